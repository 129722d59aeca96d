"""Fixtures: data of the machine where there is any, the package's sample everywhere."""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pcdeq_zoo import DATASETS
from pcdeq_zoo.data import DATA_ROOT_VARIABLE, DEFAULT_DATA_ROOT, load

DATA_ROOT = Path(os.environ.get(DATA_ROOT_VARIABLE, DEFAULT_DATA_ROOT))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def sample() -> tuple[Tensor, Tensor]:
    """The 400 MNIST test images that ship with the package, uint8, and their labels."""
    return load(DATASETS["mnist"], "test", "sample")


@pytest.fixture(scope="session")
def whole_test_set() -> Callable[[str], tuple[Tensor, Tensor]]:
    """All test images of a data set by its name, uint8, and their labels; skips where they are not at hand."""

    @functools.cache
    def images_and_labels(name: str) -> tuple[Tensor, Tensor]:
        dataset = DATASETS[name]
        folder = DATA_ROOT / dataset.folder
        if not folder.is_dir():
            pytest.skip(f"needs the whole of {dataset.title}: no folder {folder}; set {DATA_ROOT_VARIABLE}")
        return load(dataset, "test", folder)

    return images_and_labels
