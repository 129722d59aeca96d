"""What W ≥ 0 is worth for certified training: the same net with other layers in the place of the pcDEQ layers.

    python -m benchmarks.twins --layer pcdeq --eps 0.1 --seed 0 --output runs/twins

One run trains the MC net of MNIST by intervals, on all training images but the last 5,000, and measures these: accuracy
and the share that intervals certify. Nothing is chosen by it. The layers:

    pcdeq     z = σ(W z + x), W ≥ 0 of any size, x = softplus(u): the hull of a box is that of its two ends
    monotone  z = σ(W z + u), W of both signs, D^-1/2 M D^-1/2 with |M| bounded by D: the parametrisation of IBP-monDEQ
              (Wei and Kolter, ICLR 2022, https://openreview.net/forum?id=y1PXylgrXZ), m = 0.5, with its coupled hull
    explicit  z = σ(W σ(x) + x), W ≥ 0: two evaluations of pcdeq, and no equilibrium
    bounded   pcdeq with row sums of W of at most 0.5
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from pcdeq_zoo import VARIANTS, PcDEQConv2d, Solver, forward_with_margins
from pcdeq_zoo.data import load, normalize
from pcdeq_zoo.files import replace_file
from pcdeq_zoo.robustness import least_margin

NAME = "pcdeq1_mc_tanh_mnist"
HELD_OUT = 5000


class Monotone(nn.Module):
    """z = tanh(W ∗ z + u) with W = D^-1/2 M D^-1/2 for any M, D the half sums of the rows and columns of |M| over 0.5.

    The symmetric part of |W| has a spectral radius of at most 0.5, and so has |W|: plain iteration halves the error.
    """

    iterations = 12

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.randn(channels, channels, 3, 3) / (9 * channels) ** 0.5)

    @property
    def weight(self) -> Tensor:
        size = self.m.abs().sum((2, 3))
        scale = ((size.sum(0) + size.sum(1)) / (2 * 0.5)).rsqrt()
        return self.m * scale[:, None, None, None] * scale[:, None, None]

    def forward(self, u: Tensor) -> Tensor:
        z, weight = torch.tanh(u), self.weight
        for _ in range(self.iterations):
            z = torch.tanh(F.conv2d(z, weight, padding=1) + u)
        return z

    def hull(self, lower: Tensor, upper: Tensor, solver: Solver | None = None) -> tuple[Tensor, Tensor]:
        """Of the coupled iteration: an entry of W below 0 takes the other end."""
        weight = self.weight
        both = torch.cat([weight.clamp(min=0), weight.clamp(max=0)], 1)
        ends = torch.cat([lower, upper])
        z = torch.tanh(ends)
        for _ in range(self.iterations):
            other = torch.cat(z.chunk(2)[::-1])
            z = torch.tanh(F.conv2d(torch.cat([z, other], 1), both, padding=1) + ends)
        least, largest = z.chunk(2)
        return least, largest


class Explicit(PcDEQConv2d):
    """Two evaluations."""

    def forward(self, u: Tensor) -> Tensor:
        x, sigma = F.softplus(u, 5), self.sigma
        return sigma(F.conv2d(sigma(x), self.weight, padding=1) + x)

    def hull(self, lower: Tensor, upper: Tensor, solver: Solver | None = None) -> tuple[Tensor, Tensor]:
        return self(lower), self(upper)


class Bounded(PcDEQConv2d):
    """W with row sums of at most 0.5."""

    def _normalized_weight(self) -> Tensor:
        weight = super()._normalized_weight()
        return weight * (0.5 / weight.sum((1, 2, 3), keepdim=True).clamp(min=0.5))


LAYERS = {"pcdeq": None, "monotone": Monotone, "explicit": Explicit, "bounded": Bounded}


def twin(layer: str) -> nn.Module:
    """The MC net of MNIST with such layers."""
    model = timm.create_model(NAME, stop="estimated", tol=1e-3)
    for name, module in model.features.named_children():
        if isinstance(module, PcDEQConv2d) and (kind := LAYERS[layer]):
            settings = {} if kind is Monotone else {"activation": module.activation, "solver": model.solver}
            setattr(model.features, name, kind(module.direction.shape[0], **settings))
    return model


def measure(model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> dict[str, float]:
    """Accuracy, and the share certified by intervals that take solves for exact, in percent."""
    model.eval()
    right = certified = 0
    with torch.no_grad():
        for x, y in zip(images.split(500), labels.split(500), strict=True):
            logits, margins = forward_with_margins(model, normalize(x, VARIANTS[NAME].dataset), y, eps)
            right += int((logits.argmax(1) == y).sum())
            certified += int((least_margin(margins, y) > 0).sum())
    return {"clean": round(100 * right / len(labels), 2), "certified": round(100 * certified / len(labels), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", choices=LAYERS, required=True)
    parser.add_argument("--eps", type=float, choices=(0.1, 0.3), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--output", type=Path, required=True, help="folder, for a JSON file of this run")
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {args.epochs}")

    recipe = replace(VARIANTS[NAME].recipes[f"robust_{args.eps}"], epochs=args.epochs)
    images, labels = load(VARIANTS[NAME].dataset, "train")
    torch.manual_seed(args.seed)
    model = twin(args.layer)
    torch.manual_seed(args.seed)  # the same batches, whatever the layers drew
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    start = time.perf_counter()
    for epoch in range(recipe.epochs):
        model.train()
        batches = torch.randperm(len(images) - HELD_OUT).split(recipe.batch_size)
        for step, batch in enumerate(tqdm(batches, desc=f"epoch {epoch + 1}/{recipe.epochs}", disable=None)):
            passes = epoch + step / len(batches)
            eps = recipe.eps_after(passes)
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate(passes)
            x = normalize(images[batch], VARIANTS[NAME].dataset)
            logits, margins = forward_with_margins(model, x, labels[batch], eps)
            clean, worst = F.cross_entropy(logits, labels[batch]), F.cross_entropy(-margins, labels[batch])
            optimizer.zero_grad()
            clean.lerp(worst, recipe.worst_case_share(eps)).backward()
            optimizer.step()
    found = {"layer": args.layer, "eps": args.eps, "seed": args.seed, "epochs": args.epochs}
    found |= measure(model, images[-HELD_OUT:], labels[-HELD_OUT:], args.eps)
    found["hours"] = round((time.perf_counter() - start) / 3600, 2)
    args.output.mkdir(parents=True, exist_ok=True)
    name = f"{args.layer}-{args.eps}-{args.epochs}epochs-seed{args.seed}.json"
    replace_file(args.output / name, json.dumps(found) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
