"""What may be loaded into a net: the same answer whatever the way in."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models._hub import save_for_hf

from pcdeq_zoo import PcDEQLinear, WeightsError

NAME = "pcdeq1_mc_tanh_mnist"
W = "features.deq1.direction"


def by_file(state: dict, folder: Path) -> None:
    torch.save(state, folder / "mine.pth")
    timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"file": str(folder / "mine.pth")})


def by_safetensors(state: dict, folder: Path) -> None:
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(state, folder / "mine.safetensors")
    timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"file": str(folder / "mine.safetensors")})


def by_state_dict(state: dict, folder: Path) -> None:
    timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"state_dict": state})


def by_checkpoint_path(state: dict, folder: Path) -> None:
    torch.save(state, folder / "mine.pth")
    timm.create_model(NAME, checkpoint_path=str(folder / "mine.pth"))


def by_load_state_dict(state: dict, folder: Path) -> None:
    timm.create_model(NAME).load_state_dict(state)


def by_folder(state: dict, folder: Path) -> None:
    save_for_hf(timm.create_model(NAME), str(folder), safe_serialization=True)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors")
    timm.create_model(f"local-dir:{folder}", pretrained=True)


TORCH = [by_file, by_state_dict, by_checkpoint_path, by_load_state_dict]
ALL = [*TORCH, by_safetensors, by_folder]

Change = Callable[[torch.Tensor], object]


def entry(value: float) -> Change:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return change


# What is changed, how, what is said, and whether safetensors can hold it.
CASES: list[tuple[str, Change, str, bool]] = [
    (W, entry(-1e-6), f"1 entries of {W} are below 0", True),
    (W, entry(math.nan), f"{W} has 1 entries that are NaN", True),
    (W, entry(math.inf), f"{W} has 1 entries that are NaN or infinite in torch.float32", True),
    (W, lambda t: entry(1e300)(t.double()), f"{W} has 1 entries that are NaN or infinite in torch.float32", True),
    (W, lambda t: torch.full_like(t, 7e18), f"{W} has rows whose norm overflows", True),
    (W, lambda t: t.int(), rf"{W} is torch.int32 torch.strided, wanted strided floating point", True),
    (W, lambda t: t > 0, rf"{W} is torch.bool torch.strided, wanted", True),
    (W, lambda t: t.to(torch.complex64), rf"{W} is torch.complex64 torch.strided, wanted", False),
    (W, lambda t: t.to_sparse(), rf"{W} is torch.float32 torch.sparse_coo, wanted", False),
    (W, lambda t: t.to("meta"), rf"{W} is torch.float32 meta, wanted", False),
    (W, lambda t: t[:-1], rf"{W} is \(11, 12, 3, 3\), wanted \(12, 12, 3, 3\)", True),
    (W, lambda t: t.sum(), rf"{W} is \(\), wanted \(12, 12, 3, 3\)", True),
    (W, lambda t: t.tolist(), f"{W} is a list, not a tensor", False),
    (W, lambda t: None, f"{W} is a NoneType, not a tensor", False),
    ("features.deq2.magnitude", entry(-0.5), "1 entries of features.deq2.magnitude are below 0", True),
    ("features.prenorm1.running_var", entry(-1e-3), "1 variances in features.prenorm1.running_var are below 0", True),
    ("features.prenorm1.running_mean", entry(math.nan), "features.prenorm1.running_mean has 1 entries that are", True),
    ("features.prenorm1.num_batches_tracked", lambda t: t.float(), "wanted strided integers", True),
    ("head.fc.bias", entry(math.inf), "head.fc.bias has 1 entries that are NaN or infinite", True),
    ("head.fc.bias", lambda t: t[:-1], r"head.fc.bias is \(9,\), wanted \(10,\)", True),
    ("head.fc.weight", lambda t: t[:, :-1], "(takes 47 features, and this net has 48|wanted \\(10, 48\\))", True),
    ("features.conv1.weight", lambda t: t[:, :, :2], "features.conv1.weight is", True),
    ("epoch", lambda t: 3, "it has no epoch", False),
    ("features.deq4.direction", lambda t: torch.ones(2, 2), "it has no features.deq4.direction", True),
    ("a\nb\x1b[2J", lambda t: torch.ones(2), r"it has no 'a\\nb\\x1b\[2J'", True),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize("way", ALL, ids=lambda way: way.__name__)
@pytest.mark.parametrize(("name", "change", "message", "plain"), CASES, ids=range(len(CASES)))
def test_refused_in_one_line(name: str, change: Change, message: str, plain: bool, way, tmp_path: Path):
    if way not in TORCH and not plain:
        pytest.skip("safetensors hold no such thing")
    state = timm.create_model(NAME).state_dict()
    state[name] = change(state.get(name))
    with pytest.raises(WeightsError, match=message) as caught:
        way(
            {key: t.contiguous() if isinstance(t, torch.Tensor) and not t.is_sparse else t for key, t in state.items()},
            tmp_path,
        )
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("way", ALL, ids=lambda way: way.__name__)
@pytest.mark.parametrize("missing", [W, "features.postnorm3.bias", "features.conv2.weight"])
def test_missing(missing: str, way, tmp_path: Path):
    state = timm.create_model(NAME).state_dict()
    del state[missing]
    with pytest.raises(WeightsError, match=f"these weights are not of this model: {missing} missing; they hold "):
        way(state, tmp_path)


def test_twice_by_different_names():
    state = timm.create_model(NAME).state_dict()
    state["features.deq1.weight_v"] = state[W]
    with pytest.raises(WeightsError, match=f"they hold {W} twice, by different names"):
        timm.create_model(NAME).load_state_dict(state)


def test_as_transformers_saves_it():
    """With `timm_model.` before every name."""
    model = timm.create_model(NAME).eval()
    other = timm.create_model(NAME).eval()
    other.load_state_dict({f"timm_model.{name}": tensor for name, tensor in model.state_dict().items()})
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(other(x), model(x))


def test_what_is_refused_leaves_the_net_as_it_was():
    model = timm.create_model(NAME)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = timm.create_model(NAME).state_dict()
    state["head.fc.bias"] = torch.full((10,), math.nan)
    with pytest.raises(WeightsError):
        model.load_state_dict(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_not_strict():
    """What is there is checked, what is not may be missing, as of any module."""
    model, state = timm.create_model(NAME), timm.create_model(NAME).state_dict()
    part = {"head.fc.bias": state["head.fc.bias"], "more": torch.ones(1)}
    keys = model.load_state_dict(part, strict=False)
    assert keys.unexpected_keys == ["more"]
    assert "head.fc.weight" in keys.missing_keys
    assert "head.fc.bias" not in keys.missing_keys
    assert torch.equal(model.head.fc.bias, state["head.fc.bias"])
    with pytest.raises(WeightsError, match="below 0"):
        model.load_state_dict({W: -state[W]}, strict=False)


def test_other_precisions_load():
    model = timm.create_model(NAME)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        state = {
            k: t.to(dtype) if t.is_floating_point() else t for k, t in timm.create_model(NAME).state_dict().items()
        }
        model.load_state_dict(state)
        assert torch.equal(model.head.fc.bias, state["head.fc.bias"].float())


@pytest.mark.parametrize(
    ("direction", "message"),
    [(-1.0, "16 entries of direction are below 0"), (math.nan, "that are NaN"), (1e19, "whose norm overflows")],
)
def test_a_layer_by_itself(direction: float, message: str):
    layer = PcDEQLinear(4)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict({"magnitude": torch.ones(4, 1), "direction": torch.full((4, 4), direction)})


def test_norms_that_overflow_are_no_zeros():
    """W = 0 would be certified."""
    layer = PcDEQLinear(4)
    with torch.no_grad():
        layer.direction.fill_(1e19)
    assert layer.weight.isnan().all()
    with pytest.raises(ValueError, match="norms of the rows of W overflow"):
        layer.set_weight(torch.full((4, 4), 3e38))


class TestArguments:
    """What the caller asks of pretrained weights."""

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            (
                {"activation": "relu6"},
                "are of activation='tanh', got 'relu6'; use pretrained=False, and load_state_dict",
            ),
            ({"structure": "sc"}, "are of structure='mc', got 'sc'"),
            ({"channels": (12, 24, 40)}, r"features.conv3.\w+ is \(48.*\), wanted \(40.*\)"),
            ({"img_size": 56}, "classifier of these weights takes 48 features, and this net has 432: keep img_size"),
            ({"global_pool": "catavgmax"}, "takes 48 features, and this net has 96: keep img_size and global_pool"),
        ],
    )
    def test_refused(self, kwargs: dict, message: str):
        with pytest.raises(WeightsError, match=message) as caught:
            timm.create_model(NAME, pretrained=True, **kwargs)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "kwargs",
        [
            {"num_classes": 3},
            {"num_classes": 0},
            {"in_chans": 3},
            {"img_size": 56, "global_pool": "avg"},
            {"img_size": 56, "num_classes": 3},
            {"tol": 1e-4, "on_failure": "ignore"},
            {"features_only": True},
        ],
    )
    def test_taken(self, kwargs: dict):
        """Every tensor that is not the classifier's or the stem's is that of the file."""
        state = timm.create_model(NAME, pretrained=True).state_dict()
        found = timm.create_model(NAME, pretrained=True, **kwargs).state_dict()
        for name, tensor in found.items():
            name = name.replace("features_", "features.")
            if name.startswith("head.") and "num_classes" in kwargs:
                continue
            if name != "features.conv1.weight" or "in_chans" not in kwargs:
                assert torch.equal(tensor, state[name]), name
