"""Fixtures: data of the machine where there is any, the package's sample everywhere, and runs of the recipes."""

import functools
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import python
from recipe_runs import SHORT
from torch import Tensor

from pcdeq_zoo import DATASETS
from pcdeq_zoo.data import DATA_ROOT_VARIABLE, DEFAULT_DATA_ROOT, load

DATA_ROOT = Path(os.environ.get(DATA_ROOT_VARIABLE, DEFAULT_DATA_ROOT))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="run on it what a device matters to, e.g. cuda, and nothing else")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("device") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the recipes, which take a GPU where there is one


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("device") != "cpu":
        chosen = [item for item in items if "device" in item.fixturenames]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """Where a test computes; what it compares with is computed on the CPU."""
    return torch.device(pytestconfig.getoption("device"))


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
        # "svhn_first_4434" has the whole test split, and some of the training digits.
        folders = [folder for folder in sorted(DATA_ROOT.glob(f"{dataset.folder}*")) if folder.is_dir()]
        if not folders:
            where = DATA_ROOT / dataset.folder
            pytest.skip(f"needs the whole of {dataset.title}: no folder {where}; set {DATA_ROOT_VARIABLE}")
        return load(dataset, "test", folders[0])

    return images_and_labels


@pytest.fixture(scope="session")
def paper_tables() -> dict[str, Any]:
    """The tables of the paper; skips where they are not at hand."""
    file = DATA_ROOT.parent / "paper" / "tables.json"
    if not file.is_file():
        pytest.skip(f"needs the paper's tables as JSON: no {file}")
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.fixture
def refuse(monkeypatch, capsys):
    """Run a recipe's main in this process, which is faster by far, and return the line that it ends with."""

    def run(main, arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["recipe", *arguments.split()])
        with pytest.raises(SystemExit) as caught:
            main()
        if caught.value.code == 2:  # argparse has printed its line
            return capsys.readouterr().err.strip().splitlines()[-1]
        assert "\n" not in caught.value.code
        return caught.value.code

    return run


@pytest.fixture
def here(monkeypatch, capsys):
    """Run a recipe's main in this process, and return what it prints."""

    def run(main, arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["recipe", *arguments.split()])
        capsys.readouterr()
        main()
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """A finished run: two epochs on 640 images."""
    output = tmp_path_factory.mktemp("runs") / "run"
    done = python("recipes/train.py", *SHORT.split(), "--output", output)
    assert done.returncode == 0, done.stderr
    assert "epoch 2" in done.stdout
    assert re.search(r"accuracy \d\d\.\d\d % on 400 test images", done.stdout)
    summary = r"^epoch 1: loss \d\.\d{4}, accuracy \d+\.\d\d %, forward \d+\.\d, backward \d+\.\d, \d+\.\d s$"
    assert re.search(summary, done.stdout, re.M)
    assert "\r" not in done.stdout + done.stderr  # no bars where there is no terminal
    return output
