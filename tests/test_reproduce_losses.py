"""The reproductions of the modified equation and of paper C's losses: the networks are right, the entries run."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import dropscope as ds
from dropscope import _files
from dropscope.reproduce import Scale, a_fig1, c_fig1, c_fig2, c_fig8, c_fig13, c_fig14, c_table1
from dropscope.reproduce.c_networks import Setting
from dropscope.reproduce.two_layer import RECIPES, TwoLayer, losses, train
from dropscope.training import modified_loss

TINY = Setting(20, 8, 0.3, 0.02, 3, 2)


def stacked(seeds: list[int]) -> TwoLayer:
    nets = TwoLayer.init(seeds, 3, 5, 2, 0.7, torch.tanh)
    leaves = [p.detach().double().requires_grad_() for p in nets.parameters]
    return TwoLayer(*leaves, torch.tanh)


def alone(nets: TwoLayer, index: int, p: float) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(p), nn.Linear(5, 2)).double()
    with torch.no_grad():
        for q, part in zip(net.parameters(), nets.parameters, strict=True):
            q.copy_(part[index])
    return net


@pytest.mark.parametrize("kind", ["R_S", "L1"])
def test_stacked_losses_without_masks_are_the_modified_losses(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    X, Y = (torch.randn(6, k, generator=generator, dtype=torch.float64) for k in (3, 2))
    nets = stacked([0, 1])
    values = losses(nets, kind, X, Y, 0.3, 0.1, 0, 0)
    for index in range(2):
        problem = ds.Problem(alone(nets, index, 0.3), nn.MSELoss(), (X, Y))
        assert values[index].item() == pytest.approx(modified_loss(problem, kind)(0).item(), rel=1e-12)


@pytest.mark.parametrize("kind", ["R_drop", "L2", "L3", "L4"])
def test_stacked_losses_under_masks_are_the_modified_losses(kind: str) -> None:
    """The first network's masks are those of samples 0..n−1 at site 0; the model is made to draw from there."""
    generator = torch.Generator().manual_seed(0)
    X, Y = (torch.randn(6, k, generator=generator, dtype=torch.float64) for k in (3, 2))
    nets, step, seed, p = stacked([0, 1]), 4, 3, 0.3
    net = alone(nets, 0, p)
    mask = ds.dropout(torch.ones(6, 5, dtype=torch.float64), p, ds.MaskKey(seed, step))
    drop_site = net(X), net[3](net[:2](X) * mask)
    clean, dropped = ((out - Y).square().mean() for out in drop_site)
    gradient = torch.autograd.grad(dropped, list(net.parameters()), retain_graph=True)
    r2 = 0.1 / 4 * sum(g.square().sum() for g in gradient)
    r1 = modified_loss(ds.Problem(net, nn.MSELoss(), (X, Y)), "L1").r1()
    net.eval()
    clean = (net(X) - Y).square().mean()
    drop, a, b = RECIPES[kind]
    expected = (dropped if drop else clean) + a * r1 + b * r2
    assert losses(nets, kind, X, Y, p, 0.1, step, seed)[0].item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_network_does_not_feel_the_others() -> None:
    X, Y = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(5, 2)
    ends = []
    for seeds in ([0], [0, 7]):
        nets = TwoLayer.init(seeds, 3, 4, 2, 0.5, torch.relu)
        train(nets, "L3", X, Y, p=0.4, lr=0.05, steps=4)
        ends.append(nets.W[0].detach())
    torch.testing.assert_close(*ends)


def found(entry, findings) -> None:
    """Claims and figure of an entry come from numbers that survive JSON."""
    numbers = json.loads(json.dumps(_files.plain(findings.numbers)))
    assert findings.claims
    assert findings.setting
    assert all(claim.ours and claim.why and "nan" not in claim.ours for claim in findings.claims)
    assert entry.plot(numbers).axes


def test_paper_a_figure_1() -> None:
    found(a_fig1.ENTRY, a_fig1._run(Scale(), 12, 4, 0.01, 20, 2, 150, (0.5, 0.25, 0.2)))


def test_paper_c_figure_1() -> None:
    found(c_fig1.ENTRY, c_fig1._run(Scale(), 10, 2, c_fig1._tasks(3, 3, 1e-3)))


def test_paper_c_figures_2_13_and_14() -> None:
    found(c_fig2.ENTRY, c_fig2._run(Scale(), TINY, (0.5, 0.7)))
    found(c_fig13.ENTRY, c_fig13._run(Scale(), TINY, 0.5))
    found(c_fig14.ENTRY, c_fig14._run(Scale(), TINY, 0.5))


def test_paper_c_figure_8() -> None:
    found(c_fig8.ENTRY, c_fig8._run(Scale(), 10, 2, (3, 6), 3))


def test_paper_c_table_1() -> None:
    found(c_table1.ENTRY, c_table1._run(Scale(), 20, 4, 2, 0.01))
