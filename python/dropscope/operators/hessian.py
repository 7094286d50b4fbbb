"""The Hessian of the risk, by double backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dropscope import derivatives, probes
from dropscope.data import finite_sum
from dropscope.masks import MaskKey
from dropscope.modes import dual, twice_differentiable
from dropscope.operators.base import SymmetricOperator
from dropscope.operators.blocks import BlockPlan
from dropscope.operators.chain import record_chain
from dropscope.operators.graphs import Graph, GraphOperator
from dropscope.problem import Batch, Problem

# What torch says where an operation has no second derivative.
_MISSING = ("is not implemented", "once_differentiable", "not differentiable", "double backward")


class Hessian(GraphOperator):
    """H = ∇²R(θ), by products; dropout off, under one draw of every mask, or averaged over draws.

    H v = Σ_b ∇⟨∇R_b, v⟩, R_b being batch b's part of R (Pearlmutter 1994). The graph of ∇R_b is built once and kept
    while the kept graphs fit ``memory``; the others are rebuilt in every product. A product through a kept graph costs
    1.5 to 2 gradients, through a rebuilt one 2.6 to 3.3. Where the model is a chain of linear layers with element-wise
    functions between them, which the graph of a first forward pass shows, the same derivative is written out and takes
    about a tenth less, a sixth on small networks. The operator follows the model: every product first looks
    whether a parameter or buffer changed, be it by an optimizer, by hand or through ``.data``, and drops the graphs if
    so; only a write through ``.data`` or numpy that leaves the sum of a tensor's bits as it was (entries permuted) is
    not noticed. Where an operation has no double backward, products are taken forward over reverse.

    Args:
        problem: whose risk.
        masks: one draw of every mask; None switches dropout off.
        draws: average the Hessian over draws 0 .. draws−1 of ``seed``.
        seed: seed of these draws.
        memory: bytes that graphs and products through them may take, default half of what is free.
        block: columns of ``H @ V`` that go together; 1 is one after the other. By default a trial on the first batch
            decides by the clock, so that the last bits of ``H @ V`` may differ from run to run; those of ``H @ v`` do
            not, nor any under ``torch.use_deterministic_algorithms``. ``plan()`` tells.

    Raises:
        TypeError: if masks is not a MaskKey.
        ValueError: if both masks and draws are given, draws < 1, memory does not hold the graph of one batch and
            a product through it, or a loss or gradient is not finite.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> H = Hessian(Problem(model, torch.nn.MSELoss(), (torch.eye(2), torch.zeros(2, 1))))
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
        block: int | None = None,
    ) -> None:
        super().__init__(problem, masks, draws, seed, memory=memory, block=block)
        self._forward_over_reverse = False
        self._chain = True  # until a batch shows that the model is none

    def low_precision(self) -> SymmetricOperator | None:
        """As of every operator on graphs; None where products are taken forward over reverse."""
        return None if self._forward_over_reverse else super().low_precision()

    def _add(self, rows: Tensor, out: Tensor) -> None:
        if not self._forward_over_reverse:
            try:
                super()._add(rows, out)
            except RuntimeError as error:
                self.close()
                if not any(text in str(error) for text in _MISSING):
                    raise
                self._try_forward_over_reverse(error)
                out.zero_()
            else:
                self._check_curvature()
        if self._forward_over_reverse:
            self._add_forward_over_reverse(rows, out)

    def _check_curvature(self) -> None:
        """Look once whether the double backward is right; of a chain it is torch's own."""
        problem = self.problem
        if not self._chain and not problem.curvature_checked:
            with probes.untouched(problem.model):
                derivatives.curvature(problem, problem.sample)
            problem.curvature_checked = True

    def _build(self, batch: Batch, key: MaskKey | None, weight: float) -> Graph:
        problem = self.problem
        if self._chain and self._lowered is None:
            chain = record_chain(problem, batch, key, weight)
            if chain is not None:
                refuse_dead_ends([chain.residual])
                return chain
            self._chain = False
        values, _ = problem.raw_losses(batch, key)
        finite_sum(values, batch)
        gradients = torch.autograd.grad(
            values.sum() / weight, list(problem.params.values()), create_graph=True, materialize_grads=True
        )
        problem.require_finite(problem.flatten([g.detach() for g in gradients]), batch)
        if not self._size:
            refuse_dead_ends(gradients)
        return _Gradients(gradients)

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
        self._columns = BlockPlan(1, "one by one: products are taken forward over reverse")

    def _difference(self, v: Tensor, step: float, key: MaskKey | None) -> Tensor:
        """Central difference of Σ∇s over the samples of the probes."""
        problem, ends = self.problem, []
        for sign in (1.0, -1.0):
            kernels = twice_differentiable(problem.model, self.device)
            with problem.displaced(v * (sign * step)), torch.enable_grad(), kernels:
                values, _ = problem.raw_losses(problem.sample, key)
                grads = torch.autograd.grad(values.sum(), list(problem.params.values()), materialize_grads=True)
                ends.append(problem.flatten(grads))
        return (ends[0] - ends[1]) / (2 * step)

    def _tangents(self, batch: Batch, key: MaskKey | None, v: Tensor) -> list[Tensor | None]:
        """Derivative of Σ∇s along v: the gradient of dual numbers."""
        problem = self.problem
        kernels = twice_differentiable(problem.model, self.device)
        with forward_ad.dual_level(), torch.enable_grad(), kernels:
            duals = {
                name: dual(p.detach().clone().requires_grad_(), part)
                for (name, p), part in zip(problem.params.items(), self._parts(v), strict=True)
            }
            values, _ = problem.substituted(duals, lambda: problem.raw_losses(batch, key))
            finite_sum(values, batch)
            gradients = torch.autograd.grad(values.sum(), list(duals.values()), materialize_grads=True)
            return [forward_ad.unpack_dual(g).tangent for g in gradients]  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Gradients:
    """Gradients of a batch's part of R, with the graph that differentiates them."""

    gradients: tuple[Tensor, ...]

    def product(
        self, parameters: Sequence[Tensor], vs: Sequence[Tensor], *, keep: bool, batched: bool = False
    ) -> tuple[Tensor, ...] | None:
        """Return ∇⟨∇R_b, v⟩; None if no gradient depends on θ."""
        pairs = [(g, v) for g, v in zip(self.gradients, vs, strict=True) if g.requires_grad]
        if not pairs:
            return None
        gradients, directions = zip(*pairs, strict=True)
        return torch.autograd.grad(
            gradients, parameters, directions, retain_graph=keep, materialize_grads=True, is_grads_batched=batched
        )


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
