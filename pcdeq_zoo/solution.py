"""What a solve returns, and who is told of it: warnings, errors, and `record_solves`."""

from __future__ import annotations

import enum
import math
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pcdeq_zoo.maps import per_sample

__all__ = [
    "ConvergenceError",
    "ConvergenceWarning",
    "Direction",
    "OnFailure",
    "Solution",
    "SolveRecord",
    "Status",
    "announce",
    "record_solves",
]

OnFailure = Literal["raise", "warn", "ignore"]
Direction = Literal["forward", "backward", "tangent"]


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
    Status.NON_FINITE: "met NaN or infinity; look at the input and the weights",
}


@dataclass(frozen=True, eq=False)
class Solution:
    """What `solve` returns, per sample (N samples).

    Attributes:
        value: The fixed point, shape (N, ...): the last iterate where it is certified, else its extrapolation.
        status: `Status` codes, shape (N,), int8.
        evaluations: Evaluations of the step spent on the sample, shape (N,), int64.
        residual: Relative change of the last evaluation, ‖z_k − z_{k−1}‖₂ / ‖z_k‖₂, shape (N,).
        bound: Largest relative error of a unit, |value − z*| ≤ bound · value, proven; infinite where nothing was
            proven. Shape (N,).
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
        bound = per_sample(self.bound, self.value)
        return torch.where(bound < 1, self.value * (1 - bound), 0.0)

    @property
    def upper(self) -> Tensor:
        """Upper bound of every unit of the equilibrium, shape (N, ...); infinite where nothing was proven."""
        bound = per_sample(self.bound, self.value)
        return torch.where(bound.isfinite(), self.value * (1 + bound), math.inf)

    def failure(self) -> str | None:
        """One line that says which samples failed and how, or None if all converged."""
        if not bool(self.status.any()):  # the code of CONVERGED is 0
            return None
        parts = []
        for status in (Status.MAX_EVALUATIONS, Status.NON_FINITE):
            failed = self.status == status
            if failed.any():
                worst = self.residual[failed].max().item()
                parts.append(
                    f"{int(failed.sum())} of {len(failed)} samples {status.message} "
                    f"(after {int(self.evaluations[failed].max())} evaluations, relative change {worst:.1e})"
                )
        return "; ".join(parts)

    def _parts(self) -> tuple[Tensor, ...]:
        return self.value, self.status, self.evaluations, self.residual, self.bound

    def __getitem__(self, samples: Tensor) -> Solution:
        """The solution of some of the samples."""
        return Solution(*(part[samples] for part in self._parts()))

    @staticmethod
    def cat(solutions: list[Solution]) -> Solution:
        """The solutions of the parts of a batch as one."""
        if len(solutions) == 1:
            return solutions[0]
        return Solution(*map(torch.cat, zip(*(solution._parts() for solution in solutions), strict=True)))

    def replace(self, samples: Tensor, other: Solution) -> None:
        """Put another solution of some of the samples, by their indices, in the place of theirs."""
        for mine, others in zip(self._parts(), other._parts(), strict=True):
            mine[samples] = others


class SolveRecord(NamedTuple):
    """Statistics of one solve of one layer, per sample; see `Solution`. direction: "forward", "backward", "tangent"."""

    layer: str
    direction: Direction
    status: Tensor
    evaluations: Tensor
    residual: Tensor
    bound: Tensor


class _Recording(NamedTuple):
    thread: int
    names: dict[int, str]  # of the model's layers, by their id
    records: list[SolveRecord]


_recordings: list[_Recording] = []
_recordings_lock = threading.Lock()


@contextmanager
def record_solves(model: nn.Module) -> Iterator[list[SolveRecord]]:
    """Collect the statistics of every solve of the model's layers inside the block, in the order in which they end.

    Of this thread only. On a GPU autograd runs backward solves in a thread of its own; they belong to the thread that
    ran the forward.

    Example:
        >>> with record_solves(model) as solves:
        ...     model(images).sum().backward()
        >>> [(s.layer, s.direction, s.evaluations.float().mean().item()) for s in solves]
    """
    names = {id(module): name for name, module in model.named_modules()}
    recording = _Recording(threading.get_ident(), names, [])
    with _recordings_lock:
        _recordings.append(recording)
    try:
        yield recording.records
    finally:
        with _recordings_lock:
            _recordings[:] = [other for other in _recordings if other is not recording]


_warned: WeakKeyDictionary[nn.Module, set[tuple[Direction, Status]]] = WeakKeyDictionary()


def announce(
    solution: Solution, layer: nn.Module | None, direction: Direction, thread: int, on_failure: OnFailure
) -> None:
    """Tell `record_solves` of a solve, and treat samples that failed as `on_failure` says.

    Args:
        solution: Of all samples.
        layer: Whose it is; None if that is no more, and only its graph is.
        direction: Of the equilibrium, its gradient or its tangent.
        thread: `threading.get_ident()` of the thread that it belongs to.
        on_failure: See `Solver`. A warning is given once per layer, direction and kind of failure.
    """
    for recording in tuple(_recordings):  # another thread may end its own meanwhile
        if recording.thread == thread and id(layer) in recording.names:
            parts = (solution.status, solution.evaluations, solution.residual, solution.bound)
            recording.records.append(SolveRecord(recording.names[id(layer)], direction, *parts))
    if on_failure == "ignore" or solution.value.is_meta or not (failure := solution.failure()):
        return
    name = "a deleted layer" if layer is None else f"{type(layer).__name__}({layer.extra_repr()})"
    message = f"{direction} solve of {name}: {failure}"
    if on_failure == "raise":
        raise ConvergenceError(message)
    kinds = {(direction, Status(code)) for code in solution.status.unique().tolist() if code != Status.CONVERGED}
    told = set() if layer is None else _warned.setdefault(layer, set())
    if kinds - told:
        told |= kinds
        warnings.warn(f"{message}. Said once per layer and kind.", ConvergenceWarning, stacklevel=3)
