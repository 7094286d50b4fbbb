"""Traces from random products: XTrace, Hutch++ and Hutchinson, each with an error whose coverage has been checked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from dropscope import kernels
from dropscope.estimate import Estimate
from dropscope.operators.base import SymmetricOperator
from dropscope.spectral.checks import check_count, check_operator, check_seed
from dropscope.spectral.density import mean_estimate

WIDTH = 8  # vectors that go through the operator together
TraceMethod = Literal["xtrace", "hutch++", "hutchinson"]
ASYMMETRY = 1e-2  # of the compressed operator; products in bfloat16 stay below a third of it
LEAST = {"xtrace": 6, "hutch++": 6, "hutchinson": 2}


def trace(
    A: SymmetricOperator,
    method: TraceMethod = "xtrace",
    matvecs: int = 60,
    seed: int = 0,
    progress: bool = False,
) -> Estimate:
    """Unbiased estimate of tr A, with its error.

    "xtrace" (Epperly, Tropp and Webber 2024, arXiv 2301.07825) is the best where eigenvalues decay, and never much
    worse than the others; it holds matvecs/2 vectors. Its published error takes the leave-one-out estimates for
    independent and is too small (80–90 % coverage of 95 % intervals); the one returned adds their covariance.
    "hutch++" (Meyer, Musco, Musco and Woodruff 2021, arXiv 2010.09649) holds matvecs/3 vectors, "hutchinson" none.

    With matvecs ≥ dim the trace is computed exactly, from dim products.

    Args:
        A: the operator, float32 or float64.
        method: "xtrace", "hutch++" or "hutchinson".
        matvecs: products allowed; at least 6, for Hutchinson 2.
        seed: seed of the random vectors.
        progress: show a bar with the estimate so far.

    Returns:
        The trace, its standard error and the degrees of freedom of that error.

    Raises:
        TypeError: if A is not a SymmetricOperator of a supported dtype.
        ValueError: if an argument is out of range or a product is not finite.

    Example:
        >>> A = SymmetricOperator.from_callable(lambda v: v * torch.arange(1.0, 5.0), dim=4)
        >>> trace(A).value
        10.0
    """
    check_operator("trace", A)
    if method not in LEAST:
        raise ValueError(f"trace: method must be 'xtrace', 'hutch++' or 'hutchinson', got {method!r}")
    check_count("trace", "matvecs", matvecs, LEAST[method])
    check_seed("trace", seed)
    exact = matvecs >= A.dim
    with tqdm(total=A.dim if exact else matvecs, unit="product", desc="trace", disable=not progress) as bar:
        if exact:
            return Estimate(float(exact_diagonal(A, bar).sum()), 0.0)
        run = {"xtrace": _xtrace, "hutch++": _hutch_pp, "hutchinson": _hutchinson}[method]
        return run(A, matvecs, seed, bar)


def _hutchinson(A: SymmetricOperator, matvecs: int, seed: int, bar: tqdm[Any]) -> Estimate:
    """Mean of vᵀ A v over Rademacher vectors."""
    values = torch.empty(0, dtype=torch.float64)
    for V in random_blocks(A, 0, matvecs, seed, "rademacher"):
        values = torch.cat((values, _dots(V, A @ V.T)))
        bar.update(len(V))
        bar.set_postfix_str(repr(mean_estimate(values)))
    return _at_least_rounding(A, mean_estimate(values), float(values.abs().mean()))


def _hutch_pp(A: SymmetricOperator, matvecs: int, seed: int, bar: tqdm[Any]) -> Estimate:
    """Tr Qᵀ A Q, plus Hutchinson on what is orthogonal to Q, an orthonormal basis of A Ω."""
    count = matvecs // 3
    Q = torch.empty(count, A.dim, dtype=A.dtype, device=A.device)
    _sketch(A, Q, seed, bar)
    inside = float(_compression(A, Q, bar).trace())
    values = torch.empty(0, dtype=torch.float64)
    for V in random_blocks(A, count, matvecs - 2 * count, seed, "rademacher"):
        for v in V:
            kernels.orthogonalize(Q, v, force=True)
        values = torch.cat((values, _dots(V, A @ V.T)))
        bar.update(len(V))
        bar.set_postfix_str(f"{inside + float(values.mean()):.6g}")
    rest = mean_estimate(values)
    return _at_least_rounding(A, Estimate(inside + rest.value, rest.stderr, rest.dof), abs(inside))


def _xtrace(A: SymmetricOperator, matvecs: int, seed: int, bar: tqdm[Any]) -> Estimate:
    """Mean over i of tr Pᵢ A + |uᵢ|-corrected uᵢᵀ A uᵢ, Pᵢ onto the images of all vectors but ωᵢ, uᵢ = (I − Pᵢ) ωᵢ."""
    m = matvecs // 2
    Q = torch.empty(m, A.dim, dtype=A.dtype, device=A.device)
    R, W, squares = _sketch(A, Q, seed, bar)
    H = _compression(A, Q, bar)
    if float(R.abs().max()) == 0.0:
        return Estimate(0.0, 0.0, dof=m - 1)
    single, pairs = leave_out(H, R, W, squares, A.dim)
    # e_i = t_i − tr A and e_j are independent but for D_ij = t_i − t_{i without j}, whose mean given ω_j is 0, so
    # Cov(t_i, t_j) = E D_ij D_ji and Var(mean) = E s²/m + Cov, s² the sample variance of the t_i.
    D = single - pairs
    D.fill_diagonal_(0.0)
    covariance = max(float((D * D.T).sum()) / (m * (m - 1)), 0.0)
    value, stderr = float(single.mean()), math.sqrt(float(single.var()) / m + covariance)
    return _at_least_rounding(A, Estimate(value, stderr, dof=m - 1), float(torch.linalg.matrix_norm(H)))


def leave_out(H: Tensor, R: Tensor, W: Tensor, squares: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """XTrace's estimates from each probe, the sketch leaving out that probe, or that probe and another one.

    With A Ω = Q R, the images without probe i span Q (I − sᵢ sᵢᵀ), sᵢ ∝ R⁻ᵀ eᵢ, and symmetry gives every term from
    small matrices: uᵀ A u = w·r − 2 c·r + cᵀ H c with c = (I − s sᵀ) w, w and r the columns of W and R.

    Args:
        H: Qᵀ A Q, float64 (m, m).
        R: float64 (m, m), upper triangular.
        W: Qᵀ Ω, float64 (m, m).
        squares: ‖ωᵢ‖², float64 (m,).
        dim: length of a probe.

    Returns:
        t (m,), and t[i, j] (m, m): from probe j, without the images of i and j; its diagonal means nothing.
    """
    m = len(R)
    S = torch.linalg.solve_triangular(R.T, torch.eye(m, dtype=torch.float64), upper=False)
    S = S / torch.linalg.vector_norm(S, dim=0)
    HS, HW = H @ S, H @ W
    SS, SHS, SW, SHW, SR = S.T @ S, S.T @ HS, S.T @ W, HS.T @ W, S.T @ R
    wr, ww, wHw = (W * R).sum(0), W.square().sum(0), (W * HW).sum(0)
    # a = s_j; b = s_i made orthogonal to it; rows i, columns j.
    aw, ar, aHw, aHa = SW.diagonal(), SR.diagonal(), SHW.diagonal(), SHS.diagonal()
    t = (
        H.trace()
        - aHa
        + (wr - 2 * (wr - aw * ar) + wHw - 2 * aw * aHw + aw.square() * aHa)
        * (dim - m + 1)
        / (squares - ww + aw.square())
    )
    length = (1 - SS.square()).clamp(min=1e-14).sqrt()
    bw, br, bHw = (SW - SS * aw) / length, (SR - SS * ar) / length, (SHW - SS * aHw) / length
    aHb = (SHS - SS * aHa) / length
    bHb = (aHa[:, None] - 2 * SS * SHS + SS.square() * aHa) / length.square()
    cr = wr - aw * ar - bw * br
    cHc = wHw - 2 * (aw * aHw + bw * bHw) + aw.square() * aHa + 2 * aw * bw * aHb + bw.square() * bHb
    scale = (dim - m + 2) / (squares - ww + aw.square() + bw.square())
    return t, H.trace() - aHa - bHb + (wr - 2 * cr + cHc) * scale


def _sketch(A: SymmetricOperator, Q: Tensor, seed: int, bar: tqdm[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Fill the rows of Q with an orthonormal basis of A Ω, Ω normal; R with A Ω = Q R, W = Qᵀ Ω, and ‖ωᵢ‖²."""
    m, eps = len(Q), torch.finfo(A.dtype).eps
    R = torch.zeros(m, m, dtype=torch.float64)
    squares = torch.empty(m, dtype=torch.float64)
    row = 0
    for V in random_blocks(A, 0, m, seed, "normal"):
        Y = A @ V.T
        squares[row : row + len(V)] = torch.linalg.vector_norm(V, dim=1, dtype=torch.float64).square().cpu()
        for y in Y.T:
            q = Q[row].copy_(y)
            first, _, _ = kernels.orthogonalize(Q[:row], q, force=True)
            second, norm, _ = kernels.orthogonalize(Q[:row], q, force=True)
            R[:row, row] = (first + second).cpu()
            size = math.hypot(float(R[:row, row].norm()), norm)
            if norm <= 4 * eps * size:  # the images span no more: any direction will do
                kernels.probe(q, seed=seed, index=2**31 + row, kind="normal")
                for _ in range(2):
                    kernels.orthogonalize(Q[:row], q, force=True)
                norm, length = 4 * eps * size, float(torch.linalg.vector_norm(q, dtype=torch.float64))
            else:
                length = norm
            R[row, row] = norm
            q.div_(length)
            row += 1
        bar.update(len(V))
    W = torch.cat([(Q @ V.T).double().cpu() for V in random_blocks(A, 0, m, seed, "normal")], 1)
    return R, W, squares


def _compression(A: SymmetricOperator, Q: Tensor, bar: tqdm[Any]) -> Tensor:
    """Qᵀ A Q for the rows of Q, float64, symmetric."""
    parts = []
    for rows in torch.split(Q, WIDTH):
        parts.append((Q @ (A @ rows.T)).double().cpu())
        bar.update(len(rows))
    H = torch.cat(parts, 1)
    scale, gap = float(H.norm()), float((H - H.T).norm())
    if gap > ASYMMETRY * scale:
        raise ValueError(
            f"trace: A must be symmetric and the same at every product, got |Q^T A Q - (Q^T A Q)^T| = {gap:.3g} "
            f"where |Q^T A Q| = {scale:.3g}"
        )
    return (H + H.T) / 2


def exact_diagonal(A: SymmetricOperator, bar: tqdm[Any]) -> Tensor:
    """The diagonal from dim products with unit vectors, float64 on the CPU."""
    parts = []
    for start in range(0, A.dim, WIDTH):
        index = torch.arange(start, min(start + WIDTH, A.dim), device=A.device)
        E = torch.zeros(len(index), A.dim, dtype=A.dtype, device=A.device)
        E[torch.arange(len(index), device=A.device), index] = 1.0
        parts.append((A @ E.T).T.gather(1, index[:, None]).squeeze(1).double().cpu())
        bar.update(len(index))
    return torch.cat(parts)


def random_blocks(A: SymmetricOperator, start: int, count: int, seed: int, kind: kernels.ProbeKind) -> Iterator[Tensor]:
    """Probes number start .. start + count − 1, as rows, at most WIDTH at a time."""
    for begin in range(start, start + count, WIDTH):
        V = torch.empty(min(WIDTH, start + count - begin), A.dim, dtype=A.dtype, device=A.device)
        for i, v in enumerate(V):
            kernels.probe(v, seed=seed, index=begin + i, kind=kind)
        yield V


def _dots(V: Tensor, Y: Tensor) -> Tensor:
    """⟨vᵢ, yᵢ⟩ for the rows of V and the columns of Y, summed in float64."""
    return (V * Y.T).sum(1, dtype=torch.float64).cpu()


def _at_least_rounding(A: SymmetricOperator, estimate: Estimate, scale: float) -> Estimate:
    """An error below the rounding of the products is none."""
    floor = torch.finfo(A.dtype).eps * max(abs(estimate.value), scale)
    return Estimate(estimate.value, max(estimate.stderr, floor), estimate.dof, estimate.status)
