"""Thousands of damaged files, with a fixed seed: an error of ours in one line, or what the file says."""

import io
import json
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models._hub import save_for_hf

from pcdeq_zoo import DATASETS, DataError, WeightsError
from pcdeq_zoo.data import load
from pcdeq_zoo.weights import checkpoints

pytestmark = pytest.mark.slow

NAME = "pcdeq1_mc_tanh_mnist"
MNIST = DATASETS["mnist"]


def mutations(content: bytes, count: int) -> Iterator[bytes]:
    """Flipped bits, changed, lost, doubled and foreign bytes, cut ends; most near the beginning, where formats are."""
    dice = random.Random(0)
    for _ in range(count):
        data = bytearray(content)
        for _ in range(dice.choice((1, 1, 1, 2, 8))):
            place = int(len(data) * dice.random() ** dice.choice((1, 4)))
            kind = dice.randrange(7)
            if kind <= 1:
                data[min(place, len(data) - 1)] ^= 1 << dice.randrange(8)
            elif kind == 2:
                data[place : place + 1] = dice.randbytes(1)
            elif kind == 3:
                del data[place : place + dice.randrange(1, 64)]
            elif kind == 4:
                data[place:place] = data[: dice.randrange(64)]
            elif kind == 5:
                data[place : place + 8] = dice.choice((b"\xff" * 8, b"\0" * 8, b"[[[[{{{{", b"1e999999"))
            else:
                del data[place:]
            if not data:
                break
        yield bytes(data)


def outcome(function: Callable[[], object], *errors: type[Exception]) -> object:
    """What a function returns, or None where it raises an error of ours, in one line."""
    said = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of images that would be refused or are huge
        try:
            return function()
        except errors as error:
            said = str(error)
    assert "\n" not in said
    return None


def test_weights(tmp_path: Path):
    file, loaded = tmp_path / "mine.safetensors", 0
    for content in mutations(checkpoints()[f"{NAME}.zoo"].file.read_bytes(), 1500):
        file.write_bytes(content)
        overlay = {"file": str(file)}
        model = outcome(
            lambda overlay=overlay: timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay),
            WeightsError,
        )
        if model is not None:
            loaded += 1
            held = load_file(file)
            assert all(torch.equal(tensor, held[name]) for name, tensor in model.state_dict().items())
    assert 0 < loaded < 1500


def test_old_weights(tmp_path: Path):
    """As torch.save has them: a zip file with a pickle."""
    stream = io.BytesIO()
    torch.save(timm.create_model(NAME, pretrained=True).state_dict(), stream)
    file = tmp_path / "mine.pth"
    for content in mutations(stream.getvalue(), 500):
        file.write_bytes(content)
        overlay = {"file": str(file)}
        outcome(
            lambda overlay=overlay: timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay),
            WeightsError,
        )


def json_mutations(document: object, count: int) -> Iterator[object]:
    """The same document with one or two values replaced, removed or added, anywhere."""
    dice = random.Random(0)
    values = (None, True, -1, 0, 3, 10**20, 1.5, "", "x", "relu6", "head.fc", [], [1], {}, {"a": 1}, "../..", "1e9")
    keys = ("tol", "on_failure", "activation", "num_classes", "file", "url", "state_dict", "custom_load", "x" * 50)
    for _ in range(count):
        changed = json.loads(json.dumps(document))
        for _ in range(dice.choice((1, 2))):
            place = changed
            while True:
                inner = [key for key, value in place.items() if isinstance(value, dict)]
                if not inner or dice.random() < 0.4:
                    break
                place = place[dice.choice(inner)]
            key = dice.choice((*place, *keys))
            if dice.random() < 0.2:
                place.pop(key, None)
            else:
                place[key] = dice.choice(values)
        yield changed


def test_configs(tmp_path: Path):
    """A net is that of its weights, or there is none."""
    save_for_hf(timm.create_model(NAME, pretrained=True), str(tmp_path), safe_serialization=True)
    whole = json.loads((tmp_path / "config.json").read_text())
    state = timm.create_model(NAME, pretrained=True).state_dict()
    loaded = 0
    for config in json_mutations(whole, 1000):
        (tmp_path / "config.json").write_text(json.dumps(config))
        # Of what timm reads first it says itself what is wrong.
        errors = WeightsError, ValueError, TypeError, RuntimeError, KeyError, AttributeError
        model = outcome(lambda: timm.create_model(f"local-dir:{tmp_path}", pretrained=True), *errors)
        if model is None:
            continue
        loaded += 1
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name]), config
        assert model.solver.tol <= 1e-2
        assert model.solver.on_failure != "ignore"
    assert 0 < loaded < 1000


def test_parquet_files(tmp_path: Path):
    """The first 40 digits of the sample, in a file that is damaged."""
    source = next((Path(load.__globals__["_SAMPLES"]) / "mnist").glob("test-*.parquet"))
    whole = io.BytesIO()
    pq.write_table(pq.read_table(source).slice(0, 40), whole)
    file = tmp_path / "test-0.parquet"
    for content in mutations(whole.getvalue(), 2000):
        file.write_bytes(content)
        result = outcome(lambda: load(MNIST, "test", tmp_path), DataError)
        if result is not None:
            images, labels = result
            assert images.dtype == torch.uint8
            assert images.shape == (len(labels), 1, 28, 28)
            assert labels.min() >= 0
            assert labels.max() <= 9


def test_images(tmp_path: Path):
    stream = io.BytesIO()
    Image.effect_noise((28, 28), 50).save(stream, "PNG")
    for content in mutations(stream.getvalue(), 2000):
        table = pa.table({"image": [{"bytes": content, "path": None}], "label": [3]})
        pq.write_table(table, tmp_path / "test-0.parquet")
        result = outcome(lambda: load(MNIST, "test", tmp_path), DataError)
        assert result is None or result[0].shape == (1, 1, 28, 28)
