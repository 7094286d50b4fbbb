"""Diagonals from random products (Bekas, Kokiopoulou and Saad 2007), with an error per entry."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from dropscope import _files
from dropscope.operators.base import SymmetricOperator
from dropscope.spectral.checks import check_count, check_operator, check_seed
from dropscope.spectral.trace import exact_diagonal, random_blocks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class DiagonalEstimate:
    """The diagonal of an operator, entry by entry.

    Attributes:
        values: float64 (dim,), unbiased.
        stderr: standard errors, float64 (dim,).
        dof: degrees of freedom of the errors: (values − truth) / stderr is taken as Student's t.
        matvecs: products made.
    """

    values: Tensor
    stderr: Tensor
    dof: float
    matvecs: int

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Confidence intervals of the entries, each at ``level``.

        Args:
            level: probability that an interval covers its entry, in (0, 1).

        Returns:
            Lower and upper ends, float64 (dim,).

        Raises:
            ValueError: if level is not in (0, 1).
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"interval: level must lie in (0, 1), got {level!r}")
        reach = float(stats.t.isf((1 - level) / 2, self.dof)) * self.stderr
        return self.values - reach, self.values + reach

    def __repr__(self) -> str:
        low, high = float(self.values.min()), float(self.values.max())
        return (
            f"DiagonalEstimate(dim={len(self.values)}, {self.matvecs} products, values {low:.4g} to {high:.4g}, "
            f"median error {float(self.stderr.median()):.2g})"
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write values and errors as safetensors; :meth:`load` reads them back.

        Args:
            path: where to write.

        Returns:
            The path.
        """
        rest = {"kind": "diagonal", "dof": self.dof, "matvecs": self.matvecs}
        return _files.write_arrays(path, {"values": self.values, "stderr": self.stderr}, rest)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DiagonalEstimate:
        """Read what :meth:`save` wrote.

        Args:
            path: the file.

        Returns:
            The diagonal.

        Raises:
            ValueError: if the file holds something else.
        """
        arrays, rest = _files.read_arrays(path)
        if rest.get("kind") != "diagonal":
            raise ValueError(f"DiagonalEstimate.load: path must be a file that save wrote, got {os.fspath(path)!r}")
        dof = math.inf if rest["dof"] is None else rest["dof"]  # JSON has no infinity
        return cls(arrays["values"], arrays["stderr"], dof, rest["matvecs"])

    def plot(self) -> Figure:
        """Draw the entries in descending order with their 95 % intervals."""
        from dropscope import plots

        return plots.diagonal(self)


def diagonal(A: SymmetricOperator, matvecs: int = 60, seed: int = 0, progress: bool = False) -> DiagonalEstimate:
    """Unbiased estimate of the diagonal of A: the mean of v ∘ A v over Rademacher vectors v.

    The variance of entry i is Σ_{j≠i} A_ij² / matvecs: exact after one product for a diagonal matrix. With
    matvecs ≥ dim the diagonal is computed exactly, from dim products.

    Args:
        A: the operator, float32 or float64.
        matvecs: products allowed, at least 2.
        seed: seed of the random vectors.
        progress: show a bar with the root mean square error of the entries, relative to that of the values.

    Returns:
        The entries with their errors.

    Raises:
        TypeError: if A is not a SymmetricOperator of a supported dtype.
        ValueError: if an argument is out of range or a product is not finite.

    Example:
        >>> A = SymmetricOperator.from_callable(lambda v: v * torch.arange(1.0, 101.0), dim=100)
        >>> diagonal(A, matvecs=2).values[:3]
        tensor([1., 2., 3.], dtype=torch.float64)
    """
    check_operator("diagonal", A)
    check_count("diagonal", "matvecs", matvecs, 2)
    check_seed("diagonal", seed)
    exact = matvecs >= A.dim
    with tqdm(total=A.dim if exact else matvecs, unit="product", desc="diagonal", disable=not progress) as bar:
        if exact:
            values = exact_diagonal(A, bar)
            return DiagonalEstimate(values, torch.zeros_like(values), math.inf, A.dim)
        mean = torch.zeros(A.dim, dtype=torch.float64, device=A.device)
        squares, count = torch.zeros_like(mean), 0
        for V in random_blocks(A, 0, matvecs, seed, "rademacher"):
            for sample in V * (A @ V.T).T:
                count += 1
                gap = sample.double() - mean
                mean += gap / count
                squares += gap * (sample - mean)
            bar.update(len(V))
            error = (squares.sum() / (max(count - 1, 1) * count)).sqrt() / mean.norm()
            bar.set_postfix_str(f"relative error {float(error):.1e}")
    stderr = (squares / ((count - 1) * count)).sqrt()
    return DiagonalEstimate(mean.cpu(), stderr.cpu(), count - 1, count)
