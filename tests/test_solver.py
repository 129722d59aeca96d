"""The loop: when a sample stops, what is told of it, and that no sample changes another."""

import contextlib
import copy
import math
import sys
import threading
import warnings

import pytest
import timm
import torch
from oracles import truth
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from pcdeq_zoo import (
    ConvergenceError,
    ConvergenceWarning,
    PcDEQConv2d,
    PcDEQLinear,
    Solver,
    SolveRecord,
    Status,
    record_solves,
    solve,
)


def contraction(rate: Tensor, fixed_point: Tensor):
    """z ↦ z* + rate (z − z*), one rate per sample: evaluations and residuals can be computed by hand."""
    return lambda z: fixed_point + rate[:, None] * (z - fixed_point)


def test_each_sample_stops_by_its_own_criterion():
    rate = torch.tensor([0.0, 0.1, 0.5, 0.9], dtype=torch.float64)
    target = torch.rand(4, 5, dtype=torch.float64) + 1
    together = solve(contraction(rate, target), torch.zeros_like(target), tol=1e-6)
    assert together.converged.all()
    assert together.evaluations.tolist() == sorted(together.evaluations.tolist())
    for i in range(4):
        alone = solve(contraction(rate[i : i + 1], target[i : i + 1]), torch.zeros(1, 5, dtype=torch.float64), tol=1e-6)
        assert torch.equal(alone.value[0], together.value[i])
        assert alone.evaluations[0] == together.evaluations[i]
        assert alone.residual[0].item() == pytest.approx(together.residual[i].item(), rel=1e-12)
        # The first even k with ‖z_k − z_{k−1}‖ = rᵏ⁻¹ (1 − r) ‖z*‖ ≤ tol (1 − rᵏ) ‖z*‖.
        r = rate[i].item()
        k = next(k for k in range(2, 200, 2) if r ** (k - 1) * (1 - r) <= 1e-6 * (1 - r**k))
        assert alone.evaluations[0] == k


def test_estimated_stop_bounds_the_error_of_a_geometric_series():
    rate = torch.tensor([0.1, 0.5, 0.9, 0.97], dtype=torch.float64)
    target = torch.rand(4, 5, dtype=torch.float64) + 1
    solution = solve(contraction(rate, target), torch.zeros_like(target), tol=1e-5, max_evals=2000, stop="estimated")
    assert solution.converged.all()
    for i, r in enumerate(rate.tolist()):
        # z* − z_k = rᵏ z*: the error is known exactly, and so is the first even k at which it is small enough.
        k = next(k for k in range(2, 2000, 2) if r**k <= 1e-5 * (1 - r**k))
        assert solution.evaluations[i] == k


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("kind", [PcDEQLinear, PcDEQConv2d])
def test_a_tiny_unit_that_grows_is_waited_for(kind: type[PcDEQLinear | PcDEQConv2d], exported: bool):
    """One unit is at 6 at once, the other begins at 1e-7, which is rounding beside 6, and ends there, too."""
    layer = kind(2, "relu6", **({"kernel_size": 1} if kind is PcDEQConv2d else {}))
    layer.set_weight(torch.tensor([[0.2, 0.0], [0.0, 1.5]]).view(layer.direction.shape))
    u = torch.tensor([6.0, math.log(math.expm1(5e-7)) / 5]).view(1, 2, *[1] * (layer.direction.ndim - 2))
    net = torch.export.export(layer, (u,)).module() if exported else layer
    torch.testing.assert_close(net(u), torch.full_like(u, 6.0))


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("low", [-3.0, -4.0, -8.0])
def test_a_tiny_unit_that_grows_shows_in_no_norm(low: float, exported: bool):
    """The other one has converged after four evaluations; this one begins at 1e-7 to 1e-18."""
    layer = PcDEQLinear(2, "tanh", solver=Solver(on_failure="raise"))
    layer.set_weight(torch.tensor([[0.1, 0.0], [0.0, 2.0]]))
    u = torch.tensor([[1.0, low]], requires_grad=not exported)
    z = (torch.export.export(layer, (u,)).module() if exported else layer)(u)
    torch.testing.assert_close(z, torch.tensor([[0.79352, 0.957504]]), rtol=1e-3, atol=0)
    if not exported:
        z.sum().backward()
        assert u.grad.isfinite().all()


def test_a_channel_of_tiny_units_that_grow_shows_in_no_norm():
    layer = PcDEQConv2d(8, "tanh")
    weight = 0.02 * torch.rand(8, 8, 3, 3)
    weight[0] = 0
    weight[0, 0] = 1.5 / 9
    layer.set_weight(weight)
    u = torch.randn(4, 8, 6, 6)
    u[:, 0] = -2
    solution, exact = layer.solve(u), truth(layer, u)
    assert solution.converged.all()
    assert ((solution.value.flatten(1) - exact).norm(dim=1) <= 1e-3 * exact.norm(dim=1)).all()


@pytest.mark.parametrize("rate", [1.0, 1 + 1e-8, 1 - 1e-6])
def test_changes_that_hardly_fall_leave_much_to_go(rate: float):
    step = lambda z: z + 1e-9 if rate == 1 else 1 + rate * (z - 1)  # noqa: E731
    solution = solve(step, torch.full((1, 1), 0.99, dtype=torch.float64), stop="estimated")
    assert solution.status == Status.MAX_EVALUATIONS


def test_what_changes_by_rounding_alone_is_done():
    """Two iterates that alternate, one unit of the last place apart, change no less from pair to pair."""
    layer = PcDEQLinear(1, "softsign", solver=Solver(on_failure="raise"))
    layer.set_weight(torch.tensor([[0.8799949288368225]]))
    u = torch.cat([torch.tensor([[0.042980823665857315]]), torch.randn(5000, 1)])
    assert layer.solve(u).evaluations.max() <= 40


def test_acceleration_sums_the_series():
    rate = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    target = torch.rand(3, 5, dtype=torch.float64) + 1
    start = torch.zeros_like(target)
    solution = solve(contraction(rate, target), start, tol=1e-12, accelerate=True)
    assert solution.evaluations.tolist() == [4, 4, 4]  # the second pair finds nothing left to do
    torch.testing.assert_close(solution.value, target)


def test_acceleration_is_given_up_where_it_does_not_help():
    """A rotation: extrapolating along one direction throws the iterate back, again and again."""
    turn = torch.tensor([[0.0, -0.99], [0.99, 0.0]], dtype=torch.float64)
    skew = torch.tensor([[1.0, 0.9], [0.0, 1.0]], dtype=torch.float64)
    matrix = skew @ turn @ skew.inverse()
    solution = solve(lambda z: z @ matrix.T + 1, torch.ones(3, 2).double(), tol=1e-8, max_evals=5000, accelerate=True)
    assert solution.converged.all()
    exact = torch.linalg.solve(torch.eye(2).double() - matrix, torch.ones(2).double())
    torch.testing.assert_close(solution.value, exact.expand(3, 2), rtol=1e-6, atol=0)


def test_every_evaluation_counts_and_none_is_thrown_away():
    calls = []

    def step(z: Tensor) -> Tensor:
        calls.append(z)
        return 0.5 * z + 1

    solution = solve(step, torch.zeros(3, 2), tol=1e-3)
    assert solution.evaluations.tolist() == [len(calls)] * 3
    assert torch.equal(solution.value, 0.5 * calls[-1] + 1)


def test_status_says_how_each_sample_ended():
    def step(z: Tensor) -> Tensor:
        return torch.stack([0.5 * z[0] + 1, -z[1] + 1, z[2] * 1e30, z[3] * torch.nan])

    start = torch.full((4, 3), 2.0)
    solution = solve(step, start, max_evals=30)
    assert solution.status.tolist() == [
        Status.CONVERGED,
        Status.MAX_EVALUATIONS,
        Status.NON_FINITE,
        Status.NON_FINITE,
    ]
    assert solution.evaluations.tolist()[1:] == [30, 2, 2]
    assert solution.value[0].allclose(torch.tensor(2.0), rtol=1e-3)
    failure = solution.failure()
    assert failure is not None
    assert "1 of 4 samples did not reach the tolerance" in failure
    assert "2 of 4 samples met NaN or infinity" in failure
    assert solve(lambda z: z, start).failure() is None


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-9, 1.0, 1e9, 1e25])
def test_scale_of_the_values_does_not_matter(scale: float):
    # The squares of the first, second and last leave float32's range: a norm of 0 would read as convergence.
    reference = solve(lambda z: 0.5 * z + 1, torch.ones(2, 3))
    solution = solve(lambda z: 0.5 * z + scale, torch.full((2, 3), scale))
    assert solution.converged.all()
    assert solution.evaluations.tolist() == reference.evaluations.tolist()
    assert (solution.value / scale).allclose(reference.value, rtol=1e-5)


def test_zero_is_a_fixed_point_like_any_other():
    solution = solve(lambda z: 0.5 * z, torch.zeros(2, 3))
    assert solution.converged.all()
    assert solution.evaluations.tolist() == [2, 2]


def test_empty_batch():
    solution = solve(lambda z: 0.5 * z, torch.zeros(0, 3))
    assert solution.value.shape == (0, 3)
    assert solution.failure() is None


def test_meta_tensors_give_shapes():
    solution = solve(lambda z: 0.5 * z, torch.zeros(2, 3, device="meta"))
    assert solution.value.shape == (2, 3)
    assert solution.value.is_meta


SETTINGS = [
    ("tol", 0.0, ValueError, "tol must be above 0 and finite, got 0.0"),
    ("tol", -1, ValueError, "tol must be above 0 and finite, got -1.0"),
    ("tol", float("nan"), ValueError, "tol must be above 0 and finite, got nan"),
    ("tol", float("inf"), ValueError, "tol must be above 0 and finite, got inf"),
    ("tol", "1e-3", TypeError, "tol must be a number above 0, got '1e-3'"),
    ("max_evals", 1, ValueError, "max_evals must be at least 2, got 1"),
    ("max_evals", 2.9, TypeError, "max_evals must be an integer of at least 2, got 2.9"),
    ("max_evals", True, TypeError, "max_evals must be an integer of at least 2, got True"),
    ("stop", "Certified", ValueError, "stop must be one of certified, estimated, residual, got 'Certified'"),
    ("on_failure", "error", ValueError, "on_failure must be one of raise, warn, ignore, got 'error'"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), SETTINGS)
def test_settings_are_checked_whenever_they_are_set(name: str, value: object, error: type, message: str):
    solver = Solver()
    before = repr(solver)
    for attempt in (lambda: Solver(**{name: value}), lambda: setattr(solver, name, value)):
        with pytest.raises(error) as caught:
            attempt()
        assert str(caught.value) == message
    assert repr(solver) == before


@pytest.mark.parametrize("name", ["tolerance", "f_max_iter", "tols"])
def test_there_are_no_other_settings(name: str):
    with pytest.raises(AttributeError, match=f"has tol, max_evals, stop and on_failure, and no {name}"):
        setattr(Solver(), name, 1)


def test_settings_of_a_layer_and_of_a_model():
    layer = PcDEQLinear(4)
    for name in ("tol", "max_evals"):
        with pytest.raises(AttributeError, match=f"say layer.solver.{name} = 5"):
            setattr(layer, name, 5)
    with pytest.raises(TypeError, match="solver must be a Solver or None, got 0"):
        PcDEQLinear(4, solver=0)
    model = timm.create_model("pcdeq1_mc_tanh_mnist", tol=1e-2)
    assert all(layer.solver is model.solver for layer in model.modules() if isinstance(layer, PcDEQConv2d))
    model.solver = Solver(tol=1e-4)
    layers = [layer for layer in model.modules() if isinstance(layer, PcDEQConv2d)]
    assert [layer.tol for layer in layers] == [1e-4] * 3
    with pytest.raises(TypeError, match=r"solver must be a Solver, got 0\.1"):
        model.solver = 0.1


def in_place(z: Tensor) -> Tensor:
    return z.mul_(0.5)


@pytest.mark.parametrize(
    ("step", "start", "message"),
    [
        (lambda z: z, torch.zeros(3), r"start must be \(N, ...\) with at least one entry axis, .*got .* shape \(3,\)"),
        (lambda z: z, torch.zeros(3, 2, dtype=torch.complex64), "floating point; got torch.complex64"),
        (lambda z: z, torch.zeros(3, 2).long(), "floating point; got torch.int64"),
        (lambda z: z, None, r"a step that is a function needs a start, shape \(N, ...\); got None"),
        (lambda z: z[:, :1], torch.zeros(3, 2), r"must return torch.float32 of shape \(3, 2\).*got .* shape \(3, 1\)"),
        (lambda z: z.double(), torch.zeros(3, 2), "must return torch.float32 of .*got torch.float64"),
        (lambda z: None, torch.zeros(3, 2), "got NoneType"),
        (in_place, torch.ones(3, 2), "step must return a new tensor, got one that changes what it is given in place"),
    ],
)
def test_bad_steps_and_starts(step, start, message: str):
    with pytest.raises(ValueError, match=message):
        solve(step, start)


def test_the_map_of_a_layer_has_a_start():
    step = PcDEQLinear(4, "tanh").fixed_point_map(torch.randn(2, 4))
    with pytest.raises(ValueError, match="has a start of its own"):
        solve(step, torch.zeros(2, 4))


class TestFailure:
    """What a layer does with a solve that fails: two evaluations are never enough here."""

    def model(self, on_failure: str) -> nn.Sequential:
        solver = Solver(max_evals=2, on_failure=on_failure)
        net = nn.Sequential(PcDEQLinear(4, "tanh", solver=solver), PcDEQLinear(4, "tanh", solver=solver))
        with torch.no_grad():
            for layer in net:
                layer.magnitude.fill_(1)
        return net

    def test_warns_once_per_layer_and_direction(self):
        for _ in range(2):
            net = self.model("warn")
            with warnings.catch_warnings(record=True, category=ConvergenceWarning) as caught:
                warnings.simplefilter("always")
                for _ in range(3):
                    net(torch.randn(8, 4)).sum().backward()
            told = [str(warning.message).split(" solve of ")[0] for warning in caught]
            assert told == ["forward", "forward", "backward", "backward"]
            assert "8 of 8 samples did not reach the tolerance" in str(caught[0].message)

    def test_raises(self):
        net = self.model("raise")
        with pytest.raises(ConvergenceError, match="after 2 evaluations"):
            net(torch.randn(8, 4))
        with pytest.raises(ConvergenceError), torch.no_grad():
            net(torch.randn(8, 4))

    def test_raises_in_the_backward_pass(self):
        layer = PcDEQLinear(4, "tanh")
        with torch.no_grad():
            layer.magnitude.fill_(1)
        y = layer(torch.randn(8, 4))
        layer.solver.max_evals, layer.solver.tol, layer.solver.on_failure = 2, 1e-7, "raise"
        with pytest.raises(ConvergenceError, match="backward"):
            y.sum().backward()

    def test_ignores(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert self.model("ignore")(torch.randn(8, 4)).isfinite().all()

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_non_finite_input_is_told_and_stays_in_its_sample(self, bad: float):
        layer = PcDEQLinear(4, "relu6")
        x = torch.randn(3, 4)
        good = layer(x)
        x[1, 2] = bad
        with pytest.warns(ConvergenceWarning, match="1 of 3 samples met NaN or infinity"):
            y = layer(x)
        assert y[1].isnan().any()
        assert torch.equal(y[[0, 2]], good[[0, 2]])


class TestRecords:
    def test_names_directions_and_order(self):
        net = nn.Sequential(PcDEQLinear(4, "tanh"), nn.ReLU(), PcDEQLinear(4, "sigmoid"))
        with record_solves(net) as solves:
            net(torch.randn(8, 4)).sum().backward()
        assert [(s.layer, s.direction) for s in solves] == [
            ("0", "forward"),
            ("2", "forward"),
            ("2", "backward"),
            ("0", "backward"),
        ]
        assert all(s.status.shape == s.evaluations.shape == s.residual.shape == (8,) for s in solves)
        net(torch.randn(8, 4))
        assert len(solves) == 4  # nothing after the block

    def test_only_the_models_own_layers(self):
        one, other = PcDEQLinear(4, "tanh"), PcDEQLinear(4, "tanh")
        with record_solves(one) as outer:
            one(torch.randn(2, 4))
            with record_solves(other) as inner:
                one(torch.randn(2, 4))
                other(torch.randn(2, 4))
        assert (len(outer), len(inner)) == (2, 1)

    def test_an_exception_ends_the_recording(self):
        layer = PcDEQLinear(4, "tanh")
        with pytest.raises(ZeroDivisionError), record_solves(layer) as solves:
            raise ZeroDivisionError
        layer(torch.randn(2, 4))
        assert solves == []

    def test_nothing_is_left_on_the_module(self):
        layer = PcDEQLinear(4, "tanh")
        before = dict(vars(layer))
        layer(torch.randn(2, 4)).sum().backward()
        assert vars(layer) == before


def test_a_thread_records_its_own_solves():
    """Two threads with one model: each sees what it solved."""
    layer = PcDEQLinear(4, "tanh")
    both_record = threading.Barrier(2)
    counts: dict[int, list[int]] = {}

    def work(index: int) -> None:
        with record_solves(layer) as solves:
            both_record.wait()
            for _ in range(index):
                layer(torch.randn(index, 4)).sum().backward()
        counts[index] = [len(solve.evaluations) for solve in solves]

    threads = [threading.Thread(target=work, args=(index,)) for index in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == {2: [2] * 4, 3: [3] * 6}


def test_a_record_that_ends_elsewhere_costs_no_other_its_solve(monkeypatch):
    """While a solve is told to one record, another one ends that began before both."""
    layer, first = PcDEQLinear(2, "tanh"), contextlib.ExitStack()
    first.enter_context(record_solves(nn.Identity()))

    def record(*parts: object) -> SolveRecord:
        first.close()
        return SolveRecord(*parts)

    monkeypatch.setattr("pcdeq_zoo.solution.SolveRecord", record)
    with torch.no_grad(), record_solves(layer) as one, record_solves(layer) as two:
        layer(torch.rand(1, 2))
    assert (len(one), len(two)) == (1, 1)


def test_a_record_that_begins_while_another_ends_is_kept(monkeypatch):
    """In another thread, after what is left was gathered and before it takes the place of all there were."""
    layer, counts = PcDEQLinear(2, "tanh"), []
    began, ended = threading.Event(), threading.Event()

    def work() -> None:
        with torch.no_grad(), record_solves(layer) as solves:
            began.set()
            ended.wait()
            layer(torch.rand(1, 2))
        counts.append(len(solves))

    class Recordings(list):
        def __setitem__(self, *arguments: object) -> None:
            if not began.is_set():
                thread.start()
                began.wait(0.2)  # it cannot, unless nothing keeps it from it
            super().__setitem__(*arguments)

    thread = threading.Thread(target=work)
    monkeypatch.setattr("pcdeq_zoo.solution._recordings", Recordings())
    with record_solves(layer):
        pass
    ended.set()
    thread.join()
    assert counts == [1]


def test_layers_that_are_made_elsewhere_do_not_disturb_an_optimizer():
    """Another thread makes some while the step goes through all there are."""
    layers, over = [PcDEQLinear(1) for _ in range(500)], threading.Event()

    def make() -> None:
        while not over.is_set():
            layers.append(PcDEQLinear(1))

    thread, interval = threading.Thread(target=make), sys.getswitchinterval()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        for _ in range(100):
            optimizer.step()
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(interval)


def test_a_step_does_not_compute_what_parametrizations_give():
    """Spectral norm makes an iteration whenever it is read, in training."""
    layer, other = PcDEQLinear(5), nn.Linear(2, 2)
    parametrizations.spectral_norm(layer, "direction").train()
    before = layer.parametrizations.direction[0]._u.clone()
    other(torch.randn(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert torch.equal(layer.parametrizations.direction[0]._u, before)


def test_a_copy_of_a_parametrized_layer_is_projected():
    layer = PcDEQLinear(5, "tanh")
    parametrizations.weight_norm(layer, "direction")
    layer = copy.deepcopy(layer)
    layer(torch.randn(4, 5)).sum().backward()
    torch.optim.SGD([layer.magnitude], lr=1e3).step()
    assert (layer.magnitude == 0).any()
    assert (layer.magnitude >= 0).all()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_infinite_gradient_is_passed_on_and_is_no_failure(bad: float):
    """As a GradScaler finds its scale; and a real failure after it is still told."""
    layer = PcDEQLinear(4, "tanh", solver=Solver(on_failure="raise"))
    x = torch.randn(3, 4, requires_grad=True)
    weights = torch.ones(3, 4)
    weights[1, 2] = bad
    (layer(x) * weights).sum().backward()
    assert not x.grad[1].isfinite().all()
    assert x.grad[[0, 2]].isfinite().all()
    assert not layer.direction.grad.isfinite().all()
    layer.set_weight(torch.full((4, 4), 1.0))
    y = layer(x)
    layer.solver.max_evals, layer.solver.tol = 2, 1e-7
    with pytest.raises(ConvergenceError, match=r"backward solve of .*1 of 2 samples did not reach"):
        (y * weights).sum().backward()


@pytest.mark.parametrize("stop", ["estimated", "residual"])
@pytest.mark.parametrize("scale", [1e-36, 1e-25, 1e-9, 1.0, 1e25])
def test_every_stop_works_at_every_scale(stop: str, scale: float):
    solution = solve(lambda z: 0.5 * z + scale, torch.full((2, 3), scale), stop=stop, accelerate=True)
    assert solution.converged.all()
    assert (solution.value / scale).allclose(torch.tensor(2.0), rtol=1e-3)


def test_a_fall_to_zero_is_finite():
    solution = solve(lambda z: (z - 1).clamp(min=0), torch.full((1, 2), 2.0))
    assert solution.converged.all()
    assert (solution.value == 0).all()


def test_changes_that_grow_at_first_do_not_end_the_acceleration():
    """tanh(1.5 z + x) from a small x: the changes grow until the curve bends; there was nothing to give up."""
    start = torch.full((1, 1), 1e-4, dtype=torch.float64)
    step = lambda z: torch.tanh(1.5 * z + 1e-4)  # noqa: E731
    plain, accelerated = (solve(step, start, tol=1e-10, max_evals=2000, accelerate=a) for a in (False, True))
    torch.testing.assert_close(accelerated.value, plain.value)
    assert accelerated.evaluations < plain.evaluations
