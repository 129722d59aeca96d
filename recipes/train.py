"""Train a model of the zoo.

    python recipes/train.py --model pcdeq1_l_tanh_mnist                        # its default recipe
    python recipes/train.py --model pcdeq1_mc_relu6_cifar --recipe paper       # as in the paper
    python recipes/train.py --model pcdeq1_l_tanh_mnist --resume               # go on where it was killed
    python recipes/train.py --model pcdeq1_l_tanh_mnist --data sample --epochs 4

Trains on the whole training set, and looks at the test set once, after the last epoch. Writes to --output: run.json
(the settings), log.jsonl (a line per epoch), steps.jsonl (with --log-every), state/ (what --resume needs, until the run
is finished), and in the end model.safetensors and results.csv (the row that a checkpoint ships with; held_out.csv with
--hold-out).

`accelerate launch recipes/train.py` does the same, and starts several processes. Two on CPUs, which give what one
gives, up to rounding:

    accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no \\
        recipes/train.py --cpu --processes 2 --model pcdeq1_l_tanh_mnist

`accelerate launch --cpu --num_processes 2` starts only one (accelerate 1.15), which is refused, as is any other number
than --processes says.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ending import ENDING

if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv}:  # at once: what follows takes seconds to import
    print(Path(__file__).with_suffix(".txt").read_text("utf-8"), end="")
    sys.exit()

import ctypes
import dataclasses
import json
import math
import os
import time
from contextlib import nullcontext, suppress
from typing import Any, NoReturn

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from config import Config, parse, train_slices
from distributed import NEEDS_CPU, check_launch, hardware, sum_over_processes, synchronize_batch_norm
from evaluate import measure_run
from progress import Progress
from run_folder import (
    State,
    check_folder,
    commit,
    locked,
    newest_state,
    read_state,
    record_launch,
    remove_states,
    write_state,
)
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from pcdeq_zoo import DataError, PcDEQLinear, Recipe, WeightsError, forward_with_margins, record_solves
from pcdeq_zoo.data import load, normalize
from pcdeq_zoo.errors import one_line
from pcdeq_zoo.files import replace_file, weights_bytes
from pcdeq_zoo.operators import full_precision
from pcdeq_zoo.robustness import least_margin
from pcdeq_zoo.state_dict import check_state_dict
from pcdeq_zoo.weights import read_rows, sha256


def training_images(config: Config, recipe: Recipe, processes: int) -> tuple[Tensor, Tensor]:
    """What a run trains on: uint8 images (N, C, H, W) and labels (N,).

    Raises:
        SystemExit: No data, or too few for one batch.
    """
    try:
        images, labels = load(config.variant.dataset, "train", config.data)
        if not config.hold_out:
            load(config.variant.dataset, "test", config.data)  # to hear now, not after the training, that there is none
    except DataError as error:
        raise SystemExit(f"no data: {error}") from error
    if recipe.images and recipe.images > len(images):
        raise SystemExit(f"this recipe takes {recipe.images} training images, and there are {len(images)}")
    part, _ = train_slices(len(images), recipe.images, config.hold_out)
    if part.stop <= 0:
        raise SystemExit(
            f"--hold-out {config.hold_out} leaves nothing of {recipe.images or len(images)} training images"
        )
    images, labels = images[part], labels[part]
    if config.limit_train and config.limit_train > len(images):
        raise SystemExit(f"--limit-train {config.limit_train} is more than the {len(images)} images to train on")
    images, labels = images[: config.limit_train], labels[: config.limit_train]
    if min(recipe.batch_size, len(images)) < (least := max(2, processes)):
        raise SystemExit(
            f"a batch needs {least} images, one per process and two for BatchNorm; "
            f"got --batch-size {recipe.batch_size} and {len(images)} images"
        )
    return images, labels


def make_model(config: Config, recipe: Recipe) -> nn.Module:
    """The model to train, with fresh weights.

    Raises:
        SystemExit: It cannot have such channels or settings, or is of a module that needs what is not installed.
    """
    try:
        return timm.create_model(config.model, stop=recipe.stop, tol=recipe.tol, channels=config.channels)
    except (ImportError, ValueError, TypeError) as error:
        raise SystemExit(f"no {config.model}: {error}") from error


def batches(count: int, size: int, least: int, seed: int, epoch: int) -> list[Tensor]:
    """Indices of the batches of an epoch: a function of its arguments, so that a run can be resumed at any of them.

    A last batch of fewer than `least` images is left out: every process needs one, and BatchNorm two.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return [batch for batch in order.split(size) if len(batch) >= least]


def augment(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Images (N, C, H, W) cropped and flipped at random as the recipe says, each by itself.

    The generator is one of the CPU, so that all devices see the same images.
    """
    n, _, height, width = images.shape
    padding = recipe.crop_padding
    if not padding and not recipe.flip:
        return images
    top, left = (torch.randint(0, 2 * padding + 1, (n, 1), generator=generator) for _ in range(2))
    rows = top + torch.arange(height)
    columns = left + torch.arange(width)
    if recipe.flip:
        flip = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.where(flip, columns.flip(1), columns)
    sample, rows, columns = (index.to(images.device) for index in (torch.arange(n)[:, None], rows, columns))
    padded = F.pad(images, (padding,) * 4)
    return padded[sample[:, :, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class WithMargins(nn.Module):
    """A model whose forward gives the bounds of margins, too, so that a wrapper around it sees all that is computed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, labels: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return forward_with_margins(self.model, x, labels, eps)


class Training:
    """One training: the model, its optimizer, the average of its weights, and how far it has come."""

    def __init__(
        self, accelerator: Accelerator, config: Config, recipe: Recipe, images: Tensor, labels: Tensor
    ) -> None:
        self.accelerator, self.config, self.recipe = accelerator, config, recipe
        self.images, self.labels = images.to(accelerator.device), labels.to(accelerator.device)
        self.progress = Progress()
        self.least = max(2, accelerator.num_processes)  # images in a batch

        set_seed(config.seed)
        self.model = make_model(config, recipe)
        if accelerator.num_processes > 1:
            self.model = synchronize_batch_norm(self.model, accelerator.device)
        # Copied before `prepare` changes the model's forward, and moved to where it moves the model.
        self.ema = ModelEmaV3(self.model, decay=recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
        prepared = WithMargins(self.model) if recipe.eps else self.model
        self.prepared, self.optimizer = accelerator.prepare(prepared, optimizer)
        if self.ema:
            self.ema.to(accelerator.device)

    # --- the loop ---

    def run(self) -> None:
        """Train from where it is to the end, and write the weights.

        Raises:
            SystemExit: It was asked to end, or diverges.
        """
        with ENDING.awaited():
            self._train()
            if self.accelerator.is_main_process:
                self._write_weights()
            if reason := ENDING.reason():
                raise SystemExit(f"{reason}; the training is done, and --resume measures it")

    def _train(self) -> None:
        progress = self.progress
        while not self.is_done():
            steps = self.steps()
            self.prepared.train()
            self._clock = time.perf_counter()
            with self._bar(len(steps)) as bar:
                while progress.step < len(steps) and not self.is_done():
                    self._end_if_asked()
                    passes = self.passes(len(steps))
                    for group in self.optimizer.param_groups:
                        group["lr"] = self.recipe.learning_rate(passes)
                    self.step(steps[progress.step], self.recipe.eps_after(passes))
                    progress.step += 1
                    self._count_time()
                    bar.update()
                    if progress.step % 20 == 0:  # not more often: a GPU is waited for
                        self._check_loss()
                        bar.set_postfix_str(progress.summary(), refresh=False)
                    if self.config.log_every and progress.step % self.config.log_every == 0:
                        self._log_steps()
                    every, ends = self.config.save_every, progress.step == len(steps) or self.is_done()
                    if every and progress.step % every == 0 and not ends:  # at the end there is a line to log first
                        self.save()
                        self._clock = time.perf_counter()  # a state is not counted
            self._check_loss()
            progress.sums = sum_over_processes(self.accelerator, progress.sums)
            if self.accelerator.is_main_process:
                self._log()
            if progress.step < len(steps):
                break  # the time is up
            progress.next_epoch()
            self.save()

    def _end_if_asked(self) -> None:
        if reason := ENDING.reason():
            # Of several processes others may be at another step, and cannot be asked.
            if self.accelerator.num_processes == 1 and self.progress.updates:
                self.save()
            raise SystemExit(f"{reason}; --resume goes on")

    def is_done(self) -> bool:
        """Whether all epochs are done, or the time is up."""
        if self.config.minutes is not None:
            return self.progress.seconds >= 60 * self.config.minutes
        return self.progress.epoch > self.recipe.epochs

    def passes(self, steps: int) -> float:
        """How far the recipe's schedule has come, in its epochs; `steps` per epoch."""
        if self.config.minutes is not None:
            return self.recipe.epochs * min(1.0, self.progress.seconds / (60 * self.config.minutes))
        return self.progress.epoch - 1 + self.progress.step / steps

    def steps(self) -> list[Tensor]:
        """Indices of the images of each optimizer step of the epoch, where the images are."""
        size = self.recipe.batch_size * self.config.grad_accum
        steps = batches(len(self.images), size, self.least, self.config.seed, self.progress.epoch)
        return [step.to(self.images.device) for step in steps]

    def step(self, indices: Tensor, eps: float) -> None:
        """One optimizer step on the images of all processes, as one process would do it."""
        accelerator, recipe, progress = self.accelerator, self.recipe, self.progress
        self.optimizer.zero_grad()
        # What is random in a step depends on the run's seed and the step alone.
        seed = hash((self.config.seed, progress.epoch, progress.step)) % 2**63
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed((seed + accelerator.process_index) % 2**63)  # of a network with dropout
        mine = slice(accelerator.process_index, None, accelerator.num_processes)
        parts = [part for part in indices.split(recipe.batch_size) if len(part) >= self.least]
        count = sum(len(part) for part in parts)
        for number, part in enumerate(parts, start=1):
            batch = augment(self.images[part], recipe, generator)
            x = normalize(batch[mine], self.config.variant.dataset)
            target = self.labels[part][mine]
            synchronize = nullcontext() if number == len(parts) else accelerator.no_sync(self.prepared)
            with record_solves(self.model) as solves, synchronize:
                with accelerator.autocast():
                    logits, loss = self._loss(x, target, eps)
                # DistributedDataParallel divides by the number of processes.
                accelerator.backward(loss * (accelerator.num_processes / count))
            correct = (logits.argmax(1) == target).sum()
            progress.add(loss=loss.detach().double(), correct=correct.double(), images=len(target))
            progress.add_solves(solves)
        self.optimizer.step()
        progress.updates += 1
        if self.ema:
            self.ema.update(self.model, progress.updates)

    def _loss(self, x: Tensor, target: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Logits of a batch, and its loss."""
        recipe = self.recipe
        outputs = self.prepared(x, target, eps) if recipe.eps else self.prepared(x)
        logits, margins = outputs if recipe.eps else (outputs, None)
        logits = logits.float()
        loss = F.cross_entropy(logits, target, reduction="sum", label_smoothing=recipe.label_smoothing)
        if margins is not None:
            worst = F.cross_entropy(-margins.float(), target, reduction="sum")
            loss = loss.lerp(worst, recipe.worst_case_share(eps))
            self.progress.add(certified=(least_margin(margins, target) > 0).sum().double())
        return logits, loss

    def _check_loss(self) -> None:
        if not math.isfinite(loss := self.progress.sums.get("loss", 0.0)):
            self._refuse_to_go_on(f"the sum of the losses is {loss}")

    def _refuse_to_go_on(self, reason: str) -> NoReturn:
        """End a run that diverges; its last good state stays."""
        where = f"epoch {self.progress.epoch}, step {self.progress.step}"
        raise SystemExit(f"{where}: {reason}, so the run ends here; try another --lr in another --output")

    def _write_weights(self) -> None:
        """Write model.safetensors, the moving average where the recipe has one."""
        model = self.ema.module if self.ema else self.model
        replace_file(self.config.output / "model.safetensors", weights_bytes(model.state_dict(), self.config.model))

    # --- what it says ---

    def _bar(self, steps: int) -> tqdm:
        return tqdm(
            total=steps,
            initial=self.progress.step,
            desc=f"epoch {self.progress.epoch}" + ("" if self.config.minutes else f"/{self.recipe.epochs}"),
            leave=False,
            disable=None if self.accelerator.is_main_process else True,  # None: where there is no terminal
        )

    def _count_time(self) -> None:
        """Count what has passed since the last time."""
        now = time.perf_counter()
        passed, self._clock = now - self._clock, now
        self.progress.seconds += passed
        self.progress.add(seconds=passed * self.accelerator.is_main_process)

    def _log_steps(self) -> None:
        """A line on the steps since the last one, as the first process has seen them."""
        if not self.accelerator.is_main_process:
            return
        progress, sums = self.progress, self.progress.sums
        loss, correct, images = (sums[key] - progress.logged.get(key, 0.0) for key in ("loss", "correct", "images"))
        progress.logged = sums
        line = {"epoch": progress.epoch, "step": progress.step, "seconds": round(progress.seconds, 1)}
        line |= {"train_loss": round(loss / images, 5), "train_top1": round(100 * correct / images, 3)}
        with (self.config.output / "steps.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _log(self) -> None:
        rate = float(f"{self.optimizer.param_groups[0]['lr']:.4g}")
        line = {"epoch": self.progress.epoch, "lr": rate, **self.progress.line()}
        # Figure 4 of the paper: above 1, Banach's theorem says nothing of the layer, and the paper's still does.
        if dense := [module for module in self.model.modules() if isinstance(module, PcDEQLinear)]:
            with torch.no_grad():
                line["largest_singular_value"] = round(torch.linalg.matrix_norm(dense[0].weight, 2).item(), 4)
        with (self.config.output / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())  # no state has the last line
        flat = {"loss": line["train_loss"], "accuracy": line["train_top1"], "lr": rate, **line["evaluations"]}
        self.accelerator.log(flat, step=self.progress.epoch)
        tqdm.write(f"epoch {line['epoch']}: {self.progress.summary()}, {line['seconds']} s")
        sys.stdout.flush()  # to a file or a pipe as well

    # --- states ---

    def save(self) -> None:
        """Write the state. It is the same in all processes, but for the sums."""
        self._check_loss()
        progress = self.progress
        state = self.model.state_dict()
        try:
            check_state_dict(state, state)
        except WeightsError as error:
            self._refuse_to_go_on(str(error))
        mine = progress.sums
        progress.sums = sum_over_processes(self.accelerator, mine)
        # steps.jsonl tells what this process has seen, though the sums are those of all from here on.
        progress.logged = {key: progress.sums[key] - (mine[key] - progress.logged.get(key, 0.0)) for key in mine}
        if self.accelerator.is_main_process:
            name = f"epoch-{progress.epoch:04}-step-{progress.step:06}"
            write_state(self.config.output, name, self._tensors(), progress.state_dict())
        self.accelerator.wait_for_everyone()

    def resume(self, folder: Path | None, settings: dict[str, Any]) -> None:
        """Go back to a saved state and the log that it had, or to the beginning, and note this launch in run.json.

        Raises:
            SystemExit: The state is damaged, or not of this run.
        """
        log, steps = self.config.output / "log.jsonl", self.config.output / "steps.jsonl"
        if folder:
            state = read_state(folder)
            try:
                self._load(state)
            except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
                reason = one_line(error)
                raise SystemExit(f"cannot resume from {folder}, it is not of this run: {reason}") from error
            self.accelerator.print(f"resumed from {folder}")
        if not self.accelerator.is_main_process:
            self.progress.sums = dict.fromkeys(self.progress.sums, 0.0)  # the saved sums are those of all processes
            return
        record_launch(self.config.output, settings, folder)  # before the log, and not for a state that was refused
        if not folder:
            log.unlink(missing_ok=True)
            steps.unlink(missing_ok=True)
            return
        replace_file(log, state.log)
        if steps.exists():
            replace_file(steps, "".join(line for line in steps.open(encoding="utf-8") if self._has_done(line)))

    def _has_done(self, line: str) -> bool:
        """Whether what a line of steps.jsonl tells of is behind; one that was not finished is not."""
        try:
            told = json.loads(line)
            return (told["epoch"], told["step"]) <= (self.progress.epoch, self.progress.step)
        except (ValueError, KeyError, TypeError):
            return False

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        # Of the optimizer its moments; rates and weight decay are the recipe's. Nothing that is random is kept: it
        # depends on the seed and the step alone.
        moments = self.optimizer.state_dict()["state"]
        tensors = {
            "model": self.model.state_dict(),
            "optimizer": {f"{index}.{key}": value for index, part in moments.items() for key, value in part.items()},
        }
        return {**tensors, "ema": self.ema.module.state_dict()} if self.ema else tensors

    def _load(self, state: State) -> None:
        progress, epochs = self.progress, self.recipe.epochs
        progress.load_state_dict(state.progress)
        steps = len(self.steps())
        last = math.inf if self.config.minutes else epochs + 1
        if not (1 <= progress.epoch <= last and 0 <= progress.step < steps):
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


def settings_of(config: Config, recipe: Recipe, accelerator: Accelerator, images: int) -> dict[str, Any]:
    """What run.json says: all that the result depends on, and who computed it."""
    return {
        "module": config.module,
        "model": config.model,
        "tag": config.recipe,
        "channels": config.channels and list(config.channels),
        "recipe": dataclasses.asdict(recipe),
        "minutes": config.minutes,
        "grad_accum": config.grad_accum,
        "mixed_precision": accelerator.mixed_precision,
        "seed": config.seed,
        "images": images,
        "hold_out": config.hold_out,
        "data": config.data,
        "commit": commit(),
        "hardware": hardware(accelerator),
    }


def is_finished(output: Path, result: str) -> bool:
    """Whether a run has been measured, by the weights that are there.

    Raises:
        SystemExit: By others.
    """
    if not (output / result).exists():
        return False
    try:
        (run,) = read_rows(output / result)
        measured = run.row["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"{output / result} is not what train.py wrote; remove it to measure again") from error
    if sha256(output / "model.safetensors") != measured:
        raise SystemExit(
            f"{output / 'model.safetensors'} is not the file that {result} was measured on; remove {result} to measure "
            "again, or both to train again"
        )
    return True


def keep_memory() -> None:
    """Let glibc, if it is that, keep the memory of large tensors; without, page faults take a sixth of a step."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        trim, mmap = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        if not libc.mallopt(mmap, 2**30):
            libc.mallopt(mmap, 2**25)  # the most that glibc before 2.35 takes
        libc.mallopt(trim, 2**30)


def main() -> None:
    keep_memory()
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show must not end a run
    config, recipe = parse(__doc__)
    output = config.output
    try:
        accelerator = Accelerator(
            cpu=config.cpu or NEEDS_CPU,
            mixed_precision=config.mixed_precision,
            log_with=config.report_to,
            project_dir=output,
        )
    except ValueError as error:  # a setting in the environment or its config
        raise SystemExit(f"accelerate: {one_line(error)}") from error
    check_launch(accelerator, config.processes)
    if recipe.eps and accelerator.num_processes > 1:
        raise SystemExit("a recipe with eps trains in one process: its bounds go by the statistics of one batch")
    if config.minutes and accelerator.num_processes > 1:
        raise SystemExit("--minutes is for one process: each has a clock of its own")
    if config.report_to and not accelerator.log_with:
        raise SystemExit(f"{config.report_to} is not installed: pip install {config.report_to}")
    if accelerator.device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS needs for that

    make_model(config, recipe)  # to hear now, before anything is written, that there is none
    images, labels = training_images(config, recipe, accelerator.num_processes)
    settings = settings_of(config, recipe, accelerator, len(images))
    check_folder(output, settings, config.resume)
    accelerator.wait_for_everyone()  # all have looked, before the first creates what they looked for
    lock = locked(output) if accelerator.is_main_process else nullcontext()
    with lock, full_precision(accelerator.device):  # cuDNN's convolutions would be in TF32
        if not (output / "model.safetensors").exists():
            training = Training(accelerator, config, recipe, images, labels)
            accelerator.wait_for_everyone()
            accelerator.print(
                f"{config.model} on {len(images)} of the {config.variant.dataset.sizes['train']} training images, "
                f"{accelerator.num_processes} x {accelerator.device}: {recipe}"
            )
            state = newest_state(output) if config.resume in (None, "latest") else Path(config.resume)
            if config.resume and not state:
                accelerator.print(f"{output} has no state to resume from, so this starts")
            training.resume(state, settings)
            if config.report_to:
                accelerator.init_trackers("tensorboard")  # after run.json, by which a folder is known for a run
            training.run()

        if accelerator.is_main_process:
            if is_finished(output, "held_out.csv" if config.hold_out else "results.csv"):
                print(f"{output} is finished")
            else:
                try:
                    row = measure_run(output, config.data, accelerator.device)
                except (WeightsError, DataError) as error:
                    raise SystemExit(f"{output} cannot be measured: {error}") from error
                where = "held-out" if config.hold_out else "test"
                print(f"accuracy {row['top1']:.2f} % on {row['n']} {where} images; written to {output}")
            remove_states(output)
    accelerator.end_training()


if __name__ == "__main__":
    main()
