"""Publishing to the Hugging Face Hub and loading from it, and torch.hub: real processes, real HTTP, the real clients.

The Hub is tests/hub_server.py on loopback. HF_ENDPOINT is read when huggingface_hub is imported, so everything that
talks to it runs in a process of its own.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub import __version__ as hub_version
from processes import ROOT, python
from safetensors.torch import save_file

from pcdeq_zoo import DATASETS, VARIANTS, __version__
from pcdeq_zoo.cards import model_card
from pcdeq_zoo.data import load, normalize
from pcdeq_zoo.files import read_jsonl
from pcdeq_zoo.weights import NAMESPACE, Checkpoint, checkpoints, hub_digest, sha256

OLD_HUB = hub_version.startswith("0.")

NAME = "pcdeq1_l_tanh_mnist"
CHECKPOINT = f"{NAME}.{VARIANTS[NAME].default_recipe}"
SHIPPED = checkpoints()[CHECKPOINT]
TAG = f"v{__version__}"

# The client sleeps between its tries, half a minute in all where a server is gone.
AT_ONCE = "import time; time.sleep = lambda seconds: None\n"

# What every script starts with.
PRELUDE = """
import json, sys
import timm, torch
import pcdeq_zoo

def logits(model, **kwargs):
    images = torch.load(sys.argv[1], weights_only=True)
    model = timm.create_model(model, pretrained=True, **kwargs).eval()
    with torch.inference_mode():
        return model(images[model.pretrained_cfg["architecture"].split("_")[3]]).tolist()

def error(model, **kwargs):
    try:
        timm.create_model(model, pretrained=True, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
"""


class Hub:
    """The server, and commands that talk to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.start()

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, *options: str) -> None:
        command = [sys.executable, str(ROOT / "tests" / "hub_server.py"), str(self.state), *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.address = self.process.stdout.readline().strip()
        assert self.address.startswith("http://127.0.0.1:")  # nothing below may reach the real Hub

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def environment(self, home: str = "home", **variables: str) -> dict[str, str]:
        ours = {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(self.folder / home),
            "HF_TOKEN": "hf_write",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
        }
        foreign = ("HF_", "HUGGINGFACE", "HUGGING_FACE", "PCDEQ_ZOO_WEIGHTS")  # such as the cache of whoever runs this
        rest = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        return {key: value for key, value in (rest | ours | variables).items() if value}

    def python(self, script: str, *arguments: str, **variables: str) -> Any:
        """Run a script that ends with `print(json.dumps(...))`; what it printed."""
        done = python("-c", PRELUDE + script, *arguments, env=self.environment(**variables))
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def publish(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return python("-m", "pcdeq_zoo.publish", *arguments, env=self.environment(**variables))

    def repository(self, name: str) -> dict[str, Any]:
        return json.loads((self.state / "models" / f"{name}.json").read_bytes())

    def files(self, name: str, tag: str = TAG) -> dict[str, Any]:
        repository = self.repository(name)
        return repository["commits"][repository["tags"][tag]]["files"]

    def blob(self, name: str, file: str) -> Path:
        return self.state / "blobs" / self.files(name)[file]["sha256"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[Hub]:
    """A Hub on which every checkpoint of the package is published."""
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        done = hub.publish("--namespace", NAMESPACE)
        assert done.returncode == 0, done.stderr
        yield hub


@pytest.fixture
def empty_hub(tmp_path) -> Iterator[Hub]:
    with Hub(tmp_path) as hub:
        yield hub


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """File with 8 inputs for the models of each data set."""
    torch.manual_seed(0)
    shown, _ = load(DATASETS["mnist"], "test", "sample")
    batches = {name: torch.rand(8, *dataset.input_size) for name, dataset in DATASETS.items()}
    batches["mnist"] = normalize(shown[:8], DATASETS["mnist"])
    path = tmp_path_factory.mktemp("images") / "images.pt"
    torch.save(batches, path)
    return path


@pytest.fixture(scope="module")
def packaged(images: Path) -> dict[str, torch.Tensor]:
    """Logits of the packaged checkpoints."""
    batches = torch.load(images, weights_only=True)
    with torch.inference_mode():
        return {
            name: timm.create_model(name, pretrained=True).eval()(batches[checkpoint.variant.dataset.name])
            for name, checkpoint in checkpoints().items()
        }


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class TestPublish:
    def test_the_hub_holds_the_packaged_files(self, hub: Hub):
        for name, checkpoint in checkpoints().items():
            files = hub.files(f"{NAMESPACE}/{name}")
            assert set(files) == {"README.md", "config.json", "log.jsonl", "model.safetensors", "results.csv"}
            assert files["model.safetensors"]["lfs"]
            assert files["model.safetensors"]["sha256"] == checkpoint.row["sha256"]
            assert files["model.safetensors"]["size"] == int(checkpoint.row["bytes"])
            config = json.loads(hub.blob(f"{NAMESPACE}/{name}", "config.json").read_text())
            assert config["architecture"] == checkpoint.variant.name
            assert config["label_names"] == list(checkpoint.variant.dataset.classes)  # where transformers looks
            assert "num_classes" not in config["model_args"]
            assert str(ROOT) not in json.dumps(config)

    def test_again_changes_nothing(self, hub: Hub):
        before = {path: path.read_bytes() for path in hub.state.rglob("*") if path.is_file()}
        done = hub.publish("--namespace", NAMESPACE)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("is published already") == len(checkpoints())
        assert {path: path.read_bytes() for path in hub.state.rglob("*") if path.is_file()} == before

    def test_a_new_tag_of_the_same_files(self, hub: Hub):
        done = hub.publish("--namespace", "alice", "--only", CHECKPOINT)
        assert done.returncode == 0, done.stderr
        done = hub.publish("--namespace", "alice", "--only", CHECKPOINT, "--tag", "v2")
        assert done.returncode == 0, done.stderr
        assert "published, and tagged v2" in done.stdout
        card = hub.blob(f"alice/{CHECKPOINT}", "README.md").read_text()
        assert f"hf-hub:alice/{CHECKPOINT}@{TAG}" in card
        assert len(hub.repository(f"alice/{CHECKPOINT}")["tags"]) == 2

    def test_tag_of_other_files(self, empty_hub: Hub):
        assert empty_hub.publish("--namespace", "alice", "--only", CHECKPOINT).returncode == 0
        path = empty_hub.state / "models" / "alice" / f"{CHECKPOINT}.json"
        path.write_text(path.read_text().replace(SHIPPED.row["sha256"], "0" * 64))
        done = empty_hub.publish("--namespace", "alice", "--only", CHECKPOINT)
        assert done.returncode == 1
        assert f"alice/{CHECKPOINT}: the tag {TAG} is taken by other weights" in done.stderr

    def test_interrupted_before_the_tag_and_a_new_card(self, empty_hub: Hub):
        one = ("--namespace", "alice", "--only", CHECKPOINT)
        assert empty_hub.publish(*one).returncode == 0
        path = empty_hub.state / "models" / "alice" / f"{CHECKPOINT}.json"
        state = json.loads(path.read_text())
        path.write_text(json.dumps(state | {"tags": {}}))
        assert f"published, and tagged {TAG}" in empty_hub.publish(*one).stdout
        assert empty_hub.repository(f"alice/{CHECKPOINT}")["tags"] == state["tags"]  # no new commit

        older = json.loads(path.read_text())
        older["commits"][older["tags"][TAG]]["files"]["README.md"]["git_id"] = "0" * 40
        path.write_text(json.dumps(older))
        assert f"brought up to date; {TAG} stays" in empty_hub.publish(*one).stdout
        assert empty_hub.repository(f"alice/{CHECKPOINT}")["tags"] == state["tags"]
        assert "is published already" in empty_hub.publish(*one).stdout

    @pytest.mark.skipif(OLD_HUB, reason="before huggingface-hub 1.0 a failed upload leaves a folder to the collector")
    def test_killed_server_and_resumed(self, empty_hub: Hub):
        some = ("--namespace", NAMESPACE, "--only", "*_l_tanh_*")
        first, second, *rest = fnmatch.filter(checkpoints(), "*_l_tanh_*")
        empty_hub.stop()
        empty_hub.start("--die-at-upload", "2")
        port = empty_hub.address.rpartition(":")[2]
        script = f"{AT_ONCE}from pcdeq_zoo.publish import main; main()"
        done = python("-c", script, *some, env=empty_hub.environment())
        assert done.returncode == 1
        assert f"{NAMESPACE}/{second}: Error while uploading 'model.safetensors'" in done.stderr
        assert "Traceback" not in done.stderr
        assert TAG in empty_hub.repository(f"{NAMESPACE}/{first}")["tags"]
        assert not empty_hub.repository(f"{NAMESPACE}/{second}")["tags"]
        empty_hub.stop()
        empty_hub.start("--port", port)
        done = empty_hub.publish(*some)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("is published already") == 1
        for checkpoint in (first, second, *rest):
            files = empty_hub.files(f"{NAMESPACE}/{checkpoint}")
            assert files["model.safetensors"]["sha256"] == checkpoints()[checkpoint].row["sha256"]

    def test_refusals(self, empty_hub: Hub):
        """One line that says what is wrong, as the exit of the command."""
        script = f"""
import os
from pcdeq_zoo.publish import main
def refused(token, *arguments):
    os.environ["HF_TOKEN"] = token
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as stop:
        return stop.code
one = ("--namespace", "alice", "--only", "{CHECKPOINT}")
found = [refused(token, *one) for token in ("", "hf_wrong", "hf_read")]
found.append(refused("hf_write", "--namespace", "stranger", "--only", "{CHECKPOINT}"))
found.append(refused("hf_write", "--namespace", "alice", "--only", "resnet*"))
found.append(refused("hf_write", "--namespace", "alice/x"))
found.append(refused("hf_write", "--namespace", "my name"))
found.append(refused("hf_write", *one, "--tag", "main"))
print(json.dumps(found))
"""
        none, wrong, read, stranger, pattern, slash, space, main = empty_hub.python(script)
        assert none == "error: no token; log in with `hf auth login`, or set HF_TOKEN"
        assert wrong.startswith(
            "error: the Hub refused: Invalid user token. The token from HF_TOKEN environment variable is invalid. "
            "Note that HF_TOKEN takes precedence over "
        )
        assert read == "error: the token of alice is read-only; make one that may write"
        assert stranger.startswith("error: the Hub refused: ")
        assert f"You don't have the rights to write to stranger/{CHECKPOINT}" in stranger
        assert pattern == f"error: no checkpoint matches 'resnet*'; there are {', '.join(checkpoints())}"
        assert slash == "error: a namespace is the name of a user or an organisation, got 'alice/x'"
        assert space.startswith("error: Repo id must")
        assert main.startswith("error: a tag is letters, digits, ")
        assert main.endswith("; got 'main'")
        assert not (empty_hub.state / "models").exists()

    def test_no_network(self, empty_hub: Hub):
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))  # and does not listen
            address = f"http://127.0.0.1:{unused.getsockname()[1]}"
            done = empty_hub.publish("--namespace", "alice", "--only", CHECKPOINT, HF_ENDPOINT=address)
        assert done.returncode == 1
        assert done.stderr.startswith("error: the Hub cannot be reached: ")

    def test_name_taken(self, empty_hub: Hub):
        empty_hub.python(
            f"""
from huggingface_hub import HfApi
HfApi().create_repo("alice/{CHECKPOINT}")
HfApi().upload_file(path_or_fileobj=b"a poem", path_in_repo="poem.txt", repo_id="alice/{CHECKPOINT}")
print(1)
"""
        )
        done = empty_hub.publish("--namespace", "alice", "--only", CHECKPOINT)
        assert done.returncode == 1
        assert "the name is taken by a repository that is not of pcdeq_zoo, with poem.txt" in done.stderr

    def test_dry_run_needs_no_network(self, tmp_path):
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
        done = python("-m", "pcdeq_zoo.publish", "--namespace", "anyone", "--dry-run", env=environment)
        assert done.returncode == 0, done.stderr
        for name, checkpoint in checkpoints().items():
            assert f"anyone/{name}, tag {TAG}:" in done.stdout
            assert checkpoint.row["sha256"] in done.stdout

    @pytest.mark.skipif(OLD_HUB, reason="the command was another before huggingface-hub 1.0")
    def test_the_hf_command_downloads_it(self, hub: Hub, tmp_path):
        hf = str(Path(sys.executable).with_name("hf"))
        told = {"env": hub.environment(), "capture_output": True, "text": True}
        assert "alice" in subprocess.run([hf, "auth", "whoami"], **told).stdout
        repository, _, revision = SHIPPED.hub_id.partition("@")
        folder = tmp_path / "folder"
        done = subprocess.run([hf, "download", repository, "--revision", revision, "--local-dir", folder], **told)
        assert done.returncode == 0, done.stderr
        assert sha256(folder / "model.safetensors") == SHIPPED.row["sha256"]


class TestLoad:
    def test_by_prefix(self, hub: Hub, images: Path, packaged: dict[str, torch.Tensor]):
        """At the branch, the tag and the commit; then offline, from the cache."""
        script = f"""
names = {list(checkpoints())}
found = {{name: logits(f"hf-hub:{NAMESPACE}/{{name}}") for name in names}}
found["tag"] = logits("hf-hub:{SHIPPED.hub_id}")
found["commit"] = logits("hf-hub:{NAMESPACE}/{CHECKPOINT}@" + sys.argv[2])
print(json.dumps(found))
"""
        commit = hub.repository(f"{NAMESPACE}/{CHECKPOINT}")["tags"][TAG]
        for offline in ("", "1"):
            found = hub.python(script, str(images), commit, home="prefix", HF_HUB_OFFLINE=offline)
            for name in checkpoints():
                assert torch.equal(torch.tensor(found[name]), packaged[name])
            assert found["tag"] == found["commit"] == found[CHECKPOINT]

    def test_by_environment(self, hub: Hub, images: Path, packaged: dict[str, torch.Tensor]):
        script = f"""
names = {list(checkpoints())}
found = {{name: logits(name) for name in names}}
model = timm.create_model("{NAME}", pretrained=True, num_classes=3, in_chans=3)
found["adapted"] = list(model(torch.rand(2, 3, 28, 28)).shape)
found["file"] = model.pretrained_cfg["file"]
print(json.dumps(found))
"""
        found = hub.python(script, str(images), home="environment", PCDEQ_ZOO_WEIGHTS="hub")
        for name in checkpoints():
            assert torch.equal(torch.tensor(found[name]), packaged[name])
        assert found["adapted"] == [2, 3]
        assert Path(found["file"]).is_relative_to(hub.folder / "environment")

    def test_adapted_by_prefix_and_without_a_packaged_file(self, hub: Hub, images: Path, packaged):
        script = f"""
model = timm.create_model("hf-hub:{SHIPPED.hub_id}", pretrained=True, num_classes=3, in_chans=3)
shape = list(model(torch.rand(2, 3, 28, 28)).shape)
print(json.dumps([shape, logits("{NAME}", pretrained_cfg_overlay=dict(file=None))]))
"""
        shape, found = hub.python(script, str(images), home="adapted")
        assert shape == [2, 3]
        assert torch.equal(torch.tensor(found), packaged[CHECKPOINT])

    def test_corrupt_cache(self, hub: Hub):
        """A flipped bit and a cut file; when the file is gone, it is downloaded again."""
        digest = SHIPPED.row["sha256"]
        script = f"""
from pathlib import Path
def both():
    return [error("hf-hub:{SHIPPED.hub_id}"), error("{NAME}", pretrained_cfg_overlay=dict(file=None))]
found = [both()]
(blob,) = Path(sys.argv[1]).rglob("{digest}")
content = bytearray(blob.read_bytes())
content[len(content) // 2] ^= 1
blob.write_bytes(content)
found.append(both())
blob.write_bytes(content[:1000])
found.append(both())
blob.unlink()
found.append(both())
print(json.dumps([str(blob), found]))
"""
        blob, (before, flipped, cut, after) = hub.python(script, str(hub.folder / "damaged"), home="damaged")
        assert before == after == [None, None]
        got = rf"got {SHIPPED.row['bytes']} bytes with (digest|sha256) [0-9a-f]{{64}}"
        for message in flipped:
            assert re.fullmatch(
                rf"WeightsError: weights of {CHECKPOINT}: {blob}: {got}, wanted .*{digest}; .*", message
            )
        for message in cut:
            assert f"{blob}: got 1000 bytes with " in message

    @pytest.mark.skipif(OLD_HUB, reason="huggingface-hub 0.30 links whatever it is told")
    def test_cache_without_links(self, hub: Hub):
        script = f"""
print(json.dumps([error("hf-hub:{NAMESPACE}/{CHECKPOINT}"), error("{NAME}", pretrained_cfg_overlay=dict(file=None))]))
"""
        settings = {"home": "copies", "HF_HUB_DISABLE_SYMLINKS": "1"}
        assert hub.python(script, **settings) == [None, None]
        for file in (hub.folder / "copies").rglob("model.safetensors"):
            assert not file.is_symlink()
        unknown, ours = hub.python(script, **settings, HF_HUB_OFFLINE="1")
        assert "cannot be verified: this cache has no links, so the Hub must be asked" in unknown
        assert ours is None  # compared with the results row
        for file in (hub.folder / "copies").rglob("model.safetensors"):
            flip_a_bit(file)
        for message in hub.python(script, **settings):
            assert f"wanted {SHIPPED.row['sha256']}; delete this file" in message or (
                "or the cache is damaged: delete the file" in message
            )

    def test_cache_shared_between_repositories(self, hub: Hub):
        """What Xet downloads is linked once more, to a file that another hash names (huggingface_hub 2.4)."""
        script = f'print(json.dumps(error("hf-hub:{NAMESPACE}/{CHECKPOINT}")))'
        assert hub.python(script, home="shared") is None
        for blob in (hub.folder / "shared").rglob("blobs/*"):
            store = hub.folder / "shared" / "hub" / "blobs" / "ab" / hub_digest(blob.name.encode(), "")
            store.parent.mkdir(parents=True, exist_ok=True)
            blob.rename(store)
            blob.symlink_to(store)
        assert hub.python(script, home="shared", HF_HUB_OFFLINE="1") is None
        store = hub.folder / "shared" / "hub" / "blobs" / "ab" / hub_digest(SHIPPED.row["sha256"].encode(), "")
        flip_a_bit(store)
        message = hub.python(script, home="shared", HF_HUB_OFFLINE="1")
        assert message.endswith("delete this file to download it again")
        assert str(store) in message

    def test_damaged_or_hostile_config(self, hub: Hub):
        """timm reads config.json before any code of ours; what it cannot do is to bring in something unverified."""
        script = f"""
from pathlib import Path
name = "hf-hub:{NAMESPACE}/{CHECKPOINT}"
found = [error(name)]
(link,) = Path(sys.argv[1]).rglob("config.json")
blob = link.resolve()
blob.write_text(blob.read_text().replace('"num_classes": 10', '"num_classes": 30', 1))
found.append(error(name))

from huggingface_hub import HfApi, hf_hub_download
HfApi().create_repo("alice/hostile", exist_ok=True)
weights = hf_hub_download("{NAMESPACE}/{CHECKPOINT}", "model.safetensors")
HfApi().upload_file(path_or_fileobj=weights, path_in_repo="model.safetensors", repo_id="alice/hostile")
HfApi().upload_file(path_or_fileobj=b"pickle", path_in_repo="pytorch_model.bin", repo_id="alice/hostile")
pickle = dict(hf_hub_filename="pytorch_model.bin")
for extra in (dict(num_classes=30), pickle, dict(state_dict=dict(a=1)), dict(custom_load=True)):
    right = dict(input_size=[1, 28, 28], num_classes=10, fixed_input_size=True)
    config = dict(architecture="{NAME}", pretrained_cfg=right | extra)
    HfApi().upload_file(
        path_or_fileobj=json.dumps(config).encode(), path_in_repo="config.json", repo_id="alice/hostile"
    )
    found.append(error("hf-hub:alice/hostile"))
print(json.dumps(found))
"""
        intact, flipped, classes, pickle, state, custom = hub.python(script, str(hub.folder / "config"), home="config")
        assert intact is None
        assert re.search(r"config|blobs", flipped)
        assert "delete this file to download it again" in flipped
        assert "these weights have 10 classes, and their config says 30" in classes
        assert "pytorch_model.bin of alice/hostile is no safetensors file" in pickle
        assert state is custom is None  # not asked; the verified file is loaded

    def test_damaged_download(self, empty_hub: Hub):
        """The server sends a flipped bit, and then less than it promised."""
        assert empty_hub.publish("--namespace", NAMESPACE, "--only", CHECKPOINT).returncode == 0
        blob = empty_hub.blob(f"{NAMESPACE}/{CHECKPOINT}", "model.safetensors")
        flip_a_bit(blob)
        script = f"""
from pathlib import Path
blob = Path(sys.argv[1])
name = "hf-hub:{NAMESPACE}/{CHECKPOINT}"
found = [error(name, cache_dir=sys.argv[2] + "/flipped")]
blob.write_bytes(blob.read_bytes()[:1000])
found.append(error(name, cache_dir=sys.argv[2] + "/cut"))
print(json.dumps(found))
"""
        flipped, cut = empty_hub.python(AT_ONCE + script, str(blob), str(empty_hub.folder))
        assert "delete this file to download it again" in flipped
        assert cut.startswith(f"WeightsError: weights of {CHECKPOINT}: no model.safetensors from the Hub repository")

    def test_other_weights_under_our_name(self, empty_hub: Hub, tmp_path):
        """At the tag of this version only its very files load."""
        assert empty_hub.publish("--namespace", NAMESPACE, "--only", CHECKPOINT).returncode == 0
        model = timm.create_model(NAME)
        save_file(model.state_dict(), tmp_path / "other.safetensors")
        content = (tmp_path / "other.safetensors").read_bytes()
        digest = hub_digest(content, "")
        (empty_hub.state / "blobs" / digest).write_bytes(content)
        path = empty_hub.state / "models" / NAMESPACE / f"{CHECKPOINT}.json"
        state = json.loads(path.read_text())
        for commit in state["commits"].values():
            if commit["files"]:
                commit["files"]["model.safetensors"] |= {"sha256": digest, "size": len(content)}
        path.write_text(json.dumps(state))
        script = f'print(json.dumps([error("{NAME}"), error("hf-hub:{SHIPPED.hub_id}")]))'
        for message in empty_hub.python(script, PCDEQ_ZOO_WEIGHTS="hub"):
            assert "the Hub holds other weights than this version of pcdeq_zoo" in message

    def test_nothing_there(self, hub: Hub):
        script = f"""
from huggingface_hub import HfApi
HfApi().create_repo("alice/no_weights", exist_ok=True)
config = json.dumps({{"architecture": "{NAME}", "pretrained_cfg": {{"input_size": [1, 28, 28]}}}}).encode()
HfApi().upload_file(path_or_fileobj=config, path_in_repo="config.json", repo_id="alice/no_weights")
names = "hf-hub:alice/nothing", "hf-hub:alice/no_weights", "hf-hub:{NAMESPACE}/{CHECKPOINT}@v9"
overlays = [dict(file=None, hf_hub_id=name) for name in ("alice/nothing", "alice/no_weights", "not a name")]
found = [error(name) for name in names] + [error("{NAME}", pretrained_cfg_overlay=overlay) for overlay in overlays]
print(json.dumps(found))
"""
        found = hub.python(script)
        wanted = [
            r"RepositoryNotFoundError: .*alice/nothing",
            r"WeightsError: .*no model.safetensors from the Hub repository alice/no_weights: 404",
            r"RevisionNotFoundError: .*v9",
            r"WeightsError: .*no model.safetensors from the Hub repository alice/nothing: 404",
            r"WeightsError: .*no model.safetensors from the Hub repository alice/no_weights: 404",
            r"WeightsError: .*no model.safetensors from the Hub repository not a name: Repo id must",
        ]
        for message, pattern in zip(found, wanted, strict=True):
            assert re.match(pattern, message, re.S), message

    def test_unreachable_or_unknown_source(self, hub: Hub):
        script = f'print(json.dumps(error("{NAME}")))'
        offline = hub.python(script, home="nowhere", PCDEQ_ZOO_WEIGHTS="hub", HF_HUB_OFFLINE="1")
        assert offline.startswith(f"WeightsError: weights of {CHECKPOINT}: no model.safetensors from the Hub")
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))  # and does not listen
            address = f"http://127.0.0.1:{unused.getsockname()[1]}"
            gone = hub.python(script, home="nowhere", PCDEQ_ZOO_WEIGHTS="hub", HF_ENDPOINT=address)
        assert f"{address} cannot be reached: " in gone  # ours, not what the client says after its many tries
        assert hub.python(script, PCDEQ_ZOO_WEIGHTS="Hub") == (
            "WeightsError: PCDEQ_ZOO_WEIGHTS must be package or hub, got 'Hub'"
        )


def test_a_users_net_comes_back_as_it_was(hub: Hub):
    """Fine-tuned with a head of its own, pushed by timm, loaded by the prefix; and a W below 0 is refused."""
    script = f"""
import copy
from timm.models import push_to_hf_hub
torch.manual_seed(0)
model = timm.create_model("{NAME}", pretrained=True, num_classes=4, tol=1e-4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
x, y = torch.rand(16, 1, 28, 28), torch.arange(16) % 4
for _ in range(3):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
with torch.no_grad():
    model.features.deq1.direction[0, 0] = -1.0  # as a last step may leave it; what is pushed is projected
push_to_hf_hub(model, "alice/mine", safe_serialization=True)
loaded = timm.create_model("hf-hub:alice/mine", pretrained=True)
same = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))
same_logits = torch.equal(model.eval()(x), loaded.eval()(x))

from huggingface_hub import HfApi
from safetensors.torch import save
state = model.state_dict()
state["features.deq1.direction"] = state["features.deq1.direction"].clone()
state["features.deq1.direction"][0, 0] = -1.0
HfApi().upload_file(path_or_fileobj=save(state), path_in_repo="model.safetensors", repo_id="alice/mine")
refused = error("hf-hub:alice/mine")
print(json.dumps([same, same_logits, loaded.num_classes, loaded.solver.tol, refused]))
"""
    same, same_logits, classes, tol, refused = hub.python(script, home="mine")
    assert same
    assert same_logits
    assert classes == 4
    assert tol == 1e-4
    assert "1 entries of features.deq1.direction are below 0" in refused


class TestCards:
    @pytest.mark.parametrize("checkpoint", checkpoints().values(), ids=list(checkpoints()))
    def test_card_says_what_was_measured(self, checkpoint: Checkpoint):
        row, variant, log = checkpoint.row, checkpoint.variant, read_jsonl(checkpoint.log)
        card = model_card(checkpoint, f"alice/{checkpoint.name}", "v7")
        accuracy, loss = card.data.eval_results
        assert accuracy.metric_value == pytest.approx(float(row["top1"]) / 100)
        assert loss.metric_value == float(row["nll"])
        assert accuracy.dataset_type == variant.dataset.hub_id
        assert "verif" not in card.content
        for text in (
            f"| {checkpoint.top1:.2f} | {row['paper_top1']} |",
            f"{variant.parameters:,} ({int(row['bytes']):,} bytes",
            f"an image took {row['evals_layers'].replace('/', ', ')} evaluations",
            f"{row['evals_max']} at most",
            f"proven error was {row['bound_max']};",
            f"| Seed, code | {row['seed']}, commit {row['commit']} |",
            f"| Hardware, time | {row['hardware']}, {row['hours']} hours |",
            f"| {log[-1]['train_loss']}, {log[-1]['train_top1']} % |",
            f"hf-hub:alice/{checkpoint.name}@v7",
            variant.dataset.terms,
        ):
            assert text in card.content

    def test_card_on_the_hub_parses(self, hub: Hub):
        card = ModelCard(hub.blob(f"{NAMESPACE}/{CHECKPOINT}", "README.md").read_text(encoding="utf-8"))
        assert card.data.to_dict()["library_name"] == "timm"
        assert card.data.eval_results[0].metric_value == pytest.approx(SHIPPED.top1 / 100)

    def test_collection_card(self):
        text = (ROOT / "MODEL_CARD.md").read_text(encoding="utf-8")
        metadata = yaml.safe_load(text.split("---")[1])
        trained = {checkpoint.variant.dataset.hub_id for checkpoint in checkpoints().values()}
        assert set(metadata["datasets"]) == trained


def test_torch_hub_from_github(tmp_path, images: Path, packaged):
    """A zip archive as GitHub makes it, through the real download, trust list and import.

    Without the packages that only the recipes and tests need.
    """
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs a git checkout, whose files make the archive")
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("OWNER-pcdeq-zoo-0123456/", "")  # as in GitHub's, the first entry is the folder
        for name in filter(None, listed.stdout.split("\0")):
            if name.startswith(("pcdeq_zoo/", "hubconf.py")) and (ROOT / name).is_file():
                archive.write(ROOT / name, f"OWNER-pcdeq-zoo-0123456/{name}")
    script = f"""
import sys
for name in ("accelerate", "pyarrow", "pytest", "onnx", "onnxruntime", "datasets", "tensorboard"):
    sys.modules[name] = None  # to import it raises
import json, torch
torch.hub._git_archive_link = lambda *args: {(tmp_path / "archive.zip").as_uri()!r}
settings = dict(trust_repo=True, skip_validation=True)
model = torch.hub.load("OWNER/pcdeq-zoo:v1", "{NAME}", pretrained=True, **settings).eval()
import pcdeq_zoo
with torch.inference_mode():
    found = model(torch.load(sys.argv[1], weights_only=True)["mnist"]).tolist()
names = torch.hub.list("OWNER/pcdeq-zoo:v1", **settings)
text = torch.hub.help("OWNER/pcdeq-zoo:v1", "{NAME}", **settings)
print(json.dumps([pcdeq_zoo.__file__, found, names, text]))
"""
    environment = os.environ | {"TORCH_HOME": str(tmp_path / "torch"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(images)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    file, found, names, text = json.loads(done.stdout.splitlines()[-1])
    assert Path(file).is_relative_to(tmp_path / "torch")
    assert torch.equal(torch.tensor(found), packaged[CHECKPOINT])
    assert sorted(names) == sorted(VARIANTS)
    assert "70,410 parameters" in text
