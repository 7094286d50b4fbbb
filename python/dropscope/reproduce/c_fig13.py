"""Paper C, Fig. 13: which part of dropout's loss helps: R1, by itself or within dropout, and not the gradient norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from dropscope.reproduce.c_networks import CHOSEN, FULL, GENTLE, Setting, mean_error, tensors, trained
from dropscope.reproduce.entry import Claim, Entry, Findings, Scale, Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("R_S", "L2", "L4", "L3", "L1", "R_drop")
_WITH_R1, _WITHOUT = ("L1", "L3"), ("L2", "L4")


def run(scale: Scale) -> Findings:
    """Run at the scale asked for."""
    return _run(scale, FULL if scale.full else GENTLE, 0.7)


def _run(scale: Scale, setting: Setting, keep: float) -> Findings:
    runs = {kind: trained(scale, setting, kind, keep) for kind in KINDS}
    numbers: dict[str, Any] = {kind: (100 * run.accuracy).tolist() for kind, run in runs.items()}
    numbers["diverged"] = [kind for kind, run in runs.items() if not bool(torch.isfinite(run.risk).all())]
    data, _, _ = tensors(scale, setting.n)
    return Findings(_claims(numbers), numbers, f"{data.name}: {setting}, p = {keep:g}{scale.small(CHOSEN)}")


def _claims(numbers: Mapping[str, Any]) -> tuple[Claim, ...]:
    accuracy = {kind: torch.tensor(numbers[kind], dtype=torch.float64) for kind in KINDS}
    gain = accuracy["R_drop"] - accuracy["R_S"]
    whole, error = mean_error(gain)
    shares = {kind: mean_error((accuracy[kind] - accuracy["R_S"]) / gain.mean()) for kind in (*_WITH_R1, *_WITHOUT)}
    helps = whole > 2.0 * error
    verdicts: dict[tuple[str, ...], Verdict] = {}
    for kinds in (_WITH_R1, _WITHOUT):
        lost = numbers["diverged"]
        held = [(shares[kind][0] > 0.5) == (kinds == _WITH_R1) and kind not in lost for kind in kinds]
        verdicts[kinds] = "reproduced" if all(held) and helps else "partly" if any(held) and helps else "not reproduced"
    text = {kind: f"{mean_error(accuracy[kind])[0]:.1f} ± {mean_error(accuracy[kind])[1]:.1f}" for kind in KINDS}
    why = "rule: {} half of dropout's gain over plain training in the mean, and that gain above 2 standard errors"
    if numbers["diverged"]:
        why += f"; training diverged with {', '.join(numbers['diverged'])}"
    return (
        Claim(
            "Fig. 13: losses that hold R1, L1 = R_S + R1 and L3 = R^drop − R̃2, generalise as dropout does",
            "R_S 83 / 79, R^drop, L1, L3 about 89 to 90 %",
            f"R_S {text['R_S']}, R^drop {text['R_drop']}, L1 {text['L1']}, L3 {text['L3']} %; shares of the gain: "
            + ", ".join(f"{k} {shares[k][0]:.2f} ± {shares[k][1]:.2f}" for k in _WITH_R1),
            verdicts[_WITH_R1],
            why.format("more than"),
        ),
        Claim(
            "Fig. 13: losses without R1, L2 = R_S + R̃2 and L4 = R^drop − R1, do not",
            "L2, L4 about 84 to 83.5 / 80 to 79 %",
            f"L2 {text['L2']}, L4 {text['L4']} %; shares of the gain: "
            + ", ".join(f"{k} {shares[k][0]:.2f} ± {shares[k][1]:.2f}" for k in _WITHOUT),
            verdicts[_WITHOUT],
            why.format("less than"),
        ),
    )


def plot(numbers: Mapping[str, Any]) -> Figure:
    """Test accuracy by loss."""
    from dropscope.plot_style import BLUE, FAINT, VERMILION, single, style

    names = {"R_S": "$R_S$", "R_drop": r"$R^{\mathrm{drop}}$"} | {f"L{i}": f"$L_{i}$" for i in range(1, 5)}
    with style():
        figure, axes = single(5.2, 3.4)
        for i, kind in enumerate(KINDS):
            color = BLUE if kind in (*_WITH_R1, "R_drop") else VERMILION
            mean, error = mean_error(numbers[kind])
            axes.plot([i] * len(numbers[kind]), numbers[kind], ".", color=FAINT, zorder=1)
            axes.errorbar(i, mean, error, fmt="o", color=color, capsize=3)
        axes.set_xticks(range(len(KINDS)), [names[kind] for kind in KINDS])
        axes.plot([], [], "o", color=BLUE, label="with $R_1$")
        axes.plot([], [], "o", color=VERMILION, label="without")
        axes.set_ylabel("test accuracy [%]")
        axes.legend()
    return figure


ENTRY = Entry(
    name="C-fig13",
    paper="C",
    place="Fig. 13",
    title="which of L1 to L4 matter: R1 is the useful term",
    minutes=2.6,
    run=run,
    plot=plot,
)
