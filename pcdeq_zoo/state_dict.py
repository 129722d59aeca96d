"""What may be loaded into a net: names, shapes, kinds of numbers, and values that a pcDEQ can have.

One check for every way in: weights of the package, of the Hub, of a folder or a file, `checkpoint_path=`, and
`load_state_dict`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["OLD_NAMES", "WeightsError", "check_state_dict", "check_tensor", "translated"]

# Parameters of a pcDEQ layer in the files of the authors and of version 0.1.0.
OLD_NAMES = {"weight_g": "magnitude", "weight_v": "direction"}

_STEM = "features.conv1.weight"


class WeightsError(RuntimeError):
    """Weights that are missing, damaged, or of another model; the message names the file and says what to do."""


def translated(state_dict: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> dict[str, Any]:
    """The same under a net's own names, and with its stem as a convolution.

    Names of the authors' code (`conv1`, `linear1`, `downsample1`, `bn1`, `block1.deq.f.W.weight_v`, …), of this package
    before it was published, and of transformers, which puts `timm_model.` before each, are translated; others stay.

    Args:
        state_dict: By name.
        wanted: The net's own state dict.

    Raises:
        WeightsError: Two names are the same.
    """
    found: dict[str, Any] = {}
    for theirs, value in state_dict.items():
        name = _translate(str(theirs))
        if name in found:
            raise WeightsError(f"these weights are not of this model: they hold {name} twice, by different names")
        found[name] = value
    stem = found.get(_STEM)
    if _STEM in wanted and isinstance(stem, Tensor) and stem.ndim == 2:  # dense, on flattened images
        size = wanted[_STEM].shape[2:]
        if stem.shape[1] % size.numel() == 0:
            found[_STEM] = stem.unflatten(1, (-1, *size))
    return found


def _translate(name: str) -> str:
    name = name.removeprefix("timm_model.")
    if match := re.fullmatch(r"(?:conv|linear)1\.(\w+)", name):
        return f"features.conv1.{match[1]}"
    if match := re.fullmatch(r"downsample(\d)\.(\w+)", name):
        return f"features.conv{int(match[1]) + 1}.{match[2]}"
    if match := re.fullmatch(r"bn(\d)\.(\w+)", name):  # odd before, even after a pcDEQ layer
        stage, after = divmod(int(match[1]) - 1, 2)
        return f"features.{'postnorm' if after else 'prenorm'}{stage + 1}.{match[2]}"
    if match := re.fullmatch(r"(?:block(\d?)\.deq\.f\.W|features\.deq(\d+))\.(weight_[gv])", name):
        return f"features.deq{match[1] or match[2] or 1}.{OLD_NAMES[match[3]]}"
    if match := re.fullmatch(r"classifier\.(\w+)", name):
        return f"head.fc.{match[1]}"
    return name


def check_state_dict(state_dict: Mapping[str, Any], wanted: Mapping[str, Tensor], strict: bool = True) -> None:
    """Refuse tensors that may not be loaded in the place of those that are wanted.

    Args:
        state_dict: By name.
        wanted: The net's own state dict.
        strict: Whether none may be missing, and none too many.

    Raises:
        WeightsError: One line that names the tensor, and what was got and wanted.
    """
    if strict:
        if missing := [name for name in wanted if name not in state_dict]:
            raise WeightsError(
                f"these weights are not of this model: {_some(missing)} missing; they hold {_some(list(state_dict))}"
            )
        if extra := [name for name in state_dict if name not in wanted]:
            raise WeightsError(f"these weights are not of this model: it has no {_some(extra)}")
    for name, tensor in state_dict.items():
        if name in wanted:
            check_tensor(name, tensor, wanted[name])


def check_tensor(name: str, tensor: Any, wanted: Tensor) -> None:
    """Refuse one tensor, as `check_state_dict` does."""
    if not isinstance(tensor, Tensor):
        raise WeightsError(f"these weights are not of this model: {name} is a {type(tensor).__name__}, not a tensor")
    if tensor.shape != wanted.shape:
        raise WeightsError(
            f"these weights are not of this model: {name} is {tuple(tensor.shape)}, wanted {tuple(wanted.shape)}"
        )
    plain = tensor.layout == torch.strided and not tensor.is_quantized and (wanted.is_meta or not tensor.is_meta)
    if not plain or tensor.is_floating_point() != wanted.is_floating_point() or tensor.is_complex():
        found = " ".join([str(tensor.dtype), *(["meta"] if tensor.is_meta else [str(tensor.layout)])])
        numbers = "floating point" if wanted.is_floating_point() else "integers"
        raise WeightsError(f"these weights are not of this model: {name} is {found}, wanted strided {numbers}")
    if tensor.is_meta or not tensor.is_floating_point():
        return
    value, kind = tensor.to(wanted.dtype), name.rpartition(".")[2]
    if bad := int((~value.isfinite()).sum()):
        raise WeightsError(
            f"these weights are damaged: {name} has {bad} entries that are NaN or infinite in {wanted.dtype}"
        )
    if kind in ("magnitude", "direction") and (bad := int((value < 0).sum())):
        raise WeightsError(
            f"these weights are not of a pcDEQ: {bad} entries of {name} are below 0; what state_dict() gives of a "
            "model of the zoo has none, of another clamp them at 0 before saving"
        )
    if kind == "direction" and not bool(torch.linalg.vector_norm(value.flatten(1), dim=1).isfinite().all()):
        raise WeightsError(f"these weights are not of a pcDEQ: {name} has rows whose norm overflows in {wanted.dtype}")
    if kind == "running_var" and (bad := int((value < 0).sum())):
        raise WeightsError(f"these weights are damaged: {bad} variances in {name} are below 0")


def _some(names: list[str]) -> str:
    """A few names for a line, whatever characters they have."""
    shown = ", ".join(name if name.isprintable() and len(name) < 80 else repr(name[:80]) for name in names[:3])
    return f"{shown}, …" if len(names) > 3 else shown or "nothing"
