"""The Lanczos recurrence of eigenpairs and densities: a basis that stays orthonormal and its projected matrix."""

from __future__ import annotations

import math
import signal
import threading
import time
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
    """A Q = Q T + q borderᵀ + E, the columns of Q the first ``size`` rows of ``basis`` and q the row after them.

    Three-term recurrence; each new vector is measured against the whole basis (one read) and made orthogonal to it
    when it is not (a second read). T is float64.  Symmetry makes ⟨qᵢ, A qⱼ⟩ known before the product is made, so
    the measurement also tells, at no cost, an operator that is not symmetric or changes from product to product.

    Attributes:
        basis: (capacity + 1, dim), rows orthonormal; row ``size`` is the next vector.
        T: projected matrix, float64 (capacity, capacity): tridiagonal, after a restart with an arrowhead.
        errors: EᵀE, E what was removed or dropped although T does not hold it: rounding, the loss of orthogonality,
            a stirred vector; float64 (capacity, capacity).
        beta: norm of what is left after the last step; 0 after a breakdown.
        norm: the largest ‖A q‖ seen, a lower bound of ‖A‖.
        steps: products made so far, over all restarts.
        asymmetry: share of ``norm`` from which a coupling that T cannot hold is a defect of the operator.
        seconds: what the last product took.
        broke: whether the last step ended in an invariant subspace, so that the next vector is a fresh random one.
    """

    def __init__(self, A: SymmetricOperator, capacity: int, *, seed: int, full: bool, function: str = "eigsh") -> None:
        """Make room; :meth:`start` draws the first vector.

        Args:
            A: the operator.
            capacity: steps that the basis can hold, at most ``A.dim``.
            seed: seed of the start vector and of those drawn after breakdowns.
            full: make every vector orthogonal to the whole basis, measured or not.
            function: what refusals name.
        """
        self.A, self.seed, self.full, self.function = A, seed, full, function
        self.asymmetry, self.seconds = ASYMMETRY, 0.0
        self.breakdown = 16 * torch.finfo(A.dtype).eps
        self.basis = torch.empty(capacity + 1, A.dim, dtype=A.dtype, device=A.device)
        self.T = torch.zeros(capacity, capacity, dtype=torch.float64)
        self.errors = torch.zeros(capacity, capacity, dtype=torch.float64)
        self.norm, self.steps, self.index = 0.0, 0, 0
        self.size, self.first, self.beta, self.restore, self.broke = 0, 0, 0.0, False, False

    @property
    def capacity(self) -> int:
        """Steps that the basis can hold."""
        return self.T.shape[0]

    @property
    def border(self) -> Tensor:
        """Coefficients of the next vector in the columns of A Q, float64 (size,): β eᵀ, but after a restart."""
        if self.size < self.capacity:
            return self.T[self.size, : self.size]
        border = torch.zeros(self.size, dtype=torch.float64)
        border[-1] = self.beta
        return border

    def start(self, index: int = 0, kind: kernels.ProbeKind = "normal") -> None:
        """Begin anew from probe number ``index``."""
        self.T.zero_()
        self.errors.zero_()
        self.size, self.first, self.beta, self.restore, self.broke = 0, 0, 0.0, False, False
        self._draw(self.basis[0], 0, index, kind)
        self.index = index + 1

    def start_from(self, s: Tensor, share: float) -> None:
        """Begin anew from Σ sᵢ qᵢ over the first rows qᵢ of ``basis``, a share of a random direction mixed in."""
        kernels.rotate(self.basis[: len(s)], s[:, None].contiguous())
        q, index = self.basis[0], self.index
        self._draw(self.basis[1], 0, index, "normal")
        q.div_(float(torch.linalg.vector_norm(q, dtype=torch.float64))).add_(self.basis[1], alpha=share)
        q.div_(float(torch.linalg.vector_norm(q, dtype=torch.float64)))
        self.T.zero_()
        self.errors.zero_()
        self.size, self.first, self.beta, self.restore, self.broke, self.index = 0, 0, 0.0, False, False, index + 1

    def product(self, v: Tensor) -> Tensor:
        """A v, or A V for columns; an error names the step."""
        start = time.perf_counter()
        try:
            image = self.A @ v
        except ValueError as error:
            raise ValueError(f"{self.function}: Lanczos step {self.steps + 1}: {error}") from error
        self.seconds = time.perf_counter() - start  # @ reads its result: a device has finished by now
        return image

    def advance(self) -> None:
        """Make one product and extend the basis by one vector.

        Raises:
            ValueError: if the product is not finite, or the operator is not symmetric.
        """
        self.extend(self.product(self.basis[self.size]))

    def extend(self, w: Tensor) -> None:
        """Extend the basis by one vector.

        Args:
            w: A q, q being row ``size`` of the basis; overwritten if it is contiguous.

        Raises:
            ValueError: if the operator is not symmetric.
        """
        j, Q = self.size, self.basis
        if w.untyped_storage().data_ptr() == Q.untyped_storage().data_ptr() or not w.is_contiguous():
            w = w.clone(memory_format=torch.contiguous_format)  # an operator may return what it was given
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
        if gap > self.asymmetry * size:
            raise ValueError(
                f"{self.function}: A must be symmetric and the same at every product: at Lanczos step {self.steps + 1} "
                f"<q_i, A q_j> and <A q_i, q_j> "
                f"differ by {gap:.3g} where the largest product has norm {size:.3g} (are products made in a shorter "
                "dtype than the vectors', as under autocast, or is A zero but for rounding?)"
            )
        broke = beta <= self.breakdown * size
        if broke:
            gap, beta = math.hypot(gap, beta), 0.0
            if j + 1 < self.A.dim:
                self._draw(Q[j + 1], j + 1, self.index)
        else:
            torch.div(w, beta, out=Q[j + 1])
        with uninterrupted():
            self.T[j, j], self.errors[j, j] = alpha, gap * gap
            if j + 1 < self.capacity:
                self.T[j, j + 1] = self.T[j + 1, j] = beta
            self.restore = reads == 2 and not force
            self.beta, self.norm, self.broke, self.first, self.size = beta, size, broke, j, j + 1
            self.index, self.steps = self.index + int(broke), self.steps + 1

    def restart(self, theta: Tensor, S: Tensor, stir: float = 0.0) -> None:
        """Keep the Ritz vectors Q S with values ``theta``; the next vector stays.

        Args:
            theta: float64 (kept,).
            S: eigenvectors of T, float64 (size, kept).
            stir: share of a random direction mixed into the next vector, which lets in what the start vector lacked
                (further copies of a multiple eigenvalue); adds that share of β|s| to the residuals.
        """
        size, kept = S.shape
        with uninterrupted():
            kernels.rotate(self.basis[:size], S)
            q, beta = self.basis[kept].copy_(self.basis[size]), self.beta
            errors = S.T @ self.errors[:size, :size] @ S
            if stir:
                aside = beta * stir / math.hypot(1.0, stir) * S[-1]
                errors += torch.outer(aside, aside)
                self._draw(self.basis[kept + 1], kept + 1, self.index)
                q.add_(self.basis[kept + 1], alpha=stir).div_(math.hypot(1.0, stir))
                self.index, beta = self.index + 1, beta / math.hypot(1.0, stir)
            self.T.zero_()
            self.T[:kept, :kept] = theta.diag()
            self.T[kept, :kept] = self.T[:kept, kept] = beta * S[-1]
            self.errors.zero_()[:kept, :kept] = errors
            self.size, self.first, self.restore = kept, 0, True

    def residuals(self, S: Tensor) -> tuple[Tensor, Tensor]:
        """The two parts of ‖A y − θ y‖ for y = Q s and each eigenvector s of T, a column of S: |border · s|, ‖E s‖."""
        errors = (S * (self.errors[: self.size, : self.size] @ S)).sum(0)
        return (self.border @ S).abs(), errors.clamp(min=0.0).sqrt()

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
