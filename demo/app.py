"""A page that shows what a pcDEQ net does with a digit or a photograph, and what is proven of it.

    make page                  or: pip install -e '.[demo]' && python demo/app.py

Works without a network, on the checkpoints in the package and the samples beside this file.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import numpy as np
import timm
import torch
from equilibrium import approach, draw_approach, pcdeq_layers
from PIL import Image
from torch import Tensor

from pcdeq_zoo import DataError, Dataset, PcDEQ, certify, record_solves
from pcdeq_zoo.certificate import rounded_up
from pcdeq_zoo.data import as_digit, load, normalize
from pcdeq_zoo.weights import checkpoints

SAMPLES = Path(__file__).parent / "samples"
LARGEST_EPS = 0.5
HALVINGS = 9

# The default checkpoint of each model, and those that were trained against changes of the pixels.
SHIPPED = {
    checkpoint.variant.name if checkpoint.tag == checkpoint.variant.default_recipe else name: checkpoint
    for name, checkpoint in checkpoints().items()
    if checkpoint.tag == checkpoint.variant.default_recipe or checkpoint.recipe.eps
}
FIRST = "pcdeq1_mc_softsign_mnist"

# The sketchpad starts without a tool in hand, and asks for one to be taken.
TAKE_BRUSH = """
() => {
  const waiting = setInterval(() => {
    const brush = document.querySelector('#drawing button[aria-label="Brush"]');
    if (brush) { clearInterval(waiting); brush.click(); }
  }, 100);
}
"""

INTRODUCTION = """
# Positive concave deep equilibrium models

A pcDEQ layer outputs the only fixed point z ≥ 0 of z ↦ σ(W z + x), W ≥ 0 and x > 0. Draw a digit or take a sample, and
see the equilibrium being reached, the error that is proven on the way, and how far pixels may move before the proof of
the label ends. [The paper](https://arxiv.org/abs/2402.04029)
"""


@functools.cache
def net(name: str) -> PcDEQ:
    """A model with its default checkpoint, solved with proofs."""
    return timm.create_model(name, pretrained=True, stop="certified").eval()


@functools.cache
def samples(name: str) -> list[tuple[Image.Image, str]]:
    """Sample images of the data set of a model, and their labels."""
    dataset = SHIPPED[name].variant.dataset
    if dataset.name == "mnist":
        images, labels = load(dataset, "test", "sample")
        first = [int((labels == digit).nonzero()[0]) for digit in range(10)]
        return [(Image.fromarray(images[i, 0].numpy()), dataset.classes[labels[i]]) for i in first]
    return [(Image.open(file), file.stem.split("-")[1]) for file in sorted((SAMPLES / dataset.name).glob("*.png"))]


def pixels_of(picture: Image.Image, dataset: Dataset) -> tuple[Tensor, str]:
    """What a net for a data set sees of a picture, (C, H, W), uint8, and a remark on it.

    Raises:
        DataError: There is nothing in the picture.
    """
    if dataset.name == "mnist":
        return as_digit(picture)
    _, height, width = dataset.input_size
    opaque = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    resized = opaque.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1), f"{picture.width}x{picture.height} {picture.mode}"


def largest_eps(model: PcDEQ, x: Tensor, label: int) -> float:
    """By how much all pixels may change, of [0, 1], with the label proven to stay; found by halving, from below."""
    low, high, labels = 0.0, LARGEST_EPS, torch.tensor([label])
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if certify(model, x, labels, middle, progress=False).certified.item():
            low = middle
        else:
            high = middle
    return low


def classify(name: str, picture: Image.Image) -> tuple[dict[str, float], Image.Image, Any, str]:
    """Probabilities, what the net saw, a figure of its first equilibrium, and what is proven, in words."""
    model, dataset = net(name), SHIPPED[name].variant.dataset
    try:
        pixels, remark = pixels_of(picture, dataset)
    except DataError as error:
        raise gr.Error(str(error)) from error
    x = normalize(pixels[None], dataset)
    with torch.no_grad(), record_solves(model) as solves:
        probabilities = model(x).softmax(1)[0]
    label = int(probabilities.argmax())
    told = [f"A **{dataset.classes[label]}**, from a picture of {remark}.", ""]
    told += ["| Layer | Evaluations of W | Proven relative error of every unit |", "|---|--:|--:|"]
    for s in solves:
        bound = rounded_up(s.bound.item(), 2)
        told += [f"| {s.layer.removeprefix('features.')} | {s.evaluations.item()} | {bound:.1e} |"]
    eps = largest_eps(model, x, label)
    if eps:
        shown = math.floor(1e4 * eps) / 1e4
        told += ["", f"Every pixel may change by ±{shown:.4f} of [0, 1], and the label is proven to stay."]
    else:
        least = LARGEST_EPS / 2**HALVINGS
        told += ["", f"For changes of ±{least:.4f} of [0, 1] or more nothing is proven of the label."]
        told += ["The linear nets, and those trained for it, `robust_…`, have such proofs."]
    layer_name, layer, u = next(pcdeq_layers(model, x))
    figure = draw_approach(approach(layer, u), f"{name}, {layer_name}")
    seen = pixels.permute(1, 2, 0).squeeze(-1).numpy()
    large = Image.fromarray(seen).resize((224, 224), Image.Resampling.NEAREST)
    return dict(zip(dataset.classes, probabilities.tolist(), strict=True)), large, figure, "\n".join(told)


def make_page() -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="pcDEQ", analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(min_width=300):
                name = gr.Dropdown(list(SHIPPED), value=FIRST, label="Model", elem_id="model")
                drawing = gr.Sketchpad(
                    label="A digit",
                    type="pil",
                    canvas_size=(280, 280),
                    brush=gr.Brush(default_size=18, colors=["#000000"], default_color="#000000"),
                    layers=False,
                    transforms=[],
                    elem_id="drawing",
                )
                button = gr.Button("Classify the drawing", variant="primary", elem_id="classify")
                gallery = gr.Gallery(samples(FIRST), label="Or take a sample", columns=5, height=270, elem_id="samples")
            with gr.Column(min_width=300):
                label = gr.Label(num_top_classes=5, label="Prediction", elem_id="prediction")
                told = gr.Markdown(elem_id="told")
                seen = gr.Image(label="What the net saw", height=240, elem_id="seen", interactive=False)
        figure = gr.Plot(label="The equilibrium of its first layer", elem_id="figure")
        outputs = [label, seen, figure, told]

        def of_drawing(name: str, drawn: dict[str, Any] | None) -> Any:
            if not drawn or drawn["composite"] is None:
                raise gr.Error("draw a digit first")
            return classify(name, drawn["composite"])

        def of_sample(name: str, chosen: gr.SelectData) -> Any:
            return classify(name, samples(name)[chosen.index][0])

        page.load(None, js=TAKE_BRUSH)
        button.click(of_drawing, [name, drawing], outputs)
        gallery.select(of_sample, [name], outputs)
        name.change(lambda name: gr.Gallery(samples(name), selected_index=None), [name], [gallery])
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args()
    # System fonts, as those of the default theme come from the network.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    make_page().launch(server_port=args.port, theme=theme)


if __name__ == "__main__":
    main()
