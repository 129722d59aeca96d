"""The checkpoints: what was measured of them, where they are, and the check that a file is the one it should be.

`checkpoints/results.csv` holds one row per checkpoint, with its test accuracy, how it was trained, and the size and
sha256 of its safetensors file. The pretrained configs, the model cards, the tables and the checks below all read it.

`pretrained=True` takes the file in this package. With `PCDEQ_ZOO_WEIGHTS=hub` in the environment it takes the same file
from the Hugging Face Hub; `hf-hub:NAMESPACE/NAME[@REVISION]` for a name takes any repository of this architecture.
Neither huggingface_hub nor timm compares what it downloads, or finds in its cache, with the sha256 that the Hub states:
a flipped bit loads without a word (huggingface_hub 2.4, timm 1.0.31). `verified_file` does.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HTTPError
from safetensors import safe_open
from timm.models import PretrainedCfg, load_state_dict

from pcdeq_zoo._version import __version__
from pcdeq_zoo.errors import one_line
from pcdeq_zoo.files import replace_file
from pcdeq_zoo.state_dict import WeightsError
from pcdeq_zoo.variants import VARIANTS, Recipe, Variant

__all__ = [
    "CHECKPOINTS",
    "NAMESPACE",
    "RESULT_COLUMNS",
    "Checkpoint",
    "check_config",
    "checkpoints",
    "hub_digest",
    "read_rows",
    "sha256",
    "verified_file",
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
    "eps",  # of the nets that were trained for it: change of each pixel, of [0, 1], that what follows is for
    "pgd",  # accuracy under projected gradient descent
    "certified_interval",  # share of images whose label is proven for all changed ones, pixels clipped to [0, 1]
    "certified_linear",
    "unclipped_interval",  # the same where pixels may leave [0, 1]
    "unclipped_linear",
    "commit",  # of the training code
    "hardware",  # that trained it
    "hours",  # of training
    "bytes",
    "sha256",
)


@dataclass(frozen=True)
class Checkpoint:
    """A trained network and what was measured of it.

    Attributes:
        variant: The network.
        tag: The recipe that trained it.
        row: What was measured, by the columns `RESULT_COLUMNS`, as the CSV file has it.
    """

    variant: Variant
    tag: str
    row: dict[str, str]

    @property
    def name(self) -> str:
        """Name for `timm.create_model`, e.g. "pcdeq1_l_tanh_mnist.paper"."""
        return f"{self.variant.name}.{self.tag}"

    @property
    def recipe(self) -> Recipe:
        """How it was trained."""
        return self.variant.recipes[self.tag]

    @property
    def seed(self) -> int:
        """Seed of the training; those of seed 0 ship."""
        return int(self.row["seed"])

    @property
    def top1(self) -> float:
        """Test accuracy in percent."""
        return float(self.row["top1"])

    @property
    def file(self) -> Path:
        """Its weights in this package."""
        return CHECKPOINTS / f"{self.name}.safetensors"

    @property
    def log(self) -> Path:
        """Its training log in this package, a JSON object per epoch."""
        return CHECKPOINTS / f"{self.name}.jsonl"

    @property
    def hub_id(self) -> str:
        """Its repository and revision on the Hub."""
        return f"{NAMESPACE}/{self.name}@v{__version__}"

    @property
    def content(self) -> str:
        """Size and sha256 of the weights that were measured, as `_content` gives them of a file."""
        return f"{self.row['bytes']} bytes with sha256 {self.row['sha256']}"


def checkpoints() -> dict[str, Checkpoint]:
    """The checkpoints that ship, by name, in the order of the zoo; of a network, its default first."""
    return {checkpoint.name: checkpoint for checkpoint in read_rows(CHECKPOINTS / "results.csv")}


def read_rows(path: Path) -> list[Checkpoint]:
    """Read a CSV file of trained networks."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = [row["model"].partition(".") for row in rows]
    return [Checkpoint(VARIANTS[name], tag, row) for (name, _, tag), row in zip(names, rows, strict=True)]


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


def hub_digest(content: bytes, like: str) -> str:
    """Digest of a file's content as the Hub states it: sha256, or git's blob id where `like` is one (40 digits)."""
    if len(like) == 40:
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return hashlib.sha256(content).hexdigest()


# What a config that comes with weights may say of the net: nothing that makes it another one.
_CONFIG_ARGS: dict[str, tuple[type, ...]] = {
    "num_classes": (int,),
    "in_chans": (int,),
    "img_size": (int, list, tuple),
    "global_pool": (str,),
    "drop_rate": (int, float),
    "channels": (list, tuple),
    "structure": (str,),
    "activation": (str,),
    "tol": (int, float),
    "max_evals": (int,),
    "stop": (str,),
    "on_failure": (str,),
}
_LOOSEST_TOL = 1e-2
_LARGEST_SIZE = 2**16


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST_SIZE


def check_config(
    variant: Variant, cfg: PretrainedCfg, stored: dict[str, Any], asked: dict[str, Any], pretrained: bool
) -> None:
    """Refuse a config from the Hub or a folder that would give another net than its weights are of, or false solves.

    Args:
        variant: The network that its architecture names.
        cfg: Its pretrained config.
        stored: Its model_args.
        asked: What the caller, or else the config, says.
        pretrained: Whether the net is to have its weights, and so to be of the kind that they are of.

    Raises:
        WeightsError: One line.
    """
    if cfg.architecture != variant.name:
        raise WeightsError(f"a config of {variant.name} whose pretrained_cfg is of {cfg.architecture!r}")
    size = cfg.input_size
    if not (isinstance(size, list | tuple) and len(size) == 3 and all(map(_is_size, size)) and all(size)):
        raise WeightsError(f"the config of these weights has input_size {size!r}, wanted channels, height, width")
    if not _is_size(cfg.num_classes):
        raise WeightsError(f"the config of these weights has num_classes {cfg.num_classes!r}, wanted a number")
    for key, value in stored.items():
        if key not in _CONFIG_ARGS:
            raise WeightsError(f"the config of these weights sets {key!r}; it may set {', '.join(_CONFIG_ARGS)}")
        if isinstance(value, bool) or not isinstance(value, _CONFIG_ARGS[key]):
            kinds = " or ".join(kind.__name__ for kind in _CONFIG_ARGS[key])
            raise WeightsError(f"the config of these weights sets {key} to {value!r}, wanted {kinds}")
        numbers = value if isinstance(value, list | tuple) else [value] * isinstance(value, int)
        if not all(map(_is_size, numbers)):
            raise WeightsError(f"the config of these weights sets {key} to {value!r}, wanted 0 to {_LARGEST_SIZE}")
    if stored.get("num_classes", cfg.num_classes) != cfg.num_classes:
        raise WeightsError(
            f"the config of these weights contradicts itself: num_classes {cfg.num_classes}, and "
            f"{stored['num_classes']} in model_args"
        )
    in_force = stored | {key: asked[key] for key in stored if key in asked}
    tol = in_force.get("tol")
    if isinstance(tol, int | float) and not 0 < tol <= _LOOSEST_TOL:
        raise WeightsError(
            f"the config of these weights sets tol to {tol}, wanted at most {_LOOSEST_TOL}; say tol=1e-3, and set "
            "model.solver.tol afterwards if you mean it"
        )
    if in_force.get("on_failure") == "ignore":
        raise WeightsError(
            "the config of these weights sets on_failure='ignore'; say on_failure='warn', and set "
            "model.solver.on_failure afterwards if you mean it"
        )
    for key in ("structure", "activation"):
        own = getattr(variant, key)
        if pretrained and (value := asked.get(key, own)) != own:
            raise WeightsError(
                f"pretrained weights of {variant.name} are of {key}={own!r}, got {value!r}; use pretrained=False, and "
                "load_state_dict if you mean it"
            )


_MOST_BYTES = 2**28  # a hundred times the largest network of the zoo


@dataclass(frozen=True)
class _Source:
    """Where the weights of a pretrained config are, and what they must be.

    Attributes:
        name: Of the network, for messages.
        architecture: That the weights must be of.
        file: On this machine; None: on the Hub, see `cfg`.
        expected: The checkpoint whose bytes they must be, where it is one of this package.
        remedy: What to do where they are not.
    """

    name: str
    architecture: str
    file: Path | None
    expected: Checkpoint | None
    remedy: str = ""


def verified_file(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> Path | None:
    """The file that a pretrained config stands for, downloaded if need be, and verified before anything loads it.

    A checkpoint of this package, here or in the zoo's repository at the tag of this version, must have the size and
    sha256 of its results row. The config and weights of any other Hub repository must be what the Hub says they are.
    All weights must be readable and, where their safetensors metadata name an architecture, of that of `cfg`.

    Returns:
        The file, or None for what timm loads by itself: URLs and state dicts.

    Raises:
        WeightsError: No weights, no such file or repository, or not the file that it should be.
    """
    source = _resolve(cfg)
    if source is None:
        return None
    path = source.file or _fetch(cfg, source, cache_dir)
    _verify(path, source)
    return path


def _resolve(cfg: PretrainedCfg) -> _Source | None:
    """Where the weights of a config are; None where timm is to find them."""
    name = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else str(cfg.architecture)
    architecture = str(cfg.architecture)
    packaged = bool(cfg.file) and Path(str(cfg.file)).parent == CHECKPOINTS
    shipped = checkpoints()
    if cfg.source == "hf-hub" or (
        not cfg.state_dict and cfg.hf_hub_id and (not cfg.file or (packaged and _prefers_hub()))
    ):
        expected = next((checkpoint for checkpoint in shipped.values() if checkpoint.hub_id == cfg.hf_hub_id), None)
        remedy = "the Hub holds other weights than this version of pcdeq_zoo, or the cache is damaged: delete the file"
        return _Source(name, architecture, None, expected, remedy)
    if cfg.source == "local-dir":
        files = [Path(str(cfg.file)) / file for file in ("model.safetensors", "pytorch_model.bin")]
        return _Source(name, architecture, next((path for path in files if path.is_file()), files[0]), None)
    if cfg.state_dict:
        return None
    if cfg.file:
        path = Path(cfg.file)
        expected = shipped.get(path.stem) if packaged else None
        return _Source(name, architecture, path, expected, "install pcdeq_zoo again")
    if cfg.url:
        return None
    raise WeightsError(
        f"there are no weights of {name} yet; use pretrained=False, or give a file of your own with "
        "pretrained_cfg_overlay=dict(file=...); timm.list_models('pcdeq*', pretrained=True) lists what has some"
    )


def _fetch(cfg: PretrainedCfg, source: _Source, cache_dir: str | Path | None) -> Path:
    """Weights from the Hub or its cache, and the config where timm would read it."""
    if cfg.source == "hf-hub":
        _download("config.json", cfg, source.name, cache_dir, verify=True)
    filename = str(cfg.hf_hub_filename or "model.safetensors")
    if not filename.endswith(".safetensors"):
        raise WeightsError(
            f"weights of {source.name}: {filename} of {cfg.hf_hub_id} is no safetensors file, and may run code"
        )
    return _download(filename, cfg, source.name, cache_dir, verify=source.expected is None)


def _verify(path: Path, source: _Source) -> None:
    """Refuse a file that is not the expected one, cannot be read, or says that it is of another network."""
    if path.is_file() and path.stat().st_size > _MOST_BYTES:
        raise WeightsError(
            f"weights of {source.name}: {path} has {path.stat().st_size} bytes, wanted at most {_MOST_BYTES}"
        )
    found = _content(path)
    if source.expected and found != (wanted := source.expected.content):
        raise WeightsError(f"weights of {source.name}: {path.resolve()}: got {found}, wanted {wanted}; {source.remedy}")
    if not path.is_file():
        raise WeightsError(f"weights of {source.name}: there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                architecture = (file.metadata() or {}).get("architecture", source.architecture)
        else:
            load_state_dict(str(path))
            architecture = source.architecture
    except Exception as error:  # a damaged pickle raises whatever its bytes come to
        raise WeightsError(
            f"weights of {source.name}: {path} is not a readable checkpoint: got {found}: {one_line(error)}"
        ) from error
    if architecture != source.architecture:
        raise WeightsError(f"weights of {source.name}: {path} holds weights of {architecture[:80]!r}")


def _content(path: Path) -> str:
    return f"{path.stat().st_size} bytes with sha256 {sha256(path)}" if path.is_file() else "no file"


def _prefers_hub() -> bool:
    choice = os.environ.get(_SOURCE_VARIABLE) or "package"
    if choice not in ("package", "hub"):
        raise WeightsError(f"{_SOURCE_VARIABLE} must be package or hub, got {choice!r}")
    return choice == "hub"


def _check_reachable(endpoint: str) -> None:
    """Raise OSError at once where a server cannot be reached: huggingface_hub tries for half a minute first."""
    if getproxies().keys() - {"no"}:
        return  # and so cannot be asked directly
    address = urlsplit(endpoint)
    port = address.port or {"http": 80}.get(address.scheme, 443)
    try:
        socket.create_connection((address.hostname, port), timeout=10).close()
    except OSError as error:
        raise OSError(f"{endpoint} cannot be reached: {error}") from error


def _download(filename: str, cfg: PretrainedCfg, name: str, cache_dir: str | Path | None, verify: bool) -> Path:
    """A file of a Hub repository, from the cache or the network; with `verify` it must be what the Hub says it is."""
    repository, _, revision = str(cfg.hf_hub_id).partition("@")
    try:
        cached = try_to_load_from_cache(repository, filename, cache_dir, revision or None)
        if not isinstance(cached, str) and not constants.HF_HUB_OFFLINE:
            _check_reachable(constants.ENDPOINT)
        path = Path(hf_hub_download(repository, filename, revision=revision or None, cache_dir=cache_dir))
    except (HTTPError, ValueError, OSError) as error:  # HFValidationError and a bad filename are ValueErrors
        raise WeightsError(
            f"weights of {name}: no {filename} from the Hub repository {cfg.hf_hub_id}: {one_line(error)}"
        ) from error
    if not verify:
        return path
    if path.is_symlink():
        wanted = path.readlink().name  # not further: that name may lead to one which is of another hash
    else:  # a cache on a file system without links names its files otherwise
        try:
            url = hf_hub_url(repository, filename, revision=path.parents[filename.count("/")].name)
            wanted = str(get_hf_file_metadata(url).etag)
        except (HTTPError, OSError) as error:
            raise WeightsError(
                f"weights of {name}: {path} cannot be verified: this cache has no links, so the Hub must be asked for "
                f"the digest, and cannot be: {one_line(error)}"
            ) from error
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise WeightsError(f"weights of {name}: {path} has {size} bytes, wanted at most {_MOST_BYTES}")
    content = path.read_bytes()
    if (found := hub_digest(content, wanted)) != wanted:
        raise WeightsError(
            f"weights of {name}: {path.resolve()}: got {len(content)} bytes with digest {found}, wanted {wanted}; "
            "delete this file to download it again"
        )
    return path
