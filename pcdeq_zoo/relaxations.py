"""Linear lower bounds of functionals of a module's outputs, in its inputs over a box: one step of backward bounds.

A step takes a functional ⟨a, y⟩ + c and gives ⟨a', x⟩ + c' with ⟨a, f(x)⟩ + c ≥ ⟨a', x⟩ + c' for every x in the box
(CROWN, Zhang et al., NeurIPS 2018, https://arxiv.org/abs/1811.00866). That of a pcDEQ layer, which is implicit, is new:
see `_equilibrium`, and docs/robustness.md. As in `intervals`, what rounding may take is taken off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcdeq_zoo.intervals import TINY, Affine, Box, affine, has_own_hull, rounding
from pcdeq_zoo.layers import PcDEQConv2d, PcDEQLinear
from pcdeq_zoo.maps import LinearizedMap
from pcdeq_zoo.solver import solve

__all__ = ["Functional", "least", "rounded", "step_back"]

# Of the adjoint solves, relative. What they leave open is taken off the bound, so it makes it tighter, not more sound.
_TOL = 1e-5

# What σ, σ′ and the input map are off at most, in units of the last place.
_ULPS = 64

Side = Literal["below", "above"]


class Functional(NamedTuple):
    """R functionals of each of N samples, y ↦ ⟨coefficients, y⟩ + constant.

    Attributes:
        coefficients: Shape (N, R, ...) for y (N, ...).
        constant: Shape (N, R), float64; −∞ where nothing is known.
    """

    coefficients: Tensor
    constant: Tensor


class Line(NamedTuple):
    """p ↦ slope · p + intercept, unit by unit, shapes (N, ...)."""

    slope: Tensor
    intercept: Tensor


def _dot(coefficients: Tensor, y: Tensor) -> Tensor:
    """A lower bound of ⟨coefficients, y⟩ for coefficients (N, R, ...) and y (N, ...): shape (N, R), float64."""
    products = (coefficients.double() * y[:, None].double()).flatten(2)  # of floats: exact
    return products.sum(2) - rounding(products, products.shape[2]) * products.abs().sum(2)


def _sum(*terms: Tensor) -> Tensor:
    """A lower bound of a sum of a few float64 terms."""
    return sum(terms[1:], terms[0]) - rounding(terms[0], len(terms)) * sum(term.abs() for term in terms)


def _underflow(box: Box, terms: int) -> Tensor:
    """What coefficients lose on a box if so many products of each vanish: at most 0, shape (N, 1), float64."""
    return -2 * terms * torch.finfo(box.lower.dtype).tiny * box.magnitude.double().flatten(1).sum(1, keepdim=True)


def rounded(functional: Functional, box: Box) -> Functional:
    """Less what the rounding of each coefficient, the only one up to here, may take on a box."""
    coefficients, constant = functional
    lost = _dot(-coefficients.abs(), rounding(coefficients, 0) * box.magnitude + TINY)
    return Functional(coefficients, _sum(constant, lost, _underflow(box, 1)))


def least(functional: Functional, box: Box) -> Tensor:
    """The least value of functionals on a box, or less, shape (N, R), float64."""
    coefficients, constant = functional
    return _sum(constant, _dot(coefficients, box.center), _dot(-coefficients.abs(), box.radius))


def step_back(module: nn.Module, functional: Functional, box: Box, outputs: Box) -> Functional:
    """Functionals of a module's inputs that are nowhere above those of its outputs.

    Args:
        module: One that `intervals.modules_in_order` gives, in evaluation mode.
        functional: Of its outputs.
        box: Where its inputs are.
        outputs: Where its outputs are then; see `intervals.interval`.
    """
    if type(module) is PcDEQLinear or type(module) is PcDEQConv2d:  # no subclass, which may compute something else
        return _equilibrium(module, functional, box, outputs)
    if has_own_hull(module):  # whatever it is a subclass of
        return _hull(functional, box, outputs)
    if isinstance(module, nn.MaxPool2d) and not module.ceil_mode:
        return _max_pool(module, functional, box, outputs)
    if isinstance(module, nn.ReLU):
        return _through(functional, _tangent(module, box, "below"), _chord(module, box, "above"), box)
    if isinstance(module, nn.Tanh | nn.Sigmoid | nn.Softsign | nn.ReLU6 | nn.Hardtanh):
        return _through(functional, *_parallels(module, box), box)
    if (form := affine(module, box.lower)) is not None:
        return _affine(form, functional, box)
    return _hull(functional, box, outputs)


def _hull(functional: Functional, box: Box, outputs: Box) -> Functional:
    """The least on all outputs, whatever the inputs are."""
    lowest = functional.coefficients.clamp(min=0), functional.coefficients.clamp(max=0)
    constant = _sum(functional.constant, _dot(lowest[0], outputs.lower), _dot(lowest[1], outputs.upper))
    count = functional.constant.shape[1]
    return Functional(box.lower.new_zeros(len(box.lower), count, *box.lower.shape[1:]), constant)


def _affine(form: Affine, functional: Functional, box: Box) -> Functional:
    """⟨a, A x + b⟩ = ⟨Aᵀ a, x⟩ + ⟨a, b⟩."""
    a, constant = functional
    with torch.enable_grad():
        zeros = box.lower.new_zeros(a.shape[:2].numel(), *box.lower.shape[1:]).requires_grad_()
        outputs = form.function(zeros)
        (back,) = torch.autograd.grad(outputs, zeros, a.flatten(0, 1))
    offset = outputs.detach().unflatten(0, a.shape[:2])[:, 0]
    terms = max(form.terms, min(form.transposed_terms, a.shape[2:].numel()))
    slack = rounding(a, terms) * form.magnitude(box.magnitude) + TINY
    constant = _sum(constant, _dot(a, offset), _dot(-a.abs(), slack), _underflow(box, terms))
    return Functional(back.unflatten(0, a.shape[:2]), constant)


def _through(functional: Functional, below: Line, above: Line, box: Box) -> Functional:
    """Through functions unit by unit that stay between two lines: the one below where the coefficient is positive."""
    a, constant = functional
    up, down = a.clamp(min=0), a.clamp(max=0)
    back = up * below.slope[:, None] + down * above.slope[:, None]
    constant = _sum(constant, _dot(up, below.intercept), _dot(down, above.intercept))
    return rounded(Functional(back, constant), box)


def _intercept(values: Tensor, slope: Tensor, at: Tensor, reach: Tensor, side: Side) -> Tensor:
    """Of the lines with these slopes through (at, values), moved aside by what a slope's rounding does on its reach."""
    slack = rounding(values, _ULPS) * (values.abs() + slope * (at.abs() + reach)) + TINY
    return values - slope * at + (slack if side == "above" else -slack)


def _chord(function: Callable[[Tensor], Tensor], box: Box, side: Side) -> Line:
    """The line through the ends: above a convex function, below a concave one; slopes are between 0 and 1."""
    ends, zero = (function(box.lower), function(box.upper)), torch.zeros_like(box.lower)
    slope = ((ends[1] - ends[0]) / (box.upper - box.lower).clamp(min=TINY)).clamp(0, 1)
    # Whatever the slope is, the line is aside of both ends, and so of all that is between.
    intercepts = [_intercept(v, slope, at, zero, side) for v, at in zip(ends, box, strict=True)]
    return Line(slope, torch.maximum(*intercepts) if side == "above" else torch.minimum(*intercepts))


def _slope(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    with torch.enable_grad():
        at = at.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(function(at).sum(), at)
    return slope


def _tangent(function: Callable[[Tensor], Tensor], box: Box, side: Side, slope: Tensor | None = None) -> Line:
    """The line that touches in the middle of the box: below a convex function, above a concave one."""
    center = box.center
    slope = _slope(function, center) if slope is None else slope
    return Line(slope, _intercept(function(center), slope, center, box.radius, side))


def _parallels(function: Callable[[Tensor], Tensor], box: Box) -> tuple[Line, Line]:
    """Two lines around a function that is flatter away from one place: through the ends, as flat as the flatter one."""
    slope = torch.minimum(_slope(function, box.lower), _slope(function, box.upper))
    slope = slope * (1 - rounding(slope, _ULPS))
    zero = torch.zeros_like(slope)
    below = _intercept(function(box.lower), slope, box.lower, zero, "below")
    return Line(slope, below), Line(slope, _intercept(function(box.upper), slope, box.upper, zero, "above"))


def _max_pool(module: nn.MaxPool2d, functional: Functional, box: Box, outputs: Box) -> Functional:
    """A window's maximum is at least any of its entries, and at most a chord in the one that reaches highest.

    max(x_j, t) is convex in x_j, for t the next highest end.
    """
    a, constant = functional

    def pool(x: Tensor) -> tuple[Tensor, Tensor]:
        return F.max_pool2d(x, module.kernel_size, module.stride, module.padding, module.dilation, return_indices=True)

    (_, likely), (highest, reaching), (magnitude, _) = pool(box.center), pool(box.upper), pool(box.magnitude)
    if bool(highest.isneginf().any()):  # a window of padding alone, by a dilation
        return _hull(functional, box, outputs)
    pads = module.padding if isinstance(module.padding, tuple) else (module.padding, module.padding)
    padded = F.pad(box.upper, (pads[1], pads[1], pads[0], pads[0]), value=-torch.inf)
    windows = F.unfold(padded.flatten(0, 1)[:, None], module.kernel_size, module.dilation, stride=module.stride)
    windows = F.pad(windows, (0, 0, 0, 1), value=-torch.inf)  # a window of one entry has no next one
    second = windows.topk(2, dim=1).values[:, 1].view_as(highest)
    ends = Box(box.lower.flatten(2).gather(2, reaching.flatten(2)).view_as(highest), highest)
    above = _chord(lambda x: torch.maximum(x, second), ends, "above")

    up, down = a.clamp(min=0), a.clamp(max=0)
    back = a.new_zeros(*a.shape[:3], box.lower.shape[2:].numel())
    for coefficients, entries in ((up, likely), (down * above.slope[:, None], reaching)):
        back.scatter_add_(3, entries.flatten(2)[:, None].expand(-1, a.shape[1], -1, -1), coefficients.flatten(3))
    slack = rounding(a, 2 * (windows.shape[1] - 1)) * magnitude + TINY
    constant = _sum(constant, _dot(down, above.intercept), _dot(-a.abs(), slack), _underflow(box, 1))
    return Functional(back.view(*a.shape[:3], *box.lower.shape[2:]), constant)


def _equilibrium(layer: PcDEQLinear | PcDEQConv2d, functional: Functional, box: Box, outputs: Box) -> Functional:
    """Through u ↦ x ↦ z* = σ(W z* + x): lines in the place of σ make the fixed point equation linear.

    On the box the arguments p = W z* + x are between those of its ends. There t + s p ≤ σ(p) ≤ t' + s' p, with the
    chord and a tangent of the concave σ. Let q ≥ 0. Then ⟨q, z*⟩ ≥ ⟨q, t + s (W z* + x)⟩, that is

        ⟨c, z*⟩ ≥ ⟨q, t⟩ + ⟨s q, x⟩ + ⟨r, z*⟩,  r = c + Wᵀ (s q) − q,

    and the same for ≤ with t' and s'. It holds for any q; with q = c + Wᵀ (s q), the adjoint equilibrium of c ≥ 0,
    r = 0. So nothing depends on how well that is solved: what is left of r is bounded by the hull of z*. The lower one
    is exact at both ends of the box of x.
    """
    a, constant = functional
    map_ = layer.fixed_point_map(box.lower)
    w, sigma = map_.operator, map_.activation
    shape, (count, rows) = map_.x.shape, a.shape[:2]
    upper = layer.fixed_point_map(box.upper)
    z = Box(*(w.arrange(end.reshape(shape)) for end in outputs))
    share = rounding(map_.x, w.terms + _ULPS)
    p = Box(w.affine(z.lower, map_.x) * (1 - share), w.affine(z.upper, upper.x) * (1 + share))
    transposed = w.adjoint()
    a = a.reshape(count, rows, *shape[1:])
    back = torch.zeros_like(a)
    for sign, line in (
        (1, _chord(sigma.evaluate, p, "below")),
        (-1, _tangent(sigma.evaluate, p, "above", sigma.derivative(p.center))),
    ):
        c = w.arrange((sign * a).clamp(min=0).flatten(0, 1))
        slopes = w.arrange(line.slope.repeat_interleave(rows, 0))
        adjoint = LinearizedMap(slopes, c, transposed).in_full_precision()
        q = transposed.affine(solve(adjoint, tol=_TOL, accelerate=True).value, c).clamp_(min=0)
        k = slopes * q
        r = transposed.affine(k, c) - q
        lost = rounding(r, w.terms) * (c + 2 * q + r.abs())  # rounding of r
        q, k, r, lost = (tensor.unflatten(0, (count, rows)) for tensor in (q, k, r, lost))
        constant = _sum(
            constant,
            _dot(sign * q, line.intercept),
            _dot(-q, rounding(q, 0) * line.slope * p.upper),  # of k, and of the sum with the other one
            _dot((sign * r).clamp(min=0), z.lower),
            _dot((sign * r).clamp(max=0) - lost, z.upper),
            _underflow(p, 1) + _underflow(z, w.terms),
        )
        back += sign * k
    known = back.flatten(2).isfinite().all(2) & constant.isfinite()
    back = back.nan_to_num(0.0, 0.0, 0.0) * known[(..., *[None] * (back.ndim - 2))]
    constant = constant.masked_fill(~known, -torch.inf)

    u = Box(map_.u, upper.u)
    below = _tangent(sigma.input_map, u, "below", sigma.input_derivative(u.center))
    result = _through(Functional(back, constant), below, _chord(sigma.input_map, u, "above"), u)
    return Functional(result.coefficients.reshape(count, rows, *box.lower.shape[1:]), result.constant)
