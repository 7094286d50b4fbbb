"""Operators whose products go through autograd graphs, kept while they fit in memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from dropscope import kernels
from dropscope.masks import MaskKey
from dropscope.memory import budget, readable, saved_bytes
from dropscope.modes import twice_differentiable
from dropscope.operators.base import SymmetricOperator
from dropscope.problem import Batch, Problem


class Graph(Protocol):
    """One batch's part of an operator, under one mask key, ready for products."""

    def product(self, parameters: Sequence[Tensor], vs: Sequence[Tensor], *, keep: bool) -> Sequence[Tensor] | None:
        """Return the part's product with a vector given by parameter; None if the part is zero."""


class GraphOperator(SymmetricOperator):
    """Σ over batches of a product through the batch's graph; the sum over keys is a mean.

    A subclass defines :meth:`_build`. The operator follows the model: graphs are dropped when a parameter or buffer
    changes.
    """

    def __init__(
        self,
        problem: Problem,
        masks: MaskKey | None = None,
        draws: int | None = None,
        seed: int = 0,
        *,
        memory: int | None = None,
    ) -> None:
        name = type(self).__name__
        self.keys = mask_keys(name, problem, masks, draws, seed)
        self.problem, self.memory = problem, budget(name, memory, problem.device)
        self.dim, self.dtype, self.device, self.blocks = problem.dim, problem.dtype, problem.device, problem.blocks
        self._kept: dict[tuple[int, int], tuple[Graph, int]] = {}  # with its bytes
        self._taken_at: object = None
        self._size = 0.0  # bytes of a graph per element of its batch, measured on the first

    @abstractmethod
    def _build(self, batch: Batch, key: MaskKey | None, weight: float) -> Graph:
        """Return the graph of Σ s / weight over a batch under a key."""

    def __repr__(self) -> str:
        held = readable(sum(size for _, size in self._kept.values()))
        first = self.keys[0]
        masks = "dropout off" if first is None else f"{len(self.keys)} draws from {first}"
        return f"{type(self).__name__}(dim={self.dim}, {masks}, {len(self._kept)} graphs kept in {held})"

    def close(self) -> None:
        """Let go of the kept graphs; the next product builds them anew."""
        self._kept.clear()

    @torch.inference_mode(False)
    def _matmat(self, V: Tensor) -> Tensor:
        problem = self.problem
        problem.check(masks=self.keys[0] is not None)
        state = _state(problem.model)
        if state != self._taken_at:
            self.close()
            self._taken_at = state
        rows = V.T.contiguous()
        wide = torch.float32 if self.dtype in (torch.float16, torch.bfloat16) else self.dtype
        out = torch.zeros(rows.shape, dtype=wide, device=self.device)
        work = self.dim * problem.n / (problem.data.count or 1)
        with twice_differentiable(problem.model, self.device), kernels.faster_products(work):
            self._add(rows, out)
        return out.T.to(self.dtype)

    def _add(self, rows: Tensor, out: Tensor) -> None:
        """Add the products with the rows to the rows of out."""
        parameters = list(self.problem.params.values())
        pairs = [(self._parts(v), self._parts(image)) for v, image in zip(rows, out, strict=True)]
        for graph, keep in self._graphs():
            for j, (vs, images) in enumerate(pairs):
                product = graph.product(parameters, vs, keep=keep or j + 1 < len(pairs))
                if product is not None:
                    torch._foreach_add_(images, [part.detach() for part in product])

    def _parts(self, v: Tensor) -> list[Tensor]:
        """Views of a flat vector in the parameters' shapes."""
        parameters = self.problem.params.values()
        pieces = v.split_with_sizes([p.numel() for p in parameters])
        return [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]

    def _graphs(self) -> Iterator[tuple[Graph, bool]]:
        """Yield each batch's graph under each key, and whether it stays."""
        problem = self.problem
        weight = problem.total_weight * len(self.keys)
        units = (problem.data.count or 0) * len(self.keys)
        if len(self._kept) == units:
            yield from [(graph, True) for graph, _ in self._kept.values()]
            return
        held = sum(size for _, size in self._kept.values())
        largest = max((size for _, size in self._kept.values()), default=0)
        for batch in problem.batches():
            for k, key in enumerate(self.keys):
                place = batch.index, k
                if place in self._kept:
                    yield self._kept[place][0], True
                    continue
                graph, size = self._measured(batch, key, weight)
                largest = max(largest, size)
                # While others are to be rebuilt, one of them must find room beside those that stay.
                others = largest if len(self._kept) + 1 < units else 0
                if held + size + others <= self.memory:
                    self._kept[place] = graph, size
                    held += size
                elif size > self.memory:
                    raise ValueError(
                        f"{type(self).__name__}: memory must hold the graph of one batch, {readable(size)}, got "
                        f"{readable(self.memory)}: use a smaller batch_size"
                    )
                yield graph, place in self._kept
                del graph  # before the next is built

    def _measured(self, batch: Batch, key: MaskKey | None, weight: float) -> tuple[Graph, int]:
        """Build a graph; the bytes of the first are counted, the others' follow from their batches' sizes."""
        counted = nullcontext(None) if self._size else saved_bytes(list(self.problem.params.values()))
        with torch.enable_grad(), counted as taken:
            graph = self._build(batch, key, weight)
        if taken is not None:
            self._size = max(1, taken()) / batch.elements
        return graph, int(self._size * batch.elements)


def mask_keys(
    function: str, problem: Problem, masks: MaskKey | None, draws: int | None, seed: int
) -> list[MaskKey | None]:
    """Return the keys that an operator averages over: none, one, or ``draws`` of a seed.

    Raises:
        TypeError: if problem is not a Problem or masks not a MaskKey.
        ValueError: if both masks and draws are given, or draws < 1.
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"{function}: problem must be a Problem, got {type(problem).__name__}")
    if masks is not None and not isinstance(masks, MaskKey):
        raise TypeError(f"{function}: masks must be a MaskKey or None, got {type(masks).__name__}")
    if draws is None:
        return [masks]
    if masks is not None:
        raise ValueError(f"{function}: masks and draws must not both be given, got {masks} and draws={draws}")
    if not isinstance(draws, int) or draws < 1:
        raise ValueError(f"{function}: draws must be an int >= 1, got {draws!r}")
    return [MaskKey(seed, draw) for draw in range(draws)]


def _state(model: nn.Module) -> object:
    """What changes whenever a parameter or buffer does: addresses, versions, and sums of the bits."""
    tensors = [t for group in (model.parameters(), model.buffers()) for t in group]
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [t.detach().view(bits[t.element_size()]).sum() for t in tensors if t.element_size() in bits and t.ndim]
    where = tuple((t.data_ptr(), t._version) for t in tensors)
    return where, tuple(torch.stack(sums).tolist()) if sums else ()
