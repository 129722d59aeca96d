"""Put finished runs into the package: weights, log and results row.

    python recipes/ship.py runs/pcdeq1_l_tanh_mnist [RUN ...]

Refuses a run that was not measured on the whole test set. A checkpoint that ships already is replaced, with its row.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from pathlib import Path

from pcdeq_zoo import VARIANTS
from pcdeq_zoo.weights import CHECKPOINTS, RESULT_COLUMNS, results, sha256


def ship(run: Path) -> str:
    """Copy one run into the package; returns its "model.tag".

    Raises:
        SystemExit: An unfinished run, a file that is not the one the row was measured on, or not the whole test set.
    """
    weights, log, row_file = (run / name for name in ("model.safetensors", "log.jsonl", "results.csv"))
    if missing := [file.name for file in (weights, log, row_file) if not file.is_file()]:
        raise SystemExit(f"{run} is not a finished run: it has no {', '.join(missing)}")
    with row_file.open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    name = row["model"]
    variant = VARIANTS[name.split(".")[0]]
    if sha256(weights) != row["sha256"]:
        raise SystemExit(f"{weights} is not the file that {row_file} was measured on")
    if int(row["n"]) != variant.dataset.sizes["test"]:
        raise SystemExit(f"{run} was measured on {row['n']} images, not on the {variant.dataset.sizes['test']:,}")

    rows = {**results(), name: row}
    order = list(VARIANTS)
    # The weights first: a row without its file would be a broken model, a file without a row is ignored.
    for source, suffix in ((weights, "safetensors"), (log, "jsonl")):
        _replace(CHECKPOINTS / f"{name}.{suffix}", source)
    table = CHECKPOINTS / "results.csv.tmp"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, RESULT_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows.values(), key=lambda row: order.index(row["model"].split(".")[0])))
    table.replace(CHECKPOINTS / "results.csv")
    return name


def _replace(target: Path, source: Path) -> None:
    temporary = target.with_name(target.name + ".tmp")
    shutil.copyfile(source, temporary)
    temporary.replace(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of train.py")
    for run in parser.parse_args().runs:
        print(f"shipped {ship(run)}")


if __name__ == "__main__":
    main()
