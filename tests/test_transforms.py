"""torch.func, vmap and forward mode: the same derivatives as autograd's, by other ways."""

import functools

import pytest
import timm
import torch
import torch.nn.functional as F
from oracles import every_layer, make
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

from pcdeq_zoo import PcDEQLinear, Solver, record_solves
from pcdeq_zoo.pooling import CompactMaxPool2d

# PyTorch scripts its decompositions when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")

close = functools.partial(torch.testing.assert_close, rtol=1e-8, atol=1e-10)


def call(layer: nn.Module, x: Tensor, magnitude: Tensor, direction: Tensor) -> Tensor:
    return functional_call(layer, {"magnitude": magnitude, "direction": direction}, (x,))


def away_from_kinks(layer: nn.Module) -> None:
    """No zeros in W: there its derivative is one-sided."""
    with torch.no_grad():
        layer.direction.add_(0.05)


@every_layer
def test_grad_is_autograds(kind: str, activation: str):
    layer, x = make(kind, activation)
    mask = torch.randn_like(x)
    inputs = [x, *(p.detach() for p in layer.parameters())]
    got = grad(lambda *values: (call(layer, *values) * mask).sum(), argnums=(0, 1, 2))(*inputs)
    x.requires_grad_()
    for mine, theirs in zip(got, torch.autograd.grad((layer(x) * mask).sum(), [x, *layer.parameters()]), strict=True):
        close(mine, theirs)


@every_layer
def test_tangents_are_those_of_finite_differences(kind: str, activation: str):
    """Of the input and of both parameters at once, and of each alone."""
    layer, x = make(kind, activation)
    away_from_kinks(layer)
    values = (x, *(p.detach() for p in layer.parameters()))
    directions = tuple(torch.randn_like(value) for value in values)
    step = 1e-6
    for chosen in ((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        tangents = tuple(c * d for c, d in zip(chosen, directions, strict=True))
        _, got = jvp(functools.partial(call, layer), values, tangents)
        ends = [call(layer, *(v + s * t for v, t in zip(values, tangents, strict=True))) for s in (step, -step)]
        torch.testing.assert_close(got, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-7)


@every_layer
def test_the_tangent_is_the_adjoint_of_the_gradient(kind: str, activation: str):
    """⟨a, J t⟩ = ⟨Jᵀ a, t⟩, and torch.autograd's forward mode is torch.func's."""
    layer, x = make(kind, activation)
    t, a = torch.randn_like(x), torch.randn_like(x)
    _, tangent = jvp(layer, (x,), (t,))
    (gradient,) = torch.autograd.grad((layer(x.requires_grad_()) * a).sum(), x)
    assert (tangent * a).sum().item() == pytest.approx((gradient * t).sum().item(), rel=1e-9)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), t)
        assert torch.equal(forward_ad.unpack_dual(layer(dual)).tangent, tangent)
        with torch.no_grad(), record_solves(layer) as solves:
            for same in (layer(dual), *layer.hull(dual, dual)):
                close(forward_ad.unpack_dual(same).tangent, tangent)
        # Tangents are solved for, and not pushed through every evaluation of the solve.
        assert [solve.direction for solve in solves] == ["forward", "tangent"] * 2


@every_layer
def test_jacobians(kind: str, activation: str):
    """Backwards and forwards: both as autograd has them row by row."""
    layer, x = make(kind, activation)
    x = x[:2]
    rows = torch.autograd.functional.jacobian(layer, x)
    close(jacrev(layer)(x), rows)
    close(jacfwd(layer)(x), rows)


def test_autograds_own_vectorisation_says_what_to_use():
    layer, pool = PcDEQLinear(3, "tanh"), CompactMaxPool2d()
    for module, x in ((layer, torch.randn(2, 3)), (pool, torch.randn(2, 1, 5, 5))):
        with pytest.raises(NotImplementedError, match=r"use torch.func.jacrev, jacfwd or vmap, which can"):
            torch.autograd.functional.jacobian(module, x, vectorize=True)


def test_jacobians_of_the_pool():
    """By positions of two bytes as PyTorch's own has them; only its second derivative, which is 0, is not asked."""
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    own = torch.nn.MaxPool2d(3, stride=1, padding=1)
    wanted = torch.autograd.functional.jacobian(own, x)
    with torch.enable_grad():
        for jacobian in (jacrev, jacfwd):
            assert torch.equal(jacobian(CompactMaxPool2d())(x), wanted)
    t = torch.randn_like(x)
    assert torch.equal(jvp(CompactMaxPool2d(), (x,), (t,))[1], jvp(own, (x,), (t,))[1])


@every_layer
def test_gradients_of_each_sample(kind: str, activation: str):
    layer, x = make(kind, activation)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(layer, parameters, (sample[None],)).square().sum()

    got = vmap(grad(loss), (None, 0))(parameters, x)
    for i in range(len(x)):
        wanted = torch.autograd.grad(layer(x[i : i + 1]).square().sum(), list(layer.parameters()))
        for name, theirs in zip(parameters, wanted, strict=True):
            close(got[name][i], theirs)


@every_layer
def test_vmap_over_weights_is_an_ensemble(kind: str, activation: str):
    layer, x = make(kind, activation)
    layers = [layer, make(kind, activation)[0], make(kind, activation)[0]]
    stacked = [torch.stack([getattr(one, name).detach() for one in layers]) for name in ("magnitude", "direction")]
    wanted = torch.stack([one(x) for one in layers])
    close(vmap(functools.partial(call, layer), (None, 0, 0))(x, *stacked), wanted)
    close(vmap(functools.partial(call, layer), (None, 0, 0), out_dims=1)(x, *stacked), wanted.movedim(0, 1))


@every_layer
def test_gradients_of_an_ensemble(kind: str, activation: str):
    layer, x = make(kind, activation)
    layers = [layer, make(kind, activation)[0]]
    stacked = [torch.stack([getattr(one, name).detach() for one in layers]) for name in ("magnitude", "direction")]
    got = vmap(grad(lambda *values: call(layer, x, *values).square().sum(), (0, 1)))(*stacked)
    for i, one in enumerate(layers):
        wanted = torch.autograd.grad(one(x).square().sum(), list(one.parameters()))
        for mine, theirs in zip(got, wanted, strict=True):
            close(mine[i], theirs)


@every_layer
def test_jacobians_with_respect_to_the_parameters(kind: str, activation: str):
    layer, x = make(kind, activation)
    away_from_kinks(layer)
    parameters = tuple(p.detach() for p in layer.parameters())
    function = functools.partial(call, layer, x[:1])
    for index, wanted in enumerate(torch.autograd.functional.jacobian(function, parameters)):
        for jacobian in (jacrev, jacfwd):
            close(jacobian(function, argnums=index)(*parameters), wanted)


@pytest.mark.parametrize("name", ["pcdeq1_mc_tanh_mnist", "pcdeq2_l_sigmoid_mnist"])
def test_gradients_of_each_sample_of_a_whole_net(name: str):
    model = timm.create_model(name, stop="residual", tol=1e-12, max_evals=2000).double().eval()
    images, labels = torch.rand(3, 1, 28, 28, dtype=torch.float64), torch.tensor([1, 5, 9])
    parameters = {key: p.detach() for key, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (image[None],)), label[None])

    got = vmap(grad(loss), (None, 0, 0))(parameters, images, labels)
    for i in range(3):
        model.zero_grad()
        F.cross_entropy(model(images[i : i + 1]), labels[i : i + 1]).backward()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(got[key][i], parameter.grad, rtol=1e-6, atol=1e-9)
    tangent = torch.randn_like(images)
    _, pushed = jvp(model, (images,), (tangent,))
    ends = [model(images + s * tangent) for s in (1e-6, -1e-6)]
    torch.testing.assert_close(pushed, (ends[0] - ends[1]) / 2e-6, rtol=1e-4, atol=1e-7)


def test_second_derivatives_say_that_there_are_none():
    layer = PcDEQLinear(3, "tanh")
    x, t = torch.randn(2, 3), torch.randn(2, 3)
    gradient = grad(lambda x: layer(x).sum())
    for attempt in (lambda: jvp(gradient, (x,), (t,)), lambda: grad(lambda x: gradient(x).sum())(x)):
        with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
            attempt()


def test_solves_of_tangents_are_recorded():
    layer = PcDEQLinear(3, "tanh", solver=Solver(tol=1e-4))
    with record_solves(layer) as solves:
        jvp(layer, (torch.randn(2, 3),), (torch.randn(2, 3),))
    assert [solve.direction for solve in solves] == ["forward", "tangent"]
