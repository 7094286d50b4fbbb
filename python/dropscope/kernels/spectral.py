"""Kernels of the spectral room: Krylov bases kept orthogonal, rotated in place; probes made from integers."""

from __future__ import annotations

import torch
from torch import Tensor

from dropscope import reference
from dropscope.kernels._launch import _core, contiguous_rows, device_of, launch, matrix, on
from dropscope.reference import PROBE_SITE, ProbeKind

_SERVED = (torch.float32, torch.float64, torch.bfloat16)
_LARGEST_BASIS = 2048  # rows that the compiled rotation can hold in its cache block


def _check_basis(name: str, Q: Tensor) -> None:
    if not Q.is_floating_point():
        raise TypeError(f"{name}: Q must be floating point, got {Q.dtype}")
    if Q.dim() != 2:
        raise ValueError(f"{name}: Q must have shape (m, dim), got {tuple(Q.shape)}")


def orthogonalize(Q: Tensor, w: Tensor, *, force: bool = False) -> tuple[Tensor, float, int]:
    """Make w orthogonal, in place, to the orthonormal rows of Q: w ← w − Qᵀ Q w, sums in float64.

    One read of Q gives all coefficients and ‖w‖. The second, which removes them, is made when ``force`` is set or when
    a |coefficient| exceeds 1e-5·‖w‖. The result does not depend on the thread count. Where neither Q nor w
    is float64, runs of 16 products are summed in float32: an error of a coefficient of at most 1e-6·‖w‖, and of about
    6e-8·‖w‖/√dim where rounding is random; products must stay within the range of float32.

    Args:
        Q: (m, dim), orthonormal rows.
        w: (dim,), changed in place.
        force: remove the coefficients whatever their size.

    Returns:
        The coefficients Q w of the w that came in, float64 (m,) on the CPU; the norm of the w that goes out;
        and the reads of Q, 1 or 2. Reading them waits for the device; :func:`orthogonalize_async` does not.

    Raises:
        TypeError: Q or w is not floating point.
        ValueError: shapes disagree.
    """
    result = orthogonalize_async(Q, w, force=force).cpu()
    return result[:-2], float(result[-2]), int(result[-1])


def orthogonalize_async(Q: Tensor, w: Tensor, *, force: bool = False) -> Tensor:
    """:func:`orthogonalize` without waiting for the device, which decides on the second read itself.

    On CUDA it is put on the current stream and can be captured in a graph.

    Args:
        Q: (m, dim), orthonormal rows.
        w: (dim,), changed in place.
        force: remove the coefficients whatever their size.

    Returns:
        float64 (m + 2,) on the device of w: the coefficients, the norm and the reads of Q.

    Raises:
        TypeError: Q or w is not floating point.
        ValueError: shapes disagree.
    """
    _check_basis("orthogonalize", Q)
    if not w.is_floating_point():
        raise TypeError(f"orthogonalize: w must be floating point, got {w.dtype}")
    if w.dim() != 1 or w.shape[0] != Q.shape[1]:
        raise ValueError(f"orthogonalize: w must have shape ({Q.shape[1]},) as a row of Q, got {tuple(w.shape)}")
    served = Q.dtype in _SERVED and w.dtype in _SERVED and contiguous_rows(Q) and contiguous_rows(w.unsqueeze(0))
    device = device_of(Q, w) if served else None
    if device is None:
        coefficients, norm, reads = reference.orthogonalize(Q, w, force=force)
        return torch.cat((coefficients, coefficients.new_tensor([norm, reads])))
    result = torch.empty(Q.shape[0] + 2, dtype=torch.float64, device=w.device)
    scratch = torch.empty(_core.orthogonalize_scratch(device, *Q.shape), dtype=torch.float64, device=w.device)
    with on(device, w):
        _core.orthogonalize(
            device, matrix(Q), matrix(w.unsqueeze(0)), force, result.data_ptr(), scratch.data_ptr(), launch(device, w)
        )
    return result


def rotate(Q: Tensor, S: Tensor) -> None:
    """First k rows of Q ← Sᵀ Q, in place, sums in float64: Ritz vectors and restarts without a second basis.

    Args:
        Q: (m, dim); its rows k and beyond are left as they are.
        S: float64 (m, k), k ≤ m, on the device of Q or on the CPU.

    Raises:
        TypeError: Q is not floating point or S not float64.
        ValueError: shapes disagree.
    """
    _check_basis("rotate", Q)
    if S.dtype != torch.float64:
        raise TypeError(f"rotate: S must be float64, got {S.dtype}")
    if S.dim() != 2 or S.shape[0] != Q.shape[0] or S.shape[1] > S.shape[0]:
        raise ValueError(f"rotate: S must have shape ({Q.shape[0]}, k) with k <= {Q.shape[0]}, got {tuple(S.shape)}")
    served = Q.dtype in _SERVED and Q.shape[0] <= _LARGEST_BASIS and contiguous_rows(Q)
    S = S.to(Q.device, non_blocking=True).contiguous()
    device = device_of(Q, S) if served else None
    if device is None:
        return reference.rotate(Q, S)
    with on(device, Q):
        return _core.rotate(device, matrix(Q), S.data_ptr(), S.shape[1], launch(device, Q))


def probe(out: Tensor, *, seed: int, index: int, kind: ProbeKind = "rademacher") -> Tensor:
    """Fill the vector ``out`` with probe number ``index``: regenerated from integers, never stored.

    Args:
        out: (dim,), floating point.
        seed: 64-bit seed.
        index: which probe, in 0..2³²-1.
        kind: "rademacher" (±1, each with probability ½) or "normal" (standard normal).

    Returns:
        out.

    Raises:
        TypeError: out is not floating point.
        ValueError: out is not a vector, or a number or the kind is not one of those allowed.
    """
    if not out.is_floating_point():
        raise TypeError(f"probe: out must be floating point, got {out.dtype}")
    if out.dim() != 1:
        raise ValueError(f"probe: out must be a vector, got shape {tuple(out.shape)}")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"probe: seed must be in 0..2^64-1, got {seed}")
    if not 0 <= index < 1 << 32:
        raise ValueError(f"probe: index must be in 0..2^32-1, got {index}")
    if kind not in ("rademacher", "normal"):
        raise ValueError(f"probe: kind must be 'rademacher' or 'normal', got {kind!r}")
    row = out.unsqueeze(0)
    device = device_of(out) if out.dtype in _SERVED and contiguous_rows(row) else None
    if device is None:
        return reference.probe(out, seed=seed, index=index, kind=kind)
    with on(device, out):
        _core.probe(device, matrix(row), index, seed, PROBE_SITE, kind == "normal", launch(device, out))
    return out
