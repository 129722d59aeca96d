"""W ≥ 0 as a linear operator on a batch, dense or a convolution, and the precision that it is applied in."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

__all__ = ["Convolution", "Dense", "Operator", "full_precision", "operator"]

_HAS_BF16 = torch.cpu._is_avx512_bf16_supported()


class Dense:
    """z ↦ W z for z (N, n) and W (n, n)."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, z: Tensor) -> Tensor:
        return F.linear(z, self.weight)

    def arrange(self, z: Tensor) -> Tensor:
        """z in the memory order that the products work in."""
        return z

    def increment(self, change: Tensor) -> Tensor:
        """W times a change that shrinks as the iteration goes on, in whatever precision is good enough for that."""
        return self(change)

    def adjoint(self) -> Dense:
        """Wᵀ."""
        return Dense(self.weight.t())

    def double(self) -> Dense:
        """W in float64."""
        return Dense(self.weight.double())

    def weight_gradient(self, z: Tensor, a: Tensor) -> Tensor:
        """Gradient of ⟨a, W z⟩ with respect to W."""
        return a.t() @ z

    @property
    def terms(self) -> int:
        """Products in the sum of one entry of W z."""
        return self.weight[0].numel()


class Convolution:
    """z ↦ W ∗ z for z (N, C, H, W) and W (C, C, k, k), k odd: stride 1, and zero padding that keeps the size.

    Works in channels_last memory order, in which these convolutions run fastest.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.padding = weight.shape[-1] // 2
        self._reduced: Tensor | None = None

    def __call__(self, z: Tensor) -> Tensor:
        return F.conv2d(z, self.weight, padding=self.padding)

    def arrange(self, z: Tensor) -> Tensor:
        """z in the memory order that the products work in."""
        return z.contiguous(memory_format=torch.channels_last)

    def increment(self, change: Tensor) -> Tensor:
        """W times a change that shrinks as the iteration goes on, in whatever precision is good enough for that.

        A relative error of bfloat16's size in that shrinking change is none in the result, and its products take half
        the time where the machine has them.
        """
        if not (_HAS_BF16 and change.device.type == "cpu" and change.dtype == torch.float32):
            return self(change)
        if self._reduced is None:
            self._reduced = self.weight.bfloat16()
        return F.conv2d(change.bfloat16(), self._reduced, padding=self.padding)

    def adjoint(self) -> Convolution:
        """Wᵀ: a same-size stride 1 convolution too, with the kernel turned and the channels swapped."""
        return Convolution(self.weight.flip(2, 3).transpose(0, 1))

    def double(self) -> Convolution:
        """W in float64."""
        return Convolution(self.weight.double())

    def weight_gradient(self, z: Tensor, a: Tensor) -> Tensor:
        """Gradient of ⟨a, W ∗ z⟩ with respect to W."""
        return conv2d_weight(z, self.weight.shape, a, padding=self.padding)

    @property
    def terms(self) -> int:
        """Products in the sum of one entry of W ∗ z."""
        return self.weight[0].numel()


Operator = Dense | Convolution


def operator(weight: Tensor) -> Operator:
    """The operator of a weight: a matrix (n, n), or kernels (C, C, k, k)."""
    return Dense(weight) if weight.ndim == 2 else Convolution(weight)


_CPU_SWITCHES: tuple[Any, ...] = (torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
_GPU_SWITCHES: tuple[Any, ...] = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]


class _PrecisionSwitches:
    """PyTorch's switches for float32 products, turned to exact ones while any thread is inside.

    They are global: what the last thread that leaves restores is what the first one found.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._found: list[str] = []
        self._switches = _CPU_SWITCHES + (_GPU_SWITCHES if torch.cuda.is_available() else ())

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._found = [switch.fp32_precision for switch in self._switches]
                for switch in self._switches:
                    switch.fp32_precision = "ieee"
            self._inside += 1

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for switch, found in zip(self._switches, self._found, strict=True):
                    switch.fp32_precision = found


_switches = _PrecisionSwitches()


class full_precision:  # noqa: N801 - a context manager, used like a function
    """Products in the precision of their operands, whatever autocast and PyTorch's switches for TF32 and bfloat16 say.

    Half precision cannot reach the tolerance of a solve, and what a certificate proves, it proves of sums of exact
    products, rounded as `rounding_error` has it.
    """

    def __init__(self, device: torch.device) -> None:
        kind = device.type if torch.amp.is_autocast_available(device.type) else "cpu"
        self._autocast = torch.autocast(kind, enabled=False)

    def __enter__(self) -> None:
        self._autocast.__enter__()
        _switches.__enter__()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _switches.__exit__(kind, error, trace)
        self._autocast.__exit__(kind, error, trace)
