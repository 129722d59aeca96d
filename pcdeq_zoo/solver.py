"""The fixed point iteration: one loop, used for the equilibrium and for its gradient.

A pcDEQ layer is a positive concave map, so plain iteration converges geometrically from every nonnegative start
(Proposition 4.6 of https://arxiv.org/abs/2402.04029); its adjoint equation converges by the same iteration because the
Jacobian at the equilibrium has spectral radius below one. The loop decides sample by sample: a finished sample keeps
its value while the others go on, so a result never depends on what else is in the batch.
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

__all__ = [
    "ConvergenceError",
    "ConvergenceWarning",
    "OnFailure",
    "Solution",
    "SolveRecord",
    "Solver",
    "Status",
    "record_solves",
    "solve",
]

OnFailure = Literal["raise", "warn", "ignore"]


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
        value: Last iterate, shape (N, ...).
        status: `Status` codes, shape (N,), int8.
        evaluations: Evaluations of the step spent on the sample, shape (N,), int64.
        residual: Relative change of the last evaluation, ‖z_k − z_{k−1}‖₂ / ‖z_k‖₂, shape (N,).
    """

    value: Tensor
    status: Tensor
    evaluations: Tensor
    residual: Tensor

    @property
    def converged(self) -> Tensor:
        """True where the sample converged, shape (N,), bool."""
        return self.status == Status.CONVERGED

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


def relative_change(new: Tensor, old: Tensor) -> Tensor:
    """‖new − old‖₂ / ‖new‖₂ per sample, shape (N,); 0 where nothing changed, not finite only where an entry is not."""
    dims = list(range(1, new.ndim))
    change = torch.linalg.vector_norm(new - old, dim=dims)
    size = torch.linalg.vector_norm(new, dim=dims)
    if bool(((size < 1e-12) | (size > 1e15)).any()):
        # The squares of such samples leave float32's range, and a vanished norm would read as convergence.
        scale = new.abs().amax(dims, keepdim=True).clamp(min=1e-37)
        change = torch.linalg.vector_norm(new / scale - old / scale, dim=dims)
        size = torch.linalg.vector_norm(new / scale, dim=dims)
    return torch.where(change == 0, change, change / size)


def solve(step: Callable[[Tensor], Tensor], start: Tensor, *, tol: float = 1e-4, max_evals: int = 200) -> Solution:
    """Iterate z ← step(z) until every sample has converged, failed, or used up its evaluations.

    A sample has converged when ‖z_k − z_{k−1}‖₂ ≤ tol · ‖z_k‖₂ over its own entries: the paper's criterion (section 5),
    taken per sample instead of over the batch.

    Args:
        step: Map of (N, ...) to (N, ...) that treats each sample by itself.
        start: First iterate, shape (N, ...), floating point.
        tol: Relative tolerance, above 0.
        max_evals: Most evaluations of `step`, at least 1.
    """
    if start.ndim < 2:
        raise ValueError(f"start must be (N, ...) with at least one entry axis, got shape {tuple(start.shape)}")
    value = start
    count = len(start)
    status = torch.full((count,), int(Status.MAX_EVALUATIONS), dtype=torch.int8, device=start.device)
    evaluations = torch.zeros(count, dtype=torch.int64, device=start.device)
    residual = torch.full((count,), math.inf, dtype=start.dtype, device=start.device)
    if start.is_meta:  # shapes only: nothing to decide on
        return Solution(step(start), status, evaluations, residual)

    running = torch.ones(count, dtype=torch.bool, device=start.device)
    everyone = True
    for _ in range(max_evals):
        new = step(value)
        if not everyone:
            new = torch.where(running.view(-1, *[1] * (new.ndim - 1)), new, value)
        change = relative_change(new, value)
        value = new

        evaluations += running
        residual = torch.where(running, change, residual)
        status[running & (change <= tol)] = Status.CONVERGED
        status[running & ~change.isfinite()] = Status.NON_FINITE
        running = status == Status.MAX_EVALUATIONS
        left = int(running.sum())
        everyone = left == count
        if left == 0:
            break
    return Solution(value, status, evaluations, residual)


class Solver:
    """How the layers of one model are solved. The layers share the object, so one change reaches all of them.

    Args:
        tol: Relative tolerance of `solve`, above 0; forward and backward. 1e-4 is the paper's.
        max_evals: Most evaluations per solve, at least 1. 200 is the paper's.
        on_failure: What a solve does when a sample fails: "raise" `ConvergenceError`, "warn" (`ConvergenceWarning`,
            once for all layers that share this object), or "ignore". The value is the last iterate in any case, and
            NaN or infinity is passed on.
    """

    def __init__(self, tol: float = 1e-4, max_evals: int = 200, on_failure: OnFailure = "warn") -> None:
        if not tol > 0:
            raise ValueError(f"tol must be above 0, got {tol!r}")
        if not max_evals >= 1:
            raise ValueError(f"max_evals must be at least 1, got {max_evals!r}")
        if on_failure not in get_args(OnFailure):
            raise ValueError(f"on_failure must be one of {', '.join(get_args(OnFailure))}, got {on_failure!r}")
        self.tol = float(tol)
        self.max_evals = int(max_evals)
        self.on_failure = on_failure

    def __repr__(self) -> str:
        return f"Solver(tol={self.tol:g}, max_evals={self.max_evals}, on_failure={self.on_failure!r})"

    def __call__(
        self,
        step: Callable[[Tensor], Tensor],
        start: Tensor,
        layer: nn.Module,
        direction: Literal["forward", "backward"],
    ) -> Solution:
        """`solve` with these settings; tells the listeners of `record_solves`, and treats failure as chosen."""
        solution = solve(step, start, tol=self.tol, max_evals=self.max_evals)
        for listener in _listeners:
            listener(layer, direction, solution)
        if self.on_failure != "ignore" and not start.is_meta and (failure := solution.failure()):
            message = f"pcDEQ {direction} solve ({self!r}): {failure}"
            if self.on_failure == "raise":
                raise ConvergenceError(message)
            if self not in _warned:
                _warned.add(self)
                warnings.warn(f"{message}. Said once per model.", ConvergenceWarning, stacklevel=3)
        return solution


_warned: WeakSet[Solver] = WeakSet()


class SolveRecord(NamedTuple):
    """Statistics of one solve of one layer, per sample."""

    layer: str
    direction: Literal["forward", "backward"]
    status: Tensor
    evaluations: Tensor
    residual: Tensor


# A plain list, not a context variable: autograd runs the backward solves of a GPU in a thread of its own.
_listeners: list[Callable[[nn.Module, Literal["forward", "backward"], Solution], None]] = []


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

    def listen(layer: nn.Module, direction: Literal["forward", "backward"], solution: Solution) -> None:
        if id(layer) in names:
            records.append(
                SolveRecord(names[id(layer)], direction, solution.status, solution.evaluations, solution.residual)
            )

    _listeners.append(listen)
    try:
        yield records
    finally:
        _listeners.remove(listen)
