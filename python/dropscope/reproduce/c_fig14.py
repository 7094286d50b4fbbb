"""Paper C, Fig. 14: solutions of losses that hold R1 are connected, and apart from those of losses that do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from dropscope.reproduce.c_networks import CHOSEN, FULL, GENTLE, Setting, mean_error, tensors, trained
from dropscope.reproduce.entry import Claim, Entry, Findings, Scale
from dropscope.reproduce.two_layer import losses

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CONNECTED = (("L1", "L3"), ("L2", "L4"))
_APART = (("L1", "L2"), ("L1", "L4"), ("L2", "L3"), ("L3", "L4"))


def run(scale: Scale) -> Findings:
    """Run at the scale asked for."""
    return _run(scale, FULL if scale.full else GENTLE, 0.7)


def _run(scale: Scale, setting: Setting, keep: float) -> Findings:
    data, X, Y = tensors(scale, setting.n)
    alphas = torch.arange(-10, 31) / 20
    lines, barriers = {}, {}
    for first, second in (*_CONNECTED, *_APART):
        a, b = (trained(scale, setting, kind, keep).nets for kind in (first, second))
        with torch.no_grad():
            curve = torch.stack(
                [losses(a.interpolated(b, float(t)), "R_S", X, Y, 0.5, 0.0, 0, 0) for t in alphas]
            ).double()
        inside = (alphas >= 0) & (alphas <= 1)
        chord = torch.lerp(curve[inside][:1], curve[inside][-1:], alphas[inside][:, None].double())
        lines[f"{first}-{second}"] = curve.mean(1).tolist()
        rise = (curve[inside] - chord).amax(0).clamp_min(0.0)
        # A network that diverged is apart from every other.
        barriers[f"{first}-{second}"] = torch.where(rise.isfinite(), rise, 1e30).tolist()
    numbers = {"alphas": alphas.tolist(), "lines": lines, "barriers": barriers}
    line = f"{data.name}: {setting}, p = {keep:g}; 41 points a line{scale.small(CHOSEN)}"
    return Findings(_claims(numbers), numbers, line)


def _claims(numbers: Mapping[str, Any]) -> tuple[Claim, ...]:
    barrier = {pair: mean_error(values) for pair, values in numbers["barriers"].items()}
    low = {f"{a}-{b}": barrier[f"{a}-{b}"] for a, b in _CONNECTED}
    high = {f"{a}-{b}": barrier[f"{a}-{b}"] for a, b in _APART}
    text = [", ".join(f"{k} {m:.2g} ± {e:.1g}" for k, (m, e) in part.items()) for part in (low, high)]
    diverged = [pair for pair, (m, _) in barrier.items() if m > 1e20]
    ordered = not diverged and max(m for m, _ in low.values()) < min(m for m, _ in high.values())
    some = not diverged and sum(m for m, _ in low.values()) / len(low) < sum(m for m, _ in high.values()) / len(high)
    return (
        Claim(
            "Fig. 14: the risk between solutions has no barrier within {L1, L3} and {L2, L4}, and one between them",
            "below 1.2e-3 within, .01 to .035 between",
            f"within: {text[0]}; between: {text[1]}",
            "reproduced" if ordered else "partly" if some else "not reproduced",
            "rule: every mean barrier within is below every one between; partly if so on average"
            + (f"; a training run of these diverged: {', '.join(diverged)}" if diverged else ""),
        ),
    )


def plot(numbers: Mapping[str, Any]) -> Figure:
    """The risk between pairs of solutions."""
    from dropscope.plot_style import FAINT, log_axis, shades, single, style

    with style():
        figure, axes = single(5.6, 3.6)
        connected = {f"{a}-{b}" for a, b in _CONNECTED}
        for (pair, values), color in zip(numbers["lines"].items(), shades(len(numbers["lines"])), strict=True):
            axes.plot(numbers["alphas"], values, "-" if pair in connected else "--", color=color, label=pair)
        for end in (0.0, 1.0):
            axes.axvline(end, color=FAINT, linewidth=0.8, zorder=0)
        axes.set_xlabel(r"$\alpha$ in $(1-\alpha)\theta_A+\alpha\theta_B$")
        axes.set_ylabel("training risk, dropout off")
        log_axis(axes, "y")
        axes.legend(ncols=2)
    return figure


ENTRY = Entry(
    name="C-fig14",
    paper="C",
    place="Fig. 14",
    title="barriers between the solutions of L1 to L4",
    minutes=2.2,  # by itself; a second where C-fig13 has run in the same process
    run=run,
    plot=plot,
)
