"""Training: what a run leaves, that it can be repeated and killed, and what it refuses."""

import contextlib
import dataclasses
import functools
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import evaluate
import psutil
import pytest
import sweep
import timm
import torch
import train
from config import Config
from processes import ROOT, python
from recipe_runs import NAME, SHORT, command, launch, log_of, row_of
from run_folder import newest_state
from safetensors.torch import load_file
from test_data import write_parquet
from torch.nn import functional as F

from pcdeq_zoo import DATASETS, VARIANTS, Recipe, pgd
from pcdeq_zoo.data import load
from pcdeq_zoo.weights import sha256
from tools import ship


def test_what_a_run_leaves(run: Path, here):
    files = sorted(file.name for file in run.iterdir() if file.name != ".lock")
    assert files == ["log.jsonl", "model.safetensors", "results.csv", "run.json"]
    log = log_of(run)
    assert [line["epoch"] for line in log] == [1, 2]
    assert log[1]["train_loss"] < log[0]["train_loss"]
    assert [line["lr"] for line in log] == [1e-3, 1e-3]  # the decay, after 1.5 of 2 epochs, is rounded up
    assert set(log[0]["evaluations"]) == {"features.deq1 forward", "features.deq1 backward"}
    assert all(value > 1 for value in log[1]["evaluations"].values())
    assert log[1]["unconverged"] == 0
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"file": str(run / "model.safetensors")})
    norm = torch.linalg.svdvals(model.features.deq1.weight.detach().double())[0].item()
    assert log[1]["largest_singular_value"] == pytest.approx(norm, abs=1e-4)

    row = row_of(run).row
    assert row["model"] == f"{NAME}.paper"
    assert row["sha256"] == sha256(run / "model.safetensors")
    assert float(row["top1"]) > 50  # 20 steps from chance
    assert (row["epochs"], row["seed"], row["hardware"].split()[1]) == ("2", "0", "CPU")
    printed = here(evaluate.main, f"--model {NAME} --data sample --checkpoint {run / 'model.safetensors'}")
    measured = json.loads(printed)
    assert {key: str(value) for key, value in measured.items()} == {key: row[key] for key in measured}
    before = (run / "results.csv").read_bytes()
    (run / "results.csv").unlink()
    here(evaluate.main, f"--run {run} --data sample")
    assert (run / "results.csv").read_bytes() == before


def test_the_result_loads_through_timm(run: Path):
    overlay = {"file": str(run / "model.safetensors")}
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay)
    assert all(
        torch.equal(value, model.state_dict()[key]) for key, value in load_file(run / "model.safetensors").items()
    )


@pytest.mark.usefixtures("device")
def test_the_seed_makes_it_reproducible(run: Path, tmp_path):
    """Started as the README says, too."""
    again = launch(f"recipes/train.py {SHORT} --output {tmp_path / 'again'}")
    assert again.returncode == 0, again.stderr
    one, two = (folder / "model.safetensors" for folder in (run, tmp_path / "again"))
    assert sha256(one) == sha256(two)


# Batches and groups of them that do not come out even, and all that a recipe can ask for. What is left to the tolerance
# differs between batches of different sizes, and Adam makes much of it.
EVERYTHING = (
    "--model pcdeq1_mc_tanh_mnist --recipe paper --data sample --epochs 2 --limit-train 500 "
    "--tol 1e-5 --save-every 2 --batch-size 63 --grad-accum 2 --ema-decay 0.9 --label-smoothing 0.1 --output "
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, device: torch.device) -> Callable[[int], Path]:
    """A run of EVERYTHING that nobody killed, by the number of processes."""
    folder = tmp_path_factory.mktemp("whole")

    @functools.cache
    def run(processes: int) -> Path:
        arguments = f"recipes/train.py {EVERYTHING}{folder / str(processes)}"
        done = python(*arguments.split()) if processes == 1 else launch(arguments, processes)
        assert done.returncode == 0, done.stderr
        assert f"{processes} x {device.type if processes == 1 else 'cpu'}" in done.stdout
        return folder / str(processes)

    return run


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_as_if_nothing_had_happened(tmp_path, whole, here, refuse, processes: int):
    """kill -9 in the middle of an epoch: the same bits in the end, and the same log."""
    broken = tmp_path / "broken"
    process = subprocess.Popen(
        command(f"recipes/train.py {EVERYTHING}{broken}", processes),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    state = broken / "state" / "epoch-0002-step-000002"
    while not state.exists():
        assert process.poll() is None
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    if processes == 1:
        children[0].suspend()
    process.kill()
    process.wait()
    if processes == 1:  # the training itself is alive, and a second one must not write beside it
        second = refuse(train.main, f"{EVERYTHING}{broken} --resume")
        assert second == f"another process is training in {broken}"
    for child in children:
        child.kill()
    psutil.wait_procs(children)
    assert not (broken / "model.safetensors").exists()
    saved = Path(shutil.copytree(broken / "state", tmp_path / "saved"))

    again = f"recipes/train.py {EVERYTHING}{broken} --resume"
    resumed = python(*again.split()) if processes == 1 else launch(again, processes)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resumed from {broken / 'state'}" in resumed.stdout
    one, two = (load_file(run / "model.safetensors") for run in (whole(processes), broken))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert log_of(whole(processes)) == log_of(broken)
    assert not (broken / "state").exists()
    if processes == 1:  # the same from a state that was put aside, in another folder
        state = max(saved.glob("epoch-*"))  # the kill may have come before the older one was removed
        printed = here(train.main, f"{EVERYTHING}{tmp_path / 'elsewhere'} --resume {state}")
        assert f"resumed from {state}" in printed
        two = load_file(tmp_path / "elsewhere" / "model.safetensors")
        assert all(torch.equal(one[key], two[key]) for key in one)
        assert log_of(whole(1)) == log_of(tmp_path / "elsewhere")


def test_two_processes_give_what_one_gives(whole):
    """The losses. Not each weight: Adam makes full steps of gradients that are rounding errors."""
    for first, second in zip(log_of(whole(1)), log_of(whole(2)), strict=True):
        assert first["train_loss"] == pytest.approx(second["train_loss"], rel=2e-4)
        assert first["train_top1"] == pytest.approx(second["train_top1"], abs=0.5)


@pytest.mark.parametrize("when", ["importing", "training"])
def test_a_launcher_that_is_ended_ends_its_training(tmp_path, when: str):
    """SIGTERM to `accelerate launch` of one process does not reach its child."""
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(f"recipes/train.py {EVERYTHING}{run} --epochs 200"),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    launcher, started = psutil.Process(process.pid), False
    while not started:
        assert process.poll() is None
        time.sleep(0.01)
        if when == "training":
            started = bool(list(run.glob("state/epoch-*")))
        with contextlib.suppress(psutil.Error):  # it has children that end at once, too
            # Before it is another program, a child has all that its parent has.
            others = [child for child in launcher.children() if "launch" not in child.cmdline()]
            mapped = (file.path for child in others for file in child.memory_maps())
            started |= when == "importing" and any("libtorch" in path for path in mapped)
    (training,) = launcher.children(recursive=True)
    process.terminate()  # and not waited for, so that it stays as a zombie

    def has_ended() -> bool:
        try:
            return training.status() == psutil.STATUS_ZOMBIE  # which nobody may wait for: it is an orphan
        except psutil.NoSuchProcess:
            return True

    deadline = time.monotonic() + 60
    while not has_ended() and time.monotonic() < deadline:
        time.sleep(0.05)
    if survives := not has_ended():
        training.kill()
    process.wait()
    assert not survives
    assert (when == "training") == bool(list(run.glob("state/epoch-*")))
    assert not (run / "model.safetensors").exists()


def test_a_run_goes_on_wherever_its_launcher_was_ended(run: Path, tmp_path, monkeypatch, here, refuse):
    """After the last step of an epoch, too; and run.json says by which commits it was trained."""
    other, flags = tmp_path / "other", f"{SHORT} --output {tmp_path / 'other'} --resume"
    for done in (0, 1, 9, 3):  # more steps, of ten per epoch: the third time ends with the first epoch
        with monkeypatch.context() as patch:
            asked = iter(range(1000))
            patch.setattr("ending.Ending.reason", lambda _, done=done, asked=asked: "so" * (next(asked) == done))
            said = refuse(train.main, flags)
        assert said == "so; --resume goes on"
    record = newest_state(other) / "run.json"
    settings = json.loads(record.read_text())
    record.write_text(json.dumps({**settings, "commit": "0123456789ab"}))
    digests = record.with_name("digests.json")
    digests.write_text(json.dumps({**json.loads(digests.read_text()), "run.json": sha256(record)}))
    here(train.main, flags)
    assert sha256(other / "model.safetensors") == sha256(run / "model.safetensors")
    assert json.loads((other / "run.json").read_text())["commit"] == f"0123456789ab; {settings['commit']}"
    assert row_of(other).row["commit"] == f"0123456789ab; {settings['commit']}"


def test_a_resumed_run_drops_what_it_would_have_dropped(tmp_path, monkeypatch, here, refuse):
    """Of a network with dropout, ended in the middle of an epoch."""
    monkeypatch.setattr(train, "make_model", lambda config, _: timm.create_model(config.model, drop_rate=0.5))
    flags = f"{SHORT} --epochs 1 --output "
    here(train.main, f"{flags}{tmp_path / 'whole'}")
    with monkeypatch.context() as patch:
        asked = iter(range(1000))
        patch.setattr("ending.Ending.reason", lambda _: "so" * (next(asked) == 4))
        refuse(train.main, f"{flags}{tmp_path / 'broken'}")
    assert "resumed from" in here(train.main, f"{flags}{tmp_path / 'broken'} --resume")
    assert len({sha256(tmp_path / run / "model.safetensors") for run in ("whole", "broken")}) == 1


def test_killed_before_the_first_state(run: Path, tmp_path, here):
    """With nothing but what is written before it: run.json, and a line in the log of an epoch without its state."""
    broken = tmp_path / "broken"
    (broken / "state" / ".partial-epoch").mkdir(parents=True)
    shutil.copy(run / "run.json", broken)
    (broken / "log.jsonl").write_text((run / "log.jsonl").read_text().splitlines(keepends=True)[0])
    here(train.main, f"{SHORT} --output {broken} --resume")
    assert log_of(broken) == log_of(run)


def test_what_is_held_out_of_the_first_images_is_measured(tmp_path, here):
    """Of a recipe that takes some images only: the last of those, and not the last of all that are there."""
    flags = f"--model {NAME} --recipe paper --data sample --epochs 1 --images 600 --hold-out 100"
    here(train.main, f"{flags} --output {tmp_path / 'run'}")
    row = row_of(tmp_path / "run", "held_out.csv").row
    overlay = {"file": str(tmp_path / "run" / "model.safetensors")}
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, stop="certified")
    images, labels = load(VARIANTS[NAME].dataset, "train", "sample")
    found = evaluate.evaluate(model, VARIANTS[NAME].dataset, images[500:600], labels[500:600])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["images"] == 500
    assert (row["n"], row["nll"]) == ("100", str(found["nll"]))


def test_a_finished_run_is_never_overwritten(run: Path, here, refuse):
    before = sha256(run / "model.safetensors")
    message = refuse(train.main, f"--model {NAME} --data sample --epochs 1 --output {run}")
    assert message == f"{run} already holds a run; give another --output, --resume it, or remove it"
    message = refuse(
        train.main, f"--model {NAME} --recipe paper --data sample --epochs 1 --limit-train 640 --output {run} --resume"
    )
    assert message == (
        f"{run} holds a run with other settings: recipe.epochs 2 there, 1 here, recipe.lr_decay_epoch 2 there, 1 here; "
        "give another --output"
    )
    assert here(train.main, f"{SHORT} --output {run} --resume").strip() == f"{run} is finished"
    assert sha256(run / "model.safetensors") == before


def test_a_small_set_in_the_layout_of_svhn(tmp_path):
    """There is no SVHN here; its recipe and evaluation run on images that are made up."""
    folder = tmp_path / "svhn"
    for split, count in (("train", 160), ("test", 40)):
        write_parquet(folder / f"{split}-00000-of-00001.parquet", DATASETS["svhn"], n=count)
    arguments = f"recipes/train.py --model pcdeq1_mc_softsign_svhn --recipe paper --data {folder} --epochs 1"
    arguments += f" --output {tmp_path / 'run'} --report-to tensorboard --mixed-precision bf16"
    done = python(*arguments.split())
    assert done.returncode == 0, done.stderr
    assert "on 160 of the 73257 training images" in done.stdout
    assert re.search(r"accuracy \d+\.\d\d % on 40 test images", done.stdout)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["mixed_precision"] == "bf16"
    assert (tmp_path / "run" / "results.csv").exists()
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


def test_a_robust_recipe_trains_for_what_it_measures(tmp_path, here, monkeypatch):
    model, run = "pcdeq1_l_tanh_mnist", tmp_path / "run"

    def weak_pgd(*arguments: object, **settings: object) -> torch.Tensor:
        return pgd(*arguments, **settings | {"steps": 5, "restarts": 1})

    monkeypatch.setattr(evaluate, "pgd", weak_pgd)  # nothing here asks for the strong one
    here(train.main, f"--model {model} --recipe robust_0.1 --data sample --epochs 6 --output {run}")
    log, row = log_of(run), row_of(run).row
    assert all(0 <= line["train_certified"] <= line["train_top1"] <= 100 for line in log)
    assert log[-1]["train_certified"] > 20
    assert (row["model"], row["eps"]) == (f"{model}.robust_0.1", "0.1")
    shares = ("unclipped_interval", "certified_interval", "certified_linear", "pgd", "top1")
    assert sorted(shares, key=lambda share: float(row[share])) == list(shares)
    assert 10 < float(row["certified_interval"]) < float(row["pgd"])
    file = run / "model.safetensors"
    printed = here(evaluate.main, f"--model {model} --data sample --eps 0.1 --checkpoint {file}")
    measured = json.loads(printed)
    assert all(str(measured[share]) == row[share] for share in shares)


def test_a_recipe_of_the_first_images_takes_these_alone(tmp_path, refuse, monkeypatch):
    recipe = VARIANTS["pcdeq1_mc_tanh_svhn"].recipes["zoo4434"]
    images, labels = torch.zeros(5000, 3, 32, 32, dtype=torch.uint8), torch.arange(5000) % 10
    monkeypatch.setattr(train, "load", lambda *_: (images, labels))
    config = Config("pcdeq1_mc_tanh_svhn", "zoo4434", tmp_path)
    assert torch.equal(train.training_images(config, recipe, 1)[1], labels[:4434])
    held_out = dataclasses.replace(config, hold_out=434)
    assert torch.equal(train.training_images(held_out, recipe, 1)[1], labels[:4000])
    monkeypatch.setattr(train, "load", lambda *_: (images[:4433], labels[:4433]))
    line = refuse(train.main, f"--model pcdeq1_mc_tanh_svhn --output {tmp_path / 'run'}")
    assert line == "this recipe takes 4434 training images, and there are 4433"


def test_what_is_held_out(tmp_path, here):
    """The last images of the training set, which the run does not see, and not one of the test set."""
    run = tmp_path / "run"
    arguments = f"--model {NAME} --data sample --epochs 1 --output {run} --hold-out 1000 --limit-train 500"
    out = here(train.main, arguments)
    assert "on 500 of the 60000 training images" in out
    assert "on 1000 held-out images" in out
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"file": str(run / "model.safetensors")})
    images, labels = load(VARIANTS[NAME].dataset, "train", "sample")
    measured = evaluate.evaluate(model, VARIANTS[NAME].dataset, images[-1000:], labels[-1000:])
    assert measured["top1"] == row_of(run, "held_out.csv").top1
    assert not (run / "results.csv").exists()
    with pytest.raises(SystemExit, match=r"it has no results.csv"):
        ship.ship(run)


def test_another_width(tmp_path, here):
    printed = here(train.main, f"{SHORT} --channels 24 --output {tmp_path / 'run'}")
    assert re.search(r"accuracy \d\d\.\d\d % on 400 test images", printed)
    overlay = {"file": str(tmp_path / "run" / "model.safetensors")}
    model = timm.create_model(NAME, pretrained=True, channels=(24,), pretrained_cfg_overlay=overlay)
    assert model.features.deq1.weight.shape == (24, 24)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert float(row_of(tmp_path / "run").row["param_count"]) == parameters / 1e6


def test_batches_are_a_function_of_seed_and_epoch():
    first, again, other = (train.batches(103, 10, 4, *key) for key in ((0, 1), (0, 1), (0, 2)))
    assert [len(batch) for batch in first] == [10] * 10  # the last three are too few
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(torch.cat(first), torch.cat(other))
    assert len(torch.cat(train.batches(103, 10, 2, 0, 1)).unique()) == 103


@pytest.mark.parametrize("padding", [0, 2, 4])
@pytest.mark.parametrize("flip", [False, True])
def test_augmentation_crops_and_flips_each_image_by_itself(padding, flip):
    images = torch.arange(1, 3 * 32 * 32 + 1).view(1, 3, 32, 32).repeat(256, 1, 1, 1)
    recipe = Recipe(epochs=1, lr=1.0, weight_decay=0.0, crop_padding=padding, flip=flip)
    augmented = train.augment(images, recipe, torch.Generator().manual_seed(0))
    assert torch.equal(augmented, train.augment(images, recipe, torch.Generator().manual_seed(0)))
    assert augmented.shape == images.shape
    padded, places = F.pad(images[0], (padding,) * 4), range(2 * padding + 1)
    crops = [padded[:, top : top + 32, left : left + 32] for top in places for left in places]
    crops += [crop.flip(2) for crop in crops] if flip else []
    found = [next(i for i, crop in enumerate(crops) if torch.equal(crop, image)) for image in augmented]
    assert len(set(found)) > len(crops) * 0.7


def test_a_run_that_starts_while_its_sweep_ends_ends_with_it(tmp_path, monkeypatch):
    ended = threading.Event()
    ended.set()
    monkeypatch.setattr(sweep, "_ended", ended)
    assert not sweep.run(tmp_path / "run", [sys.executable, "-c", "import time; time.sleep(600)"])


def test_sweep(tmp_path, here):
    printed = here(sweep.main, "pcdeq*_l_[ts]*_mnist --seeds 0 1 --print").splitlines()
    assert len(printed) == 6  # tanh, softsign, sigmoid
    assert all("--resume" in line and "--seed=" in line for line in printed)

    arguments = [ROOT / "recipes" / "sweep.py", "pcdeq1_l_[ts]*_mnist", "--jobs", "2", "--"]
    arguments += ["--data", "sample", "--epochs", "1", "--limit-train", "128"]
    done = python(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = {f"pcdeq1_l_{activation}_mnist.zoo.seed0" for activation in ("tanh", "softsign")}
    assert {folder.name for folder in (tmp_path / "runs").iterdir() if folder.is_dir()} == names
    assert all((tmp_path / "runs" / name / "results.csv").is_file() for name in names)
    other = tmp_path / "runs" / "pcdeq1_l_tanh_mnist.zoo.seed0"
    settings = (other / "run.json").read_text()
    (other / "run.json").write_text(settings.replace('"hold_out": null', '"hold_out": 100'))
    done = python(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert "1 of 2 runs failed" in done.stderr
    assert "softsign_mnist.zoo.seed0 is finished" in done.stdout
    assert "other settings: hold_out 100 there, None here" in other.with_name(f"{other.name}.txt").read_text()


def test_a_sweep_that_is_ended_ends_its_runs(tmp_path):
    arguments = [sys.executable, str(ROOT / "recipes" / "sweep.py"), "pcdeq1_l_tanh_mnist", "--jobs", "1", "--"]
    arguments += ["--data", "sample", "--epochs", "200"]
    sweeping = subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "runs" / "pcdeq1_l_tanh_mnist.zoo.seed0" / "log.jsonl").exists():
        assert sweeping.poll() is None
        time.sleep(0.01)
    (training,) = psutil.Process(sweeping.pid).children(recursive=True)
    sweeping.terminate()
    assert "the sweep was ended, and so are its runs; start it again to go on" in sweeping.communicate()[1]
    assert not training.is_running()
    console = (tmp_path / "runs" / "pcdeq1_l_tanh_mnist.zoo.seed0.txt").read_text()
    assert console.endswith("this was ended by SIGTERM; --resume goes on\n")
    assert newest_state(tmp_path / "runs" / "pcdeq1_l_tanh_mnist.zoo.seed0")
