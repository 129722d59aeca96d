"""Classify pictures of digits, whatever their size, mode and polarity.

python examples/predict.py [PICTURE ...]
"""

import sys

import numpy as np
import timm
import torch
from PIL import Image

import pcdeq_zoo  # noqa: F401  (registers the models)
from pcdeq_zoo import DATASETS
from pcdeq_zoo.data import load


def gray(picture: Image.Image) -> np.ndarray:
    """Luminance (H, W) from 0 to 1, with what is transparent in the shade that the rest of it is not."""
    if picture.mode.startswith(("I", "F")):  # 16 bits, which PIL's own conversion clips
        values = np.asarray(picture, dtype=np.float64)
        return (values - values.min()) / max(np.ptp(values), 1)
    color = picture.convert("RGBA")
    light, alpha = np.asarray(color.convert("L")) / 255.0, np.asarray(color)[..., 3] / 255.0
    mean = (light * alpha).sum() / max(alpha.sum(), 1e-9)
    return light * alpha + (mean < 0.5) * (1 - alpha)


def like_mnist(picture: Image.Image) -> tuple[np.ndarray, str]:
    """Pixels (28, 28) as in MNIST: white on black, 20 high or wide, its center of mass in the middle; and what was."""
    light = gray(picture)
    border = np.concatenate([light[0], light[-1], light[:, 0], light[:, -1]])
    dark_on_light = float(np.median(border)) > 0.5
    ink = 1 - light if dark_on_light else light
    ink = np.clip((ink - np.median(ink)) / max(np.ptp(ink), 1e-9), 0, 1)
    rows, columns = (np.flatnonzero(ink.max(axis) > 0.3) for axis in (1, 0))
    if not len(rows):
        raise SystemExit("there is nothing in the picture; wanted one digit on a plain ground")
    digit = Image.fromarray(np.uint8(255 * ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]))
    scale = 20 / max(digit.size)
    digit = digit.resize([max(1, round(scale * length)) for length in digit.size], Image.Resampling.BOX)
    mass = np.asarray(digit, dtype=np.float64)
    middle = (mass.sum(axis) @ np.arange(mass.shape[1 - axis]) / mass.sum() for axis in (0, 1))
    canvas = Image.new("L", (28, 28))
    canvas.paste(digit, tuple(round(13.5 - place) for place in middle))
    ground = "dark on light, inverted" if dark_on_light else "light on dark"
    return np.asarray(canvas), f"{picture.width}x{picture.height} {picture.mode}, {ground}"


model = timm.create_model("pcdeq1_mc_softsign_mnist", pretrained=True).eval()
sample = Image.fromarray(load(DATASETS["mnist"], "test", "sample")[0][0, 0].numpy())
for picture in [Image.open(path) for path in sys.argv[1:]] or [sample]:
    pixels, done = like_mnist(picture)
    print(f"{done}; what the net saw:")
    for row in pixels[4:24:2]:
        print("".join(" ░▒▓█"[value // 52] for value in row))
    with torch.no_grad():
        probabilities = model(torch.tensor(pixels)[None, None] / 255).softmax(1)[0]
    best = probabilities.topk(3)
    print(", ".join(f"{label} {100 * p:.1f} %" for p, label in zip(best.values, best.indices, strict=True)))
