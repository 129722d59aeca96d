"""The proven bounds: they hold on trained and on adversarial layers, they are useful, and a broken one is noticed."""

import copy
import itertools
import math
import threading

import pytest
import timm
import torch
from oracles import BOUND, CASES, every_layer, make, truth
from torch import Tensor, nn

from pcdeq_zoo import (
    ACTIVATIONS,
    ConvergenceError,
    ConvergenceWarning,
    PcDEQConv2d,
    PcDEQLinear,
    Solution,
    Solver,
    Status,
    enclosure,
    solve,
)
from pcdeq_zoo.certificate import error_bound, find_witness, rounded_up, rounding_error
from pcdeq_zoo.compat import Switch, precision_switches
from pcdeq_zoo.data import normalize
from pcdeq_zoo.maps import EquilibriumMap
from pcdeq_zoo.operators import Convolution, Dense, full_precision
from pcdeq_zoo.weights import Checkpoint, checkpoints

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


def assert_holds(solution: Solution, z: Tensor) -> None:
    """Every unit of the true equilibrium z, (N, n), is where the solution proves it to be."""
    assert (solution.lower.double().cpu().flatten(1) <= z).all()
    assert (z <= solution.upper.double().cpu().flatten(1)).all()


@every_layer
@every_input
@pytest.mark.parametrize("norm", [0.1, 0.9, 10.0, 50.0])
def test_certified_solves_contain_the_equilibrium(
    kind: str, activation: str, norm: float, input_name: str, device: torch.device
):
    layer, x = adversarial(kind, activation, norm, input_name)
    z = truth(layer, x)
    solution = layer.to(device).solve(x.to(device))
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_witness_makes_the_map_a_contraction(kind: str, activation: str, norm: float, dtype: torch.dtype):
    """Fact 2 with the witnesses of fact 3, near the equilibrium on either side, in products of either precision."""
    layer, u = make(kind, activation, norm)
    exact = layer.fixed_point_map(u)
    step, equilibrium = copy.deepcopy(layer).to(dtype).fixed_point_map(u.to(dtype)), truth(layer, u).view_as(exact.x)
    z = (equilibrium * (1 + 1e-3 * torch.randn_like(exact.x))).clamp(0, BOUND[activation]).to(dtype)
    p = step.argument(z)
    witness = find_witness(step, z, p, step.apply(p))
    assert witness.found.all()
    base, w, rate = (t.double() for t in (witness.base, witness.w, witness.rate))
    assert (base <= equilibrium).all()
    pairs = [[torch.maximum(torch.rand_like(w) * BOUND[activation], base) for _ in range(2)] for _ in range(50)]
    for y, z in [*pairs, [base, base + 1e-3 * w]]:
        distance = ((y - z).abs() / w).flatten(1).amax(1)
        image = ((exact(y) - exact(z)).abs() / w).flatten(1).amax(1)
        rounding = (2**-52 * exact(y) / w).flatten(1).amax(1)  # of these two, where units are saturated
        assert (image <= rate * distance * (1 + 1e-9) + rounding).all()
    # Next to the base the rate is what it says, but for the margin of saturated units.
    assert (image >= 0.9 * rate * distance)[rate > 0.01].all()


@every_layer
def test_a_point_too_far_above_has_no_witness(kind: str, activation: str):
    layer, u = make(kind, activation, 0.3)
    step = layer.fixed_point_map(u)
    z = torch.full_like(step.x, BOUND[activation])
    p = step.argument(z)
    witness = find_witness(step, z, p, step.apply(p))
    assert not witness.found.any()
    assert (witness.base == 0).all()


def test_a_unit_at_0_without_neighbours_is_no_failure():
    """An extrapolation may leave it there: its w is 0, which is no witness, and no NaN either."""
    layer = PcDEQLinear(2, "sigmoid", solver=Solver(stop="certified"))
    layer.set_weight(torch.tensor([[0.5, 0.5], [0.0, 0.0]]))
    step = layer.fixed_point_map(torch.tensor([[1.0, -1.0]]))
    pair = step.pair(torch.zeros(1, 2))
    witness = find_witness(step, pair.z0, pair.p1, pair.z1)
    assert not witness.found.any()
    assert error_bound(step, pair, witness, 1e-3).isinf().all()


@every_layer
def test_the_rate_of_plain_iterates_never_rises(kind: str, activation: str):
    """q_k = max d_k / d_{k−1}, by concavity."""
    layer, u = make(kind, activation, 3.0)
    step = layer.fixed_point_map(u)
    iterates = [torch.zeros_like(step.x)]
    for _ in range(12):
        iterates.append(step(iterates[-1]))
    changes = [new - old for old, new in itertools.pairwise(iterates)]
    rates = [torch.where(old > 1e-9, new / old, 0).flatten(1).amax(1) for old, new in itertools.pairwise(changes)]
    for old, new in itertools.pairwise(rates):
        assert (new <= old * (1 + 1e-5)).all()


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("norm", [1.0, 50.0, 1000.0])
def test_sigmoid_keeps_to_its_budget(kind: str, norm: float):
    """ε_k ≤ 2^−k for any W ≥ 0 and x ≥ 0, so 14 plain evaluations reach 1e-4; here the error is computed."""
    layer, x = adversarial(kind, "sigmoid", norm, "usual")
    z, step = truth(layer, x), layer.fixed_point_map(x).double()
    iterate = torch.zeros_like(step.x)
    for k in range(1, 15):
        iterate = step(iterate)
        assert ((z - iterate.flatten(1)) / z).max() <= 2.0**-k + 1e-12
    assert ((z - iterate.flatten(1)) / z).max() <= 1e-4


# The second is below what γ, amplified, lets float32 prove by itself.
@pytest.mark.parametrize("tol", [1e-3, pytest.param(2e-4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("checkpoint", checkpoints().values(), ids=list(checkpoints()))
def test_bounds_hold_on_the_checkpoints(checkpoint: Checkpoint, tol: float, sample):
    dataset = checkpoint.variant.dataset
    model = timm.create_model(checkpoint.name, pretrained=True, stop="certified", tol=tol, on_failure="raise").eval()
    count = {"l": 64, "mc": 16, "sc": 4}[checkpoint.variant.structure]  # wide layers take their time in float64
    images = torch.randn(count, *dataset.input_size)
    if dataset.name == "mnist":
        images = normalize(sample[0][:count], dataset)
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
        lower, upper = enclosure(layer, u, tol=1e-10)
        assert (upper - lower <= 1e-10 * lower).all()
        assert (solution.lower.double() <= lower).all()
        assert (upper <= solution.upper.double()).all()


@pytest.mark.parametrize(("bound", "shown"), [(1.0001e-3, 1.01e-3), (9.995e-4, 1e-3), (1e-3, 1e-3), (0.5, 0.5)])
def test_bounds_are_shown_rounded_up(bound: float, shown: float):
    assert rounded_up(bound, 3) == shown >= bound
    assert rounded_up(math.inf, 3) == math.inf


@every_layer
def test_nothing_is_proven_of_an_input_that_is_none(kind: str, activation: str):
    layer, x = make(kind, activation, dtype=torch.float32, stop="certified", tol=1e-3, on_failure="ignore")
    x[1].view(-1)[0] = torch.nan
    solution = layer.solve(x)
    assert solution.bound.isinf().tolist() == [False, True, False, False]
    assert (solution.lower[1] == 0).all()
    assert (solution.upper[1] == torch.inf).all()


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_an_exact_evaluation_goes_where_the_rounding_bound_does_not(activation: str, monkeypatch):
    """At a tolerance next to float32's own errors; and without it there is no proof."""
    layer, x = make("conv", activation, 0.9, torch.float32, stop="certified", tol=3e-5, on_failure="ignore")
    solution = layer.solve(x)
    assert solution.converged.all()
    assert_holds(solution, truth(layer, x))
    monkeypatch.setattr("pcdeq_zoo.certificate.rounding_error", lambda map_, worst_case: 0.0 if worst_case else 1e-4)
    assert_holds(layer.solve(x), truth(layer, x))
    assert layer.solve(x).converged.all()
    monkeypatch.setattr(EquilibriumMap, "double", lambda step: lambda z: torch.full_like(z, torch.inf))
    assert not layer.solve(x).converged.any()


@pytest.mark.parametrize("activation", ["relu6", "tanh", "softsign"])
def test_a_chain_of_units_is_certified(activation: str):
    """Each unit lives off the one before, almost linearly: relative to itself, g contracts it by 1e-8 only."""
    layer = PcDEQLinear(4, activation, solver=Solver(tol=1e-4, stop="certified", on_failure="raise"))
    weight = torch.diag(torch.full((3,), 1e-2), -1)
    layer.set_weight(weight)
    x = torch.tensor([[1.0, -4.0, -4.0, -4.0]])
    solution = layer.solve(x)
    assert solution.evaluations.item() <= 8
    assert_holds(solution, truth(layer, x))


@every_layer
@pytest.mark.parametrize("norm", [1e6, 1e12, 1e18])
def test_a_huge_weight_is_certified_in_float32(kind: str, activation: str, norm: float):
    """All units are saturated, and slopes next to 0 times W next to infinity are next to nothing."""
    layer, u = make(kind, activation, norm, torch.float32, tol=1e-4, stop="certified")
    solution = layer.solve(u)
    assert solution.converged.all()
    assert solution.evaluations.max() <= 8
    lower, upper = enclosure(layer, u)
    assert (solution.lower.double() <= lower).all()
    assert (upper <= solution.upper.double()).all()


@pytest.mark.parametrize("weight", [0.3, 0.5765])
def test_bounds_hold_at_the_corner_of_relu6(weight: float):
    """Equilibria just below 6, where computed iterates are at 6 and g looks flat."""
    layer = PcDEQLinear(1, "relu6", solver=Solver(tol=1e-2, stop="certified", on_failure="ignore"))
    layer.set_weight(torch.full((1, 1), weight))
    x = 6 * (1 - weight) * (1 + torch.linspace(-1e-6, 1e-6, 500, dtype=torch.float64)[:, None])
    u = (torch.log(torch.expm1(5 * x)) / 5).float()
    solution, z = layer.solve(u), enclosure(layer, u, tol=1e-14)
    assert (solution.lower.double() <= z.upper).all()
    assert (z.lower <= solution.upper.double()).all()
    assert (solution.value == 6)[z.upper < 6].any()  # the case is there


CONV, MATMUL = precision_switches()[:2]
if MATMUL.exact != "ieee":  # before PyTorch 2.9: one switch for both, and one of cuDNN
    MATMUL = CONV
BFLOAT16 = "bf16" if MATMUL.exact == "ieee" else "medium"


def position(switch: Switch) -> str:
    return getattr(switch.owner, switch.name)


@pytest.fixture(params=["set_float32_matmul_precision", "each"])
def bfloat16_switched_on(request, monkeypatch):
    """PyTorch is told that float32 products may be bfloat16's, and obeys, as on a CPU with AMX."""

    def emulated(exact, switch):
        def product(self, z: Tensor) -> Tensor:
            if z.dtype == torch.float32 and position(switch) == BFLOAT16:
                return exact(type(self)(self.weight.bfloat16().float()), z.bfloat16().float())
            return exact(self, z)

        return product

    monkeypatch.setattr(Dense, "__call__", emulated(Dense.__call__, MATMUL))
    monkeypatch.setattr(Convolution, "__call__", emulated(Convolution.__call__, CONV))
    before = position(CONV), position(MATMUL)
    if request.param == "each":
        for switch in (CONV, MATMUL):
            setattr(switch.owner, switch.name, BFLOAT16)
    else:
        torch.set_float32_matmul_precision("medium")
    assert position(MATMUL) == BFLOAT16
    yield
    torch.set_float32_matmul_precision("highest")
    for switch, value in zip((CONV, MATMUL), before, strict=True):
        setattr(switch.owner, switch.name, value)


@every_layer
@pytest.mark.parametrize("autocast", [False, True], ids=["switches", "autocast"])
def test_what_is_proven_is_proven_in_full_precision(kind: str, activation: str, autocast: bool, bfloat16_switched_on):
    """Whatever autocast and the switches say; and these are as they were when the solve is over, however it ends."""
    layer, x = adversarial(kind, activation, 10.0, "usual")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        solutions = [layer.solve(x), solve(layer.fixed_point_map(x), stop="certified")]
    for solution in solutions:
        assert solution.converged.all()
        assert solution.value.dtype == x.dtype
        assert_holds(solution, truth(layer, x))
    assert position(MATMUL) == BFLOAT16
    layer.solver.max_evals, layer.solver.on_failure = 2, "raise"
    with pytest.raises(ConvergenceError):
        layer(x)
    assert position(MATMUL) == BFLOAT16
    step, z = layer.fixed_point_map(x), torch.rand_like(layer.fixed_point_map(x).x)
    outside = step.operator(z)
    with full_precision(x.device):
        inside = step.operator(z)
    if kind == "linear" or position(CONV) == BFLOAT16:
        assert not torch.equal(outside, inside)  # the emulation is one


@pytest.mark.skipif(MATMUL.exact != "ieee", reason="switches have parents since PyTorch 2.9")
@pytest.mark.parametrize("explicit", [False, True])
def test_a_switch_that_follows_its_parent_goes_on_to(explicit: bool):
    """Precision that is turned on globally, and off again after a solve, is off; what was set by itself stays."""
    before = torch.backends.fp32_precision
    try:
        if explicit:
            setattr(MATMUL.owner, MATMUL.name, "bf16")
        else:
            torch.backends.fp32_precision = "bf16"
        assert position(MATMUL) == "bf16"
        PcDEQLinear(4)(torch.randn(2, 4))
        assert position(MATMUL) == "bf16"
        torch.backends.fp32_precision = "ieee"
        assert position(MATMUL) == ("bf16" if explicit else "ieee")
    finally:
        torch.backends.fp32_precision = before
        setattr(MATMUL.owner, MATMUL.name, "none")


def test_full_precision_of_two_threads_that_overlap():
    """The first one leaves while the second is inside: products stay exact until that leaves too."""
    before = position(MATMUL)
    setattr(MATMUL.owner, MATMUL.name, BFLOAT16)
    entered, left, seen = threading.Event(), threading.Event(), []

    def second() -> None:
        with full_precision(torch.device("cpu")):
            entered.set()
            left.wait()
            seen.append(position(MATMUL))

    thread = threading.Thread(target=second)
    try:
        with full_precision(torch.device("cpu")):
            thread.start()
            entered.wait()
        left.set()
        thread.join()
        assert seen == [MATMUL.exact]
        assert position(MATMUL) == BFLOAT16
    finally:
        setattr(MATMUL.owner, MATMUL.name, before)


def test_a_broken_bound_is_noticed(monkeypatch):
    """The tests above would see a bound that is too small, here by a factor."""
    monkeypatch.setattr("pcdeq_zoo.solver.error_bound", lambda *args: error_bound(*args) / 300)
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
    layer = PcDEQLinear(4, "tanh", solver=Solver(stop="estimated"))
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


def test_the_worst_case_is_worse_than_the_probable():
    step = PcDEQLinear(100).fixed_point_map(torch.zeros(1, 100))
    assert rounding_error(step, worst_case=False) < rounding_error(step, worst_case=True)
    assert rounding_error(step.double(), worst_case=True) < 1e-13


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_an_input_without_an_equilibrium_has_no_enclosure(bad: float):
    x = torch.zeros(2, 4)
    x[1, 2] = bad
    with pytest.raises(ValueError, match="the input has 1 entries that are NaN or infinite, and so no equilibrium"):
        enclosure(PcDEQLinear(4), x)


def test_an_enclosure_is_of_a_layer():
    with pytest.raises(TypeError, match="enclosure takes a pcDEQ layer and its input, got a Sequential"):
        enclosure(nn.Sequential(PcDEQLinear(2)), torch.zeros(1, 2))


def test_a_certificate_is_for_the_map_of_a_layer_only():
    """Of any other step it would prove something false."""
    with pytest.raises(ValueError, match=r"takes the map of a pcDEQ layer, layer.fixed_point_map\(u\)"):
        solve(lambda z: 0.5 * z + 1, torch.ones(2, 3), stop="certified")
    layer, x = adversarial("linear", "tanh", 3.0, "usual")
    assert_holds(solve(layer.fixed_point_map(x), stop="certified", tol=1e-3), truth(layer, x))


def test_float64_proves_no_more_than_it_can():
    """z² + x z = x for w = 1 and softsign: near-critical for small x, so that rounding is amplified."""
    layer = PcDEQLinear(1, "softsign", solver=Solver(1e-14, 20000, "certified", "ignore"), dtype=torch.float64)
    layer.set_weight(torch.ones(1, 1))
    solution = layer.solve(torch.full((1, 1), -3.0, dtype=torch.float64))
    x = math.log1p(math.exp(-15)) / 5
    exact = (math.sqrt(x * x + 4 * x) - x) / 2
    assert abs(solution.value.item() / exact - 1) <= solution.bound.item()


def test_nothing_is_enclosed_of_a_weight_that_is_none():
    layer = PcDEQLinear(2)
    layer.direction.data[0, 1] = math.nan
    with pytest.raises(ValueError, match="W has 2 entries that are NaN"):
        enclosure(layer, torch.zeros(1, 2))
