"""Measure speed, accuracy and memory of the zoo's solves against other implementations, on one machine in one run.

    make benchmark                               sets up, then every net and measure: half an hour on 2 cores
    python -m benchmarks.run --nets pcdeq1_mc_relu6_cifar --rounds 5
    python -m benchmarks.run --authors ../pcdeq    against a checkout of the authors' code too
    python -m benchmarks.run --device cuda

Prints tables and, for all nets, writes benchmarks/results.json; `python -m tools.report` then brings the documents
up to date.

All contenders solve the same network with the same trained weights, one after the other in every round, so that a
machine that slows down slows all of them; figures are medians over the rounds, and speeds are ratios. Nothing else may
run meanwhile. A training step is forward, backward and projection, without an optimizer. Nets without a checkpoint in
the package are first trained for 400 steps by the first epoch of the paper's recipe (minutes to a quarter of an hour
each, kept in runs/benchmark). Errors are against enclosures of
the same layer inputs, and against a float64 solve of the whole network for gradients.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks import ROOT, environment
from benchmarks.baselines import BASELINES, Baseline, baseline, released
from benchmarks.tables import tables
from pcdeq_zoo import VARIANTS, DataError, Dataset, PcDEQ, PcDEQConv2d, PcDEQLinear, enclosure, project, record_solves
from pcdeq_zoo.data import DATA_ROOT_VARIABLE, DEFAULT_DATA_ROOT, load, normalize
from pcdeq_zoo.files import replace_file
from pcdeq_zoo.operators import full_precision
from pcdeq_zoo.weights import checkpoints

NETS = (
    "pcdeq1_l_tanh_mnist",
    "pcdeq1_mc_relu6_mnist",
    "pcdeq1_mc_relu6_cifar",
    "pcdeq1_mc_tanh_cifar",
    "pcdeq2_mc_sigmoid_cifar",
    "pcdeq1_sc_softsign_cifar",
    "pcdeq1_mc_relu6_cifar_large",
)

# Settings of the solver, by the name that the tables give them: as `timm.create_model` gives a model, proven to 1e-3,
# and as the recipe `zoo` trains.
OURS: dict[str, dict[str, Any]] = {
    "as created": {},
    "certified": {"stop": "certified"},
    "estimated 1e-3": {"stop": "estimated", "tol": 1e-3},
}

BATCHES = (1, 64)
TRAINING_STEPS = 400

# Batches over which the gradient error is averaged (root mean square): that a max pool picks another position, because
# an error decides between two that are almost equal, makes single ones erratic.
GRADIENTS = 3

ENCLOSED = 16  # images that unit errors are taken of


SVHN_IMAGES = 4434


def data_folder(dataset: Dataset, root: str | None) -> str | None:
    """--data of a data set, for a folder of several; for SVHN that of its first digits, where there is one."""
    known = Path(root or os.environ.get(DATA_ROOT_VARIABLE, DEFAULT_DATA_ROOT))
    first = known / f"svhn_first_{SVHN_IMAGES}"
    if dataset.name == "svhn" and first.is_dir():
        return str(first)
    return root and str(known / dataset.folder)


def trained(name: str, data: str | None) -> PcDEQ:
    """The zoo's checkpoint, or one of 400 training steps, on data of that folder."""
    if any(checkpoint.variant.name == name for checkpoint in checkpoints().values()):
        return timm.create_model(name, pretrained=True)
    run = ROOT / "runs" / "benchmark" / name
    if not (run / "model.safetensors").is_file():
        print(f"training {name} for {TRAINING_STEPS} steps", flush=True)
        images = TRAINING_STEPS * VARIANTS[name].recipes["paper"].batch_size
        command = [sys.executable, str(ROOT / "recipes" / "train.py"), "--model", name, "--mixed-precision=no"]
        command += ["--recipe=paper", "--epochs=1", f"--limit-train={images}", "--output", str(run), "--resume"]
        command += ["--data", data] if data else []
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment())
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(run / "model.safetensors")})


def contenders(model: PcDEQ) -> dict[str, nn.Module]:
    """The same network, solved in every way that is compared; without torchdeq where that is not installed."""
    known = [name for name in BASELINES if "torchdeq" not in name or importlib.util.find_spec("torchdeq")]
    nets: dict[str, nn.Module] = {name: baseline(model, name) for name in known}
    for name, settings in OURS.items():
        nets[name] = copy.deepcopy(model)
        for key, value in settings.items():
            setattr(nets[name].solver, key, value)
    return nets


def training_step(net: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Forward, backward and the projection of W."""
    net.zero_grad(set_to_none=True)
    F.cross_entropy(net(images), labels).backward()
    project(net)
    for layer in net.modules():
        if isinstance(layer, Baseline):
            layer.clamp()


def interleaved(functions: dict[str, Callable[[], Any]], rounds: int, calls: int) -> dict[str, float]:
    """Median seconds of a call of each function; round by round, `calls` of each in turn, the first one not counted."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            function()  # finds the caches and the allocator as the others left them
            wait()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            wait()
            times[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def solved_layers(net: nn.Module) -> dict[str, nn.Module]:
    """The pcDEQ layers of any contender, by their names in the zoo's model."""
    kinds = (PcDEQLinear, PcDEQConv2d, Baseline)
    return {name.split(".")[-1]: layer for name, layer in net.named_modules() if isinstance(layer, kinds)}


@torch.no_grad()
def unit_errors(net: nn.Module, reference: dict[str, nn.Module], images: Tensor) -> dict[str, float]:
    """Worst relative error of a unit, by layer: each output against the proven equilibrium of the same input."""
    errors: dict[str, float] = {}

    def compare(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            lower, upper = enclosure(reference[name], inputs[0], tol=1e-8)
            truth = ((lower + upper) / 2).view_as(output)
            errors[name] = ((output - truth).abs() / truth).max().item()

        return hook

    hooks = [layer.register_forward_hook(compare(name)) for name, layer in solved_layers(net).items()]
    net(images)
    for hook in hooks:
        hook.remove()
    return errors


def gradient(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    training_step(net, images, labels)
    return torch.cat([parameter.grad.flatten().double() for parameter in net.parameters()])


def exact_gradient(model: PcDEQ, images: Tensor, labels: Tensor) -> Tensor:
    exact = copy.deepcopy(model).double().train()
    exact.solver.stop, exact.solver.tol, exact.solver.max_evals = "residual", 1e-10, 2000
    return gradient(exact, images.double(), labels)


def evaluations(net: nn.Module, step: Callable[[], Any]) -> dict[str, dict[str, float]]:
    """Mean evaluations of W per sample, by direction and layer."""
    counts: dict[str, dict[str, float]] = {"forward": {}, "backward": {}}
    with record_solves(net) as solves:
        step()
    for solve in solves:
        counts[solve.direction][solve.layer.split(".")[-1]] = round(solve.evaluations.double().mean().item(), 2)
    for name, layer in solved_layers(net).items():
        if isinstance(layer, Baseline):
            for direction, count in layer.evaluations.items():
                counts[direction][name] = count
    return counts


def peak_memory(step: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that a step holds beyond what was there before, from the allocator's own log."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    held = most = 0
    for event in sorted(trace.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def flops(step: Callable[[], Any]) -> int:
    """Floating point operations in convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@torch.inference_mode()
def peak_flops(device: torch.device) -> float:
    """The best float32 rate of this machine, in FLOP/s: of a large convolution or a large matrix product."""
    image = torch.rand(64, 128, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    kernel = torch.rand(128, 128, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    matrix = torch.rand(2048, 2048, device=device)
    work = {"convolution": 2 * image.numel() * kernel[0].numel(), "matmul": 2 * 2048**3}
    run = {"convolution": lambda: F.conv2d(image, kernel, padding=1), "matmul": lambda: matrix @ matrix}
    return max(work[name] / seconds for name, seconds in interleaved(run, rounds=7, calls=2).items())


def measure(name: str, data: str | None, rounds: int, peak: float, device: torch.device) -> dict[str, Any]:
    """All measures of one net, on data of that folder."""
    model = trained(name, data).to(device)
    dataset = VARIANTS[name].dataset
    pixels, labels = load(dataset, "train", data)
    images, labels = normalize(pixels[: 64 * GRADIENTS].to(device), dataset), labels.to(device)
    batch, targets = images[:64], labels[:64]
    batches = [(images[i : i + 64], labels[i : i + 64]) for i in range(0, 64 * GRADIENTS, 64)]
    nets = contenders(model)
    report: dict[str, Any] = {contender: {} for contender in nets}

    for net in nets.values():
        net.train()
    exact = [exact_gradient(model, *pair) for pair in batches]
    steps = {key: (lambda net=net: training_step(net, batch, targets)) for key, net in nets.items()}
    calls = {"l": 20, "mc": 3, "sc": 1}[VARIANTS[name].structure]
    for key, seconds in interleaved(steps, rounds, calls).items():
        row = report[key]
        row["train_s"] = seconds
        errors = [((gradient(nets[key], *p) - e).norm() / e.norm()).item() for p, e in zip(batches, exact, strict=True)]
        row["gradient_error"] = math.sqrt(statistics.fmean(error**2 for error in errors))
        row["evaluations"] = evaluations(nets[key], steps[key])
        nets[key].zero_grad(set_to_none=True)
        row["peak_bytes"] = peak_memory(steps[key], device)
        if key in OURS:  # the counter and the hooks of the others do not go together
            row["convolution_share"] = flops(steps[key]) / peak / seconds

    for net in nets.values():
        net.eval()
    for size in BATCHES:
        with torch.inference_mode():
            runs = {key: (lambda net=net, size=size: net(images[:size])) for key, net in nets.items()}
            for key, seconds in interleaved(runs, rounds, calls if size > 1 else 10).items():
                report[key][f"infer_{size}_s"] = seconds
    reference = solved_layers(model)
    for key, net in nets.items():
        report[key]["unit_errors"] = unit_errors(net, reference, batch[:ENCLOSED])
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=list(VARIANTS), metavar="NET", help=f"default: {', '.join(NETS)}")
    parser.add_argument("--data", help="folder with the data sets (default: $PCDEQ_ZOO_DATA)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--authors", type=Path, metavar="DIR", help="measure against this checkout of their code too")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; one more is not counted")
    parser.add_argument(
        "--output", type=Path, help="JSON file (default: benchmarks/results.json if this is what make benchmark does)"
    )
    args = parser.parse_args()

    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    if args.output and not args.output.parent.is_dir():
        parser.error(f"--output {args.output}: there is no folder {args.output.parent}")
    device, on_gpu = torch.device(args.device), args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU here")
    whole = not (args.nets or args.authors or on_gpu)
    if whole and not args.output and not importlib.util.find_spec("torchdeq"):
        parser.error("benchmarks/results.json is with torchdeq: pip install torchdeq==0.1.0, or give an --output")

    if args.authors:
        BASELINES["authors"] = released(args.authors)
    with full_precision(device):  # without TF32
        peak = peak_flops(device)
    document: dict[str, Any] = {
        "machine": {
            "processor": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "peak_gflops": round(peak / 1e9),
        },
        "settings": OURS,
        "rounds": args.rounds,
        "nets": {},
    }
    output = args.output or (ROOT / "benchmarks" / "results.json" if whole else None)
    for name in tqdm(args.nets or NETS, disable=None):
        try:
            data = data_folder(VARIANTS[name].dataset, args.data)
            document["nets"][name] = measure(name, data, args.rounds, peak, device)
        except DataError as error:
            raise SystemExit(f"no data: {error}") from error
        print(tables({**document, "nets": {name: document["nets"][name]}}), flush=True)
    if output:  # whole: its means are over all nets
        replace_file(output, json.dumps(document, indent=1) + "\n")
    print(tables(document))


if __name__ == "__main__":
    main()
