"""pcDEQ layers: z* = σ(W z* + x) with W ≥ 0 (Definition 4.3 of https://arxiv.org/abs/2402.04029).

A layer takes any real input u, maps it to x ≥ 0, and returns the one equilibrium there. Which of the paper's two kinds
it is follows from its activation: ReLU6, tanh and softsign vanish at 0 and need x ≫ 0 (pcDEQ-1, softplus with β = 5);
sigmoid does not and needs x ≥ 0 (pcDEQ-2, ReLU).
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn
from weakref import WeakSet, ref

import torch
import torch.nn.functional as F
from timm.layers import is_exportable
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from pcdeq_zoo.activations import ACTIVATIONS, Activation
from pcdeq_zoo.compat import is_exporting
from pcdeq_zoo.export import TraceableLoop
from pcdeq_zoo.maps import EquilibriumMap, LinearizedMap, per_sample
from pcdeq_zoo.operators import Operator, autocast_to_bfloat16, full_precision, operator
from pcdeq_zoo.solution import Direction, Solution, Status, announce
from pcdeq_zoo.solver import Solver
from pcdeq_zoo.state_dict import OLD_NAMES, WeightsError, check_tensor
from pcdeq_zoo.transforms import folded, leaf, refuse_legacy_vmap, transformed

__all__ = ["PcDEQConv2d", "PcDEQLinear", "project"]


class _Problem(NamedTuple):
    """What a solve takes of a layer beside tensors. The graph keeps it, so it must not keep the layer."""

    activation: Activation
    solver: Solver
    layer: ref[_PcDEQLayer]
    thread: int  # that runs the forward
    autocast: bool  # to bfloat16

    def operator(self, weight: Tensor) -> Operator:
        """W, in products that are good enough for `tol`, and to prove nothing."""
        return operator(weight, autocast=self.autocast, tol=self.solver.tol)

    def map(self, u: Tensor, weight: Tensor) -> EquilibriumMap:
        """Of u, both in the precision of the solve."""
        w = operator(weight) if self.solver.stop == "certified" else self.operator(weight)
        return EquilibriumMap(u, w, self.activation)

    def equilibrium(self, u: Tensor, weight: Tensor) -> Solution:
        """Of u, both in the precision of the solve."""
        with full_precision(u.device):
            solution = self.solver.equilibrium(self.map(u, weight))
        announce(solution, self.layer(), "forward", self.thread, self.solver.on_failure)
        return solution

    def differentiable_equilibrium(self, u: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """That, σ′ there, and the proven bound of its error, shape (N,)."""
        with full_precision(u.device):
            solution, slopes = self.solver.differentiable_equilibrium(self.map(u, weight))
        announce(solution, self.layer(), "forward", self.thread, self.solver.on_failure)
        return solution.value, slopes, solution.bound

    def linearized(self, slopes: Tensor, g: Tensor, weight: Tensor, direction: Direction) -> Tensor:
        """Fixed point of `LinearizedMap` at an equilibrium with these slopes: with Wᵀ "backward", with W else."""
        with full_precision(g.device):
            w = self.operator(weight)
            map_ = LinearizedMap(slopes, g, w.adjoint() if direction == "backward" else w)
            solution = self.solver.linearized(map_)
        known = solution
        if not g.is_meta and bool((solution.status == Status.NON_FINITE).any()):
            # A GradScaler finds its scale by gradients that overflow: what came in infinite goes out so, and is no
            # failure.
            known = solution[map_.scale.flatten().isfinite()]
        thread = threading.get_ident() if g.device.type == "cpu" else self.thread
        announce(known, self.layer(), direction, thread, self.solver.on_failure)
        return solution.value


def _with_signature(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the signature that `apply` of an autograd function derives anew at each call, for 60 µs."""
    function.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return function


class _Equilibrium(torch.autograd.Function):
    """(u, W) ↦ z*, σ′(W z* + x) and a bound of z*'s error: the equilibrium for x = input map of u, with its gradient.

    With D = diag σ′(W z* + x) the gradient of L is a = D (Wᵀ a + ∂L/∂z*) with respect to x and a z*ᵀ with respect to W,
    and the tangent of z* is t = D (W t + ẋ + Ẇ z*). u, z*, D and W are all it saves.
    """

    @staticmethod
    @_with_signature
    def forward(u: Tensor, weight: Tensor, problem: _Problem) -> tuple[Tensor, Tensor, Tensor]:
        return problem.differentiable_equilibrium(u, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, _Problem], output: tuple[Tensor, Tensor, Tensor]) -> None:
        u, weight, ctx.problem = inputs
        z, slopes, bound = output
        ctx.mark_non_differentiable(slopes, bound)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, z, slopes, weight)
        ctx.save_for_forward(u, z, slopes, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        if grad is None:
            return None, None, None
        refuse_legacy_vmap(grad)
        u, z, slopes, weight = ctx.saved_tensors
        a = _Linearized.apply(z, slopes, grad, weight, ctx.problem, "backward")
        with full_precision(z.device):
            weight_grad = ctx.problem.operator(weight).weight_gradient(z, a) if ctx.needs_input_grad[1] else None
            return a * ctx.problem.activation.input_derivative(u), weight_grad, None

    @staticmethod
    def jvp(ctx: Any, u_tangent: Tensor | None, weight_tangent: Tensor | None, _: None) -> tuple[Tensor, None, None]:
        u, z, slopes, weight = ctx.saved_tensors
        g = torch.zeros_like(z)
        with full_precision(z.device):
            if u_tangent is not None:
                g = g + ctx.problem.activation.input_derivative(u) * u_tangent
            if weight_tangent is not None:
                g = g + operator(weight_tangent)(z)
        return _Linearized.apply(z, slopes, g, weight, ctx.problem, "tangent"), None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], u: Tensor, weight: Tensor, problem: _Problem
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        outputs = _fold(_Equilibrium, info.batch_size, in_dims, (u,), weight, problem)
        return outputs, (0, 0, 0)


class _Linearized(torch.autograd.Function):
    """(z*, D, g, W) ↦ (I − D A)⁻¹ D g with A = Wᵀ ("backward") or W ("tangent"); see `LinearizedMap`.

    D depends on z*, which is there for that alone: whoever differentiates once more must hear that it cannot be done.
    """

    @staticmethod
    @_with_signature
    def forward(
        z: Tensor, slopes: Tensor, g: Tensor, weight: Tensor, problem: _Problem, direction: Direction
    ) -> Tensor:
        return problem.linearized(slopes, g, weight, direction)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> NoReturn:
        raise NotImplementedError("a pcDEQ layer cannot be differentiated twice; use create_graph=False")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise NotImplementedError("a pcDEQ layer cannot be differentiated twice, as the jvp of a gradient does")

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], z: Tensor, slopes: Tensor, g: Tensor, weight: Tensor, *rest: Any
    ) -> tuple[Tensor, int]:
        (solution,) = _fold(_Linearized, info.batch_size, in_dims, (z, slopes, g), weight, *rest)
        return solution, 0


def _fold(
    function: type[torch.autograd.Function],
    count: int,
    in_dims: tuple[int | None, ...],
    samples: tuple[Tensor, ...],
    weight: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """vmap of a function of samples (N, ...) and W: one solve of all samples, or one for each W where these differ.

    Returns:
        Its outputs, with the mapped axis as their first.
    """
    *sample_dims, weight_dim = in_dims[: len(samples) + 1]
    together = folded(samples, sample_dims, count)

    def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
        output = function.apply(*tensors, *rest)
        return output if isinstance(output, tuple) else (output,)

    if weight_dim is None:
        return tuple(output.unflatten(0, (count, -1)) for output in outputs(*together, weight))
    each = zip(*(tensor.chunk(count) for tensor in together), weight.unbind(weight_dim), strict=True)
    return tuple(torch.stack(stack) for stack in zip(*(outputs(*tensors) for tensors in each), strict=True))


class _ComputedWeight(Tensor):
    """W, as `layer.weight` gives it: to compute with, not to write to, which would change a copy and nothing else."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = function.__name__ if function.__name__ != "__get__" else function.__self__.__name__
        kwargs = kwargs or {}
        writes = name in ("data", "__set__", "__setitem__") or (name.endswith("_") and not name.endswith("__"))
        written = next(iter([*args, *kwargs.values()]), None) if writes else kwargs.get("out")
        if isinstance(written, cls):
            raise TypeError(
                f"layer.weight is computed from magnitude and direction, so {name} would change a copy; use "
                "layer.set_weight(W) to set it, and layer.requires_grad_(False) to freeze it"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)


_WEIGHT_HINT = "W is computed from magnitude and direction; use layer.set_weight(W) to set it"


class _PcDEQLayer(TraceableLoop):
    """What the linear and the convolutional layer share. A subclass has the shapes, and z ↦ W z for exporters.

    W = magnitude · direction / ‖direction‖, row by row (weight normalisation, Salimans and Kingma,
    https://arxiv.org/abs/1602.07868), with entries below 0 taken for 0. The forward writes nothing. After each step of
    a torch.optim optimizer both are projected to ≥ 0, which is the paper's projection and does not change W; whoever
    updates parameters without one calls `project`.
    """

    # Least row norm that weight normalisation divides by, so that an all-zero row gives zeros and not 0/0. It bounds
    # the gradient too (by 1e12): the smallest normal number would let it overflow.
    _NORM_FLOOR = 1e-12

    __constants__ = (*TraceableLoop.__constants__, "_NORM_FLOOR")  # type: ignore[assignment]
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
        if any(size < 1 for size in weight_shape):
            raise ValueError(f"layer sizes must be at least 1, got {weight_shape}")
        if solver is not None and not isinstance(solver, Solver):
            raise TypeError(f"solver must be a Solver or None, got {solver!r}")
        self.activation = activation
        self.exportable = is_exportable()
        self.solver = Solver() if solver is None else solver
        rows = (weight_shape[0], *[1] * (len(weight_shape) - 1))
        self.magnitude = nn.Parameter(torch.empty(rows, device=device, dtype=dtype))
        self.direction = nn.Parameter(torch.empty(weight_shape, device=device, dtype=dtype))
        self.reset_parameters()
        _layers.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy, or one from a pickle. An average of weights is a copy that is updated through its state_dict(), whose
        # tensors are the parameters themselves only where none of these is below 0.
        if not self.direction.is_meta and bool((self.direction < 0).any() | (self.magnitude < 0).any()):
            project(self)
        _layers.add(self)

    def __copy__(self) -> _PcDEQLayer:
        copy = type(self).__new__(type(self))
        nn.Module.__setstate__(copy, self.__dict__)  # of the same parameters, which stay as they are
        return copy

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W as the authors' code does, uniform in [0, 0.01 / √(C_out + C_in))."""
        shape = self.direction.shape
        self.direction.uniform_(0, 0.01 / (shape[0] + shape[1]) ** 0.5)
        self.magnitude.copy_(_row_norms(self.direction))

    @property
    def weight(self) -> Tensor:
        """W, shape (n, n) or (C, C, k, k), entries ≥ 0 whatever the parameters are; differentiable, not to be written.

        magnitude · direction / ‖direction‖ for each row; see `set_weight`.
        """
        return self._normalized_weight().as_subclass(_ComputedWeight)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Set W.

        Args:
            weight: Entries ≥ 0, finite, of the shape of `weight`.

        Raises:
            ValueError: It is not.
        """
        if weight.shape != self.direction.shape:
            raise ValueError(f"W must be {tuple(self.direction.shape)}, got {tuple(weight.shape)}")
        if not bool(((weight >= 0) & weight.isfinite()).all()):
            raise ValueError(f"W must be ≥ 0 and finite, got entries from {weight.min():g} to {weight.max():g}")
        dtype = self.direction.dtype
        rows = weight.to(dtype).to("cpu", torch.float64)
        largest = rows.flatten(1).amax(1).view(self.magnitude.shape)
        # Directions with entries to 1, by powers of two, which are exact: the squares of tiny ones would vanish in a
        # norm. A row of zeros gets one too, or it would have no gradient.
        exponent = torch.frexp(largest).exponent
        direction = torch.where(largest > 0, torch.ldexp(rows, -exponent), 1.0)
        magnitude = torch.where(largest > 0, torch.ldexp(_row_norms(direction), exponent), 0.0).to(dtype)
        if not bool(magnitude.isfinite().all()):
            raise ValueError(f"the norms of the rows of W overflow in {dtype}, got entries to {weight.max():g}")
        self.direction.copy_(direction)
        self.magnitude.copy_(magnitude)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(f"layer.weight cannot be assigned: {_WEIGHT_HINT}")
        if name == "activation":
            if value not in ACTIVATIONS:
                raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {value!r}")
            # What compilers see of it.
            record = ACTIVATIONS[value]
            self.sigma, self.kind, self.supremum = record.function, record.pcdeq, record.supremum
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name.startswith("weight"):  # pruning, spectral norm and other parametrisations of "weight"
            raise AttributeError(f"{name} cannot be registered: {_WEIGHT_HINT}")
        super().register_parameter(name, param)

    @property
    def tol(self) -> float:
        """Of the solver; set it there."""
        return self.solver.tol

    @tol.setter
    def tol(self, value: float) -> None:
        raise AttributeError(f"say layer.solver.tol = {value}: it holds for all layers that share this solver")

    @property
    def max_evals(self) -> int:
        """Of the solver; set it there."""
        return self.solver.max_evals

    @max_evals.setter
    def max_evals(self, value: int) -> None:
        raise AttributeError(f"say layer.solver.max_evals = {value}: it holds for all layers that share this solver")

    def forward(self, u: Tensor) -> Tensor:
        """Equilibrium of each sample for any real u; same shape and dtype as u. Half precision is solved in float32."""
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript takes it nested only
            if isinstance(u, Proxy):
                return leaf(self, u)
        v = self._prepare(u)
        if torch.jit.is_scripting():
            return self._scripted(v).reshape(u.shape).to(u.dtype)
        elif is_exporting() or (self.exportable and torch.compiler.is_compiling()):
            return self._exported(v).reshape(u.shape).to(u.dtype)
        else:
            return self._implicit(v).reshape(u.shape).to(u.dtype)

    @torch.jit.unused
    @torch.no_grad()
    def solve(self, u: Tensor) -> Solution:
        """`forward` without a gradient, but with all that is known of the solve; see `Solution`."""
        v = self._prepare(u)
        solution = self._problem().equilibrium(v, self._normalized_weight().to(v.dtype))
        return replace(solution, value=solution.value.reshape(u.shape))

    @torch.jit.unused
    def fixed_point_map(self, u: Tensor) -> EquilibriumMap:
        """z ↦ σ(W z + x) for a batch of inputs, as a value that `pcdeq_zoo.solve` takes.

        Its products are good enough for proofs, to whatever tolerance the layer itself is solved.
        """
        u = self._prepare(u)
        return EquilibriumMap(u, operator(self._normalized_weight().to(u.dtype)), ACTIVATIONS[self.activation])

    @torch.jit.unused
    @torch.compiler.disable
    def hull(self, lower: Tensor, upper: Tensor, solver: Solver | None = None) -> tuple[Tensor, Tensor]:
        """The least and the largest output of each unit over all inputs u with lower ≤ u ≤ upper.

        Shapes as of u, in the precision of the solve.

        W ≥ 0 and a nondecreasing σ make the equilibrium nondecreasing in its input, as the limit of nondecreasing
        iterates. So these are the equilibria of the two ends, whatever the size of W, and no other bounds are tighter.
        Differentiable with respect to both ends and to the parameters.

        Args:
            lower, upper: Ends of the box, as for `forward`.
            solver: Settings of the solves; by default the layer's. If it is "certified", the hull is widened by what
                the solves leave open, and is [0, sup σ] where they prove nothing: no output is outside of it.

        Raises:
            ValueError, TypeError: Ends of two shapes or in the wrong order, no solver, or what `forward` refuses.
        """
        if lower.shape != upper.shape:
            raise ValueError(f"a box needs ends of one shape, got {tuple(lower.shape)} and {tuple(upper.shape)}")
        if count := int((lower > upper).sum()):
            raise ValueError(f"a box needs lower ≤ upper, got {count} of {lower.numel()} entries where it is not")
        if solver is not None and not isinstance(solver, Solver):
            raise TypeError(f"solver must be a Solver or None, got {solver!r}")
        u = torch.cat([self._prepare(lower), self._prepare(upper)])
        problem = self._problem()
        if solver is not None:
            problem = problem._replace(solver=solver)
        z, bound = self._solved(u, problem)
        least, largest = z.chunk(2)
        if problem.solver.stop == "certified":
            # What the rounding of this line takes is four units in the last place.
            shares = per_sample(bound + 4 * torch.finfo(z.dtype).eps, z).chunk(2)
            least = (least * (1 - shares[0])).masked_fill(~(shares[0] < 1), 0.0)
            largest = (largest * (1 + shares[1])).masked_fill(~shares[1].isfinite(), self.supremum)
            largest = largest.clamp(max=self.supremum)
        # The ends of a narrow box are nearer to each other than solves to a tolerance are to the equilibria.
        least, largest = torch.minimum(least, largest), torch.maximum(least, largest)
        return least.reshape(lower.shape), largest.reshape(upper.shape)

    def extra_repr(self) -> str:
        return f"{self.direction.shape[0]}, activation={self.activation!r}, solver={self.solver!r}"

    def _to_shape(self, u: Tensor) -> Tensor:
        """Check the shape of u, and bring it to the one that products with W work in."""
        raise NotImplementedError

    def _prepare(self, u: Tensor) -> Tensor:
        """Check the input, and bring it to the precision and shape of the solve."""
        if not u.is_floating_point():
            raise TypeError(f"a pcDEQ layer takes floating point inputs, got {u.dtype}")
        u = self._to_shape(u)
        if u.dtype == torch.float16 or u.dtype == torch.bfloat16:
            u = u.float()
        return u

    def _normalized_weight(self) -> Tensor:
        # Not clamp or relu: their gradient is 0 at 0, and a weight that was projected there could never grow again.
        direction = self.direction.masked_fill(self.direction < 0, 0.0)
        magnitude = self.magnitude.masked_fill(self.magnitude < 0, 0.0)
        if direction.dtype == torch.float16 or direction.dtype == torch.bfloat16:
            direction, magnitude = direction.float(), magnitude.float()
        norm = _row_norms(direction)
        norm = norm.masked_fill(norm.isinf(), math.nan)  # a row whose squares overflow must not pass for one of zeros
        return direction * (magnitude / norm.clamp(min=self._NORM_FLOOR))

    @torch.jit.unused
    def _problem(self) -> _Problem:
        _layers.add(self)  # a copy of a parametrized layer has been made without __setstate__
        autocast = autocast_to_bfloat16(self.direction.device)
        return _Problem(ACTIVATIONS[self.activation], self.solver, ref(self), threading.get_ident(), autocast)

    @torch.jit.unused
    @torch.compiler.disable  # branches on tensor values; `exportable` has a loop that does not
    def _implicit(self, u: Tensor) -> Tensor:
        if torch.jit.is_tracing():
            raise NotImplementedError(
                "torch.jit.trace would fix the number of evaluations and the batch; use torch.export, "
                "torch.onnx.export(dynamo=True) or torch.jit.script"
            )
        return self._solved(u, self._problem())[0]

    @torch.jit.unused
    def _solved(self, u: Tensor, problem: _Problem) -> tuple[Tensor, Tensor]:
        """The equilibrium and the proven bound of its error, shape (N,); through autograd where anyone differentiates.

        Without that, no tensors are saved for it, and σ′ is not computed.
        """
        weight = self._normalized_weight().to(u.dtype)
        tangents = (forward_ad.unpack_dual(tensor).tangent for tensor in (u, weight))
        if torch.is_grad_enabled() or transformed() or any(tangent is not None for tangent in tangents):
            z, _, bound = _Equilibrium.apply(u, weight, problem)
            return z, bound
        solution = problem.equilibrium(u, weight)
        return solution.value, solution.bound

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in OLD_NAMES.values():  # what is saved is nonnegative, the parameters stay as they are
            value = destination.get(prefix + name)  # none if it is parametrised by torch.nn.utils
            if value is not None and not keep_vars and not value.is_meta and bool((value < 0).any()):
                destination[prefix + name] = value.detach().clamp(min=0)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for old, new in OLD_NAMES.items():
            if prefix + old in state_dict:
                state_dict[prefix + new] = state_dict.pop(prefix + old)
        errors: list[str] = args[-1]  # told by load_state_dict, all together
        for name in OLD_NAMES.values():
            if prefix + name in state_dict:
                try:
                    check_tensor(prefix + name, state_dict[prefix + name], getattr(self, name))
                except WeightsError as error:
                    errors.append(str(error))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _row_norms(direction: Tensor) -> Tensor:
    return torch.linalg.vector_norm(direction, dim=list(range(1, direction.ndim)), keepdim=True)


class _LiveLayers:
    """All pcDEQ layers that are alive; threads that make some do not disturb one that goes through them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._layers: WeakSet[_PcDEQLayer] = WeakSet()

    def add(self, layer: _PcDEQLayer) -> None:
        with self._lock:
            self._layers.add(layer)

    def __iter__(self) -> Iterator[_PcDEQLayer]:
        with self._lock:
            layers = list(self._layers)
        return iter(layers)


_layers = _LiveLayers()


@torch.no_grad()
def project(model: nn.Module) -> None:
    """Project the parameters of all pcDEQ layers of a model to ≥ 0, in place, as the paper does after each step.

    W does not change: it takes entries below 0 for 0. But their gradient is 0, so that without the projection a weight
    that a step took below 0 could never grow again. Steps of torch.optim optimizers do it by themselves.
    """
    for layer in model.modules():
        if isinstance(layer, _PcDEQLayer):
            layer.magnitude.clamp_(min=0)
            layer.direction.clamp_(min=0)


@torch.no_grad()
def _project_after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for layer in _layers:
        for name in ("magnitude", "direction"):
            parameter = layer._parameters.get(name)  # None: it is computed, by a parametrization
            if parameter is not None and id(parameter) in stepped:
                parameter.clamp_(min=0)


register_optimizer_step_post_hook(_project_after_step)


class PcDEQLinear(_PcDEQLayer):
    """Dense pcDEQ layer: z* = σ(W z* + x) for x, z* ∈ ℝⁿ₊ and W ∈ ℝⁿˣⁿ₊.

    x is softplus(u) with β = 5 of the input u for pcDEQ-1, and ReLU(u) for pcDEQ-2.

    Args:
        features: n, entries per sample.
        activation: "relu6", "tanh", "softsign" (pcDEQ-1) or "sigmoid" (pcDEQ-2).
        solver: Settings, shared by the layers of a model; by default `Solver()`.

    Attributes:
        exportable: Whether `torch.compile(fullgraph=True)` gets the layer as a loop (docs/solver.md); as
            `timm.layers.set_exportable` says where the layer is made, by default False.

    Shape:
        (N, features) or any (N, ...) whose samples hold `features` entries, to the same.

    Raises:
        ValueError, TypeError: Unknown activation, no solver, or an input of another shape.
    """

    def __init__(
        self,
        features: int,
        activation: str = "relu6",
        *,
        solver: Solver | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__((features, features), activation, solver, device, dtype)

    def _to_shape(self, u: Tensor) -> Tensor:
        features = self.direction.shape[1]
        if u.ndim < 2 or u.flatten(1).shape[1] != features:
            raise ValueError(
                f"PcDEQLinear takes (N, ...) with {features} entries per sample, got {u.shape}; give it a sequence "
                "(N, T, features) as x.flatten(0, 1)"
            )
        return u.flatten(1)

    def _product(self, z: Tensor, weight: Tensor) -> Tensor:
        return F.linear(z, weight)


class PcDEQConv2d(_PcDEQLayer):
    """Convolutional pcDEQ layer: z* = σ(W ∗ z* + x), stride 1, zero padding that keeps the size.

    W ≥ 0, and x ≥ 0 is made of the input as in `PcDEQLinear`.

    Args:
        channels: C, of input and output.
        activation: "relu6", "tanh", "softsign" (pcDEQ-1) or "sigmoid" (pcDEQ-2).
        kernel_size: Odd; 3 in the paper.
        solver: Settings, shared by the layers of a model; by default `Solver()`.

    Attributes:
        exportable: Whether `torch.compile(fullgraph=True)` gets the layer as a loop (docs/solver.md); as
            `timm.layers.set_exportable` says where the layer is made, by default False.

    Shape:
        (N, C, H, W) to the same, in channels_last memory order, in which these convolutions run fastest.

    Raises:
        ValueError, TypeError: Unknown activation, no solver, even kernel size, or an input of another shape.
    """

    def __init__(
        self,
        channels: int,
        activation: str = "relu6",
        kernel_size: int = 3,
        *,
        solver: Solver | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(kernel_size, int) or kernel_size % 2 != 1:
            raise ValueError(f"kernel_size must be an odd integer, to keep the image size, got {kernel_size}")
        super().__init__((channels, channels, kernel_size, kernel_size), activation, solver, device, dtype)
        self.padding = kernel_size // 2

    def _to_shape(self, u: Tensor) -> Tensor:
        channels = self.direction.shape[1]
        if u.ndim != 4 or u.shape[1] != channels:
            raise ValueError(f"PcDEQConv2d takes (N, {channels}, H, W), got {u.shape}")
        return u

    def _product(self, z: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(z, weight, padding=self.padding)
