"""Which pixels speak for a digit: the gradient of its logit, through the equilibria, by the implicit function theorem.

python examples/saliency.py [FILE.png]
"""

import sys

import matplotlib
import timm
import torch

from pcdeq_zoo import DATASETS
from pcdeq_zoo.data import load, normalize

matplotlib.use("agg")
from matplotlib import pyplot as plt

file = sys.argv[1] if len(sys.argv) > 1 else "saliency.png"
model = timm.create_model("pcdeq1_mc_relu6_mnist", pretrained=True, tol=1e-6).double().eval()
images, labels = load(DATASETS["mnist"], "test", "sample")
x = normalize(images[:6], DATASETS["mnist"]).double().requires_grad_()
logits = model(x)
(gradient,) = torch.autograd.grad(logits.gather(1, labels[:6, None]).sum(), x)

# Against a difference of two forward passes, along the gradient of the first image.
with torch.no_grad():
    step = 1e-4 * gradient[:1] / gradient[:1].norm()
    difference = (model(x[:1] + step) - model(x[:1] - step))[0, labels[0]] / 2e-4
print(f"slope of the logit along its gradient: {gradient[0].norm():.3f}, by differences {difference:.3f}")

figure, axes = plt.subplots(2, 6, figsize=(9, 3.2), layout="constrained")
for column, image, part in zip(axes.T, x.detach()[:, 0], gradient[:, 0], strict=True):
    largest = part.abs().max().item()
    column[0].imshow(image.numpy(), cmap="gray")
    column[1].imshow(part.numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest)
    for axis in column:
        axis.axis("off")
figure.savefig(file)
print(f"drew {file}: red pixels speak for the digit, blue ones against it")
