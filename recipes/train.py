"""Train a model of the zoo.

    accelerate launch recipes/train.py --model pcdeq1_l_tanh_mnist                        # the paper's recipe
    accelerate launch recipes/train.py --model pcdeq1_mc_relu6_cifar --recipe zoo         # ours: shorter
    accelerate launch recipes/train.py --model pcdeq1_l_tanh_mnist --resume               # go on where it was killed
    accelerate launch recipes/train.py --model pcdeq1_l_tanh_mnist --data sample --epochs 4

The paper's recipe (Tables 5-7) trains on the whole training set and is measured on the test set once, after the last
epoch. Writes to --output (default runs/<model>.<recipe>): run.json (the settings), log.jsonl (a line per epoch), state/
(what --resume needs, until the run is finished), and in the end model.safetensors and results.csv (the row that a
checkpoint ships with).

Two processes on CPUs, which give what one gives, up to rounding:

    accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no \\
        recipes/train.py --cpu --processes 2 --model pcdeq1_l_tanh_mnist

`accelerate launch --cpu --num_processes 2` starts only one (accelerate 1.15), which is refused, as is any other number
than --processes says.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from evaluate import measure_run
from run_folder import (
    State,
    check_folder,
    compare_settings,
    locked,
    newest_state,
    read_state,
    remove_states,
    write_state,
)
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from tqdm import tqdm

from pcdeq_zoo import VARIANTS, DataError, PcDEQLinear, Recipe, SolveRecord, WeightsError, record_solves
from pcdeq_zoo.data import load, normalize
from pcdeq_zoo.files import replace_file, weights_bytes


class _SumOverProcesses(torch.autograd.Function):
    """Sum of a tensor over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose training statistics are those of the batches of all processes together.

    PyTorch's own takes CUDA tensors only.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dtype, x = x.dtype, x.float()  # as torch.nn.BatchNorm2d computes half precision
        count = x.new_full((1,), x.numel() // x.shape[1])
        sums = _SumOverProcesses.apply(torch.cat([x.sum((0, 2, 3)), count]))
        mean = sums[:-1] / sums[-1]
        centred = x - mean.view(1, -1, 1, 1)
        var = _SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / sums[-1]
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (sums[-1] / (sums[-1] - 1)), self.momentum)
        scale = torch.rsqrt(var + self.eps) * self.weight
        return (centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(dtype)


def synchronize_batch_norm(model: nn.Module) -> None:
    """Make every BatchNorm2d of the model a `SyncBatchNorm2d`; names and state stay."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random crop of the image padded with 4 black pixels, and random horizontal flip, image by image."""
    n, _, height, width = images.shape
    padded = F.pad(images, (4, 4, 4, 4))
    top, left = (torch.randint(0, 9, (n, 1), generator=generator) for _ in range(2))
    rows = top + torch.arange(height)
    columns = left + torch.arange(width)
    flip = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    sample = torch.arange(n)[:, None, None]
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def batches(count: int, size: int, least: int, seed: int, epoch: int) -> list[Tensor]:
    """Indices of the batches of an epoch: a function of its arguments, so that a run can be resumed at any of them.

    A last batch of fewer than `least` images is left out: every process needs one, and BatchNorm two.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return [batch for batch in order.split(size) if len(batch) >= least]


class Progress:
    """How far a run has come, and the sums of the epoch that it is in; over all processes once they are gathered."""

    def __init__(self) -> None:
        self.epoch = 1
        self.step = 0  # optimiser steps of this epoch
        self.updates = 0  # of all epochs
        self.sums: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "step": self.step, "updates": self.updates, "sums": dict(self.sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.step, self.updates = (int(state[key]) for key in ("epoch", "step", "updates"))
        self.sums = {key: float(value) for key, value in state["sums"].items()}

    def add(self, **values: float) -> None:
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + value

    def add_solves(self, records: list[SolveRecord]) -> None:
        for record in records:
            key = f"{record.layer} {record.direction}"
            failed = float((record.status != 0).sum())
            self.add(
                **{key: float(record.evaluations.sum()), f"{key} n": len(record.evaluations), "unconverged": failed}
            )

    def evaluations(self) -> dict[str, float]:
        """Mean evaluations per image, by layer and direction: {"features.deq1 forward": 7.2, ...}."""
        keys = sorted((key for key in self.sums if f"{key} n" in self.sums), key=lambda key: ("backward" in key, key))
        return {key: round(self.sums[key] / self.sums[f"{key} n"], 2) for key in keys}


@dataclasses.dataclass
class Run:
    """One training: what is trained, how, on what, and where it is kept."""

    accelerator: Accelerator
    model: nn.Module
    name: str
    recipe: Recipe
    images: Tensor
    labels: Tensor
    seed: int
    grad_accum: int
    save_every: int | None
    output: Path

    def __post_init__(self) -> None:
        if self.accelerator.num_processes > 1:
            synchronize_batch_norm(self.model)
        recipe = self.recipe
        self.progress = Progress()
        # Copied before `prepare` changes the model's forward, and moved to where it moves the model.
        self.ema = ModelEmaV3(self.model, decay=recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
        self.prepared, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        if self.ema:
            self.ema.to(self.accelerator.device)

    # --- state ---

    def save(self) -> None:
        """Write the state. It is the same in all processes, but for the sums."""
        self.gather()
        if self.accelerator.is_main_process:
            name = f"epoch-{self.progress.epoch:04}-step-{self.progress.step:06}"
            write_state(self.output, name, self._tensors(), self.progress.state_dict())
        self.accelerator.wait_for_everyone()

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        # Of the optimizer its moments; rates and weight decay are the recipe's. Nothing that is random is kept: it
        # depends on the seed and the step alone.
        moments = self.optimizer.state_dict()["state"]
        tensors = {
            "model": self.model.state_dict(),
            "optimizer": {f"{index}.{key}": value for index, part in moments.items() for key, value in part.items()},
        }
        return {**tensors, "ema": self.ema.module.state_dict()} if self.ema else tensors

    def resume(self, folder: Path | None) -> None:
        """Go back to a saved state and the log that it had, or to the beginning.

        Raises:
            SystemExit: The state is damaged, or not of this run.
        """
        log = self.output / "log.jsonl"
        if folder:
            state = read_state(folder)
            try:
                self._load(state)
            except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
                reason = " ".join(str(error).split())
                raise SystemExit(f"cannot resume from {folder}, it is not of this run: {reason}") from error
            self.accelerator.print(f"resumed from {folder}")
        if not self.accelerator.is_main_process:
            self.progress.sums = dict.fromkeys(self.progress.sums, 0.0)  # the saved sums are those of all processes
        elif folder:
            replace_file(log, state.log)
        else:
            log.unlink(missing_ok=True)

    def _load(self, state: State) -> None:
        self.progress.load_state_dict(state.progress)
        progress, epochs, steps = self.progress, self.recipe.epochs, len(self.steps(self.progress.epoch))
        if not (1 <= progress.epoch <= epochs + 1 and 0 <= progress.step < steps):
            raise ValueError(f"epoch {progress.epoch}, step {progress.step}, of {epochs} epochs of {steps} steps")
        if progress.updates != (wanted := (progress.epoch - 1) * steps + progress.step):
            raise ValueError(f"{progress.updates} updates, wanted {wanted}")
        if (lines := len(state.log.splitlines())) != progress.epoch - 1:
            raise ValueError(f"a log of {lines} epochs before epoch {progress.epoch}")
        self.model.load_state_dict(state.tensors["model"])
        if self.ema:
            self.ema.module.load_state_dict(state.tensors["ema"])
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in state.tensors["optimizer"].items():
            index, _, name = key.partition(".")
            moments.setdefault(int(index), {})[name] = value
        for index, parameter in enumerate(self.model.parameters()):
            found = {name: tuple(value.shape) for name, value in moments[index].items()}
            if found != {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}:
                raise ValueError(f"moments {found} of parameter {index}, which is {tuple(parameter.shape)}")
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})

    def gather(self) -> None:
        """Make the sums of this process those of all, and leave them with the first."""
        if self.accelerator.num_processes == 1:
            return
        keys = list(self.progress.sums)
        values = torch.tensor([self.progress.sums[key] for key in keys], dtype=torch.float64)
        total = self.accelerator.reduce(values.to(self.accelerator.device), "sum").tolist()
        first = self.accelerator.is_main_process
        self.progress.sums = {key: value if first else 0.0 for key, value in zip(keys, total, strict=True)}

    # --- training ---

    def train(self) -> None:
        """Train from where the run is to its end; a line per epoch in the log, and the state as often as asked."""
        while self.progress.epoch <= self.recipe.epochs:
            self._train_epoch()
            self.progress.epoch, self.progress.step, self.progress.sums = self.progress.epoch + 1, 0, {}
            self.save()

    def steps(self, epoch: int) -> list[Tensor]:
        """Indices of the images of each optimizer step of an epoch."""
        size, least = self.recipe.batch_size * self.grad_accum, max(2, self.accelerator.num_processes)
        return batches(len(self.images), size, least, self.seed, epoch)

    def _train_epoch(self) -> None:
        accelerator, progress, recipe = self.accelerator, self.progress, self.recipe
        steps = self.steps(progress.epoch)
        self.prepared.train()
        start = time.perf_counter()
        bar = tqdm(
            total=len(steps),
            initial=progress.step,
            desc=f"epoch {progress.epoch}/{recipe.epochs}",
            leave=False,
            disable=not accelerator.is_main_process,
        )
        with bar:
            while progress.step < len(steps):
                for parameters in self.optimizer.param_groups:
                    parameters["lr"] = recipe.learning_rate(progress.epoch - 1 + progress.step / len(steps))
                self._step(steps[progress.step])
                progress.step += 1
                bar.update()
                if progress.step % 20 == 0:
                    bar.set_postfix(self._summary(), refresh=False)
                if self.save_every and progress.step % self.save_every == 0 and progress.step < len(steps):
                    progress.add(seconds=(time.perf_counter() - start) * accelerator.is_main_process)
                    start = time.perf_counter()
                    self.save()
        progress.add(seconds=(time.perf_counter() - start) * accelerator.is_main_process)
        self.gather()
        self._log()

    def _step(self, indices: Tensor) -> None:
        """One optimiser step on the images of all processes, as one process would do it."""
        accelerator, recipe = self.accelerator, self.recipe
        self.optimizer.zero_grad()
        # What is random in a step depends on the run's seed and the step alone.
        progress = self.progress
        generator = torch.Generator().manual_seed(hash((self.seed, progress.epoch, progress.step)) % 2**63)
        parts = [part for part in indices.split(recipe.batch_size) if len(part) >= max(2, accelerator.num_processes)]
        count = sum(len(part) for part in parts)
        for last, part in zip([*[False] * (len(parts) - 1), True], parts, strict=True):
            batch = augment(self.images[part], generator) if recipe.augmentation else self.images[part]
            mine = slice(accelerator.process_index, None, accelerator.num_processes)
            x = normalize(batch[mine].to(accelerator.device), VARIANTS[self.name].dataset)
            target = self.labels[part][mine].to(accelerator.device)
            with record_solves(self.model) as records, nullcontext() if last else accelerator.no_sync(self.prepared):
                with accelerator.autocast():
                    logits = self.prepared(x).float()
                    loss = F.cross_entropy(logits, target, reduction="sum", label_smoothing=recipe.label_smoothing)
                # DistributedDataParallel divides by the number of processes.
                accelerator.backward(loss * (accelerator.num_processes / count))
            correct = (logits.argmax(1) == target).sum()
            progress.add(loss=loss.item(), correct=correct.item(), images=len(target))
            progress.add_solves(records)
        self.optimizer.step()
        progress.updates += 1
        if self.ema:
            self.ema.update(self.model, progress.updates)

    def _summary(self) -> dict[str, str]:
        sums = self.progress.sums
        numbers: dict[str, list[str]] = {"forward": [], "backward": []}
        for key, value in self.progress.evaluations().items():
            numbers[key.split()[-1]].append(f"{value:.1f}")
        return {
            "loss": f"{sums['loss'] / sums['images']:.4f}",
            "acc": f"{100 * sums['correct'] / sums['images']:.2f}",
            **{direction: "/".join(values) for direction, values in numbers.items()},
        }

    def _log(self) -> None:
        sums = self.progress.sums
        if not self.accelerator.is_main_process:
            return
        line: dict[str, Any] = {
            "epoch": self.progress.epoch,
            "lr": float(f"{self.optimizer.param_groups[0]['lr']:.4g}"),
            "train_loss": round(sums["loss"] / sums["images"], 5),
            "train_top1": round(100 * sums["correct"] / sums["images"], 3),
            "evaluations": self.progress.evaluations(),
            "unconverged": int(sums["unconverged"]),
            "seconds": round(sums["seconds"], 1),
        }
        # Figure 4 of the paper: above 1, Banach's theorem says nothing of the layer, and the paper's still does.
        if dense := [module for module in self.model.modules() if isinstance(module, PcDEQLinear)]:
            with torch.no_grad():
                line["largest_singular_value"] = round(torch.linalg.matrix_norm(dense[0].weight, 2).item(), 4)
        with (self.output / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        flat = {"loss": line["train_loss"], "accuracy": line["train_top1"], "lr": line["lr"], **line["evaluations"]}
        self.accelerator.log(flat, step=self.progress.epoch)
        tqdm.write(f"epoch {line['epoch']}: {self._summary()}, {line['seconds']} s")

    def write_weights(self) -> None:
        """Write model.safetensors, the moving average where the recipe has one."""
        model = self.ema.module if self.ema else self.model
        replace_file(self.output / "model.safetensors", weights_bytes(model.state_dict(), self.name))


def hardware(accelerator: Accelerator) -> str:
    """What a run computes on, e.g. "1 CPU thread" or "2 x NVIDIA H100"."""
    if accelerator.device.type == "cuda":
        return f"{accelerator.num_processes} x {torch.cuda.get_device_name(accelerator.device)}"
    threads = accelerator.num_processes * torch.get_num_threads()
    return f"{threads} {accelerator.device.type.upper()} thread{'s' * (threads > 1)}"


def commit() -> str:
    """Commit of this code, for the record, with "-dirty" where it was changed; empty outside a git checkout."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="name in the zoo, e.g. pcdeq1_l_tanh_mnist")
    add("--recipe", choices=("paper", "zoo"), default="paper", help="default: paper")
    add("--data", help="folder, 'sample' or 'hub' (default: below $PCDEQ_ZOO_DATA, else the Hub)")
    add("--output", type=Path, help="folder for the run (default: runs/<model>.<recipe>)")
    add(
        "--resume", nargs="?", const="latest", metavar="STATE", help="go on from the newest state of --output, or STATE"
    )
    add("--save-every", type=int, metavar="STEPS", help="save the state also within epochs")
    add("--eval-only", action="store_true", help="measure the finished run in --output again, and train nothing")
    add("--epochs", type=int, help="default: the recipe's; its schedule moves along in proportion")
    add("--batch-size", type=int, help="images per forward, over all processes (default: the recipe's)")
    add("--grad-accum", type=int, default=1, metavar="N", help="forwards per optimizer step (default: 1)")
    add("--lr", type=float, help="default: the recipe's")
    add("--weight-decay", type=float, help="default: the recipe's")
    add("--label-smoothing", type=float, help="default: the recipe's")
    add("--ema-decay", type=float, help="moving average of the weights, 0 for none (default: the recipe's)")
    add("--tol", type=float, help="tolerance of the solves (default: the recipe's)")
    add("--mixed-precision", choices=("no", "bf16"), help="default: accelerate's; equilibria are solved in float32")
    add("--seed", type=int, default=0)
    add("--limit-train", type=int, metavar="N", help="train on the first N images only")
    add("--hold-out", type=int, metavar="N", help="measure on the last N training images, and leave the test set alone")
    add("--report-to", choices=("tensorboard",), help="beside log.jsonl")
    add("--cpu", action="store_true", help="even where there is a GPU")
    add("--processes", type=int, metavar="N", help="refuse to run as any other number of processes")
    args = parser.parse_args()
    if args.model not in VARIANTS:
        parser.error(f"unknown model {args.model}; the zoo has {', '.join(VARIANTS)}")
    for flag in (
        "epochs",
        "batch_size",
        "lr",
        "limit_train",
        "hold_out",
        "grad_accum",
        "save_every",
        "processes",
        "tol",
    ):
        if (value := getattr(args, flag)) is not None and not 0 < value < math.inf:
            parser.error(f"--{flag.replace('_', '-')} must be above 0, got {value}")
    for flag in ("seed", "weight_decay"):
        if (value := getattr(args, flag)) is not None and not 0 <= value < math.inf:
            parser.error(f"--{flag.replace('_', '-')} must be at least 0, got {value}")
    for flag in ("label_smoothing", "ema_decay"):
        if not 0 <= (getattr(args, flag) or 0) < 1:
            parser.error(f"--{flag.replace('_', '-')} must be at least 0 and below 1, got {getattr(args, flag)}")

    variant = VARIANTS[args.model]
    recipe = variant.recipes[args.recipe]
    if args.epochs:
        decay = recipe.lr_decay_epoch and round(recipe.lr_decay_epoch * args.epochs / recipe.epochs)
        recipe = dataclasses.replace(recipe, epochs=args.epochs, lr_decay_epoch=decay)
    names = ("batch_size", "lr", "weight_decay", "label_smoothing", "ema_decay", "tol")
    chosen = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    recipe = dataclasses.replace(recipe, **chosen)

    output = args.output or Path("runs") / f"{args.model}.{args.recipe}"
    accelerator = Accelerator(
        cpu=args.cpu, mixed_precision=args.mixed_precision, log_with=args.report_to, project_dir=output
    )
    launched = args.processes or int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise SystemExit(f"launched as {launched} processes, but accelerate runs {accelerator.num_processes} here")
    # With several processes asked for and one started, accelerate 1.15 says where they should meet, and no more.
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ and not args.processes:
        raise SystemExit(
            "accelerate was asked for several processes and started one; on CPUs say --multi_gpu to it and --cpu to "
            "this, or --processes 1 for one"
        )
    if accelerator.mixed_precision == "fp16":
        raise SystemExit(
            "mixed precision fp16 is float32 without a word on CPUs, and not tried on GPUs; use bf16 or no"
        )
    if args.report_to and not accelerator.log_with:
        raise SystemExit(f"{args.report_to} is not installed: pip install {args.report_to}")
    if accelerator.device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        images, labels = load(variant.dataset, "train", args.data)
        if not args.hold_out:
            load(variant.dataset, "test", args.data)  # to hear now, and not after the training, that there is none
    except DataError as error:
        raise SystemExit(f"no data: {error}") from error
    if args.hold_out:
        if args.hold_out >= len(images):
            raise SystemExit(f"--hold-out {args.hold_out} leaves nothing of {len(images)} training images")
        images, labels = images[: -args.hold_out], labels[: -args.hold_out]
    images, labels = images[: args.limit_train], labels[: args.limit_train]
    if min(recipe.batch_size, len(images)) < (least := max(2, accelerator.num_processes)):
        raise SystemExit(
            f"a batch needs {least} images, one per process and two for BatchNorm; "
            f"got --batch-size {recipe.batch_size} and {len(images)} images"
        )

    settings = {
        "model": args.model,
        "tag": args.recipe,
        "recipe": dataclasses.asdict(recipe),
        "grad_accum": args.grad_accum,
        "mixed_precision": accelerator.mixed_precision,
        "seed": args.seed,
        "images": len(images),
        "hold_out": args.hold_out,
        "commit": commit(),
        "hardware": hardware(accelerator),
    }
    if args.eval_only:
        if accelerator.is_main_process:
            if not all((output / file).exists() for file in ("model.safetensors", "run.json", "log.jsonl")):
                raise SystemExit(f"{output} holds no finished run to measure")
            compare_settings(settings, output / "run.json")
            try:
                print(json.dumps(measure_run(output, args.data, accelerator.device)))
            except (WeightsError, DataError) as error:
                raise SystemExit(str(error)) from error
        return
    check_folder(output, settings, args.resume)
    accelerator.wait_for_everyone()  # all have looked, before the first creates what they looked for
    with locked(output) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process and not (output / "run.json").exists():
            replace_file(output / "run.json", json.dumps(settings, indent=1) + "\n")
        accelerator.wait_for_everyone()
        if args.report_to:
            accelerator.init_trackers("tensorboard")
        if not (output / "model.safetensors").exists():
            state = Path(args.resume) if args.resume not in (None, "latest") else newest_state(output)
            set_seed(args.seed)
            model = timm.create_model(args.model, stop=recipe.stop, tol=recipe.tol)
            count, every = args.grad_accum, args.save_every
            run = Run(accelerator, model, args.model, recipe, images, labels, args.seed, count, every, output)
            accelerator.print(
                f"{args.model} on {len(images)} images, {accelerator.num_processes} x {accelerator.device}: {recipe}"
            )
            run.resume(state)
            run.train()
            if accelerator.is_main_process:
                run.write_weights()
        if accelerator.is_main_process:
            measured = output / ("held_out.csv" if args.hold_out else "results.csv")
            if measured.exists():
                print(f"{output} is finished")
            else:
                row = measure_run(output, args.data, accelerator.device)
                where = "held-out" if args.hold_out else "test"
                print(f"accuracy {row['top1']:.2f} % on {row['n']} {where} images; written to {output}")
            remove_states(output)
    accelerator.end_training()


if __name__ == "__main__":
    main()
