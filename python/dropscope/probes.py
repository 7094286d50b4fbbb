"""Four probes, on a few samples, that model, loss and data make one risk."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dropscope.problem import Problem


def run(problem: Problem) -> None:
    """Run every probe."""
