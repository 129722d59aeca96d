"""Proven error bounds of a positive concave fixed point z* = g(z*), g(z) = σ(W z + x) with W ≥ 0.

Facts used, for g nondecreasing and concave on the nonnegative numbers with one fixed point z* (order per unit):

1. z ≤ g(z) implies z ≤ z*, and g(z) ≤ z implies z* ≤ z. So iterates from 0 rise to z*, and those from an upper bound of
   σ fall to it: z* lies between them at every step. (Yates, IEEE JSAC 1995; Proposition 4.6 of
   https://arxiv.org/abs/2402.04029.) `enclosure` is this, with outward rounding.
2. Let p = W b + x and B = diag σ′(p) W ≥ 0. Concavity gives B (b − a) ≤ g(b) − g(a) for every a. Also B b ≤ h, the
   lesser of g(b) − g(0), by concavity, and p σ′(p), as W b ≤ p. Hence for the weights w = b − a + η b > 0 and
   q = max_i (g(b) − g(a) + η h)_i / w_i

        B w ≤ q w.

   As the slopes of σ fall, |g(y) − g(z)| ≤ B |y − z| wherever y, z ≥ b. So where b ≤ z* and q < 1, g is a contraction
   with factor q in the norm max_i |·|_i / w_i on {z ≥ b}, and Banach's bound holds for each unit of *any* z ≥ b:

        |g(z) − z*| ≤ q / (1 − q) · max_j (|g(z) − z|_j / w_j) · w.

   It takes two evaluations that the solver does anyway (a, b the iterates before), asks nothing of the size of W, and
   lets the solver go on as it likes: z may be extrapolated or cached. `Certificate` is this. (Rounded iterates may
   exceed z* by about γ / (1 − q); what that changes is of second order in the terms in γ that the bound has.)
   The bound for z itself has 1 / (1 − q) in the place of q / (1 − q).
3. Any w > 0 with B w ≤ q w, q < 1, does for fact 2. Products with B find better ones: w = b + B b + … + Bᵏ b, for
   which B w = w − b + Bᵏ⁺¹ b, tends to (I − B)⁻¹ b, where q = 1 − min_i b_i / w_i. That is well below 1 also where a
   unit lives off others almost linearly, so that no combination of b − a and b has a good q.

Rounding. A float evaluation of g is off by a relative error of at most γ per unit: nothing cancels in a sum of
nonnegative terms, and σ concave with σ(0) ≥ 0 does not amplify a relative error of its argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pcdeq_zoo.layers import PcDEQConv2d, PcDEQLinear

__all__ = ["Certificate", "Enclosure", "enclosure"]

# Rounding errors beside those of the sum: the input map's exponential (raised to the fifth power) and logarithm, the
# activation and the additions.
_ELEMENTARY_ERRORS = 40


def rounding_error(terms: int, like: Tensor, *, worst_case: bool) -> float:
    """γ, the relative error of σ(W z + x) with sums of `terms` products in the dtype and on the device of `like`.

    Either the worst case, terms · u, or what holds with a probability of at least 1 − 2 terms e⁻¹⁸ per sum if rounding
    errors are independent with mean zero, 6 √terms · u (Higham and Mary, SIAM J. Sci. Comput. 2019). u is the unit
    roundoff, that of bfloat16 products where PyTorch is free to use these or TF32.
    Winograd convolutions are not covered.
    """
    unit = torch.finfo(like.dtype).eps / 2
    if like.dtype == torch.float32:
        reduced = torch.get_float32_matmul_precision() != "highest" or (
            like.is_cuda and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
        )
        unit = 2.0**-8 if reduced else unit
    return ((terms if worst_case else 6 * math.sqrt(terms)) + _ELEMENTARY_ERRORS) * unit


class Certificate:
    """Bounds the error of iterates of one batch while they are computed; see fact 2 above.

    The solver calls it after each evaluation. As long as a sample has no weights with a good enough rate it must be
    iterated plainly, from `first`; afterwards freely, above `clamp`.

    Args:
        first: g(0) = σ(x), shape (N, ...), the solver's start.
        product: w ↦ W w.
        derivative: σ(p) ↦ σ′(p).
        response: σ(p) ↦ p σ′(p).
        rounding: γ of `rounding_error`. The bounds are those of exact arithmetic, widened by it.
        exact: Indices of samples and iterates z of them ↦ g(z) in float64. Where γ alone, amplified, exceeds what is to
            be proven, one such evaluation takes its place; float32's actual errors are several times smaller than γ.
    """

    # What q / (1 − q) and the spread of w / b together may multiply a relative distance by. Worse weights need many
    # more evaluations, and end at the rounding error times this. Samples that have none better after so many calls get
    # those of fact 3, and after twice as many take the best they have had.
    _GOOD_FACTOR, _PATIENCE = 50.0, 3
    _LEAST_ETA = 0.01
    _TERMS = 3  # k of fact 3

    def __init__(
        self,
        first: Tensor,
        product: Callable[[Tensor], Tensor],
        derivative: Callable[[Tensor], Tensor],
        response: Callable[[Tensor], Tensor],
        rounding: float,
        exact: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        self.first = first
        self.product = product
        self.derivative = derivative
        self.response = response
        self.rounding = rounding
        self.exact = exact
        self.ready = torch.zeros(len(first), dtype=torch.bool, device=first.device)
        self._all_ready = False
        self._calls = 0
        self._dims = list(range(1, first.ndim))
        self._weights = self._inverse = torch.ones_like(first)
        self._base = first
        self._amplification = torch.full((len(first),), math.inf, dtype=first.dtype, device=first.device)
        self._spread = self._factor = self._amplification

    def __call__(self, value: Tensor, new: Tensor, change: Tensor, previous: Tensor, tol: float) -> Tensor:
        """Largest relative error of a unit of new = g(value), shape (N,): |new − z*| ≤ bound · new.

        Infinite where it is unknown or far above `tol`, NaN where an entry is.

        Args:
            value: Iterate, shape (N, ...).
            new: g(value).
            change: new − value.
            previous: The change of the evaluation before.
            tol: What the bound will be compared with.
        """
        self._calls += 1
        if not self._all_ready:
            self._weigh(value, new, change, previous)
        distance = (change * self._inverse).abs_().amax(self._dims)
        near = self.ready & (self._amplification * distance * self._spread < 3 * tol)
        bound = torch.where(distance.isnan(), distance, math.inf)
        if new.device.type != "cpu" or bool(near.any()):
            spread = (self._weights / new).amax(self._dims)
            error = self._amplification * distance * spread
            proven = error + self._amplification * self.rounding * (new * self._inverse).amax(self._dims) * spread
            proven = proven + self.rounding
            bound = torch.where(near, proven, bound)
            # Once the iteration has nothing more to gain (its share is small beside the rest), ask a better evaluation.
            limited = near & (proven > tol) & (error < 0.1 * proven)
            if bool(limited.any()):
                rows = limited.nonzero()[:, 0]
                z, weights = new[rows], self._weights[rows]
                error = ((self.exact(rows, z) - z).abs() / weights).amax(self._dims) * spread[rows]
                error = (1 + self._amplification[rows]) * error
                bound[rows] = error.to(bound.dtype) + 4 * torch.finfo(bound.dtype).eps  # of `lower` and `upper`
        return bound

    def clamp(self, value: Tensor) -> Tensor:
        """`value`, not below the b of fact 2."""
        return torch.maximum(value, self._base)

    def _weigh(self, value: Tensor, new: Tensor, change: Tensor, previous: Tensor) -> None:
        """Take weights from the last two changes, for the samples that have no good ones and had no better ones."""
        norm = torch.linalg.vector_norm
        # η = ‖b − a‖ / ‖b‖: the weights are then neither far from the slowest mode nor far from relative errors. The
        # floor is for what has converged before it had weights: rounding errors must not set them.
        eta = norm(previous, dim=self._dims, keepdim=True) / norm(value, dim=self._dims, keepdim=True)
        eta.nan_to_num_(1.0, 1.0).clamp_(min=self._LEAST_ETA)  # norms of very small samples vanish
        weights = torch.addcmul(previous, eta, value)
        # The response of a float next to 1 is off by up to 40 γ: 1 − σ has lost its digits, and p is at most 37.
        own = torch.minimum(new - self.first, self.response(new)) + 40 * self.rounding * new
        image = change + self.rounding * (new + value) + eta * own
        rate = (image / weights).amax(self._dims)
        self._take(weights, value, torch.where(self.ready, 1, rate))
        if self._calls % self._PATIENCE == 0 and bool((poor := ~self.ready).any()):
            rows = poor.nonzero()[:, 0]
            base = value[rows]
            # Slopes of a smooth σ are off by at most 2 γ, and where ReLU6 is flat as computed it is so up to γ. Another
            # γ each is for the rounding of the slope and, as slopes are at most 1, for that of the product.
            slopes = self.derivative(new[rows]) + 4 * self.rounding
            sums = base
            for _ in range(self._TERMS):
                sums = base + slopes * self.product(sums)
            weights, rate = weights.clone(), torch.ones_like(rate)
            weights[rows] = sums
            rate[rows] = (slopes * self.product(sums) / sums).amax(self._dims)
            self._take(weights, value, rate)
        self.ready = self._factor < (self._GOOD_FACTOR if self._calls < 2 * self._PATIENCE else math.inf)
        self._all_ready = self.ready.device.type == "cpu" and bool(self.ready.all())

    def _take(self, weights: Tensor, base: Tensor, rate: Tensor) -> None:
        """Take weights and b of the samples for which q = `rate` is below 1 and they amplify less than those before."""
        relative = weights / base
        spread = relative.amax(self._dims)
        factor = rate / (1 - rate) * spread / relative.amin(self._dims)
        better = (rate >= 0) & (rate < 1) & (factor < self._factor)
        if better.device.type != "cpu" or bool(better.any()):
            chosen = better.view(-1, *[1] * len(self._dims))
            self._weights = torch.where(chosen, weights, self._weights)
            self._base = torch.where(chosen, base, self._base)
            self._amplification = torch.where(better, rate / (1 - rate), self._amplification)
            self._spread = torch.where(better, spread, self._spread)
            self._factor = torch.where(better, factor, self._factor)
            self._inverse = 1 / self._weights


class Enclosure(NamedTuple):
    """Bounds of an equilibrium, per unit: lower ≤ z* ≤ upper; float64, shape of the layer's output."""

    lower: Tensor
    upper: Tensor


@torch.no_grad()
def enclosure(layer: PcDEQLinear | PcDEQConv2d, x: Tensor, *, tol: float = 1e-9, max_evals: int = 1000) -> Enclosure:
    """Rigorous bounds of a layer's equilibrium for its weights and input as stored, computed in float64.

    Iterates from below and from above (fact 1), each rounded outwards by the worst case error, until they are `tol`
    apart, relative, in every unit. However early it stops, the bounds hold.

    Args:
        layer: A pcDEQ layer.
        x: Its input, as for its forward.
        tol: Relative distance of the bounds to stop at; below about 1e-12 float64 cannot get.
        max_evals: Most evaluations from either side.
    """
    u = layer._arrange(x).double()
    weight = layer._arrange_weight(layer.weight.double())
    margin = rounding_error(weight[0].numel(), u, worst_case=True)
    x = layer._input_map(u)
    lower = layer._step(torch.zeros_like(x), weight, x) * (1 - margin)
    upper = torch.full_like(x, layer.bound)
    for _ in range(max_evals):
        lower = torch.maximum(layer._step(lower, weight, x) * (1 - margin), lower)
        upper = torch.minimum(layer._step(upper, weight, x) * (1 + margin), upper)
        if bool((upper - lower <= tol * lower).all()):
            break
    return Enclosure(lower, upper)
