"""How the equilibrium of a layer is reached from below and from above, and a picture of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pcdeq_zoo import PcDEQ, PcDEQConv2d, PcDEQLinear

EVALUATIONS = 32


@dataclass(frozen=True)
class Approach:
    """Iterates of one sample: those from 0 rise, those from sup σ fall, since W ≥ 0 and σ does not fall.

    So the equilibrium is between them, and how far they are from one another bounds the error of either.

    Attributes:
        below, above: Shape (EVALUATIONS + 1, C, H, W), float64.
    """

    below: Tensor
    above: Tensor

    @property
    def gaps(self) -> list[float]:
        """Proven relative error of a unit after 1, 2, ... evaluations: the widest gap."""
        return ((self.above - self.below) / self.below.clamp(min=1e-300))[1:].flatten(1).amax(1).tolist()

    @property
    def changes(self) -> list[float]:
        """The criterion of the paper: ‖z_k − z_{k−1}‖ / ‖z_k‖, of all units together."""
        sizes = self.below.flatten(1).norm(dim=1)[1:]
        return (self.below.diff(dim=0).flatten(1).norm(dim=1) / sizes).tolist()


def pcdeq_layers(model: PcDEQ, image: Tensor) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """The pcDEQ layers of a model, by name, with their inputs (1, C, H, W) for an image as it takes them."""
    x = image
    for name, module in model.features.named_children():
        if isinstance(module, PcDEQLinear | PcDEQConv2d):
            yield name, module, x
        with torch.no_grad():
            x = module(x)


@torch.no_grad()
def approach(layer: nn.Module, u: Tensor) -> Approach:
    """The iterates of a layer for an input (1, C, H, W), in float64."""
    step = copy.deepcopy(layer).double().fixed_point_map(u.double())
    ways = []
    for start in (0.0, layer.supremum):
        iterates = [torch.full_like(step.start, start)]
        for _ in range(EVALUATIONS // 2):
            pair = step.pair(iterates[-1])
            iterates += [pair.z1, pair.z2]
        ways.append(torch.cat(iterates).reshape(-1, *u.shape[1:]))
    return Approach(*ways)


def draw_approach(way: Approach, title: str) -> Any:
    """A matplotlib figure: the liveliest feature map by evaluation, one unit between its bounds, the proven error."""
    from matplotlib.figure import Figure

    low = way.below[-1]
    channel = int((low.amax((1, 2)) - low.amin((1, 2))).argmax())
    maps = way.below[:, channel]
    row, column = divmod(int((maps[2] - maps[-1]).abs().argmax()), maps.shape[-1])
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    grid = figure.add_gridspec(2, 10, height_ratios=(1, 1.5))
    for i, count in enumerate((1, 2, 4, 8, EVALUATIONS)):
        axis = figure.add_subplot(grid[0, 2 * i : 2 * i + 2])
        axis.imshow(maps[count].numpy(), vmin=0, vmax=maps.max().item())
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"{count} evaluation{'s' * (count > 1)}", fontsize="medium")
    left, right = figure.add_subplot(grid[1, :5]), figure.add_subplot(grid[1, 5:])
    left.plot(way.below[:, channel, row, column].numpy(), label="from 0")
    left.plot(way.above[:, channel, row, column].numpy(), label="from sup σ")
    left.set(title="One unit: its equilibrium is between the lines", xlabel="Evaluations of W")
    counts = range(1, EVALUATIONS + 1)
    right.semilogy(counts, way.gaps, label="proven: the widest gap between bounds")
    right.semilogy(counts, way.changes, "--", label="the paper's criterion, of all units together")
    right.set(title="Relative error of all units", xlabel="Evaluations of W")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.suptitle(title)
    return figure
