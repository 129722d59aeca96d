"""The loader: each layout it takes, and each way a folder can be wrong."""

import io
import json
import os
import pickle
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from processes import python

from pcdeq_zoo import DATASETS, DataError
from pcdeq_zoo.data import DATA_ROOT_VARIABLE, as_digit, load, normalize

MNIST, SVHN, CIFAR = DATASETS["mnist"], DATASETS["svhn"], DATASETS["cifar"]


def write_parquet(file: Path, dataset, n: int = 6, column: str = "image", names=None):
    """A file as the Hub has them, with random images; returns these (N, C, H, W) and the labels."""
    channels, height, width = dataset.input_size
    images = np.random.default_rng(0).integers(0, 256, (n, height, width, channels), dtype=np.uint8)
    labels = [i % 10 for i in range(n)]
    encoded = []
    for array in images:
        buffer = io.BytesIO()
        Image.fromarray(array[:, :, 0] if channels == 1 else array).save(buffer, "PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    table = pa.table(
        {column: pa.array(encoded, pa.struct([("bytes", pa.binary()), ("path", pa.string())])), "label": labels}
    )
    if names:
        features = {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.tensor(labels)


@pytest.mark.parametrize("dataset", DATASETS.values(), ids=DATASETS)
def test_parquet_in_several_files(tmp_path, dataset):
    one = write_parquet(tmp_path / "train-00000-of-00002.parquet", dataset, names=dataset.classes)
    two = write_parquet(tmp_path / "train-00001-of-00002.parquet", dataset, n=3)
    write_parquet(tmp_path / "test-00000-of-00001.parquet", dataset, n=1)
    images, labels = load(dataset, "train", tmp_path)
    assert torch.equal(images, torch.cat((one[0], two[0])))
    assert torch.equal(labels, torch.cat((one[1], two[1])))
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert len(load(dataset, "test", tmp_path)[0]) == 1


def test_the_hubs_column_name_for_cifar(tmp_path):
    images, _ = write_parquet(tmp_path / "test-0.parquet", CIFAR, column="img")
    assert torch.equal(load(CIFAR, "test", tmp_path)[0], images)


def test_environment_variable_names_the_default_root(tmp_path, monkeypatch):
    images, _ = write_parquet(tmp_path / "cifar10" / "test-0.parquet", CIFAR)
    monkeypatch.setenv(DATA_ROOT_VARIABLE, str(tmp_path))
    assert torch.equal(load(CIFAR, "test")[0], images)


def test_torchvisions_mnist_files(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    labels = np.arange(5, dtype=np.uint8)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, 5, 28, 28) + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, 5) + labels.tobytes())
    got, got_labels = load(MNIST, "test", tmp_path)
    assert torch.equal(got, torch.from_numpy(images)[:, None])
    assert got_labels.tolist() == [0, 1, 2, 3, 4]


def test_the_sample_is_the_beginning_of_mnist(sample, whole_test_set):
    images, labels = whole_test_set("mnist")
    assert torch.equal(sample[0], images[:400])
    assert torch.equal(sample[1], labels[:400])
    assert len(load(MNIST, "train", "sample")[0]) == 1600


@pytest.mark.parametrize("name", ["mnist", "cifar"])
def test_the_whole_data_sets(name: str, whole_test_set):
    dataset = DATASETS[name]
    images, labels = whole_test_set(name)
    assert len(images) == len(labels) == dataset.sizes["test"]
    assert len(labels.unique()) == 10


def test_normalize():
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 32, 32)
    x = normalize(pixels, CIFAR)
    for channel, (mean, std) in enumerate(zip(CIFAR.mean, CIFAR.std, strict=True)):
        torch.testing.assert_close(x[:, channel, 0, 0], torch.tensor([-mean / std, (1 - mean) / std]))
    assert torch.equal(normalize(pixels[:, :1], MNIST), pixels[:, :1].float() / 255)


class TestWrong:
    def refused(self, message: str, dataset=CIFAR, source=None, split="test"):
        with pytest.raises(DataError, match=message) as caught:
            load(dataset, split, source)
        assert "\n" not in str(caught.value)

    def test_no_folder(self, tmp_path):
        self.refused(
            f"no data folder .*: give one that exists, or 'hub', or set {DATA_ROOT_VARIABLE}", source=tmp_path / "no"
        )

    @pytest.mark.parametrize("dataset", DATASETS.values(), ids=DATASETS)
    def test_empty_folder(self, tmp_path, dataset):
        self.refused("holds neither test-.*parquet nor", dataset, tmp_path)

    def test_no_sample(self):
        self.refused("no CIFAR-10 sample ships with the package, only one of MNIST", source="sample")

    def test_no_images(self, tmp_path):
        write_parquet(tmp_path / "test-0.parquet", CIFAR, n=0)
        self.refused("holds no images", source=tmp_path)

    def test_other_classes(self, tmp_path):
        write_parquet(tmp_path / "test-0.parquet", SVHN, names=SVHN.classes)
        self.refused(r"has the classes 0, 1, .*; CIFAR-10 has airplane, ", source=tmp_path)

    def test_other_columns(self, tmp_path):
        write_parquet(tmp_path / "test-0.parquet", CIFAR, column="picture")
        self.refused(r"has columns \['picture', 'label'\], wanted one of 'image' and 'img', and", source=tmp_path)

    def test_damaged_file(self, tmp_path):
        (tmp_path / "test-0.parquet").write_bytes(b"PAR1 and no more")
        self.refused("cannot read .*test-0.parquet as parquet: ", source=tmp_path)

    def test_no_such_data_set_or_split(self):
        with pytest.raises(TypeError, match=r"dataset must be a Dataset, such as DATASETS\['mnist'\], got 'mnist'"):
            load("mnist", "test", "sample")
        with pytest.raises(ValueError, match="split must be train or test, got 'val'"):
            load(CIFAR, "val")

    def test_no_network(self, tmp_path):
        script = "import pcdeq_zoo, pcdeq_zoo.data as d; d.load(pcdeq_zoo.DATASETS['cifar'], 'test')"
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), DATA_ROOT_VARIABLE: str(tmp_path)}
        done = python("-c", script, env=environment)
        assert done.returncode == 1
        last = done.stderr.strip().splitlines()[-1]
        assert "DataError: could not get CIFAR-10 (uoft-cs/cifar10) from the Hugging Face Hub" in last
        assert f"set {DATA_ROOT_VARIABLE} to the parent of cifar10/" in last


@pytest.mark.parametrize(("ground", "ink"), [(0.0, 1.0), (0.6, 1.0), (0.55, 0.9), (1.0, 0.0), (0.45, 0.0), (0.5, 0.1)])
def test_a_digit_on_any_plain_ground(ground: float, ink: float):
    """White on black or on grey, dark on light or on less dark: the same digit."""
    strokes = np.zeros((90, 60))
    strokes[10:20, 10:50] = strokes[10:80, 40:50] = 1
    picture = Image.fromarray((255 * (ground + (ink - ground) * strokes)).astype(np.uint8))
    pixels, told = as_digit(picture)
    assert torch.equal(pixels, as_digit(Image.fromarray((255 * strokes).astype(np.uint8)))[0])
    assert told.endswith("dark on light, inverted" if ink < ground else "light on dark")


def test_specks_are_no_digit():
    pixels = np.full((3000, 3000), 255, np.uint8)
    pixels[100, 100] = pixels[2900, 2500] = 0
    with pytest.raises(DataError, match="specks in the picture; wanted one digit"):
        as_digit(Image.fromarray(pixels))


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 32, 32), (2, 32, 32, 3)])
def test_other_channels_are_not_broadcast(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"CIFAR-10 images are \(N, 3, H, W\), got "):
        normalize(torch.zeros(shape, dtype=torch.uint8), DATASETS["cifar"])


def png(mode: str = "RGB", size: tuple[int, int] = (32, 32), **options: object) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, "PNG", **options)
    return stream.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that declares a huge image."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return png()[:8] + struct.pack(">I", len(header)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png()[33:]


def cells(*values: object, kind: pa.DataType | None = None) -> pa.Array:
    return pa.array([{"bytes": value, "path": None} for value in values] if kind is None else list(values), kind)


# Of CIFAR-10: the columns of a file, and what is said of it. Rows count from 0.
BAD_FILES: list[tuple[dict[str, object], str]] = [
    ({"image": cells(png(), png()[:0])}, "row 1, holds an image that cannot be read: "),
    ({"image": cells(png(), png()[:20])}, "row 1, holds an image that cannot be read: "),
    ({"image": cells(png(), png()[:60])}, "row 1, holds an image that cannot be read: "),
    ({"image": cells(png(), b"\x89PNG\r\n\x1a\n" + bytes(range(256)))}, "row 1, holds an image that cannot be read: "),
    ({"image": cells(png(), bomb(2**30, 2**30))}, "row 1, holds an image that cannot be read: "),
    ({"image": cells(png(), bomb(9000, 9000))}, "row 1, holds a 9000x9000 image, CIFAR-10 has 32x32"),
    ({"image": cells(png(), png(size=(28, 28)))}, "row 1, holds a 28x28 image, CIFAR-10 has 32x32"),
    ({"image": cells(png(), png("I;16"))}, "row 1, holds an image of mode I(;16)?, wanted 8 bits per channel"),
    ({"image": cells(png(), png("RGBA"))}, "row 1, holds an image of mode RGBA, .* no transparency"),
    ({"image": cells(png(), png("LA"))}, "row 1, holds an image of mode LA, .* no transparency"),
    ({"image": cells(png(), None)}, "row 1, holds NoneType, wanted the bytes of an encoded image"),
    ({"image": pa.array([1, 2])}, "row 0, holds int, wanted the bytes of an encoded image"),
    ({"image": pa.array(["a.png", "b.png"])}, "row 0, holds str, wanted the bytes of an encoded image"),
    ({"image": pa.array([[0, 1], [2]])}, "row 0, holds list, wanted the bytes of an encoded image"),
    ({"image": pa.nulls(2)}, "row 0, holds NoneType, wanted the bytes of an encoded image"),
    ({"image": pa.array([{"path": "a.png"}] * 2)}, "row 0, holds NoneType, wanted the bytes of an encoded image"),
    ({"image": cells(png(), png()), "img": cells(png(), png())}, r"has columns \['image', 'img', 'label'\], wanted"),
    ({"label": pa.array(["cat", "dog"])}, "has labels of type string, wanted integers"),
    ({"label": pa.array([1.5, 2.0])}, "has labels of type double, wanted integers"),
    ({"label": pa.array([True, False])}, "has labels of type bool, wanted integers"),
    ({"label": pa.array([[1], [2]])}, "has labels of type list<.*>, wanted integers"),
    ({"label": pa.array([{"a": 1}] * 2)}, "has labels of type struct<.*>, wanted integers"),
    ({"label": pa.array([1, 2], pa.timestamp("s"))}, r"has labels of type timestamp\[.*\], wanted integers"),
    ({"label": pa.array([1, 2], pa.decimal128(5))}, r"has labels of type decimal128\(5, 0\), wanted integers"),
    ({"label": pa.nulls(2)}, "has labels of type null, wanted integers"),
    ({"label": pa.array([0, None])}, r"has labels \[None\], wanted 0 to 9"),
    ({"label": pa.array([10, -1])}, r"has labels \[-1, 10\], wanted 0 to 9"),
    ({"label": pa.array([2**63, 1], pa.uint64())}, r"has labels \[9223372036854775808\], wanted 0 to 9"),
]  # fmt: skip


@pytest.mark.parametrize(("columns", "message"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_bad_columns(tmp_path, columns: dict[str, object], message: str):
    table = pa.table({"image": cells(png(), png()), **columns, "label": columns.get("label", pa.array([0, 1]))})
    pq.write_table(table, tmp_path / "test-0.parquet")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(DataError, match=message) as caught:
            load(CIFAR, "test", tmp_path)
    assert str(tmp_path / "test-0.parquet") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "metadata",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"info": 3}',
        b'{"info": {"features": []}}',
        b'{"info": {"features": {"label": {"names": 3}}}}',
    ],
)
def test_damaged_metadata(tmp_path, metadata: bytes):
    table = pa.table({"image": cells(png()), "label": [0]}).replace_schema_metadata({"huggingface": metadata})
    pq.write_table(table, tmp_path / "test-0.parquet")
    with pytest.raises(DataError, match=r"cannot read .*test-0.parquet as parquet: ") as caught:
        load(CIFAR, "test", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_a_column_of_bytes(tmp_path, kind: pa.DataType):
    images, _ = write_parquet(tmp_path / "train-0.parquet", CIFAR)
    encoded = [cell["bytes"] for cell in pq.read_table(tmp_path / "train-0.parquet")["image"].to_pylist()]
    pq.write_table(pa.table({"image": cells(*encoded, kind=kind), "label": [0] * 6}), tmp_path / "test-0.parquet")
    assert torch.equal(load(CIFAR, "test", tmp_path)[0], images)


def test_loops_and_folders_in_the_place_of_files(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "test-0.parquet").symlink_to(tmp_path / "test-0.parquet")
    (tmp_path / "train-0.parquet").mkdir()
    for source, split, message in (
        (tmp_path / "loop", "test", "no data folder "),
        (tmp_path, "test", "cannot read "),
        (tmp_path, "train", "cannot read |holds no images|has columns"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            load(CIFAR, split, source)
        assert "\n" not in str(caught.value)


def write_idx(folder: Path, images: bytes, labels: bytes) -> None:
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)


def idx(*shape: int) -> bytes:
    return struct.pack(f">I{len(shape)}I", 0x800 + len(shape), *shape) + bytes(np.prod(shape))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (b"", b"", "in torchvision's layout: "),
        (b"text", b"text", "in torchvision's layout: "),
        (idx(5, 28, 28)[:-7], idx(5), "in torchvision's layout: "),
        (idx(5, 28, 28), idx(5)[:-1], "in torchvision's layout: "),
        (idx(5, 14, 14), idx(5), r"holds uint8 images of shape \(1, 14, 14\), MNIST has uint8 of shape \(1, 28, 28\)"),
        (idx(10, 28, 28), idx(20), "holds 10 images and 20 labels, wanted as many"),
        (idx(0, 28, 28), idx(0), "holds 0 images and 0 labels|in torchvision's layout"),
        (idx(5, 28, 28), idx(5)[:8] + bytes([0, 1, 2, 3, 77]), r"has labels \[77\], wanted 0 to 9"),
    ],
)
def test_bad_torchvision_files(tmp_path, images: bytes, labels: bytes, message: str):
    write_idx(tmp_path, images, labels)
    with pytest.raises(DataError, match=message) as caught:
        load(MNIST, "test", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_pickle_in_torchvisions_old_place_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    processed = tmp_path / "MNIST" / "processed"
    processed.mkdir(parents=True)
    for name in ("training.pt", "test.pt"):
        (processed / name).write_bytes(pickle.dumps(Payload()))
    with pytest.raises(DataError, match="in torchvision's layout: "):
        load(MNIST, "test", tmp_path)
    assert not (tmp_path / "ran").exists()
