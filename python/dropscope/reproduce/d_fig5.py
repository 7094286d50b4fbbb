"""D Fig. 5: the explicit penalty and the implicit noise together stand for dropout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dropscope.reproduce.entry import Claim
from dropscope.reproduce.language import BOTH, DROPOUT, EXPLICIT, NONE
from dropscope.reproduce.language_figures import entry, judged


def judge(found: Mapping[str, Any]) -> tuple[Claim, ...]:
    """The claims of the figure."""
    return (
        judged(
            "Both effects together are far better than none",
            "better",
            found,
            NONE,
            "worse",
            BOTH,
        ),
        judged(
            "The noise improves on the penalty alone",
            "rerun: 87.0 against 77.4",
            found,
            EXPLICIT,
            "worse",
            BOTH,
        ),
        judged(
            "Both together match dropout",
            "equal, in fewer iterations; rerun: 77.4 against 83.0",
            found,
            BOTH,
            "equal",
            DROPOUT,
        ),
    )


ENTRY = entry(
    "D-fig5",
    "Fig. 5",
    "explicit penalty and implicit noise together match dropout",
    3.0,
    (
        EXPLICIT,
        BOTH,
    ),
    judge,
)
