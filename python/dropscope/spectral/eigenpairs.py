"""Eigenpairs with their residuals and an honest status."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from dropscope import _files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Which = Literal["LM", "LA", "SA", "BE"]


class EigenStatus(Enum):
    """How the iteration ended; the value is the message, with the remedy."""

    CONVERGED = "every pair's residual is within tol"
    MAX_MATVECS = (
        "max_matvecs ran out before every pair converged: raise max_matvecs, widen the basis, or loosen tol; "
        "with a checkpoint the run goes on from where it stopped"
    )
    ROUNDING = (
        "the rounding of the products keeps residuals above tol: loosen tol, or use an operator in float64 "
        "(the residuals of these pairs are true ones)"
    )
    RANK = "every pair's residual is within tol; k is above the operator's rank, and the values after it are zeros"

    def __str__(self) -> str:
        return f"{self.name.lower()}: {self.value}"


@dataclass(frozen=True, repr=False)
class Eigenpairs:
    """Eigenvalues and eigenvectors of a symmetric operator.

    Attributes:
        values: float64 (k,): "LM" by falling magnitude, "LA" and "BE" falling, "SA" rising.
        vectors: (dim, k), orthonormal columns, dtype and device of the operator.
        residuals: float64 (k,), ‖A v − λ v‖: true ones, or upper bounds confirmed by a true product.
        converged: bool (k,), residual ≤ tol · max |θ|.
        status: how the iteration ended.
        matvecs: full-precision products made, those that confirm included.
        scale: max |θ| over the Ritz values of the last basis, the norm of A in practice.
        tol: the tolerance asked for.
        which: the end of the spectrum asked for.
        low_matvecs: low-precision products made, those of a trial included.
        precision: "full" or "mixed", with the reason where it was decided on the way.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: Tensor
    status: EigenStatus
    matvecs: int
    scale: float
    tol: float
    which: Which
    low_matvecs: int = 0
    precision: str = "full"

    def __repr__(self) -> str:
        count, k = int(self.converged.sum()), len(self.values)
        low = f" and {self.low_matvecs} in low precision" if self.low_matvecs else ""
        lines = [
            f"Eigenpairs({count} of {k} converged, which={self.which}, dim={self.vectors.shape[0]}, "
            f"tol={self.tol:g}, {self.matvecs} products{low})",
            f"  status  {self.status}",
            *([f"  {'precision':<7} {self.precision}"] if self.precision != "full" else []),
            f"  {'':>4}  {'eigenvalue':>15}  {'residual':>9}",
        ]
        for i in range(k):
            mark = "" if bool(self.converged[i]) else "  not converged"
            lines.append(f"  {i:>4}  {float(self.values[i]):>15.8g}  {float(self.residuals[i]):>9.2e}{mark}")
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the pairs as safetensors; :meth:`load` reads them back.

        Args:
            path: where to write.

        Returns:
            The path.
        """
        arrays = {name: getattr(self, name) for name in ("values", "vectors", "residuals", "converged")}
        rest = {name: getattr(self, name) for name in ("matvecs", "scale", "tol", "which", "low_matvecs", "precision")}
        return _files.write_arrays(
            path, arrays, {"kind": "eigenpairs", "status": self.status.name, **rest, **self._more()}
        )

    def _more(self) -> dict[str, Any]:
        """What a subclass writes besides."""
        return {}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Eigenpairs:
        """Read what :meth:`save` wrote, onto the CPU.

        Args:
            path: the file.

        Returns:
            The pairs.

        Raises:
            ValueError: if the file holds something else.
        """
        arrays, rest = _files.read_arrays(path)
        if rest.pop("kind", None) != "eigenpairs":
            raise ValueError(
                f"Eigenpairs.load: path must be a file that Eigenpairs.save wrote, got {os.fspath(path)!r}"
            )
        content: dict[str, Any] = {**arrays, **rest, "status": EigenStatus[rest["status"]]}
        return cls(**{field.name: content[field.name] for field in fields(cls) if field.name in content})

    def plot(self) -> Figure:
        """Draw the eigenvalues with their residuals."""
        from dropscope import plots

        return plots.eigenpairs(self)
