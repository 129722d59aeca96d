"""The 32 networks of the paper as data: names, sizes, recipes and published accuracies.

From Tables 1-3 (accuracy, mean of five runs) and 5-7 (hyper-parameters) of https://arxiv.org/abs/2402.04029. Everything
that depends on the set of models (factories, configs, recipes, tests, README) reads this table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pcdeq_zoo.data import DATASETS, Dataset
from pcdeq_zoo.solver import Stop

__all__ = ["VARIANTS", "Recipe", "Variant"]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: AdamW on all parameters, cross-entropy.

    Attributes:
        epochs: Passes over the training set.
        lr: Highest learning rate.
        weight_decay: Decoupled weight decay of AdamW, on all parameters.
        batch_size: Images per optimiser step.
        augmentation: Random crop of the image padded by 4, and random horizontal flip.
        lr_decay_epoch: Epoch after which the learning rate is multiplied by `lr_decay_factor`, once; None for one
            cycle: a cosine up from lr / 25 over the share `warmup` of the epochs, and another one down to zero.
        lr_decay_factor: See `lr_decay_epoch`.
        warmup: See `lr_decay_epoch`.
        label_smoothing: Probability that is spread over all classes.
        ema_decay: Decay per step of the moving average of the weights that is evaluated and saved; 0 for none.
        stop: Criterion of the solves, see `Solver`.
        tol: Their tolerance.
    """

    epochs: int
    lr: float
    weight_decay: float
    batch_size: int = 64
    augmentation: bool = False
    lr_decay_epoch: int | None = None
    lr_decay_factor: float = 0.1
    warmup: float = 0.25
    label_smoothing: float = 0.0
    ema_decay: float = 0.0
    stop: Stop = "residual"
    tol: float = 1e-4

    def learning_rate(self, passes: float) -> float:
        """Learning rate after so many passes over the training set, 0 ≤ passes ≤ epochs."""
        if self.lr_decay_epoch is not None:
            return self.lr * (self.lr_decay_factor if passes >= self.lr_decay_epoch else 1.0)
        rise = self.warmup * self.epochs
        if passes < rise:
            return self.lr * (1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * passes / rise)) / 2)
        return self.lr * (1 + math.cos(math.pi * (passes - rise) / (self.epochs - rise))) / 2


@dataclass(frozen=True)
class Variant:
    """One network of the paper.

    Attributes:
        name: Name in the registry, e.g. "pcdeq1_mc_relu6_cifar".
        paper_name: Name in the paper's tables, e.g. "pcDEQ-1-MC-ReLU6"; a star marks the large, augmented nets.
        dataset: What it is trained on.
        structure: "l" one linear, "sc" one convolutional, "mc" three convolutional pcDEQ layers (Appendix B).
        activation: Key of `pcdeq_zoo.ACTIVATIONS`.
        channels: Width of each pcDEQ layer.
        parameters: Number of trainable parameters.
        paper_accuracy: Published test accuracy in percent.
        recipes: How it is trained, by the tag of its checkpoints: "paper" as in the paper's Tables 5-7, "zoo" ours.
        default_recipe: Tag of the default checkpoint: what did better on held-out training images where both were tried
            (see MODEL_CARD.md), else "paper".
    """

    name: str
    paper_name: str
    dataset: Dataset
    structure: str
    activation: str
    channels: tuple[int, ...]
    parameters: int
    paper_accuracy: float
    recipes: dict[str, Recipe]
    default_recipe: str


# Per group: structure, dataset, name suffix, channels, parameters, epochs, epoch of the decay, weight decay,
# augmentation, then learning rate and accuracy by activation.
_GROUPS = (
    ("l", "mnist", "", (80,), 70_410, 40, 30, 0.02, False,
     {"relu6": (1e-3, 98.1), "tanh": (1e-3, 98.2), "softsign": (1e-3, 98.1), "sigmoid": (1e-3, 98.1)}),
    ("sc", "mnist", "", (82,), 69_136, 40, 30, 0.02, False,
     {"relu6": (7e-4, 99.2), "tanh": (7e-4, 99.2), "softsign": (7e-4, 99.1), "sigmoid": (2e-4, 98.9)}),
    ("mc", "mnist", "", (12, 24, 48), 41_278, 40, 30, 0.015, False,
     {"relu6": (5e-4, 99.3), "tanh": (5e-4, 99.2), "softsign": (5e-4, 99.2), "sigmoid": (2e-4, 98.7)}),
    ("sc", "svhn", "", (125,), 164_760, 80, 70, 0.02, False,
     {"relu6": (7e-4, 88.0), "tanh": (7e-4, 88.1), "softsign": (7e-4, 88.4), "sigmoid": (5e-4, 87.3)}),
    ("mc", "svhn", "", (20, 50, 80), 130_950, 50, 40, 0.015, False,
     {"relu6": (5e-4, 93.0), "tanh": (5e-4, 92.3), "softsign": (5e-4, 92.3), "sigmoid": (2e-4, 91.5)}),
    ("sc", "cifar", "", (125,), 164_760, 80, 70, 0.02, False,
     {"relu6": (5e-4, 76.3), "tanh": (5e-4, 76.6), "softsign": (5e-4, 76.4), "sigmoid": (2e-4, 75.5)}),
    ("mc", "cifar", "", (20, 50, 80), 130_950, 50, 40, 0.015, False,
     {"relu6": (7e-4, 78.2), "tanh": (7e-4, 76.5), "softsign": (7e-4, 77.1), "sigmoid": (2e-4, 71.0)}),
    ("mc", "cifar", "_large", (100, 120, 140), 661_470, 120, 100, 0.02, True,
     {"relu6": (7e-4, 89.2), "tanh": (7e-4, 88.5), "softsign": (7e-4, 89.0), "sigmoid": (2e-4, 85.6)}),
)  # fmt: skip

_PAPER_ACTIVATIONS = {"relu6": "ReLU6", "tanh": "Tanh", "softsign": "Softsign", "sigmoid": "Sigmoid"}


def _variants() -> dict[str, Variant]:
    variants = {}
    for structure, dataset, suffix, channels, parameters, epochs, decay_epoch, decay, augmentation, runs in _GROUPS:
        for activation, (lr, accuracy) in runs.items():
            kind = 2 if activation == "sigmoid" else 1
            recipes = {
                "paper": Recipe(epochs, lr, decay, augmentation=augmentation, lr_decay_epoch=decay_epoch),
                # Chosen with MC-ReLU6 on the last 5,000 training images of CIFAR-10, and not tuned for the others.
                "zoo": Recipe(
                    epochs // 5,
                    1.2e-2,
                    0.05,
                    batch_size=128,
                    augmentation=augmentation,
                    label_smoothing=0.1,
                    stop="estimated",
                    tol=1e-3,
                ),
            }
            better_by_zoo = structure == "mc" and dataset in ("mnist", "cifar") and not suffix
            name = f"pcdeq{kind}_{structure}_{activation}_{dataset}{suffix}"
            variants[name] = Variant(
                name=name,
                paper_name=f"pcDEQ-{kind}-{structure.upper()}-{_PAPER_ACTIVATIONS[activation]}{'*' if suffix else ''}",
                dataset=DATASETS[dataset],
                structure=structure,
                activation=activation,
                channels=channels,
                parameters=parameters,
                paper_accuracy=accuracy,
                recipes=recipes,
                default_recipe="zoo" if better_by_zoo else "paper",
            )
    return variants


VARIANTS: dict[str, Variant] = _variants()
