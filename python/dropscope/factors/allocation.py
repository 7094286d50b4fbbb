"""How many draws each sample gets, decided before any mask is drawn.

The variance of the estimated covariance is about Σ_i c_i σ_i⁴/M_i, least for a given number of rows where M_i grows as
σ_i² c_i^½. The noise σ_i² of a sample is not known, and a pilot's estimate of it is worse than none: it misses rare
masks, and then the sample gets few draws because it seemed quiet. The gradient with dropout off is known exactly and
grows with the noise, slower than σ_i²: M_i - 2 ∝ ‖g_i‖^½ spends the rows on loud samples without starving those that
only seem quiet. What does not depend on the draws leaves every estimate unbiased.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dropscope import kernels
from dropscope.factors.capture import part_of, record
from dropscope.factors.fallback import dense_rows, group_size
from dropscope.factors.plan import Plan
from dropscope.factors.uses import Factors
from dropscope.problem import Problem

Allocation = Literal["uniform", "gradient"]
ALLOCATIONS: tuple[Allocation, ...] = ("uniform", "gradient")
# The fewest draws that have a variance.
FEWEST = 2


def gradient_norms(problem: Problem, plan: Plan) -> Tensor:
    """‖g_i‖ with dropout off, float64 (n,) on the CPU, in one pass over the data.

    Parameters that are matrix-free are left out, unless there are no others: their norms would take a pass a sample.

    Args:
        problem: the problem.
        plan: the routes of its parameters.

    Raises:
        ValueError: if a gradient is not finite.
    """
    captured = plan.names("factors", "rows")
    alone = plan.names("dense") or ([] if captured else plan.names("matrix_free"))
    squares = []
    for batch in problem.batches():
        total = torch.zeros(batch.size, dtype=torch.float64, device=problem.device)
        if captured:
            ids = {id(problem.params[name]): name for name in captured}
            uses, gradients = record(problem, batch, ids, None, 1)
            for name in captured:
                part = part_of(name, uses, gradients, batch.size, 1, plan.routes[name].layout)
                total += kernels.sq_norms(*part) if isinstance(part, Factors) else part.double().square().sum(1)
        if alone and plan.grouped and plan.names("dense"):
            group = group_size(problem, alone, batch.size)
            for rows in dense_rows(problem, batch, alone, None, 1, group):
                total += rows.double().square().sum(1)
        elif alone:
            for i in range(batch.size):  # one at a time: a matrix-free parameter has room for one gradient only
                one = dense_rows(problem, batch.select(slice(i, i + 1)), alone, None, 1)
                total[i] += sum(float(row.double().square().sum()) for row in one)
        squares.append(total.cpu())
    return torch.cat(squares).sqrt()


def allocate(norms: Tensor, draws: int) -> Tensor:
    """M_i = 2 + extra_i, extra_i ∝ ‖g_i‖^½, so that their mean is at most ``draws`` and close to it.

    Args:
        norms: ‖g_i‖, float64 (n,).
        draws: mean number of draws, at least 2.

    Returns:
        int64 (n,). The extra draws take few values, 0 to 4 and then two an octave, so that samples of equal numbers
        can be handled together; this costs the estimate next to nothing.
    """
    budget = len(norms) * (draws - FEWEST)
    shape = norms.sqrt()
    if budget == 0 or not bool((shape > 0).any()):
        return torch.full((len(norms),), draws, dtype=torch.int64)
    levels = [0, 1, 2, 3]
    while levels[-1] < budget:
        octave = 4 << (len(levels) - 4) // 2
        levels.append(octave if len(levels) % 2 == 0 else octave * 3 // 2)
    values = torch.tensor(levels, dtype=torch.float64)
    between = (values[1:] + values[:-1]) / 2
    low, high = 0.0, budget / float(shape.max()) * 4.0

    def extra(scale: float) -> Tensor:
        return values[torch.bucketize(scale * shape, between)]

    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float(extra(middle).sum()) <= budget else (low, middle)
    return FEWEST + extra(low).long()
