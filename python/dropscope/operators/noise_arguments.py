"""What GradientNoise accepts: each refusal names the argument, the rule and the value seen."""

from __future__ import annotations

from dropscope.factors import ALLOCATIONS, CACHES
from dropscope.problem import Problem


def check_arguments(
    problem: object, draws: object, seed: object, cache: object, sharing: object, memory: object
) -> None:
    """Refuse what makes no table of gradients."""
    if not isinstance(problem, Problem):
        raise TypeError(f"GradientNoise: problem must be a Problem, got {type(problem).__name__}")
    if isinstance(draws, bool) or not isinstance(draws, int):
        raise TypeError(f"GradientNoise: draws must be an int, got {draws!r}")
    if not 2 <= draws < 2**32:
        raise ValueError(f"GradientNoise: draws must be at least 2 and below 2**32, got {draws}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"GradientNoise: seed must be an int, got {seed!r}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"GradientNoise: seed must lie in [0, 2**64), got {seed}")
    if cache not in CACHES:
        raise ValueError(f"GradientNoise: cache must be one of {CACHES}, got {cache!r}")
    if sharing not in ("sample", "batch"):
        raise ValueError(f"GradientNoise: sharing must be 'sample' or 'batch', got {sharing!r}")
    if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int)):
        raise TypeError(f"GradientNoise: memory must be an int of bytes or None, got {memory!r}")
    if memory is not None and memory < 1:
        raise ValueError(f"GradientNoise: memory must be positive, got {memory}")


def check_allocation(sharing: object, allocation: object, target: object) -> None:
    """Refuse what gives no number of draws."""
    if allocation not in ALLOCATIONS:
        raise ValueError(f"GradientNoise: allocation must be one of {ALLOCATIONS}, got {allocation!r}")
    if allocation != "uniform" and sharing == "batch":
        raise ValueError(f"GradientNoise: allocation must be 'uniform' under sharing='batch', got {allocation!r}")
    if target is None:
        return
    if isinstance(target, bool) or not isinstance(target, (int, float)):
        raise TypeError(f"GradientNoise: target must be a float or None, got {target!r}")
    if not 0.0 < target < 1.0:
        raise ValueError(f"GradientNoise: target must lie in (0, 1), got {target}")
