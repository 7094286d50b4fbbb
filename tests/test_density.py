"""Quadratures are exact to their degree, isolated values are single nodes, bands cover."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cases import Matrix
from dropscope import kernels
from dropscope.spectral import SpectralDensity, spectral_density


def goe(n: int, seed: int = 0) -> Tensor:
    M = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (M + M.T) / math.sqrt(2 * n)


def wishart(n: int, samples: int, seed: int = 0) -> Tensor:
    Z = torch.randn(n, samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Z @ Z.T / samples


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_quadrature_is_exact_to_degree_2m_minus_1_and_not_beyond(steps: int) -> None:
    A = Matrix(goe(200))
    rho = spectral_density(A, probes=3, steps=steps, seed=4)
    for p in range(3):
        v = kernels.probe(torch.empty(200, dtype=torch.float64), seed=4, index=p) / math.sqrt(200)
        power = v
        for degree in range(2 * steps + 1):
            found = float((rho.weights[p] * rho.nodes[p] ** degree).sum())
            error = abs(found - float(v @ power)) / 2**degree
            assert error > 1e-8 if degree == 2 * steps else error < 1e-14, (degree, error)
            power = A.M @ power


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_isolated_values_are_single_nodes(dtype: torch.dtype) -> None:
    values = torch.linspace(0, 1, 2000, dtype=torch.float64)
    values[-3:] = torch.tensor([10.0, 20.0, 40.0])
    rho = spectral_density(Matrix(values.to(dtype)), probes=2, steps=100)
    for nodes in rho.nodes:
        torch.testing.assert_close(nodes[-3:], values[-3:], rtol=1e-5, atol=0)
        assert nodes[-4] <= 1.0
    assert (rho.weights >= 0).all()
    torch.testing.assert_close(rho.weights.sum(1), torch.ones(2, dtype=torch.float64))


def test_spiked_marchenko_pastur_has_three_outliers() -> None:
    n = 1000
    M = wishart(n, n, seed=2)
    root = torch.ones(n, dtype=torch.float64)
    root[:3] = torch.tensor([5.0, 4.0, 3.0]).sqrt()
    M = root[:, None] * M * root
    rho = spectral_density(Matrix(M), probes=2, steps=60)
    values = torch.linalg.eigvalsh(M)
    for nodes in rho.nodes:
        assert int((nodes > float(values[-4]) + 1e-6).sum()) == 3
        torch.testing.assert_close(nodes[-3:], values[-3:], rtol=1e-8, atol=0)
    expected = torch.tensor([theta + theta / (theta - 1) for theta in (3.0, 4.0, 5.0)]).double()
    torch.testing.assert_close(values[-3:], expected, rtol=0.06, atol=0)


def test_moments_of_semicircle_and_marchenko_pastur() -> None:
    rho = spectral_density(Matrix(goe(1000)), probes=8, steps=20)
    assert rho.nodes.abs().max() < 2.1
    for order, truth in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 2.0)):
        assert abs(rho.moment(order).value - truth) < 0.1
    rho = spectral_density(Matrix(wishart(600, 1200)), probes=8, steps=20)
    low, high = ((1 + sign * math.sqrt(0.5)) ** 2 for sign in (-1, 1))
    assert rho.nodes.min() > low - 0.05
    assert rho.nodes.max() < high + 0.05
    assert abs(rho.moment(1).value - 1) < 0.02
    assert abs(rho.moment(2).value - 1.5) < 0.05


def test_curve_of_the_semicircle() -> None:
    rho = spectral_density(Matrix(goe(1000)), probes=8, steps=40)
    grid = torch.linspace(-1.7, 1.7, 50, dtype=torch.float64)
    _, mean, _, _ = rho.curve(grid, sigma=0.1)
    torch.testing.assert_close(mean, (4 - grid**2).sqrt() / (2 * math.pi), rtol=0, atol=0.05)
    whole, mean, low, high = rho.curve()
    assert abs(float(torch.trapezoid(mean, whole)) - 1) < 1e-3
    assert (low <= mean).all()
    assert (mean <= high).all()
    _, mean, low, high = rho.curve(log=True)
    assert (low <= mean).all()
    assert (mean <= high).all()
    torch.testing.assert_close(low * high, mean * mean)


@pytest.mark.parametrize("log", [False, True])
def test_bands_and_moment_intervals_cover(log: bool) -> None:
    """150 repeats: 95 % coverage leaves .89–.99 with probability below 1e-2 in each of the four intervals."""
    M, repeats = wishart(60, 150), 150
    values = torch.linalg.eigvalsh(M)
    grid = torch.tensor([0.3, 0.8, 1.5], dtype=torch.float64)
    sigma = 0.2
    bumps = torch.exp(-0.5 * ((grid[:, None] - values) / sigma) ** 2)
    truth = bumps.mean(1) / (sigma * math.sqrt(2 * math.pi))
    inside, moments = torch.zeros(3), 0
    for seed in range(repeats):
        rho = spectral_density(Matrix(M), probes=6, steps=12, seed=seed)
        _, _, low, high = rho.curve(grid, sigma, log=log)
        inside += (low <= truth) & (truth <= high)
        bounds = rho.moment(2).interval()
        moments += bounds[0] <= float((values**2).mean()) <= bounds[1]
    assert ((inside / repeats > 0.89) & (inside / repeats <= 0.99)).all(), inside
    assert 0.89 < moments / repeats <= 0.99


def test_breakdown_gives_fewer_nodes_and_stays_exact() -> None:
    values = torch.tensor([2.0] * 30 + [-1.0] * 50 + [0.0] * 20, dtype=torch.float64)
    A = Matrix(values)
    rho = spectral_density(A, probes=3, steps=20)
    assert rho.matvecs == A.count == 9
    assert ((rho.weights > 0).sum(1) == 3).all()
    torch.testing.assert_close(rho.nodes[:, :3], torch.tensor([-1.0, 0, 2]).double().expand(3, 3))
    torch.testing.assert_close(rho.weights[:, :3], torch.tensor([0.5, 0.2, 0.3]).double().expand(3, 3))
    assert (rho.nodes[:, 3:] == rho.nodes[:, 2:3]).all()


def test_zero_operator_and_steps_beyond_dim() -> None:
    rho = spectral_density(Matrix(torch.zeros(50)), probes=2, steps=10)
    assert (rho.nodes == 0).all()
    assert torch.isfinite(rho.curve()[1]).all()
    M = goe(12)
    rho = spectral_density(Matrix(M), probes=2, steps=50)
    assert rho.nodes.shape == (2, 12)
    torch.testing.assert_close(rho.nodes[0], torch.linalg.eigvalsh(M))


def test_one_probe_has_no_band() -> None:
    rho = spectral_density(Matrix(goe(100)), probes=1, steps=10)
    assert rho.curve()[2].isnan().all()
    assert rho.moment(1).status == "no_error"


def test_saved_density_comes_back(tmp_path: Path) -> None:
    rho = spectral_density(Matrix(goe(100)), probes=2, steps=10)
    back = SpectralDensity.load(rho.save(tmp_path / "rho.safetensors"))
    assert torch.equal(back.nodes, rho.nodes)
    assert torch.equal(back.weights, rho.weights)
    assert repr(back) == repr(rho)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [({"probes": 0}, "probes"), ({"steps": 0}, "steps"), ({"steps": 2.5}, "steps"), ({"seed": 2**64}, "seed")],
)
def test_bad_input_is_refused_before_any_product(arguments: dict[str, int], match: str) -> None:
    A = Matrix(goe(20))
    with pytest.raises(ValueError, match=f"spectral_density: {match} must be"):
        spectral_density(A, **arguments)
    assert A.count == 0
    rho = spectral_density(A, probes=2, steps=3)
    for bad in ({"sigma": 0.0}, {"level": 1.0}):
        with pytest.raises(ValueError, match="curve:"):
            rho.curve(**bad)
    with pytest.raises(ValueError, match="moment: order"):
        rho.moment(0)


def test_a_matrix_that_is_not_symmetric_is_refused() -> None:
    M = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="symmetric"):
        spectral_density(Matrix(M))
