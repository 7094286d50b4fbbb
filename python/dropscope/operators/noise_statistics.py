"""Errors of the dropout noise, from the draws of every sample alone.

The draws of one sample are independent and identically distributed for fixed data, so the error of a sum over samples
of within-sample variances is the sum of the variances' own within-sample variances. Nothing is resampled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dropscope.estimate import Estimate

MIN_DRAWS_FOR_ERROR = 4
MIN_DOF = 40.0


@dataclass(frozen=True)
class TraceMoments:
    """Unbiased within-sample moments of the gradient noise, float64 (n,) each; C_i = Cov over masks of g_i.

    Attributes:
        trace: tr C_i.
        variance: variance of ``trace``.
        gaussian: what ``variance`` would be for Gaussian noise of the same covariance, 2 tr C_i² / (M-1).
        squared_trace: (tr C_i)².
        trace_of_square: tr C_i².
        cumulant: Σ_jk of the fourth cumulant κ_jjkk = E‖x‖⁴ - (tr C_i)² - 2 tr C_i².

    All but ``trace`` are NaN for fewer than 4 draws.
    """

    trace: Tensor
    variance: Tensor
    gaussian: Tensor
    squared_trace: Tensor
    trace_of_square: Tensor
    cumulant: Tensor


def centre(X: Tensor, dim: int) -> Tensor:
    """Subtract the mean along ``dim``; equal entries give exact zeros, whatever their number."""
    shifted = X - X.narrow(dim, 0, 1)
    return shifted - shifted.mean(dim, keepdim=True)


def trace_moments(gram: Tensor) -> TraceMoments:
    """Moments of each sample from the Gram matrix of its M draws.

    With S the sample covariance and Q = (M-1)⁻¹ Σ_m ‖x_m - x̄‖⁴, the three statistics tr S², (tr S)² and Q are linear
    in (tr C)², tr C² and κ; solving gives estimates that are unbiased for any distribution with four moments
    (Himeno and Yamada 2014 for tr C²; the first is the mean of h_ml h_pq over disjoint pairs, h_ml = ½‖x_m - x_l‖²).

    Args:
        gram: ⟨g_im, g_il⟩, (n, M, M), M ≥ 2.

    Returns:
        The moments, float64.
    """
    gram = centre(centre(gram.double(), 1), 2)
    M = gram.shape[1]
    norms = gram.diagonal(dim1=1, dim2=2)
    trace = norms.sum(1) / (M - 1)
    if M < MIN_DRAWS_FOR_ERROR:
        nan = torch.full_like(trace, math.nan)
        return TraceMoments(trace, nan, nan, nan, nan, nan)
    square = gram.square().sum((1, 2)) / (M - 1) ** 2
    fourth = norms.square().sum(1) / (M - 1)
    lead = (M - 1) / (M * (M - 2) * (M - 3))
    squared_trace = lead * (2 * square + (M * M - 3 * M + 1) * trace.square() - M * fourth)
    trace_of_square = lead * ((M - 1) * (M - 2) * square + trace.square() - M * fourth)
    cumulant = (M * (M + 1) * fourth - (M - 1) ** 2 * (2 * square + trace.square())) / ((M - 2) * (M - 3))
    # tr S² under a Gaussian law has mean tr C² (1 + 1/(M-1)) + (tr C)²/(M-1); solving gives a form that is never
    # negative, unlike the distribution-free one above.
    gaussian_square = (M - 1) ** 2 / ((M + 1) * (M - 2)) * (square - trace.square() / (M - 1))
    return TraceMoments(
        trace=trace,
        variance=trace.square() - squared_trace,
        gaussian=2.0 / (M - 1) * gaussian_square.clamp_min(0.0),
        squared_trace=squared_trace,
        trace_of_square=trace_of_square,
        cumulant=cumulant,
    )


def direction_moments(P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sample variances along directions, their variances and the Gaussian form of these.

    V = [k₄/M + 2s⁴/(M-1)] / (1 + 2/(M-1)) is unbiased for Var s² = κ₄/M + 2σ⁴/(M-1); k₄ is Fisher's k-statistic.

    Args:
        P: projections ⟨v_k, g_im⟩, (n, M, K), M ≥ 2.

    Returns:
        s², V and 2s⁴/(M+1), float64 (n, K) each; the last two are NaN for fewer than 4 draws.
    """
    X = centre(P.double(), 1)
    M = X.shape[1]
    square = X.square().sum(1)
    variance = square / (M - 1)
    if M < MIN_DRAWS_FOR_ERROR:
        nan = torch.full_like(variance, math.nan)
        return variance, nan, nan
    fourth = X.pow(4).sum(1)
    k4 = M * ((M + 1) * fourth - 3 * (M - 1) / M * square.square()) / ((M - 1) * (M - 2) * (M - 3))
    error = (k4 / M + 2 * variance.square() / (M - 1)) / (1 + 2 / (M - 1))
    return variance, error, 2 * variance.square() / (M + 1)


def scale_estimate(values: Tensor, variances: Tensor, gaussian: Tensor, factor: float = 1.0) -> Estimate:
    """Sum of within-sample variances, factor · Σ_i values_i, with its error.

    ν = 2q²/max(ΣV_i, its Gaussian form), q = Σ values_i (Satterthwaite): ν·q/truth is taken as χ²(ν).

    Args:
        values: within-sample variances, float64 (n,).
        variances: unbiased variances of them, NaN for fewer than 4 draws.
        gaussian: their Gaussian form.
        factor: multiplies the sum.

    Returns:
        The estimate; its status is ``"heavy_tailed"`` for ν < 40 and ``"no_error"`` for fewer than 4 draws.
    """
    total, error, floor = float(values.sum()), float(variances.sum()), float(gaussian.sum())
    if math.isnan(error):
        return Estimate(factor * total, math.nan, math.nan, "no_error", scale=True)
    error = max(error, floor)
    if total <= 0.0 or error <= 0.0:
        return Estimate(factor * total, 0.0, math.inf, "ok", scale=True)
    dof = 2.0 * total**2 / error
    return Estimate(
        factor * total, factor * math.sqrt(error), dof, "ok" if dof >= MIN_DOF else "heavy_tailed", scale=True
    )


def direction_estimates(P: Tensor, factor: float) -> list[Estimate]:
    """Variance along each direction, factor · Σ_i s_i², from P as in :func:`direction_moments`."""
    variance, error, gaussian = direction_moments(P)
    return [scale_estimate(variance[:, k], error[:, k], gaussian[:, k], factor) for k in range(P.shape[2])]


def effective_samples(moments: TraceMoments) -> float:
    """N_e = (Σσ_i²)² / Σσ_i⁴, σ_i² = tr C_i: how many samples carry the noise, between 1 and n.

    Both sums are estimated without bias: Σσ_i⁴ from disjoint pairs of draws, (Σσ_i²)² less the variance of Σσ̂_i².

    Returns:
        N_e, kept in [1, n]; NaN for fewer than 4 draws; 0 when there is no noise.
    """
    n = len(moments.trace)
    numerator = float(moments.trace.sum()) ** 2 - float(moments.variance.sum())
    if math.isnan(numerator):
        return math.nan
    if not bool((moments.trace > 0).any()):
        return 0.0
    denominator = float(moments.squared_trace.sum())
    return float(n) if denominator <= 0.0 else min(max(numerator / denominator, 1.0), float(n))


def kurtosis(moments: TraceMoments) -> float:
    """Excess kurtosis over masks, K = 2 Σ_i κ_i / Σ_i [(tr C_i)² + tr C_i²]; 0 for Gaussian noise.

    In one dimension it is Σκ₄ / Σσ⁴. It is the K for which the mean square error of the estimated covariance is
    (K/M + 2/(M-1)) · ½ Σ_i [(tr C_i)² + tr C_i²].

    Returns:
        K ≥ -2; NaN for fewer than 4 draws; 0 when there is no noise.
    """
    denominator = float((moments.squared_trace + moments.trace_of_square).sum())
    if math.isnan(denominator):
        return math.nan
    return 0.0 if denominator <= 0.0 else max(2.0 * float(moments.cumulant.sum()) / denominator, -2.0)


def gain(samples: float, excess: float) -> float:
    """G = (K + 2N_e) / (K + 2): full-batch draws that one draw of every sample is worth.

    The variance of a variance estimated from D full-batch draws is (K/N_e + 2)/D, from M draws of each sample
    (K + 2)/(N_e M), relative to its square; D = G·M makes them equal.

    Args:
        samples: N_e.
        excess: K.

    Returns:
        G ≥ 1; NaN when either is unknown.
    """
    if math.isnan(samples) or math.isnan(excess):
        return math.nan
    return math.inf if excess <= -2.0 else max((excess + 2.0 * samples) / (excess + 2.0), 1.0)


def split_traces(sample_grams: Tensor, draw_gram: Tensor) -> tuple[Estimate, Estimate]:
    """Traces of B/n and (W + B)/n, with errors from a jackknife over draws (Student's t, M-1 degrees of freedom).

    tr B = [Σ_i ‖ḡ_i‖² - n‖ḡ‖²]/(n-1) - tr W/M.

    Args:
        sample_grams: ⟨g_im, g_il⟩, float64 (n, M, M).
        draw_gram: Gram matrix of the full-batch gradients (1/n) Σ_i g_im of each draw, float64 (M, M).

    Returns:
        The two estimates; without errors for fewer than 4 draws.
    """
    n, M = sample_grams.shape[:2]
    # Removing the mean first costs nothing in exactness: both traces are differences of sums over pairs of draws.
    sums = sample_grams.sum(0)
    noise = centre(centre(sample_grams, 1), 2).diagonal(dim1=1, dim2=2).sum(0)

    def traces(kept: list[int]) -> tuple[float, float]:
        m = len(kept)
        grid = torch.tensor(kept)
        means = float(sums[grid][:, grid].sum() - n * n * draw_gram[grid][:, grid].sum() / n) / m**2
        if m == M:
            W = float(noise.sum()) / (M - 1) / n
        else:
            part = sample_grams[:, grid][:, :, grid]
            W = float((part.diagonal(dim1=1, dim2=2).sum() - part.sum() / m) / max(m - 1, 1)) / n
        B = means / (n - 1) - W / m
        return B / n, (W + B) / n

    values = traces(list(range(M)))
    if M < MIN_DRAWS_FOR_ERROR:
        return tuple(Estimate(v, math.nan, math.nan, "no_error") for v in values)  # type: ignore[return-value]
    left = torch.tensor([traces([other for other in range(M) if other != m]) for m in range(M)], dtype=torch.float64)
    errors = ((left - left.mean(0)).square().sum(0) * (M - 1) / M).sqrt().tolist()
    return tuple(Estimate(v, e, M - 1) for v, e in zip(values, errors, strict=True))  # type: ignore[return-value]
