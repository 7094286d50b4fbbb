"""D Fig. 2: the noise that Dropout_k lacks, put back, makes it dropout again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dropscope.reproduce.entry import Claim
from dropscope.reproduce.language import DROPOUT, K4, K4_AGAIN
from dropscope.reproduce.language_figures import entry, judged


def judge(found: Mapping[str, Any]) -> tuple[Claim, ...]:
    """The claims of the figure."""
    return (
        judged(
            "Without the noise, averaging 4 masks is worse",
            "worse",
            found,
            K4,
            "worse",
            K4_AGAIN,
        ),
        judged(
            "With the noise of two more masks it equals dropout",
            "the same curve",
            found,
            K4_AGAIN,
            "equal",
            DROPOUT,
        ),
    )


ENTRY = entry(
    "D-fig2",
    "Fig. 2",
    "Dropout_4 with its noise put back is dropout",
    3.0,
    (
        K4,
        K4_AGAIN,
    ),
    judge,
)
