"""The Hessian–variance relation: is the noise larger where the loss is sharper?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dropscope.analyses.alignment import Alignment, MaskError, measure_alignment
from dropscope.analyses.noise_source import Noise, NoiseSource, check_pairs, noise_source
from dropscope.analyses.power_law import PowerLaw, fit_power_law
from dropscope.analyses.saving import Result
from dropscope.estimate import Estimate, EstimateStatus
from dropscope.operators.base import SymmetricOperator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dropscope.spectral import Eigenpairs


@dataclass(frozen=True)
class HessianVariance(Result):
    """Noise along the eigenvectors of the Hessian, and how the two matrices align.

    Attributes:
        eigenvalues: λ_j of the Hessian, float64 (k,), largest first.
        residuals: ‖H v_j - λ_j v_j‖, float64 (k,).
        converged: bool (k,).
        variances: v_jᵀ Σ v_j, one estimate for each eigenvector.
        law: v_jᵀ Σ v_j ~ λ_j^s over the pairs with λ_j > 0.
        alignment: Tr(HΣ) against isotropic noise, the cosine of H and Σ and its same-spectrum null.
        dim: number of parameters.
    """

    eigenvalues: Tensor
    residuals: Tensor
    converged: Tensor
    variances: tuple[Estimate, ...]
    law: PowerLaw
    alignment: Alignment
    dim: int

    @property
    def status(self) -> EstimateStatus:
        """``"ok"``, or the worst status among the variances."""
        order: tuple[EstimateStatus, ...] = ("ok", "heavy_tailed", "no_error")
        return max((v.status for v in self.variances), key=order.index, default="ok")

    def table(self) -> list[dict[str, Any]]:
        """One row per eigenvector: eigenvalue, residual, variance, its error, 95 % interval and status."""
        rows = []
        for j, variance in enumerate(self.variances):
            low, high = variance.interval(0.95)
            rows.append(
                {
                    "index": j + 1,
                    "eigenvalue": float(self.eigenvalues[j]),
                    "residual": float(self.residuals[j]),
                    "converged": bool(self.converged[j]),
                    "variance": variance.value,
                    "stderr": variance.stderr,
                    "low": low,
                    "high": high,
                    "status": variance.status,
                }
            )
        return rows

    def plot(self) -> Figure:
        """Return a figure: variance of the noise against curvature, with the power law."""
        from dropscope import plots

        return plots.hessian_variance(self)

    def __repr__(self) -> str:
        law, a = self.law, self.alignment
        status = "" if self.status == "ok" else f", {self.status}"
        return (
            f"HessianVariance(Var ~ λ^({law.slope.value:.2f} ± {law.slope.stderr:.2f}), r {law.r:.2f}, "
            f"Tr(HΣ)/Tr(HΣ̄) {a.ratio.value:.4g} ± {a.ratio.stderr:.2g}, cosine {a.cosine.value:.3g} "
            f"against {a.null.value:.2g} by chance{status})"
        )


def hessian_variance(
    H: SymmetricOperator,
    noise: Noise,
    k: int = 20,
    *,
    top: Eigenpairs | None = None,
    probes: int = 16,
    tol: float = 1e-3,
    seed: int = 0,
    progress: bool = False,
) -> HessianVariance:
    """Variance of the noise along the k leading eigenvectors of H against their eigenvalues.

    Fits v_jᵀΣv_j ~ λ_j^s (arXiv:2111.01022, and §5.2 of arXiv:2305.15850) and compares Tr(HΣ) with Tr(HΣ̄),
    Σ̄ = (Tr Σ/D) I (the test of Zhu et al.), and the cosine Tr(HΣ)/(‖H‖_F‖Σ‖_F) with its mean over random
    eigenvectors at the same spectra. Errors: of the variances, χ² from the draws of every sample; of the exponent, a
    weighted log–log fit with scatter; of the traces, probes and masks together. Variances along different eigenvectors
    come from the same masks; the fit takes their errors as independent. ‖Σ̂‖_F² is corrected for what sampling masks
    adds to it.

    Args:
        H: the Hessian.
        noise: a ``GradientNoise`` (then its dropout part, with errors), ``NoiseData`` of the parameters of H, or any
            covariance operator (taken as exact).
        k: number of eigenpairs, from the largest eigenvalue down; those that are not positive enter no fit.
        top: eigenpairs of H computed before, instead of computing them here.
        probes: random vectors for the traces, at least 2.
        tol: relative tolerance of the eigenpairs.
        seed: seed of the eigensolver and of the probes.
        progress: show bars.

    Returns:
        The relation, with ``.plot()``, ``.save()`` and ``.table()``.

    Raises:
        TypeError: if H is not an operator or noise is neither of the two.
        ValueError: if sizes or dtypes differ, k is not in [1, dim] probes < 2, or top does not fit.

    Example:
        >>> scale = torch.arange(1.0, 9.0, dtype=torch.float64)
        >>> H = SymmetricOperator.from_callable(lambda v: scale * v, 8, torch.float64)
        >>> noise = SymmetricOperator.from_callable(lambda v: scale**2 * v, 8, torch.float64)
        >>> hessian_variance(H, noise, k=5).law
        PowerLaw(slope 2.00 ± 0.00, r 1.00, Spearman 1.00, 5 points)
    """
    if not isinstance(H, SymmetricOperator):
        raise TypeError(f"hessian_variance: H must be a SymmetricOperator, got {type(H).__name__}")
    source = noise_source(noise, "hessian_variance")
    if (source.operator.dim, source.operator.dtype) != (H.dim, H.dtype):
        raise ValueError(
            f"hessian_variance: noise must match H, dim {H.dim} and {H.dtype}, "
            f"got dim {source.operator.dim} and {source.operator.dtype}"
        )
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= H.dim:
        raise ValueError(f"hessian_variance: k must be an int in [1, {H.dim}], got {k!r}")
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 2:
        raise ValueError(f"hessian_variance: probes must be an int of at least 2, got {probes!r}")
    if top is None:
        from dropscope.spectral import eigsh

        top = eigsh(H, k, which="LA", tol=tol, seed=seed, progress=progress)
    check_pairs(top, H.dim, k, "hessian_variance")
    order = torch.as_tensor(top.values).argsort(descending=True)[:k]
    V = top.vectors[:, order.to(top.vectors.device)]
    eigenvalues = torch.as_tensor(top.values).double().cpu()[order.cpu()]
    variances = source.along(V)
    law = fit_power_law(eigenvalues.numpy(), [v.value for v in variances], [v.stderr for v in variances])
    alignment = measure_alignment(
        H,
        source.operator,
        V,
        probes=probes,
        seed=seed,
        masks=_mask_error(source, V, eigenvalues),
        trace_noise=source.trace.value if source.trace else None,
        progress=progress,
    )
    return HessianVariance(
        eigenvalues=eigenvalues,
        residuals=torch.as_tensor(top.residuals).double().cpu()[order.cpu()],
        converged=torch.as_tensor(top.converged).cpu()[order.cpu()],
        variances=tuple(variances),
        law=law,
        alignment=alignment,
        dim=H.dim,
    )


def _mask_error(source: NoiseSource, V: Tensor, eigenvalues: Tensor) -> MaskError:
    """What sampling the masks does to Tr(HΣ̂), Tr Σ̂ and ‖Σ̂‖_F², as seen along the eigenvectors."""
    covariance, dof = source.log_covariance(V, eigenvalues)
    return MaskError(covariance.cpu().numpy(), dof, source.square_bias)
