"""``GradientNoise(problem, method="exact")``: the noise where it is known in closed form, with nothing sampled."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, Literal, NoReturn

from torch import Tensor

from dropscope.estimate import Estimate
from dropscope.factors.centred_gram import Precision
from dropscope.masks import Sharing
from dropscope.operators.base import SymmetricOperator
from dropscope.operators.exact_noise import MAX_EXACT_FACTORS, ExactNoise
from dropscope.operators.gradient_noise import GradientNoise
from dropscope.operators.noise_arguments import unit_columns
from dropscope.operators.noise_spectrum import NoiseEigenpairs
from dropscope.problem import Problem
from dropscope.spectral import eigsh, trace


class ExactGradientNoise(GradientNoise):
    """The dropout noise exactly: every error is zero, the operator follows the model.

    What only sampled masks have (``sampling``, ``total``, ``gram``, ``kurtosis``, ``gain``) is refused.

    Args:
        problem: dropout on the last hidden layer, a linear read-out, squared loss.
        draws: not used.
        seed: of the start vectors of the eigensolver.
        cache: not used.
        sharing: ``"sample"`` or ``"batch"``.
        memory: bytes that stored factors may take.
        progress: whether to show progress bars.
        method: ``"exact"``.
    """

    def __init__(
        self,
        problem: Problem,
        draws: int = 0,
        seed: int = 0,
        *,
        sharing: Sharing = "sample",
        memory: int | None = None,
        progress: bool = False,
        method: str = "exact",
        **options: Any,
    ) -> None:
        if not isinstance(problem, Problem):
            raise TypeError(f"GradientNoise: problem must be a Problem, got {type(problem).__name__}")
        if options:
            raise ValueError(f"GradientNoise: {next(iter(options))} must not be given with method='exact'")
        self.problem, self.draws, self.seed, self.sharing, self.progress = problem, draws, seed, sharing, progress
        self.n = problem.n if sharing == "sample" else 1
        self.method = method
        self.exact = ExactNoise(problem, sharing, memory=memory)
        self.dropout: SymmetricOperator = self.exact

    @cached_property
    def trace(self) -> Estimate:
        """Trace of ``dropout``: exact up to 20 000 factors, else estimated by XTrace with its error."""
        if self.exact.rank <= MAX_EXACT_FACTORS:
            return Estimate(self.exact.trace(), 0.0, math.inf, "ok", scale=True)
        return trace(self.exact, seed=self.seed, progress=self.progress)

    @cached_property
    def mean(self) -> Tensor:
        """E ∇R^drop, (dim,)."""
        return self.exact.mean_gradient()

    def variance_along(self, V: Tensor) -> list[Estimate]:
        """Variance of the full-batch gradient along each column of V scaled to unit length, without error."""
        unit = unit_columns(V, self.dropout.dim, self.dropout.dtype)
        values = (unit.double() * (self.dropout @ unit).double()).sum(0).tolist()
        return [Estimate(value, 0.0, math.inf, "ok", scale=True) for value in values]

    def eigsh(
        self,
        k: int = 10,
        tol: float = 1e-4,
        seed: int = 0,
        *,
        cross_validate: bool = True,  # noqa: ARG002  the truth needs none
        precision: Precision = "full",
        verify: Literal["each", "together"] = "each",  # noqa: ARG002  products are cheap enough for each
        progress: bool | None = None,
    ) -> NoiseEigenpairs:
        """Return the k largest eigenpairs of ``dropout``."""
        if precision != "full":
            raise ValueError(f"GradientNoise.eigsh: precision must be 'full' with method='exact', got {precision!r}")
        shown = self.progress if progress is None else progress
        return NoiseEigenpairs(**vars(eigsh(self.dropout, k, "LA", tol, seed=seed, progress=shown)))

    def close(self) -> None:
        """Nothing is stored; the noise stays open."""

    def __repr__(self) -> str:
        return f"GradientNoise(dim={self.dropout.dim}, method='exact', sharing={self.sharing!r})"

    def __str__(self) -> str:
        return f"{self!r}\n  trace              {self.trace!r}"

    def _sampled_only(self) -> NoReturn:
        raise ValueError("GradientNoise: method must be 'sampled' for what sampled masks tell, got 'exact'")

    @property
    def table(self) -> NoReturn:
        """Refused: no gradient is stored."""
        self._sampled_only()

    @property
    def sampling(self) -> NoReturn:
        """Refused: the formula is of the dropout part."""
        self._sampled_only()
