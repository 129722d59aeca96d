"""The one mode that soon dominates the error of a fixed point iteration: changes that go on as a geometric series.

Functions of tensors alone, which TorchScript and the exporters take too. d₁ and d₂ are two changes in a row, shape
(N, ...), size1 and size2 their norms, shape (N,).
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["aitken_factor", "change_rate", "growing", "remaining_error"]


def change_rate(size1: Tensor, size2: Tensor) -> Tensor:
    """r = ‖d₂‖ / ‖d₁‖, shape (N,); 0 where nothing changes."""
    return (size2 / size1.clamp(min=1e-37)).nan_to_num(0.0)


def remaining_error(change: Tensor, rate: Tensor) -> Tensor:
    """‖d₂‖ r / (1 − r), for the change ‖d₂‖ in any unit, shape (N,); no series, r ≥ 1, leaves all there is."""
    return change * rate / (1 - rate).clamp(min=1e-37)


def growing(d1: Tensor, d2: Tensor, z: Tensor) -> Tensor:
    """Where a unit of z ≥ 0 still grows by 2 % or more of itself, and no slower than before, shape (N,), bool.

    One that is tiny beside the others does not show in a norm. Where W has blocks, nothing else may lift it.
    """
    return ((d2 >= d1) & (d2 > 0.02 * z)).flatten(1).any(dim=1)


def aitken_factor(d1: Tensor, d2: Tensor, size1: Tensor, dims: list[int]) -> Tensor:
    """How many times d₂ the rest of the series is, ρ / (1 − ρ), shape (N,); 0 where it is no series.

    Its rate ρ is the Rayleigh quotient ⟨d₁, d₂⟩ / ‖d₁‖². At most 19 is believed, which is that of 0.95.

    Args:
        d1, d2, size1: See above.
        dims: All but the first.
    """
    along = (d2 * d1).sum(dims)
    return (along / (size1 * size1 - along)).nan_to_num(0.0, 0.0, 0.0).clamp(0.0, 19.0)
