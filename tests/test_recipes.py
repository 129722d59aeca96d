"""The recipes as their users run them: real processes on the sample, and documents that match the data."""

import csv
import dataclasses
import functools
import io
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import evaluate
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import report
import ship
import timm
import torch
import torch.distributed as dist
import train
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from pcdeq_zoo import VARIANTS, Recipe, weights
from pcdeq_zoo.data import load
from pcdeq_zoo.weights import results, sha256, write_rows

ROOT = Path(__file__).parents[1]
NAME = "pcdeq1_l_softsign_mnist"
SHORT = f"recipes/train.py --model {NAME} --data sample --epochs 2 --limit-train 640"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def command(arguments: str, processes: int = 1) -> list[str]:
    """A recipe as the README says to run it."""
    launcher = [str(Path(sys.executable).with_name("accelerate")), "launch", "--num_machines=1", "--mixed_precision=no"]
    launcher += ["--dynamo_backend=no", f"--num_processes={processes}"]
    if processes > 1:
        launcher += ["--multi_gpu", f"--main_process_port={free_port()}"]
        arguments += f" --cpu --processes {processes}"
    return [*launcher, *arguments.split()]


def launch(arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(arguments, processes), cwd=ROOT, capture_output=True, text=True)


def files_of(run: Path) -> list[str]:
    return sorted(file.name for file in run.iterdir() if file.name != ".lock")


def log_of(run: Path) -> list[dict]:
    """The log, without what no two runs share."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


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
    assert re.search(r"accuracy \d\d\.\d\d % on 400 test images", done.stdout)
    assert "epoch 1/2:   0%|" in done.stderr  # the progress bar, which ends as the line below
    summary = r"epoch 1: {'loss': '\d\.\d{4}', 'acc': '\d+\.\d\d', 'forward': '\d+\.\d', 'backward': '\d+\.\d'}, "
    assert re.search(summary, done.stderr + done.stdout)
    return output


def test_what_a_run_leaves(run: Path, monkeypatch, capsys):
    assert files_of(run) == ["log.jsonl", "model.safetensors", "results.csv", "run.json"]
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

    with (run / "results.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["model"] == f"{NAME}.paper"
    assert row["sha256"] == sha256(run / "model.safetensors")
    assert (run / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert float(row["top1"]) > 50  # 20 steps from chance
    assert (row["epochs"], row["seed"], row["hardware"].split()[1]) == ("2", "0", "CPU")
    done = launch(f"recipes/evaluate.py --model {NAME} --data sample --checkpoint {run / 'model.safetensors'}")
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert {key: str(value) for key, value in measured.items()} == {key: row[key] for key in measured}
    before = (run / "results.csv").read_bytes()
    (run / "results.csv").unlink()
    assert launch(f"recipes/evaluate.py --run {run} --data sample").returncode == 0
    assert (run / "results.csv").read_bytes() == before
    (run / "results.csv").unlink()
    monkeypatch.setattr(sys, "argv", [*SHORT.split(), "--eval-only", f"--output={run}"])
    train.main()
    assert json.loads(capsys.readouterr().out)["top1"] == float(row["top1"])
    assert (run / "results.csv").read_bytes() == before


@pytest.mark.parametrize("own", [True, False])
def test_evaluate_writes_a_row_of_what_it_measured(run: Path, tmp_path, monkeypatch, own: bool):
    """How a file was trained is known of those that ship only, whatever another one is called."""
    file = weights.CHECKPOINTS / f"{NAME}.paper.safetensors" if own else run / "model.safetensors"
    arguments = f"--model {NAME} --checkpoint {file} --data sample --output {tmp_path / 'row.csv'}"
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments.split()])
    evaluate.main()
    with (tmp_path / "row.csv").open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert row["sha256"] == sha256(file)
    assert row["n"] == "400"
    known = results()[f"{NAME}.paper"] if own else {"model": NAME}
    for column in ("model", "epochs", "seed", "commit", "hardware", "hours"):
        assert row[column] == known.get(column, "")


def test_the_result_loads_through_timm(run: Path):
    overlay = {"file": str(run / "model.safetensors")}
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay)
    assert all(
        torch.equal(value, model.state_dict()[key]) for key, value in load_file(run / "model.safetensors").items()
    )


def test_the_seed_makes_it_reproducible(run: Path, tmp_path):
    again = launch(f"{SHORT} --output {tmp_path / 'again'}")
    assert again.returncode == 0, again.stderr
    one, two = (folder / "model.safetensors" for folder in (run, tmp_path / "again"))
    assert sha256(one) == sha256(two)


# Batches and groups of them that do not come out even, and all that a recipe can ask for.
EVERYTHING = (
    "recipes/train.py --model pcdeq1_mc_tanh_mnist --data sample --epochs 2 --limit-train 500 --save-every 2 "
    "--batch-size 63 --grad-accum 2 --ema-decay 0.9 --label-smoothing 0.1 --output "
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Callable[[int], Path]:
    """A run of EVERYTHING that nobody killed, by the number of processes."""
    folder = tmp_path_factory.mktemp("whole")

    @functools.cache
    def run(processes: int) -> Path:
        done = launch(f"{EVERYTHING}{folder / str(processes)}", processes)
        assert done.returncode == 0, done.stderr
        assert f"{processes} x cpu" in done.stdout
        return folder / str(processes)

    return run


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_resumed_is_as_if_nothing_had_happened(tmp_path, whole, processes: int):
    """kill -9 in the middle of an epoch: the same bits in the end, and the same log."""
    broken = tmp_path / "broken"
    process = subprocess.Popen(
        command(f"{EVERYTHING}{broken}", processes), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    state = broken / "state" / "epoch-0002-step-000002"
    while not state.exists():
        assert process.poll() is None
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    if processes == 1:  # the training itself is alive, and a second one must not write beside it
        children[0].suspend()
        second = launch(f"{EVERYTHING}{broken} --resume")
        assert f"another process is training in {broken}" in second.stderr
    for child in children:
        child.kill()
    psutil.wait_procs(children)
    assert not (broken / "model.safetensors").exists()
    saved = Path(shutil.copytree(broken / "state", tmp_path / "saved"))

    resumed = launch(f"{EVERYTHING}{broken} --resume", processes)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resumed from {broken / 'state'}" in resumed.stdout
    one, two = (load_file(run / "model.safetensors") for run in (whole(processes), broken))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert log_of(whole(processes)) == log_of(broken)
    assert not (broken / "state").exists()
    if processes == 1:  # the same from a state that was put aside, in another folder
        (state,) = saved.glob("epoch-*")
        elsewhere = launch(f"{EVERYTHING}{tmp_path / 'elsewhere'} --resume {state}")
        assert elsewhere.returncode == 0, elsewhere.stderr
        assert f"resumed from {state}" in elsewhere.stdout
        two = load_file(tmp_path / "elsewhere" / "model.safetensors")
        assert all(torch.equal(one[key], two[key]) for key in one)
        assert log_of(whole(1)) == log_of(tmp_path / "elsewhere")


def test_killed_before_the_first_state(run: Path, tmp_path):
    """With nothing but what is written before it: run.json, and a line in the log of an epoch without its state."""
    broken = tmp_path / "broken"
    (broken / "state" / ".writing-epoch").mkdir(parents=True)
    shutil.copy(run / "run.json", broken)
    (broken / "log.jsonl").write_text((run / "log.jsonl").read_text().splitlines(keepends=True)[0])
    done = launch(f"{SHORT} --output {broken} --resume")
    assert done.returncode == 0, done.stderr
    assert log_of(broken) == log_of(run)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """A run that ended in its second epoch, two steps after the epoch's first state."""
    output = tmp_path_factory.mktemp("interrupted") / "run"
    step = train.Run._step

    def fail(run: train.Run, indices: torch.Tensor) -> None:
        if (run.progress.epoch, run.progress.step) == (2, 4):
            raise KeyboardInterrupt
        step(run, indices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Run, "_step", fail)
        patch.setattr(sys, "argv", ["train.py", *INTERRUPTED.split(), f"--output={output}"])
        with pytest.raises(KeyboardInterrupt):
            train.main()
    return output


INTERRUPTED = f"{SHORT.partition(' ')[2]} --save-every 3 --ema-decay 0.9"


def only_state(run: Path) -> Path:
    (state,) = (run / "state").glob("epoch-*")
    return state


class Attack:
    """Unpickled, it writes a file: what a state folder from somewhere else could do."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def rewrite(state: Path, **changes: object) -> None:
    """Change progress.json, digest included: what a damaged disk does not do, and a person may."""
    progress = json.loads((state / "progress.json").read_text()) | changes
    (state / "progress.json").write_text(json.dumps(progress))
    digests = json.loads((state / "digests.json").read_text())
    digests["progress.json"] = sha256(state / "progress.json")
    (state / "digests.json").write_text(json.dumps(digests))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_state_holds_no_pickles_and_none_is_loaded(interrupted: Path, tmp_path, monkeypatch, refuse):
    """As accelerate loads `custom_checkpoint_*.pkl` and `optimizer.bin`, from a run folder of somebody else."""
    run = Path(shutil.copytree(interrupted, tmp_path / "run"))
    state = only_state(run)
    names = ["digests.json", "ema.safetensors", "log.jsonl", "model.safetensors", "optimizer.safetensors"]
    assert sorted(file.name for file in state.iterdir()) == [*names, "progress.json", "run.json"]
    planted = ("custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl", "random_states_0.pkl", "optimizer.bin")
    for name in (*planted, "pytorch_model.bin", "scheduler.bin"):
        (state / name).write_bytes(pickle.dumps(Attack(tmp_path / "attacked")))
    monkeypatch.setattr(sys, "argv", ["train.py", *INTERRUPTED.split(), f"--output={run}", "--resume"])
    train.main()
    assert (run / "results.csv").exists()
    assert not (tmp_path / "attacked").exists()

    run = Path(shutil.copytree(interrupted, tmp_path / "only-pickles"))
    state = only_state(run)
    for file in state.iterdir():
        file.write_bytes(pickle.dumps(Attack(tmp_path / "attacked")))
    line = refuse(train.main, f"{INTERRUPTED} --output {run} --resume")
    assert line.startswith(f"cannot resume from {state}, UnicodeDecodeError: ")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda state: flip(state / "model.safetensors"), "model.safetensors is not what its digest says"),
        (lambda state: flip(state / "optimizer.safetensors"), "optimizer.safetensors is not what its digest says"),
        (lambda state: flip(state / "log.jsonl"), "log.jsonl is not what its digest says"),
        (lambda state: flip(state / "digests.json"), "JSONDecodeError"),
        (lambda state: (state / "log.jsonl").unlink(), "it has no log.jsonl"),
        (lambda state: (state / "ema.safetensors").unlink(), "it has no ema.safetensors"),
        (lambda state: (state / "digests.json").unlink(), "it has no digests.json"),
        (lambda state: (state / "digests.json").write_text("[]"), "KeyError: 'progress.json'"),
        (lambda state: rewrite(state, step=10**9), "epoch 2, step 1000000000, of 2 epochs of 10 steps"),
        (lambda state: rewrite(state, step=-1), "epoch 2, step -1, of 2 epochs of 10 steps"),
        (lambda state: rewrite(state, epoch=9), "epoch 9, step 3, of 2 epochs of 10 steps"),
        (lambda state: rewrite(state, updates=0), "0 updates, wanted 13"),
        (lambda state: rewrite(state, epoch=1, updates=3), "a log of 1 epochs before epoch 1"),
        (lambda state: rewrite(state, sums=[]), "it is not of this run: 'list' object has no attribute 'items'"),
    ],
)
def test_a_state_that_is_not_what_was_written_is_refused(interrupted: Path, tmp_path, refuse, damage, reason: str):
    run = Path(shutil.copytree(interrupted, tmp_path / "run"))
    state = only_state(run)
    damage(state)
    line = refuse(train.main, f"{INTERRUPTED} --output {run} --resume")
    assert line.startswith(f"cannot resume from {state}, ")
    assert reason in line
    assert not (run / "model.safetensors").exists()


def test_what_is_beside_the_states_stays(interrupted: Path, tmp_path, monkeypatch):
    """Somebody's notes and backups, and what a killed process had begun to write."""
    run = Path(shutil.copytree(interrupted, tmp_path / "run"))
    (run / "state" / "notes.txt").touch()
    (run / "state" / "my-backup").mkdir()
    (run / "state" / ".writing-x").mkdir()
    monkeypatch.setattr(sys, "argv", ["train.py", *INTERRUPTED.split(), f"--output={run}", "--resume"])
    train.main()
    assert sorted(file.name for file in (run / "state").iterdir()) == ["my-backup", "notes.txt"]


def test_two_processes_give_what_one_gives(whole):
    """The losses. Not each weight: Adam makes full steps of gradients that are rounding errors."""
    for first, second in zip(log_of(whole(1)), log_of(whole(2)), strict=True):
        assert first["train_loss"] == pytest.approx(second["train_loss"], rel=2e-4)
        assert first["train_top1"] == pytest.approx(second["train_top1"], abs=0.5)


def _batch_norm_worker(rank: int, folder: str, dtype: torch.dtype) -> None:
    """One of two processes with an uneven share of a batch; it writes what it gets."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    norm = batch_norm()
    train.synchronize_batch_norm(norm)
    x = batch()[:4] if rank == 0 else batch()[4:]
    x = x.to(dtype).requires_grad_()
    y = norm(x)
    assert y.dtype == dtype
    (y.float() * torch.sin(x.detach().float())).sum().backward()
    weight_grad = norm[0].weight.grad.clone()
    dist.all_reduce(weight_grad)  # as DistributedDataParallel would
    state = {"y": y.detach(), "x_grad": x.grad, "weight_grad": weight_grad, **norm.state_dict()}
    torch.save(state, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def batch_norm() -> torch.nn.Sequential:
    torch.manual_seed(0)
    norm = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    torch.nn.init.normal_(norm[0].weight)
    return norm


def batch() -> torch.Tensor:
    return 10 + torch.randn(7, 3, 9, 9, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_norm_over_processes_is_batch_norm(tmp_path, dtype: torch.dtype):
    torch.multiprocessing.spawn(_batch_norm_worker, (str(tmp_path), dtype), nprocs=2)
    norm, x = batch_norm(), batch().to(dtype).requires_grad_()
    y = norm(x)
    (y.float() * torch.sin(x.detach().float())).sum().backward()
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    exact = dtype == torch.float32
    close = functools.partial(torch.testing.assert_close, rtol=1e-4 if exact else 0.02, atol=1e-5 if exact else 0.02)
    close(torch.cat([part["y"] for part in parts]), y.detach())
    close(torch.cat([part["x_grad"] for part in parts]), x.grad)
    for part in parts:
        close(part["weight_grad"], norm[0].weight.grad, atol=1e-3 if exact else 0.5)
        torch.testing.assert_close(part["0.running_mean"], norm[0].running_mean)
        torch.testing.assert_close(part["0.running_var"], norm[0].running_var)


def thirteen() -> tuple[torch.nn.Module, Recipe, torch.Tensor, torch.Tensor]:
    """A model, a recipe with batches of 5, and 13 images with labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (13, 1, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (13,), generator=generator)
    recipe = dataclasses.replace(VARIANTS[NAME].recipes["paper"], batch_size=5, label_smoothing=0.1)
    torch.manual_seed(0)
    return timm.create_model(NAME, stop="residual", tol=1e-6), recipe, images, labels


def _step_worker(rank: int, processes: int, port: int, folder: str) -> None:
    """One optimiser step on three batches, as one of several processes; it writes the gradient and the sums."""
    if processes > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1")
    model, recipe, images, labels = thirteen()
    run = train.Run(Accelerator(cpu=True), model, NAME, recipe, images, labels, 0, 3, None, Path(folder))
    assert run.accelerator.num_processes == processes
    run.prepared.train()
    run._step(torch.arange(13))
    run.gather()
    if rank == 0:
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        torch.save({"gradients": gradients, "sums": run.progress.sums}, f"{folder}/step.pt")
    if processes > 1:
        dist.destroy_process_group()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_step_is_the_mean_over_all_its_images(tmp_path, processes: int):
    """Batches of 5, 5 and 3, however many processes share them: the gradient of the mean loss of the 13 images."""
    if processes == 1:
        _step_worker(0, 1, 0, str(tmp_path))
    else:
        torch.multiprocessing.spawn(_step_worker, (processes, free_port(), str(tmp_path)), nprocs=processes)
    model, _, images, labels = thirteen()
    model.train()
    losses = [
        F.cross_entropy(model(images[part].float() / 255), labels[part], reduction="sum", label_smoothing=0.1)
        for part in torch.arange(13).split(5)
    ]
    (sum(losses) / 13).backward()
    found = torch.load(tmp_path / "step.pt", weights_only=True)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found["gradients"][name], parameter.grad, rtol=1e-3, atol=1e-6)
    assert found["sums"]["loss"] == pytest.approx(sum(losses).item(), rel=1e-5)
    assert found["sums"]["images"] == 13


def test_one_process_instead_of_two_is_refused(tmp_path):
    """`accelerate launch --cpu --num_processes 2` starts one, without a word."""
    launcher = [str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu", "--num_processes=2"]
    launcher += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    arguments = f"{SHORT} --output {tmp_path / 'run'}"
    done = subprocess.run([*launcher, *arguments.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "accelerate was asked for several processes and started one; on CPUs say --multi_gpu" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_never_overwritten(run: Path, refuse):
    before = sha256(run / "model.safetensors")
    message = refuse(train.main, f"--model {NAME} --data sample --epochs 1 --output {run}")
    assert message == f"{run} already holds a run; give another --output, --resume it, or remove it"
    other = f"--model {NAME} --data sample --epochs 1 --limit-train 640 --output {run}"
    for flag in ("--resume", "--eval-only"):
        message = refuse(train.main, f"{other} {flag}")
        assert message.startswith(f"{run} holds a run with other settings: recipe {{'epochs': 2, ")
    done = launch(f"{SHORT} --output {run} --resume")
    assert done.stdout.strip() == f"{run} is finished"
    assert sha256(run / "model.safetensors") == before


def test_a_small_set_in_the_layout_of_svhn(tmp_path):
    """There is no SVHN here; its recipe and evaluation run on images that are made up."""
    folder = tmp_path / "svhn"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 160), ("test", 40)):
        rows = []
        for index in range(count):
            pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8).numpy()
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "PNG")
            rows.append({"image": {"bytes": stream.getvalue(), "path": None}, "label": index % 10})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
    arguments = f"recipes/train.py --model pcdeq1_mc_softsign_svhn --data {folder} --epochs 1"
    done = launch(f"{arguments} --output {tmp_path / 'run'} --report-to tensorboard --mixed-precision bf16")
    assert done.returncode == 0, done.stderr
    assert "on 160 images" in done.stdout
    assert re.search(r"accuracy \d+\.\d\d % on 40 test images", done.stdout)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["mixed_precision"] == "bf16"
    assert (tmp_path / "run" / "results.csv").exists()
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


def test_what_is_held_out(tmp_path, monkeypatch, capsys):
    """The last images of the training set, which the run does not see, and not one of the test set."""
    run = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", f"train.py --model {NAME} --data sample --epochs 1 --output {run}".split())
    sys.argv += ["--hold-out", "1000", "--limit-train", "500"]
    train.main()
    out = capsys.readouterr().out
    assert "on 500 images" in out
    assert "on 1000 held-out images" in out
    with (run / "held_out.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"file": str(run / "model.safetensors")})
    images, labels = load(VARIANTS[NAME].dataset, "train", "sample")
    assert evaluate.evaluate(model, VARIANTS[NAME].dataset, images[-1000:], labels[-1000:])["top1"] == float(
        row["top1"]
    )
    assert not (run / "results.csv").exists()
    with pytest.raises(SystemExit, match=r"it has no results.csv"):
        ship.ship(run)


def test_batches_are_a_function_of_seed_and_epoch():
    first, again, other = (train.batches(103, 10, 4, *key) for key in ((0, 1), (0, 1), (0, 2)))
    assert [len(batch) for batch in first] == [10] * 10  # the last three are too few
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(torch.cat(first), torch.cat(other))
    assert len(torch.cat(train.batches(103, 10, 2, 0, 1)).unique()) == 103


def test_learning_rates():
    paper, zoo = (VARIANTS["pcdeq1_mc_relu6_cifar"].recipes[tag] for tag in ("paper", "zoo"))
    assert [paper.learning_rate(passes) for passes in (0, 39.99, 40, 49)] == pytest.approx([7e-4, 7e-4, 7e-5, 7e-5])
    rise, end = zoo.warmup * zoo.epochs, zoo.epochs
    wanted = [zoo.lr / 25, zoo.lr, zoo.lr / 2, 0]
    assert [zoo.learning_rate(p) for p in (0, rise, (rise + end) / 2, end)] == pytest.approx(wanted)
    assert zoo.learning_rate(rise / 2) == pytest.approx(zoo.lr * 0.52)


def test_calibration_error():
    confidence = torch.tensor([0.62, 0.64, 0.91, 0.93, 1.0])
    correct = torch.tensor([True, False, True, True, False])
    # Bins of 1/15: 0.62 and 0.64 share (0.6, 0.667], 0.91 and 0.93 (0.867, 0.933], 1.0 has (0.933, 1].
    by_hand = (2 * abs(0.63 - 0.5) + 2 * abs(0.92 - 1) + abs(1.0 - 0)) / 5
    assert evaluate.calibration_error(confidence, correct) == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--epochs 0", "--epochs must be above 0, got 0"),
        ("--lr -1", "--lr must be above 0, got -1.0"),
        ("--lr nan", "--lr must be above 0, got nan"),
        ("--weight-decay -1", "--weight-decay must be at least 0, got -1.0"),
        ("--mixed-precision fp16", "argument --mixed-precision: invalid choice: 'fp16'"),
        ("--processes 2", "launched as 2 processes, but accelerate runs 1 here"),
        ("--limit-train 0", "--limit-train must be above 0, got 0"),
        ("--hold-out 1600", "--hold-out 1600 leaves nothing of 1600 training images"),
        ("--resume /no/such/state", "no state /no/such/state to resume from; --resume alone takes the newest of"),
        ("--eval-only", "holds no finished run to measure"),
        ("--limit-train 1", "a batch needs 2 images, one per process and two for BatchNorm; got"),
        ("--seed -1", "--seed must be at least 0, got -1"),
        ("--ema-decay 1", "--ema-decay must be at least 0 and below 1, got 1.0"),
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
        (f"--model {NAME} --batch-size 0", "--batch-size must be above 0, got 0"),
        (f"--model {NAME}.zoo", f"no weights of {NAME}.zoo ship; there are pcdeq1_l_relu6_mnist.paper, "),
        ("--model pcdeq1_mc_tanh_svhn", "no weights of pcdeq1_mc_tanh_svhn.paper are published yet"),
        (f"--model {NAME} --data /no/such/folder", "no data folder /no/such/folder"),
        (f"--model {NAME} --checkpoint /no/such/file", "there is no file /no/such/file"),
    ],
)
def test_evaluate_says_what_is_wrong(refuse, arguments: str, message: str):
    assert message in refuse(evaluate.main, arguments)


class TestShip:
    def test_refuses_a_run_measured_on_the_sample(self, run: Path):
        with pytest.raises(SystemExit, match=r"was measured on 400 images, not on the 10,000"):
            ship.ship(run)

    def test_refuses_an_unfinished_run(self, tmp_path):
        (tmp_path / "log.jsonl").touch()
        with pytest.raises(SystemExit, match=r"it has no model.safetensors, results.csv, run.json"):
            ship.ship(tmp_path)

    @pytest.fixture
    def whole(self, run: Path, tmp_path, monkeypatch) -> Path:
        """A run as if it had been measured on the whole test set, and an empty package to put it in."""
        for target in (ship, weights):
            monkeypatch.setattr(target, "CHECKPOINTS", tmp_path)
        for target in (ship, report):
            monkeypatch.setattr(target, "RUNS", tmp_path / "runs")
        (tmp_path / "results.csv").write_text(",".join(weights.RESULT_COLUMNS) + "\n")
        whole = tmp_path / "whole"
        shutil.copytree(run, whole)
        (row,) = csv.DictReader(io.StringIO((whole / "results.csv").read_text()))
        write_rows(whole / "results.csv", [{**row, "n": "10000", "commit": "0123456789ab"}])
        settings = json.loads((whole / "run.json").read_text())
        settings |= {"images": 60000, "recipe": dataclasses.asdict(VARIANTS[NAME].recipes["paper"])}
        (whole / "run.json").write_text(json.dumps(settings))
        return whole

    def test_refuses_a_run_of_another_recipe_than_its_tag_says(self, whole: Path, run: Path, tmp_path):
        shutil.copy(run / "run.json", whole)
        with pytest.raises(SystemExit, match=r"recipe {'epochs': 2, .*, images 640, wanted 60000"):
            ship.ship(whole)
        assert not list(tmp_path.glob("*.safetensors"))

    @pytest.mark.parametrize(
        ("column", "value", "message"),
        [
            ("bound_max", "", "unproven equilibria: largest bound none, tol 0.001"),
            ("bound_max", "0.002", "unproven equilibria: largest bound 0.002, tol 0.001"),
            ("commit", "0123456789ab-dirty", "not trained by a commit of this code, but by 0123456789ab-dirty"),
        ],
    )
    def test_refuses_what_proves_nothing(self, whole: Path, column: str, value: str, message: str):
        (row,) = csv.DictReader(io.StringIO((whole / "results.csv").read_text()))
        write_rows(whole / "results.csv", [{**row, column: value}])
        with pytest.raises(SystemExit, match=message):
            ship.ship(whole)

    def test_writes_weights_log_and_row(self, whole: Path, run: Path, tmp_path):
        assert ship.ship(whole) == f"{NAME}.paper"
        assert results()[f"{NAME}.paper"]["sha256"] == sha256(tmp_path / f"{NAME}.paper.safetensors")
        assert (tmp_path / f"{NAME}.paper.jsonl").read_bytes() == (run / "log.jsonl").read_bytes()
        assert ship.ship(whole) == f"{NAME}.paper"  # again: the same
        assert list(results()) == [f"{NAME}.paper"]
        (whole / "model.safetensors").write_bytes(b"other")
        with pytest.raises(SystemExit, match=r"is not the file that .* was measured on"):
            ship.ship(whole)

    def test_other_seeds_are_recorded_and_drawn_but_do_not_ship(self, whole: Path, tmp_path):
        ship.ship(whole)
        text = (whole / "results.csv").read_text()
        (row,) = csv.DictReader(io.StringIO(text))
        other = {**row, "seed": "1", "top1": str(float(row["top1"]) + 2)}
        write_rows(whole / "results.csv", [other])
        before = (tmp_path / "results.csv").read_bytes()
        ship.ship(whole)
        assert (tmp_path / "results.csv").read_bytes() == before
        assert list(ship.recorded()) == [(f"{NAME}.paper", 0), (f"{NAME}.paper", 1)]
        assert f"| {float(row['top1']) + 1:.2f} ± 1.41 (2 runs) |" in report.paper_table("mnist")
        assert report.groups() == {"mnist-l-paper": [f"{NAME}.paper"]}
        report.draw("mnist-l-paper", [f"{NAME}.paper"], tmp_path / "figure.svg")
        drawn = (tmp_path / "figure.svg").read_text()
        assert "<svg" in drawn
        assert (ROOT / "docs" / "figures" / "mnist-l-paper.svg").is_file()


def test_sweep(tmp_path):
    arguments = [sys.executable, str(ROOT / "recipes" / "sweep.py"), "pcdeq*_l_[ts]*_mnist", "--seeds", "0", "1"]
    printed = subprocess.run([*arguments, "--print"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(printed) == 6  # tanh, softsign, sigmoid
    assert all("--resume" in line and "--seed=" in line for line in printed)

    arguments = [sys.executable, str(ROOT / "recipes" / "sweep.py"), "pcdeq1_l_[ts]*_mnist", "--jobs", "2", "--"]
    arguments += ["--data", "sample", "--epochs", "1", "--limit-train", "128"]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = {f"pcdeq1_l_{activation}_mnist.paper.seed0" for activation in ("tanh", "softsign")}
    assert {folder.name for folder in (tmp_path / "runs").iterdir() if folder.is_dir()} == names
    assert all((tmp_path / "runs" / name / "results.csv").is_file() for name in names)
    other = tmp_path / "runs" / "pcdeq1_l_tanh_mnist.paper.seed0"
    settings = (other / "run.json").read_text()
    (other / "run.json").write_text(settings.replace('"hold_out": null', '"hold_out": 100'))
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "1 of 2 runs failed" in done.stderr
    assert "softsign_mnist.paper.seed0 is finished" in done.stdout
    assert "other settings: hold_out 100 there, None here" in other.with_name(f"{other.name}.txt").read_text()


def test_augmentation_crops_and_flips_each_image_by_itself():
    images = torch.arange(1, 3 * 32 * 32 + 1).view(1, 3, 32, 32).repeat(64, 1, 1, 1)
    augmented = train.augment(images, torch.Generator().manual_seed(0))
    assert torch.equal(augmented, train.augment(images, torch.Generator().manual_seed(0)))
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
    outside = ("digit.png", "theirs.pth", "path/to/", "NAMESPACE/", "you/")  # need what is the reader's
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
