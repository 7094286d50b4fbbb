"""D Fig. 1: the fewer the noise, the worse the model: Dropout_k for growing k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dropscope.reproduce.entry import Claim
from dropscope.reproduce.language import DROPOUT, K4, K8, NONE
from dropscope.reproduce.language_figures import entry, judged


def judge(found: Mapping[str, Any]) -> tuple[Claim, ...]:
    """The claims of the figure."""
    return (
        judged(
            "No dropout is far worse than dropout",
            "PTB: about 120 without",
            found,
            NONE,
            "worse",
            DROPOUT,
        ),
        judged(
            "No dropout is worse than even 8 masks averaged",
            "none ≫ k = 8",
            found,
            NONE,
            "worse",
            K8,
        ),
        judged(
            "Averaging 8 masks is worse than 4",
            "rises with k up to 32",
            found,
            K8,
            "worse",
            K4,
        ),
        judged(
            "Averaging 4 masks is worse than dropout",
            "rises with k up to 32",
            found,
            K4,
            "worse",
            DROPOUT,
        ),
    )


ENTRY = entry(
    "D-fig1",
    "Fig. 1",
    "validation perplexity degrades with the number of masks averaged",
    3.5,
    (
        K4,
        K8,
    ),
    judge,
)
