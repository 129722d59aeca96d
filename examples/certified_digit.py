"""Classify a digit, and see what is proven of the computation.

python examples/certified_digit.py
"""

import timm
import torch

from pcdeq_zoo import VARIANTS, enclosure
from pcdeq_zoo.certificate import rounded_up
from pcdeq_zoo.data import load, normalize

NAME = "pcdeq1_mc_relu6_mnist"

model = timm.create_model(NAME, pretrained=True, stop="certified", on_failure="raise").eval()
dataset = VARIANTS[NAME].dataset
images, labels = load(dataset, "test", "sample")
x = normalize(images[:1], dataset)
with torch.no_grad():
    probabilities = model(x).softmax(1)[0]
print(f"a {labels[0]}, taken for a {probabilities.argmax()} with {100 * probabilities.max():.1f} %")

# Layer by layer: the solve, in float32, and bounds in float64 that hold whatever was rounded on the way.
for name, layer in model.features.named_children():
    if name.startswith("deq"):
        with torch.no_grad():
            solution = layer.solve(x)
            lower, upper = enclosure(layer, x, tol=1e-9)
        error = ((solution.value.double() - lower).abs() / lower.clamp(min=1e-30)).max().item()
        bound = rounded_up(solution.bound.item(), 2)
        print(
            f"{name}: {solution.evaluations.item()} evaluations, every unit proven within {bound:.1e} "
            f"of its equilibrium; in fact within {error:.1e}"
        )
    with torch.no_grad():
        x = layer(x)
