"""Eigenpairs by thick-restart Lanczos (Wu and Simon 2000), every reported residual confirmed by a true product."""

from __future__ import annotations

import os

import torch
from tqdm import tqdm

from dropscope.operators.base import SymmetricOperator
from dropscope.spectral.checkpoint import Checkpoint
from dropscope.spectral.checks import check_operator, check_seed
from dropscope.spectral.eigenpairs import Eigenpairs, EigenStatus, Which
from dropscope.spectral.krylov import ASYMMETRY
from dropscope.spectral.precision import Precision
from dropscope.spectral.ritz import order
from dropscope.spectral.solver import Solver


def eigsh(
    A: SymmetricOperator,
    k: int = 6,
    which: Which = "LM",
    tol: float = 1e-4,
    max_matvecs: int | None = None,
    seed: int = 0,
    *,
    basis: int | None = None,
    precision: Precision = "full",
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

    With ``precision="mixed"`` the recurrence makes the operator's low-precision products (bfloat16 where the machine
    has units for it) until the error of these, measured on the second vector, dominates. Then the Ritz vectors are
    multiplied in full precision, Rayleigh–Ritz is done there, and Davidson steps, which keep A·Q, follow until the true
    residuals are within tol; where the error is far below tol, two true products of random combinations confirm all
    pairs instead. It pays for loose tolerances (1e-2) where low-precision products are about five times faster. Both
    begin with two steps in full precision; "auto" tries two low-precision products, and goes on in mixed precision only
    where the measured error and times predict a gain. Low-precision products that fail or are off by a
    third are given up. The result's ``precision`` says what was done and why.

    An operator with dim ≤ basis is formed and diagonalised.

    Args:
        A: the operator, float32 or float64.
        k: number of pairs, 1 ≤ k ≤ dim.
        which: "LM" largest magnitude, "LA" largest, "SA" smallest, "BE" half from each end (the odd one is high).
        tol: relative tolerance, in (0, 1).
        max_matvecs: products allowed, of both precisions, at least k + 2; default 40 · basis.
        seed: seed of the start vector; the same seed gives the same bits.
        basis: vectors held, at least k + 3; default max(2k, k + 15); mixed precision may hold as many products.
        precision: "full", "mixed" or "auto".
        checkpoint: file that keeps the state: written every few seconds and when interrupted; an existing one is
            continued, to the same bits as a run that was not interrupted. Removed once every pair has converged;
            kept otherwise, so that a call with more ``max_matvecs`` goes on.
        progress: show a bar with the number of converged pairs and the worst residual relative to the tolerance's
            scale.

    Returns:
        The pairs; see :class:`Eigenpairs` for their order and ``status`` for how it ended.

    Raises:
        TypeError: if A is not a SymmetricOperator of a supported dtype.
        ValueError: if an argument is out of range, precision is "mixed" and A offers no low-precision products, a
            product is not finite (with the step), A is not symmetric or
            changes between products, or the checkpoint belongs to another problem.

    Example:
        >>> A = SymmetricOperator.from_callable(lambda v: v * torch.arange(1.0, 101.0), dim=100)
        >>> eigsh(A, k=2).values.round()
        tensor([100.,  99.], dtype=torch.float64)
    """
    basis = max(2 * k, k + 15) if basis is None and isinstance(k, int) else basis
    budget = _validate(A, k, which, tol, max_matvecs, seed, basis, precision)
    if checkpoint is not None and not isinstance(checkpoint, (str, os.PathLike)):
        raise TypeError(f"eigsh: checkpoint must be a path or None, got {checkpoint!r}")
    if checkpoint is not None and os.path.isdir(checkpoint):
        raise ValueError(f"eigsh: checkpoint must be a file, got the folder {os.fspath(checkpoint)!r}")
    assert basis is not None
    if A.dim <= basis and A.dim <= budget:
        return _dense(A, k, which, tol)
    solver = Solver(A, k, which, tol, budget, seed, min(basis, A.dim - 1), precision)
    if precision == "mixed" and solver.low is None:
        raise ValueError(
            f'eigsh: precision must be "full" or "auto" here, got "mixed": {type(A).__name__} offers no '
            "low-precision products"
        )
    store = None if checkpoint is None else Checkpoint(checkpoint, solver)
    with tqdm(total=k, unit="pair", desc="eigsh", disable=not progress) as bar:
        return solver.run(bar, store)


def _dense(A: SymmetricOperator, k: int, which: Which, tol: float) -> Eigenpairs:
    """Form A, of dim products, and diagonalise it."""
    M = A.to_dense().double()
    scale = float(torch.linalg.matrix_norm(M))
    gap = float(torch.linalg.matrix_norm(M - M.T))
    if gap > ASYMMETRY * scale:
        raise ValueError(f"eigsh: A must be symmetric, got a matrix with |A - A^T| = {gap:.3g}, |A| = {scale:.3g}")
    theta, V = torch.linalg.eigh((M + M.T) / 2)
    chosen = order(theta.cpu(), which)[:k].to(theta.device)
    if which == "BE":
        chosen = chosen.sort(descending=True).values
    vectors, values, norm = V[:, chosen].to(A.dtype), theta[chosen], float(theta.abs().max())
    residuals = torch.linalg.vector_norm(M @ vectors.double() - vectors.double() * values, dim=0).cpu()
    converged = residuals <= tol * norm
    status = EigenStatus.CONVERGED if bool(converged.all()) else EigenStatus.ROUNDING
    return Eigenpairs(values.cpu(), vectors, residuals, converged, status, A.dim, norm, tol, which)


def _validate(
    A: SymmetricOperator,
    k: int,
    which: str,
    tol: float,
    max_matvecs: int | None,
    seed: int,
    basis: int | None,
    precision: str,
) -> int:
    """Refuse bad input; the number of products allowed."""
    check_operator("eigsh", A)
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= A.dim:
        raise ValueError(f"eigsh: k must be an int with 1 <= k <= dim = {A.dim}, got {k!r}")
    if which not in ("LM", "LA", "SA", "BE"):
        raise ValueError(f"eigsh: which must be 'LM', 'LA', 'SA' or 'BE', got {which!r}")
    if not isinstance(tol, (int, float)) or not 0.0 < tol < 1.0:
        raise ValueError(f"eigsh: tol must lie in (0, 1), got {tol!r}")
    if precision not in ("full", "mixed", "auto"):
        raise ValueError(f"eigsh: precision must be 'full', 'mixed' or 'auto', got {precision!r}")
    check_seed("eigsh", seed)
    if not isinstance(basis, int) or basis < min(k + 3, A.dim):
        raise ValueError(f"eigsh: basis must be an int of at least k + 3 = {k + 3}, got {basis!r}")
    budget = 40 * basis if max_matvecs is None else max_matvecs
    if not isinstance(budget, int) or budget < min(k + 2, A.dim):
        raise ValueError(f"eigsh: max_matvecs must be an int of at least k + 2 = {k + 2}, got {max_matvecs!r}")
    return budget
