"""The recipes as their users run them: real processes on the sample, and documents that match the data."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest
import report
import timm
import torch
import train
from safetensors.torch import load_file
from ship import ship
from torch.nn import functional as F

from pcdeq_zoo import VARIANTS
from pcdeq_zoo.weights import results, sha256

ROOT = Path(__file__).parents[1]
NAME = "pcdeq1_l_softsign_mnist"
SHORT = f"recipes/train.py --model {NAME} --data sample --epochs 2 --limit-train 640"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def launch(arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a recipe as the README says."""
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--num_processes=1", "--num_machines=1"]
    command += ["--mixed_precision=no", "--dynamo_backend=no", *arguments.split()]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


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


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run: two epochs on 640 images, started as the README says."""
    output = tmp_path_factory.mktemp("runs") / "run"
    done = launch(f"{SHORT} --output {output}")
    assert done.returncode == 0, done.stderr
    assert "epoch 2" in done.stdout
    assert re.search(r"test accuracy \d\d\.\d\d % on 400 images", done.stdout)
    assert "0%|" in done.stderr  # the progress bar
    return output


def test_what_a_run_leaves(run: Path):
    assert sorted(file.name for file in run.iterdir()) == ["log.jsonl", "model.safetensors", "results.csv"]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [1, 2]
    assert log[1]["train_loss"] < log[0]["train_loss"]
    assert [line["lr"] for line in log] == [1e-3, 1e-3]  # the decay, after 1.5 of 2 epochs, is rounded up
    assert set(log[0]["evaluations"]) == {"features.deq1 forward", "features.deq1 backward"}
    assert all(value > 1 for value in log[1]["evaluations"].values())
    assert log[1]["unconverged"] == 0

    with (run / "results.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["model"] == f"{NAME}.paper"
    assert row["sha256"] == sha256(run / "model.safetensors")
    assert (run / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert float(row["top1"]) > 50  # 20 steps from chance
    done = launch(f"recipes/evaluate.py --model {NAME} --data sample --checkpoint {run / 'model.safetensors'}")
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert {key: str(value) for key, value in measured.items()} == {key: row[key] for key in measured}


def test_the_result_loads_through_timm(run: Path):
    overlay = {"file": str(run / "model.safetensors")}
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay)
    assert all(
        torch.equal(value, model.state_dict()[key]) for key, value in load_file(run / "model.safetensors").items()
    )


def test_the_seed_makes_it_reproducible(run: Path, tmp_path):
    again = launch(f"{SHORT} --output {tmp_path / 'again'}")
    assert again.returncode == 0, again.stderr
    # The tensors, not the files: safetensors writes its metadata in random order.
    one, two = (load_file(folder / "model.safetensors") for folder in (run, tmp_path / "again"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_finished_run_is_never_overwritten(run: Path, refuse):
    before = sha256(run / "model.safetensors")
    message = refuse(train.main, f"--model {NAME} --data sample --epochs 1 --output {run}")
    assert message == f"{run} already holds a run; give another --output, or remove it"
    assert sha256(run / "model.safetensors") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--epochs 0", "--epochs must be above 0, got 0"),
        ("--lr -1", "--lr must be above 0, got -1.0"),
        ("--limit-train 0", "--limit-train must be above 0, got 0"),
        ("--model resnet18", "unknown model resnet18; the zoo has pcdeq1_l_relu6_mnist, "),
        ("--data /no/such/folder", "no data folder /no/such/folder"),
        ("--model pcdeq1_mc_tanh_cifar", "no CIFAR-10 sample ships with the package"),
    ],
)
def test_train_says_what_is_wrong(tmp_path, refuse, arguments: str, message: str):
    assert message in refuse(train.main, f"--model {NAME} --data sample --output {tmp_path / 'run'} {arguments}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model resnet18", "unknown model resnet18"),
        ("--model pcdeq1_mc_tanh_mnist", "no weights of pcdeq1_mc_tanh_mnist.paper are published yet"),
        (f"--model {NAME} --data /no/such/folder", "no data folder /no/such/folder"),
        (f"--model {NAME} --checkpoint /no/such/file", "there is no file /no/such/file"),
    ],
)
def test_evaluate_says_what_is_wrong(refuse, arguments: str, message: str):
    assert message in refuse(evaluate.main, arguments)


class TestShip:
    def test_refuses_a_run_measured_on_the_sample(self, run: Path):
        with pytest.raises(SystemExit, match=r"was measured on 400 images, not on the 10,000"):
            ship(run)

    def test_refuses_an_unfinished_run(self, tmp_path):
        (tmp_path / "log.jsonl").touch()
        with pytest.raises(SystemExit, match=r"it has no model.safetensors, results.csv"):
            ship(tmp_path)

    def test_writes_weights_log_and_row(self, run: Path, tmp_path, monkeypatch):
        import ship as module

        from pcdeq_zoo import weights

        for target in (module, weights):
            monkeypatch.setattr(target, "CHECKPOINTS", tmp_path)
        (tmp_path / "results.csv").write_text(",".join(weights.RESULT_COLUMNS) + "\n")
        whole = tmp_path / "whole"
        whole.mkdir()
        for file in run.iterdir():
            (whole / file.name).write_bytes(file.read_bytes())
        text = (whole / "results.csv").read_text()
        (whole / "results.csv").write_text(text.replace(",400,", ",10000,"))
        assert ship(whole) == f"{NAME}.paper"
        assert results()[f"{NAME}.paper"]["sha256"] == sha256(tmp_path / f"{NAME}.paper.safetensors")
        assert (tmp_path / f"{NAME}.paper.jsonl").read_bytes() == (run / "log.jsonl").read_bytes()
        assert ship(whole) == f"{NAME}.paper"  # again: the same
        assert list(results()) == [f"{NAME}.paper"]
        (whole / "model.safetensors").write_bytes(b"other")
        with pytest.raises(SystemExit, match=r"is not the file that .* was measured on"):
            ship(whole)


def test_augmentation_crops_and_flips_each_image_by_itself():
    images = torch.arange(1, 3 * 32 * 32 + 1).view(1, 3, 32, 32).repeat(64, 1, 1, 1)
    augmented = train.augment(images)
    assert augmented.shape == images.shape
    padded = F.pad(images[0], (4, 4, 4, 4))
    crops = [
        crop
        for top in range(9)
        for left in range(9)
        for crop in (padded[:, top : top + 32, left : left + 32], padded[:, top : top + 32, left : left + 32].flip(2))
    ]
    found = [next(i for i, crop in enumerate(crops) if torch.equal(crop, image)) for image in augmented]
    assert len(set(found)) > 20


@pytest.mark.parametrize("document", report.DOCUMENTS)
def test_tables_match_the_data(document: str):
    text = (ROOT / document).read_text(encoding="utf-8")
    assert any(f"<!-- {name} -->" in text for name in report.TABLES)
    assert report.updated(text) == text, "run recipes/report.py"


def test_readme_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    outside = ("digit.png", "theirs.pth", "path/to/")  # need a file of the reader's
    runnable = [block for block in blocks if not any(name in block for name in outside)]
    assert len(runnable) == 2
    for block in runnable:
        exec(block, {})


def test_readme_names_models_and_commands_that_exist():
    assert set(re.findall(r"pcdeq[12]_\w+", README)) == set(VARIANTS)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make (\w+) {2,}#", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
    assert "exec make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
