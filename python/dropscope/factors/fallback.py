"""Per-sample gradients of parameters that no rule covers: some samples at once, one at a time, or by products alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from dropscope.factors.blocks import Block
from dropscope.factors.capture import require_finite
from dropscope.masks import MaskKey
from dropscope.problem import Batch, Problem

# Samples and bytes of gradients of a group: more would gain little, and be held twice.
_MOST_SAMPLES, _GROUP_BYTES = 256, 64 << 20


def dense_rows(
    problem: Problem, batch: Batch, names: Sequence[str], key: MaskKey | None, draws: int, group: int = 1
) -> list[Tensor]:
    """Materialised gradients of the draws of every sample, each sample alone in its batch.

    Exact because a mask depends on the sample and not on the batch that it is in.

    Args:
        problem: the problem.
        batch: one of its batches.
        names: the parameters.
        key: the first draw; None switches dropout off.
        draws: number of draws.
        group: samples that are differentiated together by ``torch.func.vmap``; 1 takes one after the other, which
            works for whatever autograd does. For an LSTM on short sequences groups are two to three times as fast.

    Returns:
        (rows, numel) of each parameter.

    Raises:
        ValueError: if a gradient is not finite.
        RuntimeError: if group is not 1 and the model does what vmap cannot.
    """
    parameters = [problem.params[name] for name in names]
    out = [p.new_empty(batch.size * draws, p.numel()) for p in parameters]
    if group > 1:
        _fill_by_groups(problem, batch, names, key, [rows.view(batch.size, draws, -1) for rows in out], group)
    else:
        _fill_one_by_one(problem, batch, parameters, key, draws, out)
    for rows in out:
        require_finite(rows, batch, key, draws)
    return out


def group_size(problem: Problem, names: Sequence[str], rows: int) -> int:
    """Samples of a group where a pass has room for so many rows."""
    size = sum(problem.params[name].numel() * problem.params[name].element_size() for name in names)
    return max(1, min(_MOST_SAMPLES, rows, _GROUP_BYTES // max(1, size)))


def groups_work(
    problem: Problem, batch: Batch, names: Sequence[str], key: MaskKey, weights: Tensor, truth: Mapping[str, Tensor]
) -> bool:
    """Whether rows by groups can be had and reproduce Σ_r weights_r g_r = truth.

    Args:
        problem: the problem.
        batch: some of its samples.
        names: the parameters.
        key: the first draw.
        weights: (rows,), of the draws of every sample of the batch.
        truth: parameter -> what plain autograd gives, flat.
    """
    try:
        found = dense_rows(problem, batch, names, key, len(weights) // batch.size, group=batch.size)
    except Exception:  # whatever a model may raise under vmap: it goes sample by sample, where errors are told
        return False
    gaps = [float((weights @ rows - truth[name]).norm()) for name, rows in zip(names, found, strict=True)]
    scales = [float((weights.abs() @ rows.abs()).norm()) for rows in found]
    tolerance = 1e3 * torch.finfo(weights.dtype).eps
    return all(gap <= tolerance * scale for gap, scale in zip(gaps, scales, strict=True))


def _fill_by_groups(
    problem: Problem, batch: Batch, names: Sequence[str], key: MaskKey | None, out: Sequence[Tensor], group: int
) -> None:
    """out[p][i, m] <- gradient of draw m of sample i.

    Every sample has its own parameters, expanded: an LSTM adds, in place, products with its data to products of its
    first state, and these must have the dimension of the samples too.
    """
    parameters = {name: problem.params[name].detach() for name in names}
    draws = out[0].shape[1]
    for m in range(draws):
        masks = None if key is None else MaskKey(key.seed, key.draw + m)

        def value(parameters: dict[str, Tensor], row: Tensor, masks: MaskKey | None = masks) -> Tensor:
            one = batch.select(row)
            return problem.substituted(parameters, lambda: problem.raw_losses(one, masks)[0]).sum() * problem.scale

        for start in range(0, batch.size, group):
            rows = torch.arange(start, min(batch.size, start + group), device=problem.device).unsqueeze(1)
            expanded = {name: p.expand(len(rows), *p.shape) for name, p in parameters.items()}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # torch's own, on what it batches by a loop
                # A fused LSTM would be looped over. Other parameters want a graph, which nobody reads.
                with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
                    gradients = vmap(grad(value))(expanded, rows)
            for target, name in zip(out, names, strict=True):
                target[start : start + len(rows), m] = gradients[name].flatten(1)


def _fill_one_by_one(
    problem: Problem,
    batch: Batch,
    parameters: Sequence[Tensor],
    key: MaskKey | None,
    draws: int,
    out: Sequence[Tensor],
) -> None:
    """out[p][i·draws + m] <- gradient of draw m of sample i."""
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
