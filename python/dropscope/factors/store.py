"""Where the per-sample gradients live: in memory, in bf16, on disk, or made again for every product."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from dropscope.factors.allocation import Allocation, allocate, gradient_norms
from dropscope.factors.blocks import Block, DenseBlock, FactorBlock
from dropscope.factors.capture import join_draws, part_of, record, rows_of
from dropscope.factors.chunk import Chunk, joined
from dropscope.factors.fallback import MatrixFreeBlock, dense_rows, group_size
from dropscope.factors.plan import Plan, draws_masks, make_plan
from dropscope.factors.uses import Factors
from dropscope.masks import MaskKey, Sharing
from dropscope.memory import free_bytes
from dropscope.problem import Batch, Problem

Cache = Literal["auto", "factors", "bf16", "disk", "recompute"]
CACHES = ("auto", "factors", "bf16", "disk", "recompute")
# Shares of the memory that is free: what stored gradients may take, and what one pass may.
STORE_SHARE, PASS_SHARE = 0.5, 0.25
MAX_ROWS_PER_PASS = 4096


class Table:
    """The table g_im of per-sample gradients, i = 1..n, m = 1..M_i, as a sequence of chunks.

    Args:
        problem: the problem.
        draws: mean of the M_i; the draws of sample i are 0..M_i-1 of ``seed``.
        seed: seed of the masks.
        cache: where it lives; ``"auto"`` is ``"factors"`` if it fits, else ``"recompute"``.
        sharing: ``"sample"``, or ``"batch"``: then the one "sample" is the whole data set.
        memory: bytes that it may take; by default half of what is free.
        progress: whether to show a progress bar while capturing.
        allocation: ``"uniform"``: M_i = draws; ``"gradient"``: see :mod:`dropscope.factors.allocation`.

    Attributes:
        quiet: the model drew no mask, so that all draws are equal and one is stored.
        counts: M_i, int64 (n,) on the CPU; ones when quiet.

    Raises:
        ValueError: if ``memory`` is too small, a gradient is not finite, or samples share a mask under
            ``sharing="sample"``.
    """

    def __init__(
        self,
        problem: Problem,
        draws: int,
        seed: int,
        cache: Cache,
        sharing: Sharing,
        memory: int | None,
        progress: bool,
        allocation: Allocation = "uniform",
    ) -> None:
        problem.check(masks=True)
        if sharing == "sample" and problem.shared:
            raise ValueError(
                "GradientNoise: masks must be independent across samples under sharing='sample', got "
                f"{', '.join(sorted(problem.shared))}, one mask for all samples (dropout on weights, layers dropped as "
                "a whole); use sharing='batch'"
            )
        self.problem, self.seed, self.draws, self.sharing, self.progress = problem, seed, draws, sharing, progress
        free = free_bytes(problem.device)
        self.budget = int(free * STORE_SHARE) if memory is None else memory
        self.n = problem.n if sharing == "sample" else 1
        batch = next(iter(problem.batches()))
        self.quiet = not draws_masks(problem, batch, seed, sharing)
        self.largest = batch.size
        self.plan = self._make_plan(batch)
        self.step = self._fit_pass(int((free if memory is None else memory) * PASS_SHARE))
        self.asked: Cache = cache
        self.folder: Path | None = None
        self._chunks: list[Chunk] | None = None
        self._point: dict[str, tuple[float, float]] | None = None
        self._norms = gradient_norms(problem, self.plan) if allocation == "gradient" and not self.quiet else None
        self.redraw(draws)

    def redraw(self, draws: int) -> None:
        """Take another number of draws; what was captured is dropped. The smaller set of draws is part of the larger.

        Args:
            draws: mean of the M_i.

        Raises:
            ValueError: if they do not fit.
        """
        self.close()
        self.draws = draws
        if self._norms is None:
            self.counts = torch.full((self.n,), 1 if self.quiet else draws, dtype=torch.int64)
        else:
            self.counts = allocate(self._norms, draws)
        self.cache = self._choose(self.asked)

    def __len__(self) -> int:
        """Number of rows stored, Σ M_i."""
        return int(self.counts.sum())

    @property
    def complete(self) -> bool:
        """Whether every parameter has rows, so that Gram matrices can be had."""
        return not self.plan.names("matrix_free")

    def chunks(self) -> Iterator[Chunk]:
        """The chunks, in the order of the samples.

        Raises:
            ValueError: if what is not stored is wanted again and the parameters have changed since the first pass.
        """
        if self.cache == "recompute" or not self.complete:
            self._same_parameters()
        if self.cache == "recompute":
            yield from self._capture("noise")
            return
        if self._chunks is None:
            self._chunks = self._fill()
        if self.cache == "disk":
            for index, chunk in enumerate(self._chunks):
                yield self._load(index, chunk)
        else:
            yield from self._chunks

    def gram(self) -> Tensor:
        """⟨g_r, g_q⟩ of all rows, in the order of the chunks.

        Raises:
            ValueError: if a parameter is matrix-free, or the gradients are not stored.
        """
        if not self.complete or self.cache == "recompute":
            why = self.plan.names("matrix_free") or f"cache={self.cache!r}"
            raise ValueError(f"gram: every per-sample gradient must be stored, got {why}; use products instead")
        dtype = torch.promote_types(self.problem.dtype, torch.float32)
        out = torch.zeros(len(self), len(self), dtype=dtype, device=self.problem.device)
        start = 0
        for i, rows in enumerate(self.chunks()):
            at, left = slice(start, start := start + rows.rows), 0
            for j, cols in enumerate(self.chunks()):
                if j > i:
                    break
                to = slice(left, left := left + cols.rows)
                for mine, other in zip(rows.blocks, cols.blocks, strict=True):
                    mine.add_gram(mine if i == j else other, out[at, to])
                if i != j:
                    out[to, at] = out[at, to].T
        return out

    def close(self) -> None:
        """Drop what is stored; a later use would capture again."""
        self._chunks = None
        if self.folder is not None:
            self._finalizer()
            self.folder = None

    def _same_parameters(self) -> None:
        """Refuse to mix gradients at two points: a training step between two passes would go unnoticed."""
        f64 = torch.float64
        parameters = {name: p.detach() for name, p in self.problem.params.items()}
        now = {
            name: (float(p.sum(dtype=f64)), float(torch.linalg.vector_norm(p, dtype=f64)))
            for name, p in parameters.items()
        }
        if self._point is None:
            self._point = now
        moved = [name for name, seen in now.items() if seen != self._point[name]]
        if moved:
            raise ValueError(
                "GradientNoise: parameters must stay as they were at the first measurement when gradients are not "
                f"stored, got a change of {moved[0]!r}; make a new GradientNoise"
            )

    def _make_plan(self, batch: Batch) -> Plan:
        size = self.problem.dim * torch.empty(0, dtype=self.problem.dtype).element_size()
        if self.sharing == "batch":
            return Plan(shared_bytes=0, draw_bytes=size, pass_bytes=1)
        return make_plan(self.problem, batch, self.seed, 1 if self.quiet else self.draws, self.budget)

    def _fit_pass(self, room: int) -> int:
        """Rows of one pass."""
        return max(1, min(MAX_ROWS_PER_PASS, room // self.plan.pass_bytes))

    def _choose(self, cache: Cache) -> Cache:
        need = self.plan.shared_bytes * self.n + self.plan.draw_bytes * len(self)
        if cache in ("auto", "factors") and need <= self.budget:
            return "factors"
        if cache == "factors" or (cache == "bf16" and need // 2 > self.budget):
            asked = need if cache == "factors" else need // 2
            raise ValueError(
                f"GradientNoise: memory must be at least {asked} bytes for cache={cache!r} with {self.draws} draws of "
                f"{self.n} samples, got {self.budget}; use fewer draws, or cache='disk' or 'recompute'"
            )
        if cache != "bf16":
            chunk = need // self.n * min(self.n, self.largest if self.sharing == "sample" else 1)
            if chunk > self.budget:
                raise ValueError(
                    f"GradientNoise: memory must be at least {chunk} bytes, what one batch of gradients takes, "
                    f"got {self.budget}; use smaller batches or fewer draws"
                )
        return "recompute" if cache == "auto" else cache

    def _fill(self) -> list[Chunk]:
        kept = []
        if self.cache == "disk":
            self.folder = Path(tempfile.mkdtemp(prefix="dropscope-"))
            self._finalizer = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        for index, chunk in enumerate(self._capture("capture")):
            if self.cache == "bf16":
                kept.append(_converted(chunk, torch.bfloat16))
            elif self.cache == "disk":
                assert self.folder is not None
                tensors = {
                    f"{b}.{name}": t.contiguous()
                    for b, block in enumerate(chunk.blocks)
                    for name, t in block.tensors().items()
                }
                save_file(tensors, self.folder / f"{index}.safetensors")
                kept.append(_emptied(chunk))
            else:
                kept.append(chunk)
        return kept if self.cache == "disk" else joined(kept)

    def _load(self, index: int, chunk: Chunk) -> Chunk:
        assert self.folder is not None
        device = str(self.problem.device)
        with safe_open(self.folder / f"{index}.safetensors", framework="pt", device=device) as file:
            blocks = tuple(
                block.replace({name: file.get_tensor(f"{b}.{name}") for name in block.tensors()})
                for b, block in enumerate(chunk.blocks)
            )
        return chunk.replace(blocks)

    def _capture(self, title: str) -> Iterator[Chunk]:
        if self.sharing == "batch":
            yield self._full_gradients(title)
            return
        start = 0
        with tqdm(total=len(self), desc=title, unit="row", disable=not self.progress, leave=False) as bar:
            for batch in self.problem.batches():
                counts, start = self.counts[start : start + batch.size], start + batch.size
                for draws in sorted(set(counts.tolist())):
                    chosen = (counts == draws).nonzero().squeeze(1)
                    part = batch if len(chosen) == batch.size else batch.select(chosen.to(batch.samples.device))
                    yield Chunk(part.samples.cpu(), draws, tuple(self._blocks(part, draws)))
                    bar.update(part.size * draws)

    def _full_gradients(self, title: str) -> Chunk:
        draws = len(self)
        rows = torch.empty(draws, self.problem.dim, dtype=self.problem.dtype, device=self.problem.device)
        for m in tqdm(range(draws), desc=title, unit="draw", disable=not self.progress, leave=False):
            rows[m] = self.problem.gradient(MaskKey(self.seed, m), sharing="batch")
        return Chunk(torch.zeros(1, dtype=torch.int64), draws, (DenseBlock(rows, slice(0, self.problem.dim)),))

    def _groups(self, batch: Batch, M: int) -> list[tuple[int, int]]:
        """(first draw, number of draws) of the passes over a batch."""
        step = max(1, min(M, self.step // batch.size))
        return [(first, min(step, M - first)) for first in range(0, M, step)]

    def _blocks(self, batch: Batch, draws: int) -> Iterator[Block]:
        plan, blocks, groups = self.plan, self.problem.blocks, self._groups(batch, draws)
        captured = plan.names("factors", "rows")
        if captured:
            passes = [self._pass(batch, captured, *group) for group in groups]
            for name in captured:
                if name in plan.biases.values():
                    continue
                part = join_draws([parts.pop(name) for parts in passes], batch.size)
                if isinstance(part, Factors):
                    bias = plan.biases.get(name)
                    yield FactorBlock(part.A, part.B, blocks[name], None if bias is None else blocks[bias])
                else:
                    yield DenseBlock(part, blocks[name])
        dense = plan.names("dense")
        if dense:
            group = group_size(self.problem, dense, self.step) if plan.grouped else 1
            rows = dense_rows(self.problem, batch, dense, MaskKey(self.seed, 0), draws, group)
            for name, G in zip(dense, rows, strict=True):
                yield DenseBlock(G, blocks[name])
        free = plan.names("matrix_free")
        if free:
            yield MatrixFreeBlock(self.problem, batch, free, self.seed, groups)

    def _pass(self, batch: Batch, names: list[str], first: int, draws: int) -> dict[str, Factors | Tensor]:
        key = MaskKey(self.seed, first)
        ids = {id(self.problem.params[name]): name for name in names}
        uses, gradients = record(self.problem, batch, ids, key, draws)
        found: dict[str, Factors | Tensor] = {}
        for name in names:
            if name in self.plan.biases.values():
                continue
            route = self.plan.routes[name]
            part = part_of(name, uses, gradients, batch.size, draws, route.layout)
            found[name] = rows_of(part) if route.kind == "rows" else part
        return found


def _converted(chunk: Chunk, dtype: torch.dtype) -> Chunk:
    return chunk.replace(b.to(dtype) for b in chunk.blocks)


def _emptied(chunk: Chunk) -> Chunk:
    """The chunk without its numbers, which are on disk: its shapes stay, on a device that stores nothing."""
    blocks = tuple(b.replace({name: t.to("meta") for name, t in b.tensors().items()}) for b in chunk.blocks)
    return chunk.replace(blocks)
