"""Ritz pairs: which are wanted, and how many to keep at a restart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dropscope.spectral.eigenpairs import Which


@dataclass(frozen=True)
class Ritz:
    """Ritz pairs of a Krylov basis, wanted ones first; residuals in two parts, see :meth:`Krylov.residuals`."""

    theta: Tensor
    S: Tensor
    estimates: Tensor
    errors: Tensor
    scale: float


def order(theta: Tensor, which: Which) -> Tensor:
    """Indices of rising ``theta``, wanted first; every prefix is the wanted set of its size."""
    n = len(theta)
    if which == "LM":
        return torch.argsort(theta.abs(), descending=True, stable=True)
    rising = torch.arange(n)
    if which == "SA":
        return rising
    if which == "LA":
        return rising.flip(0)
    return torch.stack((rising.flip(0), rising), 1).reshape(-1)[:n]


def keep(ritz: Ritz, k: int, limit: float) -> int:
    """Ritz vectors to keep at a restart: more as pairs converge, so that they take no room from the others.

    ARPACK's rule and a tenth; on slowly converging ends it needs half the products of rules that maximise the gap
    to the discarded Ritz values, elsewhere the same.
    """
    room = len(ritz.theta) - k
    return k + min(int((ritz.estimates[:k] <= limit).sum()) + room // 10, room // 2)


def guards(theta: Tensor, k: int, slack: float, most: int) -> int:
    """Ritz values beyond the k-th, in the order of :func:`order`, that an error of ``slack`` could put before it.

    Args:
        theta: Ritz values, wanted first.
        k: number of wanted ones.
        slack: by how much a value may be off.
        most: largest count that is returned.
    """
    near = (theta[k:, None].abs() - theta[:k].abs()).abs().min(1).values <= 2.0 * slack
    run = int(near.long().cumprod(0).sum())
    return min(run, most)
