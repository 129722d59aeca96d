"""Recipes as their users run them, and what they leave."""

import socket
import subprocess
import sys
from pathlib import Path

from processes import ROOT

from pcdeq_zoo import VARIANTS
from pcdeq_zoo.files import read_jsonl
from pcdeq_zoo.weights import Checkpoint, read_rows

NAME = "pcdeq1_l_softsign_mnist"
CHECKPOINT = f"{NAME}.{VARIANTS[NAME].default_recipe}"  # the one that ships as its default
SHORT = f"--model {NAME} --recipe paper --data sample --epochs 2 --limit-train 640"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def command(arguments: str, processes: int = 1) -> list[str]:
    """A recipe as the README says to run it."""
    launcher = [str(Path(sys.executable).with_name("accelerate")), "launch", "--num_machines=1", "--mixed_precision=no"]
    launcher += ["--dynamo_backend=no", f"--num_processes={processes}"]
    if processes > 1:
        launcher += ["--multi_gpu", f"--main_process_port={free_port()}"]
        arguments += f" --cpu --processes {processes}"
    return [*launcher, *arguments.split()]


def launch(arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(arguments, processes), cwd=ROOT, capture_output=True, text=True)


def log_of(run: Path) -> list[dict]:
    """The log, without what no two runs share."""
    lines = read_jsonl(run / "log.jsonl")
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def row_of(run: Path, file: str = "results.csv") -> Checkpoint:
    """What a run says that it measured."""
    (row,) = read_rows(run / file)
    return row
