"""Certified robustness: what a whole net can output for all images near one, proven, and whether its label changes.

What is near an image is all that differs from it by at most `eps` in every pixel (the ℓ∞ ball), pixels on the scale of
[0, 1]. What is proven holds of the net in exact arithmetic, with the parameters that it has: docs/robustness.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pcdeq_zoo.intervals import TINY, Box, interval, modules_in_order, rounding
from pcdeq_zoo.operators import full_precision
from pcdeq_zoo.relaxations import Functional, least, step_back
from pcdeq_zoo.solver import Solver

__all__ = ["Box", "Certification", "Method", "certify", "forward_with_margins", "interval_bounds", "pgd", "pixel_box"]

Method = Literal["interval", "linear"]

# A solve without a proof gives a trivial hull, so that nothing is certified by it: nobody has to be warned. 1e-4 costs
# hardly more than 1e-3, and leaves next to nothing of what a hull is too wide.
_PROVEN = Solver(tol=1e-4, stop="certified", on_failure="ignore")


@dataclass(frozen=True, eq=False)
class Certification:
    """What `certify` returns, for N images and K classes.

    Attributes:
        margins: Proven lower bounds of logit[label] − logit[k] over all images near each one, shape (N, K), float64; 0
            for the label itself, −∞ where nothing was proven. Those of images that intervals certify are by intervals.
        labels: Shape (N,).
    """

    margins: Tensor
    labels: Tensor

    @property
    def margin(self) -> Tensor:
        """The least margin to another class, shape (N,)."""
        return self.margins.scatter(1, self.labels[:, None], math.inf).amin(1)

    @property
    def certified(self) -> Tensor:
        """Where no image near this one gets another label, shape (N,), bool. So this one is classified right, too."""
        return self.margin > 0


def pixel_box(model: nn.Module, images: Tensor, eps: float, clip: bool = True) -> Box:
    """All images near some, as the model takes them.

    Args:
        model: Of the zoo; its `pretrained_cfg` says how pixels are normalised. Any other takes pixels as they are.
        images: As the model takes them, shape (N, C, H, W).
        eps: Largest change of a pixel on the scale of [0, 1].
        clip: Whether pixels stay in [0, 1], as those of images do.

    Raises:
        ValueError: An eps outside [0, 1], or pixels that are not finite, or outside of [0, 1] where they are clipped.
    """
    if not 0 <= eps <= 1:
        raise ValueError(f"eps is the largest change of a pixel on the scale of [0, 1], so from 0 to 1; got {eps}")
    if images.ndim != 4 or images.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"images must be (N, C, H, W), float32 or float64, got {images.dtype} of shape {tuple(images.shape)}"
        )
    if not bool(images.isfinite().all()):
        raise ValueError("got images with NaN or infinite pixels")
    config = getattr(model, "pretrained_cfg", None) or {}
    mean, std = (
        torch.tensor(config.get(name) or (default,), dtype=torch.float64, device=images.device).view(-1, 1, 1)
        for name, default in (("mean", 0.0), ("std", 1.0))
    )
    change = eps / std
    lower, upper = images - change, images + change
    if clip:
        black, white = -mean / std, (1 - mean) / std
        if bool(((images < black - 1e-5) | (images > white + 1e-5)).any()):
            raise ValueError(
                f"got pixels outside of [0, 1], after normalising from {images.min():g} to {images.max():g}: give "
                "images as the model takes them, or say clip=False"
            )
        lower, upper = torch.maximum(lower, black), torch.minimum(upper, white)
    # Outwards by what the normalisation of an image in floats may be off.
    margin = rounding(images, 0) * (torch.maximum(lower.abs(), upper.abs()) + (mean.abs() + 1) / std) + TINY
    return Box((lower - margin).to(images.dtype), (upper + margin).to(images.dtype))


def _check(model: nn.Module, images: Tensor) -> list[tuple[str, nn.Module]]:
    """Modules of a model of which something is to be proven."""
    modules = list(modules_in_order(model))
    if training := [name for name, module in modules if module.training and not isinstance(module, nn.Identity)]:
        raise RuntimeError(
            f"the model is in training mode ({training[0]}): call model.eval(), or forward_with_margins to train it"
        )
    for name, parameter in model.named_parameters():
        if parameter.dtype != images.dtype or parameter.device != images.device:
            raise TypeError(
                f"images and parameters must have one dtype and device: {images.dtype} on {images.device}, and {name} "
                f"is {parameter.dtype} on {parameter.device}"
            )
    return modules


def interval_bounds(model: nn.Module, images: Tensor, eps: float, *, clip: bool = True) -> Box:
    """Bounds of all outputs of a model over all images near some: no output is outside of them. Differentiable.

    Each pcDEQ layer has its exact hull, from two certified solves (`PcDEQConv2d.hull`); each other module is exact on a
    box too. What makes the bounds loose is that a box forgets how its entries depend on each other.

    Args:
        model: In evaluation mode: of the zoo, or an `nn.Sequential` of common modules and pcDEQ layers.
        images: As the model takes them, shape (N, C, H, W), float32 or float64.
        eps, clip: See `pixel_box`.

    Returns:
        Box of the outputs, for a classifier of logits, shapes (N, K).

    Raises:
        ValueError, TypeError, RuntimeError: An unsupported module, a model in training mode, bad images or eps.
    """
    box = pixel_box(model, images, eps, clip)
    modules = _check(model, images)
    with full_precision(images.device):
        for _, module in modules:
            box = interval(module, box, _PROVEN)
    return box


def _labels(labels: Tensor, count: int, classes: int) -> Tensor:
    if labels.shape != (count,) or labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, shape ({count},); got {labels.dtype} of {tuple(labels.shape)}")
    if count and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels must be from 0 to {classes - 1}, got {labels.min()} to {labels.max()}")
    return labels.long()


def _classifier(modules: list[tuple[str, nn.Module]]) -> nn.Linear:
    name, last = modules[-1]
    if not isinstance(last, nn.Linear):
        raise TypeError(f"a classifier must end in nn.Linear to have margins, this one ends in {name}, {last}")
    return last


def _margin_functional(classifier: nn.Linear, labels: Tensor) -> Functional:
    """logit[label] − logit[k] as functionals of the classifier's inputs: coefficients (N, K, F), constant (N, K)."""
    weight, bias = classifier.weight, classifier.bias
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    constant = bias[labels][:, None] - bias
    return Functional(weight[labels][:, None] - weight, constant - rounding(constant, 0) * constant.abs())


def forward_with_margins(
    model: nn.Module, images: Tensor, labels: Tensor, eps: float, *, clip: bool = True
) -> tuple[Tensor, Tensor]:
    """Logits, and lower bounds of their margins over all images near each one, to train with.

    In training mode a BatchNorm goes by the statistics of the images themselves, in the bounds as well, and gradients
    flow through these. Solves are those that the model is set to, and nothing is proven; see `certify`.

    Args:
        model: Of the zoo, or an `nn.Sequential` of common modules and pcDEQ layers, that ends in `nn.Linear`.
        images: As the model takes them, shape (N, C, H, W).
        labels: Shape (N,).
        eps, clip: See `pixel_box`.

    Returns:
        Logits (N, K), and bounds of logit[label] − logit[k], (N, K); `F.cross_entropy(-bounds, labels)` is the loss of
        interval training.
    """
    modules = list(modules_in_order(model))
    classifier = _classifier(modules)
    labels = _labels(labels, len(images), classifier.out_features)
    box, clean = pixel_box(model, images, eps, clip), images
    for _, module in modules[:-1]:
        box, clean = interval(module, box, clean=clean), module(clean)
    coefficients, constant = _margin_functional(classifier, labels)
    center = torch.einsum("nkf,nf->nk", coefficients, box.center)
    radius = torch.einsum("nkf,nf->nk", coefficients.abs(), box.radius)
    return classifier(clean), center - radius + constant


@torch.no_grad()
def certify(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    method: Method = "linear",
    clip: bool = True,
    batch_size: int = 100,
    progress: bool = True,
) -> Certification:
    """Prove of each image that no image near it gets another label than its own, where that can be done.

    Args:
        model: In evaluation mode: of the zoo, or an `nn.Sequential` of common modules and pcDEQ layers, that ends in
            `nn.Linear`.
        images: As the model takes them, shape (N, C, H, W), float32 or float64.
        labels: Right labels, shape (N,).
        eps, clip: See `pixel_box`.
        method: "interval": intervals of all layers, and margins of the last one's inputs. "linear": for images that
            this leaves open linear bounds as well, from the margins back to the pixels; tighter, and slower by the
            number of classes.
        batch_size: Images at a time.
        progress: Show a bar, on a terminal, of what takes longer than two seconds.

    Raises:
        ValueError, TypeError, RuntimeError: As of `interval_bounds`, and bad labels.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    box = pixel_box(model, images, eps, clip)
    modules = _check(model, images)
    classifier = _classifier(modules)
    labels = _labels(labels, len(images), classifier.out_features)
    margins = torch.empty(len(images), classifier.out_features, dtype=torch.float64, device=images.device)
    with (
        full_precision(images.device),
        tqdm(total=len(images), desc="certify", delay=2, disable=None if progress else True, leave=False) as bar,
    ):
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            part = Box(box.lower[rows], box.upper[rows])
            margins[rows] = _margins(modules, classifier, part, labels[rows], method)
            bar.update(len(part.lower))
    return Certification(margins, labels)


def _margins(
    modules: list[tuple[str, nn.Module]], classifier: nn.Linear, box: Box, labels: Tensor, method: Method
) -> Tensor:
    """Proven margins on a box of images, shape (N, K), float64."""
    boxes = [box]
    for _, module in modules[:-1]:
        boxes.append(interval(module, boxes[-1], _PROVEN))
    functional = _margin_functional(classifier, labels)
    functional = functional._replace(constant=functional.constant.double())
    margins = least(functional, boxes[-1]).nan_to_num(-math.inf, math.inf, -math.inf)
    own = labels[:, None]
    open_ = (margins.scatter(1, own, math.inf).amin(1) <= 0).nonzero()[:, 0]
    if method == "linear" and len(open_):
        functional = Functional(*(part[open_] for part in functional))
        ends = [Box(*(end[open_] for end in box)) for box in boxes]
        for index in range(len(modules) - 2, -1, -1):
            functional = step_back(modules[index][1], functional, ends[index], ends[index + 1])
        margins[open_] = torch.maximum(margins[open_], least(functional, ends[0]).nan_to_num(-math.inf))
    return margins.scatter(1, own, 0.0)


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    clip: bool = True,
    steps: int = 50,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Images near some that the model labels wrong, as far as projected gradient descent finds them.

    Of the margin to the best other class, from random starts, with a step that falls from eps to 0 (Madry et al., ICLR
    2018, https://arxiv.org/abs/1706.06083). An upper bound of the robust accuracy, where `certify` has a lower one.

    Args:
        model: In evaluation mode.
        images, labels: As the model takes them, (N, C, H, W), and right labels (N,).
        eps, clip: See `pixel_box`.
        steps: Gradients of each start.
        restarts: Starts.
        generator: Of the starts.

    Returns:
        For each image the one with the least margin of all that were tried, itself included; of its shape.
    """
    box = pixel_box(model, images, eps, clip)
    labels = labels.long()
    width = (box.upper - box.lower) / 2
    best, least_margin = images.clone(), _logit_margin(model(images).detach(), labels)
    for _ in range(restarts):
        x = box.lower + 2 * width * torch.rand(images.shape, generator=generator, dtype=images.dtype).to(images.device)
        for step in range(steps + 1):
            x = x.detach().requires_grad_()
            margin = _logit_margin(model(x), labels)
            better = margin.detach() < least_margin
            best[better], least_margin[better] = x.detach()[better], margin.detach()[better]
            if step < steps:
                (gradient,) = torch.autograd.grad(margin.sum(), x)
                size = (1 + math.cos(math.pi * step / steps)) / 2
                x = torch.minimum(torch.maximum(x - size * width * gradient.sign(), box.lower), box.upper)
    return best


def _logit_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """logit[label] − the largest other one, shape (N,)."""
    own = labels[:, None]
    return (logits.gather(1, own) - logits.scatter(1, own, -math.inf).amax(1, keepdim=True))[:, 0]
