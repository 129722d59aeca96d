"""Classify pictures of digits, whatever their size, mode and polarity: python examples/predict.py [PICTURE ...]"""

import argparse

import timm
import torch
from PIL import Image

from pcdeq_zoo import DATASETS, DataError
from pcdeq_zoo.data import as_digit, load, normalize

MNIST = DATASETS["mnist"]

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="default: a digit that ships")
pictures = parser.parse_args().pictures
model = timm.create_model("pcdeq1_mc_softsign_mnist", pretrained=True).eval()
names = model.pretrained_cfg["label_names"]
for path in pictures or [None]:
    try:
        picture = Image.open(path) if path else Image.fromarray(load(MNIST, "test", "sample")[0][0, 0].numpy())
        pixels, told = as_digit(picture)
    except (OSError, DataError, Image.DecompressionBombError) as error:
        raise SystemExit(f"{path or 'the sample'}: {error}") from error
    print(f"{told}; what the net saw:")
    for row in pixels[0, 4:24:2].tolist():
        print("".join(" ░▒▓█"[value // 52] for value in row))
    with torch.no_grad():
        best = model(normalize(pixels[None], MNIST)).softmax(1)[0].topk(3)
    print(", ".join(f"{names[i]} {100 * p:.1f} %" for p, i in zip(best.values, best.indices, strict=True)))
