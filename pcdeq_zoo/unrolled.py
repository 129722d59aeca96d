"""Models without equilibria: each layer a fixed number of evaluations, of operators that any verifier reads."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcdeq_zoo.activations import ACTIVATIONS, INPUT_FLOOR
from pcdeq_zoo.intervals import modules_in_order
from pcdeq_zoo.layers import PcDEQConv2d, PcDEQLinear
from pcdeq_zoo.pooling import CompactMaxPool2d

__all__ = ["unrolled"]


class _Unrolled(nn.Module):
    """z ← σ(W z + x), so many times from 0, for the W that the layer has now."""

    weight: Tensor

    def __init__(self, layer: PcDEQLinear | PcDEQConv2d, evaluations: int) -> None:
        super().__init__()
        self.activation, self.kind, self.evaluations = layer.activation, layer.kind, evaluations
        weight = layer.weight.detach().as_subclass(Tensor).clone()
        self.register_buffer("weight", weight.to(layer.direction.dtype))

    def forward(self, u: Tensor) -> Tensor:
        x = F.softplus(5 * u) / 5 + INPUT_FLOOR if self.kind == 1 else F.relu(u)
        z = self._sigma(x)
        for _ in range(self.evaluations - 1):
            z = self._sigma(self._product(z) + x)
        return z

    def _product(self, z: Tensor) -> Tensor:
        if self.weight.ndim == 4:
            return F.conv2d(z, self.weight, padding=self.weight.shape[-1] // 2)
        if z.shape[1:] == (len(self.weight), 1, 1):  # as in the zoo's; without a change of shape for verifiers to read
            return F.conv2d(z, self.weight[:, :, None, None])
        return F.linear(z.flatten(1), self.weight).view_as(z)

    def _sigma(self, p: Tensor) -> Tensor:
        if self.activation == "softsign":
            return 1 - torch.reciprocal(1 + p)  # for p ≥ 0; verifiers do not know the other form
        return ACTIVATIONS[self.activation].function(p)


class _PairwiseMaxPool(nn.Module):
    """Max of 3x3 windows of nonnegative images, by maxima of two, shifted by convolutions, which pad with 0.

    Verifiers that have no linear bounds of overlapping windows have some of both.
    """

    left: Tensor
    right: Tensor
    left_turned: Tensor
    right_turned: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        left = torch.tensor([1.0, 0.0, 0.0]).expand(channels, 1, 1, 3).contiguous()
        for name, kernel in {"left": left, "right": left.flip(3)}.items():
            self.register_buffer(name, kernel)
            self.register_buffer(f"{name}_turned", kernel.transpose(2, 3).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        for kernels, padding in (((self.left, self.right), (0, 1)), ((self.left_turned, self.right_turned), (1, 0))):
            first, second = (F.conv2d(x, kernel, padding=padding, groups=x.shape[1]) for kernel in kernels)
            x = torch.maximum(torch.maximum(x, first), second)
        return x


def unrolled(model: nn.Module, evaluations: int) -> nn.Sequential:
    """A copy of a model as an explicit net: for verifiers (auto_LiRPA, for one), attacks through all steps, ONNX.

    W ≥ 0 makes intervals of the unrolled net exact at each step, so those of a verifier are those of `interval_bounds`,
    but for what the evaluations leave open: with sigmoid at most a share of 2 ** -evaluations of each unit, with others
    what trying more of them shows. See docs/robustness.md.

    Args:
        model: Of the zoo, or an `nn.Sequential` of modules that have bounds; see `certify`.
        evaluations: Of σ(W z + x) in each pcDEQ layer, from z = 0; at least 1.

    Raises:
        ValueError, TypeError: No number of evaluations, or modules without bounds.
    """
    if isinstance(evaluations, bool) or not isinstance(evaluations, int) or evaluations < 1:
        raise ValueError(f"evaluations must be an integer of at least 1, got {evaluations!r}")
    modules: list[nn.Module] = []
    for name, module in modules_in_order(model):
        if type(module) is PcDEQLinear or type(module) is PcDEQConv2d:
            modules.append(_Unrolled(module, evaluations))
        elif isinstance(module, PcDEQLinear | PcDEQConv2d):
            raise TypeError(f"{name}, {module}, may compute something else than the layer it is a subclass of")
        elif (
            isinstance(module, CompactMaxPool2d)
            and modules
            and isinstance(modules[-1], _Unrolled)
            and modules[-1].weight.ndim == 4
        ):
            modules.append(_PairwiseMaxPool(len(modules[-1].weight)))
        elif not isinstance(module, nn.Identity | nn.Dropout):
            modules.append(module)
    return copy.deepcopy(nn.Sequential(*modules)).eval()
