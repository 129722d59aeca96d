"""The `accelerate launch` that this process is of.

Import it before PyTorch, whose import takes seconds in which that one may end, and leave an orphan like any other.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil

_NAMES = ("accelerate", "accelerate-launch", "accelerate.commands.launch")


class Launcher:
    """The parent, if that launches. A signal that ends it does not reach its child."""

    def __init__(self) -> None:
        parent = psutil.Process().parent()
        try:
            launches = parent is not None and any(Path(part).name in _NAMES for part in parent.cmdline())
        except psutil.Error:
            launches = False
        self._process = parent if launches else None

    def is_gone(self) -> bool:
        """Whether there was one, and is none any more."""
        return self._process is not None and os.getppid() != self._process.pid  # not is_running: it may be a zombie


LAUNCHER = Launcher()
