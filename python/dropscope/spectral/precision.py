"""Whether low-precision products pay: their error and time, measured, against what the rest will cost."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dropscope.operators.base import SymmetricOperator

Precision = Literal["full", "mixed", "auto"]

# A random combination with normal coefficients shows its largest term; it is below 1/5 of it in one case of six at the
# very worst, when all errors are parallel.
CONFIRM = 5.0
CHECKS = 2  # combinations that confirm what came from low-precision products: both miss in one case of forty
WORST = 0.3  # relative error from which a product tells nothing
# One round of Davidson steps, each pair's residual added to the space, takes residuals down by about this much.
ROUND = 5.0
MARGIN = 1.2  # the predicted gain that is asked for


@dataclass(frozen=True)
class Trial:
    """What one vector showed of low-precision products.

    Attributes:
        error: ‖(A − B) q‖ / ‖A q‖, B the low-precision operator.
        ratio: time of B q over that of A q.
        products: low-precision products that the trial made.
        failure: why B cannot be used, else empty.
    """

    error: float
    ratio: float
    products: int
    failure: str = ""


def measure(low: SymmetricOperator, q: Tensor, image: Tensor, seconds: float, *, warm: bool) -> Trial:
    """Try low-precision products on a vector whose product is known.

    Args:
        low: the low-precision operator.
        q: a unit vector.
        image: A q.
        seconds: the time that A q took.
        warm: make a second product, so that the time is one without first-use costs.

    Returns:
        The trial; a product that raises or is far off is a failure, not an error.
    """
    products, spent = 0, math.inf
    try:
        for _ in range(2 if warm else 1):
            products += 1
            start = time.perf_counter()
            found = low @ q
            spent = min(spent, time.perf_counter() - start)
            norm = float(torch.linalg.vector_norm(image, dtype=torch.float64))
            error = float(torch.linalg.vector_norm(found - image, dtype=torch.float64)) / (norm or 1.0)
            if error > WORST:
                return Trial(error, math.inf, products, f"low-precision products are off by {error:.0%}")
    except ValueError as reason:
        return Trial(math.inf, math.inf, products, f"a low-precision product failed: {reason}")
    return Trial(error, spent / max(seconds, 1e-9), products)


def confirmable(error: float, tol: float, k: int) -> bool:
    """Whether the sum of k pairs' errors is small enough that a few random combinations will confirm all."""
    return CONFIRM * 1.5 * error * math.sqrt(k) <= 0.4 * tol


def full_products(error: float, tol: float, k: int) -> int:
    """Full-precision products that are expected after the Lanczos phase."""
    if confirmable(error, tol, k):
        return CHECKS
    rounds = max(0, math.ceil(math.log(1.2 * error / tol) / math.log(ROUND)))
    return k * (1 + rounds)


def pays(trial: Trial, tol: float, k: int, steps: int) -> bool:
    """Whether mixed precision is predicted to gain.

    With n Lanczos steps, full precision takes n products, mixed precision n · ratio + :func:`full_products`; the gain
    grows with n, so the smallest n, the basis once full, stands for all.

    Args:
        trial: the measured error and time.
        tol: tolerance of the eigenpairs.
        k: number of pairs.
        steps: the fewest Lanczos steps of a run.
    """
    if trial.failure:
        return False
    return steps > MARGIN * (steps * trial.ratio + full_products(trial.error, tol, k))
