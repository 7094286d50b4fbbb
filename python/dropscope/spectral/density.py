"""Spectral density by stochastic Lanczos quadrature (Ubaru, Chen and Saad 2017), with a band over probes."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from dropscope import _files
from dropscope.estimate import Estimate
from dropscope.memory import free_bytes
from dropscope.operators.base import SymmetricOperator
from dropscope.spectral.checks import check_count, check_operator, check_seed
from dropscope.spectral.krylov import Krylov

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class SpectralDensity:
    """Gauss quadratures of the eigenvalue density, one per probe.

    For probe v of unit length, Σᵢ wᵢ f(θᵢ) = vᵀ f(A) v exactly for polynomials of degree ≤ 2·steps − 1, and its mean
    over probes is tr f(A) / dim.

    Attributes:
        nodes: Ritz values θ, float64 (probes, steps), rising in each row.
        weights: their weights, float64 (probes, steps), each row sums to 1. Where the Krylov space closed early, the
            last node is repeated with weight 0.
        dim: dimension of the operator.
        matvecs: products made.
    """

    nodes: Tensor
    weights: Tensor
    dim: int
    matvecs: int

    def moment(self, order: int) -> Estimate:
        """Mean of λ^order over all eigenvalues, with its error over probes.

        Args:
            order: power of the eigenvalue, at least 1.

        Returns:
            The estimate of tr(A^order) / dim; without an error for a single probe.

        Raises:
            ValueError: if order < 1.
        """
        if not isinstance(order, int) or order < 1:
            raise ValueError(f"moment: order must be a positive int, got {order!r}")
        return mean_estimate((self.weights * self.nodes**order).sum(1))

    def curve(
        self, grid: Tensor | None = None, sigma: float | None = None, level: float = 0.95, log: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The density smoothed by a Gaussian, and its confidence band.

        Args:
            grid: eigenvalues at which to evaluate; default 1000 points over the spectrum.
            sigma: width of the Gaussian; default (largest − smallest node) / steps, below which single nodes show.
            level: probability that the band covers the smoothed density at a point, over the draw of probes
                (Student's t with probes − 1 degrees of freedom).
            log: make the band symmetric in the logarithm, so that it stays positive; for logarithmic axes.

        Returns:
            grid, mean, low and high, float64 (points,); low and high are NaN for a single probe.

        Raises:
            ValueError: if sigma ≤ 0 or level is not in (0, 1).
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"curve: level must lie in (0, 1), got {level!r}")
        low, high = float(self.nodes.min()), float(self.nodes.max())
        if sigma is None:
            sigma = (high - low) / self.nodes.shape[1] or max(abs(high), 1.0) / 1000
        if not sigma > 0.0:
            raise ValueError(f"curve: sigma must be positive, got {sigma!r}")
        if grid is None:
            grid = torch.linspace(low - 4 * sigma, high + 4 * sigma, 1000, dtype=torch.float64)
        grid = grid.double().cpu()
        densities = torch.stack([_smooth(grid, *pair, sigma) for pair in zip(self.nodes, self.weights, strict=True)])
        mean, count = densities.mean(0), len(densities)
        if count < 2:
            nothing = torch.full_like(mean, math.nan)
            return grid, mean, nothing, nothing.clone()
        reach = float(stats.t.isf((1 - level) / 2, count - 1)) * densities.std(0) / math.sqrt(count)
        if log:
            factor = torch.exp(reach / mean.clamp(min=torch.finfo(torch.float64).tiny))
            return grid, mean, mean / factor, mean * factor
        return grid, mean, (mean - reach).clamp(min=0), mean + reach

    def __repr__(self) -> str:
        probes, steps = self.nodes.shape
        low, high = float(self.nodes.min()), float(self.nodes.max())
        return (
            f"SpectralDensity({probes} probes, {steps} steps, dim={self.dim}, {self.matvecs} products)\n"
            f"  nodes   {low:.6g} to {high:.6g}\n"
            f"  mean    {self.moment(1)!r}\n"
            f"  square  {self.moment(2)!r}"
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write nodes and weights as safetensors; :meth:`load` reads them back.

        Args:
            path: where to write.

        Returns:
            The path.
        """
        rest = {"kind": "spectral density", "dim": self.dim, "matvecs": self.matvecs}
        return _files.write_arrays(path, {"nodes": self.nodes, "weights": self.weights}, rest)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SpectralDensity:
        """Read what :meth:`save` wrote.

        Args:
            path: the file.

        Returns:
            The density.

        Raises:
            ValueError: if the file holds something else.
        """
        arrays, rest = _files.read_arrays(path)
        if rest.pop("kind", None) != "spectral density":
            raise ValueError(f"SpectralDensity.load: path must be a file that save wrote, got {os.fspath(path)!r}")
        fields: dict[str, Any] = {**arrays, **rest}
        return cls(**fields)

    def plot(self, **arguments: Any) -> Figure:
        """Draw the density with its band; arguments as in :meth:`curve`."""
        from dropscope import plots

        return plots.spectral_density(self, **arguments)


def spectral_density(
    A: SymmetricOperator, probes: int = 8, steps: int = 100, seed: int = 0, progress: bool = False
) -> SpectralDensity:
    """Density of all eigenvalues of A: one Lanczos run of ``steps`` products from each of ``probes`` random vectors.

    The basis stays orthogonal (no ghosts: an isolated eigenvalue is one node) and its coefficients are float64. Where
    the operator gains by taking vectors together (``A.block``), that many runs go in lockstep. Memory: steps + 1
    vectors for each of them. A run whose Krylov space closes has fewer nodes, and is then exact for its probe.

    Args:
        A: the operator, float32 or float64.
        probes: random vectors (Rademacher); the width of the band falls as 1/√probes.
        steps: products for each; taken down to dim.
        seed: seed of the probes.
        progress: show a bar with the mean eigenvalue and its error.

    Returns:
        Nodes and weights; see :class:`SpectralDensity`.

    Raises:
        TypeError: if A is not a SymmetricOperator of a supported dtype.
        ValueError: if an argument is out of range, a product is not finite, or A is not symmetric.

    Example:
        >>> A = SymmetricOperator.from_callable(lambda v: 3 * v, dim=50)
        >>> round(spectral_density(A, probes=2, steps=10).moment(1).value, 5)
        3.0
    """
    check_operator("spectral_density", A)
    check_count("spectral_density", "probes", probes, 1)
    check_count("spectral_density", "steps", steps, 1)
    check_seed("spectral_density", seed)
    steps = min(steps, A.dim)
    width = _lockstep(A, probes, steps)
    runs = [
        Krylov(A, steps, seed=seed, full=A.dtype == torch.float64, function="spectral_density") for _ in range(width)
    ]
    nodes, weights = torch.zeros(2, probes, steps, dtype=torch.float64)
    with tqdm(total=probes * steps, unit="product", desc="spectral density", disable=not progress) as bar:
        for first in range(0, probes, width):
            together = runs[: probes - first]
            for p, krylov in enumerate(together, first):
                krylov.start(p, "rademacher")
            while active := [krylov for krylov in together if krylov.size < steps and not krylov.broke]:
                if len(active) == 1:
                    active[0].advance()
                else:
                    images = active[0].product(torch.stack([krylov.basis[krylov.size] for krylov in active], 1))
                    for krylov, image in zip(active, images.unbind(1), strict=True):
                        krylov.extend(image)
                bar.update(len(active))
            for p, krylov in enumerate(together, first):
                size = krylov.size
                theta, S = torch.linalg.eigh(krylov.T[:size, :size])
                nodes[p, :size], nodes[p, size:], weights[p, :size] = theta, theta[-1], S[0].square()
                bar.update(steps - size)
            bar.set_postfix_str(repr(mean_estimate((weights * nodes).sum(1)[: first + len(together)])))
    matvecs = sum(krylov.steps for krylov in runs)
    return SpectralDensity(nodes, weights, A.dim, matvecs)


def _lockstep(A: SymmetricOperator, probes: int, steps: int) -> int:
    """Probes that go through the operator together: as many as it gains by, while their bases fit in free memory."""
    if probes == 1 or steps == 1 or (width := min(probes, A.block)) == 1:
        return 1
    basis = (steps + 1) * A.dim * torch.finfo(A.dtype).bits // 8
    return max(1, min(width, int(free_bytes(A.device) // 4 // basis)))


def mean_estimate(values: Tensor) -> Estimate:
    """The mean of independent values with its standard error; no error for a single one."""
    count = len(values)
    if count < 2:
        return Estimate(float(values.mean()), math.nan, status="no_error")
    return Estimate(float(values.mean()), float(values.std()) / math.sqrt(count), dof=count - 1)


def _smooth(grid: Tensor, nodes: Tensor, weights: Tensor, sigma: float) -> Tensor:
    """Σᵢ wᵢ N(x; θᵢ, σ²) on the grid."""
    bumps = torch.exp(-0.5 * ((grid[:, None] - nodes) / sigma).square())
    return bumps @ weights / (sigma * math.sqrt(2 * math.pi))
