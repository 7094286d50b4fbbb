"""Unequal numbers of draws: allocated by the gradient with dropout off, or added until the trace is known well."""

import math

import pytest
import torch

import dropscope as ds
from cases import CASES, sample_gradients
from dropscope.factors.allocation import allocate
from dropscope.operators import noise_statistics as statistics
from test_gradient_noise import Masked, exact


def gradients(noise):
    """The drawn gradients of every sample, (M_i, dim) each."""
    G = sample_gradients(noise.problem, noise.seed, int(noise.counts.max()))
    return [rows[:M] for rows, M in zip(G, noise.counts.tolist(), strict=True)]


def definitions(rows):
    """Covariance over draws of the mean gradient, and of the samples' means less what the draws put into it."""
    n = len(rows)
    C = torch.stack([torch.cov(g.T) for g in rows])
    means = torch.stack([g.mean(0) for g in rows])
    error = sum(c / len(g) for c, g in zip(C, rows, strict=True)) / n
    return C.sum(0) / n**2, (torch.cov(means.T) - error) / n


def test_draws_follow_the_root_of_the_gradient():
    norms = torch.logspace(-4, 2, 400, dtype=torch.float64)[torch.randperm(400)]
    counts = allocate(norms, 8)
    assert 7.8 <= float(counts.double().mean()) <= 8.0
    assert int(counts.min()) >= 2
    extra, shape = (counts - 2).double(), norms.sqrt()
    kept = extra >= 4
    ratio = extra[kept] / shape[kept]
    assert float(ratio.max() / ratio.min()) < 1.6  # levels are at most half as much again apart
    order = norms.argsort()
    assert bool((counts[order][1:] >= counts[order][:-1]).all())
    assert len(counts.unique()) < 20
    assert allocate(norms, 2).tolist() == [2] * 400
    assert allocate(torch.zeros(5, dtype=torch.float64), 6).tolist() == [6] * 5
    assert allocate(torch.ones(5, dtype=torch.float64), 6).tolist() == [6] * 5


@pytest.mark.parametrize("name", CASES)
def test_operators_are_their_definitions(name):
    problem = CASES[name].problem()
    with ds.GradientNoise(problem, draws=9, seed=3, allocation="gradient") as noise:
        assert len(noise.counts.unique()) > 1
        dropout, sampling = definitions(gradients(noise))
        close = {"rtol": 0, "atol": 1e-10 * float(dropout.norm() + sampling.norm())}
        torch.testing.assert_close(noise.dropout.to_dense(), dropout, **close)
        torch.testing.assert_close(noise.sampling.to_dense(), sampling, **close)
        torch.testing.assert_close(noise.total.to_dense(), dropout + sampling, **close)
        torch.testing.assert_close(noise.batch(2).total.to_dense(), (dropout + sampling) * problem.n / 2, **close)
        assert noise.trace.value == pytest.approx(float(dropout.trace()))
        split = noise.split()
        assert split.sampling.value == pytest.approx(float(sampling.trace()), abs=1e-12)
        assert split.total.value == pytest.approx(float((dropout + sampling).trace()), abs=1e-12)
        V = torch.randn(problem.dim, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        V /= V.norm(dim=0)
        found = [e.value for e in noise.variance_along(V)]
        assert found == pytest.approx((V * (dropout @ V)).sum(0).tolist())
        assert f"draws=9 ({int(noise.counts.min())} to" in repr(noise)


@pytest.mark.parametrize("name", ["mlp", "gpt"])
def test_gram_and_eigenpairs_are_those_of_the_covariance(name):
    problem = CASES[name].problem()
    with ds.GradientNoise(problem, draws=9, allocation="gradient") as noise:
        rows = [(g - g.mean(0)) / (problem.n * (len(g) - 1) ** 0.5) for g in gradients(noise)]
        X = torch.cat(rows)
        torch.testing.assert_close(noise.gram(), X @ X.T, rtol=0, atol=1e-10 * float(X.square().sum()))
        dense = torch.linalg.eigh(X.T @ X)
        for verify in ("each", "together"):
            pairs = noise.eigsh(3, verify=verify)
            torch.testing.assert_close(pairs.values, dense.eigenvalues[-3:].flip(0), rtol=1e-6, atol=0)
            assert float((pairs.vectors * dense.eigenvectors[:, -3:].flip(1)).sum(0).abs().min()) > 1 - 1e-5
            assert bool(pairs.converged.all())
        assert len(pairs.cross_validated) == 3
        assert all(0 < e.value < float(v) for e, v in zip(pairs.cross_validated, pairs.values, strict=True))


@pytest.mark.parametrize("cache", ["disk", "recompute"])
def test_caches_give_the_same_operators(cache):
    problem = CASES["mlp"].problem()
    V = torch.randn(problem.dim, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with ds.GradientNoise(problem, draws=9, allocation="gradient") as noise:
        expected = noise.total @ V
    with ds.GradientNoise(problem, draws=9, allocation="gradient", cache=cache) as noise:
        torch.testing.assert_close(noise.total @ V, expected, rtol=0, atol=1e-12 * float(expected.norm()))


def test_estimates_are_unbiased_against_every_mask():
    """Mean over 120 seeds with a mean of 4 draws, against 2^7 masks, along 5 directions, the trace and B.

    Bands of 4.5 standard errors of the mean: false alarms below 1e-4 in all.
    """
    net = Masked(n=6)
    weights, g = net.gradients()
    n = 6
    truth = sum(exact(weights, g[:, i]) for i in range(n)) / n**2
    means = torch.einsum("m,mnd->nd", weights, g)
    spread = (means - means.mean(0)).square().sum() / (n - 1) / n
    V = torch.linalg.qr(torch.randn(len(truth), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))).Q
    V[:, 0] = torch.linalg.eigh(truth).eigenvectors[:, -1]
    found, counts = [], set()
    for seed in range(120):
        with ds.GradientNoise(net.problem, draws=4, seed=seed, allocation="gradient") as noise:
            along = (V * (noise.dropout @ V)).sum(0)
            values = [noise.trace.value, noise.split().sampling.value]
            found.append(torch.cat([along, torch.tensor(values, dtype=torch.float64)]))
            counts.add(tuple(noise.counts.tolist()))
    assert len(counts) == 1, "the masks decided how many draws there are"
    assert len(set(counts.pop())) > 1
    found = torch.stack(found)
    expected = torch.cat([(V * (truth @ V)).sum(0), truth.trace()[None], spread[None]])
    error = found.std(0) / 120**0.5
    assert bool(((found.mean(0) - expected).abs() <= 4.5 * error + 1e-12).all())
    assert float(error[0] / expected[0]) < 0.1


def test_intervals_cover_the_enumerated_truth():
    """95 % intervals of 100 seeds, trace, a direction (mostly heavy_tailed here), and both traces of the split.

    With a true coverage of .95, fewer than .87 of 100 is below 1e-3; intervals may be too wide, where few draws are
    bounded by their squares.
    """
    net = Masked(n=12)
    weights, g = net.gradients()
    truth = sum(exact(weights, g[:, i]) for i in range(12)) / 144
    means = torch.einsum("m,mnd->nd", weights, g)
    spread = float((means - means.mean(0)).square().sum()) / 11 / 12
    v = torch.linalg.eigh(truth).eigenvectors[:, -1]
    trace = float(truth.trace())
    hits = {"trace": [], "direction": [], "sampling": [], "total": []}
    for seed in range(100):
        with ds.GradientNoise(net.problem, draws=9, seed=seed, allocation="gradient") as noise:
            split = noise.split()
            found = {
                "trace": (noise.trace, trace),
                "direction": (noise.variance_along(v)[0], float(v @ truth @ v)),
                "sampling": (split.sampling, spread),
                "total": (split.total, spread + trace),
            }
        for name, (estimate, value) in found.items():
            if estimate.status == "ok":
                low, high = estimate.interval()
                hits[name].append(low <= value <= high)
    assert all(len(hits[name]) > 50 for name in ("trace", "sampling", "total"))
    for name, seen in hits.items():
        assert len(seen) <= 50 or sum(seen) / len(seen) >= 0.87, name


def test_errors_of_few_draws_are_bounded_from_above():
    nan = math.nan
    values = torch.tensor([4.0, 1.0], dtype=torch.float64)
    known, partly, none = (torch.tensor(x, dtype=torch.float64) for x in ([2.0, 0.5], [2.0, nan], [nan, nan]))
    assert statistics.bounded(known, values).tolist() == [2.0, 0.5]
    assert statistics.bounded(partly, values).tolist() == [2.0, 1.0]
    assert bool(statistics.bounded(none, values).isnan().all())
    estimate = statistics.scale_estimate(values, partly, partly)
    assert (estimate.value, estimate.stderr) == (5.0, 3.0**0.5)


def test_target_adds_draws_until_the_trace_is_known():
    net = Masked(n=12)
    with ds.GradientNoise(net.problem, draws=4, seed=1) as noise:
        assert noise.trace.stderr / noise.trace.value > 0.1
    for allocation in ("uniform", "gradient"):
        with ds.GradientNoise(net.problem, draws=4, seed=1, target=0.1, allocation=allocation) as noise:
            assert 4 < noise.draws < 512
            assert noise.trace.stderr <= 0.1 * noise.trace.value
            draws = noise.draws
            dense = noise.dropout.to_dense()
        with ds.GradientNoise(net.problem, draws=draws, seed=1, allocation=allocation) as noise:
            torch.testing.assert_close(noise.dropout.to_dense(), dense, rtol=0, atol=1e-15)
    with ds.GradientNoise(net.problem, draws=2, seed=1, target=0.9) as noise:
        assert noise.draws >= 4, "two draws have no error to stop by"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"allocation": "pilot"}, ValueError, "allocation must be one of .* got 'pilot'"),
        ({"allocation": "gradient", "sharing": "batch"}, ValueError, "must be 'uniform' under sharing='batch'"),
        ({"target": "low"}, TypeError, "target must be a float or None, got 'low'"),
        ({"target": 0.0}, ValueError, r"target must lie in \(0, 1\), got 0.0"),
    ],
)
def test_bad_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        ds.GradientNoise(CASES["mlp"].problem(), draws=4, **options)


def test_values_beyond_the_rank_are_zeros():
    """Six samples of two draws have at most six directions; later pairs are zeros, said so, and meet no noise."""
    problem = CASES["mlp"].problem()
    small = ds.Problem(problem.model, problem.loss.loss, _first(problem, 6))
    with ds.GradientNoise(small, draws=2) as noise:
        rank = int(torch.linalg.matrix_rank(noise.dropout.to_dense(), hermitian=True, rtol=1e-10))
        assert 1 < rank <= 6
        for k in (rank + 1, 8):  # through the Gram matrix, which has six contrasts, and through products
            pairs = noise.eigsh(k)
            assert pairs.status.name == "RANK"
            assert int((pairs.values > 0).sum()) == rank
            assert pairs.values[rank:].tolist() == [0.0] * (k - rank)
            image = (noise.dropout @ pairs.vectors[:, rank:]).norm(dim=0)
            assert float(image.max()) < 1e-10 * float(pairs.values[0])
        assert noise.eigsh(rank).status.name == "CONVERGED"


def _first(problem, n):
    batch = next(iter(problem.batches())).select(slice(0, n))
    return tuple(batch.content)
