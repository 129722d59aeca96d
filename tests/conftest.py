"""Fixtures: data of the machine where there is any, the package's sample everywhere."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pcdeq_zoo import DATASETS
from pcdeq_zoo.data import DATA_ROOT_VARIABLE, load

DATA_ROOT = Path(os.environ.get(DATA_ROOT_VARIABLE, "../shared/data"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def sample() -> tuple[Tensor, Tensor]:
    """The 400 MNIST test images that ship with the package, uint8, and their labels."""
    return load(DATASETS["mnist"], "test", "sample")


@pytest.fixture(scope="session")
def mnist_test() -> tuple[Tensor, Tensor]:
    """All 10,000 MNIST test images, uint8, and their labels."""
    if not (DATA_ROOT / "mnist").is_dir():
        pytest.skip(f"needs the whole of MNIST: no folder {DATA_ROOT / 'mnist'}; set {DATA_ROOT_VARIABLE}")
    return load(DATASETS["mnist"], "test", DATA_ROOT / "mnist")
