"""The Lanczos recurrence of eigenpairs and densities: a basis that stays orthonormal and its projected matrix."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor

from dropscope import kernels
from dropscope.operators.base import SymmetricOperator

# Rounding leaves couplings of 1e-4 of the norm at the very worst (orthogonality is restored at 1e-5).
ASYMMETRY = 1e-3


class Krylov:
    """A Q = Q T + β q eᵀ, the columns of Q the first ``size`` rows of ``basis`` and q the row after them.

    Three-term recurrence; each new vector is measured against the whole basis (one read) and made orthogonal to it
    when it is not (a second read). T is float64.  Symmetry makes ⟨qᵢ, A qⱼ⟩ known before the product is made, so
    the measurement also tells, at no cost, an operator that is not symmetric or changes from product to product.

    Attributes:
        basis: (capacity + 1, dim), rows orthonormal; row ``size`` is the next vector.
        T: projected matrix, float64 (capacity, capacity): tridiagonal, after a restart with an arrowhead.
        beta: norm of what is left after the last step; 0 after a breakdown.
        norm: the largest ‖A q‖ seen, a lower bound of ‖A‖.
        steps: products made so far, over all restarts.
        broke: whether the last step ended in an invariant subspace, so that the next vector is a fresh random one.
    """

    def __init__(self, A: SymmetricOperator, capacity: int, *, seed: int, full: bool, breakdown: float = 0.0) -> None:
        """Make room; :meth:`start` draws the first vector.

        Args:
            A: the operator.
            capacity: steps that the basis can hold, at most ``A.dim``.
            seed: seed of the start vector and of those drawn after breakdowns.
            full: make every vector orthogonal to the whole basis, measured or not.
            breakdown: β below this share of the norm (or rounding) counts as an invariant subspace.
        """
        self.A, self.seed, self.full = A, seed, full
        self.breakdown = max(breakdown, 4 * torch.finfo(A.dtype).eps)
        self.basis = torch.empty(capacity + 1, A.dim, dtype=A.dtype, device=A.device)
        self.T = torch.zeros(capacity, capacity, dtype=torch.float64)
        self.norm, self.steps, self.index = 0.0, 0, 0
        self.size, self.first, self.beta, self.restore, self.broke = 0, 0, 0.0, False, False

    @property
    def capacity(self) -> int:
        """Steps that the basis can hold."""
        return self.T.shape[0]

    def start(self, index: int = 0, kind: kernels.ProbeKind = "normal") -> None:
        """Begin anew from probe number ``index``."""
        self.T.zero_()
        self.size, self.first, self.beta, self.restore, self.broke = 0, 0, 0.0, False, False
        self._draw(self.basis[0], 0, index, kind)
        self.index = index + 1

    def product(self, v: Tensor) -> Tensor:
        """A v; an error names the step."""
        try:
            return self.A @ v
        except ValueError as error:
            raise ValueError(f"Lanczos step {self.steps + 1}: {error}") from error

    def advance(self) -> None:
        """Make one product and extend the basis by one vector.

        Raises:
            ValueError: if the product is not finite, or the operator is not symmetric.
        """
        j, Q = self.size, self.basis
        w = Q[j + 1]
        w.copy_(self.product(Q[j]))
        found, norm, _ = kernels.orthogonalize(Q[self.first : j + 1], w, force=True)
        found = found.cpu()
        coupling = found[:-1] - self.T[self.first : j, j]
        force = self.full or self.restore
        rest, beta, reads = kernels.orthogonalize(Q[: j + 1], w, force=force)
        alpha, gap = float(found[-1]), float(coupling.norm())
        size = max(self.norm, math.hypot(float(found.norm()), norm))
        if reads == 2:
            removed = rest.cpu()
            for _ in range(2):  # after a removal that left little, rounding has to be removed once more
                if float(rest.norm()) <= beta or beta == 0.0:
                    break
                rest, beta, _ = kernels.orthogonalize(Q[: j + 1], w, force=True)
                removed += rest.cpu()
            alpha, gap = alpha + float(removed[j]), math.hypot(gap, float(removed[:j].norm()))
        if gap > ASYMMETRY * size:
            raise ValueError(
                f"A must be symmetric and the same at every product: at Lanczos step {self.steps + 1} "
                f"<q_i, A q_j> and <A q_i, q_j> "
                f"differ by {gap:.3g} where the largest product has norm {size:.3g}"
            )
        broke = beta <= self.breakdown * size
        if broke:
            beta = 0.0
            if j + 1 < self.A.dim:
                self._draw(w, j + 1, self.index)
        else:
            w.div_(beta)
        with uninterrupted():
            self.T[j, j] = alpha
            if j + 1 < self.capacity:
                self.T[j, j + 1] = self.T[j + 1, j] = beta
            self.restore = reads == 2 and not force
            self.beta, self.norm, self.broke, self.first, self.size = beta, size, broke, j, j + 1
            self.index, self.steps = self.index + int(broke), self.steps + 1

    def restart(self, theta: Tensor, S: Tensor) -> None:
        """Keep the Ritz vectors Q S with values ``theta``; the next vector stays.

        Args:
            theta: float64 (kept,).
            S: eigenvectors of T, float64 (size, kept).
        """
        size, kept = S.shape
        with uninterrupted():
            kernels.rotate(self.basis[:size], S)
            self.basis[kept].copy_(self.basis[size])
            self.T.zero_()
            self.T[:kept, :kept] = theta.diag()
            self.T[kept, :kept] = self.T[:kept, kept] = self.beta * S[-1]
            self.size, self.first, self.restore = kept, 0, True

    def _draw(self, out: Tensor, rows: int, index: int, kind: kernels.ProbeKind = "normal") -> None:
        """Fill ``out`` with a random unit vector orthogonal to the first ``rows`` rows."""
        kernels.probe(out, seed=self.seed, index=index, kind=kind)
        norm = float(torch.linalg.vector_norm(out, dtype=torch.float64))
        for _ in range(2 if rows else 0):
            _, norm, _ = kernels.orthogonalize(self.basis[:rows], out, force=True)
        out.div_(norm)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back while the state of an iteration is changed, so that what is saved then is whole."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    seen: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: seen.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if seen:
        handler(*seen[0])
