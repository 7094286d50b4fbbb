"""The analyses against closed forms and dense matrices."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cases import bowl
from dropscope import _files
from dropscope.analyses import fit_power_law, hessian_variance, variance_flatness
from dropscope.analyses.alignment import MaskError, measure_alignment
from dropscope.analyses.noise_source import noise_source
from dropscope.masks import keep_probability
from dropscope.operators.base import SymmetricOperator
from dropscope.operators.gradient_noise import GradientNoise
from dropscope.operators.hessian import Hessian
from dropscope.problem import Problem
from dropscope.spectral import eigsh

F64 = torch.float64


def dense(A: Tensor) -> SymmetricOperator:
    return SymmetricOperator.from_callable(lambda v: A @ v, A.shape[0], A.dtype)


def rotated(spectrum: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=F64))[0]
    return (Q * spectrum) @ Q.T, Q


# --- power law ---------------------------------------------------------------------------------------------------


def test_power_law_is_exact_on_a_law_and_blind_to_units() -> None:
    x = np.geomspace(1e-3, 1e4, 12)
    law = fit_power_law(x, 7.0 * x**-1.7)
    assert law.slope.value == pytest.approx(-1.7, abs=1e-9)
    assert law.prefactor == pytest.approx(7.0, rel=1e-9)
    assert law.r == pytest.approx(-1.0)
    assert law.spearman == pytest.approx(-1.0)
    np.testing.assert_allclose(law(x), 7.0 * x**-1.7)
    rng = np.random.default_rng(0)
    y = x**1.3 * np.exp(rng.normal(0, 0.5, 12))
    assert fit_power_law(1e6 * x, 1e-9 * y).slope.value == pytest.approx(fit_power_law(x, y).slope.value)


def test_power_law_leaves_out_what_has_no_logarithm_and_says_so() -> None:
    law = fit_power_law([1.0, 2.0, 4.0, 8.0, -1.0, 3.0, math.inf], [2.0, 4.0, 8.0, 16.0, 5.0, 0.0, 1.0])
    assert (law.points, law.left_out) == (4, 3)
    assert law.slope.value == pytest.approx(1.0)
    few = fit_power_law([1.0, 2.0], [1.0, 2.0])
    assert few.slope.status == "no_error"
    assert math.isnan(few.slope.value)


def test_power_law_interval_covers_with_unequal_errors_and_scatter() -> None:
    # 400 repeats: a true coverage of 0.95 falls below 0.90 with probability below 1e-4.
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        x = np.exp(rng.uniform(0.0, 5.0, 20))
        relative = rng.uniform(0.02, 0.3, 20)
        y = x**1.3 * np.exp(rng.normal(0, 0.2, 20) + relative * rng.normal(0, 1, 20))
        low, high = fit_power_law(x, y, relative * y).slope.interval(0.95)
        covered += low < 1.3 < high
    assert 0.90 <= covered / 400 <= 0.99


def test_power_law_weights_points_by_their_errors() -> None:
    x = np.geomspace(1.0, 100.0, 6)
    y = x.copy()
    y[-1] *= 5.0  # off the law, but with an error that says so
    errors = 0.01 * y
    errors[-1] = 10.0 * y[-1]
    assert fit_power_law(x, y, errors).slope.value == pytest.approx(1.0, abs=1e-3)
    assert fit_power_law(x, y).slope.value > 1.2


def test_power_law_refuses_unequal_lengths() -> None:
    with pytest.raises(ValueError, match=r"fit_power_law: x, y and y_stderr must be vectors of one length"):
        fit_power_law([1.0, 2.0, 3.0], [1.0, 2.0])


# --- alignment ---------------------------------------------------------------------------------------------------


def test_alignment_is_exact_when_the_basis_spans_everything() -> None:
    H, Q = rotated(torch.linspace(-1.0, 5.0, 10, dtype=F64), 0)
    S, _ = rotated(torch.linspace(0.1, 3.0, 10, dtype=F64), 1)
    got = measure_alignment(dense(H), dense(S), Q, probes=4)
    product, norms = float((H * S).sum()), float(H.norm() * S.norm())
    assert got.trace_product.value == pytest.approx(product, rel=1e-10)
    assert got.ratio.value == pytest.approx(product * 10 / float(H.trace() * S.trace()), rel=1e-10)
    assert got.cosine.value == pytest.approx(product / norms, rel=1e-10)
    assert got.null.value == pytest.approx(float(H.trace() * S.trace()) / 10 / norms, rel=1e-10)
    assert got.cosine.stderr < 1e-8


def test_alignment_intervals_cover_when_most_is_left_to_the_probes() -> None:
    # 200 repeats of 95 % intervals; a true coverage of 0.95 falls below 0.89 with probability below 1e-3.
    H, Q = rotated(torch.logspace(-2, 1, 40, dtype=F64), 2)
    S, _ = rotated(torch.logspace(-1, 0, 40, dtype=F64), 3)
    product, trace, norm = float((H * S).sum()), float(H.trace()), float(S.norm())
    hits = np.zeros(3)
    for seed in range(200):
        got = measure_alignment(dense(H), dense(S), Q[:, -2:], probes=12, seed=seed)
        for j, (estimate, truth) in enumerate(
            ((got.trace_product, product), (got.trace_h, trace), (got.frobenius_noise, norm))
        ):
            low, high = estimate.interval(0.95)
            hits[j] += low < truth < high
    assert (hits / 200 > 0.89).all(), hits


def test_null_is_the_mean_cosine_over_random_eigenvectors() -> None:
    spectrum_h, spectrum_s = torch.logspace(-1, 1, 12, dtype=F64), torch.logspace(-2, 1, 12, dtype=F64)
    S = torch.diag(spectrum_s)
    cosines = []
    for seed in range(300):
        H, _ = rotated(spectrum_h, seed)
        cosines.append(float((H * S).sum() / (H.norm() * S.norm())))
    got = measure_alignment(dense(H), dense(S), torch.eye(12, dtype=F64), probes=2)
    error = float(np.std(cosines)) / math.sqrt(len(cosines))
    assert abs(float(np.mean(cosines)) - got.null.value) < 4 * error


def test_isotropic_noise_has_ratio_one_and_shared_mask_errors_cancel() -> None:
    H, Q = rotated(torch.linspace(0.5, 4.0, 16, dtype=F64), 4)
    identity = dense(0.3 * torch.eye(16, dtype=F64))
    got = measure_alignment(dense(H), identity, Q[:, :5], probes=4)
    assert got.ratio.value == pytest.approx(1.0, rel=1e-10)
    assert got.ratio.stderr < 1e-8
    wider = measure_alignment(dense(H), identity, Q[:, :5], probes=4, masks=MaskError(0.01 * np.ones((3, 3)), dof=3))
    assert wider.trace_product.stderr >= 0.1 * abs(wider.trace_product.value)
    assert wider.trace_product.dof == 3
    assert wider.ratio.stderr < 1e-8  # an error that all share leaves ratios alone
    unknown = measure_alignment(dense(H), identity, Q[:, :5], probes=4, masks=MaskError(np.full((3, 3), np.nan)))
    assert unknown.ratio.status == "no_error"
    assert unknown.trace_h.status == "ok"


# --- Hessian and variance ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [-1.0, 0.5, 2.0])
def test_hessian_variance_recovers_a_known_exponent(exponent: float) -> None:
    spectrum = torch.logspace(-2, 2, 30, dtype=F64)
    H, Q = rotated(spectrum, 5)
    S = (Q * spectrum**exponent) @ Q.T
    got = hessian_variance(dense(H), dense(S), k=12, tol=1e-8)
    assert got.law.slope.value == pytest.approx(exponent, abs=1e-3)
    assert abs(got.law.r) == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(got.eigenvalues, spectrum.flip(0)[:12], rtol=1e-6, atol=0.0)
    assert bool(got.converged.all())
    assert got.status == "ok"


def test_hessian_variance_fits_positive_eigenvalues_only() -> None:
    H, Q = rotated(torch.tensor([-3.0, -2.0, -1.0, 1.0, 2.0, 4.0, 8.0], dtype=F64), 6)
    S = Q @ torch.diag(torch.tensor([9.0, 4.0, 1.0, 1.0, 4.0, 16.0, 64.0], dtype=F64)) @ Q.T
    got = hessian_variance(dense(H), dense(S), k=7, tol=1e-10)
    assert (got.law.points, got.law.left_out) == (4, 3)
    assert got.law.slope.value == pytest.approx(2.0, abs=1e-6)


def test_masks_that_drop_nothing_have_no_alignment() -> None:
    """Equal draws have trace zero, and products with their covariance are rounding, which has no cosine."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.SELU(), nn.Dropout(1e-5), nn.Linear(5, 3)).double()
    problem = Problem(model, nn.CrossEntropyLoss(), (torch.randn(50, 4, dtype=F64), torch.randint(0, 3, (50,))))
    noise = GradientNoise(problem, draws=6, seed=0)
    assert not noise.table.quiet  # masks are drawn
    assert noise.trace.value == 0.0
    alignment = hessian_variance(Hessian(problem), noise, k=3).alignment
    assert math.isnan(alignment.ratio.value)
    assert math.isnan(alignment.cosine.value)


def test_hessian_variance_saves_and_tabulates(tmp_path) -> None:
    H, _ = rotated(torch.logspace(-1, 1, 12, dtype=F64), 7)
    got = hessian_variance(dense(H), dense(H @ H), k=5)
    saved = json.loads(got.save(tmp_path / "relation.json").read_text())
    assert saved["type"] == "HessianVariance"
    assert saved["law"]["slope"]["value"] == pytest.approx(got.law.slope.value)
    arrays, rest = _files.read_arrays(got.save(tmp_path / "relation.safetensors"))
    torch.testing.assert_close(arrays["eigenvalues"], got.eigenvalues)
    assert rest["dim"] == 12
    assert [row["eigenvalue"] for row in got.table()] == got.eigenvalues.tolist()
    assert "Var ~ λ^(2.00" in repr(got)
    with pytest.raises(ValueError, match=r"save: path must end in \.json or \.safetensors"):
        got.save(tmp_path / "relation.pickle")


def test_hessian_variance_refuses_bad_input() -> None:
    A = dense(torch.eye(6, dtype=F64))
    with pytest.raises(TypeError, match=r"hessian_variance: H must be a SymmetricOperator, got Tensor"):
        hessian_variance(torch.eye(6), A)
    with pytest.raises(TypeError, match=r"hessian_variance: noise must be a GradientNoise or a SymmetricOperator"):
        hessian_variance(A, "noise")
    with pytest.raises(ValueError, match=r"hessian_variance: k must be an int in \[1, 6\], got 7"):
        hessian_variance(A, A, k=7)
    with pytest.raises(ValueError, match=r"hessian_variance: noise must match H"):
        hessian_variance(A, dense(torch.eye(5, dtype=F64)), k=2)
    with pytest.raises(ValueError, match=r"hessian_variance: probes must be an int of at least 2, got 1"):
        hessian_variance(A, A, k=2, probes=1)
    with pytest.raises(ValueError, match=r"hessian_variance: top must hold at least 3 eigenvectors of length 6"):
        hessian_variance(A, A, k=3, top=eigsh(A, 2))


# --- flatness ----------------------------------------------------------------------------------------------------


def test_variance_flatness_of_a_quadratic_has_the_exponent_of_theory() -> None:
    # R = ½ Σ c θ² and Σ = diag(c²): F = 2 √(2R/c), so that λ = c² falls as F⁻⁴.
    curvature = torch.logspace(0, 3, 8, dtype=F64)
    got = variance_flatness(bowl(curvature.tolist()), dense(torch.diag(curvature**2)), k=6, tol=1e-8)
    assert got.law.slope.value == pytest.approx(-4.0, abs=0.02)
    assert got.law.spearman == pytest.approx(-1.0)
    torch.testing.assert_close(got.eigenvalues, (curvature**2).flip(0)[:6], rtol=1e-6, atol=0.0)
    assert len(got.table()) == 6


def test_isotropic_noise_shows_no_inverse_relation() -> None:
    curvature = torch.logspace(0, 3, 8, dtype=F64)
    got = variance_flatness(bowl(curvature.tolist()), dense(torch.eye(8, dtype=F64)), k=6)
    assert abs(got.law.slope.value) < 1e-6


def test_variance_flatness_refuses_bad_input() -> None:
    problem = bowl([1.0, 2.0])
    with pytest.raises(ValueError, match=r"variance_flatness: noise must match the problem"):
        variance_flatness(problem, dense(torch.eye(3, dtype=F64)), k=1)
    with pytest.raises(ValueError, match=r"variance_flatness: k must be an int in \[1, 2\], got 0"):
        variance_flatness(problem, dense(torch.eye(2, dtype=F64)), k=0)


# --- sampled noise -----------------------------------------------------------------------------------------------


def toy(seed: int = 0) -> Problem:
    """A network with 5 dropped units on 3 samples: 2⁵ masks each, so that everything about its noise is known."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, 1)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=F64))
    X, y = (torch.randn(3, width, generator=generator, dtype=F64) for width in (2, 1))
    return Problem(model, nn.MSELoss(), (X, y))


def exact_covariance(problem: Problem) -> Tensor:
    """Σ = n⁻² Σ_i Cov(g_i) by summing over every mask, without any of the package's noise code."""
    first, _, drop, last = problem.model
    keep = keep_probability(drop.p)
    (X, y), total = next(problem.batches()).content, torch.zeros(problem.dim, problem.dim, dtype=F64)
    for x, target in zip(X, y, strict=True):
        mean, second = torch.zeros(problem.dim, dtype=F64), torch.zeros(problem.dim, problem.dim, dtype=F64)
        for bits in range(32):
            mask = torch.tensor([bits >> u & 1 for u in range(5)], dtype=F64)
            weight = float(torch.prod(torch.where(mask > 0, keep, 1.0 - keep)))
            loss = (last(torch.tanh(first(x)) * mask / keep) - target).square().sum()
            g = problem.flatten(torch.autograd.grad(loss, list(problem.params.values())))
            mean, second = mean + weight * g, second + weight * torch.outer(g, g)
        total += (second - torch.outer(mean, mean)) / 9.0
    return total


def test_noise_source_knows_the_bias_of_the_squared_norm() -> None:
    # 120 repeats; the mean of the corrected estimates stays within 4 of its standard errors of the truth.
    problem = toy()
    truth = float(exact_covariance(problem).square().sum())
    raw, corrected = [], []
    for seed in range(120):
        with GradientNoise(problem, draws=6, seed=seed) as noise:
            source = noise_source(noise, "test")
            raw.append(float(source.operator.to_dense().square().sum()))
            corrected.append(raw[-1] - source.square_bias)
    error = np.std(corrected) / math.sqrt(len(corrected))
    assert abs(np.mean(corrected) - truth) < 4 * error
    assert np.mean(raw) - truth > 4 * error, "the correction would not matter here"


def test_alignment_of_sampled_noise_covers_the_exact_ratio_and_cosine() -> None:
    # 80 repeats of jackknife intervals with 23 degrees of freedom; below 0.85 with probability below 1e-3 at 0.95.
    problem = toy(1)
    S, H = exact_covariance(problem), Hessian(problem)
    dense_h = H.to_dense()
    product = float((dense_h * S).sum())
    ratio = product * problem.dim / float(dense_h.trace() * S.trace())
    cosine = product / float(dense_h.norm() * S.norm())
    top = eigsh(H, problem.dim, which="LA", tol=1e-8)
    hits = np.zeros(2)
    for seed in range(80):
        with GradientNoise(problem, draws=24, seed=seed) as noise:
            got = hessian_variance(H, noise, problem.dim, top=top, probes=2).alignment
        for j, (estimate, truth) in enumerate(((got.ratio, ratio), (got.cosine, cosine))):
            reach = 2.07 * estimate.stderr  # t(23), the probes being without error here
            hits[j] += abs(estimate.value - truth) < reach
    assert (hits / 80 > 0.85).all(), hits / 80


def test_noise_and_its_dropout_operator_are_the_same_noise() -> None:
    problem = toy(2)
    H = Hessian(problem)
    with GradientNoise(problem, draws=8, seed=0) as noise:
        one, other = hessian_variance(H, noise, 5), hessian_variance(H, noise.dropout, 5)
        assert [v.value for v in one.variances] == [v.value for v in other.variances]
        assert other.variances[0].stderr > 0.0
        plain = hessian_variance(H, 1.0 * noise.dropout, 5)
    assert plain.variances[0].stderr == 0.0
    assert plain.variances[0].value == pytest.approx(one.variances[0].value, rel=1e-9)


def test_two_draws_give_values_without_errors() -> None:
    problem = toy(3)
    with GradientNoise(problem, draws=2, seed=0) as noise:
        got = hessian_variance(Hessian(problem), noise, 4)
    assert got.status == "no_error"
    assert got.alignment.ratio.status == "no_error"
    assert math.isfinite(got.alignment.ratio.value)


def test_variance_flatness_takes_the_noise_by_its_own_route() -> None:
    problem = toy(4)
    with GradientNoise(problem, draws=32, seed=0) as noise:
        got = variance_flatness(problem, noise, 4)
        S = noise.dropout.to_dense()
    values = torch.linalg.eigvalsh(S).flip(0)[:4]
    torch.testing.assert_close(got.eigenvalues, values, rtol=1e-3, atol=1e-3 * float(values[0]))
    assert all(v.stderr > 0.0 for v in got.variances)
