"""The activations σ of pcDEQ layers, and what a solve, its gradient and its certificate need to know of each.

To add one, add a record to `ACTIVATIONS`: nondecreasing, bounded and concave on the nonnegative numbers, σ(0) ≥ 0
(Definition 4.3 and Remark 4.1 of https://arxiv.org/abs/2402.04029). Nothing in the package but `unrolled` asks which
one it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "Activation"]

# softplus(u, β = 5) is exactly 0 in float32 below u ≈ -20; then x ≫ 0 fails, and with it uniqueness (σ = ReLU6, w = 2
# has the equilibria 0 and 6). The floor restores it. It is below half an ulp of any other summand, and 1 / 1e-30 is
# finite.
INPUT_FLOOR = 1e-30


class Activation(NamedTuple):
    """One activation.

    Attributes:
        pcdeq: 1 or 2, the paper's list. pcDEQ-1 vanishes at 0 and needs x ≫ 0, which softplus with β = 5 gives; pcDEQ-2
            does not and needs x ≥ 0, which ReLU gives.
        supremum: sup σ.
        evaluate: σ of nonnegative arguments p.
        derivative: σ′(p). Of the argument: as a function of σ(p) it loses its digits where σ saturates.
        function: σ as TorchScript and the exporters take it.
        slope_of_output: Whether `derivative` may be given σ(p) for p, and says the same.
        ulps: Rounding errors of one evaluation beside those of W z, in units of the last place: the input map's
            exponential (raised to the fifth power) and logarithm, the addition and σ.
    """

    pcdeq: Literal[1, 2]
    supremum: float
    evaluate: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    function: Callable[[Tensor], Tensor]
    slope_of_output: bool = False
    ulps: float = 40

    def input_map(self, u: Tensor) -> Tensor:
        """x ≥ 0 of any real u: softplus with β = 5, floored, or ReLU."""
        if self.pcdeq == 2:
            return F.relu(u)
        # log1p(e) = log(w) + (e − (w − 1)) / w with w = 1 + e as rounded, exact to an ulp or two, as w − 1 is. Several
        # times faster than log1p itself, which PyTorch does not vectorise well on CPUs.
        q = u.abs().neg_().exp_()
        e = (q * q).square_().mul_(q)  # exp(−5 |u|); 5 |u| would be rounded, which exp makes up to 70 times as large
        w = e + 1
        log1p = torch.addcdiv(w.log(), e.sub_(w - 1), w)
        return F.relu(u).add_(log1p, alpha=0.2).clamp_(min=INPUT_FLOOR)

    def input_derivative(self, u: Tensor) -> Tensor:
        """∂x/∂u."""
        return torch.sigmoid(5 * u) if self.pcdeq == 1 else (u > 0).to(u.dtype)


def _relu6_derivative(p: Tensor) -> Tensor:
    return ((p > 0) & (p < 6)).to(p.dtype)


def _sigmoid_derivative(p: Tensor) -> Tensor:
    rest = torch.sigmoid(-p)  # 1 − σ(p), which would have no digits where σ(p) is next to 1
    return torch.addcmul(rest, rest, rest, value=-1)


def _tanh_derivative(p: Tensor) -> Tensor:
    rest = torch.sigmoid(-2 * p)  # (1 − tanh p) / 2; 1 / cosh² is ten times slower on CPUs
    return torch.addcmul(rest, rest, rest, value=-1).mul_(4)


_TANH_SERIES_BELOW = 0.25


def _tanh(p: Tensor) -> Tensor:
    """tanh(p) for p ≥ 0 to 8 ulps, in half the time that PyTorch's takes on CPUs for large tensors.

    A continued fraction up to 0.25; beyond, what 1 − 2 / (1 + exp(2 p)) gains there, which has no digits near 0.
    """
    if p.device.type != "cpu" or p.dtype != torch.float32 or p.numel() < 2**15:
        return torch.tanh(p)
    gain = p.clamp(min=_TANH_SERIES_BELOW).mul_(-2).sigmoid_()
    small = p.clamp(max=_TANH_SERIES_BELOW)
    square = small * small
    small.mul_(square + 15).div_(square.mul_(6).add_(15))
    return small.sub_(gain.sub_(_GAIN_AT_START).mul_(2))


# As computed there, so that nothing is gained below.
_GAIN_AT_START = torch.full((64,), _TANH_SERIES_BELOW, dtype=torch.float32, device="cpu").mul_(-2).sigmoid_()[0].item()


ACTIVATIONS = {
    "relu6": Activation(
        pcdeq=1,
        supremum=6.0,
        evaluate=lambda p: p.clamp(max=6),
        derivative=_relu6_derivative,
        function=F.relu6,
        slope_of_output=True,
    ),
    "tanh": Activation(
        pcdeq=1,
        supremum=1.0,
        evaluate=_tanh,
        derivative=_tanh_derivative,
        function=torch.tanh,
        ulps=50,
    ),
    "softsign": Activation(
        pcdeq=1,
        supremum=1.0,
        evaluate=lambda p: p / (p + 1),
        derivative=lambda p: (p + 1).square_().reciprocal_(),
        function=F.softsign,
    ),
    "sigmoid": Activation(
        pcdeq=2,
        supremum=1.0,
        evaluate=torch.sigmoid,
        derivative=_sigmoid_derivative,
        function=torch.sigmoid,
    ),
}
