"""What maintainers run: shipping, and the report."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from recipe_runs import NAME, row_of
from safetensors.torch import load_file, save_file

from pcdeq_zoo import VARIANTS, weights
from pcdeq_zoo.weights import checkpoints, sha256, write_rows
from tools import report, ship


class TestShip:
    def test_refuses_a_run_measured_on_the_sample(self, run: Path):
        with pytest.raises(SystemExit, match=r"was measured on 400 images, not on the 10,000"):
            ship.ship(run)

    def test_refuses_an_unfinished_run(self, tmp_path):
        (tmp_path / "log.jsonl").touch()
        with pytest.raises(SystemExit, match=r"it has no model.safetensors, results.csv, run.json"):
            ship.ship(tmp_path)

    @pytest.fixture
    def whole(self, run: Path, tmp_path, monkeypatch) -> Path:
        """A run as if it had been measured on the whole test set, and an empty package to put it in."""
        monkeypatch.setattr(weights, "CHECKPOINTS", tmp_path)
        monkeypatch.setattr(ship, "RUNS", tmp_path / "runs")
        (tmp_path / "results.csv").write_text(",".join(weights.RESULT_COLUMNS) + "\n")
        whole = tmp_path / "whole"
        shutil.copytree(run, whole)
        write_rows(whole / "results.csv", [row_of(whole).row | {"n": "10000", "commit": "0123456789ab"}])
        settings = json.loads((whole / "run.json").read_text())
        settings |= {"images": 60000, "recipe": dataclasses.asdict(VARIANTS[NAME].recipes["paper"])}
        (whole / "run.json").write_text(json.dumps(settings))
        return whole

    def test_refuses_a_run_of_another_recipe_than_its_tag_says(self, whole: Path, run: Path, tmp_path):
        shutil.copy(run / "run.json", whole)
        with pytest.raises(SystemExit, match=r"recipe {'epochs': 2, .*, images 640, wanted 60000"):
            ship.ship(whole)
        assert not list(tmp_path.glob("*.safetensors"))

    @pytest.mark.parametrize(
        ("column", "value", "message"),
        [
            ("bound_max", "", "unproven equilibria: largest bound none, tol 0.001"),
            ("bound_max", "0.002", "unproven equilibria: largest bound 0.002, tol 0.001"),
            ("commit", "0123456789ab-dirty", "not trained by a commit of this code, but by 0123456789ab-dirty"),
        ],
    )
    def test_refuses_what_proves_nothing(self, whole: Path, column: str, value: str, message: str):
        write_rows(whole / "results.csv", [row_of(whole).row | {column: value}])
        with pytest.raises(SystemExit, match=message):
            ship.ship(whole)

    def test_writes_weights_log_row_and_logits(self, whole: Path, run: Path, tmp_path, monkeypatch, here, sample):
        assert ship.ship(whole).name == f"{NAME}.paper"
        assert checkpoints()[f"{NAME}.paper"].row["sha256"] == sha256(tmp_path / f"{NAME}.paper.safetensors")
        assert (tmp_path / f"{NAME}.paper.jsonl").read_bytes() == (run / "log.jsonl").read_bytes()
        recorded = json.loads((tmp_path / "runs" / f"{NAME}.paper.seed0.json").read_text())
        settings = json.loads((whole / "run.json").read_text())
        assert settings.pop("data")  # where it lay on this machine
        assert recorded == settings
        assert ship.ship(whole).name == f"{NAME}.paper"  # again: the same
        save_file({}, tmp_path / "logits.safetensors")
        monkeypatch.setattr(ship, "LOGITS", tmp_path / "logits.safetensors")
        assert here(ship.main, str(whole)).strip() == f"recorded {whole}, {NAME}.paper of seed 0"
        model = timm.create_model(
            NAME, pretrained=True, pretrained_cfg_overlay={"file": str(run / "model.safetensors")}
        )
        logits = load_file(tmp_path / "logits.safetensors")[f"{NAME}.paper"]
        model.solver.stop = "certified"
        assert torch.equal(logits, model.eval()(sample[0][:16].float() / 255))
        assert list(checkpoints()) == [f"{NAME}.paper"]
        (whole / "model.safetensors").write_bytes(b"other")
        with pytest.raises(SystemExit, match=r"is not the file that .* was measured on"):
            ship.ship(whole)

    def test_refuses_a_run_of_a_recipe_that_the_zoo_does_not_have(self, whole: Path):
        write_rows(whole / "results.csv", [row_of(whole).row | {"model": f"{NAME}.other"}])
        with pytest.raises(SystemExit, match=r"a model or a recipe that the zoo does not have: 'other'"):
            ship.ship(whole)

    def test_other_seeds_are_recorded_and_drawn_but_do_not_ship(self, whole: Path, tmp_path, monkeypatch, here):
        ship.ship(whole)
        first = row_of(whole)
        write_rows(whole / "results.csv", [first.row | {"seed": "1", "top1": str(first.top1 + 2)}])
        before = (tmp_path / "results.csv").read_bytes()
        monkeypatch.setattr(ship, "LOGITS", tmp_path / "logits.safetensors")
        assert here(ship.main, str(whole)).strip() == f"recorded {whole}, {NAME}.paper of seed 1"
        assert (tmp_path / "results.csv").read_bytes() == before
        assert not (tmp_path / "logits.safetensors").exists()  # nor are the logits expected of seed 0 made again
        assert [(run.name, run.seed) for run in ship.runs()] == [(f"{NAME}.paper", 0), (f"{NAME}.paper", 1)]
        assert f"| {first.top1 + 1:.2f} ± 1.41 (2 runs) |" in report.paper_table("mnist")
        ((group, networks),) = report.groups().items()
        assert group == "mnist-l-paper"
        report.draw(networks, tmp_path / "figure.svg")
        drawn = (tmp_path / "figure.svg").read_text()
        assert "<svg" in drawn

    def test_refuses_a_run_of_a_given_time(self, whole: Path):
        settings = json.loads((whole / "run.json").read_text())
        (whole / "run.json").write_text(json.dumps(settings | {"minutes": 12.0}))
        with pytest.raises(SystemExit, match=r"not a run of the recipe that its tag says: minutes 12.0, wanted None"):
            ship.ship(whole)


class TestComparison:
    @pytest.fixture(autouse=True)
    def _found(self, tmp_path, monkeypatch) -> None:
        """As if MNIST had been compared."""
        ours = {"top1": 99.0, "epochs": 8.0, "recipe": "zoo", "lr": 0.012, "updates": 3752, "train_s": 0.0345}
        ours |= {"solves": 4000, "unconverged": 2, "curve": [[30.0, 90.0], [60.0, 95.0]]}
        systems = {"pcdeq1_mc_relu6_mnist": ours, "node_mnist": {"top1": 95.5, "failed_runs": ["underflow"]}}
        found = {"mnist": {"minutes": 12.0, "machine": {}, "systems": systems}}
        (tmp_path / "compared.json").write_text(json.dumps(found))
        monkeypatch.setattr(report, "RESULTS", tmp_path / "compared.json")

    def test_the_tables_of_the_paper_have_what_came_out_here(self):
        lines = report.paper_table("mnist").splitlines()
        assert lines[0].endswith("| At equal time, 12 minutes, % |")
        assert "| NODE | 85,316 | 96.4 |  |  | 95.50 |" in lines
        assert "| monDEQ-L | 84,313 | 98.1 |  |  | – |" in lines
        assert any(line.startswith("| pcDEQ-1-MC-ReLU6 |") and line.endswith("| 99.00 |") for line in lines)
        assert any(line.startswith("| pcDEQ-1-MC-ReLU6* |") for line in report.paper_table("cifar").splitlines())
        assert "not trained |" in report.paper_table("cifar")

    def test_one_table_for_all(self):
        lines = report.equal_time().splitlines()
        assert lines[0] == "| Test accuracy, % | MNIST, 12 min |"
        assert "| NODE | 95.50 |" in lines
        assert "| pcDEQ-1-MC-ReLU6 | 99.00 |" in lines
        assert not any("*" in line for line in lines)

    def test_all_that_was_measured(self):
        lines = report.compared("mnist").splitlines()
        row = "| pcDEQ-1-MC-ReLU6 | 41,278 | 99.3 | 99.00 | `zoo` | 0.012 | 3,752 | 8.0 "
        assert f"{row}| – | – | – | 0.5 | 34.5 | – | – | 0 |" in lines
        assert any(line.startswith("| NODE | 85,316 | 96.4 | 95.50 |") and line.endswith("| 1 |") for line in lines)

    def test_a_figure(self, tmp_path):
        report.draw_comparison(report.comparison(), tmp_path / "figure.svg")
        assert "<svg" in (tmp_path / "figure.svg").read_text()
