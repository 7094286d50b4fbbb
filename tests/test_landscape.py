"""Lines, planes and condensation against sums by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import dropscope as ds
from cases import CASES, state

F64 = torch.float64


@pytest.mark.parametrize("name", ["mlp", "conv", "lstm", "batchnorm"])
def test_a_line_is_the_risk_at_moved_parameters(name: str) -> None:
    """The LSTM cannot be batched over parameters: the loop gives the same."""
    problem = CASES[name].problem()
    before = state(problem.model)
    d = torch.randn(problem.dim, generator=torch.Generator().manual_seed(0), dtype=F64)
    alphas = (-0.3, 0.0, 0.2)
    line = ds.loss_line(problem, d, alphas=alphas)
    assert state(problem.model) == before
    for alpha, seen in zip(alphas, line.losses[0].tolist(), strict=True):
        with problem.displaced(alpha * d):
            assert seen == pytest.approx(problem.risk(), rel=1e-12)


@pytest.mark.parametrize("normalise", ["filter", "layer"])
def test_random_directions_have_the_lengths_of_the_filters(normalise: str) -> None:
    problem = CASES["conv"].problem()
    from dropscope.analyses.loss_line import random_directions

    d = random_directions(problem, 2, normalise, False, 0, "test")
    for name, part in problem.unflatten(d[:, 1]).items():
        theta = problem.params[name].detach()
        if theta.ndim == 1:
            assert not part.any()
        elif normalise == "filter":
            torch.testing.assert_close(part.flatten(1).norm(dim=1), theta.flatten(1).norm(dim=1))
        else:
            torch.testing.assert_close(part.norm(), theta.norm())
    moved = problem.unflatten(random_directions(problem, 1, normalise, True, 0, "test")[:, 0])
    assert all(bool(part.any()) for part in moved.values())


def test_between_two_solutions_the_ends_are_theirs_and_the_barrier_is_the_rise() -> None:
    problem, other = CASES["mlp"].problem(seed=0), CASES["mlp"].problem(seed=1)
    data = problem.data._tensors
    there = ds.Problem(other.model, nn.CrossEntropyLoss(), data)
    line = ds.loss_line(problem, between=other.model, alphas=torch.linspace(0, 1, 11).tolist())
    assert float(line.losses[0, 0]) == pytest.approx(problem.risk(), rel=1e-12)
    assert float(line.losses[0, -1]) == pytest.approx(there.risk(), rel=1e-12)
    by_state = ds.loss_line(problem, between=other.model.state_dict(), alphas=[0.0, 0.5, 1.0])
    assert float(by_state.losses[0, 1]) == pytest.approx(float(line.losses[0, 5]), rel=1e-12)
    chord = torch.lerp(line.losses[0, 0], line.losses[0, -1], line.alphas)
    assert line.barrier == pytest.approx(max(0.0, float((line.losses[0] - chord).max())))
    assert ds.loss_line(problem, between=other.model).barrier >= line.barrier - 1e-12  # on a finer grid
    assert math.isnan(ds.loss_line(problem, alphas=[0.0, 1.0]).barrier)


def test_a_plane_goes_through_its_three_solutions() -> None:
    problem, second, third = (CASES["mlp"].problem(seed=s) for s in range(3))
    data = problem.data._tensors
    plane = ds.loss_plane(problem, between=(second.model, third.model), alphas=[0.0, 1.0], betas=[0.0, 0.5, 1.0])
    assert plane.losses.shape == (2, 3)
    expected = [ds.Problem(p.model, nn.CrossEntropyLoss(), data).risk() for p in (problem, second, third)]
    seen = [float(plane.losses[i, j]) for i, j in ((0, 0), (1, 0), (0, 2))]
    assert seen == pytest.approx(expected, rel=1e-12)
    again = ds.loss_plane(problem, alphas=[-0.5, 0.5], seed=3)
    assert float(again.losses[0, 1]) != float(again.losses[1, 0])


def neurons(theta: torch.Tensor, reading: torch.Tensor) -> nn.Sequential:
    """A network whose first layer has the rows (w, b) of theta and whose last reads them by ``reading``."""
    net = nn.Sequential(nn.Linear(theta.shape[1] - 1, len(theta)), nn.Tanh(), nn.Linear(len(theta), len(reading)))
    with torch.no_grad():
        net[0].weight.copy_(theta[:, :-1])
        net[0].bias.copy_(theta[:, -1])
        net[2].weight.copy_(reading)
    return net


def test_condensed_neurons_are_counted_by_signed_direction() -> None:
    angle = torch.tensor([0.3, 0.31, 0.32, 0.3 + math.pi, 2.0, 2.02, -1.0])
    length = torch.tensor([1.0, 2.0, 0.5, 1.0, 1.0, 3.0, 1.0])
    theta = length[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    reading = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1e-3]])  # the last is too weak to count
    found = ds.condensation(neurons(theta, reading), "0", "2")
    assert found.orientations == 3
    assert found.active.tolist() == [True] * 6 + [False]
    assert found.effective_ratio == pytest.approx(0.5)
    strength = torch.tensor([3.5, 1.0, 4.0])
    assert found.weighted_orientations == pytest.approx(float(strength.sum() ** 2 / strength.square().sum()))
    groups = found.groups.tolist()
    assert groups[0] == groups[1] == groups[2] == 0
    assert groups[4] == groups[5] != groups[3]
    assert groups[6] == -1
    torch.testing.assert_close(found.amplitudes[:6], (length[:6] / 3.0).double())
    turn = (found.angles - angle + math.pi).remainder(2 * math.pi) - math.pi
    assert float(turn.abs().max()) < 1e-6
    assert ds.condensation(neurons(theta, reading), "0", "2", floor=0.0).orientations == 4


def test_a_greedy_cover_covers_and_uses_no_neuron_in_vain() -> None:
    theta = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    found = ds.condensation(neurons(theta, torch.ones(1, 200)), "0", threshold=0.8, floor=0.0)
    cosines = found.directions @ found.directions.T
    for group in range(found.orientations):
        members = (found.groups == group).nonzero()[:, 0]
        assert bool((cosines[members] > 0.8 - 1e-12).all(0).any() or (cosines[:, members] > 0.8).all(1).any())
    assert found.orientations < 100


def test_random_neurons_in_the_plane_seem_condensed_unless_weak_ones_are_left_out():
    """About 13 cones cover a thousand of them, so the paper's ratio over all neurons tells nothing there."""
    generator = torch.Generator().manual_seed(0)
    strong = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    theta = torch.cat((strong.repeat(5, 1), 0.01 * torch.randn(990, 2, generator=generator)))
    model = neurons(theta, torch.ones(1, 1000))
    assert 10 <= ds.condensation(model, "0", "2", floor=0.0).orientations <= 15
    assert ds.condensation(model, "0", "2").orientations == 2


def test_filters_of_a_convolution_and_a_flattened_readout() -> None:
    net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 4, 3))
    found = ds.condensation(net, "0", "3", floor=0.0)
    weight, bias = net[0].weight.detach().double(), net[0].bias.detach().double()
    theta = torch.cat([weight.flatten(1), bias[:, None]], 1)
    torch.testing.assert_close(found.directions, theta / theta.norm(dim=1, keepdim=True))
    reading = net[3].weight.detach().double().view(3, 5, 4).pow(2).sum((0, 2)).sqrt()
    amplitudes = theta.norm(dim=1) * reading
    torch.testing.assert_close(found.amplitudes, amplitudes / amplitudes.max())
    assert found.angles is None


def test_results_plot_save_and_say_what_they_are(tmp_path) -> None:
    problem = CASES["mlp"].problem()
    results = {
        "line": ds.loss_line(problem, lines=2, alphas=[-1.0, 0.0, 1.0]),
        "plane": ds.loss_plane(problem, alphas=[-1.0, 0.0, 1.0]),
        "condensation": ds.condensation(problem.model, "0", "3"),
    }
    for name, result in results.items():
        result.plot().savefig(tmp_path / f"{name}.png")
        assert json.loads(result.save(tmp_path / f"{name}.json").read_text())["type"] == type(result).__name__
        assert type(result).__name__ in repr(result)


def test_arguments_are_checked() -> None:
    problem = CASES["mlp"].problem()
    with pytest.raises(TypeError, match="loss_line: problem"):
        ds.loss_line(problem.model)
    with pytest.raises(TypeError, match="loss_plane: problem"):
        ds.loss_plane(problem.model)
    with pytest.raises(TypeError, match="direction must"):
        ds.loss_line(problem, [1.0])
    with pytest.raises(TypeError, match="between must"):
        ds.loss_line(problem, between=3)
    for what, bad in {
        "not both": {"direction": torch.ones(problem.dim, dtype=F64), "between": problem.model},
        "lines must": {"lines": 0},
        "alphas must": {"alphas": [math.nan]},
        "normalise must": {"normalise": "rows"},
        "direction must": {"direction": torch.ones(3, dtype=F64)},
        "every parameter": {"between": {}},
    }.items():
        with pytest.raises(ValueError, match=what):
            ds.loss_line(problem, **bad)
    with pytest.raises(ValueError, match="two solutions"):
        ds.loss_plane(problem, between=(problem.model,))
    for what, bad in {
        "name a module": {"layer": "9"},
        "readout must read": {"layer": "0", "readout": "6"},
        "threshold": {"layer": "0", "threshold": 1.0},
        "floor": {"layer": "0", "floor": 1.0},
    }.items():
        with pytest.raises(ValueError, match=what):
            ds.condensation(problem.model, **bad)
    with pytest.raises(TypeError, match="linear layer or a convolution"):
        ds.condensation(problem.model, "1")
