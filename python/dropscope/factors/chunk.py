"""Rows of the table of per-sample gradients that stand together: the same number of draws, the same shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dropscope.factors.blocks import Block

# Below this many rows of a chunk, products are too small to be worth their calls.
_FEW_ROWS = 512


@dataclass(frozen=True)
class Chunk:
    """Per-sample gradients of some samples under the M draws that each of them has; rows are sample-major.

    Attributes:
        ids: positions of the samples in the data, int64 on the CPU.
        draws: M.
        blocks: one for each group of parameters; their answers add.
    """

    ids: Tensor
    draws: int
    blocks: tuple[Block, ...]

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.ids)

    @property
    def rows(self) -> int:
        """Number of rows, samples · draws."""
        return self.samples * self.draws

    def project(self, Vt: Tensor) -> Tensor:
        """⟨g_r, V_k⟩, (rows, K), for the rows of Vt (K, dim)."""
        out = Vt.new_zeros(self.rows, len(Vt))
        for block in self.blocks:
            block.project(Vt, out)
        return out

    def accumulate(self, S: Tensor, out: Tensor) -> None:
        """out[k] += Σ_r S[r, k] g_r; S: (rows, K), out: (K, dim)."""
        S = S.contiguous()
        for block in self.blocks:
            block.accumulate(S, out)

    def sample_gram(self) -> Tensor:
        """⟨g_im, g_il⟩ of each sample, float64 (samples, M, M)."""
        device = next((t.device for b in self.blocks for t in b.tensors().values()), None)
        out = torch.zeros(self.samples, self.draws, self.draws, dtype=torch.float64, device=device)
        for block in self.blocks:
            block.add_sample_gram(out)
        return out

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return sum(block.nbytes for block in self.blocks)

    def replace(self, blocks: Iterable[Block]) -> Chunk:
        """The same samples with other blocks."""
        return Chunk(self.ids, self.draws, tuple(blocks))

    def halves(self) -> tuple[Chunk, Chunk]:
        """The first half of every sample's draws, and the rest."""
        M = self.draws
        return tuple(  # type: ignore[return-value]
            Chunk(self.ids, len(range(M)[chosen]), tuple(block.take(M, chosen) for block in self.blocks))
            for chosen in (slice(0, M // 2), slice(M // 2, M))
        )


def joined(chunks: Sequence[Chunk]) -> list[Chunk]:
    """Chunks of equal draws and shapes as one where one of them has few rows; the samples keep their order within it.

    The list is emptied on the way, so that no more than one group is held twice.
    """
    groups: dict[object, list[Chunk]] = {}
    for chunk in chunks:
        shapes = tuple(
            (len(t) * chunk.draws // chunk.rows, t.shape[1:]) for b in chunk.blocks for t in b.tensors().values()
        )
        stored = all(b.tensors() for b in chunk.blocks)
        forms = tuple(b.form for b in chunk.blocks)
        groups.setdefault((chunk.draws, shapes, forms) if stored else id(chunk), []).append(chunk)
    out = []
    for group in groups.values():
        if len(group) == 1 or min(chunk.rows for chunk in group) >= _FEW_ROWS:
            out += group
            continue
        columns = zip(*(chunk.blocks for chunk in group), strict=True)
        blocks = [c[0].replace({n: torch.cat([b.tensors()[n] for b in c]) for n in c[0].tensors()}) for c in columns]
        out.append(Chunk(torch.cat([chunk.ids for chunk in group]), group[0].draws, tuple(blocks)))
    return out
