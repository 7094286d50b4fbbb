"""D Fig. 4: Dropout_k with the approximate implicit noise follows dropout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dropscope.reproduce.entry import Claim
from dropscope.reproduce.language import DROPOUT, K4, K4_NOISE
from dropscope.reproduce.language_figures import entry, judged


def judge(found: Mapping[str, Any]) -> tuple[Claim, ...]:
    """The claims of the figure."""
    return (
        judged(
            "The implicit noise improves averaging 4 masks",
            "better",
            found,
            K4,
            "worse",
            K4_NOISE,
        ),
        judged(
            "With it they equal dropout",
            "the same curve",
            found,
            K4_NOISE,
            "equal",
            DROPOUT,
        ),
    )


ENTRY = entry(
    "D-fig4",
    "Fig. 4",
    "Dropout_4 with the implicit noise follows dropout",
    3.5,
    (
        K4,
        K4_NOISE,
    ),
    judge,
)
