"""Sound intervals of all outputs of a module over a box of inputs, in floating point.

Each rule bounds what its module computes in exact arithmetic, from its parameters as stored, for every input in the
box. Rounding errors are bounded by their worst case, n u for a sum of n terms with u the unit roundoff (Higham,
Accuracy and Stability of Numerical Algorithms, 2002, chapter 3), and added to the width; those inside a pcDEQ layer are
covered by its certificate (docs/certificate.md). Gradients flow through all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn

from pcdeq_zoo.pcdeq import PcDEQ
from pcdeq_zoo.pooling import CompactMaxPool2d
from pcdeq_zoo.solver import Solver

__all__ = ["TINY", "Affine", "Box", "affine", "interval", "modules_in_order", "rounding"]

TINY = 1e-30  # far more than underflow takes of a sum

# They keep order: outputs do not fall where inputs rise. The first ones do not round.
_EXACT = (nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Identity, nn.Dropout)
_MEANS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, SelectAdaptivePool2d)
_SMOOTH = (nn.Softplus, nn.Tanh, nn.Sigmoid, nn.Softsign)
_AFFINE = (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)


def _supported(module: nn.Module) -> bool:
    """Whether there are bounds of this module: because it is known, or has a method `hull` of its own.

    Not of subclasses, which may compute something else, but for the zoo's own.
    """
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return False
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is None:
        return False
    kinds = (*_EXACT, *_MEANS, *_SMOOTH, *_AFFINE)
    return hasattr(module, "hull") or isinstance(module, CompactMaxPool2d) or type(module) in kinds


_HEAD = ("pool", "drop", "fc")


def modules_in_order(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules that the input passes through one after the other, and their names.

    Args:
        model: Of the zoo, or an `nn.Sequential`, of others as well, of modules that have bounds.
        name: Of the model itself.

    Raises:
        TypeError: A module without bounds.
    """
    if isinstance(model, PcDEQ):
        parts = [("features", model.features), *((f"head.{part}", getattr(model.head, part)) for part in _HEAD)]
        for part, module in parts:
            yield from modules_in_order(module, part)
    elif isinstance(model, nn.Sequential):
        for part, module in model.named_children():
            yield from modules_in_order(module, f"{name}.{part}".strip("."))
    elif _supported(model):
        yield name, model
    else:
        raise TypeError(
            f"there are no bounds of {name or 'the model'}, {model}: a model must be of this zoo, or an nn.Sequential "
            "of convolutions and pools in 2-D, Linear, BatchNorm with running statistics, Flatten, ReLU, ReLU6, "
            "Hardtanh, Softplus, Tanh, Sigmoid, Softsign, Dropout, Identity and pcDEQ layers"
        )


def rounding(x: Tensor, terms: int) -> float:
    """Largest relative error of a sum of so many products, and of eight operations more, in the dtype of x."""
    return (terms + 8) * torch.finfo(x.dtype).eps / 2


class Box(NamedTuple):
    """All x with lower ≤ x ≤ upper, entry by entry; shapes (N, ...)."""

    lower: Tensor
    upper: Tensor

    @property
    def center(self) -> Tensor:
        return (self.lower + self.upper) / 2

    @property
    def radius(self) -> Tensor:
        """Half the width, and what the rounding of this and of the center may take."""
        eps = torch.finfo(self.lower.dtype).eps
        return (self.upper - self.lower) * (0.5 + eps) + eps * self.magnitude

    @property
    def magnitude(self) -> Tensor:
        """max |x|."""
        return torch.maximum(self.lower.abs(), self.upper.abs())

    def widened(self, width: Tensor) -> Box:
        """With both ends moved outwards."""
        return Box(self.lower - width, self.upper + width)


class Affine(NamedTuple):
    """A module x ↦ A x + b, and what its bounds need of it.

    Attributes:
        function: x ↦ A x + b.
        spread: x ↦ |A| x, for x ≥ 0.
        offset: |b| or more, to be broadcast to the output.
        terms: Most products in the sum of an output, which is off by no more than `rounding(terms)` (|A| |x| + |b|).
        transposed_terms: Most products in a sum of Aᵀ.
    """

    function: Callable[[Tensor], Tensor]
    spread: Callable[[Tensor], Tensor]
    offset: Tensor
    terms: int
    transposed_terms: int

    def magnitude(self, x: Tensor) -> Tensor:
        """|A| x + |b|, for x ≥ 0."""
        return self.spread(x) + self.offset

    def interval(self, box: Box) -> Box:
        """Exact but for rounding: the outputs at the corners that the signs of a row of A pick."""
        center, radius = box.center, box.radius
        share = rounding(center, self.terms)
        output = self.function(center)
        width = self.spread(radius + share * (center.abs() + radius)) * (1 + share) + (share * self.offset + TINY)
        return Box(output, output).widened(width)


def affine(module: nn.Module, x: Tensor, clean: Tensor | None = None) -> Affine | None:
    """The affine form of a module; None if it is not affine.

    Args:
        module: Any.
        x: An input of it, of which only the shape counts.
        clean: The batch whose statistics a BatchNorm in training mode goes by.
    """
    zero = x.new_zeros(())
    if isinstance(module, nn.Conv2d):
        where: Any = (module.stride, module.padding, module.dilation, module.groups)
        weight, bias = module.weight, module.bias
        return Affine(
            lambda x: F.conv2d(x, weight, bias, *where),
            lambda x: F.conv2d(x, weight.abs(), None, *where),
            zero if bias is None else bias.abs().view(-1, 1, 1),
            weight[0].numel() + 1,
            weight.shape[0] // module.groups * weight[0, 0].numel(),
        )
    if isinstance(module, nn.Linear):
        weight, bias = module.weight, module.bias
        return Affine(
            lambda x: F.linear(x, weight, bias),
            lambda x: F.linear(x, weight.abs()),
            zero if bias is None else bias.abs(),
            weight.shape[1] + 1,
            weight.shape[0],
        )
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        mean, variance = module.running_mean, module.running_var
        if module.training:
            assert clean is not None
            axes = [0, *range(2, clean.ndim)]
            mean, variance = clean.mean(axes), clean.var(axes, correction=0)
        assert mean is not None
        assert variance is not None
        shape = (-1, *[1] * (x.ndim - 2))
        scale = torch.rsqrt(variance + module.eps)
        scale = scale if module.weight is None else scale * module.weight
        bias = mean.new_zeros(()) if module.bias is None else module.bias
        shift = (bias - mean * scale).view(shape)
        scale, offset = scale.view(shape), (bias.abs() + (mean * scale).abs()).view(shape)
        return Affine(lambda x: x * scale + shift, lambda x: x * scale.abs(), offset, 1, 1)
    if isinstance(module, nn.AvgPool2d | nn.AdaptiveAvgPool2d) or (
        isinstance(module, SelectAdaptivePool2d) and module.pool_type == "avg"
    ):
        return Affine(module, module, zero, size := x.shape[2:].numel(), size)
    if isinstance(module, nn.Flatten | nn.Identity | nn.Dropout):
        return Affine(module, module, zero, 1, 1)
    return None


def interval(module: nn.Module, box: Box, solver: Solver | None = None, clean: Tensor | None = None) -> Box:
    """All outputs of a module for inputs in a box.

    Args:
        module: One that `modules_in_order` gives, in evaluation mode or with `clean`.
        box: Of its inputs.
        solver: Of pcDEQ layers; by default their own. The bounds are proven if it is "certified". Handed to any `hull`,
            see `PcDEQConv2d.hull`.
        clean: See `affine`.
    """
    hull: Any = getattr(module, "hull", None)
    if hull is not None:
        return Box(*hull(*box, solver))
    if isinstance(module, _EXACT):
        return Box(module(box.lower), module(box.upper))
    if isinstance(module, _SMOOTH):
        outputs = Box(module(box.lower), module(box.upper))
        return outputs.widened(rounding(box.lower, 8) * outputs.magnitude + TINY)
    if (form := affine(module, box.lower, clean)) is not None and not isinstance(module, _MEANS):
        return form.interval(box)
    outputs = Box(module(box.lower), module(box.upper))
    return outputs.widened(rounding(box.lower, box.lower.shape[2:].numel()) * module(box.magnitude) + TINY)
