"""Bring the tables and figures of the documents up to date with the package, docs/runs and benchmarks/*.json.

    python -m tools.report

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`, NAME being a key of `TABLES`. The figures are those of the
paper, drawn from our logs: docs/figures/*.svg, shown in docs/report.md.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm

from benchmarks import tables as benchmark
from benchmarks.compare import RESULTS, SYSTEMS
from benchmarks.compared import VARIANTS as OTHERS
from benchmarks.tables import table
from demo.equilibrium import approach, draw_approach, pcdeq_layers
from pcdeq_zoo import DATASETS, VARIANTS, Variant
from pcdeq_zoo.data import load, normalize
from pcdeq_zoo.files import read_jsonl, replace_file
from pcdeq_zoo.weights import Checkpoint, checkpoints
from tools.ship import log_of, runs

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "MODEL_CARD.md", "docs/solver.md", "docs/report.md", "docs/robustness.md", "docs/compared.md")
FIGURES = ROOT / "docs" / "figures"

_NUMBERS = {"mnist": 1, "svhn": 2, "cifar": 3}


def models() -> str:
    """All models: parameters, and test accuracy in the paper and of the default checkpoint."""
    shipped = checkpoints()
    rows = []
    for variant in VARIANTS.values():
        default = shipped.get(f"{variant.name}.{variant.default_recipe}")
        ours = "–"
        if default:
            ours = f"[{default.top1:.2f}]({default.file.relative_to(ROOT)}){_remark(default)}"
        size, paper = f"{variant.parameters:,}", f"{variant.paper_accuracy}"
        rows.append([f"`{variant.name}`", variant.dataset.title, size, paper, ours])
    return table(["Model", "Data", "Parameters", "Paper, %", "Checkpoint, %"], rows)


def _remark(checkpoint: Checkpoint) -> str:
    images = checkpoint.recipe.images
    return f" (trained on the first {images:,} images only)" if images else ""


def measured() -> str:
    """What was measured of each checkpoint that ships."""
    columns = "Checkpoint|Top-1, %|Paper, %|NLL, nats|Test images|Epochs|Seed|Evaluations of W, mean (max)"
    rows = []
    for name, checkpoint in checkpoints().items():
        row = checkpoint.row
        top1, evaluations = f"{checkpoint.top1:.2f}{_remark(checkpoint)}", f"{row['evals_mean']} ({row['evals_max']})"
        n = f"{int(row['n']):,}"
        rows.append([f"`{name}`", top1, row["paper_top1"], row["nll"], n, row["epochs"], row["seed"], evaluations])
    return table(columns.split("|"), rows)


def paper_table(dataset: str) -> str:
    """Table 1, 2 or 3 of the paper, with our runs beside it: mean ± standard deviation over seeds."""
    recipes = {"paper": "Ours, `paper` recipe, %", "zoo": "Ours, `zoo` recipe, %"}
    if dataset == "svhn":
        recipes["zoo4434"] = "Ours, trained on the first 4,434 images only, %"
    found = comparison().get(dataset, {})
    time = f"At equal time, {found['minutes']:g} minutes, %" if found else "At equal time, %"
    columns = ["Method", "Parameters", "Paper, %", *recipes.values(), time]
    rows, recorded = [], runs()
    for variant in (*OTHERS.values(), *VARIANTS.values()):
        if variant.dataset.name != dataset:
            continue
        cells = [variant.paper_name, f"{variant.parameters:,}", f"{variant.paper_accuracy:.1f}"]
        for tag in recipes:
            top1 = [run.top1 for run in recorded if run.variant is variant and run.tag == tag]
            spread = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
            count = f" ({len(top1)} runs)" if len(top1) > 1 else " (1 run)"
            none = "" if variant.name in OTHERS else "–"
            cells.append(f"{statistics.mean(top1):.2f}{spread}{count}" if top1 else none)
        rows.append([*cells, _at_equal_time(found, variant)])
    return table(columns, rows)


def comparison() -> dict[str, Any]:
    """What benchmarks/compare.py found, by data set."""
    return json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}


def _at_equal_time(found: dict[str, Any], variant: Variant) -> str:
    if variant.name.endswith("_large"):
        return "not trained"
    top1 = found.get("systems", {}).get(variant.name, {}).get("top1")
    return "–" if top1 is None else f"{top1:.2f}"


def equal_time() -> str:
    """Accuracy of each system after equal training time, a column per data set."""
    found = comparison()
    datasets = {name: DATASETS[name].title for name in _NUMBERS if name in found}
    columns = [f"{title}, {found[name]['minutes']:g} min" for name, title in datasets.items()]
    rows = []
    small = [variant for variant in SYSTEMS.values() if not variant.name.endswith("_large")]
    for paper_name in dict.fromkeys(variant.paper_name for variant in small):
        by_data = {variant.dataset.name: variant for variant in small if variant.paper_name == paper_name}
        cells = [_at_equal_time(found[name], by_data[name]) if name in by_data else "" for name in datasets]
        rows.append([paper_name, *cells])
    return table(["Test accuracy, %", *columns], rows)


def compared(dataset: str) -> str:
    """All that compare.py found of a data set."""
    return benchmark.compared(comparison()[dataset], [v for v in SYSTEMS.values() if v.dataset.name == dataset])


def robust() -> str:
    """What is proven of each checkpoint that was trained for it, beside attacks and the images as they are."""
    columns = "Checkpoint|Parameters|Epochs|ε|Clean, %|PGD, %|Linear, %|Intervals, %|Linear, not clipped, %|Hours"
    rows = []
    for name, checkpoint in checkpoints().items():
        row = checkpoint.row
        if row["eps"]:
            shares = ("top1", "pgd", "certified_linear", "certified_interval", "unclipped_linear")
            cells = [f"`{name}`", f"{checkpoint.variant.parameters:,}", row["epochs"], f"{float(row['eps']):.4g}"]
            cells += [f"{float(row[share]):.2f}" for share in shares]
            rows.append([*cells, row["hours"]])
    return table(columns.split("|"), rows)


def groups() -> dict[str, dict[str, list[Checkpoint]]]:
    """What is drawn together: the runs of all seeds, by structure, data set, size and recipe, and then by network."""
    found: dict[str, dict[str, list[Checkpoint]]] = {}
    for run in runs():
        size = "-large" if run.variant.name.endswith("_large") else ""
        group = f"{run.variant.dataset.name}-{run.variant.structure}{size}-{run.tag}"
        found.setdefault(group, {}).setdefault(run.name, []).append(run)
    return found


def gallery() -> str:
    """The figures, as Markdown."""
    lines = []
    for group, networks in groups().items():
        run = next(iter(networks.values()))[0]
        data, structure = run.variant.dataset.title, run.variant.structure.upper()
        title = f"{data}, {structure}, {run.variant.parameters:,} parameters, `{run.tag}` recipe"
        lines += [f"**{title}**", "", f"![{title.replace('`', '')}](figures/{group}.svg)", ""]
    return "\n".join(lines).rstrip()


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {"svg.hashsalt": "pcdeq_zoo", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    return pyplot


def save(figure: Any, file: Path) -> None:
    """Write a figure as SVG, with the same bytes for the same figure."""
    drawing = io.BytesIO()
    figure.savefig(drawing, format="svg", metadata={"Date": None, "Title": file.stem})
    _pyplot().close(figure)
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, drawing.getvalue())


def draw(networks: dict[str, list[Checkpoint]], file: Path) -> None:
    """By epoch: training accuracy, evaluations forward and backward, of dense layers the largest singular value of W.

    Lines are means over seeds and layers, bands the extremes of the seeds.
    """
    plt = _pyplot()
    panels: list[tuple[str, Callable[[dict[str, Any]], float]]] = [
        ("Training accuracy, %", lambda line: line["train_top1"]),
        ("Evaluations forward", lambda line: _mean_evaluations(line, "forward")),
        ("Evaluations backward", lambda line: _mean_evaluations(line, "backward")),
    ]
    logs = {seeds[0].variant.activation: [read_jsonl(log_of(run)) for run in seeds] for seeds in networks.values()}
    if all("largest_singular_value" in line for seeds in logs.values() for log in seeds for line in log):
        panels.append(("Largest singular value of W", lambda line: line["largest_singular_value"]))
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 2.8), layout="constrained")
    for axis, (title, value) in zip(axes, panels, strict=True):
        for activation, seeds in logs.items():
            epochs = [line["epoch"] for line in seeds[0]]
            values = [[value(line) for line in lines] for lines in zip(*seeds, strict=True)]
            (drawn,) = axis.plot(epochs, [statistics.mean(v) for v in values], label=activation, linewidth=1.2)
            if len(seeds) > 1:
                low, high = [min(v) for v in values], [max(v) for v in values]
                axis.fill_between(epochs, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)
        axis.set(title=title, xlabel="Epoch")
    axes[0].legend(frameon=False)
    save(figure, file)


def draw_certificate(file: Path) -> None:
    """One unit, z = tanh(1.5 z + 0.1): the map, its slope at b, and the interval proven from the next iterate."""
    import numpy as np

    plt = _pyplot()
    w, x, b, z = 1.5, 0.1, 0.75, 0.82
    z2, slope = math.tanh(w * z + x), w * (1 - math.tanh(w * b + x) ** 2)
    bound = slope / (1 - slope) * abs(z2 - z)
    figure, axis = plt.subplots(figsize=(5.5, 4), layout="constrained")
    grid = np.linspace(0.55, 1, 200)
    axis.plot(grid, np.tanh(w * grid + x), label="g(z) = tanh(1.5 z + 0.1)")
    axis.plot(grid, grid, color="0.6", linewidth=1, label="z")
    tangent = math.tanh(w * b + x) + slope * (grid - b)
    axis.plot(grid[grid >= b], tangent[grid >= b], "--", linewidth=1, label=f"slope q = {slope:.2f} at b")
    axis.axvspan(z2 - bound, z2 + bound, alpha=0.25, label="proven: |g(z) − z★| ≤ q / (1 − q) · |g(z) − z|")
    for place, name in ((b, "b"), (z, "z"), (z2, "g(z)")):
        axis.plot([place, place], [0.55, math.tanh(w * place + x)], ":", color="0.4", linewidth=1)
        axis.annotate(name, (place, 0.56), textcoords="offset points", xytext=(3, 0))
    axis.set(xlim=(0.55, 1), ylim=(0.55, 1))
    axis.legend(frameon=False, loc="upper left")
    save(figure, file)


def draw_robustness(panels: list[dict[str, Any]], file: Path) -> None:
    """A panel for each robust checkpoint and the ordinary one of its net: shares of images against the change."""
    plt = _pyplot()
    styles = {
        "pgd": (":", "right under PGD"),
        "linear": ("-", "proven, linear"),
        "interval": ("--", "proven, intervals"),
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), layout="constrained", squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for color, (name, curve) in zip(("C0", "C1"), panel["curves"].items(), strict=True):
            for key, (style, label) in styles.items():
                label = f".{name.partition('.')[2]}, {label}"
                axis.plot(curve["eps"], curve[key], style, color=color, label=label, linewidth=1.2)
        axis.axvline(panel["eps"], color="0.8", linewidth=0.8)
        title = f"{next(iter(panel['curves'])).partition('.')[0]}, first {panel['images']:,} test images"
        axis.set(xlabel="Change of each pixel, of [0, 1]", ylim=(0, 100))
        axis.set_title(title, fontsize="medium")
    axes[0][0].set(ylabel="Share of the images, %")
    axes[0][0].legend(frameon=False, fontsize=7)
    save(figure, file)


def draw_comparison(found: dict[str, Any], file: Path) -> None:
    """A panel per data set: accuracy on the images trained on in the last minutes, against the time of training."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(found), figsize=(4.2 * len(found), 3.4), layout="constrained", squeeze=False)
    for axis, (dataset, results) in zip(axes[0], found.items(), strict=True):
        for name, system in results["systems"].items():
            if points := system.get("curve"):
                ours = name in VARIANTS
                seconds, top1 = zip(*points, strict=True)
                minutes = [value / 60 for value in seconds]
                label = SYSTEMS[name].paper_name
                axis.plot(minutes, top1, "-" if ours else "--", label=label, linewidth=1.8 if ours else 1.0)
        axis.set(title=DATASETS[dataset].title, xlabel="Minutes of training, one thread")
        axis.legend(frameon=False, fontsize=7)
    axes[0][0].set(ylabel="Training accuracy, %")
    save(figure, file)


def _mean_evaluations(line: dict[str, Any], direction: str) -> float:
    return statistics.mean(value for key, value in line["evaluations"].items() if key.endswith(direction))


def measurements() -> dict[str, Any]:
    """What benchmarks/run.py measured last."""
    return json.loads((ROOT / "benchmarks" / "results.json").read_text(encoding="utf-8"))


TABLES = {
    "models": models,
    "checkpoints": measured,
    **{f"table-{number}": partial(paper_table, dataset) for dataset, number in _NUMBERS.items()},
    "equal-time": equal_time,
    **{f"compared-{dataset}": partial(compared, dataset) for dataset in _NUMBERS},
    "robust": robust,
    "figures": gallery,
    "benchmark-summary": lambda: benchmark.summary(measurements()),
    "benchmark-speed": lambda: benchmark.speed(measurements()),
    "benchmark-accuracy": lambda: benchmark.accuracy(measurements()),
}


def helps() -> dict[Path, str]:
    """What `--help` of the recipes prints, by its file."""
    sys.path.insert(0, str(ROOT / "recipes"))
    config, train, evaluate, sweep = map(importlib.import_module, ("config", "train", "evaluate", "sweep"))
    parsers = {
        "train": config.make_parser(train.__doc__),
        "evaluate": evaluate.make_parser(),
        "sweep": sweep.make_parser(),
    }
    return {ROOT / "recipes" / f"{name}.txt": parser.format_help() for name, parser in parsers.items()}


def updated(text: str) -> str:
    """`text` with every table replaced by the current one."""
    for name, make in TABLES.items():
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda m, make=make: f"{m[1]}\n{make()}\n\n{m[2]}",
            text,
            flags=re.S,
        )
    return text


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for file in (ROOT / document for document in DOCUMENTS):
        text = file.read_text(encoding="utf-8")
        if (new := updated(text)) != text:
            replace_file(file, new)
            print(f"updated {file.name}")
    for file, text in helps().items():
        replace_file(file, text)
    for group, networks in groups().items():
        draw(networks, FIGURES / f"{group}.svg")
        print(f"drew {group}.svg")
    model = timm.create_model("pcdeq1_mc_softsign_mnist", pretrained=True).eval()
    digit = load(DATASETS["mnist"], "test", "sample")[0][:1]
    name, layer, u = next(pcdeq_layers(model, normalize(digit, DATASETS["mnist"])))
    save(
        draw_approach(approach(layer, u), f"{model.pretrained_cfg['architecture']}, {name}"),
        FIGURES / "equilibrium.svg",
    )
    draw_certificate(FIGURES / "certificate.svg")
    draw_robustness(
        json.loads((ROOT / "benchmarks" / "robustness.json").read_text("utf-8")), FIGURES / "robustness.svg"
    )
    if found := comparison():
        draw_comparison(found, FIGURES / "compared.svg")


if __name__ == "__main__":
    main()
