"""What the zoo is measured against: the same networks with their pcDEQ layers solved by others.

`paper` is the algorithm of the paper and its released code, written out plainly; `torchdeq` hands the same map to
torchdeq 0.1.0 (https://github.com/locuslab/torchdeq) with its exact gradient; `authors` is that code itself, where
there is a checkout. All keep PyTorch's default memory order and the batch or sample criterion that they come with, at
the paper's tolerance.
"""

from __future__ import annotations

import copy
import importlib
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from pcdeq_zoo import PcDEQ, PcDEQConv2d, PcDEQLinear

TOL = 1e-4
MAX_EVALS = 200

_SIGMA = {"relu6": nn.ReLU6, "tanh": nn.Tanh, "softsign": nn.Softsign, "sigmoid": nn.Sigmoid}


class Baseline(nn.Module):
    """What stands in for a pcDEQ layer. `evaluations` are those of the last solve, by direction."""

    evaluations: dict[str, int]

    def clamp(self) -> None:
        """Project the parameters onto the nonnegative numbers, which the paper's training loop does after each step."""
        raise NotImplementedError


class _Map(Baseline):
    """The map f(z, x) = σ(W z + x) with weight normalisation, and the input map, as the paper's code has them."""

    def __init__(self, layer: PcDEQLinear | PcDEQConv2d) -> None:
        super().__init__()
        channels = layer.direction.shape[0]
        map_ = (
            nn.Linear(channels, channels, bias=False)
            if isinstance(layer, PcDEQLinear)
            else nn.Conv2d(channels, channels, layer.direction.shape[-1], padding=layer.padding, bias=False)
        )
        self.map = parametrizations.weight_norm(map_)
        with torch.no_grad():
            self.map.parametrizations.weight.original0.copy_(layer.magnitude.clamp(min=0))
            self.map.parametrizations.weight.original1.copy_(layer.direction.clamp(min=0))
        self.sigma = _SIGMA[layer.activation]()
        self.kind = layer.kind
        self.evaluations = {"forward": 0, "backward": 0}

    def f(self, z: Tensor, x: Tensor) -> Tensor:
        """One evaluation; normalises the weight again, as the paper's code does every time."""
        return self.sigma(self.map(z) + x)

    def input_map(self, u: Tensor) -> Tensor:
        u = u.flatten(1) if isinstance(self.map, nn.Linear) else u
        return F.softplus(u, beta=5) if self.kind == 1 else F.relu(u)

    @torch.no_grad()
    def clamp(self) -> None:
        for parameter in self.parameters():
            parameter.clamp_(min=0)


def _iterate(step: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, int]:
    """Plain iteration until the whole batch changes by less than TOL in one norm; returns the evaluations as well."""
    evaluations, change = 0, math.inf
    while change >= TOL and evaluations < MAX_EVALS:
        new = step(z)
        change = (new - z).norm().item() / (new.norm().item() + 1e-5)
        z, evaluations = new, evaluations + 1
    return z, evaluations


class Paper(_Map):
    """Solve from zero without a graph, evaluate once more with one, and solve the adjoint in a hook on that result."""

    def forward(self, u: Tensor) -> Tensor:
        x = self.input_map(u)
        with torch.no_grad():
            z, self.evaluations["forward"] = _iterate(lambda z: self.f(z, x), torch.zeros_like(x))
        z = self.f(z, x)
        start = z.detach().clone().requires_grad_()
        again = self.f(start, x)
        if z.requires_grad:

            def solve_adjoint(grad: Tensor) -> Tensor:
                a, self.evaluations["backward"] = _iterate(
                    lambda a: torch.autograd.grad(again, start, a, retain_graph=True)[0] + grad, grad
                )
                return a

            z.register_hook(solve_adjoint)
        return z.reshape(u.shape)


class TorchDEQ(_Map):
    """torchdeq's implicit layer, with a weight that is normalised once per forward, as its own normalisation is."""

    def __init__(self, layer: PcDEQLinear | PcDEQConv2d, solver: str) -> None:
        super().__init__(layer)
        from torchdeq import get_deq

        settings: dict[str, Any] = {
            "f_solver": solver,
            "b_solver": solver,
            "f_max_iter": MAX_EVALS,
            "b_max_iter": MAX_EVALS,
            "f_tol": TOL,
            "b_tol": TOL,
            "f_stop_mode": "rel",
            "b_stop_mode": "rel",
        }
        self.deq = get_deq(ift=True, **settings)

    def forward(self, u: Tensor) -> Tensor:
        x, weight = self.input_map(u), self.map.weight
        padding = {} if isinstance(self.map, nn.Linear) else {"padding": self.map.padding}
        function = F.linear if isinstance(self.map, nn.Linear) else F.conv2d

        def f(z: Tensor) -> Tensor:
            return self.sigma(function(z, weight, **padding) + x)

        (z, *_), info = self.deq(f, torch.zeros_like(x), backward_writer=self._count)
        self.evaluations["forward"] = int(info["nstep"].max())
        return z.reshape(u.shape)

    def _count(self, info: dict[str, Tensor]) -> None:
        self.evaluations["backward"] = int(info["nstep"].max())


class Released(Baseline):
    """A block of the released code with the weights of a layer."""

    def __init__(self, layer: PcDEQLinear | PcDEQConv2d, blocks: Any) -> None:
        super().__init__()
        self.flat = isinstance(layer, PcDEQLinear)
        kind = f"{'Linear' if self.flat else 'Conv'}PcDEQ{layer.kind}Block"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its weight normalisation is of an older PyTorch
            self.block = getattr(blocks, kind)(layer.direction.shape[0], layer.activation)
        with torch.no_grad():
            self.block.deq.f.W.weight_g.copy_(layer.magnitude.clamp(min=0))
            self.block.deq.f.W.weight_v.copy_(layer.direction.clamp(min=0))

    @property
    def evaluations(self) -> dict[str, int]:  # type: ignore[override]
        return {"forward": self.block.deq.iter_forward, "backward": self.block.deq.iter_backward}

    def forward(self, u: Tensor) -> Tensor:
        # It registers a hook on its output, which needs a graph; its own test loop has one too.
        with torch.inference_mode(False), torch.enable_grad():
            return self.block(u.flatten(1) if self.flat else u).reshape(u.shape)

    def clamp(self) -> None:
        self.block.clamp()


def released(folder: Path) -> Callable[[PcDEQLinear | PcDEQConv2d], Baseline]:
    """What replaces a layer by the authors' code, from a checkout of https://github.com/mateuszgabor/pcdeq.

    Raises:
        SystemExit: The folder is none.
    """
    if missing := [
        name for name in ("blocks.py", "layers.py", "solvers.py", "utils.py") if not (folder / name).is_file()
    ]:
        raise SystemExit(f"{folder} is no checkout of https://github.com/mateuszgabor/pcdeq: no {', '.join(missing)}")
    sys.path.append(str(folder.resolve()))
    blocks = importlib.import_module("blocks")
    return lambda layer: Released(layer, blocks)


BASELINES: dict[str, Callable[[PcDEQLinear | PcDEQConv2d], Baseline]] = {
    "paper": Paper,
    "torchdeq": lambda layer: TorchDEQ(layer, "fixed_point_iter"),
    "torchdeq anderson": lambda layer: TorchDEQ(layer, "anderson"),
}


def baseline(model: PcDEQ, name: str) -> nn.Module:
    """A copy of `model` with its pcDEQ layers replaced by `BASELINES[name]`, and PyTorch's pools and memory order."""
    features = copy.deepcopy(model.features)
    for key, layer in list(features.named_children()):
        if isinstance(layer, PcDEQLinear | PcDEQConv2d):
            setattr(features, key, BASELINES[name](layer))
        elif isinstance(layer, nn.MaxPool2d):
            setattr(features, key, nn.MaxPool2d(layer.kernel_size, layer.stride, layer.padding))
    return nn.Sequential(features, copy.deepcopy(model.head)).to(memory_format=torch.contiguous_format)
