"""Monotone operator equilibrium networks (monDEQ), from the formulas of Winston and Kolter, NeurIPS 2020,
https://arxiv.org/abs/2006.08591.

A layer is z = relu(W z + U x + b) with

    W = (1 − m) I − AᵀA + B − Bᵀ

so that I − W, whose symmetric part is m I + AᵀA, is strongly monotone: there is one equilibrium, and operator splitting
finds it. `Dense`, `Circular` and `MultiTier` are the three kinds of W of the paper (monDEQ-L, -SC, -MT), each with the
resolvent (I + α (I − W))⁻¹ that Peaceman-Rachford splitting takes; of convolutions by FFT.

A state is a tuple of tensors: one for each tier of `MultiTier`, one of the others.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcdeq_zoo.solution import Direction, Solution, Status, announce

State = tuple[Tensor, ...]
Resolvent = Callable[..., State]  # of a state, and whether it is that of Wᵀ
Splitting = Literal["peaceman_rachford", "forward_backward"]


def circular(z: Tensor, kernel: Tensor, stride: int = 1) -> Tensor:
    """Convolution of z (N, C, n, n) by a 3×3 kernel (K, C, 3, 3) on a torus."""
    return F.conv2d(F.pad(z, (1, 1, 1, 1), mode="circular"), kernel, stride=stride)


def transposed(kernel: Tensor) -> Tensor:
    """The kernel of the adjoint of a circular convolution."""
    return kernel.transpose(0, 1).flip(2, 3)


def symbol(kernel: Tensor, n: int, half: bool) -> Tensor:
    """A circular convolution on n×n as a matrix (K, C) for each frequency, (n, n or n // 2 + 1, K, C), complex."""
    wide = F.pad(kernel, (0, n - 3, 0, n - 3)).roll((-1, -1), (2, 3))
    transform = torch.fft.rfft2 if half else torch.fft.fft2
    return transform(wide).conj().permute(2, 3, 0, 1).resolve_conj()


def spectrum(z: Tensor, half: bool) -> Tensor:
    """z (N, C, n, n) as (n, n or n // 2 + 1, C, N), complex."""
    return (torch.fft.rfft2 if half else torch.fft.fft2)(z).permute(2, 3, 1, 0)


def from_spectrum(z: Tensor, n: int, half: bool) -> Tensor:
    """The inverse of `spectrum`."""
    z = z.permute(3, 2, 0, 1)
    return torch.fft.irfft2(z, s=(n, n)) if half else torch.fft.ifft2(z).real


class Dense(nn.Module):
    """W of (N, C)."""

    def __init__(self, channels: int, m: float = 1.0) -> None:
        super().__init__()
        self.m = m
        self.A = nn.Linear(channels, channels, bias=False)
        self.B = nn.Linear(channels, channels, bias=False)

    @property
    def weight(self) -> Tensor:
        a, b = self.A.weight, self.B.weight
        return (1 - self.m) * torch.eye(len(a), dtype=a.dtype, device=a.device) - a.T @ a + b - b.T

    def forward(self, z: State, transpose: bool = False) -> State:
        """W z, or Wᵀ z."""
        weight = self.weight
        return (z[0] @ (weight if transpose else weight.T),)

    def resolvent(self, alpha: float) -> Resolvent:
        """(I + α (I − W))⁻¹."""
        weight = self.weight
        identity = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        inverse = torch.linalg.inv((1 + alpha) * identity - alpha * weight)
        return lambda z, transpose=False: (z[0] @ (inverse if transpose else inverse.T),)


class Circular(nn.Module):
    """W of (N, C, n, n) by 3×3 convolutions on a torus; the Frobenius norms of A and B, √|g| and |h|, are learned."""

    def __init__(self, channels: int, size: int, m: float = 1.0) -> None:
        super().__init__()
        self.m, self.size = m, size
        self.A0 = nn.Conv2d(channels, channels, 3, bias=False)
        self.B0 = nn.Conv2d(channels, channels, 3, bias=False)
        self.g = nn.Parameter(torch.ones(()))
        self.h = nn.Parameter(torch.ones(()))

    @property
    def A(self) -> Tensor:  # noqa: N802
        return self.g.abs().sqrt() * self.A0.weight / self.A0.weight.norm()

    @property
    def B(self) -> Tensor:  # noqa: N802
        return self.h * self.B0.weight / self.B0.weight.norm()

    def forward(self, z: State, transpose: bool = False) -> State:
        """W z, or Wᵀ z."""
        a, b = self.A, self.B
        skew = circular(z[0], b) - circular(z[0], transposed(b))
        output = (1 - self.m) * z[0] - circular(circular(z[0], a), transposed(a))
        return (output - skew if transpose else output + skew,)

    def matrices(self, alpha: float, half: bool) -> Tensor:
        """I + α (I − W) at each frequency."""
        a, b = symbol(self.A, self.size, half), symbol(self.B, self.size, half)
        identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        return (1 + alpha * self.m) * identity + alpha * (a.mH @ a - b + b.mH)

    def resolvent(self, alpha: float) -> Resolvent:
        """(I + α (I − W))⁻¹."""
        inverse = torch.linalg.inv(self.matrices(alpha, half=True))
        adjoint = inverse.mH.resolve_conj()  # now, and not in each product

        def solve(z: State, transpose: bool = False) -> State:
            found = (adjoint if transpose else inverse) @ spectrum(z[0], half=True)
            return (from_spectrum(found, self.size, half=True),)

        return solve


class MultiTier(nn.Module):
    """W of several tiers (N, Cᵢ, nᵢ, nᵢ), each half as wide as the one before, which feeds it.

    A has the convolutions Aᵢ of the tiers on its diagonal and below it those with stride 2, P Dᵢ, where P adds a row
    and a column of zeros. The blocks of B above the diagonal are what makes W block lower triangular:

        Wᵢᵢ = (1 − m) I − AᵢᵀAᵢ − DᵢᵀDᵢ + Bᵢ − Bᵢᵀ      Wᵢ₊₁,ᵢ = −2 Aᵢ₊₁ᵀ P Dᵢ
    """

    def __init__(self, channels: tuple[int, ...], sizes: tuple[int, ...], m: float = 1.0) -> None:
        super().__init__()
        self.m, self.sizes = m, sizes
        self.tiers = nn.ModuleList(Circular(c, n, m) for c, n in zip(channels, sizes, strict=True))
        pairs = list(itertools.pairwise(channels))
        self.D0 = nn.ModuleList(nn.Conv2d(first, second, 3, bias=False) for first, second in pairs)
        self.gn = nn.ParameterList(nn.Parameter(torch.ones(())) for _ in pairs)

    def D(self, i: int) -> Tensor:  # noqa: N802
        """Kernel from tier i to the next."""
        return self.gn[i].abs().sqrt() * self.D0[i].weight / self.D0[i].weight.norm()

    def down(self, z: Tensor, i: int) -> Tensor:
        """Dᵢ z."""
        return circular(z, self.D(i), stride=2)

    def up(self, z: Tensor, i: int) -> Tensor:
        """Dᵢᵀ z: zeros between the pixels, and the adjoint of the convolution without stride."""
        wide = z.new_zeros(*z.shape[:2], self.sizes[i], self.sizes[i])
        wide[:, :, ::2, ::2] = z
        return circular(wide, transposed(self.D(i)))

    def forward(self, z: State, transpose: bool = False) -> State:
        """W z, or Wᵀ z."""
        outputs = [tier((part,), transpose)[0] for tier, part in zip(self.tiers, z, strict=True)]
        for i in range(len(self.D0)):
            outputs[i] = outputs[i] - self.up(self.down(z[i], i), i)
        for i in range(len(self.D0)):
            if transpose:
                outputs[i] = outputs[i] + self._below_transposed(z[i + 1], i)
            else:
                outputs[i + 1] = outputs[i + 1] + self._below(z[i], i)
        return tuple(outputs)

    def _below(self, z: Tensor, i: int) -> Tensor:
        """Wᵢ₊₁,ᵢ z."""
        return -2 * circular(F.pad(self.down(z, i), (0, 1, 0, 1)), transposed(self.tiers[i + 1].A))

    def _below_transposed(self, z: Tensor, i: int) -> Tensor:
        """Wᵢ₊₁,ᵢᵀ z."""
        return -2 * self.up(circular(z, self.tiers[i + 1].A)[:, :, :-1, :-1], i)

    def resolvent(self, alpha: float) -> Resolvent:
        """(I + α (I − W))⁻¹, tier by tier, as W is block triangular."""
        inverses = [self._tier_resolvent(i, alpha) for i in range(len(self.tiers))]

        def solve(z: State, transpose: bool = False) -> State:
            outputs: dict[int, Tensor] = {}
            for i in range(len(z))[::-1] if transpose else range(len(z)):
                right = z[i]
                if transpose and i + 1 in outputs:
                    right = right + alpha * self._below_transposed(outputs[i + 1], i)
                elif not transpose and i - 1 in outputs:
                    right = right + alpha * self._below(outputs[i - 1], i - 1)
                (outputs[i],) = inverses[i]((right,), transpose)
            return tuple(outputs[i] for i in range(len(z)))

        return solve

    def _tier_resolvent(self, i: int, alpha: float) -> Resolvent:
        """(I + α (I − Wᵢᵢ))⁻¹ = (M + α DᵀD)⁻¹, M as of `Circular`.

        A stride of 2 takes four frequencies for one, so that D M⁻¹ Dᵀ is a convolution on the smaller grid, and by the
        Woodbury identity the inverse is M⁻¹ − M⁻¹ Dᵀ (I / α + D M⁻¹ Dᵀ)⁻¹ D M⁻¹.
        """
        if i == len(self.D0):
            return self.tiers[i].resolvent(alpha)
        n = self.sizes[i]
        inverse = torch.linalg.inv(self.tiers[i].matrices(alpha, half=False))
        d = symbol(self.D(i), n, half=False)
        core = _fold(d @ inverse @ d.mH)
        core = torch.linalg.inv(torch.eye(core.shape[-1], dtype=core.dtype, device=core.device) / alpha + core)
        inverse_adjoint, core_adjoint, d_adjoint = (matrix.mH.resolve_conj() for matrix in (inverse, core, d))

        def solve(z: State, transpose: bool = False) -> State:
            outer, inner = (inverse_adjoint, core_adjoint) if transpose else (inverse, core)
            first = outer @ spectrum(z[0], half=False)
            second = outer @ (d_adjoint @ (inner @ _fold(d @ first)).repeat(2, 2, 1, 1))
            return (from_spectrum(first - second, n, half=False),)

        return solve


def _fold(z: Tensor) -> Tensor:
    """The spectrum (n, n, ...) of what a stride of 2 leaves, (n / 2, n / 2, ...)."""
    n = len(z) // 2
    return z.reshape(2, n, 2, n, *z.shape[2:]).sum((0, 2)) / 4


@dataclass
class SplittingSolver:
    """How the equilibrium is found; the defaults are those of the experiments in the released code.

    Attributes:
        tol: The sum over the tiers of ‖z_k − z_{k−1}‖ / ‖z_k‖ that ends a solve, of the whole batch.
        max_evals: Iterations after which it ends without.
        splitting: Forward-backward converges for small α only, Peaceman-Rachford for all.
        on_failure: As of `pcdeq_zoo.Solver`.
    """

    tol: float = 1e-2
    max_evals: int = 300
    splitting: Splitting = "peaceman_rachford"
    on_failure: Literal["raise", "warn", "ignore"] = "warn"

    def resolvent(self, operator: Any, alpha: float) -> Resolvent | None:
        """What `solve` takes of an operator; the same for W and its transpose."""
        return operator.resolvent(alpha) if self.splitting == "peaceman_rachford" else None

    def solve(
        self,
        operator: Any,
        resolvent: Resolvent | None,
        right: State,
        prox: Callable[[State], State],
        alpha: float,
        transpose: bool = False,
    ) -> tuple[State, int, float]:
        """z with 0 ∈ (I − W) z − right + N(z), where `prox` is the projection on the set whose normal cone N is.

        Returns:
            z, the iterations and the last change.
        """
        z = tuple(map(torch.zeros_like, right))
        u, change, iterations = z, math.inf, 0
        while change > self.tol and iterations < self.max_evals:
            if resolvent:
                reflected = tuple(2 * a - b for a, b in zip(z, u, strict=True))
                solved = resolvent(tuple(a + alpha * b for a, b in zip(reflected, right, strict=True)), transpose)
                u = tuple(2 * a - b for a, b in zip(solved, reflected, strict=True))
            else:
                image = operator(z, transpose)
                u = tuple((1 - alpha) * a + alpha * (b + c) for a, b, c in zip(z, image, right, strict=True))
            new = prox(u)
            change = sum(((b - a).norm() / (1e-6 + b.norm())).item() for a, b in zip(z, new, strict=True))
            z, iterations = new, iterations + 1
        return z, iterations, change


class MonotoneEquilibrium(nn.Module):
    """z = relu(W z + b), zero on the border, where a torus would let one side of the image see the other.

    α is halved, from 1, as long as that does not take more iterations (section 5 of the paper, and its released code):
    in the 30th step of a training, and twice per epoch of 60,000 images in batches of 128.
    """

    first_tuning, tuning_period = 30, 234

    def __init__(self, operator: nn.Module, solver: SplittingSolver, border: int) -> None:
        super().__init__()
        self.operator, self.solver, self.border = operator, solver, border
        self.register_buffer("alpha", torch.ones(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, b: State) -> State:
        """The equilibrium, (N, ...) per tier."""
        thread = threading.get_ident()
        masks = tuple(self._mask(part) for part in b)

        def prox(u: State) -> State:
            return tuple(F.relu(part) * mask for part, mask in zip(u, masks, strict=True))

        with torch.no_grad():
            if self.training:
                self.steps += 1
                if int(self.steps) % self.tuning_period == self.first_tuning:
                    self._tune(b, prox)
            alpha = self.alpha.item()
            resolvent = self.solver.resolvent(self.operator, alpha)

        def solve(direction: Direction, right: State, prox: Callable[[State], State]) -> State:
            transpose = direction == "backward"
            z, *how = self.solver.solve(self.operator, resolvent, right, prox, alpha, transpose)
            self._announce(z, *how, direction, thread)
            return z

        def adjoint(z: State, grad: State) -> State:
            """Wᵀ a + grad where a = J (Wᵀ a + grad), J = relu′, which is a projection."""
            slopes = tuple((part > 0).to(part.dtype) for part in z)
            a = solve("backward", grad, lambda u: tuple(x * y for x, y in zip(u, slopes, strict=True)))
            return tuple(x + y for x, y in zip(self.operator(a, True), grad, strict=True))

        with torch.no_grad():
            z = solve("forward", b, prox)
        z = prox(tuple(x + y for x, y in zip(self.operator(z), b, strict=True)))
        return _Implicit.apply(adjoint, *z)

    def _mask(self, b: Tensor) -> Tensor:
        mask = b.new_ones(b.shape[1:])
        if self.border:
            inner = slice(self.border, -self.border)
            mask = torch.zeros_like(mask)
            mask[..., inner, inner] = 1
        return mask

    def _announce(self, z: State, iterations: int, change: float, direction: Direction, thread: int) -> None:
        samples = z[0].new_ones(len(z[0]))
        status = Status.CONVERGED if change <= self.solver.tol else Status.MAX_EVALUATIONS
        if not math.isfinite(change):
            status = Status.NON_FINITE
        codes = (samples * status).to(torch.int8)
        solution = Solution(z[-1], codes, (samples * iterations).long(), samples * change, samples * math.inf)
        announce(solution, self, direction, thread, self.solver.on_failure)

    def _tune(self, b: State, prox: Callable[[State], State]) -> None:
        alpha, best, least = 1.0, None, self.solver.max_evals
        while alpha > 1e-4:
            resolvent = self.solver.resolvent(self.operator, alpha)
            iterations = self.solver.solve(self.operator, resolvent, b, prox, alpha)[1]
            if iterations > least:
                break
            if iterations < self.solver.max_evals:
                best = alpha
            alpha, least = alpha / 2, iterations
        if best is not None:
            self.alpha.fill_(best)


class _Implicit(torch.autograd.Function):
    """The identity, whose gradient is that of an equilibrium."""

    @staticmethod
    def forward(ctx: Any, adjoint: Callable[[State, State], State], *z: Tensor) -> State:
        ctx.adjoint = adjoint
        ctx.save_for_backward(*z)
        return tuple(part.view_as(part) for part in z)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.adjoint(ctx.saved_tensors, grad)


class MonDEQ(nn.Module):
    """The networks of the paper: an equilibrium of the image, for convolutions of its pixels in a frame of zeros.

    Args:
        structure: "l", "sc" or "mt".
        channels: Of the equilibrium; of each tier for "mt".
        in_chans, img_size: Channels, height and width of an image, which is square.
        num_classes: Of the classifier.
        tol: See `SplittingSolver`.
    """

    def __init__(
        self,
        structure: Literal["l", "sc", "mt"],
        channels: tuple[int, ...],
        in_chans: int,
        img_size: tuple[int, int],
        num_classes: int = 10,
        tol: float = 1e-2,
    ) -> None:
        super().__init__()
        width = img_size[0]
        self.num_classes = num_classes
        self.solver = SplittingSolver(tol)
        operator: nn.Module
        if structure == "l":
            self.injection: nn.Module = nn.Linear(in_chans * width**2, channels[0])
            operator, features, border = Dense(*channels), channels[0], 0
            self.prepare, self.pool = nn.Flatten(), nn.Identity()
        else:
            size, border = width + 2, 1
            self.prepare = nn.ZeroPad2d(1)
            self.injection = nn.Conv2d(in_chans, channels[0], 3, padding=1, padding_mode="circular")
            if structure == "sc":
                operator, self.pool = Circular(*channels, size), nn.AvgPool2d(4)
                features = channels[0] * (size // 4) ** 2
            else:
                sizes = tuple(width // 2**tier + 2 for tier in range(len(channels)))
                operator, self.pool = MultiTier(channels, sizes), nn.Identity()
                features = channels[-1] * sizes[-1] ** 2
        self.equilibrium = MonotoneEquilibrium(operator, self.solver, border)
        self.classifier = nn.Linear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        b = self.injection(self.prepare(x))
        operator = self.equilibrium.operator
        state = (b,)
        if isinstance(operator, MultiTier):  # the image enters the first tier
            below = zip(operator.tiers[1:], operator.sizes[1:], strict=True)
            state += tuple(b.new_zeros(len(b), tier.A0.in_channels, n, n) for tier, n in below)
        z = self.equilibrium(state)[-1]
        return self.classifier(self.pool(z).flatten(1))
