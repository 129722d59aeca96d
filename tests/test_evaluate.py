"""Evaluation: what is measured, of which files, and the rows that it writes."""

from pathlib import Path

import evaluate
import pytest
import torch
from recipe_runs import CHECKPOINT, NAME, row_of

from pcdeq_zoo.weights import checkpoints, sha256


@pytest.mark.parametrize("own", [True, False])
def test_evaluate_writes_a_row_of_what_it_measured(run: Path, tmp_path, here, own: bool):
    """How a file was trained is known of those that ship only, whatever another one is called."""
    shipped = checkpoints()[CHECKPOINT]
    file = shipped.file if own else run / "model.safetensors"
    arguments = f"--model {NAME} --checkpoint {file} --data sample --output {tmp_path / 'row.csv'}"
    here(evaluate.main, arguments)
    row = row_of(tmp_path, "row.csv").row
    assert row["sha256"] == sha256(file)
    assert row["n"] == "400"
    known = shipped.row if own else {"model": NAME}
    for column in ("model", "epochs", "seed", "commit", "hardware", "hours"):
        assert row[column] == known.get(column, "")


def test_nothing_measured_otherwise_is_in_the_row_of_a_robust_net(tmp_path, here):
    """Its own row has columns that this does not measure without --eps."""
    name = next(key for key, checkpoint in checkpoints().items() if checkpoint.row["pgd"])
    here(evaluate.main, f"--model {name} --data sample --output {tmp_path / 'row.csv'}")
    row = row_of(tmp_path, "row.csv").row
    assert row["hours"] == checkpoints()[name].row["hours"]
    robust = ("eps", "pgd", "certified_interval", "certified_linear", "unclipped_interval", "unclipped_linear")
    assert [row[column] for column in robust] == [""] * 6


def test_calibration_error():
    confidence = torch.tensor([0.62, 0.64, 0.91, 0.93, 1.0])
    correct = torch.tensor([True, False, True, True, False])
    # Bins of 1/15: 0.62 and 0.64 share (0.6, 0.667], 0.91 and 0.93 (0.867, 0.933], 1.0 has (0.933, 1].
    by_hand = (2 * abs(0.63 - 0.5) + 2 * abs(0.92 - 1) + abs(1.0 - 0)) / 5
    assert evaluate.calibration_error(confidence, correct) == pytest.approx(by_hand, abs=1e-6)
