"""The modified losses against sums over every mask, and as losses that train."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import dropscope as ds
from cases import state
from dropscope.training import modified_loss

F64 = torch.float64
P = 0.3  # T = 45875: not 0.7 but 0.69999..., which the identities must use


def number(value: Tensor) -> float:
    return value.item() if isinstance(value, Tensor) else value


def half_squared(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - target).square().sum(1)


LOSSES = {"mse": nn.MSELoss(), "half": half_squared, "sum": nn.MSELoss(reduction="sum")}


def network(activation: nn.Module, outputs: int = 2, width: int = 4) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        body = [nn.Linear(3, 5), activation, nn.Linear(5, width), activation]
        return nn.Sequential(*body, nn.Dropout(P), nn.Linear(width, outputs)).double()


def make(loss: str = "mse", activation: nn.Module | None = None, batch_size: int | None = None) -> ds.Problem:
    generator = torch.Generator().manual_seed(3)
    X, y = (torch.randn(7, k, generator=generator, dtype=F64) for k in (3, 2))
    return ds.Problem(network(activation or nn.Tanh()), LOSSES[loss], (X, y), batch_size=batch_size)


def under_mask(problem: ds.Problem, eta: Tensor) -> Tensor:
    """R^drop(η) with one mask for all samples, by hand: the model is a Sequential with the dropout before the end."""
    X, y = problem.data._tensors
    model = problem.model
    output = model[-1](model[:-2](X) * (1.0 + eta))
    value = problem.loss.loss(output, y)
    return value.mean() if value.ndim else value


def enumerated(problem: ds.Problem) -> tuple[list[Tensor], list[float]]:
    """R^drop under every mask and the probability of each."""
    keep = ds.keep_probability(P)
    risks, weights = [], []
    for bits in itertools.product((0.0, 1.0), repeat=problem.model[-1].in_features):
        kept = torch.tensor(bits, dtype=F64)
        risks.append(under_mask(problem, kept / keep - 1.0))
        weights.append(keep ** sum(bits) * (1.0 - keep) ** (len(bits) - sum(bits)))
    return risks, weights


def gradient(problem: ds.Problem, value: Tensor) -> Tensor:
    return problem.flatten(torch.autograd.grad(value, list(problem.params.values()), retain_graph=True))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU()])
def test_the_mean_over_every_mask_is_the_risk_plus_r1(loss: str, activation: nn.Module) -> None:
    problem = make(loss, activation, batch_size=3)
    risks, weights = enumerated(problem)
    mean = sum(w * r for w, r in zip(weights, risks, strict=True))
    l1 = modified_loss(problem, "L1")
    assert number(l1(0)) == pytest.approx(number(mean), rel=1e-12)
    torch.testing.assert_close(gradient(problem, l1(0)), gradient(problem, mean), rtol=1e-11, atol=1e-13)
    assert number(l1(0)) == pytest.approx(problem.risk() + number(l1.r1()), rel=1e-12)


def test_the_mean_gradient_norm_is_that_of_the_mean_plus_the_trace_of_the_noise() -> None:
    problem = make()
    risks, weights = enumerated(problem)
    gradients = torch.stack([gradient(problem, risk) for risk in risks])
    pi = torch.tensor(weights, dtype=F64)
    mean = pi @ gradients
    trace = pi @ (gradients - mean).square().sum(1)
    epsilon = 0.2
    own = modified_loss(problem, "mean_iterate", epsilon=epsilon)
    l1 = modified_loss(problem, "L1")
    quarter = number(own(0) - l1(0))
    assert quarter == pytest.approx(epsilon / 4.0 * number(mean.square().sum()), rel=1e-12)
    r2 = epsilon / 4.0 * number(pi @ gradients.square().sum(1))
    assert r2 == pytest.approx(quarter + epsilon / 4.0 * number(trace), rel=1e-12)


def keep_of(problem: ds.Problem, seed: int, draw: int) -> Tensor:
    """The shared mask of a draw, read off what dropout does to ones."""
    seen: list[Tensor] = []
    hook = problem.model[-2].register_forward_hook(lambda _, inputs, out: seen.append(out / inputs[0]))
    problem.raw_losses(next(iter(problem.data)), ds.MaskKey(seed, draw), sharing="batch")
    hook.remove()
    return seen[0][0].detach()


def test_the_sampled_gradient_norm_is_that_of_its_masks() -> None:
    problem = make()
    loss = modified_loss(problem, "R_regu", epsilon=0.3, draws=2, seed=5, sharing="batch")
    risks = [under_mask(problem, keep_of(problem, 5, draw) - 1.0) for draw in (6, 7)]
    norms = [gradient(problem, risk).square().sum() for risk in risks]
    expected = sum(risks) / 2 + 0.3 / 4 * sum(norms) / 2
    assert number(loss(3)) == pytest.approx(number(expected), rel=1e-12)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_the_losses_are_what_their_names_say(batch_size: int | None) -> None:
    problem = make(batch_size=batch_size)
    value = {
        kind: number(modified_loss(problem, kind, epsilon=0.4, seed=2)(9))
        for kind in ("R_S", "R_drop", "L1", "L2", "L3", "L4", "R_regu", "expected_gradnorm")
    }
    r1, r2 = number(modified_loss(problem, "L1").r1()), number(modified_loss(problem, "L2", epsilon=0.4, seed=2).r2(9))
    assert value["R_S"] == pytest.approx(problem.risk(), rel=1e-12)
    assert value["R_drop"] == pytest.approx(problem.risk(ds.MaskKey(2, 9)), rel=1e-12)
    for kind, expected in {
        "L1": value["R_S"] + r1,
        "L2": value["R_S"] + r2,
        "L3": value["R_drop"] - r2,
        "L4": value["R_drop"] - r1,
        "R_regu": value["R_drop"] + r2,
        "expected_gradnorm": value["R_S"] + r1 + r2,
    }.items():
        assert value[kind] == pytest.approx(expected, rel=1e-12), kind


@pytest.mark.parametrize("kind", ["L1", "L2", "L3", "L4", "R_regu", "expected_gradnorm", "mean_iterate"])
def test_the_gradient_is_the_slope(kind: str) -> None:
    problem = make(batch_size=4)
    loss = modified_loss(problem, kind, epsilon=0.3, seed=4)
    slope = gradient(problem, loss(2))
    v = torch.randn(problem.dim, generator=torch.Generator().manual_seed(0), dtype=F64)
    with problem.displaced(1e-5 * v):
        ahead = number(loss(2))
    with problem.displaced(-1e-5 * v):
        behind = number(loss(2))
    assert number(slope @ v) == pytest.approx((ahead - behind) / 2e-5, rel=1e-7)


def test_a_mini_batch_is_the_mean_of_its_own_samples() -> None:
    problem = make()
    X, y = problem.data._tensors
    part = ds.Problem(problem.model, nn.MSELoss(), (X[2:5], y[2:5]))
    loss = modified_loss(problem, "L4", seed=1)
    assert number(loss(0, (X[2:5], y[2:5]))) == pytest.approx(number(modified_loss(part, "L4", seed=1)(0)), rel=1e-14)


def test_training_repeats_by_its_seed_and_leaves_no_trace() -> None:
    ends = []
    for _ in range(2):
        problem = make()
        problem.model.train()
        before = state(problem.model)
        loss = modified_loss(problem, "L3", epsilon=0.05, seed=8)
        loss(0)
        assert state(problem.model) == before
        optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.05)
        start = problem.risk()
        for step in range(30):
            optimizer.zero_grad()
            loss(step).backward()
            optimizer.step()
        assert problem.risk() < start
        ends.append(problem.flatten([p.detach() for p in problem.params.values()]))
    assert torch.equal(*ends)


def test_what_has_no_closed_form_is_refused_by_name() -> None:
    X, y = torch.randn(6, 3), torch.randn(6, 2)
    body = [nn.Linear(3, 4), nn.Tanh()]
    refused = {
        "got SmoothL1Loss": ds.Problem(
            nn.Sequential(*body, nn.Dropout(0.1), nn.Linear(4, 2)), nn.SmoothL1Loss(), (X, y)
        ),
        "second dropout, in module '3'": ds.Problem(
            nn.Sequential(nn.Dropout(0.1), *body, nn.Dropout(0.1), nn.Linear(4, 2)), nn.MSELoss(), (X, y)
        ),
        "after the linear": ds.Problem(
            nn.Sequential(*body, nn.Dropout(0.1), nn.Linear(4, 2), nn.Tanh()), nn.MSELoss(), (X, y)
        ),
        "no active dropout": ds.Problem(nn.Sequential(*body, nn.Linear(4, 2)), nn.MSELoss(), (X, y)),
        "no linear map reads": ds.Problem(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.1)), nn.MSELoss(), (X, y)),
        "another kind": ds.Problem(nn.Sequential(*body, nn.AlphaDropout(0.1), nn.Linear(4, 2)), nn.MSELoss(), (X, y)),
    }
    for what, problem in refused.items():
        with pytest.raises(ValueError, match=what):
            modified_loss(problem, "L1")


def test_arguments_are_checked() -> None:
    problem = make()
    with pytest.raises(TypeError, match="problem must be"):
        modified_loss(problem.model, "L1")
    with pytest.raises(ValueError, match="kind must be"):
        modified_loss(problem, "L5")
    with pytest.raises(ValueError, match="epsilon must be"):
        modified_loss(problem, "L2")
    with pytest.raises(ValueError, match="epsilon must be"):
        modified_loss(problem, "L2", epsilon=0.0)
    with pytest.raises(ValueError, match="draws must be"):
        modified_loss(problem, "R_drop", draws=0)
    with pytest.raises(ValueError, match="sharing must be"):
        modified_loss(problem, "R_drop", sharing="all")
    with pytest.raises(ValueError, match=r"draw outside|draw must"):
        modified_loss(problem, "R_drop")(-1)


def test_dropout_on_the_inputs_of_a_linear_model_is_a_penalty():
    """E R = ½(t−wᵀx)² + ½κΣwⱼ²xⱼ² and E∇R = −(t−wᵀx)x + κ w∘x², κ = (1−q)/q, q the probability to keep.

    4096 draws of one sample: nine numbers beyond 4.5 standard errors have a false-alarm rate below 1e-4; seed fixed.
    """
    generator = torch.Generator().manual_seed(0)
    w, x, t = torch.randn(4, generator=generator), torch.randn(4, generator=generator), torch.tensor(0.7)
    w, x, t, draws, q = w.double(), x.double(), t.double(), 4096, ds.keep_probability(0.3)
    model = nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 1, bias=False)).double()
    model[1].weight.data.copy_(w)
    problem = ds.Problem(model, lambda out, y: 0.5 * (out[:, 0] - y).square(), (x[None], t[None]))
    (batch,) = problem.batches()
    values, _ = problem.sample_losses(batch, ds.MaskKey(11), draws)
    residual, kappa = t - w @ x, (1 - q) / q
    mean = 0.5 * residual**2 + 0.5 * kappa * (w * x).square().sum()
    assert abs(values.mean() - mean) < 4.5 * values.std() / draws**0.5
    slopes = torch.autograd.functional.jacobian(
        lambda p: problem.substituted({"1.weight": p}, lambda: problem.sample_losses(batch, ds.MaskKey(11), draws)[0]),
        w[None],
    )[:, 0]
    expected = -residual * x + kappa * w * x**2
    assert ((slopes.mean(0) - expected).abs() < 4.5 * slopes.std(0) / draws**0.5).all()
    assert (expected + residual * x).abs().max() > 10 * (slopes.std(0) / draws**0.5).max()
