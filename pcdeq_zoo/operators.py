"""W ≥ 0 as a linear operator on a batch, dense or a convolution, and the precision that it is applied in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from pcdeq_zoo.compat import cpu_capabilities, precision_switches
from pcdeq_zoo.transforms import transformed

__all__ = [
    "COARSE_TOL",
    "REDUCED_BOUND",
    "CoarseConvolution",
    "Convolution",
    "Dense",
    "Operator",
    "autocast_to_bfloat16",
    "full_precision",
    "has_bfloat16_products",
    "operator",
]

# What reduced products leave in an equilibrium or a gradient, in the Euclidean norm, relative to how far they moved it
# and to 1 / (1 − r), by which a series of rate r amplifies errors: 0.1e-3 to 1.4e-3 in the layers of five checkpoints.
# The unit roundoff is 2⁻⁸, but the errors of units are random.
_REDUCED_ERROR = 2.0**-10

# What a reduced product W a is off at most, unit by unit, relative to W |a|: a, W and the sum are each rounded to
# bfloat16, by at most 2⁻⁸, and what is left of four times that is for the float32 sum.
REDUCED_BOUND = 2.0**-6


# Ten times what products in bfloat16 alone cost a solution: to this tolerance and looser ones it needs no other.
COARSE_TOL = 1e-2


class Dense:
    """z ↦ W z for z (N, n) and W (n, n)."""

    reduced_error: float | None = None  # matrices of the sizes that can be solved are too small to gain from it

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._transposed = weight.t()

    def __call__(self, z: Tensor) -> Tensor:
        return torch.mm(z, self._transposed)

    def affine(self, z: Tensor, x: Tensor) -> Tensor:
        """W z + x."""
        return torch.addmm(x, z, self._transposed)

    def arrange(self, z: Tensor) -> Tensor:
        """z in the memory order that the products work in."""
        return z

    def reduced(self, change: Tensor) -> Tensor:
        """W times a change, in reduced precision."""
        raise NotImplementedError

    def adjoint(self) -> Dense:
        """Wᵀ."""
        return Dense(self._transposed)

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

    Args:
        weight: W.
        reduced_error: Relative error of `reduced`; None if there are to be no such products.
    """

    def __init__(self, weight: Tensor, reduced_error: float | None = None) -> None:
        # torch.func.vmap over weights knows no memory orders.
        self.weight = weight if transformed() else weight.contiguous(memory_format=torch.channels_last)
        self.padding = weight.shape[-1] // 2
        self.reduced_error = reduced_error

    def __call__(self, z: Tensor) -> Tensor:
        return F.conv2d(z, self.weight, padding=self.padding)

    def affine(self, z: Tensor, x: Tensor) -> Tensor:
        """W ∗ z + x."""
        return self(z).add_(x)

    def arrange(self, z: Tensor) -> Tensor:
        """z in the memory order that the products work in."""
        return z.contiguous(memory_format=torch.channels_last)

    @cached_property
    def _bfloat16(self) -> Tensor:
        return self.weight.bfloat16()

    def reduced(self, change: Tensor) -> Tensor:
        """W ∗ a change, in bfloat16: half the time of float32 where the machine has such products."""
        return F.conv2d(change.bfloat16(), self._bfloat16, padding=self.padding)

    def _turned(self) -> Tensor:
        return self.weight.flip(2, 3).transpose(0, 1)

    def adjoint(self) -> Convolution:
        """Wᵀ: a same-size stride 1 convolution too, with the kernel turned and the channels swapped."""
        return Convolution(self._turned(), self.reduced_error)

    def double(self) -> Convolution:
        """W in float64."""
        return Convolution(self.weight.double())

    def in_full_precision(self) -> Convolution:
        """W without reduced products."""
        return Convolution(self.weight)

    def weight_gradient(self, z: Tensor, a: Tensor) -> Tensor:
        """Gradient of ⟨a, W ∗ z⟩ with respect to W."""
        return conv2d_weight(z, self.weight.shape, a, padding=self.padding)

    @property
    def terms(self) -> int:
        """Products in the sum of one entry of W ∗ z."""
        return self.weight[0].numel()


class CoarseConvolution(Convolution):
    """A convolution that makes all its products in bfloat16, and counts their error for nothing."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight, reduced_error=0.0)

    def __call__(self, z: Tensor) -> Tensor:
        return self.reduced(z).float()

    def affine(self, z: Tensor, x: Tensor) -> Tensor:
        return x + self.reduced(z)

    def adjoint(self) -> CoarseConvolution:
        return CoarseConvolution(self._turned())

    def weight_gradient(self, z: Tensor, a: Tensor) -> Tensor:
        return super().weight_gradient(z.bfloat16(), a.bfloat16()).float()


Operator = Dense | Convolution


def operator(weight: Tensor, *, autocast: bool = False, tol: float = 0.0) -> Operator:
    """The operator of a weight: a matrix (n, n), or kernels (C, C, k, k).

    Products in bfloat16 are made only where the machine has them, and their error counts against the tolerance.

    Args:
        weight: W.
        autocast: Make all products so, on any machine, and count their error for nothing, as autocast does.
        tol: Relative tolerance of what is made from the products, to make all so if it is `COARSE_TOL` or looser; 0 for
            what is to be proven.
    """
    if weight.ndim == 2:
        return Dense(weight)
    if weight.dtype != torch.float32:
        return Convolution(weight)
    has_products = has_bfloat16_products(weight.device)
    if autocast or (has_products and tol >= COARSE_TOL):
        return CoarseConvolution(weight)
    return Convolution(weight, _REDUCED_ERROR if has_products else None)


@cache
def has_bfloat16_products(device: torch.device) -> bool:
    """Whether products in bfloat16 are made in hardware, faster than those in float32, and summed in float32.

    On a CPU with AVX512-BF16 it depends on who made it: AMD's cores (SSE4a tells them) make them at twice the rate of
    float32, Intel's at half of it, unless they may use AMX.
    """
    if device.type == "cpu":
        has = cpu_capabilities()
        return bool(has.get("amx_bf16") or (has.get("avx512_bf16") and has.get("sse4a")))
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def autocast_to_bfloat16(device: torch.device) -> bool:
    """Whether the caller is under an autocast of that device to bfloat16."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return False
    return torch.get_autocast_dtype(kind) == torch.bfloat16


class _PrecisionSwitches:
    """PyTorch's switches for float32 products, turned to exact ones while any thread is inside.

    They are global: what the last thread that leaves restores is what the first one found.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._found: list[Any] = []
        self._switches = precision_switches()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._found = [switch.make_exact() for switch in self._switches]
            self._inside += 1

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for switch, found in zip(self._switches, self._found, strict=True):
                    setattr(switch.owner, switch.name, found)


_switches = _PrecisionSwitches()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products in the precision of their operands, whatever autocast and PyTorch's switches for TF32 and bfloat16 say.

    Half precision cannot reach the tolerance of a solve, and what a certificate proves, it proves of sums of exact
    products, rounded as `rounding_error` has it.
    """
    kind = device.type if torch.amp.is_autocast_available(device.type) else "cpu"
    with torch.autocast(kind, enabled=False), _switches:
        yield
