"""What GradientNoise accepts: each refusal names the argument, the rule and the value seen."""

from __future__ import annotations

import torch
from torch import Tensor

from dropscope.factors import ALLOCATIONS, CACHES
from dropscope.factors.centred_gram import PRECISIONS
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


def check_pairs(k: object, dim: int, tol: float, precision: object, verify: object) -> None:
    """Refuse what asks for no eigenpairs."""
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= dim:
        raise ValueError(f"GradientNoise.eigsh: k must be an int in 1..{dim}, got {k!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"GradientNoise.eigsh: precision must be 'full', 'bf16' or 'int8', got {precision!r}")
    if not 0.0 < tol < 1.0:
        raise ValueError(f"GradientNoise.eigsh: tol must lie in (0, 1), got {tol!r}")
    if verify not in ("each", "together"):
        raise ValueError(f"GradientNoise.eigsh: verify must be 'each' or 'together', got {verify!r}")


def unit_columns(V: object, dim: int, dtype: torch.dtype) -> Tensor:
    """Directions as columns of unit length, (dim, K); what makes none is refused."""
    if not isinstance(V, Tensor):
        raise TypeError(f"variance_along: V must be a torch.Tensor, got {type(V).__name__}")
    if V.dtype != dtype:
        raise TypeError(f"variance_along: V must have dtype {dtype}, got {V.dtype}")
    columns = V.unsqueeze(1) if V.ndim == 1 else V
    if columns.ndim != 2 or columns.shape[0] != dim:
        raise ValueError(f"variance_along: V must have {dim} rows, got shape {tuple(V.shape)}")
    norms = columns.double().norm(dim=0)
    if not bool((torch.isfinite(norms) & (norms > 0)).all()):
        raise ValueError(f"variance_along: columns of V must be finite and not zero, got norms {norms.tolist()}")
    units: Tensor = columns / norms.to(columns.dtype)
    return units
