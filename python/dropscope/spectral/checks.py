"""Refusals that the functions of this room share."""

from __future__ import annotations

import torch

from dropscope.operators.base import SymmetricOperator


def check_operator(function: str, A: SymmetricOperator) -> None:
    """Refuse what is no operator, or one of another dtype than float32 and float64."""
    if not isinstance(A, SymmetricOperator):
        raise TypeError(
            f"{function}: A must be a SymmetricOperator (SymmetricOperator.from_callable makes one), "
            f"got {type(A).__name__}"
        )
    if A.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{function}: A.dtype must be torch.float32 or torch.float64, got {A.dtype}")


def check_count(function: str, name: str, value: int, least: int) -> None:
    """Refuse what is not an int of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{function}: {name} must be an int of at least {least}, got {value!r}")


def check_seed(function: str, seed: int) -> None:
    """Refuse what is not a 64-bit seed."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**64:
        raise ValueError(f"{function}: seed must be an int in [0, 2**64), got {seed!r}")
