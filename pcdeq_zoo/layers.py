"""pcDEQ layers: z* = σ(W z* + x) with W ≥ 0 (Definition 4.3 of https://arxiv.org/abs/2402.04029).

A layer takes any real input, maps it to the nonnegative orthant, and returns the one equilibrium there. Which of the
paper's two kinds it is follows from its activation: ReLU6, tanh and softsign vanish at 0 and need x ≫ 0 (pcDEQ-1,
softplus with β = 5); sigmoid does not and needs x ≥ 0 (pcDEQ-2, ReLU).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import is_exportable, register_notrace_module
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.grad import conv2d_weight

from pcdeq_zoo.certificate import Certificate, rounding_error
from pcdeq_zoo.solver import Solution, Solver

__all__ = ["ACTIVATIONS", "Activation", "PcDEQConv2d", "PcDEQLinear"]


class Activation(NamedTuple):
    """A nondecreasing concave activation (Remark 4.1), and what the solver needs to know of it."""

    module: Callable[[], nn.Module]
    evaluate: Callable[[Tensor, Tensor | None], Tensor]  # σ of nonnegative numbers, into a tensor if one is given
    derivative: Callable[[Tensor], Tensor]  # σ′(p) as a function of the *output* σ(p)
    bound: float  # sup σ
    kind: int  # 1 or 2: the paper's list, and with it pcDEQ-1 or pcDEQ-2


ACTIVATIONS = {
    "relu6": Activation(
        module=nn.ReLU6,
        evaluate=lambda p, out: torch.clamp(p, max=6, out=out),
        derivative=lambda z: ((z > 0) & (z < 6)).to(z.dtype),
        bound=6.0,
        kind=1,
    ),
    "tanh": Activation(
        module=nn.Tanh,
        evaluate=lambda p, out: torch.tanh(p, out=out),
        derivative=lambda z: 1 - z * z,
        bound=1.0,
        kind=1,
    ),
    "softsign": Activation(
        module=nn.Softsign,
        evaluate=lambda p, out: torch.div(p, p + 1, out=out),
        derivative=lambda z: (1 - z).square(),
        bound=1.0,
        kind=1,
    ),
    "sigmoid": Activation(
        module=nn.Sigmoid,
        evaluate=lambda p, out: torch.sigmoid(p, out=out),
        derivative=lambda z: z * (1 - z),
        bound=1.0,
        kind=2,
    ),
}


_BLOCK_BYTES = 2**21


def blocks(x: Tensor) -> list[slice]:
    """Cut a batch into blocks of samples that are worked on one after the other.

    On a CPU they are small enough for half a dozen temporary tensors of a block's size to stay in the cache, and large
    enough for the arithmetic to outweigh the calls. A solve ends, block by block, with the slowest sample, and
    temporary memory does not grow with the batch.
    """
    count = len(x)
    if x.device.type != "cpu" or not x.numel():
        return [slice(None)]
    size = math.ceil(count / math.ceil(x.numel() * x.element_size() / _BLOCK_BYTES))
    return [slice(start, start + size) for start in range(0, count, size)]


_HAS_BF16 = torch.cpu._is_avx512_bf16_supported()


class _Equilibrium(torch.autograd.Function):
    """(u, W) ↦ z*, the equilibrium for x = input map of u, differentiated implicitly: u, z* and W are all it saves.

    With D = diag σ′(W z* + x), which is a function of z* alone, the gradient of L is a = D (Wᵀ a + ∂L/∂z*) with respect
    to x and a z*ᵀ with respect to W. ρ(D Wᵀ) < 1 whatever the size of W: concavity gives σ(x) ≤ z* − D W z*, so
    D W z* ≤ c z* with c < 1 and z* ≫ 0. Hence the forward solver's iteration converges here as well.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor, layer: _PcDEQLayer) -> Tensor:
        z = layer._equilibrium(u, weight).value
        ctx.layer = layer
        ctx.save_for_backward(u, z, weight)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        if torch.is_grad_enabled():
            # `once_differentiable` would let this pass where `grad` is a constant, and take D and z* for constants too.
            raise NotImplementedError("a pcDEQ layer cannot be differentiated twice; use create_graph=False")
        u, z, weight = ctx.saved_tensors
        layer: _PcDEQLayer = ctx.layer
        with _no_autocast(z.device):
            a = layer._adjoint_equilibrium(z, layer._arrange(grad), weight).value
            weight_grad = layer._weight_gradient(z, a, weight) if ctx.needs_input_grad[1] else None
            return a.mul_(layer._input_derivative(u)), weight_grad, None


def _no_autocast(device: torch.device) -> torch.autocast:
    """Equilibria are solved in float32 at least: half precision cannot reach the tolerance."""
    kind = device.type if torch.amp.is_autocast_available(device.type) else "cpu"
    return torch.autocast(kind, enabled=False)


class _PcDEQLayer(nn.Module):
    """What the linear and the convolutional layer share. A subclass gives z ↦ W z, its adjoint and its gradient."""

    # softplus(x, β = 5) is exactly 0 in float32 below x ≈ -20; then x ≫ 0 fails, and with it uniqueness (σ = ReLU6,
    # w = 2 has the equilibria 0 and 6). This restores it, is lost in any other sum, and can be divided by.
    _INPUT_FLOOR = 1e-30

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
        self.bound = ACTIVATIONS[activation].bound
        self.exportable = is_exportable()
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
        u = self._prepare(x)
        if torch.jit.is_scripting():
            return self._scripted(u).reshape(x.shape).to(x.dtype)
        elif torch.compiler.is_exporting() or (self.exportable and torch.compiler.is_compiling()):
            return self._exported(u).reshape(x.shape).to(x.dtype)
        else:
            return self._implicit(u).reshape(x.shape).to(x.dtype)

    @torch.jit.unused
    @torch.no_grad()
    def solve(self, x: Tensor) -> Solution:
        """`forward` without a gradient, but with all that is known of the solve; see `Solution`."""
        u = self._prepare(x)
        with _no_autocast(u.device):
            return self._equilibrium(u, self._normalized_weight().to(u.dtype))

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

    def _prepare(self, x: Tensor) -> Tensor:
        """Check the input, and bring it to the precision, shape and memory order of the solve."""
        if not x.is_floating_point():
            raise TypeError(f"a pcDEQ layer takes floating point inputs, got {x.dtype}")
        x = self._arrange(x)
        if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
            x = x.float()
        return x

    @torch.jit.unused
    def _input_map(self, u: Tensor) -> Tensor:
        """x: softplus of u with β = 5, floored, or ReLU."""
        if self.kind == 2:
            return F.relu(u)
        # log1p(e) = log(w) + (e − (w − 1)) / w with w = 1 + e as rounded, exact to an ulp or two, as w − 1 is. Several
        # times faster than log1p itself, which PyTorch does not vectorise well on CPUs.
        q = u.abs().neg_().exp_()
        e = (q * q).square_().mul_(q)  # exp(−5 |u|); 5 |u| would be rounded, which exp makes up to 70 times as large
        w = e + 1
        log1p = torch.addcdiv(w.log(), e.sub_(w - 1), w)
        return F.relu(u).add_(log1p, alpha=0.2).clamp_(min=self._INPUT_FLOOR)

    @torch.jit.unused
    def _input_derivative(self, u: Tensor) -> Tensor:
        return torch.sigmoid(5 * u) if self.kind == 1 else (u > 0).to(u.dtype)

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
    @torch.compiler.disable  # a loop that asks for data; `exportable` has one that does not
    def _implicit(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self._project()
        with _no_autocast(x.device):
            weight = self._normalized_weight().to(x.dtype)
            if torch.is_grad_enabled():
                return _Equilibrium.apply(x, weight, self)
            return self._equilibrium(x, weight).value

    @torch.jit.unused
    def _step(self, z: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        """g(z) = σ(W z + x)."""
        return ACTIVATIONS[self.activation].evaluate(self._map(z, weight).add_(x), None)

    @torch.jit.unused
    def _equilibrium(self, u: Tensor, weight: Tensor) -> Solution:
        weight = self._arrange_weight(weight)
        coarse = self._coarse(weight)
        activation = ACTIVATIONS[self.activation]

        def product(w: Tensor) -> Tensor:
            return self._map(w, weight)

        def solve_block(rows: slice) -> Solution:
            x = self._input_map(u[rows])
            pre = x

            def step(z: Tensor) -> Tensor:
                nonlocal pre
                pre = product(z).add_(x)
                return activation.evaluate(pre, None)

            def again(change: Tensor) -> Tensor:
                return activation.evaluate(pre.add_(self._map(change.to(coarse.dtype), coarse)), pre)

            def exact(samples: Tensor, z: Tensor) -> Tensor:
                return self._step(z.double(), weight.double(), self._input_map(u[rows][samples].double()))

            def certificate() -> Certificate:
                return Certificate(
                    product=product,
                    x=x,
                    evaluate=activation.evaluate,
                    derivative=activation.derivative,
                    rounding=rounding_error(weight[0].numel(), u, worst_case=False),
                    exact=exact,
                )

            # σ(x) is the iterate after 0, and costs no evaluation of W.
            return self.solver.forward(step, activation.evaluate(x, None), again, certificate)

        return self._solve_in_blocks(solve_block, u, "forward")

    @torch.jit.unused
    def _adjoint_equilibrium(self, z: Tensor, grad: Tensor, weight: Tensor) -> Solution:
        adjoint = self._adjoint(weight)
        coarse = self._coarse(adjoint)

        def solve_block(rows: slice) -> Solution:
            d, g = ACTIVATIONS[self.activation].derivative(z[rows]), grad[rows]
            # The squares of very small gradients vanish. The equation is linear: solve it at scale 1.
            scale = g.abs().amax(list(range(1, g.ndim)), keepdim=True)
            scale = torch.where(scale == 0, 1, scale)
            g = g / scale
            pre = g

            def step(a: Tensor) -> Tensor:
                nonlocal pre
                pre = self._map(a, adjoint).add_(g)
                return pre * d

            def again(change: Tensor) -> Tensor:
                return pre.add_(self._map(change.to(coarse.dtype), coarse)).mul_(d)

            solution = self.solver.backward(step, g * d, again)
            solution.value.mul_(scale)
            return solution

        return self._solve_in_blocks(solve_block, z, "backward")

    @torch.jit.unused
    def _coarse(self, weight: Tensor) -> Tensor:
        """W for the second evaluation of a pair, which adds W (z₁ − z₀) to W z₀.

        A relative error of bfloat16's size in that shrinking change is none in the result, so bfloat16 products do
        where the machine has them; they take half the time.
        """
        fast = weight.device.type == "cpu" and weight.dtype == torch.float32 and _HAS_BF16 and weight.ndim == 4
        return weight.bfloat16() if fast else weight

    @torch.jit.unused
    def _solve_in_blocks(
        self, solve_block: Callable[[slice], Solution], like: Tensor, direction: Literal["forward", "backward"]
    ) -> Solution:
        rows = blocks(like)
        if len(rows) == 1:
            solution = solve_block(slice(None))
        else:
            value, rest = torch.empty_like(like), []
            for block in rows:
                part = solve_block(block)
                value[block] = part.value
                rest.append((part.status, part.evaluations, part.residual, part.bound))
            solution = Solution(value, *(torch.cat(parts) for parts in zip(*rest, strict=True)))
        self.solver.report(solution, self, direction)
        return solution

    def _start(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """W, x and the state of a plain iteration: z, its last relative change, which samples go on.

        TorchScript and the exporters take neither autograd.Function nor the solver. For them the layer iterates
        plainly until the estimated error of each sample is below `tol`, see `solve`.
        """
        u = u.contiguous()  # the loop's state must keep its memory order, which exporters do not promise of others
        x = F.softplus(u, beta=5.0).clamp(min=self._INPUT_FLOOR) if self.kind == 1 else F.relu(u)
        weight = self._normalized_weight().to(x.dtype)
        size = torch.full((x.shape[0],), math.inf, dtype=x.dtype, device=x.device)
        return weight, x, self.sigma(x), size, torch.ones(x.shape[0], dtype=torch.bool, device=x.device)

    def _advance(
        self, weight: Tensor, x: Tensor, z: Tensor, size: Tensor, running: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The state after one more evaluation of the samples that go on."""
        new = self.sigma(self._map(z, weight) + x).contiguous()
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


@register_notrace_module  # a loop whose length depends on the data
class PcDEQLinear(_PcDEQLayer):
    """Dense pcDEQ layer: z* = σ(W z* + x) for x, z* ∈ ℝⁿ₊ and W ∈ ℝⁿˣⁿ₊.

    Args:
        features: n, entries per sample.
        activation: "relu6", "tanh", "softsign" (pcDEQ-1) or "sigmoid" (pcDEQ-2).
        solver: Settings, shared by the layers of a model; by default `Solver()`.

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
        solver: Settings, shared by the layers of a model; by default `Solver()`.

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
