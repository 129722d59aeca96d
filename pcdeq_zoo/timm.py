"""Run a script of timm's, or any other that creates models by name, with those of the zoo registered.

    python -m pcdeq_zoo.timm ../pytorch-image-models/validate.py DATA --model pcdeq1_mc_relu6_cifar --pretrained

What follows the script goes to it. `torchrun -m pcdeq_zoo.timm SCRIPT ...` starts several processes.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run the script that the command line names, as Python would."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__, end="")
        raise SystemExit(0 if len(sys.argv) > 1 else "which script?")
    script = Path(sys.argv[1])
    if not script.is_file():
        raise SystemExit(
            f"there is no script {script}; timm's are in a checkout of https://github.com/huggingface/pytorch-image-models"
        )
    sys.argv = sys.argv[1:]
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
