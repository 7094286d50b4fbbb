"""Traces and diagonals are unbiased and their intervals cover."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cases import Matrix
from dropscope import _files
from dropscope.spectral import DiagonalEstimate, diagonal, trace

i = torch.arange(150, dtype=torch.float64)
SPECTRA = {
    "flat": 3 - i / 75,
    "power": 1 / (1 + i),
    "square": 1 / (1 + i) ** 2,
    "exponential": 0.9**i,
    "step": (i < 40).double() + 1e-3,
    "indefinite": torch.cos(i * math.pi / 149),
}


def rotated(values: Tensor, seed: int = 0) -> Tensor:
    n = len(values)
    G = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    U = torch.linalg.qr(G)[0]
    return (U * values) @ U.T


@pytest.mark.parametrize(
    ("method", "name"),
    [("xtrace", name) for name in SPECTRA if name != "power"]
    + [("hutch++", "square"), ("hutch++", "indefinite"), ("hutchinson", "power")],
)
def test_intervals_cover_and_estimates_are_unbiased(method: str, name: str) -> None:
    """150 repeats: 95 % coverage leaves .90–.99 with probability below 2e-2, the bias 4 errors below 1e-4, each."""
    A, truth, repeats = Matrix(rotated(SPECTRA[name])), float(SPECTRA[name].sum()), 150
    found = [trace(A, method, matvecs=24, seed=seed) for seed in range(repeats)]  # type: ignore[arg-type]
    low, high = (torch.tensor(ends) for ends in zip(*(e.interval() for e in found), strict=True))
    covered = float(((low <= truth) & (truth <= high)).double().mean())
    errors = torch.tensor([e.value - truth for e in found], dtype=torch.float64)
    rms = float(errors.square().mean().sqrt())
    claimed = math.sqrt(sum(e.stderr**2 for e in found) / repeats)
    assert abs(float(errors.mean())) < 4 * rms / math.sqrt(repeats)
    assert 0.90 <= covered <= 0.99, covered
    assert 0.8 < claimed / rms < 1.25
    assert A.count == 24 * repeats


def test_xtrace_beats_the_others_where_eigenvalues_decay() -> None:
    values = 0.8**i
    A, truth = Matrix(rotated(values)), float(values.sum())
    error = {
        m: torch.tensor([trace(A, m, 60, seed).value - truth for seed in range(20)]).norm()
        for m in ("xtrace", "hutch++", "hutchinson")
    }
    assert error["xtrace"] < 0.5 * error["hutch++"] < 0.1 * error["hutchinson"]


@pytest.mark.parametrize("method", ["xtrace", "hutch++", "hutchinson"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_low_rank_zero_and_exact(method: str, dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    values = torch.zeros(200, dtype=torch.float64)
    values[:4] = torch.tensor([5.0, 3.0, 3.0, -1.0])
    A = Matrix(rotated(values).to(dtype))
    found = trace(A, method, 36)  # type: ignore[arg-type]
    if method != "hutchinson":
        assert abs(found.value - 10) < 200 * eps
        assert found.stderr < 200 * eps
    zero = trace(Matrix(torch.zeros(200, dtype=dtype)), method, 36)  # type: ignore[arg-type]
    assert (zero.value, zero.stderr) == (0.0, 0.0)
    exact = trace(A, method, 200)  # type: ignore[arg-type]
    assert abs(exact.value - float(A.M.double().diagonal().sum())) < 1e-12
    assert exact.interval() == (exact.value, exact.value)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_passes_through(scale: float) -> None:
    values = SPECTRA["power"].float()
    one, scaled = (trace(Matrix(values * s), matvecs=30, seed=1) for s in (1.0, scale))
    assert scaled.value / scale == pytest.approx(one.value, rel=1e-5)
    assert scaled.stderr / scale == pytest.approx(one.stderr, rel=1e-2)


def test_same_seed_same_bits() -> None:
    A, before = Matrix(rotated(SPECTRA["power"])), torch.get_rng_state()
    assert trace(A, seed=3) == trace(A, seed=3)
    assert trace(A, seed=3) != trace(A, seed=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_diagonal_is_unbiased_and_covers() -> None:
    """150 entries by 100 repeats."""
    A, repeats = Matrix(rotated(SPECTRA["power"])), 100
    truth = A.M.diagonal()
    total, covered = torch.zeros(150, dtype=torch.float64), 0.0
    for seed in range(repeats):
        found = diagonal(A, matvecs=16, seed=seed)
        low, high = found.interval()
        covered += float(((low <= truth) & (truth <= high)).double().mean()) / repeats
        total += found.values / repeats
    expected = ((A.M.square().sum(1) - truth.square()) / 16).sqrt()
    assert 0.92 < covered < 0.98, covered
    assert ((total - truth).abs() < 4.5 * expected / math.sqrt(repeats)).all()
    torch.testing.assert_close(found.stderr.square().mean(), expected.square().mean(), rtol=0.3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_diagonal_is_exact_for_diagonal_matrices_and_enough_products(dtype: torch.dtype) -> None:
    values = SPECTRA["indefinite"].to(dtype)
    found = diagonal(Matrix(values), matvecs=3)
    assert torch.equal(found.values, values.double())
    assert (found.stderr == 0).all()
    M = rotated(SPECTRA["power"]).to(dtype)
    found = diagonal(Matrix(M), matvecs=150)
    assert torch.equal(found.values, M.diagonal().double())
    assert found.matvecs == 150
    assert found.interval()[0] is not None
    assert torch.equal(found.interval()[0], found.values)


@pytest.mark.parametrize("matvecs", [4, 1000])
def test_diagonal_is_saved_and_read_back(matvecs: int, tmp_path: Path) -> None:
    """Also the infinite degrees of freedom of an exact one."""
    found = diagonal(Matrix(rotated(SPECTRA["power"])), matvecs)
    back = DiagonalEstimate.load(found.save(tmp_path / "d.safetensors"))
    assert torch.equal(back.values, found.values)
    assert torch.equal(back.stderr, found.stderr)
    assert (back.dof, back.matvecs) == (found.dof, found.matvecs)
    assert math.isinf(found.dof) == (matvecs == 1000)


def test_diagonal_is_not_read_from_another_file(tmp_path: Path) -> None:
    path = _files.write_arrays(tmp_path / "x", {"values": torch.ones(2)}, {"kind": "eigenpairs"})
    with pytest.raises(ValueError, match=r"DiagonalEstimate.load: path must be a file that save wrote"):
        DiagonalEstimate.load(path)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"method": "exact"}, "trace: method must be"),
        ({"matvecs": 5}, "trace: matvecs must be an int of at least 6, got 5"),
        ({"method": "hutchinson", "matvecs": 1}, "at least 2, got 1"),
        ({"seed": "a"}, "trace: seed must be"),
    ],
)
def test_bad_input_is_refused_before_any_product(arguments: dict[str, object], match: str) -> None:
    A = Matrix(rotated(SPECTRA["power"]))
    with pytest.raises(ValueError, match=match):
        trace(A, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="diagonal: matvecs"):
        diagonal(A, matvecs=1)
    with pytest.raises(TypeError, match="trace: A must be a SymmetricOperator"):
        trace(A.M)  # type: ignore[arg-type]
    assert A.count == 0


@pytest.mark.parametrize("method", ["xtrace", "hutch++"])
def test_what_is_not_symmetric_is_refused(method: str) -> None:
    M = torch.randn(150, 150, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(ValueError, match="trace: A must be symmetric"):
        trace(Matrix(M), method, matvecs=24)  # type: ignore[arg-type]
    trace(Matrix(M + M.T), method, matvecs=24)  # type: ignore[arg-type]
