"""Train several models with several seeds on one machine, a few at a time.

    python recipes/sweep.py 'pcdeq*_l_*_mnist' --seeds 0 1 2 3 4 --jobs 2
    python recipes/sweep.py 'pcdeq1_mc_*_cifar' --recipe zoo --jobs 1 -- --save-every 200
    python recipes/sweep.py 'pcdeq*_mnist' --print > commands.txt    # for a scheduler: one command per line

Every run has a folder <runs>/<model>.<recipe>.seed<seed>, and beside it a file with what it prints, of the same name
and .txt. Runs that are finished are left alone, others go on where they were: start a sweep that was killed again. A
folder with a run of other settings is refused: give trials, such as those with --hold-out, a place of their own with
--runs. What follows `--` goes to recipes/train.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv}:  # at once: what follows takes seconds to import
    print(Path(__file__).with_suffix(".txt").read_text("utf-8"), end="")
    sys.exit()

import argparse
import fnmatch
import shlex
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from config import HelpFormatter
from tqdm import tqdm

from pcdeq_zoo import VARIANTS

_OWN = ("--model", "--recipe", "--seed", "--output", "--resume")
TRAIN = Path(__file__).with_name("train.py")

_running: set[subprocess.Popen[bytes]] = set()
_ended = threading.Event()


def commands(
    runs: Path, models: list[str], recipe: str | None, seeds: list[int], threads: int, extra: list[str]
) -> dict[Path, list[str]]:
    """The command of each run, by its folder."""
    train = ["env", f"OMP_NUM_THREADS={threads}", sys.executable, str(TRAIN), "--mixed-precision=no"]
    found = {}
    for seed in seeds:
        for model in models:
            tag = recipe or VARIANTS[model].default_recipe
            output = runs / f"{model}.{tag}.seed{seed}"
            settings = [f"--model={model}", f"--recipe={tag}", f"--seed={seed}", f"--output={output}", "--resume"]
            found[output] = [*train, *settings, *extra]
    return found


def run(output: Path, command: list[str]) -> bool:
    """Run one command; whether it went well."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.with_name(f"{output.name}.txt").open("a", encoding="utf-8") as console:
        process = subprocess.Popen(command, stdout=console, stderr=subprocess.STDOUT)
        _running.add(process)
        if _ended.is_set():  # since `main` looked for those that run
            process.terminate()
        well = process.wait() == 0
        _running.discard(process)
    tqdm.write(f"{output} {'is finished' if well else f'failed, see {console.name}'}")
    return well


def make_parser() -> argparse.ArgumentParser:
    """The parser of a command line."""
    parser = argparse.ArgumentParser("sweep.py", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("models", nargs="+", metavar="GLOB", help="names in the zoo")
    parser.add_argument("--recipe", help="paper, zoo, ... (default: that of each model's checkpoint)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="default: 0")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="of the CPU, per run (default: PyTorch's, shared among the jobs)"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")
    parser.add_argument("--print", action="store_true", help="print the commands and run nothing")
    return parser


def main() -> None:
    sys.stdout.reconfigure(errors="backslashreplace")
    parser = make_parser()
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    args = parser.parse_args(arguments[:split])
    threads = max(1, torch.get_num_threads() // max(1, args.jobs)) if args.threads is None else args.threads
    for flag, value in (("jobs", args.jobs), ("threads", threads)):
        if value < 1:
            parser.error(f"--{flag} must be above 0, got {value}")
    if bad := [seed for seed in args.seeds if not 0 <= seed < 2**32]:
        parser.error(f"--seeds must be at least 0 and below {2**32}, got {bad[0]}")
    extra = arguments[split + 1 :]
    if own := [flag for flag in extra if flag.split("=")[0] in _OWN]:
        parser.error(f"{own[0]} is what a sweep says itself; it cannot follow --")
    models = [name for name in VARIANTS if any(fnmatch.fnmatch(name, glob) for glob in args.models)]
    if not models:
        parser.error(f"no model matches {' '.join(args.models)}; the zoo has {', '.join(VARIANTS)}")
    if without := [name for name in models if args.recipe and args.recipe not in VARIANTS[name].recipes]:
        has = ", ".join(VARIANTS[without[0]].recipes)
        parser.error(f"{without[0]} has no recipe {args.recipe}; it has {has}")

    runs = commands(args.runs, models, args.recipe, args.seeds, threads, extra)
    if args.print:
        print("\n".join(shlex.join(command) for command in runs.values()))
        return
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit("the sweep was ended, and so are its runs; start it again to go on")
    )
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            finished = pool.map(run, runs.keys(), runs.values())
            done = list(tqdm(finished, total=len(runs), desc="sweep", unit="run", disable=None))
        finally:
            _ended.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(_running):
                process.terminate()
            for process in list(_running):
                process.wait()
    if failed := done.count(False):
        raise SystemExit(f"{failed} of {len(done)} runs failed")


if __name__ == "__main__":
    main()
