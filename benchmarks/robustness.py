"""Accuracy against the change of the pixels: of images as they are, attacked, and proven.

    python -m benchmarks.robustness [--images 1000] ['pcdeq1_mc_*' ...]

For each checkpoint that was trained against changes of the pixels, and the ordinary one of the same net, on the first
test images; writes benchmarks/robustness.json, of which `python -m tools.report` makes docs/figures/robustness.svg.
Those that no GLOB matches stay there as they are.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
from pathlib import Path
from typing import Any

import timm
import torch
from tqdm import tqdm

from pcdeq_zoo import certify, pgd
from pcdeq_zoo.data import load, normalize
from pcdeq_zoo.files import replace_file
from pcdeq_zoo.weights import Checkpoint, checkpoints

RESULTS = Path(__file__).with_name("robustness.json")

# In multiples of the eps that the robust net was trained for.
SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.25, 1.5)


def curve(checkpoint: Checkpoint, eps_of_training: float, count: int) -> dict[str, Any]:
    """Shares of the first test images, in percent, by eps: left right by PGD, proven by intervals, by linear bounds."""
    model = timm.create_model(checkpoint.name, pretrained=True).eval()
    dataset = checkpoint.variant.dataset
    images, labels = load(dataset, "test")
    x, y = normalize(images[:count], dataset), labels[:count]
    with torch.no_grad():
        clean = model(x).argmax(1) == y
    found: dict[str, Any] = {"eps": [], "pgd": [], "interval": [], "linear": []}
    generator = torch.Generator().manual_seed(0)
    for eps in (share * eps_of_training for share in SHARES):
        proven = certify(model, x, y, eps)
        survives = proven.certified
        left = clean & ~survives
        with torch.no_grad():
            attacked = pgd(model, x[left], y[left], eps, generator=generator)
            survives[left] = model(attacked).argmax(1) == y[left]
        found["eps"].append(round(eps, 6))
        found["pgd"].append(_percent(survives))
        found["interval"].append(_percent(proven.by_intervals))
        found["linear"].append(_percent(proven.certified))
    return found


def _percent(hits: torch.Tensor) -> float:
    return round(100 * hits.double().mean().item(), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", default=["*"], metavar="GLOB", help="default: all")
    parser.add_argument("--images", type=int, default=1000)
    args = parser.parse_args()
    if args.images < 1:
        parser.error(f"--images must be at least 1, got {args.images}")
    shipped = checkpoints()
    robust = {name: checkpoint for name, checkpoint in shipped.items() if checkpoint.recipe.eps}
    chosen = [name for name in robust if any(fnmatch.fnmatch(name, glob) for glob in args.checkpoints)]
    if not chosen:
        parser.error(f"no checkpoint matches {' '.join(args.checkpoints)}; there are {', '.join(robust)}")
    known = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else []
    panels = {next(iter(panel["curves"])): panel for panel in known}
    for name in tqdm(chosen, disable=None):
        ordinary = shipped[f"{robust[name].variant.name}.{robust[name].variant.default_recipe}"]
        eps = robust[name].recipe.eps
        curves = {it.name: curve(it, eps, args.images) for it in (robust[name], ordinary)}
        panels[name] = {"eps": eps, "images": args.images, "curves": curves}
        replace_file(RESULTS, json.dumps([panels[name] for name in robust if name in panels], indent=1) + "\n")


if __name__ == "__main__":
    main()
