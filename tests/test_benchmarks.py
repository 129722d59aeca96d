"""What the zoo is measured against solves the same problem: the same outputs and gradients, within its tolerance."""

import os
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from benchmarks.baselines import BASELINES, Paper, baseline, released
from benchmarks.run import gradient, solved_layers, unit_errors
from benchmarks.twins import LAYERS, twin
from pcdeq_zoo import PcDEQConv2d, PcDEQLinear, forward_with_margins, interval_bounds, pixel_box

AUTHORS = os.environ.get("PCDEQ_AUTHORS")

NETS = ["pcdeq1_l_tanh_mnist", "pcdeq2_mc_sigmoid_mnist", "pcdeq1_mc_softsign_mnist"]


@pytest.mark.parametrize("name", NETS)
def test_the_papers_algorithm_gives_the_same(name: str):
    model = timm.create_model(name, stop="residual", tol=1e-5).train()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, PcDEQLinear | PcDEQConv2d):
                layer.direction.uniform_()
                layer.magnitude.uniform_(0.3, 0.6)
    net = baseline(model, "paper").train()
    assert sum(isinstance(layer, Paper) for layer in net.modules()) == len(solved_layers(model))
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in model.parameters())

    images, labels = torch.rand(8, 1, 28, 28), torch.arange(8)
    ours, theirs = gradient(model, images, labels), gradient(net, images, labels)
    assert (ours - theirs).norm() < 0.02 * ours.norm()
    assert all(count > 0 for layer in solved_layers(net).values() for count in layer.evaluations.values())
    model.eval()
    net.eval()
    with torch.no_grad():
        torch.testing.assert_close(net(images), model(images), rtol=1e-2, atol=1e-3)
    errors = unit_errors(net, solved_layers(model), images)
    assert 0 < max(errors.values()) < 0.01


@pytest.mark.skipif(not AUTHORS, reason="$PCDEQ_AUTHORS names no checkout of https://github.com/mateuszgabor/pcdeq")
@pytest.mark.parametrize("name", NETS)
def test_the_plain_algorithm_is_the_one_that_was_released(name: str, monkeypatch):
    monkeypatch.setitem(BASELINES, "authors", released(Path(AUTHORS)))
    model = timm.create_model(name, pretrained=True).train()
    nets = [baseline(model, key).train() for key in ("paper", "authors")]
    images, labels = torch.rand(8, 1, 28, 28), torch.arange(8)
    ours, theirs = (gradient(net, images, labels) for net in nets)
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()
    counts = [[layer.evaluations for layer in solved_layers(net).values()] for net in nets]
    assert counts[0] == counts[1]


def test_a_folder_without_the_released_code(tmp_path):
    with pytest.raises(SystemExit, match=r"is no checkout of .*: no blocks.py, layers.py, solvers.py, utils.py"):
        released(tmp_path)


def test_the_projection_of_the_baseline():
    net = baseline(timm.create_model("pcdeq1_mc_tanh_mnist"), "paper")
    layer = next(layer for layer in net.modules() if isinstance(layer, Paper))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.sub_(1)
    layer.clamp()
    assert all((parameter >= 0).all() for parameter in layer.parameters())
    assert isinstance(layer.sigma, nn.Tanh)


@pytest.mark.parametrize("layer", LAYERS)
def test_twins_differ_in_their_layers_and_have_bounds_that_hold(layer: str):
    model, x, y = twin(layer), torch.rand(8, 1, 28, 28), torch.arange(8)
    assert list(model.features._modules) == list(twin("pcdeq").features._modules)
    _, margins = forward_with_margins(model.train(), x, y, 0.02)
    margins.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    with torch.no_grad():
        bounds, box = interval_bounds(model.eval(), x, 0.02), pixel_box(model, x, 0.02)
        for share in (0, 1, *torch.rand(5, *x.shape)):
            logits = model(torch.lerp(*box, torch.as_tensor(share, dtype=x.dtype)))
            assert ((bounds.lower - 0.01 <= logits) & (logits <= bounds.upper + 0.01)).all()
    weights = [module.weight.abs().sum((1, 2, 3)) for name, module in model.features.named_children() if "deq" in name]
    if layer == "bounded":
        assert all((sums <= 0.5 + 1e-6).all() for sums in weights)
