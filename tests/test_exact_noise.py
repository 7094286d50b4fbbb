"""The exact covariance of dropout noise against the sum over every mask."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dropscope as ds
from dropscope.operators.exact_noise import ExactNoise

F64 = torch.float64
DROP = 0.3


def deep(seed: int = 0, n: int = 4) -> ds.Problem:
    """Two hidden layers, five dropped units, two outputs; batches of three split the samples unevenly."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.ReLU(), nn.Dropout(DROP), nn.Linear(5, 2)]
        model = nn.Sequential(*layers).double()
        return ds.Problem(
            model, nn.MSELoss(), (torch.randn(n, 3, dtype=F64), torch.randn(n, 2, dtype=F64)), batch_size=3
        )


def enumerated(problem: ds.Problem, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float, float]:
    """Covariance and mean of the gradient, mean and variance of the loss, of these samples under one mask for all."""
    *body, _, last = problem.model
    keep = ds.keep_probability(DROP)
    mean, second = torch.zeros(problem.dim, dtype=F64), torch.zeros(problem.dim, problem.dim, dtype=F64)
    first, square = 0.0, 0.0
    for bits in itertools.product([0.0, 1.0], repeat=5):
        mask = torch.tensor(bits, dtype=F64)
        weight = float((mask * keep + (1.0 - mask) * (1.0 - keep)).prod())
        loss = F.mse_loss(last(nn.Sequential(*body)(X) * mask / keep), y)
        g = problem.flatten(torch.autograd.grad(loss, list(problem.params.values())))
        mean, second = mean + weight * g, second + weight * torch.outer(g, g)
        first, square = first + weight * loss.item(), square + weight * loss.item() ** 2
    return second - torch.outer(mean, mean), mean, first, square - first**2


def truth(problem: ds.Problem, sharing: str) -> tuple[Tensor, Tensor, float, float]:
    X, y = (torch.cat(part) for part in zip(*(b.content for b in problem.batches()), strict=True))
    if sharing == "batch":
        return enumerated(problem, X, y)
    n = len(X)
    parts = [enumerated(problem, X[i : i + 1], y[i : i + 1]) for i in range(n)]
    return (
        sum(part[0] for part in parts) / n**2,
        sum(part[1] for part in parts) / n,
        sum(part[2] for part in parts) / n,
        sum(part[3] for part in parts) / n**2,
    )


@pytest.mark.parametrize("sharing", ["batch", "sample"])
def test_everything_exact_is_the_sum_over_every_mask(sharing: str) -> None:
    problem = deep()
    covariance, mean, loss, variance = truth(problem, sharing)
    exact = ExactNoise(problem, sharing)
    size = float(covariance.norm())
    assert float((exact.to_dense() - covariance).norm()) < 1e-12 * size
    factors = exact.factors()
    assert factors.shape == (problem.dim, exact.rank)
    assert float((factors @ factors.T - covariance).norm()) < 1e-12 * size
    assert exact.trace() == pytest.approx(float(covariance.trace()), rel=1e-12)
    torch.testing.assert_close(exact.mean_gradient(), mean, rtol=1e-12, atol=1e-14)
    assert exact.penalty() == pytest.approx(loss - problem.risk(), rel=1e-11)
    assert exact.loss_variance() == pytest.approx(variance, rel=1e-11)


@pytest.mark.parametrize("sharing", ["batch", "sample"])
def test_draws_have_the_covariance(sharing: str) -> None:
    # 200 draws: each directional variance has a relative error of sqrt(2/200) = 0.1; five of these are a chance of
    # 1e-6 for each of three directions.
    problem = deep(1)
    exact, generator = ExactNoise(problem, sharing), torch.Generator().manual_seed(0)
    Z = torch.stack([exact.draw(generator) for _ in range(200)])
    top = ds.eigsh(exact, 3, which="LA")
    ratio = (Z @ top.vectors).square().mean(0) / top.values
    assert bool(((ratio - 1.0).abs() < 0.5).all()), ratio


def test_a_block_of_the_parameters_has_its_block_of_the_covariance() -> None:
    whole = deep(2)
    part = ds.Problem(whole.model, nn.MSELoss(), next(whole.batches()).content, params="2.weight")
    full = ds.Problem(whole.model, nn.MSELoss(), next(whole.batches()).content)
    expected = ExactNoise(full).restrict("2.weight").to_dense()
    torch.testing.assert_close(ExactNoise(part).to_dense(), expected, rtol=1e-12, atol=1e-16)


def test_any_squared_loss_counts_with_its_own_factor() -> None:
    problem = deep(3)
    content = next(problem.batches()).content
    half = ds.Problem(problem.model, lambda out, y: 0.5 * (out - y).square().sum(1), content)
    mean = ds.Problem(problem.model, nn.MSELoss(), content)
    total = ds.Problem(problem.model, nn.MSELoss(reduction="sum"), content)
    traces = [ExactNoise(p).trace() for p in (half, mean, total)]
    # R = c/(2n) Σ‖f-y‖² with c = 1, 2/d and 2n; d = 2 outputs, n = 3 samples in the batch.
    assert traces[1] == pytest.approx(traces[0], rel=1e-12)
    assert traces[2] == pytest.approx(36.0 * traces[0], rel=1e-12)


def test_gradient_noise_takes_the_method() -> None:
    problem = deep(4)
    covariance = truth(problem, "sample")[0]
    with ds.GradientNoise(problem, method="exact") as noise:
        assert isinstance(noise, ds.GradientNoise)
        assert noise.trace.value == pytest.approx(float(covariance.trace()), rel=1e-12)
        assert noise.trace.stderr == 0.0
        values = torch.linalg.eigvalsh(covariance).flip(0)[:4]
        top = noise.eigsh(4, tol=1e-8)
        torch.testing.assert_close(top.values, values, rtol=1e-8, atol=0.0)
        got = [v.value for v in noise.variance_along(3.0 * top.vectors)]
        torch.testing.assert_close(torch.tensor(got, dtype=F64), values, rtol=1e-7, atol=0.0)
        relation = ds.hessian_variance(ds.Hessian(problem), noise, k=5)
        assert relation.variances[0].stderr == 0.0
        with pytest.raises(ValueError, match=r"GradientNoise: method must be 'sampled'"):
            _ = noise.sampling
        with pytest.raises(ValueError, match=r"GradientNoise: method must be 'sampled'"):
            noise.gram()
    with ds.GradientNoise(problem, draws=300, seed=1, sharing="batch") as sampled:
        # Five standard errors: a chance of 1e-6.
        exact = ds.GradientNoise(problem, method="exact", sharing="batch")
        assert abs(sampled.trace.value - exact.trace.value) < 5 * sampled.trace.stderr
    with pytest.raises(ValueError, match=r"GradientNoise: method must be 'sampled' or 'exact', got 'closed'"):
        ds.GradientNoise(problem, method="closed")
    with pytest.raises(ValueError, match=r"GradientNoise: cache must not be given with method='exact'"):
        ds.GradientNoise(problem, method="exact", cache="disk")


class Two(nn.Module):
    """A read-out beside which the undropped features go on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.skip = nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.last(F.dropout(h, DROP, self.training)) + self.skip(h)


def refused(model: nn.Module, loss: object = None) -> str:
    data = (torch.randn(4, 3), torch.randn(4, 2))
    with pytest.raises(ValueError, match=r"ExactNoise: the problem must be one dropout, then a linear") as caught:
        ExactNoise(ds.Problem(model, loss or nn.MSELoss(), data))
    return str(caught.value)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), "no active dropout"),
        (
            nn.Sequential(nn.Dropout(0.2), nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 2)),
            "a second dropout, in module '3'",
        ),
        (nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.3), nn.Tanh(), nn.Linear(5, 2)), "that no linear map reads"),
        (nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.3), nn.Linear(5, 2), nn.Softmax(1)), "something after the linear"),
        (Two(), "something after the linear"),
        (
            nn.Sequential(
                nn.Linear(3, 4), nn.Unflatten(1, (2, 2)), nn.Dropout1d(0.5), nn.Flatten(), nn.Dropout(0.3),
                nn.Linear(4, 2),
            ),
            "a second dropout, '2#0'",
        ),
    ],
)  # fmt: skip
def test_what_is_not_of_the_form_is_refused_by_name(model: nn.Module, names: str) -> None:
    assert names in refused(model)


def test_another_loss_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.3), nn.Linear(5, 2))
    assert "L1Loss" in refused(model, nn.L1Loss())
    problem = ds.Problem(model, nn.CrossEntropyLoss(), (torch.randn(4, 3), torch.tensor([0, 1, 0, 1])))
    with pytest.raises(ValueError, match=r"got CrossEntropyLoss"):
        ExactNoise(problem)


class Pooled(nn.Module):
    """The features of a sequence, dropped out place by place."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.3), nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x[:, None].expand(-1, 4, -1))


def test_the_noise_needs_flat_features() -> None:
    data = (torch.randn(4, 3), torch.randn(4, 4, 2))
    with pytest.raises(ValueError, match=r"got features of shape \(., 4, 5\), which must be \(rows, m\)"):
        ExactNoise(ds.Problem(Pooled(), nn.MSELoss(), data))


def test_the_target_is_what_the_loss_makes_of_it() -> None:
    """Classes made one-hot within the loss, and an output that is a view of the read-out's result."""
    generator = torch.Generator().manual_seed(0)
    x, classes = torch.randn(6, 3, generator=generator, dtype=F64), torch.tensor([0, 1, 1, 0, 1, 0])
    body = [nn.Linear(3, 4), nn.Tanh(), nn.Dropout(DROP)]
    plain = nn.Sequential(*body, nn.Linear(4, 2)).double()
    hot = F.one_hot(classes, 2).double()

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return 1.5 * (f - F.one_hot(y, 2)).square().sum(1)

    def same(f: Tensor, y: Tensor) -> Tensor:
        return 1.5 * (f - y).square().sum(1)

    pair = [ds.Problem(plain, loss, (x, classes)), ds.Problem(plain, same, (x, hot))]
    one = nn.Sequential(*body, nn.Linear(4, 1)).double()
    viewed = nn.Sequential(*one, nn.Flatten(0)).double()
    views = [ds.Problem(one, nn.MSELoss(), (x, hot[:, 1:])), ds.Problem(viewed, nn.MSELoss(), (x, hot[:, 1]))]
    for first, second in (pair, views):
        for sharing in ("sample", "batch"):
            a, b = (ExactNoise(problem, sharing).factors() for problem in (first, second))
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_the_model_is_left_as_it_was() -> None:
    problem = deep(5)
    problem.check(masks=True)
    before = [p.clone() for p in problem.params.values()]
    modes = [m.training for m in problem.model.modules()]
    state = torch.get_rng_state()
    exact = ExactNoise(problem)
    _ = exact @ torch.ones(problem.dim, dtype=F64)
    assert all(torch.equal(a, b) for a, b in zip(before, problem.params.values(), strict=True))
    assert modes == [m.training for m in problem.model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in problem.params.values())
