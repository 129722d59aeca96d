"""Several processes give what one gives."""

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import timm
import torch
import torch.distributed as dist
from accelerate import Accelerator
from config import Config
from distributed import sum_over_processes, synchronize_batch_norm
from ending import Ending
from processes import ROOT
from recipe_runs import NAME, SHORT, free_port
from torch.nn import functional as F
from train import Training

from pcdeq_zoo import VARIANTS, Recipe
from pcdeq_zoo.files import read_jsonl

DTYPES = (torch.float32, torch.bfloat16)


def _batch_norm_worker(rank: int, folder: str) -> None:
    """One of two processes with an uneven share of a batch; it writes what it gets."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for dtype in DTYPES:
        norm = synchronize_batch_norm(batch_norm(), torch.device("cpu"))
        x = (batch()[:4] if rank == 0 else batch()[4:]).to(dtype).requires_grad_()
        y = norm(x)
        assert y.dtype == dtype
        (y.float() * torch.sin(x.detach().float())).sum().backward()
        weight_grad = norm[0].weight.grad.clone()
        dist.all_reduce(weight_grad)  # as DistributedDataParallel would
        state = {"y": y.detach(), "x_grad": x.grad, "weight_grad": weight_grad, **norm.state_dict()}
        torch.save(state, f"{folder}/{dtype}.{rank}.pt")
    dist.destroy_process_group()


def batch_norm() -> torch.nn.Sequential:
    torch.manual_seed(0)
    norm = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    torch.nn.init.normal_(norm[0].weight)
    return norm


def batch() -> torch.Tensor:
    return 10 + torch.randn(7, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def _start(worker: Callable[..., None], *arguments: object) -> None:
    """Two processes, forked from one that knows PyTorch; see `processes`."""
    torch.multiprocessing.start_processes(worker, arguments, nprocs=2, start_method="forkserver")


@pytest.fixture(scope="module")
def normalized_by_two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("batch_norm")
    _start(_batch_norm_worker, str(folder))
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_norm_over_processes_is_batch_norm(normalized_by_two: Path, dtype: torch.dtype):
    norm, x = batch_norm(), batch().to(dtype).requires_grad_()
    y = norm(x)
    (y.float() * torch.sin(x.detach().float())).sum().backward()
    parts = [torch.load(normalized_by_two / f"{dtype}.{rank}.pt", weights_only=True) for rank in range(2)]
    exact = dtype == torch.float32
    close = functools.partial(torch.testing.assert_close, rtol=1e-4 if exact else 0.02, atol=1e-5 if exact else 0.02)
    close(torch.cat([part["y"] for part in parts]), y.detach())
    close(torch.cat([part["x_grad"] for part in parts]), x.grad)
    for part in parts:
        close(part["weight_grad"], norm[0].weight.grad, atol=1e-3 if exact else 0.5)
        torch.testing.assert_close(part["0.running_mean"], norm[0].running_mean)
        torch.testing.assert_close(part["0.running_var"], norm[0].running_var)


def thirteen() -> tuple[Recipe, torch.Tensor, torch.Tensor]:
    """A recipe with batches of 5, and 13 images with labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (13, 1, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (13,), generator=generator)
    paper = VARIANTS[NAME].recipes["paper"]
    return dataclasses.replace(paper, batch_size=5, label_smoothing=0.1, tol=1e-6), images, labels


def _step_worker(rank: int, processes: int, port: int, folder: str) -> None:
    """One optimiser step on three batches, as one of several processes; it writes the gradient and the sums."""
    if processes > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1")
    training = Training(Accelerator(cpu=True), Config(NAME, "paper", Path(folder), grad_accum=3), *thirteen())
    assert training.accelerator.num_processes == processes
    training.prepared.train()
    training.step(torch.arange(13), eps=0.0)
    sums = sum_over_processes(training.accelerator, training.progress.sums)
    if rank == 0:
        gradients = {name: parameter.grad for name, parameter in training.model.named_parameters()}
        torch.save({"gradients": gradients, "sums": sums}, f"{folder}/step.pt")
    if processes > 1:
        dist.destroy_process_group()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_step_is_the_mean_over_all_its_images(tmp_path, processes: int):
    """Batches of 5, 5 and 3, however many processes share them: the gradient of the mean loss of the 13 images."""
    if processes == 1:
        _step_worker(0, 1, 0, str(tmp_path))
    else:
        _start(_step_worker, processes, free_port(), str(tmp_path))
    recipe, images, labels = thirteen()
    torch.manual_seed(0)
    model = timm.create_model(NAME, stop=recipe.stop, tol=recipe.tol).train()
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


def test_steps_are_logged_as_the_first_process_has_seen_them(tmp_path, monkeypatch):
    """Also after a state was saved, which takes the sums of all processes together."""
    accelerator = Accelerator(cpu=True)
    for name in ("saves", "does not"):
        (tmp_path / name).mkdir()
        training = Training(accelerator, Config(NAME, "paper", tmp_path / name), *thirteen())
        training.step(torch.arange(5), eps=0.0)
        training._log_steps()
        training.step(torch.arange(5, 8), eps=0.0)
        if name == "saves":
            monkeypatch.setattr("train.sum_over_processes", lambda _, sums: {key: 3 * sums[key] for key in sums})
            training.save()
        training.step(torch.arange(8, 13), eps=0.0)
        training._log_steps()
    one, two = (read_jsonl(tmp_path / name / "steps.jsonl") for name in ("saves", "does not"))
    assert len(one) == 2
    assert one == two


@pytest.mark.parametrize(
    ("command", "launches"),
    [
        (["python", "/usr/bin/accelerate", "launch", "train.py"], True),
        (["python", "/usr/bin/accelerate-launch", "train.py"], True),
        (["python", "-m", "accelerate.commands.launch", "train.py"], True),
        (["bash", "/home/somebody/accelerate-study/run.sh"], False),
    ],
)
def test_who_is_a_launcher(monkeypatch, command: list[str], launches: bool):
    monkeypatch.setattr(psutil.Process, "cmdline", lambda _: command)
    ending = Ending()
    assert not ending.reason()
    monkeypatch.setattr("os.getppid", lambda: 1)  # whoever takes orphans
    assert bool(ending.reason()) == launches


def test_one_process_instead_of_two_is_refused(tmp_path):
    """`accelerate launch --cpu --num_processes 2` starts one, without a word."""
    launcher = [str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu", "--num_processes=2"]
    launcher += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    arguments = f"recipes/train.py {SHORT} --output {tmp_path / 'run'}"
    done = subprocess.run([*launcher, *arguments.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "accelerate was asked for several processes and started one; on CPUs say --multi_gpu" in done.stderr
    assert not (tmp_path / "run").exists()


def test_on_a_gpu_batch_norm_is_synchronized_by_pytorch():
    usual = batch_norm()
    ours = synchronize_batch_norm(batch_norm(), torch.device("cuda"))
    assert isinstance(ours[0], torch.nn.SyncBatchNorm)
    assert list(ours.state_dict()) == list(usual.state_dict())
