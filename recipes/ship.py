"""Record finished runs, and put those of seed 0 into the package: weights, log and results row.

    python recipes/ship.py runs/pcdeq1_l_tanh_mnist.paper.seed0 [RUN ...]

Seed 0 ships, not the luckiest one. The row, the log and the settings of every run go to docs/runs, from which the
report takes its means. Refuses a run that was not measured on the whole test set. What is there already is replaced.

Then `python recipes/report.py` brings tables and figures up to date, and tests/test_weights.py the logits that the
tests expect.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import re
from pathlib import Path

from pcdeq_zoo import VARIANTS
from pcdeq_zoo.files import replace_file
from pcdeq_zoo.weights import CHECKPOINTS, results, sha256, write_rows

RUNS = Path(__file__).parents[1] / "docs" / "runs"


def recorded() -> dict[tuple[str, int], dict[str, str]]:
    """The rows of docs/runs/runs.csv by "model.tag" and seed."""
    file = RUNS / "runs.csv"
    if not file.is_file():
        return {}
    with file.open(newline="", encoding="utf-8") as stream:
        return {(row["model"], int(row["seed"])): row for row in csv.DictReader(stream)}


def ship(run: Path) -> str:
    """Record one run, and copy it into the package if its seed is 0; returns its "model.tag".

    Raises:
        SystemExit: An unfinished run, a file that is not the one the row was measured on, not the whole test set, an
            equilibrium that was not proven, code that is not a commit, or settings other than those of the recipe
            that the tag names.
    """
    parts = weights, log, row_file, record = [
        run / name for name in ("model.safetensors", "log.jsonl", "results.csv", "run.json")
    ]
    if missing := [file.name for file in parts if not file.is_file()]:
        raise SystemExit(f"{run} is not a finished run: it has no {', '.join(missing)}")
    with row_file.open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    name, seed = row["model"], int(row["seed"])
    variant = VARIANTS[name.split(".")[0]]
    if sha256(weights) != row["sha256"]:
        raise SystemExit(f"{weights} is not the file that {row_file} was measured on")
    if int(row["n"]) != variant.dataset.sizes["test"]:
        raise SystemExit(f"{run} was measured on {row['n']} images, not on the {variant.dataset.sizes['test']:,}")

    if not row["bound_max"] or not float(row["bound_max"]) <= float(row["tol"]):
        raise SystemExit(f"{run} has unproven equilibria: largest bound {row['bound_max'] or 'none'}, tol {row['tol']}")
    if not re.fullmatch("[0-9a-f]{12}", row["commit"]):
        raise SystemExit(f"{run} was not trained by a commit of this code, but by {row['commit'] or 'none'}")

    settings = json.loads(record.read_text("utf-8"))
    wanted = {
        "recipe": dataclasses.asdict(variant.recipes[name.split(".")[1]]),
        "images": variant.dataset.sizes["train"],
        "grad_accum": 1,
        "mixed_precision": "no",
        "hold_out": None,
    }
    if other := [key for key, value in wanted.items() if settings[key] != value]:
        found = ", ".join(f"{key} {settings[key]!r}, wanted {wanted[key]!r}" for key in other)
        raise SystemExit(f"{run} is not a run of the recipe that its tag says: {found}")

    RUNS.mkdir(parents=True, exist_ok=True)
    replace_file(RUNS / f"{name}.seed{seed}.jsonl", log.read_bytes())
    replace_file(RUNS / f"{name}.seed{seed}.json", record.read_bytes())
    _write_rows(RUNS / "runs.csv", {**recorded(), (name, seed): row})
    if seed == 0:
        # The row last: without one a file is ignored, and between the two a file that replaces another is refused.
        replace_file(CHECKPOINTS / f"{name}.safetensors", weights.read_bytes())
        replace_file(CHECKPOINTS / f"{name}.jsonl", log.read_bytes())
        _write_rows(
            CHECKPOINTS / "results.csv", {(model, 0): old for model, old in results().items()} | {(name, 0): row}
        )
    return name


def _write_rows(path: Path, rows: dict[tuple[str, int], dict[str, str]]) -> None:
    """Write rows in the order of the zoo; of one model, its default tag first."""
    models = list(VARIANTS)

    def place(key: tuple[str, int]) -> tuple[int, bool, int]:
        model, tag = key[0].split(".")
        return models.index(model), tag != VARIANTS[model].default_recipe, key[1]

    write_rows(path, [rows[key] for key in sorted(rows, key=place)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of train.py")
    for run in parser.parse_args().runs:
        name = ship(run)
        print(f"recorded {run}, {name}")


if __name__ == "__main__":
    main()
