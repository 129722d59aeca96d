"""pcDEQ beside the systems that the paper compares with: trained for equal time on the same cores, by the same loop.

    python -m benchmarks.compare --jobs 2                all of it: an estimated seven hours on two cores
    python -m benchmarks.compare '*_mnist' --jobs 2      the systems of MNIST
    python -m benchmarks.compare mondeq_l_mnist --share 0.1 --runs runs/try    a tenth of the time, to try it

Every run is one of recipes/train.py, with one thread: started again, what is finished is left alone, and what was
killed goes on. Then every system is timed, with nothing else running, and the tables are printed. Of a data set whose
systems were all run, with --share 1, they are written, too, to benchmarks/compared.json; `python -m tools.report` then
brings the documents up to date.

Time of a run: 12 minutes for MNIST and the first 4,434 digits of SVHN, 25 for CIFAR-10. All schedules are stretched
over it. pcDEQ is trained by its own recipe. The others have two, see benchmarks/compared, that of their papers and one
for short trainings, each at three learning rates: its own, a third and three times that. All six are tried for a
quarter of the time on training images without the last ones, and measured on these; the best has the whole time. For
MNIST there is also a run of equal epochs, 4 on the first 3,000 images.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import platform
import random
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import psutil
import timm
import torch
from tqdm import tqdm

from benchmarks import ROOT, environment
from benchmarks.compared import VARIANTS as OTHERS
from benchmarks.run import SVHN_IMAGES, data_folder, interleaved, peak_memory, training_step
from benchmarks.tables import compared
from pcdeq_zoo import VARIANTS, DataError, Variant
from pcdeq_zoo.data import load, normalize
from pcdeq_zoo.files import read_jsonl, replace_file
from pcdeq_zoo.weights import read_rows

RESULTS = ROOT / "benchmarks" / "compared.json"

# One net of the zoo for each structure, and the large one.
OURS = [name for name in VARIANTS if fnmatch.fnmatch(name, "pcdeq1_*_relu6_*")]
SYSTEMS: dict[str, Variant] = {**OTHERS, **{name: VARIANTS[name] for name in OURS}}

MINUTES = {"mnist": 12.0, "svhn": 12.0, "cifar": 25.0}
HELD_OUT = {"mnist": 5000, "svhn": 434, "cifar": 5000}
RATES = (1 / 3, 1, 3)
TRIAL_SHARE = 1 / 4
EQUAL_EPOCHS = ["--limit-train=3000", "--epochs=4"]
BINS = 24  # of the time, in a curve
BATCH = 64

# How a training ends whose solves fail, or whose loss is no number: torchdiffeq's AssertionError among them.
BREAKDOWN = re.compile(r"(\w+\.)*(ConvergenceError|_?LinAlgError)|AssertionError|epoch \d+, step \d+: ")


class Candidate(NamedTuple):
    """How a system may be trained: a recipe, by its tag, at a learning rate."""

    tag: str
    lr: float

    def __str__(self) -> str:
        return f"{self.tag}-{self.lr:g}"


@dataclass(frozen=True)
class Harness:
    """Where runs are, and how much of the time they get."""

    runs: Path
    share: float
    data: str | None

    def settings(self, variant: Variant) -> list[str]:
        """What all runs of a system have."""
        flags = ["--module=benchmarks.compared", f"--model={variant.name}", "--resume", "--mixed-precision=no", "--cpu"]
        # A step of an ODE takes seconds.
        flags += [f"--save-every={10 if variant.structure == 'ode' else 200}", "--log-every=1"]
        if variant.dataset.name == "svhn":
            flags += [f"--images={SVHN_IMAGES}"]
        if folder := data_folder(variant.dataset, self.data):
            flags += [f"--data={folder}"]
        return flags

    def folder(self, variant: Variant, what: str, candidate: Candidate) -> Path:
        """Of a run."""
        return self.runs / f"{variant.name}.{what}-{candidate}"

    def train(self, variant: Variant, what: str, candidate: Candidate, *flags: str) -> None:
        """One run. If its training breaks down, a file beside it says how, and it is not tried again.

        Raises:
            SystemExit: It ended by anything else, such as a kill or missing data, which is no fault of the system's.
        """
        output = self.folder(variant, what, candidate)
        failure = output.with_name(f"{output.name}.failed")
        if failure.exists():
            return
        output.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(ROOT / "recipes" / "train.py"), *self.settings(variant)]
        command += [f"--recipe={candidate.tag}", f"--lr={candidate.lr}", *flags]
        command += [f"--output={output}"]
        with output.with_name(f"{output.name}.txt").open("a", encoding="utf-8") as console:
            one_thread = {**environment(), "OMP_NUM_THREADS": "1"}
            training = subprocess.Popen(command, stdout=console, stderr=console, env=one_thread)
            if _ended.is_set():  # since `end` looked for trainings
                training.terminate()
            status = training.wait()
        if not status:
            return
        lines = output.with_name(f"{output.name}.txt").read_text("utf-8", errors="replace").splitlines()
        last = next((line for line in reversed(lines) if line.strip()), "")
        if status < 0 or not BREAKDOWN.match(last):
            raise SystemExit(f"{output} ended, start this again to go on: {last}")
        replace_file(failure, last + "\n")
        tqdm.write(f"{output} failed: {last}")

    def system(self, variant: Variant) -> None:
        """All runs of a system."""
        minutes = MINUTES[variant.dataset.name] * self.share
        if variant.name not in OURS:
            trial = [f"--hold-out={HELD_OUT[variant.dataset.name]}", f"--minutes={minutes * TRIAL_SHARE:g}"]
            for candidate in candidates(variant):
                self.train(variant, "trial", candidate, *trial)
        for candidate in self.by_merit(variant):  # the next one only where training with the best breaks down
            self.train(variant, "time", candidate, f"--minutes={minutes:g}")
            if result(self.folder(variant, "time", candidate) / "results.csv"):
                if variant.dataset.name == "mnist":
                    self.train(variant, "epochs", candidate, *EQUAL_EPOCHS)
                break

    def trials(self, variant: Variant) -> dict[Candidate, float | None]:
        """Accuracy on the held-out images; None of a run that failed."""
        rows = {c: result(self.folder(variant, "trial", c) / "held_out.csv") for c in candidates(variant)}
        return {candidate: row and float(row["top1"]) for candidate, row in rows.items()}

    def by_merit(self, variant: Variant) -> list[Candidate]:
        """Candidates, the best first; without those that failed."""
        if variant.name in OURS:
            return candidates(variant)
        found = {candidate: top1 for candidate, top1 in self.trials(variant).items() if top1 is not None}
        return sorted(found, key=lambda candidate: -found[candidate])

    def trained(self, variant: Variant) -> Candidate | None:
        """The one that had the whole time."""
        done = (c for c in self.by_merit(variant) if result(self.folder(variant, "time", c) / "results.csv"))
        return next(done, None)

    def collect(self, variant: Variant) -> dict[str, Any]:
        """What the runs of a system gave."""
        found: dict[str, Any] = {"parameters": variant.parameters}
        if variant.name not in OURS:
            found["trials"] = {str(candidate): top1 for candidate, top1 in self.trials(variant).items()}
        failures = [path.read_text("utf-8").strip() for path in sorted(self.runs.glob(f"{variant.name}.*.failed"))]
        found["failed_runs"] = failures
        if (candidate := self.trained(variant)) is None:
            return found
        run = self.folder(variant, "time", candidate)
        row = result(run / "results.csv")
        assert row is not None
        log, steps = (read_jsonl(run / name) for name in ("log.jsonl", "steps.jsonl"))
        found |= {"recipe": candidate.tag, "lr": candidate.lr, "top1": float(row["top1"])}
        found |= {"epochs": float(row["epochs"]), "updates": len(steps)}
        images = sum(line["images"] for line in log)
        for direction in ("forward", "backward"):  # mean over the images trained on, added up over the layers
            counts = ((line["images"], key, n) for line in log for key, n in line["evaluations"].items())
            total = sum(part * n for part, key, n in counts if key.endswith(direction))
            found[direction] = round(total / images, 2)
        found["solves"] = sum(line["images"] * len(line["evaluations"]) for line in log)
        found["unconverged"] = sum(line["unconverged"] for line in log)
        found["curve"] = curve(steps, MINUTES[variant.dataset.name] * self.share * 60)
        if row := result(self.folder(variant, "epochs", candidate) / "results.csv"):
            found["top1_equal_epochs"] = float(row["top1"])
        return found


def candidates(variant: Variant) -> list[Candidate]:
    """How a system may be trained; ours by its own recipe only."""
    if variant.name in OURS:
        tag = "zoo4434" if variant.dataset.name == "svhn" else "zoo"
        return [Candidate(tag, variant.recipes[tag].lr)]
    recipes = variant.recipes.items()
    return [Candidate(tag, float(f"{recipe.lr * rate:.3g}")) for tag, recipe in recipes for rate in RATES]


def result(path: Path) -> dict[str, str] | None:
    """The row of a finished run."""
    if not path.exists():
        return None
    (found,) = read_rows(path)
    return found.row


def curve(steps: list[dict[str, Any]], seconds: float) -> list[tuple[float, float]]:
    """Seconds of training and accuracy on the images trained on since the point before, at equal distances in time."""
    points = []
    for end in (seconds * (i + 1) / BINS for i in range(BINS)):
        recent = [step["train_top1"] for step in steps if end - seconds / BINS < step["seconds"] <= end]
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
        images, labels = load(variant.dataset, "train", data_folder(variant.dataset, harness.data))
        x, y = normalize(images[:BATCH], variant.dataset), labels[:BATCH]
        candidate = harness.trained(variant)
        recipe = variant.recipes[(candidate or candidates(variant)[0]).tag]
        overlay = candidate and {"file": str(harness.folder(variant, "time", candidate) / "model.safetensors")}
        create = {"pretrained": candidate is not None, "stop": recipe.stop, "tol": recipe.tol}
        train = timm.create_model(name, **create, pretrained_cfg_overlay=overlay).train()
        infer = timm.create_model(name, **create, pretrained_cfg_overlay=overlay).eval()
        steps[name] = lambda train=train, x=x, y=y: training_step(train, x, y)
        runs[name] = torch.inference_mode()(lambda infer=infer, x=x: infer(x))
    for key, functions in (("train", steps), ("infer", runs)):
        for name, seconds in interleaved(functions, rounds, 1).items():
            found[name][f"{key}_s"] = seconds
            found[name][f"{key}_peak_bytes"] = peak_memory(functions[name], torch.device("cpu"))
    return found


_ended = threading.Event()


def end(*_: object) -> NoReturn:
    """End with all trainings, which a signal to this process does not reach."""
    _ended.set()
    trainings = psutil.Process().children()
    for training in trainings:
        training.terminate()
    psutil.wait_procs(trainings)
    raise SystemExit("this was ended, and so are its trainings; start it again to go on")


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
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    names = [name for name in SYSTEMS if any(fnmatch.fnmatch(name, glob) for glob in args.systems)]
    if not names:
        parser.error(f"no system matches {' '.join(args.systems)}; there are {', '.join(SYSTEMS)}")
    if not importlib.util.find_spec("torchdiffeq"):
        raise SystemExit("neural ODEs need torchdiffeq: pip install torchdiffeq==0.2.5")

    VARIANTS.update(OTHERS)  # so that their rows are read
    harness = Harness(args.runs, args.share, args.data)
    trained = [SYSTEMS[name] for name in names if not name.endswith("_large")]
    random.Random(0).shuffle(trained)  # what else is on the machine at a time hits any of them
    signal.signal(signal.SIGTERM, end)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(tqdm(pool.map(harness.system, trained), total=len(trained), desc="systems", disable=None))

    torch.set_num_threads(1)
    for dataset in MINUTES:
        group = [name for name in names if SYSTEMS[name].dataset.name == dataset]
        if not group:
            continue
        systems = {name: harness.collect(SYSTEMS[name]) for name in group}
        for large in (False, True):  # apart, and once, as a step of the large ones takes minutes
            some = [name for name in group if name.endswith("_large") == large]
            try:
                measured = costs(some, harness, 1 if large else args.rounds) if some else {}
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
