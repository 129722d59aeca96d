"""Proven error bounds of a positive concave fixed point z* = g(z*), g(z) = σ(W z + x) with W ≥ 0.

The facts and their proofs are in docs/certificate.md. In short: let B = D W with the slopes D of σ at some b ≤ z*. As
slopes fall, |g(y) − g(z)| ≤ B |y − z| for all y, z ≥ b. A *witness* is any w > 0 with B w ≤ q w and q < 1; its rate
q = max (B w)ᵢ / wᵢ is the Collatz-Wielandt bound of B's spectral radius. By it g is a contraction in the norm
max |·|ᵢ / wᵢ, and Banach's bound holds for every unit of any z ≥ b, however z was found:

    |g(z) − z*| ≤ q / (1 − q) · max_j (|g(z) − z|_j / w_j) · w.

A witness is made from any z near z*, with a b a little below it.
"""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Context
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pcdeq_zoo.maps import EquilibriumMap, Pair, per_sample
from pcdeq_zoo.operators import REDUCED_BOUND, full_precision

if TYPE_CHECKING:
    from pcdeq_zoo.layers import PcDEQConv2d, PcDEQLinear

__all__ = ["Enclosure", "Witness", "enclosure", "error_bound", "find_witness", "rounded_up", "rounding_error"]

# Slopes are taken at arguments smaller by this share, so that b may lie so much lower than z.
_MARGIN = 0.03

# Products with B that a witness is made of, at the first attempt; one more at each of the next.
_PRODUCTS = 2

_REDUCED_ATTEMPTS = 2  # after that, what reduced products lose may be all that is missing


def rounding_error(map_: EquilibriumMap, *, worst_case: bool) -> float:
    """γ, the relative error of one evaluation of the map in its dtype.

    Either the worst case, terms · u, or what holds with a probability of at least 1 − 2 terms e⁻⁴⁰ per sum if rounding
    errors are independent with mean zero, 9 √terms · u (Higham and Mary, SIAM J. Sci. Comput. 2019,
    https://doi.org/10.1137/18M1226312, λ = 9): of the largest layers of the paper's nets all sums of an evaluation
    but for once in 10⁹. u is the unit roundoff: `full_precision` sees to it that products are exact.
    Winograd convolutions, which cuDNN may choose, are not covered.
    """
    terms = map_.operator.terms
    sums = terms if worst_case else min(terms, 9 * math.sqrt(terms))
    return (sums + map_.activation.ulps) * torch.finfo(map_.u.dtype).eps / 2


class Witness(NamedTuple):
    """The witness w of each sample, and what it proves.

    Attributes:
        w, inverse: w > 0 and 1 / w, shape (N, ...).
        base: b, above which the contraction holds, shape (N, ...); 0 where there is no witness.
        rate: q, shape (N,); infinite where there is no witness.
    """

    w: Tensor
    inverse: Tensor
    base: Tensor
    rate: Tensor

    @property
    def found(self) -> Tensor:
        """Where there is one, shape (N,), bool."""
        return self.rate < 1

    def replace(self, samples: Tensor, other: Witness) -> None:
        """Put those of some of the samples, by their indices, in the place of theirs."""
        for mine, others in zip(self, other, strict=True):
            mine.index_copy_(0, samples, others)


def find_witness(map_: EquilibriumMap, z: Tensor, p: Tensor, y: Tensor, attempt: int = 1) -> Witness:
    """The witnesses near any z (fact 3), for the samples that have one.

    w = z + B z + … + Bᵏ z. Products are reduced where the map has such: all terms are nonnegative, so that a bound of
    their relative error covers it.

    Args:
        map_: The map.
        z, p, y: z, W z + x and g(z) = σ(p), from a full product, shapes (N, ...).
        attempt: From 1; each one has longer sums.
    """
    gamma, dims = rounding_error(map_, worst_case=False), list(range(1, z.ndim))
    reduced = map_.reduced_error is not None and attempt <= _REDUCED_ATTEMPTS
    # Relative, as the slopes of saturated units are next to 0 and the size of W is not; 1e-37 is for what underflows.
    slopes = map_.activation.derivative(p * ((1 - gamma) * (1 - _MARGIN))) * (1 + gamma) + 1e-37
    w, image = z, p - map_.x  # W w; here up to rounding, which is good enough for the next w
    for _ in range(_PRODUCTS + attempt - 1):
        w = torch.addcmul(z, slopes, image)
        image = map_.operator.reduced(w).float() if reduced else map_.operator(w)
    image *= 1 + (REDUCED_BOUND if reduced else gamma)
    inverse = 1 / w
    rate = (slopes * image).mul_(inverse).amax(dims) + gamma
    # δ of fact 3, and whether b = z − δ w is as near as the slopes suppose.
    delta = (z - (1 - gamma) * y).mul_(inverse).amax(dims).clamp_(min=0) / (1 - rate)
    base = torch.addcmul(z, per_sample(delta, w), w, value=-1)
    room = torch.addcmul(p * (0.99 * _MARGIN), per_sample(delta, w), image, value=-1)
    sound = (rate < 1) & (room.amin(dims) >= 0) & (base.amin(dims) >= 0)
    base.masked_fill_(per_sample(~sound, base), 0.0)
    return Witness(w, inverse, base, rate.masked_fill(~sound, math.inf))


def error_bound(map_: EquilibriumMap, pair: Pair, witness: Witness, tol: float) -> Tensor:
    """Largest relative error of a unit of z₂, shape (N,): |z₂ − z*| ≤ bound · z₂.

    Infinite where there is no witness, NaN where an entry is. Where γ alone, amplified, exceeds `tol`, of float32 one
    evaluation in float64 takes its place; float32's actual errors are several times smaller.

    Args:
        map_: The map.
        pair: Two evaluations of it from any z₀ ≥ b, the first one from a full product.
        witness: Of its samples.
        tol: What the bound will be compared with.
    """
    gamma, rate = rounding_error(map_, worst_case=False), witness.rate
    spread = (witness.w / pair.z2).amax(pair.dims)
    distance = (pair.d2 * witness.inverse).abs_().amax(pair.dims)
    amplification = rate / (1 - rate)
    error = amplification * distance * spread
    if map_.reduced_error is not None:  # of the product with d₁, which |d₁| ≤ ‖d₁‖ w bounds by ‖d₁‖ W w
        reduced = REDUCED_BOUND * rate * (pair.d1 * witness.inverse).abs_().amax(pair.dims)
        error += (1 + amplification) * reduced * spread
    proven = error + amplification * gamma * (pair.z2 * witness.inverse).amax(pair.dims) * spread + gamma
    bound = torch.where(witness.found, proven, math.inf)
    bound = bound.masked_fill(pair.size2.isnan(), math.nan)
    # Once the iteration has nothing more to gain (its share is small beside the rest), ask a better evaluation.
    rounding_limited = witness.found & (bound > tol) & (error < 0.1 * bound)
    if map_.u.dtype != torch.float64 and bool(rounding_limited.any()):
        rows = rounding_limited.nonzero()[:, 0]
        exact, z, w = map_[rows].double(), pair.z2[rows].double(), witness.w[rows]
        value = exact(z)
        distance = (value - z).abs() + rounding_error(exact, worst_case=True) * value
        error = (distance / w).amax(pair.dims) * spread[rows] / (1 - rate[rows])
        bound[rows] = error.to(bound.dtype) + 4 * torch.finfo(bound.dtype).eps  # of `lower` and `upper`
    return bound


def rounded_up(bound: float, digits: int) -> float:
    """The least number of so many digits that is not below a proven bound, to be shown: the nearest may be none."""
    return float(Context(prec=digits, rounding=ROUND_CEILING).create_decimal(repr(bound)))


class Enclosure(NamedTuple):
    """Bounds of an equilibrium, per unit: lower ≤ z* ≤ upper; float64, shape of the layer's output."""

    lower: Tensor
    upper: Tensor


@torch.no_grad()
def enclosure(layer: PcDEQLinear | PcDEQConv2d, x: Tensor, *, tol: float = 1e-9, max_evals: int = 1000) -> Enclosure:
    """Rigorous bounds of a layer's equilibrium, for W as the layer computes it and its input, computed in float64.

    Iterates from below and from above (fact 1 of docs/certificate.md), each rounded outwards by the worst case error,
    until they are `tol` apart, relative, in every unit. However early it stops, the bounds hold.

    Args:
        layer: A pcDEQ layer.
        x: Its input, as for its forward.
        tol: Relative distance of the bounds to stop at; below about 1e-12 float64 cannot get.
        max_evals: Most evaluations from either side.

    Raises:
        ValueError: An input or W with NaN or infinity, which has no equilibrium.
        TypeError: Not a pcDEQ layer.
    """
    if not hasattr(layer, "fixed_point_map"):
        raise TypeError(f"enclosure takes a pcDEQ layer and its input, got a {type(layer).__name__}")
    map_ = layer.fixed_point_map(x).double()
    for name, values in (("the input", x), ("W", map_.operator.weight)):
        if bad := int((~values.isfinite()).sum()):
            raise ValueError(f"{name} has {bad} entries that are NaN or infinite, and so no equilibrium to enclose")
    margin = rounding_error(map_, worst_case=True)
    with full_precision(x.device):
        lower = map_.start * (1 - margin)
        upper = torch.full_like(map_.x, map_.activation.supremum)
        for _ in range(max_evals):
            lower = torch.maximum(map_(lower) * (1 - margin), lower)
            upper = torch.minimum(map_(upper) * (1 + margin), upper)
            if bool((upper - lower <= tol * lower).all()):
                break
    return Enclosure(lower.reshape(x.shape), upper.reshape(x.shape))
