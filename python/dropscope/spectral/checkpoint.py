"""The state of a Lanczos run on disk, written whole or not at all."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError

from dropscope import _files
from dropscope.operators.base import SymmetricOperator
from dropscope.spectral.davidson import Davidson
from dropscope.spectral.krylov import Krylov

EVERY = 5.0  # seconds between two writes, more when a write is slow: at most a twentieth of the time is spent on them
KRYLOV = ("size", "first", "beta", "norm", "index", "restore", "broke", "steps", "seconds")
SOLVER = ("share", "spent", "discrepancy", "examined", "accept_from", "settled")
PRECISION = ("stage", "precision", "error", "tried", "before")
DAVIDSON = ("size", "pending", "matvecs", "scale", "worst")


class Resumable(Protocol):
    """What a checkpoint needs of a solver."""

    A: SymmetricOperator
    krylov: Krylov
    davidson: Davidson | None
    stage: Any
    k: int
    which: Any
    seed: int
    asked: Any

    def lower(self) -> None:
        """Let the recurrence make low-precision products."""

    def refine(self, pending: int, scale: float) -> Davidson:
        """Begin Davidson steps on the first ``pending`` rows of the basis."""


class Checkpoint:
    """Keeps ``solver`` in the file ``path``."""

    def __init__(self, path: str | os.PathLike[str], solver: Resumable) -> None:
        self.path, self.solver = Path(path), solver
        self.next = time.monotonic() + EVERY

    def _identity(self) -> dict[str, Any]:
        s = self.solver
        return {
            "kind": "eigsh checkpoint",
            "dim": s.A.dim,
            "dtype": str(s.A.dtype),
            "k": s.k,
            "which": s.which,
            "seed": s.seed,
            "basis": s.krylov.capacity,
            "precision": s.asked,
        }

    def save(self) -> None:
        """Write the state now."""
        start = time.monotonic()
        krylov, davidson = self.solver.krylov, self.solver.davidson
        state = {name: getattr(krylov, name) for name in KRYLOV}
        state |= {name: getattr(self.solver, name) for name in SOLVER + PRECISION}
        if davidson is None:
            arrays = {"basis": krylov.basis[: krylov.size + 1], "T": krylov.T, "errors": krylov.errors}
            refined = None
        else:
            arrays = {"basis": davidson.vectors[: davidson.size + davidson.pending]}
            arrays |= {"images": davidson.images[: davidson.size], "H": davidson.H}
            refined = {name: getattr(davidson, name) for name in DAVIDSON}
        _files.write_arrays(self.path, arrays, {"identity": self._identity(), "state": state, "davidson": refined})
        end = time.monotonic()
        self.next = end + max(EVERY, 20 * (end - start))

    def save_if_due(self) -> None:
        """Write the state if the last write is long enough ago."""
        if time.monotonic() >= self.next:
            self.save()

    def load(self) -> bool:
        """Take the state from the file; False if there is none.

        Raises:
            ValueError: if the file is no checkpoint, or one of another problem.
        """
        if not self.path.exists():
            return False
        try:
            arrays, metadata = _files.read_arrays(self.path)
        except SafetensorError as error:
            raise ValueError(f"eigsh: checkpoint must be a file that eigsh wrote, got {str(self.path)!r}") from error
        saved = metadata.get("identity", {})
        for name, mine in self._identity().items():
            if saved.get(name) != mine:
                raise ValueError(
                    f"eigsh: checkpoint must belong to this problem, but {name} is {saved.get(name)!r} in "
                    f"{str(self.path)!r} and {mine!r} here"
                )
        solver, krylov, state = self.solver, self.solver.krylov, metadata["state"]
        krylov.basis[: len(arrays["basis"])].copy_(arrays["basis"])
        for owner, names in ((krylov, KRYLOV), (solver, SOLVER + PRECISION)):
            for name in names:
                setattr(owner, name, state[name])
        if solver.stage in ("low", "davidson"):
            solver.lower()
        if refined := metadata["davidson"]:
            davidson = solver.refine(refined["pending"], refined["scale"])
            davidson.images[: len(arrays["images"])].copy_(arrays["images"])
            davidson.H.copy_(arrays["H"])
            for name in DAVIDSON:
                setattr(davidson, name, refined[name])
        else:
            krylov.T.copy_(arrays["T"])
            krylov.errors.copy_(arrays["errors"])
        return True

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)
