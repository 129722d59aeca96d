"""What asks a training to end before it is done.

Import it before PyTorch, whose import takes seconds in which an `accelerate launch` may end, and leave an orphan like
any other.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_NAMES = ("accelerate", "accelerate-launch", "accelerate.commands.launch")


class Ending:
    """Asked for by SIGTERM, which schedulers send, or because the `accelerate launch` that this process is of is gone.

    A signal that ends the launcher does not reach its child.
    """

    def __init__(self) -> None:
        self._terminated = False
        parent = psutil.Process().parent()
        try:
            launches = parent is not None and any(Path(part).name in _NAMES for part in parent.cmdline())
        except psutil.Error:
            launches = False
        self._launcher = parent if launches else None

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Within the block SIGTERM is noted, and ends nothing."""
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _note(self, *_: object) -> None:
        self._terminated = True

    def reason(self) -> str:
        """Why this process is to end; empty if it is not."""
        if self._terminated:
            return "this was ended by SIGTERM"
        # Not is_running: it may be a zombie.
        if self._launcher is not None and os.getppid() != self._launcher.pid:
            return "accelerate launch was ended, and so is this"
        return ""


ENDING = Ending()
