"""The error formulas of the dropout noise, against enumeration and against repeats."""

import itertools
import math

import pytest
import torch

from dropscope.operators import noise_statistics as ns


def draws(n, M, dim, repeats, law, seed):
    """Rows of `repeats` independent tables, (repeats, n, M, dim), and the true covariances (n, dim, dim)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, dim, dim, generator=generator, dtype=torch.float64)
    shape = (repeats, n, M, dim)
    if law == "normal":
        z = torch.randn(shape, generator=generator, dtype=torch.float64)
    else:  # masks: Bernoulli(p) in {1/p - 1, -1}, p = .8: skewed, kurtosis not zero
        keep = torch.rand(shape, generator=generator, dtype=torch.float64) < 0.8
        z = torch.where(keep, 0.25, -1.0).double() / math.sqrt(0.25)
    return torch.einsum("rnmj,nij->rnmi", z, mix), mix @ mix.mT


def grams(X):
    return (X @ X.mT).flatten(0, -3)


@pytest.mark.parametrize("M", [4, 5, 7])
def test_one_dimension_and_gram_formulas_agree(M):
    x = torch.randn(9, M, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(M)) ** 3 + 2.0
    moments = ns.trace_moments(grams(x))
    variance, error, gaussian = ns.direction_moments(x)
    torch.testing.assert_close(moments.trace, variance[:, 0])
    torch.testing.assert_close(moments.variance, error[:, 0])
    torch.testing.assert_close(moments.gaussian, gaussian[:, 0])
    assembled = moments.cumulant / M + 2 * moments.trace_of_square / (M - 1)
    torch.testing.assert_close(moments.variance, assembled)


@pytest.mark.parametrize("M", [4, 6])
def test_trace_variance_is_the_disjoint_pair_formula(M):
    X = torch.randn(3, M, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    h = 0.5 * torch.cdist(X, X, compute_mode="donot_use_mm_for_euclid_dist").square()
    a = h.sum((1, 2)) / 2
    b = h.sum(2).square().sum(1)
    c = h.square().sum((1, 2)) / 2
    t = 2 * a / (M * (M - 1))
    V = t**2 - 4 * (a**2 - b + c) / (M * (M - 1) * (M - 2) * (M - 3))
    moments = ns.trace_moments(grams(X))
    torch.testing.assert_close(moments.trace, t)
    torch.testing.assert_close(moments.variance, V)


def test_moments_are_unbiased_over_every_outcome_of_a_discrete_law():
    """Exact expectation: all 3^4 tables of M = 4 draws from a skewed three-point law in two dimensions."""
    points = torch.tensor([[0.0, 1.0], [2.0, -1.0], [-1.0, 3.0]], dtype=torch.float64)
    weights = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    centred = points - weights @ points
    C = centred.T @ (weights[:, None] * centred)
    square = float((C @ C).trace())
    kappa = float(weights @ centred.square().sum(1).square()) - float(C.trace()) ** 2 - 2 * square
    index = torch.tensor(list(itertools.product(range(3), repeat=4)))
    X, w = points[index], weights[index].prod(1)
    moments = ns.trace_moments(grams(X))
    truth = {
        "trace": float(C.trace()),
        "squared_trace": float(C.trace()) ** 2,
        "trace_of_square": square,
        "cumulant": kappa,
        "variance": kappa / 4 + 2 * square / 3,
    }
    for name, value in truth.items():
        assert float(w @ getattr(moments, name)) == pytest.approx(value, rel=1e-12), name
    spread = float(w @ moments.trace**2) - float(w @ moments.trace) ** 2
    assert float(w @ moments.variance) == pytest.approx(spread, rel=1e-12)
    variance, error, _ = ns.direction_moments(X)
    torch.testing.assert_close(w @ error, w @ variance**2 - (w @ variance) ** 2)
    torch.testing.assert_close(w @ variance, C.diagonal())


def test_gaussian_forms_are_unbiased_for_gaussian_noise():
    """4000 repeats of 5 samples; bands of four standard errors of the mean (false alarm 6e-5 each)."""
    X, C = draws(5, 6, 3, 4000, "normal", 3)
    gaussian = ns.trace_moments(grams(X)).gaussian.reshape(4000, 5).sum(1)
    truth = float(2 * (C @ C).diagonal(dim1=1, dim2=2).sum() / 5)
    # clamping at zero biases a rank-one sample's form upwards a little
    assert -4 * float(gaussian.std()) / 4000**0.5 < float(gaussian.mean()) - truth < 0.02 * truth
    gaussian = ns.direction_moments(X.flatten(0, 1)[..., :1])[2].reshape(4000, 5).sum(1)
    truth = float(2 * C[:, 0, 0].square().sum() / 5)
    assert abs(float(gaussian.mean()) - truth) < 4 * float(gaussian.std()) / 4000**0.5


@pytest.mark.parametrize("law", ["normal", "mask"])
@pytest.mark.parametrize("kind", ["trace", "direction"])
def test_intervals_cover(law, kind):
    """Coverage of 95 % intervals over 1500 repeats lies in [.92, .98] where not heavy_tailed.

    A true coverage of .95 has a standard error of .0056 here, so a false alarm is a 5-sigma event.
    """
    n, M, repeats = 40, 5, 1500
    X, C = draws(n, M, 3, repeats, law, 11)
    if kind == "trace":
        moments = ns.trace_moments(grams(X))
        parts = (moments.trace, moments.variance, moments.gaussian)
        truth = float(C.diagonal(dim1=1, dim2=2).sum())
    else:
        parts = tuple(part[:, 0] for part in ns.direction_moments(X.flatten(0, 1)[..., :1]))
        truth = float(C[:, 0, 0].sum())
    table = [part.reshape(repeats, n) for part in parts]
    estimates = [ns.scale_estimate(*(part[r] for part in table), factor=2.0) for r in range(repeats)]
    sound = [e for e in estimates if e.status == "ok"]
    assert len(sound) > 0.5 * repeats
    covered = sum(low <= 2 * truth <= high for low, high in (e.interval(0.95) for e in sound)) / len(sound)
    assert 0.92 <= covered <= 0.98
    values = torch.tensor([e.value for e in estimates], dtype=torch.float64)
    assert abs(float(values.mean()) - 2 * truth) < 4 * float(values.std()) / repeats**0.5
    stated = sum(e.stderr**2 for e in estimates) / repeats
    assert stated == pytest.approx(float(values.var()), rel=0.15)


def test_rare_masks_are_called_heavy_tailed():
    x = torch.zeros(50, 8, 1, dtype=torch.float64)
    x[3, 2] = 1.0
    estimate = ns.scale_estimate(*(part[:, 0] for part in ns.direction_moments(x)))
    assert estimate.status == "heavy_tailed"
    assert "draws" in estimate.remedy


def test_few_draws_give_values_without_errors():
    X = torch.randn(6, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments = ns.trace_moments(grams(X))
    estimate = ns.scale_estimate(moments.trace, moments.variance, moments.gaussian)
    assert estimate.status == "no_error"
    assert math.isnan(estimate.stderr)
    assert estimate.value == pytest.approx(float(X.var(1).sum()))
    assert math.isnan(ns.effective_samples(moments))
    assert math.isnan(ns.gain(ns.effective_samples(moments), ns.kurtosis(moments)))


def test_effective_samples_and_kurtosis_are_their_definitions():
    """6 samples of known covariance, 1200 draws each: the estimates' own errors are a few per cent."""
    X, C = draws(6, 1200, 2, 1, "mask", 5)
    size = torch.tensor([3.0, 1, 1, 0.1, 0.1, 0.1], dtype=torch.float64)
    X = X[0] * size[:, None, None]
    traces = C.diagonal(dim1=1, dim2=2).sum(1) * size**2
    expected = float(traces.sum() ** 2 / traces.square().sum())
    assert ns.effective_samples(ns.trace_moments(grams(X))) == pytest.approx(expected, rel=0.12)
    one = X[:1, :, :1]
    z = ns.centre(one, 1)[0, :, 0]
    plain = float(z.pow(4).mean() / z.square().mean() ** 2 - 3)
    assert ns.kurtosis(ns.trace_moments(grams(one))) == pytest.approx(plain, rel=0.03)
    normal, _ = draws(60, 50, 3, 1, "normal", 6)
    assert abs(ns.kurtosis(ns.trace_moments(grams(normal)))) < 0.2


def test_gain_is_the_ratio_of_the_two_estimators_errors():
    """Error of D full-batch draws over the error of M draws a sample, at the same number of gradients."""
    assert ns.gain(100.0, 0.0) == pytest.approx(100.0)
    assert ns.gain(1.0, 7.0) == pytest.approx(1.0)
    n, M, repeats = 12, 20, 4000
    X, _ = draws(n, M, 1, repeats, "mask", 8)
    ours = X.var(2)[..., 0].sum(1)
    loop = X.sum(1)[..., 0].var(1)
    pooled = X[:25].permute(1, 0, 2, 3).reshape(n, -1, 1)
    moments = ns.trace_moments(grams(pooled))
    G = ns.gain(ns.effective_samples(moments), ns.kurtosis(moments))
    assert float(loop.var() / ours.var()) == pytest.approx(G, rel=0.15)


def test_equal_draws_have_exactly_no_noise():
    x = torch.full((4, 7, 3), 0.1)
    assert torch.count_nonzero(ns.centre(x, 1)) == 0
    moments = ns.trace_moments(torch.full((4, 7, 7), 0.1))
    estimate = ns.scale_estimate(moments.trace, moments.variance, moments.gaussian)
    assert (estimate.value, estimate.stderr, estimate.status) == (0.0, 0.0, "ok")
    assert ns.effective_samples(moments) == 0.0
    assert ns.kurtosis(moments) == 0.0
