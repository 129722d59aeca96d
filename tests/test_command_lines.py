"""Command lines that ask for what cannot be: one line says what was got and wanted, and nothing is written."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import config
import evaluate
import pytest
import sweep
import timm
import torch
import train
from PIL import Image
from processes import ROOT, python
from recipe_runs import NAME, SHORT
from timm.models._hub import save_for_hf

from pcdeq_zoo.errors import one_line
from pcdeq_zoo.publish import PublishError, publish

BIG = 10**20

PARSERS = {
    "train": lambda: config.make_parser(train.__doc__),
    "evaluate": evaluate.make_parser,
    "sweep": sweep.make_parser,
}


@pytest.mark.parametrize("name", PARSERS)
def test_help_comes_at_once_and_is_that_of_the_parser(name: str):
    """It is printed from a file, as an import of PyTorch takes seconds; `python -m tools.report` writes it."""
    script = ROOT / "recipes" / f"{name}.py"
    done = subprocess.run([sys.executable, "-X", "importtime", script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "torch" not in done.stderr
    told, parser = " ".join(done.stdout.split()), PARSERS[name]()
    usage = told.split(parser.description.split()[0])[0]
    flags = {option for action in parser._actions for option in action.option_strings} - {"-h", "--help"}
    assert set(re.findall(r"(?<=[ [(])--[a-z-]+", usage)) == flags
    assert all(" ".join((action.help or "").split()) in told for action in parser._actions)
    assert " ".join(parser.description.split()) in told


def test_what_others_errors_say_is_one_line_that_can_be_read():
    assert one_line(ValueError("no such\n  thing")) == "no such thing"
    assert one_line(ValueError()) == "ValueError"
    long = one_line(ValueError("x" * 10_000))
    assert long.rstrip("…") == "x" * 500
    assert long.endswith("…")


TRAIN = [
    ("--epochs 0", "argument --epochs: must be above 0 and below 10000, got 0"),
    ("--epochs two", "argument --epochs: invalid int value: 'two'"),
    (f"--epochs {BIG}", f"argument --epochs: must be above 0 and below 10000, got {BIG}"),
    ("--lr -1", "argument --lr: must be above 0, got -1.0"),
    ("--lr nan", "argument --lr: must be above 0, got nan"),
    ("--lr inf", "argument --lr: must be above 0, got inf"),
    ("--weight-decay -1", "argument --weight-decay: must be at least 0, got -1.0"),
    ("--batch-size 0", "argument --batch-size: must be above 0 and below 1048576, got 0"),
    (f"--batch-size {BIG}", f"argument --batch-size: must be above 0 and below 1048576, got {BIG}"),
    (f"--grad-accum {BIG}", f"argument --grad-accum: must be above 0 and below 1048576, got {BIG}"),
    ("--stop proven", "argument --stop: invalid choice: 'proven'"),
    ("--tol 0", "argument --tol: must be above 0, got 0.0"),
    ("--warmup 1", "argument --warmup: must be above 0 and below 1, got 1.0"),
    ("--ema-decay 1", "argument --ema-decay: must be at least 0 and below 1, got 1.0"),
    ("--label-smoothing -0.1", "argument --label-smoothing: must be at least 0 and below 1, got -0.1"),
    ("--seed -1", "argument --seed: must be at least 0 and below 4294967296, got -1"),
    ("--seed 4294967296", "argument --seed: must be at least 0 and below 4294967296, got 4294967296"),
    (f"--seed {'9' * 400}", "argument --seed: must be at least 0 and below 4294967296, got 999"),
    ("--save-every 0", "argument --save-every: must be above 0 and below"),
    ("--limit-train 0", "argument --limit-train: must be above 0 and below 2147483648, got 0"),
    ("--limit-train 1", "a batch needs 2 images, one per process and two for BatchNorm; got"),
    ("--limit-train 1601", "--limit-train 1601 is more than the 1600 images to train on"),
    ("--hold-out 1600", "--hold-out 1600 leaves nothing of 1600 training images"),
    ("--processes 2", "launched as 2 processes, but accelerate runs 1 here"),
    ("--mixed-precision fp16", "argument --mixed-precision: invalid choice: 'fp16'"),
    ("--report-to wandb", "argument --report-to: invalid choice: 'wandb'"),
    ("--resume /no/such/state", "no state /no/such/state to resume from; --resume alone takes the newest of"),
    ("--model resnet18", "unknown model resnet18; the zoo has pcdeq1_l_relu6_mnist, "),
    ("--model pcdeq1_mc_tanh_cifar", "no CIFAR-10 sample ships with the package"),
    ("--data /no/such/folder", "no data folder /no/such/folder"),
    ("--output FILE", "is no folder for a run: Not a directory"),
    ("--output FILE/below", "(is no folder for a run|cannot write to .*): Not a directory"),
    ("--output LOOP", "(is no folder for a run|cannot write to .*): (File exists|Too many levels of symbolic links)"),
    (f"--output {'x' * 300}", "(is no folder for a run|cannot write to .*): File name too long"),
    ("--channels 0", "argument --channels: must be above 0 and below 65536, got 0"),
    ("--channels 8 16", f"no {NAME}: structure 'l' takes one width, got (8, 16)"),
    ("--nonsense", "unrecognized arguments: --nonsense"),
    ("--see 3", "unrecognized arguments: --see 3"),  # no short for --seed, which a sweep would not know
]


def one_line_only(message: str) -> None:
    assert "\n" not in message
    assert "Traceback" not in message


@pytest.mark.parametrize(("arguments", "message"), TRAIN)
def test_train(tmp_path, refuse, arguments: str, message: str):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    arguments = arguments.replace("FILE", str(tmp_path / "file")).replace("LOOP", str(tmp_path / "loop"))
    line = refuse(train.main, f"--model {NAME} --data sample --output {tmp_path / 'run'} {arguments}")
    one_line_only(line)
    assert message in line or re.search(message, line)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_MIXED_PRECISION", "foo", "accelerate: |mixed precision must be no or bf16"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "mixed precision must be no or bf16, accelerate is set to 'fp16'"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "accelerate: |mixed precision must be no or bf16"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "set to accumulate 4 gradients, .*; say --grad-accum instead"),
    ],
)
def test_train_under_settings_of_accelerate(tmp_path, variable: str, value: str, message: str):
    """In a process of its own: accelerate remembers what it saw first."""
    done = python(*f"recipes/train.py {SHORT} --output {tmp_path / 'run'}".split(), env=os.environ | {variable: value})
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.search(message, done.stderr.splitlines()[-1])
    assert not (tmp_path / "run").exists()


def test_evaluation_is_float32_whatever_accelerate_is_set_to(here):
    """In a process of its own, as above."""
    arguments = f"--model {NAME} --data sample"
    set_to = os.environ | {"ACCELERATE_MIXED_PRECISION": "fp8"}  # an error where it is heard
    done = python("recipes/evaluate.py", *arguments.split(), env=set_to)
    assert done.stdout == here(evaluate.main, arguments)


EVALUATE = [
    ("--model resnet18", "unknown model 'resnet18'; the zoo has "),
    ("--model=", "unknown model ''; the zoo has "),
    ("--model :", "unknown model ':'; the zoo has "),
    ("--model /", "unknown model '/'; the zoo has "),
    ("--model @", "unknown model '@'; the zoo has "),
    ("--model hf-hub:", "no model 'hf-hub:': "),
    ("--model local-dir:/no/such/folder", "no model 'local-dir:/no/such/folder': "),
    ("--model local-dir:FOLDER", "is not of this zoo, whose models this measures: "),
    (f"--model {NAME} --batch-size 0", "--batch-size must be above 0"),
    (
        "--model pcdeq1_mc_tanh_svhn.zoo",
        "no weights of pcdeq1_mc_tanh_svhn.zoo ship; there are pcdeq1_l_relu6_mnist.zoo, ",
    ),
    ("--model pcdeq1_sc_tanh_cifar", "there are no weights of pcdeq1_sc_tanh_cifar.zoo yet"),
    (f"--model {NAME} --data /no/such/folder", "no data folder /no/such/folder"),
    (f"--model {NAME} --checkpoint /no/such/file", "there is no file /no/such/file"),
    ("--model local-dir:FOLDER --checkpoint FOLDER/x", "--checkpoint goes with a name in the zoo: local-dir:/"),
    (f"--model {NAME} --output /no/such/folder/row.csv", "there is no folder /no/such/folder"),
    (f"--model {NAME} --output FOLDER/row.txt", "wanted a name that ends in .csv"),
    (f"--model {NAME} --output FOLDER/theirs.csv", "there is a file that this program did not write"),
    (f"--model {NAME} --output FOLDER/link.csv", "there is something else of that name"),
    (f"--model {NAME} --output FOLDER/folder.csv", "there is something else of that name"),
    ("--run FOLDER", "is not a run of train.py: it has no run.json"),
    ("--run FOLDER/begun", "is not finished: it has no model.safetensors; go on with train.py --resume"),
    ("--run FOLDER --checkpoint FOLDER/x", "--checkpoint, --eps and --output go with --model"),
    (f"--run FOLDER --model {NAME}", "argument --model: not allowed with argument --run"),
    ("", "one of the arguments --model --run is required"),
]


@pytest.mark.parametrize(("arguments", "message"), EVALUATE)
def test_evaluate(tmp_path, refuse, arguments: str, message: str):
    (tmp_path / "theirs.csv").write_text("a document")
    (tmp_path / "link.csv").symlink_to(tmp_path / "theirs.csv")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "run.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"architecture": "resnet18", "pretrained_cfg": {"num_classes": 10}}')
    line = refuse(evaluate.main, arguments.replace("FOLDER", str(tmp_path)))
    one_line_only(line)
    assert message in line
    assert (tmp_path / "theirs.csv").read_text() == "a document"


def test_a_net_of_other_classes_is_not_measured(tmp_path, refuse):
    save_for_hf(timm.create_model(NAME, num_classes=3), tmp_path / "three", safe_serialization=True)
    line = refuse(evaluate.main, f"--model local-dir:{tmp_path / 'three'} --data sample")
    assert "has 3 classes and images of (1, 28, 28), MNIST 10 and (1, 28, 28)" in line


def test_none_is_a_value_of_a_setting_that_may_have_none():
    given = ["--model", NAME, "--recipe", "paper", "--lr-decay-epoch", "none", "--images", "none"]
    recipe = config.parse("", given)[1]
    assert (recipe.lr_decay_epoch, recipe.images) == (None, None)


SWEEP = [
    ("resnet*", "no model matches resnet*; the zoo has "),
    ("pcdeq1_*_tanh_mnist --recipe robust_0.3", "pcdeq1_l_tanh_mnist has no recipe robust_0.3; it has "),
    ("*_l_* --jobs 0", "--jobs must be above 0, got 0"),
    ("*_l_* --threads 0", "--threads must be above 0, got 0"),
    ("*_l_* --seeds -1", "--seeds must be at least 0 and below 4294967296, got -1"),
    ("*_l_* --seeds 4294967296", "--seeds must be at least 0 and below 4294967296, got 4294967296"),
    *(
        (f"*_l_* -- {flag}", f"{flag.split()[0]} is what a sweep says itself; it cannot follow --")
        for flag in ("--seed 7", "--seed=7", "--model x", "--recipe zoo", "--output x", "--resume")
    ),
]


@pytest.mark.parametrize(("arguments", "message"), SWEEP)
def test_sweep(tmp_path, monkeypatch, refuse, arguments: str, message: str):
    monkeypatch.chdir(tmp_path)
    line = refuse(sweep.main, arguments)
    one_line_only(line)
    assert message in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "tag", ["", "main", "HEAD", "..", "a..b", "-x", ".x", "x.", "x.lock", "a/b", "a b", "ä\n", "v1\n"]
)
def test_publish_takes_no_such_tag(tag: str):
    with pytest.raises(PublishError, match=r"^a tag is letters, digits, ") as caught:
        publish("alice", "pcdeq1_l_tanh_*", tag, dry_run=True)
    one_line_only(str(caught.value))


@pytest.mark.parametrize("tag", ["v0.1.0", "v0.1.0-rc1", "1", "x_y"])
def test_publish_takes_such_a_tag(tag: str, capsys):
    publish("alice", "pcdeq1_l_tanh_*", tag, dry_run=True)
    assert f"tag {tag}:" in capsys.readouterr().out


class TestDamagedRuns:
    """A finished run whose files are no longer what was written."""

    @pytest.fixture
    def copy(self, run: Path, tmp_path) -> Path:
        return Path(shutil.copytree(run, tmp_path / "run"))

    RESUME = (train.main, f"{SHORT} --resume --output ")
    MEASURE = (evaluate.main, "--data sample --run ")

    @pytest.mark.parametrize(
        ("recipe", "file", "content", "message"),
        [
            (RESUME, "run.json", b"", "run.json is not what train.py wrote: Expecting value"),
            (RESUME, "run.json", b"[]", "run.json is not what train.py wrote: it holds a list"),
            (RESUME, "run.json", b"\xff\xfe", "run.json is not what train.py wrote: "),
            (RESUME, "run.json", b"{}", "holds a run with other settings: model None there"),
            (RESUME, "results.csv", b"", "results.csv is not what train.py wrote; remove it to measure again"),
            (RESUME, "results.csv", b"model\nresnet18.paper\n", "results.csv is not what train.py wrote; remove it"),
            (RESUME, "model.safetensors", b"garbage", "is not the file that results.csv was measured on; remove"),
            (MEASURE, "run.json", b"{}", "is not what train.py wrote: KeyError: 'model'"),
            (MEASURE, "run.json", b'{"model": "resnet18"}', "is not what train.py wrote: KeyError: 'resnet18'"),
            (MEASURE, "run.json", b'{"model": "pcdeq1_l_tanh_mnist", "hold_out": "x"}', "wrote: ValueError: "),
            (MEASURE, "log.jsonl", b"{", "is not what train.py wrote: JSONDecodeError"),
            (MEASURE, "log.jsonl", b"3\n", "is not what train.py wrote: TypeError"),
            (MEASURE, "model.safetensors", b"garbage", "is not a readable checkpoint: got 7 bytes"),
        ],
    )
    def test_refused(self, copy: Path, refuse, recipe: tuple, file: str, content: bytes, message: str):
        (copy / file).write_bytes(content)
        main, arguments = recipe
        line = refuse(main, f"{arguments}{copy}")
        one_line_only(line)
        assert message in line
        assert (copy / file).read_bytes() == content

    def test_one_without_its_row_is_measured_again(self, copy: Path, here):
        before = (copy / "results.csv").read_bytes()
        (copy / "results.csv").unlink()
        assert "accuracy" in here(train.main, f"{SHORT} --output {copy} --resume")
        assert (copy / "results.csv").read_bytes() == before


def test_a_failed_start_leaves_no_run(tmp_path, monkeypatch, here, refuse):
    run = tmp_path / "run"

    def fail(*args: object, **kwargs: object) -> None:
        raise SystemExit("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(train.timm, "create_model", fail)
        assert refuse(train.main, f"{SHORT} --output {run}") == "no memory"
    here(train.main, f"{SHORT} --epochs 1 --output {run}")
    assert (run / "results.csv").exists()


@pytest.mark.filterwarnings("ignore::pcdeq_zoo.ConvergenceWarning")
def test_a_run_that_diverges_ends(tmp_path, refuse):
    """At the first loss that is no number, with the last good state, and so again when it is resumed."""
    run = tmp_path / "run"
    arguments = f"--model {NAME} --data sample --limit-train 640 --epochs 3 --save-every 1 --lr 1e30 --output {run}"
    line = refuse(train.main, arguments)
    one_line_only(line)
    assert line.startswith("epoch 1, step ")
    assert "try another --lr in another --output" in line
    assert not (run / "model.safetensors").exists()
    log = run / "log.jsonl"
    assert not log.exists() or all(json.loads(text) for text in log.read_text().splitlines())
    again = refuse(train.main, f"{arguments} --resume")
    assert "so the run ends here" in again


def test_a_name_that_the_terminal_cannot_show(tmp_path, run: Path):
    """The training is finished, and must end well, whatever the folder is called."""
    folder = tmp_path / "häll-日本"
    shutil.copytree(run, folder)
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    command = [sys.executable, *f"recipes/train.py {SHORT} --output {folder} --resume".split()]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "is finished" in done.stdout


class TestScriptsOfTimm:
    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return python("-m", "pcdeq_zoo.timm", *arguments)

    def test_a_script_finds_the_models_its_arguments_and_its_neighbours(self, tmp_path):
        (tmp_path / "neighbour.py").write_text("NAME = 'pcdeq1_l_tanh_mnist'")
        (tmp_path / "script.py").write_text(
            "import sys, timm, neighbour\n"
            "if __name__ == '__main__':\n"
            "    print(type(timm.create_model(neighbour.NAME)).__name__, sys.argv[1:])\n"
            "    sys.exit(3)\n"
        )
        done = self.run(tmp_path / "script.py", "--lr", "0.1")
        assert done.stdout == "PcDEQ ['--lr', '0.1']\n", done.stderr
        assert done.returncode == 3

    def test_no_script(self):
        assert self.run("nothing.py").stderr.startswith("there is no script nothing.py; timm's are in a checkout of ")
        assert self.run().stderr == "which script?\n"
        assert "python -m pcdeq_zoo.timm" in self.run("--help").stdout

    @pytest.mark.skipif("PCDEQ_TIMM" not in os.environ, reason="$PCDEQ_TIMM names no checkout of timm's repository")
    def test_timms_own_scripts(self, tmp_path):
        """An epoch of train.py on noise, and validate.py of what it leaves."""
        timm_folder = Path(os.environ["PCDEQ_TIMM"])
        for split in ("train", "validation"):
            for label in ("a", "b"):
                (tmp_path / "data" / split / label).mkdir(parents=True)
                for i in range(8):
                    noise = torch.randint(256, (32, 32, 3), dtype=torch.uint8).numpy()
                    Image.fromarray(noise).save(tmp_path / "data" / split / label / f"{i}.png")
        common = ["--data-dir", tmp_path / "data", "--model", "pcdeq1_mc_relu6_cifar", "--num-classes", "2", "-b", "4"]
        common += ["--workers", "0", "--device", "cpu"]
        done = self.run(timm_folder / "train.py", *common, "--epochs", "1", "--output", tmp_path, "--experiment", "run")
        assert done.returncode == 0, done.stderr
        weights = tmp_path / "run" / "last.pth.tar"
        done = self.run(timm_folder / "validate.py", *common, "--checkpoint", weights)
        assert done.returncode == 0, done.stderr
        assert '"top1"' in done.stdout
