"""Neural ODEs, augmented or not: the convolutional networks of Dupont, Doucet and Teh, NeurIPS 2019,
https://arxiv.org/abs/1904.01681, solved by torchdiffeq (https://github.com/rtqichen/torchdiffeq).

    dx/dt = f(x, t), from the image and `augmented` channels of zeros at t = 0 to t = 1, and a linear classifier of that

f: convolutions 1×1, 3×3, 1×1 with relu between, each of which sees t as one more channel. Dormand-Prince steps with a
relative and absolute tolerance of 1e-3, at most 1,000 of them, and the gradient by the adjoint ODE, as in the released
code.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pcdeq_zoo.solution import ConvergenceError, Direction, Solution, announce

# Here and not where it is needed: it makes tensors as it is imported, on whatever device is the default just then.
try:
    from torchdiffeq import odeint_adjoint
except ImportError:
    odeint_adjoint = None


class Velocity(nn.Module):
    """f(x, t). `evaluations`, shape (N,), is counted up by each call."""

    evaluations: Tensor

    def __init__(self, channels: int, filters: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels + 1, filters, 1)
        self.conv2 = nn.Conv2d(filters + 1, filters, 3, padding=1)
        self.conv3 = nn.Conv2d(filters + 1, channels, 1)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        self.evaluations += 1
        time = t.to(x.dtype).expand(len(x), 1, *x.shape[2:])
        for layer in (self.conv1, self.conv2):
            x = F.relu(layer(torch.cat([time, x], 1)))
        return self.conv3(torch.cat([time, x], 1))


@dataclass
class ODESolver:
    """Settings of `torchdiffeq.odeint_adjoint`: relative and absolute tolerance, and most steps."""

    tol: float = 1e-3
    max_steps: int = 1000


class ODEFlow(nn.Module):
    """x (N, C, H, W) at t = 0 to x at t = 1, with the gradient by the adjoint ODE.

    `pcdeq_zoo.record_solves` counts the evaluations of f of each image; torchdiffeq takes the same steps for all images
    of a batch.

    Raises:
        ImportError: No torchdiffeq.
        ConvergenceError: A forward solve that underflows its step or takes too many. A backward one raises what
            torchdiffeq does, an AssertionError.
    """

    def __init__(self, velocity: Velocity, solver: ODESolver) -> None:
        super().__init__()
        if odeint_adjoint is None:
            raise ImportError("neural ODEs need torchdiffeq: pip install torchdiffeq==0.2.5")
        self.velocity, self.solver = velocity, solver

    def forward(self, x: Tensor) -> Tensor:
        thread = threading.get_ident()
        times = torch.tensor([0.0, 1.0], dtype=x.dtype, device=x.device)
        settings = {"rtol": self.solver.tol, "atol": self.solver.tol, "method": "dopri5"}
        self._count("forward", x, thread)
        try:
            y = odeint_adjoint(self.velocity, x, times, options={"max_num_steps": self.solver.max_steps}, **settings)[1]
        except AssertionError as error:  # what torchdiffeq raises
            raise ConvergenceError(
                f"the ODE could not be solved to {self.solver.tol:g} in {self.solver.max_steps} steps: {error}; "
                "its velocity has become too stiff, try a lower learning rate"
            ) from error
        if y.requires_grad:
            y.register_hook(lambda grad: self._count("backward", grad, thread))
        return y

    def _count(self, direction: Direction, x: Tensor, thread: int) -> None:
        """Tell of a solve that begins, with a tensor that counts on."""
        samples = x.new_ones(len(x))
        self.velocity.evaluations = samples.long() * 0
        status = (samples * 0).to(torch.int8)
        solution = Solution(x, status, self.velocity.evaluations, samples * float("nan"), samples * float("inf"))
        announce(solution, self, direction, thread, "ignore")


class NeuralODE(nn.Module):
    """The networks of the paper.

    Args:
        filters: Channels of f.
        augmented: Channels of zeros beside the image; none for a NODE, some for an ANODE.
        in_chans, img_size: Channels, height and width of an image.
        num_classes: Of the classifier.
        tol: See `ODESolver`.
    """

    def __init__(
        self,
        filters: int,
        augmented: int,
        in_chans: int,
        img_size: tuple[int, int],
        num_classes: int = 10,
        tol: float = 1e-3,
    ) -> None:
        super().__init__()
        channels = in_chans + augmented
        self.num_classes, self.augmented = num_classes, augmented
        self.solver = ODESolver(tol)
        self.flow = ODEFlow(Velocity(channels, filters), self.solver)
        self.classifier = nn.Linear(channels * math.prod(img_size), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, 0, self.augmented))
        return self.classifier(self.flow(x).flatten(1))
