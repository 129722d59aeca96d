"""Documents that match the data and the code."""

import re
import subprocess
import sys

import pytest
from recipe_runs import ROOT

from pcdeq_zoo import VARIANTS
from tools import report

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", report.DOCUMENTS)
def test_tables_match_the_data(document: str):
    text = (ROOT / document).read_text(encoding="utf-8")
    assert any(f"<!-- {name} -->" in text for name in report.TABLES)
    assert report.updated(text) == text, "run python -m tools.report"


def test_readme_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    outside = ("digit.png", "theirs.pth", "path/to/", "NAMESPACE/", "you/")  # need what is the reader's
    runnable = [block for block in blocks if not any(name in block for name in outside)]
    assert len(runnable) == 3
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
        ("certified_digit", r"a 7, taken for a 7 with 9\d\.\d %\n(deq\d: .* unit proven within \d\.\de-04 .*\n){3}$"),
    ],
)
def test_examples_run(name: str, said: str):
    script = [sys.executable, "-W", "error", str(ROOT / "examples" / f"{name}.py")]
    done = subprocess.run(script, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert re.search(said, done.stdout)


def test_readme_names_models_and_commands_that_exist():
    assert set(re.findall(r"pcdeq[12]_\w+", README)) == set(VARIANTS)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make (\w+) {2,}#", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
    assert "exec make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
