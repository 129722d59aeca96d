"""Measure speed, accuracy and memory of the zoo's solves against other implementations, on one machine in one run.

    python benchmarks/run.py                     every net and measure; prints tables, writes benchmarks/results.json
    python benchmarks/run.py --nets pcdeq1_mc_relu6_cifar --rounds 5

All contenders solve the same network with the same trained weights, one after the other in every round, so that a
machine that slows down slows all of them; figures are medians over the rounds, and speeds are ratios. Nothing else may
run meanwhile. Nets without a checkpoint in the package are first trained for 400 steps by the first epoch of the
paper's recipe (minutes to a quarter of an hour each, kept in runs/benchmark): by then the evaluations per layer have
stopped rising. Errors are against float64 solves of the same layer inputs, and of the whole network for gradients.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
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
from baselines import BASELINES, Baseline, baseline
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from pcdeq_zoo import VARIANTS, PcDEQ, PcDEQConv2d, PcDEQLinear, enclosure, record_solves
from pcdeq_zoo.data import load, normalize
from pcdeq_zoo.weights import results

ROOT = Path(__file__).parents[1]

NETS = (
    "pcdeq1_l_tanh_mnist",
    "pcdeq1_mc_relu6_mnist",
    "pcdeq1_mc_relu6_cifar",
    "pcdeq1_mc_tanh_cifar",
    "pcdeq2_mc_sigmoid_cifar",
    "pcdeq1_sc_softsign_cifar",
    "pcdeq1_mc_relu6_cifar_large",
)

# Settings of the solver, by the name that the tables give them.
OURS: dict[str, dict[str, Any]] = {
    "float32": {"stop": "estimated", "tol": 1e-3},
    "certified": {"stop": "certified", "tol": 1e-3},
}

BATCHES = (1, 64, 512)
TRAINING_STEPS = 400


def trained(name: str, data: str | None) -> PcDEQ:
    """The zoo's checkpoint, or one of 400 training steps."""
    if any(checkpoint.split(".")[0] == name for checkpoint in results()):
        return timm.create_model(name, pretrained=True)
    run = ROOT / "runs" / "benchmark" / name
    if not (run / "model.safetensors").is_file():
        print(f"training {name} for {TRAINING_STEPS} steps", flush=True)
        images = TRAINING_STEPS * VARIANTS[name].recipe.batch_size
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
        command += ["--mixed_precision=no", "--dynamo_backend=no", str(ROOT / "recipes" / "train.py"), "--model", name]
        command += ["--epochs=1", f"--limit-train={images}", "--output", str(run)]
        subprocess.run([*command, *(["--data", data] if data else [])], check=True, stdout=subprocess.DEVNULL)
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(run / "model.safetensors")})


def contenders(model: PcDEQ) -> dict[str, nn.Module]:
    """The same network, solved in every way that is compared."""
    nets: dict[str, nn.Module] = {name: baseline(model, name) for name in BASELINES}
    for name, settings in OURS.items():
        nets[name] = copy.deepcopy(model)
        for key, value in settings.items():
            setattr(nets[name].solver, key, value)
    return nets


def training_step(net: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Forward, backward and, where the layers need it, the projection of W."""
    net.zero_grad(set_to_none=True)
    F.cross_entropy(net(images), labels).backward()
    for layer in net.modules():
        if isinstance(layer, Baseline):
            layer.clamp()


def interleaved(functions: dict[str, Callable[[], Any]], rounds: int, calls: int) -> dict[str, float]:
    """Median seconds of a call of each function; round by round, `calls` of each in turn."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            function()  # brings its data back into the cache
            start = time.perf_counter()
            for _ in range(calls):
                function()
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
            lower, upper = enclosure(reference[name], inputs[0], tol=1e-10)
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
    exact.solver.stop, exact.solver.tol, exact.solver.max_evals = "residual", 1e-12, 2000
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


def peak_memory(step: Callable[[], Any]) -> int:
    """Most bytes that a step holds beyond what was there before, from the allocator's own log."""
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
def peak_flops() -> float:
    """The best float32 rate of this machine, in FLOP/s: of a large convolution or a large matrix product."""
    image = torch.rand(64, 128, 32, 32).contiguous(memory_format=torch.channels_last)
    kernel = torch.rand(128, 128, 3, 3).contiguous(memory_format=torch.channels_last)
    matrix = torch.rand(2048, 2048)
    work = {"convolution": 2 * image.numel() * kernel[0].numel(), "matmul": 2 * 2048**3}
    run = {"convolution": lambda: F.conv2d(image, kernel, padding=1), "matmul": lambda: matrix @ matrix}
    return max(work[name] / seconds for name, seconds in interleaved(run, rounds=7, calls=2).items())


def measure(name: str, data: str | None, rounds: int, peak: float) -> dict[str, Any]:
    """All measures of one net."""
    model = trained(name, data)
    dataset = VARIANTS[name].dataset
    pixels, labels = load(dataset, "train", data)
    images = normalize(pixels[: max(BATCHES)], dataset)
    batch, targets = images[:64], labels[:64]
    nets = contenders(model)
    report: dict[str, Any] = {contender: {} for contender in nets}

    for net in nets.values():
        net.train()
    exact = exact_gradient(model, batch, targets)
    steps = {key: (lambda net=net: training_step(net, batch, targets)) for key, net in nets.items()}
    calls = 1 if VARIANTS[name].structure != "l" else 20
    for key, seconds in interleaved(steps, rounds, calls).items():
        row = report[key]
        row["train_s"] = seconds
        row["gradient_error"] = ((gradient(nets[key], batch, targets) - exact).norm() / exact.norm()).item()
        row["evaluations"] = evaluations(nets[key], steps[key])
        nets[key].zero_grad(set_to_none=True)
        row["peak_bytes"] = peak_memory(steps[key])
        if key in OURS:  # the counter and the hooks of the others do not go together
            row["convolution_share"] = flops(steps[key]) / peak / seconds

    for net in nets.values():
        net.eval()
    for size in BATCHES:
        with torch.inference_mode():
            runs = {key: (lambda net=net, size=size: net(images[:size])) for key, net in nets.items()}
            for key, seconds in interleaved(runs, rounds, calls if size > 1 else 20).items():
                report[key][f"infer_{size}_s"] = seconds
    reference = solved_layers(model)
    for key, net in nets.items():
        report[key]["unit_errors"] = unit_errors(net, reference, batch)
    return report


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


MEASURES = {
    "train_s": "Training step, batch 64",
    "infer_64_s": "Inference, batch 64",
    "infer_512_s": "Inference, batch 512",
    "infer_1_s": "Inference, batch 1",
}


def tables(document: dict[str, Any]) -> str:
    """The document as Markdown: speed ratios for each measure, then accuracy, evaluations and memory per net."""
    nets: dict[str, Any] = document["nets"]
    lines = []
    for measure_name, title in MEASURES.items():
        header = [f"{ours} / {theirs}" for ours in OURS for theirs in BASELINES]
        lines += [f"\n**{title}: times faster than**\n", f"| Net | {' | '.join(header)} |"]
        lines.append("|---|" + "--:|" * len(header))
        ratios = [
            [row[theirs][measure_name] / row[ours][measure_name] for ours in OURS for theirs in BASELINES]
            for row in nets.values()
        ]
        for name, values in zip(nets, ratios, strict=True):
            lines.append(f"| `{name}` | {' | '.join(f'{value:.2f}' for value in values)} |")
        means = [geometric_mean(list(column)) for column in zip(*ratios, strict=True)]
        lines.append(f"| geometric mean | {' | '.join(f'{value:.2f}' for value in means)} |")
    lines += [
        "\n**Accuracy, evaluations of W and memory of a training step**\n",
        "| Net | Solver | Worst unit error | Gradient error | Forward | Backward | Peak, MB | Convolutions, % |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in nets.items():
        for key, values in row.items():
            counts = [
                " / ".join(f"{count:g}" for count in values["evaluations"][way].values())
                for way in ("forward", "backward")
            ]
            share = f"{100 * values['convolution_share']:.0f}" if "convolution_share" in values else ""
            lines.append(
                f"| `{name}` | {key} | {max(values['unit_errors'].values()):.1e} | {values['gradient_error']:.1e} "
                f"| {counts[0]} | {counts[1]} | {values['peak_bytes'] / 1e6:.1f} | {share} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(VARIANTS), metavar="NET")
    parser.add_argument("--data", help="as for recipes/train.py")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results.json")
    args = parser.parse_args()

    peak = peak_flops()
    document: dict[str, Any] = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "peak_gflops": round(peak / 1e9),
        },
        "settings": OURS,
        "rounds": args.rounds,
        "nets": {},
    }
    for name in tqdm(args.nets):
        document["nets"][name] = measure(name, args.data, args.rounds, peak)
    temporary = args.output.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    temporary.replace(args.output)
    print(tables(document))


if __name__ == "__main__":
    main()
