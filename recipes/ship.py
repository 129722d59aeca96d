"""Record finished runs, and put those of seed 0 into the package: weights, log and results row.

    python recipes/ship.py runs/pcdeq1_l_tanh_mnist.paper.seed0 [RUN ...]

Seed 0 ships, not the luckiest one. The row and the log of every run go to docs/runs, from which the report takes its
means. Refuses a run that was not measured on the whole test set. What is there already is replaced.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import shutil
from pathlib import Path

from pcdeq_zoo import VARIANTS
from pcdeq_zoo.weights import CHECKPOINTS, RESULT_COLUMNS, results, sha256

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
        SystemExit: An unfinished run, a file that is not the one the row was measured on, not the whole test set, or
            settings other than those of the recipe that the tag names.
    """
    weights, log, row_file = (run / name for name in ("model.safetensors", "log.jsonl", "results.csv"))
    if missing := [file.name for file in (weights, log, row_file, run / "run.json") if not file.is_file()]:
        raise SystemExit(f"{run} is not a finished run: it has no {', '.join(missing)}")
    with row_file.open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    name, seed = row["model"], int(row["seed"])
    variant = VARIANTS[name.split(".")[0]]
    if sha256(weights) != row["sha256"]:
        raise SystemExit(f"{weights} is not the file that {row_file} was measured on")
    if int(row["n"]) != variant.dataset.sizes["test"]:
        raise SystemExit(f"{run} was measured on {row['n']} images, not on the {variant.dataset.sizes['test']:,}")

    settings = json.loads((run / "run.json").read_text("utf-8"))
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
    _replace(RUNS / f"{name}.seed{seed}.jsonl", log)
    _write_rows(RUNS / "runs.csv", {**recorded(), (name, seed): row})
    if seed == 0:
        # The weights first: a row without its file would be a broken model, a file without a row is ignored.
        _replace(CHECKPOINTS / f"{name}.safetensors", weights)
        _replace(CHECKPOINTS / f"{name}.jsonl", log)
        _write_rows(
            CHECKPOINTS / "results.csv", {(model, 0): old for model, old in results().items()} | {(name, 0): row}
        )
    return name


def _write_rows(path: Path, rows: dict[tuple[str, int], dict[str, str]]) -> None:
    """Write rows in the order of the zoo; of one model, its default tag first."""
    models = list(VARIANTS)

    def place(key: tuple[str, int]) -> tuple[int, int, int]:
        model, tag = key[0].split(".")
        return models.index(model), list(VARIANTS[model].recipes).index(tag), key[1]

    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, RESULT_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows, key=place))
    temporary.replace(path)


def _replace(target: Path, source: Path) -> None:
    temporary = target.with_name(target.name + ".tmp")
    shutil.copyfile(source, temporary)
    temporary.replace(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of train.py")
    for run in parser.parse_args().runs:
        name = ship(run)
        print(f"recorded {run}, {name}")


if __name__ == "__main__":
    main()
