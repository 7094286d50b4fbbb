"""Paper C, Figs. 1 and 4: with dropout the neurons of a wide network condense on few orientations; without, not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dropscope.analyses.condensation import condensation
from dropscope.analyses.loss_line import loss_line
from dropscope.problem import Problem
from dropscope.reproduce.c_networks import mean_error
from dropscope.reproduce.entry import Claim, Entry, Findings, Scale, Verdict
from dropscope.reproduce.two_layer import TwoLayer, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = {"R_S": "plain", "R_drop": "dropout", "L1": "R_S + R1"}
_KEEP = 0.9
_NOTE = "width, rate and steps were chosen after trial runs that showed when the orientations settle"
_LABELS = {"R_S": "plain", "R_drop": "dropout", "L1": "$R_S+R_1$"}


@dataclass(frozen=True)
class Task:
    """A target on the line and the network that learns it."""

    target: Callable[[Tensor], Tensor]
    points: Tensor
    activation: type[nn.Module]
    lr: float
    steps: int


def _tanh_target(x: Tensor) -> Tensor:
    return torch.tanh(x - 6.0) + torch.tanh(x + 6.0)


def _relu_target(x: Tensor) -> Tensor:
    return 0.5 * torch.relu(-x - 1.0 / 3.0) + 0.5 * torch.relu(x - 1.0 / 3.0)


def _tasks(tanh_steps: int, relu_steps: int, lr: float) -> dict[str, Task]:
    thirds = torch.tensor([-5.0, -3.0, -1.0, 1.0, 3.0, 5.0]) / 3.0
    return {
        "tanh": Task(_tanh_target, torch.linspace(-12.0, 12.0, 14), nn.Tanh, lr, tanh_steps),
        "relu": Task(_relu_target, thirds, nn.ReLU, lr, relu_steps),
    }


def run(scale: Scale) -> Findings:
    """Run at the scale asked for."""
    if scale.full:
        return _run(scale, 1000, 5, _tasks(1_000_000, 1_000_000, 1e-4))
    return _run(scale, 200, 3, _tasks(10000, 6000, 3e-3))


def _run(scale: Scale, width: int, seeds: int, tasks: Mapping[str, Task]) -> Findings:
    numbers: dict[str, Any] = {name: {} for name in tasks}
    for name, task in tasks.items():
        X, Y = task.points[:, None], task.target(task.points)[:, None]
        for kind in KINDS:
            nets = TwoLayer.init(
                [scale.seed + i for i in range(seeds)], 1, width, 1, width**-0.1, task.activation().forward
            )
            train(
                nets,
                kind,
                X,
                Y,
                p=1.0 - _KEEP,
                lr=task.lr,
                steps=task.steps,
                adam=True,
                seed=scale.seed,
                progress=scale.progress,
            )
            numbers[name][kind] = _measure(nets, task, X, Y)
    setting = (
        f"2-layer networks of width {width}, start N(0, m^-0.2), Adam, p = {_KEEP:g}, {seeds} seeds: tanh on 14 "
        f"points, {tasks['tanh'].steps} steps; ReLU on 6 points, {tasks['relu'].steps} steps; learning rate "
        f"{tasks['tanh'].lr:g}, mean squared error{scale.small(_NOTE)}"
    )
    return Findings(_claims(numbers), numbers, setting)


def _measure(nets: TwoLayer, task: Task, X: Tensor, Y: Tensor) -> dict[str, Any]:
    low, high = float(X.min()), float(X.max())
    grid = torch.linspace(low, high, 241)[:, None]
    outputs, truth = nets(grid)[:, :, 0], task.target(grid)[:, 0]
    result: dict[str, Any] = {
        "train": (nets(X) - Y).square().mean((1, 2)).tolist(),
        "test": (outputs - truth).square().mean(1).tolist(),
        "grid": grid[:, 0].tolist(),
        "output": outputs[0].tolist(),
        "target": truth.tolist(),
    }
    for key in ("orientations", "weighted", "active", "rise"):
        result[key] = []
    for s in range(len(nets.W)):
        net = single_network(nets, s, task.activation)
        found = condensation(net, "0", "2")
        result["orientations"].append(found.orientations)
        result["weighted"].append(found.weighted_orientations)
        result["active"].append(int(found.active.sum()))
        line = loss_line(Problem(net, nn.MSELoss(), (X, Y)), alphas=[-0.2, 0.0, 0.2], lines=10, normalise="layer")
        result["rise"].append(float(line.losses[:, [0, 2]].mean() - line.losses[:, 1].mean()))
        if s == 0:
            assert found.angles is not None
            result["angles"], result["amplitudes"] = found.angles.tolist(), found.amplitudes.tolist()
    return result


def single_network(nets: TwoLayer, index: int, activation: type[nn.Module]) -> nn.Sequential:
    """One of the stacked networks as a module."""
    _, m, d = nets.W.shape
    net = nn.Sequential(nn.Linear(d, m), activation(), nn.Linear(m, nets.A.shape[1]))
    with torch.no_grad():
        for p, stacked in zip(net.parameters(), nets.parameters, strict=True):
            p.copy_(stacked[index])
    return net


def _claims(numbers: Mapping[str, Any]) -> tuple[Claim, ...]:
    def compared(key: str, name: str, kind: str) -> tuple[str, bool, bool, float]:
        plain = torch.tensor(numbers[name]["R_S"][key], dtype=torch.float64)
        other = torch.tensor(numbers[name][kind][key], dtype=torch.float64)
        gap, error = mean_error(plain - other)
        (m0, e0), (m1, e1) = mean_error(plain), mean_error(other)
        text = f"{name}, {KINDS[kind]}: {m1:.2g} ± {e1:.1g}, plain {m0:.2g} ± {e0:.1g}"
        return text, bool((other < plain).all()), gap > 2.0 * error, m0 / m1

    claims = []
    for text, paper, key in (
        (
            "Figs. 1, 4: with dropout, and with R_S + R1, the neurons condense on few orientations (their number, "
            "weighted by amplitude)",
            "a handful of orientations with, spread without",
            "weighted",
        ),
        (
            "Figs. 1, 4: the network's output is then the simple target between the points (test error)",
            "visibly",
            "test",
        ),
        (
            "Fig. 1: the loss rises less along random directions (rise at |α| = .2)",
            "above .2 without, below .03 with",
            "rise",
        ),
    ):
        seen = [compared(key, name, kind) for name in numbers for kind in ("R_drop", "L1")]
        held = [every or clear for _, every, clear, _ in seen]
        verdict: Verdict = "reproduced" if all(held) else "partly" if sum(held) * 2 >= len(held) else "not reproduced"
        rule = "rule: below plain in every seed, or on average by 2 standard errors, for both networks and both losses"
        failed = [t for (t, *_), ok in zip(seen, held, strict=True) if not ok]
        ratios = ", ".join(f"{text.split(':')[0]} {ratio:.1f}" for text, *_, ratio in seen)
        why = f"{rule}; plain over it: {ratios}" + (f"; fails for {'; '.join(failed)}" if failed else "")
        claims.append(Claim(text, paper, "; ".join(t for t, *_ in seen), verdict, why))
    return tuple(claims)


def plot(numbers: Mapping[str, Any]) -> Figure:
    """Orientations and amplitudes of one seed, and the outputs."""
    from dropscope.plot_style import FAINT, Figure, shades, style

    with style():
        figure = Figure(figsize=(9.6, 5.0), layout="constrained")
        rows = figure.subplots(len(numbers), 4, squeeze=False)
        for axes, (name, kinds) in zip(rows, numbers.items(), strict=True):
            colors = shades(len(KINDS))
            axes[3].plot(kinds["R_S"]["grid"], kinds["R_S"]["target"], color=FAINT, linewidth=3, label="target")
            for place, (kind, label), color in zip(axes[:3], _LABELS.items(), colors, strict=True):
                found = kinds[kind]
                place.plot(found["angles"], found["amplitudes"], ".", markersize=4, color=color)
                place.set_title(f"{name}, {label}:\n{mean_error(found['weighted'])[0]:.1f} orientations")
                place.set_xlim(-3.3, 3.3)
                place.set_xlabel("orientation [rad]")
                place.set_ylabel("amplitude / largest")
                axes[3].plot(found["grid"], found["output"], color=color, label=label)
            axes[3].set_xlabel("x")
            axes[3].set_ylabel("output")
        rows[0][3].legend()
    return figure


ENTRY = Entry(
    name="C-fig1",
    paper="C",
    place="Figs. 1, 4",
    title="neurons condense on few orientations under dropout",
    minutes=1.4,
    run=run,
    plot=plot,
)
