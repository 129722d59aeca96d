"""How far a run has come, what it counts, and the line that it logs of an epoch."""

from __future__ import annotations

from typing import Any

from pcdeq_zoo import SolveRecord


class Progress:
    """How far a run has come, and the sums of the epoch that it is in."""

    def __init__(self) -> None:
        self.epoch = 1
        self.step = 0  # optimizer steps of this epoch
        self.updates = 0  # of all epochs
        self.sums: dict[str, float] = {}

    def next_epoch(self) -> None:
        """Begin to count again."""
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}

    def add(self, **values: float) -> None:
        """Add to the sums."""
        for key, value in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + value

    def add_solves(self, records: list[SolveRecord]) -> None:
        """Count the evaluations of solves, by layer and direction, and those that did not converge."""
        for record in records:
            key = f"{record.layer} {record.direction}"
            counts = {key: float(record.evaluations.sum()), f"{key} n": float(len(record.evaluations))}
            self.add(**counts, unconverged=float((record.status != 0).sum()))

    def evaluations(self) -> dict[str, float]:
        """Mean evaluations per image, by layer and direction: {"features.deq1 forward": 7.2, ...}."""
        keys = sorted((key for key in self.sums if f"{key} n" in self.sums), key=lambda key: ("backward" in key, key))
        return {key: round(self.sums[key] / self.sums[f"{key} n"], 2) for key in keys}

    def line(self) -> dict[str, Any]:
        """What log.jsonl says of the epoch."""
        return {
            "train_loss": round(self.sums["loss"] / self.sums["images"], 5),
            "train_top1": round(100 * self.sums["correct"] / self.sums["images"], 3),
            "evaluations": self.evaluations(),
            "unconverged": int(self.sums["unconverged"]),
            "seconds": round(self.sums["seconds"], 1),
        }

    def summary(self) -> dict[str, str]:
        """The same for a progress bar; evaluations "5.9/8.1/12.4" layer by layer."""
        numbers: dict[str, list[str]] = {"forward": [], "backward": []}
        for key, value in self.evaluations().items():
            numbers[key.split()[-1]].append(f"{value:.1f}")
        return {
            "loss": f"{self.sums['loss'] / self.sums['images']:.4f}",
            "acc": f"{100 * self.sums['correct'] / self.sums['images']:.2f}",
            **{direction: "/".join(values) for direction, values in numbers.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """All of it, as JSON can have it."""
        return {"epoch": self.epoch, "step": self.step, "updates": self.updates, "sums": dict(self.sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to what `state_dict` gave."""
        self.epoch, self.step, self.updates = (int(state[key]) for key in ("epoch", "step", "updates"))
        self.sums = {key: float(value) for key, value in state["sums"].items()}
