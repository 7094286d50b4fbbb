"""What the figures of paper D share: curves of perplexity, best values with errors, and the rules of their verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from dropscope import plot_style
from dropscope.reproduce.entry import Claim, Entry, Findings, Scale, Verdict
from dropscope.reproduce.language import DROPOUT, FULL, NONE, SMALL, Method, Size, described, runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLOSE = 0.2  # "equal" is a difference below this share of what dropout gains over no dropout
SEEDS = 3
Relation = Literal["worse", "equal"]


def best(curves: Mapping[str, Any]) -> list[float]:
    """The best validation perplexity of each seed: each run at its tuned length."""
    return [min(curve) for curve in curves["valid"]]


def mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    n, middle = len(values), sum(values) / len(values)
    spread = sum((v - middle) ** 2 for v in values)
    return middle, math.sqrt(spread / (n * max(n - 1, 1)))


def judged(text: str, paper: str, found: Mapping[str, Any], first: Method, relation: Relation, second: Method) -> Claim:
    """Hold one comparison of best perplexities against the paper; differences are taken seed by seed.

    "Worse" is reproduced where the mean difference is positive and above 2 standard errors, partly where it is only
    positive. "Equal" is reproduced where it is below ``CLOSE`` of the gap between no dropout and dropout, partly below
    twice that.
    """
    a, b = best(found[first.name]), best(found[second.name])
    difference, error = mean([x - y for x, y in zip(a, b, strict=True)])
    gap = mean(best(found[NONE.name]))[0] - mean(best(found[DROPOUT.name]))[0]
    (one, one_error), (other, other_error) = mean(a), mean(b)
    verdict: Verdict
    if relation == "worse":
        verdict = "reproduced" if difference > 2 * error else "partly" if difference > 0 else "not reproduced"
    else:
        share = abs(difference) / gap if gap > 0 else math.inf
        verdict = "reproduced" if share < CLOSE else "partly" if share < 2 * CLOSE else "not reproduced"
    ours = (
        f"{first.name} {one:.2f} ± {one_error:.2f}, {second.name} {other:.2f} ± {other_error:.2f}: "
        f"difference {difference:+.2f} ± {error:.2f}"
    ) + (f", {difference / gap:+.0%} of what dropout gains" if gap > 0 else "")
    why = "" if verdict == "reproduced" else _reason(found, first, second, len(a))
    return Claim(text, paper, ours, verdict, why)


def _reason(found: Mapping[str, Any], first: Method, second: Method, seeds: int) -> str:
    """What was measured that bears on a comparison: the spread over seeds, and how penalty and noise fit."""
    spread = [
        f"{method.name} {min(values):.1f} to {max(values):.1f}"
        for method in (first, second)
        for values in [best(found[method.name])]
    ]
    reasons = [f"over {seeds} seeds the best perplexities range: " + ", ".join(spread)]
    for method in (first, second):
        if method.explicit or method.implicit:
            penalty, noise, _ = _fidelity(found, method)
            parts = [f"the penalty is {penalty} of what dropout adds to the loss"] * method.explicit
            parts += [f"the noise has {noise} of the variance of dropout's"] * method.implicit
            reasons.append(f"at the models trained with {method.name}, " + " and ".join(parts))
    if first.masks != second.masks or first.implicit != second.implicit:
        share = _fidelity(found, DROPOUT)[2]
        reasons.append(f"dropout's noise, which tells the two apart, has {share} of the variance of the batches' own")
    return "; ".join(reasons)


def _fidelity(found: Mapping[str, Any], method: Method) -> list[str]:
    """The numbers of ``language.fidelity`` over the seeds."""
    columns = zip(*found[method.name]["fidelity"], strict=True)
    return ["{:.2f} ± {:.2f}".format(*mean(column)) for column in columns]


Judge = Callable[[Mapping[str, Any]], tuple[Claim, ...]]


def entry(name: str, place: str, title: str, minutes: float, methods: Sequence[Method], judge: Judge) -> Entry:
    """An entry that trains these methods, beside no dropout and dropout, and judges their best perplexities."""
    trained = (NONE, DROPOUT, *methods)

    def run(scale: Scale) -> Findings:
        return findings(scale, FULL if scale.full else SMALL, SEEDS, trained, judge)

    return Entry(name, "D", place, title, minutes, run, plot)


def findings(
    scale: Scale, size: Size, seeds: int, methods: Sequence[Method], judge: Judge, workers: int = 2
) -> Findings:
    """Train, judge, describe."""
    found = runs(methods, seeds, size, scale, workers)
    what = "the standard library's sources" if scale.data is None else str(scale.data)
    return Findings(judge(found), {"methods": found}, described(size, seeds, f"{size.train} words of {what}"))


@plot_style.styled
def plot(numbers: Mapping[str, Any]) -> Figure:
    """Validation perplexity by epoch, mean over seeds with its range; a dot marks the best mean."""
    figure, axes = plot_style.single(6.0, 3.8)
    found = numbers["methods"]
    highest = 0.0
    for color, (name, curves) in zip(plot_style.shades(len(found)), found.items(), strict=True):
        length = min(len(curve) for curve in curves["valid"])
        columns = [[curve[epoch] for curve in curves["valid"]] for epoch in range(length)]
        middle = [mean(column)[0] for column in columns]
        epochs = list(range(1, length + 1))
        axes.plot(epochs, middle, color=color, label=f"{name}: {mean(best(curves))[0]:.1f}")
        axes.fill_between(epochs, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.15, lw=0)
        axes.plot(epochs[middle.index(min(middle))], min(middle), "o", color=color, ms=4)
        highest = max(highest, min(middle))
    low = min(min(best(curves)) for curves in found.values())
    axes.set_ylim(low - 0.05 * (highest - low) - 0.5, highest + 0.6 * (highest - low) + 1.0)
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation perplexity")
    axes.legend(fontsize="small")
    return figure
