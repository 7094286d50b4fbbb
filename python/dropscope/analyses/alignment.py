"""How much more curvature the noise meets than by chance: Tr(HΣ), its isotropic and its random counterparts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm.auto import tqdm

from dropscope import kernels
from dropscope.estimate import Estimate
from dropscope.operators.base import SymmetricOperator

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Alignment:
    """Traces and norms of a Hessian H and a noise covariance Σ of size D, and what follows from them.

    Attributes:
        trace_product: Tr(HΣ), the mean of gᵀHg over the noise g.
        trace_h: Tr H.
        trace_noise: Tr Σ.
        frobenius_h: ‖H‖_F.
        frobenius_noise: ‖Σ‖_F, without the bias that sampled masks give it.
        ratio: Tr(HΣ) / Tr(HΣ̄) with Σ̄ = (Tr Σ / D) I: 1 for isotropic noise.
        cosine: Tr(HΣ) / (‖H‖_F ‖Σ‖_F).
        null: the mean of that cosine when the spectra stay and the eigenvectors are random,
            (Tr H · Tr Σ / D) / (‖H‖_F ‖Σ‖_F).
        isotropic: Tr(HΣ̄) = Tr H · Tr Σ / D, the product for isotropic noise of equal trace, which is also its mean over
            random eigenvectors at the same spectra.
        null_spread: standard deviation of the cosine over random eigenvectors at the same spectra,
            √(2/((D-1)(D+2))) · ‖H₀‖_F‖Σ₀‖_F / (‖H‖_F‖Σ‖_F) with H₀ = H - (Tr H/D) I, Σ₀ likewise.
        probes: random vectors used beyond the deflated basis.
    """

    trace_product: Estimate
    trace_h: Estimate
    trace_noise: Estimate
    frobenius_h: Estimate
    frobenius_noise: Estimate
    ratio: Estimate
    cosine: Estimate
    null: Estimate
    isotropic: Estimate
    null_spread: float
    probes: int

    @property
    def excess(self) -> float:
        """How many standard deviations of the same-spectrum null the cosine lies above its mean."""
        return (self.cosine.value - self.null.value) / self.null_spread if self.null_spread > 0.0 else math.nan

    def __repr__(self) -> str:
        return f"Alignment(ratio {self.ratio!r}, cosine {self.cosine.value:.3g}, null {self.null.value:.3g})"


@dataclass(frozen=True)
class MaskError:
    """What sampling masks does to Σ̂; all zero for a covariance that is known exactly.

    Attributes:
        covariance: of the errors of the logarithms of Tr(HΣ̂), Tr Σ̂ and ‖Σ̂‖_F², (3, 3); NaN where unknown.
        dof: degrees of freedom of that covariance.
        square_bias: E‖Σ̂‖_F² - ‖Σ‖_F².
    """

    covariance: Vector = field(default_factory=lambda: np.zeros((3, 3)))
    dof: int = 10**9
    square_bias: float = 0.0


def measure_alignment(
    H: SymmetricOperator,
    noise: SymmetricOperator,
    basis: Tensor,
    *,
    probes: int = 16,
    seed: int = 0,
    masks: MaskError | None = None,
    trace_noise: float | None = None,
    progress: bool = False,
) -> Alignment:
    """Estimate every trace of :class:`Alignment` from products with H and Σ.

    For orthonormal columns V, Tr M = Tr VᵀMV + E qᵀMq, q uniform on the sphere of radius √(D - k) orthogonal to V. The
    first part is exact and, for V the leading eigenvectors of H, holds most of Tr(HΣ), Tr H and ‖H‖_F²; the second is
    averaged over probes. The same products serve all of M = HΣ, H, Σ, H², Σ², so that the errors of ratios account for
    their correlation, and isotropic noise has a ratio of exactly 1.

    Args:
        H: the Hessian.
        noise: the covariance.
        basis: V, (dim, k), k ≥ 0, orthonormalised here.
        probes: number of z, at least 2.
        seed: seed of the probes.
        masks: errors of Σ̂ from sampled masks, taken as those of its part along the basis.
        trace_noise: Tr Σ where it is known, which saves its probe error.
        progress: show a bar.

    Returns:
        The estimates; intervals are Student's t with ``probes - 1`` degrees of freedom, or those of the masks if fewer.
    """
    masks = masks or MaskError()
    V = torch.linalg.qr(basis.double())[0].to(H.dtype) if basis.shape[1] else basis.to(H.dtype)
    sums = _forms(V, H, noise).sum(0)
    rows = []
    with tqdm(total=probes, desc="alignment", unit="probe", disable=not progress, leave=False) as bar:
        for start in range(0, probes, 4):
            Z = torch.empty(H.dim, min(4, probes - start), dtype=H.dtype, device=H.device)
            for column in range(Z.shape[1]):
                z = torch.empty(H.dim, dtype=H.dtype, device=H.device)
                Z[:, column] = kernels.probe(z, seed=seed, index=start + column, kind="normal")
            Z = Z - V @ (V.T @ Z)
            # Uniform on the sphere of the complement: E qqᵀ = Q still, and Tr I is met without error.
            Z *= math.sqrt(H.dim - V.shape[1]) / Z.norm(dim=0).clamp_min(torch.finfo(H.dtype).tiny)
            rows.append(_forms(Z, H, noise))
            bar.update(Z.shape[1])
    table = np.concatenate(rows)
    if trace_noise is not None:
        sums[2], table[:, 2] = trace_noise, 0.0
    means = sums + table.mean(0)
    covariance = np.atleast_2d(np.cov(table, rowvar=False)) / probes
    means[4] -= masks.square_bias
    if trace_noise == 0.0:  # a covariance without a trace is zero; what its products say is rounding
        means[[0, 4]] = 0.0
    return _assemble(means, covariance, H.dim, masks, probes)


def _forms(X: Tensor, H: SymmetricOperator, noise: SymmetricOperator) -> Vector:
    """xᵀHΣx, xᵀHx, xᵀΣx, ‖Hx‖², ‖Σx‖² for each column x, (k, 5)."""
    HX, SX, X = (H @ X).double(), (noise @ X).double(), X.double()
    pairs = ((HX, SX), (X, HX), (X, SX), (HX, HX), (SX, SX))
    return np.asarray(torch.stack([(a * b).sum(0) for a, b in pairs], 1).cpu().numpy(), float)


def _assemble(means: Vector, covariance: Vector, dim: int, masks: MaskError, probes: int) -> Alignment:
    """Products of powers of the five means, with errors by the delta method."""
    mask_log = np.zeros((5, 5))
    of_noise = np.ix_([0, 2, 4], [0, 2, 4])
    mask_log[of_noise] = masks.covariance
    known = bool(np.isfinite(masks.covariance).all())
    dof = float(min(probes - 1, masks.dof))

    def monomial(powers: tuple[float, float, float, float, float], factor: float = 1.0) -> Estimate:
        exponents = np.asarray(powers)
        used = exponents != 0
        fractional = used & (exponents != np.round(exponents))
        if bool((means[fractional] <= 0.0).any()) or bool((means[used & (exponents < 0)] == 0.0).any()):
            return Estimate(math.nan, math.nan, 0.0, "no_error")
        value = factor * float(np.prod(np.power(means[used], exponents[used])))
        slope = np.zeros(5)
        slope[used & (means != 0)] = exponents[used & (means != 0)] / means[used & (means != 0)]
        if not known and bool(exponents[[0, 2, 4]].any()):
            return Estimate(value, math.nan, 0.0, "no_error")
        relative = slope @ covariance @ slope + exponents @ np.nan_to_num(mask_log) @ exponents
        return Estimate(value, abs(value) * math.sqrt(max(float(relative), 0.0)), dof)

    return Alignment(
        trace_product=monomial((1, 0, 0, 0, 0)),
        trace_h=monomial((0, 1, 0, 0, 0)),
        trace_noise=monomial((0, 0, 1, 0, 0)),
        frobenius_h=monomial((0, 0, 0, 0.5, 0)),
        frobenius_noise=monomial((0, 0, 0, 0, 0.5)),
        ratio=monomial((1, -1, -1, 0, 0), float(dim)),
        cosine=monomial((1, 0, 0, -0.5, -0.5)),
        null=monomial((0, 1, 1, -0.5, -0.5), 1.0 / dim),
        isotropic=monomial((0, 1, 1, 0, 0), 1.0 / dim),
        null_spread=_null_spread(means, dim),
        probes=probes,
    )


def _null_spread(means: Vector, dim: int) -> float:
    """Standard deviation of Tr(H QΣQᵀ)/(‖H‖_F‖Σ‖_F) over Haar-distributed Q."""
    if dim < 2 or means[3] <= 0.0 or means[4] <= 0.0:
        return math.nan
    parts = (max(1.0 - means[1] ** 2 / (dim * means[3]), 0.0), max(1.0 - means[2] ** 2 / (dim * means[4]), 0.0))
    return math.sqrt(2.0 * parts[0] * parts[1] / ((dim - 1) * (dim + 2)))
