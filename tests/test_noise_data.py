"""Random gradient and trajectory data: laws of isotropic noise, bowls and Ornstein–Uhlenbeck, and agreement with Σ."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import dropscope as ds
from dropscope.analyses import NoiseData, gradient_data, noise_data, trajectory_data
from dropscope.analyses.noise_source import noise_source

F64 = torch.float64


class Bowl(nn.Module):
    """A risk offset + ½ Σ c_j θ_j², θ in two parameters, base point the origin."""

    def __init__(self, curvature: Tensor) -> None:
        super().__init__()
        half = len(curvature) // 2
        self.first, self.second = (
            nn.Parameter(torch.zeros(half, dtype=F64)),
            nn.Parameter(torch.zeros_like(curvature[half:])),
        )
        self.register_buffer("curvature", curvature)

    def forward(self, x: Tensor) -> Tensor:
        theta = torch.cat([self.first, self.second])
        return x + 0.5 * (self.curvature * theta**2).sum()


CURVATURE = torch.logspace(0, 2, 8, dtype=F64)


def bowl() -> ds.Problem:
    data = (torch.full((4,), 0.5, dtype=F64), torch.zeros(4))
    return ds.Problem(Bowl(CURVATURE), lambda out, _: out, data)


def network(seed: int = 0) -> ds.Problem:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 2)).double()
        return ds.Problem(model, nn.MSELoss(), (torch.randn(12, 3, dtype=F64), torch.randn(12, 2, dtype=F64)))


# --- principal components -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 9), (12, 30), (1600, 200)])
def test_principal_components_are_those_of_the_covariance(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(*shape, generator=generator, dtype=F64) * torch.logspace(0, -1, shape[1], dtype=F64) + 3.0
    expected = torch.cov(X.T)
    data = noise_data(X.clone())
    top = data.eigsh(5, tol=1e-9)
    torch.testing.assert_close(top.values, torch.linalg.eigvalsh(expected).flip(0)[:5], rtol=1e-8, atol=0.0)
    torch.testing.assert_close(expected @ top.vectors, top.vectors * top.values, rtol=0.0, atol=1e-7)
    torch.testing.assert_close(top.vectors.T @ top.vectors, torch.eye(5, dtype=F64), rtol=0.0, atol=1e-8)
    assert bool(top.converged.all())
    torch.testing.assert_close(data.covariance.to_dense(), expected, rtol=1e-10, atol=1e-12)
    assert data.trace.value == pytest.approx(float(expected.trace()), rel=1e-10)
    along = [v.value for v in data.variance_along(2.0 * top.vectors)]
    torch.testing.assert_close(torch.tensor(along, dtype=F64), top.values, rtol=1e-8, atol=0.0)


def test_rows_are_freed_of_a_line_in_each_run() -> None:
    time = torch.arange(20.0, dtype=F64)
    noise = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    drift = torch.stack(
        [
            torch.outer(time, torch.tensor([1.0, -2.0, 0.5], dtype=F64)),
            7.0 - torch.outer(time, torch.ones(3, dtype=F64)),
        ]
    )
    with_line = noise_data((noise + drift).reshape(40, 3), "trajectory", runs=2)
    without = noise_data(noise.reshape(40, 3).clone(), "trajectory", runs=2)
    torch.testing.assert_close(with_line.rows, without.rows, rtol=0.0, atol=1e-12)
    assert with_line.freedom == 36
    assert with_line.drift > 0.9
    assert without.drift < 0.3
    mean_only = noise_data((noise + drift).reshape(40, 3), "trajectory", runs=2, detrend="mean")
    assert mean_only.trace.value > 5 * with_line.trace.value


def test_intervals_of_projected_variances_cover() -> None:
    # 300 repeats of 95 % intervals; a true coverage of 0.95 falls below 0.90 with probability below 1e-3.
    v, hits, traces = torch.tensor([1.0, 2.0, 0.0], dtype=F64), 0, 0
    spread = torch.tensor([1.0, 0.5, 3.0], dtype=F64)
    truth = float((v / v.norm() * spread).square().sum())
    for seed in range(300):
        data = noise_data(torch.randn(120, 3, generator=torch.Generator().manual_seed(seed), dtype=F64) * spread)
        low, high = data.variance_along(v)[0].interval(0.95)
        hits += low < truth < high
        low, high = data.trace.interval(0.95)
        traces += low < float(spread.square().sum()) < high
    assert hits >= 270, hits
    assert traces >= 270, traces


# --- gradient data ------------------------------------------------------------------------------------------------


def test_gradient_data_have_the_covariance_of_the_noise() -> None:
    # Five standard errors: a chance of 1e-6 a direction.
    problem = network()
    for sharing in ("sample", "batch"):
        exact = ds.GradientNoise(problem, method="exact", sharing=sharing)
        top = exact.eigsh(3)
        data = gradient_data(problem, 300, sharing=sharing, seed=1)
        got = data.variance_along(top.vectors)
        for one, truth in zip(got, top.values.tolist(), strict=True):
            assert abs(one.value - truth) < 5 * one.stderr
            assert one.stderr < 0.2 * truth


def test_minibatch_data_have_the_covariance_of_sampling_without_replacement() -> None:
    # b of n without replacement: (B/b)(1 - b/n) with B the covariance of the gradients over samples.
    problem = network(1)
    data = gradient_data(problem, 400, noise="minibatch", batch_size=4, seed=2)
    grads = []
    (batch,) = problem.batches()
    for i in range(problem.n):
        values, _ = problem.sample_losses(batch.select(slice(i, i + 1)))
        grads.append(problem.flatten(torch.autograd.grad(values.sum() * problem.scale, list(problem.params.values()))))
    expected = torch.cov(torch.stack(grads).T) / 4 * (1 - 4 / 12)
    values, vectors = torch.linalg.eigh(expected)
    for one, truth in zip(data.variance_along(vectors.flip(1)[:, :3]), values.flip(0)[:3].tolist(), strict=True):
        assert abs(one.value - truth) < 5 * one.stderr


def test_isotropic_gradient_noise_is_flat_and_weight_noise_is_the_square_of_the_hessian() -> None:
    problem = bowl()
    flat = gradient_data(problem, 2000, noise="gradient", scale=0.1)
    # Eight variances of 0.01, each with a relative error of 0.032.
    variances = torch.tensor([v.value for v in flat.variance_along(torch.eye(8, dtype=F64))])
    assert bool(((variances / 0.01 - 1.0).abs() < 0.16).all())
    relation = ds.hessian_variance(ds.Hessian(problem), flat, k=8)
    assert abs(relation.law.slope.value) < 0.05
    assert relation.alignment.ratio.value == pytest.approx(1.0, abs=0.1)
    weights = gradient_data(problem, 300, noise="weights", scale=0.01)
    # Exponents of eight variances over two decades, each with a relative error of 0.08: five of 0.02.
    assert ds.hessian_variance(ds.Hessian(problem), weights, k=8).law.slope.value == pytest.approx(2.0, abs=0.1)
    # F = 2 √(2R/c) and Var ~ c²: F⁻⁴, by construction and not by any property of a network.
    inverse = ds.variance_flatness(problem, weights, k=5)
    assert inverse.law.slope.value == pytest.approx(-4.0, abs=0.3)


def test_without_noise_the_rows_do_not_vary() -> None:
    data = gradient_data(network(2), 6, noise="none")
    assert not bool(data.rows.any())
    assert data.trace.value == 0.0


def test_rows_depend_on_seed_and_index_alone() -> None:
    problem = network(3)
    for options in ({}, {"noise": "minibatch", "batch_size": 3}, {"noise": "weights", "scale": 0.1}):
        raw = [gradient_data(problem, n, seed=5, **options).rows for n in (8, 4)]
        torch.testing.assert_close(raw[0][:4] - raw[0][:4].mean(0), raw[1], rtol=0.0, atol=1e-14)
        assert not torch.equal(gradient_data(problem, 4, seed=6, **options).rows, raw[1])


def test_a_block_is_the_block_of_all() -> None:
    problem = network(4)
    whole, part = gradient_data(problem, 20), gradient_data(problem, 20, names=["3.weight", "0.bias"])
    expected = whole.covariance.restrict(["3.weight", "0.bias"]).to_dense()
    torch.testing.assert_close(part.covariance.to_dense(), expected)
    H = ds.Hessian(problem).restrict(["3.weight", "0.bias"])
    assert ds.hessian_variance(H, part, k=4).dim == 18
    walked = ds.variance_flatness(problem, part, k=3)
    by_hand = torch.zeros(problem.dim, 3, dtype=F64)
    top = part.eigsh(3)
    for name, where in part.blocks.items():
        by_hand[problem.blocks[name]] = top.vectors[where]
    torch.testing.assert_close(
        walked.flatness.flatness, ds.interval_flatness(problem, by_hand).flatness, rtol=1e-3, atol=0.0
    )


# --- trajectories -------------------------------------------------------------------------------------------------


def test_a_long_trajectory_in_a_bowl_is_an_ornstein_uhlenbeck_process() -> None:
    # Stationary variance of θ ← θ - ε(cθ + σz): εσ²/(2c - εc²): it rises with flatness, which is the trap.
    problem, rate, sigma = bowl(), 0.01, 0.3
    data = trajectory_data(problem, 600, rate, noise="gradient", scale=sigma, runs=3, seed=1)
    assert data.status == "window_too_long"
    assert data.window == pytest.approx(600 * rate * 100.0, rel=1e-3)
    stiff = CURVATURE[4:]
    expected = rate * sigma**2 / (2 * stiff - rate * stiff**2)
    got = data.variance_along(torch.eye(8, dtype=F64)[:, 4:])
    # Curvatures of 14 to 100 give 80 memories or more in a run, 240 in all: a relative error of 0.09 at most.
    for one, truth in zip(got, expected.tolist(), strict=True):
        assert abs(one.value - truth) < max(5 * one.stderr, 0.4 * truth)
    assert ds.variance_flatness(problem, data, k=6).law.slope.value > 1.0


def test_a_short_trajectory_of_isotropic_noise_is_isotropic() -> None:
    problem = bowl()
    data = trajectory_data(problem, 10, 8e-4, noise="gradient", scale=0.3, runs=40)
    assert data.status == "ok"
    assert data.window == pytest.approx(0.8, rel=1e-3)
    # 40 runs: a directional variance of a detrended walk has a relative error near 0.15, an exponent one of 0.03.
    relation = ds.hessian_variance(ds.Hessian(problem), data, k=8)
    assert abs(relation.law.slope.value) < 0.2
    assert relation.alignment.ratio.value == pytest.approx(1.0, abs=0.6)
    again = trajectory_data(problem, 10, 8e-4, noise="weights", scale=2.4e-4, runs=40)
    assert abs(ds.hessian_variance(ds.Hessian(problem), again, k=8).law.slope.value) < 0.2


def test_without_noise_the_trajectory_is_gradient_descent() -> None:
    problem = network(5)
    data = trajectory_data(problem, 5, 0.1, noise="none", runs=1)
    start = [p.detach().clone() for p in problem.params.values()]
    thetas = []
    try:
        for _ in range(5):
            g = problem.unflatten(problem.gradient())
            for name, p in problem.params.items():
                p.data = p.data - 0.1 * g[name]
            thetas.append(problem.flatten([p.detach() for p in problem.params.values()]))
    finally:
        for p, before in zip(problem.params.values(), start, strict=True):
            p.data = before
    expected = noise_data(torch.stack(thetas), "trajectory", sharpness=1.0, rate=0.1)
    torch.testing.assert_close(data.rows, expected.rows, rtol=0.0, atol=1e-14)


def test_the_window_rule_is_a_status_or_a_refusal() -> None:
    problem = network(6)
    long = trajectory_data(problem, 50, 0.5, runs=2, sharpness=1.0)
    assert (long.status, long.window) == ("window_too_long", 25.0)
    assert "smaller rate" in long.remedy
    with pytest.raises(ValueError, match=r"trajectory_data: rate \* count \* λ_max\(H\) must be at most 4, got 25"):
        trajectory_data(problem, 50, 0.5, runs=2, sharpness=1.0, refuse=True)
    assert trajectory_data(problem, 5, 0.5, runs=2, sharpness=1.0, refuse=True).status == "ok"
    stored = noise_data(torch.randn(20, 3, dtype=F64), "trajectory")
    assert stored.status == "window_unknown"


def test_the_model_is_left_as_it_was() -> None:
    problem = network(7)
    pointers = [p.data_ptr() for p in problem.params.values()]
    before, state = [p.clone() for p in problem.params.values()], torch.get_rng_state()
    trajectory_data(problem, 5, 0.1, runs=2)
    gradient_data(problem, 5, noise="weights", scale=0.1)
    with pytest.raises(ValueError, match=r"must be finite|diverge"):
        trajectory_data(problem, 50, 1e200, runs=1, sharpness=1.0)
    assert pointers == [p.data_ptr() for p in problem.params.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, problem.params.values(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


# --- the face they show ---------------------------------------------------------------------------------------------


def test_data_are_a_noise_with_errors() -> None:
    problem = network(8)
    H = ds.Hessian(problem)
    data = gradient_data(problem, 150)
    relation = ds.hessian_variance(H, data, k=5)
    exact = ds.hessian_variance(H, ds.GradientNoise(problem, method="exact"), k=5)
    assert relation.variances[0].stderr > 0.0
    # A ratio within five of its own standard errors of the exact one.
    assert (
        abs(relation.alignment.ratio.value - exact.alignment.ratio.value) < 5 * relation.alignment.ratio.stderr + 1e-9
    )
    source = noise_source(data, "test")
    assert source.square_bias > 0.0
    runs = trajectory_data(problem, 10, 0.05, runs=6)
    assert math.isfinite(ds.hessian_variance(H, runs, k=5).alignment.ratio.stderr)
    one = trajectory_data(problem, 10, 0.05, runs=1)
    assert one.variance_along(torch.ones(problem.dim, dtype=F64))[0].status == "no_error"


def test_data_are_saved_and_read_back(tmp_path) -> None:
    data = trajectory_data(network(9), 6, 0.05, runs=2, names="0.weight")
    back = NoiseData.load(data.save(tmp_path / "data.safetensors"))
    assert torch.equal(back.rows, data.rows)
    assert back.blocks == data.blocks
    assert repr(back) == repr(data)
    assert '"window"' in data.save(tmp_path / "data.json").read_text()
    assert data.plot().axes


def test_bad_input_is_refused() -> None:
    problem = network(10)
    cases = {
        "noise must be one of": {"noise": "uniform"},
        "count must be an int of at least 4": {"count": 3},
        "batch_size must be given": {"noise": "minibatch"},
        "batch_size must lie in 1..12": {"noise": "minibatch", "batch_size": 13},
        "scale must be a positive number": {"noise": "gradient"},
        "scale must be left out": {"scale": 1.0},
        "names must be among": {"names": "5.weight"},
        "sharing must be": {"sharing": "site"},
        "seed must be": {"seed": -1},
        "memory must hold": {"memory": 100},
    }
    for message, options in cases.items():
        with pytest.raises(ValueError, match=f"gradient_data: {message}"):
            gradient_data(problem, **options)
    with pytest.raises(TypeError, match="gradient_data: problem must be a Problem"):
        gradient_data(problem.model)
    with pytest.raises(ValueError, match="trajectory_data: rate must be positive"):
        trajectory_data(problem, 5, 0.0)
    with pytest.raises(ValueError, match="noise_data: rows must be finite"):
        noise_data(torch.full((4, 2), math.nan))
    with pytest.raises(ValueError, match="noise_data: rows must be"):
        noise_data(torch.ones(9, 2), "trajectory", runs=2)
    with pytest.raises(ValueError, match=r"variance_flatness: skip must be"):
        ds.variance_flatness(problem, gradient_data(problem, 8), k=3, skip=problem.dim)
    with pytest.raises(ValueError, match=r"NoiseData.eigsh: k must be an int in 1..7"):
        gradient_data(problem, 8).eigsh(8)
