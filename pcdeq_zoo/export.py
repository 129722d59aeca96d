"""A pcDEQ layer for TorchScript, torch.export, ONNX and torch.compile(fullgraph=True): one graph with a loop in it.

The loop of `pcdeq_zoo.solver` once more, with the same extrapolation (`pcdeq_zoo.series`), in what these compilers
understand. It knows no certificate, and goes on until the error is estimated, by the last rate alone, to be below 0.003
`tol`: certified solves are far better than they can prove, and exported nets are to be no worse than they.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops import while_loop

from pcdeq_zoo.activations import INPUT_FLOOR
from pcdeq_zoo.compat import SINCE_2_7, is_exporting, refuse_gradient_of_a_loop
from pcdeq_zoo.series import aitken_factor, change_rate, growing, remaining_error

__all__ = ["TraceableLoop"]


class TraceableLoop(nn.Module):
    """The part of a pcDEQ layer that these compilers see.

    What the loop reads of the settings are tensors: torch.compile makes inputs of a graph of floats that change, and
    takes none for a loop in it.
    """

    _INPUT_FLOOR = INPUT_FLOOR
    _SAFETY = 0.003
    __constants__ = ("_INPUT_FLOOR", "_SAFETY", "kind", "max_evals", "supremum", "tol")

    if TYPE_CHECKING:  # TorchScript reads a class's annotations
        kind: int
        supremum: float
        tol: float
        max_evals: int
        sigma: Callable[[Tensor], Tensor]

    def _normalized_weight(self) -> Tensor:
        """W."""
        raise NotImplementedError

    def _product(self, z: Tensor, weight: Tensor) -> Tensor:
        """W z."""
        raise NotImplementedError

    def _problem_of(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """W, x, sup σ, the estimated error to stop at, and the change that is nothing but rounding, both relative."""
        u = u.contiguous()  # the loop's state must keep its memory order, which exporters do not promise of others
        # PyTorch's threshold of 20, above which softplus is the identity, is 4e-10 off.
        x = F.softplus(u, beta=5.0, threshold=40.0).clamp(min=self._INPUT_FLOOR) if self.kind == 1 else F.relu(u)
        weight = self._normalized_weight().to(x.dtype)
        tol = torch.full((), self.tol * self._SAFETY, dtype=x.dtype, device=x.device)
        rounding = torch.full_like(tol, 4.4e-16 if x.dtype == torch.float64 else 2.4e-7)  # two units of the last place
        return weight, x, torch.full_like(tol, self.supremum), tol, rounding

    def _start(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The state of the iteration: z, the change up to which it is extrapolated, and which samples go on."""
        limit = torch.full((x.shape[0],), math.inf, dtype=x.dtype, device=x.device)
        return self.sigma(x), limit, torch.ones_like(limit, dtype=torch.bool)

    def _advance(
        self,
        problem: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
        z: Tensor,
        limit: Tensor,
        running: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The state after one more pair of evaluations of the samples that go on."""
        weight, x, supremum, tol, rounding = problem
        z1 = self.sigma(self._product(z, weight) + x).contiguous()
        z2 = self.sigma(self._product(z1, weight) + x).contiguous()
        per_sample = [-1] + [1] * (x.ndim - 1)
        with torch.no_grad():
            d1, d2, end = (z1 - z).flatten(1), (z2 - z1).flatten(1), z2.flatten(1)
            scale = torch.maximum(torch.maximum(end.abs(), d2.abs()), d1.abs()).amax(dim=1, keepdim=True)
            scale = scale.clamp(min=1e-37)  # squares of tiny samples would vanish
            d1, d2, end = d1 / scale, d2 / scale, end / scale
            size1, size2 = torch.linalg.vector_norm(d1, dim=1), torch.linalg.vector_norm(d2, dim=1)
            change = size2 / torch.linalg.vector_norm(end, dim=1)
            ends = (remaining_error(change, change_rate(size1, size2)) <= tol) | (change <= rounding)
            ends = ends & ~growing(d1, d2, end)
            factor = aitken_factor(d1, d2, size1, [1]).masked_fill(size1 * scale[:, 0] > limit, 0.0)
            limit = torch.where(factor > 0, size2 * scale[:, 0], limit)
        new = torch.minimum((z2 + factor.view(per_sample) * (z2 - z1)).clamp(min=0.0), supremum)
        new = torch.where(running.view(per_sample), new, z)
        return new, limit, running & ~ends

    def _scripted(self, u: Tensor) -> Tensor:
        """The equilibrium in TorchScript; autograd goes through the iterations."""
        problem = self._problem_of(u)
        z, limit, running = self._start(problem[1])
        for _ in range(self.max_evals // 2):
            z, limit, running = self._advance(problem, z, limit, running)
            if not bool(running.any()):
                break
        if bool(running.any()):
            warnings.warn("a scripted pcDEQ solve did not converge", stacklevel=2)
        return z

    @torch.jit.unused
    def _exported(self, u: Tensor) -> Tensor:
        """The equilibrium as a loop that torch.export, ONNX and torch.compile(fullgraph=True) keep."""
        weight, x, supremum, tol, rounding = self._problem_of(u)
        if not SINCE_2_7 and torch.is_grad_enabled():
            refuse_gradient_of_a_loop()
        if is_exporting() or not torch.is_grad_enabled():  # exported programs have no gradient
            weight, x = weight.detach(), x.detach()
        problem = weight, x, supremum, tol, rounding

        def goes_on(left: Tensor, z: Tensor, limit: Tensor, running: Tensor) -> Tensor:
            return (left >= 2) & running.any()

        def body(left: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
            return (left - 2, *self._advance(problem, *state))

        left = torch.full((), self.max_evals, dtype=torch.int64, device=x.device)
        return while_loop(goes_on, body, (left, *self._start(x)))[1]
