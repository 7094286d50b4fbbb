"""The one interface that the Hessian, the noise and every sum of them share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


class SymmetricOperator(ABC):
    """A symmetric linear map on flat parameter vectors, known by its products.

    A subclass sets the fields below and defines :meth:`_matmat`; it may offer :meth:`low_precision` and :attr:`block`,
    nothing else is overridden.

    Attributes:
        dim: length of a vector.
        dtype: dtype of vectors.
        device: device of vectors.
        blocks: parameter name -> slice of the flat vector, in order; empty when the operator has no names.
    """

    dim: int
    dtype: torch.dtype
    device: torch.device
    blocks: Mapping[str, slice]

    @abstractmethod
    def _matmat(self, V: Tensor) -> Tensor:
        """Product with the columns of V, shape (dim, k), checked and on the operator's device."""

    def low_precision(self) -> SymmetricOperator | None:
        """Return the same operator by cheaper, less accurate products, or None if there is none.

        Vectors keep their dtype; only the arithmetic inside is shorter. ``eigsh(precision=...)`` measures the error
        and the time of these products before it relies on them, and never takes convergence from them.
        """
        return None

    @property
    def block(self) -> int:
        """Columns that a product takes together at a gain; 1 where it takes them one after the other."""
        return 1

    def __matmul__(self, v: Tensor) -> Tensor:
        """A @ v for a vector (dim,) or A @ V for columns (dim, k).

        Raises:
            TypeError: if v is not a tensor of the operator's dtype.
            ValueError: if its shape or device does not fit, or the product is not finite.
        """
        name = type(self).__name__
        if not isinstance(v, Tensor):
            raise TypeError(f"{name} @ v: v must be a torch.Tensor, got {type(v).__name__}")
        if v.dtype != self.dtype:
            raise TypeError(f"{name} @ v: v must have dtype {self.dtype}, got {v.dtype}")
        if v.ndim not in (1, 2) or v.shape[0] != self.dim:
            raise ValueError(f"{name} @ v: v must have shape ({self.dim},) or ({self.dim}, k), got {tuple(v.shape)}")
        if v.device != self.device:
            raise ValueError(f"{name} @ v: v must be on {self.device}, got {v.device}")
        V = v.detach() if v.ndim == 2 else v.detach().unsqueeze(1)
        out = self._matmat(V) if V.shape[1] else V.clone()
        # A sum is one cheap read; only when it is not finite is it worth knowing whether an entry is to blame.
        if not math.isfinite(float(out.sum())) and not torch.isfinite(out).all():
            where = "v itself is not finite" if not torch.isfinite(v).all() else "v is finite"
            raise ValueError(f"{name} @ v: the product must be finite, got NaN or Inf ({where})")
        return out if v.ndim == 2 else out.squeeze(1)

    @property
    def shape(self) -> tuple[int, int]:
        """(dim, dim)."""
        return self.dim, self.dim

    def __repr__(self) -> str:
        return f"{type(self).__name__}(dim={self.dim}, {self.dtype})"

    def to_scipy(self) -> LinearOperator:
        """Return a :class:`scipy.sparse.linalg.LinearOperator` on numpy vectors with the same products."""
        from scipy.sparse.linalg import LinearOperator

        def product(x: object) -> object:
            v = torch.as_tensor(x).to(self.device, self.dtype)
            return (self @ (v if v.ndim == 2 else v.reshape(-1))).cpu().numpy()

        numpy_dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(self.shape, matvec=product, rmatvec=product, matmat=product, dtype=numpy_dtype)

    def to_dense(self) -> Tensor:
        """Return the matrix, shape (dim, dim); for tests and small problems."""
        return self @ torch.eye(self.dim, dtype=self.dtype, device=self.device)

    def restrict(self, names: str | Sequence[str]) -> SymmetricOperator:
        """Return the diagonal block that belongs to the named parameters.

        Args:
            names: one name or several, in the order that the restricted vectors shall have; a name may end in
                ``*`` and then stands for every parameter that begins with what precedes it.

        Returns:
            P A Pᵀ, P selecting the coordinates of the named parameters.

        Raises:
            TypeError: if names are no strings.
            ValueError: if the operator has no names, or one of them is unknown.
        """
        return Restricted(self, names)

    def __add__(self, other: SymmetricOperator) -> SymmetricOperator:
        if not isinstance(other, SymmetricOperator):
            return NotImplemented
        return Combination([(1.0, self), (1.0, other)])

    def __sub__(self, other: SymmetricOperator) -> SymmetricOperator:
        if not isinstance(other, SymmetricOperator):
            return NotImplemented
        return Combination([(1.0, self), (-1.0, other)])

    def __mul__(self, factor: float) -> SymmetricOperator:
        if not isinstance(factor, (int, float)):
            return NotImplemented
        if not math.isfinite(factor):
            raise ValueError(f"c * A: c must be finite, got {factor}")
        return Combination([(float(factor), self)])

    __rmul__ = __mul__

    def __neg__(self) -> SymmetricOperator:
        return self * -1.0

    @staticmethod
    def from_callable(
        fn: Callable[[Tensor], Tensor],
        dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        low: Callable[[Tensor], Tensor] | None = None,
    ) -> SymmetricOperator:
        """Wrap a product as an operator.

        Args:
            fn: maps a vector of shape (dim,) to A v; called once per column.
            dim: length of a vector.
            dtype: dtype of vectors.
            device: device of vectors.
            low: a cheaper and less accurate ``fn``, which :meth:`low_precision` then offers.

        Returns:
            The operator. It is probed once: ⟨u, A v⟩ = ⟨A u, v⟩ on random u and v.

        Raises:
            TypeError: if fn or low is not callable or dtype is not a floating dtype.
            ValueError: if dim < 1, fn returns another shape, or fn is not symmetric.

        Example:
            >>> A = SymmetricOperator.from_callable(lambda v: 2 * v, dim=3)
            >>> A @ torch.ones(3)
            tensor([2., 2., 2.])
        """
        A = FromCallable(fn, dim, dtype, torch.device(device), low)
        check_symmetric(A, subject="from_callable: fn")
        return A


class FromCallable(SymmetricOperator):
    """See :meth:`SymmetricOperator.from_callable`."""

    def __init__(
        self,
        fn: Callable[[Tensor], Tensor],
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
        low: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if not callable(fn):
            raise TypeError(f"from_callable: fn must be callable, got {type(fn).__name__}")
        if low is not None and not callable(low):
            raise TypeError(f"from_callable: low must be callable or None, got {type(low).__name__}")
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise ValueError(f"from_callable: dim must be a positive int, got {dim!r}")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"from_callable: dtype must be a floating dtype, got {dtype}")
        self.fn, self.low, self.dim, self.dtype, self.device, self.blocks = fn, low, dim, dtype, device, {}

    def low_precision(self) -> SymmetricOperator | None:
        """Return the operator of ``low``; it is not probed, for its rounding need not be symmetric."""
        return None if self.low is None else FromCallable(self.low, self.dim, self.dtype, self.device)

    def _matmat(self, V: Tensor) -> Tensor:
        columns = []
        for v in V.unbind(1):
            column = self.fn(v)
            if not isinstance(column, Tensor) or column.shape != (self.dim,):
                seen = tuple(column.shape) if isinstance(column, Tensor) else type(column).__name__
                raise ValueError(f"from_callable: fn must return a tensor of shape ({self.dim},), got {seen}")
            columns.append(column.detach().to(self.device, self.dtype))
        return torch.stack(columns, 1)


class Combination(SymmetricOperator):
    """Σ cᵢ Aᵢ."""

    def __init__(self, terms: Sequence[tuple[float, SymmetricOperator]]) -> None:
        first = terms[0][1]
        for _, other in terms[1:]:
            for field in ("dim", "dtype", "device"):
                mine, theirs = getattr(first, field), getattr(other, field)
                if mine != theirs:
                    raise ValueError(f"A + B: both must have the same {field}, got {mine} and {theirs}")
        self.terms = list(terms)
        self.dim, self.dtype, self.device = first.dim, first.dtype, first.device
        self.blocks = first.blocks if all(op.blocks == first.blocks for _, op in terms) else {}

    def low_precision(self) -> SymmetricOperator | None:
        """Return the sum in which every term that offers cheaper products makes them."""
        low = [(factor, operator.low_precision()) for factor, operator in self.terms]
        if all(operator is None for _, operator in low):
            return None
        return Combination([(c, cheap or full) for (c, cheap), (_, full) in zip(low, self.terms, strict=True)])

    @property
    def block(self) -> int:
        """The widest of the terms'."""
        return max(operator.block for _, operator in self.terms)

    def _matmat(self, V: Tensor) -> Tensor:
        out = torch.zeros_like(V)
        for factor, operator in self.terms:
            out.add_(operator @ V, alpha=factor)
        return out


class Restricted(SymmetricOperator):
    """P A Pᵀ on the coordinates of some parameters."""

    def __init__(self, operator: SymmetricOperator, names: str | Sequence[str]) -> None:
        if not operator.blocks:
            raise ValueError("restrict: the operator must know parameter names, this one has none")
        wanted = [names] if isinstance(names, str) else list(names) if isinstance(names, Iterable) else [names]
        if not all(isinstance(name, str) for name in wanted):
            raise TypeError(f"restrict: names must be parameter names, got {names!r}")
        chosen: dict[str, slice] = {}
        for name in wanted:
            matches = [b for b in operator.blocks if b == name or (name.endswith("*") and b.startswith(name[:-1]))]
            if not matches:
                raise ValueError(f"restrict: names must be among {list(operator.blocks)}, got {name!r}")
            repeated = [match for match in matches if match in chosen]
            if repeated:
                raise ValueError(f"restrict: names must choose each parameter once, got {repeated[0]!r} twice")
            chosen.update({match: operator.blocks[match] for match in matches})
        if not chosen:
            raise ValueError("restrict: names must choose at least one parameter, got none")
        self.operator, self.dtype, self.device = operator, operator.dtype, operator.device
        self.source = chosen
        self.blocks, start = {}, 0
        for name, where in chosen.items():
            self.blocks[name] = slice(start, start := start + where.stop - where.start)
        self.dim = start

    def low_precision(self) -> SymmetricOperator | None:
        """Return the same block of the operator's cheaper products."""
        low = self.operator.low_precision()
        return None if low is None else Restricted(low, list(self.source))

    @property
    def block(self) -> int:
        """The operator's."""
        return self.operator.block

    def _matmat(self, V: Tensor) -> Tensor:
        full = V.new_zeros(self.operator.dim, V.shape[1])
        for name, where in self.source.items():
            full[where] = V[self.blocks[name]]
        image = self.operator @ full
        return torch.cat([image[where] for where in self.source.values()])


def check_symmetric(operator: SymmetricOperator, seed: int = 0, subject: str = "operator") -> None:
    """Probe ⟨u, A v⟩ = ⟨A u, v⟩ on one random pair.

    Args:
        operator: the operator to probe.
        seed: seed of the pair.
        subject: what the refusal calls it.

    Raises:
        ValueError: if the two inner products differ by more than rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(operator.dim, 2, generator=generator, dtype=torch.float64)
    U = pair.to(operator.device, operator.dtype)
    image = operator @ U
    G = (U.double().T @ image.double()).cpu()
    scale = float(image.double().norm(dim=0).max() * U.double().norm(dim=0).max())
    # Rounding of a product is about sqrt(dim)·eps·scale in the worst reasonable case; a hundred times that is a defect.
    slack = 100 * torch.finfo(operator.dtype).eps * max(1.0, operator.dim**0.5) * scale
    gap = abs(float(G[0, 1] - G[1, 0]))
    if gap > min(slack, 1e-2 * scale):
        raise ValueError(
            f"{subject} must be symmetric, got <u, Av> = {float(G[0, 1]):.6g} and <Au, v> = {float(G[1, 0]):.6g} "
            f"on a random pair (rounding explains {slack:.2g})"
        )
