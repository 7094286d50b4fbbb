"""The modified equations: their square roots of Σ against sums over masks, and their weak errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

import dropscope as ds
from cases import CASES, state
from dropscope.training import sde
from dropscope.training.diffusion import Enumerated, LowRank, Sampled, Walsh
from dropscope.training.equation import Equation
from dropscope.training.flat_risk import FlatRisk

F64 = torch.float64
P = 0.2


def half_squared(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - target).square().sum(1)


def small(
    width: int = 2, outputs: int = 1, n: int = 3, scale: float = 1.2, batch_size: int | None = None
) -> ds.Problem:
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(
        nn.Linear(1, width, bias=False), nn.Tanh(), nn.Dropout(P), nn.Linear(width, outputs, bias=outputs > 1)
    ).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=F64) * 1.2)
    x = torch.linspace(-1.0, 1.5, n, dtype=F64)[:, None]
    y = torch.sin(2.0 * x * torch.arange(1, outputs + 1))
    return ds.Problem(net, half_squared, (x, y), batch_size=batch_size)


def dense_noise(problem: ds.Problem, sharing: str) -> tuple[Tensor, Tensor]:
    """∇L and Σ by hand: every mask of every sample, one autograd pass each."""
    keep = ds.keep_probability(P)
    X, y = problem.data._tensors
    model, parameters = problem.model, list(problem.params.values())

    def moments(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        gradients, weights = [], []
        for bits in itertools.product((0.0, 1.0), repeat=model[-1].in_features):
            out = model[-1](model[:2](x) * torch.tensor(bits, dtype=F64) / keep)
            gradients.append(problem.flatten(torch.autograd.grad(half_squared(out, t).sum() / len(X), parameters)))
            weights.append(keep ** sum(bits) * (1.0 - keep) ** (len(bits) - sum(bits)))
        g, pi = torch.stack(gradients), torch.tensor(weights, dtype=F64)
        mean = pi @ g
        return mean, (g - mean).T @ (pi[:, None] * (g - mean))

    if sharing == "batch":
        return moments(X, y)
    parts = [moments(X[i : i + 1], y[i : i + 1]) for i in range(len(X))]
    return sum(m for m, _ in parts), sum(c for _, c in parts)


@pytest.mark.parametrize("sharing", ["batch", "sample"])
@pytest.mark.parametrize("root", [Walsh, Enumerated])
def test_the_square_root_squares_to_the_covariance(root: type, sharing: str) -> None:
    problem = small(width=3, outputs=2, batch_size=2)
    risk = FlatRisk(problem, sharing, 0)
    noise = root(risk)
    mean, sigma = dense_noise(problem, sharing)
    z = noise.draw(1, torch.Generator().manual_seed(0), 0)[0]
    # The potential is linear in z, so its gradients for the unit vectors of z are the columns of a root of Σ.
    units = torch.eye(z.numel(), dtype=F64).view(-1, *z.shape)
    columns = vmap(grad(noise.potential), in_dims=(None, 0))(risk.theta, units)
    torch.testing.assert_close(columns.T @ columns, sigma, rtol=1e-12, atol=1e-14 * float(sigma.max()))
    torch.testing.assert_close(grad(noise.mean)(risk.theta, z), mean, rtol=1e-12, atol=1e-14)


def test_a_full_low_rank_is_the_noise_and_a_lower_one_its_leading_part() -> None:
    problem = small(width=3, outputs=2)
    risk = FlatRisk(problem, "batch", 0)
    _, sigma = dense_noise(problem, "batch")
    values, vectors = torch.linalg.eigh(sigma)
    base = Enumerated(risk)
    for rank in (2, 8):
        noise = LowRank(base, rank)
        columns = torch.stack([noise.sample(risk.theta, unit[:, None]) for unit in torch.eye(8, dtype=F64)])
        leading = vectors[:, -rank:] * values[-rank:] @ vectors[:, -rank:].T
        torch.testing.assert_close(columns.T @ columns, leading, rtol=1e-9, atol=1e-12)


def test_sampled_masks_keep_the_covariance_of_a_step() -> None:
    """Mean and covariance of one step, 40000 steps: each entry within 5 standard errors, false alarm below 1e-4."""
    problem, paths, epsilon = small(), 40000, 0.2
    mean, sigma = dense_noise(problem, "batch")
    risk = FlatRisk(problem, "batch", 3)
    for h in (epsilon, epsilon / 4.0):
        noise = Sampled(risk, 3)
        step = Equation(noise, epsilon, h, 1, "euler")
        z = noise.draw(paths, torch.Generator().manual_seed(1), 0)
        moved = vmap(step)(risk.theta.expand(paths, -1), z) - risk.theta
        error = (moved.mean(0) + h * mean) / (moved.std(0) / math.sqrt(paths))
        assert float(error.abs().max()) < 5.0
        centred = moved - moved.mean(0)
        products = centred[:, :, None] * centred[:, None, :]
        deviation = (products.mean(0) - epsilon * h * sigma) / (products.std(0) / math.sqrt(paths))
        assert float(deviation.abs().max()) < 5.0


@pytest.mark.parametrize("loss", [nn.MSELoss, nn.HuberLoss])
def test_sampled_masks_of_a_network_with_two_outputs(loss) -> None:
    """Paths by masks, mapped over at once, are the same one by one."""
    model, _, data = CASES["regression"].parts()
    risk = FlatRisk(ds.Problem(model, loss(), data), "batch", 3)
    noise = Sampled(risk, 2)
    z, thetas = noise.draw(3, torch.Generator().manual_seed(1), 0), risk.theta + torch.zeros(3, 1)
    together = vmap(grad(noise.mean))(thetas, z)
    one_by_one = [
        grad(lambda theta, d=d: torch.stack([risk.under_draw(theta, draw).sum() for draw in d]).mean())(risk.theta)
        for d in z[:, :, 0].to(torch.int64)
    ]
    torch.testing.assert_close(together, torch.stack(one_by_one), rtol=1e-10, atol=1e-12)


def test_a_mean_over_sampled_masks_has_the_drift_of_order_two() -> None:
    """The curvature term needs two sets of masks: mean over 40000 steps within 5 standard errors, 4 coordinates."""
    problem, paths, epsilon = small(), 40000, 0.5
    risk = FlatRisk(problem, "batch", 3)
    exact, noise = Equation(Walsh(risk), epsilon, 0.1, 2, "euler"), Sampled(risk, 4)
    z = noise.draw(paths, torch.Generator().manual_seed(1), 0)
    drifts = vmap(Equation(noise, epsilon, 0.1, 2, "euler").drift)(risk.theta.expand(paths, -1), z)
    gap = drifts.mean(0) - exact.drift(risk.theta, z[0])
    assert float((gap / (drifts.std(0) / math.sqrt(paths))).abs().max()) < 5.0


@pytest.mark.parametrize("sharing", ["batch", "sample"])
def test_the_descent_is_that_of_a_loop_under_mask_keys(sharing: str) -> None:
    problem, paths, steps, epsilon = small(batch_size=2), 3, 4, 0.1
    before = state(problem.model)
    result = sde.dropout_descent(problem, epsilon, steps * epsilon, paths=paths, sharing=sharing, seed=7, records=3)
    assert state(problem.model) == before
    assert result.times.tolist() == pytest.approx([0.0, 0.2, 0.4])
    start = FlatRisk(problem, sharing, 7).theta
    for path in range(paths):
        delta = torch.zeros_like(start)
        for step in range(steps):
            with problem.displaced(delta):
                key = ds.MaskKey(7, step * paths + path)
                delta = delta - epsilon * problem.gradient(key, sharing=sharing)
        torch.testing.assert_close(result.theta[path], start + delta, rtol=1e-12, atol=1e-13)
        with problem.displaced(delta):
            assert float(result.risk[-1, path]) == pytest.approx(problem.risk(), rel=1e-12)


def test_the_control_variate_has_mean_zero_and_takes_off_the_variance() -> None:
    """Means of 4 coordinates over 3000 paths for two processes within 5 standard errors: false alarm below 1e-5."""
    problem, options = small(), {"paths": 3000, "control": True, "seed": 2}
    for result in (
        sde.dropout_descent(problem, 0.1, 0.5, **options),
        sde.simulate(problem, 0.1, 0.5, substeps=1, scheme="euler", **options),
    ):
        raw, delta = result.theta, result.fluctuation
        assert float((delta.mean(0) / delta.std(0)).abs().max()) * math.sqrt(3000) < 5.0
        assert bool((((raw - delta).var(0)) < 0.25 * raw.var(0)).all())


def test_the_weak_orders_are_one_and_two() -> None:
    """Slopes 1.0 ± 0.15 and 2.0 ± 0.3; their Monte Carlo errors are about 0.02 and 0.1."""
    problem, epsilons, paths = small(), (0.25, 0.125), 1000
    descents = [sde.dropout_descent(problem, e, 1.0, paths=paths, control=True) for e in epsilons]
    for order, allowed in ((1, 0.15), (2, 0.3)):
        found = sde.weak_error(problem, epsilons, 1.0, order=order, paths=paths, substeps=2, descents=descents)
        slope = math.log(found.errors[0].value / found.errors[1].value) / math.log(2.0)
        assert abs(slope - order) < allowed
        assert all(e.stderr < 0.1 * e.value for e in found.errors)


def test_results_plot_save_and_say_what_they_are(tmp_path) -> None:
    problem = small()
    result = sde.simulate(problem, 0.1, 0.3, paths=4, records=4)
    assert len(result.plot().axes) == 1
    assert result.save(tmp_path / "paths.safetensors").exists()
    assert "order 1" in repr(result)
    errors = sde.weak_error(problem, (0.2, 0.1), 0.4, paths=50, substeps=1)
    assert len(errors.plot().axes) == 1
    assert errors.save(tmp_path / "errors.json").exists()


def test_arguments_are_checked() -> None:
    problem = small()
    with pytest.raises(TypeError, match="problem must be"):
        sde.simulate(problem.model, 0.1, 1.0)
    for name, bad in {
        "epsilon and time": {"epsilon": 0.0},
        "order must": {"order": 3},
        "substeps must": {"substeps": 0},
        "scheme must": {"scheme": "heun"},
        "noise must": {"noise": "all"},
        "masks must": {"noise": "sampled", "masks": 1},
        "rank must": {"rank": 0},
        "rank must be None": {"rank": 2, "noise": "exact"},
        "control must": {"rank": 2, "control": True},
        "paths must": {"paths": 0},
        "sharing must": {"sharing": "all"},
    }.items():
        with pytest.raises(ValueError, match=name):
            sde.simulate(problem, **{"epsilon": 0.1, "time": 0.2} | bad)
    with pytest.raises(ValueError, match="at least two"):
        sde.weak_error(problem, (0.1,), 1.0)
    with pytest.raises(ValueError, match="multiple of every"):
        sde.weak_error(problem, (0.3, 0.1), 1.0)
    other = ds.Problem(problem.model, nn.SmoothL1Loss(), problem.data._tensors)
    with pytest.raises(ValueError, match=r"simulate: .* got SmoothL1Loss"):
        sde.simulate(other, 0.1, 0.2, noise="exact")
    silent = ds.Problem(nn.Linear(1, 1).double(), nn.MSELoss(), (torch.ones(2, 1, dtype=F64),) * 2)
    with pytest.raises(ValueError, match="active dropout"):
        sde.simulate(silent, 0.1, 0.2)
