"""The covariance of the gradient noise: its definition, exhaustive enumeration of masks, and its errors."""

import itertools
import math

import pytest
import torch
from torch import nn

import dropscope as ds
from cases import CASES, SHARED_MASKS, checkpointed, sample_gradients, shared_mask
from dropscope.problem import Problem
from dropscope.spectral import eigsh

M = 4


def covariances(G):
    """W and B of gradients (n, M, dim) by their definitions."""
    n, M = G.shape[:2]
    centred = (G - G.mean(1, keepdim=True)).flatten(0, 1)
    W = centred.T @ centred / (n * (M - 1))
    means = G.mean(1) - G.mean((0, 1))
    return W, means.T @ means / (n - 1) - W / M


@pytest.mark.parametrize("name", CASES)
def test_operators_are_their_definitions(name):
    problem = CASES[name].problem()
    n = problem.n
    W, B = covariances(sample_gradients(problem, 3, M))
    with ds.GradientNoise(problem, draws=M, seed=3) as noise:
        close = {"rtol": 0, "atol": 1e-10 * float(W.norm() + B.norm())}
        torch.testing.assert_close(noise.dropout.to_dense(), W / n, **close)
        torch.testing.assert_close(noise.sampling.to_dense(), B / n, **close)
        torch.testing.assert_close(noise.total.to_dense(), (W + B) / n, **close)
        assert noise.trace.value == pytest.approx(float(W.trace()) / n)
        split = noise.split()
        assert split.dropout == noise.trace
        assert split.sampling.value == pytest.approx(float(B.trace()) / n, abs=1e-12)
        assert split.total.value == pytest.approx(float((W + B).trace()) / n)
        mini = noise.batch(3)
        torch.testing.assert_close(mini.total.to_dense(), (W + B) / 3, **close)
        assert noise.dropout.blocks == problem.blocks


@pytest.mark.parametrize("name", ["mlp", "conv", "shared"])
def test_a_shared_mask_gives_the_covariance_of_full_gradients(name):
    problem = CASES[name].problem()
    G = sample_gradients(problem, 3, M, sharing="batch").mean(0)
    centred = G - G.mean(0)
    with ds.GradientNoise(problem, draws=M, seed=3, sharing="batch") as noise:
        torch.testing.assert_close(noise.dropout.to_dense(), centred.T @ centred / (M - 1), rtol=0, atol=1e-12)
        assert noise.trace.value == pytest.approx(float(centred.square().sum()) / (M - 1))
        with pytest.raises(ValueError, match="no split"):
            _ = noise.sampling
        with pytest.raises(ValueError, match="sharing"):
            noise.batch(2)


@pytest.mark.parametrize("cache", ["factors", "recompute"])
@pytest.mark.parametrize("sharing", ["sample", "batch"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_change_nothing(reentrant, sharing, cache):
    problem, plain = checkpointed(reentrant), checkpointed(None)
    options = {"draws": M, "seed": 3, "sharing": sharing, "cache": cache}
    with ds.GradientNoise(problem, **options) as noise, ds.GradientNoise(plain, **options) as expected:
        assert expected.trace.value > 0
        assert torch.equal(noise.dropout.to_dense(), expected.dropout.to_dense())
    assert problem.routes == plain.routes


@pytest.mark.parametrize("name", SHARED_MASKS)
def test_masks_that_samples_share_are_refused_but_as_shared(name):
    """DropConnect and LayerDrop: gradients of the samples of a batch are not independent given the weights."""
    problem, passes = shared_mask(name), []
    problem.check(masks=True)
    problem.model.register_forward_hook(lambda *_: passes.append(0))
    with pytest.raises(ValueError, match=f"independent across samples.*got {SHARED_MASKS[name]} in.*sharing='batch'"):
        ds.GradientNoise(problem, draws=M)
    assert not passes
    with ds.GradientNoise(problem, draws=M, seed=3, sharing="batch") as noise:
        G = torch.stack([problem.gradient(ds.MaskKey(3, m)) for m in range(M)])
        centred = G - G.mean(0)
        assert float(centred.norm()) > 0.01
        torch.testing.assert_close(noise.dropout.to_dense(), centred.T @ centred / (M - 1), rtol=0, atol=1e-14)


class Masked:
    """A network of two hidden layers with explicit masks, every one of which is enumerated."""

    p = 0.3
    widths = (3, 4)

    def __init__(self, n=4):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            a, b = self.widths
            layers = (nn.Linear(2, a), nn.Tanh(), nn.Dropout(self.p), nn.Linear(a, b), nn.Tanh(), nn.Dropout(self.p))
            self.model = nn.Sequential(*layers, nn.Linear(b, 1)).double()
            self.X, self.y = torch.randn(n, 2, dtype=torch.float64), torch.randn(n, 1, dtype=torch.float64)
        self.problem = Problem(self.model, nn.MSELoss(), (self.X, self.y))

    def gradients(self):
        """Probabilities of all masks, (masks,), and the gradient of every sample under each, (masks, n, dim)."""
        a, b = self.widths
        keep = ds.keep_probability(self.p)
        masks = torch.tensor(list(itertools.product((0.0, 1.0), repeat=a + b)), dtype=torch.float64)
        weights = torch.where(masks > 0, keep, 1 - keep).double().prod(1)
        names = [name for name, _ in self.model.named_parameters()]
        parameters = [p.detach() for p in self.model.parameters()]

        def loss(parameters, x, y, mask):
            W1, b1, W2, b2, W3, b3 = parameters
            h = torch.tanh(W1 @ x + b1) * mask[:a] / keep
            h = torch.tanh(W2 @ h + b2) * mask[a:] / keep
            return (W3 @ h + b3 - y).square().sum()

        assert names == [f"{i}.{kind}" for i in (0, 3, 6) for kind in ("weight", "bias")]
        gradient = torch.func.grad(loss)
        over = torch.func.vmap(torch.func.vmap(gradient, (None, 0, 0, None)), (None, None, None, 0))
        parts = over(parameters, self.X, self.y, masks)
        return weights, torch.cat([g.flatten(2) for g in parts], 2)


def exact(weights, g):
    """Covariance of g (masks, dim) under the weights."""
    centred = g - weights @ g
    return centred.T @ (weights[:, None] * centred)


@pytest.mark.parametrize("sharing", ["sample", "batch"])
def test_estimates_are_unbiased_against_every_mask(sharing):
    """Mean over 120 seeds of the estimate from 3 draws, against 2^7 masks, along 5 directions, the trace and B.

    Bands of 4.5 standard errors of the mean: false alarms below 1e-4 in all.
    """
    net = Masked()
    weights, g = net.gradients()
    n, seeds = 4, 120
    each = torch.stack([exact(weights, g[:, i]) for i in range(n)])
    truth = each.sum(0) / n**2 if sharing == "sample" else exact(weights, g.mean(1))
    means = torch.einsum("m,mnd->nd", weights, g)
    spread = (means - means.mean(0)).square().sum() / (n - 1) / n
    V = torch.linalg.qr(torch.randn(len(truth), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))).Q
    V[:, 0] = torch.linalg.eigh(truth).eigenvectors[:, -1]
    found = []
    for seed in range(seeds):
        with ds.GradientNoise(net.problem, draws=3, seed=seed, sharing=sharing) as noise:
            along = (V * (noise.dropout @ V)).sum(0)
            sampling = noise.split().sampling.value if sharing == "sample" else float(spread)
            found.append(torch.cat([along, torch.tensor([noise.trace.value, sampling], dtype=torch.float64)]))
    found = torch.stack(found)
    expected = torch.cat([(V * (truth @ V)).sum(0), truth.trace()[None], spread[None]])
    error = found.std(0) / seeds**0.5
    assert bool(((found.mean(0) - expected).abs() <= 4.5 * error + 1e-12).all())
    assert float(error[0] / expected[0]) < 0.1


def test_many_draws_approach_the_enumerated_covariance():
    net = Masked()
    weights, g = net.gradients()
    truth = sum(exact(weights, g[:, i]) for i in range(4)) / 16
    with ds.GradientNoise(net.problem, draws=1500) as noise:
        assert float((noise.dropout.to_dense() - truth).norm() / truth.norm()) < 0.1
        low, high = noise.trace.interval(0.9999)
        assert low < float(truth.trace()) < high


def test_intervals_cover_the_enumerated_truth():
    """95 % intervals of 150 seeds; with a true coverage of .95, fewer than .88 is a 4-sigma event."""
    net = Masked(n=12)
    weights, g = net.gradients()
    truth = sum(exact(weights, g[:, i]) for i in range(12)) / 144
    v = torch.linalg.eigh(truth).eigenvectors[:, -1]
    hits = []
    for seed in range(150):
        with ds.GradientNoise(net.problem, draws=8, seed=seed) as noise:
            estimates = {noise.trace: float(truth.trace()), noise.variance_along(v)[0]: float(v @ truth @ v)}
        for estimate, value in estimates.items():
            if estimate.status == "ok":
                low, high = estimate.interval()
                hits.append(low <= value <= high)
    assert len(hits) > 150
    assert 0.88 <= sum(hits) / len(hits) <= 0.995


def test_variance_along_is_the_quadratic_form():
    problem = CASES["mlp"].problem()
    V = torch.randn(problem.dim, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with ds.GradientNoise(problem, draws=5) as noise:
        unit = V / V.norm(dim=0)
        expected = (unit * (noise.dropout @ unit)).sum(0)
        estimates = noise.variance_along(V)
        torch.testing.assert_close(torch.tensor([e.value for e in estimates], dtype=torch.float64), expected)
        assert all(e.stderr > 0 and e.dof > 0 for e in estimates)
        (single,) = noise.variance_along(V[:, 0])
        assert single.value == pytest.approx(estimates[0].value)


@pytest.mark.parametrize("sharing", ["sample", "batch"])
def test_without_dropout_there_is_exactly_no_noise(sharing):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 33), nn.Tanh(), nn.Dropout(0.0), nn.Linear(33, 3))
        data = (torch.randn(37, 4), torch.randint(0, 3, (37,)))
    problem = Problem(model, nn.CrossEntropyLoss(), data, batch_size=10)
    with ds.GradientNoise(problem, draws=4, sharing=sharing) as noise:
        V = torch.randn(problem.dim, 2)
        assert torch.count_nonzero(noise.dropout @ V) == 0
        assert torch.count_nonzero(noise.gram()) == 0
        assert noise.trace.value == 0.0
        assert noise.variance_along(V)[1].interval() == (0.0, 0.0)
        assert noise.effective_samples == 0.0
        if sharing == "sample":
            G = sample_gradients(problem, 0, 1)[:, 0]
            expected = torch.cov(G.T.double()).trace() / 37
            assert noise.split().sampling.value == pytest.approx(float(expected), rel=1e-4)
            assert noise.split().total.value == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("cache", ["disk", "recompute", "bf16"])
def test_caches_give_the_same_operators(cache):
    problem = CASES["mlp"].problem()
    V = torch.randn(problem.dim, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with ds.GradientNoise(problem, draws=M) as noise:
        expected = noise.total @ V
    with ds.GradientNoise(problem, draws=M, cache=cache) as noise:
        tolerance = 0.03 if cache == "bf16" else 1e-12
        assert float((noise.total @ V - expected).norm() / expected.norm()) < tolerance


def test_answers_do_not_depend_on_the_batches():
    answers = []
    for size in (1, 4, 11):
        with ds.GradientNoise(CASES["mlp"].problem(batch_size=size), draws=M) as noise:
            answers.append(noise.dropout.to_dense())
    torch.testing.assert_close(answers[0], answers[2], rtol=0, atol=1e-15)
    torch.testing.assert_close(answers[1], answers[2], rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ["mlp", "conv", "gpt"])
def test_eigenpairs_are_those_of_the_matrix(name):
    problem = CASES[name].problem()
    with ds.GradientNoise(problem, draws=6) as noise:
        pairs = noise.eigsh(3)
        dense = torch.linalg.eigh(noise.dropout.to_dense())
        torch.testing.assert_close(pairs.values, dense.eigenvalues[-3:].flip(0), rtol=1e-6, atol=0)
        overlap = (pairs.vectors * dense.eigenvectors[:, -3:].flip(1)).sum(0).abs()
        assert float(overlap.min()) > 1 - 1e-6
        image = noise.dropout @ pairs.vectors
        true = (image - pairs.vectors * pairs.values).norm(dim=0)
        assert bool((true <= pairs.residuals + 1e-12 * pairs.values[0]).all())
        gram = noise.gram()
        torch.testing.assert_close(
            torch.linalg.eigvalsh(gram)[-3:].flip(0), dense.eigenvalues[-3:].flip(0), rtol=1e-9, atol=0
        )
        assert torch.equal(eigsh(noise.dropout, 1, "LA").converged, torch.tensor([True]))


def test_half_precision_says_what_it_costs():
    problem = CASES["mlp"].problem(dtype=torch.float32)
    with ds.GradientNoise(problem, draws=6) as noise:
        full, half = noise.eigsh(2), noise.eigsh(2, precision="bf16", tol=0.1)
    torch.testing.assert_close(half.values, full.values, rtol=0.03, atol=0)
    assert float(half.residuals[0]) > float(full.residuals[0])


def test_some_parameters_only():
    problem = CASES["mlp"].problem(params=["3.*", "0.bias"])
    W, _ = covariances(sample_gradients(problem, 3, M))
    with ds.GradientNoise(problem, draws=M, seed=3) as noise:
        torch.testing.assert_close(noise.dropout.to_dense(), W / problem.n)
    assert set(problem.routes) == {"0.bias", "3.weight", "3.bias"}


def test_cross_validated_values_bracket_the_truth():
    """Averaged over 30 seeds: the plain value is biased upwards, the cross-validated one downwards."""
    net = Masked(n=10)
    weights, g = net.gradients()
    truth = float(torch.linalg.eigvalsh(sum(exact(weights, g[:, i]) for i in range(10)) / 100)[-1])
    plain, crossed = [], []
    for seed in range(30):
        with ds.GradientNoise(net.problem, draws=8, seed=seed) as noise:
            pairs = noise.eigsh(1)
            plain.append(float(pairs.values[0]))
            crossed.append(pairs.cross_validated[0].value)
            assert pairs.cross_validated[0].stderr > 0
    assert sum(crossed) / 30 < truth < sum(plain) / 30


def test_few_draws_have_values_and_no_errors():
    with ds.GradientNoise(CASES["mlp"].problem(), draws=3) as noise:
        assert noise.trace.status == "no_error"
        assert math.isnan(noise.trace.stderr)
        assert noise.split().sampling.status == "no_error"
        assert math.isnan(noise.gain)
        assert noise.eigsh(2).cross_validated == ()


def test_effective_samples_gain_and_repr():
    problem = CASES["mlp"].problem()
    with ds.GradientNoise(problem, draws=40) as noise:
        assert 1 <= noise.effective_samples <= problem.n
        assert noise.gain == pytest.approx(
            max(1.0, (noise.kurtosis + 2 * noise.effective_samples) / (noise.kurtosis + 2))
        )
        assert "draws=40" in repr(noise)
        assert f"{noise.effective_samples:.4g} of {problem.n}" in str(noise)
        assert repr(noise.trace) in str(noise)
    assert "closed" in repr(noise)
    assert "closed" in str(noise)
    with pytest.raises(ValueError, match="closed"):
        _ = noise.dropout @ torch.zeros(problem.dim, dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"draws": 1}, ValueError, r"draws must be at least 2 and below 2\*\*32, got 1"),
        ({"draws": 2.0}, TypeError, "draws must be an int, got 2.0"),
        ({"draws": True}, TypeError, "draws must be an int"),
        ({"draws": 4, "seed": -1}, ValueError, "seed must lie in"),
        ({"draws": 4, "cache": "ram"}, ValueError, "cache must be one of"),
        ({"draws": 4, "sharing": "all"}, ValueError, "sharing must be 'sample' or 'batch', got 'all'"),
        ({"draws": 4, "memory": 0}, ValueError, "memory must be positive, got 0"),
        ({"draws": 4, "memory": 1.5}, TypeError, "memory must be an int"),
        ({"draws": 4, "memory": 10, "cache": "factors"}, ValueError, "memory must be at least"),
    ],
)
def test_bad_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        ds.GradientNoise(CASES["mlp"].problem(), **options)


def test_bad_directions_and_counts_are_refused():
    with pytest.raises(TypeError, match="problem must be a Problem, got Linear"):
        ds.GradientNoise(nn.Linear(2, 2), draws=4)
    problem = CASES["mlp"].problem()
    with ds.GradientNoise(problem, draws=4) as noise:
        with pytest.raises(TypeError, match="dtype"):
            noise.variance_along(torch.ones(problem.dim))
        with pytest.raises(TypeError, match=r"V must be a torch.Tensor, got int"):
            noise.variance_along(3)
        with pytest.raises(ValueError, match="rows"):
            noise.variance_along(torch.ones(3, dtype=torch.float64))
        with pytest.raises(ValueError, match="not zero"):
            noise.variance_along(torch.zeros(problem.dim, dtype=torch.float64))
        for k in (0, problem.dim + 1):
            with pytest.raises(ValueError, match="k must be an int"):
                noise.eigsh(k)
        with pytest.raises(ValueError, match="precision must be"):
            noise.eigsh(1, precision="fp8")
        with pytest.raises(ValueError, match="tol must lie"):
            noise.eigsh(1, tol=0.0)
        with pytest.raises(ValueError, match="size must be an int >= 1, got 0"):
            noise.batch(0)


@pytest.mark.parametrize("cache", ["factors", "recompute"])
def test_gradients_at_two_points_are_never_mixed(cache):
    """Stored gradients stay those of the first measurement; what would have to be taken again is refused."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    problem = ds.Problem(model, nn.CrossEntropyLoss(), (torch.randn(6, 3), torch.arange(6) % 2))
    v = torch.ones(problem.dim)
    with ds.GradientNoise(problem, draws=4, cache=cache) as noise:
        before = noise.dropout @ v
        assert torch.equal(noise.dropout @ v, before)
        with torch.no_grad():
            model[2].bias[0] += 1e-3
        if cache == "factors":
            assert torch.equal(noise.dropout @ v, before)
        else:
            with pytest.raises(ValueError, match=r"got a change of '2\.bias'"):
                noise.dropout @ v
