"""Try the zoo on a GPU, without a network: an epoch of training, the benchmark, and the tests that a device matters to.

    make gpu                          or: python -m benchmarks.gpu, where PyTorch, timm and accelerate are there already
    PCDEQ_ZOO_DATA=FOLDER python -m benchmarks.gpu --nets pcdeq1_mc_relu6_cifar

The tests are of logits, gradients, proven bounds and autocast, against float64 on the CPU, and of runs of the recipes.
Prints tables, and writes runs/gpu/results.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks import ROOT, environment
from benchmarks.tables import tables
from pcdeq_zoo.files import read_jsonl, replace_file

OUTPUT = ROOT / "runs" / "gpu"

# Of those that ship, one of each kind: no time for the training of others.
NETS = ("pcdeq1_l_tanh_mnist", "pcdeq1_mc_relu6_mnist", "pcdeq1_mc_relu6_cifar", "pcdeq2_mc_sigmoid_cifar")
TRAINED = "pcdeq1_mc_relu6_cifar"


def python(*arguments: str) -> tuple[int, float]:
    """Run Python on the checkout, installed or not; its exit status, and the seconds it took."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment())
    return done.returncode, round(time.perf_counter() - start, 1)


def test(device: str) -> dict[str, Any]:
    status, seconds = python("-m", "pytest", "-q", "--device", device)
    return {"passed": status == 0, "seconds": seconds}


def train(device: str) -> dict[str, Any]:
    """An epoch of the zoo's recipe."""
    run = OUTPUT / "train"
    shutil.rmtree(run, ignore_errors=True)
    arguments = ["--model", TRAINED, "--recipe", "zoo", "--epochs", "1", "--output", str(run)]
    status, seconds = python("recipes/train.py", *arguments, *(["--cpu"] if device == "cpu" else []))
    result: dict[str, Any] = {"model": TRAINED, "passed": status == 0, "seconds": seconds}
    if status == 0:
        result["log"] = read_jsonl(run / "log.jsonl")
    return result


def benchmark(device: str, nets: list[str]) -> dict[str, Any]:
    output = OUTPUT / "benchmark.json"
    output.unlink(missing_ok=True)
    arguments = ["-m", "benchmarks.run", "--device", device, "--nets", *nets, "--output", str(output)]
    status, seconds = python(*arguments)
    result: dict[str, Any] = {"passed": status == 0, "seconds": seconds}
    if output.exists():
        result |= json.loads(output.read_text())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="default: cuda")
    parser.add_argument("--nets", nargs="+", default=list(NETS), metavar="NET", help="for the benchmark")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no GPU here; --device cpu goes the same way without one")

    OUTPUT.mkdir(parents=True, exist_ok=True)
    document = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
        "torch": torch.__version__,
        "training": train(args.device),
        "benchmark": benchmark(args.device, args.nets),
        "tests": test(args.device),
    }
    replace_file(OUTPUT / "results.json", json.dumps(document, indent=1) + "\n")
    if "nets" in document["benchmark"]:
        print(tables(document["benchmark"]))
    steps = ("training", "benchmark", "tests")
    for step in steps:
        print(f"{step}: {'passed' if document[step]['passed'] else 'failed'}, {document[step]['seconds']} s")
    if not all(document[step]["passed"] for step in steps):
        raise SystemExit("not all of it passed; what failed stands above")


if __name__ == "__main__":
    main()
