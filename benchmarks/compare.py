"""pcDEQ beside the systems that the paper compares with: trained for equal time on the same cores, by the same loop.

    python -m benchmarks.compare --jobs 2                all of it: four to five hours on two cores
    python -m benchmarks.compare '*_mnist' --jobs 2      the systems of MNIST
    python -m benchmarks.compare mondeq_l_mnist --share 0.1 --runs runs/try    a tenth of the time, to try it

Every run is one of recipes/train.py, with one thread: started again, what is finished is left alone, and what was
killed goes on. Then every system is timed, with nothing else running, and the tables are printed. Of a data set all of
whose systems had their full time they are written, too, to benchmarks/compared.json; `python -m tools.report` then
brings the documents up to date.

Time of a run: 12 minutes for MNIST, 25 for CIFAR-10, 6 for the first 4,434 digits of SVHN. pcDEQ is trained by its own
recipe, which the time cuts short or prolongs. The others have the settings of their papers, stretched over the time,
and the best of three learning rates: what was published, a third and three times that, each tried for a third of the
time on training images without the last ones, and measured on these. For MNIST there is also a run of equal epochs, 5
on the first 6,000 images.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from tqdm import tqdm

from benchmarks.compared import VARIANTS as OTHERS
from benchmarks.run import interleaved, peak_memory, training_step
from benchmarks.tables import compared
from pcdeq_zoo import VARIANTS, DataError, Variant
from pcdeq_zoo.data import DATA_ROOT_VARIABLE, DEFAULT_DATA_ROOT, load, normalize
from pcdeq_zoo.files import replace_file
from pcdeq_zoo.weights import read_rows

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "compared.json"

# One net of the zoo for each structure, and the large one.
OURS = [name for name in VARIANTS if fnmatch.fnmatch(name, "pcdeq1_*_relu6_*")]
SYSTEMS: dict[str, Variant] = {**OTHERS, **{name: VARIANTS[name] for name in OURS}}

MINUTES = {"mnist": 12.0, "svhn": 6.0, "cifar": 25.0}
HELD_OUT = {"mnist": 5000, "svhn": 434, "cifar": 5000}
SVHN_IMAGES = 4434
RATES = (1 / 3, 1, 3)
TRIAL_SHARE = 1 / 3
FEW = ["--limit-train=6000", "--epochs=5"]  # of equal epochs
BINS = 24  # of the time, in a curve
BATCH = 64

# How a training ends whose solves fail, or whose loss is no number: torchdiffeq's AssertionError among them.
BREAKDOWN = re.compile(r"(\w+\.)*ConvergenceError|AssertionError|epoch \d+, step \d+: ")


@dataclass(frozen=True)
class Harness:
    """Where runs are, and how much of the time they get."""

    runs: Path
    share: float
    data: str | None

    def settings(self, variant: Variant) -> list[str]:
        """What all runs of a system have."""
        flags = ["--module=benchmarks.compared", f"--model={variant.name}", "--resume", "--mixed-precision=no"]
        flags += ["--save-every=200", "--cpu"]
        flags += [f"--recipe={tag_of(variant)}"]
        if variant.dataset.name == "svhn":
            flags += [f"--images={SVHN_IMAGES}"]
        if folder := data_of(variant, self.data):
            flags += [f"--data={folder}"]
        return flags

    def train(self, variant: Variant, what: str, *flags: str) -> None:
        """One run. If its training breaks down, a file beside it says how, and it is not tried again.

        Raises:
            SystemExit: It ended by anything else, such as a kill or missing data, which is no fault of the system's.
        """
        output = self.runs / f"{variant.name}.{what}"
        failure = output.with_name(f"{output.name}.failed")
        if failure.exists():
            return
        output.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(ROOT / "recipes" / "train.py"), *self.settings(variant), *flags]
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        with output.with_name(f"{output.name}.txt").open("a", encoding="utf-8") as console:
            done = subprocess.run([*command, f"--output={output}"], stdout=console, stderr=console, env=environment)
        if not done.returncode:
            return
        lines = output.with_name(f"{output.name}.txt").read_text("utf-8", errors="replace").splitlines()
        last = next((line for line in reversed(lines) if line.strip()), "")
        if done.returncode < 0 or not BREAKDOWN.match(last):
            raise SystemExit(f"{output} ended, start this again to go on: {last}")
        replace_file(failure, last + "\n")
        tqdm.write(f"{output} failed: {last}")

    def system(self, variant: Variant) -> None:
        """All runs of a system."""
        minutes = MINUTES[variant.dataset.name] * self.share
        for rate in self.rates(variant):
            held_out = f"--hold-out={HELD_OUT[variant.dataset.name]}"
            self.train(variant, f"trial-{rate:.3g}", held_out, f"--lr={rate}", f"--minutes={minutes * TRIAL_SHARE:g}")
        if (rate := self.best_rate(variant)) is not None:
            self.train(variant, "time", f"--lr={rate}", f"--minutes={minutes:g}", "--log-every=10")
            if variant.dataset.name == "mnist":
                self.train(variant, "epochs", f"--lr={rate}", *FEW)

    def rates(self, variant: Variant) -> list[float]:
        """Learning rates to try; none for ours."""
        if variant.name in OURS:
            return []
        return [float(f"{variant.recipes[tag_of(variant)].lr * factor:.3g}") for factor in RATES]

    def trials(self, variant: Variant) -> dict[float, float | None]:
        """Accuracy on the held-out images by learning rate; None of a run that failed."""
        found = {}
        for rate in self.rates(variant):
            row = result(self.runs / f"{variant.name}.trial-{rate:.3g}" / "held_out.csv")
            found[rate] = row and float(row["top1"])
        return found

    def best_rate(self, variant: Variant) -> float | None:
        """The learning rate that did best; of ours its own. None if all failed."""
        if variant.name in OURS:
            return variant.recipes[tag_of(variant)].lr
        found = {rate: top1 for rate, top1 in self.trials(variant).items() if top1 is not None}
        return max(found, key=lambda rate: found[rate]) if found else None

    def collect(self, variant: Variant) -> dict[str, Any]:
        """What the runs of a system gave."""
        run = self.runs / f"{variant.name}.time"
        found: dict[str, Any] = {"parameters": variant.parameters, "lr": self.best_rate(variant)}
        found["trials"] = {f"{rate:g}": top1 for rate, top1 in self.trials(variant).items()}
        failures = [path.read_text("utf-8").strip() for path in self.runs.glob(f"{variant.name}.*.failed")]
        found["failed_runs"] = failures
        if row := result(run / "results.csv"):
            log = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
            found |= {"top1": float(row["top1"]), "epochs": float(row["epochs"])}
            for direction in ("forward", "backward"):
                counts = [count for key, count in log[-1]["evaluations"].items() if key.endswith(direction)]
                found[direction] = round(sum(counts), 2)
            found["unconverged"] = sum(line["unconverged"] for line in log)
            found["images"] = sum(line["images"] for line in log)
            found["curve"] = curve(run / "steps.jsonl", MINUTES[variant.dataset.name] * self.share * 60)
        if row := result(self.runs / f"{variant.name}.epochs" / "results.csv"):
            found["top1_equal_epochs"] = float(row["top1"])
        return found


def tag_of(variant: Variant) -> str:
    """The recipe that a system is trained by."""
    if variant.name not in OURS:
        return "published"
    return "zoo4434" if variant.dataset.name == "svhn" else "zoo"


def data_of(variant: Variant, data: str | None) -> str | None:
    """--data of a run: for SVHN the folder of its first digits, where there is one."""
    root = Path(data or os.environ.get(DATA_ROOT_VARIABLE, DEFAULT_DATA_ROOT))
    first = root / f"svhn_first_{SVHN_IMAGES}"
    if variant.dataset.name == "svhn" and first.is_dir():
        return str(first)
    return data and str(root / variant.dataset.folder)


def result(path: Path) -> dict[str, str] | None:
    """The row of a finished run."""
    if not path.exists():
        return None
    (found,) = read_rows(path)
    return found.row


def curve(path: Path, seconds: float) -> list[tuple[float, float]]:
    """Seconds of training and accuracy on the images trained on since the point before, at equal distances in time."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    points = []
    for end in (seconds * (i + 1) / BINS for i in range(BINS)):
        recent = [line["train_top1"] for line in lines if end - seconds / BINS < line["seconds"] <= end]
        if recent:
            points.append((round(end, 1), round(sum(recent) / len(recent), 2)))
    return points


def costs(names: list[str], harness: Harness, rounds: int) -> dict[str, dict[str, float]]:
    """Time and peak memory of a training step and of inference, of all systems of a data set in turn, one thread each.

    Of the weights after the time, where there are; a solve takes more iterations then.
    """
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    steps, runs = {}, {}
    for name in names:
        variant = SYSTEMS[name]
        images, labels = load(variant.dataset, "train", data_of(variant, harness.data))
        x, y = normalize(images[:BATCH], variant.dataset), labels[:BATCH]
        file = harness.runs / f"{name}.time" / "model.safetensors"
        recipe = variant.recipes[tag_of(variant)]
        overlay = {"file": str(file)} if file.exists() else None
        create = {"pretrained": file.exists(), "stop": recipe.stop, "tol": recipe.tol}
        train = timm.create_model(name, **create, pretrained_cfg_overlay=overlay).train()
        infer = timm.create_model(name, **create, pretrained_cfg_overlay=overlay).eval()
        steps[name] = lambda train=train, x=x, y=y: training_step(train, x, y)
        runs[name] = torch.inference_mode()(lambda infer=infer, x=x: infer(x))
    for key, functions in (("train", steps), ("infer", runs)):
        for name, seconds in interleaved(functions, rounds, 1).items():
            found[name][f"{key}_s"] = seconds
            found[name][f"{key}_peak_bytes"] = peak_memory(functions[name], torch.device("cpu"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", default=["*"], metavar="GLOB", help="names; default: all")
    parser.add_argument("--share", type=float, default=1.0, help="of the time that runs get (default: 1)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; one more is not counted")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "compared", metavar="DIR")
    parser.add_argument("--data", help="folder with the data sets (default: $PCDEQ_ZOO_DATA)")
    args = parser.parse_args()
    if args.share <= 0 or args.jobs < 1:
        parser.error(f"--share must be above 0 and --jobs at least 1, got {args.share} and {args.jobs}")
    names = [name for name in SYSTEMS if any(fnmatch.fnmatch(name, glob) for glob in args.systems)]
    if not names:
        parser.error(f"no system matches {' '.join(args.systems)}; there are {', '.join(SYSTEMS)}")
    if not importlib.util.find_spec("torchdiffeq"):
        raise SystemExit("neural ODEs need torchdiffeq: pip install torchdiffeq==0.2.5")

    VARIANTS.update(OTHERS)  # so that their rows are read
    harness = Harness(args.runs, args.share, args.data)
    trained = [SYSTEMS[name] for name in names if not name.endswith("_large")]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(tqdm(pool.map(harness.system, trained), total=len(trained), desc="systems", disable=None))

    torch.set_num_threads(1)
    for dataset in MINUTES:
        group = [name for name in names if SYSTEMS[name].dataset.name == dataset]
        if not group:
            continue
        systems = {name: harness.collect(SYSTEMS[name]) for name in group}
        for large in (False, True):  # apart, as a step of the large ones takes longer by far
            some = [name for name in group if name.endswith("_large") == large]
            try:
                measured = costs(some, harness, args.rounds) if some else {}
            except DataError as error:
                raise SystemExit(f"no data: {error}") from error
            for name, values in measured.items():
                systems[name] |= values
        machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": 1}
        found = {"minutes": MINUTES[dataset] * args.share, "machine": machine, "systems": systems}
        if args.share == 1 and group == [name for name in SYSTEMS if SYSTEMS[name].dataset.name == dataset]:
            known = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
            replace_file(RESULTS, json.dumps({**known, dataset: found}, indent=1) + "\n")
        print(compared(found, [SYSTEMS[name] for name in group]), end="\n\n")


if __name__ == "__main__":
    main()
