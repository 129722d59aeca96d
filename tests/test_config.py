"""Configs that come with weights, from the Hub or a folder: the net is the one that the weights are of."""

import json
from pathlib import Path

import pytest
import timm
import torch
from timm.models._hub import save_for_hf

from pcdeq_zoo import WeightsError

NAME = "pcdeq1_l_relu6_mnist"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_for_hf(timm.create_model(NAME, pretrained=True), str(folder), safe_serialization=True)
    return folder


def changed(saved: Path, folder: Path, change) -> str:
    """A copy whose config was changed; its name for `timm.create_model`."""
    config = json.loads((saved / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    return f"local-dir:{folder}"


def model_args(**values: object):
    return lambda config: config.setdefault("model_args", {}).update(values)


def pretrained_cfg(**values: object):
    return lambda config: config["pretrained_cfg"].update(values)


def top(**values: object):
    return lambda config: config.update(values)


def own_input_size(value: object):
    """Without model_args, from which timm makes it."""
    return lambda config: config.update(model_args={}) or config["pretrained_cfg"].update(input_size=value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (top(num_classes=0), "contradicts itself: num_classes 0, and 10 in model_args|have 10 classes, .* says 0"),
        (model_args(num_classes=9), "contradicts itself: num_classes 10, and 9 in model_args"),
        (top(num_classes=9, model_args={"num_classes": 9}), "these weights have 10 classes, and their config says 9"),
        (own_input_size([1, 28]), r"has input_size \[1, 28\], wanted channels, height, width"),
        (own_input_size("x"), "has input_size 'x', wanted channels, height, width"),
        (top(num_classes="x", model_args={}), "has num_classes 'x', wanted a number"),
        (pretrained_cfg(nonsense=1), "pretrained_cfg of these weights is none of timm's: .* 'nonsense'"),
        (model_args(in_chans=10**20), "has input_size .1000.*, 28, 28.?, wanted channels"),
        (model_args(img_size=[28, -1]), "has input_size .*, wanted channels, height, width"),
        (model_args(channels=["a"]), r"sets channels to \['a'\], wanted 0 to 65536"),
        (model_args(num_classes="10"), "sets num_classes to '10', wanted int"),
        (model_args(num_classes=True), "sets num_classes to True, wanted int"),
        (model_args(activation="tanh"), "are of activation='relu6', got 'tanh'"),
        (model_args(structure="sc"), "are of structure='l', got 'sc'"),
        (model_args(pretrained_strict=False), "sets 'pretrained_strict'; it may set num_classes, "),
        (model_args(features_only=True), "sets 'features_only'; it may set num_classes, "),
        (model_args(tol=1e9), "sets tol to 1000000000.0, wanted at most 0.01"),
        (model_args(tol=-1), "sets tol to -1, wanted "),
        (model_args(tol=float("nan")), "sets tol to nan, wanted at most 0.01"),
        (model_args(on_failure="ignore"), "sets on_failure='ignore'; say on_failure='warn', and set"),
        (model_args(in_chans=3), r"features.conv1.weight is \(80, 1, 28, 28\), wanted \(80, 3, 28, 28\)"),
        (
            pretrained_cfg(architecture="pcdeq1_l_tanh_mnist"),
            "a config of pcdeq1_l_relu6_mnist whose pretrained_cfg is of",
        ),
    ],
)
def test_refused_in_one_line(saved: Path, tmp_path: Path, change, message: str):
    with pytest.raises(WeightsError, match=message) as caught:
        timm.create_model(changed(saved, tmp_path, change), pretrained=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: None,
        pretrained_cfg(classifier="features.conv1"),
        pretrained_cfg(classifier=["head.fc", "features.conv1"]),
        pretrained_cfg(classifier=None),
        pretrained_cfg(first_conv="head.fc"),
        pretrained_cfg(label_offset=1),
        pretrained_cfg(custom_load=True),
        pretrained_cfg(state_dict={"a": 1}),
        pretrained_cfg(url="http://127.0.0.1:9/weights.pth"),
        model_args(tol=1e-4, stop="residual", on_failure="raise", drop_rate=0.1),
    ],
)
def test_what_a_config_cannot_change(saved: Path, tmp_path: Path, change):
    """Every tensor is that of the file."""
    model = timm.create_model(changed(saved, tmp_path, change), pretrained=True).eval()
    for name, tensor in timm.create_model(NAME, pretrained=True).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_what_the_caller_may_ask(saved: Path, tmp_path: Path):
    loose = changed(saved, tmp_path, model_args(tol=0.05, on_failure="ignore"))
    model = timm.create_model(loose, pretrained=True, tol=1e-4, on_failure="raise")
    assert (model.solver.tol, model.solver.on_failure) == (1e-4, "raise")
    state = timm.create_model(NAME, pretrained=True).state_dict()
    model = timm.create_model(f"local-dir:{saved}", pretrained=True, num_classes=3, in_chans=3)
    assert model.num_classes == 3
    assert torch.equal(model.features.deq1.direction, state["features.deq1.direction"])
