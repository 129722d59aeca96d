"""Bounds of whole nets: that nothing is outside of them, and nothing certified that can be changed."""

import copy
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from oracles import every_layer, make, truth
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn

from pcdeq_zoo import (
    VARIANTS,
    Box,
    PcDEQConv2d,
    PcDEQLinear,
    Solver,
    certify,
    enclosure,
    forward_with_margins,
    interval_bounds,
    pgd,
    pixel_box,
)
from pcdeq_zoo.data import normalize
from pcdeq_zoo.intervals import interval, modules_in_order
from pcdeq_zoo.operators import full_precision
from pcdeq_zoo.relaxations import Functional, least, step_back

METHODS = ("interval", "linear")
PROVEN = Solver(stop="certified")


def points(box: Box, count: int) -> Tensor:
    """Points of a box, (N, count, ...): random ones, corners, and mixtures of both."""
    shape = (len(box.lower), count, *box.lower.shape[1:])
    share = torch.rand(shape, dtype=box.lower.dtype)
    share[:, 1::3] = share[:, 1::3].round()
    share[:, 2::3] = (3 * share[:, 2::3] - 1).clamp(0, 1)
    share[:, 0], share[:, -1] = 0, 1
    inside = box.lower[:, None] + share * (box.upper - box.lower)[:, None]
    return torch.minimum(torch.maximum(inside, box.lower[:, None]), box.upper[:, None])


def random_box(*shape: int, dtype: torch.dtype = torch.float32) -> Box:
    lower = torch.randn(shape, dtype=dtype)
    return Box(lower, lower + torch.rand(shape, dtype=dtype) * torch.randint(0, 3, shape))


def holds(box: Box, outputs: Tensor) -> None:
    """Outputs (N, count, ...), of exact arithmetic, are inside."""
    assert (outputs >= box.lower[:, None]).all()
    assert (outputs <= box.upper[:, None]).all()


# --- one layer ---


@every_layer
@pytest.mark.parametrize("norm", [0.5, 8.0])
def test_the_hull_of_a_layer_is_attained_at_its_ends_and_holds_what_is_between(kind: str, activation: str, norm: float):
    layer, u = make(kind, activation, norm)
    box = Box(u, u + torch.rand_like(u))
    hull = Box(*layer.hull(*box))
    for end, output in zip(box, hull, strict=True):
        torch.testing.assert_close(output.flatten(1), truth(layer, end), rtol=1e-9, atol=1e-12)
    inside = points(box, 200)
    outputs = layer(inside.flatten(0, 1)).view_as(inside)
    assert ((outputs >= hull.lower[:, None] - 1e-11) & (outputs <= hull.upper[:, None] + 1e-11)).all()


@every_layer
def test_a_certified_hull_in_float32_holds_the_rigorous_enclosure_of_both_ends(kind: str, activation: str):
    layer, u = make(kind, activation, 5.0, torch.float32)
    box = Box(u, u + torch.rand_like(u))
    for solver in (PROVEN, Solver(stop="certified", tol=1e-2), Solver(stop="certified", max_evals=2)):
        lower, upper = layer.hull(*box, Solver(solver.tol, solver.max_evals, "certified", "ignore"))
        assert (lower <= enclosure(layer, box.lower).lower).all()
        assert (upper >= enclosure(layer, box.upper).upper).all()


def test_the_hull_of_a_solve_without_a_proof_says_nothing():
    layer, u = make("conv", "relu6", 8.0, torch.float32)
    lower, upper = layer.hull(u, u + 1, Solver(stop="certified", max_evals=2, on_failure="ignore"))
    assert (lower == 0).all()
    assert (upper == 6).all()


@every_layer
def test_the_gradient_of_a_hull_is_that_of_finite_differences(kind: str, activation: str):
    layer, u = make(kind, activation, 2.0)
    layer.direction.data.add_(0.05)  # W has a kink at 0
    u = u[:1]
    width = torch.rand_like(u).requires_grad_()
    settings = Solver(tol=1e-13, max_evals=5000, stop="residual")

    def ends(u: Tensor, width: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return layer.hull(u, u + width, settings)

    assert torch.autograd.gradcheck(ends, (u.requires_grad_(), width, *layer.parameters()), atol=1e-6)


# --- one module ---

MODULES = {
    "convolution": (nn.Conv2d(2, 3, 3, padding=1), (2, 6, 5)),
    "strided convolution": (nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2, bias=False), (4, 7, 7)),
    "linear": (nn.Linear(12, 7), (12,)),
    "batch norm": (nn.BatchNorm2d(3), (3, 4, 4)),
    "batch norm without affine": (nn.BatchNorm1d(5, affine=False), (5,)),
    "max pool": (nn.MaxPool2d(3, 1, 1), (2, 5, 6)),
    "halving max pool": (nn.MaxPool2d(2), (2, 6, 6)),
    "max pool with ceil": (nn.MaxPool2d(3, 2, ceil_mode=True), (2, 6, 6)),
    "average pool": (nn.AvgPool2d(4, 2, 1), (2, 7, 7)),
    "adaptive average pool": (nn.AdaptiveAvgPool2d(1), (3, 4, 5)),
    "adaptive max pool": (nn.AdaptiveMaxPool2d(2), (3, 4, 5)),
    "flatten": (nn.Flatten(), (3, 2, 2)),
    "relu": (nn.ReLU(), (40,)),
    "relu6": (nn.ReLU6(), (40,)),
    "hardtanh": (nn.Hardtanh(-0.3, 0.7), (40,)),
    "relu in place": (nn.ReLU(inplace=True), (40,)),
    "softplus": (nn.Softplus(5), (40,)),
    "tanh": (nn.Tanh(), (40,)),
    "sigmoid": (nn.Sigmoid(), (40,)),
    "softsign": (nn.Softsign(), (40,)),
    **{f"linear pcDEQ {name}": (PcDEQLinear(12, name), (12,)) for name in ("relu6", "tanh", "softsign", "sigmoid")},
    **{f"pcDEQ {name}": (PcDEQConv2d(2, name), (2, 5, 3)) for name in ("relu6", "tanh", "softsign", "sigmoid")},
}


def test_a_hull_of_a_narrow_box_by_loose_solves_has_its_ends_in_order():
    torch.manual_seed(0)
    layer = PcDEQConv2d(8, "tanh", solver=Solver(stop="estimated", tol=1e-2))
    layer.set_weight(torch.rand(8, 8, 3, 3) * 0.05)
    u = torch.randn(64, 8, 7, 7) * 2
    assert (layer(u) > layer(u + 1e-4)).any()  # what the tolerance is larger than
    lower, upper = layer.hull(u, u + 1e-4)
    assert (lower <= upper).all()


@pytest.fixture(params=list(MODULES))
def module_and_shape(request) -> tuple[nn.Module, tuple[int, ...]]:
    module, shape = MODULES[request.param]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 2).sub_(0.5)
        for buffer in (getattr(module, name, None) for name in ("running_mean", "running_var")):
            if buffer is not None:
                buffer.uniform_(0.1, 3)
        if isinstance(module, PcDEQLinear | PcDEQConv2d):
            weight = torch.rand_like(module.direction)
            module.set_weight(2 * weight / weight.flatten(1).sum(1).mean())
    return module.eval(), shape


def exact(module: nn.Module, x: Tensor) -> Tensor:
    """Outputs in float64 of points (N, count, ...), those of pcDEQ layers by Newton's method; (N, count, ...)."""
    together = x.flatten(0, 1)
    if isinstance(module, PcDEQLinear | PcDEQConv2d):
        outputs = truth(module, together).view(together.shape)
    else:
        with torch.no_grad():
            outputs = copy.deepcopy(module).double()(together.double())
    return outputs.unflatten(0, x.shape[:2])


def values(functional: Functional, y: Tensor) -> Tensor:
    """Of functionals (N, R, ...) at points (N, count, ...), in float64: (N, R, count)."""
    coefficients = functional.coefficients.double().flatten(2)
    return torch.einsum("nrk,npk->nrp", coefficients, y.double().flatten(2)) + functional.constant[..., None]


def test_bounds_of_a_module_hold_its_outputs_in_exact_arithmetic(module_and_shape):
    module, shape = module_and_shape
    (_, module), *_ = modules_in_order(module)
    box = random_box(3, *shape)
    x = points(box, 300)
    y = exact(module, x)
    outputs = interval(module, box, PROVEN)
    holds(outputs, y)
    functional = Functional(torch.randn(3, 4, *outputs.lower.shape[1:]), torch.randn(3, 4, dtype=torch.float64))
    back = step_back(module, functional, box, outputs)
    assert back.coefficients.shape == (3, 4, *shape)
    assert (values(back, x) <= values(functional, y)).all()
    assert (least(back, box)[..., None] <= values(functional, y)).all()


def test_bounds_hold_where_rounding_is_all_there_is():
    """Sums of large terms that cancel, on boxes of one point, against float64."""
    module = nn.Sequential(nn.Linear(400, 300), nn.BatchNorm1d(300), nn.Linear(300, 50)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 30)
    x = torch.randn(8, 400) * 100
    box = Box(x, x)
    for part in module:
        box = interval(part, box, PROVEN)
    y = exact(module, x[:, None])
    holds(box, y)
    assert ((box.upper - box.lower) < 1e-2 * y[:, 0].abs().amax()).all()


def test_convolutions_by_other_algorithms_are_off_where_rounding_counts():
    """Without oneDNN PyTorch takes NNPACK, whose Winograd convolutions round more than any order of a plain sum."""
    module = nn.Conv2d(16, 16, 3, padding=1, bias=False)
    x = torch.randn(16, 16, 32, 32)
    x[:, :, ::4, ::4] *= 1e5
    torch._C._set_mkldnn_enabled(False)
    try:
        with torch.no_grad(), full_precision(x.device):
            outputs = interval(module, Box(x, x), PROVEN)
    finally:
        torch._C._set_mkldnn_enabled(True)
    holds(outputs, exact(module, x[:, None]))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_linear_bounds_of_a_layer_are_exact_at_both_ends_of_a_box(kind: str):
    """Those from below: the chord of σ meets it at the arguments of both ends. Where the input map is the identity."""
    layer, u = make(kind, "sigmoid", 3.0)
    box = Box(u.abs(), u.abs() + torch.rand_like(u))
    outputs = Box(*layer.hull(*box, Solver(stop="certified", tol=1e-9, max_evals=5000)))
    functional = Functional(torch.rand(len(u), 3, *u.shape[1:]).double(), torch.zeros(len(u), 3).double())
    back = step_back(layer, functional, box, outputs)
    for end in box:
        gap = values(functional, truth(layer, end)[:, None]) - values(back, end[:, None])
        assert (gap >= 0).all()
        assert (gap < 1e-5).all()
    middle = (box.lower + box.upper) / 2
    assert (values(functional, truth(layer, middle)[:, None]) - values(back, middle[:, None]) > 1e-4).all()


# --- whole nets ---


def net(name: str = "pcdeq1_l_tanh_mnist", **arguments) -> nn.Module:
    return timm.create_model(name, pretrained=True, **arguments).eval()


def noise(model: nn.Module, count: int) -> Tensor:
    config = model.pretrained_cfg
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return (torch.rand(count, *config["input_size"]) - mean) / std


@pytest.mark.parametrize("name", list(VARIANTS))
def test_bounds_of_every_net_hold_its_outputs(name: str):
    torch.manual_seed(1)
    model = timm.create_model(name).eval()
    with torch.no_grad():
        for layer in model.modules():  # W at initialisation is almost 0
            if isinstance(layer, PcDEQLinear | PcDEQConv2d):
                layer.magnitude.fill_(0.5)
    x, eps = noise(model, 1), 0.004
    logits = interval_bounds(model, x, eps)
    inside = points(pixel_box(model, x, eps), 12)
    with torch.no_grad():
        outputs = model.double()(inside[0].double())[None]
    holds(logits, outputs)
    model.float()
    margins = [certify(model, x, torch.tensor([3]), eps, method=method).margins for method in METHODS]
    assert (margins[0] <= margins[1]).all()
    assert (margins[1][:, None] <= outputs[:, :, 3, None] - outputs).all()
    assert margins[1][0, 3] == 0


@pytest.fixture(scope="module")
def digits(request) -> tuple[Tensor, Tensor]:
    images, labels = request.getfixturevalue("sample")
    return normalize(images[:200], VARIANTS["pcdeq1_l_tanh_mnist"].dataset), labels[:200]


@pytest.mark.parametrize("method", METHODS)
def test_nothing_certified_falls_to_an_attack(method: str, digits):
    model, (x, y) = net(), digits
    for eps in (0.005, 0.02):
        certified = certify(model, x, y, eps, method=method).certified
        found = [pgd(model, x, y, eps, steps=20, restarts=2), apgd(model, x, y, eps), *corner_attacks(model, x, y, eps)]
        with torch.no_grad():
            for images in found:
                assert (model(images).argmax(1) == y)[certified].all()
        if method == "linear":
            assert certified.float().mean() > 0.2


def apgd(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int = 30) -> Tensor:
    """Like Auto-PGD (Croce and Hein, ICML 2020): momentum, and half the step from the best point where it stalls."""
    box = pixel_box(model, x, eps)
    width = (box.upper - box.lower) / 2

    def margin(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        logits = model(x)
        others = logits.scatter(1, y[:, None], -math.inf).amax(1)
        value = logits.gather(1, y[:, None])[:, 0] - others
        return value.detach(), torch.autograd.grad(value.sum(), x)[0]

    best, before, size = x.clone(), x.clone(), torch.full((len(x), 1, 1, 1), 2.0)
    least_margin, gradient = margin(x)
    won = torch.zeros(len(x))
    for step in range(1, steps + 1):
        plain = x - size * width * gradient.sign()
        moved = x + 0.75 * (plain - x) + 0.25 * (x - before)
        before, x = x, torch.minimum(torch.maximum(moved, box.lower), box.upper)
        value, gradient = margin(x)
        better = value < least_margin
        best[better], least_margin[better] = x[better], value[better]
        won += better
        if step % 6 == 0:
            stalled = won < 4
            size[stalled] /= 2
            x = torch.where(stalled[:, None, None, None], best, x)
            value, gradient = margin(x)
            won.zero_()
    return best


def corner_attacks(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> list[Tensor]:
    """Both ends of the ball, and the corners that linear bounds of the margins point to."""
    box = pixel_box(model, x, eps)
    modules = [*model.features, model.head.pool, model.head.drop]
    boxes = [box]
    for module in modules:
        boxes.append(interval(module, boxes[-1], PROVEN))
    weight = model.head.fc.weight.detach()
    functional = Functional(weight[y][:, None] - weight, torch.zeros(len(x), 10).double())
    for index in reversed(range(len(modules))):
        functional = step_back(modules[index], functional, boxes[index], boxes[index + 1])
    corners = torch.where(functional.coefficients > 0, box.lower[:, None], box.upper[:, None])
    return [*box, *corners.unbind(1)]


def test_linear_bounds_certify_more_and_all_certify_less_as_eps_grows(digits):
    model, (x, y) = net(), digits
    before = {method: torch.ones(len(x), dtype=torch.bool) for method in METHODS}
    for eps in (0.0, 0.003, 0.01, 0.03):
        now = {method: certify(model, x, y, eps, method=method).certified for method in METHODS}
        assert (now["interval"] <= now["linear"]).all()
        for method in METHODS:
            assert (now[method] <= before[method]).all()
        before = now
    assert not before["interval"].any()
    with torch.no_grad():
        right = model(x).argmax(1) == y
    alone = certify(model, x, y, 0.0).certified
    assert (alone <= right).all()
    assert (right & ~alone).sum() <= 2  # margins below what the solves leave open


def test_clipped_balls_are_smaller_and_the_pixel_range_is_that_of_the_data_set(digits):
    model, (x, y) = net(), digits
    clipped, whole = (certify(model, x, y, 0.01, method="interval", clip=clip) for clip in (True, False))
    assert (whole.margin <= clipped.margin).all()
    assert whole.certified.sum() < clipped.certified.sum()
    box = pixel_box(model, x, 0.1)
    assert -1e-5 < box.lower.min() <= 0
    assert 1 <= box.upper.max() < 1 + 1e-5
    cifar = timm.create_model("pcdeq1_mc_tanh_cifar")
    image = torch.zeros(1, 3, 32, 32)  # a grey that is the mean of each channel
    box = pixel_box(cifar, image, 0.1)
    std = torch.tensor(cifar.pretrained_cfg["std"])
    torch.testing.assert_close(box.upper[0, :, 0, 0], 0.1 / std, rtol=1e-5, atol=0)


def planted(distance: float) -> nn.Sequential:
    """A net of one pixel whose label flips where the pixel has grown by `distance` from 0.3: found by bisection."""
    layer = PcDEQLinear(1, "tanh")
    layer.set_weight(torch.tensor([[2.5]]))
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 1), layer, nn.Linear(1, 2)).eval()
    with torch.no_grad():
        for parameter, value in ((model[1].weight, 2.0), (model[1].bias, -1.0)):
            parameter.fill_(value)
        flip = truth(layer, model[1](torch.tensor([[0.3 + distance]])))
        model[3].weight.copy_(torch.tensor([[-1.0], [1.0]]))
        model[3].bias.copy_(torch.tensor([flip.item(), -flip.item()]))
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("distance", [0.001, 0.05, 0.4])
def test_a_planted_counterexample_is_never_certified_past_and_nearly_up_to(method: str, distance: float):
    model, x, y = planted(distance), torch.full((1, 1, 1, 1), 0.3), torch.tensor([0])
    assert not certify(model, x, y, distance * 1.00001 + 1e-6, method=method).certified
    assert distance < 0.01 or certify(model, x, y, distance * 0.95, method=method).certified


def test_these_tests_see_a_bound_that_is_too_small(monkeypatch):
    whole = PcDEQLinear.hull

    def shrunken(self, *args) -> tuple[Tensor, Tensor]:
        lower, upper = whole(self, *args)
        return lower + 0.02 * (upper - lower), upper - 0.02 * (upper - lower)

    monkeypatch.setattr(PcDEQLinear, "hull", shrunken)
    with pytest.raises(AssertionError):
        test_a_planted_counterexample_is_never_certified_past_and_nearly_up_to("interval", 0.4)
    with pytest.raises(AssertionError):
        test_a_certified_hull_in_float32_holds_the_rigorous_enclosure_of_both_ends("linear", "tanh")


def test_solves_without_a_proof_certify_nothing(monkeypatch, digits):
    model, (x, y) = net(), digits
    assert certify(model, x, y, 0.001).certified.any()
    monkeypatch.setattr("pcdeq_zoo.robustness._PROVEN", Solver(stop="certified", max_evals=2, on_failure="ignore"))
    for method in METHODS:
        assert not certify(model, x, y, 0.001, method=method).certified.any()
    assert interval_bounds(model, x, 0.001).lower.isfinite().all()


# --- to train with ---


@pytest.mark.parametrize("name", ["pcdeq1_l_tanh_mnist", "pcdeq2_l_sigmoid_mnist"])
def test_the_gradient_of_bounds_is_that_of_finite_differences(name: str):
    exactly = {"stop": "residual", "tol": 1e-13, "max_evals": 2000}
    model = timm.create_model(name, img_size=3, channels=(4,), num_classes=3, **exactly).double()
    with torch.no_grad():
        model.features.deq1.magnitude.uniform_(0.5, 1.5)
        model.features.deq1.direction.uniform_(0.5, 1.5)
    x, y = torch.rand(5, 1, 3, 3).double(), torch.tensor([0, 1, 2, 0, 1])
    parameters = dict(model.named_parameters())
    direction = {key: torch.randn_like(value) for key, value in parameters.items()}

    def loss(step: float) -> Tensor:
        with torch.no_grad():
            for key, value in parameters.items():
                value.add_(direction[key], alpha=step)
        logits, margins = forward_with_margins(model, x, y, 0.05)
        return F.cross_entropy(-margins, y) + F.cross_entropy(logits, y)

    model.train()
    gradients = torch.autograd.grad(loss(0.0), list(parameters.values()))
    slope = sum((g * direction[key]).sum() for key, g in zip(parameters, gradients, strict=True))
    h = 1e-6
    with torch.no_grad():
        differences = (loss(h) - loss(-2 * h)) / (2 * h)
    torch.testing.assert_close(slope, differences, rtol=1e-6, atol=1e-8)


def test_bounds_to_train_with_are_those_that_are_proven_but_for_their_proof(digits):
    model, (x, y) = net(stop="residual", tol=1e-6), digits
    logits, margins = forward_with_margins(model, x, y, 0.01)
    torch.testing.assert_close(logits, model(x))
    proven = certify(model, x, y, 0.01, method="interval").margins
    assert (proven <= margins.double()).all()
    torch.testing.assert_close(proven.float(), margins, rtol=0.02, atol=0.3)
    model.zero_grad()
    interval_bounds(model, x, 0.01).lower.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_batch_norm_goes_by_the_images_and_remembers_them(digits):
    x, y = digits[0].double(), digits[1]
    model, expected = (net(stop="residual", tol=1e-10).double().train() for _ in range(2))
    before = model.features.prenorm1.running_mean.clone()
    _, margins = forward_with_margins(model, x, y, 0.0)
    logits = expected(x)
    assert not torch.equal(model.features.prenorm1.running_mean, before)
    torch.testing.assert_close(model.features.prenorm1.running_mean, expected.features.prenorm1.running_mean)
    torch.testing.assert_close(margins, logits.gather(1, y[:, None]) - logits, rtol=1e-6, atol=1e-6)


# --- bad input ---


def with_nan() -> nn.Module:
    model = timm.create_model("pcdeq1_l_tanh_mnist").eval()
    model.head.fc.bias.data[3] = math.nan
    return model


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"eps": -0.1}, ValueError, "eps is the largest change"),
        ({"eps": math.nan}, ValueError, "eps is the largest change"),
        ({"eps": 8}, ValueError, "eps is the largest change"),
        ({"labels": torch.tensor([0, 10])}, ValueError, "labels must be from 0 to 9, got 0 to 10"),
        ({"labels": torch.tensor([-1, 0])}, ValueError, "labels must be from 0 to 9"),
        ({"labels": torch.tensor([0])}, ValueError, r"labels must be integers, shape \(2,\)"),
        ({"labels": torch.tensor([0.0, 1.0])}, ValueError, "labels must be integers"),
        ({"images": torch.full((2, 1, 28, 28), math.nan)}, ValueError, "NaN or infinite pixels"),
        ({"images": torch.full((2, 1, 28, 28), 128.0)}, ValueError, r"outside of \[0, 1\]"),
        ({"images": torch.zeros(2, 1, 28, 28, dtype=torch.uint8)}, ValueError, "float32 or float64"),
        ({"images": torch.zeros(2, 28, 28)}, ValueError, r"must be \(N, C, H, W\)"),
        ({"images": torch.zeros(2, 1, 28, 28).double()}, TypeError, "one dtype and device"),
        ({"method": "crown"}, ValueError, "method must be one of interval, linear"),
        ({"batch_size": 0}, ValueError, "batch_size must be an integer of at least 1, got 0"),
        ({"batch_size": 2.5}, ValueError, "batch_size must be an integer of at least 1, got 2.5"),
        ({"eps": "0.1"}, ValueError, "from 0 to 1; got '0.1'"),
        ({"eps": torch.zeros(2)}, ValueError, "from 0 to 1; got tensor"),
        ({"images": (torch.zeros(2, 1, 28, 28),) * 2}, TypeError, "must be a tensor, or a Box .*, got tuple"),
        (
            {"images": Box(*[torch.zeros(2, 1, 28, 28).half()] * 2)},
            ValueError,
            "both float32 or float64; got .*float16",
        ),
        ({"images": Box(*[torch.zeros(2, 1, 28, 28).int()] * 2)}, ValueError, "both float32 or float64; got .*int32"),
        (
            {"images": Box(torch.zeros(2, 1, 28, 28), torch.ones(4, 1, 28, 28)), "batch_size": 2},
            ValueError,
            "one shape",
        ),
        ({"model": nn.Sequential(nn.Linear(28, 3)).eval()}, ValueError, r"takes \(N, F\), and gets \(2, 1, 28, 28\)"),
        ({"model": with_nan()}, ValueError, "head.fc.bias has entries that are NaN or infinite"),
        (
            {"model": nn.Sequential(nn.Flatten(), nn.GELU(), nn.Linear(784, 10)).eval()},
            TypeError,
            "no bounds of 1, GELU",
        ),
        ({"model": nn.Sequential(nn.Flatten(), nn.ReLU()).eval()}, TypeError, "must end in nn.Linear"),
        ({"model": timm.create_model("pcdeq1_l_tanh_mnist")}, RuntimeError, "call model.eval()"),
    ],
)
def test_bad_input_is_told_in_one_line(change: dict, error: type[Exception], message: str):
    arguments = {
        "model": timm.create_model("pcdeq1_l_tanh_mnist").eval(),
        "images": torch.zeros(2, 1, 28, 28),
        "labels": torch.tensor([0, 1]),
        "eps": 0.1,
        **change,
    }
    with pytest.raises(error, match=message):
        certify(**arguments)


class Reversed(nn.Sequential):
    def __iter__(self) -> Iterator[nn.Module]:
        return reversed(list(super().__iter__()))


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Minus(PcDEQLinear):
    def forward(self, u: Tensor) -> Tensor:
        return 1 - super().forward(u)


def with_hook() -> nn.Module:
    module = nn.Linear(4, 4)
    module.register_forward_hook(lambda module, inputs, output: -output)
    return module


def with_forward() -> nn.Module:
    module = nn.Linear(4, 4)
    module.forward = lambda x: -x
    return module


def with_a_hook_inside() -> nn.Module:
    module = SelectAdaptivePool2d(pool_type="avg", flatten=True)
    module.pool.register_forward_hook(lambda module, inputs, output: -output)
    return module


def with_a_method() -> nn.Module:
    module = nn.Conv2d(1, 1, 1)
    module._conv_forward = lambda x, weight, bias: -x
    return module


@pytest.mark.parametrize(
    "module",
    [
        Residual(nn.Linear(4, 4)),
        Reversed(nn.Linear(4, 4), nn.ReLU()),
        with_a_hook_inside(),
        with_a_method(),
        Minus(4),
        with_hook(),
        with_forward(),
        nn.utils.spectral_norm(nn.Linear(4, 4)),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.Softplus(beta=-1),
        nn.Softplus(threshold=1),
        nn.Flatten(2),
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")),
        nn.MaxPool2d(2, return_indices=True),
        nn.AvgPool2d(2, divisor_override=-1),
    ],
    ids=lambda module: type(module).__name__,
)
def test_a_module_that_computes_something_else_is_refused(module: nn.Module):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), module, nn.Linear(4, 2)).eval()
    with pytest.raises(TypeError, match=r"there are no bounds of 2"):
        interval_bounds(model, torch.rand(1, 1, 2, 2), 0.1)
    with pytest.raises(TypeError, match="the model is an empty"):
        interval_bounds(nn.Sequential(), torch.rand(1, 1, 2, 2), 0.1)


def test_a_net_of_the_zoo_with_a_method_of_its_own_is_refused(digits):
    model = timm.create_model("pcdeq1_l_tanh_mnist").eval()
    model.forward_features = lambda x: -model.features(x)
    with pytest.raises(TypeError, match=r"(?s)there are no bounds of the model, .* methods of its own"):
        interval_bounds(model, digits[0], 0.1)


class OfAbsoluteWeight(nn.Linear):
    """A subclass of a common module, that computes something else, with bounds of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.abs(), self.bias)

    def hull(self, lower: Tensor, upper: Tensor, solver: Solver | None = None) -> tuple[Tensor, Tensor]:
        return self(lower), self(upper)


@pytest.mark.parametrize("method", METHODS)
def test_a_hull_of_its_own_is_taken_whatever_the_module_is_a_subclass_of(method: str):
    model = nn.Sequential(nn.Flatten(), OfAbsoluteWeight(4, 4), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        model[1].weight.copy_(-torch.eye(4))  # computes the identity
        model[1].bias.zero_()
        model[2].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]]))
        model[2].bias.copy_(torch.tensor([-0.5, 0.0]))
    x = torch.full((1, 1, 2, 2), 0.55)
    for eps, label, proven in ((0.04, 0, True), (0.06, 0, False), (0.04, 1, False)):
        assert certify(model, x, torch.tensor([label]), eps, method=method).certified.item() == proven
    with pytest.raises(TypeError, match=r"a classifier must end in nn\.Linear"):
        certify(nn.Sequential(nn.Flatten(), OfAbsoluteWeight(4, 2)).eval(), x, torch.tensor([0]), 0.1, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_a_module_that_is_used_twice_counts_twice(method: str):
    relu = nn.ReLU(inplace=True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 1), relu, nn.Linear(1, 1), relu, nn.Linear(1, 2)).eval()
    with torch.no_grad():
        values = ([[1.0]], [-1.0], [[1.0]], [-1.0], [[1.0], [-1.0]], [-0.1, 0.1])
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(torch.tensor(value))
    x = torch.rand(1, 1, 1, 1)
    with torch.no_grad():
        (label,) = model(x).argmax(1)
    assert certify(model, x, torch.tensor([int(label)]), 0.1, method=method).certified
    assert not certify(model, x, torch.tensor([1 - int(label)]), 0.1, method=method).certified


def rows_of(values: list[Any]) -> nn.Sequential:
    """A classifier of one pixel, by its parameters."""
    sizes = [len(value) for value in values if isinstance(value[0], list)]
    linear = [nn.Linear(n, m, bias=False) for n, m in itertools.pairwise([1, *sizes])]
    linear[-1] = nn.Linear(sizes[-2], sizes[-1])
    model = nn.Sequential(nn.Flatten(), *linear).eval()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(torch.tensor(value))
    return model


@pytest.mark.parametrize("method", METHODS)
def test_coefficients_that_underflow_are_not_forgotten(method: str):
    """From the margins back 1e-9 · 1e-37 is 0, and what it stands for 1e-9."""
    model, x = rows_of([[[1e37]], [[1e-37]], [[1e-9], [0.0]], [0.0, 1e-10]]), torch.ones(1, 1, 1, 1)
    assert model(x)[0].tolist() == pytest.approx([1e-9, 1e-10])
    assert not certify(model, x, torch.tensor([1]), 0.5, method=method).certified
    assert not certify(model, x, torch.tensor([1]), 0.0, method=method).certified


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_norm_whose_scale_underflows(method: str):
    model = rows_of([[[1e36]], [[1e12]], [[1.0], [0.0]], [0.0, 1.0]])
    norm = nn.BatchNorm1d(1).eval()
    with torch.no_grad():
        norm.running_var.fill_(1e30)
        norm.weight.fill_(1e-32)
    model.insert(2, norm)
    x = torch.ones(1, 1, 1, 1)
    assert copy.deepcopy(model).double()(x.double())[0].tolist() == pytest.approx([10.0, 1.0], rel=1e-5)
    assert not certify(model.eval(), x, torch.tensor([1]), 0.0, method=method).certified
    norm.running_var.fill_(-9.99e-6)
    with pytest.raises(ValueError, match="its running_var is below 0"):
        certify(model, x, torch.tensor([1]), 0.0, method=method)


class AsItIs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x

    def hull(self, lower: Tensor, upper: Tensor, solver: Solver | None = None) -> tuple[Tensor, Tensor]:
        return lower, upper


@pytest.mark.parametrize("method", METHODS)
def test_the_rounding_of_differences_of_weights_counts(method: str):
    """1 - 2⁻²⁵, which is rounded to 1, 1,500 times."""
    model, x = nn.Sequential(AsItIs(), nn.Linear(1502, 2)).eval(), torch.ones(1, 1502)
    with torch.no_grad():
        model[1].bias.zero_()
        model[1].weight.zero_()
        model[1].weight[0, :1500] = 1
        model[1].weight[1, :1500] = 2.0**-25
        model[1].weight[1, 1500:] = 1
        x[0, 1500:] = torch.tensor([1024.0, 476 - 2.0**-15])
        assert copy.deepcopy(model).double()(x.double()).argmax() == 1
    assert not certify(model, Box(x, x), torch.tensor([0]), method=method).certified


@pytest.mark.parametrize("method", METHODS)
def test_a_pool_with_windows_of_padding_alone_proves_nothing(method: str):
    model = nn.Sequential(nn.MaxPool2d(2, (1, 2), 1, dilation=2), nn.Flatten(), nn.Linear(3, 2)).eval()
    assert not certify(model, torch.rand(1, 1, 1, 6), torch.tensor([0]), 0.1, method=method).certified


def test_what_overflows_proves_nothing():
    model = nn.Sequential(nn.Flatten(), nn.Linear(7, 1), nn.Tanh(), nn.Linear(1, 2)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[3e38, 3e38, 3e38, -3e38, -3e38, -3e38, -3e38]]))
        model[1].bias.zero_()
        model[3].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model[3].bias.zero_()
    for label in (0, 1):
        for method in METHODS:
            assert not certify(
                model, torch.full((1, 1, 1, 7), 0.99), torch.tensor([label]), 0.01, method=method
            ).certified


def test_softplus_is_bounded_where_the_library_has_it_jump_and_round():
    for module, dtype in (
        (nn.Softplus(5), torch.float32),
        (nn.Softplus(30), torch.float32),
        (nn.Softplus(), torch.float64),
    ):
        x = torch.cat([torch.linspace(-25, 25, 40_001), torch.linspace(19.9, 20.1, 2001)]).to(dtype) / module.beta
        outputs = interval(module, Box(x, x), PROVEN)
        y = torch.logaddexp(module.beta * x.double(), torch.zeros(())) / module.beta
        assert ((outputs.lower <= y) & (y <= outputs.upper)).all()


def test_a_box_of_ones_own(digits):
    model, (x, y) = net(), digits
    box = pixel_box(model, x, 0.01)
    assert torch.equal(certify(model, box, y).margins, certify(model, x, y, 0.01).margins)
    assert torch.equal(interval_bounds(model, box).upper, interval_bounds(model, x, 0.01).upper)
    frame = torch.ones(28, 28)
    frame[4:-4, 4:-4] = 0
    patch = Box(x, x + frame * (1 - x))
    certified = certify(model, patch, y).certified
    attacked = pgd(model, patch, y, steps=20)
    assert ((attacked == x) | (frame > 0)).all()
    with torch.no_grad():
        assert (model(attacked).argmax(1) == y)[certified].all()
    for bad, message in (
        ((box, 0.1), "leave eps out, got 0.1"),
        ((x, None), "give eps"),
        ((Box(x + frame, x), None), f"lower ≤ upper, got {int(frame.sum()) * len(x)} of {x.numel()} entries"),
        ((Box(x - math.inf, x), None), "finite ends"),
    ):
        with pytest.raises(ValueError, match=message):
            certify(model, bad[0], y, bad[1])


def test_an_attack_stays_in_the_ball_and_leaves_no_trace(digits):
    model, (x, y) = net(), digits
    with torch.inference_mode():
        attacked = pgd(model, x, y.clone(), 0.05, steps=5, restarts=2)
        assert certify(model, x, y, 0.02).certified.any()
    assert not attacked.requires_grad
    assert ((attacked.double() - x.double()).abs() <= 0.05).all()
    assert (attacked >= 0).all()
    assert (attacked <= 1).all()
    assert torch.equal(pgd(model, x, y, 0.0, steps=1), x)
    with pytest.raises(RuntimeError, match="training mode"):
        pgd(net().train(), x, y, 0.1)
    with pytest.raises(ValueError, match="labels must be integers"):
        pgd(model, x, y.float(), 0.1)


def test_an_image_at_the_end_of_the_pixel_range():
    model = timm.create_model("pcdeq1_l_tanh_mnist").eval()
    box = pixel_box(model, torch.full((1, 1, 28, 28), 1.000009), 0.0)
    assert (box.lower <= box.upper).all()


def test_images_of_other_channels_than_the_config():
    model = timm.create_model("pcdeq1_mc_tanh_svhn").eval()
    with pytest.raises(ValueError, match="normalises 3 channels, and images have 1"):
        certify(model, torch.zeros(1, 1, 32, 32), torch.tensor([0]), 0.1)
    grey = timm.create_model("pcdeq1_mc_tanh_svhn", in_chans=1).eval()
    box = Box(torch.zeros(1, 1, 32, 32), torch.full((1, 1, 32, 32), 1e-3))
    assert interval_bounds(grey, box).lower.isfinite().all()
    with pytest.raises(ValueError, match="this model takes"):
        interval_bounds(grey, Box(*(end[:, :, 2:] for end in box)))


def test_dropout_cannot_be_shared_by_bounds():
    model = timm.create_model("pcdeq1_l_tanh_mnist", drop_rate=0.5)
    x, y = torch.rand(4, 1, 28, 28), torch.arange(4)
    with pytest.raises(ValueError, match="set its p to 0"):
        forward_with_margins(model.train(), x, y, 0.1)
    forward_with_margins(model.eval(), x, y, 0.1)


def test_the_hull_of_no_box():
    layer = PcDEQLinear(3)
    with pytest.raises(ValueError, match="a box needs lower ≤ upper, got 2 of 6 entries where it is not"):
        layer.hull(torch.tensor([[0.0, 1, 0]]).expand(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"a box needs ends of one shape, got \(2, 3\) and \(1, 3\)"):
        layer.hull(torch.zeros(2, 3), torch.zeros(1, 3))
    with pytest.raises(TypeError, match="solver must be a Solver"):
        layer.hull(torch.zeros(2, 3), torch.ones(2, 3), "certified")


def test_no_images_are_no_trouble():
    found = certify(net(), torch.zeros(0, 1, 28, 28), torch.zeros(0, dtype=torch.long), 0.1)
    assert found.certified.shape == (0,)
