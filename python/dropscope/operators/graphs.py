"""Operators whose products go through autograd graphs, kept while they fit in memory."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors  # one call where views one by one would cost a small product more

from dropscope import kernels
from dropscope.masks import MaskKey
from dropscope.memory import Live, budget, readable
from dropscope.modes import fast_bfloat16, twice_differentiable
from dropscope.operators.base import SymmetricOperator
from dropscope.operators.blocks import LEAST, BlockPlan, try_block
from dropscope.operators.fingerprint import Fingerprint
from dropscope.problem import Batch, Problem


class Graph(Protocol):
    """One batch's part of an operator, under one mask key, ready for products."""

    def product(
        self, parameters: Sequence[Tensor], vs: Sequence[Tensor], *, keep: bool, batched: bool = False
    ) -> Sequence[Tensor] | None:
        """Return the part's product with a vector given by parameter; None if the part is zero.

        Args:
            parameters: the parameters.
            vs: the vector's part for each; where ``batched``, several vectors in dim 0.
            keep: whether the graph serves further products.
            batched: take all vectors together.
        """


class GraphOperator(SymmetricOperator):
    """Σ over batches of a product through the batch's graph; the sum over keys is a mean.

    A subclass defines :meth:`_build`. The operator follows the model: every product first looks whether a parameter
    or buffer changed, by the :class:`~dropscope.operators.fingerprint.Fingerprint`, and drops the graphs if so.

    Attributes:
        peak: the most bytes that graphs and the products through them have taken, by the count of tensors alive.
    """

    def __init__(
        self,
        problem: Problem,
        masks: MaskKey | None = None,
        draws: int | None = None,
        seed: int = 0,
        *,
        memory: int | None = None,
        block: int | None = None,
    ) -> None:
        name = type(self).__name__
        self.keys = mask_keys(name, problem, masks, draws, seed)
        self.problem, self.memory = problem, budget(name, memory, problem.device)
        if block is not None and (not isinstance(block, int) or isinstance(block, bool) or block < 1):
            raise ValueError(f"{name}: block must be a positive int or None, got {block!r}")
        self.dim, self.dtype, self.device, self.blocks = problem.dim, problem.dtype, problem.device, problem.blocks
        self.peak = 0
        self._shapes = [p.detach().new_empty(()).expand(p.shape) for p in problem.params.values()]  # without memory
        self._kept: dict[tuple[int, int], tuple[Graph, int]] = {}  # with its bytes
        self._taken_at: Fingerprint | None = None  # the model that the graphs are of
        self._size = 0.0  # bytes of a graph per element of its batch, measured on the first
        self._work = 0.0  # bytes that building it or a product through it takes besides, per element
        self._made: tuple[Sequence[Tensor] | None] | None = None  # the product that was measured, until it is used
        self._columns = None if block is None else BlockPlan(block, "as asked for")
        self._lowered: torch.dtype | None = None  # of autocast

    @abstractmethod
    def _build(self, batch: Batch, key: MaskKey | None, weight: float) -> Graph:
        """Return the graph of Σ s / weight over a batch under a key."""

    def __repr__(self) -> str:
        held = readable(self._held)
        first = self.keys[0]
        masks = "dropout off" if first is None else f"{len(self.keys)} draws from {first}"
        low = "" if self._lowered is None else f", {str(self._lowered).removeprefix('torch.')} products"
        return f"{type(self).__name__}(dim={self.dim}, {masks}{low}, {len(self._kept)} graphs kept in {held})"

    def plan(self) -> str:
        """Return what is kept, what it takes, and how several columns go through it, one line each."""
        units = (self.problem.data.count or 0) * len(self.keys)
        columns = "not tried yet" if self._columns is None else self._columns.reason
        return (
            f"graphs   {len(self._kept)} of {units} kept in {readable(self._held)}, the rest rebuilt in every product\n"
            f"memory   peak {readable(self.peak)} of {readable(self.memory)}\n"
            f"columns  {columns}"
        )

    def close(self) -> None:
        """Let go of the kept graphs; the next product builds them anew."""
        self._kept.clear()

    def low_precision(self) -> SymmetricOperator | None:
        """Return the operator with bfloat16 products; None where float32 is not the dtype or bfloat16 has no units.

        The forward pass runs under autocast, and with it the derivatives: matrix products in bfloat16, losses,
        normalisations and the sums over batches in float32. Graphs take what this operator leaves of ``memory``.
        """
        if self.dtype != torch.float32 or self._lowered is not None or not fast_bfloat16(self.device):
            return None
        return self.lowered()

    def lowered(self) -> GraphOperator:
        """Return the operator with bfloat16 products, whether or not the machine has units for them."""
        low = copy.copy(self)
        low.memory, low.peak = max(1, self.memory - self._held), 0
        low._kept, low._taken_at, low._size, low._work, low._columns = {}, None, 0.0, 0.0, None
        low._lowered = torch.bfloat16
        return low

    @property
    def block(self) -> int:
        """Columns that a product takes together at a gain, found by a trial on the first batch; 1 if there is none."""
        if self._columns is None:
            self @ torch.ones(self.dim, LEAST, dtype=self.dtype, device=self.device)
        return 1 if self._columns is None else self._columns.width

    @property
    def _held(self) -> int:
        return sum(size for _, size in self._kept.values())

    def _matmat(self, V: Tensor) -> Tensor:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return self._matmat(V.clone())
        problem = self.problem
        problem.check(masks=self.keys[0] is not None)
        if self._taken_at is None or self._taken_at.outdated():
            self.close()
            self._taken_at = Fingerprint(problem.model)
        rows = V.T.contiguous()
        wide = torch.float32 if self.dtype in (torch.float16, torch.bfloat16) else self.dtype
        out = torch.zeros(rows.shape, dtype=wide, device=self.device)
        work = self.dim * problem.n / (problem.data.count or 1)
        with kernels.faster_products(work):
            self._add(rows, out)
        return out.T.to(self.dtype)

    def _add(self, rows: Tensor, out: Tensor) -> None:
        """Add the products with the rows to the rows of out."""
        parameters = list(self.problem.params.values())
        self._measurement()  # of a product that was interrupted
        vectors, images = [self._parts(v) for v in rows.unbind()], [self._parts(image) for image in out.unbind()]
        for graph, size, keep in self._graphs(vectors[0]):
            made = self._measurement()
            if self._columns is None and len(vectors) >= LEAST:
                self._columns = try_block(
                    lambda vs, batched, graph=graph: graph.product(parameters, vs, keep=True, batched=batched),  # type: ignore[misc]
                    vectors,
                    self.device,
                )
            width = self._width(size, keep)
            for start in range(0, len(vectors), width):
                end = min(start + width, len(vectors))
                together = end - start > 1
                vs = [torch.stack(c) for c in zip(*vectors[start:end], strict=True)] if together else vectors[start]
                if made is not None and start == 0 and not together:
                    (product,) = made
                else:
                    product = graph.product(parameters, vs, keep=keep or end < len(vectors), batched=together)
                made = None
                if product is not None:
                    _accumulate(product, images[start:end], parameters)
                del product
            del graph  # before the next is built

    def _measurement(self) -> tuple[Sequence[Tensor] | None] | None:
        """Take the product that was measured, if there is one; it is kept no longer."""
        made, self._made = self._made, None
        return made

    def _width(self, size: int, kept: bool) -> int:
        """Columns that go together through a graph of ``size`` bytes: each takes the working memory of a product."""
        width = 1 if self._columns is None else self._columns.width
        if width == 1:
            return 1
        free, work = self.memory - self._held - (0 if kept else size), size * self._work / self._size
        width = max(1, min(width, int(free / max(work, 1.0))))
        self.peak = max(self.peak, self.memory - free + int(width * work))
        return width

    def _parts(self, v: Tensor) -> list[Tensor]:
        """Views of a flat vector in the parameters' shapes."""
        return list(_unflatten_dense_tensors(v, self._shapes))  # type: ignore[no-untyped-call]

    def _graphs(self, first: Sequence[Tensor]) -> Iterator[tuple[Graph, int, bool]]:
        """Yield each batch's graph under each key, its bytes, and whether it stays; the first product is measured."""
        problem = self.problem
        weight = problem.total_weight * len(self.keys)
        units = (problem.data.count or 0) * len(self.keys)
        if len(self._kept) == units:
            yield from [(graph, size, True) for graph, size in self._kept.values()]
            return
        held, largest = self._held, max((size for _, size in self._kept.values()), default=0)
        for batch in problem.batches():
            for k, key in enumerate(self.keys):
                place = batch.index, k
                if place in self._kept:
                    yield *self._kept[place], True
                    continue
                graph, size = self._measured(batch, key, weight, first)
                largest = max(largest, size)
                work = int(largest * self._work / self._size)
                # While others are to be rebuilt, one of them must find room beside those that stay.
                others = largest if len(self._kept) + 1 < units else 0
                if held + size + others + work <= self.memory:
                    self._kept[place] = graph, size
                    held += size
                elif size + work > self.memory:
                    raise ValueError(
                        f"{type(self).__name__}: memory must hold the graph of one batch and a product through it, "
                        f"{readable(size + work)}, got {readable(self.memory)}: use a smaller batch_size"
                    )
                while place not in self._kept and held + size + work > self.memory:  # larger than those before it
                    held -= self._kept.popitem()[1][1]
                self.peak = max(self.peak, held + work + (0 if place in self._kept else size))
                yield graph, size, place in self._kept
                del graph  # before the next is built, as the caller does

    def _measured(self, batch: Batch, key: MaskKey | None, weight: float, vs: Sequence[Tensor]) -> tuple[Graph, int]:
        """Build a graph; the bytes of the first are counted, the others' follow from their batches' sizes.

        So are those of its product with ``vs``, which is left in ``_made``.
        """
        autocast = nullcontext() if self._lowered is None else torch.autocast(self.device.type, self._lowered)
        counted = nullcontext(None) if self._size else Live()
        with torch.enable_grad(), counted as live:
            with autocast, twice_differentiable(self.problem.model, self.device):
                graph = self._build(batch, key, weight)
            if live is not None:
                size = live.alive()
                self._made = (graph.product(list(self.problem.params.values()), vs, keep=True),)
                self._size, self._work = max(1, size) / batch.elements, (live.peak - size) / batch.elements
        return graph, int(self._size * batch.elements)


def _accumulate(product: Sequence[Tensor], images: Sequence[list[Tensor]], parameters: Sequence[Tensor]) -> None:
    """Add each column of a product to its image, by parameter."""
    if len(images) == 1:
        torch._foreach_add_(images[0], list(product))
        return
    for j, image in enumerate(images):
        # A part that depends on no parameter is zero, and comes without columns.
        torch._foreach_add_(
            image, [part[j] if part.dim() > p.dim() else part for part, p in zip(product, parameters, strict=True)]
        )


def mask_keys(
    function: str, problem: Problem, masks: MaskKey | None, draws: int | None, seed: int
) -> list[MaskKey | None]:
    """Return the keys that an operator averages over: none, one, or ``draws`` of a seed.

    Raises:
        TypeError: if problem is not a Problem or masks not a MaskKey.
        ValueError: if both masks and draws are given, draws < 1, or seed is outside [0, 2**64).
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"{function}: problem must be a Problem, got {type(problem).__name__}")
    if masks is not None and not isinstance(masks, MaskKey):
        raise TypeError(f"{function}: masks must be a MaskKey or None, got {type(masks).__name__}")
    if draws is None:
        return [masks]
    if masks is not None:
        raise ValueError(f"{function}: masks and draws must not both be given, got {masks} and draws={draws}")
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise ValueError(f"{function}: draws must be an int >= 1, got {draws!r}")
    return [MaskKey(seed, draw) for draw in range(draws)]
