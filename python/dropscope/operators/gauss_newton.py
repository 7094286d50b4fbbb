"""The generalised Gauss–Newton matrix, and the Fisher matrix where the two are one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dropscope.data import finite_sum
from dropscope.losses import TokenLoss
from dropscope.masks import MaskKey
from dropscope.operators.graphs import Graph, GraphOperator
from dropscope.problem import Batch, Problem

# Negative log-likelihoods in their natural parameter, up to a constant factor that the definition carries along.
_NATURAL = (nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.MSELoss)


class GaussNewton(GraphOperator):
    """G = (1/W) Σᵢ Jᵢᵀ Lᵢ Jᵢ, the Hessian without the model's own curvature (Schraudolph 2002).

    Jᵢ is the Jacobian of sample i's outputs, Lᵢ the Hessian of sᵢ in these outputs. G is positive semi-definite when
    the loss is convex in the outputs, and equals the Hessian of R where the model is linear in its parameters or every
    residual vanishes. It splits the computation at what the model returns: log-probabilities or logits give two
    different matrices. Graphs are kept and dropped as by :class:`~dropscope.Hessian`.

    Args:
        problem: whose risk.
        masks: one draw of every mask; None switches dropout off.
        draws: average over draws 0 .. draws−1 of ``seed``.
        seed: seed of these draws.
        memory: bytes that graphs and products through them may take, default half of what is free.
        block: columns of ``G @ V`` that go together, by default as a trial decides; see :class:`~dropscope.Hessian`.

    Raises:
        TypeError: if masks is not a MaskKey.
        ValueError: if both masks and draws are given, draws < 1, memory does not hold the graph of one batch and
            a product through it, or a loss or an output is not finite.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> G = GaussNewton(Problem(model, torch.nn.MSELoss(), (torch.eye(2), torch.zeros(2, 1))))
        >>> G @ torch.ones(2)
        tensor([1., 1.])
    """

    def _build(self, batch: Batch, key: MaskKey | None, weight: float) -> Graph:
        problem = self.problem
        parameters = list(problem.params.values())
        output, target, rows = problem.raw_outputs(batch, key)
        attached, leaves, detached = _detach(output)
        values, _ = problem.losses_of(detached, target, rows)
        finite_sum(values, batch)
        slopes = torch.autograd.grad(values.sum() / weight, leaves, create_graph=True, materialize_grads=True)
        # Jᵀλ is linear in λ, so its derivative along v is J v wherever λ is: at 0 (the double-backward trick).
        duals = [torch.zeros_like(z, requires_grad=True) for z in attached]
        pulled = torch.autograd.grad(attached, parameters, duals, create_graph=True, materialize_grads=True)
        return _Split(attached, leaves, slopes, tuple(duals), pulled)


class Fisher(GaussNewton):
    """F = (1/W) Σᵢ wᵢ E_y[∇log p(y|xᵢ) ∇log p(y|xᵢ)ᵀ], y drawn from the model's own prediction.

    For cross entropy on logits (with class weights, smoothing and K dimensions), binary cross entropy on logits,
    squared error and the language-model losses, the loss is a negative log-likelihood in its natural parameter, and the
    Fisher matrix is exactly the Gauss–Newton matrix (Martens, arXiv:1412.1193). Arguments and errors as there.

    Raises:
        TypeError: if the loss is another one.
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
        loss = problem.loss
        known = loss.elements is not None and isinstance(loss.loss, _NATURAL)
        known = known and getattr(loss.loss, "pos_weight", None) is None  # else no likelihood
        if not known and not isinstance(loss.loss, TokenLoss):
            names = ", ".join(kind.__name__ for kind in _NATURAL)
            raise TypeError(
                f"Fisher: loss must be a negative log-likelihood in its natural parameter ({names}, causal_lm, "
                f"masked_lm), got {type(loss.loss).__name__}: use GaussNewton"
            )


@dataclass(frozen=True)
class _Split:
    """A batch split at the model's outputs z: z(θ) attached, the same as leaves, ∂Σs/∂z, λ = 0 and Jᵀλ."""

    outputs: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]
    slopes: tuple[Tensor, ...]
    duals: tuple[Tensor, ...]
    pulled: tuple[Tensor, ...]

    def product(
        self, parameters: Sequence[Tensor], vs: Sequence[Tensor], *, keep: bool, batched: bool = False
    ) -> tuple[Tensor, ...] | None:
        """Return Jᵀ L J v; None if the loss is linear in the outputs."""
        curved = [(slope, k) for k, slope in enumerate(self.slopes) if slope.requires_grad]
        pairs = [(g, v) for g, v in zip(self.pulled, vs, strict=True) if g.requires_grad]
        if not curved or not pairs:
            return None
        pulled, directions = zip(*pairs, strict=True)
        pushed = torch.autograd.grad(
            pulled, self.duals, directions, retain_graph=True, materialize_grads=True, is_grads_batched=batched
        )
        slopes, places = zip(*curved, strict=True)
        how = {"retain_graph": keep, "materialize_grads": True, "is_grads_batched": batched}
        bent = torch.autograd.grad(slopes, self.leaves, [pushed[k] for k in places], **how)
        return torch.autograd.grad(self.outputs, parameters, bent, **how)


def _detach(output: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Any]:
    """Return the output's differentiable tensors, leaves equal to them, and the output made of these leaves."""
    if not isinstance(output, (Tensor, tuple, list, dict)) and hasattr(output, "logits"):
        attached, leaves, logits = _detach(output.logits)
        output = copy.copy(output)
        output.logits = logits
        return attached, leaves, output
    parts, form = pytree.tree_flatten(output)
    attached = tuple(part for part in parts if isinstance(part, Tensor) and part.requires_grad)
    if not attached:
        raise ValueError("GaussNewton: the model's output must depend on the parameters, got no tensor with a graph")
    leaves = tuple(part.detach().requires_grad_() for part in attached)
    of = {id(part): leaf for part, leaf in zip(attached, leaves, strict=True)}
    return attached, leaves, pytree.tree_unflatten([of.get(id(part), part) for part in parts], form)
