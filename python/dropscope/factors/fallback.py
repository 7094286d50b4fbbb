"""Per-sample gradients of parameters that no rule covers: one sample at a time, or by products alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dropscope.factors.blocks import Block
from dropscope.factors.capture import require_finite
from dropscope.masks import MaskKey
from dropscope.problem import Batch, Problem


def dense_rows(problem: Problem, batch: Batch, names: Sequence[str], key: MaskKey | None, draws: int) -> list[Tensor]:
    """Materialised gradients of the draws of every sample, each sample alone in its batch.

    Exact because a mask depends on the sample and not on the batch that it is in.

    Args:
        problem: the problem.
        batch: one of its batches.
        names: the parameters.
        key: the first draw; None switches dropout off.
        draws: number of draws.

    Returns:
        (rows, numel) of each parameter.

    Raises:
        ValueError: if a gradient is not finite.
    """
    parameters = [problem.params[name] for name in names]
    out = [p.new_empty(batch.size * draws, p.numel()) for p in parameters]
    for i in range(batch.size):
        with torch.enable_grad():
            values, _ = problem.sample_losses(batch.select(slice(i, i + 1)), key, draws)
            for m, value in enumerate(values.unbind()):
                gradients = torch.autograd.grad(
                    value * problem.scale,
                    parameters,
                    retain_graph=m + 1 < draws,
                    allow_unused=True,
                    materialize_grads=True,
                )
                for rows, gradient in zip(out, gradients, strict=True):
                    rows[i * draws + m] = gradient.reshape(-1)
    for rows in out:
        require_finite(rows, batch, key, draws)
    return out


class MatrixFreeBlock(Block):
    """Products with the per-sample gradients of some parameters, from replayed passes; nothing is stored.

    ⟨g_r, v⟩ for all rows is one derivative of the per-sample losses along v, taken as the derivative of a weighted
    gradient with respect to its weights; Σ_r S_r g_r is one weighted gradient. Both are exact.

    Args:
        problem: the problem.
        batch: the batch.
        names: the parameters.
        seed: seed of the masks.
        groups: (first draw, number of draws) of each pass.
    """

    def __init__(
        self, problem: Problem, batch: Batch, names: Sequence[str], seed: int, groups: Sequence[tuple[int, int]]
    ) -> None:
        self.problem, self.batch, self.names, self.seed = problem, batch, list(names), seed
        self.groups = list(groups)
        self.draws = sum(draws for _, draws in groups)
        self.rows = batch.size * self.draws
        self.columns = tuple(problem.blocks[name] for name in names)
        self.parameters = [problem.params[name] for name in names]

    def project(self, Vt: Tensor, out: Tensor) -> None:
        """See :class:`Block`."""

        def along(values: Tensor, rows: Tensor) -> None:
            weights = torch.zeros_like(values, requires_grad=True)
            gradients = torch.autograd.grad(
                values, self.parameters, weights, create_graph=True, allow_unused=True, materialize_grads=True
            )
            live = [(g, c) for g, c in zip(gradients, self.columns, strict=True) if g.requires_grad]
            for k, v in enumerate(Vt):
                (slope,) = torch.autograd.grad(
                    [g for g, _ in live],
                    weights,
                    [v[c].view_as(g).to(g.dtype) for g, c in live],
                    retain_graph=k + 1 < len(Vt),
                    allow_unused=True,
                    materialize_grads=True,
                )
                out[rows, k] += slope.to(out.dtype)

        self._each_pass(along)

    def accumulate(self, S: Tensor, out: Tensor) -> None:
        """See :class:`Block`."""

        def weighted(values: Tensor, rows: Tensor) -> None:
            for k in range(S.shape[1]):
                gradients = torch.autograd.grad(
                    values,
                    self.parameters,
                    S[rows, k].to(values.dtype),
                    retain_graph=k + 1 < S.shape[1],
                    allow_unused=True,
                    materialize_grads=True,
                )
                for gradient, columns in zip(gradients, self.columns, strict=True):
                    out[k, columns] += gradient.reshape(-1).to(out.dtype)

        self._each_pass(weighted)

    def add_sample_gram(self, out: Tensor) -> None:
        """See :class:`Block`."""
        for i in range(self.batch.size):
            one = self.batch.select(slice(i, i + 1))
            for rows in dense_rows(self.problem, one, self.names, MaskKey(self.seed, 0), self.draws):
                out[i] += rows @ rows.T

    def _each_pass(self, act: Callable[[Tensor, Tensor], None]) -> None:
        every = torch.arange(self.rows, device=self.problem.device).view(self.batch.size, self.draws)
        # The fused attention kernels have no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for first, draws in self.groups:
                values, _ = self.problem.sample_losses(self.batch, MaskKey(self.seed, first), draws)
                act(values * self.problem.scale, every[:, first : first + draws].reshape(-1))
