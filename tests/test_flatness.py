"""Interval flatness against closed forms: both sides, both routes, statuses and memory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cases import bowl
from dropscope.analyses import interval_flatness
from dropscope.analyses.displaced_risks import DisplacedRisks
from dropscope.problem import Problem

F64 = torch.float64


def test_interval_flatness_of_a_quadratic_is_the_closed_form() -> None:
    curvature = [1e6, 30.0, 1.0, 1e-3]
    problem = bowl(curvature, offset=0.7)
    got = interval_flatness(problem, torch.eye(4, dtype=F64), factor=3.0, rtol=1e-6)
    exact = torch.tensor([2.0 * math.sqrt(2.0 * 0.7 * 2.0 / c) for c in curvature], dtype=F64)
    torch.testing.assert_close(got.flatness, exact, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(got.left, got.right, rtol=1e-5, atol=0.0)
    assert got.status == "ok"
    assert got.level == pytest.approx(2.1)


def test_interval_flatness_takes_each_side_for_itself() -> None:
    # ½δ² + δ³/4 = ½: roots from numpy, independent of the search.
    problem = bowl([1.0], cubic=[0.25])
    got = interval_flatness(problem, torch.tensor([2.0], dtype=F64), rtol=1e-7)
    roots = np.roots([0.25, 0.5, 0.0, -0.5])
    right = float(min(r.real for r in roots if abs(r.imag) < 1e-12 and r.real > 0))
    assert float(got.right) == pytest.approx(right, rel=1e-6)
    # To the left the risk rises to 0.5 + 8/27 only and then falls: it never doubles.
    assert got.status_left == ("no_crossing",)
    assert math.isinf(float(got.flatness))


def test_interval_flatness_leaves_the_problem_as_it_was_and_ignores_order() -> None:
    problem = bowl([4.0, 1.0, 9.0])
    before = problem.model.theta.data.clone()
    V = torch.tensor([[1.0, 0.3, 0.0], [0.0, 1.0, 0.5], [0.2, 0.0, 1.0]], dtype=F64)
    together = interval_flatness(problem, V)
    assert torch.equal(problem.model.theta.data, before)
    alone = torch.cat([interval_flatness(problem, 5.0 * V[:, j]).flatness for j in (2, 1, 0)]).flip(0)
    torch.testing.assert_close(together.flatness, alone, rtol=1e-12, atol=0.0)


def test_interval_flatness_has_statuses_for_what_has_no_answer() -> None:
    V = torch.eye(2, dtype=F64)
    zero = interval_flatness(bowl([1.0, 1.0], offset=0.0), V)
    assert zero.status == "zero_loss"
    assert "level=" in zero.remedy
    assert bool(zero.flatness.isnan().all())
    given = interval_flatness(bowl([1.0, 1.0], offset=0.0), V, level=0.5, rtol=1e-6)
    torch.testing.assert_close(given.flatness, torch.full((2,), 2.0, dtype=F64), rtol=1e-5, atol=0.0)
    near = interval_flatness(bowl([1e20, 1.0]), V)
    assert near.status_left == ("below_range", "ok")
    assert near.status == "below_range"


@pytest.mark.parametrize("block", [None, "2.weight"])
def test_lockstep_and_one_by_one_give_the_same_distances(block: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    X, y = torch.randn(30, 5, generator=generator, dtype=F64), torch.arange(30) % 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    problem = Problem(model, nn.CrossEntropyLoss(), (X, y), params=block, batch_size=12)
    V = torch.randn(problem.dim, 6, generator=generator, dtype=F64)
    clock = [0.0]  # the trial's clock: ticks of one route are long, so that the choice does not depend on the machine

    def decided(together: bool) -> object:
        clock[0] = 0.0
        spent = {"_one_by_one": 1.0, "_together": 1e-3 if together else 1e3}
        for name, seconds in spent.items():
            inner = getattr(DisplacedRisks, name)

            def timed(self: DisplacedRisks, C: Tensor, inner=inner, seconds=seconds) -> Tensor:
                clock[0] += seconds
                return inner(self, C)

            monkeypatch.setattr(DisplacedRisks, name, timed)
        monkeypatch.setattr("dropscope.analyses.displaced_risks.time.perf_counter", lambda: clock[0])
        got = interval_flatness(problem, V, rtol=1e-6)
        monkeypatch.undo()
        return got

    batched, alone = decided(True), decided(False)
    assert batched.route == "up to 64 at once"
    assert alone.route == "one by one: vmap is slower"
    assert batched.status_left == alone.status_left
    torch.testing.assert_close(batched.flatness, alone.flatness, rtol=1e-9, atol=0.0)
    # And they are what they claim to be: the risk has doubled there.
    unit = V / V.norm(dim=0)
    for j in torch.nonzero(torch.isfinite(batched.right))[:, 0].tolist():
        with problem.displaced(batched.right[j] * unit[:, j]):
            assert problem.risk() == pytest.approx(batched.level, rel=1e-5)


def test_displaced_risks_are_bounded_by_memory_and_leave_unmoved_parameters_out() -> None:
    problem = bowl([4.0, 1.0, 9.0])
    V, C = torch.eye(3, dtype=F64)[:, :2], torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -3.0]], dtype=F64)
    risks = DisplacedRisks(problem, V, memory=1)
    torch.testing.assert_close(risks(C), torch.tensor([2.5, 9.0, 5.0], dtype=F64))
    assert risks.route == "one by one: memory holds no two"
    assert risks.evaluations == 3
    still = DisplacedRisks(problem, torch.zeros(3, 1, dtype=F64))
    assert still.moved == []
    torch.testing.assert_close(still(torch.ones(1, 2)), torch.tensor([0.5, 0.5], dtype=F64))


def test_interval_flatness_refuses_bad_input() -> None:
    problem, V = bowl([1.0, 1.0]), torch.eye(2, dtype=F64)
    with pytest.raises(TypeError, match=r"interval_flatness: problem must be a Problem, got Linear"):
        interval_flatness(nn.Linear(1, 1), V)
    with pytest.raises(TypeError, match=r"interval_flatness: V must be a torch.Tensor of dtype torch.float64"):
        interval_flatness(problem, V.float())
    with pytest.raises(ValueError, match=r"interval_flatness: V must have shape \(2,\) or \(2, k\), got \(3, 3\)"):
        interval_flatness(problem, torch.eye(3, dtype=F64))
    with pytest.raises(ValueError, match=r"interval_flatness: V must have finite columns of positive length"):
        interval_flatness(problem, 0.0 * V)
    with pytest.raises(ValueError, match=r"interval_flatness: factor must be a finite number > 1, got 1.0"):
        interval_flatness(problem, V, factor=1.0)
    with pytest.raises(ValueError, match=r"interval_flatness: level must be finite and exceed the risk 0.5, got 0.4"):
        interval_flatness(problem, V, level=0.4)
    with pytest.raises(ValueError, match=r"interval_flatness: reach must be"):
        interval_flatness(problem, V, reach=(1.0, 0.1))
