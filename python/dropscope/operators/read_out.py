"""The form in which dropout's mean and noise are known exactly: one dropout, a linear read-out, squared error.

With h(x) the features that dropout masks, W and b the read-out, f = W((1 + η) ∘ h) + b, and the loss of a sample
(c/2)‖f − y‖². For the keep probability k: η_r² = κ + γη_r with κ = (1 − k)/k = E η_r² and γ = (1 − 2k)/k. Let
u_r = W_r h_r be what unit r contributes, e = f − y without dropout. Then, by R^drop the sum over samples,

    R^drop = R + c [(κ/2) Σ_r ‖u_r‖² + Σ_r η_r φ_r + Σ_{r<s} η_r η_s ⟨u_r, u_s⟩],  φ_r = ⟨e, u_r⟩ + (γ/2)‖u_r‖²,

where the η_r and η_r η_s are uncorrelated: the first term is R1 (arXiv:2207.05952), the others are the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dropscope.intercept import Call
from dropscope.masks import MaskKey, keep_probability
from dropscope.problem import Batch, Problem
from dropscope.replay import arguments, is_parameter


@dataclass(frozen=True)
class ReadOut:
    """A batch at its read-out, dropout off, graphs attached.

    Attributes:
        features: h, (rows, ..., m).
        weight: W, (outputs, m).
        output: f, as the model gives it to the loss.
        target: what the loss compares f with.
        rows: number of samples.
        p: probability to drop.
        path: module that drops out.
    """

    features: Tensor
    weight: Tensor
    output: Tensor
    target: Any
    rows: int
    p: float
    path: str


class ReadOutForm:
    """A problem of the form, checked on a few samples. All methods but ``read`` are plain functions of tensors.

    Args:
        problem: model, loss and data.
        caller: named in errors.
        instead: what to do otherwise, for the errors.
        noise: whether the noise is wanted too, which needs features (rows, m); else R1 only.

    Attributes:
        curvature: c: 2 for ``MSELoss`` with one output, 1 for half the squared error.
        share: c/W, by which sums over samples become parts of the risk.
        keep: k = T/65536.
        units: m.

    Raises:
        ValueError: if the problem is not of the form; the message names what is not.
    """

    def __init__(self, problem: Problem, caller: str, instead: str, *, noise: bool = True) -> None:
        problem.check(masks=True)
        self.problem, self.caller, self.instead = problem, caller, instead
        with torch.no_grad():
            read = self.read(problem.sample)
        if noise and (problem.batch_dim != 0 or read.features.ndim != 2):
            raise self.refusal(f"features of shape {tuple(read.features.shape)}, which must be (rows, m)")
        self.keep, self.units = keep_probability(read.p), read.weight.shape[1]
        if not 0.0 < self.keep < 1.0:
            raise self.refusal(f"the drop probability {read.p} in module {read.path!r}, which leaves nothing to chance")
        self.curvature = self._curvature(read)
        self.share = self.curvature / problem.total_weight

    @property
    def kappa(self) -> float:
        """κ = E η²."""
        return (1.0 - self.keep) / self.keep

    @property
    def gamma(self) -> float:
        """γ of η² = κ + γη."""
        return (1.0 - 2.0 * self.keep) / self.keep

    def read(self, batch: Batch) -> ReadOut:
        """Run the model on a batch with dropout off.

        Raises:
            ValueError: if the model is not of the form.
        """
        seen = _Seen(self.refusal)
        handlers: dict[Callable[..., Any], Callable[[Call], Any]] = {F.dropout: seen.drop, F.linear: seen.linear}
        # Every other random function is replayed, and so leaves its name.
        output, target, rows = self.problem.raw_outputs(batch, MaskKey(0), handlers=handlers)
        return seen.read_out(output, target, rows)

    def penalty(self, read: ReadOut) -> Tensor:
        """(cκ/2) Σᵢ Σ_r ‖u_r‖², W·R1 of a batch."""
        squares = read.features.square().reshape(-1, self.units).sum(0)
        return 0.5 * self.curvature * self.kappa * (squares @ read.weight.square().sum(0))

    def error(self, read: ReadOut) -> Tensor:
        """E = f − y, (rows, outputs), with y by what the loss does: ∇(c/2)‖f − y‖² at f = 0 is −cy."""
        output = read.output
        zero = torch.zeros(output.shape, dtype=output.dtype, device=output.device)
        return (output + self._slope(read, zero) / self.curvature).reshape(read.rows, -1)

    def linear(self, read: ReadOut) -> Tensor:
        """φ of every sample, (rows, m)."""
        own = read.features * read.weight.square().sum(0)
        return read.features * (self.error(read) @ read.weight + 0.5 * self.gamma * own)

    def potential(self, read: ReadOut, z: Tensor) -> Tensor:
        """(c/W) Σᵢ [√κ Σ_r z_rr φ_r + κ Σ_{r<s} z_rs ⟨u_r, u_s⟩], whose gradient has Σ for normal z.

        Args:
            read: a batch.
            z: (rows, m, m), or (1, m, m) for a mask that all share.
        """
        first = (z.diagonal(dim1=-2, dim2=-1) * self.linear(read)).sum()
        pairs = z.triu(1) * (read.weight.T @ read.weight)
        inner = read.features @ pairs[0] if len(z) == 1 else torch.einsum("ir,irs->is", read.features, pairs)
        return self.share * (math.sqrt(self.kappa) * first + self.kappa * (inner * read.features).sum())

    def refusal(self, seen: str) -> ValueError:
        """The error that names what is not of the form."""
        return ValueError(
            f"{self.caller}: the problem must be one dropout, then a linear read-out, then a squared error "
            f"(c/2)‖f − y‖² for each sample; got {seen}; {self.instead}"
        )

    def _slope(self, read: ReadOut, at: Tensor) -> Tensor:
        """The gradient of the samples' losses by the output."""
        slope = torch.func.grad(lambda f: self.problem.losses_of(f, read.target, read.rows)[0].sum())
        result: Tensor = slope(at)
        return result

    def _curvature(self, read: ReadOut) -> float:
        """The c of a loss whose slope in f is c(f − y): between three points on a scale beyond f and y."""
        start = self._slope(read, read.output)
        signs = torch.randint(0, 2, read.output.shape, generator=torch.Generator().manual_seed(0)).to(start) * 2 - 1
        step = signs * (1.0 + read.output.abs().max() + start.abs().max())
        ratios = torch.stack(
            [(self._slope(read, read.output + size * step) - start) / (size * step) for size in (1.0, 30.0)]
        )
        c = float(ratios.double().mean())
        if not c > 0.0 or float((ratios - c).abs().max()) > 1e3 * torch.finfo(ratios.dtype).eps * c:
            raise self.refusal(str(self.problem.loss.loss))
        return c


class _Seen:
    """What one forward pass shows: the dropout, which is let through, and the linear map that reads it."""

    def __init__(self, refusal: Callable[[str], ValueError]) -> None:
        self.refusal = refusal
        self.p, self.path = 0.0, ""
        self.dropped: Tensor | None = None
        self.by: tuple[Tensor, Tensor] | None = None  # weight and result
        self.modes: list[Any] = []

    def drop(self, call: Call) -> Any:
        given = arguments(call, ("input", "p", "training", "inplace"))
        x, p = given["input"], float(given.get("p", 0.5))
        if not given.get("training", True) or p == 0.0:
            return x
        if is_parameter(x):
            raise self.refusal(f"dropout on a weight in module {call.path!r}")
        if self.dropped is not None:
            raise self.refusal(f"a second dropout, in module {call.path!r}")
        # A tensor of its own, by which the read-out is known from what reads x past the dropout.
        self.p, self.path, self.dropped = p, call.path, x.view_as(x)
        self.modes.append(call.mode)
        return self.dropped

    def linear(self, call: Call) -> Any:
        given, result = arguments(call, ("input", "weight", "bias")), call.proceed()
        self.modes.append(call.mode)
        if given["input"] is self.dropped:
            if self.by is not None:
                raise self.refusal(f"two linear maps of the dropped features, the second in module {call.path!r}")
            self.by = given["weight"], result
        return result

    def read_out(self, output: Any, target: Any, rows: int) -> ReadOut:
        others = [label for mode in self.modes for label in mode.sites.values()]
        if others:
            kind = "another kind of" if self.dropped is None else "a second"
            raise self.refusal(f"{kind} dropout, {others[0]!r}")
        if self.dropped is None:
            raise self.refusal("no active dropout")
        if self.by is None:
            raise self.refusal(f"a dropout in module {self.path!r} that no linear map reads directly")
        weight, result = self.by
        if not isinstance(output, Tensor) or not _same(output, result):
            raise self.refusal("something after the linear map that reads the dropout")
        return ReadOut(self.dropped, weight, output, target, rows, self.p, self.path)


def _same(output: Tensor, result: Tensor) -> bool:
    """Whether the output is the read-out's result or a view of all of it."""
    base = result if result._base is None else result._base
    return output is result or (output._base is base and output.numel() == result.numel())
