"""The one form whose dropout noise is known exactly: one dropout, then a linear read-out, then a squared loss.

With ξ = 1 + η the mask of the last hidden layer, h its features, W and b the read-out: f = W(ξ ∘ h) + b. Everything
about the noise then follows from h, W, b and the targets.
"""

from __future__ import annotations

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

_FORM = "dropout on the last hidden layer, a linear read-out, squared loss"


@dataclass(frozen=True)
class ReadOut:
    """A batch at its read-out, graphs attached.

    Attributes:
        features: h, (rows, m), dropout off.
        weight: W, (d, m).
        residual_target: y - b, (rows, d).
    """

    features: Tensor
    weight: Tensor
    residual_target: Tensor


@dataclass(frozen=True)
class Form:
    """What does not depend on the parameters.

    Attributes:
        keep: the keep probability, T/65536.
        scale: c of R = c · (1/2n) Σ_i ‖f_i - y_i‖².
        units: m.
        path: module that drops out.
    """

    keep: float
    scale: float
    units: int
    path: str

    @property
    def kappa(self) -> float:
        """κ = E η² = (1-p)/p, p the keep probability."""
        return (1.0 - self.keep) / self.keep

    @property
    def gamma(self) -> float:
        """γ of η² = κ + γη, (1-2p)/p."""
        return (1.0 - 2.0 * self.keep) / self.keep


class Reader:
    """Follows one forward pass to its read-out, and refuses by name what is not of the form.

    Args:
        caller: named in errors.
    """

    def __init__(self, caller: str) -> None:
        self.caller = caller
        self.p = 0.0
        self.path = ""
        self._clear()

    def _clear(self) -> None:
        self._dropped: Tensor | None = None
        self._linear: tuple[Tensor, Tensor, Tensor | None, Tensor] | None = None
        self._modes: list[Any] = []

    def read(self, problem: Problem, batch: Batch) -> ReadOut:
        """Run the model on a batch, dropout replaced by its mean, and return its read-out.

        Raises:
            ValueError: if the model is not of the form; the message names what is not.
        """
        self._clear()
        handlers: dict[Callable[..., Any], Callable[[Call], Any]] = {F.dropout: self._drop, F.linear: self._read}
        output, target, _ = problem.raw_outputs(batch, MaskKey(0), handlers=handlers)
        sites = [label for mode in self._modes for label in getattr(mode, "sites", {}).values()]
        if sites:
            raise self._refusal(f"a second dropout, {sites[0]!r}")
        if self._dropped is None:
            raise self._refusal("a model without an active F.dropout or nn.Dropout")
        if self._linear is None:
            raise self._refusal(f"a dropout in module {self.path!r} whose result does not enter an nn.Linear directly")
        features, weight, bias, result = self._linear
        if not isinstance(output, Tensor) or not _same(output, result):
            raise self._refusal("a model that does something after the linear map that follows the dropout")
        if not isinstance(target, Tensor) or target.numel() != output.numel():
            raise self._refusal("targets that are not a tensor of the output's size")
        target = target.to(output.dtype).reshape(result.shape)
        return ReadOut(features, weight, target if bias is None else target - bias)

    def _drop(self, call: Call) -> Any:
        given = arguments(call, ("input", "p", "training", "inplace"))
        x, p = given["input"], float(given.get("p", 0.5))
        if not given.get("training", True) or p == 0.0:
            return x
        if is_parameter(x):
            raise self._refusal(f"dropout on a weight in module {call.path!r}")
        if self._dropped is not None:
            raise self._refusal(f"a second dropout, in module {call.path!r}")
        if x.ndim != 2:
            raise self._refusal(f"features of shape {tuple(x.shape)} in module {call.path!r}, which must be (rows, m)")
        self.p, self.path = p, call.path
        self._modes.append(call.mode)
        self._dropped = x.clone()  # storage of its own, by which the read-out is known
        return self._dropped

    def _read(self, call: Call) -> Any:
        given, result = arguments(call, ("input", "weight", "bias")), call.proceed()
        if self._dropped is not None and given["input"].data_ptr() == self._dropped.data_ptr():
            if self._linear is not None:
                raise self._refusal(f"two linear maps of the dropped features, the second in module {call.path!r}")
            self._linear = (given["input"], given["weight"], given.get("bias"), result)
        return result

    def _refusal(self, seen: str) -> ValueError:
        return ValueError(f"{self.caller}: the exact covariance needs {_FORM}; got {seen}; use method='sampled'")


def find_form(problem: Problem, caller: str) -> Form:
    """Check on a few samples that the problem is of the form.

    Raises:
        ValueError: if it is not; the message names what is not.
    """
    problem.check(masks=True)
    reader = Reader(caller)
    batch = problem.sample
    if problem.batch_dim != 0:
        raise ValueError(f"{caller}: batch_dim must be 0 for the exact covariance, got {problem.batch_dim}")
    with torch.no_grad():
        factor = _square_factor(problem, *problem.raw_outputs(batch), caller)
        read = reader.read(problem, batch)
    keep = keep_probability(reader.p)
    if not 0.0 < keep < 1.0:
        raise ValueError(f"{caller}: the drop probability must lie between 0 and 1, got {reader.p}")
    return Form(keep, 2.0 * factor * problem.scale, read.weight.shape[1], reader.path)


def _square_factor(problem: Problem, output: Any, target: Any, rows: int, caller: str) -> float:
    """A of s_i = a‖f_i - y_i‖², found on random outputs; refused where there is no such a."""
    generator = torch.Generator().manual_seed(0)
    ratios = []
    if not isinstance(output, Tensor) or not isinstance(target, Tensor) or output.numel() != target.numel():
        raise ValueError(f"{caller}: the exact covariance needs {_FORM}; got {problem.loss.loss}; use method='sampled'")
    for size in (1.0, 3.0):
        noise = size * torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
        try:
            values, _ = problem.losses_of(target.to(output.dtype).reshape(output.shape) + noise, target, rows)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ValueError(f"{caller}: the exact covariance needs {_FORM}; got {problem.loss.loss}") from error
        ratios.append(values.double() / noise.double().reshape(rows, -1).square().sum(1))
    ratio = torch.cat(ratios)
    mean = float(ratio.mean())
    if not mean > 0.0 or float((ratio - mean).abs().max()) > 1e3 * torch.finfo(output.dtype).eps * mean:
        raise ValueError(f"{caller}: the exact covariance needs {_FORM}; got {problem.loss.loss}; use method='sampled'")
    return mean


def _same(output: Tensor, result: Tensor) -> bool:
    """Whether the output is the read-out's result or a view of all of it."""
    return output is result or (output.data_ptr() == result.data_ptr() and output.numel() == result.numel())
