"""Measure a model of the zoo on a test set.

accelerate launch recipes/evaluate.py --model pcdeq1_l_tanh_mnist
accelerate launch recipes/evaluate.py --model pcdeq1_l_tanh_mnist --checkpoint runs/mine/model.safetensors --data sample
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from pcdeq_zoo import VARIANTS, DataError, Dataset, WeightsError, record_solves
from pcdeq_zoo.data import load, normalize


@torch.inference_mode()
def evaluate(
    model: nn.Module, dataset: Dataset, images: Tensor, labels: Tensor, batch_size: int = 500, progress: bool = False
) -> dict[str, Any]:
    """Accuracy and the cost of the solves on uint8 images (N, C, H, W) with labels (N,).

    Returns:
        n, top1 and top5 in percent, nll (mean cross-entropy in nats), evals_mean and evals_max (evaluations of W per
        image and pcDEQ layer), evals_layers (the mean layer by layer, "5.9/8.1/12.4"), bound_max (largest proven
        relative error of a unit).
    """
    model.eval()
    device = next(model.parameters()).device
    top1 = top5 = nll = bound_max = 0.0
    evaluations: dict[str, int] = defaultdict(int)
    evaluations_max = 0
    for start in tqdm(range(0, len(images), batch_size), desc="evaluate", leave=False, disable=not progress):
        x = normalize(images[start : start + batch_size].to(device), dataset)
        y = labels[start : start + batch_size].to(device)
        with record_solves(model) as records:
            logits = model(x)
        hits = logits.topk(5).indices == y[:, None]
        top1 += hits[:, 0].sum().item()
        top5 += hits.sum().item()
        nll += F.cross_entropy(logits, y, reduction="sum").item()
        for record in records:
            evaluations[record.layer] += int(record.evaluations.sum())
            evaluations_max = max(evaluations_max, int(record.evaluations.max()))
            bound_max = max(bound_max, record.bound.max().item())
    n = len(images)
    return {
        "n": n,
        "top1": round(100 * top1 / n, 4),
        "top5": round(100 * top5 / n, 4),
        "nll": round(nll / n, 4),
        "evals_mean": round(sum(evaluations.values()) / len(evaluations) / n, 2),
        "evals_layers": "/".join(f"{total / n:.2f}" for total in evaluations.values()),
        "evals_max": evaluations_max,
        "bound_max": float(f"{bound_max:.2e}"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name in the zoo, with or without tag")
    parser.add_argument(
        "--checkpoint", type=Path, help="a safetensors file, or one of the authors' code; default: the zoo's"
    )
    parser.add_argument("--data", help="folder, 'sample' or 'hub' (default: below $PCDEQ_ZOO_DATA, else the Hub)")
    parser.add_argument("--batch-size", type=int, default=500)
    args = parser.parse_args()
    name = args.model.split(".")[0]
    if name not in VARIANTS:
        parser.error(f"unknown model {name}; the zoo has {', '.join(VARIANTS)}")

    overlay = {"file": str(args.checkpoint)} if args.checkpoint else None
    dataset = VARIANTS[name].dataset
    try:
        model = timm.create_model(args.model, pretrained=True, pretrained_cfg_overlay=overlay)
        images, labels = load(dataset, "test", args.data)
    except (WeightsError, DataError) as error:
        raise SystemExit(str(error)) from error
    accelerator = Accelerator()
    if accelerator.is_main_process:
        model.to(accelerator.device)
        print(json.dumps(evaluate(model, dataset, images, labels, args.batch_size, progress=True)))


if __name__ == "__main__":
    main()
