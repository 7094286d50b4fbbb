"""The Hessian of the risk: double backward through graphs that are kept while they fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from dropscope import kernels
from dropscope.masks import MaskKey
from dropscope.memory import budget, readable, saved_bytes
from dropscope.modes import dual, twice_differentiable
from dropscope.operators.base import SymmetricOperator
from dropscope.problem import Batch, Problem, finite_sum

# What torch says where an operation has no second derivative.
_MISSING = ("is not implemented", "once_differentiable", "not differentiable", "double backward")


class Hessian(SymmetricOperator):
    """H = ∇²R(θ), by products; dropout off, under one draw of every mask, or averaged over draws.

    H v = Σ_b ∇⟨∇R_b, v⟩, R_b being batch b's part of R (Pearlmutter 1994). The graph of ∇R_b is built once and kept
    while the kept graphs fit ``memory``; the others are rebuilt in every product. A product through a kept graph costs
    1.5 to 2 gradients, through a rebuilt one 2.6 to 3.3. The operator follows the model: graphs are dropped when a
    parameter or buffer changes. Where an operation has no double backward, products are taken forward over reverse.

    Args:
        problem: whose risk.
        masks: one draw of every mask; None switches dropout off.
        draws: average the Hessian over draws 0 .. draws−1 of ``seed``.
        seed: seed of these draws.
        memory: bytes that graphs may take, default half of what is free.

    Raises:
        TypeError: if masks is not a MaskKey.
        ValueError: if both masks and draws are given, draws < 1, memory does not hold the graph of one batch, or a
            loss or gradient is not finite.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> H = Hessian(Problem(model, nn.MSELoss(), (torch.eye(2), torch.zeros(2, 1))))
        >>> H @ torch.ones(2)
        tensor([1., 1.])
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
        self.keys = mask_keys("Hessian", problem, masks, draws, seed)
        self.problem, self.memory = problem, budget("Hessian", memory, problem.device)
        self.dim, self.dtype, self.device, self.blocks = problem.dim, problem.dtype, problem.device, problem.blocks
        self._kept: dict[tuple[int, int], _Graph] = {}
        self._taken_at: object = None
        self._size = 0.0  # bytes of a graph per element of its batch, measured on the first
        self._forward_over_reverse = False

    def __repr__(self) -> str:
        held = readable(sum(graph.bytes for graph in self._kept.values()))
        first = self.keys[0]
        masks = "dropout off" if first is None else f"{len(self.keys)} draws from {first}"
        return f"Hessian(dim={self.dim}, {masks}, {len(self._kept)} graphs kept in {held})"

    def close(self) -> None:
        """Let go of the kept graphs; the next product builds them anew."""
        self._kept.clear()

    @torch.inference_mode(False)
    def _matmat(self, V: Tensor) -> Tensor:
        self.problem.check(masks=self.keys[0] is not None)
        state = _state(self.problem.model)
        if state != self._taken_at:
            self.close()
            self._taken_at = state
        rows = V.T.contiguous()
        wide = torch.float32 if self.dtype in (torch.float16, torch.bfloat16) else self.dtype
        out = torch.zeros(rows.shape, dtype=wide, device=self.device)
        work = self.dim * self.problem.n / (self.problem.data.count or 1)
        with twice_differentiable(self.problem.model, self.device), kernels.faster_products(work):
            if not self._forward_over_reverse:
                try:
                    self._add_double_backward(rows, out)
                except RuntimeError as error:
                    self.close()
                    if not any(text in str(error) for text in _MISSING):
                        raise
                    self._try_forward_over_reverse(error)
                    out.zero_()
            if self._forward_over_reverse:
                self._add_forward_over_reverse(rows, out)
        return out.T.to(self.dtype)

    def _add_double_backward(self, rows: Tensor, out: Tensor) -> None:
        parameters = list(self.problem.params.values())
        pairs = [(self._parts(v), self._parts(image)) for v, image in zip(rows, out, strict=True)]
        for graph, keep in self._graphs():
            for j, (vs, images) in enumerate(pairs):
                product = graph.product(parameters, vs, keep=keep or j + 1 < len(pairs))
                if product is not None:
                    torch._foreach_add_(images, product)

    def _parts(self, v: Tensor) -> list[Tensor]:
        """Views of a flat vector in the parameters' shapes."""
        parameters = self.problem.params.values()
        pieces = v.split_with_sizes([p.numel() for p in parameters])
        return [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]

    def _graphs(self) -> Iterator[tuple[_Graph, bool]]:
        """Yield each batch's graph under each key, and whether it stays."""
        problem = self.problem
        weight = problem.total_weight * len(self.keys)
        units = (problem.data.count or 0) * len(self.keys)
        if len(self._kept) == units:
            yield from [(graph, True) for graph in self._kept.values()]
            return
        held = sum(graph.bytes for graph in self._kept.values())
        largest = max((graph.bytes for graph in self._kept.values()), default=0)
        for batch in problem.batches():
            for k, key in enumerate(self.keys):
                graph = self._kept.get((batch.index, k))
                if graph is not None:
                    yield graph, True
                    continue
                graph = self._build(batch, key, weight)
                largest = max(largest, graph.bytes)
                # While others are to be rebuilt, one of them must find room beside those that stay.
                others = largest if len(self._kept) + 1 < units else 0
                if held + graph.bytes + others <= self.memory:
                    self._kept[batch.index, k] = graph
                    held += graph.bytes
                elif graph.bytes > self.memory:
                    raise ValueError(
                        f"Hessian: memory must hold the graph of one batch, {readable(graph.bytes)}, got "
                        f"{readable(self.memory)}: use a smaller batch_size"
                    )
                yield graph, (batch.index, k) in self._kept

    def _build(self, batch: Batch, key: MaskKey | None, weight: float) -> _Graph:
        parameters = list(self.problem.params.values())
        counted = saved_bytes(parameters) if not self._size else nullcontext(None)
        with torch.enable_grad(), counted as taken:
            values, _ = self.problem.raw_losses(batch, key)
            finite_sum(values, batch)
            gradients = torch.autograd.grad(
                values.sum() / weight, parameters, create_graph=True, materialize_grads=True
            )
        self.problem.require_finite(self.problem.flatten([g.detach() for g in gradients]), batch)
        if taken is not None:
            refuse_dead_ends(gradients)
            self._size = max(1, taken()) / batch.elements
        return _Graph(gradients, int(self._size * batch.elements))

    def _add_forward_over_reverse(self, rows: Tensor, out: Tensor) -> None:
        problem = self.problem
        weight = problem.total_weight * len(self.keys)
        for batch in problem.batches():
            for key in self.keys:
                for v, image in zip(rows, out, strict=True):
                    for part, tangent in zip(self._parts(image), self._tangents(batch, key, v), strict=True):
                        if tangent is not None:
                            part.add_(tangent, alpha=1.0 / weight)

    def _try_forward_over_reverse(self, error: RuntimeError) -> None:
        """Take the other order of derivatives if it agrees with differences of gradients: torch may drop tangents."""
        problem, key = self.problem, self.keys[0]
        generator = torch.Generator().manual_seed(0)
        v = (torch.randint(0, 2, (self.dim,), generator=generator) * 2.0 - 1.0).to(self.device, self.dtype)
        size = max(float(p.detach().abs().max()) for p in problem.params.values()) or 1.0
        step = size * torch.finfo(self.dtype).eps ** (1 / 3)
        try:
            tangents = self._tangents(problem.sample, key, v)
            product = problem.flatten(
                [
                    torch.zeros_like(p) if t is None else t
                    for t, p in zip(tangents, problem.params.values(), strict=True)
                ]
            )
            wide, narrow = (self._difference(v, h, key) for h in (step, step / 2))
            slack = 0.02 * float(narrow.norm()) + 3 * float((wide - narrow).norm())
            wrong = not float((product - narrow).norm()) <= slack
        except (RuntimeError, NotImplementedError):
            wrong = True
        if wrong:
            raise ValueError(f"Hessian: an operation has no second derivative in torch: {error}") from error
        self._forward_over_reverse = True

    def _difference(self, v: Tensor, step: float, key: MaskKey | None) -> Tensor:
        """Central difference of Σ∇s over the samples of the probes."""
        problem, ends = self.problem, []
        for sign in (1.0, -1.0):
            with problem.displaced(v * (sign * step)), torch.enable_grad():
                values, _ = problem.raw_losses(problem.sample, key)
                grads = torch.autograd.grad(values.sum(), list(problem.params.values()), materialize_grads=True)
                ends.append(problem.flatten(grads))
        return (ends[0] - ends[1]) / (2 * step)

    def _tangents(self, batch: Batch, key: MaskKey | None, v: Tensor) -> list[Tensor | None]:
        """Derivative of Σ∇s along v: the gradient of dual numbers."""
        problem = self.problem
        with forward_ad.dual_level(), torch.enable_grad():
            duals = {
                name: dual(p.detach().clone().requires_grad_(), part)
                for (name, p), part in zip(problem.params.items(), self._parts(v), strict=True)
            }
            values, _ = problem.substituted(duals, lambda: problem.raw_losses(batch, key))
            finite_sum(values, batch)
            gradients = torch.autograd.grad(values.sum(), list(duals.values()), materialize_grads=True)
            return [forward_ad.unpack_dual(g).tangent for g in gradients]  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Graph:
    """Gradients of a batch's part of R, with the graph that differentiates them."""

    gradients: tuple[Tensor, ...]
    bytes: int

    def product(self, parameters: Sequence[Tensor], vs: Sequence[Tensor], *, keep: bool) -> tuple[Tensor, ...] | None:
        """Return ∇⟨∇R_b, v⟩; None if no gradient depends on θ."""
        pairs = [(g, v) for g, v in zip(self.gradients, vs, strict=True) if g.requires_grad]
        if not pairs:
            return None
        gradients, directions = zip(*pairs, strict=True)
        return torch.autograd.grad(gradients, parameters, directions, retain_graph=keep, materialize_grads=True)


def refuse_dead_ends(gradients: Sequence[Tensor]) -> None:
    """Raise RuntimeError if a graph ends in a ``once_differentiable`` function: torch then returns zeros silently."""
    nodes = [g.grad_fn for g in gradients]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "Error":
            raise RuntimeError("the backward pass of a custom function is once_differentiable")
        nodes.extend(following for following, _ in node.next_functions)


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
