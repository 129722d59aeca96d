"""How far a run has come, what it counts, and the line that it logs of an epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pcdeq_zoo import SolveRecord


class Progress:
    """How far a run has come, and the sums of the epoch that it is in.

    What a device counts is summed there: to read it is to wait until all that was launched is done.
    """

    def __init__(self) -> None:
        self.epoch = 1
        self.step = 0  # optimizer steps of this epoch
        self.updates = 0  # of all epochs
        self.seconds = 0.0  # of all epochs
        self.logged: dict[str, float] = {}  # what steps.jsonl has of the sums
        self._sums: dict[str, float | Tensor] = {}

    @property
    def sums(self) -> dict[str, float]:
        """What was counted up to now, which is waited for."""
        return {key: float(value) for key, value in self._sums.items()}

    @sums.setter
    def sums(self, sums: Mapping[str, float | Tensor]) -> None:
        self._sums = dict(sums)

    def next_epoch(self) -> None:
        """Begin to count again."""
        self.epoch, self.step, self.sums, self.logged = self.epoch + 1, 0, {}, {}

    def add(self, **values: float | Tensor) -> None:
        """Add to the sums, a number or a tensor of one in float64, without waiting for it."""
        for key, value in values.items():
            self._sums[key] = self._sums.get(key, 0.0) + value

    def add_solves(self, records: list[SolveRecord]) -> None:
        """Count the evaluations of solves, by layer and direction, and those that did not converge."""
        for record in records:
            key = f"{record.layer} {record.direction}"
            self.add(
                **{key: record.evaluations.sum().double(), f"{key} n": float(len(record.evaluations))},
                unconverged=(record.status != 0).sum().double(),
            )

    def line(self) -> dict[str, Any]:
        """What log.jsonl says of the epoch."""
        sums = self.sums
        return {
            "train_loss": round(sums["loss"] / sums["images"], 5),
            "train_top1": round(100 * sums["correct"] / sums["images"], 3),
            **({"train_certified": round(_certified(sums), 3)} if "certified" in sums else {}),
            "evaluations": _evaluations(sums),
            "unconverged": int(sums.get("unconverged", 0)),
            "images": int(sums["images"]),
            "seconds": round(sums["seconds"], 1),
        }

    def summary(self) -> str:
        """The same in words; evaluations "5.9/8.1/12.4" layer by layer."""
        sums = self.sums
        numbers: dict[str, list[str]] = {"forward": [], "backward": []}
        for key, value in _evaluations(sums).items():
            numbers[key.split()[-1]].append(f"{value:.1f}")
        loss, accuracy = sums["loss"] / sums["images"], 100 * sums["correct"] / sums["images"]
        parts = [f"loss {loss:.4f}", f"accuracy {accuracy:.2f} %"]
        if "certified" in sums:
            parts.append(f"certified {_certified(sums):.2f} %")
        parts += [f"{direction} {'/'.join(values)}" for direction, values in numbers.items() if values]
        if unconverged := int(sums.get("unconverged", 0)):
            parts.append(f"{unconverged} solves unconverged")
        return ", ".join(parts)

    def state_dict(self) -> dict[str, Any]:
        """All of it, as JSON can have it."""
        return {name: getattr(self, name) for name in ("epoch", "step", "updates", "seconds", "sums", "logged")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to what `state_dict` gave."""
        self.epoch, self.step, self.updates = (int(state[key]) for key in ("epoch", "step", "updates"))
        self.seconds = float(state["seconds"])
        self.sums = {key: float(value) for key, value in state["sums"].items()}
        self.logged = {key: float(value) for key, value in state["logged"].items()}


def _certified(sums: dict[str, float]) -> float:
    """Images that keep their label within the eps of their step, by intervals with solves taken for exact; percent."""
    return 100 * sums["certified"] / sums["images"]


def _evaluations(sums: dict[str, float]) -> dict[str, float]:
    """Mean evaluations per image, by layer and direction: {"features.deq1 forward": 7.2, ...}."""
    keys = sorted((key for key in sums if f"{key} n" in sums), key=lambda key: ("backward" in key, key))
    return {key: round(sums[key] / sums[f"{key} n"], 2) for key in keys}
