"""The inverse variance–flatness relation: directions of large noise are directions in which the loss is steep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dropscope.analyses.flatness import IntervalFlatness, interval_flatness
from dropscope.analyses.noise_source import Noise, check_pairs, embed, noise_source
from dropscope.analyses.power_law import PowerLaw, fit_power_law
from dropscope.analyses.saving import Result
from dropscope.estimate import Estimate, EstimateStatus
from dropscope.problem import Problem

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dropscope.spectral import Eigenpairs


@dataclass(frozen=True)
class VarianceFlatness(Result):
    """Variance of the noise along its own principal directions against the interval flatness there.

    Attributes:
        eigenvalues: λ_i(Σ), float64 (k,), largest first.
        variances: the variance along each eigenvector with its error, when masks were sampled; else the eigenvalue.
        flatness: interval flatness along each eigenvector.
        law: λ_i ~ F_i^s over the directions with a finite flatness; s < 0 is the inverse relation.
    """

    eigenvalues: Tensor
    variances: tuple[Estimate, ...]
    flatness: IntervalFlatness
    law: PowerLaw

    @property
    def status(self) -> EstimateStatus:
        """``"ok"``, or the worst status among the variances."""
        order: tuple[EstimateStatus, ...] = ("ok", "heavy_tailed", "no_error")
        return max((v.status for v in self.variances), key=order.index, default="ok")

    def table(self) -> list[dict[str, Any]]:
        """One row per direction: variance with its error and status, flatness and its two sides."""
        f = self.flatness
        rows = zip(self.variances, f.flatness.tolist(), f.left.tolist(), f.right.tolist(), strict=True)
        return [
            {
                "index": i + 1,
                "variance": variance.value,
                "stderr": variance.stderr,
                "status": variance.status,
                "flatness": flatness,
                "left": left,
                "right": right,
            }
            for i, (variance, flatness, left, right) in enumerate(rows)
        ]

    def plot(self) -> Figure:
        """Return a figure: variance against interval flatness, log–log, with the fitted law."""
        from dropscope import plots

        return plots.variance_flatness(self)

    def __repr__(self) -> str:
        status = "" if self.status == "ok" else f", {self.status}"
        return (
            f"VarianceFlatness(Var ~ F^({self.law.slope.value:.2f} ± {self.law.slope.stderr:.2f}), "
            f"r {self.law.r:.2f}, Spearman {self.law.spearman:.2f}, {self.law.points} directions{status})"
        )


def variance_flatness(
    problem: Problem,
    noise: Noise,
    k: int = 20,
    factor: float = 2.0,
    *,
    skip: int = 0,
    top: Eigenpairs | None = None,
    tol: float = 1e-3,
    seed: int = 0,
    progress: bool = False,
) -> VarianceFlatness:
    """Leading eigenvectors of the noise, and how far the loss lets one walk along each.

    The protocol for random gradient data of arXiv:2111.01022 and arXiv:2305.15850 (§5.2): v_i the principal directions
    of the dropout noise at fixed parameters, λ_i its variance there, F_i the interval flatness of the risk along v_i.
    They report λ_i falling as a power of F_i; isotropic noise must not. The variance of a sampled covariance along its
    own eigenvectors is biased upwards, the more so the further down the spectrum.

    Args:
        problem: the risk that is walked on, dropout off.
        noise: a ``GradientNoise`` (then its dropout part), ``NoiseData``, or any covariance operator; of all parameters
            of the problem or of some blocks of them, along which the others then stay as they are.
        k: number of directions.
        factor: how many times the risk grows at the ends of the interval: 2, or e as in Feng and Tu.
        skip: leading directions left out, such as the first principal component of a trajectory that drifts.
        top: eigenpairs of the noise computed before, instead of computing them here.
        tol: relative tolerance of the eigenpairs.
        seed: seed of the eigensolver.
        progress: show bars.

    Returns:
        The relation, with ``.plot()``, ``.save()`` and ``.table()``.

    Raises:
        TypeError: if problem is not a Problem, or noise is neither of the two.
        ValueError: if sizes or dtypes differ, k is not in [1, dim], or factor is not above 1.
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"variance_flatness: problem must be a Problem, got {type(problem).__name__}")
    source = noise_source(noise, "variance_flatness")
    operator = source.operator
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= operator.dim:
        raise ValueError(f"variance_flatness: k must be an int in [1, {operator.dim}], got {k!r}")
    if isinstance(skip, bool) or not isinstance(skip, int) or not 0 <= skip <= operator.dim - k:
        raise ValueError(f"variance_flatness: skip must be an int in [0, {operator.dim - k}], got {skip!r}")
    embed(torch.zeros(operator.dim, 0, dtype=operator.dtype), operator, problem, "variance_flatness")
    if top is None:
        top = source.leading(k + skip, tol, seed, progress)
    check_pairs(top, operator.dim, k + skip, "variance_flatness")
    values = torch.as_tensor(top.values).double().cpu()
    order = values.argsort(descending=True)[skip : k + skip]
    V = top.vectors[:, order.to(top.vectors.device)]
    variances = tuple(source.along(V))
    flatness = interval_flatness(problem, embed(V, operator, problem, "variance_flatness"), factor, progress=progress)
    law = fit_power_law(flatness.flatness.numpy(), [v.value for v in variances], [v.stderr for v in variances])
    return VarianceFlatness(values[order], variances, flatness, law)
