"""MNIST, SVHN and CIFAR-10 as uint8 tensors, from local files, the package's sample, or the Hugging Face Hub."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from pcdeq_zoo.errors import one_line

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["DATASETS", "DataError", "Dataset", "as_digit", "load", "normalize"]

DATA_ROOT_VARIABLE = "PCDEQ_ZOO_DATA"
DEFAULT_DATA_ROOT = "../shared/data"
_SAMPLES = Path(__file__).parent / "samples"

Split = Literal["train", "test"]


class DataError(RuntimeError):
    """A data set that is missing, or not what it should be; the message says where, and what to do."""


@dataclass(frozen=True)
class Dataset:
    """What is known of a data set, and where its files are.

    Attributes:
        name: Last part of the model names: "mnist", "svhn" or "cifar".
        title: Name in the paper.
        folder: Its folder below the data root.
        hub_id: Data set on the Hugging Face Hub.
        hub_config: Folder of the parquet files in it.
        input_size: Channels, height, width.
        mean: Per channel, of pixels in [0, 1]; `normalize` subtracts it.
        std: Per channel; `normalize` divides by it.
        classes: Names of the labels 0 to 9.
        sizes: Images per split.
        terms: Under what terms the images may be used, and whose they are.
        read_torchvision: Images (N, C, H, W) and labels of a split, from a folder in torchvision's layout.
    """

    name: str
    title: str
    folder: str
    hub_id: str
    hub_config: str
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]
    sizes: dict[Split, int]
    terms: str
    read_torchvision: Callable[[str, Split], tuple[np.ndarray, list[int]]]


def _read_mnist(folder: str, split: Split) -> tuple[np.ndarray, list[int]]:
    from torchvision.datasets import MNIST

    data = MNIST(folder, train=split == "train")
    return data.data.numpy()[:, None], data.targets.tolist()


def _read_svhn(folder: str, split: Split) -> tuple[np.ndarray, list[int]]:
    from torchvision.datasets import SVHN

    data = SVHN(folder, split=split)
    return data.data, data.labels.tolist()


def _read_cifar(folder: str, split: Split) -> tuple[np.ndarray, list[int]]:
    from torchvision.datasets import CIFAR10

    data = CIFAR10(folder, train=split == "train")
    return data.data.transpose(0, 3, 1, 2), data.targets


_DIGITS = tuple("0123456789")

DATASETS = {
    "mnist": Dataset(
        name="mnist",
        title="MNIST",
        folder="mnist",
        hub_id="ylecun/mnist",
        hub_config="mnist",
        input_size=(1, 28, 28),
        mean=(0.0,),
        std=(1.0,),
        classes=_DIGITS,
        sizes={"train": 60_000, "test": 10_000},
        terms="LeCun, Cortes and Burges; CC BY-SA 3.0",
        read_torchvision=_read_mnist,
    ),
    "svhn": Dataset(
        name="svhn",
        title="SVHN",
        folder="svhn",
        hub_id="ufldl-stanford/svhn",
        hub_config="cropped_digits",
        input_size=(3, 32, 32),
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
        classes=_DIGITS,
        sizes={"train": 73_257, "test": 26_032},
        terms="Netzer et al., 2011; for non-commercial use only",
        read_torchvision=_read_svhn,
    ),
    "cifar": Dataset(
        name="cifar",
        title="CIFAR-10",
        folder="cifar10",
        hub_id="uoft-cs/cifar10",
        hub_config="plain_text",
        input_size=(3, 32, 32),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        sizes={"train": 50_000, "test": 10_000},
        terms="Krizhevsky, 2009; its authors state no licence",
        read_torchvision=_read_cifar,
    ),
}


def normalize(images: Tensor, dataset: Dataset) -> Tensor:
    """Turn uint8 images (N, C, H, W) into what the models take: float32, scaled to [0, 1], mean and std per channel.

    Raises:
        ValueError: Images of another number of channels.
    """
    if images.ndim != 4 or images.shape[1] != len(dataset.mean):
        raise ValueError(f"{dataset.title} images are (N, {len(dataset.mean)}, H, W), got {tuple(images.shape)}")
    mean, std = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (dataset.mean, dataset.std))
    return images.float().div(255).sub(mean).div(std)


def as_digit(picture: Image) -> tuple[Tensor, str]:
    """A picture of a digit as MNIST has them: white on black, 20 pixels high or wide, its center of mass in the middle.

    Args:
        picture: One digit on a plain ground, dark on light or light on dark, of any size and mode; turned as its EXIF
            data say.

    Returns:
        Pixels (1, 28, 28), uint8, for `normalize`; and what the picture was, in words.

    Raises:
        DataError: There is nothing in it.
    """
    from PIL import Image, ImageOps

    picture, mode = ImageOps.exif_transpose(picture), picture.mode
    light = _luminance(picture)
    ground = np.median(np.concatenate([light[0], light[-1], light[:, 0], light[:, -1]]))
    dark_on_light = bool(ground - light.min() > light.max() - ground)
    ink = 1 - light if dark_on_light else light
    ink = np.clip((ink - np.median(ink)) / max(np.ptp(ink), 1e-9), 0, 1)
    rows, columns = (np.flatnonzero(ink.max(axis) > 0.3) for axis in (1, 0))
    if not len(rows):
        raise DataError("there is nothing in the picture; wanted one digit on a plain ground")
    cut = Image.fromarray((255 * ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]).astype(np.uint8))
    scale = 20 / max(cut.size)
    cut = cut.resize((max(1, round(scale * cut.width)), max(1, round(scale * cut.height))), Image.Resampling.BOX)
    mass = np.asarray(cut, dtype=np.float64)
    if not mass.any():
        raise DataError("there are but specks in the picture; wanted one digit on a plain ground")
    middle = (mass.sum(axis) @ np.arange(mass.shape[1 - axis]) / mass.sum() for axis in (0, 1))
    left, top = (round(13.5 - place) for place in middle)
    canvas = Image.new("L", (28, 28))
    canvas.paste(cut, (left, top))
    polarity = "dark on light, inverted" if dark_on_light else "light on dark"
    return torch.from_numpy(np.array(canvas))[None], f"{picture.width}x{picture.height} {mode}, {polarity}"


def _luminance(picture: Image) -> np.ndarray:
    """Of a picture (H, W), from 0 to 1, with what is transparent in the shade that the rest of it is not."""
    if picture.mode.startswith(("I", "F")):  # 16 bits, which PIL's own conversion clips
        values = np.asarray(picture, dtype=np.float64)
        return (values - values.min()) / max(np.ptp(values), 1)
    color = picture.convert("RGBA")
    light, alpha = np.asarray(color.convert("L")) / 255.0, np.asarray(color)[..., 3] / 255.0
    mean = (light * alpha).sum() / max(alpha.sum(), 1e-9)
    return light * alpha + (mean < 0.5) * (1 - alpha)


def load(dataset: Dataset, split: Split, source: str | Path | None = None) -> tuple[Tensor, Tensor]:
    """Read a whole split into memory.

    Args:
        dataset: One of `DATASETS`.
        split: "train" or "test".
        source: A folder with parquet files (`train-*.parquet`, `test-*.parquet`, as on the Hub) or in torchvision's
            layout; "sample" for the 2,000 MNIST digits in this package; "hub" for the Hugging Face Hub. By default
            the data set's folder below `$PCDEQ_ZOO_DATA` (itself `../shared/data` by default) where there is one,
            else the Hub.

    Returns:
        Images (N, C, H, W), uint8, and labels (N,), int64.

    Raises:
        DataError: Nothing there, no network, or files that do not hold this data set.
        TypeError, ValueError: No such data set or split.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(f"dataset must be a Dataset, such as DATASETS['mnist'], got {dataset!r}")
    if split not in dataset.sizes:
        raise ValueError(f"split must be train or test, got {split!r}")
    if source is None:
        source = Path(os.environ.get(DATA_ROOT_VARIABLE, DEFAULT_DATA_ROOT)) / dataset.folder
        source = source if source.is_dir() else "hub"
    if source == "hub":
        files = _download(dataset, split)
    else:
        folder = _SAMPLES / dataset.folder if source == "sample" else Path(source)
        if not folder.is_dir():
            raise DataError(
                f"no {dataset.title} sample ships with the package, only one of MNIST"
                if source == "sample"
                else f"no data folder {folder}: give one that exists, or 'hub', or set {DATA_ROOT_VARIABLE}"
            )
        files = sorted(folder.glob(f"{split}-*.parquet"))
        if not files:
            return _read_torchvision(dataset, split, folder)
    return _read_parquet(dataset, files)


def _download(dataset: Dataset, split: Split) -> list[Path]:
    from huggingface_hub import snapshot_download

    pattern = f"{dataset.hub_config}/{split}-*.parquet"
    try:
        folder = snapshot_download(dataset.hub_id, repo_type="dataset", allow_patterns=pattern)
    except Exception as error:  # the client raises a dozen unrelated classes for "no network"
        raise DataError(
            f"could not get {dataset.title} ({dataset.hub_id}) from the Hugging Face Hub: "
            f"{one_line(error).rstrip('.')}. Without a network, put its parquet files into a folder and name it, or "
            f"set {DATA_ROOT_VARIABLE} to the parent of {dataset.folder}/"
            + ('; "sample" is 2,000 digits that ship' if dataset.name == "mnist" else "")
        ) from error
    files = sorted(Path(folder).glob(pattern))
    if not files:
        raise DataError(
            f"no {pattern} of {dataset.hub_id}, neither on the Hugging Face Hub nor, where there is no network, of an "
            f"earlier download in {folder}; name a folder that has it, or set {DATA_ROOT_VARIABLE}"
        )
    return files


def _read_parquet(dataset: Dataset, files: Iterable[Path]) -> tuple[Tensor, Tensor]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"reading parquet files needs pyarrow (pip install pyarrow): {one_line(error)}") from error

    images: list[np.ndarray] = []
    labels: list[int] = []
    for file in files:
        try:
            table = pq.read_table(file)
            classes = _class_names(table.schema.metadata or {})
        except Exception as error:  # pyarrow raises its own classes, OSError and more for damaged files
            raise DataError(f"cannot read {file} as parquet: {one_line(error)}") from error
        if not len(table):
            raise DataError(f"{file} holds no images")
        columns = [name for name in ("image", "img") if name in table.column_names]
        if len(columns) != 1 or table.column_names.count("label") != 1:
            raise DataError(f"{file} has columns {table.column_names}, wanted one of 'image' and 'img', and 'label'")
        if not pa.types.is_integer(table.schema.field("label").type):
            raise DataError(f"{file} has labels of type {table.schema.field('label').type}, wanted integers")
        # SVHN and CIFAR-10 have the same shape: where the file says what its labels mean, that must fit.
        if classes is not None and classes != dataset.classes:
            raise DataError(f"{file} has the classes {_list(classes)}; {dataset.title} has {_list(dataset.classes)}")
        for row, cell in enumerate(table[columns[0]].to_pylist()):
            images.append(_decode(dataset, f"{file}, row {row},", cell))
        labels += table["label"].to_pylist()
    return _tensors(dataset, np.stack(images), labels, ", ".join(map(str, files)))


def _class_names(metadata: dict[bytes, bytes]) -> tuple[str, ...] | None:
    """What the labels of a parquet file mean, if it says so."""
    features: dict[str, Any] = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = features.get("label", {}).get("names")
    return None if names is None else tuple(map(str, names))


def _decode(dataset: Dataset, where: str, cell: Any) -> np.ndarray:
    """Pixels (C, H, W) of an encoded image, as the cell {"bytes": ..., "path": ...} of the Hub or as bytes."""
    from PIL import Image

    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes):
        raise DataError(f"{where} holds {type(data).__name__}, wanted the bytes of an encoded image")
    channels, height, width = dataset.input_size
    try:
        image = Image.open(io.BytesIO(data))
        if image.size == (width, height):  # nothing else is worth the memory that its header may ask for
            image.load()
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and more for damaged images
        raise DataError(f"{where} holds an image that cannot be read: {one_line(error)}") from error
    if image.size != (width, height):
        raise DataError(f"{where} holds a {image.width}x{image.height} image, {dataset.title} has {width}x{height}")
    if image.mode not in ("1", "L", "P", "RGB"):
        raise DataError(f"{where} holds an image of mode {image.mode}, wanted 8 bits per channel and no transparency")
    array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return array.reshape(height, width, channels).transpose(2, 0, 1)


def _read_torchvision(dataset: Dataset, split: Split, folder: Path) -> tuple[Tensor, Tensor]:
    try:
        images, labels = dataset.read_torchvision(str(folder), split)
    except Exception as error:  # whatever the bytes of a damaged file come to
        raise DataError(
            f"{folder} holds neither {split}-*.parquet nor {dataset.title} in torchvision's layout: {one_line(error)}"
        ) from error
    return _tensors(dataset, images, labels, str(folder))


def _tensors(dataset: Dataset, images: np.ndarray, labels: list[int], where: str) -> tuple[Tensor, Tensor]:
    if images.dtype != np.uint8 or images.shape[1:] != dataset.input_size:
        raise DataError(
            f"{where} holds {images.dtype} images of shape {images.shape[1:]}, {dataset.title} has uint8 of shape "
            f"{dataset.input_size}"
        )
    if not len(images) or len(labels) != len(images):
        raise DataError(f"{where} holds {len(images)} images and {len(labels)} labels, wanted as many, and some")
    bad = sorted({label for label in labels if label is None or not 0 <= label < len(dataset.classes)}, key=str)
    if bad:
        raise DataError(f"{where} has labels {bad[:5]}, wanted 0 to {len(dataset.classes) - 1}")
    return torch.from_numpy(np.ascontiguousarray(images)), torch.tensor(labels)


def _list(classes: tuple[str, ...]) -> str:
    return ", ".join(classes[:20])
