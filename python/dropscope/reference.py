"""Pure-torch definition of every kernel: the specification, the fallback and the oracle of the tests.

Each function has the signature of its namesake in :mod:`dropscope.kernels`; arguments are taken as checked.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
PROBE_SITE = 0x70726F62
ProbeKind = Literal["rademacher", "normal"]


def philox4x32_10(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al. 2011) on int64 tensors that hold 32-bit words.

    Args:
        counter: four broadcastable int64 tensors of words.
        key: the two key words.

    Returns:
        Four int64 tensors of words.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)  # type: ignore[no-untyped-call]
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32x32-bit product; split at 16 bits, since int64 has no unsigned product."""
    low, high = word * (factor & 0xFFFF), word * (factor >> 16)
    middle = (low >> 16) + (high & 0xFFFF)
    return (high >> 16) + (middle >> 16), ((middle << 16) | (low & 0xFFFF)) & MASK32


def _words(streams: Tensor, blocks: int, seed: int, site: int) -> Tensor:
    """Output words of mask format 1, int64 (rows, blocks, 4)."""
    counter = (
        torch.arange(blocks, device=streams.device).unsqueeze(0),
        (streams & MASK32).unsqueeze(1),
        ((streams >> 32) & MASK32).unsqueeze(1),
        torch.tensor(site & MASK32, device=streams.device),
    )
    key = (seed & MASK32, ((seed >> 32) ^ (site >> 32)) & MASK32)
    return torch.stack(philox4x32_10(counter, key), -1)


def keep_mask(streams: Tensor, units: int, *, seed: int, site: int, threshold: int) -> Tensor:
    """keep ⇔ lane < threshold, bool (rows, units); lane 2w is the low, 2w+1 the high half of word w."""
    words = _words(streams, -(-units // 8), seed, site)
    lanes = torch.stack((words & 0xFFFF, words >> 16), -1).flatten(1)
    return lanes[:, :units] < threshold


def apply_mask(
    x: Tensor,
    streams: Tensor,
    *,
    seed: int,
    site: int,
    threshold: int,
    group: int = 1,
    skip: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """out = x ∘ mask · 65536/threshold, out of shape (rows, units); row r reads row (skip + r) // group of x."""
    if group > 1:
        x = x[(torch.arange(len(streams), device=x.device) + skip) // group]
    keep = keep_mask(streams, x.shape[1], seed=seed, site=site, threshold=threshold)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale = torch.tensor(65536.0 / threshold, dtype=torch.float64).to(wide)
    result = torch.where(keep, (x.to(wide) * scale).to(x.dtype), torch.zeros((), dtype=x.dtype, device=x.device))
    return result if out is None else out.copy_(result)


def project(A: Tensor, B: Tensor, V: Tensor, out: Tensor) -> None:
    """out[i, k] += Σ_t b_itᵀ V_k a_it.

    A: (N/M, T, d_in), each row shared by M consecutive samples; B: (N, T, d_out); V: (K, d_out, d_in); out: (N, K).
    """
    A = A.repeat_interleave(B.shape[0] // A.shape[0], 0)
    dtype = torch.promote_types(out.dtype, torch.float32)
    out += torch.einsum("nto,koi,nti->nk", B.to(dtype), V.to(dtype), A.to(dtype)).to(out.dtype)


def accumulate(A: Tensor, B: Tensor, S: Tensor, out: Tensor) -> None:
    """out[k] += Σ_i S[i, k] Σ_t b_it a_itᵀ; shapes as in :func:`project`, S: (N, K), out: (K, d_out, d_in)."""
    A = A.repeat_interleave(B.shape[0] // A.shape[0], 0)
    dtype = torch.promote_types(out.dtype, torch.float32)
    out += torch.einsum("nk,nto,nti->koi", S.to(dtype), B.to(dtype), A.to(dtype)).to(out.dtype)


def gram(A: Tensor, B: Tensor, A2: Tensor, B2: Tensor, out: Tensor, *, bias: bool = False) -> None:
    """out[i, j] += ⟨Σ_t b_it ã_itᵀ, Σ_t b'_jt ã'_jtᵀ⟩, out: (N, N'); ã is a with a 1 appended when ``bias``."""
    dtype = torch.promote_types(out.dtype, torch.float32)
    G, G2 = per_sample_gradients(A, B, dtype, bias), per_sample_gradients(A2, B2, dtype, bias)
    out += (G.flatten(1) @ G2.flatten(1).T).to(out.dtype)


def sq_norms(A: Tensor, B: Tensor, *, bias: bool = False) -> Tensor:
    """‖Σ_t b_it ã_itᵀ‖²_F per sample, float64 (N,)."""
    return per_sample_gradients(A, B, torch.float64, bias).flatten(1).square().sum(1)


def center(X: Tensor, draws: int, scale: float = 1.0) -> Tensor:
    """X[i·draws + m] ← scale (X[i·draws + m] − mean over m), in place; X: (n·draws, K)."""
    wide = X.double().view(-1, draws, X.shape[1])
    return X.copy_((scale * (wide - wide.mean(1, keepdim=True))).view(X.shape))


def per_sample_gradients(A: Tensor, B: Tensor, dtype: torch.dtype, bias: bool = False) -> Tensor:
    """Σ_t b_it ã_itᵀ, shape (N, d_out, d_in + bias)."""
    A = A.repeat_interleave(B.shape[0] // A.shape[0], 0).to(dtype)
    if bias:
        A = torch.cat((A, A.new_ones(*A.shape[:-1], 1)), -1)
    return torch.einsum("nto,nti->noi", B.to(dtype), A)


def orthogonalize(Q: Tensor, w: Tensor, *, force: bool = False) -> tuple[Tensor, float, int]:
    """Make w orthogonal, in place, to the orthonormal rows of Q.

    Args:
        Q: (m, dim), orthonormal rows.
        w: (dim,), changed in place.
        force: remove the coefficients whatever their size.

    Returns:
        The coefficients Q w of the w that came in, float64 (m,); the norm of the w that goes out; and whether the
        second read of Q (the removal) was made: 1 or 2 reads. It is skipped when no |coefficient| exceeds 1e-5·‖w‖.
    """
    coefficients = Q.double() @ w.double()
    norm = float(w.double().norm())
    if not force and float(coefficients.abs().amax() if len(coefficients) else 0.0) <= 1e-5 * norm:
        return coefficients, norm, 1
    w.copy_(w.double() - Q.double().T @ coefficients)
    return coefficients, float(w.double().norm()), 2


def rotate(Q: Tensor, S: Tensor) -> None:
    """First k rows of Q ← Sᵀ Q, in place; Q: (m, dim), S: float64 (m, k), k ≤ m."""
    Q[: S.shape[1]] = (S.T @ Q.double()).to(Q.dtype)


def probe(out: Tensor, *, seed: int, index: int, kind: ProbeKind = "rademacher") -> Tensor:
    """Fill the vector ``out`` with probe number ``index``: regenerated from integers, never stored.

    The stream is sample = index, draw = 0, site = PROBE_SITE of mask format 1. Rademacher: unit j is +1 if the top bit
    of its lane is 0. Normal: words 2q and 2q+1 of the stream give units 2q and 2q+1 by Box-Muller in float64.
    """
    n = out.numel()
    stream = torch.tensor([index], dtype=torch.int64, device=out.device)
    if kind == "rademacher":
        keep = keep_mask(stream, n, seed=seed, site=PROBE_SITE, threshold=1 << 15)[0]
        return out.copy_(torch.where(keep, 1.0, -1.0))
    words = _words(stream, -(-n // 4), seed, PROBE_SITE).reshape(-1, 2).double()
    radius = torch.sqrt(-2.0 * torch.log((words[:, 0] + 1.0) * 2.0**-32))
    angle = 2.0 * math.pi * words[:, 1] * 2.0**-32
    return out.copy_(torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), -1).reshape(-1)[:n])
