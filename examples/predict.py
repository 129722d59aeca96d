"""Classify pictures of digits, whatever their size, mode and polarity.

python examples/predict.py [PICTURE ...]
"""

import sys

import timm
import torch
from PIL import Image

from pcdeq_zoo import DATASETS, DataError
from pcdeq_zoo.data import as_digit, load, normalize

MNIST = DATASETS["mnist"]

model = timm.create_model("pcdeq1_mc_softsign_mnist", pretrained=True).eval()
names = model.pretrained_cfg["label_names"]
sample = Image.fromarray(load(MNIST, "test", "sample")[0][0, 0].numpy())
for picture in [Image.open(path) for path in sys.argv[1:]] or [sample]:
    try:
        pixels, told = as_digit(picture)
    except DataError as error:
        raise SystemExit(str(error)) from error
    print(f"{told}; what the net saw:")
    for row in pixels[0, 4:24:2].tolist():
        print("".join(" ░▒▓█"[value // 52] for value in row))
    with torch.no_grad():
        best = model(normalize(pixels[None], MNIST)).softmax(1)[0].topk(3)
    print(", ".join(f"{names[i]} {100 * p:.1f} %" for p, i in zip(best.values, best.indices, strict=True)))
