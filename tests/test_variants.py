"""The table of networks, and what a recipe says."""

import pytest
import timm

from pcdeq_zoo import ACTIVATIONS, VARIANTS, Recipe


def test_the_variants_are_registered():
    assert sorted(VARIANTS) == timm.list_models("pcdeq*")
    assert len(VARIANTS) == 32


def test_the_variants_are_those_of_the_paper(paper_tables):
    rows = paper_tables["models"]
    assert len(rows) == 32
    for row in rows:
        variant = VARIANTS[row["model"]]
        ours = {
            "paper_name": variant.paper_name,
            "dataset": variant.dataset.title,
            "layer": ACTIVATIONS[variant.activation].pcdeq,
            "structure": variant.structure.upper(),
            "activation": variant.activation,
            "channels": list(variant.channels),
            "parameters": variant.parameters,
            "paper_accuracy": variant.paper_accuracy,
            "epochs": variant.recipes["paper"].epochs,
            "lr": variant.recipes["paper"].lr,
            "lr_decay_epoch": variant.recipes["paper"].lr_decay_epoch,
            "lr_decay_factor": variant.recipes["paper"].lr_decay_factor,
            "weight_decay": variant.recipes["paper"].weight_decay,
            "batch_size": variant.recipes["paper"].batch_size,
            "augmentation": (variant.recipes["paper"].crop_padding, variant.recipes["paper"].flip) == (4, True),
        }
        assert ours == {key: row[key] for key in ours}


def test_learning_rates():
    paper, zoo = (VARIANTS["pcdeq1_mc_relu6_cifar"].recipes[tag] for tag in ("paper", "zoo"))
    assert [paper.learning_rate(passes) for passes in (0, 39.99, 40, 49)] == pytest.approx([7e-4, 7e-4, 7e-5, 7e-5])
    rise, end = zoo.warmup * zoo.epochs, zoo.epochs
    wanted = [zoo.lr / 25, zoo.lr, zoo.lr / 2, 0]
    assert [zoo.learning_rate(p) for p in (0, rise, (rise + end) / 2, end)] == pytest.approx(wanted)
    assert zoo.learning_rate(rise / 2) == pytest.approx(zoo.lr * 0.52)


def test_a_recipe_of_other_length():
    """Its decay moves along, and is never before the first epoch."""
    paper, zoo = (VARIANTS["pcdeq1_mc_relu6_cifar"].recipes[tag] for tag in ("paper", "zoo"))
    assert [paper.of_epochs(n).lr_decay_epoch for n in (100, 10, 1)] == [80, 8, 1]
    assert zoo.of_epochs(3).lr_decay_epoch is None
    assert paper.of_epochs(50) == paper


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be above 0 and below 10000, got 0"),
        ({"lr": float("nan")}, "lr must be above 0, got nan"),
        ({"tol": float("inf")}, "tol must be above 0, got inf"),
        ({"warmup": 1.0}, "warmup must be above 0 and below 1, got 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing must be at least 0 and below 1, got -0.1"),
    ],
)
def test_settings_outside_their_limits(settings: dict, message: str):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Recipe(**{"epochs": 1, "lr": 1e-3, "weight_decay": 0.0, **settings})


def test_eps_rises_to_its_end_and_stays():
    recipe = Recipe(8, 1e-3, 0.0, eps=0.1, eps_ramp=0.5)
    assert [round(recipe.eps_after(passes), 6) for passes in (0, 1, 2, 4, 7.9)] == [0, 0.025, 0.05, 0.1, 0.1]
    assert Recipe(8, 1e-3, 0.0, eps=0.1, eps_ramp=0).eps_after(0) == 0.1
    assert {tag: recipe.eps for tag, recipe in VARIANTS["pcdeq1_mc_tanh_mnist"].recipes.items()} == {
        "paper": 0,
        "zoo": 0,
        "robust_0.1": 0.1,
        "robust_0.3": 0.3,
    }
    with pytest.raises(ValueError, match=r"eps_weight must be above 0 and at most 1, got 1\.5"):
        Recipe(8, 1e-3, 0.0, eps_weight=1.5)
