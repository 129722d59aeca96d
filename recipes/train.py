"""Train a model of the zoo by the paper's recipe (Tables 5-7).

    accelerate launch recipes/train.py --model pcdeq1_l_tanh_mnist
    accelerate launch recipes/train.py --model pcdeq1_l_tanh_mnist --data sample --epochs 4

Trains on the whole training set, looks at the test set once, after the last epoch, and writes to --output (default
runs/<model>): model.safetensors, log.jsonl (a line per epoch) and results.csv (the row that a checkpoint ships with).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import subprocess
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from evaluate import evaluate
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm

from pcdeq_zoo import DATASETS, VARIANTS, Dataset, Recipe, SolveRecord, record_solves
from pcdeq_zoo.data import DataError, load, normalize
from pcdeq_zoo.weights import RESULT_COLUMNS, sha256

TAG = "paper"

# The paper's criterion (section 5), per sample. The checkpoint is measured with the model's default: certified solves.
SOLVES = {"stop": "residual", "tol": 1e-4}


class Images(TorchDataset[tuple[Tensor, Tensor]]):
    """Images in memory; a batch is one indexing operation instead of a collation of single images."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]


def augment(images: Tensor) -> Tensor:
    """Random crop of the image padded with 4 black pixels, and random horizontal flip, image by image."""
    n, _, height, width = images.shape
    padded = F.pad(images, (4, 4, 4, 4))
    top, left = (torch.randint(0, 9, (n, 1), device=images.device) for _ in range(2))
    rows = top + torch.arange(height, device=images.device)
    columns = left + torch.arange(width, device=images.device)
    flip = torch.rand(n, 1, device=images.device) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    sample = torch.arange(n, device=images.device)[:, None, None]
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def mean_evaluations(records: list[SolveRecord]) -> dict[str, float]:
    """Mean evaluations per image, by layer and direction: {"features.deq1 forward": 7.2, ...}."""
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for record in records:
        total = totals[f"{record.layer} {record.direction}"]
        total[0] += record.evaluations.sum().item()
        total[1] += len(record.evaluations)
    return {key: round(total / count, 2) for key, (total, count) in totals.items()}


def train(
    accelerator: Accelerator,
    model: torch.nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    images: Tensor,
    labels: Tensor,
    seed: int,
    log: Path,
) -> None:
    """Train in place; appends a line per epoch to `log`."""
    loader = DataLoader(
        Images(images, labels),
        batch_size=recipe.batch_size,
        shuffle=True,
        # BatchNorm cannot learn from a single image of the linear nets.
        drop_last=len(images) % recipe.batch_size == 1,
        collate_fn=lambda batch: batch,
        generator=torch.Generator().manual_seed(seed),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for epoch in range(1, recipe.epochs + 1):
        if epoch == recipe.lr_decay_epoch + 1:
            for group in optimizer.param_groups:
                group["lr"] *= recipe.lr_decay_factor
        prepared.train()
        start = time.perf_counter()
        loss_sum = correct = seen = 0.0
        bar = tqdm(loader, desc=f"epoch {epoch}/{recipe.epochs}", leave=False, disable=not accelerator.is_main_process)
        with record_solves(model) as records:
            for step, (batch, target) in enumerate(bar):
                x = normalize(augment(batch) if recipe.augmentation else batch, dataset)
                optimizer.zero_grad()
                logits = prepared(x)
                loss = F.cross_entropy(logits, target)
                accelerator.backward(loss)
                optimizer.step()
                loss_sum += loss.item() * len(target)
                correct += (logits.argmax(1) == target).sum().item()
                seen += len(target)
                if step % 50 == 0:
                    bar.set_postfix(loss=f"{loss_sum / seen:.4f}", acc=f"{100 * correct / seen:.2f}")
        line = {
            "epoch": epoch,
            "lr": optimizer.param_groups[0]["lr"],
            "train_loss": round(loss_sum / seen, 5),
            "train_top1": round(100 * correct / seen, 3),
            "evaluations": mean_evaluations(records),
            "unconverged": sum(int((record.status != 0).sum()) for record in records),
            "seconds": round(time.perf_counter() - start, 1),
        }
        if accelerator.is_main_process:
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            tqdm.write(
                f"epoch {epoch}: loss {line['train_loss']}, accuracy {line['train_top1']} %, {line['evaluations']}"
            )


def results_row(
    name: str, measured: dict[str, Any], recipe: Recipe, seed: int, tol: float, hours: float, device: str, file: Path
) -> dict[str, Any]:
    """The row of `results.csv`, columns as in `pcdeq_zoo.weights.results`."""
    variant = VARIANTS[name]
    row = {
        **measured,
        "model": f"{name}.{TAG}",
        "top1_err": round(100 - measured["top1"], 4),
        "top5_err": round(100 - measured["top5"], 4),
        "param_count": round(variant.parameters / 1e6, 6),
        "img_size": variant.dataset.input_size[-1],
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "paper_top1": variant.paper_accuracy,
        "epochs": recipe.epochs,
        "seed": seed,
        "tol": tol,
        "commit": _commit(),
        "hardware": device,
        "hours": round(hours, 2),
        "bytes": file.stat().st_size,
        "sha256": sha256(file),
    }
    return {column: row[column] for column in RESULT_COLUMNS}


def hardware(accelerator: Accelerator) -> str:
    """What a run computes on, e.g. "1 CPU thread" or "2 x NVIDIA H100"."""
    if accelerator.device.type == "cuda":
        return f"{accelerator.num_processes} x {torch.cuda.get_device_name(accelerator.device)}"
    threads = accelerator.num_processes * torch.get_num_threads()
    return f"{threads} {accelerator.device.type.upper()} thread{'s' * (threads > 1)}"


def _commit() -> str:
    """Commit of this code, for the record; empty outside a git checkout."""
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name in the zoo, e.g. pcdeq1_l_tanh_mnist")
    parser.add_argument("--data", help="folder, 'sample' or 'hub' (default: below $PCDEQ_ZOO_DATA, else the Hub)")
    parser.add_argument("--output", type=Path, help="folder for the run (default: runs/<model>)")
    parser.add_argument("--epochs", type=int, help="default: the paper's; the decay moves along in proportion")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--weight-decay", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-train", type=int, help="train on the first N images only")
    args = parser.parse_args()
    if args.model not in VARIANTS:
        parser.error(f"unknown model {args.model}; the zoo has {', '.join(VARIANTS)}")
    for flag in ("epochs", "batch_size", "lr", "limit_train"):
        if (value := getattr(args, flag)) is not None and value <= 0:
            parser.error(f"--{flag.replace('_', '-')} must be above 0, got {value}")

    variant = VARIANTS[args.model]
    recipe = variant.recipe
    if args.epochs:
        decay = round(recipe.lr_decay_epoch * args.epochs / recipe.epochs)
        recipe = dataclasses.replace(recipe, epochs=args.epochs, lr_decay_epoch=decay)
    chosen = {name: getattr(args, name) for name in ("batch_size", "lr", "weight_decay")}
    recipe = dataclasses.replace(recipe, **{name: value for name, value in chosen.items() if value is not None})

    accelerator = Accelerator()
    if (wanted := int(os.environ.get("WORLD_SIZE", 1))) != accelerator.num_processes:
        raise SystemExit(f"launched as {wanted} processes, but accelerate runs {accelerator.num_processes} here")
    output = args.output or Path("runs") / args.model
    if output.exists() and any(output.iterdir()):
        raise SystemExit(f"{output} already holds a run; give another --output, or remove it")
    try:
        images, labels = load(variant.dataset, "train", args.data)
        test_images, test_labels = load(variant.dataset, "test", args.data)
    except DataError as error:
        raise SystemExit(f"no data: {error}") from error
    images, labels = images[: args.limit_train], labels[: args.limit_train]
    accelerator.wait_for_everyone()  # before anyone creates the folder that the others look for
    output.mkdir(parents=True, exist_ok=True)

    set_seed(args.seed)
    model = timm.create_model(args.model, **SOLVES)
    print(f"{args.model} on {len(images)} images, {accelerator.num_processes} x {accelerator.device}: {recipe}")
    train(accelerator, model, variant.dataset, recipe, images, labels, args.seed, output / "log.jsonl")

    if accelerator.is_main_process:
        file = output / "model.safetensors"
        temporary = file.with_suffix(".tmp")
        state = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, temporary, metadata={"format": "pt", "architecture": args.model, "tag": TAG})
        temporary.chmod(0o644)  # safetensors writes files that only their owner can read
        temporary.replace(file)
        # Measured on the file, as a user loads it.
        saved = timm.create_model(args.model, pretrained=True, pretrained_cfg_overlay={"file": str(file)})
        saved.to(accelerator.device)
        measured = evaluate(saved, variant.dataset, test_images, test_labels)
        hours = sum(json.loads(line)["seconds"] for line in (output / "log.jsonl").open()) / 3600
        row = results_row(args.model, measured, recipe, args.seed, saved.solver.tol, hours, hardware(accelerator), file)
        with (output / "results.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, RESULT_COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerow(row)
        whole = len(test_images) == DATASETS[variant.dataset.name].sizes["test"]
        print(
            f"test accuracy {measured['top1']:.2f} % on {measured['n']} images"
            f"{f' (paper: {variant.paper_accuracy} %)' if whole else ' of the sample'}; written to {file}"
        )
    accelerator.end_training()


if __name__ == "__main__":
    main()
