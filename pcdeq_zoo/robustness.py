"""Certified robustness: what a whole net can output for all images near one, proven, and whether its label changes.

What is near an image is all that differs from it by at most `eps` in every pixel (the ℓ∞ ball), pixels on the scale of
[0, 1], or any `Box` of your own. What is proven holds of the net in exact arithmetic, with W as the layers compute it
and its other parameters as they are: docs/robustness.md.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pcdeq_zoo.intervals import TINY, Box, interval, modules_in_order, rounding
from pcdeq_zoo.operators import full_precision
from pcdeq_zoo.pcdeq import PcDEQ, check_images, in_channels_last
from pcdeq_zoo.relaxations import Functional, least, rounded, step_back
from pcdeq_zoo.solver import Solver

__all__ = [
    "Box",
    "Certification",
    "Method",
    "certify",
    "forward_with_margins",
    "interval_bounds",
    "least_margin",
    "pgd",
    "pixel_box",
]

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
        by_intervals: Where intervals are enough, shape (N,), bool.
        labels: Shape (N,).
    """

    margins: Tensor
    by_intervals: Tensor
    labels: Tensor

    @property
    def margin(self) -> Tensor:
        """The least margin to another class, shape (N,)."""
        return least_margin(self.margins, self.labels)

    @property
    def certified(self) -> Tensor:
        """Where no image near this one gets another label, shape (N,), bool. So this one is classified right, too."""
        return self.margin > 0


def least_margin(margins: Tensor, labels: Tensor) -> Tensor:
    """The least of margins (N, K) to another class than the label, shape (N,)."""
    return margins.scatter(1, labels[:, None], math.inf).amin(1)


def pixel_box(model: nn.Module, images: Tensor, eps: float, *, clip: bool = True, inner: bool = False) -> Box:
    """All images near some, as the model takes them.

    Args:
        model: Its `pretrained_cfg`, as models of the zoo have one, says how pixels are normalised. Without one it takes
            pixels as they are.
        images: As the model takes them, shape (N, C, H, W), float32 or float64.
        eps: Largest change of a pixel on the scale of [0, 1].
        clip: Whether pixels stay in [0, 1], as those of images do.
        inner: Leave out, instead of taking in, what the rounding of normalised pixels may have moved across the border.

    Raises:
        ValueError: An eps outside [0, 1], pixels that are not finite, or outside of [0, 1] where they are clipped, or
            images of another number of channels than the config's mean.
    """
    if isinstance(eps, bool) or not isinstance(eps, numbers.Real) or not 0 <= eps <= 1:
        raise ValueError(f"eps is the largest change of a pixel on the scale of [0, 1], so from 0 to 1; got {eps!r}")
    if images.ndim != 4 or images.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"images must be (N, C, H, W), float32 or float64, got {images.dtype} of shape {tuple(images.shape)}"
        )
    if not bool(images.isfinite().all()):
        raise ValueError("got images with NaN or infinite pixels")
    config = getattr(model, "pretrained_cfg", None) or {}
    given = [tuple(config.get(name) or (default,)) for name, default in (("mean", 0.0), ("std", 1.0))]
    if any(len(values) not in (1, images.shape[1]) for values in given):
        raise ValueError(
            f"the pretrained_cfg of the model normalises {len(given[0])} channels, and images have {images.shape[1]}: "
            "give a Box of what is near them instead"
        )
    mean, std = (torch.tensor(values, dtype=torch.float64, device=images.device).view(-1, 1, 1) for values in given)
    black, white, exact = -mean / std, (1 - mean) / std, images.double()
    if clip:
        if bool(((exact < black - 1e-5) | (exact > white + 1e-5)).any()):
            raise ValueError(
                f"got pixels outside of [0, 1], after normalising from {images.min():g} to {images.max():g}: give "
                "images as the model takes them, or say clip=False"
            )
        exact = exact.clamp(black, white)
    lower, upper = exact - eps / std, exact + eps / std
    if clip:
        lower, upper = torch.maximum(lower, black), torch.minimum(upper, white)
    margin = rounding(images, 0) * (torch.maximum(lower.abs(), upper.abs()) + (mean.abs() + 1) / std) + TINY
    if inner:  # not empty, though
        lower, upper = torch.minimum(lower + margin, images), torch.maximum(upper - margin, images)
    else:
        lower, upper = lower - margin, upper + margin
    return Box(lower.to(images.dtype), upper.to(images.dtype))


def _near(model: nn.Module, images: Tensor | Box, eps: float | None, clip: bool, inner: bool = False) -> Box:
    """What is near images, of a model that takes them."""
    _check(images)
    if isinstance(images, Box):
        if eps is not None:
            raise ValueError(f"a Box says by itself what is near; leave eps out, got {eps}")
        box = images
    else:
        if eps is None:
            raise ValueError("give eps, the largest change of a pixel, or a Box for images")
        box = pixel_box(model, images, eps, clip=clip, inner=inner)
    if isinstance(model, PcDEQ):
        check_images(box.lower, model.in_chans, model.img_size)
    return Box(*map(_arranged, box))


def _check(images: Tensor | Box) -> None:
    if isinstance(images, Tensor):
        return
    if not isinstance(images, Box):
        raise TypeError(f"images must be a tensor, or a Box of what is near them, got {type(images).__name__}")
    lower, upper = images
    same = lower.shape == upper.shape and lower.dtype == upper.dtype
    if not same or lower.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"a Box needs ends of one shape, both float32 or float64; got {lower.dtype} of {tuple(lower.shape)} and "
            f"{upper.dtype} of {tuple(upper.shape)}"
        )
    if not bool((lower.isfinite() & upper.isfinite()).all()):
        raise ValueError("a Box needs finite ends, got NaN or infinity")
    if count := int((lower > upper).sum()):
        raise ValueError(f"a Box needs lower ≤ upper, got {count} of {lower.numel()} entries where it is not")


def _arranged(images: Tensor) -> Tensor:
    return in_channels_last(images) if images.ndim == 4 else images


def _parts(model: nn.Module, like: Tensor) -> list[tuple[str, nn.Module]]:
    """Modules of a model of which something is to be proven, for inputs like that."""
    modules = modules_in_order(model)
    if training := [name for name, module in modules if module.training]:
        raise RuntimeError(
            f"the model is in training mode ({training[0]}): call model.eval(), or forward_with_margins to train it"
        )
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_floating_point() and (value.dtype != like.dtype or value.device != like.device):
            raise TypeError(
                f"images and parameters must have one dtype and device: {like.dtype} on {like.device}, and {name} is "
                f"{value.dtype} on {value.device}"
            )
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name} has entries that are NaN or infinite: nothing can be proven of such a model")
    return modules


def _classifier(modules: list[tuple[str, nn.Module]]) -> nn.Linear:
    name, last = modules[-1]
    if type(last) is not nn.Linear:  # no subclass, which may compute something else
        raise TypeError(f"a classifier must end in nn.Linear to have margins, this one ends in {name}, {last}")
    return last


def _labels(labels: Tensor, count: int, classes: int, device: torch.device) -> Tensor:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    if labels.shape != (count,) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, shape ({count},); got {labels.dtype} of {tuple(labels.shape)}")
    if count and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"labels must be from 0 to {classes - 1}, got {labels.min()} to {labels.max()}")
    return labels.to(device).long()


def interval_bounds(model: nn.Module, images: Tensor | Box, eps: float | None = None, *, clip: bool = True) -> Box:
    """Bounds of all outputs of a model over all images near some: no output is outside of them. Differentiable.

    Each pcDEQ layer has its exact hull, from two certified solves (`PcDEQConv2d.hull`); each other module is exact on a
    box too. What makes the bounds loose is that a box forgets how its entries depend on each other.

    Args:
        model: In evaluation mode: of the zoo, or an `nn.Sequential` of common modules and pcDEQ layers. A module of
            another kind takes part by a method `hull` of its own.
        images: As the model takes them, shape (N, C, H, W), float32 or float64; or what is near them, without eps.
        eps, clip: See `pixel_box`.

    Returns:
        Box of the outputs, for a classifier of logits, shapes (N, K).

    Raises:
        ValueError, TypeError, RuntimeError: An unsupported module, a model in training mode, bad images or eps.
    """
    box = _near(model, images, eps, clip)
    with full_precision(box.lower.device):
        for _, module in _parts(model, box.lower):
            box = interval(module, box, _PROVEN)
    return box


def _margin_functional(classifier: nn.Linear, labels: Tensor, inputs: Box) -> Functional:
    """logit[label] − logit[k] as functionals of the classifier's inputs: coefficients (N, K, F), constant (N, K)."""
    if inputs.lower.ndim != 2:
        shape = tuple(inputs.lower.shape)
        raise ValueError(f"the last layer of a classifier takes (N, F), and gets {shape}: put nn.Flatten before it")
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

    Raises:
        ValueError, TypeError: As of `interval_bounds`, bad labels, or a dropout in training mode, which would drop
            other units of each bound.
    """
    box, clean = _near(model, images, eps, clip), _arranged(images)
    modules = modules_in_order(model)
    classifier = _classifier(modules)
    labels = _labels(labels, len(images), classifier.out_features, images.device)
    for name, module in modules[:-1]:
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:
            raise ValueError(f"bounds and images would not share what {name}, {module}, drops; set its p to 0")
        box, clean = interval(module, box, clean=clean), module(clean)
    coefficients, constant = _margin_functional(classifier, labels, box)
    center = torch.einsum("nkf,nf->nk", coefficients, box.center)
    radius = torch.einsum("nkf,nf->nk", coefficients.abs(), box.radius)
    return classifier(clean), center - radius + constant


@torch.inference_mode(False)  # in which the adjoints of its modules could not be computed
@torch.no_grad()
def certify(
    model: nn.Module,
    images: Tensor | Box,
    labels: Tensor,
    eps: float | None = None,
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
        images: As the model takes them, shape (N, C, H, W), float32 or float64; or what is near them, without eps.
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
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
    _check(images)
    like = images.lower if isinstance(images, Box) else images
    count, device = len(like), like.device
    first = _near(model, _rows(images, slice(0, batch_size)), eps, clip)
    modules = _parts(model, first.lower)
    classifier = _classifier(modules)
    labels = _labels(labels, count, classifier.out_features, device)
    margins = torch.empty(count, classifier.out_features, dtype=torch.float64, device=device)
    by_intervals = torch.empty(count, dtype=torch.bool, device=device)
    with (
        full_precision(device),
        tqdm(total=count, desc="certify", delay=2, disable=None if progress else True, leave=False) as bar,
    ):
        for start in range(0, count, batch_size):
            rows = slice(start, start + batch_size)
            box = _near(model, _rows(images, rows), eps, clip) if start else first
            margins[rows], by_intervals[rows] = _margins(modules, classifier, box, labels[rows], method)
            bar.update(len(box.lower))
    return Certification(margins, by_intervals, labels)


def _rows(images: Tensor | Box, rows: slice) -> Tensor | Box:
    return Box(images.lower[rows], images.upper[rows]) if isinstance(images, Box) else images[rows]


def _margins(
    modules: list[tuple[str, nn.Module]], classifier: nn.Linear, box: Box, labels: Tensor, method: Method
) -> tuple[Tensor, Tensor]:
    """Proven margins on a box of images, shape (N, K), float64, and where intervals are enough, shape (N,), bool."""
    boxes = [box]
    for _, module in modules[:-1]:
        boxes.append(interval(module, boxes[-1], _PROVEN))
    coefficients, constant = _margin_functional(classifier, labels, boxes[-1])
    functional = rounded(Functional(coefficients, constant.double()), boxes[-1])
    margins = _proven(least(functional, boxes[-1]))
    by_intervals = least_margin(margins, labels) > 0
    left = (~by_intervals).nonzero()[:, 0]
    if method == "linear" and len(left):
        functional = Functional(*(part[left] for part in functional))
        ends = [Box(*(end[left] for end in box)) for box in boxes]
        for index in range(len(modules) - 2, -1, -1):
            functional = step_back(modules[index][1], functional, ends[index], ends[index + 1])
        margins[left] = torch.maximum(margins[left], _proven(least(functional, ends[0])))
    return margins.scatter(1, labels[:, None], 0.0), by_intervals


def _proven(margins: Tensor) -> Tensor:
    """What is finite of them: a bound that overflowed is none."""
    return margins.nan_to_num(-math.inf, -math.inf, -math.inf)


def pgd(
    model: nn.Module,
    images: Tensor | Box,
    labels: Tensor,
    eps: float | None = None,
    *,
    clip: bool = True,
    steps: int = 50,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Images near some that the model labels wrong, as far as projected gradient descent finds them.

    Of the margin to the best other class, from random starts, with a step that falls from half the width of the box to
    0 (Madry et al., ICLR 2018, https://arxiv.org/abs/1706.06083). An upper bound of the robust accuracy, where
    `certify` has a lower one.

    Args:
        model: A classifier in evaluation mode.
        images: As the model takes them, (N, C, H, W); or a `Box`, whose center is the first that is tried.
        labels: Right labels, shape (N,).
        eps, clip: See `pixel_box`.
        steps: Gradients of each start.
        restarts: Starts.
        generator: Of the starts.

    Returns:
        For each image the one with the least margin of all that were tried, itself included; of its shape.

    Raises:
        ValueError, TypeError, RuntimeError: Bad images, labels or eps, or a model in training mode.
    """
    if model.training:
        raise RuntimeError("the model is in training mode: call model.eval()")
    with torch.inference_mode(False), torch.enable_grad():
        box = Box(*(end.detach().clone() for end in _near(model, images, eps, clip, inner=True)))
        best = box.center if isinstance(images, Box) else images.detach().clone()
        width = (box.upper - box.lower) / 2
        logits = model(best).detach()
        labels = _labels(labels, len(best), logits.shape[1], best.device).clone()
        lowest = _logit_margin(logits, labels)
        for _ in range(restarts):
            x = torch.rand(best.shape, generator=generator, dtype=best.dtype).to(best.device)
            x = torch.lerp(box.lower, box.upper, x)
            for step in range(steps + 1):
                x = torch.minimum(torch.maximum(x.detach(), box.lower), box.upper).requires_grad_()
                margin = _logit_margin(model(x), labels)
                better = margin.detach() < lowest
                best[better], lowest[better] = x.detach()[better], margin.detach()[better]
                if step < steps:
                    (gradient,) = torch.autograd.grad(margin.sum(), x)
                    x = x - (1 + math.cos(math.pi * step / steps)) / 2 * width * gradient.sign()
    return best


def _logit_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """logit[label] − the largest other one, shape (N,)."""
    return least_margin(logits.gather(1, labels[:, None]) - logits, labels)
