"""Processes of their own, as `python` starts them, but three seconds sooner: forked from one that knows PyTorch.

What reads its environment when it is imported is imported by each: huggingface_hub, timm, accelerate, this package.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired

ROOT = Path(__file__).parents[1]

# torchvision brings torch._dynamo, the larger part of what all of them import.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torch", "torchvision"])


def python(
    *arguments: object, cwd: Path = ROOT, env: Mapping[str, str] | None = None, timeout: float = 300
) -> CompletedProcess[str]:
    """What `python -W error SCRIPT ...`, `-m MODULE ...` or `-c CODE ...` does in the folder `cwd`."""
    command = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdout", "stderr")]
        process = _FORKS.Process(target=_run, args=(command, cwd, dict(os.environ if env is None else env), streams))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise TimeoutExpired(command, timeout)
        return CompletedProcess(command, process.exitcode, *(file.read_text(encoding="utf-8") for file in streams))


def _run(command: list[str], cwd: Path, environment: dict[str, str], streams: list[Path]) -> None:
    for descriptor, file in enumerate(streams, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    warnings.simplefilter("error")
    # One warning of huggingface_hub's own use of its HTTP client is none of ours.
    warnings.filterwarnings("ignore", "Use 'content=<...>' to upload")
    first, *rest = command
    folder = "" if first in ("-c", "-m") else str(Path(first).parent)
    sys.path[:0] = [folder, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    if first == "-c":
        sys.argv = [first, *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(first, run_name="__main__")
