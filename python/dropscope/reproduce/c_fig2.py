"""Paper C, Fig. 2: training with R_S + R1 gives what training with dropout gives, and plain training does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dropscope.reproduce.c_networks import CHOSEN, FULL, SMALL, Setting, mean_error, tensors, trained
from dropscope.reproduce.entry import Claim, Entry, Findings, Scale, Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_EQUAL, _WORSE = 0.3, 5.0  # points of accuracy


def run(scale: Scale) -> Findings:
    """Run at the scale asked for."""
    if scale.full:
        return _run(scale, FULL, (0.6, 0.7, 0.8, 0.85, 0.9, 0.95))
    return _run(scale, SMALL, (0.6, 0.7, 0.8))


def _run(scale: Scale, setting: Setting, keeps: Sequence[float]) -> Findings:
    plain = trained(scale, setting, "R_S", keeps[0])
    numbers: dict[str, Any] = {"keeps": list(keeps), "plain": (100 * plain.accuracy).tolist()}
    for kind in ("R_drop", "L1"):
        runs = [trained(scale, setting, kind, keep) for keep in keeps]
        numbers[kind] = {
            "accuracy": [(100 * r.accuracy).tolist() for r in runs],
            "risk": [r.risk.tolist() for r in runs],
            "r1": [r.r1.tolist() for r in runs],
        }
    data, _, _ = tensors(scale, setting.n)
    return Findings(_claims(numbers), numbers, f"{data.name}: {setting}{scale.small(CHOSEN)}")


def _claims(numbers: Mapping[str, Any]) -> tuple[Claim, ...]:
    drop, l1 = (torch.tensor(numbers[k]["accuracy"], dtype=torch.float64) for k in ("R_drop", "L1"))
    plain = torch.tensor(numbers["plain"], dtype=torch.float64)
    between = [mean_error(a - b) for a, b in zip(drop, l1, strict=True)]
    equal = [abs(gap) <= max(_EQUAL, 2.0 * error) for gap, error in between]
    strict = [abs(gap) <= _EQUAL for gap, _ in between]
    above = [mean_error(torch.minimum(a, b) - plain) for a, b in zip(drop, l1, strict=True)]
    better = [gap >= _WORSE for gap, _ in above]
    sign = [gap > 2.0 * error for gap, error in above]
    keeps = numbers["keeps"]
    ratio = [
        torch.tensor(a, dtype=torch.float64).mean().item() / torch.tensor(b, dtype=torch.float64).mean().item()
        for a, b in zip(numbers["R_drop"]["r1"], numbers["L1"]["r1"], strict=True)
    ]
    return (
        Claim(
            "Fig. 2: test accuracy is the same whether trained with dropout or with R_S + R1",
            "difference below 0.1 points at every p",
            "; ".join(f"p = {k:g}: {g:+.2f} ± {e:.2f}" for k, (g, e) in zip(keeps, between, strict=True)),
            "reproduced" if all(equal) and any(strict) else "partly" if any(equal) else "not reproduced",
            f"rule: within {_EQUAL:g} points, or two standard errors over seeds where that is more; "
            f"R1 at the end, dropout over R_S + R1: {', '.join(f'{r:.2f}' for r in ratio)}",
        ),
        Claim(
            "Fig. 2: plain training is worse than both",
            "79 % against 88.4 to 89.4 %",
            f"plain {plain.mean():.1f} %; the lesser of the two above it by "
            + "; ".join(f"{g:.1f} ± {e:.1f} points (p = {k:g})" for k, (g, e) in zip(keeps, above, strict=True)),
            _verdict(better, sign),
            f"rule: by {_WORSE:g} points at every p; partly if only at some, or by more than 2 standard errors",
        ),
    )


def _verdict(full: Sequence[bool], half: Sequence[bool]) -> Verdict:
    return "reproduced" if all(full) else "partly" if any(full) or all(half) else "not reproduced"


def plot(numbers: Mapping[str, Any]) -> Figure:
    """Test accuracy against p, and the two parts of the loss."""
    from dropscope.plot_style import BLUE, FAINT, VERMILION, Figure, log_axis, style

    with style():
        figure = Figure(figsize=(8.0, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        names = (("R_drop", "dropout", BLUE, -0.006), ("L1", "$R_S+R_1$", VERMILION, 0.006))
        for kind, label, color, shift in names:
            x = [k + shift for k in numbers["keeps"]]
            pairs = [mean_error(a) for a in numbers[kind]["accuracy"]]
            left.errorbar(x, [m for m, _ in pairs], [e for _, e in pairs], fmt="o-", ms=4, color=color, label=label)
            for part, marker, text in (("risk", "s", "$R_S$"), ("r1", "^", "$R_1$")):
                pairs = [mean_error(a) for a in numbers[kind][part]]
                values, errors = [m for m, _ in pairs], [e for _, e in pairs]
                right.errorbar(x, values, errors, fmt=f"{marker}-", ms=4, color=color, label=f"{text}, {label}")
        mean, error = mean_error(numbers["plain"])
        left.axhline(mean, color=FAINT, label="plain")
        left.axhspan(mean - error, mean + error, color=FAINT, alpha=0.25, linewidth=0)
        left.set_xlabel("keep probability p")
        left.set_ylabel("test accuracy [%]")
        left.legend()
        right.set_xlabel("keep probability p")
        right.set_ylabel("at the end of training")
        log_axis(right, "y")
        right.legend()
    return figure


ENTRY = Entry(
    name="C-fig2",
    paper="C",
    place="Fig. 2",
    title="training with R_S + R1 equals training with dropout, plain training is worse",
    minutes=1.1,
    run=run,
    plot=plot,
)
