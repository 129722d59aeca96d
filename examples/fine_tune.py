"""Fine-tune a net of the zoo on your own images, of another size and with other classes.

python examples/fine_tune.py [FOLDER]

FOLDER has a folder of images for each class. Without one, circles, squares and triangles are drawn.
"""

import random
import sys
import tempfile
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from timm.data import create_transform, resolve_input_data_config
from torch.utils.data import DataLoader, random_split
from torchvision.datasets import ImageFolder

import pcdeq_zoo  # noqa: F401  (registers the models)


def draw_shapes(folder: Path, images: int = 120, size: int = 28) -> None:
    for shape, sides in {"circle": 40, "square": 4, "triangle": 3}.items():
        (folder / shape).mkdir()
        for i in range(images):
            color, ground = ([random.randrange(low, low + 100) for _ in range(3)] for low in (150, 0))
            picture = Image.new("RGB", (size, size), tuple(ground))
            where = (*random.choices(range(10, size - 10), k=2), random.randrange(7, 11))
            ImageDraw.Draw(picture).regular_polygon(where, sides, random.randrange(360), tuple(color))
            picture.save(folder / shape / f"{i}.png")


torch.manual_seed(0)
random.seed(0)
with tempfile.TemporaryDirectory() as drawn:
    if (folder := sys.argv[1] if len(sys.argv) > 1 else drawn) == drawn:
        draw_shapes(Path(drawn))
    classes = ImageFolder(folder).classes
    # Another classifier, and a pool over the whole image: that of the paper is for 32 x 32. Take sizes up to 64.
    own = {"num_classes": len(classes), "img_size": 28, "global_pool": "avg"}
    model = timm.create_model("pcdeq1_mc_relu6_cifar", pretrained=True, **own)
    transform = create_transform(**resolve_input_data_config(model=model))  # the size of this model, its mean and std
    training, held_out = random_split(ImageFolder(folder, transform), [0.8, 0.2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    for epoch in range(1, 7):
        model.train()
        for images, labels in DataLoader(training, batch_size=32, shuffle=True, drop_last=len(training) > 32):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}")
    images, labels = next(iter(DataLoader(held_out, batch_size=len(held_out))))
with torch.no_grad():
    right = (model.eval()(images).argmax(1) == labels).sum().item()
print(f"{right} of {len(labels)} held-out images right; classes: {', '.join(classes)}")
