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

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pcdeq_zoo.certificate import Witness, error_bound, find_witness
from pcdeq_zoo.maps import EquilibriumMap, FixedPointMap, FunctionMap, Pair, per_sample
from pcdeq_zoo.operators import CoarseConvolution, full_precision
from pcdeq_zoo.series import aitken_factor, change_rate, growing, remaining_error
from pcdeq_zoo.solution import OnFailure, Solution, Status

__all__ = ["Solver", "Stop", "solve"]

Stop = Literal["certified", "estimated", "residual"]

DEFAULT_TOL: dict[Stop, float] = {"certified": 1e-3, "estimated": 3e-4, "residual": 1e-4}


class Verdict(NamedTuple):
    """What a stop rule says of a pair of evaluations.

    Attributes:
        error: To compare with the tolerance, shape (N,).
        rounding: The part of it that is due to reduced products, shape (N,); None where there are none.
        rates: Of an estimate, r now and when it was asked before, each of shape (N,).
        witness: What a certified solve has found up to now.
    """

    error: Tensor
    rounding: Tensor | None = None
    rates: tuple[Tensor, ...] = ()
    witness: Witness | None = None


def residual(map_: FixedPointMap, pair: Pair, number: int, tol: float, before: Verdict | None) -> Verdict:
    """‖d₂‖₂ / ‖z₂‖₂ over a sample's own entries: the paper's criterion (section 5), per sample."""
    rounding = _rounding(map_, pair)
    return Verdict(pair.change if rounding is None else pair.change.hypot(rounding), rounding)


def estimated(map_: FixedPointMap, pair: Pair, number: int, tol: float, before: Verdict | None) -> Verdict:
    """The error ‖d₂‖ r / (1 − r) that is left if changes go on as a geometric series with rate r, relative.

    For r the largest ‖d₂‖ / ‖d₁‖ of the last three times: extrapolation takes the slowest mode out of the changes but
    not quite out of the error, and for a while the faster ones alone would say how much is left. What reduced products
    have cost is amplified as every error is, by 1 / (1 − r).
    """
    rates = (change_rate(pair.size1, pair.size2), *(before.rates[:2] if before else ()))
    rate = functools.reduce(torch.maximum, rates)
    error = torch.where(map_.settled(pair), pair.change, remaining_error(pair.change, rate))
    rounding = _rounding(map_, pair)
    if rounding is not None:
        rounding = rounding / (1 - rate).clamp(min=1e-4)  # and not more than that while changes grow
        error = error.hypot(rounding)
    if isinstance(map_, EquilibriumMap) and bool((ends := error <= tol).any()):
        error = error.masked_fill(ends & growing(pair.d1, pair.d2, pair.z2), math.inf)
    return Verdict(error, rounding, rates)


def _rounding(map_: FixedPointMap, pair: Pair) -> Tensor | None:
    """What reduced products have cost an iterate up to now, relative, shape (N,); None where there are none."""
    if not map_.reduced_error:
        return None
    assert pair.moved is not None
    return map_.reduced_error * pair.moved / pair.size


_LONGEST_ATTEMPT = 10  # pairs, up to which a better witness is looked for: after them only rounding is in the way


def certified(map_: FixedPointMap, pair: Pair, number: int, tol: float, before: Verdict | None) -> Verdict:
    """The largest relative error of a unit, proven; see `pcdeq_zoo.certificate`."""
    assert isinstance(map_, EquilibriumMap)
    assert not isinstance(map_.operator, CoarseConvolution)
    assert pair.p1 is not None
    witness = before.witness if before else None
    if witness is None:
        witness = find_witness(map_, pair.z0, pair.p1, pair.z1)
    elif not bool(witness.found.all()):
        rows = (~witness.found).nonzero()[:, 0]
        witness.replace(rows, find_witness(map_[rows], pair.z0[rows], pair.p1[rows], pair.z1[rows], number))
    error = error_bound(map_, pair, witness, tol)
    if number < _LONGEST_ATTEMPT:
        # Where the iterate has settled and the bound is still too large, the next witness is to be from a longer sum.
        settled = (error > tol) & (pair.size2 <= 8 * torch.finfo(pair.z2.dtype).eps * pair.size)
        witness = witness._replace(rate=witness.rate.masked_fill(settled, math.inf))
    return Verdict(error, witness=witness)


# A rule takes the map, a pair of its evaluations, the number of that pair in its solve, from 1, the tolerance, and the
# verdict of the pair that was last asked about. To add one, add a function here and its name to `Stop`.
RULES: dict[Stop, Callable[[FixedPointMap, Pair, int, float, Verdict | None], Verdict]] = {
    "certified": certified,
    "estimated": estimated,
    "residual": residual,
}


def extrapolate(pair: Pair, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Extrapolate a pair as a geometric series with one rate per sample (vector Aitken).

    Not for a sample that now changes more than before it was last extrapolated: plain iteration has to bring it there
    first, which it does from everywhere.

    Args:
        pair: Of N samples.
        limit: Largest change ‖d₁‖ to extrapolate, shape (N,).

    Returns:
        The next iterate, shape (N, ...), z₂ where it is not extrapolated; and the next limit.
    """
    factor = aitken_factor(pair.d1, pair.d2, pair.size1, pair.dims).masked_fill_(pair.size1 > limit, 0.0)
    if pair.moved is not None:
        pair.moved = torch.addcmul(pair.moved, factor, pair.size2)
    z = torch.addcmul(pair.z2, per_sample(factor, pair.z2), pair.d2)
    return z, torch.where(factor > 0, pair.size2, limit)


class _Outcome:
    """What is known of the samples of a solve, those that have ended among them."""

    def __init__(self, start: Tensor, max_evals: int) -> None:
        count, device = len(start), start.device
        self.value = start
        self.evaluations = torch.full((count,), max_evals // 2 * 2, dtype=torch.int64, device=device)
        self.change = self.error = torch.full((count,), math.inf, dtype=start.dtype, device=device)
        self.running: Tensor | None = None  # before the first check all are

    def any_running(self, samples: Tensor) -> bool:
        """Whether any of these samples, shape (N,), bool, has not ended."""
        return bool((samples if self.running is None else samples & self.running).any())

    def close(self, k: int, change: Tensor, error: Tensor, tol: float, value: Tensor) -> bool:
        """Note what evaluation k gave; fixed from now on where the error is below tol, or NaN. True if none is left."""
        goes_on = error > tol
        if self.running is None:
            self.change, self.error, self.value = change, error, value
            self.running = goes_on
            self.evaluations.masked_fill_(~goes_on, k)
        else:
            running = self.running
            self.change = torch.where(running, change, self.change)
            self.error = torch.where(running, error, self.error)
            self.value = torch.where(per_sample(running, value), value, self.value)
            self.running = running & goes_on
            self.evaluations.masked_fill_(running & ~goes_on, k)
        return not bool(self.running.any())

    def solution(self, value: Tensor, tol: float, proven: bool) -> Solution:
        """With the value in its own units."""
        status = torch.full_like(self.evaluations, int(Status.MAX_EVALUATIONS), dtype=torch.int8)
        status.masked_fill_(self.error <= tol, int(Status.CONVERGED)).masked_fill_(
            self.error.isnan(), int(Status.NON_FINITE)
        )
        bound = self.error.nan_to_num(math.inf, math.inf) if proven else torch.full_like(self.error, math.inf)
        return Solution(value, status, self.evaluations, self.change, bound)


def solve(
    step: FixedPointMap | Callable[[Tensor], Tensor],
    start: Tensor | None = None,
    *,
    tol: float | None = None,
    max_evals: int = 200,
    stop: Stop = "residual",
    accelerate: bool = False,
) -> Solution:
    """Iterate z ← step(z) until every sample has converged, failed, or used up its evaluations.

    The iteration goes by pairs of evaluations. The two changes of a pair give the extrapolation, and the criterion,
    which is asked after each pair, or every second one (see `FixedPointMap.check_every`).

    Args:
        step: Map of (N, ...) to new (N, ...) that treats each sample by itself; a function, which autograd follows
            through all its evaluations, or the map of a layer, which is solved without a gradient.
        start: First iterate, shape (N, ...), floating point; only for a function.
        tol: Relative tolerance, above 0; None for what suits `stop`, see `Solver`.
        max_evals: Most evaluations of `step`, at least 2.
        stop: What a sample has to reach: "residual", "estimated" or "certified", see `Solver`; the last one only for
            the map of a layer.
        accelerate: Extrapolate each pair as a geometric series with one rate per sample.

    Raises:
        ValueError, TypeError: A bad argument, or a step that changes shape or dtype, or works in place.
    """
    settings = Solver(tol, max_evals, stop)
    if not isinstance(step, FixedPointMap):
        if start is None:
            raise ValueError("a step that is a function needs a start, shape (N, ...); got None")
        step = FunctionMap(step, start)
    elif start is not None:
        raise ValueError("the map of a layer has a start of its own; got another one")
    if isinstance(step, FunctionMap):
        return _solve_by_blocks(step, settings.tol, settings.max_evals, stop, accelerate)
    with torch.no_grad(), full_precision(step.like.device):
        return _solve_by_blocks(step, settings.tol, settings.max_evals, stop, accelerate)


def _solve_by_blocks(map_: FixedPointMap, tol: float, max_evals: int, stop: Stop, accelerate: bool) -> Solution:
    return Solution.cat([_solve_block(block, tol, max_evals, stop, accelerate) for block in map_.blocks()])


def _solve_block(map_: FixedPointMap, tol: float, max_evals: int, stop: Stop, accelerate: bool) -> Solution:
    if stop != "certified":
        return _solve(map_, map_.start, tol, max_evals, stop, accelerate)
    if not isinstance(map_, EquilibriumMap):
        raise ValueError(
            'stop="certified" takes the map of a pcDEQ layer, layer.fixed_point_map(u): nothing can be proven of any '
            'other; use "estimated" or "residual"'
        )
    # Near the equilibrium without a proof, and on from there with one.
    half = max_evals // 4 * 2
    near = _solve(map_, map_.start, tol, half, "estimated", accelerate)
    proven = _solve(map_, near.value, tol, max_evals - half, "certified", accelerate)
    proven.evaluations.add_(near.evaluations)
    return proven


def _solve(map_: FixedPointMap, z: Tensor, tol: float, max_evals: int, stop: Stop, accelerate: bool) -> Solution:
    rule, proven, reduced = RULES[stop], stop == "certified", map_.reduced_error is not None
    outcome = _Outcome(z, max_evals)
    if z.is_meta or not len(z):  # shapes only: nothing to decide on
        return outcome.solution(z.clone(), tol, proven)
    check_every = 2 if proven else map_.check_every
    verdict: Verdict | None = None
    pair: Pair | None = None
    full: Tensor | None = None
    limit = outcome.error
    for k in range(2, max_evals + 1, 2):
        pair = map_.pair(z, None if proven else pair, full)
        z, full = pair.z2, None
        last, before = k + 2 > max_evals, verdict
        checks = last or k % check_every == 0
        if checks:
            verdict = rule(map_, pair, k // 2, tol, before)
        if accelerate:
            z, limit = extrapolate(pair, limit)
            z = map_.project(z)
            if verdict is not None and verdict.witness is not None:  # not below the b above which it is one
                z = torch.maximum(z, verdict.witness.base)
        if not checks:
            continue
        assert verdict is not None
        least = verdict.error.amin().item()
        if last or not least > tol:
            change, error = pair.change, verdict.error
            # The second question says it all, but takes twice as long, and the first one nearly always answers it.
            in_order = least > 0 and bool(pair.in_range().all())
            if not in_order and outcome.any_running(~((error > 0) & pair.in_range())):
                measured, scale = pair.rescaled()
                change = measured.change
                if not proven:  # a proof has no norms in it
                    error = rule(map_, measured, k // 2, tol, before).error
                    if reduced:  # what products have cost was not measured at that scale: solved again, see below
                        error = error.masked_fill(~((scale > 1e-15) & (scale < 1e15)), math.nan)
            # A bound holds for the iterate, so certified samples return that, and not its extrapolation.
            if outcome.close(k, change, error, tol, pair.z2 if proven else z):
                break
        if verdict.rounding is not None:
            full = _too_rounded(map_, pair, verdict, tol)
    solution = outcome.solution(map_.restore(outcome.value), tol, proven)
    if reduced and not proven and bool(solution.status.any()):
        rows = solution.status.nonzero()[:, 0]
        part = map_[rows].in_full_precision()
        again = _solve(part, part.start, tol, max_evals, stop, accelerate)
        again.evaluations.add_(solution.evaluations[rows])
        solution.replace(rows, again)
    return solution


def _too_rounded(map_: FixedPointMap, pair: Pair, verdict: Verdict, tol: float) -> Tensor | None:
    """Where the next product must be a full one, shape (N,), bool; None if nowhere.

    Where rounding stands in the way of the tolerance, and the next pair will leave less to do than it has cost. If
    reduced products alone cannot do, a full one costs little beside the rest, and is made early enough to leave no
    trace.
    """
    assert verdict.rounding is not None
    assert map_.reduced_error is not None
    allowed = tol / 2 if map_.reduced_error <= tol else tol / 10
    after_next = verdict.error * (pair.size2 / pair.size1).pow_(4)  # two evaluations, and what extrapolation takes
    full = (verdict.rounding > allowed) & (verdict.rounding > after_next) & (verdict.error > tol)
    return full if bool(full.any()) else None


class Solver:
    """How the layers of one model are solved. The layers share the object, so one change reaches all of them.

    Every setting is checked whenever it is set; there are no others.

    Args:
        tol: Relative tolerance, above 0. What it bounds, `stop` says. None for what suits that: 1e-3 for "certified",
            3e-4 for "estimated", 1e-4 for "residual". From 0.01 on convolutional layers make all products in bfloat16
            where these are faster, but never those of a proof.
        max_evals: Most evaluations per solve, at least 2. 200 is the paper's. A sample that reduced products do not
            bring to `tol` is solved again without, and has as many once more.
        stop: "certified": every unit of the equilibrium is proven to be within `tol`, relative (docs/certificate.md).
            "estimated": the error of a sample is estimated to be below `tol`, in the Euclidean norm and relative to
            it, from the rate at which it falls; cheaper, and single units may be off by more. "residual": the last
            evaluation changed a sample by less than `tol`, relative, which says little about the error; the paper's
            criterion, but per sample. The gradient's solve, for which there is no certificate, takes "estimated" for
            "certified".
        on_failure: What a solve does when a sample fails: "raise" `ConvergenceError`, "warn" (`ConvergenceWarning`,
            once per layer, direction and kind of failure), or "ignore". The layer outputs what it has in any case, NaN
            and infinity included.

    Raises:
        ValueError, TypeError, AttributeError: A value outside these, or a setting of another name.
    """

    __slots__ = ("__weakref__", "_tol", "max_evals", "on_failure", "stop")

    _tol: float | None
    max_evals: int
    stop: Stop
    on_failure: OnFailure

    def __init__(
        self, tol: float | None = None, max_evals: int = 200, stop: Stop = "estimated", on_failure: OnFailure = "warn"
    ) -> None:
        self.tol, self.max_evals, self.stop, self.on_failure = tol, max_evals, stop, on_failure

    @property
    def tol(self) -> float:
        """Relative tolerance; see the class."""
        return DEFAULT_TOL[self.stop] if self._tol is None else self._tol

    @tol.setter
    def tol(self, value: float | None) -> None:
        object.__setattr__(self, "_tol", value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_tol":  # a copy, or a pickle
            name = "tol"
        if name == "tol" and value is not None:
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
        elif name != "tol":
            raise AttributeError(f"a Solver has tol, max_evals, stop and on_failure, and no {name}")
        object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return (
            f"Solver(tol={self.tol:g}, max_evals={self.max_evals}, stop={self.stop!r}, on_failure={self.on_failure!r})"
        )

    def equilibrium(self, map_: EquilibriumMap) -> Solution:
        """The equilibrium of a layer's map."""
        return _solve_by_blocks(map_, self.tol, self.max_evals, self.stop, accelerate=True)

    def differentiable_equilibrium(self, map_: EquilibriumMap) -> tuple[Solution, Tensor]:
        """That and σ′ there, shape (N, ...), which each block takes while it has its x at hand."""
        solutions, slopes = [], []
        for block in map_.blocks():
            assert isinstance(block, EquilibriumMap)
            solutions.append(_solve_block(block, self.tol, self.max_evals, self.stop, accelerate=True))
            slopes.append(block.slopes(solutions[-1].value))
        return Solution.cat(solutions), slopes[0] if len(slopes) == 1 else torch.cat(slopes)

    def linearized(self, map_: FixedPointMap) -> Solution:
        """The gradient or the tangent of an equilibrium, for which there is no certificate."""
        stop: Stop = "residual" if self.stop == "residual" else "estimated"
        return _solve_by_blocks(map_, self.tol, self.max_evals, stop, accelerate=True)
