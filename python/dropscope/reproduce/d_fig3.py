"""D Fig. 3: the explicit penalty alone lies between many masks and one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dropscope.reproduce.entry import Claim
from dropscope.reproduce.language import DROPOUT, EXPLICIT, K8, NONE
from dropscope.reproduce.language_figures import entry, judged


def judge(found: Mapping[str, Any]) -> tuple[Claim, ...]:
    """The claims of the figure."""
    return (
        judged(
            "The explicit penalty alone is far better than none",
            "better",
            found,
            NONE,
            "worse",
            EXPLICIT,
        ),
        judged(
            "It is better than many masks averaged",
            "better than k = 32 (here k = 8)",
            found,
            K8,
            "worse",
            EXPLICIT,
        ),
        judged(
            "It is worse than dropout, which also has the implicit effect",
            "worse",
            found,
            EXPLICIT,
            "worse",
            DROPOUT,
        ),
    )


ENTRY = entry(
    "D-fig3",
    "Fig. 3",
    "the explicit penalty is better than many masks averaged and worse than dropout",
    3.5,
    (
        K8,
        EXPLICIT,
    ),
    judge,
)
