"""The max pool of the nets, with less memory for its gradient than PyTorch's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from pcdeq_zoo.maps import cache_blocks
from pcdeq_zoo.transforms import folded, leaf, refuse_legacy_vmap

__all__ = ["CompactMaxPool2d"]


class _MaxPool(torch.autograd.Function):
    """Max pool of windows that keep the size; the positions of its maxima take 2 bytes instead of 8.

    As the library has it, they are the largest tensors of a training step: twice as large as what is pooled.
    """

    @staticmethod
    def forward(x: Tensor, size: int, padding: int) -> tuple[Tensor, Tensor]:
        y, positions = torch.empty_like(x), torch.empty_like(x, dtype=torch.int16)
        for rows in cache_blocks(x):
            y[rows], positions[rows] = F.max_pool2d(x[rows], size, 1, padding, return_indices=True)
        return y, positions

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int], output: tuple[Tensor, Tensor]) -> None:
        x, ctx.size, ctx.padding = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, output[1])
        ctx.save_for_forward(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        refuse_legacy_vmap(grad)
        x, positions = ctx.saved_tensors
        return _Scatter.apply(grad, x, positions, ctx.size, ctx.padding), None, None

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor, *_: None) -> tuple[Tensor, None]:
        (positions,) = ctx.saved_tensors
        return x_tangent.flatten(2).gather(2, positions.flatten(2).long()).view_as(x_tangent), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, None, None], x: Tensor, size: int, padding: int
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        y, positions = _MaxPool.apply(*folded([x], in_dims[:1], info.batch_size), size, padding)
        shape = (info.batch_size, -1)
        return (y.unflatten(0, shape), positions.unflatten(0, shape)), (0, 0)


class _Scatter(torch.autograd.Function):
    """The gradient with respect to what was pooled: each entry of `grad` goes to the position of its maximum."""

    @staticmethod
    def forward(grad: Tensor, x: Tensor, positions: Tensor, size: int, padding: int) -> Tensor:
        pool_backward = torch.ops.aten.max_pool2d_with_indices_backward
        x_grad = torch.empty_like(x)
        for rows in cache_blocks(x):
            long = positions[rows].long()
            x_grad[rows] = pool_backward(grad[rows], x[rows], [size], [1], [padding], [1], False, long)
        return x_grad

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (positions,) = ctx.saved_tensors
        return grad.flatten(2).gather(2, positions.flatten(2).long()).view_as(grad), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        x_grad = _Scatter.apply(*folded(inputs[:3], in_dims[:3], info.batch_size), *inputs[3:])
        return x_grad.unflatten(0, (info.batch_size, -1)), 0


class CompactMaxPool2d(nn.MaxPool2d):
    """Max pool of 3x3 windows that keeps the image size, with less memory for its gradient than `nn.MaxPool2d`."""

    def __init__(self) -> None:
        super().__init__(3, stride=1, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript takes it nested only
            if isinstance(x, Proxy):
                return leaf(self, x)
        if torch.jit.is_scripting() or torch.compiler.is_compiling():
            return F.max_pool2d(x, self.kernel_size, self.stride, self.padding)
        else:
            return self._compact(x)

    @torch.jit.unused
    def _compact(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or x.shape[2] * x.shape[3] >= 2**15:
            return super().forward(x)
        return _MaxPool.apply(x, self.kernel_size, self.padding)[0]
