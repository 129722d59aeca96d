"""Certify a digit against changes of its pixels, and draw the bounds of its logits.

python examples/certified_robustness.py
"""

import timm
import torch

from pcdeq_zoo import VARIANTS, certify, interval_bounds, pgd
from pcdeq_zoo.data import load, normalize

NAME = "pcdeq1_l_tanh_mnist"

model = timm.create_model(f"{NAME}.robust_0.1", pretrained=True).eval()
dataset = VARIANTS[NAME].dataset
images, labels = load(dataset, "test", "sample")
x, y = normalize(images[:1], dataset), labels[:1]

for eps in (0.05, 0.1, 0.2):
    found = certify(model, x, y, eps)
    verdict = f"proven, by a margin of {found.margin.item():.2f}" if found.certified else "not proven"
    with torch.no_grad():
        attacked = model(pgd(model, x, y, eps)).argmax().item()
    result = "does not change that" if attacked == y.item() else f"makes a {attacked} of it"
    print(f"a {y.item()} within ±{eps} of each pixel stays one: {verdict}; an attack {result}")

print("\nlogits for all images within ±0.05, and for this one:")
with torch.no_grad():
    logits, box = model(x)[0], interval_bounds(model, x, 0.05)
low, high = box.lower.min().item(), box.upper.max().item()
for digit, (lower, logit, upper) in enumerate(zip(box.lower[0], logits, box.upper[0], strict=True)):
    left, middle, right = (round(60 * (value.item() - low) / (high - low)) for value in (lower, logit, upper))
    bar = "".join("●" if i == middle else "─" if left <= i <= right else " " for i in range(61))
    print(f"{digit} {bar} {lower:6.2f} {logit:6.2f} {upper:6.2f}")
