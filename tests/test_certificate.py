"""The proven bounds: they hold on trained and on adversarial layers, they are useful, and a broken one is noticed."""

import itertools

import pytest
import timm
import torch
from test_layers import BOUND, CASES, dense, every_layer, input_map, make, newton
from torch import Tensor, nn

from pcdeq_zoo import (
    ACTIVATIONS,
    VARIANTS,
    ConvergenceWarning,
    PcDEQConv2d,
    PcDEQLinear,
    Solution,
    Solver,
    Status,
    enclosure,
)
from pcdeq_zoo.certificate import Certificate, rounding_error
from pcdeq_zoo.data import normalize
from pcdeq_zoo.weights import results

# Inputs to a layer that push it to its limits, by name: applied to a standard normal one.
INPUTS = {
    "usual": lambda x: x,
    "saturated": lambda x: 20 * x.abs(),
    "tiny": lambda x: -4 - x.abs(),  # softplus of it is about 1e-10
    "mixed": lambda x: torch.where(x > 0, 30 * x, 3 * x),
}
every_input = pytest.mark.parametrize("input_name", INPUTS)


def adversarial(kind: str, activation: str, norm: float, input_name: str) -> tuple[nn.Module, Tensor]:
    """A float32 layer with random, partly zero W of that spectral norm, and a batch of inputs."""
    layer, x = make(kind, activation, norm, torch.float32, stop="certified", tol=1e-3, max_evals=2000)
    return layer, INPUTS[input_name](torch.randn(16, *x.shape[1:]))


def truth(layer: nn.Module, x: Tensor) -> Tensor:
    """The equilibrium in float64 by dense Newton steps, shape (N, n)."""
    exact = x.double()
    return newton(
        dense(layer, exact, layer.weight.double()).detach(), input_map(layer, exact).flatten(1), layer.activation
    )


def assert_holds(solution: Solution, z: Tensor) -> None:
    """Every unit of the true equilibrium z, (N, n), is where the solution proves it to be."""
    assert (solution.lower.double().flatten(1) <= z).all()
    assert (z <= solution.upper.double().flatten(1)).all()


@every_layer
@every_input
@pytest.mark.parametrize("norm", [0.1, 0.9, 10.0, 50.0])
def test_certified_solves_contain_the_equilibrium(kind: str, activation: str, norm: float, input_name: str):
    layer, x = adversarial(kind, activation, norm, input_name)
    z = truth(layer, x)
    solution = layer.solve(x)
    assert solution.converged.all(), solution.failure()
    assert (solution.bound <= layer.solver.tol).all()
    assert_holds(solution, z)


@every_layer
@every_input
@pytest.mark.parametrize("norm", [0.1, 0.9, 10.0, 50.0])
def test_enclosures_contain_the_equilibrium_and_are_tight(kind: str, activation: str, norm: float, input_name: str):
    layer, x = adversarial(kind, activation, norm, input_name)
    z, (lower, upper) = truth(layer, x), enclosure(layer, x)
    lower, upper = lower.flatten(1), upper.flatten(1)
    # The oracle has rounding errors of its own, the bounds have none.
    assert (lower <= z * (1 + 1e-12)).all()
    assert (z * (1 - 1e-12) <= upper).all()
    assert (upper - lower <= 2e-9 * lower).all()


@every_layer
def test_an_enclosure_holds_however_early_it_stops(kind: str, activation: str):
    layer, x = adversarial(kind, activation, 10.0, "usual")
    z = truth(layer, x)
    previous = None
    for evaluations in range(1, 8):
        lower, upper = enclosure(layer, x, max_evals=evaluations)
        assert (lower.flatten(1) <= z).all()
        assert (z <= upper.flatten(1)).all()
        if previous is not None:
            assert (lower >= previous.lower).all()
            assert (upper <= previous.upper).all()
        previous = enclosure(layer, x, max_evals=evaluations)


@every_layer
@pytest.mark.parametrize("norm", [0.5, 3.0, 30.0])
@pytest.mark.parametrize("fact", [3, 4])
def test_the_weights_make_the_map_a_contraction(kind: str, activation: str, norm: float, fact: int):
    """Fact 2 with the weights of facts 3 and 4: for any y, z above the base, random or next to it."""
    layer, x = make(kind, activation, norm)
    weight, x = layer._arrange_weight(layer.weight), layer._input_map(layer._arrange(x))
    certificate = Certificate(
        product=lambda w: layer._map(w, weight),
        x=x,
        evaluate=ACTIVATIONS[activation].evaluate,
        derivative=ACTIVATIONS[activation].derivative,
        rounding=rounding_error(weight[0].numel(), x, worst_case=False),
        exact=lambda rows, z: layer._step(z, weight, x[rows]),
    )
    a = layer.sigma(x)
    for _ in range(50):
        b = certificate.step(a)
        new = certificate.step(b)
        # Without a change before, there are no weights of fact 3.
        certificate(b, new, new - b, b - a if fact == 3 else torch.full_like(a, torch.nan), 1e-3)
        if certificate.ready.all():
            break
        a = new
    assert certificate.ready.all()
    weights, base = certificate._weights, certificate._base
    rate = certificate._amplification / (1 + certificate._amplification)  # of q / (1 − q)
    pairs = [[torch.maximum(torch.rand_like(x) * BOUND[activation], base) for _ in range(2)] for _ in range(50)]
    for y, z in [*pairs, [base, base + 1e-3 * weights]]:
        distance = ((y - z).abs() / weights).flatten(1).amax(1)
        image = ((layer._step(y, weight, x) - layer._step(z, weight, x)).abs() / weights).flatten(1).amax(1)
        assert (image <= rate * distance * (1 + 1e-9)).all()
    # Next to the base the rate is what it says, but for the margin of saturated units.
    assert (image >= 0.9 * rate * distance)[rate > 0.01].all()


@every_layer
def test_the_rate_of_plain_iterates_never_rises(kind: str, activation: str):
    """q_k = max d_k / d_{k−1}, by concavity."""
    layer, x = make(kind, activation, 3.0)
    weight, x = layer._arrange_weight(layer.weight), layer._input_map(layer._arrange(x))
    iterates = [torch.zeros_like(x)]
    for _ in range(12):
        iterates.append(layer._step(iterates[-1], weight, x))
    changes = [new - old for old, new in itertools.pairwise(iterates)]
    rates = [torch.where(old > 1e-9, new / old, 0).flatten(1).amax(1) for old, new in itertools.pairwise(changes)]
    for old, new in itertools.pairwise(rates):
        assert (new <= old * (1 + 1e-5)).all()


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("norm", [1.0, 50.0, 1000.0])
def test_sigmoid_keeps_to_its_budget(kind: str, norm: float):
    """ε_k ≤ 2^−k for any W ≥ 0 and x ≥ 0, so 14 plain evaluations reach 1e-4; here the error is computed."""
    layer, x = adversarial(kind, "sigmoid", norm, "usual")
    z, weight = truth(layer, x), layer._arrange_weight(layer.weight.double())
    u = layer._input_map(layer._arrange(x.double()))
    iterate = torch.zeros_like(u)
    for k in range(1, 15):
        iterate = layer._step(iterate, weight, u)
        assert ((z - iterate.flatten(1)) / z).max() <= 2.0**-k + 1e-12
    assert ((z - iterate.flatten(1)) / z).max() <= 1e-4


@pytest.mark.parametrize("tol", [1e-3, 2e-4])  # the latter is below what γ, amplified, lets float32 prove by itself
@pytest.mark.parametrize("checkpoint", list(results()))
def test_bounds_hold_on_the_checkpoints(checkpoint: str, tol: float, sample):
    dataset = VARIANTS[checkpoint.split(".")[0]].dataset
    model = timm.create_model(checkpoint, pretrained=True, tol=tol, on_failure="raise").eval()
    images = normalize(sample[0][:64], dataset) if dataset.name == "mnist" else torch.randn(16, *dataset.input_size)
    solved = []
    layers = [layer for layer in model.modules() if isinstance(layer, PcDEQLinear | PcDEQConv2d)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, inputs: solved.append((layer, inputs[0].clone())))
    with torch.no_grad():
        model(images)
    assert len(solved) == len(layers)
    for layer, u in solved:
        solution = layer.solve(u)
        assert (solution.bound <= tol).all()
        lower, upper = (bound.view_as(solution.value) for bound in enclosure(layer, u, tol=1e-10))
        assert (upper - lower <= 1e-10 * lower).all()
        assert (solution.lower.double() <= lower).all()
        assert (upper <= solution.upper.double()).all()


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_an_exact_evaluation_goes_where_the_rounding_bound_does_not(activation: str, monkeypatch):
    """At a tolerance next to float32's own errors; and without it there is no proof."""
    layer, x = make("conv", activation, 0.9, torch.float32, stop="certified", tol=3e-5, on_failure="ignore")
    solution = layer.solve(x)
    assert solution.converged.all()
    assert_holds(solution, truth(layer, x))
    monkeypatch.setattr("pcdeq_zoo.layers.rounding_error", lambda *args, **kwargs: 1e-4)
    assert_holds(layer.solve(x), truth(layer, x))
    assert layer.solve(x).converged.all()
    monkeypatch.setattr(Certificate, "__init__", _without_exact(Certificate.__init__))
    assert not layer.solve(x).converged.any()


def _without_exact(init):
    def patched(self, **kwargs):
        init(self, **kwargs | {"exact": lambda rows, z: torch.full_like(z, torch.inf, dtype=torch.float64)})

    return patched


@pytest.mark.parametrize("activation", ["relu6", "tanh", "softsign"])
def test_a_chain_of_units_is_certified(activation: str):
    """Each unit lives off the one before, almost linearly: relative to itself, g contracts it by 1e-8 only."""
    layer = PcDEQLinear(4, activation, Solver(tol=1e-4, on_failure="raise"))
    weight = torch.diag(torch.full((3,), 1e-2), -1)
    with torch.no_grad():
        layer.weight_v.copy_(weight)
        layer.weight_g.copy_(torch.linalg.vector_norm(weight, dim=1, keepdim=True))
    x = torch.tensor([[1.0, -4.0, -4.0, -4.0]])
    solution = layer.solve(x)
    assert solution.evaluations.item() <= 6
    assert_holds(solution, truth(layer, x))


@pytest.mark.parametrize("weight", [0.3, 0.5765])  # bfloat16 rounds these up
def test_bounds_hold_at_the_corner_of_relu6_and_with_coarse_products(weight: float, monkeypatch):
    """Equilibria just below 6, where computed iterates are at 6 and g looks flat."""
    monkeypatch.setattr(PcDEQLinear, "_map", _coarse_map)
    torch.set_float32_matmul_precision("medium")
    try:
        layer = PcDEQLinear(1, "relu6", Solver(tol=1e-2, on_failure="ignore"))
        with torch.no_grad():
            layer.weight_v.fill_(weight)
            layer.weight_g.fill_(weight)
        x = 6 * (1 - weight) * torch.linspace(0.97, 1.01, 500)[:, None]
        u = torch.log(torch.expm1(5 * x.double())).float() / 5
        solution, z = layer.solve(u), enclosure(layer, u, tol=1e-12)
        assert (solution.lower.double() <= z.upper).all()
        assert (z.lower <= solution.upper.double()).all()
        assert (solution.value == 6).sum() > (z.upper == 6).sum()  # the case is there
    finally:
        torch.set_float32_matmul_precision("highest")


def _coarse_map(self, z: Tensor, weight: Tensor) -> Tensor:
    if z.dtype == torch.float64:
        return nn.functional.linear(z, weight)
    return nn.functional.linear(z.bfloat16().float(), weight.bfloat16().float())


def test_a_broken_bound_is_noticed(monkeypatch):
    """The tests above would see a bound that is too small, here by a factor."""
    honest = Certificate.__call__
    monkeypatch.setattr(Certificate, "__call__", lambda *args: honest(*args) / 300)
    noticed = 0
    for kind, activation in CASES:
        layer, x = adversarial(kind, activation, 10.0, "usual")
        z, solution = truth(layer, x), layer.solve(x)
        try:
            assert_holds(solution, z)
        except AssertionError:
            noticed += 1
    assert noticed >= len(CASES) // 2


def test_a_tolerance_below_the_rounding_error_is_told():
    layer, x = adversarial("linear", "tanh", 3.0, "usual")
    layer.solver.tol, layer.solver.max_evals = 1e-7, 60
    with pytest.warns(ConvergenceWarning, match="tol if float precision is the limit"):
        layer(x)
    solution = layer.solve(x)
    assert (solution.status == Status.MAX_EVALUATIONS).all()
    assert_holds(solution, truth(layer, x))  # what is proven still holds


def test_nothing_is_proven_by_other_stops():
    layer = PcDEQLinear(4, "tanh", Solver(stop="estimated"))
    solution = layer.solve(torch.randn(3, 4))
    assert solution.converged.all()
    assert solution.bound.isinf().all()
    assert (solution.lower == 0).all()
    assert solution.upper.isinf().all()


def test_memory_order_and_dtype_of_an_enclosure():
    layer = PcDEQConv2d(3, "tanh")
    lower, upper = enclosure(layer, torch.randn(2, 3, 5, 5))
    assert lower.dtype == upper.dtype == torch.float64
    assert lower.shape == upper.shape == (2, 3, 5, 5)


@every_layer
def test_certified_alone_as_in_a_batch(kind: str, activation: str):
    layer, _ = adversarial(kind, activation, 3.0, "usual")
    shape = (64, 12) if kind == "linear" else (64, 3, 5, 4)
    x = torch.randn(shape) * torch.logspace(-2, 1, 64).view(-1, *[1] * (len(shape) - 1))
    batch = layer.solve(x)
    mates = x.clone()
    mates[:32] = 5 * torch.randn_like(mates[:32])
    again = layer.solve(mates)
    assert torch.equal(again.value[32:], batch.value[32:])
    assert torch.equal(again.evaluations[32:], batch.evaluations[32:])
    for i in range(0, 64, 9):
        torch.testing.assert_close(layer.solve(x[i : i + 1]).value[0], batch.value[i], rtol=1e-4, atol=1e-7)


def test_reduced_precision_products_widen_the_bound():
    like = torch.zeros(1)
    exact = rounding_error(100, like, worst_case=False)
    torch.set_float32_matmul_precision("medium")
    try:
        assert rounding_error(100, like, worst_case=False) > 1000 * exact
    finally:
        torch.set_float32_matmul_precision("highest")
    assert exact < rounding_error(100, like, worst_case=True)
