"""Record finished runs, and put those of seed 0 into the package: weights, log and results row.

    python -m tools.ship runs/pcdeq1_l_tanh_mnist.paper.seed0 [RUN ...]

Seed 0 ships, not the luckiest one. The row and the settings of every run go to docs/runs, and the log of every other
seed; the report takes its means from there. Refuses a run that was not measured on the whole test set. What is there
already is replaced.

The logits that the tests expect of a checkpoint that ships are written to tests/. Then `python -m tools.report` brings
tables and figures up to date.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path

import safetensors.torch
import timm
import torch
from torch import Tensor

from pcdeq_zoo import VARIANTS, weights
from pcdeq_zoo.data import load, normalize
from pcdeq_zoo.files import replace_file
from pcdeq_zoo.weights import Checkpoint, checkpoints, read_rows, sha256, write_rows

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "docs" / "runs"
LOGITS = ROOT / "tests" / "logits.safetensors"


def runs() -> list[Checkpoint]:
    """The recorded runs of all seeds, in the order of the zoo."""
    file = RUNS / "runs.csv"
    return read_rows(file) if file.is_file() else []


def log_of(run: Checkpoint) -> Path:
    """The log of a recorded run: in the package if the run ships."""
    return RUNS / f"{run.name}.seed{run.seed}.jsonl" if run.seed else run.log


def ship(folder: Path) -> Checkpoint:
    """Record one run, and copy it into the package if its seed is 0.

    Raises:
        SystemExit: An unfinished run, one of another module or recipe than the zoo has, a file that is not the one the
            row was measured on, not the whole test set, an equilibrium that was not proven, code that is not a commit,
            or settings other than those of the recipe that the tag names.
    """
    parts = file, log, row_file, record = [
        folder / name for name in ("model.safetensors", "log.jsonl", "results.csv", "run.json")
    ]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise SystemExit(f"{folder} is not a finished run: it has no {', '.join(missing)}")
    try:
        (run,) = read_rows(row_file)
        recipe = run.recipe
    except KeyError as error:
        raise SystemExit(f"{folder} is of a model or a recipe that the zoo does not have: {error}") from error
    row, variant = run.row, run.variant
    if sha256(file) != row["sha256"]:
        raise SystemExit(f"{file} is not the file that {row_file} was measured on")
    if int(row["n"]) != variant.dataset.sizes["test"]:
        raise SystemExit(f"{folder} was measured on {row['n']} images, not on the {variant.dataset.sizes['test']:,}")
    if not row["bound_max"] or not float(row["bound_max"]) <= float(row["tol"]):
        bound = row["bound_max"] or "none"
        raise SystemExit(f"{folder} has unproven equilibria: largest bound {bound}, tol {row['tol']}")
    if not re.fullmatch("[0-9a-f]{12}", row["commit"]):
        raise SystemExit(f"{folder} was not trained by a commit of this code, but by {row['commit'] or 'none'}")

    settings = json.loads(record.read_text("utf-8"))
    wanted = {
        "recipe": dataclasses.asdict(recipe),
        "images": recipe.images or variant.dataset.sizes["train"],
        "grad_accum": 1,
        "mixed_precision": "no",
        "hold_out": None,
        "minutes": None,
        "channels": None,
    }
    if other := [key for key, value in wanted.items() if settings.get(key) != value]:
        found = ", ".join(f"{key} {settings.get(key)!r}, wanted {wanted[key]!r}" for key in other)
        raise SystemExit(f"{folder} is not a run of the recipe that its tag says: {found}")

    RUNS.mkdir(parents=True, exist_ok=True)
    settings.pop("data", None)  # where it lay: nobody's affair but this machine's
    replace_file(RUNS / f"{run.name}.seed{run.seed}.json", json.dumps(settings, indent=1) + "\n")
    if run.seed == 0:
        replace_file(run.file, file.read_bytes())
    replace_file(log_of(run), log.read_bytes())
    # The rows last: without one a file is ignored, and one that replaces another is refused until its row is there.
    _add_row(RUNS / "runs.csv", runs(), run)
    if run.seed == 0:
        _add_row(weights.CHECKPOINTS / "results.csv", list(checkpoints().values()), run)
    return run


def example_logits(checkpoint: Checkpoint) -> Tensor:
    """Of 16 images, the first of MNIST's test set or noise, as float32 on a CPU gives them."""
    dataset = checkpoint.variant.dataset
    if dataset.name == "mnist":
        images = normalize(load(dataset, "test", "sample")[0][:16], dataset)
    else:
        images = torch.randn(16, *dataset.input_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        # By its file: timm's list of checkpoints is older than one that was shipped just now.
        overlay = {"file": str(checkpoint.file)}
        model = timm.create_model(
            checkpoint.variant.name, pretrained=True, stop="certified", pretrained_cfg_overlay=overlay
        )
        return model.eval()(images)


def _add_row(path: Path, runs: list[Checkpoint], run: Checkpoint) -> None:
    """Add a run, or replace an older one. The order is that of the zoo; of a network the default tag is first."""
    order = list(VARIANTS)
    kept = [other for other in runs if (other.name, other.seed) != (run.name, run.seed)]

    def place(run: Checkpoint) -> tuple[int, bool, int]:
        return order.index(run.variant.name), run.tag != run.variant.default_recipe, run.seed

    write_rows(path, [run.row for run in sorted([*kept, run], key=place)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of train.py")
    for folder in parser.parse_args().runs:
        run = ship(folder)
        print(f"recorded {folder}, {run.name} of seed {run.seed}")
        if run.seed == 0:
            logits = safetensors.torch.load_file(LOGITS)
            logits[run.name] = example_logits(checkpoints()[run.name])
            replace_file(LOGITS, safetensors.torch.save({name: logits[name] for name in checkpoints()}))


if __name__ == "__main__":
    main()
