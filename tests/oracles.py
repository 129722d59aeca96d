"""Random layers, and their equilibria by means that share nothing with the package."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcdeq_zoo import ACTIVATIONS, PcDEQConv2d, PcDEQLinear, Solver

BOUND = {"relu6": 6.0, "tanh": 1.0, "softsign": 1.0, "sigmoid": 1.0}
SIGMA = {"relu6": F.relu6, "tanh": torch.tanh, "softsign": F.softsign, "sigmoid": torch.sigmoid}

CASES = [(kind, activation) for kind in ("linear", "conv") for activation in ACTIVATIONS]
every_layer = pytest.mark.parametrize(("kind", "activation"), CASES, ids=["-".join(case) for case in CASES])


def make(kind: str, activation: str, norm: float = 3.0, dtype: torch.dtype = torch.float64, **solver):
    """A layer with random W of spectral norm `norm`, solved as far as the precision allows, and a random input."""
    tol = 1e-14 if dtype == torch.float64 else 1e-6
    settings = Solver(**{"tol": tol, "max_evals": 5000, "stop": "residual", **solver})
    if kind == "linear":
        layer, x = PcDEQLinear(12, activation, solver=settings, dtype=dtype), torch.randn(4, 12, dtype=dtype)
    else:
        layer, x = PcDEQConv2d(3, activation, solver=settings, dtype=dtype), torch.randn(4, 3, 5, 4, dtype=dtype)
    with torch.no_grad():
        layer.direction.uniform_().masked_fill_(torch.rand_like(layer.direction) < 0.2, 0)
        layer.magnitude.uniform_(0.5, 1)
        layer.magnitude.mul_(norm / torch.linalg.matrix_norm(dense(layer, x), 2))
    return layer, x


def dense(layer: nn.Module, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """W as a matrix on one flattened sample, column by column."""
    weight = layer.weight if weight is None else weight
    if isinstance(layer, PcDEQLinear):
        return weight
    n = x[0].numel()
    units = torch.eye(n, dtype=x.dtype).view(n, *x.shape[1:])
    return F.conv2d(units, weight, padding=layer.padding).flatten(1).T


def input_map(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.logaddexp(5 * x, x.new_zeros(())) / 5 if layer.kind == 1 else F.relu(x)


def derivative(activation: str, pre: Tensor) -> Tensor:
    with torch.enable_grad():
        pre = pre.detach().requires_grad_()
        (d,) = torch.autograd.grad(SIGMA[activation](pre).sum(), pre)
    return d


def newton(matrix: Tensor, u: Tensor, activation: str) -> Tensor:
    """Equilibrium of samples u (N, n) by dense Newton steps from the upper bound; as σ is concave they fall to z*.

    Shares nothing with the package: no iteration of the map, no stopping rule, σ′ by autograd.
    """
    z = torch.full_like(u, BOUND[activation])
    eye = torch.eye(u.shape[1], dtype=u.dtype)
    for _ in range(60):
        pre = z @ matrix.T + u
        jacobian = derivative(activation, pre)[:, :, None] * matrix
        step = torch.linalg.solve(eye - jacobian, (z - SIGMA[activation](pre))[:, :, None])[:, :, 0]
        z = z - step
        if step.abs().max() < 1e-12:  # its square is what is left
            break
    assert (SIGMA[activation](z @ matrix.T + u) - z).abs().max() < 1e-13
    return z


def truth(layer: nn.Module, x: Tensor) -> Tensor:
    """The equilibrium in float64 by dense Newton steps on the CPU, shape (N, n)."""
    exact = x.double().cpu()
    matrix = dense(layer, exact, layer.weight.double().cpu()).detach()
    return newton(matrix, input_map(layer, exact).flatten(1), layer.activation)
