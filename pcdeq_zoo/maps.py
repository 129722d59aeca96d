"""The fixed point maps that are solved, as values: the equilibrium of a layer, its linearisation, and any function.

A map g treats each sample of a batch by itself. Solvers take its evaluations by pairs: how a pair is computed, in which
precision and in which memory, is the map's own affair and nobody else's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from pcdeq_zoo.activations import Activation
from pcdeq_zoo.operators import Operator

__all__ = ["EquilibriumMap", "FixedPointMap", "FunctionMap", "LinearizedMap", "Pair", "cache_blocks", "per_sample"]


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """View (N,) as (N, 1, ...), to be combined with the samples of `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))


_BLOCK_BYTES = 2**21


def cache_blocks(x: Tensor) -> list[slice]:
    """Cut a batch into blocks of samples that are worked on one after the other.

    On a CPU they are small enough for half a dozen temporary tensors of a block's size to stay in the cache, and large
    enough for the arithmetic to outweigh the calls. A solve ends, block by block, with the slowest sample, and
    temporary memory does not grow with the batch.
    """
    count = len(x)
    if x.device.type != "cpu" or x.numel() * x.element_size() <= _BLOCK_BYTES:
        return [slice(None)]
    size = math.ceil(count / math.ceil(x.numel() * x.element_size() / _BLOCK_BYTES))
    return [slice(start, start + size) for start in range(0, count, size)]


class Pair:
    """Two evaluations from z₀: z₁ = g(z₀), z₂ = g(z₁), shapes (N, ...); their changes, and the norms of these.

    Attributes:
        z1, z2: The iterates.
        d1, d2: z₁ − z₀ and z₂ − z₁.
        p1, p2: The arguments of σ, z₁ = σ(p₁) and z₂ = σ(p₂), where they were asked for.
        size1, size2, size: ‖d₁‖₂, ‖d₂‖₂ and ‖z₂‖₂ of each sample, shape (N,); of `rescaled` ones relative to its
            largest entry.
    """

    __slots__ = ("_change", "_size", "d1", "d2", "dims", "p1", "p2", "size1", "size2", "z1", "z2")

    def __init__(
        self, z1: Tensor, z2: Tensor, d1: Tensor, d2: Tensor, p1: Tensor | None = None, p2: Tensor | None = None
    ) -> None:
        self.z1, self.z2, self.d1, self.d2, self.p1, self.p2 = z1, z2, d1, d2, p1, p2
        self.dims = list(range(1, z2.ndim))
        self.size1, self.size2 = (torch.linalg.vector_norm(d, dim=self.dims) for d in (d1, d2))
        self._size: Tensor | None = None
        self._change: Tensor | None = None

    @property
    def size(self) -> Tensor:
        if self._size is None:
            self._size = torch.linalg.vector_norm(self.z2, dim=self.dims)
        return self._size

    @property
    def change(self) -> Tensor:
        """‖d₂‖₂ / ‖z₂‖₂, shape (N,); NaN or wrong where `in_range` is not."""
        if self._change is None:
            self._change = self.size2 / self.size
        return self._change

    def in_range(self) -> Tensor:
        """True where the squares in the norms neither vanish nor overflow, shape (N,), bool."""
        return (self.size2 > 1e-15) & (self.size + self.size1 < 1e15)

    def rescale(self) -> None:
        """Take the norms again at a scale where no square leaves the range of floats.

        The squares of tiny or huge samples do, and a norm that vanished would read as convergence.
        """
        scale = torch.maximum(torch.maximum(self.z2.abs(), self.d2.abs()), self.d1.abs()).amax(self.dims, keepdim=True)
        scale.clamp_(min=1e-37)
        norm = torch.linalg.vector_norm
        self.size1, self.size2, self._size = (norm(t / scale, dim=self.dims) for t in (self.d1, self.d2, self.z2))
        self._size.clamp_(min=1e-30)  # of a sample that is 0, and so does not change
        self._change = None


class FixedPointMap:
    """What a solver needs of a map g. Subclasses: `EquilibriumMap`, `LinearizedMap`, `FunctionMap`."""

    start: Tensor  # first iterate, shape (N, ...)

    def pair(self, z: Tensor, keep_arguments: bool) -> Pair:
        """Two evaluations from z. With `keep_arguments` the pair has p1 and p2, if this is an `EquilibriumMap`."""
        raise NotImplementedError

    def project(self, z: Tensor) -> Tensor:
        """z, in place, onto where g is defined."""
        return z

    def restore(self, z: Tensor) -> Tensor:
        """The solution in its own units, in place."""
        return z

    def blocks(self) -> list[FixedPointMap]:
        """The map on the parts of the batch, in their order, that are best solved one after the other."""
        return [self]


class EquilibriumMap(FixedPointMap):
    """g(z) = σ(W z + x) for z ≥ 0, x the input map of u: positive and concave, with exactly one fixed point.

    Args:
        u: Input of the layer, shape (N, ...), in the memory order of `weight`.
        weight: W.
        activation: σ and its input map.
    """

    def __init__(self, u: Tensor, weight: Operator, activation: Activation) -> None:
        self.u = u
        self.weight = weight
        self.activation = activation

    @cached_property
    def x(self) -> Tensor:
        """The mapped input, shape (N, ...); NaN where u is infinite, for what overflowed before it is no input."""
        x = self.activation.input_map(self.u)
        if self.u.device.type != "cpu" or not math.isfinite(self.u.sum().item()):
            x += self.u - self.u
        return x

    @property
    def start(self) -> Tensor:  # type: ignore[override]
        """g(0) = σ(x): the iterate after 0, which costs no product with W."""
        return self.activation.evaluate(self.x, None)

    def argument(self, z: Tensor) -> Tensor:
        """p = W z + x."""
        return self.weight(z).add_(self.x)

    def __call__(self, z: Tensor) -> Tensor:
        return self.activation.evaluate(self.argument(z), None)

    def pair(self, z: Tensor, keep_arguments: bool) -> Pair:
        p1 = self.argument(z)
        z1 = self.activation.evaluate(p1, None)
        d1 = z1 - z
        if keep_arguments:
            p2 = self.argument(z1)
            z2 = self.activation.evaluate(p2, None)
            return Pair(z1, z2, d1, z2 - z1, p1, p2)
        p2 = p1.add_(self.weight.increment(d1))
        z2 = self.activation.evaluate(p2, p2)
        return Pair(z1, z2, d1, z2 - z1)

    def project(self, z: Tensor) -> Tensor:
        return z.clamp_(0, self.activation.supremum)

    def slopes(self, z: Tensor) -> Tensor:
        """σ′(W z + x), the diagonal D of the linearisation D W at z."""
        if self.activation.derivative_of_output is not None:
            return self.activation.derivative_of_output(z)
        return self.activation.derivative(self.argument(z))

    def __getitem__(self, samples: slice | Tensor) -> EquilibriumMap:
        return EquilibriumMap(self.u[samples], self.weight, self.activation)

    def double(self) -> EquilibriumMap:
        """The same map in float64."""
        return EquilibriumMap(self.u.double(), self.weight.double(), self.activation)

    def blocks(self) -> list[FixedPointMap]:
        blocks = cache_blocks(self.u)
        return [self] if len(blocks) == 1 else [self[samples] for samples in blocks]


class LinearizedMap(FixedPointMap):
    """a ↦ D (A a + g) at an equilibrium z★, D = diag σ′(W z★ + x), A = W or Wᵀ. Its fixed point is (I − D A)⁻¹ D g.

    With A = Wᵀ and g the gradient with respect to z★ that is the gradient with respect to x (implicit function
    theorem); with A = W and g the tangent of W z★ + x at fixed z★ it is the tangent of z★. ρ(D W) < 1 whatever the
    size of W: concavity gives σ(x) ≤ z★ − D W z★, so D W z★ ≤ c z★ with c < 1 and z★ ≫ 0.

    Args:
        equilibrium: The map whose equilibrium is z.
        z: z★, shape (N, ...).
        g: Shape (N, ...).
        operator: A.
    """

    def __init__(self, equilibrium: EquilibriumMap, z: Tensor, g: Tensor, operator: Operator) -> None:
        self.equilibrium = equilibrium
        self.z = z
        self.g = g
        self.operator = operator

    @cached_property
    def scale(self) -> Tensor:
        """Largest entry of g, sample by sample, 1 where that is 0, shape (N, 1, ...).

        The equation is linear, and solved at scale 1: the squares of very small gradients vanish.
        """
        scale = self.g.abs().amax(list(range(1, self.g.ndim)), keepdim=True)
        return torch.where(scale == 0, 1, scale)

    @cached_property
    def _terms(self) -> tuple[Tensor, Tensor]:
        return self.equilibrium.slopes(self.z), self.g / self.scale

    @property
    def start(self) -> Tensor:  # type: ignore[override]
        """The value at 0, D g."""
        d, g = self._terms
        return g * d

    def pair(self, a: Tensor, keep_arguments: bool) -> Pair:
        d, g = self._terms
        p = self.operator(a).add_(g)
        a1 = p * d
        d1 = a1 - a
        a2 = p.add_(self.operator.increment(d1)).mul_(d)
        return Pair(a1, a2, d1, a2 - a1)

    def restore(self, a: Tensor) -> Tensor:
        return a.mul_(self.scale)

    def __getitem__(self, samples: slice) -> LinearizedMap:
        return LinearizedMap(self.equilibrium[samples], self.z[samples], self.g[samples], self.operator)

    def blocks(self) -> list[FixedPointMap]:
        blocks = cache_blocks(self.z)
        return [self] if len(blocks) == 1 else [self[samples] for samples in blocks]


class FunctionMap(FixedPointMap):
    """Any function of (N, ...) to new (N, ...) that treats each sample by itself, and a start."""

    def __init__(self, function: Callable[[Tensor], Tensor], start: Tensor) -> None:
        if start.ndim < 2 or not start.is_floating_point():
            raise ValueError(
                f"start must be (N, ...) with at least one entry axis, floating point; got {start.dtype} of shape "
                f"{tuple(start.shape)}"
            )
        self.function = function
        self.start = start

    def _evaluate(self, z: Tensor) -> Tensor:
        version = None if z.is_inference() else z._version
        new = self.function(z)
        if not isinstance(new, Tensor) or new.shape != z.shape or new.dtype != z.dtype:
            got = f"{new.dtype} of shape {tuple(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
            raise ValueError(f"step must return {z.dtype} of shape {tuple(z.shape)}, as it is given; got {got}")
        if version is not None and z._version != version:
            raise ValueError("step must return a new tensor, got one that changes what it is given in place")
        return new

    def pair(self, z: Tensor, keep_arguments: bool) -> Pair:
        z1 = self._evaluate(z)
        z2 = self._evaluate(z1)
        return Pair(z1, z2, z1 - z, z2 - z1)
