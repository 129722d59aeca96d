"""Bring the tables of the documents up to date with the package's data and benchmarks/results.json.

    python recipes/report.py

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`, NAME being a key of `TABLES`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from pcdeq_zoo import VARIANTS
from pcdeq_zoo.weights import results

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "MODEL_CARD.md", "docs/solver.md")

sys.path.insert(0, str(ROOT / "benchmarks"))
import tables as benchmark  # noqa: E402


def models() -> str:
    """All models: parameters, and test accuracy in the paper and of the checkpoint that ships."""
    rows = {name.split(".")[0]: row for name, row in results().items()}
    lines = ["| Model | Data | Parameters | Paper, % | Checkpoint, % |", "|---|---|--:|--:|--:|"]
    for variant in VARIANTS.values():
        ours = f"{float(rows[variant.name]['top1']):.2f}" if variant.name in rows else "–"
        cells = f"`{variant.name}`", variant.dataset.title, f"{variant.parameters:,}", f"{variant.paper_accuracy}", ours
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def checkpoints() -> str:
    """What was measured of each checkpoint that ships."""
    lines = [
        "| Checkpoint | Top-1, % | Paper, % | NLL, nats | Test images | Epochs | Seed | Evaluations of W, mean (max) |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in results().items():
        lines.append(
            f"| `{name}` | {float(row['top1']):.2f} | {row['paper_top1']} | {row['nll']} | {int(row['n']):,} "
            f"| {row['epochs']} | {row['seed']} | {row['evals_mean']} ({row['evals_max']}) |"
        )
    return "\n".join(lines)


def measurements() -> dict[str, Any]:
    """What benchmarks/run.py measured last."""
    return json.loads((ROOT / "benchmarks" / "results.json").read_text(encoding="utf-8"))


TABLES = {
    "models": models,
    "checkpoints": checkpoints,
    "benchmark-summary": lambda: benchmark.summary(measurements()),
    "benchmark-speed": lambda: benchmark.speed(measurements()),
    "benchmark-accuracy": lambda: benchmark.accuracy(measurements()),
}


def updated(text: str) -> str:
    """`text` with every table replaced by the current one."""
    for name, table in TABLES.items():
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda m, t=table: f"{m[1]}\n{t()}\n\n{m[2]}",
            text,
            flags=re.S,
        )
    return text


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for file in (ROOT / document for document in DOCUMENTS):
        text = file.read_text(encoding="utf-8")
        if updated(text) != text:
            file.write_text(updated(text), encoding="utf-8")
            print(f"updated {file.name}")


if __name__ == "__main__":
    main()
