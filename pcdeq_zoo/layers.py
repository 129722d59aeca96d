"""pcDEQ layers: z* = σ(W z* + x) with W ≥ 0 (Definition 4.3 of https://arxiv.org/abs/2402.04029).

A layer takes any real input, maps it to the nonnegative orthant, and returns the one equilibrium there. Which of the
paper's two kinds it is follows from its activation: ReLU6, tanh and softsign vanish at 0 and need x ≫ 0 (pcDEQ-1,
softplus with β = 5); sigmoid does not and needs x ≥ 0 (pcDEQ-2, ReLU).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from pcdeq_zoo.solver import Solution, Solver, relative_change

__all__ = ["ACTIVATIONS", "Activation", "PcDEQConv2d", "PcDEQLinear"]


class Activation(NamedTuple):
    """A nondecreasing concave activation (Remark 4.1), and what the solver needs to know of it."""

    module: Callable[[], nn.Module]
    derivative: Callable[[Tensor], Tensor]  # σ′ as a function of the *output* σ
    kind: int  # 1 or 2: the paper's list, and with it pcDEQ-1 or pcDEQ-2


ACTIVATIONS = {
    "relu6": Activation(nn.ReLU6, lambda z: ((z > 0) & (z < 6)).to(z.dtype), 1),
    "tanh": Activation(nn.Tanh, lambda z: 1 - z * z, 1),
    "softsign": Activation(nn.Softsign, lambda z: (1 - z).square(), 1),
    "sigmoid": Activation(nn.Sigmoid, lambda z: z * (1 - z), 2),
}


class _Equilibrium(torch.autograd.Function):
    """(x, W) ↦ z*, differentiated implicitly: nothing is saved but z* and W.

    With D = diag σ′(W z* + x), which is a function of z* alone, the gradient of L is a = D (Wᵀ a + ∂L/∂z*) with respect
    to x and a z*ᵀ with respect to W. ρ(D Wᵀ) < 1 whatever the size of W: concavity gives σ(x) ≤ z* − D W z*, so
    D W z* ≤ c z* with c < 1 and z* ≫ 0. Hence the forward solver's iteration converges here as well.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, layer: _PcDEQLayer) -> Tensor:
        return layer._fixed_point(x, weight).value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, _PcDEQLayer], output: Tensor) -> None:
        _, weight, ctx.layer = inputs
        ctx.save_for_backward(output, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        if torch.is_grad_enabled():
            # `once_differentiable` would let this pass where `grad` is a constant, and take D and z* for constants too.
            raise NotImplementedError("a pcDEQ layer cannot be differentiated twice; use create_graph=False")
        z, weight = ctx.saved_tensors
        layer: _PcDEQLayer = ctx.layer
        with _no_autocast(z.device):
            derivative = ACTIVATIONS[layer.activation].derivative(z)
            adjoint = layer._adjoint(weight)
            a = layer.solver(
                lambda a: derivative * (layer._map(a, adjoint) + grad), derivative * grad, layer, "backward"
            ).value
            return a, layer._weight_gradient(z, a, weight) if ctx.needs_input_grad[1] else None, None


def _no_autocast(device: torch.device) -> torch.autocast:
    """Equilibria are solved in float32 at least: half precision cannot reach the tolerance."""
    kind = device.type if torch.amp.is_autocast_available(device.type) else "cpu"
    return torch.autocast(kind, enabled=False)


class _PcDEQLayer(nn.Module):
    """What the linear and the convolutional layer share. A subclass gives z ↦ W z, its adjoint and its gradient."""

    # softplus(x, β = 5) is exactly 0 in float32 below x ≈ -20; then x ≫ 0 fails, and with it uniqueness (σ = ReLU6,
    # w = 2 has the equilibria 0 and 6). The smallest normal float32 restores it and is lost in any other sum.
    _INPUT_FLOOR = torch.finfo(torch.float32).tiny

    # Least row norm that weight normalisation divides by, so that an all-zero row gives zeros and not 0/0. It bounds
    # the gradient too (by 1e12): the smallest normal number would let it overflow.
    _NORM_FLOOR = 1e-12

    __constants__ = ("_INPUT_FLOOR", "_NORM_FLOOR", "kind", "tol", "max_evals")
    __jit_unused_properties__ = ("weight", "tol", "max_evals")

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        activation: str,
        solver: Solver | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if any(size < 1 for size in weight_shape):
            raise ValueError(f"layer sizes must be at least 1, got {weight_shape}")
        self.activation = activation
        self.sigma = ACTIVATIONS[activation].module()
        self.kind = ACTIVATIONS[activation].kind
        self.solver = solver or Solver()
        self.weight_g = nn.Parameter(
            torch.empty(weight_shape[0], *[1] * (len(weight_shape) - 1), device=device, dtype=dtype)
        )
        self.weight_v = nn.Parameter(torch.empty(weight_shape, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw v as the authors' code does, uniform in [0, 0.01 / √(C_out + C_in)), and set g to its row norms."""
        self.weight_v.uniform_(0, 0.01 / (self.weight_v.shape[0] + self.weight_v.shape[1]) ** 0.5)
        self.weight_g.copy_(
            torch.linalg.vector_norm(self.weight_v, dim=list(range(1, self.weight_v.ndim)), keepdim=True)
        )

    @property
    def weight(self) -> Tensor:
        """W = g · v / ‖v‖ with g and v projected to ≥ 0; differentiable. Entries ≥ 0 whatever the parameters are."""
        return self._normalized_weight()

    @property
    def tol(self) -> float:
        return self.solver.tol

    @property
    def max_evals(self) -> int:
        return self.solver.max_evals

    def forward(self, x: Tensor) -> Tensor:
        """Equilibrium of each sample for any real x; same shape and dtype as x. Half precision is solved in float32."""
        u = self._input_map(x)
        if torch.jit.is_scripting():
            return self._unrolled(u).reshape(x.shape).to(x.dtype)
        else:
            return self._implicit(u).reshape(x.shape).to(x.dtype)

    @torch.jit.unused
    @torch.no_grad()
    def solve(self, x: Tensor) -> Solution:
        """`forward` without a gradient, but with status, evaluations and residual per sample."""
        u = self._input_map(x)
        with _no_autocast(u.device):
            return self._fixed_point(u, self._normalized_weight().to(u.dtype))

    def extra_repr(self) -> str:
        return f"{self.weight_v.shape[0]}, activation={self.activation!r}, solver={self.solver!r}"

    def _arrange(self, x: Tensor) -> Tensor:
        """Check the shape of x, and bring it to the one and the memory order that `_map` works in."""
        raise NotImplementedError

    def _arrange_weight(self, weight: Tensor) -> Tensor:
        """Bring W to the memory order that `_map` works in."""
        raise NotImplementedError

    def _map(self, z: Tensor, weight: Tensor) -> Tensor:
        """W z."""
        raise NotImplementedError

    def _adjoint(self, weight: Tensor) -> Tensor:
        """The weight with which `_map` is Wᵀ a."""
        raise NotImplementedError

    def _weight_gradient(self, z: Tensor, a: Tensor, weight: Tensor) -> Tensor:
        """Gradient of ⟨a, W z⟩ with respect to W."""
        raise NotImplementedError

    def _input_map(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise TypeError(f"a pcDEQ layer takes floating point inputs, got {x.dtype}")
        x = self._arrange(x)
        if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
            x = x.float()
        if self.kind == 1:
            return F.softplus(x, beta=5.0).clamp(min=self._INPUT_FLOOR)
        return F.relu(x)

    def _normalized_weight(self) -> Tensor:
        # Not clamp or relu: their gradient is 0 at 0, and a weight that was projected there could never grow again.
        v = self.weight_v.masked_fill(self.weight_v < 0, 0.0)
        g = self.weight_g.masked_fill(self.weight_g < 0, 0.0)
        if v.dtype == torch.float16 or v.dtype == torch.bfloat16:
            v, g = v.float(), g.float()
        norm = torch.linalg.vector_norm(v, dim=list(range(1, v.ndim)), keepdim=True)
        return v * (g / norm.clamp(min=self._NORM_FLOOR))

    @torch.jit.unused
    def _project(self) -> None:
        """Project v and g in place. The function that the layer computes does not change.

        Done just before a training forward, this is the same iteration as the paper's projection after each optimiser
        step, with nothing for the training loop to remember. `.data` keeps autograd's version counter where it is:
        within one optimiser step a second projection changes nothing, so using the layer twice in one graph is safe.
        """
        self.weight_v.data.clamp_(min=0)
        self.weight_g.data.clamp_(min=0)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._project()  # what is saved is nonnegative, also when it is saved straight after an optimiser step
        super()._save_to_state_dict(destination, prefix, keep_vars)

    @torch.jit.unused
    def _implicit(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self._project()
        with _no_autocast(x.device):
            return _Equilibrium.apply(x, self._normalized_weight().to(x.dtype), self)

    def _fixed_point(self, x: Tensor, weight: Tensor) -> Solution:
        weight = self._arrange_weight(weight)
        # σ(x) is the iterate after 0, and costs no evaluation of W.
        return self.solver(lambda z: self.sigma(self._map(z, weight) + x), self.sigma(x), self, "forward")

    def _unrolled(self, x: Tensor) -> Tensor:
        """`solve` once more for TorchScript, which takes neither a function as argument nor an autograd.Function.

        Same values; autograd goes through the iterations, so that its gradient is right to the tolerance as well.
        """
        weight = self._arrange_weight(self._normalized_weight().to(x.dtype))
        z = self.sigma(x)
        running = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
        for _ in range(self.max_evals):
            new = self.sigma(self._map(z, weight) + x)
            new = torch.where(running.view([-1] + [1] * (x.ndim - 1)), new, z)
            running = running & ~(relative_change(new, z) <= self.tol)
            z = new
            if not bool(running.any()):
                break
        if bool(running.any()):
            warnings.warn("a scripted pcDEQ solve did not converge", stacklevel=2)
        return z


@register_notrace_module  # a loop whose length depends on the data
class PcDEQLinear(_PcDEQLayer):
    """Dense pcDEQ layer: z* = σ(W z* + x) for x, z* ∈ ℝⁿ₊ and W ∈ ℝⁿˣⁿ₊.

    Args:
        features: n, entries per sample.
        activation: "relu6", "tanh", "softsign" (pcDEQ-1) or "sigmoid" (pcDEQ-2).
        solver: Settings, shared by the layers of a model; by default the paper's (`Solver`).

    Shape:
        (N, features) or any (N, ...) whose samples hold `features` entries, to the same.

    Raises:
        ValueError: Unknown activation, or an input of another shape.
    """

    def __init__(
        self,
        features: int,
        activation: str = "relu6",
        solver: Solver | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((features, features), activation, solver, device, dtype)

    def _arrange(self, x: Tensor) -> Tensor:
        features = self.weight_v.shape[1]
        if x.ndim < 2 or x.flatten(1).shape[1] != features:
            raise ValueError(f"PcDEQLinear takes (N, ...) with {features} entries per sample, got {x.shape}")
        return x.flatten(1)

    def _arrange_weight(self, weight: Tensor) -> Tensor:
        return weight

    def _map(self, z: Tensor, weight: Tensor) -> Tensor:
        return F.linear(z, weight)

    def _adjoint(self, weight: Tensor) -> Tensor:
        return weight.t()

    def _weight_gradient(self, z: Tensor, a: Tensor, weight: Tensor) -> Tensor:
        return a.t() @ z


@register_notrace_module  # a loop whose length depends on the data
class PcDEQConv2d(_PcDEQLayer):
    """Convolutional pcDEQ layer: z* = σ(W ∗ z* + x), stride 1, zero padding that keeps the size.

    Args:
        channels: C, of input and output.
        activation: "relu6", "tanh", "softsign" (pcDEQ-1) or "sigmoid" (pcDEQ-2).
        kernel_size: Odd; 3 in the paper.
        solver: Settings, shared by the layers of a model; by default the paper's (`Solver`).

    Shape:
        (N, C, H, W) to the same, in channels_last memory order, in which these convolutions run fastest.

    Raises:
        ValueError: Unknown activation, even kernel size, or an input of another shape.
    """

    def __init__(
        self,
        channels: int,
        activation: str = "relu6",
        kernel_size: int = 3,
        solver: Solver | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if kernel_size % 2 != 1:
            raise ValueError(f"kernel_size must be odd to keep the image size, got {kernel_size}")
        super().__init__((channels, channels, kernel_size, kernel_size), activation, solver, device, dtype)
        self.padding = kernel_size // 2

    def _arrange(self, x: Tensor) -> Tensor:
        channels = self.weight_v.shape[1]
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"PcDEQConv2d takes (N, {channels}, H, W), got {x.shape}")
        return x.contiguous(memory_format=torch.channels_last)

    def _arrange_weight(self, weight: Tensor) -> Tensor:
        return weight.contiguous(memory_format=torch.channels_last)

    def _map(self, z: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(z, weight, padding=self.padding)

    def _adjoint(self, weight: Tensor) -> Tensor:
        # The adjoint of a same-size stride 1 convolution is one too, with the kernel turned and the channels swapped.
        return self._arrange_weight(weight.flip(2, 3).transpose(0, 1))

    def _weight_gradient(self, z: Tensor, a: Tensor, weight: Tensor) -> Tensor:
        return conv2d_weight(z, weight.shape, a, padding=self.padding)
