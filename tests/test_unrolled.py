"""Unrolled models: as good as their evaluations, and read by an existing verifier, where there is one.

PYTHONPATH=path/to/auto_LiRPA python -m pytest tests/test_unrolled.py
"""

import pytest
import timm
import torch
from oracles import every_layer, make, truth
from torch import nn

from pcdeq_zoo import VARIANTS, PcDEQLinear, certify, interval_bounds, pgd, unrolled
from pcdeq_zoo.data import normalize
from pcdeq_zoo.pooling import CompactMaxPool2d

NETS = {
    "pcdeq1_l_tanh_mnist": 100,
    "pcdeq2_l_sigmoid_mnist": 16,
    "pcdeq1_mc_softsign_mnist": 60,
    "pcdeq1_mc_relu6_mnist": 60,
}
every_net = pytest.mark.parametrize("name", NETS)


@pytest.fixture(scope="module")
def digits(request):
    images, labels = request.getfixturevalue("sample")
    return normalize(images[:100], VARIANTS["pcdeq1_l_tanh_mnist"].dataset), labels[:100]


@every_layer
def test_iterates_rise_to_the_equilibrium(kind: str, activation: str):
    layer, u = make(kind, activation, 2.0)
    exact = truth(layer, u)
    before = torch.zeros_like(exact)
    for evaluations in (1, 2, 5, 20, 200):
        z = unrolled(nn.Sequential(layer), evaluations)(u).flatten(1)
        assert (z >= before).all()
        assert (z <= exact + 1e-12).all()
        if activation == "sigmoid":
            assert (exact - z <= 2.0**-evaluations * exact + 1e-12).all()
        before = z
    torch.testing.assert_close(before, exact)


@pytest.mark.parametrize("shape", [(3, 12), (3, 12, 1), (3, 4, 3), (3, 3, 2, 2), (3, 12, 1, 1)])
def test_a_linear_layer_of_any_sample_shape(shape: tuple[int, ...]):
    layer, u = PcDEQLinear(12, "tanh"), torch.randn(shape)
    layer.set_weight(torch.rand(12, 12) / 6)
    layer.solver.tol = 1e-6
    torch.testing.assert_close(unrolled(nn.Sequential(layer), 100)(u), layer(u), rtol=1e-4, atol=1e-5)


def test_an_input_that_is_zero_in_floats():
    layer = PcDEQLinear(1, "relu6")
    layer.set_weight(torch.tensor([[2.0]]))
    assert unrolled(nn.Sequential(layer), 200)(torch.tensor([[-30.0]])).item() == layer(torch.tensor([[-30.0]])).item()


def test_a_pool_beside_a_linear_layer_and_half_precision():
    net = nn.Sequential(PcDEQLinear(16, "tanh"), CompactMaxPool2d(), nn.Flatten(), nn.Linear(16, 2)).bfloat16().eval()
    u = torch.randn(3, 1, 4, 4).bfloat16()
    torch.testing.assert_close(unrolled(net, 50)(u), net(u), rtol=0.05, atol=0.05)


def test_a_subclass_may_compute_something_else():
    class Minus(PcDEQLinear):
        def forward(self, u: torch.Tensor) -> torch.Tensor:
            return 1 - super().forward(u)

        def hull(self, lower: torch.Tensor, upper: torch.Tensor, solver=None) -> tuple[torch.Tensor, torch.Tensor]:
            return tuple(1 - end for end in reversed(super().hull(lower, upper, solver)))

    with pytest.raises(TypeError, match=r"0, Minus.* may compute something else than the layer it is a subclass of"):
        unrolled(nn.Sequential(Minus(4)), 10)


@every_net
def test_an_unrolled_net_gives_the_same(name: str, digits):
    model = timm.create_model(name, pretrained=True, stop="residual", tol=1e-6).eval()
    with torch.no_grad():
        torch.testing.assert_close(unrolled(model, NETS[name])(digits[0]), model(digits[0]), rtol=1e-3, atol=5e-3)


def test_it_is_a_copy(digits):
    model = timm.create_model("pcdeq1_l_tanh_mnist", pretrained=True).eval()
    net = unrolled(model, 5)
    before = net(digits[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert torch.equal(net(digits[0]), before)
    for evaluations in (0, 2.0, True):
        with pytest.raises(ValueError, match="evaluations must be an integer of at least 1"):
            unrolled(model, evaluations)


def test_an_attack_through_all_steps_finds_nothing_that_was_certified(digits):
    """Gradients by autograd through the iterations owe nothing to the implicit ones."""
    model, (x, y) = timm.create_model("pcdeq1_l_tanh_mnist", pretrained=True).eval(), digits
    certified = certify(model, x, y, 0.01).certified
    adversarial = pgd(unrolled(model, 30), x, y, 0.01, steps=20)
    with torch.no_grad():
        labels = model(adversarial).argmax(1)
    assert 50 < certified.sum() < 100
    assert (labels == y)[certified].all()


@pytest.mark.filterwarnings("ignore")  # of auto_LiRPA, on a PyTorch newer than it knows
@every_net
def test_intervals_are_those_of_an_existing_verifier(name: str, digits):
    """auto_LiRPA (https://github.com/Verified-Intelligence/auto_LiRPA) on the unrolled net."""
    lirpa = pytest.importorskip("auto_LiRPA", reason="auto_LiRPA is not on the path")
    model, x, eps = timm.create_model(name, pretrained=True).eval(), digits[0][:4], 0.003
    ours = interval_bounds(model, x, eps, clip=False)
    bounded = lirpa.BoundedModule(unrolled(model, NETS[name]), torch.zeros_like(x[:1]))
    ball = lirpa.BoundedTensor(x, lirpa.PerturbationLpNorm(norm=float("inf"), eps=eps))
    lower, upper = bounded.compute_bounds(x=(ball,), method="IBP")
    slack = 0.02 * (
        upper - lower
    )  # solves and rounding, which ours cover; what evaluations leave open, which theirs have
    for theirs, end in ((lower, ours.lower), (upper, ours.upper)):
        assert ((theirs - end).abs() <= slack).all()
