"""The covariance of the gradient noise: what dropout injects, what sampling the data injects, and their sum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dropscope import kernels
from dropscope.estimate import Estimate
from dropscope.factors import CACHES, Cache, Table
from dropscope.factors.eigen import Precision
from dropscope.masks import Sharing
from dropscope.operators import noise_statistics as statistics
from dropscope.operators.base import SymmetricOperator
from dropscope.operators.covariance import CovarianceOperator, work_dtype
from dropscope.problem import Problem

if TYPE_CHECKING:
    from dropscope.operators.noise_spectrum import NoiseEigenpairs


class Split(NamedTuple):
    """Traces of the parts of the gradient noise, by the law of total covariance."""

    dropout: Estimate
    sampling: Estimate
    total: Estimate


@dataclass(frozen=True)
class MiniBatchNoise:
    """Noise of a gradient averaged over ``size`` samples drawn with replacement, each with masks of its own.

    Attributes:
        size: b.
        dropout: W/b.
        sampling: B/b.
        total: (W + B)/b.
    """

    size: int
    dropout: SymmetricOperator
    sampling: SymmetricOperator
    total: SymmetricOperator

    def __repr__(self) -> str:
        return f"MiniBatchNoise(size={self.size}, dim={self.dropout.dim})"


class GradientNoise:
    """Covariance of the gradient of the risk over dropout masks and over samples.

    With g_i(η) the gradient of sample i under its mask η, so that the gradient of the risk is (1/n) Σ g_i:

        W = (1/n) Σ_i Cov_η(g_i),    B = Cov over samples of E_η g_i,

    and ``dropout`` = W/n is the covariance of the full-batch gradient over the masks. From M draws for every sample,
    W/n is estimated without bias by n⁻² Σ_i (M-1)⁻¹ Σ_m (g_im - ḡ_i)(g_im - ḡ_i)ᵀ, and B by the covariance of the ḡ_i
    less W/M (so it need not be positive). Products are exact for the drawn masks: per-sample gradients are kept as
    factors, materialised, or replayed, whichever is smallest for each parameter (``problem.plan()``).

    Args:
        problem: model, loss and data.
        draws: M ≥ 2, masks per sample; errors need 4.
        seed: seed of the masks; the draws are 0..M-1.
        cache: ``"factors"`` keeps the per-sample gradients in memory, ``"bf16"`` rounded to bfloat16 (relative error
            2⁻⁹ each), ``"disk"`` in a temporary folder, ``"recompute"`` makes them again for every product;
            ``"auto"`` is ``"factors"`` if they fit, else ``"recompute"``.
        sharing: ``"sample"`` draws a mask for each sample; ``"batch"`` shares one over all samples: ``dropout`` is then
            the covariance over draws of the full-batch gradient, estimated from M of these, and there is no split.
        memory: bytes that stored gradients may take; by default half of what is free.
        progress: whether to show progress bars.

    Attributes:
        dropout: W/n.
        sampling: B/n.
        total: (W + B)/n, the noise of a gradient over n samples drawn with replacement.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if draws < 2, an option is unknown, ``memory`` is too small, a gradient is not finite, or samples
            share a mask (DropConnect, LayerDrop) under ``sharing="sample"``.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1))
        >>> problem = Problem(model, nn.MSELoss(), (torch.randn(6, 2), torch.zeros(6, 1)))
        >>> with GradientNoise(problem, draws=4) as noise:
        ...     noise.dropout.shape
        (33, 33)
    """

    def __init__(
        self,
        problem: Problem,
        draws: int,
        seed: int = 0,
        *,
        cache: Cache = "auto",
        sharing: Sharing = "sample",
        memory: int | None = None,
        progress: bool = False,
    ) -> None:
        _check(problem, draws, seed, cache, sharing, memory)
        self.problem, self.draws, self.seed, self.sharing, self.progress = problem, draws, seed, sharing, progress
        self.n = problem.n if sharing == "sample" else 1
        self._table: Table | None = Table(problem, draws, seed, cache, sharing, memory, progress)
        self.cache = self._table.cache
        weight = 0.0 if self._table.quiet else 1.0 / (self.n**2 * (draws - 1))
        self.dropout: SymmetricOperator = CovarianceOperator(self, within=weight)

    @property
    def table(self) -> Table:
        """The per-sample gradients.

        Raises:
            ValueError: if the noise is closed.
        """
        if self._table is None:
            raise ValueError("GradientNoise: must be open, got one that was closed")
        return self._table

    @cached_property
    def sampling(self) -> SymmetricOperator:
        """B/n.

        Raises:
            ValueError: under ``sharing="batch"``, or if there is one sample.
        """
        if self.sharing == "batch":
            raise ValueError(
                "GradientNoise.sampling: sharing must be 'sample', got 'batch': a shared mask has no split"
            )
        if self.n < 2:
            raise ValueError("GradientNoise.sampling: the data must have at least 2 samples, got 1")
        M, n = self.table.stored_draws, self.n
        within = 0.0 if M == 1 else -1.0 / (n**2 * M * (M - 1))
        return CovarianceOperator(self, within=within, between=1.0 / (n * (n - 1) * M))

    @cached_property
    def total(self) -> SymmetricOperator:
        """(W + B)/n, in one pass."""
        sampling, dropout = self.sampling, self.dropout
        assert isinstance(sampling, CovarianceOperator)
        assert isinstance(dropout, CovarianceOperator)
        return CovarianceOperator(self, within=sampling.within + dropout.within, between=sampling.between)

    def batch(self, size: int) -> MiniBatchNoise:
        """Rescale to the gradient averaged over ``size`` samples drawn with replacement.

        Args:
            size: b ≥ 1.

        Returns:
            The operators W/b, B/b and their sum.

        Raises:
            ValueError: if size < 1, or under ``sharing="batch"``, where masks couple the samples.
        """
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"GradientNoise.batch: size must be an int >= 1, got {size!r}")
        if self.sharing == "batch":
            raise ValueError("GradientNoise.batch: sharing must be 'sample', got 'batch'")
        factor = self.n / size
        return MiniBatchNoise(size, factor * self.dropout, factor * self.sampling, factor * self.total)

    def gram(self) -> Tensor:
        """Return the Gram matrix of the centred gradients (g_im - ḡ_i)/(n √(M-1)), shape (nM, nM).

        Its nonzero eigenvalues are those of ``dropout``.

        Raises:
            ValueError: if a parameter is matrix-free, or the gradients are not stored.
        """
        if self.table.quiet:
            return torch.zeros(self.n * self.draws, self.n * self.draws, dtype=self.dropout.dtype)
        raw = kernels.center(self.table.gram(), self.draws, 1.0 / (self.n**2 * (self.draws - 1)))
        return kernels.center(raw.T.contiguous(), self.draws)

    def variance_along(self, V: Tensor) -> list[Estimate]:
        """Variance of the full-batch gradient along directions, vᵀ(W/n)v for each column of V scaled to unit length.

        Args:
            V: (dim,) or (dim, K).

        Returns:
            K estimates with errors for fixed data: V = [k₄/M + 2s⁴/(M-1)]/(1 + 2/(M-1)) summed over samples.

        Raises:
            TypeError: if V has another dtype than the parameters.
            ValueError: if its shape does not fit, or a column is zero or not finite.
        """
        columns = V.unsqueeze(1) if V.ndim == 1 else V
        if V.dtype != self.dropout.dtype:
            raise TypeError(f"variance_along: V must have dtype {self.dropout.dtype}, got {V.dtype}")
        if columns.ndim != 2 or columns.shape[0] != self.dropout.dim:
            raise ValueError(f"variance_along: V must have {self.dropout.dim} rows, got shape {tuple(V.shape)}")
        norms = columns.double().norm(dim=0)
        if not bool((torch.isfinite(norms) & (norms > 0)).all()):
            raise ValueError(f"variance_along: columns of V must be finite and not zero, got norms {norms.tolist()}")
        if self.table.quiet:
            return [Estimate(0.0, 0.0, math.inf, "ok", scale=True)] * columns.shape[1]
        Vt = (columns / norms.to(columns.dtype)).T.contiguous()
        P = torch.cat([chunk.project(Vt).view(chunk.samples, self.draws, -1) for chunk in self.table.chunks()])
        return statistics.direction_estimates(P, 1.0 / self.n**2)

    @property
    def trace(self) -> Estimate:
        """Trace of ``dropout`` with its error for fixed data."""
        m = self._moments
        return statistics.scale_estimate(m.trace, m.variance, m.gaussian, factor=1.0 / self.n**2)

    @property
    def moments(self) -> statistics.TraceMoments:
        """Unbiased moments of every sample's noise, on which the errors rest."""
        return self._moments

    @property
    def effective_samples(self) -> float:
        """N_e = (Σσ_i²)²/Σσ_i⁴, how many samples carry the noise; NaN for fewer than 4 draws."""
        return statistics.effective_samples(self._moments)

    @property
    def kurtosis(self) -> float:
        """K, the excess kurtosis of the noise over masks; NaN for fewer than 4 draws."""
        return statistics.kurtosis(self._moments)

    @property
    def gain(self) -> float:
        """G = (K + 2N_e)/(K + 2), full-batch draws that one draw of every sample is worth."""
        return statistics.gain(self.effective_samples, self.kurtosis)

    def eigsh(
        self,
        k: int = 10,
        tol: float = 1e-4,
        seed: int = 0,
        *,
        cross_validate: bool = True,
        precision: Precision = "full",
        progress: bool | None = None,
    ) -> NoiseEigenpairs:
        """Return the k largest eigenpairs of ``dropout``, by the cheaper of Gram matrix and products.

        Args:
            k: number of pairs.
            tol: relative tolerance of the residuals.
            seed: seed of the start vector.
            cross_validate: whether to find the cross-validated values, which double the time.
            precision: ``"bf16"`` rounds the factors while the Gram matrix is formed: up to twice as fast where the CPU
                multiplies bfloat16 natively, with residuals of some 10⁻³ of the largest eigenvalue.
            progress: whether to show a progress bar; by default as for the capture.

        Returns:
            The pairs, with cross-validated values where the Gram matrix was formed from 4 draws or more.

        Raises:
            ValueError: if k is not in 1..dim, tol not in (0, 1), or ``precision`` is unknown.
        """
        from dropscope.operators.noise_spectrum import noise_eigenpairs

        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= self.dropout.dim:
            raise ValueError(f"GradientNoise.eigsh: k must be an int in 1..{self.dropout.dim}, got {k!r}")
        if precision not in ("full", "bf16"):
            raise ValueError(f"GradientNoise.eigsh: precision must be 'full' or 'bf16', got {precision!r}")
        if not 0.0 < tol < 1.0:
            raise ValueError(f"GradientNoise.eigsh: tol must lie in (0, 1), got {tol!r}")
        return noise_eigenpairs(
            self, k, tol, seed, precision, cross_validate, self.progress if progress is None else progress
        )

    def split(self) -> Split:
        """Return the traces of ``dropout``, ``sampling`` and ``total``.

        The error of the last two is a jackknife over draws: Student's t with M-1 degrees of freedom.

        Raises:
            ValueError: under ``sharing="batch"``, or if there is one sample.
        """
        _ = self.sampling  # refuses what has no split
        sampling, total = statistics.split_traces(self._sample_grams, self._draw_gram)
        return Split(self.trace, sampling, total)

    def close(self) -> None:
        """Drop what is stored, in memory and on disk; nothing can be computed afterwards."""
        if self._table is not None:
            self._table.close()
            self._table = None

    def __enter__(self) -> GradientNoise:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._table is None else f"cache={self.cache!r}"
        return (
            f"GradientNoise(dim={self.dropout.dim}, samples={self.problem.n}, draws={self.draws}, "
            f"sharing={self.sharing!r}, seed={self.seed}, {state})"
        )

    def __str__(self) -> str:
        """Describe the noise as :func:`repr` does, with trace, effective samples, kurtosis and gain."""
        if self._table is None:
            return repr(self)
        return (
            f"{self!r}\n  trace              {self.trace!r}\n  effective samples  {self.effective_samples:.4g} "
            f"of {self.n}\n  kurtosis           {self.kurtosis:.4g}\n  gain               {self.gain:.4g}"
        )

    @cached_property
    def _sample_grams(self) -> Tensor:
        """⟨g_im, g_il⟩, float64 (n, M, M)."""
        grams = torch.cat([chunk.sample_gram() for chunk in self.table.chunks()])
        return grams.expand(-1, self.draws, self.draws) if self.table.quiet else grams

    @cached_property
    def _moments(self) -> statistics.TraceMoments:
        return statistics.trace_moments(self._sample_grams)

    @cached_property
    def _draw_means(self) -> Tensor:
        """(1/n) Σ_i g_im, the full-batch gradient of each draw, (M, dim)."""
        M = self.table.stored_draws
        out = torch.zeros(M, self.problem.dim, dtype=work_dtype(self.problem.dtype), device=self.problem.device)
        for chunk in self.table.chunks():
            each = torch.eye(M, dtype=out.dtype, device=out.device).repeat(chunk.samples, 1) / self.n
            chunk.accumulate(each, out)
        return out

    @cached_property
    def _draw_gram(self) -> Tensor:
        means = self._draw_means.double()
        gram = means @ means.T
        return gram.expand(self.draws, self.draws) if self.table.quiet else gram

    @cached_property
    def mean(self) -> Tensor:
        """Mean of all g_im, (dim,)."""
        out = torch.zeros(1, self.problem.dim, dtype=work_dtype(self.problem.dtype), device=self.problem.device)
        for chunk in self.table.chunks():
            chunk.accumulate(out.new_full((chunk.rows, 1), 1.0 / len(self.table)), out)
        return out[0]


def _check(problem: object, draws: object, seed: object, cache: object, sharing: object, memory: object) -> None:
    if not isinstance(problem, Problem):
        raise TypeError(f"GradientNoise: problem must be a Problem, got {type(problem).__name__}")
    if isinstance(draws, bool) or not isinstance(draws, int):
        raise TypeError(f"GradientNoise: draws must be an int, got {draws!r}")
    if not 2 <= draws < 2**32:
        raise ValueError(f"GradientNoise: draws must be at least 2, got {draws}")
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
