"""Rayleigh–Ritz in full precision on a space that grows by residuals, the products with it stored (Davidson 1975)."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from dropscope import kernels
from dropscope.operators.base import SymmetricOperator
from dropscope.spectral.eigenpairs import EigenStatus, Which
from dropscope.spectral.krylov import ASYMMETRY, uninterrupted
from dropscope.spectral.ritz import order

# A residual is orthogonal to the space; of one that depends on those just added, this share must be left.
INDEPENDENT = 1e-2
# Between two restarts the worst residual has to fall by this much; else Lanczos in full precision is the better way.
FALL = 5.0


class Davidson:
    """W = A Q for the first ``size`` rows Q of ``vectors``, and H = Qᵀ A Q: every residual W s − θ Q s is a true one.

    Lanczos in low precision leaves Ritz vectors off by its own error. Their products in full precision are made once
    and kept; each round adds the residuals of the pairs that are not there yet.

    Attributes:
        vectors: (rows, dim), orthonormal; ``pending`` rows after the first ``size`` have no product yet.
        images: (rows, dim), the products.
        H: float64 (rows, rows).
        matvecs: products made.
        scale: the norm of A in practice.
        worst: the worst residual at the last restart.
    """

    def __init__(
        self, A: SymmetricOperator, vectors: Tensor, pending: int, k: int, which: Which, tol: float, scale: float
    ) -> None:
        self.A, self.k, self.which, self.tol, self.scale = A, k, which, tol, scale
        self.vectors, self.images = vectors, torch.empty_like(vectors)
        self.H = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
        self.size, self.pending, self.matvecs, self.worst = 0, pending, 0, sys.float_info.max
        self._added = 0

    def multiply(self) -> None:
        """Make the products of the next pending rows: as many as the operator takes together.

        Raises:
            ValueError: if a product is not finite or A is not symmetric.
        """
        start, count = self.size, min(self.pending, self.A.block)
        end = start + count
        rows = self.vectors[start:end]
        try:
            image = (self.A @ (rows[0] if count == 1 else rows.T)).reshape(len(rows.T), -1).T
        except ValueError as error:
            raise ValueError(f"eigsh: Davidson step {self.matvecs + 1}: {error}") from error
        self.images[start:end] = image
        new = (self.vectors[:end] @ image.T).double().cpu()
        # Symmetry tells ⟨q_new, A q_old⟩ and ⟨A q_new, q_old⟩ to be one: two products, made at different times.
        known = (self.images[:end] @ rows.T).double().cpu()
        gap, scale = float((new - known).norm()), max(self.scale, float(self.H.abs().max()))
        if gap > ASYMMETRY * max(scale, float(new.norm())):
            raise ValueError(
                f"eigsh: A must be symmetric and the same at every product: in Davidson step {self.matvecs + 1} "
                f"<q_i, A q_j> and <A q_i, q_j> differ by {gap:.3g} where |A| is about {scale:.3g}"
            )
        new = (new + known) / 2
        with uninterrupted():
            self.H[:end, start:end], self.H[start:end, :end] = new, new.T
            self.size, self.pending, self.matvecs = end, self.pending - count, self.matvecs + count

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Ritz values and coordinates, wanted first."""
        theta, S = torch.linalg.eigh(self.H[: self.size, : self.size])
        chosen = order(theta, self.which)
        self.scale = max(self.scale, float(theta.abs().max()))
        return theta[chosen], S[:, chosen]

    def residuals(self, theta: Tensor, S: Tensor) -> Tensor:
        """‖A y − θ y‖ of the k wanted pairs; those above tol are put, orthonormal, into the rows after the space.

        They become the pending rows only with :meth:`grow`, so that a call without consequences changes nothing.
        """
        limit, size = self.tol * self.scale, self.size
        norms, self._added = torch.empty(self.k, dtype=torch.float64), 0
        for i in range(self.k):
            s = S[:, i].to(self.vectors)
            r = self.images[:size].T @ s
            r.addmv_(self.vectors[:size].T, s, alpha=-float(theta[i]))
            norms[i] = float(torch.linalg.vector_norm(r, dtype=torch.float64))
            row = size + self._added
            if float(norms[i]) <= limit or row >= len(self.vectors):
                continue
            q = self.vectors[row].copy_(r)
            for _ in range(2):
                _, left, _ = kernels.orthogonalize(self.vectors[:row], q, force=True)
            if left > INDEPENDENT * float(norms[i]):
                q.div_(left)
                self._added += 1
        return norms

    def grow(self) -> bool:
        """Take in the residuals of :meth:`residuals`; False if there was none to take in."""
        self.pending = self._added
        return self.pending > 0

    @property
    def crowded(self) -> bool:
        """Whether too few rows are free for a round worth its name."""
        rows = len(self.vectors)
        return rows - self.size < max(1, min(self.k, rows - self.k) // 2)

    def restart(self, S: Tensor, worst: float) -> None:
        """Keep the wanted Ritz vectors and some beyond."""
        kept = max(self.k, min(self.size - 1, self.k + (len(self.vectors) - self.k) // 3))
        S = S[:, :kept].contiguous()
        with uninterrupted():
            kernels.rotate(self.vectors[: self.size], S)
            kernels.rotate(self.images[: self.size], S)
            H = S.T @ self.H[: self.size, : self.size] @ S
            self.H.zero_()[:kept, :kept] = (H + H.T) / 2
            self.size, self.worst = kept, worst

    def round(self, budget: int) -> tuple[EigenStatus | None, Tensor] | None:
        """Make the products that are due and examine the pairs.

        Args:
            budget: products that may still be made.

        Returns:
            How it ended, with the residuals: a status, or None where the residuals fall too slowly; None to go on.
        """
        while self.pending and budget > 0:
            before = self.matvecs
            self.multiply()
            budget -= self.matvecs - before
        theta, S = self.ritz()
        norms = self.residuals(theta, S)
        worst = float(norms.max())
        if worst <= self.tol * self.scale:
            return EigenStatus.CONVERGED, norms
        if budget <= 0:
            return EigenStatus.MAX_MATVECS, norms
        if self.worst == sys.float_info.max:
            self.worst = worst
        elif self.crowded:
            if worst > self.worst / FALL:
                return None, norms
            self.restart(S, worst)
            norms = self.residuals(*self.ritz())
        return None if self.grow() else (None, norms)
