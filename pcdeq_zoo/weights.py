"""The checkpoints in this package: what was measured of them, and the check that a file is the one it was measured on.

`checkpoints/results.csv` holds one row per checkpoint, with its test accuracy, how it was trained, and the size and
sha256 of its safetensors file. The pretrained configs, the model tables and the check below all read it.
"""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg, load_state_dict

__all__ = ["CHECKPOINTS", "RESULT_COLUMNS", "WeightsError", "check_source", "results", "sha256"]

CHECKPOINTS = Path(__file__).parent / "checkpoints"

# Accuracies in percent; the first nine as in timm's result files.
RESULT_COLUMNS = (
    "model",
    "top1",
    "top1_err",
    "top5",
    "top5_err",
    "param_count",  # millions
    "img_size",
    "crop_pct",
    "interpolation",
    "paper_top1",
    "nll",  # mean cross-entropy, nats
    "n",  # test images
    "epochs",
    "seed",
    "tol",
    "evals_mean",  # evaluations of W per image and pcDEQ layer
    "evals_max",
    "bound_max",  # largest proven relative error of a unit
    "commit",  # of the training code
    "bytes",
    "sha256",
)


class WeightsError(RuntimeError):
    """Weights that are missing, damaged, or of another model; the message names the file and says what to do."""


def results() -> dict[str, dict[str, str]]:
    """The rows of `checkpoints/results.csv` by "model.tag", in the file's order; a model's first is its default."""
    with (CHECKPOINTS / "results.csv").open(newline="", encoding="utf-8") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def check_source(cfg: PretrainedCfg) -> None:
    """Refuse a pretrained config whose weights cannot be loaded, before timm tries.

    A file of this package must have the size and sha256 of its results row. Any other file must be readable and, where
    its safetensors metadata name an architecture, hold that of `cfg`. Hub ids, URLs and state dicts are left to timm.

    Raises:
        WeightsError: No weights, no such file, or not the file that it should be.
    """
    name = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else str(cfg.architecture)
    if cfg.source in ("hf-hub", "local-dir") or cfg.state_dict:
        return
    if not cfg.file:
        if not (cfg.hf_hub_id or cfg.url):
            trained = ", ".join(results()) or "none yet"
            raise WeightsError(
                f"no weights of {name} are published yet; use pretrained=False, or give a file of your own with "
                f"pretrained_cfg_overlay=dict(file=...). With weights: {trained}"
            )
        return

    path = Path(cfg.file)
    found = f"{path.stat().st_size} bytes with sha256 {sha256(path)}" if path.is_file() else "no file"
    if path.parent == CHECKPOINTS and (row := results().get(path.stem)):
        wanted = f"{row['bytes']} bytes with sha256 {row['sha256']}"
        if found != wanted:
            raise WeightsError(f"weights of {name}: {path}: got {found}, wanted {wanted}; install pcdeq_zoo again")
    if not path.is_file():
        raise WeightsError(f"weights of {name}: there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                architecture = (file.metadata() or {}).get("architecture", cfg.architecture)
        else:
            load_state_dict(str(path))
            architecture = cfg.architecture
    except (SafetensorError, RuntimeError, ValueError, EOFError, OSError, KeyError, AttributeError) as error:
        raise WeightsError(f"weights of {name}: {path} is not a readable checkpoint: got {found}: {error}") from error
    if architecture != cfg.architecture:
        raise WeightsError(f"weights of {name}: {path} holds weights of {architecture}")
