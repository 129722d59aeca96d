"""What products and functions are computed in, what that costs, and that nobody has to know."""

import copy

import pytest
import timm
import torch
from oracles import BOUND, SIGMA, dense, derivative, make, truth
from processes import python
from torch import Tensor

from pcdeq_zoo import ACTIVATIONS, PcDEQConv2d, Solver, record_solves, solve
from pcdeq_zoo.operators import REDUCED_BOUND, Convolution, has_bfloat16_products
from pcdeq_zoo.solver import extrapolate


@pytest.fixture(params=[True, False], ids=["bfloat16 products", "none"])
def hardware(request, monkeypatch) -> bool:
    """A machine with bfloat16 products, or one without, whatever this one is."""
    monkeypatch.setattr("pcdeq_zoo.operators.has_bfloat16_products", lambda device: request.param)
    return request.param


@pytest.fixture
def full_products(monkeypatch) -> list[int]:
    """Numbers of samples of the full products that are made."""
    samples: list[int] = []
    whole = Convolution.__call__

    def counted(operator: Convolution, z: Tensor) -> Tensor:
        samples.append(len(z))
        return whole(operator, z)

    monkeypatch.setattr(Convolution, "__call__", counted)
    return samples


def relative(z: Tensor, exact: Tensor) -> Tensor:
    return (z.double().flatten(1) - exact).norm(dim=1) / exact.norm(dim=1)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, False),  # a PyTorch that does not say
        ({"avx512_bf16": False, "sse4a": True}, False),
        ({"avx512_bf16": True, "sse4a": True}, True),  # AMD Zen 4
        ({"avx512_bf16": True, "sse4a": False, "amx_bf16": False}, False),  # Intel, AMX kept from a virtual machine
        ({"avx512_bf16": True, "sse4a": False, "amx_bf16": True}, True),
    ],
)
def test_products_are_reduced_only_where_that_is_faster(flags: dict[str, bool], expected: bool, monkeypatch):
    monkeypatch.setattr("pcdeq_zoo.operators.cpu_capabilities", lambda: flags)
    assert has_bfloat16_products.__wrapped__(torch.device("cpu")) is expected


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("count", [100, 2**16])
def test_sigma_and_its_slope_of_small_and_large_tensors(activation: str, count: int):
    """To the rounding errors that a certificate takes them for, and without falling anywhere."""
    p = torch.cat([torch.logspace(-30, 1.5, count), torch.rand(count) * 8]).sort().values
    exact, record = p.double(), ACTIVATIONS[activation]
    sigma = record.evaluate(p)
    torch.testing.assert_close(sigma.double(), SIGMA[activation](exact), rtol=10 * 2**-24, atol=0)
    assert (sigma <= BOUND[activation]).all()
    assert (sigma.diff() >= -(2**-22) * sigma[1:]).all()
    slope = record.derivative(p)
    torch.testing.assert_close(slope.double(), derivative(activation, exact), rtol=1e-5, atol=1e-15)


def test_the_default_dtype_at_import_does_not_matter():
    code = "import torch; torch.set_default_dtype(torch.bfloat16); torch.set_default_device('meta'); "
    code += "from pcdeq_zoo.activations import ACTIVATIONS; evaluate = ACTIVATIONS['tanh'].evaluate; "
    code += "p = torch.full((2**15,), 1e-10, dtype=torch.float32, device='cpu'); print(evaluate(p).sub_(p).any())"
    assert python("-c", code).stdout == "tensor(False)\n"


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-3, 3e-4, 1e-5])
@pytest.mark.parametrize("norm", [0.8, 10.0])
def test_a_solve_is_as_good_as_it_says_in_either_products(hardware: bool, activation: str, tol: float, norm: float):
    layer, x = make("conv", activation, norm, torch.float32, stop="estimated", tol=tol, max_evals=400)
    x = x.repeat(8, 1, 1, 1) * torch.logspace(-1, 0.5, 32).view(-1, 1, 1, 1)
    solution = layer.solve(x)
    assert solution.converged.all()
    assert (relative(solution.value, truth(layer, x)) <= 5 * tol).all()  # an estimate, of the slowest mode alone


@pytest.mark.parametrize(("radius", "times"), [(0.9, 3), (0.97, 6), (0.99, 15)])
@pytest.mark.parametrize("channels", [8, 24])
def test_a_stiff_layer_is_not_left_far_too_early(hardware: bool, radius: float, times: float, channels: int):
    """After an extrapolation faster modes change most; they alone would stop it some 80 times tol off at 0.99."""
    layer = PcDEQConv2d(channels, "relu6", solver=Solver(max_evals=1000))
    u = 0.3 * torch.randn(4, channels, 6, 6) - 1  # of equilibria below 6: nothing is saturated
    weight = torch.rand_like(layer.direction)
    layer.set_weight(weight * (radius / torch.linalg.eigvals(dense(layer, u, weight)).abs().max()))
    exact = truth(layer, u)
    assert exact.max() < 6
    solution = layer.solve(u)
    assert solution.converged.all()
    assert (relative(solution.value, exact) <= times * layer.solver.tol).all()


def test_products_are_full_where_they_have_to_be(hardware: bool, full_products: list[int]):
    """None to 1e-2, two of each sample to 1e-3 and 1e-4; without hardware every one."""
    model = timm.create_model("pcdeq1_mc_relu6_mnist", pretrained=True).eval()
    layer, u = model.features.deq1, model.features[:2](torch.rand(8, 1, 28, 28))
    for tol, most, evaluations in ((1e-2, 0, 4), (1e-3, 2, 8), (1e-4, 2, 8)):
        layer.solver.tol = tol
        full_products.clear()
        solution = layer.solve(u)
        assert solution.converged.all()
        assert solution.evaluations.min() >= evaluations
        if hardware:
            assert 8 * most == sum(full_products)
        else:
            assert sum(full_products) >= solution.evaluations.sum()


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_gradients_of_a_loose_solve(hardware: bool, activation: str):
    """As good as its tolerance, in coarse products or not; that of W is a product of its own."""
    layer, x = make("conv", activation, 3.0, torch.float32, stop="estimated", tol=1e-2)
    exact, cotangent = copy.deepcopy(layer).double(), torch.randn_like(x)
    exact.solver = Solver(1e-10, 1000)
    found, wanted = (
        torch.autograd.grad((part(y) * cotangent.to(y.dtype)).sum(), [y, *part.parameters()])
        for part, y in ((layer, x.clone().requires_grad_()), (exact, x.double().requires_grad_()))
    )
    for mine, oracle in zip(found, wanted, strict=True):
        assert 0 < (mine - oracle).norm() <= 2e-2 * oracle.norm()


@pytest.mark.parametrize("stop", ["estimated", "certified"])
@pytest.mark.parametrize("autocast", [False, True])
def test_nothing_is_proven_from_coarse_products(stop: str, autocast: bool, monkeypatch):
    """A layer whose own solves make no other gives a map that has full ones, and so do its certified solves."""
    monkeypatch.setattr("pcdeq_zoo.operators.has_bfloat16_products", lambda device: True)
    layer, x = make("conv", "tanh", 3.0, torch.float32, stop=stop, tol=0.1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        proven = solve(layer.fixed_point_map(x), stop="certified", tol=1e-4)
        own = layer.solve(x)
    exact = truth(layer, x).view_as(x)
    assert proven.converged.all()
    for solution in (proven, own) if stop == "certified" else (proven,):
        off = ((solution.value.double() - exact).abs() / exact).flatten(1).amax(1)
        assert (off <= solution.bound.double()).all()


def test_autocast_reduces_all_products(full_products: list[int], monkeypatch):
    """Whatever the machine has and whatever it costs; and only autocast to bfloat16 does."""
    monkeypatch.setattr("pcdeq_zoo.operators.has_bfloat16_products", lambda device: False)
    layer, x = make("conv", "tanh", 3.0, torch.float32, stop="estimated", tol=1e-5)
    for dtype, fewer in ((torch.bfloat16, True), (torch.float16, False)):
        full_products.clear()
        with torch.autocast("cpu", dtype=dtype):
            solution = layer.solve(x)
        assert solution.converged.all()
        assert (not full_products) == fewer


def test_autocast_reduces_the_products_of_the_gradient_of_a_proven_solve(full_products: list[int], monkeypatch):
    monkeypatch.setattr("pcdeq_zoo.operators.has_bfloat16_products", lambda device: False)
    layer, x = make("conv", "tanh", 3.0, torch.float32, stop="certified")
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert full_products
    full_products.clear()
    y.sum().backward()
    assert not full_products


def _nan(z: Tensor) -> Tensor:
    return torch.full_like(z, torch.nan)


# Not noise to 1e-2: to so loose a tolerance it may look like convergence.
@pytest.mark.parametrize(("broken", "tol"), [(torch.randn_like, 1e-5), (_nan, 1e-5), (_nan, 1e-2)])
def test_what_reduced_products_cannot_finish_is_solved_without(broken, tol: float, monkeypatch):
    layer, x = make("conv", "tanh", 3.0, torch.float32, stop="estimated", tol=tol)
    monkeypatch.setattr("pcdeq_zoo.operators.has_bfloat16_products", lambda device: False)
    whole = layer.solve(x)
    monkeypatch.setattr("pcdeq_zoo.operators.has_bfloat16_products", lambda device: True)
    monkeypatch.setattr(Convolution, "reduced", lambda operator, z: broken(z))
    layer.solver.max_evals = 100
    solution = layer.solve(x)
    assert solution.converged.all()
    assert (relative(solution.value, whole.value.double().flatten(1)) <= 3 * tol).all()
    assert (solution.evaluations > whole.evaluations).all()  # those that were in vain are counted


@pytest.mark.parametrize("channels", [3, 40])
@pytest.mark.parametrize("signs", [False, True])
def test_reduced_products_keep_to_their_bound(channels: int, signs: bool):
    """Unit by unit, relative to W |d|: what certificates take them for."""
    weight, d = torch.rand(channels, channels, 3, 3), torch.rand(4, channels, 9, 9) ** 4
    if signs:
        d *= torch.randn_like(d)
    operator = Convolution(weight, 0.0)
    error = (operator.reduced(d).double() - operator.double()(d.double())).abs()
    assert (error <= REDUCED_BOUND * operator.double()(d.abs().double())).all()
    assert error.max() > 0  # they are reduced


def test_an_extrapolation_leaves_the_measures_of_its_pair(monkeypatch):
    monkeypatch.setattr("pcdeq_zoo.operators.has_bfloat16_products", lambda device: True)
    layer, x = make("conv", "tanh", 3.0, torch.float32)
    with torch.no_grad():
        map_ = layer.fixed_point_map(x)
        pair = map_.pair(map_.start)
        z, _ = extrapolate(pair, torch.full((len(x),), torch.inf))
    assert not torch.equal(z, pair.z2)
    for size, d in ((pair.size1, pair.d1), (pair.size2, pair.d2)):
        torch.testing.assert_close(size, d.flatten(1).norm(dim=1))
    moved = pair.size2 + (z - pair.z2).flatten(1).norm(dim=1)  # by the product with d₁, and by the next
    torch.testing.assert_close(pair.moved, moved)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_a_map_with_parameters_is_solved_without_a_graph(activation: str):
    layer, x = make("conv", activation)
    assert layer.direction.requires_grad
    value = solve(layer.fixed_point_map(x), tol=1e-10, max_evals=1000).value
    assert not value.requires_grad
    assert (relative(value, truth(layer, x)) <= 1e-8).all()


def test_the_tolerance_follows_the_stop_until_it_is_set():
    solver = Solver()
    assert (solver.stop, solver.tol) == ("estimated", 3e-4)
    solver.stop = "certified"
    assert solver.tol == 1e-3
    solver.tol = 2e-4
    solver.stop = "residual"
    assert solver.tol == 2e-4
    solver.tol = None
    assert solver.tol == 1e-4
    model = timm.create_model("pcdeq1_l_tanh_mnist", stop="certified")
    assert model.solver.tol == 1e-3


def test_a_certificate_holds_with_either_products(hardware: bool):
    layer = PcDEQConv2d(8, "relu6", solver=Solver(stop="certified", on_failure="raise"))
    with torch.no_grad():
        layer.direction.uniform_()
        layer.magnitude.uniform_(0.3, 0.5)
        x = torch.randn(6, 8, 9, 9)
        with record_solves(layer) as solves:
            layer(x)
        solution, exact = layer.solve(x), truth(layer, x)
    assert (solves[0].bound <= 1e-3).all()
    value = solution.value.double().flatten(1)
    assert ((value - exact).abs() <= solution.bound.double()[:, None] * value).all()
