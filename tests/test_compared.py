"""The systems that the paper compares with: what they compute, and that the recipes train them."""

import copy
import csv
import json
import os
import re
import subprocess
import sys
import threading
import time

import psutil
import pytest
import timm
import torch
import torch.nn.functional as F
import train
from processes import ROOT, python
from recipe_runs import log_of
from run_folder import newest_state
from torch import Tensor, nn

from benchmarks.compare import BREAKDOWN, MINUTES, SYSTEMS, Candidate, Harness, candidates, curve
from benchmarks.compared import VARIANTS as OTHERS
from benchmarks.compared import ode
from benchmarks.compared.mondeq import Circular, Dense, MonotoneEquilibrium, MultiTier, SplittingSolver
from benchmarks.compared.ode import ODEFlow, ODESolver, Velocity
from benchmarks.tables import compared
from pcdeq_zoo import VARIANTS, ConvergenceError, ConvergenceWarning, record_solves
from pcdeq_zoo.files import read_jsonl

OPERATORS = {
    "dense": (lambda: Dense(7, m=0.4), [(7,)]),
    "circular": (lambda: Circular(3, 6, m=0.4), [(3, 6, 6)]),
    "multitier": (lambda: MultiTier((2, 3, 2), (10, 6, 4), m=0.4), [(2, 10, 10), (3, 6, 6), (2, 4, 4)]),
}


def operator_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    operator = OPERATORS[kind][0]().double()
    with torch.no_grad():
        for parameter in operator.parameters():
            parameter.mul_(2.0 if parameter.ndim == 0 else 1.5)
    return operator


def join(state) -> Tensor:
    return torch.cat([part.flatten(1) for part in state], 1)


def split(vector: Tensor, kind: str):
    sizes = [torch.Size(shape).numel() for shape in OPERATORS[kind][1]]
    parts = zip(vector.split(sizes, 1), OPERATORS[kind][1], strict=True)
    return tuple(part.reshape(-1, *shape) for part, shape in parts)


def dense(operator: nn.Module, kind: str) -> Tensor:
    """W as a matrix."""
    size = sum(torch.Size(shape).numel() for shape in OPERATORS[kind][1])
    with torch.no_grad():
        return join(operator(split(torch.eye(size, dtype=torch.float64), kind))).T


@pytest.mark.parametrize("kind", OPERATORS)
def test_the_operator_is_strongly_monotone_and_its_transpose_is_that(kind: str):
    operator = operator_of(kind)
    matrix = dense(operator, kind)
    symmetric = torch.eye(len(matrix)) - (matrix + matrix.T) / 2
    assert torch.linalg.eigvalsh(symmetric).min() > 0.4 - 1e-12
    assert (matrix - matrix.T).abs().max() > 0.1
    with torch.no_grad():
        transpose = join(operator(split(torch.eye(len(matrix), dtype=torch.float64), kind), transpose=True)).T
    torch.testing.assert_close(transpose, matrix.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("kind", OPERATORS)
def test_the_resolvent_is_the_dense_inverse(kind: str, alpha: float):
    operator = operator_of(kind)
    matrix = dense(operator, kind)
    inverse = torch.linalg.inv(torch.eye(len(matrix)) + alpha * (torch.eye(len(matrix)) - matrix))
    z = torch.randn(3, len(matrix), dtype=torch.float64)
    with torch.no_grad():
        resolvent = operator.resolvent(alpha)
        for transpose, expected in ((False, inverse), (True, inverse.T)):
            found = join(resolvent(split(z, kind), transpose))
            torch.testing.assert_close(found, z @ expected.T, rtol=0, atol=1e-11)


def equilibrium_of(kind: str, splitting="peaceman_rachford", alpha=1.0, **settings) -> MonotoneEquilibrium:
    solver = SplittingSolver(**{"tol": 1e-13, "max_evals": 5000, "splitting": splitting, **settings})
    layer = MonotoneEquilibrium(operator_of(kind), solver, border=0 if kind == "dense" else 1).double().eval()
    layer.alpha.fill_(alpha)
    return layer


@pytest.mark.parametrize("splitting", ["peaceman_rachford", "forward_backward"])
@pytest.mark.parametrize("kind", OPERATORS)
def test_the_equilibrium_is_the_only_one(kind: str, splitting):
    """Plain steps with the dense W, short enough to converge, end there from wherever they start."""
    layer = equilibrium_of(kind, splitting, alpha=0.05 if splitting == "forward_backward" else 1.0)
    matrix = dense(layer.operator, kind)
    b = torch.randn(4, len(matrix), dtype=torch.float64)
    mask = join([layer._mask(part).expand(4, *part.shape[1:]) for part in split(b, kind)])
    found = join(layer(split(b, kind)))
    assert (found > 0).any()
    assert ((found == 0) | (mask > 0)).all()
    for start in (torch.zeros_like(b), 10 * torch.rand_like(b), -torch.ones_like(b)):
        z = start
        for _ in range(3000):
            z = F.relu((1 - 0.05) * z + 0.05 * (z @ matrix.T + b)) * mask
        torch.testing.assert_close(found, z, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", OPERATORS)
def test_the_gradient_of_the_equilibrium_is_that_of_finite_differences(kind: str):
    layer = equilibrium_of(kind)
    size = sum(torch.Size(shape).numel() for shape in OPERATORS[kind][1])
    b = torch.randn(2, size, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, size, dtype=torch.float64)
    inputs = [b, *layer.parameters()]

    def loss() -> Tensor:
        return (join(layer(split(b, kind))) * weights).sum()

    gradients = torch.autograd.grad(loss(), inputs)
    for value, gradient in zip(inputs, gradients, strict=True):
        direction = torch.randn_like(value)
        with torch.no_grad():
            value.add_(1e-6 * direction)
            above = loss()
            value.sub_(2e-6 * direction)
            below = loss()
            value.add_(1e-6 * direction)
        expected = (above - below) / 2e-6
        torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-5, atol=1e-6)


def test_a_splitting_that_does_not_converge_is_said_and_counted():
    layer = equilibrium_of("dense", "forward_backward", alpha=1.0, max_evals=20)
    with torch.no_grad():
        layer.operator.B.weight.mul_(20)
    model = nn.Sequential(layer)
    b = torch.randn(5, 7, dtype=torch.float64)
    with record_solves(model) as solves, pytest.warns(ConvergenceWarning, match="5 of 5 samples did not reach"):
        model[0]((b,))
    assert solves[0].status.tolist() == [1] * 5
    assert solves[0].evaluations.tolist() == [20] * 5
    layer.solver.on_failure = "raise"
    with pytest.raises(ConvergenceError, match="after 20 evaluations"):
        model[0]((b,))


def test_alpha_is_tuned_in_training_to_take_fewer_iterations_than_at_first():
    layer = equilibrium_of("circular", tol=1e-3)
    with torch.no_grad():
        layer.operator.h.fill_(20.0)
    b = (torch.randn(2, 3, 6, 6, dtype=torch.float64),)
    with record_solves(layer) as before:
        layer(b)
    layer.train()
    for _ in range(layer.first_tuning):
        layer(b)
    assert layer.alpha < 1
    with record_solves(layer) as after:
        layer.eval()(b)
    assert after[0].evaluations[0] < before[0].evaluations[0]


def test_the_gradient_of_the_flow_is_that_of_fine_steps_unrolled():
    torch.manual_seed(0)
    flow = ODEFlow(Velocity(2, 4), ODESolver(tol=1e-6, max_steps=10_000)).double()
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(x)
    inputs = [x, *flow.parameters()]
    with record_solves(flow) as solves:
        found = torch.autograd.grad((flow(x) * weights).sum(), inputs)
    assert [solve.direction for solve in solves] == ["forward", "backward"]
    assert all((solve.evaluations > 6).all() for solve in solves)

    velocity, z, h = copy.deepcopy(flow.velocity), x, 1 / 200
    for step in range(200):  # the midpoint method
        t = torch.tensor(step * h, dtype=torch.float64)
        z = z + h * velocity(t + h / 2, z + h / 2 * velocity(t, z))
    expected = torch.autograd.grad((z * weights).sum(), [x, *velocity.parameters()])
    for gradient, other in zip(found, expected, strict=True):
        assert (gradient - other).norm() < 1e-2 * other.norm()  # relu's kinks make fixed steps one of first order


def test_an_ode_that_takes_too_many_steps_is_an_error():
    flow = ODEFlow(Velocity(1, 2), ODESolver(tol=1e-7, max_steps=2))
    with pytest.raises(ConvergenceError, match="could not be solved to 1e-07 in 2 steps: max_num_steps exceeded"):
        flow(torch.rand(2, 1, 4, 4))


@pytest.mark.parametrize("name", OTHERS)
def test_the_number_of_parameters(name: str):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == OTHERS[name].parameters


def test_they_are_those_of_the_paper_in_its_sizes(paper_tables):
    rows = {(row["dataset"], row["method"]): row for row in paper_tables["compared_methods"]}
    assert len(rows) == len(OTHERS)
    for variant in OTHERS.values():
        row = rows[variant.dataset.title, variant.paper_name]
        size = float(row["paper_parameters"].replace("K", "e3").replace("M", "e6"))
        assert abs(variant.parameters - size) <= 0.05 * size
        assert row["paper_accuracy"] == variant.paper_accuracy


@pytest.mark.parametrize("name", ["node_mnist", "anode_cifar", "mondeq_l_mnist", "mondeq_sc_svhn", "mondeq_mt_cifar"])
def test_a_training_step(name: str):
    variant = OTHERS[name]
    model = timm.create_model(name, tol=variant.recipes["published"].tol).train()
    with record_solves(model) as solves:
        loss = F.cross_entropy(model(torch.rand(2, *variant.dataset.input_size)), torch.tensor([1, 2]))
        loss.backward()
    assert {solve.direction for solve in solves} == {"forward", "backward"}
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_the_recipes_train_and_resume_them_for_a_given_time(tmp_path, monkeypatch):
    """Killed in the middle of an epoch; afterwards the log of steps knows of none twice, and the clock went on."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run = tmp_path / "run"
    arguments = f"recipes/train.py --module benchmarks.compared --model mondeq_l_mnist --data sample --output {run} "
    arguments += "--minutes 0.05 --log-every 5 --save-every 5 --batch-size 32 --resume --cpu"
    first = subprocess.Popen([sys.executable, *arguments.split()], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not list(run.glob("state/epoch-*")):
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()
    first.wait()
    second = python(*arguments.split())
    assert second.returncode == 0, second.stderr
    assert "resumed from" in second.stdout

    lines = read_jsonl(run / "steps.jsonl")
    where = [(line["epoch"], line["step"]) for line in lines]
    assert where == sorted(set(where))
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
    log = log_of(run)
    assert log[-1]["lr"] == pytest.approx(1e-6)  # three drops, as in 40 epochs
    assert [line["images"] for line in log[:-1]] == [1600] * (len(log) - 1)
    assert 0 < log[-1]["images"] <= 1600
    (row,) = csv.DictReader((run / "results.csv").read_text().splitlines())
    assert row["model"] == "mondeq_l_mnist.published"
    assert float(row["epochs"]) == round(sum(line["images"] for line in log) / 1600, 2)
    assert float(row["top1"]) > 60
    assert (row["tol"], row["bound_max"]) == ("0.01", "")
    assert float(row["evals_mean"]) > 1


def test_the_recipes_train_an_ode(tmp_path, monkeypatch):
    """In a process of its own: what an import has done in another test does not count."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run = tmp_path / "run"
    arguments = f"recipes/train.py --module benchmarks.compared --model anode_mnist --data sample --output {run} --cpu "
    arguments += "--epochs 1 --limit-train 32 --batch-size 16 --hold-out 16"
    done = python(*arguments.split())
    assert done.returncode == 0, done.stderr
    (line,) = log_of(run)
    assert line["evaluations"]["flow forward"] > 6
    assert line["evaluations"]["flow backward"] > 6
    (row,) = csv.DictReader((run / "held_out.csv").read_text().splitlines())
    assert (row["n"], row["model"]) == ("16", "anode_mnist.published")


def test_the_recipes_train_a_network_that_solves_nothing(tmp_path, monkeypatch):
    """Of a module of one's own, with one step of an explicit net; there is nothing to say of evaluations."""
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\n"
        "from timm.models import build_model_with_cfg, register_model\n"
        "from torch import nn\n"
        "from pcdeq_zoo import VARIANTS as OURS\n"
        "class Explicit(nn.Sequential):\n"
        "    def __init__(self, **unused):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(784, 10))\n"
        "@register_model\n"
        "def explicit_mnist(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, **arguments):\n"
        "    cfg = dict(architecture='explicit_mnist', crop_pct=1.0, interpolation='bilinear')\n"
        "    cfg |= pretrained_cfg_overlay or {}\n"
        "    return build_model_with_cfg(Explicit, 'explicit_mnist', pretrained, pretrained_cfg=cfg)\n"
        "VARIANTS = {'explicit_mnist': replace(OURS['pcdeq1_l_tanh_mnist'], name='explicit_mnist')}\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(tmp_path)]))
    run = tmp_path / "run"
    arguments = f"recipes/train.py --module mine --model explicit_mnist --data sample --output {run} --epochs 1 --cpu"
    done = python(*arguments.split())
    assert done.returncode == 0, done.stderr
    (line,) = log_of(run)
    assert (line["evaluations"], line["unconverged"]) == ({}, 0)
    (row,) = csv.DictReader((run / "results.csv").read_text().splitlines())
    assert (row["evals_mean"], row["evals_max"], row["bound_max"], row["tol"]) == ("", "", "", "")
    assert float(row["top1"]) > 50
    measured = (run / "results.csv").read_bytes()
    (run / "results.csv").unlink()
    measure = ["recipes/evaluate.py", f"--run={run}"]
    unknown = python(*measure)  # nobody's run.json says what to import
    assert unknown.stderr == f"{run} is of a network of mine; say --module mine to import that\n"
    again = python(*measure, "--module=mine")
    assert again.returncode == 0, again.stderr
    assert (run / "results.csv").read_bytes() == measured


def test_a_setting_that_a_network_of_a_module_does_not_know(tmp_path):
    arguments = f"--module benchmarks.compared --model mondeq_l_mnist --data sample --output {tmp_path / 'run'}"
    done = python("recipes/train.py", *arguments.split(), "--stop", "certified")
    assert re.search(r"^no mondeq_l_mnist: .* unexpected keyword argument 'stop'$", done.stderr)


def test_a_module_that_is_none(refuse):
    for name, reason in (
        ("nothing", "No module named 'nothing'"),
        ("json", "module 'json' has no attribute 'VARIANTS'"),
    ):
        line = refuse(train.main, f"--module {name} --model x")
        assert line == f"--module {name}: {reason}; wanted a module with VARIANTS, see PYTHONPATH"


def test_without_torchdiffeq_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(ode, "odeint_adjoint", None)
    with pytest.raises(ImportError, match=r"^neural ODEs need torchdiffeq: pip install torchdiffeq==0\.2\.5$"):
        timm.create_model("node_mnist")


def test_a_harness_says_what_broke_down_and_takes_the_rest(tmp_path, monkeypatch):
    harness = Harness(tmp_path, 1.0, None)
    variant = OTHERS["mondeq_l_mnist"]
    calls, said = [], "AssertionError: underflow in dt 0.0"

    class Training:
        def __init__(self, command, stdout, stderr, env):
            calls.append(command)
            stdout.write(f"epoch 1\n{said}\n")

        def wait(self) -> int:
            return int("--lr=0.003" in calls[-1])

    monkeypatch.setattr("subprocess.Popen", Training)
    for _ in range(2):
        harness.train(variant, "trial", Candidate("published", 0.003))
    harness.train(variant, "trial", Candidate("published", 0.001))
    assert len(calls) == 2  # what broke down is not tried again
    found = harness.collect(variant)
    assert found["failed_runs"] == [said]
    table = compared({"minutes": 12, "systems": {variant.name: found}}, [variant])
    assert table.splitlines()[2].startswith("| monDEQ-L | 84,313 | 98.1 | – | – |")
    assert table.splitlines()[2].endswith("| 1 |")

    said = "no data: no data folder nowhere"  # which is not held against the system
    with pytest.raises(SystemExit, match=rf"time-published-0\.003 ended, start this again to go on: {said}$"):
        harness.train(variant, "time", Candidate("published", 0.003))
    assert harness.collect(variant)["failed_runs"] == found["failed_runs"]


def test_a_harness_that_is_ended_ends_its_trainings(tmp_path, whole_test_set):
    whole_test_set("mnist")  # or skip
    arguments = ["-m", "benchmarks.compare", "mondeq_l_mnist", f"--runs={tmp_path}"]
    harness = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("*/steps.jsonl")):
        assert harness.poll() is None
        time.sleep(0.01)
    (training,) = psutil.Process(harness.pid).children()
    harness.terminate()
    assert "this was ended, and so are its trainings; start it again to go on" in harness.communicate()[1]
    assert not training.is_running()
    assert newest_state(next(tmp_path.glob("*/"))) is not None
    assert not list(tmp_path.glob("*.failed"))


@pytest.mark.parametrize(
    ("last", "is_breakdown"),
    [
        ("pcdeq_zoo.solution.ConvergenceError: the ODE could not be solved", True),
        ("AssertionError: max_num_steps exceeded (1000>=1000)", True),
        ("torch._C._LinAlgError: linalg.inv: The diagonal element 3 is zero", True),
        ("epoch 3, step 40: the sum of the losses is nan, so the run ends here; try another --lr", True),
        ("ModuleNotFoundError: No module named 'accelerate'", False),
        ("another process is training in runs/x", False),
    ],
)
def test_what_is_a_breakdown(last: str, is_breakdown: bool):
    assert bool(BREAKDOWN.match(last)) == is_breakdown


def test_what_did_best_on_held_out_images_has_the_time_and_the_next_one_where_it_breaks_down(tmp_path, monkeypatch):
    harness, variant = Harness(tmp_path, 1.0, None), OTHERS["mondeq_l_mnist"]
    choice = candidates(variant)
    assert len(choice) == 6
    assert {candidate.tag for candidate in choice} == {"published", "one_cycle"}
    merit = dict(zip(choice, (90.0, 95.0, 91.0, 97.0, 96.0, None), strict=True))
    ran = []

    def train(self, variant, what, candidate, *flags):
        ran.append((what, candidate, flags))
        folder = self.folder(variant, what, candidate)
        if merit[candidate] is None or (what == "time" and merit[candidate] == 97.0):
            folder.with_name(f"{folder.name}.failed").write_text("broke down\n")
            return
        folder.mkdir()
        row = {"top1": merit[candidate], "epochs": 2}
        name = "held_out.csv" if what == "trial" else "results.csv"
        monkeypatch.setitem(rows, folder / name, row)
        log = {"images": 100, "evaluations": {"a forward": 7.0, "a backward": 5.0}, "unconverged": 1}
        (folder / "log.jsonl").write_text(json.dumps(log) + "\n" + json.dumps({**log, "images": 50}) + "\n")
        (folder / "steps.jsonl").write_text(json.dumps({"seconds": 3.0, "train_top1": 50.0}) + "\n")

    rows: dict = {}
    monkeypatch.setattr("benchmarks.compare.result", rows.get)
    monkeypatch.setattr(Harness, "train", train)
    harness.system(variant)
    assert [what for what, *_ in ran] == ["trial"] * 6 + ["time"] * 2 + ["epochs"]
    assert "--hold-out=5000" in ran[0][2]
    assert "--minutes=3" in ran[0][2]
    assert [candidate for _, candidate, _ in ran[6:]] == [choice[3], choice[4], choice[4]]

    found = harness.collect(variant)
    assert (found["recipe"], found["lr"], found["top1"]) == ("one_cycle", choice[4].lr, 96.0)
    assert (found["updates"], found["solves"], found["unconverged"]) == (1, 300, 2)
    assert (found["forward"], found["backward"], found["top1_equal_epochs"]) == (7.0, 5.0, 96.0)
    assert len(found["failed_runs"]) == 2


def test_a_training_that_starts_while_the_harness_ends_ends_with_it(tmp_path, monkeypatch):
    ended = threading.Event()
    ended.set()
    monkeypatch.setattr("benchmarks.compare._ended", ended)
    variant = VARIANTS["pcdeq1_l_relu6_mnist"]
    with pytest.raises(SystemExit, match=r"ended, start this again to go on: $"):  # and it had nothing to say
        Harness(tmp_path, 1.0, None).train(variant, "time", candidates(variant)[0])


def test_ours_are_trained_by_their_own_recipe():
    assert candidates(VARIANTS["pcdeq1_mc_relu6_mnist"]) == [Candidate("zoo", 0.012)]
    assert candidates(VARIANTS["pcdeq1_sc_relu6_svhn"]) == [Candidate("zoo4434", 0.012)]


def test_a_curve_has_its_points_at_equal_distances():
    steps = [{"seconds": i, "train_top1": float(i)} for i in range(1, 49)]
    points = curve(steps, 48.0)
    assert [seconds for seconds, _ in points] == [2.0 * (i + 1) for i in range(24)]
    assert points[0][1] == 1.5


def test_the_zoo_is_compared_by_a_net_of_each_structure():
    ours = {name for name in SYSTEMS if name in VARIANTS}
    kinds = {(VARIANTS[name].structure, VARIANTS[name].dataset.name) for name in ours}
    assert kinds == {("l", "mnist"), *((kind, data) for kind in ("sc", "mc") for data in MINUTES)}
