"""What one reproduced figure or table is made of: an entry, its scale, its findings, the claims it judges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Verdict = Literal["reproduced", "partly", "not reproduced"]


@dataclass(frozen=True)
class Scale:
    """What an entry is run with.

    Attributes:
        full: the paper's own size instead of minutes on two cores.
        data: folder or file of the user's data, read by :mod:`dropscope.reproduce.datasets`; None for what is at hand.
        seed: every random number of the entry follows from it.
        progress: whether to show progress bars.
    """

    full: bool = False
    data: Path | None = None
    seed: int = 0
    progress: bool = False

    def small(self, note: str) -> str:
        """What to add to a setting of how its small scale was chosen; nothing at the full one."""
        return "" if self.full else f"; {note}"


@dataclass(frozen=True)
class Claim:
    """One statement of a paper, held against what was measured.

    Attributes:
        text: what the paper says, in our words, with its place.
        paper: the paper's number or ordering, as text.
        ours: the measured one, with its error, as text.
        verdict: whether it holds here.
        why: for any other verdict than "reproduced", the measured reason; else what is worth knowing.
    """

    text: str
    paper: str
    ours: str
    verdict: Verdict
    why: str = ""


@dataclass(frozen=True)
class Findings:
    """What an entry measured.

    Attributes:
        claims: the statements it judges, at least one.
        numbers: all that its figure and its claims come from, as plain lists and numbers: it is written as JSON.
        setting: one line: network, data, repeats, what is smaller than in the paper.
    """

    claims: tuple[Claim, ...]
    numbers: Mapping[str, Any]
    setting: str


@dataclass(frozen=True)
class Entry:
    """A figure or table of a paper that ``dropscope reproduce`` computes.

    Attributes:
        name: on the command line, such as ``C-fig13``.
        paper: "A", "B", "C" or "D".
        place: figure or table of the paper.
        title: what it shows, in a line.
        minutes: of a run at the small scale on two cores.
        run: does the work.
        plot: the figure, drawn from ``numbers`` as read back from JSON.
    """

    name: str
    paper: Literal["A", "B", "C", "D"]
    place: str
    title: str
    minutes: float
    run: Callable[[Scale], Findings]
    plot: Callable[[Mapping[str, Any]], Figure] = field(repr=False)
