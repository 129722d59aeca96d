"""What errors of other libraries say, in one line."""

from __future__ import annotations

__all__ = ["one_line"]

_MOST = 500  # characters


def one_line(error: Exception) -> str:
    """An error's text without its line breaks, or its class where it has none; cut where it is long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MOST else f"{text[:_MOST]}…"
