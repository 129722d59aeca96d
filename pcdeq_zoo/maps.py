"""The fixed point maps that are solved, as values: the equilibrium of a layer, its linearisation, and any function.

A map g treats each sample of a batch by itself. Solvers take its evaluations by pairs: how a pair is computed, in which
precision and in which memory, is the map's own affair and nobody else's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from pcdeq_zoo.activations import Activation
from pcdeq_zoo.operators import Convolution, Operator

__all__ = [
    "EquilibriumMap",
    "FixedPointMap",
    "FunctionMap",
    "LinearizedMap",
    "OperatorMap",
    "Pair",
    "cache_blocks",
    "per_sample",
]


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
        z0, z1, z2: The iterates.
        d1, d2: z₁ − z₀ and z₂ − z₁.
        p1, p2: Of an `OperatorMap`, z₁ = f(p₁) and z₂ = f(p₂); p₁ is kept only if it is from a product of z₀ itself.
        size1, size2, size: ‖d₁‖₂, ‖d₂‖₂ and ‖z₂‖₂ of each sample, shape (N,); of a `rescaled` pair relative to
            its largest entry.
        moved: How far reduced products have moved z₂ since the last full one: ‖ ‖₂ of the changes they made, added
            up, shape (N,); None where products are full.
    """

    def __init__(
        self, z0: Tensor, z1: Tensor, z2: Tensor, d1: Tensor, p1: Tensor | None = None, p2: Tensor | None = None
    ) -> None:
        self.z0, self.z1, self.z2, self.d1, self.d2, self.p1, self.p2 = z0, z1, z2, d1, z2 - z1, p1, p2
        self.dims = list(range(1, z2.ndim))
        self.size1, self.size2 = (torch.linalg.vector_norm(d, dim=self.dims) for d in (self.d1, self.d2))
        self.moved: Tensor | None = None

    @cached_property
    def size(self) -> Tensor:
        return torch.linalg.vector_norm(self.z2, dim=self.dims)

    @cached_property
    def change(self) -> Tensor:
        """‖d₂‖₂ / ‖z₂‖₂, shape (N,); NaN or wrong where `in_range` is not."""
        return self.size2 / self.size

    def in_range(self) -> Tensor:
        """Where no square of a change vanishes, shape (N,), bool. Norms that overflow make errors of 0 or NaN."""
        return self.size2 > 1e-15

    def rescaled(self) -> tuple[Pair, Tensor]:
        """The changes and z₂ at a scale where no square leaves the range of floats, shape (N,), and that scale.

        The squares of tiny or huge samples do, and a norm that vanished would read as convergence.
        """
        scale = torch.maximum(torch.maximum(self.z2.abs(), self.d2.abs()), self.d1.abs()).amax(self.dims, keepdim=True)
        scale.clamp_(min=1e-37)
        pair = copy.copy(self)
        pair.d1, pair.d2, pair.z2 = (t / scale for t in (self.d1, self.d2, self.z2))
        pair.size1, pair.size2, size = (torch.linalg.vector_norm(t, dim=self.dims) for t in (pair.d1, pair.d2, pair.z2))
        pair.size = size.clamp_(min=1e-30)  # 0 is the size of a sample that is, and stays, 0
        pair.change = pair.size2 / pair.size
        scale = scale.flatten()
        if self.moved is not None:
            pair.moved = self.moved / scale
        return pair, scale


class FixedPointMap:
    """What a solver needs of a map g. Subclasses: `OperatorMap` with those of a layer, and `FunctionMap`."""

    start: Tensor  # first iterate, shape (N, ...)
    like: Tensor  # of its shape, dtype and device, and no work to have
    reduced_error: float | None = None  # of its products, relative, 0 if that is not to count; None: not reduced

    @property
    def check_every(self) -> int:
        """Evaluations after which it is worth to ask whether samples are done: a multiple of 2."""
        return 2 if self.like.device.type == "cpu" else 4  # reading the answer waits for the device

    def pair(self, z: Tensor, before: Pair | None = None, full: Tensor | None = None) -> Pair:
        """Two evaluations from z.

        Args:
            z: Where to start.
            before: The pair that led to z, which is used up.
            full: Samples whose first product must not be reduced, shape (N,), bool; None: none.
        """
        raise NotImplementedError

    def project(self, z: Tensor) -> Tensor:
        """z, in place, onto where g is defined."""
        return z

    def settled(self, pair: Pair) -> Tensor:
        """Where a change is nothing but rounding, two units of the last place, and will not fall, shape (N,), bool."""
        return pair.change <= 2 * torch.finfo(pair.z2.dtype).eps

    def restore(self, z: Tensor) -> Tensor:
        """The solution in its own units, in place."""
        return z

    def __getitem__(self, samples: slice | Tensor) -> FixedPointMap:
        """The map of some of the samples."""
        raise NotImplementedError

    def blocks(self) -> Iterator[FixedPointMap]:
        """The map on the parts of the batch, in their order, that are best solved one after the other."""
        yield self

    def in_full_precision(self) -> FixedPointMap:
        """The same without reduced products."""
        return self


class OperatorMap(FixedPointMap):
    """g(z) = f(p), p = A z + x, with f unit by unit: the form of the equilibrium and of its linearisation.

    Where A has reduced products, p is kept, and moved along by A (z − z') with the changes of z: as these shrink, so do
    the errors of their products, and only those of the first ones are left. `Pair.moved` tells how much that may be.
    Where it is too much, the solver asks for one full product, which sets p right.

    Attributes:
        x: Shape (N, ...), in the memory order of `operator`.
        operator: A.
        starts_full: Whether the first product is a full one, of an operator that has such.
    """

    x: Tensor
    operator: Operator
    starts_full = True

    @property
    def reduced_error(self) -> float | None:  # type: ignore[override]
        return self.operator.reduced_error

    @cached_property
    def check_every(self) -> int:
        # On a GPU the answer is waited for; of a small matrix two products are done in the time it takes.
        return 2 if self.like.device.type == "cpu" and isinstance(self.operator, Convolution) else 4

    def apply(self, p: Tensor) -> Tensor:
        """f(p)."""
        raise NotImplementedError

    def argument(self, z: Tensor) -> Tensor:
        """p = A z + x."""
        return self.operator.affine(z, self.x)

    def __call__(self, z: Tensor) -> Tensor:
        return self.apply(self.argument(z))

    @property
    def start(self) -> Tensor:  # type: ignore[override]
        """g(0) = f(x): the iterate after 0, which costs no product."""
        return self.apply(self.x)

    def pair(self, z: Tensor, before: Pair | None = None, full: Tensor | None = None) -> Pair:
        if self.reduced_error is None:
            p1 = self.argument(z)
            z1 = self.apply(p1)
            p2 = self.argument(z1)
            z2 = self.apply(p2)
            return Pair(z, z1, z2, z1 - z, p1, p2)
        is_full = before is None and self.starts_full
        if before is not None:
            assert before.p2 is not None
            p = before.p2.add_(self.operator.reduced(z - before.z1))
        else:
            p = self.argument(z) if is_full else self.x + self.operator.reduced(z)
        if full is not None:
            # Of all samples, for the few percent that it costs: a product of some rounds as their number has it, and
            # makes a sample depend on its mates.
            p = torch.where(per_sample(full, p), self.argument(z), p)
        z1 = self.apply(p)
        d1 = z1 - z
        increment = self.operator.reduced(d1)
        p2 = p + increment if is_full else p.add_(increment)
        z2 = self.apply(p2)
        pair = Pair(z, z1, z2, d1, p if is_full else None, p2)
        if is_full:
            pair.moved = pair.size2
        else:  # what a product changed shows in the evaluation after it
            moved = pair.size1 if before is None or before.moved is None else before.moved + pair.size1
            pair.moved = pair.size2 + (moved if full is None else moved.masked_fill(full, 0))
        return pair

    def __getitem__(self, samples: slice | Tensor) -> OperatorMap:
        raise NotImplementedError

    def blocks(self) -> Iterator[FixedPointMap]:
        blocks = cache_blocks(self.like)
        if len(blocks) == 1:
            yield self
        else:  # one by one, so that what a block computed for itself is freed with it
            yield from (self[samples] for samples in blocks)

    def in_full_precision(self) -> OperatorMap:
        if self.reduced_error is None:
            return self
        assert isinstance(self.operator, Convolution)
        full = copy.copy(self)
        full.operator = self.operator.in_full_precision()
        return full


class EquilibriumMap(OperatorMap):
    """g(z) = σ(W z + x) for z ≥ 0, x the input map of u: positive and concave, with exactly one fixed point.

    Args:
        u: Input of the layer, shape (N, ...).
        operator: W.
        activation: σ and its input map.
    """

    def __init__(self, u: Tensor, operator: Operator, activation: Activation) -> None:
        self.u = self.like = operator.arrange(u)
        self.operator = operator
        self.activation = activation

    @cached_property
    def x(self) -> Tensor:  # type: ignore[override]
        """The mapped input, shape (N, ...); NaN where u is infinite, for what overflowed before it is no input."""
        x = self.activation.input_map(self.u)
        if self.u.device.type != "cpu" or not math.isfinite(self.u.sum().item()):
            x += self.u - self.u
        return x

    def apply(self, p: Tensor) -> Tensor:
        return self.activation.evaluate(p)

    def project(self, z: Tensor) -> Tensor:
        return z.clamp_(0, self.activation.supremum)

    def slopes(self, z: Tensor) -> Tensor:
        """D = diag σ′(W z + x), not from reduced products: where p is large, a small share of it is much of σ′(p)."""
        return self.activation.derivative(z if self.activation.slope_of_output else self.argument(z))

    def __getitem__(self, samples: slice | Tensor) -> EquilibriumMap:
        return EquilibriumMap(self.u[samples], self.operator, self.activation)

    def double(self) -> EquilibriumMap:
        """The same map in float64."""
        return EquilibriumMap(self.u.double(), self.operator.double(), self.activation)


class LinearizedMap(OperatorMap):
    """a ↦ D (A a + g) at an equilibrium z★, D = diag σ′(W z★ + x), A = W or Wᵀ. Its fixed point is (I − D A)⁻¹ D g.

    With A = Wᵀ and g the gradient with respect to z★ that is the gradient with respect to x (implicit function
    theorem); with A = W and g the tangent of W z★ + x at fixed z★ it is the tangent of z★. ρ(D W) < 1 whatever the
    size of W: concavity gives σ(x) ≤ z★ − D W z★, so D W z★ ≤ c z★ with c < 1 and z★ ≫ 0.

    It is solved for g / max |g|, sample by sample: the squares of very small gradients vanish.

    Args:
        slopes: D, shape (N, ...).
        g: Shape (N, ...).
        operator: A.
    """

    starts_full = False  # a gradient that is off by 1e-3 is good enough where `tol` asks for no more

    def __init__(self, slopes: Tensor, g: Tensor, operator: Operator) -> None:
        self.slopes = operator.arrange(slopes)
        self.g = self.like = operator.arrange(g)
        self.operator = operator

    @cached_property
    def scale(self) -> Tensor:
        """max |g|, sample by sample, 1 where that is 0, shape (N, 1, ...)."""
        largest = self.g.abs().amax(list(range(1, self.g.ndim)), keepdim=True)
        return largest.masked_fill_(largest == 0, 1.0)

    @cached_property
    def x(self) -> Tensor:  # type: ignore[override]
        return self.g / self.scale

    def apply(self, p: Tensor) -> Tensor:
        return p * self.slopes

    def restore(self, a: Tensor) -> Tensor:
        return a.mul_(self.scale)

    def __getitem__(self, samples: slice | Tensor) -> LinearizedMap:
        return LinearizedMap(self.slopes[samples], self.g[samples], self.operator)


class FunctionMap(FixedPointMap):
    """Any function of (N, ...) to new (N, ...) that treats each sample by itself, and a start."""

    def __init__(self, function: Callable[[Tensor], Tensor], start: Tensor) -> None:
        if start.ndim < 2 or not start.is_floating_point():
            raise ValueError(
                f"start must be (N, ...) with at least one entry axis, floating point; got {start.dtype} of shape "
                f"{tuple(start.shape)}"
            )
        self.function = function
        self.start = self.like = start

    def _evaluate(self, z: Tensor) -> Tensor:
        version = None if z.is_inference() else z._version
        new = self.function(z)
        if not isinstance(new, Tensor) or new.shape != z.shape or new.dtype != z.dtype:
            got = f"{new.dtype} of shape {tuple(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
            raise ValueError(f"step must return {z.dtype} of shape {tuple(z.shape)}, as it is given; got {got}")
        if version is not None and z._version != version:
            raise ValueError("step must return a new tensor, got one that changes what it is given in place")
        return new

    def settled(self, pair: Pair) -> Tensor:
        # And to and fro: nobody knows how long such a map may go on as it does.
        return super().settled(pair) & ((pair.d1 * pair.d2).sum(pair.dims) <= 0)

    def pair(self, z: Tensor, before: Pair | None = None, full: Tensor | None = None) -> Pair:
        z1 = self._evaluate(z)
        z2 = self._evaluate(z1)
        return Pair(z, z1, z2, z1 - z)
