"""Model cards for the Hugging Face Hub, written from the results rows, the training logs and the variants."""

from __future__ import annotations

from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from pcdeq_zoo import __version__
from pcdeq_zoo.activations import ACTIVATIONS
from pcdeq_zoo.files import read_jsonl
from pcdeq_zoo.solver import Solver
from pcdeq_zoo.variants import Recipe
from pcdeq_zoo.weights import Checkpoint

__all__ = ["model_card"]

_STRUCTURES = {
    "l": "one dense pcDEQ layer of {} units",
    "sc": "one convolutional pcDEQ layer of {} channels",
    "mc": "three convolutional pcDEQ layers of {} channels, strided convolutions between",
}

_INPUTS = {
    "mnist": "28×28 grey digits, white on black, scaled to [0, 1]",
    "svhn": "32×32 colour images of house numbers, normalised per channel",
    "cifar": "32×32 colour photographs of the ten classes of CIFAR-10, normalised per channel",
}

_REMARKS = {"cifar": " The copy of CIFAR-10 that was used has 155 training and 34 test images\nthat went through JPEG."}

_CRITERIA: dict[str | None, str] = {
    "residual": "a relative change",
    "estimated": "an estimated relative error",
    "certified": "a proven relative error",
}

_CITATION = """@inproceedings{gabor2024pcdeq,
  title     = {Positive Concave Deep Equilibrium Models},
  author    = {Gabor, Mateusz and Piotrowski, Tomasz and Cavalcante, Renato L. G.},
  booktitle = {Proceedings of the 41st International Conference on Machine Learning},
  volume    = {235},
  pages     = {14365--14381},
  year      = {2024},
  url       = {https://proceedings.mlr.press/v235/gabor24a.html}
}"""

_BODY = """
# {checkpoint}

{paper_name} for {data}: an image classifier whose features are equilibria z★ = σ(W z★ + x) with W ≥ 0, of
[Gabor, Piotrowski, Cavalcante, ICML 2024](https://arxiv.org/abs/2402.04029). Trained by the developers of pcdeq_zoo,
not by the paper's authors, whose code is [mateuszgabor/pcdeq](https://github.com/mateuszgabor/pcdeq).

## Results

| {data}, {n} test images | This checkpoint | Paper (mean of five runs) |
|---|--:|--:|
| Top-1, % | {top1:.2f} | {paper_top1} |
| Top-5, % | {top5:.2f} | – |
| Cross-entropy, nats | {nll} | – |
| Expected calibration error, % | {ece} | – |

One run, seed {seed}, last epoch; nothing was chosen on the test set. `results.csv` has all that was measured,
`log.jsonl` a line per epoch.{remark}
{robustness}
## Model details

- **Architecture:** {structure}, activation {activation} (pcDEQ-{kind}), BatchNorm before and after
- **Parameters:** {parameters:,} ({bytes:,} bytes, float32)
- **Input:** {inputs}
- **Classes:** {classes}
- **Licence of the weights:** Apache-2.0

## Usage

```python
import timm, torch
import pcdeq_zoo  # registers the models; `pip install .` in a checkout of pcdeq_zoo installs it

model = timm.create_model("hf-hub:{repository}", pretrained=True).eval()
model = timm.create_model("{checkpoint}", pretrained=True).eval()  # the same file, from the package, offline
model = timm.create_model("{checkpoint}", pretrained=True, num_classes=3)  # a new classifier, to fine-tune
```

With torch.hub, without installing it (torch, torchvision and timm have to be there):
`torch.hub.load("OWNER/pcdeq-zoo", "{name}", pretrained=True)`, or from a checkout
`torch.hub.load("path/to/pcdeq_zoo", "{name}", source="local", pretrained=True)`.

The layers alone, with what is known of each solve:

```python
layer = model.features.deq1
solution = layer.solve(torch.randn(8, {features}))  # value, status, evaluations, residual, bound
```

## Solver, and what is guaranteed

The equilibrium of every sample exists, is unique, and does not depend on its batch mates (beyond float rounding). By
default it is solved to an estimated relative error of {default_tol:g}. With `stop="certified"` (`tol={tol:g}`, at most
{max_evals} evaluations) every unit is proven to be within {tol:.1%} of it, relative, in float32; a solve that does not
get there warns or raises. So on the test set the largest proven error was {bound_max};
an image took {evals} evaluations of W on average in the pcDEQ layer{plural}, and {evals_max} at most.

## Training

| | |
|---|---|
| Data | {train_size} training images of {data} ({terms}){augmentation} |
| Recipe | {recipe}: AdamW, cross-entropy{smoothing}{worst}, float32, batch size {batch_size} |
| Learning rate | {schedule} |
| Weight decay | {decay:g} |
| Solves in training | per sample, to {criterion}, forward and backward; {unconverged} |
| Evaluations in the last epoch | {log_evaluations} |
| Last training loss, accuracy | {train_loss}, {train_top1} % |
| Seed, code | {seed}, commit {commit} |
| Hardware, time | {hardware}, {hours} hours |

## Limits

For research on implicit models and tests of solvers. It knows {inputs}, and gives a confident and meaningless answer to
anything else. {not_measured} was not measured.

## Citation

```bibtex
{citation}
```
"""


_ROBUSTNESS = """
### Robustness

Share of the {n} test images, in percent, that keep their right label when each pixel changes by up to {eps} on the
scale of [0, 1]:

| | pixels stay in [0, 1] | pixels may leave it |
|---|--:|--:|
| not found otherwise by an attack (PGD, 5 × 50 steps) | {pgd} | – |
| proven by linear bounds | {certified_linear} | {unclipped_linear} |
| proven by intervals | {certified_interval} | {unclipped_interval} |

What is proven holds of the net in exact arithmetic; `pcdeq_zoo.certify` repeats it.
"""


def _evaluation(checkpoint: Checkpoint, repository: str, tag: str) -> list[EvalResult]:
    dataset, row = checkpoint.variant.dataset, checkpoint.row
    shared: dict[str, Any] = {
        "task_type": "image-classification",
        "task_name": "Image Classification",
        "dataset_type": dataset.hub_id,
        "dataset_name": dataset.title,
        "dataset_config": dataset.hub_config,
        "dataset_split": "test",
        "source_name": f"pcdeq_zoo {__version__}, results.csv",
        "source_url": f"https://huggingface.co/{repository}/blob/{tag}/results.csv",
    }
    trained = f", trained on {_training_images(checkpoint)} images" if checkpoint.recipe.images else ""
    accuracy = f"Top-1 (float32, certified solves, n={row['n']}{trained})"
    return [
        EvalResult(
            metric_type="accuracy", metric_value=round(checkpoint.top1 / 100, 6), metric_name=accuracy, **shared
        ),
        EvalResult(metric_type="loss", metric_value=float(row["nll"]), metric_name="Cross-entropy, nats", **shared),
    ]


def _schedule(recipe: Recipe, epochs: int) -> str:
    average = f"; moving average of the weights, {recipe.ema_decay:g} per step" if recipe.ema_decay else ""
    if recipe.lr_decay_epoch is not None:
        return (
            f"{recipe.lr:g}, times {recipe.lr_decay_factor:g} after epoch {recipe.lr_decay_epoch} of {epochs}{average}"
        )
    return f"one cycle of {epochs} epochs with its peak of {recipe.lr:g} at {recipe.warmup:.0%}{average}"


def _augmentation(recipe: Recipe) -> str:
    crops = f"random crops of the image padded by {recipe.crop_padding}" if recipe.crop_padding else ""
    flips = "horizontal flips" if recipe.flip else ""
    return ", " + (" and ".join(filter(None, (crops, flips))) or "no augmentation")


def _training_images(checkpoint: Checkpoint) -> str:
    images, whole = checkpoint.recipe.images, f"{checkpoint.variant.dataset.sizes['train']:,}"
    return f"only the first {images:,} of the {whole}" if images else whole


def _robustness(checkpoint: Checkpoint) -> str:
    if not checkpoint.row["eps"]:
        return ""
    values = {**checkpoint.row, "n": f"{int(checkpoint.row['n']):,}", "eps": f"{float(checkpoint.row['eps']):.4g}"}
    return _ROBUSTNESS.format(**values)


def model_card(checkpoint: Checkpoint, repository: str, tag: str) -> ModelCard:
    """Card of a checkpoint that ships, for a Hub repository and its tag; the same text for the same package."""
    variant, row, log = checkpoint.variant, checkpoint.row, read_jsonl(checkpoint.log)
    dataset, recipe, defaults = variant.dataset, checkpoint.recipe, Solver()
    unconverged = sum(line["unconverged"] for line in log)
    metadata = ModelCardData(
        license="apache-2.0",
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "pcdeq", "deep-equilibrium-models"],
        datasets=[dataset.hub_id],
        metrics=["accuracy"],
        model_name=checkpoint.name,
        eval_results=_evaluation(checkpoint, repository, tag),
    )
    body = _BODY.format(
        checkpoint=checkpoint.name,
        name=variant.name,
        repository=f"{repository}@{tag}",
        paper_name=variant.paper_name,
        data=dataset.title,
        n=f"{int(row['n']):,}",
        top1=checkpoint.top1,
        top5=float(row["top5"]),
        nll=row["nll"],
        ece=row["ece"],
        paper_top1=row["paper_top1"],
        seed=checkpoint.seed,
        remark=_REMARKS.get(dataset.name, "")
        + (f"\n\n**Trained on {_training_images(checkpoint)} training images.**" if recipe.images else ""),
        structure=_STRUCTURES[variant.structure].format(", ".join(map(str, variant.channels))),
        activation=variant.activation,
        kind=ACTIVATIONS[variant.activation].pcdeq,
        parameters=variant.parameters,
        bytes=int(row["bytes"]),
        inputs=_INPUTS[dataset.name],
        classes=", ".join(dataset.classes),
        features=", ".join(
            map(str, variant.channels[:1] + (() if variant.structure == "l" else dataset.input_size[1:]))
        ),
        default_tol=defaults.tol,
        max_evals=defaults.max_evals,
        tol=float(row["tol"]),
        bound_max=row["bound_max"],
        evals=row["evals_layers"].replace("/", ", "),
        evals_max=row["evals_max"],
        plural="s, in their order" if variant.structure == "mc" else "",
        train_size=_training_images(checkpoint),
        terms=dataset.terms,
        augmentation=_augmentation(recipe),
        recipe="the paper's (Tables 5–7)" if checkpoint.tag == "paper" else "the zoo's own",
        smoothing=f" with label smoothing {recipe.label_smoothing:g}" if recipe.label_smoothing else "",
        schedule=_schedule(recipe, int(row["epochs"])),
        criterion=f"{_CRITERIA[recipe.stop]} of {recipe.tol:g}",
        decay=recipe.weight_decay,
        batch_size=recipe.batch_size,
        unconverged=f"{unconverged:,} did not get there" if unconverged else "all got there",
        log_evaluations=", ".join(f"{key.removeprefix('features.')} {n}" for key, n in log[-1]["evaluations"].items()),
        train_loss=log[-1]["train_loss"],
        train_top1=log[-1]["train_top1"],
        commit=row["commit"],
        hardware=row["hardware"],
        hours=row["hours"],
        worst=f", and of the worst logits within ±{recipe.eps:.4g} of each pixel by intervals" if recipe.eps else "",
        robustness=_robustness(checkpoint),
        not_measured=f"Robustness to {'' if recipe.eps else 'perturbations and '}shifts of the data",
        citation=_CITATION,
    )
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n{body}", ignore_metadata_errors=False)
