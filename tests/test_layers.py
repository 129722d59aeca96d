"""The layers against mathematics: independent oracles in float64, and the limits of float32."""

import copy
import gc
import math
import pickle
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from oracles import BOUND, SIGMA, dense, derivative, every_layer, input_map, make, newton
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from pcdeq_zoo import ConvergenceWarning, PcDEQConv2d, PcDEQLinear, Solver, Status, enclosure, project, solve


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
    final, step = layer.solve(x).value, layer.fixed_point_map(x)
    previous = torch.zeros_like(final)
    for _ in range(30):
        iterate = step(previous)
        assert (iterate >= previous - 1e-14).all()
        assert (iterate <= final + 1e-12).all()
        previous = iterate


@every_layer
def test_gradient_is_the_implicit_function_theorems(kind: str, activation: str, device: torch.device):
    """x, v and g against a dense solve of (I − DW)ᵀ a = D ∂L/∂z, chained by autograd through an explicit W(v, g)."""
    layer, x = make(kind, activation)
    x.requires_grad_()
    loss_weight = torch.randn(x.shape, dtype=x.dtype)
    there = copy.deepcopy(layer).to(device)
    (there(x.to(device)) * loss_weight.to(device)).sum().backward()
    got = x.grad, there.direction.grad.cpu(), there.magnitude.grad.cpu()

    v, g = (p.detach().clone().requires_grad_() for p in (layer.direction, layer.magnitude))
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
        return torch.func.functional_call(layer, {"direction": v, "magnitude": g}, (x,))

    v = (layer.direction.detach() + 0.1).requires_grad_()  # away from the kink of the projection
    g = layer.magnitude.detach().clone().requires_grad_()
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


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("activation", ["tanh", "softsign", "sigmoid"])
@pytest.mark.parametrize("stop", ["certified", "estimated"])
@pytest.mark.parametrize("norm", [3.0, 30.0])
def test_gradient_at_the_default_tolerance_where_units_are_saturated(
    kind: str, activation: str, stop: str, norm: float
):
    """σ′ next to 0 has no digits left as a function of an equilibrium with an error of 1e-3, only of its argument."""
    exact, x = make(kind, activation, norm)
    layer = copy.deepcopy(exact).float()
    layer.solver = Solver(stop=stop)
    mask = torch.randn_like(x)
    wanted, got = (
        torch.autograd.grad((net(x.to(net.direction.dtype)) * mask).sum(), list(net.parameters()))
        for net in (exact, layer)
    )
    wanted, got = (torch.cat([grad.flatten().double() for grad in grads]) for grads in (wanted, got))
    assert (got - wanted).norm() <= 3e-3 * wanted.norm()
    assert (layer(x.float()) <= BOUND[activation]).all()  # nor does an extrapolation leave σ's range


class TestCounterExamples:
    """Why W ≥ 0, x ≫ 0 and z₀ ≥ 0 are there, and that the layers keep to them."""

    def scalar(self, activation: str, weight: float) -> PcDEQLinear:
        layer = PcDEQLinear(1, activation, solver=Solver(tol=1e-6, max_evals=500, stop="residual"))
        with torch.no_grad():
            layer.direction.fill_(weight)
            layer.magnitude.fill_(abs(weight))
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
        layer.direction[1] = 0
    y = layer(x)
    y.sum().backward()
    assert (layer.weight[1] == 0).all()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert (layer.direction.grad[1] != 0).any()


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
    norm = 3.0 if activation == "sigmoid" else 0.9  # where samples of different sizes need different numbers
    layer, _ = make(kind, activation, norm, dtype=torch.float32, tol=1e-4)
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
    assert y.dtype == x.grad.dtype == half.direction.grad.dtype == dtype
    # The exact layer with the rounded parameters; only the output is rounded once more.
    exact = copy.deepcopy(half).float()
    assert torch.equal(y, exact(x.detach().float()).to(dtype))


@every_layer
@pytest.mark.parametrize("stop", ["certified", "estimated"])
def test_autocast_to_bfloat16_reduces_products_and_nothing_else(
    kind: str, activation: str, stop: str, device: torch.device
):
    """The state stays float32: the output has that dtype, and is as far off as the products are, or proven."""
    layer, x = (part.to(device) for part in make(kind, activation, dtype=torch.float32, stop=stop, tol=1e-4))
    plain, grads = layer(x), torch.autograd.grad(layer(x).sum(), layer.parameters())
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = layer(x)
        solution = layer.solve(x)
    cast = torch.autograd.grad(y.sum(), layer.parameters())  # outside, as in any training loop
    assert y.dtype == torch.float32
    assert solution.converged.all()
    assert (y - plain).norm() <= (3e-4 if stop == "certified" else 1e-2) * plain.norm()
    for a, b in zip(grads, cast, strict=True):
        assert (a - b).norm() <= 2e-2 * a.norm()
    if kind == "linear":  # too small to gain anything
        assert torch.equal(y, plain)


@every_layer
def test_autocast_to_float16_is_solved_in_float32(kind: str, activation: str):
    layer, x = make(kind, activation, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.float16):
        y = layer(x)
    assert torch.equal(y, layer(x))


@every_layer
def test_no_grad_and_inference_mode(kind: str, activation: str):
    layer, x = make(kind, activation)
    y = layer(x)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert torch.equal(layer(x), y)
    assert torch.equal(layer.solve(x).value, y.detach())
    assert enclosure(layer, x, tol=1e-3).lower.shape == y.shape


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

    v, g = (p.detach().clone().requires_grad_() for p in (layer.direction, layer.magnitude))
    weight = g * v / v.flatten(1).norm(dim=1).view(g.shape)
    y = x
    for _ in range(2):
        u, z = input_map(layer, y), torch.zeros_like(y)
        for _ in range(400):
            z = SIGMA[activation]((F.linear(z, weight) if kind == "linear" else F.conv2d(z, weight, padding=1)) + u)
        y = z
    for a, b in zip(wanted, torch.autograd.grad(y.sum(), [x, g, v]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_only_input_equilibrium_slopes_and_weight_are_saved():
    layer, u = make("linear", "tanh")
    layer.requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        layer(u.requires_grad_())
    assert sorted(saved) == sorted([u.shape, u.shape, u.shape, layer.weight.shape])


@every_layer
def test_double_backward_raises(kind: str, activation: str):
    layer, x = make(kind, activation)
    (grad,) = torch.autograd.grad(layer(x.requires_grad_()).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        grad.sum().backward()


@every_layer
def test_a_training_loop_that_knows_nothing_leaves_the_weight_nonnegative(kind: str, activation: str):
    layer, x = make(kind, activation, norm=0.5, dtype=torch.float32, tol=1e-4)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.3)  # moves every entry by about 0.3
    for _ in range(3):
        optimizer.zero_grad()
        (layer(x) * torch.randn_like(x)).sum().backward()
        before = layer.direction.detach().clone()
        optimizer.step()
        assert ((before > 0) & (layer.direction == 0)).any()  # the optimizer did leave the orthant
        assert all((parameter >= 0).all() for parameter in layer.parameters())
    with torch.no_grad():  # by hand
        for parameter in layer.parameters():
            parameter.sub_(1)
    assert (layer.weight >= 0).all()
    assert layer(x).isfinite().all()


def test_a_step_projects_what_it_moves_and_nothing_else():
    mine, other = (PcDEQLinear(3, "tanh") for _ in range(2))
    copied = copy.deepcopy(mine)
    with torch.no_grad():
        for layer in (mine, other, copied):
            layer.direction.sub_(1)
    torch.optim.SGD([*copied.parameters(), nn.Parameter(torch.zeros(1))], lr=0.0).step()
    assert (copied.direction == 0).all()
    assert (mine.direction < 0).all()
    assert (other.direction < 0).all()
    project(nn.Sequential(mine, nn.ReLU()))
    assert (mine.direction == 0).all()
    assert (other.direction < 0).all()


@every_layer
def test_forward_and_state_dict_write_nothing(kind: str, activation: str):
    """Parameters below 0 are taken for 0, saved as 0, and stay where whoever put them there wants them."""
    layer, x = make(kind, activation, dtype=torch.float32)
    with torch.no_grad():
        layer.direction.sub_(0.3)
        layer.magnitude[0] = -1
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    y = layer(x)
    (y * torch.randn_like(y)).sum().backward()
    state = layer.state_dict()
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, before[name])
        assert (parameter < 0).any()
        assert torch.equal(state[name], before[name].clamp(min=0))
    clone = copy.deepcopy(layer)
    clone.load_state_dict(state)
    assert torch.equal(clone(x), y)
    project(layer)  # W does not change by it
    assert torch.equal(layer(x), y)


def test_what_a_caller_computes_with_is_the_callers():
    """functional_call, a penalty taken before the forward, and a difference at a zero entry."""
    layer, x = make("linear", "tanh")
    candidate = {name: (p.detach() - 0.3).requires_grad_() for name, p in layer.named_parameters()}
    before = {name: value.detach().clone() for name, value in candidate.items()}
    torch.func.functional_call(layer, candidate, (x,)).sum().backward()
    assert all(torch.equal(candidate[name], value) for name, value in before.items())

    with torch.no_grad():
        layer.direction.sub_(0.3)
    wanted = 2 * layer.direction.detach()
    penalty = layer.direction.square().sum()
    layer(x)
    (got,) = torch.autograd.grad(penalty, layer.direction)
    assert torch.equal(got, wanted)


class TestWeight:
    """One way to set W; what would change a copy of it raises."""

    @pytest.mark.parametrize("layer", [PcDEQLinear(3), PcDEQConv2d(2)], ids=["linear", "conv"])
    def test_set_weight(self, layer: nn.Module):
        wanted = torch.rand_like(layer.direction)
        wanted[0] = 0
        layer.set_weight(wanted)
        torch.testing.assert_close(torch.Tensor(layer.weight), wanted)

    @pytest.mark.parametrize("size", [1e-38, 1e-25, 1e-13, 1e30])
    def test_set_weight_of_any_size(self, size: float):
        """Rows whose norm, or its square, leaves the range of float32 or the floor of the normalisation."""
        layer, wanted = PcDEQLinear(4), torch.rand(4, 4) * size
        layer.set_weight(wanted)
        torch.testing.assert_close(torch.Tensor(layer.weight), wanted, rtol=1e-6, atol=1e-44)

    def test_a_row_of_zeros_can_grow(self):
        layer = PcDEQLinear(4, "tanh")
        layer.set_weight(torch.zeros(4, 4))
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
        for _ in range(10):
            optimizer.zero_grad()
            layer(torch.randn(8, 4)).mean().neg().backward()
            optimizer.step()
        assert (layer.weight > 0).all()

    def test_a_parametrised_layer_has_a_state(self):
        layer = PcDEQLinear(4)
        nn.utils.parametrize.register_parametrization(layer, "magnitude", nn.Identity())
        assert set(layer.state_dict()) == {"direction", "parametrizations.magnitude.original"}

    @pytest.mark.parametrize(
        ("weight", "message"),
        [
            (torch.full((3, 3), -1.0), "W must be ≥ 0 and finite, got entries from -1 to -1"),
            (torch.full((3, 3), torch.nan), "W must be ≥ 0 and finite, got entries from nan to nan"),
            (torch.zeros(2, 3), r"W must be \(3, 3\), got \(2, 3\)"),
        ],
    )
    def test_refuses_what_is_no_weight(self, weight: Tensor, message: str):
        with pytest.raises(ValueError, match=message):
            PcDEQLinear(3).set_weight(weight)

    @pytest.mark.parametrize(
        "change",
        [
            lambda layer: nn.init.constant_(layer.weight, 1.0),
            lambda layer: nn.init.xavier_uniform_(layer.weight),
            lambda layer: layer.weight.data.copy_(torch.ones(3, 3)),
            lambda layer: torch.add(layer.weight, 1, out=layer.weight),
            lambda layer: layer.weight.requires_grad_(False),
            lambda layer: layer.weight.mul_(2),
            lambda layer: layer.weight.__setitem__((0, 0), 1.0),
        ],
    )
    def test_what_would_change_a_copy_raises(self, change):
        layer = PcDEQLinear(3)
        with (
            torch.no_grad(),
            pytest.raises(TypeError, match=r"use layer.set_weight\(W\) to set it, and"),
        ):
            change(layer)

    @pytest.mark.parametrize(
        "change",
        [
            lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(3, 3))),
            lambda layer: setattr(layer, "weight", torch.ones(3, 3)),
            lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
            lambda layer: layer.register_parameter("weight", nn.Parameter(torch.ones(3, 3))),
        ],
    )
    def test_it_cannot_be_replaced(self, change):
        with pytest.raises(AttributeError, match=r"use layer.set_weight\(W\) to set it"):
            change(PcDEQLinear(3))

    def test_it_can_be_computed_with_and_frozen(self):
        layer = PcDEQLinear(3)
        (2 * layer.weight).sum().backward()
        assert layer.direction.grad is not None
        assert type(layer.weight + 1) is type(layer.weight.detach()) is Tensor
        layer.requires_grad_(False)
        assert not layer.weight.requires_grad


def test_files_of_the_old_names_load():
    layer, x = make("linear", "tanh")
    old = {"weight_g": layer.magnitude.detach(), "weight_v": layer.direction.detach()}
    net = nn.Sequential(PcDEQLinear(12, "tanh", solver=layer.solver, dtype=torch.float64))
    net.load_state_dict({f"0.{name}": value for name, value in old.items()})
    assert torch.equal(net(x), layer(x))
    assert list(net.state_dict()) == ["0.magnitude", "0.direction"]


def test_a_graph_does_not_keep_its_layer():
    """A hook that keeps the output, as Grad-CAM's and distillation's do, is no reason to keep the layer."""
    kept = []
    layer = PcDEQLinear(4, "tanh")
    layer.register_forward_hook(lambda layer, inputs, output: kept.append(output))
    layer(torch.randn(2, 4))
    alive = weakref.ref(layer)
    del layer
    gc.collect()
    assert alive() is None
    kept[0].sum().backward()


def test_a_weight_at_zero_still_learns():
    """The projection must not be a trap: where W = 0 the gradient of the smallest increase is there."""
    layer, x = make("linear", "tanh")
    with torch.no_grad():
        layer.direction[:, 0] = 0
    layer(x).sum().backward()
    assert (layer.direction.grad[:, 0].abs() > 0).all()


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
    with torch.no_grad():
        layer.direction[0, 0] = -1.0
    unpickled = pickle.loads(pickle.dumps(layer))
    assert torch.equal(unpickled(x), layer(x))
    assert (unpickled.direction >= 0).all()


def test_a_shallow_copy_writes_nothing():
    layer = PcDEQLinear(3)
    layer.direction.data.sub_(1)
    twin = copy.copy(layer)
    assert twin.direction is layer.direction
    assert (layer.direction < 0).all()


def test_another_activation_is_that_of_all_it_computes():
    layer, u = PcDEQLinear(3, "tanh"), torch.full((1, 3), 4.0)
    layer.activation = "relu6"
    z = layer(u)
    assert (z > 1).all()
    exported = torch.export.export(layer, (u,)).module()
    for same in (exported(u), *layer.hull(u, u, Solver(stop="certified")), *enclosure(layer, u)):
        torch.testing.assert_close(same, z, rtol=2e-3, atol=0, check_dtype=False)
    with pytest.raises(ValueError, match="activation must be one of"):
        layer.activation = "gelu"


def test_linear_layer_takes_any_sample_shape():
    layer, x = make("linear", "tanh")
    assert torch.equal(layer(x.view(4, 3, 2, 2)), layer(x).view(4, 3, 2, 2))


def test_memory_order_of_the_input_does_not_matter():
    layer, x = make("conv", "tanh")
    assert torch.equal(layer(x.contiguous(memory_format=torch.channels_last)), layer(x))


def test_unconverged_solves_are_not_silent_by_default():
    layer = PcDEQLinear(4, "tanh", solver=Solver(tol=1e-12, max_evals=3))
    with torch.no_grad():
        layer.magnitude.fill_(1)
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
        (lambda: PcDEQConv2d(3, kernel_size=4), ValueError, "kernel_size must be an odd integer, .*, got 4"),
        (lambda: PcDEQLinear(4)(torch.rand(2, 5)), ValueError, r"takes \(N, ...\) with 4 entries per sample, got .*5"),
        (lambda: PcDEQConv2d(3)(torch.rand(2, 4, 5, 5)), ValueError, r"takes \(N, 3, H, W\), got .*4"),
        (lambda: PcDEQLinear(4)(torch.ones(2, 4).long()), TypeError, "floating point inputs, got torch.int64"),
    ],
)
def test_bad_arguments(build, error, message):
    with pytest.raises(error, match=message):
        build()
