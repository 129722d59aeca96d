"""The layers against mathematics: independent oracles in float64, and the limits of float32."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pcdeq_zoo import ACTIVATIONS, ConvergenceWarning, PcDEQConv2d, PcDEQLinear, Solver, Status, solve

BOUND = {"relu6": 6.0, "tanh": 1.0, "softsign": 1.0, "sigmoid": 1.0}
SIGMA = {"relu6": F.relu6, "tanh": torch.tanh, "softsign": F.softsign, "sigmoid": torch.sigmoid}

CASES = [(kind, activation) for kind in ("linear", "conv") for activation in ACTIVATIONS]
every_layer = pytest.mark.parametrize(("kind", "activation"), CASES, ids=["-".join(case) for case in CASES])


def make(kind: str, activation: str, norm: float = 3.0, dtype: torch.dtype = torch.float64, **solver):
    """A layer with random W of spectral norm `norm`, solved as far as the precision allows, and a random input."""
    tol = 1e-14 if dtype == torch.float64 else 1e-6
    settings = Solver(**{"tol": tol, "max_evals": 5000, "stop": "residual", **solver})
    if kind == "linear":
        layer, x = PcDEQLinear(12, activation, settings, dtype=dtype), torch.randn(4, 12, dtype=dtype)
    else:
        layer, x = PcDEQConv2d(3, activation, solver=settings, dtype=dtype), torch.randn(4, 3, 5, 4, dtype=dtype)
    with torch.no_grad():
        layer.weight_v.uniform_().masked_fill_(torch.rand_like(layer.weight_v) < 0.2, 0)
        layer.weight_g.uniform_(0.5, 1)
        layer.weight_g.mul_(norm / torch.linalg.matrix_norm(dense(layer, x), 2))
    return layer, x


def dense(layer: nn.Module, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """W as a matrix on one flattened sample, column by column."""
    weight = layer.weight if weight is None else weight
    if isinstance(layer, PcDEQLinear):
        return weight
    n = x[0].numel()
    units = torch.eye(n, dtype=x.dtype).view(n, *x.shape[1:])
    return F.conv2d(units, weight, padding=layer.padding).flatten(1).T


def input_map(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.logaddexp(5 * x, x.new_zeros(())) / 5 if layer.kind == 1 else F.relu(x)


def derivative(activation: str, pre: Tensor) -> Tensor:
    with torch.enable_grad():
        pre = pre.detach().requires_grad_()
        (d,) = torch.autograd.grad(SIGMA[activation](pre).sum(), pre)
    return d


def newton(matrix: Tensor, u: Tensor, activation: str) -> Tensor:
    """Equilibrium of samples u (N, n) by dense Newton steps from the upper bound; as σ is concave they fall to z*.

    Shares nothing with the package: no iteration of the map, no stopping rule, σ′ by autograd.
    """
    z = torch.full_like(u, BOUND[activation])
    eye = torch.eye(u.shape[1], dtype=u.dtype)
    for _ in range(60):
        pre = z @ matrix.T + u
        jacobian = derivative(activation, pre)[:, :, None] * matrix
        z = z - torch.linalg.solve(eye - jacobian, (z - SIGMA[activation](pre))[:, :, None])[:, :, 0]
    assert (SIGMA[activation](z @ matrix.T + u) - z).abs().max() < 1e-13
    return z


@every_layer
@pytest.mark.parametrize("norm", [0.1, 1.0, 10.0, 50.0])
def test_equilibrium_is_the_oracles_from_any_start(kind: str, activation: str, norm: float):
    layer, x = make(kind, activation, norm)
    matrix, u = dense(layer, x).detach(), input_map(layer, x)
    truth = newton(matrix, u.flatten(1), activation)
    with torch.no_grad():
        torch.testing.assert_close(layer(x).flatten(1), truth, rtol=1e-10, atol=1e-14)
    for _ in range(20):
        start = torch.rand_like(truth) * 10 ** torch.empty(1).uniform_(-3, 2).item()
        found = solve(lambda z: SIGMA[activation](z @ matrix.T + u.flatten(1)), start, tol=1e-14, max_evals=5000)
        torch.testing.assert_close(found.value, truth, rtol=1e-10, atol=1e-14)


@every_layer
def test_plain_iterates_rise_to_the_equilibrium(kind: str, activation: str):
    layer, x = make(kind, activation)
    final, u, weight = layer.solve(x).value, layer._input_map(layer._arrange(x)), layer._arrange_weight(layer.weight)
    previous = torch.zeros_like(final)
    for _ in range(30):
        iterate = layer._step(previous, weight, u)
        assert (iterate >= previous - 1e-14).all()
        assert (iterate <= final + 1e-12).all()
        previous = iterate


@every_layer
def test_gradient_is_the_implicit_function_theorems(kind: str, activation: str):
    """x, v and g against a dense solve of (I − DW)ᵀ a = D ∂L/∂z, chained by autograd through an explicit W(v, g)."""
    layer, x = make(kind, activation)
    x.requires_grad_()
    loss_weight = torch.randn(x.shape, dtype=x.dtype)
    (layer(x) * loss_weight).sum().backward()
    got = x.grad, layer.weight_v.grad, layer.weight_g.grad

    v, g = (p.detach().clone().requires_grad_() for p in (layer.weight_v, layer.weight_g))
    leaf = x.detach().clone().requires_grad_()
    matrix = dense(layer, x, g * v / v.flatten(1).norm(dim=1).view(g.shape))
    u = input_map(layer, leaf).flatten(1)
    z = newton(matrix.detach(), u.detach(), activation)
    d = derivative(activation, z @ matrix.detach().T + u.detach())
    system = torch.eye(z.shape[1], dtype=z.dtype) - d[:, :, None] * matrix.detach()
    a = d * torch.linalg.solve(system.mT, loss_weight.flatten(1)[:, :, None])[:, :, 0]
    (a * (z @ matrix.T + u)).sum().backward()
    for mine, theirs in zip(got, (leaf.grad, v.grad, g.grad), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@every_layer
def test_gradient_is_that_of_finite_differences(kind: str, activation: str):
    layer, x = make(kind, activation)
    x = x[:2].clone().requires_grad_()

    def f(x: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight_v": v, "weight_g": g}, (x,))

    v = (layer.weight_v.detach() + 0.1).requires_grad_()  # away from the kink of the projection
    g = layer.weight_g.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(f, (x, v, g), eps=1e-6, atol=1e-6, rtol=1e-5)


@every_layer
def test_gradient_is_that_of_unrolling(kind: str, activation: str):
    layer, x = make(kind, activation)
    loss_weight = torch.randn(x.shape, dtype=x.dtype)
    implicit = torch.autograd.grad((layer(x) * loss_weight).sum(), layer.parameters())
    weight, u = layer.weight, input_map(layer, x)
    z = torch.zeros_like(x)
    for _ in range(400):
        z = F.linear(z, weight) if kind == "linear" else F.conv2d(z, weight, padding=1)
        z = SIGMA[activation](z + u)
    unrolled = torch.autograd.grad((z * loss_weight).sum(), layer.parameters())
    for mine, theirs in zip(implicit, unrolled, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@every_layer
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-9, 1e-30, 1e20, 1e36])
def test_gradient_does_not_depend_on_the_scale_of_the_loss(kind: str, activation: str, scale: float):
    layer, x = make(kind, activation, dtype=torch.float32)
    y = layer(x.requires_grad_())
    reference, scaled = (torch.autograd.grad((y * s).sum(), x, retain_graph=True)[0] for s in (1.0, scale))
    torch.testing.assert_close(scaled / scale, reference, rtol=1e-4, atol=1e-5)


class TestCounterExamples:
    """Why W ≥ 0, x ≫ 0 and z₀ ≥ 0 are there, and that the layers keep to them."""

    def scalar(self, activation: str, weight: float) -> PcDEQLinear:
        layer = PcDEQLinear(1, activation, Solver(tol=1e-6, max_evals=500, stop="residual"))
        with torch.no_grad():
            layer.weight_v.fill_(weight)
            layer.weight_g.fill_(abs(weight))
        return layer

    def test_without_positive_input_the_fixed_point_is_not_unique(self):
        ends = [solve(lambda z: F.relu6(2 * z), torch.full((1, 1), z0)).value.item() for z0 in (0.0, 0.1)]
        assert ends == [0.0, 6.0]

    def test_the_input_map_keeps_it_unique(self):
        # softplus(-1000) is 0 in any precision; the floor leaves the equilibrium 6 only.
        assert self.scalar("relu6", 2)(torch.tensor([[-1000.0]])).item() == 6.0

    def test_without_nonnegative_start_there_is_another_fixed_point(self):
        ends = [solve(lambda z: torch.tanh(3 * z + 0.05), torch.full((1, 1), z0)).value.item() for z0 in (-1.0, 1.0)]
        assert ends[0] < 0 < ends[1]
        x = torch.tensor([[math.log(math.expm1(5 * 0.05)) / 5]])  # softplus(x, β = 5) = 0.05
        assert self.scalar("tanh", 3)(x).item() == pytest.approx(ends[1], rel=1e-4)

    def test_with_a_negative_weight_the_iteration_cycles(self):
        solution = solve(lambda z: torch.sigmoid(-12 * z + 6.5), torch.full((1, 1), 0.3))
        assert solution.status.item() == Status.MAX_EVALUATIONS
        layer = self.scalar("sigmoid", -12)
        assert layer.weight.item() == 0
        assert layer(torch.tensor([[6.5]])).item() == pytest.approx(torch.sigmoid(torch.tensor(6.5)).item())


@every_layer
def test_zero_rows_are_zero_and_can_grow(kind: str, activation: str):
    layer, x = make(kind, activation, dtype=torch.float32)
    with torch.no_grad():
        layer.weight_v[1] = 0
    y = layer(x)
    y.sum().backward()
    assert (layer.weight[1] == 0).all()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert (layer.weight_v.grad[1] != 0).any()


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_and_tiny_inputs(kind: str, activation: str, dtype: torch.dtype):
    layer, x = make(kind, activation, dtype=dtype, tol=1e-6)
    largest = torch.finfo(dtype).max
    for value in (0.0, 1e-30, -1e-30, 1e5, -1e5, largest, -largest):
        solution = layer.solve(torch.full_like(x, value))
        assert solution.converged.all(), (value, solution.failure())
        assert (solution.value >= 0).all()
        assert (solution.value <= BOUND[activation]).all()


@every_layer
def test_alone_as_in_a_batch(kind: str, activation: str):
    layer, _ = make(kind, activation, dtype=torch.float32, tol=1e-4)
    shape = (64, 12) if kind == "linear" else (64, 3, 5, 4)
    x = torch.randn(shape) * torch.logspace(-2, 2, 64).view(-1, *[1] * (len(shape) - 1))
    batch = layer.solve(x)
    assert len(set(batch.evaluations.tolist())) > 1  # they really stop at different evaluations
    for i in range(0, 64, 9):
        torch.testing.assert_close(layer.solve(x[i : i + 1]).value[0], batch.value[i], rtol=2e-4, atol=1e-6)
    # To the bit, with the same arithmetic: a sample in a batch of other mates.
    mates = x.clone()
    mates[:32] = 1e3 * torch.randn_like(mates[:32])
    assert torch.equal(layer.solve(mates).value[32:], batch.value[32:])


@every_layer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_solved_in_float32(kind: str, activation: str, dtype: torch.dtype):
    layer, x = make(kind, activation, dtype=torch.float32)
    half = copy.deepcopy(layer).to(dtype)
    x = x.to(dtype)
    y = half(x.requires_grad_())
    y.sum().backward()
    assert y.dtype == x.grad.dtype == half.weight_v.grad.dtype == dtype
    # The exact layer with the rounded parameters; only the output is rounded once more.
    exact = copy.deepcopy(half).float()
    assert torch.equal(y, exact(x.detach().float()).to(dtype))


@every_layer
def test_autocast_does_not_change_the_solve(kind: str, activation: str):
    layer, x = make(kind, activation, dtype=torch.float32)
    plain = torch.autograd.grad(layer(x).sum(), layer.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    cast = torch.autograd.grad(y.sum(), layer.parameters())
    assert torch.equal(y, layer(x))
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b)


@every_layer
def test_no_grad_and_inference_mode(kind: str, activation: str):
    layer, x = make(kind, activation)
    y = layer(x)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert torch.equal(layer(x), y)
    assert torch.equal(layer.solve(x).value.reshape(y.shape), y.detach())


@every_layer
def test_checkpointing_and_twice_in_one_forward(kind: str, activation: str):
    layer, x = make(kind, activation)
    x.requires_grad_()
    wanted = torch.autograd.grad(layer(layer(x)).sum(), [x, *layer.parameters()])
    got = torch.autograd.grad(
        checkpoint(lambda x: layer(layer(x)), x, use_reentrant=False).sum(), [x, *layer.parameters()]
    )
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)

    v, g = (p.detach().clone().requires_grad_() for p in (layer.weight_v, layer.weight_g))
    weight = g * v / v.flatten(1).norm(dim=1).view(g.shape)
    y = x
    for _ in range(2):
        u, z = input_map(layer, y), torch.zeros_like(y)
        for _ in range(400):
            z = SIGMA[activation]((F.linear(z, weight) if kind == "linear" else F.conv2d(z, weight, padding=1)) + u)
        y = z
    for a, b in zip(wanted, torch.autograd.grad(y.sum(), [x, g, v]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_only_input_equilibrium_and_weight_are_saved():
    layer, u = make("linear", "tanh")
    saved = []
    weight = layer.weight.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        from pcdeq_zoo.layers import _Equilibrium

        _Equilibrium.apply(u, weight, layer)
    assert sorted(saved) == sorted([u.shape, u.shape, weight.shape])


@every_layer
def test_double_backward_raises(kind: str, activation: str):
    layer, x = make(kind, activation)
    y = layer(x.requires_grad_())
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@every_layer
def test_a_training_loop_that_knows_nothing_leaves_the_weight_nonnegative(kind: str, activation: str):
    layer, x = make(kind, activation, norm=0.5, dtype=torch.float32, tol=1e-4)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.3)  # moves every entry by about 0.3
    for _ in range(3):
        optimizer.zero_grad()
        (layer(x) * torch.randn_like(x)).sum().backward()
        optimizer.step()
    assert (layer.weight_v < 0).any()  # the optimiser did leave the orthant
    assert (layer.weight >= 0).all()
    state = layer.state_dict()
    assert all((tensor >= 0).all() for tensor in state.values())
    # A hand-made state dict, and an average of models.
    layer.load_state_dict({name: tensor - 1 for name, tensor in state.items()})
    assert (layer.weight >= 0).all()
    assert layer(x).isfinite().all()


def test_projection_does_not_change_the_function():
    layer, x = make("conv", "relu6", dtype=torch.float32)
    with torch.no_grad():
        layer.weight_v.sub_(0.3)
        before = layer(x)
    after = layer(x)
    assert (layer.weight_v >= 0).all()
    assert torch.equal(before, after)


def test_a_weight_at_zero_still_learns():
    """The projection must not be a trap: where W = 0 the gradient of the smallest increase is there."""
    layer, x = make("linear", "tanh")
    with torch.no_grad():
        layer.weight_v[:, 0] = 0
    layer(x).sum().backward()
    assert (layer.weight_v.grad[:, 0].abs() > 0).all()


def test_deepcopy_and_pickle_before_and_after_a_forward(tmp_path):
    layer, x = make("conv", "tanh")
    for _ in range(2):
        clone = copy.deepcopy(layer)
        assert torch.equal(clone(x), layer(x))
        assert clone.solver is not layer.solver
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    clone = PcDEQConv2d(3, "tanh", solver=layer.solver, dtype=torch.float64)
    clone.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert torch.equal(clone(x), layer(x))


def test_linear_layer_takes_any_sample_shape():
    layer, x = make("linear", "tanh")
    assert torch.equal(layer(x.view(4, 3, 2, 2)), layer(x).view(4, 3, 2, 2))


def test_memory_order_of_the_input_does_not_matter():
    layer, x = make("conv", "tanh")
    assert torch.equal(layer(x.contiguous(memory_format=torch.channels_last)), layer(x))


def test_unconverged_solves_are_not_silent_by_default():
    layer = PcDEQLinear(4, "tanh", Solver(tol=1e-12, max_evals=3))
    with torch.no_grad():
        layer.weight_g.fill_(1)
    with pytest.warns(ConvergenceWarning, match="raise max_evals, or tol"):
        layer(torch.randn(2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.randn(2, 4))  # said already


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: PcDEQLinear(4, "gelu"), ValueError, "activation must be one of relu6, tanh, .*, got 'gelu'"),
        (lambda: PcDEQLinear(0), ValueError, "layer sizes must be at least 1"),
        (lambda: PcDEQConv2d(3, kernel_size=4), ValueError, "kernel_size must be odd to keep the image size, got 4"),
        (lambda: PcDEQLinear(4)(torch.rand(2, 5)), ValueError, r"takes \(N, ...\) with 4 entries per sample, got .*5"),
        (lambda: PcDEQConv2d(3)(torch.rand(2, 4, 5, 5)), ValueError, r"takes \(N, 3, H, W\), got .*4"),
        (lambda: PcDEQLinear(4)(torch.ones(2, 4).long()), TypeError, "floating point inputs, got torch.int64"),
    ],
)
def test_bad_arguments(build, error, message):
    with pytest.raises(error, match=message):
        build()
