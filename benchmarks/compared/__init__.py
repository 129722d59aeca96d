"""The systems that the paper compares with, as data: NODE, ANODE and monDEQ, in the sizes of its Tables 1-3.

Importing it registers them with timm, and recipes/train.py trains them like networks of the zoo:

    PYTHONPATH=. python recipes/train.py --module benchmarks.compared --model mondeq_sc_mnist

The recipe "published" has the settings of the released code: of monDEQ (https://github.com/locuslab/monotone_op_net,
experiments.ipynb) for each net, sizes and standardisation of pixels included, but for the cycle of momentum of the two
large ones; of the ODEs (https://github.com/EmilienDupont/augmented-neural-odes, config_img.json) those of MNIST, for
all. AdamW without weight decay is their Adam. 56 channels instead of 54 for monDEQ-SC on MNIST, and the widths of ODEs
for SVHN and CIFAR-10, are what gives the published number of parameters.

"one_cycle" is for short trainings, as the zoo's recipes are: one cycle, label smoothing, and where the zoo's net of the
same structure and data has them, random crops; for ODEs also smaller batches, as they take seconds per step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from benchmarks.compared.mondeq import MonDEQ
from benchmarks.compared.ode import NeuralODE
from pcdeq_zoo import DATASETS, Dataset, Recipe, Variant

__all__ = ["VARIANTS"]

_ODE = Recipe(20, 1e-3, 0.0, batch_size=256, lr_decay_epoch=1, lr_decay_factor=1.0, stop=None, tol=1e-3)  # constant
_MONDEQ = Recipe(40, 1e-3, 0.0, batch_size=128, lr_decay_epoch=10, stop=None, tol=1e-2)
_MONDEQ_25 = replace(_MONDEQ, lr_decay_epoch=25)
_SC_LARGE = replace(_MONDEQ, epochs=65, lr=1e-2, lr_decay_epoch=None, crop_padding=4, flip=True)
_MT_LARGE = replace(_SC_LARGE, lr=0.05)

_MNIST, _SVHN, _CIFAR = DATASETS["mnist"], DATASETS["svhn"], DATASETS["cifar"]


def _standardized(dataset: Dataset, mean: float, std: float) -> Dataset:
    channels = dataset.input_size[0]
    return replace(dataset, mean=(mean,) * channels, std=(std,) * channels)


_MNIST_01 = _standardized(_MNIST, 0.1307, 0.3081)
_SVHN_PIXELS, _CIFAR_PIXELS = _standardized(_SVHN, 0.0, 1.0), _standardized(_CIFAR, 0.0, 1.0)

# Name, name in the paper's tables, data, structure, channels (of an ODE: of its velocity, and added to the image),
# parameters, accuracy in the paper, recipe. A star: trained with augmentation there, and not at all here.
_NETWORKS = (
    ("node_mnist", "NODE", _MNIST, "ode", (92, 0), 85_316, 96.4, _ODE),
    ("anode_mnist", "ANODE", _MNIST, "ode", (64, 5), 85_462, 98.2, _ODE),
    ("mondeq_l_mnist", "monDEQ-L", _MNIST_01, "l", (87,), 84_313, 98.1, _MONDEQ),
    ("mondeq_sc_mnist", "monDEQ-SC", _MNIST_01, "sc", (56,), 84_460, 99.1, _MONDEQ),
    ("mondeq_mt_mnist", "monDEQ-MT", _MNIST_01, "mt", (16, 32, 32), 81_394, 99.0, _MONDEQ),
    ("node_svhn", "NODE", _SVHN_PIXELS, "ode", (125, 0), 173_611, 81.0, _ODE),
    ("anode_svhn", "ANODE", _SVHN_PIXELS, "ode", (64, 10), 172_452, 83.5, _ODE),
    ("mondeq_sc_svhn", "monDEQ-SC", _SVHN, "sc", (81,), 172_218, 88.7, _MONDEQ_25),
    ("mondeq_mt_svhn", "monDEQ-MT", _SVHN, "mt", (16, 32, 60), 170_194, 92.4, _MONDEQ),
    ("node_cifar", "NODE", _CIFAR_PIXELS, "ode", (125, 0), 173_611, 53.7, _ODE),
    ("anode_cifar", "ANODE", _CIFAR_PIXELS, "ode", (64, 10), 172_452, 60.6, _ODE),
    ("mondeq_sc_cifar", "monDEQ-SC", _CIFAR, "sc", (81,), 172_218, 74.0, _MONDEQ_25),
    ("mondeq_mt_cifar", "monDEQ-MT", _CIFAR, "mt", (16, 32, 60), 170_194, 72.0, replace(_MONDEQ, lr=1e-2)),
    ("node_cifar_large", "NODE*", _CIFAR_PIXELS, "ode", (326, 0), 993_088, 59.9, _ODE),
    ("anode_cifar_large", "ANODE*", _CIFAR_PIXELS, "ode", (309, 10), 1_004_227, 73.4, _ODE),
    ("mondeq_sc_cifar_large", "monDEQ-SC*", _CIFAR, "sc", (200,), 853_612, 82.0, _SC_LARGE),
    ("mondeq_mt_cifar_large", "monDEQ-MT*", _CIFAR, "mt", (64, 128, 128), 1_014_546, 89.0, _MT_LARGE),
)


def _one_cycle(published: Recipe, dataset: Dataset, structure: str) -> Recipe:
    crop_padding = 3 if dataset.name == "svhn" else int(structure == "l")
    batch_size = 32 if structure == "ode" else published.batch_size
    settings = {"lr": 3 * published.lr, "batch_size": batch_size, "crop_padding": crop_padding}
    return replace(published, lr_decay_epoch=None, label_smoothing=0.1, **settings)


VARIANTS: dict[str, Variant] = {
    name: Variant(
        name=name,
        paper_name=paper_name,
        dataset=dataset,
        structure=structure,
        activation="relu",
        channels=channels,
        parameters=parameters,
        paper_accuracy=accuracy,
        recipes={"published": recipe, "one_cycle": _one_cycle(recipe, dataset, structure)},
        default_recipe="published",
    )
    for name, paper_name, dataset, structure, channels, parameters, accuracy, recipe in _NETWORKS
}

default_cfgs = generate_default_cfgs(
    {
        f"{variant.name}.{variant.default_recipe}": {
            "input_size": variant.dataset.input_size,
            "fixed_input_size": True,
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": variant.dataset.mean,
            "std": variant.dataset.std,
            "num_classes": len(variant.dataset.classes),
            "classifier": "classifier",
        }
        for variant in VARIANTS.values()
    }
)


def _entrypoint(variant: Variant) -> Callable[..., nn.Module]:
    if variant.structure == "ode":
        kind: type[nn.Module] = NeuralODE
        sizes: dict[str, Any] = dict(zip(("filters", "augmented"), variant.channels, strict=True))
    else:
        kind = MonDEQ
        sizes = {"structure": variant.structure, "channels": variant.channels}

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(kind, variant.name, pretrained, **sizes, **kwargs)

    create.__name__ = create.__qualname__ = variant.name
    create.__doc__ = f"{variant.paper_name} for {variant.dataset.title}: {variant.parameters:,} parameters."
    return register_model(create)


globals().update({variant.name: _entrypoint(variant) for variant in VARIANTS.values()})
