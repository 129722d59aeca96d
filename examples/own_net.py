"""pcDEQ layers in a net of your own, trained by a plain PyTorch loop on the 1,600 digits that ship with the package.

python examples/own_net.py
"""

import torch
import torch.nn.functional as F
from torch import nn

from pcdeq_zoo import DATASETS, PcDEQConv2d, PcDEQLinear, Solver, record_solves
from pcdeq_zoo.certificate import rounded_up
from pcdeq_zoo.data import load, normalize

MNIST = DATASETS["mnist"]

torch.manual_seed(0)
solver = Solver(stop="estimated", tol=1e-3)  # shared by both layers; training needs no certificate
net = nn.Sequential(
    nn.Conv2d(1, 16, 5, stride=2, padding=2),
    nn.BatchNorm2d(16),
    PcDEQConv2d(16, "tanh", solver=solver),
    nn.AvgPool2d(2),
    nn.Flatten(),
    nn.Linear(16 * 7 * 7, 32),
    nn.BatchNorm1d(32),
    PcDEQLinear(32, "sigmoid", solver=solver),
    nn.Linear(32, 10),
)
optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)  # W stays nonnegative: the layers see to it after each step

images, labels = load(MNIST, "train", "sample")
x = normalize(images, MNIST)
for epoch in range(1, 6):
    net.train()
    for batch in torch.randperm(len(x)).split(64):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x[batch]), labels[batch])
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: loss {loss.item():.3f}")

# To be certain of what it computes: prove every equilibrium to 0.1 %, and raise where that fails.
solver.stop, solver.on_failure = "certified", "raise"
images, labels = load(MNIST, "test", "sample")
net.eval()
with torch.no_grad(), record_solves(net) as solves:
    accuracy = (net(normalize(images, MNIST)).argmax(1) == labels).float().mean().item()
print(f"accuracy {100 * accuracy:.1f} % on {len(labels)} test images")
for solve in solves:
    evaluations, bound = solve.evaluations.float().mean().item(), rounded_up(solve.bound.max().item(), 2)
    print(f"layer {solve.layer}: {evaluations:.1f} evaluations of W on average, proven error at most {bound:.1e}")
