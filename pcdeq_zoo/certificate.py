"""Proven error bounds of a positive concave fixed point z* = g(z*), g(z) = σ(W z + x) with W ≥ 0.

The facts and their proofs are in docs/certificate.md. In short: let B = D W with the slopes D of σ at some b ≤ z*. As
slopes fall, |g(y) − g(z)| ≤ B |y − z| for all y, z ≥ b. A *witness* is any w > 0 with B w ≤ q w and q < 1; its rate
q = max (B w)ᵢ / wᵢ is the Collatz-Wielandt bound of B's spectral radius. By it g is a contraction in the norm
max |·|ᵢ / wᵢ, and Banach's bound holds for every unit of any z ≥ b, however z was found:

    |g(z) − z*| ≤ q / (1 − q) · max_j (|g(z) − z|_j / w_j) · w.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pcdeq_zoo.maps import EquilibriumMap, Pair, per_sample
from pcdeq_zoo.operators import full_precision

if TYPE_CHECKING:
    from pcdeq_zoo.layers import PcDEQConv2d, PcDEQLinear

__all__ = ["Enclosure", "Witness", "enclosure", "error_bound", "find_witness", "no_witness", "rounding_error"]

# What q / (1 − q) and the spread of w / b together may multiply a relative distance by. A worse witness needs many
# more evaluations, and ends at the rounding error times this.
_GOOD_AMPLIFICATION = 50.0

# After so many pairs without a good witness the sums of fact 4 are tried, again after twice as many, and so on; from
# twice as many on, any witness will do.
_PAIRS_BEFORE_SUMS = 3

_LEAST_ETA = 0.01  # η of fact 3, at least: rounding errors must not set a witness
_MARGIN = 100.0  # how many γ smaller the arguments are that the slopes are taken at


def rounding_error(map_: EquilibriumMap, *, worst_case: bool) -> float:
    """γ, the relative error of one evaluation of the map in its dtype.

    Either the worst case, terms · u, or what holds with a probability of at least 1 − 2 terms e⁻¹⁸ per sum if rounding
    errors are independent with mean zero, 6 √terms · u (Higham and Mary, SIAM J. Sci. Comput. 2019,
    https://doi.org/10.1137/18M1226312). u is the unit roundoff: `full_precision` sees to it that products are exact.
    Winograd convolutions are not covered.
    """
    terms = map_.weight.terms
    sums = terms if worst_case else 6 * math.sqrt(terms)
    return (sums + map_.activation.ulps) * torch.finfo(map_.u.dtype).eps / 2


class Witness(NamedTuple):
    """The witness w of each sample, and what it proves.

    Attributes:
        w, inverse: w > 0 and 1 / w, shape (N, ...).
        base: b, above which the contraction holds, shape (N, ...).
        amplification: q / (1 − q), infinite where there is none, shape (N,).
        spread: max w / b, shape (N,).
        factor: What a relative distance is multiplied by at most, amplification · spread / min (w / b), shape (N,).
        found: True where w is good enough, shape (N,), bool.
    """

    w: Tensor
    inverse: Tensor
    base: Tensor
    amplification: Tensor
    spread: Tensor
    factor: Tensor
    found: Tensor


def no_witness(map_: EquilibriumMap) -> Witness:
    """None for any sample, yet."""
    x = map_.x
    none, infinite = torch.ones_like(x), torch.full((len(x),), math.inf, dtype=x.dtype, device=x.device)
    found = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    return Witness(none, none, torch.zeros_like(x), infinite, infinite, infinite, found)


def find_witness(map_: EquilibriumMap, pair: Pair, before: Witness, number: int) -> Witness:
    """The witnesses at b = z₁ (facts 3 and 4) for the samples that have no good one and had no better one.

    Args:
        map_: The map.
        pair: Two evaluations of it, with arguments.
        before: The witnesses up to now.
        number: Of this pair, from 1.
    """
    gamma = rounding_error(map_, worst_case=False)
    margin = min(0.9, _MARGIN * gamma)
    z1, p1, p2 = pair.z1, pair.p1, pair.p2
    assert p1 is not None
    assert p2 is not None
    slopes = map_.activation.derivative(p2 * ((1 - gamma) * (1 - margin))) + gamma
    norm = torch.linalg.vector_norm
    # η = ‖b − a‖ / ‖b‖: w is then neither far from the slowest mode nor far from relative errors.
    eta = norm(pair.d1, dim=pair.dims, keepdim=True) / norm(z1, dim=pair.dims, keepdim=True)
    eta.nan_to_num_(1.0, 1.0).clamp_(min=_LEAST_ETA)  # norms of very small samples vanish
    b_times_w = slopes * ((1 + eta) * ((1 + gamma) * p2) - (1 - gamma) * p1 - eta * map_.x)
    witness = _keep_better(before, pair, torch.addcmul(pair.d1, eta, z1), b_times_w, gamma, margin)
    if _tries_sums(number):
        rows = (~before.found).nonzero()[:, 0]
        if len(rows):
            w, b_times_w = z1.clone(), torch.full_like(z1, math.inf)
            base, slopes = z1[rows], slopes[rows]
            for _ in range(number):  # k of fact 4: more where few were not enough
                w[rows] = base + slopes * map_.weight(w[rows])
            b_times_w[rows] = (1 + gamma) * slopes * map_.weight(w[rows])
            witness = _keep_better(witness, pair, w, b_times_w, gamma, margin)
    good = _GOOD_AMPLIFICATION if number < 2 * _PAIRS_BEFORE_SUMS else math.inf
    return witness._replace(found=witness.factor < good)


def _tries_sums(number: int) -> bool:
    turns, rest = divmod(number, _PAIRS_BEFORE_SUMS)
    return rest == 0 and turns & (turns - 1) == 0  # 3, 6, 12, …


def _keep_better(before: Witness, pair: Pair, w: Tensor, b_times_w: Tensor, gamma: float, margin: float) -> Witness:
    """Per sample without a good witness, the one with the smaller factor: w at b = z₁, or the one before."""
    relative, rate = w / pair.z1, (b_times_w / w).amax(pair.dims)
    spread = relative.amax(pair.dims)
    factor = rate / (1 - rate) * spread / relative.amin(pair.dims)
    delta = ((pair.z1 - (1 - gamma) * pair.z2) / w).amax(pair.dims).clamp(min=0) / (1 - rate)
    sound = (rate >= 0) & (rate < 1) & (delta * spread <= margin)
    better = ~before.found & sound & (factor < before.factor)
    if better.device.type == "cpu" and not bool(better.any()):
        return before
    chosen = per_sample(better, w)
    w = torch.where(chosen, w, before.w)
    return before._replace(
        w=w,
        inverse=1 / w,
        base=torch.where(chosen, pair.z1, before.base),
        amplification=torch.where(better, rate / (1 - rate), before.amplification),
        spread=torch.where(better, spread, before.spread),
        factor=torch.where(better, factor, before.factor),
    )


def error_bound(map_: EquilibriumMap, pair: Pair, witness: Witness, tol: float) -> Tensor:
    """Largest relative error of a unit of z₂, shape (N,): |z₂ − z*| ≤ bound · z₂.

    Infinite where it is unknown or far above `tol`, NaN where an entry is. Where γ alone, amplified, exceeds `tol`, one
    evaluation in float64 takes its place; float32's actual errors are several times smaller.

    Args:
        map_: The map.
        pair: Two evaluations of it from any z₀ ≥ b.
        witness: Of its samples.
        tol: What the bound will be compared with.
    """
    gamma = rounding_error(map_, worst_case=False)
    amplification, z2 = witness.amplification, pair.z2
    distance = (pair.d2 * witness.inverse).abs_().amax(pair.dims)
    in_reach = witness.found & (amplification * distance * witness.spread < 3 * tol)
    bound = torch.where(distance.isnan(), distance, math.inf)
    if z2.device.type == "cpu" and not bool(in_reach.any()):
        return bound
    spread = (witness.w / z2).amax(pair.dims)
    error = amplification * distance * spread
    proven = error + amplification * gamma * (z2 * witness.inverse).amax(pair.dims) * spread
    proven = proven + gamma
    bound = torch.where(in_reach, proven, bound)
    # Once the iteration has nothing more to gain (its share is small beside the rest), ask a better evaluation.
    rounding_limited = in_reach & (proven > tol) & (error < 0.1 * proven)
    if bool(rounding_limited.any()):
        rows = rounding_limited.nonzero()[:, 0]
        z = z2[rows]
        error = ((map_[rows].double()(z.double()) - z).abs() / witness.w[rows]).amax(pair.dims) * spread[rows]
        error = (1 + amplification[rows]) * error
        bound[rows] = error.to(bound.dtype) + 4 * torch.finfo(bound.dtype).eps  # of `lower` and `upper`
    return bound


class Enclosure(NamedTuple):
    """Bounds of an equilibrium, per unit: lower ≤ z* ≤ upper; float64, shape of the layer's output."""

    lower: Tensor
    upper: Tensor


@torch.no_grad()
def enclosure(layer: PcDEQLinear | PcDEQConv2d, x: Tensor, *, tol: float = 1e-9, max_evals: int = 1000) -> Enclosure:
    """Rigorous bounds of a layer's equilibrium for its weights and input as stored, computed in float64.

    Iterates from below and from above (fact 1 of docs/certificate.md), each rounded outwards by the worst case error,
    until they are `tol` apart, relative, in every unit. However early it stops, the bounds hold.

    Args:
        layer: A pcDEQ layer.
        x: Its input, as for its forward.
        tol: Relative distance of the bounds to stop at; below about 1e-12 float64 cannot get.
        max_evals: Most evaluations from either side.

    Raises:
        ValueError: An input with NaN or infinity, which has no equilibrium.
    """
    if bad := int((~x.isfinite()).sum()):
        raise ValueError(f"the input has {bad} entries that are NaN or infinite, and so no equilibrium to enclose")
    map_ = layer.fixed_point_map(x).double()
    margin = rounding_error(map_, worst_case=True)
    with full_precision(x.device):
        lower = map_(torch.zeros_like(map_.x)) * (1 - margin)
        upper = torch.full_like(map_.x, map_.activation.supremum)
        for _ in range(max_evals):
            lower = torch.maximum(map_(lower) * (1 - margin), lower)
            upper = torch.minimum(map_(upper) * (1 + margin), upper)
            if bool((upper - lower <= tol * lower).all()):
                break
    return Enclosure(lower, upper)
