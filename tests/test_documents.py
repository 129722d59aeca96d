"""Documents that match the data and the code."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from processes import ROOT, python

from pcdeq_zoo import VARIANTS
from tools import api, report

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", report.DOCUMENTS)
def test_tables_match_the_data(document: str):
    text = (ROOT / document).read_text(encoding="utf-8")
    assert any(f"<!-- {name} -->" in text for name in report.TABLES)
    assert report.updated(text) == text, "run python -m tools.report"


def test_the_reference_is_that_of_the_code():
    assert api.FILE.read_text(encoding="utf-8") == api.reference(), "run python -m tools.api"


def test_readme_examples_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    outside = ("digit.png", "theirs.pth", "path/to/", "NAMESPACE/", "you/")  # need what is the reader's
    runnable = [block for block in blocks if not any(name in block for name in outside)]
    assert len(runnable) == 5
    for block in runnable:
        exec(block, {})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own_net", r"accuracy (8[5-9]|9\d)\.\d % on 400 test images\nlayer 2: .* at most (1\.0e-03|\d\.\de-0[4-9])"),
        (
            "certified_robustness",
            r"^a 7 within ±0\.05 .*: proven, by a margin of \d\.\d\d; .*\n(.*\n)+7 +[─●]+ +\d\.\d\d",
        ),
        ("predict", r"^28x28 L, light on dark; what the net saw:\n([ ░▒▓█]+\n){10}7 9\d\.\d %, "),
        ("fine_tune", r"\n(6[5-9]|7[0-2]) of 72 held-out images right; classes: circle, square, triangle\n$"),
        ("saliency", r"^slope of the logit along its gradient: (\d\.\d\d\d), by differences \1\ndrew saliency\.png"),
        (
            "compare_solvers",
            r"^to 1e-3: plain iteration (1[5-9]|2\d) evaluations, this package (9|1[0-4])\.\d on average",
        ),
        pytest.param(
            "onnx_file",
            r"in onnxruntime: 39\d of 400 right, logits within \d\.\de-0[3-9] of PyTorch's\n$",
            marks=pytest.mark.skipif(
                torch.__version__ < (2, 11), reason="the ONNX exporter takes loops in PyTorch 2.11"
            ),
        ),
        ("certified_digit", r"a 7, taken for a 7 with 9\d\.\d %\n(deq\d: .* unit proven within \d\.\de-04 .*\n){3}$"),
    ],
)
def test_examples_run(name: str, said: str, tmp_path):
    """In a folder of their own, for what they write."""
    script = ROOT / "examples" / f"{name}.py"
    assert len(script.read_text().splitlines()) <= 60
    done = python(script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(said, done.stdout)


def test_a_digit_is_read_whatever_its_polarity_mode_and_size(tmp_path, sample):
    ink = Image.fromarray(sample[0][0, 0].numpy()).resize((150, 180))
    light, dark = (Image.new("L", ink.size, shade) for shade in (255, 0))
    pictures = {
        "inverted": Image.composite(dark, light, ink),
        "bilevel": Image.composite(dark, light, ink).convert("1"),
        "palette": Image.composite(dark, light, ink).convert("P"),
        "deep": Image.fromarray(np.asarray(ink).astype(np.uint16) * 200),
        "black on nothing": Image.merge("RGBA", [dark, dark, dark, ink]),
        "white on nothing": Image.merge("RGBA", [light, light, light, ink]),
    }
    sideways = pictures["inverted"].transpose(Image.Transpose.ROTATE_90)  # as a camera that was turned has it
    sideways.getexif()[0x0112] = 6
    pictures["turned"] = sideways
    files = [tmp_path / f"{name}.png" for name in pictures]
    for file, picture in zip(files, pictures.values(), strict=True):
        picture.save(file, exif=picture.getexif())
    script = ROOT / "examples" / "predict.py"
    done = python(script, *files)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^7 9\d\.\d %", done.stdout, re.M)) == len(pictures)
    assert re.findall("dark on light|light on dark", done.stdout) == [
        *["dark on light"] * 3,
        "light on dark",
        "dark on light",
        "light on dark",
        "dark on light",
    ]
    Image.new("L", (40, 40), 128).save(tmp_path / "empty.png")
    done = python(script, tmp_path / "empty.png")
    said = "there is nothing in the picture; wanted one digit on a plain ground"
    assert done.stderr == f"{tmp_path / 'empty.png'}: {said}\n"
    done = python(script, ROOT / "README.md")
    assert done.stderr == f"{ROOT / 'README.md'}: cannot identify image file '{ROOT / 'README.md'}'\n"


def test_links_lead_somewhere():
    files = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "MODEL_CARD.md", "CHANGELOG.md")]
    for file in [*files, *(ROOT / "docs").glob("*.md")]:
        text = re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (file.parent / link).exists(), f"{file.name}: {link}"


def test_readme_names_models_and_commands_that_exist():
    assert set(re.findall(r"pcdeq[12]_\w+", README)) == set(VARIANTS)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make (\w+) {2,}#", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
    assert "exec make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
