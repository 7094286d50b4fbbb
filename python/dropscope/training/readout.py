"""A linear read-out behind a dropout: the setting in which the mean over masks has a closed form (arXiv:2207.05952)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dropscope.intercept import Call, Handlers
from dropscope.masks import keep_probability
from dropscope.problem import Batch, Problem
from dropscope.randomness import Generators
from dropscope.replay import ELEMENTWISE, arguments, described


@dataclass(frozen=True)
class Readout:
    """One forward pass with dropout off, f(x) = W h(x) + b, where dropout would mask h.

    Attributes:
        features: h, what the dropout masks, shape (rows, ..., m).
        weight: W, shape (outputs, m).
        p: probability to drop.
        output: f, shape (rows, ..., outputs).
        target: what the loss compares it with.
        rows: number of samples.
    """

    features: Tensor
    weight: Tensor
    p: float
    output: Tensor
    target: Any
    rows: int

    @property
    def kappa(self) -> float:
        """κ = E η² = (1 − k)/k with the keep probability k = T/65536."""
        keep = keep_probability(self.p)
        return (1.0 - keep) / keep


class _Capture:
    """Handlers that let h through unmasked and remember it, its read-out and whether anything else was masked."""

    def __init__(self) -> None:
        self.p = 0.0
        self.features: Tensor | None = None
        self.weight: Tensor | None = None
        self.output: Tensor | None = None
        self.problem = ""

    def handlers(self) -> Handlers:
        handlers: dict[Callable[..., Any], Callable[[Call], Any]] = dict.fromkeys(ELEMENTWISE, self.other)
        return handlers | {F.dropout: self.dropout, F.linear: self.linear}

    def dropout(self, call: Call) -> Any:
        given = arguments(call, ("input", "p", "training", "inplace"))
        x, p = given["input"], float(given.get("p", 0.5))
        if not given.get("training", True) or p == 0.0:
            return NotImplemented
        if self.features is not None:
            self.problem = f"a second dropout, {described(call)}"
        self.features, self.p = x, p
        return x

    def other(self, call: Call) -> Any:
        self.problem = f"another kind of dropout, {described(call)}"
        return NotImplemented

    def linear(self, call: Call) -> Any:
        given = arguments(call, ("input", "weight", "bias"))
        out = call.proceed()
        if self.features is not None and given["input"] is self.features:
            self.weight, self.output = given["weight"], out
        return out


def capture_readout(problem: Problem, batch: Batch, name: str) -> Readout:
    """Run one forward pass in which the network's one dropout is off, and return what stands around it.

    Args:
        problem: model and data.
        batch: a batch of it.
        name: of the function that asks, for the error.

    Raises:
        ValueError: if the network has not exactly one active dropout call, whose output goes straight into the linear
            layer that gives the network's output.
    """
    seen = _Capture()
    output, target, rows = problem.raw_outputs(batch, handlers=seen.handlers(), train=True)
    if seen.features is None:
        seen.problem = seen.problem or "no active dropout"
    elif seen.weight is None:
        seen.problem = seen.problem or "a dropout that no linear layer reads"
    elif output is not seen.output:
        seen.problem = seen.problem or "something after the linear layer that reads the dropout"
    if seen.problem:
        raise ValueError(
            f"{name}: the network must have one dropout, read by the linear layer that gives the output, got "
            f"{seen.problem}"
        )
    assert seen.features is not None
    assert seen.weight is not None
    return Readout(seen.features, seen.weight, seen.p, output, target, rows)


def squared_curvature(problem: Problem, name: str) -> float:
    """The c of a loss whose value for a sample is (c/2)‖f − y‖²: 2 for ``MSELoss``, 1 for half of it.

    Raises:
        ValueError: if the loss is of another form, found by comparing its second derivatives at two points.
    """
    problem.check(masks=True)
    generators = Generators()
    with torch.no_grad():
        readout = capture_readout(problem, problem.sample, name)
    if generators.restore():
        raise ValueError(f"{name}: the network must have one dropout, before its read-out, got another random call")
    output = readout.output.detach()
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    ratios = []
    for point in (output, output + v):
        with torch.enable_grad():
            leaf = point.clone().requires_grad_()
            values, _ = problem.losses_of(leaf, readout.target, readout.rows)
            (slope,) = torch.autograd.grad(values.sum(), leaf, create_graph=True)
            bend = torch.zeros_like(v) if not slope.requires_grad else torch.autograd.grad(slope, leaf, v)[0]
        ratios.append(bend / v)
    ratios_all = torch.stack(ratios)
    c = float(ratios_all.mean())
    if c <= 0.0 or float((ratios_all - c).abs().max()) > 1e-4 * c:
        raise ValueError(
            f"{name}: the loss must be a squared error, (c/2)‖f − y‖² for each sample, got {problem.loss.loss}; "
            "for other losses there is training.explicit_penalty"
        )
    return float(round(c)) if abs(c - round(c)) < 1e-4 else c
