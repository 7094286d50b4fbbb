"""Errors of the dropout noise, from the draws of every sample alone.

The draws of one sample are independent and identically distributed for fixed data, so the error of a sum over samples
of within-sample variances is the sum of the variances' own within-sample variances. Nothing is resampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

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

    All but ``trace`` are NaN where a sample has fewer than 4 draws.
    """

    trace: Tensor
    variance: Tensor
    gaussian: Tensor
    squared_trace: Tensor
    trace_of_square: Tensor
    cumulant: Tensor


class Split(NamedTuple):
    """Traces of the parts of the gradient noise, by the law of total covariance."""

    dropout: Estimate
    sampling: Estimate
    total: Estimate


def draws_for(trace: Estimate, draws: int, target: float) -> int:
    """Draws that a relative standard error of ``target`` asks for: at most four times as many, ``draws`` if enough."""
    if trace.status == "no_error":
        factor = 2.0
    elif trace.stderr <= target * trace.value:
        return draws
    else:
        factor = (trace.stderr / (target * trace.value)) ** 2
    return max(math.ceil(draws * min(max(1.1 * factor, 1.25), 4.0)), MIN_DRAWS_FOR_ERROR)


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


def in_order(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Values of groups of samples, as (ids, values), in the order of the samples."""
    ids, values = torch.cat([ids for ids, _ in parts]), torch.cat([values for _, values in parts])
    out = torch.empty_like(values)
    out[ids.to(out.device)] = values
    return out


def gathered(parts: Sequence[tuple[Tensor, TraceMoments]]) -> TraceMoments:
    """Moments of groups of samples, as (ids, moments), in the order of the samples."""
    names = [field.name for field in fields(TraceMoments)]
    return TraceMoments(**{name: in_order([(ids, getattr(m, name)) for ids, m in parts]) for name in names})


def bounded(unknown: Tensor, values: Tensor) -> Tensor:
    """Fill what fewer than 4 draws leave unknown beside samples with more: a variance by the square of its value.

    E value² = truth² + variance: so the error is overstated, by little where few draws were given to small values.
    With no sample of 4 draws everything stays NaN.
    """
    nan = torch.isnan(unknown)
    return unknown if bool(nan.all()) else torch.where(nan, values.square(), unknown)


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
        variances: unbiased variances of them; where fewer than 4 draws leave NaN, see :func:`bounded`.
        gaussian: their Gaussian form, likewise.
        factor: multiplies the sum.

    Returns:
        The estimate; its status is ``"heavy_tailed"`` for ν < 40 and ``"no_error"`` if no sample has 4 draws.
    """
    total = float(values.sum())
    error, floor = (float(bounded(part, values).sum()) for part in (variances, gaussian))
    if math.isnan(error):
        return Estimate(factor * total, math.nan, math.nan, "no_error", scale=True)
    error = max(error, floor)
    if total <= 0.0 or error <= 0.0:
        return Estimate(factor * total, 0.0, math.inf, "ok", scale=True)
    dof = 2.0 * total**2 / error
    return Estimate(
        factor * total, factor * math.sqrt(error), dof, "ok" if dof >= MIN_DOF else "heavy_tailed", scale=True
    )


def direction_estimates(projections: Sequence[Tensor], factor: float) -> list[Estimate]:
    """Variance along each direction, factor · Σ_i s_i², from P of groups of samples as in :func:`direction_moments`."""
    parts = zip(*(direction_moments(P) for P in projections), strict=True)
    variance, error, gaussian = (torch.cat(part) for part in parts)
    return [scale_estimate(variance[:, k], error[:, k], gaussian[:, k], factor) for k in range(variance.shape[1])]


def effective_samples(moments: TraceMoments) -> float:
    """N_e = (Σσ_i²)² / Σσ_i⁴, σ_i² = tr C_i: how many samples carry the noise, between 1 and n.

    Both sums are estimated without bias: Σσ_i⁴ from disjoint pairs of draws, (Σσ_i²)² less the variance of Σσ̂_i².
    Samples of fewer than 4 draws beside others enter by :func:`bounded`, which can only lower N_e.

    Returns:
        N_e, kept in [1, n]; NaN if no sample has 4 draws; 0 when there is no noise.
    """
    n = len(moments.trace)
    numerator = float(moments.trace.sum()) ** 2 - float(bounded(moments.variance, moments.trace).sum())
    if math.isnan(numerator):
        return math.nan
    if not bool((moments.trace > 0).any()):
        return 0.0
    denominator = float(bounded(moments.squared_trace, moments.trace).sum())
    return float(n) if denominator <= 0.0 else min(max(numerator / denominator, 1.0), float(n))


def kurtosis(moments: TraceMoments) -> float:
    """Excess kurtosis over masks, K = 2 Σ_i κ_i / Σ_i [(tr C_i)² + tr C_i²]; 0 for Gaussian noise.

    In one dimension it is Σκ₄ / Σσ⁴. It is the K for which the mean square error of the estimated covariance is
    (K/M + 2/(M-1)) · ½ Σ_i [(tr C_i)² + tr C_i²]. Samples of fewer than 4 draws say nothing about it.

    Returns:
        K ≥ -2; NaN if no sample has 4 draws; 0 when there is no noise.
    """
    if bool(torch.isnan(moments.cumulant).all()):
        return math.nan
    denominator = float((moments.squared_trace + moments.trace_of_square).nansum())
    return 0.0 if denominator <= 0.0 else max(2.0 * float(moments.cumulant.nansum()) / denominator, -2.0)


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


def split_traces(groups: Sequence[tuple[Tensor, Tensor]], mean_square: float) -> tuple[Estimate, Estimate]:
    """Traces of B/n and (W + B)/n, with errors for fixed data from a jackknife over the draws of every sample.

    tr B = Σ_i ‖ḡ_i - ḡ‖²/(n-1) - n⁻¹ Σ_i tr Ĉ_i/M_i, Ĉ_i the covariance over the M_i draws of sample i. Samples are
    independent given the data, so the variances of leaving out one draw of one sample add; the sum is taken to have
    Satterthwaite's degrees of freedom, each part having M_i - 1.

    Args:
        groups: for samples of equal numbers of draws: ⟨g_im, g_il⟩, (s, M, M), and ⟨g_im, ḡ⟩, (s, M); float64.
        mean_square: ‖ḡ‖².

    Returns:
        The two estimates; without errors if no sample has 4 draws.
    """
    n = sum(len(gram) for gram, _ in groups)
    values = torch.zeros(2, dtype=torch.float64)
    errors, squares = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    most = 1
    for gram, inner in groups:
        M = gram.shape[1]
        most = max(most, M)
        gap = gram.mean((1, 2)) - 2 * inner.mean(1) + mean_square
        norms = centre(centre(gram, 1), 2).diagonal(dim1=1, dim2=2)
        trace = norms.sum(1) / max(M - 1, 1)
        values += _traces(gap.sum() / (n - 1), trace.sum(), M, n).cpu()
        if M == 1:
            continue
        # What leaving out draw m does to ‖ḡ_i - ḡ‖² summed over samples, and to tr Ĉ_i.
        along = centre(gram.mean(2) - inner, 1)
        change = norms * ((1 - 1 / n) / (M - 1) ** 2) - along * (2 / (M - 1))
        left = trace[:, None] if M == 2 else (norms.sum(1, keepdim=True) - norms * (M / (M - 1))) / (M - 2)
        moved = _traces(change / (n - 1), left, M - 1, n) - _traces(torch.zeros_like(change), trace[:, None], M, n)
        spread = centre(moved, 2).square().sum(2) * ((M - 1) / M)
        if M == 2:  # one draw left has no trace: its square, as in `bounded`
            spread[1] += (trace * ((1 - 1 / M) / n**2)).square()
        errors += spread.sum(1).cpu()
        squares += spread.square().sum(1).cpu() / (M - 1)
    if most < MIN_DRAWS_FOR_ERROR and most > 1:
        return tuple(Estimate(v, math.nan, math.nan, "no_error") for v in values.tolist())  # type: ignore[return-value]
    dofs = torch.where(squares > 0, errors.square() / squares.clamp_min(1e-300), math.inf).tolist()
    parts = zip(values.tolist(), errors.sqrt().tolist(), dofs, strict=True)
    return tuple(Estimate(value, error, dof) for value, error, dof in parts)  # type: ignore[return-value]


def _traces(between: Tensor, within: Tensor, draws: int, n: int) -> Tensor:
    """What samples of so many draws add to the traces of B/n and (W + B)/n, stacked."""
    sampling = between / n - within / (draws * n**2)
    return torch.stack((sampling, sampling + within / n**2 + torch.zeros_like(between)))
