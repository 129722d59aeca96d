"""How fast solvers come near an equilibrium: the worst error of a unit against the evaluations of W, with a plot.

python examples/compare_solvers.py [FILE.png]
"""

import sys

import matplotlib
import timm
import torch
import torch.nn.functional as F

from pcdeq_zoo import DATASETS, Solver, enclosure
from pcdeq_zoo.data import normalize

matplotlib.use("agg")
from matplotlib import pyplot as plt

file = sys.argv[1] if len(sys.argv) > 1 else "solvers.png"
model = timm.create_model("pcdeq1_mc_relu6_cifar", pretrained=True).eval()
layer = model.features.deq3
noise = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    u = model.features[: list(dict(model.features.named_children())).index("deq3")](
        normalize(255 * noise, DATASETS["cifar"])
    )
    lower, upper = enclosure(layer, u, tol=1e-9)  # in float64, proven
truth = (lower + upper) / 2


def error(z: torch.Tensor) -> float:
    return ((z.double() - truth).abs() / truth).max().item()


with torch.no_grad():
    x = F.softplus(u, beta=5)  # the input map of pcDEQ-1
    z, plain = torch.zeros_like(x), []
    for _ in range(40):
        z = layer.sigma(F.conv2d(z, layer.weight, padding=1) + x)
        plain.append(error(z))
    solved = {"estimated": [], "certified": []}
    for stop, points in solved.items():
        for tol in (1e-1, 1e-2, 1e-3, 1e-4):
            layer.solver = Solver(tol, stop=stop)
            found = layer.solve(u)
            points.append((found.evaluations.double().mean().item(), error(found.value)))

figure, axis = plt.subplots(figsize=(5.5, 4), layout="constrained")
axis.semilogy(range(1, 41), plain, label="plain iteration from zero, as in the paper")
for stop, points in solved.items():
    axis.semilogy(*zip(*points, strict=True), "o-", label=f'this package, stop="{stop}"')
axis.set(xlabel="Evaluations of W", ylabel="Worst relative error of a unit", title="pcdeq1_mc_relu6_cifar, third layer")
axis.legend(frameon=False)
figure.savefig(file)
count = next((i for i, e in enumerate(plain, start=1) if e < 1e-3), len(plain))
ours = next(n for n, e in solved["estimated"] if e < 1e-3)
print(f"to 1e-3: plain iteration {count} evaluations, this package {ours:.1f} on average; drew {file}")
