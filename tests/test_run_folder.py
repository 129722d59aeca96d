"""The states of a run: what is in them, and that nothing else is taken for one."""

import errno
import json
import os
import pickle
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import train
from recipe_runs import NAME, SHORT, row_of
from run_folder import locked, newest_state, read_state, record_launch, remove_states, write_state

from pcdeq_zoo.weights import sha256

INTERRUPTED = f"{SHORT} --save-every 3 --ema-decay 0.9"


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """A run that ended in its second epoch, two steps after the epoch's first state."""
    output = tmp_path_factory.mktemp("interrupted") / "run"
    step = train.Training.step

    def fail(training: train.Training, indices: torch.Tensor, eps: float) -> None:
        if (training.progress.epoch, training.progress.step) == (2, 4):
            raise KeyboardInterrupt
        step(training, indices, eps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Training, "step", fail)
        patch.setattr(sys, "argv", ["train.py", *INTERRUPTED.split(), f"--output={output}"])
        with pytest.raises(KeyboardInterrupt):
            train.main()
    return output


def test_who_trained_it_is_known_of_a_state_that_went_elsewhere(tmp_path):
    state, elsewhere = tmp_path / "state", tmp_path / "elsewhere"
    for folder in (state, elsewhere):
        folder.mkdir()
    first = {"commit": "a-dirty", "hardware": "2 CPU threads", "data": "there"}
    second = {"commit": "b", "hardware": "2 CPU threads", "data": "here"}
    record_launch(state, first, None)
    record_launch(elsewhere, second | {"commit": "c"}, None)  # trained nothing of what goes on here
    wanted = {"commit": "a-dirty; b", "hardware": "2 CPU threads", "data": "here"}
    for _ in range(2):
        record_launch(elsewhere, second, state)
        assert json.loads((elsewhere / "run.json").read_text()) == wanted
    record_launch(elsewhere, second, None)
    assert json.loads((elsewhere / "run.json").read_text()) == second


def test_a_file_system_without_locks_is_no_other_training(tmp_path, monkeypatch):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(SystemExit, match=r"cannot lock .*: No locks available; give an --output on another file"):
        locked(tmp_path).__enter__()


def only_state(run: Path) -> Path:
    (state,) = (run / "state").glob("epoch-*")
    return state


class Attack:
    """Unpickled, it writes a file: what a state folder from somewhere else could do."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def rewrite(state: Path, **changes: object) -> None:
    """Change progress.json, digest included: what a damaged disk does not do, and a person may."""
    progress = json.loads((state / "progress.json").read_text()) | changes
    (state / "progress.json").write_text(json.dumps(progress))
    digests = json.loads((state / "digests.json").read_text())
    digests["progress.json"] = sha256(state / "progress.json")
    (state / "digests.json").write_text(json.dumps(digests))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_state_holds_no_pickles_and_none_is_loaded(interrupted: Path, tmp_path, here, refuse):
    """As accelerate loads `custom_checkpoint_*.pkl` and `optimizer.bin`, from a run folder of somebody else."""
    run = Path(shutil.copytree(interrupted, tmp_path / "run"))
    state = only_state(run)
    names = ["digests.json", "ema.safetensors", "log.jsonl", "model.safetensors", "optimizer.safetensors"]
    assert sorted(file.name for file in state.iterdir()) == [*names, "progress.json", "run.json"]
    planted = ("custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl", "random_states_0.pkl", "optimizer.bin")
    for name in (*planted, "pytorch_model.bin", "scheduler.bin"):
        (state / name).write_bytes(pickle.dumps(Attack(tmp_path / "attacked")))
    here(train.main, f"{INTERRUPTED} --output {run} --resume")
    assert (run / "results.csv").exists()
    assert not (tmp_path / "attacked").exists()

    run = Path(shutil.copytree(interrupted, tmp_path / "only-pickles"))
    state = only_state(run)
    for file in state.iterdir():
        file.write_bytes(pickle.dumps(Attack(tmp_path / "attacked")))
    line = refuse(train.main, f"{INTERRUPTED} --output {run} --resume")
    assert line.startswith(f"cannot resume from {state}, UnicodeDecodeError: ")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda state: flip(state / "model.safetensors"), "model.safetensors is not what its digest says"),
        (lambda state: flip(state / "optimizer.safetensors"), "optimizer.safetensors is not what its digest says"),
        (lambda state: flip(state / "log.jsonl"), "log.jsonl is not what its digest says"),
        (lambda state: flip(state / "digests.json"), "JSONDecodeError"),
        (lambda state: (state / "log.jsonl").unlink(), "it has no log.jsonl"),
        (lambda state: (state / "ema.safetensors").unlink(), "it has no ema.safetensors"),
        (lambda state: (state / "digests.json").unlink(), "it has no digests.json"),
        (lambda state: (state / "digests.json").write_text("[]"), "KeyError: 'progress.json'"),
        (lambda state: rewrite(state, step=10**9), "epoch 2, step 1000000000, of 2 epochs of 10 steps"),
        (lambda state: rewrite(state, step=-1), "epoch 2, step -1, of 2 epochs of 10 steps"),
        (lambda state: rewrite(state, epoch=9), "epoch 9, step 3, of 2 epochs of 10 steps"),
        (lambda state: rewrite(state, updates=0), "0 updates, wanted 13"),
        (lambda state: rewrite(state, epoch=1, updates=3), "a log of 1 epochs before epoch 1"),
        (lambda state: rewrite(state, sums=[]), "it is not of this run: 'list' object has no attribute 'items'"),
    ],
)
def test_a_state_that_is_not_what_was_written_is_refused(interrupted: Path, tmp_path, refuse, damage, reason: str):
    run = Path(shutil.copytree(interrupted, tmp_path / "run"))
    state = only_state(run)
    damage(state)
    record = json.loads((run / "run.json").read_text()) | {"commit": "0123456789ab"}
    (run / "run.json").write_text(json.dumps(record))
    line = refuse(train.main, f"{INTERRUPTED} --output {run} --resume")
    assert line.startswith(f"cannot resume from {state}, ")
    assert reason in line
    assert not (run / "model.safetensors").exists()
    assert json.loads((run / "run.json").read_text()) == record  # this code has trained nothing of it


def test_a_state_of_the_same_step_is_there_until_the_new_one_is(interrupted: Path, tmp_path, monkeypatch):
    """A run goes on from an older state and comes by its newest one again, when the power fails."""
    run = Path(shutil.copytree(interrupted, tmp_path / "run"))
    state = only_state(run)
    before = read_state(state)
    write_state(run, state.name, before.tensors, before.progress)
    (again,) = (run / "state").iterdir()
    assert again == newest_state(run)
    assert again != state
    assert read_state(again).progress == before.progress

    def no_power(*_: object) -> None:
        raise OSError("no power")

    def power_fails_while_removing(state: Path, **_: object) -> None:
        (state / "digests.json").unlink()
        raise OSError("no power")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", power_fails_while_removing)
        with pytest.raises(OSError, match="no power"):
            write_state(run, state.name, before.tensors, before.progress)  # one that is sorted before the other
    again = newest_state(run)
    assert read_state(again).progress == before.progress

    monkeypatch.setattr(Path, "rename", no_power)
    with pytest.raises(OSError, match="no power"):
        write_state(run, again.name, before.tensors, before.progress)
    assert newest_state(run) == again


# Of 200 steps to an epoch, which no machine takes in that time.
TIMED = f"--model {NAME} --data sample --batch-size 8 --minutes 0.001 --save-every 1"


def test_a_timed_run_that_is_ended_when_its_time_is_up_has_only_to_be_measured(tmp_path, monkeypatch, refuse, here):
    log = train.Training._log

    def end(training: train.Training) -> None:
        log(training)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train.Training, "_log", end)
    monkeypatch.setattr(train.ENDING, "_terminated", False)  # and so again for other tests
    line = refuse(train.main, f"{TIMED} --output {tmp_path / 'run'}")
    assert line == "this was ended by SIGTERM; the training is done, and --resume measures it"
    assert "epoch" not in here(train.main, f"{TIMED} --output {tmp_path / 'run'} --resume")
    assert float(row_of(tmp_path / "run").row["epochs"]) > 0


def test_a_timed_run_that_is_killed_when_its_time_is_up_keeps_its_last_line(tmp_path, monkeypatch, here):
    """A state of the last step would have a log without it."""

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.Training, "_write_weights", kill)
        with pytest.raises(KeyboardInterrupt):
            here(train.main, f"{TIMED} --output {tmp_path / 'run'}")
    assert "epoch 1: " in here(train.main, f"{TIMED} --output {tmp_path / 'run'} --resume")
    assert float(row_of(tmp_path / "run").row["epochs"]) > 0


def test_a_state_is_removed_beside_what_is_left_of_one_of_its_name(tmp_path):
    write_state(tmp_path, "epoch-0001-step-000001", {}, {})
    (tmp_path / "state" / ".partial-epoch-0001-step-000001").mkdir()
    (tmp_path / "state" / ".partial-epoch-0001-step-000001" / "progress.json").touch()
    remove_states(tmp_path)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077], ids=oct)
def test_others_may_read_what_the_umask_lets_them(umask: int, tmp_path):
    before = os.umask(umask)
    try:
        record_launch(tmp_path, {"commit": "a", "hardware": "2 CPU threads", "data": "here"}, None)
        write_state(tmp_path, "epoch-0001-step-000001", {"model": {"x": torch.zeros(1)}}, {})
    finally:
        os.umask(before)
    state = newest_state(tmp_path)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "run.json", state, *state.iterdir())}
    assert modes == {name: (0o777 if name == state.name else 0o666) & ~umask for name in modes}


def test_what_is_beside_the_states_stays(interrupted: Path, tmp_path, here):
    """Somebody's notes and backups, and what a killed process had begun to write."""
    run = Path(shutil.copytree(interrupted, tmp_path / "run"))
    (run / "state" / "notes.txt").touch()
    (run / "state" / "my-backup").mkdir()
    (run / "state" / ".partial-x").mkdir()
    here(train.main, f"{INTERRUPTED} --output {run} --resume")
    assert sorted(file.name for file in (run / "state").iterdir()) == ["my-backup", "notes.txt"]
