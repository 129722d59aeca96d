"""What PyTorch has had only since a version above the oldest that is supported, 2.6, or calls otherwise since."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import torch

__all__ = ["SINCE_2_7", "Switch", "cpu_capabilities", "is_exporting", "precision_switches", "refuse_gradient_of_a_loop"]


SINCE_2_7 = hasattr(torch.compiler, "is_exporting")


def is_exporting() -> bool:
    """Whether torch.export is tracing; never before PyTorch 2.7, which cannot tell it from torch.compile."""
    return SINCE_2_7 and torch.compiler.is_exporting()


@torch.compiler.disable  # dynamo would swallow the message
def refuse_gradient_of_a_loop() -> NoReturn:
    """Raise, before PyTorch 2.7, where an exportable model is compiled or exported with gradients, which would be 0.

    Raises:
        RuntimeError: Always.
    """
    raise RuntimeError(
        "before PyTorch 2.7 models made with exportable=True can be exported and compiled under torch.no_grad() only; "
        "use that, or one made without it to train"
    )


def cpu_capabilities() -> Mapping[str, Any]:
    """Sets of instructions, by name, and whether the CPU has them; empty where PyTorch is too old to say."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


class Switch(NamedTuple):
    """An attribute that decides in which precision float32 products are made.

    Attributes:
        owner, name: Of the attribute.
        exact: Its value for float32.
        inherited: Its value for that of its parent, which reading it then gives; None if it has none.
    """

    owner: Any
    name: str
    exact: Any
    inherited: Any = None

    def make_exact(self) -> Any:
        """Set it to `exact`; returns the value to set it back to."""
        found = getattr(self.owner, self.name)
        if self.inherited is not None:
            setattr(self.owner, self.name, self.inherited)
            if getattr(self.owner, self.name) == found:  # the parent's, and to be so when that changes
                found = self.inherited
        setattr(self.owner, self.name, self.exact)
        return found


class _Nnpack:
    """The functions that switch NNPACK as an attribute. Its convolutions are by Winograd's algorithm."""

    @property
    def value(self) -> bool:
        return torch._C._get_nnpack_enabled()

    @value.setter
    def value(self, value: bool) -> None:
        torch._C._set_nnpack_enabled(value)


class _MatmulPrecision:
    """The functions for the precision of matrix products as an attribute, to be a `Switch` too."""

    @property
    def value(self) -> str:
        return torch.get_float32_matmul_precision()

    @value.setter
    def value(self, value: str) -> None:
        torch.set_float32_matmul_precision(value)


def precision_switches() -> list[Switch]:
    """All that there are: since PyTorch 2.9 one for each backend and kind of product."""
    backends: Any = torch.backends
    nnpack = Switch(_Nnpack(), "value", False)
    if not hasattr(backends.mkldnn, "conv"):
        return [Switch(_MatmulPrecision(), "value", "highest"), Switch(backends.cudnn, "allow_tf32", False), nnpack]
    owners = [backends.mkldnn.conv, backends.mkldnn.matmul]
    if torch.cuda.is_available():
        owners += [backends.cudnn.conv, backends.cuda.matmul]
    return [*(Switch(owner, "fp32_precision", "ieee", "none") for owner in owners), nnpack]
