"""Sound intervals of all outputs of a module over a box of inputs, in floating point.

Each rule bounds what its module computes in exact arithmetic, from its parameters as stored, for every input in the
box. Rounding errors are bounded by their worst case, n u for a sum of n products in any order, with u the unit roundoff
(Jeannerod and Rump, SIAM J. Matrix Anal. Appl. 34, 2013), and added to the width; those inside a pcDEQ layer are
covered by its certificate (docs/certificate.md). Gradients flow through all of it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn

from pcdeq_zoo.pcdeq import PcDEQ, PcDEQHead
from pcdeq_zoo.pooling import CompactMaxPool2d
from pcdeq_zoo.solver import Solver

__all__ = ["TINY", "Affine", "Box", "affine", "has_own_hull", "interval", "modules_in_order", "rounding"]

TINY = 1e-30  # far more than underflow takes of a sum

# They keep order: outputs do not fall where inputs rise. The first ones do not round.
_EXACT = (nn.MaxPool2d, CompactMaxPool2d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.ReLU, nn.ReLU6, nn.Identity, nn.Dropout)
_MEANS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, SelectAdaptivePool2d)
_SMOOTH = (nn.Softplus, nn.Tanh, nn.Sigmoid, nn.Softsign, nn.Hardtanh)
_AFFINE = (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)
_KINDS = (*_EXACT, *_MEANS, *_SMOOTH, *_AFFINE)


def has_own_hull(module: nn.Module) -> bool:
    """Whether it has a method `hull`, and that is of its `forward`: of the class that defines it, or a subclass."""
    found = {name: next((c for c in type(module).__mro__ if name in vars(c)), None) for name in ("hull", "forward")}
    return found["hull"] is not None and found["forward"] is not None and issubclass(found["hull"], found["forward"])


def _is_plain(module: nn.Module) -> bool:
    """Whether nothing of this one instance changes what its class computes: no hook, and no method of its own."""
    own = (name for name, value in vars(module).items() if callable(value) and hasattr(type(module), name))
    return not (module._forward_hooks or module._forward_pre_hooks or any(own))


def _is_sequential(module: nn.Module) -> bool:
    kind, base = type(module), nn.Sequential
    same = kind.forward is base.forward and kind.__call__ is base.__call__
    return same and kind.__iter__ is base.__iter__  # type: ignore[attr-defined]


def _why_not(module: nn.Module) -> str:
    """Why there are no bounds of a module, or nothing. A subclass may compute something else than its base."""
    if not all(map(_is_plain, module.modules())):
        return "it has hooks, or methods of its own"
    if has_own_hull(module):
        return ""
    if type(module) not in _KINDS:
        return "it is none of those that have"
    unusual = {
        "padding_mode": ("zeros",),
        "return_indices": (False,),
        "start_dim": (1,),
        "end_dim": (-1,),
        "track_running_stats": (True,),
    }
    for name, values in unusual.items():
        if getattr(module, name, values[0]) not in values:
            return f"of its {name}, {getattr(module, name)}"
    if isinstance(module, nn.AvgPool2d) and module.divisor_override is not None and module.divisor_override <= 0:
        return f"of its divisor_override, {module.divisor_override}"
    if isinstance(module, nn.Softplus) and not (module.beta > 0 and module.threshold >= 20):
        return f"of its beta, {module.beta}, and threshold, {module.threshold}"
    return ""


_HEAD = ("pool", "drop", "fc")


def modules_in_order(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that the input passes through one after the other, and their names.

    Args:
        model: Of the zoo, or an `nn.Sequential`, of others as well, of modules that have bounds. A module of another
            kind has them if its class has a method `hull` like `PcDEQConv2d.hull`.

    Raises:
        TypeError: A module without bounds.
    """
    modules = list(_modules(model, ""))
    if not modules:
        raise TypeError("the model is an empty nn.Sequential")
    return modules


def _modules(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    if type(module) is PcDEQ and type(module.head) is PcDEQHead and _is_plain(module) and _is_plain(module.head):
        yield from _modules(module.features, "features")
        for part in _HEAD:
            yield from _modules(getattr(module.head, part), f"head.{part}")
    elif _is_sequential(module) and _is_plain(module):
        for part, child in module._modules.items():  # not named_children, which leaves out what comes again
            if child is not None:
                yield from _modules(child, f"{name}.{part}".strip("."))
    elif reason := _why_not(module):
        what = type(module).__name__ if any(module.children()) else module
        raise TypeError(
            f"there are no bounds of {name or 'the model'}, {what}, because {reason}: a model must be of this zoo, "
            "or an nn.Sequential of convolutions and pools in 2-D, Linear, BatchNorm with running statistics, Flatten, "
            "ReLU, ReLU6, Hardtanh, Softplus, Tanh, Sigmoid, Softsign, Dropout, Identity and pcDEQ layers"
        )
    else:
        if getattr(module, "inplace", False):
            module = copy.copy(module)
            module.inplace = False  # type: ignore[assignment]
        yield name, module


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

    def interval(self, box: Box, *, proven: bool) -> Box:
        """Exact but for rounding: the outputs at the corners that the signs of a row of A pick."""
        center = box.center
        output = self.function(center)
        if not proven:
            width = self.spread(box.upper - center)
        else:
            radius, share = box.radius, rounding(center, self.terms)
            width = self.spread(radius + share * (center.abs() + radius)) / (1 - share) + (share * self.offset + TINY)
        return Box(output - width, output + width)


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
        if not module.training and bool((variance < 0).any()):
            raise ValueError(f"there are no bounds of {module}: its running_var is below 0, {variance.min():g}")
        mean, shape = mean.double(), (-1, *[1] * (x.ndim - 2))
        scale = torch.rsqrt(variance.double() + module.eps)
        scale = scale if module.weight is None else scale * module.weight.double()
        bias = mean.new_zeros(()) if module.bias is None else module.bias.double()
        values = scale, bias - mean * scale, bias.abs() + (mean * scale).abs()
        scale, shift, offset = (value.to(x.dtype).view(shape) for value in values)
        spread = scale.abs() + 2 * torch.finfo(x.dtype).tiny / rounding(x, 1)  # a scale may underflow, and x be huge
        return Affine(lambda x: x * scale + shift, lambda x: x * spread, offset, 1, 1)
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
        solver: Of pcDEQ layers; the bounds are proven if it is "certified". None for their own, and bounds to train
            with, without rounding, which takes a tenth of a step. Handed to any `hull`, see `PcDEQConv2d.hull`.
        clean: See `affine`.
    """
    lower, upper = _interval(module, box, solver, clean)
    if solver is None:
        return Box(lower, upper)
    known = lower.isfinite() & upper.isfinite()  # what overflows may be anything
    return Box(lower.masked_fill(~known, -math.inf), upper.masked_fill(~known, math.inf))


def _interval(module: nn.Module, box: Box, solver: Solver | None, clean: Tensor | None) -> Box:
    hull: Any = getattr(module, "hull", None)
    if hull is not None:
        return Box(*hull(*box, solver))
    if isinstance(module, _AFFINE):
        form = affine(module, box.lower, clean)
        assert form is not None
        return form.interval(box, proven=solver is not None)
    outputs = Box(module(box.lower), module(box.upper))
    if solver is None:
        return outputs
    if isinstance(module, _SMOOTH):
        outputs = outputs.widened(_error(module, box) * outputs.magnitude + (_jump(module) + TINY))
    if isinstance(module, _MEANS):
        terms = box.lower.shape[2:].numel()
        outputs = outputs.widened(rounding(box.lower, terms) * module(box.magnitude) + TINY)
    return outputs


def _error(module: nn.Module, box: Box) -> Tensor | float:
    """Largest relative error of a smooth function. Softplus takes exp(βx), where the rounding of βx becomes |βx| u."""
    if isinstance(module, nn.Softplus):
        return (1 + module.beta * box.magnitude) * rounding(box.lower, 8)
    return rounding(box.lower, 8)


def _jump(module: nn.Module) -> float:
    """By how much PyTorch's softplus is not continuous: it is the identity where βx is above its threshold."""
    return math.exp(-module.threshold) / module.beta if isinstance(module, nn.Softplus) else 0.0
