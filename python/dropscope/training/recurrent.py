"""An LSTM that can be differentiated twice at the price of its matrix products.

torch's own LSTM has no second derivative in its fast form, and in its plain form spends most of the time outside matrix
products: it adds every step's weight gradient to an array by itself. Here the steps of a layer are one function; its
first and second derivatives are written out, each a loop over time that holds only what must be sequential.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Weights:
    """Whether a backward pass shall compute gradients of weights; a pass that only asks for activations need not."""

    wanted = True


@contextmanager
def without_weight_gradients() -> Iterator[None]:
    """Inside, the LSTM's backward gives no gradient of its recurrent weights: for passes that ask for activations."""
    before, _Weights.wanted = _Weights.wanted, False
    try:
        yield
    finally:
        _Weights.wanted = before


def lstm(
    x: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    *,
    biases: bool,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
    between: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.lstm`` on padded input, differentiable twice; ``between`` is applied to what each layer hands the next.

    Args:
        x: (T, B, I), or (B, T, I) if ``batch_first``.
        hx: h₀ and c₀, (layers·directions, B, H).
        params: as ``torch.lstm`` takes them, without projections.
        biases: whether they hold biases.
        layers: how many.
        bidirectional: whether each layer also runs backwards in time.
        batch_first: the layout of x and of the output.
        between: dropout between layers; sees and returns the layout of x.

    Returns:
        Output, h_T and c_T, as ``torch.lstm``.
    """
    directions, each = 1 + bidirectional, 4 if biases else 2
    h, c = [], []
    for layer in range(layers):
        if layer:
            x = between(x)
        steps, outs = x.transpose(0, 1) if batch_first else x, []
        for direction in range(directions):
            place = layer * directions + direction
            w_in, w_rec, *bias = params[place * each : (place + 1) * each]
            gates = F.linear(steps, w_in, bias[0] + bias[1] if bias else None)
            state = [part[place].to(gates.dtype) for part in hx]
            w_rec = w_rec.to(gates.dtype)
            out, last = _layer(gates.flip(0) if direction else gates, w_rec, *state)
            h.append(out[-1])
            c.append(last)
            outs.append(out.flip(0) if direction else out)
        x = torch.cat(outs, -1) if bidirectional else outs[0]
        x = x.transpose(0, 1) if batch_first else x
    return x, torch.stack(h), torch.stack(c)


def _layer(A: Tensor, W: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return cast("tuple[Tensor, Tensor]", _Layer.apply(A, W, h, c))  # type: ignore[no-untyped-call]


def _by_gate(a: Tensor) -> Tensor:
    return a.view(*a.shape[:-1], 4, -1)


class _Run:
    """What one pass over a layer leaves for its derivatives; all of shape (T, B, ·)."""

    def __init__(self, A: Tensor, W: Tensor, h: Tensor, c: Tensor) -> None:
        """aₜ = Aₜ + W hₜ₋₁;  cₜ = f cₜ₋₁ + i g;  hₜ = o tanh cₜ, gates (i, f, g, o) = (σ, σ, tanh, σ)(aₜ)."""
        steps, batch, width = A.shape[0], A.shape[1], W.shape[1]
        self.W = W
        self.gates = torch.empty_like(A, memory_format=torch.contiguous_format)
        self.h = A.new_empty(steps + 1, batch, width)  # h₀ .. h_T
        self.c = A.new_empty(steps + 1, batch, width)
        self.tanh_c = A.new_empty(steps, batch, width)
        self.h[0], self.c[0] = h, c
        Wt = W.t().contiguous()
        for t in range(steps):
            a = self.gates[t]
            torch.addmm(A[t], self.h[t], Wt, out=a)
            i, f, g, o = a.chunk(4, -1)
            a[:, : 2 * width].sigmoid_()
            g.tanh_()
            o.sigmoid_()
            torch.mul(f, self.c[t], out=self.c[t + 1]).addcmul_(i, g)
            torch.tanh(self.c[t + 1], out=self.tanh_c[t])
            torch.mul(o, self.tanh_c[t], out=self.h[t + 1])
        self._slopes: tuple[Tensor, ...] | None = None

    def slopes(self) -> tuple[Tensor, Tensor, Tensor]:
        """∂c or ∂h through each gate's aₜ, (T, B, 4, H);  ∂h/∂c;  ∂gate/∂a, (T, B, 4, H)."""
        if self._slopes is None:
            i, _, g, o = self.gates.chunk(4, -1)
            own = _by_gate(self.gates)
            bend = torch.addcmul(own, own, own, value=-1.0)  # of the logistic function
            torch.sub(1.0, g.square(), out=bend[:, :, 2])
            through = torch.empty_like(bend)
            for gate, factor in enumerate((g, self.c[:-1], i, self.tanh_c)):
                torch.mul(factor, bend[:, :, gate], out=through[:, :, gate])
            self._slopes = through, o * (1.0 - self.tanh_c.square()), bend
        return cast("tuple[Tensor, Tensor, Tensor]", self._slopes)

    def adjoint(self, G: Tensor, gc: Tensor, bulk: tuple[Tensor, Tensor, Tensor] | None = None) -> _Adjoints:
        """Reverse pass for cotangents G of every hₜ and gc of c_T, with further ones of aₜ, cₜ and cₜ₋₁ in ``bulk``."""
        through, bend_h, _ = self.slopes()
        f = self.gates.chunk(4, -1)[1]
        found = _Adjoints(torch.empty_like(through), torch.empty_like(G), torch.empty_like(G))
        flat = found.a.flatten(2)
        carry, dh = gc, G[-1]
        for t in range(len(G) - 1, -1, -1):
            dh = torch.addmm(G[t], flat[t + 1], self.W, out=found.h[t]) if t + 1 < len(G) else found.h[t].copy_(dh)
            dc = torch.addcmul(carry, dh, bend_h[t], out=found.c[t])
            if bulk is not None:
                dc += bulk[1][t]
            torch.mul(through[t, :, :3], dc.unsqueeze(1), out=found.a[t, :, :3])
            torch.mul(through[t, :, 3], dh, out=found.a[t, :, 3])
            carry = dc * f[t]
            if bulk is not None:
                found.a[t] += bulk[0][t]
                carry += bulk[2][t]
        found.h0, found.c0 = flat[0] @ self.W, carry
        return found

    def tangent(self, dA: Tensor, dW: Tensor | None, dh: Tensor, dc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Forward pass of tangents: those of aₜ, (T, B, 4, H), of h₀ .. h_T and of c₀ .. c_T."""
        through, bend_h, _ = self.slopes()
        f = self.gates.chunk(4, -1)[1]
        a, h, c = torch.empty_like(self.gates), torch.empty_like(self.h), torch.empty_like(self.c)
        h[0], c[0] = dh, dc
        if dW is not None:
            dA = dA + self.h[:-1] @ dW.t()
        Wt, parts = self.W.t().contiguous(), _by_gate(a)
        for t in range(len(a)):
            torch.addmm(dA[t], h[t], Wt, out=a[t])
            moved = parts[t] * through[t]
            torch.addcmul(moved[:, :3].sum(1), f[t], c[t], out=c[t + 1])
            torch.addcmul(moved[:, 3], bend_h[t], c[t + 1], out=h[t + 1])
        return parts, h, c


class _Adjoints:
    """Cotangents of aₜ (T, B, 4, H), hₜ and cₜ, and of h₀ and c₀."""

    h0: Tensor
    c0: Tensor

    def __init__(self, a: Tensor, h: Tensor, c: Tensor) -> None:
        self.a, self.h, self.c = a, h, c

    def weight(self, run: _Run) -> Tensor:
        """Σₜ āₜ hₜ₋₁ᵀ."""
        return self.a.flatten(2).flatten(0, 1).t() @ run.h[:-1].flatten(0, 1)


class _Layer(torch.autograd.Function):
    """(A, W, h₀, c₀) ↦ (h₁ .. h_T, c_T)."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, W: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        ctx.run = run = _Run(A, W, h, c)
        ctx.save_for_backward(A, W, h, c)
        return run.h[1:].clone(), run.c[-1].clone()

    @staticmethod
    def backward(ctx: Any, G: Tensor, gc: Tensor) -> tuple[Tensor | None, ...]:
        return cast("tuple[Tensor | None, ...]", _Backward.apply(ctx.run, G, gc, *ctx.saved_tensors))  # type: ignore[no-untyped-call]


class _Backward(torch.autograd.Function):
    """(G, gc; A, W, h₀, c₀) ↦ the gradients of ⟨G, h⟩ + ⟨gc, c_T⟩ in A, W, h₀, c₀."""

    @staticmethod
    def forward(
        ctx: Any, run: _Run, G: Tensor, gc: Tensor, A: Tensor, W: Tensor, h: Tensor, c: Tensor
    ) -> tuple[Tensor | None, ...]:
        found = run.adjoint(G, gc)
        # A context must not hold the tensors that it returns: their history is the context, so nothing would free them.
        ctx.run, ctx.found = run, _Adjoints(found.a.detach(), found.h, found.c)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(A, W, h, c)
        return found.a.flatten(2), found.weight(run) if _Weights.wanted else None, found.h0, found.c0

    @staticmethod
    def backward(
        ctx: Any, uA: Tensor | None, uW: Tensor | None, uh: Tensor | None, uc: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """⟨u, gradients⟩ = ⟨G, ḣ⟩ + ⟨gc, ċ_T⟩ for the tangents that start from u: one forward and one reverse pass."""
        run, found = ctx.run, ctx.found
        uA = torch.zeros_like(run.gates) if uA is None else uA
        uh = torch.zeros_like(run.h[0]) if uh is None else uh
        uc = torch.zeros_like(run.c[0]) if uc is None else uc
        da, dh, dc = run.tangent(uA, uW, uh, uc)
        second = _second(run, found, da, dc, uW)
        W = second.weight(run) + found.a.flatten(2).flatten(0, 1).t() @ dh[:-1].flatten(0, 1)
        return None, dh[1:], dc[-1], second.a.flatten(2), W, second.h0, second.c0


def _second(run: _Run, found: _Adjoints, da: Tensor, dc: Tensor, uW: Tensor | None) -> _Adjoints:
    """The reverse pass through the tangents: adjoints of aₜ, hₜ and cₜ, where those of their tangents are ``found``."""
    g = run.gates.chunk(4, -1)[2]
    _, bend_h, bend = run.slopes()
    moved = bend * da  # tangents of the gates
    # In place from here on: fresh arrays of this size cost as much as what is computed in them.
    bulk_a = torch.rsub(_by_gate(run.gates), 1.0, alpha=2.0)  # σ″/σ′
    torch.mul(g, -2.0, out=bulk_a[:, :, 2])  # tanh″/tanh′
    bulk_a.mul_(found.a).mul_(da)
    bulk_a[:, :, 0] += found.c * moved[:, :, 2] * bend[:, :, 0]
    bulk_a[:, :, 1] += found.c * dc[:-1] * bend[:, :, 1]
    bulk_a[:, :, 2] += found.c * moved[:, :, 0] * bend[:, :, 2]
    flat = 1.0 - run.tanh_c.square()
    bulk_a[:, :, 3] += found.h * flat * dc[1:] * bend[:, :, 3]
    bulk_c = found.h * (moved[:, :, 3] * flat - 2.0 * run.tanh_c * bend_h * dc[1:])
    bulk_before = found.c * moved[:, :, 1]
    steps = len(found.h)
    G = torch.zeros_like(found.h)
    if uW is not None:
        # aₜ's tangent holds Ẇ hₜ₋₁
        back = found.a.flatten(2) @ uW
        G[: steps - 1] = back[1:]
    second = run.adjoint(G, torch.zeros_like(run.c[0]), (bulk_a, bulk_c, bulk_before))
    if uW is not None:
        second.h0 = second.h0 + back[0]
    return second
