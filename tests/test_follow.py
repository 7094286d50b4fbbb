"""The noise structure along training, and the nulls of the alignment."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dropscope as ds
from dropscope.analyses import follow, gradient_data, noise_structure
from dropscope.analyses.alignment import measure_alignment

F64 = torch.float64


def setting() -> tuple[nn.Module, ds.Problem]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 2)).double()
        problem = ds.Problem(model, nn.MSELoss(), (torch.randn(10, 3, dtype=F64), torch.randn(10, 2, dtype=F64)))
    return model, problem


def training(model: nn.Module, problem: ds.Problem, visited: list[int]):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    (batch,) = problem.batches()
    X, y = batch.content
    for step in range(50):
        visited.append(step)
        yield step
        optimizer.zero_grad()
        nn.functional.mse_loss(model(X), y).backward()
        optimizer.step()


def test_each_checkpoint_is_what_is_measured_there(tmp_path) -> None:
    model, problem = setting()
    model.eval()
    visited: list[int] = []
    trace = follow(problem, training(model, problem, visited), at=[4, 0], k=4, draws=4, probes=4)
    assert visited == [0, 1, 2, 3, 4], "the loop stops after the last checkpoint"
    assert [moment.step for moment in trace.moments] == [0, 4]
    assert not model.training
    again = noise_structure(problem, step=4, k=4, draws=4, probes=4)
    rows = trace.table()
    assert rows[1]["risk"] == pytest.approx(again.risk, rel=1e-12)
    assert rows[1]["ratio"] == pytest.approx(again.alignment.ratio.value, rel=1e-6)
    assert rows[1]["risk"] < rows[0]["risk"]
    assert rows[0]["ratio"] == pytest.approx(rows[0]["trace_product"] / rows[0]["isotropic_product"], rel=1e-9)
    saved = json.loads(trace.save(tmp_path / "trace.json").read_text())
    assert len(saved["moments"]) == 2
    assert len(trace.plot().axes) == 2
    assert len(repr(trace).splitlines()) == 4


def test_noise_and_block_are_the_users() -> None:
    model, problem = setting()
    names = "0.weight"
    trace = follow(
        problem,
        training(model, problem, []),
        at=[0],
        k=3,
        names=names,
        noise=lambda p: gradient_data(p, 20, noise="gradient", scale=0.1, names=names),
        probes=4,
    )
    assert trace.moments[0].curvature.dim == 18
    default = noise_structure(problem, k=3, names=names, draws=4, probes=4, flatness=False)
    assert default.curvature.dim == 18
    assert default.flatness is None


def test_a_loop_that_ends_too_soon_is_refused() -> None:
    model, problem = setting()
    with pytest.raises(ValueError, match=r"follow: training must reach the steps \[0, 60\], got only \[0\]"):
        follow(problem, training(model, problem, []), at=[0, 60], k=2, draws=2, probes=2)
    with pytest.raises(ValueError, match=r"follow: at must name at least one step"):
        follow(problem, [], at=[])
    with pytest.raises(TypeError, match=r"follow: problem must be a Problem"):
        follow(model, [], at=[0])


def test_the_spread_of_the_null_is_that_of_random_eigenvectors() -> None:
    # 600 rotations: a standard deviation has a relative error of about 0.03.
    def rotation(seed: int) -> Tensor:
        Q, R = torch.linalg.qr(torch.randn(10, 10, generator=torch.Generator().manual_seed(seed), dtype=F64))
        return Q * torch.sign(R.diagonal())

    h, s = torch.logspace(-1, 1, 10, dtype=F64), torch.logspace(-2, 1, 10, dtype=F64)
    cosines = []
    for seed in range(600):
        Q = rotation(seed)
        cosines.append(float(((Q * h) @ Q.T).diagonal() @ s / (h.norm() * s.norm())))
    H = ds.SymmetricOperator.from_callable(lambda v: h * v, 10, F64)
    S = ds.SymmetricOperator.from_callable(lambda v: s * v, 10, F64)
    got = measure_alignment(H, S, torch.eye(10, dtype=F64), probes=2)
    assert got.null_spread == pytest.approx(float(np.std(cosines)), rel=0.15)
    assert abs(np.mean(cosines) - got.null.value) < 5 * np.std(cosines) / math.sqrt(600)
    assert got.isotropic.value == pytest.approx(float(h.sum() * s.sum()) / 10, rel=1e-9)
    assert got.excess == pytest.approx((got.cosine.value - got.null.value) / got.null_spread)
