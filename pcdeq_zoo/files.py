"""Files that are either whole or not there, logs, and the bytes of weights."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

__all__ = ["read_jsonl", "replace_file", "sync_folder", "weights_bytes"]


def replace_file(path: Path, content: bytes | str) -> None:
    """Write a file, text as UTF-8, so that the path holds the old content or the whole of the new one at any time.

    It is written under a name that nobody can guess or plant a link at, synced to disk, and renamed.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Sync to disk what a folder is said to hold, where a folder can be opened: not on Windows."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, a JSON object each."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def weights_bytes(state_dict: dict[str, Tensor], architecture: str) -> bytes:
    """A safetensors file of a state dict; the same bytes, and so the same sha256, for the same numbers.

    safetensors writes its metadata in random order (0.7), so the header is written again, sorted.
    """
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state_dict.items()}
    content = safetensors.torch.save(tensors, metadata={"format": "pt", "architecture": architecture})
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the tensors stay aligned
    return len(header).to_bytes(8, "little") + header + content[8 + length :]
