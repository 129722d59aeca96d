"""Proven error bounds of a positive concave fixed point z* = g(z*), g(z) = σ(W z + x) with W ≥ 0.

Facts used, for g nondecreasing and concave on the nonnegative numbers with one fixed point z* (order per unit):

1. z ≤ g(z) implies z ≤ z*, and g(z) ≤ z implies z* ≤ z. So iterates from 0 rise to z*, and those from an upper bound of
   σ fall to it: z* lies between them at every step. (Yates, IEEE JSAC 1995; Proposition 4.6 of
   https://arxiv.org/abs/2402.04029.) `enclosure` is this, with outward rounding.
2. Let B = diag σ′(W b + x) W ≥ 0 for some b ≤ z*. As the slopes of σ fall, |g(y) − g(z)| ≤ B |y − z| wherever y, z ≥ b.
   So if B w ≤ q w with w > 0 and q < 1, g is a contraction with factor q in the norm max_i |·|_i / w_i on {z ≥ b}, and
   Banach's bound holds for each unit of *any* z ≥ b:

        |g(z) − z*| ≤ q / (1 − q) · max_j (|g(z) − z|_j / w_j) · w.

   It takes nothing but weights w, asks nothing of the size of W, and lets the solver go on as it likes: z may be
   extrapolated or cached. `Certificate` is this. The bound for z itself has 1 / (1 − q) in the place of q / (1 − q).
3. Weights for nothing: w = b − a + η b, with a the iterate before b. W w is known from the W a + x and W b + x that the
   solver evaluates anyway. Near the equilibrium b − a is close to the slowest mode, for which q is least.
4. Better weights, for some products with B: w = b + B b + … + Bᵏ b, for which B w = w − b + Bᵏ⁺¹ b. Where B's spectral
   radius is below 1 they tend to (I − B)⁻¹ b, for which q = 1 − min_i b_i / w_i. That is well below 1 also where a unit
   lives off others almost linearly, so that no combination of b − a and b has a good q.

Rounding. A float evaluation of g is off by a relative error of at most γ per unit: nothing cancels in a sum of
nonnegative terms, and σ concave with σ(0) ≥ 0 does not amplify a relative error of its argument. An iterate b may thus
lie above z*. But b − δ w does not, δ = max_i ((b − g(b))_i / w_i) / (1 − q), if B belongs to it: g(b − δ w) ≥ g(b) −
q δ w ≥ b − δ w, and fact 1. So the slopes are taken at smaller arguments, and weights whose δ needs still smaller ones
are refused.
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
    """Bounds the error of iterates of one batch while they are computed by `step`; see facts 2 to 4 above.

    The solver calls it after each pair of steps. As long as a sample has no weights with a good enough rate it must be
    iterated plainly, from σ(x); afterwards freely, above `clamp`.

    Args:
        product: w ↦ W w.
        x: Input of the layer, after the input map, shape (N, ...).
        evaluate: σ, of a tensor and one to put the result into (or None).
        derivative: σ(p) ↦ σ′(p).
        rounding: γ of `rounding_error`. The bounds are those of exact arithmetic, widened by it.
        exact: Indices of samples and iterates z of them ↦ g(z) in float64. Where γ alone, amplified, exceeds what is to
            be proven, one such evaluation takes its place; float32's actual errors are several times smaller than γ.
    """

    # What q / (1 − q) and the spread of w / b together may multiply a relative distance by. Worse weights need many
    # more evaluations, and end at the rounding error times this. Samples that have none better after so many pairs get
    # those of fact 4 (again after twice as many, and so on), and after twice as many take the best they have had.
    _GOOD_FACTOR, _PATIENCE = 50.0, 3
    _LEAST_ETA = 0.01
    _MARGIN = 100.0  # how many γ smaller the arguments are that the slopes are taken at

    def __init__(
        self,
        *,
        product: Callable[[Tensor], Tensor],
        x: Tensor,
        evaluate: Callable[[Tensor, Tensor | None], Tensor],
        derivative: Callable[[Tensor], Tensor],
        rounding: float,
        exact: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        self.product = product
        self.x = x
        self.evaluate = evaluate
        self.derivative = derivative
        self.rounding = rounding
        self._margin = min(0.9, self._MARGIN * rounding)
        self.exact = exact
        self.ready = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self._all_ready = False
        self._calls, self._next_sums = 0, self._PATIENCE
        self._dims = list(range(1, x.ndim))
        self._argument = self._argument_before = x  # of σ in the last step, and in the one before
        self._weights = self._inverse = torch.ones_like(x)
        self._base = torch.zeros_like(x)
        self._amplification = torch.full((len(x),), math.inf, dtype=x.dtype, device=x.device)
        self._spread = self._factor = self._amplification

    def step(self, z: Tensor) -> Tensor:
        """g(z) = σ(W z + x)."""
        self._argument_before, self._argument = self._argument, self.product(z).add_(self.x)
        return self.evaluate(self._argument, None)

    def __call__(self, value: Tensor, new: Tensor, change: Tensor, previous: Tensor, tol: float) -> Tensor:
        """Largest relative error of a unit of new = g(value), shape (N,): |new − z*| ≤ bound · new.

        Infinite where it is unknown or far above `tol`, NaN where an entry is.

        Args:
            value: Iterate, shape (N, ...), from the step before the last one.
            new: g(value), from the last step.
            change: new − value.
            previous: The change of the step before.
            tol: What the bound will be compared with.
        """
        self._calls += 1
        if not self._all_ready:
            self._weigh(value, new, previous)
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

    def _weigh(self, value: Tensor, new: Tensor, previous: Tensor) -> None:
        """Look for weights at b = value, for the samples that have no good ones and had no better ones."""
        argument = self._argument * ((1 - self.rounding) * (1 - self._margin))
        slopes = self.derivative(self.evaluate(argument, None)) + self.rounding
        norm = torch.linalg.vector_norm
        # η = ‖b − a‖ / ‖b‖: the weights are then neither far from the slowest mode nor far from relative errors. The
        # floor is for what has converged before it had weights: rounding errors must not set them.
        eta = norm(previous, dim=self._dims, keepdim=True) / norm(value, dim=self._dims, keepdim=True)
        eta.nan_to_num_(1.0, 1.0).clamp_(min=self._LEAST_ETA)  # norms of very small samples vanish
        upper, lower = (1 + self.rounding) * self._argument, (1 - self.rounding) * self._argument_before
        image = slopes * ((1 + eta) * upper - lower - eta * self.x)
        self._take(value, new, torch.addcmul(previous, eta, value), image, ~self.ready)
        if self._calls == self._next_sums:
            self._next_sums *= 2
            rows = (~self.ready).nonzero()[:, 0]
            if len(rows):
                weights, image = value.clone(), torch.full_like(value, math.inf)
                base, slopes = value[rows], slopes[rows]
                for _ in range(self._calls):  # k of fact 4: more where few were not enough
                    weights[rows] = base + slopes * self.product(weights[rows])
                image[rows] = (1 + self.rounding) * slopes * self.product(weights[rows])
                self._take(value, new, weights, image, ~self.ready)
        self.ready = self._factor < (self._GOOD_FACTOR if self._calls < 2 * self._PATIENCE else math.inf)
        self._all_ready = self.ready.device.type == "cpu" and bool(self.ready.all())

    def _take(self, base: Tensor, new: Tensor, weights: Tensor, image: Tensor, wanted: Tensor) -> None:
        """Let the `wanted` samples have these weights where they amplify less than those before; image is B w."""
        relative, rate = weights / base, (image / weights).amax(self._dims)
        spread = relative.amax(self._dims)
        factor = rate / (1 - rate) * spread / relative.amin(self._dims)
        excess = ((base - (1 - self.rounding) * new) / weights).amax(self._dims).clamp(min=0) / (1 - rate)  # δ
        sound = (rate >= 0) & (rate < 1) & (excess * spread <= self._margin)
        better = wanted & sound & (factor < self._factor)
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
