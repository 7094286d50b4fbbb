"""Paper C, Fig. 8: with dropout a wide student recovers a small teacher from as many samples as parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dropscope.reproduce.c_networks import mean_error
from dropscope.reproduce.entry import Claim, Entry, Findings, Scale, Verdict
from dropscope.reproduce.two_layer import TwoLayer, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KEEP = 0.9
_LABELS = {"R_S": "plain", "R_drop": "dropout", "L1": "$R_S+R_1$"}
_NOTE = "at first 4 trials, 6 numbers of samples and 8000 steps, shortened for the time"
_PARAMETERS = 6  # of the teacher
KINDS = {"R_S": "plain", "R_drop": "dropout", "L1": "R_S + R1"}


def teacher(x: Tensor) -> Tensor:
    """Two tanh neurons, six parameters."""
    return torch.tanh(x - 6.0) + torch.tanh(x + 6.0)


def run(scale: Scale) -> Findings:
    """Run at the scale asked for."""
    if scale.full:
        return _run(scale, 1000, 10, tuple(range(1, 15)), 500_000, 1e-4)
    return _run(scale, 150, 3, (4, 8, 11, 14), 6000)


def _run(scale: Scale, width: int, trials: int, counts: Sequence[int], steps: int, lr: float = 3e-3) -> Findings:
    grid = torch.linspace(-12.0, 12.0, 241)[:, None]
    numbers: dict[str, Any] = {"counts": list(counts)} | {kind: [] for kind in KINDS}
    for count in counts:
        X = torch.linspace(-12.0, 12.0, count)[:, None]
        for kind in KINDS:
            nets = TwoLayer.init([scale.seed + i for i in range(trials)], 1, width, 1, width**-0.1, torch.tanh)
            options = {"p": 1.0 - _KEEP, "lr": lr, "steps": steps, "adam": True, "seed": scale.seed}
            train(nets, kind, X, teacher(X), progress=scale.progress, **options)  # type: ignore[arg-type]
            numbers[kind].append((nets(grid) - teacher(grid)).square().mean((1, 2)).tolist())
    setting = (
        f"teacher of 2 tanh neurons, student of width {width}, start N(0, m^-0.2), Adam {lr:g}, {steps} steps, "
        f"p = {_KEEP:g}, {trials} trials, samples evenly spaced on [-12, 12]{scale.small(_NOTE)}"
    )
    return Findings(_claims(numbers), numbers, setting)


def _claims(numbers: Mapping[str, Any]) -> tuple[Claim, ...]:
    enough = [i for i, count in enumerate(numbers["counts"]) if count > _PARAMETERS] or [-1]
    ratios, texts, noiseless = [], [], []
    for i in enough:
        drop, plain = (torch.tensor(numbers[kind][i], dtype=torch.float64) for kind in ("R_drop", "R_S"))
        ratios.append(float(plain.log().mean().exp() / drop.log().mean().exp()))
        noiseless.append(f"{mean_error(numbers['L1'][i])[0]:.2g}")
        texts.append(f"n = {numbers['counts'][i]}: {mean_error(drop)[0]:.2g} / {mean_error(plain)[0]:.2g}")
    held = [ratio > 2.0 for ratio in ratios]
    full = [ratio > 10.0 for ratio in ratios]
    verdict: Verdict = "reproduced" if all(full) else "partly" if sum(held) * 2 >= len(held) else "not reproduced"
    return (
        Claim(
            "Fig. 8: from as many samples as the teacher has parameters the test error is small, with dropout only",
            "n >= 7: below 1e-3 with dropout, above 1e-1 without",
            "test error with / without: " + "; ".join(texts),
            verdict,
            "rule: the geometric mean over trials is 10 times smaller with dropout at every n above 6; partly if 2 "
            f"times at half of them; ratios {', '.join(f'{r:.1f}' for r in ratios)}; R_S + R1, which is dropout's loss "
            f"without its noise at this learning rate, gives {', '.join(noiseless)}",
        ),
    )


def plot(numbers: Mapping[str, Any]) -> Figure:
    """Test error against the number of samples."""
    from dropscope.plot_style import FAINT, log_axis, shades, single, style

    with style():
        figure, axes = single(5.2, 3.4)
        for (kind, label), color in zip(_LABELS.items(), shades(len(KINDS)), strict=True):
            values = torch.tensor(numbers[kind], dtype=torch.float64)
            axes.plot(numbers["counts"], values.log().mean(1).exp().tolist(), "o-", ms=4, color=color, label=label)
            low, high = values.amin(1).tolist(), values.amax(1).tolist()
            axes.fill_between(numbers["counts"], low, high, color=color, alpha=0.2, linewidth=0)
        axes.axvline(_PARAMETERS, color=FAINT, linestyle="--", linewidth=0.9)
        place = (_PARAMETERS + 0.1, 0.97)
        axes.text(*place, "parameters of the teacher", transform=axes.get_xaxis_transform(), va="top", fontsize="small")
        axes.set_xlabel("training samples")
        axes.set_ylabel("test error (mean square)")
        log_axis(axes, "y")
        axes.legend()
    return figure


ENTRY = Entry(
    name="C-fig8",
    paper="C",
    place="Fig. 8",
    title="a wide student recovers a small teacher with dropout",
    minutes=2.5,
    run=run,
    plot=plot,
)
