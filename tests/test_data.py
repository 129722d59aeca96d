"""The loader: each layout it takes, and each way a folder can be wrong."""

import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pcdeq_zoo import DATASETS, DataError
from pcdeq_zoo.data import DATA_ROOT_VARIABLE, load, normalize

MNIST, SVHN, CIFAR = DATASETS["mnist"], DATASETS["svhn"], DATASETS["cifar"]


def write_parquet(file: Path, dataset, n: int = 6, column: str = "image", labels=None, names=None, size=None):
    """A file as the Hub has them, with random images; returns these (N, C, H, W) and the labels."""
    channels, height, width = dataset.input_size
    images = np.random.default_rng(0).integers(0, 256, (n, size or height, size or width, channels), dtype=np.uint8)
    labels = [i % 10 for i in range(n)] if labels is None else labels
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

    @pytest.mark.parametrize("length", [0, 20, 60, 500])
    def test_damaged_image(self, tmp_path, length: int):
        file = tmp_path / "test-0.parquet"
        write_parquet(file, CIFAR, n=1)
        table = pq.read_table(file)
        (image,) = table["image"].to_pylist()
        damaged = pa.array([{**image, "bytes": image["bytes"][:length]}], table["image"].type)
        pq.write_table(table.set_column(table.column_names.index("image"), "image", damaged), file)
        self.refused("holds an image that cannot be read: ", source=tmp_path)

    def test_labels_out_of_range(self, tmp_path):
        write_parquet(tmp_path / "test-0.parquet", CIFAR, n=3, labels=[0, 10, -1])
        self.refused(r"has labels \[-1, 10\], wanted 0 to 9", source=tmp_path)

    def test_missing_label(self, tmp_path):
        file = tmp_path / "test-0.parquet"
        write_parquet(file, CIFAR, n=2)
        pq.write_table(pq.read_table(file).set_column(1, "label", pa.array([0, None])), file)
        self.refused(r"has labels \[None\], wanted 0 to 9", source=tmp_path)

    def test_other_size(self, tmp_path):
        write_parquet(tmp_path / "test-0.parquet", CIFAR, size=28)
        self.refused("holds a 28x28 image, CIFAR-10 has 32x32", source=tmp_path)

    def test_other_classes(self, tmp_path):
        write_parquet(tmp_path / "test-0.parquet", SVHN, names=SVHN.classes)
        self.refused(r"has the classes 0, 1, .*; CIFAR-10 has airplane, ", source=tmp_path)

    def test_other_columns(self, tmp_path):
        write_parquet(tmp_path / "test-0.parquet", CIFAR, column="picture")
        self.refused(r"has columns \['picture', 'label'\], wanted 'image' \(or 'img'\) and 'label'", source=tmp_path)

    def test_damaged_file(self, tmp_path):
        (tmp_path / "test-0.parquet").write_bytes(b"PAR1 and no more")
        self.refused(r"cannot read .*test-0.parquet \(16 bytes\) as parquet", source=tmp_path)

    def test_split(self):
        with pytest.raises(ValueError, match="split must be train or test, got 'val'"):
            load(CIFAR, "val")

    def test_no_network(self, tmp_path):
        script = "import pcdeq_zoo, pcdeq_zoo.data as d; d.load(pcdeq_zoo.DATASETS['cifar'], 'test')"
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), DATA_ROOT_VARIABLE: str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert done.returncode == 1
        last = done.stderr.strip().splitlines()[-1]
        assert "DataError: could not get CIFAR-10 (uoft-cs/cifar10) from the Hugging Face Hub" in last
        assert f"set {DATA_ROOT_VARIABLE} to the parent of cifar10/" in last


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 32, 32), (2, 32, 32, 3)])
def test_other_channels_are_not_broadcast(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"CIFAR-10 images are \(N, 3, H, W\), got "):
        normalize(torch.zeros(shape, dtype=torch.uint8), DATASETS["cifar"])
