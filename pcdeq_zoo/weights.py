"""The checkpoints: what was measured of them, where they are, and the check that a file is the one it should be.

`checkpoints/results.csv` holds one row per checkpoint, with its test accuracy, how it was trained, and the size and
sha256 of its safetensors file. The pretrained configs, the model cards, the tables and the checks below all read it.

`pretrained=True` takes the file in this package. With `PCDEQ_ZOO_WEIGHTS=hub` in the environment it takes the same file
from the Hugging Face Hub; `hf-hub:NAMESPACE/NAME[@REVISION]` for a name takes any repository of this architecture.
Neither huggingface_hub nor timm compares what it downloads, or finds in its cache, with the sha256 that the Hub states:
a flipped bit loads without a word (huggingface_hub 2.4, timm 1.0.31). `local_file` does.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HFValidationError, HTTPError
from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg, load_state_dict

from pcdeq_zoo._version import __version__
from pcdeq_zoo.files import replace_file

__all__ = [
    "CHECKPOINTS",
    "NAMESPACE",
    "RESULT_COLUMNS",
    "WeightsError",
    "hub_digest",
    "hub_id",
    "local_file",
    "results",
    "sha256",
    "write_rows",
]

CHECKPOINTS = Path(__file__).parent / "checkpoints"

# Where the zoo's own repositories are: one per checkpoint, tagged with the version of the package that it ships with.
NAMESPACE = "pcdeq-zoo"
_SOURCE_VARIABLE = "PCDEQ_ZOO_WEIGHTS"

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
    "ece",  # expected calibration error, percent
    "n",  # test images
    "epochs",
    "seed",
    "tol",
    "evals_mean",  # evaluations of W per image and pcDEQ layer
    "evals_layers",  # the same mean layer by layer, "5.9/8.1/12.4"
    "evals_max",
    "bound_max",  # largest proven relative error of a unit
    "commit",  # of the training code
    "hardware",  # that trained it
    "hours",  # of training
    "bytes",
    "sha256",
)


class WeightsError(RuntimeError):
    """Weights that are missing, damaged, or of another model; the message names the file and says what to do."""


def results() -> dict[str, dict[str, str]]:
    """The rows of `checkpoints/results.csv` by "model.tag", in the file's order; a model's first is its default."""
    with (CHECKPOINTS / "results.csv").open(newline="", encoding="utf-8") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows with the keys `RESULT_COLUMNS` to a CSV file, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, RESULT_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    replace_file(path, text.getvalue())


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def hub_id(checkpoint: str) -> str:
    """Repository and revision on the Hub of a "model.tag" that ships with this version."""
    return f"{NAMESPACE}/{checkpoint}@v{__version__}"


def hub_digest(content: bytes, like: str) -> str:
    """Digest of a file's content as the Hub states it: sha256, or git's blob id where `like` is one (40 digits)."""
    if len(like) == 40:
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return hashlib.sha256(content).hexdigest()


def local_file(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> Path | None:
    """The file that a pretrained config stands for, downloaded if need be, and verified before anything loads it.

    A checkpoint of this package, here or in the zoo's repository at the tag of this version, must have the size and
    sha256 of its results row. The config and weights of any other Hub repository must be what the Hub says they are.
    All weights must be readable and, where their safetensors metadata name an architecture, of that of `cfg`.

    Returns:
        The file, or None for what timm loads by itself: URLs, state dicts, and folders without model.safetensors.

    Raises:
        WeightsError: No weights, no such file or repository, or not the file that it should be.
    """
    name = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else str(cfg.architecture)
    packaged = bool(cfg.file) and Path(str(cfg.file)).parent == CHECKPOINTS
    row = None
    remedy = "install pcdeq_zoo again"
    if cfg.source == "hf-hub" or (
        not cfg.state_dict and cfg.hf_hub_id and (not cfg.file or (packaged and _prefers_hub()))
    ):
        row = next((row for model, row in results().items() if hub_id(model) == cfg.hf_hub_id), None)
        remedy = "the Hub holds other weights than this version of pcdeq_zoo, or the cache is damaged: delete the file"
        if cfg.source == "hf-hub":
            _download("config.json", cfg, name, cache_dir, known=False)
        path = _download(cfg.hf_hub_filename or "model.safetensors", cfg, name, cache_dir, known=row is not None)
        if path.suffix != ".safetensors":
            raise WeightsError(
                f"weights of {name}: {path.name} of {cfg.hf_hub_id} is no safetensors file, and may run code"
            )
    elif cfg.source == "local-dir":
        path = Path(str(cfg.file)) / "model.safetensors"
        if not path.is_file():
            return None
    elif cfg.state_dict:
        return None
    elif cfg.file:
        path = Path(cfg.file)
        row = results().get(path.stem) if packaged else None
    elif cfg.url:
        return None
    else:
        trained = ", ".join(results()) or "none yet"
        raise WeightsError(
            f"no weights of {name} are published yet; use pretrained=False, or give a file of your own with "
            f"pretrained_cfg_overlay=dict(file=...). With weights: {trained}"
        )

    found = f"{path.stat().st_size} bytes with sha256 {sha256(path)}" if path.is_file() else "no file"
    if row and found != (wanted := f"{row['bytes']} bytes with sha256 {row['sha256']}"):
        raise WeightsError(f"weights of {name}: {path.resolve()}: got {found}, wanted {wanted}; {remedy}")
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
    return path


def _prefers_hub() -> bool:
    choice = os.environ.get(_SOURCE_VARIABLE) or "package"
    if choice not in ("package", "hub"):
        raise WeightsError(f"{_SOURCE_VARIABLE} must be package or hub, got {choice!r}")
    return choice == "hub"


def _download(filename: str, cfg: PretrainedCfg, name: str, cache_dir: str | Path | None, known: bool) -> Path:
    """A file of a Hub repository, from the cache or the network; compared with the Hub's digest, unless `known`."""
    repository, _, revision = str(cfg.hf_hub_id).partition("@")
    try:
        path = Path(hf_hub_download(repository, filename, revision=revision or None, cache_dir=cache_dir))
    except (HTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())
        raise WeightsError(
            f"weights of {name}: no {filename} from the Hub repository {cfg.hf_hub_id}: {reason}"
        ) from error
    if known:
        return path
    if path.is_symlink():
        wanted = path.readlink().name  # not further: that name may lead to one which is of another hash
    else:  # a cache on a file system without links names its files otherwise
        try:
            url = hf_hub_url(repository, filename, revision=path.parent.name)
            wanted = str(get_hf_file_metadata(url).etag)
        except (HTTPError, OSError) as error:
            raise WeightsError(
                f"weights of {name}: {path} cannot be verified: this cache has no links, so the Hub must be asked for "
                f"the digest, and cannot be: {' '.join(str(error).split())}"
            ) from error
    content = path.read_bytes()
    if (found := hub_digest(content, wanted)) != wanted:
        raise WeightsError(
            f"weights of {name}: {path.resolve()}: got {len(content)} bytes with digest {found}, wanted {wanted}; "
            "delete this file to download it again"
        )
    return path
