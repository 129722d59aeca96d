"""How layers go through torch.func, where vmap is a larger batch, and torch.fx, where they are leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

__all__ = ["folded", "leaf", "refuse_legacy_vmap", "transformed"]


def leaf(module: nn.Module, x: Proxy) -> Proxy:
    """A module as one node of the graph that torch.fx is tracing, whatever its tracer takes for leaves."""
    tracer: Any = x.tracer
    if module is tracer.root:
        raise TypeError("a pcDEQ layer is one node of a graph, and has none of its own: trace a model that holds it")
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (x,), {})


def transformed() -> bool:
    """True inside torch.func's grad, vmap and the like."""
    return torch._C._are_functorch_transforms_active()


def folded(tensors: Sequence[Tensor], in_dims: Sequence[int | None], count: int) -> list[Tensor]:
    """Tensors (N, ...) of which vmap has `count`, at the dimension `in_dims` or all the same, as (count · N, ...)."""
    stacked = [
        tensor.movedim(dim, 0) if dim is not None else tensor.expand(count, *tensor.shape)
        for tensor, dim in zip(tensors, in_dims, strict=True)
    ]
    return [tensor.flatten(0, 1) for tensor in stacked]


def refuse_legacy_vmap(grad: Tensor) -> None:
    """Raise one line where a gradient comes from the vmap that autograd has besides torch.func's.

    It calls a function's backward, but has no place for how that is to be vectorised.
    """
    if torch._C._functorch.is_legacy_batchedtensor(grad):
        raise NotImplementedError(
            "autograd's own vectorisation (is_grads_batched, jacobian(vectorize=True)) cannot vectorise a solve; use "
            "torch.func.jacrev, jacfwd or vmap, which can"
        )
