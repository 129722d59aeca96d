"""Publish the checkpoints of this package on the Hugging Face Hub.

    python -m pcdeq_zoo.publish --namespace NAMESPACE [--only GLOB] [--tag TAG] [--dry-run]

One repository per checkpoint, NAMESPACE/MODEL.TAG: the safetensors file byte by byte, timm's config.json, a model card,
the results row and the training log. What the Hub then holds is compared with the package's sha256, and tagged.
Publishing again changes nothing; an interrupted run is completed by running it again. The token is that of
`hf auth login`, or HF_TOKEN.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import timm
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars, validate_repo_id
from timm.models._hub import save_config_for_hf
from tqdm import tqdm

import pcdeq_zoo
from pcdeq_zoo.cards import model_card
from pcdeq_zoo.errors import one_line
from pcdeq_zoo.state_dict import WeightsError
from pcdeq_zoo.weights import Checkpoint, checkpoints, hub_digest, sha256, write_rows

__all__ = ["PublishError", "main", "publish", "write_folder"]


class PublishError(RuntimeError):
    """A checkpoint that could not be published; the message says why, and what to do."""


def write_folder(checkpoint: Checkpoint, repository: str, tag: str, folder: Path) -> None:
    """Write what the Hub repository of a checkpoint that ships holds at `tag` into an empty folder.

    Raises:
        PublishError: The packaged file is not the one that its results row was measured on.
    """
    if not checkpoint.file.is_file() or sha256(checkpoint.file) != checkpoint.row["sha256"]:
        raise PublishError(f"{checkpoint.file} is missing or not the file of its results row; install pcdeq_zoo again")
    if not checkpoint.log.is_file():
        raise PublishError(f"{checkpoint.log} is missing; install pcdeq_zoo again")
    shutil.copyfile(checkpoint.file, folder / "model.safetensors")
    shutil.copyfile(checkpoint.log, folder / "log.jsonl")
    write_rows(folder / "results.csv", [checkpoint.row])
    _write_config(checkpoint, folder / "config.json")
    model_card(checkpoint, repository, tag).save(folder / "README.md")


def _write_config(checkpoint: Checkpoint, file: Path) -> None:
    """timm's config, as transformers takes it too: the labels at the root, the number of classes not in model_args."""
    save_config_for_hf(timm.create_model(checkpoint.name), str(file))
    config = json.loads(file.read_text("utf-8"))
    config["model_args"].pop("num_classes", None)
    config["label_names"] = config["pretrained_cfg"].pop("label_names")
    file.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _same(api: HfApi, repository: str, revision: str, files: Iterable[Path]) -> bool:
    """Whether the Hub holds these files at a revision, by the digests that it states."""
    held = {
        file.path: file.lfs.sha256 if file.lfs else file.blob_id
        for file in api.list_repo_tree(repository, recursive=True, revision=revision)
        if isinstance(file, RepoFile)
    }
    return all(
        path.name in held and hub_digest(path.read_bytes(), held[path.name]) == held[path.name] for path in files
    )


def _publish_folder(api: HfApi, folder: Path, repository: str, tag: str) -> str:
    """Bring a repository to the state of `folder` and tag it; says what was done."""
    try:
        tags = [ref.name for ref in api.list_repo_refs(repository).tags]
    except RepositoryNotFoundError:
        tags = []
    files = list(folder.iterdir())
    if tag in tags:
        # A card and a config are written by whatever versions of the libraries are here; these two never change.
        if not _same(api, repository, tag, [folder / "model.safetensors", folder / "log.jsonl"]):
            raise PublishError(
                f"{repository}: the tag {tag} is taken by other weights; choose another --tag, or delete it on the Hub"
            )
        if _same(api, repository, "main", files):
            return "is published already"
    else:
        api.create_repo(repository, exist_ok=True)
        held = set(api.list_repo_files(repository)) - {".gitattributes"}
        if held and not {"config.json", "results.csv"} <= held:
            raise PublishError(
                f"{repository}: the name is taken by a repository that is not of pcdeq_zoo, with "
                f"{', '.join(sorted(held))}; publish to another --namespace, or delete it on the Hub"
            )
    message = f"pcdeq_zoo {pcdeq_zoo.__version__}"
    try:
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except RuntimeError as error:  # huggingface_hub's, around what happened while it sent a large file
        raise PublishError(f"{repository}: {error} {error.__cause__}; run the same command again to go on") from error
    if not _same(api, repository, commit.oid, files):
        raise PublishError(f"{repository}: the Hub holds other bytes than were sent, and nothing was tagged; try again")
    if tag in tags:
        return f"brought up to date; {tag} stays where it is, with the same weights"
    api.create_tag(repository, tag=tag, revision=commit.oid)
    return f"published, and tagged {tag}"


def publish(namespace: str, only: str = "*", tag: str = f"v{pcdeq_zoo.__version__}", dry_run: bool = False) -> None:
    """Publish every checkpoint whose "model.tag" matches the pattern `only`; prints a line for each.

    Args:
        namespace: User or organisation on the Hub.
        only: Shell pattern.
        tag: Name of the revision, which `hf-hub:NAMESPACE/MODEL.TAG@tag` loads.
        dry_run: Only write the folders to a temporary place and say what they hold; needs no network.

    Raises:
        PublishError: Nothing matches, no token, no right to write, a name or tag that is taken, or damaged files.
        HFValidationError: `namespace` cannot be one.
        HTTPError, OSError: The Hub refused a request, or could not be reached.
    """
    shipped = checkpoints()
    chosen = [shipped[name] for name in fnmatch.filter(shipped, only)]
    if not chosen:
        raise PublishError(f"no checkpoint matches {only!r}; there are {', '.join(shipped) or 'none'}")
    if "/" in namespace:
        raise PublishError(f"a namespace is the name of a user or an organisation, got {namespace!r}")
    for checkpoint in chosen:
        validate_repo_id(f"{namespace}/{checkpoint.name}")
    # What git takes for the name of a tag, and nobody for a branch.
    if tag in ("main", "HEAD") or not re.fullmatch(r"[A-Za-z0-9](?:[\w-]|\.(?!\.|$))*", tag) or tag.endswith(".lock"):
        raise PublishError(
            f"a tag is letters, digits, single '.', '-' and '_', begins with one of the first two, and is not 'main', "
            f"'HEAD' or *.lock; got {tag!r}"
        )
    api = HfApi(library_name="pcdeq_zoo", library_version=pcdeq_zoo.__version__)
    if not dry_run:
        try:
            user = api.whoami()
        except LocalTokenNotFoundError as error:
            raise PublishError("no token; log in with `hf auth login`, or set HF_TOKEN") from error
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise PublishError(f"the token of {user['name']} is read-only; make one that may write")
        disable_progress_bars()  # one bar is enough
    for checkpoint in tqdm(chosen, desc="publish", unit="model", disable=dry_run or None):
        with tempfile.TemporaryDirectory() as temporary:
            folder, repository = Path(temporary), f"{namespace}/{checkpoint.name}"
            write_folder(checkpoint, repository, tag, folder)
            if dry_run:
                print(f"{repository}, tag {tag}:")
                for path in sorted(folder.iterdir()):
                    print(f"  {path.name:18} {path.stat().st_size:>9,} bytes  sha256 {sha256(path)}")
            else:
                tqdm.write(f"{repository}: {_publish_folder(api, folder, repository, tag)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="pcdeq-zoo-publish", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--namespace", required=True, help="user or organisation on the Hub")
    parser.add_argument("--only", default="*", metavar="GLOB", help="checkpoints, e.g. 'pcdeq1_mc_*' (default: all)")
    parser.add_argument("--tag", default=f"v{pcdeq_zoo.__version__}", help="default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="say what would be published, without the network")
    args = parser.parse_args()
    try:
        publish(args.namespace, args.only, args.tag, args.dry_run)
    except (PublishError, WeightsError, HFValidationError) as error:
        sys.exit(f"error: {error}")
    except (HTTPError, OSError) as error:
        if getattr(error, "response", None) is not None:  # some errors of an answer have no class of their own
            sys.exit(f"error: the Hub refused: {one_line(error)}")
        reason = one_line(error).rstrip(".")
        sys.exit(f"error: the Hub cannot be reached: {reason}; run the same command again to go on")


if __name__ == "__main__":
    main()
