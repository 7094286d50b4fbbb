"""Rows of random gradient data or random trajectory data, and their principal components."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from dropscope import _files
from dropscope.estimate import Estimate
from dropscope.operators import noise_statistics as statistics
from dropscope.operators.base import SymmetricOperator
from dropscope.spectral import Eigenpairs, EigenStatus, eigsh

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Kind = Literal["gradient", "trajectory"]
NoiseName = Literal["dropout", "minibatch", "gradient", "weights", "none"]
WindowStatus = Literal["ok", "window_too_long", "window_unknown"]
Detrend = Literal["linear", "mean"]

REMEDIES: dict[str, str] = {
    "ok": "the rows are independent, or the window is short against the relaxation along the sharpest direction",
    "window_too_long": "rate · count · λ_max(H) exceeds the limit (4 by default): relaxation and drift then dominate "
    "the covariance and can turn the relation round; take a smaller rate or fewer steps",
    "window_unknown": "λ_max(H) or the learning rate was not given, so that the window cannot be judged",
}
GRAM_ROWS = 1500  # up to so many rows, the Gram matrix is decomposed whole


@dataclass(frozen=True)
class NoiseData:
    """N rows of D parameters: gradients under N draws of the noise, or a trajectory under it, less mean or trend.

    Accepted wherever a noise is: ``hessian_variance(H, data)``, ``variance_flatness(problem, data)``.

    Attributes:
        rows: centred rows, (N, D), run after run; Σ̂ = rowsᵀ rows / freedom.
        kind: ``"gradient"`` for independent rows, ``"trajectory"`` for successive ones.
        noise: ``"dropout"``, ``"minibatch"``, isotropic ``"gradient"`` or ``"weights"`` noise, or ``"none"``.
        blocks: parameter name -> slice of a row.
        runs: independent trajectories from the same start; 1 for gradients.
        detrend: what was taken from every run: its ``"mean"`` or its ``"linear"`` trend.
        rate: learning rate of a trajectory.
        sharpness: λ_max of the Hessian of all parameters that moved, at the start.
        limit: of ``window``.
        drift: share of a trajectory's variance that was linear trend.
    """

    rows: Tensor
    kind: Kind
    noise: str
    blocks: Mapping[str, slice]
    runs: int = 1
    detrend: Detrend = "mean"
    rate: float = math.nan
    sharpness: float = math.nan
    limit: float = 4.0
    drift: float = 0.0

    @property
    def count(self) -> int:
        """Rows of a run."""
        return len(self.rows) // self.runs

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the covariance: rows less what was fitted to each run."""
        return self.runs * (self.count - (2 if self.detrend == "linear" else 1))

    @property
    def window(self) -> float:
        """Rate · count · λ_max(H), the length of a run in relaxation times of the sharpest direction; else NaN."""
        return math.nan if self.kind == "gradient" else self.rate * self.count * self.sharpness

    @property
    def status(self) -> WindowStatus:
        """``"ok"``, or what is wrong with the window of a trajectory."""
        if self.kind == "gradient":
            return "ok"
        if not math.isfinite(self.window):
            return "window_unknown"
        return "ok" if self.window <= self.limit else "window_too_long"

    @property
    def remedy(self) -> str:
        """What the status means and what to do about it."""
        return REMEDIES[self.status]

    @cached_property
    def covariance(self) -> SymmetricOperator:
        """Σ̂ as an operator on the D parameters: two passes over the rows a product, never formed."""
        return DataCovariance(self)

    def variance_along(self, V: Tensor) -> list[Estimate]:
        """Projected variance: the variance of ⟨v, row⟩ for each column v of V, (D, K), scaled to length one.

        Errors: of independent rows, from their fourth moment, as χ²; of trajectories, whose rows depend on each other,
        from the spread between runs (Student's t, runs - 1 degrees of freedom).

        Raises:
            TypeError: if V has another dtype than the rows.
            ValueError: if its shape does not fit, or a column is zero or not finite.
        """
        columns = V.unsqueeze(1) if V.ndim == 1 else V
        if V.dtype != self.rows.dtype:
            raise TypeError(f"variance_along: V must have dtype {self.rows.dtype}, got {V.dtype}")
        if columns.ndim != 2 or columns.shape[0] != self.rows.shape[1]:
            raise ValueError(f"variance_along: V must have {self.rows.shape[1]} rows, got shape {tuple(V.shape)}")
        norms = columns.double().norm(dim=0)
        if not bool((torch.isfinite(norms) & (norms > 0)).all()):
            raise ValueError(f"variance_along: columns of V must be finite and not zero, got norms {norms.tolist()}")
        P = (self.rows @ (columns / norms.to(columns.dtype))).double()
        if self.kind == "gradient":
            return statistics.direction_estimates([P.unsqueeze(0)], 1.0)
        each = P.view(self.runs, self.count, -1).square().sum(1) * (self.runs / self.freedom)
        return [_between_runs(column) for column in each.unbind(1)]

    @cached_property
    def trace(self) -> Estimate:
        """Tr Σ̂ with its error, as of :meth:`variance_along`."""
        if self.kind == "gradient":
            m = self.moments
            return statistics.scale_estimate(m.trace, m.variance, m.gaussian)
        each = self.rows.double().square().sum(1).view(self.runs, -1).sum(1) * (self.runs / self.freedom)
        return _between_runs(each)

    @cached_property
    def moments(self) -> statistics.TraceMoments:
        """Unbiased moments of independent rows."""
        return statistics.trace_moments((self.rows @ self.rows.T).double().unsqueeze(0))

    def eigsh(self, k: int = 20, tol: float = 1e-4, seed: int = 0, *, progress: bool = False) -> Eigenpairs:
        """Principal components: the k leading eigenpairs of Σ̂, without forming it.

        Up to 1500 rows, or where many components are asked for, from the N × N Gram matrix; else by Lanczos.

        Args:
            k: number of pairs.
            tol: relative tolerance of the residuals.
            seed: seed of the start vector.
            progress: show a bar.

        Raises:
            ValueError: if k is not in 1..min(N - fitted, D).
        """
        N, D = self.rows.shape
        rank = min(self.freedom, D)
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= rank:
            raise ValueError(f"NoiseData.eigsh: k must be an int in 1..{rank}, got {k!r}")
        if N > GRAM_ROWS and 10 * k < min(N, D):
            return eigsh(self.covariance, k, "LA", tol, seed=seed, progress=progress)
        values, U = torch.linalg.eigh((self.rows @ self.rows.T).double() / self.freedom)
        values, U = values.flip(0)[:k].clamp_min(0.0), U.flip(1)[:, :k]
        vectors = torch.linalg.qr(self.rows.T.double() @ U)[0]
        vectors = vectors * torch.sign((vectors * (self.rows.T.double() @ U)).sum(0))
        V = vectors.to(self.rows.dtype)
        scale = float(values[0])
        residuals = ((self.covariance @ V).double() - V.double() * values).norm(dim=0).cpu()
        converged = residuals <= tol * max(scale, 1e-300)
        return Eigenpairs(
            values=values.cpu(),
            vectors=V,
            residuals=residuals,
            converged=converged,
            status=EigenStatus.CONVERGED if bool(converged.all()) else EigenStatus.ROUNDING,
            matvecs=1,
            scale=scale,
            tol=tol,
            which="LA",
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write safetensors with the rows, or JSON without them.

        Raises:
            ValueError: if the ending is another one.
        """
        content: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rows"}
        content["blocks"] = {name: [part.start, part.stop] for name, part in self.blocks.items()}
        content |= {"type": "NoiseData", "window": self.window, "status": self.status, "shape": list(self.rows.shape)}
        if Path(path).suffix == ".safetensors":
            return _files.write_arrays(path, {"rows": self.rows}, content)
        if Path(path).suffix == ".json":
            return _files.write_json(path, content | {"trace": self.trace})
        raise ValueError(f"save: path must end in .json or .safetensors, got {str(path)!r}")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> NoiseData:
        """Read what :meth:`save` wrote as safetensors."""
        arrays, rest = _files.read_arrays(path)
        names = {f.name for f in fields(NoiseData)} - {"rows", "blocks"}
        values: dict[str, Any] = {name: math.nan if rest[name] is None else rest[name] for name in names}
        blocks = {name: slice(start, stop) for name, (start, stop) in rest["blocks"].items()}
        return NoiseData(rows=arrays["rows"], blocks=blocks, **values)

    def plot(self) -> Figure:
        """Return a figure: the leading principal components' variances."""
        from dropscope import plots

        k = min(50, self.freedom, self.rows.shape[1])
        return plots.noise_eigenvalues(self.variance_along(self.eigsh(k, 1e-3).vectors))

    def __repr__(self) -> str:
        N, D = self.rows.shape
        window = f", window {self.window:.3g}" if self.kind == "trajectory" else ""
        status = "" if self.status == "ok" else f", {self.status}"
        return f"NoiseData({self.kind}, {self.noise} noise, {N} rows of {D}, {self.runs} run(s){window}{status})"


class DataCovariance(SymmetricOperator):
    """Rowsᵀ rows / freedom."""

    def __init__(self, data: NoiseData) -> None:
        self.data = data
        self.dim, self.dtype, self.device = data.rows.shape[1], data.rows.dtype, data.rows.device
        self.blocks = data.blocks

    def _matmat(self, V: Tensor) -> Tensor:
        out: Tensor = self.data.rows.T @ (self.data.rows @ V) / self.data.freedom
        return out


def noise_data(
    rows: Tensor,
    kind: Kind = "gradient",
    *,
    noise: str = "given",
    blocks: Mapping[str, slice] | None = None,
    runs: int = 1,
    detrend: Detrend | None = None,
    rate: float = math.nan,
    sharpness: float = math.nan,
    limit: float = 4.0,
) -> NoiseData:
    """Make :class:`NoiseData` of rows that a user's own loop has stored; they are centred in place.

    Args:
        rows: (N, D): gradients at fixed parameters, or parameters after successive steps, run after run.
        kind: which of the two.
        noise: what made them, as a name.
        blocks: parameter name -> slice of a row, for relations to a whole network.
        runs: number of independent trajectories; their length is N / runs.
        detrend: what is taken from each run, by default the mean of gradients and the linear trend of trajectories.
        rate: learning rate, for the window of a trajectory.
        sharpness: λ_max(H), for the window.
        limit: of rate · count · λ_max(H).

    Raises:
        TypeError: if rows is not a floating-point tensor.
        ValueError: if it is not (N, D) with enough finite rows in equal runs.

    Example:
        >>> noise_data(torch.randn(100, 7, generator=torch.Generator().manual_seed(0)))
        NoiseData(gradient, given noise, 100 rows of 7, 1 run(s))
    """
    if not isinstance(rows, Tensor) or not rows.is_floating_point():
        raise TypeError(f"noise_data: rows must be a floating-point tensor, got {type(rows).__name__}")
    if kind not in ("gradient", "trajectory"):
        raise ValueError(f"noise_data: kind must be 'gradient' or 'trajectory', got {kind!r}")
    detrend = detrend or ("linear" if kind == "trajectory" else "mean")
    if detrend not in ("linear", "mean"):
        raise ValueError(f"noise_data: detrend must be 'linear' or 'mean', got {detrend!r}")
    if rows.ndim != 2 or runs < 1 or len(rows) % runs or len(rows) // runs < 4:
        raise ValueError(f"noise_data: rows must be (N, D), 4 or more in each of {runs} runs, got {tuple(rows.shape)}")
    if kind == "gradient" and runs != 1:
        raise ValueError(f"noise_data: runs must be 1 for gradients, whose rows are independent, got {runs}")
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("noise_data: rows must be finite, got NaN or Inf")
    share = _centre(rows, runs, detrend)
    return NoiseData(
        rows, kind, noise, dict(blocks or {}), runs, detrend, float(rate), float(sharpness), float(limit), share
    )


def _centre(rows: Tensor, runs: int, detrend: Detrend) -> float:
    """Take mean or line from every run in place; the share of the variance that was line."""
    count, before, line = len(rows) // runs, 0.0, 0.0
    time = torch.arange(count, dtype=torch.float64, device=rows.device)
    time = ((time - time.mean()) / (time - time.mean()).norm()).to(rows.dtype)
    for run in rows.view(runs, count, -1):
        run -= run[:1].clone()  # equal rows give exact zeros
        run -= run.mean(0)
        before += float(run.double().square().sum())
        slope = time @ run
        line += float(slope.double().square().sum())
        if detrend == "linear":
            run -= torch.outer(time, slope)
    return line / before if before > 0.0 else 0.0


def _between_runs(each: Tensor) -> Estimate:
    """The mean over runs with the error of their spread."""
    runs, value = len(each), float(each.mean())
    if runs < 2:
        return Estimate(value, math.nan, math.nan, "no_error")
    return Estimate(value, float(each.std()) / math.sqrt(runs), float(runs - 1))
