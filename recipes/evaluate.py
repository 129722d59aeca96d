"""Measure a model of the zoo on a test set.

    python recipes/evaluate.py --model pcdeq1_l_tanh_mnist
    python recipes/evaluate.py --model hf-hub:NAMESPACE/pcdeq1_l_tanh_mnist.paper
    python recipes/evaluate.py --model pcdeq1_l_tanh_mnist --checkpoint model.safetensors --data sample
    python recipes/evaluate.py --model pcdeq1_l_tanh_mnist.robust_0.1 --eps 0.1
    python recipes/evaluate.py --run runs/pcdeq1_l_tanh_mnist.paper

Prints what it measures as JSON. With --run it measures the weights of a run of train.py, and writes the run's
results.csv.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv}:  # at once: what follows takes seconds to import
    print(Path(__file__).with_suffix(".txt").read_text("utf-8"), end="")
    sys.exit()

import argparse
import functools
import json
import math
import os
from collections import defaultdict
from typing import Any

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from config import HelpFormatter, import_module, train_slices
from distributed import NEEDS_CPU
from run_folder import read_record
from torch import Tensor, nn
from tqdm import tqdm

from pcdeq_zoo import VARIANTS, DataError, Dataset, WeightsError, certify, pgd, record_solves
from pcdeq_zoo.certificate import rounded_up
from pcdeq_zoo.data import load, normalize
from pcdeq_zoo.errors import one_line
from pcdeq_zoo.files import read_jsonl
from pcdeq_zoo.operators import full_precision
from pcdeq_zoo.weights import RESULT_COLUMNS, checkpoints, sha256, write_rows

TRAINING_COLUMNS = ("model", "epochs", "seed", "commit", "hardware", "hours")  # of a results row; the rest is measured


@torch.inference_mode()
def evaluate(
    model: nn.Module, dataset: Dataset, images: Tensor, labels: Tensor, batch_size: int = 500, progress: bool = False
) -> dict[str, Any]:
    """Accuracy and the cost of the solves on uint8 images (N, C, H, W) with labels (N,).

    Returns:
        n, top1 and top5 in percent, nll (mean cross-entropy in nats), evals_mean and evals_max (evaluations of W per
        image and pcDEQ layer), evals_layers (the mean layer by layer, "5.9/8.1/12.4"), bound_max (largest proven
        relative error of a unit; None where one could not be proven at all), and ece: the expected calibration error
        in percent, mean |confidence − accuracy| over 15 equal bins of confidence, weighted by their images (Guo et al.,
        ICML 2017).
    """
    model.eval()
    quiet = None if progress else True  # None: where there is no terminal
    device = next(model.parameters()).device
    top1 = top5 = nll = 0.0
    bounds = []
    evaluations: dict[str, int] = defaultdict(int)
    evaluations_max = 0
    confidences, hits_all = [], []
    for start in tqdm(range(0, len(images), batch_size), desc="evaluate", leave=False, disable=quiet):
        x = normalize(images[start : start + batch_size].to(device), dataset)
        y = labels[start : start + batch_size].to(device)
        with record_solves(model) as records:
            logits = model(x)
        hits = logits.topk(5).indices == y[:, None]
        confidences.append(logits.softmax(1).amax(1).cpu())
        hits_all.append(hits[:, 0].cpu())
        top1 += hits[:, 0].sum().item()
        top5 += hits.sum().item()
        nll += F.cross_entropy(logits, y, reduction="sum").item()
        for record in records:
            evaluations[record.layer] += int(record.evaluations.sum())
            evaluations_max = max(evaluations_max, int(record.evaluations.max()))
            bounds.append(record.bound.max().item())
    n = len(images)
    bound_max = max(bounds) if bounds and all(map(math.isfinite, bounds)) else None
    return {
        "n": n,
        "top1": round(100 * top1 / n, 4),
        "top5": round(100 * top5 / n, 4),
        "nll": round(nll / n, 4),
        "ece": round(100 * calibration_error(torch.cat(confidences), torch.cat(hits_all)), 2),
        "evals_mean": round(sum(evaluations.values()) / len(evaluations) / n, 2) if evaluations else None,
        "evals_layers": "/".join(f"{total / n:.2f}" for total in evaluations.values()),
        "evals_max": evaluations_max if evaluations else None,
        "bound_max": None if bound_max is None else rounded_up(bound_max, 3),
    }


def evaluate_robustness(
    model: nn.Module,
    dataset: Dataset,
    images: Tensor,
    labels: Tensor,
    eps: float,
    batch_size: int = 100,
    progress: bool = False,
) -> dict[str, Any]:
    """Accuracy for images whose pixels change by up to eps, as `evaluate` has it for those as they are.

    Returns:
        eps; in percent of all images: pgd, those that 5 x 50 steps of `pcdeq_zoo.pgd` leave right, and those that are
        proven to keep their right label, by both methods of `pcdeq_zoo.certify`: certified_interval, certified_linear,
        and unclipped_interval, unclipped_linear for pixels that may leave [0, 1].
    """
    model.eval()
    quiet = None if progress else True
    device = next(model.parameters()).device
    totals: dict[str, int] = defaultdict(int)
    batch_size = min(batch_size, 100)  # linear bounds of all classes take the memory of ten times as many
    generator = torch.Generator().manual_seed(0)
    for start in tqdm(range(0, len(images), batch_size), desc="robustness", leave=False, disable=quiet):
        x = normalize(images[start : start + batch_size].to(device), dataset)
        y = labels[start : start + batch_size].to(device)
        proven = torch.zeros(len(x), dtype=torch.bool, device=device)
        for box, clip in (("certified", True), ("unclipped", False)):
            found = certify(model, x, y, eps, clip=clip, progress=False)
            totals[f"{box}_interval"] += int(found.by_intervals.sum())
            totals[f"{box}_linear"] += int(found.certified.sum())
            proven |= found.certified
        left = ~proven  # what is proven cannot fall
        adversarial = pgd(model, x[left], y[left], eps, steps=50, restarts=5, generator=generator)
        with torch.no_grad():
            totals["pgd"] += int(proven.sum() + (model(adversarial).argmax(1) == y[left]).sum())
    return {"eps": eps, **{key: round(100 * total / len(images), 4) for key, total in totals.items()}}


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Expected calibration error of confidences (N,) in (0, 1] and whether they were right (N,)."""
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64, device=confidence.device)
    gaps.index_add_(0, index, confidence.double() - correct.double())
    return gaps.abs().sum().item() / len(confidence)


def measure_run(
    run: Path, data: str | None, device: torch.device, batch_size: int = 500, progress: bool = False
) -> dict[str, Any]:
    """Measure the weights of a run as a user loads them, on the test set or what the run held out; writes results.csv.

    Returns:
        The row, columns as in `pcdeq_zoo.weights.RESULT_COLUMNS`.

    Raises:
        WeightsError, DataError, SystemExit: No such weights, data or run.
    """
    if not (run / "run.json").is_file():
        raise SystemExit(f"{run} is not a run of train.py: it has no run.json")
    settings = read_record(run / "run.json")
    if not (run / "model.safetensors").is_file():
        raise SystemExit(f"{run} is not finished: it has no model.safetensors; go on with train.py --resume")
    if (module := settings.get("module")) and settings.get("model") not in VARIANTS:
        raise SystemExit(f"{run} is of a network of {module}; say --module {module} to import that")
    try:
        variant, held_out = VARIANTS[settings["model"]], int(settings["hold_out"] or 0)
        log = read_jsonl(run / "log.jsonl")
        known = {
            "model": f"{variant.name}.{settings['tag']}",
            # Where the time was given, what was done in it.
            "epochs": round(sum(line["images"] for line in log) / settings["images"], 2)
            if settings.get("minutes")
            else settings["recipe"]["epochs"],
            "seed": settings["seed"],
            "commit": settings["commit"],
            "hardware": settings["hardware"],
            "hours": round(sum(line["seconds"] for line in log) / 3600, 2),
        }
        stop = settings["recipe"]["stop"] and "certified"  # models that have but one criterion prove nothing
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{run} is not what train.py wrote: {type(error).__name__}: {error}") from error
    overlay = {"file": str(run / "model.safetensors")}
    create: dict[str, Any] = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    create["channels"] = settings.get("channels")
    model = timm.create_model(variant.name, stop=stop, **create).to(device)
    images, labels = load(variant.dataset, "train" if held_out else "test", data or settings.get("data"))
    if held_out:
        _, part = train_slices(len(images), settings["recipe"].get("images"), held_out)
        images, labels = images[part], labels[part]
    measured = evaluate(model, variant.dataset, images, labels, batch_size, progress)
    if eps := settings["recipe"].get("eps"):
        as_created = timm.create_model(variant.name, **create).to(device)
        measured |= evaluate_robustness(as_created, variant.dataset, images, labels, eps, batch_size, progress)
    row = results_row(model, measured, known)
    write_rows(run / ("held_out.csv" if held_out else "results.csv"), [row])
    return row


def measure_model(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure the weights that `--model` and the flags beside it name on the test set; writes `--output`.

    Args:
        args: Of `make_parser`, checked.
        device: To measure on.

    Returns:
        What `evaluate` does, and with `--eps` what `evaluate_robustness` does.

    Raises:
        SystemExit: There is no such model, or nothing to measure it on.
        WeightsError: It has no weights.
        DataError: The data set is missing, or damaged.
    """
    overlay = {"file": str(args.checkpoint)} if args.checkpoint else None
    create = functools.partial(timm.create_model, args.model, pretrained=True, pretrained_cfg_overlay=overlay)
    try:
        model = create(stop="certified")
    except TypeError as error:  # of another constructor
        raise SystemExit(f"{args.model} is not of this zoo, whose models this measures: {error}") from error
    except (RuntimeError, ValueError, LookupError, OSError, AssertionError) as error:  # timm's and the Hub's
        raise SystemExit(f"no model {args.model!r}: {one_line(error)}") from error
    architecture = model.pretrained_cfg["architecture"]
    if architecture not in VARIANTS:
        raise SystemExit(f"{args.model} holds a {architecture}; this measures models of the zoo only")
    dataset = VARIANTS[architecture].dataset
    wanted = len(dataset.classes), dataset.input_size
    if (found := (model.num_classes, (model.in_chans, *model.img_size))) != wanted:
        raise SystemExit(
            f"{args.model} has {found[0]} classes and images of {found[1]}, {dataset.title} {wanted[0]} and "
            f"{wanted[1]}: there is nothing to measure it on"
        )
    images, labels = load(dataset, "test", args.data)
    measured = evaluate(model.to(device), dataset, images, labels, args.batch_size, progress=True)
    if args.eps:
        as_created = create().to(device)
        measured |= evaluate_robustness(as_created, dataset, images, labels, args.eps, args.batch_size, progress=True)
    if args.output:
        # How it was trained is copied only if these are, to the byte, weights that ship.
        digest = sha256(Path(model.pretrained_cfg["file"]))
        rows = (checkpoint.row for checkpoint in checkpoints().values())
        known = next((row for row in rows if row["sha256"] == digest), {"model": architecture})
        write_rows(args.output, [results_row(model, measured, known)])
    return measured


def results_row(model: nn.Module, measured: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """The row of a model of the zoo, columns as in `pcdeq_zoo.weights.RESULT_COLUMNS`.

    Args:
        model: As `timm.create_model` gives it with pretrained=True.
        measured: What `evaluate` returns.
        known: The `TRAINING_COLUMNS`, empty in the row where they are missing; other columns are not taken.
    """
    variant, weights = VARIANTS[model.pretrained_cfg["architecture"]], Path(model.pretrained_cfg["file"])
    values = {
        **dict.fromkeys(RESULT_COLUMNS, ""),
        **{column: known[column] for column in TRAINING_COLUMNS if column in known},
        **measured,
        "top1_err": round(100 - measured["top1"], 4),
        "top5_err": round(100 - measured["top5"], 4),
        "param_count": round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 6),
        "img_size": variant.dataset.input_size[-1],
        "crop_pct": model.pretrained_cfg["crop_pct"],
        "interpolation": model.pretrained_cfg["interpolation"],
        "paper_top1": variant.paper_accuracy,
        "tol": model.solver.tol if hasattr(model, "solver") else "",
        "bytes": weights.stat().st_size,
        "sha256": sha256(weights),
    }
    return {column: values[column] for column in RESULT_COLUMNS}


def _why_not(output: Path) -> str:
    """What is wrong with a CSV file to write, or nothing: nothing else is ever replaced."""
    if output.suffix != ".csv":
        return "wanted a name that ends in .csv"
    if not output.parent.is_dir():
        return f"there is no folder {output.parent}"
    if not os.path.lexists(output):
        return ""
    try:
        if output.is_symlink() or not output.is_file():
            return "there is something else of that name"
        is_ours = output.read_bytes().startswith(",".join(RESULT_COLUMNS).encode())
    except OSError as error:
        return str(error.strerror)
    return "" if is_ours else "there is a file that this program did not write"


def make_parser() -> argparse.ArgumentParser:
    """The parser of a command line."""
    parser = argparse.ArgumentParser("evaluate.py", description=__doc__, formatter_class=HelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--model", help="name in the zoo, with or without tag, or hf-hub:NAMESPACE/NAME[@REVISION] or local-dir:FOLDER"
    )
    source.add_argument(
        "--run", type=Path, help="folder of a finished run; its results.csv, or held_out.csv, is written"
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="a safetensors file, or one of the authors' code; default: the zoo's"
    )
    parser.add_argument("--module", metavar="MODULE", help="import it first, for a --run of train.py with it")
    parser.add_argument("--data", help="folder, 'sample' or 'hub' (default: below $PCDEQ_ZOO_DATA, else the Hub)")
    parser.add_argument(
        "--batch-size", type=int, default=500, help="images at a time (default: 500; at most 100 with --eps)"
    )
    parser.add_argument(
        "--eps", type=float, help="measure robustness, too, against changes of each pixel by so much, of [0, 1]"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results row to this CSV file")
    return parser


def main() -> None:
    sys.stdout.reconfigure(errors="backslashreplace")
    parser = make_parser()
    args = parser.parse_args()
    if args.module:
        import_module(args.module)
    if args.model is not None and not args.model.startswith(("hf-hub:", "local-dir:")):
        name, dot, _ = args.model.partition(".")
        if name not in VARIANTS:
            parser.error(f"unknown model {args.model!r}; the zoo has {', '.join(VARIANTS)}")
        if dot and args.model not in checkpoints():
            parser.error(f"no weights of {args.model} ship; there are {', '.join(checkpoints())}")
    if args.batch_size < 1:
        parser.error(f"--batch-size must be above 0, got {args.batch_size}")
    if args.eps is not None and not 0 < args.eps <= 1:
        parser.error(f"--eps must be above 0 and at most 1, got {args.eps}")
    if args.run and (args.checkpoint or args.output or args.eps):
        parser.error("--checkpoint, --eps and --output go with --model")
    if args.checkpoint and args.model.startswith(("hf-hub:", "local-dir:")):
        parser.error(f"--checkpoint goes with a name in the zoo: {args.model} has weights of its own")
    if args.output and (reason := _why_not(args.output)):
        parser.error(f"--output {args.output}: {reason}")

    # What is measured is float32, whatever accelerate and cuDNN are set to.
    accelerator = Accelerator(cpu=NEEDS_CPU, mixed_precision="no")
    if not accelerator.is_main_process:
        return
    try:
        with full_precision(accelerator.device):
            if args.run:
                measured = measure_run(args.run, args.data, accelerator.device, args.batch_size, progress=True)
            else:
                measured = measure_model(args, accelerator.device)
    except (WeightsError, DataError) as error:
        raise SystemExit(str(error)) from error
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
