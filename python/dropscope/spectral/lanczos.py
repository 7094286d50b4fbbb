"""Eigenpairs by thick-restart Lanczos (Wu and Simon 2000), every reported residual confirmed by a true product."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dropscope import kernels
from dropscope.operators.base import SymmetricOperator
from dropscope.spectral.checkpoint import Checkpoint
from dropscope.spectral.checks import check_operator, check_seed
from dropscope.spectral.eigenpairs import Eigenpairs, EigenStatus, Which
from dropscope.spectral.krylov import ASYMMETRY, Krylov, uninterrupted

# Vectors restored at 1e-5 keep residuals below a few 1e-5 of the norm; tighter tolerances take full orthogonalisation.
LOOSEST_FULL = 1e-4
# A random combination with normal coefficients shows its largest term; it is below 1/5 of it in one case of six at the
# very worst, when all errors are parallel.
CONFIRM = 5.0
# Of a random direction, when pairs converge before the basis was full once: enough for missed copies to show, little
# enough to leave the residuals as they are.
STIR = 1e-2


def eigsh(
    A: SymmetricOperator,
    k: int = 6,
    which: Which = "LM",
    tol: float = 1e-4,
    max_matvecs: int | None = None,
    seed: int = 0,
    *,
    basis: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Eigenpairs:
    """The k eigenpairs A v = λ v at an end of the spectrum of a symmetric operator.

    A pair counts as converged when ‖A v − λ v‖ ≤ tol · max |θ|, θ the Ritz values: relative to the norm of A, since
    the rounding of a product is. The error of a value is at most its residual, and about residual² / gap where it
    stands apart. Convergence is never taken from the recurrence alone: one true product of a random combination of
    all pairs must agree with it, else each pair is judged by its own product.

    The basis stays orthogonal, so no value comes twice by rounding. When the Krylov space closes on itself
    (an operator of low rank, multiple eigenvalues), the iteration goes on from fresh random vectors until one of
    them changes nothing. Pairs that converge before the basis was full once are accepted after as many products, with
    a random direction mixed in. A copy of an exactly multiple eigenvalue can still be missed, as in every
    single-vector Krylov method, when the rest of the spectrum keeps the space from closing and tol is loose.

    An operator with dim ≤ basis is formed and diagonalised.

    Args:
        A: the operator, float32 or float64.
        k: number of pairs, 1 ≤ k ≤ dim.
        which: "LM" largest magnitude, "LA" largest, "SA" smallest, "BE" half from each end (the odd one is high).
        tol: relative tolerance, in (0, 1).
        max_matvecs: products allowed, at least k + 2; default 40 · basis.
        seed: seed of the start vector; the same seed gives the same bits.
        basis: vectors held, at least k + 3; default max(2k, k + 15).
        checkpoint: file that keeps the state: written every few seconds and when interrupted; an existing one is
            continued, to the same bits as a run that was not interrupted. Removed once every pair has converged;
            kept otherwise, so that a call with more ``max_matvecs`` goes on.
        progress: show a bar with the number of converged pairs and the worst residual relative to the tolerance's
            scale.

    Returns:
        The pairs; see :class:`Eigenpairs` for their order and ``status`` for how it ended.

    Raises:
        TypeError: if A is not a SymmetricOperator of a supported dtype.
        ValueError: if an argument is out of range, a product is not finite (with the step), A is not symmetric or
            changes between products, or the checkpoint belongs to another problem.

    Example:
        >>> A = SymmetricOperator.from_callable(lambda v: v * torch.arange(1.0, 101.0), dim=100)
        >>> eigsh(A, k=2).values.round()
        tensor([100.,  99.], dtype=torch.float64)
    """
    basis = max(2 * k, k + 15) if basis is None and isinstance(k, int) else basis
    budget = _validate(A, k, which, tol, max_matvecs, seed, basis)
    if checkpoint is not None and not isinstance(checkpoint, (str, os.PathLike)):
        raise TypeError(f"eigsh: checkpoint must be a path or None, got {checkpoint!r}")
    assert basis is not None
    if A.dim <= basis and A.dim <= budget:
        return _dense(A, k, which, tol)
    solver = _Solver(A, k, which, tol, budget, seed, min(basis, A.dim - 1))
    store = None if checkpoint is None else Checkpoint(checkpoint, solver)
    with tqdm(total=k, unit="pair", desc="eigsh", disable=not progress) as bar:
        return solver.run(bar, store)


@dataclass(frozen=True)
class _Ritz:
    """Ritz pairs of the basis, wanted ones first; residuals in two parts, see :meth:`Krylov.residuals`."""

    theta: Tensor
    S: Tensor
    estimates: Tensor
    errors: Tensor
    scale: float


class _Solver:
    """The state of a run; ``run`` goes on from any state that a checkpoint holds."""

    def __init__(
        self, A: SymmetricOperator, k: int, which: Which, tol: float, budget: int, seed: int, capacity: int
    ) -> None:
        self.A, self.k, self.which, self.tol, self.budget, self.seed = A, k, which, tol, budget, seed
        full = A.dtype == torch.float64 or tol < LOOSEST_FULL
        self.krylov = Krylov(A, capacity, seed=seed, full=full)
        self.share = 0.9  # of the tolerance that the recurrence may use; the rest is for what the true product adds
        self.spent = 0  # products made to confirm
        self.discrepancy = 0.0  # what the last combination's product showed beyond the known errors
        self.examined = 0  # step at which the Ritz pairs were looked at last
        self.accept_from = 0  # step before which a fresh random vector has not had its say
        self.settled: list[float] | None = None  # wanted values when the Krylov space last closed

    @property
    def matvecs(self) -> int:
        return self.krylov.steps + self.spent

    def run(self, bar: tqdm[Any], store: Checkpoint | None) -> Eigenpairs:
        if store is None or not store.load():
            self.krylov.start()
        try:
            while (result := self._examine(bar)) is None:
                if self.matvecs >= self.budget - 1:
                    if store is not None:
                        store.save()
                    result = self._out_of_budget()
                    break
                if self.krylov.size == self.krylov.capacity:
                    self._restart()
                self.krylov.advance()
                if store is not None:
                    store.save_if_due()
        except KeyboardInterrupt:
            if store is not None:
                store.save()
            raise
        if store is not None and result.status is EigenStatus.CONVERGED:
            store.remove()
        return result

    def _ritz(self) -> _Ritz:
        size = self.krylov.size
        theta, S = torch.linalg.eigh(self.krylov.T[:size, :size])
        order = _order(theta, self.which)
        theta, S = theta[order], S[:, order]
        return _Ritz(theta, S, *self.krylov.residuals(S), float(theta.abs().max()))

    def _examine(self, bar: tqdm[Any]) -> Eigenpairs | None:
        """The result if it stands; everything that this changes is changed at once, at the end."""
        krylov, k = self.krylov, self.k
        due = krylov.broke or krylov.size == krylov.capacity or krylov.size % max(1, krylov.capacity // 64) == 0
        if self.examined == krylov.steps or krylov.size < 1 or not due:
            return None
        accept_from, settled, result = self.accept_from, self.settled, None
        ritz = self._ritz()
        limit = self.tol * ritz.scale
        if krylov.broke:
            values = ritz.theta[:k].tolist()
            same = settled is not None and max(abs(a - b) for a, b in zip(values, settled, strict=True)) <= limit
            settled = values if krylov.size >= k else None
            accept_from = krylov.steps if same else krylov.steps + krylov.capacity - k
        spent, share, discrepancy, stir = self.spent, self.share, self.discrepancy, 0.0
        if krylov.size >= k:
            estimates = ritz.estimates[:k]
            ready = int((estimates <= share * limit).sum())
            bar.n = ready
            worst = float(estimates.max()) / ritz.scale if ritz.scale else 0.0
            bar.set_postfix(residual=f"{worst:.1e}", products=self.matvecs)
            if ready == k and krylov.steps >= accept_from:
                if settled is None and krylov.steps < krylov.capacity:
                    stir, accept_from = STIR, krylov.capacity
                else:
                    result, spent, share, discrepancy = self._confirm(ritz)
        with uninterrupted():
            if stir:
                krylov.restart(ritz.theta[:k], ritz.S[:, :k].contiguous(), stir)
            self.spent, self.share, self.discrepancy = spent, share, discrepancy
            self.accept_from, self.settled, self.examined = accept_from, settled, krylov.steps
        return result

    def _confirm(self, ritz: _Ritz) -> tuple[Eigenpairs | None, int, float, float]:
        """Hold the recurrence against true products: the result or None, products spent, share, discrepancy."""
        limit, estimates = self.tol * ritz.scale, ritz.estimates[: self.k]
        discrepancy, spent = self._combination(ritz), self.spent + 1
        errors = 2 * ritz.errors[: self.k] + CONFIRM * discrepancy
        bound, floor = estimates + errors, float(errors.max())
        if bool((bound <= limit).all()):
            return self._result(ritz, bound, EigenStatus.CONVERGED, spent), spent, self.share, discrepancy
        if floor > limit / 2 and self.krylov.steps + spent + self.k <= self.budget:
            residuals, spent = self._each(ritz), spent + self.k
            if bool((residuals <= limit).all()):
                return self._result(ritz, residuals, EigenStatus.CONVERGED, spent), spent, self.share, discrepancy
            floor = float((residuals.square() - estimates.square()).clamp(min=0).sqrt().max())
            if floor > limit / 2:
                return self._result(ritz, residuals, EigenStatus.ROUNDING, spent), spent, self.share, discrepancy
        return None, spent, max(0.1, 1.0 - 1.2 * floor / limit), discrepancy

    def _combination(self, ritz: _Ritz) -> float:
        """Hold A y against what the recurrence says it is, for y = Σ gᵢ vᵢ and g standard normal.

        Returns:
            The norm of the difference less twice what the known errors explain; 0 if they explain it.
        """
        k, size, basis = self.k, self.krylov.size, self.krylov.basis
        g = torch.empty(k, dtype=torch.float64)
        kernels.probe(g, seed=self.seed, index=2**31 + self.matvecs, kind="normal")
        S = ritz.S[:, :k]
        s = S @ g
        image = torch.cat((S @ (ritz.theta[:k] * g), (self.krylov.border @ s).reshape(1)))
        product = self.krylov.product(basis[:size].T @ s.to(basis))
        gap = torch.addmv(product, basis[: size + 1].T, image.to(basis), alpha=-1)
        known = math.sqrt(max(0.0, float(s @ self.krylov.errors[:size, :size] @ s)))
        return max(0.0, float(torch.linalg.vector_norm(gap, dtype=torch.float64)) - 2.0 * known)

    def _each(self, ritz: _Ritz) -> Tensor:
        """True residuals ‖A v − θ v‖ of the wanted pairs."""
        basis = self.krylov.basis
        residuals = []
        for i in range(self.k):
            v = basis[: self.krylov.size].T @ ritz.S[:, i].to(basis)
            gap = self.krylov.product(v).sub(v, alpha=float(ritz.theta[i]))
            residuals.append(torch.linalg.vector_norm(gap, dtype=torch.float64))
        return torch.stack(residuals).cpu()

    def _restart(self) -> None:
        ritz = self._ritz()
        keep = _keep(ritz, self.k, self.share * self.tol * ritz.scale)
        self.krylov.restart(ritz.theta[:keep], ritz.S[:, :keep].contiguous())

    def _out_of_budget(self) -> Eigenpairs:
        ritz, spent = self._ritz(), self.spent
        if self.matvecs < self.budget:
            self.discrepancy, spent = self._combination(ritz), spent + 1
        bound = ritz.estimates[: self.k] + 2 * ritz.errors[: self.k] + CONFIRM * self.discrepancy
        done = bool((bound <= self.tol * ritz.scale).all())
        return self._result(ritz, bound, EigenStatus.CONVERGED if done else EigenStatus.MAX_MATVECS, spent)

    def _result(self, ritz: _Ritz, residuals: Tensor, status: EigenStatus, spent: int) -> Eigenpairs:
        order = torch.argsort(ritz.theta[: self.k], descending=True) if self.which == "BE" else torch.arange(self.k)
        basis = self.krylov.basis
        kernels.rotate(basis[: self.krylov.size], ritz.S[:, order].contiguous())
        return Eigenpairs(
            values=ritz.theta[order],
            vectors=basis[: self.k].clone().T,
            residuals=residuals[order],
            converged=residuals[order] <= self.tol * ritz.scale,
            status=status,
            matvecs=self.krylov.steps + spent,
            scale=ritz.scale,
            tol=self.tol,
            which=self.which,
        )


def _order(theta: Tensor, which: Which) -> Tensor:
    """Indices of rising ``theta``, wanted first; every prefix is the wanted set of its size."""
    n = len(theta)
    if which == "LM":
        return torch.argsort(theta.abs(), descending=True, stable=True)
    rising = torch.arange(n)
    if which == "SA":
        return rising
    if which == "LA":
        return rising.flip(0)
    return torch.stack((rising.flip(0), rising), 1).reshape(-1)[:n]


def _keep(ritz: _Ritz, k: int, limit: float) -> int:
    """Ritz vectors to keep at a restart: more as pairs converge, so that they take no room from the others.

    ARPACK's rule and a tenth; on slowly converging ends it needs half the products of rules that maximise the gap
    to the discarded Ritz values, elsewhere the same.
    """
    room = len(ritz.theta) - k
    return k + min(int((ritz.estimates[:k] <= limit).sum()) + room // 10, room // 2)


def _dense(A: SymmetricOperator, k: int, which: Which, tol: float) -> Eigenpairs:
    """Form A, of dim products, and diagonalise it."""
    M = A.to_dense().double()
    scale = float(torch.linalg.matrix_norm(M))
    gap = float(torch.linalg.matrix_norm(M - M.T))
    if gap > ASYMMETRY * scale:
        raise ValueError(f"eigsh: A must be symmetric, got a matrix with |A - A^T| = {gap:.3g}, |A| = {scale:.3g}")
    theta, V = torch.linalg.eigh((M + M.T) / 2)
    chosen = _order(theta.cpu(), which)[:k].to(theta.device)
    if which == "BE":
        chosen = chosen.sort(descending=True).values
    vectors, values, norm = V[:, chosen].to(A.dtype), theta[chosen], float(theta.abs().max())
    residuals = torch.linalg.vector_norm(M @ vectors.double() - vectors.double() * values, dim=0).cpu()
    converged = residuals <= tol * norm
    status = EigenStatus.CONVERGED if bool(converged.all()) else EigenStatus.ROUNDING
    return Eigenpairs(values.cpu(), vectors, residuals, converged, status, A.dim, norm, tol, which)


def _validate(
    A: SymmetricOperator, k: int, which: str, tol: float, max_matvecs: int | None, seed: int, basis: int | None
) -> int:
    """Refuse bad input; the number of products allowed."""
    check_operator("eigsh", A)
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= A.dim:
        raise ValueError(f"eigsh: k must be an int with 1 <= k <= dim = {A.dim}, got {k!r}")
    if which not in ("LM", "LA", "SA", "BE"):
        raise ValueError(f"eigsh: which must be 'LM', 'LA', 'SA' or 'BE', got {which!r}")
    if not isinstance(tol, (int, float)) or not 0.0 < tol < 1.0:
        raise ValueError(f"eigsh: tol must lie in (0, 1), got {tol!r}")
    check_seed("eigsh", seed)
    if not isinstance(basis, int) or basis < min(k + 3, A.dim):
        raise ValueError(f"eigsh: basis must be an int of at least k + 3 = {k + 3}, got {basis!r}")
    budget = 40 * basis if max_matvecs is None else max_matvecs
    if not isinstance(budget, int) or budget < min(k + 2, A.dim):
        raise ValueError(f"eigsh: max_matvecs must be an int of at least k + 2 = {k + 2}, got {max_matvecs!r}")
    return budget
