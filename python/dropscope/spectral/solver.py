"""The state of an eigsh run and its iteration: thick-restart Lanczos, in mixed precision with Davidson steps after."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from dropscope import kernels
from dropscope.operators.base import SymmetricOperator
from dropscope.spectral.checkpoint import Checkpoint
from dropscope.spectral.davidson import Davidson
from dropscope.spectral.eigenpairs import Eigenpairs, EigenStatus, Which
from dropscope.spectral.krylov import ASYMMETRY, Krylov, uninterrupted
from dropscope.spectral.precision import CHECKS, CONFIRM, Precision, confirmable, full_products, measure, pays
from dropscope.spectral.ritz import Ritz, guards, keep, order

# Vectors restored at 1e-5 keep residuals below a few 1e-5 of the norm; tighter tolerances take full orthogonalisation.
LOOSEST_FULL = 1e-4
# Of a random direction, when pairs converge before the basis was full once: enough for missed copies to show, little
# enough to leave the residuals as they are, and couplings that the operator's symmetry does not explain small.
STIR = 1e-2
FRESH = 0.1  # the same, where Lanczos goes on from the pairs of low-precision products
FOUND = 0.9  # share of the tolerance that the recurrence may use; the rest is for what the true product adds


class Solver:
    """The state of a run; ``run`` goes on from any state that a checkpoint holds.

    In full precision ``krylov`` is the whole of it. With ``precision`` "mixed" or "auto" the first steps are made in
    full precision and are the trial's yardstick; then the recurrence goes on with them or with those of ``low``. Its
    pairs are held against true products as the others are, and handed to ``davidson`` where these disagree.
    """

    def __init__(
        self,
        A: SymmetricOperator,
        k: int,
        which: Which,
        tol: float,
        budget: int,
        seed: int,
        capacity: int,
        precision: Precision = "full",
    ) -> None:
        self.A, self.k, self.which, self.tol, self.budget, self.seed = A, k, which, tol, budget, seed
        full = A.dtype == torch.float64 or tol < LOOSEST_FULL
        self.krylov = Krylov(A, capacity, seed=seed, full=full)
        self.asked = precision
        self.stage: Literal["undecided", "full", "low", "davidson"] = "full" if precision == "full" else "undecided"
        self.precision = "full"  # with the reason, once decided
        self.davidson: Davidson | None = None
        self.low = A.low_precision() if precision != "full" else None
        self.error = 0.0  # relative, of low-precision products
        self.tried, self.before = 0, 0  # low-precision products of the trial or given up; full ones before the switch
        self.share = FOUND
        self.spent = 0  # full-precision products made to confirm
        self.discrepancy = 0.0  # what the last combination's product showed beyond the known errors
        self.examined = 0  # step at which the Ritz pairs were looked at last
        self.accept_from = 0  # step before which a fresh random vector has not had its say
        self.settled: list[float] | None = None  # wanted values when the Krylov space last closed
        if self.stage == "undecided" and self.low is None:
            self.stage, self.precision = "full", f"full: {type(A).__name__} offers no low-precision products"
        elif self.stage == "undecided" and budget < 2 * capacity + k:
            self.stage, self.precision = "full", "full: max_matvecs leaves no room for mixed precision"

    @property
    def low_matvecs(self) -> int:
        """Low-precision products made."""
        return self.tried + (self.krylov.steps - self.before if self.stage in ("low", "davidson") else 0)

    @property
    def full_matvecs(self) -> int:
        """Full-precision products made."""
        steps = self.before if self.stage in ("low", "davidson") else self.krylov.steps
        return steps + self.spent + (self.davidson.matvecs if self.davidson is not None else 0)

    @property
    def matvecs(self) -> int:
        """Products of both kinds."""
        return self.full_matvecs + self.low_matvecs

    @property
    def _fewest(self) -> int:
        """Products without which Lanczos in full precision, begun anew, would have no k pairs to show."""
        return self.k + 2

    def run(self, bar: tqdm[Any], store: Checkpoint | None) -> Eigenpairs:
        """Iterate to a result.

        Args:
            bar: shows converged pairs and the worst residual.
            store: where the state is kept.
        """
        if store is None or not store.load():
            self.krylov.start()
        try:
            while (result := (self._refine if self.davidson else self._lanczos)(bar, store)) is None:
                pass
        except KeyboardInterrupt:
            if store is not None:
                store.save()
            raise
        if store is not None and result.status is EigenStatus.CONVERGED:
            store.remove()
        return result

    def _lanczos(self, bar: tqdm[Any], store: Checkpoint | None) -> Eigenpairs | None:
        """The result, or None where Davidson steps are to follow."""
        while (result := self._examine(bar)) is None and self.davidson is None:
            reserve = self._fewest if self.stage == "low" else 1
            if self.matvecs >= self.budget - reserve:
                if self.stage == "low":
                    self._hand_over(self._ritz())
                    return None
                if store is not None:
                    store.save()
                return self._out_of_budget()
            if self.stage == "undecided" and self.krylov.steps >= 2:
                self._decide()
            if self.krylov.size == self.krylov.capacity:
                self._restart()
            try:
                self.krylov.advance()
            except ValueError as reason:
                if self.stage != "low":
                    raise
                self.tried += 1
                self._full(f"full: low-precision products failed: {reason}")
            if store is not None:
                store.save_if_due()
        return result

    def _refine(self, bar: tqdm[Any], store: Checkpoint | None) -> Eigenpairs | None:
        """The result, or None where Lanczos in full precision is to follow."""
        davidson = self.davidson
        assert davidson is not None
        while (done := davidson.round(self.budget - self.matvecs)) is None:
            if store is not None:
                store.save_if_due()
            bar.set_postfix_str(f"full precision, products={self.matvecs}")
        status, residuals = done
        if status is None and self.budget - self.matvecs < self._fewest:
            status = EigenStatus.MAX_MATVECS
        if status is None:
            self._full(f"{self.precision}; then full: Davidson steps were slow")
            return None
        bar.n = int((residuals <= self.tol * davidson.scale).sum())
        if store is not None and status is EigenStatus.MAX_MATVECS:
            store.save()
        theta, S = davidson.ritz()
        ritz = Ritz(theta, S, residuals, torch.zeros_like(residuals), davidson.scale)
        return self._result(ritz, residuals, status, davidson.vectors, davidson.size)

    def _decide(self) -> None:
        """Try the low-precision products on a vector whose product is known, and choose."""
        krylov = self.krylov
        assert self.low is not None
        # Of the two vectors whose products are known, the second leans to the ends of the spectrum, as Ritz vectors do.
        q, column = krylov.basis[1], torch.cat((krylov.T[:2, 1], krylov.border[-1:]))
        image = krylov.basis[:3].T @ column.to(q)
        trial = measure(self.low, q, image, krylov.seconds, warm=self.asked == "auto")
        self.tried += trial.products
        if trial.failure:
            self._full(f"full: {trial.failure}")
            return
        if self.asked == "auto" and not pays(trial, self.tol, self.k, krylov.capacity):
            more = full_products(trial.error, self.tol, self.k)
            self._full(
                f"full: a low-precision product takes {trial.ratio:.2g} of a product's time and is off by "
                f"{trial.error:.1g}, so that about {more} full ones would follow"
            )
            return
        with uninterrupted():
            self.stage, self.error, self.before = "low", trial.error, krylov.steps
            self.precision = f"mixed: low-precision products are off by {trial.error:.1g}"
            self.share = FOUND * max(1.0 - 1.2 * trial.error / self.tol, 0.5 * trial.error / self.tol)
            self.lower()

    def lower(self) -> None:
        """Let the recurrence make low-precision products, whose rounding need not be symmetric."""
        assert self.low is not None
        self.krylov.A, self.krylov.full = self.low, False
        self.krylov.asymmetry = max(ASYMMETRY, 5 * self.error)

    def refine(self, pending: int, scale: float) -> Davidson:
        """Begin Davidson steps on the first ``pending`` rows of the basis."""
        self.davidson = Davidson(self.A, self.krylov.basis, pending, self.k, self.which, self.tol, scale)
        self.stage = "davidson"
        return self.davidson

    def _full(self, precision: str) -> None:
        """Go on in full precision: from pairs that low precision found, else anew."""
        krylov, davidson = self.krylov, self.davidson
        if self.stage == "undecided":
            self.stage, self.precision = "full", precision
            return
        with uninterrupted():
            self.tried, self.spent = self.low_matvecs, self.full_matvecs
            self.stage, self.precision, self.davidson = "full", precision, None
            self.share, self.discrepancy, self.examined, self.accept_from, self.settled = FOUND, 0.0, 0, 0, None
            krylov.steps, krylov.norm, self.before, self.error = 0, 0.0, 0, 0.0
            krylov.A, krylov.asymmetry = self.A, ASYMMETRY
            krylov.full = self.A.dtype == torch.float64 or self.tol < LOOSEST_FULL
            if davidson is None:
                krylov.start()
            else:
                g = torch.empty(self.k, dtype=torch.float64)
                kernels.probe(g, seed=self.seed, index=2**31, kind="normal")
                krylov.start_from(davidson.ritz()[1][:, : self.k] @ g, FRESH)

    def _ritz(self) -> Ritz:
        size = self.krylov.size
        theta, S = torch.linalg.eigh(self.krylov.T[:size, :size])
        chosen = order(theta, self.which)
        theta, S = theta[chosen], S[:, chosen]
        return Ritz(theta, S, *self.krylov.residuals(S), float(theta.abs().max()))

    def _examine(self, bar: tqdm[Any]) -> Eigenpairs | None:
        """The result if it stands; everything that this changes is changed at once, at the end."""
        krylov, k = self.krylov, self.k
        due = krylov.size >= k and krylov.size % max(1, krylov.capacity // 64) == 0
        due = due or krylov.broke or krylov.size == krylov.capacity
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
        hand_over = False
        if krylov.size >= k:
            estimates = ritz.estimates[:k]
            ready = int((estimates <= share * limit).sum())
            bar.n = ready
            worst = float(estimates.max()) / ritz.scale if ritz.scale else 0.0
            bar.set_postfix(residual=f"{worst:.1e}", products=self.matvecs)
            found = ready == k and krylov.steps >= accept_from
            if not (found or krylov.broke):
                self.examined = krylov.steps
                return None
            if found:
                if settled is None and krylov.steps < krylov.capacity:
                    stir, accept_from = min(STIR, 0.3 * ASYMMETRY / self.tol), krylov.capacity
                elif self.stage == "low":
                    result, spent, discrepancy = self._confirm_low(ritz)
                    hand_over = result is None
                else:
                    result, spent, share, discrepancy = self._confirm(ritz)
        with uninterrupted():
            if stir:
                krylov.restart(ritz.theta[:k], ritz.S[:, :k].contiguous(), stir)
            self.spent, self.share, self.discrepancy = spent, share, discrepancy
            self.accept_from, self.settled, self.examined = accept_from, settled, krylov.steps
            if hand_over:
                self._hand_over(ritz)
        return result

    def _confirm(self, ritz: Ritz) -> tuple[Eigenpairs | None, int, float, float]:
        """Hold the recurrence against true products: the result or None, products spent, share, discrepancy."""
        limit, estimates = self.tol * ritz.scale, ritz.estimates[: self.k]
        discrepancy, spent = self._combination(ritz, self.full_matvecs), self.spent + 1
        errors = 2 * ritz.errors[: self.k] + CONFIRM * discrepancy
        bound, floor = estimates + errors, float(errors.max())
        if bool((bound <= limit).all()):
            return self._lanczos_result(ritz, bound, EigenStatus.CONVERGED, spent), spent, self.share, discrepancy
        if floor > limit / 2 and self.krylov.steps + spent + self.k <= self.budget:
            residuals, spent = self._each(ritz), spent + self.k
            if bool((residuals <= limit).all()):
                result = self._lanczos_result(ritz, residuals, EigenStatus.CONVERGED, spent)
                return result, spent, self.share, discrepancy
            floor = float((residuals.square() - estimates.square()).clamp(min=0).sqrt().max())
            if floor > limit / 2:
                result = self._lanczos_result(ritz, residuals, EigenStatus.ROUNDING, spent)
                return result, spent, self.share, discrepancy
        return None, spent, max(0.1, 1.0 - 1.2 * floor / limit), discrepancy

    def _confirm_low(self, ritz: Ritz) -> tuple[Eigenpairs | None, int, float]:
        """As :meth:`_confirm`, by combinations only, and only where they are expected to do."""
        spent, discrepancy = self.spent, self.discrepancy
        if not confirmable(self.error, self.tol, self.k):
            return None, spent, discrepancy
        for _ in range(CHECKS):
            found = self._combination(ritz, self.full_matvecs + spent - self.spent)
            discrepancy, spent = max(discrepancy, found), spent + 1
        bound = ritz.estimates[: self.k] + CONFIRM * discrepancy
        if bool((bound <= self.tol * ritz.scale).all()):
            return self._lanczos_result(ritz, bound, EigenStatus.CONVERGED, spent), spent, discrepancy
        return None, spent, discrepancy

    def _combination(self, ritz: Ritz, draw: int) -> float:
        """Hold A y against what the recurrence says it is, for y = Σ gᵢ vᵢ and g standard normal.

        Returns:
            The norm of the difference less twice what the known errors explain; 0 if they explain it.
        """
        k, size, basis = self.k, self.krylov.size, self.krylov.basis
        g = torch.empty(k, dtype=torch.float64)
        kernels.probe(g, seed=self.seed, index=2**31 + draw, kind="normal")
        S = ritz.S[:, :k]
        s = S @ g
        image = torch.cat((S @ (ritz.theta[:k] * g), (self.krylov.border @ s).reshape(1)))
        product = self._true(basis[:size].T @ s.to(basis))
        gap = torch.addmv(product, basis[: size + 1].T, image.to(basis), alpha=-1)
        # In low precision the known errors are only those that are not symmetric: they explain nothing.
        known = math.sqrt(max(0.0, float(s @ self.krylov.errors[:size, :size] @ s))) if self.stage == "full" else 0.0
        return max(0.0, float(torch.linalg.vector_norm(gap, dtype=torch.float64)) - 2.0 * known)

    def _true(self, v: Tensor) -> Tensor:
        """A v in full precision; an error names the step."""
        try:
            return self.A @ v
        except ValueError as error:
            raise ValueError(f"eigsh: Lanczos step {self.krylov.steps + 1}: {error}") from error

    def _each(self, ritz: Ritz) -> Tensor:
        """True residuals ‖A v − θ v‖ of the wanted pairs."""
        basis = self.krylov.basis
        residuals = []
        for i in range(self.k):
            v = basis[: self.krylov.size].T @ ritz.S[:, i].to(basis)
            gap = self._true(v).sub(v, alpha=float(ritz.theta[i]))
            residuals.append(torch.linalg.vector_norm(gap, dtype=torch.float64))
        return torch.stack(residuals).cpu()

    def _restart(self) -> None:
        ritz = self._ritz()
        kept = keep(ritz, self.k, self.share * self.tol * ritz.scale)
        self.krylov.restart(ritz.theta[:kept], ritz.S[:, :kept].contiguous())

    def _hand_over(self, ritz: Ritz) -> None:
        """Make the wanted Ritz vectors, and those that an error could put among them, the space of Davidson steps."""
        krylov, k = self.krylov, self.k
        most = min(krylov.size - k, (len(krylov.basis) - k) // 2 - 1, k, self.budget - self.matvecs - k)
        more = guards(ritz.theta, k, self.error * ritz.scale, most) if most > 0 and self.error > self.tol / 4 else 0
        with uninterrupted():
            kernels.rotate(krylov.basis[: krylov.size], ritz.S[:, : k + more].contiguous())
            self.refine(k + more, ritz.scale)

    def _out_of_budget(self) -> Eigenpairs:
        ritz, spent = self._ritz(), self.spent
        if self.matvecs < self.budget:
            self.discrepancy, spent = self._combination(ritz, self.full_matvecs), spent + 1
        bound = ritz.estimates[: self.k] + 2 * ritz.errors[: self.k] + CONFIRM * self.discrepancy
        done = bool((bound <= self.tol * ritz.scale).all())
        return self._lanczos_result(ritz, bound, EigenStatus.CONVERGED if done else EigenStatus.MAX_MATVECS, spent)

    def _lanczos_result(self, ritz: Ritz, residuals: Tensor, status: EigenStatus, spent: int) -> Eigenpairs:
        self.spent = spent
        return self._result(ritz, residuals, status, self.krylov.basis, self.krylov.size)

    def _result(self, ritz: Ritz, residuals: Tensor, status: EigenStatus, rows: Tensor, size: int) -> Eigenpairs:
        chosen = torch.argsort(ritz.theta[: self.k], descending=True) if self.which == "BE" else torch.arange(self.k)
        kernels.rotate(rows[:size], ritz.S[:, chosen].contiguous())
        return Eigenpairs(
            values=ritz.theta[chosen],
            vectors=rows[: self.k].clone().T,
            residuals=residuals[chosen],
            converged=residuals[chosen] <= self.tol * ritz.scale,
            status=status,
            matvecs=self.full_matvecs,
            scale=ritz.scale,
            tol=self.tol,
            which=self.which,
            low_matvecs=self.low_matvecs,
            precision=self.precision,
        )
