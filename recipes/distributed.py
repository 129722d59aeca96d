"""Several processes that train as one would: BatchNorm over all of them, and launches that are what they seem."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Apple's GPUs know no float64, in which sums are kept and rounding is bounded.
NEEDS_CPU = torch.backends.mps.is_available()


def check_launch(accelerator: Accelerator, processes: int | None) -> None:
    """Refuse what accelerate 1.15 does without a word: other numbers of processes or gradients, fp16 that is float32.

    Args:
        accelerator: As it came up.
        processes: The number that is wanted, if it was said.

    Raises:
        SystemExit: The line says what to do.
    """
    launched = processes or int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise SystemExit(f"launched as {launched} processes, but accelerate runs {accelerator.num_processes} here")
    # With several processes asked for and one started, accelerate says where they should meet, and no more.
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ and not processes:
        raise SystemExit(
            "accelerate was asked for several processes and started one; on CPUs say --multi_gpu to it and --cpu to "
            "this, or --processes 1 for one"
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise SystemExit(
            f"mixed precision must be no or bf16, accelerate is set to {accelerator.mixed_precision!r} (fp16 is "
            "float32 on CPUs, and not tried on GPUs)"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise SystemExit(
            f"accelerate is set to accumulate {accelerator.gradient_accumulation_steps} gradients, which would divide "
            "them; say --grad-accum instead"
        )


def hardware(accelerator: Accelerator) -> str:
    """What a run computes on, e.g. "1 CPU thread" or "2 x NVIDIA H100"."""
    if accelerator.device.type == "cuda":
        return f"{accelerator.num_processes} x {torch.cuda.get_device_name(accelerator.device)}"
    threads = accelerator.num_processes * torch.get_num_threads()
    return f"{threads} {accelerator.device.type.upper()} thread{'s' * (threads > 1)}"


def sum_over_processes(accelerator: Accelerator, sums: dict[str, float]) -> dict[str, float]:
    """Sums over all processes, in the first; zeros in the others, so that nothing is ever counted twice."""
    if accelerator.num_processes == 1:
        return sums
    values = torch.tensor(list(sums.values()), dtype=torch.float64, device=accelerator.device)
    total = accelerator.reduce(values, "sum").tolist()
    return dict(zip(sums, total if accelerator.is_main_process else [0.0] * len(sums), strict=True))


class _SumOverProcesses(torch.autograd.Function):
    """Sum of a tensor over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose training statistics are those of the batches of all processes together.

    For CPUs: PyTorch's own takes tensors on a GPU only.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dtype, x = x.dtype, x.float()  # as torch.nn.BatchNorm2d computes half precision
        count = x.new_full((1,), x.numel() // x.shape[1])
        sums = _SumOverProcesses.apply(torch.cat([x.sum((0, 2, 3)), count]))
        mean = sums[:-1] / sums[-1]
        centred = x - mean.view(1, -1, 1, 1)
        var = _SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / sums[-1]
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (sums[-1] / (sums[-1] - 1)), self.momentum)
        scale = torch.rsqrt(var + self.eps) * self.weight
        return (centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(dtype)


def synchronize_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """The same model with every BatchNorm2d synchronized on that device; names and state stay."""
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
    return model
