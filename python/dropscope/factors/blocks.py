"""Per-sample gradients of some parameters, in the form that is smallest, and what can be computed from them.

Every form answers the same questions for its rows g_r (sample-major, all draws of a sample together): inner products
with vectors, weighted sums, Gram matrices of all rows and of each sample's own rows. Answers of different parameters
add, so a network may mix the forms. N×P gradients are formed only where they are smaller than their factors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from dropscope import kernels
from dropscope.kernels import FirstOperand, Masked

# Numbers of masked rows that are made at once.
_SAMPLE_NUMBERS = 1 << 22


class Block(ABC):
    """Gradients of the rows of one batch with respect to the parameters in ``columns``.

    Attributes:
        rows: number of rows N.
        columns: where the parameters stand in the flat vector.
        form: what blocks must agree in, besides the shapes of their tensors, to be joined.
    """

    rows: int
    columns: tuple[slice, ...]
    form: object = None

    @abstractmethod
    def project(self, Vt: Tensor, out: Tensor) -> None:
        """out[r, k] += ⟨g_r, V_k⟩; Vt: (K, dim), contiguous; out: (N, K)."""

    @abstractmethod
    def accumulate(self, S: Tensor, out: Tensor) -> None:
        """out[k] += Σ_r S[r, k] g_r; S: (N, K), contiguous; out: (K, dim), contiguous."""

    @abstractmethod
    def add_sample_gram(self, out: Tensor) -> None:
        """out[i, m, l] += ⟨g_im, g_il⟩; out: float64 (N/M, M, M)."""

    def add_gram(self, other: Block, out: Tensor) -> None:
        """out[r, q] += ⟨g_r, other g_q⟩.

        Raises:
            NotImplementedError: if this form has products only.
        """
        raise NotImplementedError(f"{type(self).__name__} has products but no Gram matrix ({other.rows} rows)")

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name; empty when nothing is."""
        return {}

    def replace(self, tensors: dict[str, Tensor]) -> Block:
        """The same block on other storage."""
        del tensors
        return self

    def to(self, dtype: torch.dtype) -> Block:
        """The same block with its numbers rounded to a dtype."""
        return self.replace({name: t.to(dtype) if t.is_floating_point() else t for name, t in self.tensors().items()})

    def take(self, draws: int, chosen: slice) -> Block:
        """The rows of some of the ``draws`` draws of every sample."""
        samples = self.rows // draws
        return self.replace(
            {
                name: t if len(t) == samples else t.view(samples, draws, *t.shape[1:])[:, chosen].flatten(0, 1)
                for name, t in self.tensors().items()
            }
        )

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


class FactorBlock(Block):
    """Σ_t b_t a_tᵀ of a (d_out, d_in) weight, and Σ_t b_t of its bias when ``bias``.

    Args:
        A: (N, T, d_in), or (N/M, T, d_in) when the draws share it, or masked rows.
        B: (N, T, d_out).
        weight: columns of the weight.
        bias: columns of the bias, if it has the same uses.
    """

    def __init__(self, A: FirstOperand, B: Tensor, weight: slice, bias: slice | None = None) -> None:
        self.A, self.B, self.weight, self.bias = A, B, weight, bias
        self.rows = B.shape[0]
        self.form = A.mask if isinstance(A, Masked) else None
        self.columns = (weight,) if bias is None else (weight, bias)

    def project(self, Vt: Tensor, out: Tensor) -> None:
        """See :class:`Block`."""
        V = Vt[:, self.weight].view(-1, self.B.shape[2], self.A.shape[2])
        kernels.project(self.A, self.B, V, out)
        if self.bias is not None:
            out += self._bias_rows(out.dtype) @ Vt[:, self.bias].T

    def accumulate(self, S: Tensor, out: Tensor) -> None:
        """See :class:`Block`."""
        target = out[:, self.weight].view(-1, self.B.shape[2], self.A.shape[2])
        kernels.accumulate(self.A, self.B, S, target)
        if self.bias is not None:
            out[:, self.bias] += S.T @ self._bias_rows(S.dtype)

    def add_sample_gram(self, out: Tensor) -> None:
        """See :class:`Block`."""
        n, M = out.shape[:2]
        size = max(1, _SAMPLE_NUMBERS // (M * self.A.shape[1] * self.A.shape[2])) if isinstance(self.A, Masked) else n
        for start in range(0, n, size):
            self._add_sample_gram(out[start : start + size], start)

    def _add_sample_gram(self, out: Tensor, first: int) -> None:
        """Of the samples from ``first``, as many as out has."""
        n, M = out.shape[:2]
        rows = slice(first * M, (first + n) * M)
        wide = torch.promote_types(self.B.dtype, torch.float32)
        A = (self.A.samples(rows.start, rows.stop) if isinstance(self.A, Masked) else self.A).to(wide)
        B = self.B[rows].to(wide)
        T = B.shape[1]
        b = B.reshape(n, M * T, -1)
        bb = (b @ b.mT).double().view(n, M, T, M, T)
        if A.shape[0] == n:
            aa = (A @ A.mT).double().view(n, 1, T, 1, T)
        else:
            a = A.reshape(n, M * T, -1)
            aa = (a @ a.mT).double().view(n, M, T, M, T)
        out += (aa * bb).sum((2, 4))
        if self.bias is not None:
            out += bb.sum((2, 4))

    def add_gram(self, other: Block, out: Tensor) -> None:
        """See :class:`Block`."""
        if not isinstance(other, FactorBlock):
            raise NotImplementedError("a Gram matrix needs the same form of both rows")
        kernels.gram(self.A, self.B, other.A, other.B, out, bias=self.bias is not None)

    def _bias_rows(self, dtype: torch.dtype) -> Tensor:
        return self.B.squeeze(1).to(dtype) if self.B.shape[1] == 1 else self.B.sum(1, dtype=dtype)

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`Block`."""
        if isinstance(self.A, Masked):
            return {"A": self.A.x, "B": self.B, "streams": self.A.streams}
        return {"A": self.A, "B": self.B}

    def replace(self, tensors: dict[str, Tensor]) -> FactorBlock:
        """See :class:`Block`."""
        A: FirstOperand = tensors["A"]
        if isinstance(self.A, Masked):
            A = Masked(tensors["A"], tensors["streams"], *self.A.mask)
        return FactorBlock(A, tensors["B"], self.weight, self.bias)


class DenseBlock(Block):
    """Materialised gradients G, (N, numel), of one parameter."""

    def __init__(self, G: Tensor, columns: slice) -> None:
        self.G, self.rows, self.columns = G, G.shape[0], (columns,)

    def project(self, Vt: Tensor, out: Tensor) -> None:
        """See :class:`Block`."""
        out.addmm_(self.G.to(out.dtype), Vt[:, self.columns[0]].T)

    def accumulate(self, S: Tensor, out: Tensor) -> None:
        """See :class:`Block`."""
        out[:, self.columns[0]] += S.T @ self.G.to(S.dtype)

    def add_sample_gram(self, out: Tensor) -> None:
        """See :class:`Block`."""
        G = self.G.to(torch.promote_types(self.G.dtype, torch.float32)).view(*out.shape[:2], -1)
        out += G @ G.mT

    def add_gram(self, other: Block, out: Tensor) -> None:
        """See :class:`Block`."""
        if not isinstance(other, DenseBlock):
            raise NotImplementedError("a Gram matrix needs the same form of both rows")
        out.addmm_(self.G.to(out.dtype), other.G.to(out.dtype).T)

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`Block`."""
        return {"G": self.G}

    def replace(self, tensors: dict[str, Tensor]) -> DenseBlock:
        """See :class:`Block`."""
        return DenseBlock(tensors["G"], self.columns[0])


def materialise(A: FirstOperand, B: Tensor) -> Tensor:
    """Σ_t b_t a_tᵀ of each row, (N, d_out·d_in)."""
    A = kernels.whole(A)
    if A.shape[0] != B.shape[0]:
        A = A.repeat_interleave(B.shape[0] // A.shape[0], 0)
    return (B.mT @ A).flatten(1)
