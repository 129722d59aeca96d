"""The measurements of run.py and compare.py as Markdown tables."""

from __future__ import annotations

from statistics import geometric_mean
from typing import Any

from pcdeq_zoo import Variant

MEASURES = {
    "train_s": "Training step, batch 64",
    "infer_64_s": "Inference, batch 64",
    "infer_1_s": "Inference, batch 1",
}


def ours_and_theirs(document: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Names of the zoo's settings, and of the others that every net was measured with."""
    ours = list(document["settings"])
    return ours, [name for name in next(iter(document["nets"].values())) if name not in ours]


def ratios(document: dict[str, Any], measure: str, ours: str, theirs: str) -> dict[str, float]:
    """How many times faster, per net."""
    return {net: rows[theirs][measure] / rows[ours][measure] for net, rows in document["nets"].items()}


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown; all columns but the first are aligned to the right."""
    lines = [f"| {' | '.join(header)} |", "|---|" + "--:|" * (len(header) - 1)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def summary(document: dict[str, Any]) -> str:
    """Geometric means over the nets, a row per measure and setting."""
    ours, theirs = ours_and_theirs(document)
    rows = []
    for measure, title in MEASURES.items():
        for setting in ours:
            columns = [list(ratios(document, measure, setting, other).values()) for other in theirs]
            cells = [f"{geometric_mean(column):.1f} ({min(column):.1f} to {max(column):.1f})" for column in columns]
            rows.append([f"{title}, {setting}", *cells])
    return table(["Times faster than", *theirs], rows)


def speed(document: dict[str, Any]) -> str:
    """How many times faster than the paper's algorithm; a row per net, in each cell the settings in their order."""
    ours, (paper, *_) = ours_and_theirs(document)
    rows = []
    for net in document["nets"]:
        cells = [" / ".join(f"{ratios(document, m, setting, paper)[net]:.2f}" for setting in ours) for m in MEASURES]
        rows.append([f"`{net}`", *cells])
    return table([f"Times faster: {' / '.join(ours)}", *MEASURES.values()], rows)


def accuracy(document: dict[str, Any]) -> str:
    """Errors, evaluations, memory and use of the machine of a training step."""
    header = [
        "Net",
        "Solver",
        "Worst unit error",
        "Gradient error",
        "Forward",
        "Backward",
        "Peak, MB",
        "Convolutions, %",
    ]
    rows = []
    for net, contenders in document["nets"].items():
        for name, values in contenders.items():
            counts = [
                " / ".join(f"{count:.3g}" for _, count in sorted(values["evaluations"][way].items()))
                for way in ("forward", "backward")
            ]
            share = f"{100 * values['convolution_share']:.0f}" if "convolution_share" in values else ""
            errors = [f"{max(values['unit_errors'].values()):.1e}", f"{values['gradient_error']:.1e}"]
            rows.append([f"`{net}`", name, *errors, *counts, f"{values['peak_bytes'] / 1e6:.1f}", share])
    return table(header, rows)


def tables(document: dict[str, Any]) -> str:
    """Everything."""
    return "\n\n".join(part(document) for part in (summary, speed, accuracy))


def compared(found_of: dict[str, Any], systems: list[Variant]) -> str:
    """What compare.py found of the systems of a data set; a dash where one was not trained, or not measured."""
    header = f"System|Parameters|Published, %|{found_of['minutes']:g} minutes, %|Recipe|Learning rate|Updates|Epochs"
    header += "|Equal epochs, %|NFE forward|NFE backward|Unconverged solves, ‰|Training step, ms|Peak, MB|Inference, ms"
    header += "|Runs that failed"
    rows = []
    for variant in systems:
        found = found_of["systems"].get(variant.name, {})

        def cell(key: str, form: str = "{:.2f}", factor: float = 1, found: dict[str, Any] = found) -> str:
            return form.format(found[key] * factor) if found.get(key) is not None else "–"

        share = 1000 / found["solves"] if found.get("solves") else 1
        rows.append(
            [
                variant.paper_name,
                f"{variant.parameters:,}",
                f"{variant.paper_accuracy:.1f}",
                cell("top1"),
                f"`{found['recipe']}`" if "recipe" in found else "–",
                cell("lr", "{:.2g}"),
                cell("updates", "{:,}"),
                cell("epochs", "{:.1f}"),
                cell("top1_equal_epochs"),
                cell("forward", "{:.1f}"),
                cell("backward", "{:.1f}"),
                cell("unconverged", "{:.1f}", share),
                cell("train_s", "{:,.1f}", 1e3),
                cell("train_peak_bytes", "{:.1f}", 1e-6),
                cell("infer_s", "{:,.1f}", 1e3),
                str(len(found.get("failed_runs", []))),
            ]
        )
    return table(header.split("|"), rows)
