"""The folder of a run: who may write to it, its settings, and the states that `--resume` goes on from.

    run.json                    the settings, and by which commits and hardware it was trained
    log.jsonl                   a line per epoch
    steps.jsonl                 with --log-every, a line every so many steps
    state/epoch-0002-step-…/    the newest state: tensors as safetensors, the rest as JSON, digests.json over all
    model.safetensors           the result, when the run is finished; then there is no state any more

A run folder may come from anywhere, so nothing in it is ever unpickled, and a state that is not what was written is
refused: a run that goes on from damaged numbers would end with a checkpoint that nobody can reproduce.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from pcdeq_zoo.errors import one_line
from pcdeq_zoo.files import replace_file, sync_folder

_STATE_NAME = re.compile(r"epoch-\d{4,}-step-\d{6,}(-\d+)?")
_PARTIAL_PREFIX = ".partial-"  # a state that is being written, or removed
_DIGESTS = "digests.json"
_RECORDS = ("run.json", "log.jsonl")  # of the run, kept with each state as they were


@dataclass(frozen=True)
class State:
    """What a run goes on from.

    Attributes:
        tensors: Named groups of tensors, e.g. {"model": state dict, "optimizer": ...}.
        progress: How far the run has come, as JSON has it.
        log: The lines of log.jsonl.
    """

    tensors: dict[str, dict[str, Tensor]]
    progress: dict[str, Any]
    log: str


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Claim a run's folder until the block or the process ends, however it ends.

    Killing `accelerate launch` leaves the training alive; a second one must not write into the same folder.

    Raises:
        SystemExit: Another process has it, or its file system knows no locks.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = (output / ".lock").open("w")
    except OSError as error:
        raise SystemExit(f"cannot write to {str(output)[:200]}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SystemExit(f"another process is training in {output}") from error
        except OSError as error:
            raise SystemExit(
                f"cannot lock {output}: {error.strerror}; give an --output on another file system"
            ) from error
        yield


def check_folder(output: Path, settings: dict[str, Any], resume: str | None) -> None:
    """Refuse a folder that holds a run which was not to be resumed, or one with other settings, or no such state.

    Raises:
        SystemExit: What was found, and what to do.
    """
    record = output / "run.json"
    try:
        held = {file.name for file in output.iterdir()} - {".lock"} if output.exists() else set()
    except OSError as error:
        raise SystemExit(f"{str(output)[:200]} is no folder for a run: {error.strerror}") from error
    if resume is None:
        if held:
            raise SystemExit(f"{output} already holds a run; give another --output, --resume it, or remove it")
    elif not record.exists() and (other := {name for name in held if not name.startswith(".run.json.")}):
        raise SystemExit(f"{output} holds no run of train.py, but {', '.join(sorted(other))}; give another --output")
    elif resume != "latest":
        if not (Path(resume) / "run.json").is_file():
            raise SystemExit(f"no state {resume} to resume from; --resume alone takes the newest of {output}")
        compare_settings(settings, Path(resume) / "run.json")
        if (output / "model.safetensors").exists():
            raise SystemExit(f"{output} is finished, and cannot go on from {resume}; give another --output")
    if record.exists():
        compare_settings(settings, record)


def compare_settings(settings: dict[str, Any], record: Path) -> None:
    """Refuse to go on with other settings than a run.json has; commit, hardware and where data lie may change."""
    before, now = _flat(read_record(record)), _flat(settings)
    free = ("commit", "hardware", "data")
    if other := [key for key in now if key not in free and now[key] != before.get(key)]:
        found = ", ".join(f"{key} {before.get(key)!r} there, {now[key]!r} here" for key in other)
        raise SystemExit(f"{record.parent} holds a run with other settings: {found}; give another --output")


def record_launch(output: Path, settings: dict[str, Any], state: Path | None) -> None:
    """Write run.json; for a run that goes on add to what its state was trained by, "1 CPU thread; 2 CPU threads".

    Args:
        output: The run's folder.
        settings: Of this launch.
        state: What it goes on from, maybe of another folder; None if it starts.
    """
    if state:
        before, settings = read_record(state / "run.json"), dict(settings)
        for key in ("commit", "hardware"):
            if settings[key] not in (known := str(before.get(key)).split("; ")):
                known.append(settings[key])
            settings[key] = "; ".join(known)
    replace_file(output / "run.json", json.dumps(settings, indent=1) + "\n")


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """The same with a key for each setting of the recipe, so that only those that differ need to be told."""
    recipe = settings.get("recipe")
    parts = {f"recipe.{key}": value for key, value in recipe.items()} if isinstance(recipe, dict) else {}
    return {key: value for key, value in settings.items() if key != "recipe"} | parts


def read_record(record: Path) -> dict[str, Any]:
    """What a run.json says.

    Raises:
        SystemExit: It is damaged.
    """
    try:
        settings = json.loads(record.read_text("utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"it holds a {type(settings).__name__}")
    except (OSError, ValueError) as error:
        raise SystemExit(f"{record} is not what train.py wrote: {one_line(error)}") from error
    return settings


def commit() -> str:
    """Commit of this code, for the record, with "-dirty" where it was changed; empty outside a git checkout."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def newest_state(output: Path) -> Path | None:
    """The newest state of a run, or None."""
    return max(_states(output / "state"), default=None)


def write_state(output: Path, name: str, tensors: dict[str, dict[str, Tensor]], progress: dict[str, Any]) -> None:
    """Write a state whole under another name, sync and rename it, and remove the states before it.

    Whatever else is in the folder stays.

    Args:
        output: The run's folder; its run.json and log.jsonl are kept with the state.
        name: "epoch-0002-step-000040": states are ordered by it.
        tensors: See `State`.
        progress: See `State`.
    """
    folder = output / "state"
    folder.mkdir(exist_ok=True)
    _remove_partials(folder)
    contents = {
        f"{group}.safetensors": safetensors.torch.save({key: value.cpu().contiguous() for key, value in part.items()})
        for group, part in tensors.items()
    }
    contents["progress.json"] = json.dumps(progress).encode()
    contents |= {record: (output / record).read_bytes() for record in _RECORDS if (output / record).exists()}
    digests = {file: hashlib.sha256(content).hexdigest() for file, content in contents.items()}
    contents[_DIGESTS] = json.dumps(digests, indent=1).encode()

    temporary = folder / (_PARTIAL_PREFIX + name)
    temporary.mkdir()
    for file, content in contents.items():
        with (temporary / file).open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    sync_folder(temporary)
    before = _states(folder)
    taken = {state.name for state in before}  # this name too, where the run went on from that state and comes by again
    names = chain([name], (f"{name}-{number}" for number in count(2)))
    temporary.rename(folder / next(free for free in names if free not in taken))
    sync_folder(folder)
    for state in before:
        _remove(state)


def read_state(state: Path) -> State:
    """Read a state, every byte of which must be what was written.

    Raises:
        SystemExit: It is not; the line says which file, and what to do.
    """
    try:
        digests = json.loads((state / _DIGESTS).read_bytes())
        contents = {file: (state / Path(file).name).read_bytes() for file in digests}
        if damaged := [file for file in digests if hashlib.sha256(contents[file]).hexdigest() != digests[file]]:
            raise ValueError(f"{', '.join(damaged)} is not what its digest says")
        tensors = {
            Path(file).stem: safetensors.torch.load(content)
            for file, content in contents.items()
            if file.endswith(".safetensors")
        }
        return State(tensors, json.loads(contents["progress.json"]), contents.get("log.jsonl", b"").decode())
    except FileNotFoundError as error:
        reason = f"it has no {Path(error.filename).name}"
    except (ValueError, KeyError, TypeError, AttributeError, OSError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise SystemExit(f"cannot resume from {state}, {reason}; remove it, and --resume again")


def remove_states(output: Path) -> None:
    """Remove the states of a finished run; whatever else is beside them stays."""
    folder = output / "state"
    _remove_partials(folder)  # first: one may be of the name that a state is removed under
    for state in _states(folder):
        _remove(state)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _remove_partials(folder: Path) -> None:
    """Remove what processes that were killed have left; this one has the lock."""
    for partial in folder.glob(f"{_PARTIAL_PREFIX}*"):
        shutil.rmtree(partial)


def _remove(state: Path) -> None:
    """Remove a state so that no part of it is ever taken for one."""
    shutil.rmtree(state.rename(state.with_name(_PARTIAL_PREFIX + state.name)))


def _states(folder: Path) -> list[Path]:
    return [state for state in folder.glob("epoch-*") if _STATE_NAME.fullmatch(state.name)]
