"""Hessian products of a chain of linear layers and element-wise functions, written out.

With z_l = a_{l−1} W_lᵀ + b_l, a_l = φ_l(z_l), δ_l = ∂R/∂z_l and ε_l = δ_{l+1} W_{l+1}, the derivatives along (V, c) are

    ż_l = a_{l−1} V_lᵀ + ȧ_{l−1} W_lᵀ + c_l,            ȧ_l = φ'_l ∘ ż_l
    δ̇_l = φ'_l ∘ (δ̇_{l+1} W_{l+1} + δ_{l+1} V_{l+1}) + φ''_l ∘ ε_l ∘ ż_l

and the product's parts are δ̇_lᵀ a_{l−1} + δ_lᵀ ȧ_{l−1} and the column sums of δ̇_l (Pearlmutter 1994). These are the
matrix products of double backward without what autograd adds to them: zeros, copies, sums of parts, calls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dropscope.data import finite_sum
from dropscope.intercept import Call
from dropscope.kernels.products import add_product
from dropscope.masks import MaskKey
from dropscope.problem import Batch, Problem

# What autograd calls torch's functions that act on each element alone (a user's class has no number after its name),
# and dropout under a key.
_ELEMENTWISE = {
    f"{name}Backward0" for name in ("Clone", "Elu", "Gelu", "LeakyRelu", "Relu", "Sigmoid", "Silu", "Softplus", "Tanh")
} | {"_MaskBackward"}


@dataclass(frozen=True)
class _Layer:
    """One linear layer and the element-wise function after it, at the point θ."""

    weight: Tensor  # (out, in)
    places: tuple[int, int | None]  # of weight and bias among the parameters
    inputs: Tensor  # a_{l−1}
    delta: Tensor  # δ_l
    slope: Tensor | None  # φ'_l(z_l); None after the last layer
    bend: Tensor | None  # φ''_l(z_l) ∘ ε_l; None where it is zero


@dataclass(frozen=True)
class Chain:
    """A batch's part of R as a chain, ready for products; :func:`record_chain` makes it.

    Attributes:
        layers: first to last.
        output: z of the last layer, a leaf.
        residual: its δ, with the graph that differentiates it.
    """

    layers: tuple[_Layer, ...]
    output: Tensor
    residual: Tensor

    def product(
        self, parameters: Sequence[Tensor], vs: Sequence[Tensor], *, keep: bool, batched: bool = False
    ) -> list[Tensor]:
        """Return ∇⟨∇R_b, v⟩ by parameter; see :class:`~dropscope.operators.graphs.Graph`."""
        del keep  # what is held serves every product
        with torch.no_grad():
            states, dot = self._forward(vs)
        if self.residual.requires_grad:
            (dot,) = torch.autograd.grad(self.residual, self.output, dot, retain_graph=True, is_grads_batched=batched)
        else:
            dot = torch.zeros_like(dot)
        with torch.no_grad():
            return self._backward(dot, states, vs, len(parameters))

    def _forward(self, vs: Sequence[Tensor]) -> tuple[list[tuple[Tensor, Tensor | None]], Tensor]:
        """ȧ_l and φ''_l ∘ ε_l ∘ ż_l of the layers before the last, and its ż."""
        states: list[tuple[Tensor, Tensor | None]] = []
        for layer in self.layers:
            weight, bias = layer.places
            V = vs[weight].mT
            if bias is None:
                z = layer.inputs @ V
            elif V.dim() == 2:
                z = torch.addmm(vs[bias], layer.inputs, V)
            else:
                z = (layer.inputs @ V).add_(vs[bias].unsqueeze(-2))
            if states:
                _add_product(z, states[-1][0], layer.weight.T)
            if layer.slope is not None:
                bent = None if layer.bend is None else layer.bend * z
                states.append((z.mul_(layer.slope), bent))
        return states, z

    def _backward(
        self, dot: Tensor, states: list[tuple[Tensor, Tensor | None]], vs: Sequence[Tensor], count: int
    ) -> list[Tensor]:
        """The parts of the product; ``dot`` is δ̇ of the last layer."""
        parts: list[Tensor] = [dot] * count
        for i in range(len(self.layers) - 1, -1, -1):
            layer = self.layers[i]
            weight, bias = layer.places
            part = dot.mT @ layer.inputs
            if i:
                _add_product(part, layer.delta.T, states[i - 1][0])
            parts[weight] = part
            if bias is not None:
                parts[bias] = dot.sum(-2)
            if i:
                before, bent = self.layers[i - 1].slope, states[i - 1][1]
                assert before is not None
                dot = dot @ layer.weight
                _add_product(dot, layer.delta, vs[weight])
                dot.mul_(before)
                if bent is not None:
                    dot.add_(bent)
        return parts


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b, with or without columns in dim 0."""
    if out.dim() == 2:
        add_product(out, a, b)
    else:
        K = len(out)  # in place, so that columns together take no more memory each than one alone
        out.baddbmm_(a if a.dim() == 3 else a.expand(K, *a.shape), b if b.dim() == 3 else b.expand(K, *b.shape))


class _NoChainError(Exception):
    """The model is something else."""


class _Recorder:
    """Sees every linear layer of a forward pass, and cuts the graph at its output."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.place = {id(p): i for i, p in enumerate(parameters.values())}
        self.found: list[tuple[Tensor, tuple[int, int | None], Tensor, Tensor]] = []  # weight, places, input, output
        self.refused = False  # a model may catch what a handler raises

    def linear(self, call: Call) -> Tensor:
        """Stand in for F.linear."""
        x, weight, bias = _arguments(*call.args, **call.kwargs)
        places = self.place.pop(id(weight), None), None if bias is None else self.place.pop(id(bias), None)
        if places[0] is None or (bias is not None and places[1] is None) or x.dim() != 2:
            self.refuse()
        if self.found:
            leaf = self.found[-1][-1]
            if x.shape != leaf.shape or not _reaches_only(x, leaf, elementwise=True):
                self.refuse()
        elif x.requires_grad:
            self.refuse()
        with torch.no_grad():
            leaf = F.linear(x, weight, bias)
        if leaf.dtype != weight.dtype:  # autocast inside the model: products of two dtypes
            self.refuse()
        self.found.append((weight.detach(), places, x, leaf.requires_grad_()))  # type: ignore[arg-type]
        return leaf.clone()  # which a function may overwrite

    def refuse(self) -> None:
        self.refused = True
        raise _NoChainError


def _arguments(
    input: Tensor,  # noqa: A002 (torch's name)
    weight: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def record_chain(problem: Problem, batch: Batch, key: MaskKey | None, weight: float) -> Chain | None:
    """Record Σ s / weight of a batch as a chain.

    Args:
        problem: the problem.
        batch: one of its batches.
        key: the draw of every mask; None switches dropout off.
        weight: what the sum is divided by.

    Returns:
        The chain; None if the model is another thing: if a parameter is used twice, not at all or by another function
        than F.linear, if the layers do not follow one another through element-wise functions alone, if an input is no
        matrix, or if something is not finite, which the general route reports.
    """
    if any(p.dim() > 2 for p in problem.params.values()):
        return None
    recorder = _Recorder(problem.params)
    try:
        values, _ = problem.raw_losses(batch, key, handlers={F.linear: recorder.linear})
    except _NoChainError:
        return None
    if recorder.refused or recorder.place or not recorder.found:
        return None
    output = recorder.found[-1][-1]
    if not _reaches_only(values, output, elementwise=False):
        return None
    finite_sum(values, batch)
    (residual,) = torch.autograd.grad(values.sum() / weight, output, create_graph=True)
    layers: list[_Layer] = []
    delta, after = residual.detach(), None
    for W, places, x, z in reversed(recorder.found):
        slope, bend = None, None
        if after is not None:
            slope, curve = _derivatives(after[1], z)
            error = delta @ after[0]
            delta, bend = slope * error, None if curve is None else curve.mul_(error)
        if not math.isfinite(float(delta.sum())):
            return None
        layers.insert(0, _Layer(W, places, x.detach(), delta, slope, bend))
        after = W, x
    return Chain(tuple(layers), output, residual)


def _derivatives(a: Tensor, z: Tensor) -> tuple[Tensor, Tensor | None]:
    """φ'(z) and φ''(z) of a = φ(z), element by element; None for a second derivative that is zero."""
    (slope,) = torch.autograd.grad(a.sum(), z, create_graph=True)
    if not slope.requires_grad:
        return slope, None
    (curve,) = torch.autograd.grad(slope.sum(), z, materialize_grads=True)
    return slope.detach(), curve if bool(curve.any()) else None


def _reaches_only(x: Tensor, leaf: Tensor, *, elementwise: bool) -> bool:
    """Whether the graph of x ends in this leaf and no other, and passes element-wise functions, or torch's, alone."""
    if x.grad_fn is None:
        return False
    nodes, seen = [x.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            if variable is not leaf:
                return False
        elif type(node).__name__ not in _ELEMENTWISE and (elementwise or hasattr(node, "_forward_cls")):
            return False  # a class of the user's may have no second derivative; the general route looks
        nodes.extend(following for following, _ in node.next_functions if following is not None)
    return True
