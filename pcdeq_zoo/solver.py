"""The fixed point iteration: one loop for the equilibrium, its gradient and its tangent.

A pcDEQ layer is a positive concave map, so plain iteration converges geometrically from every nonnegative start
(Proposition 4.6 of https://arxiv.org/abs/2402.04029); its linearisation converges by the same iteration because the
Jacobian at the equilibrium has spectral radius below one. The loop extrapolates along the one mode that soon dominates
the error of both, and goes back to plain iteration where that does not help. It decides sample by sample: a sample's
result is fixed when it has converged, so it never depends on what else is in the batch.

    z₀ ─ two evaluations ─▶ z₁, z₂ ─ stop rule ─▶ error of each sample ─ all below tol? ─▶ solution
     ▲                                                     │ no
     └───────────── extrapolate (Aitken), project ◀────────┘
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pcdeq_zoo.certificate import Witness, error_bound, find_witness, no_witness
from pcdeq_zoo.maps import EquilibriumMap, FixedPointMap, FunctionMap, Pair, per_sample
from pcdeq_zoo.series import aitken_rate, remaining_error
from pcdeq_zoo.solution import OnFailure, Solution, Status

__all__ = ["Solver", "Stop", "solve"]

Stop = Literal["certified", "estimated", "residual"]


class Verdict(NamedTuple):
    """What a stop rule says of a pair of evaluations.

    Attributes:
        error: To compare with the tolerance, shape (N,).
        witness: What a certified solve has found up to now, for the next pair.
    """

    error: Tensor
    witness: Witness | None = None


def residual(map_: FixedPointMap, pair: Pair, number: int, tol: float, before: Witness | None) -> Verdict:
    """‖d₂‖₂ / ‖z₂‖₂ over a sample's own entries: the paper's criterion (section 5), per sample."""
    return Verdict(pair.change)


def estimated(map_: FixedPointMap, pair: Pair, number: int, tol: float, before: Witness | None) -> Verdict:
    """The error ‖d₂‖ r / (1 − r) that is left if changes go on as a geometric series with r = ‖d₂‖ / ‖d₁‖, relative."""
    return Verdict(remaining_error(pair.change, pair.size1, pair.size2))


def certified(map_: FixedPointMap, pair: Pair, number: int, tol: float, before: Witness | None) -> Verdict:
    """The largest relative error of a unit, proven; see `pcdeq_zoo.certificate`."""
    if not isinstance(map_, EquilibriumMap):
        raise ValueError(
            'stop="certified" takes the map of a pcDEQ layer, layer.fixed_point_map(u): nothing can be proven of any '
            'other; use "estimated" or "residual"'
        )
    witness = no_witness(map_) if before is None else before
    if witness.found.device.type != "cpu" or not bool(witness.found.all()):
        witness = find_witness(map_, pair, witness, number)
    return Verdict(error_bound(map_, pair, witness, tol), witness)


# To add a rule, add a function here and its name to `Stop`.
RULES: dict[Stop, Callable[[FixedPointMap, Pair, int, float, Witness | None], Verdict]] = {
    "certified": certified,
    "estimated": estimated,
    "residual": residual,
}


class Extrapolation(NamedTuple):
    """Of each sample, shape (N,): whether extrapolating still helps, whether it was done last, and the change then."""

    helps: Tensor
    done: Tensor
    last_size: Tensor


def extrapolate(pair: Pair, before: Extrapolation, allowed: Tensor | None) -> tuple[Tensor, Extrapolation]:
    """Extrapolate a pair as a geometric series with one rate per sample.

    Vector Aitken with the Rayleigh quotient ⟨d₁, d₂⟩ / ‖d₁‖² for the rate. Given up for a sample when it changes more
    after an extrapolation than before, so that plain iteration takes over.

    Returns:
        The next iterate, shape (N, ...), z₂ where it is not extrapolated; and the state for the next pair.
    """
    rate = aitken_rate(pair.d1, pair.d2, pair.size1, pair.dims)
    helps = before.helps & ~(before.done & (pair.size1 > before.last_size))
    rate *= helps if allowed is None else helps & allowed
    z = torch.addcmul(pair.z2, per_sample(rate / (1 - rate), pair.z2), pair.d2)
    return z, Extrapolation(helps, rate > 0, pair.size2)


class _Outcome:
    """The samples of a solve that have ended, and how."""

    def __init__(self, start: Tensor, max_evals: int) -> None:
        count, device = len(start), start.device
        self.value: Tensor | None = None
        self.status = torch.full((count,), int(Status.MAX_EVALUATIONS), dtype=torch.int8, device=device)
        self.evaluations = torch.full((count,), max_evals // 2 * 2, dtype=torch.int64, device=device)
        self.residual = self.bound = torch.full((count,), math.inf, dtype=start.dtype, device=device)
        self.running = torch.ones(count, dtype=torch.bool, device=device)

    def close(self, k: int, change: Tensor, error: Tensor, tol: float, value: Tensor, proven: bool) -> bool:
        """Fix the samples that converged or failed by evaluation k; True if none is left."""
        done = self.running & (error <= tol)
        failed = self.running & ~change.isfinite()
        self.status.masked_fill_(done, Status.CONVERGED).masked_fill_(failed, Status.NON_FINITE)
        self.evaluations.masked_fill_(done | failed, k)
        self.residual = torch.where(self.running, change, self.residual)
        if proven:
            self.bound = torch.where(self.running, error, self.bound)
        # Those that run on are overwritten at a later check.
        self.value = value if self.value is None else torch.where(per_sample(self.running, value), value, self.value)
        self.running = self.running & ~(done | failed)
        return not bool(self.running.any())


def solve(
    step: FixedPointMap | Callable[[Tensor], Tensor],
    start: Tensor | None = None,
    *,
    tol: float = 1e-4,
    max_evals: int = 200,
    stop: Stop = "residual",
    accelerate: bool = False,
) -> Solution:
    """Iterate z ← step(z) until every sample has converged, failed, or used up its evaluations.

    The iteration goes by pairs of evaluations. The two changes of a pair give the criterion, which is asked after each
    pair (on a GPU after every second), and the extrapolation.

    Args:
        step: Map of (N, ...) to new (N, ...) that treats each sample by itself; a function, or the map of a layer.
        start: First iterate, shape (N, ...), floating point; only for a function.
        tol: Relative tolerance, above 0.
        max_evals: Most evaluations of `step`, at least 2.
        stop: What a sample has to reach: "residual", "estimated" or "certified", see `Solver`; the last one only for
            the map of a layer.
        accelerate: Extrapolate each pair as a geometric series with one rate per sample.

    Raises:
        ValueError: A bad argument, or a step that changes shape or dtype, or works in place.
    """
    Solver(tol, max_evals, stop)  # checks them
    if not isinstance(step, FixedPointMap):
        if start is None:
            raise ValueError("a step that is a function needs a start, shape (N, ...); got None")
        step = FunctionMap(step, start)
    elif start is not None:
        raise ValueError("the map of a layer has a start of its own; got another one")
    return _solve_by_blocks(step, tol, max_evals, stop, accelerate)


def _solve_by_blocks(map_: FixedPointMap, tol: float, max_evals: int, stop: Stop, accelerate: bool) -> Solution:
    parts = [_solve(block, tol, max_evals, stop, accelerate) for block in map_.blocks()]
    if len(parts) == 1:
        return parts[0]
    names = ("value", "status", "evaluations", "residual", "bound")
    return Solution(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def _solve(map_: FixedPointMap, tol: float, max_evals: int, stop: Stop, accelerate: bool) -> Solution:
    rule, proven = RULES[stop], stop == "certified"
    z = map_.start
    outcome = _Outcome(z, max_evals)
    if z.is_meta or not len(z):  # shapes only: nothing to decide on
        return Solution(z.clone(), outcome.status, outcome.evaluations, outcome.residual, outcome.bound)
    # Reading a flag on the host synchronises; on a GPU that costs more than a pair.
    check_every = 2 if z.device.type == "cpu" else 4
    witness, state = None, Extrapolation(outcome.running, ~outcome.running, outcome.residual)
    for k in range(2, max_evals + 1, 2):
        pair = map_.pair(z, proven)
        error, next_witness = rule(map_, pair, k // 2, tol, witness)
        following = pair.z2
        if accelerate and next_witness is not None:
            # Not before there is a witness, and not below the b above which it is one.
            following, state = extrapolate(pair, state, next_witness.found)
            following = torch.maximum(following, next_witness.base)
        elif accelerate:
            following, state = extrapolate(pair, state, None)
            following = map_.project(following)
        if k + 2 > max_evals or (k % check_every == 0 and not error.amin().item() > tol):
            in_range = pair.in_range()
            if not bool(in_range.all()) and not bool((in_range | ~outcome.running).all()):
                pair.rescale()
                error = rule(map_, pair, k // 2, tol, witness).error
            # A bound holds for the iterate, so certified samples return that, and not its extrapolation.
            answer = pair.z2 if proven else following
            if outcome.close(k, pair.change, error, tol, answer, proven):
                break
        z, witness = following, next_witness
        del pair, following  # free before the next pair allocates
    assert outcome.value is not None
    value = map_.restore(outcome.value)
    return Solution(value, outcome.status, outcome.evaluations, outcome.residual, outcome.bound)


class Solver:
    """How the layers of one model are solved. The layers share the object, so one change reaches all of them.

    Every setting is checked whenever it is set; there are no others.

    Args:
        tol: Relative tolerance, above 0. What it bounds, `stop` says.
        max_evals: Most evaluations per solve, at least 2. 200 is the paper's.
        stop: "certified": every unit of the equilibrium is proven to be within `tol`, relative (docs/certificate.md).
            "estimated": the error of a sample is estimated to be below `tol`, relative, from the rate at which it
            falls; cheaper. "residual": the last evaluation changed a sample by less than `tol`, relative, which says
            little about the error; the paper's criterion, but per sample. The gradient's solve, for which there is no
            certificate, takes "estimated" for "certified".
        on_failure: What a solve does when a sample fails: "raise" `ConvergenceError`, "warn" (`ConvergenceWarning`,
            once per layer, direction and kind of failure), or "ignore". The layer outputs what it has in any case, NaN
            and infinity included.

    Raises:
        ValueError, TypeError, AttributeError: A value outside these, or a setting of another name.
    """

    __slots__ = ("__weakref__", "max_evals", "on_failure", "stop", "tol")

    tol: float
    max_evals: int
    stop: Stop
    on_failure: OnFailure

    def __init__(
        self, tol: float = 1e-3, max_evals: int = 200, stop: Stop = "certified", on_failure: OnFailure = "warn"
    ) -> None:
        self.tol, self.max_evals, self.stop, self.on_failure = tol, max_evals, stop, on_failure

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "tol":
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"tol must be a number above 0, got {value!r}")
            value = float(value)
            if not 0 < value < math.inf:
                raise ValueError(f"tol must be above 0 and finite, got {value!r}")
        elif name == "max_evals":
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                raise TypeError(f"max_evals must be an integer of at least 2, got {value!r}")
            if value < 2:
                raise ValueError(f"max_evals must be at least 2, got {value!r}")
            value = int(value)
        elif name in ("stop", "on_failure"):
            options = get_args(Stop if name == "stop" else OnFailure)
            if value not in options:
                raise ValueError(f"{name} must be one of {', '.join(options)}, got {value!r}")
        else:
            raise AttributeError(f"a Solver has tol, max_evals, stop and on_failure, and no {name}")
        object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return (
            f"Solver(tol={self.tol:g}, max_evals={self.max_evals}, stop={self.stop!r}, on_failure={self.on_failure!r})"
        )

    def equilibrium(self, map_: EquilibriumMap) -> Solution:
        """The equilibrium of a layer's map."""
        return _solve_by_blocks(map_, self.tol, self.max_evals, self.stop, accelerate=True)

    def linearized(self, map_: FixedPointMap) -> Solution:
        """The gradient or the tangent of an equilibrium, for which there is no certificate."""
        stop: Stop = "residual" if self.stop == "residual" else "estimated"
        return _solve_by_blocks(map_, self.tol, self.max_evals, stop, accelerate=True)
