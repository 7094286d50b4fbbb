"""The covariance of the gradient noise: what dropout injects, what sampling the data injects, and their sum."""

from __future__ import annotations

import inspect
import math
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from dropscope.estimate import Estimate
from dropscope.factors import Allocation, Cache, Table
from dropscope.factors.centred_gram import Precision
from dropscope.factors.eigen import Verify
from dropscope.masks import Sharing
from dropscope.operators import noise_statistics as statistics
from dropscope.operators.base import SymmetricOperator
from dropscope.operators.covariance import CovarianceOperator, MiniBatchNoise, covariance_gram, work_dtype
from dropscope.operators.noise_arguments import check_allocation, check_arguments, check_pairs, unit_columns
from dropscope.problem import Problem

if TYPE_CHECKING:
    from dropscope.operators.noise_spectrum import NoiseEigenpairs


# Where `target` stops: a mean number of draws.
MOST_DRAWS = 512


class GradientNoise:
    """Covariance of the gradient of the risk over dropout masks and over samples.

    With g_i(η) the gradient of sample i under its mask η, so that the gradient of the risk is (1/n) Σ g_i:

        W = (1/n) Σ_i Cov_η(g_i),    B = Cov over samples of E_η g_i,

    and ``dropout`` = W/n is the covariance of the full-batch gradient over the masks. From M_i draws of sample i, W/n
    is estimated without bias by n⁻² Σ_i (M_i-1)⁻¹ Σ_m (g_im - ḡ_i)(g_im - ḡ_i)ᵀ, and B by the covariance of the ḡ_i
    less (1/n) Σ_i Ĉ_i/M_i (so it need not be positive). Products are exact for the drawn masks: per-sample gradients
    are kept as factors, materialised, or replayed, whichever is smallest for each parameter (``problem.plan()``).

    Args:
        problem: model, loss and data.
        draws: masks per sample, at least 2, on average; errors need 4.
        seed: seed of the masks; the draws are 0..M-1.
        cache: ``"factors"`` keeps the per-sample gradients in memory, ``"bf16"`` rounded to bfloat16 (every number to
            2⁻⁹ of itself; a product is then off by some 3·10⁻³ of its norm), ``"disk"`` in a temporary folder,
            ``"recompute"`` makes them again for every product; ``"auto"`` is ``"factors"`` if they fit, else
            ``"recompute"``.
        sharing: ``"sample"`` draws a mask for each sample; ``"batch"`` shares one over all samples: ``dropout`` is then
            the covariance over draws of the full-batch gradient, estimated from M of these, and there is no split.
        allocation: ``"uniform"``: M_i = draws; ``"gradient"``: M_i - 2 ∝ ‖g_i‖^½ with dropout off, decided before any
            draw: so unbiased, and closer for the same rows where few samples carry the noise, as after training.
        target: relative standard error asked of the trace, ``trace.stderr / trace.value``, e.g. 0.05. While it is
            larger, ``draws`` is raised to what the error seen so far asks for, at most four times at once and to 512:
            past that the trace says what was reached. The draws seen first are part of the later ones. Stopping by
            the estimate biases it, by less than its error squared.
        memory: bytes that stored gradients may take; by default half of what is free.
        progress: whether to show progress bars.
        method: ``"exact"`` samples no mask where dropout acts on the last hidden layer, the read-out is linear and
            the loss squared; see :class:`~dropscope.operators.exact_noise.ExactNoise`. Anything else is refused.

    Attributes:
        draws: the mean number of draws, asked for or come to.
        dropout: W/n.
        sampling: B/n.
        total: (W + B)/n, the noise of a gradient over n samples drawn with replacement.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if draws < 2, an option is unknown or does not go with ``sharing="batch"``, ``memory`` is too small,
            a gradient is not finite, or samples share a mask (DropConnect, LayerDrop) under ``sharing="sample"``.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1))
        >>> problem = Problem(model, nn.MSELoss(), (torch.randn(6, 2), torch.zeros(6, 1)))
        >>> with GradientNoise(problem, draws=4) as noise:
        ...     noise.dropout.shape
        (33, 33)
    """

    def __new__(cls, *_: Any, method: str = "sampled", **__: Any) -> GradientNoise:
        """Choose the class by the method."""
        if method == "exact":
            from dropscope.operators.exact_gradient_noise import ExactGradientNoise

            cls = ExactGradientNoise
        return object.__new__(cls)

    def __init__(
        self,
        problem: Problem,
        draws: int = 8,
        seed: int = 0,
        *,
        cache: Cache = "auto",
        sharing: Sharing = "sample",
        allocation: Allocation = "uniform",
        target: float | None = None,
        memory: int | None = None,
        progress: bool = False,
        method: Literal["sampled", "exact"] = "sampled",
    ) -> None:
        if method != "sampled":
            raise ValueError(f"GradientNoise: method must be 'sampled' or 'exact', got {method!r}")
        check_arguments(problem, draws, seed, cache, sharing, memory)
        check_allocation(sharing, allocation, target)
        self.problem, self.draws, self.seed, self.sharing, self.progress = problem, draws, seed, sharing, progress
        self.n = problem.n if sharing == "sample" else 1
        self._table: Table | None = Table(problem, draws, seed, cache, sharing, memory, progress, allocation)
        self.dropout: SymmetricOperator = CovarianceOperator(self, within=1.0 / self.n**2)
        if target is not None:
            self._draw_until(target)

    # What help() shows: __new__ passes everything on.
    __signature__ = inspect.Signature(list(inspect.signature(__init__).parameters.values())[1:])

    def _draw_until(self, target: float) -> None:
        """See ``target`` of the class."""
        while self.draws < MOST_DRAWS and not self.table.quiet:
            wanted = statistics.draws_for(self.trace, self.draws, target)
            if wanted <= self.draws:
                return
            self.draws = min(wanted, MOST_DRAWS)
            self.table.redraw(self.draws)
            for name in ("_moments", "_sample_grams", "mean"):
                self.__dict__.pop(name, None)

    @property
    def counts(self) -> Tensor:
        """M_i, the draws of every sample, int64 (n,)."""
        return self.table.counts.clamp_min(self.draws) if self.table.quiet else self.table.counts

    @property
    def cache(self) -> Cache:
        """Where the gradients live."""
        return self.table.cache

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
        return CovarianceOperator(self, mean_error=-1.0 / self.n**2, between=1.0 / (self.n * (self.n - 1)))

    @cached_property
    def total(self) -> SymmetricOperator:
        """(W + B)/n, in one pass."""
        sampling, dropout = self.sampling, self.dropout
        assert isinstance(sampling, CovarianceOperator)
        assert isinstance(dropout, CovarianceOperator)
        return CovarianceOperator(self, within=dropout.within, mean_error=sampling.mean_error, between=sampling.between)

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
        """Return the Gram matrix of the centred gradients (g_im - ḡ_i)/(n √(M_i-1)), shape (ΣM_i, ΣM_i).

        Its nonzero eigenvalues are those of ``dropout``. Rows are sample-major.

        Raises:
            ValueError: if a parameter is matrix-free, or the gradients are not stored.
        """
        if self.table.quiet:
            rows = int(self.counts.sum())
            return torch.zeros(rows, rows, dtype=self.dropout.dtype)
        return covariance_gram(self.table, self.n)

    def variance_along(self, V: Tensor) -> list[Estimate]:
        """Variance of the full-batch gradient along directions, vᵀ(W/n)v for each column of V scaled to unit length.

        Args:
            V: (dim,) or (dim, K).

        Returns:
            K estimates with errors for fixed data: V = [k₄/M + 2s⁴/(M-1)]/(1 + 2/(M-1)) summed over samples.

        Raises:
            TypeError: if V is no tensor, or of another dtype than the parameters.
            ValueError: if its shape does not fit, or a column is zero or not finite.
        """
        Vt = unit_columns(V, self.dropout.dim, self.dropout.dtype).T.contiguous()
        if self.table.quiet:
            return [Estimate(0.0, 0.0, math.inf, "ok", scale=True)] * len(Vt)
        projections = [chunk.project(Vt).view(chunk.samples, chunk.draws, -1) for chunk in self.table.chunks()]
        return statistics.direction_estimates(projections, 1.0 / self.n**2)

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
        """N_e = (Σσ_i²)²/Σσ_i⁴, how many samples carry the noise; NaN if no sample has 4 draws."""
        return statistics.effective_samples(self._moments)

    @property
    def kurtosis(self) -> float:
        """K, the excess kurtosis of the noise over masks; NaN if no sample has 4 draws."""
        return statistics.kurtosis(self._moments)

    @property
    def gain(self) -> float:
        """G = (K + 2N_e)/(K + 2), full-batch draws that one uniform draw of every sample is worth."""
        return statistics.gain(self.effective_samples, self.kurtosis)

    def eigsh(
        self,
        k: int = 10,
        tol: float = 1e-4,
        seed: int = 0,
        *,
        cross_validate: bool = True,
        precision: Precision = "full",
        verify: Verify = "each",
        progress: bool | None = None,
    ) -> NoiseEigenpairs:
        """Return the k largest eigenpairs of ``dropout``, by the cheaper of Gram matrix and products.

        Args:
            k: number of pairs.
            tol: relative tolerance of the residuals.
            seed: seed of the start vector.
            cross_validate: whether to find the cross-validated values, which double the time.
            precision: ``"bf16"`` rounds the factors while the Gram matrix is formed: up to twice as fast where the CPU
                multiplies bfloat16 natively, with residuals of some 10⁻³ of the largest eigenvalue; ``"int8"`` rounds
                them to 8-bit integers for the Gram matrix only: up to four times as fast where the CPU has units for
                these (VNNI, AMX), with residuals of some 3·10⁻⁴.
            verify: ``"each"`` takes a product for each pair, so that every residual is a true one; ``"together"`` a
                single product, with a random combination of the pairs: for a handful of pairs up to twice as fast,
                and a residual is then at least the root mean square over the pairs.
            progress: whether to show a progress bar; by default as for the capture.

        Returns:
            The pairs, with cross-validated values where the Gram matrix was formed from 4 draws or more. Where k is
            above the rank, the values after it are zeros, with vectors that the noise does not reach.

        Raises:
            ValueError: if k is not in 1..dim, tol not in (0, 1), or an option is unknown.
        """
        from dropscope.operators.noise_spectrum import noise_eigenpairs

        check_pairs(k, self.dropout.dim, tol, precision, verify)
        return noise_eigenpairs(
            self,
            k,
            tol,
            seed,
            precision=precision,
            verify=verify,
            cross_validate=cross_validate,
            progress=self.progress if progress is None else progress,
        )

    def split(self) -> statistics.Split:
        """Return the traces of ``dropout``, ``sampling`` and ``total``.

        The error of the last two is a jackknife over the draws of every sample, for fixed data.

        Raises:
            ValueError: under ``sharing="batch"``, or if there is one sample.
        """
        _ = self.sampling  # refuses what has no split
        mean = self.mean.unsqueeze(0)
        chunks = self.table.chunks()
        groups = [
            (gram, chunk.project(mean).view(chunk.samples, chunk.draws).double())
            for (_, gram), chunk in zip(self._sample_grams, chunks, strict=True)
        ]
        sampling, total = statistics.split_traces(groups, float(self.mean.double().square().sum()))
        return statistics.Split(self.trace, sampling, total)

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
        if self._table is None:
            state = "closed"
        else:
            few, most = int(self.counts.min()), int(self.counts.max())
            spread = "" if few == most else f" ({few} to {most})"
            state = f"draws={self.draws}{spread}, cache={self.cache!r}"
        return (
            f"GradientNoise(dim={self.dropout.dim}, samples={self.problem.n}, sharing={self.sharing!r}, "
            f"seed={self.seed}, {state})"
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
    def _sample_grams(self) -> list[tuple[Tensor, Tensor]]:
        """Positions of samples of equal numbers of draws and their ⟨g_im, g_il⟩, float64 (samples, M, M)."""
        return [(chunk.ids, chunk.sample_gram()) for chunk in self.table.chunks()]

    @cached_property
    def _moments(self) -> statistics.TraceMoments:
        M = self.draws
        parts = [(ids, gram.expand(-1, M, M) if self.table.quiet else gram) for ids, gram in self._sample_grams]
        return statistics.gathered([(ids, statistics.trace_moments(gram)) for ids, gram in parts])

    @cached_property
    def mean(self) -> Tensor:
        """Mean over the samples of their mean gradients ḡ_i, (dim,)."""
        out = torch.zeros(1, self.problem.dim, dtype=work_dtype(self.problem.dtype), device=self.problem.device)
        for chunk in self.table.chunks():
            chunk.accumulate(out.new_full((chunk.rows, 1), 1.0 / (self.n * chunk.draws)), out)
        return out[0]
