"""The equilibrium as a loop that TorchScript, torch.export, ONNX and torch.compile(fullgraph=True) take.

They take neither autograd.Function nor the solver. For them a layer iterates plainly until the estimated error of each
sample is below `tol`, see `estimated` in solver.py, without a certificate.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop

from pcdeq_zoo.activations import INPUT_FLOOR

__all__ = ["TraceableLoop"]


class TraceableLoop(nn.Module):
    """The part of a pcDEQ layer that these compilers see."""

    _INPUT_FLOOR = INPUT_FLOOR
    __constants__ = ("_INPUT_FLOOR", "kind", "max_evals", "tol")

    if TYPE_CHECKING:  # TorchScript reads a class's annotations
        kind: int
        tol: float
        max_evals: int
        sigma: nn.Module

    def _normalized_weight(self) -> Tensor:
        """W."""
        raise NotImplementedError

    def _product(self, z: Tensor, weight: Tensor) -> Tensor:
        """W z."""
        raise NotImplementedError

    def _start(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """W, x and the state of the iteration: z, its last relative change, which samples go on."""
        u = u.contiguous()  # the loop's state must keep its memory order, which exporters do not promise of others
        x = F.softplus(u, beta=5.0).clamp(min=self._INPUT_FLOOR) if self.kind == 1 else F.relu(u)
        weight = self._normalized_weight().to(x.dtype)
        size = torch.full((x.shape[0],), math.inf, dtype=x.dtype, device=x.device)
        return weight, x, self.sigma(x), size, torch.ones(x.shape[0], dtype=torch.bool, device=x.device)

    def _advance(
        self, weight: Tensor, x: Tensor, z: Tensor, size: Tensor, running: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The state after one more evaluation of the samples that go on."""
        new = self.sigma(self._product(z, weight) + x).contiguous()
        new = torch.where(running.view([-1] + [1] * (x.ndim - 1)), new, z)
        scale = new.flatten(1).abs().amax(dim=1, keepdim=True).clamp(min=1e-37)  # squares of tiny samples would vanish
        norm = torch.linalg.vector_norm(new.flatten(1) / scale, dim=1)
        change = torch.linalg.vector_norm((new - z).flatten(1) / scale, dim=1) / norm
        rate = change / size
        done = ((rate > 0) & (rate < 1) & (change * rate / (1 - rate) <= self.tol)) | (change == 0)
        return new, change, running & ~done

    def _scripted(self, u: Tensor) -> Tensor:
        """The equilibrium in TorchScript; autograd goes through the iterations."""
        weight, x, z, size, running = self._start(u)
        for _ in range(self.max_evals):
            z, size, running = self._advance(weight, x, z, size, running)
            if not bool(running.any()):
                break
        if bool(running.any()):
            warnings.warn("a scripted pcDEQ solve did not converge", stacklevel=2)
        return z

    @torch.jit.unused
    def _exported(self, u: Tensor) -> Tensor:
        """The equilibrium as a loop that torch.export, ONNX and torch.compile(fullgraph=True) keep."""
        weight, x, z, size, running = self._start(u)
        if torch.compiler.is_exporting():  # exported programs have no gradient
            weight, x, z = weight.detach(), x.detach(), z.detach()

        def goes_on(k: Tensor, z: Tensor, size: Tensor, running: Tensor) -> Tensor:
            return (k < self.max_evals) & running.any()

        def body(k: Tensor, z: Tensor, size: Tensor, running: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            return (k + 1, *self._advance(weight, x, z, size, running))

        zero = torch.zeros((), dtype=torch.int64, device=x.device)
        return while_loop(goes_on, body, (zero, z, size, running))[1]
