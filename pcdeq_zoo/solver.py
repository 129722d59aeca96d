"""The fixed point iteration: one loop, used for the equilibrium and for its gradient.

A pcDEQ layer is a positive concave map, so plain iteration converges geometrically from every nonnegative start
(Proposition 4.6 of https://arxiv.org/abs/2402.04029); its adjoint equation converges by the same iteration because the
Jacobian at the equilibrium has spectral radius below one. The loop extrapolates along the one mode that soon dominates
the error of both, and goes back to plain iteration where that does not help. It decides sample by sample: a sample's
result is fixed when it has converged, so it never depends on what else is in the batch.
"""

from __future__ import annotations

import enum
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args
from weakref import WeakSet

import torch
from torch import Tensor, nn

from pcdeq_zoo.certificate import Certificate

__all__ = [
    "ConvergenceError",
    "ConvergenceWarning",
    "OnFailure",
    "Solution",
    "SolveRecord",
    "Solver",
    "Status",
    "Stop",
    "record_solves",
    "solve",
]

OnFailure = Literal["raise", "warn", "ignore"]
Stop = Literal["certified", "estimated", "residual"]
Direction = Literal["forward", "backward"]

# Largest rate that an extrapolation believes: it multiplies the last change by at most 19.
_MAX_RATE = 0.95


class ConvergenceWarning(UserWarning):
    """A solve ended without converging, and the model goes on with what it has."""


class ConvergenceError(RuntimeError):
    """A solve ended without converging, and the model was asked to raise."""


class Status(enum.IntEnum):
    """How the solve of one sample ended."""

    CONVERGED = 0
    MAX_EVALUATIONS = 1
    NON_FINITE = 2

    @property
    def message(self) -> str:
        """What happened, and what to do about it."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.CONVERGED: "converged",
    Status.MAX_EVALUATIONS: "did not reach the tolerance; raise max_evals, or tol if float precision is the limit",
    Status.NON_FINITE: "met NaN or infinity; look at the input, the weights and the incoming gradient",
}


@dataclass(frozen=True, eq=False)
class Solution:
    """What `solve` returns, per sample (N samples).

    Attributes:
        value: The fixed point, shape (N, ...): the last iterate where it is certified, else its extrapolation.
        status: `Status` codes, shape (N,), int8.
        evaluations: Evaluations of the step spent on the sample, shape (N,), int64.
        residual: Relative change of the last evaluation, ‖z_k − z_{k−1}‖₂ / ‖z_k‖₂, shape (N,).
        bound: Largest relative error of a unit, |value − z*| ≤ bound · value, proven (`Certificate`); infinite where
            nothing was proven. Shape (N,).
    """

    value: Tensor
    status: Tensor
    evaluations: Tensor
    residual: Tensor
    bound: Tensor

    @property
    def converged(self) -> Tensor:
        """True where the sample converged, shape (N,), bool."""
        return self.status == Status.CONVERGED

    @property
    def lower(self) -> Tensor:
        """Lower bound of every unit of the equilibrium, shape (N, ...); 0 where nothing was proven."""
        return self.value * (1 - _per_sample(self.bound, self.value)).clamp(min=0)

    @property
    def upper(self) -> Tensor:
        """Upper bound of every unit of the equilibrium, shape (N, ...); infinite where nothing was proven."""
        bound = _per_sample(self.bound, self.value)
        return torch.where(bound.isfinite(), self.value * (1 + bound), math.inf)

    def failure(self) -> str | None:
        """One line that says which samples failed and how, or None if all converged."""
        parts = []
        for status in Status:
            failed = self.status == status
            if status is Status.CONVERGED or not failed.any():
                continue
            worst = self.residual[failed].max().item()
            parts.append(
                f"{int(failed.sum())} of {len(failed)} samples {status.message} "
                f"(after {int(self.evaluations[failed].max())} evaluations, relative change {worst:.1e})"
            )
        return "; ".join(parts) or None


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """View (N,) as (N, 1, ...), to be combined with the samples of `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))


def _check_limits(tol: float, max_evals: int) -> None:
    if not tol > 0:
        raise ValueError(f"tol must be above 0, got {tol!r}")
    if not max_evals >= 2:
        raise ValueError(f"max_evals must be at least 2, got {max_evals!r}")


def relative_change(change: Tensor, new: Tensor) -> Tensor:
    """‖change‖₂ / ‖new‖₂ per sample, shape (N,); 0 where nothing changed, not finite only where an entry is not."""
    dims = list(range(1, new.ndim))
    # Scaled: the squares of tiny or huge samples leave float32's range, and a vanished norm would read as convergence.
    scale = torch.maximum(new.abs(), change.abs()).amax(dims, keepdim=True).clamp(min=1e-37)
    size = torch.linalg.vector_norm(new / scale, dim=dims)
    change_size = torch.linalg.vector_norm(change / scale, dim=dims)
    return torch.where(change_size == 0, change_size, change_size / size)


def solve(
    step: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    tol: float = 1e-4,
    max_evals: int = 200,
    stop: Literal["estimated", "residual"] = "residual",
    accelerate: bool = False,
    again: Callable[[Tensor], Tensor] | None = None,
    nonnegative: bool = False,
    certificate: Certificate | None = None,
) -> Solution:
    """Iterate z ← step(z) until every sample has converged, failed, or used up its evaluations.

    The iteration goes by pairs of evaluations. The two changes d₁, d₂ of a pair give the criterion, which is asked
    after each pair (on a GPU after every second), and the extrapolation.

    Args:
        step: Map of (N, ...) to new (N, ...) that treats each sample by itself.
        start: First iterate, shape (N, ...), floating point.
        tol: Relative tolerance, above 0.
        max_evals: Most evaluations of `step`, at least 2.
        stop: What a sample has to reach. "residual": ‖d₂‖₂ ≤ tol · ‖z‖₂ over its own entries, the paper's criterion
            (section 5) per sample. "estimated": the same for the error ‖d₂‖ r / (1 − r) that is left if the changes go
            on as a geometric series, r = ‖d₂‖ / ‖d₁‖.
        accelerate: Extrapolate each pair as a geometric series with one rate per sample (Aitken's process). Given up
            for a sample when it changes more after an extrapolation than before, so that plain iteration takes over.
        again: `step(step(z))` from the change step(z) − z, called right after `step(z)`; where that is cheaper.
        nonnegative: Keep extrapolations nonnegative.
        certificate: Of a positive concave `step` and its `start`. A sample is then done when it proves every unit to
            within `tol`, instead of `stop`.
    """
    _check_limits(tol, max_evals)
    if stop not in ("estimated", "residual"):
        raise ValueError(f"stop must be estimated or residual, got {stop!r}")
    if start.ndim < 2:
        raise ValueError(f"start must be (N, ...) with at least one entry axis, got shape {tuple(start.shape)}")
    count, device, dims = len(start), start.device, list(range(1, start.ndim))
    norm = torch.linalg.vector_norm
    status = torch.full((count,), int(Status.MAX_EVALUATIONS), dtype=torch.int8, device=device)
    evaluations = torch.full((count,), max_evals // 2 * 2, dtype=torch.int64, device=device)
    residual = bound = torch.full((count,), math.inf, dtype=start.dtype, device=device)
    if start.is_meta or not count:  # shapes only: nothing to decide on
        return Solution(step(start), status, evaluations, residual, bound)

    # To ask who is done is to wait for the device; on a GPU for longer than a pair takes.
    patience = 2 if device.type == "cpu" else 4
    running = torch.ones(count, dtype=torch.bool, device=device)
    helps, extrapolated, last_size = running, ~running, residual
    value = result = start
    for k in range(2, max_evals + 1, 2):
        middle = step(value)
        first = middle - value
        new = step(middle) if again is None else again(first)
        change = new - middle
        first_size, size = norm(first, dim=dims), norm(change, dim=dims)
        if certificate is not None:
            error = certificate(middle, new, change, first, tol)
        else:
            # NaN where squares vanish or overflow; looked into below.
            now = error = size / norm(new, dim=dims)
            if stop == "estimated":
                error = now * size / (first_size - size).clamp_(min=0)

        following = new
        if accelerate:
            rate = (change * first).sum(dims).div_(first_size * first_size).nan_to_num_(0, 0, 0)
            rate = rate.masked_fill_(rate >= 1, 0).clamp_(0, _MAX_RATE)
            helps = helps & ~(extrapolated & (first_size > last_size))
            rate *= helps if certificate is None else helps & certificate.ready
            last_size, extrapolated = size, rate > 0
            following = torch.addcmul(new, _per_sample(rate / (1 - rate), new), change)
            if certificate is not None:
                following = certificate.clamp(following)
            elif nonnegative:
                following.clamp_(min=0)

        if k + 2 > max_evals or (k % patience == 0 and not error.amin().item() > tol):
            if certificate is not None:
                now = relative_change(change, new)
            elif not bool(((now > 1e-12) & (now < 1e12)).all()):
                now = error = relative_change(change, new)
                if stop == "estimated":
                    ratio = now / relative_change(first, new)
                    error = torch.where(now == 0, now, now * ratio / (1 - ratio).clamp_(min=0))
            done = running & (error <= tol)
            failed = running & ~now.isfinite()
            status.masked_fill_(done, Status.CONVERGED).masked_fill_(failed, Status.NON_FINITE)
            evaluations.masked_fill_(done | failed, k)
            residual = torch.where(running, now, residual)
            if certificate is not None:
                bound = torch.where(running, error, bound)
            # Those that go on are overwritten later. What is proven is proven of the iterate, not of the extrapolation.
            ended = new if certificate is not None else following
            result = ended if result is start else torch.where(_per_sample(running, new), ended, result)
            running = running & ~(done | failed)
            if not bool(running.any()):
                break
        value = following
        del middle, first, new, change, following  # or they would stay beside the next pair's
    return Solution(result, status, evaluations, residual, bound)


class Solver:
    """How the layers of one model are solved. The layers share the object, so one change reaches all of them.

    Args:
        tol: Relative tolerance, above 0. What it bounds, `stop` says.
        max_evals: Most evaluations per solve, at least 2. 200 is the paper's.
        stop: "certified": every unit of the equilibrium is proven to be within `tol`, relative (`Certificate`).
            "estimated": the error of a sample is estimated to be below `tol`, relative, from the rate at which it
            falls; cheaper. "residual": the last evaluation changed a sample by less than `tol`, relative, which says
            little about the error; the paper's criterion, but per sample. The gradient's solve, for which there is no
            certificate, takes "estimated" for "certified".
        on_failure: What a solve does when a sample fails: "raise" `ConvergenceError`, "warn" (`ConvergenceWarning`,
            once for all layers that share this object), or "ignore". The layer outputs what it has in any case, NaN and
            infinity included.
    """

    def __init__(
        self, tol: float = 1e-3, max_evals: int = 200, stop: Stop = "certified", on_failure: OnFailure = "warn"
    ) -> None:
        _check_limits(tol, max_evals)
        for name, value, options in (("stop", stop, Stop), ("on_failure", on_failure, OnFailure)):
            if value not in get_args(options):
                raise ValueError(f"{name} must be one of {', '.join(get_args(options))}, got {value!r}")
        self.tol = float(tol)
        self.max_evals = int(max_evals)
        self.stop = stop
        self.on_failure = on_failure

    def __repr__(self) -> str:
        return (
            f"Solver(tol={self.tol:g}, max_evals={self.max_evals}, stop={self.stop!r}, on_failure={self.on_failure!r})"
        )

    def forward(
        self,
        step: Callable[[Tensor], Tensor],
        first: Tensor,
        again: Callable[[Tensor], Tensor] | None,
        certificate: Callable[[], Certificate],
    ) -> Solution:
        """Equilibrium of a positive concave `step` from first = step(0), or by the steps of its certificate."""
        proof = certificate() if self.stop == "certified" and not first.is_meta else None
        return solve(
            step if proof is None else proof.step,
            first,
            tol=self.tol,
            max_evals=self.max_evals,
            stop="residual" if self.stop == "residual" else "estimated",
            accelerate=True,
            again=again if proof is None else None,
            nonnegative=True,
            certificate=proof,
        )

    def backward(
        self, step: Callable[[Tensor], Tensor], start: Tensor, again: Callable[[Tensor], Tensor] | None
    ) -> Solution:
        """Solution of the adjoint equation."""
        stop: Literal["estimated", "residual"] = "residual" if self.stop == "residual" else "estimated"
        return solve(step, start, tol=self.tol, max_evals=self.max_evals, stop=stop, accelerate=True, again=again)

    def report(self, solution: Solution, layer: nn.Module, direction: Direction) -> None:
        """Tell the listeners of `record_solves`, and treat failure as chosen."""
        for listener in _listeners:
            listener(layer, direction, solution)
        if self.on_failure != "ignore" and not solution.value.is_meta and (failure := solution.failure()):
            message = f"pcDEQ {direction} solve ({self!r}): {failure}"
            if self.on_failure == "raise":
                raise ConvergenceError(message)
            if self not in _warned:
                _warned.add(self)
                warnings.warn(f"{message}. Said once per model.", ConvergenceWarning, stacklevel=3)


_warned: WeakSet[Solver] = WeakSet()


class SolveRecord(NamedTuple):
    """Statistics of one solve of one layer, per sample."""

    layer: str
    direction: Direction
    status: Tensor
    evaluations: Tensor
    residual: Tensor
    bound: Tensor


# A plain list, not a context variable: autograd runs the backward solves of a GPU in a thread of its own.
_listeners: list[Callable[[nn.Module, Direction, Solution], None]] = []


@contextmanager
def record_solves(model: nn.Module) -> Iterator[list[SolveRecord]]:
    """Collect the statistics of every solve of the model's layers inside the block, in the order in which they end.

    Example:
        >>> with record_solves(model) as solves:
        ...     model(images).sum().backward()
        >>> [(s.layer, s.direction, s.evaluations.float().mean().item()) for s in solves]
    """
    names = {id(module): name for name, module in model.named_modules()}
    records: list[SolveRecord] = []

    def listen(layer: nn.Module, direction: Direction, solution: Solution) -> None:
        if id(layer) in names:
            records.append(
                SolveRecord(
                    names[id(layer)],
                    direction,
                    solution.status,
                    solution.evaluations,
                    solution.residual,
                    solution.bound,
                )
            )

    _listeners.append(listen)
    try:
        yield records
    finally:
        _listeners.remove(listen)
