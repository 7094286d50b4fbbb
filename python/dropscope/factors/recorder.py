"""One forward pass watched: calls that consume parameters go to their rules, which record them as uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from dropscope.factors.layers import LAYERS
from dropscope.factors.scales import SCALES
from dropscope.factors.uses import Dropped, Factors, Layout, Use, last_axis_bias
from dropscope.intercept import chained
from dropscope.mask_op import mask_rows

WeightPart = Callable[[Any, Tensor, int, Layout], Factors | Tensor]


class Postponed(NamedTuple):
    """An output that all rows share, kept alive as it is known by its id, and what its use is to be."""

    output: Tensor
    weight: Tensor
    lookup: Callable[[Tensor], Tensor]
    weight_part: WeightPart

    def add(self, x: Tensor, weight: Tensor, _: Tensor | None) -> Tensor:
        """What it becomes with the rows."""
        return x + self.lookup(weight)


class Recorder:
    """Handlers for one forward pass, and the uses that they recorded.

    Args:
        names: id of a parameter -> its name, for the parameters to capture.
        samples: samples in the pass.
        draws: draws of each; rows are sample-major.
    """

    def __init__(self, names: Mapping[int, str], samples: int, draws: int) -> None:
        self.names, self.samples, self.draws = names, samples, draws
        self.rows = samples * draws
        self.uses: list[Use] = []
        self._dropped: Dropped | None = None
        self._postponed: dict[int, Postponed] = {}

    def handlers(self) -> dict[Callable[..., Any], Callable[[Any], Any]]:
        """The functions that consume parameters, each with its rule."""
        rules = {**LAYERS, **SCALES}
        guarded = {function: self._guard(rule) for function, rule in rules.items()}
        return chained({torch.add: self._late, Tensor.add: self._late, mask_rows: self._watch}, guarded)

    def captures(self, parameter: object) -> bool:
        """Whether this is a parameter to capture."""
        return id(parameter) in self.names

    def forget(self) -> None:
        """Let go of what was held to recognise inputs."""
        self._dropped = None
        self._postponed.clear()

    def postpone(self, weight: Tensor, lookup: Callable[[Tensor], Tensor], weight_part: WeightPart) -> Tensor:
        """Return lookup(weight), which all rows share; its use is recorded where it is added to them."""
        y = lookup(weight.detach())
        self._postponed[id(y)] = Postponed(y, weight, lookup, weight_part)
        return y

    def _late(self, call: Any) -> Any:
        """A sum with what was postponed."""
        if not self._postponed or call.kwargs or len(call.args) != 2 or not torch.is_grad_enabled():
            return NotImplemented
        for x, y in (call.args, call.args[::-1]):
            late = self._postponed.get(id(y))
            if late is not None and isinstance(x, Tensor) and x.shape[1:] == y.shape[1:]:
                return self.run(x, late.weight, None, late.add, late.weight_part, keep=False)
        return NotImplemented

    def _watch(self, call: Any) -> Any:
        """Remember the mask just made if it is on what the draws share, as a single draw may."""
        x, *mask = call.args
        out = call.proceed()
        shared = self.draws == 1 or self._shared(x)
        self._dropped = Dropped(x, out, tuple(mask), self.draws) if shared else None
        return out

    def _guard(self, rule: Callable[..., Any]) -> Callable[[Any], Any]:
        def handler(call: Any) -> Any:
            operands = (*call.args, *call.kwargs.values())
            if not torch.is_grad_enabled() or not any(map(self.captures, operands)):
                return NotImplemented
            return rule(self, *call.args, **call.kwargs)

        return handler

    def _claim(self, parameter: Tensor | None, rooted: bool) -> tuple[str | None, Tensor | None]:
        """Name of a captured parameter and what stands for it in the graph."""
        if parameter is None or id(parameter) not in self.names:
            return None, parameter
        return self.names[id(parameter)], parameter.detach().requires_grad_(not rooted)

    def _shared(self, x: Tensor) -> bool:
        if self.draws == 1 or x.ndim < 2 or x.shape[0] != self.rows or not x.numel():
            return False
        grouped = x.detach().view(self.samples, self.draws, -1) if x.is_contiguous() else None
        if grouped is None or not torch.equal(grouped[0, 1:], grouped[0, :1].expand_as(grouped[0, 1:])):
            return False
        return torch.equal(grouped[:, 1:], grouped[:, :1].expand_as(grouped[:, 1:]))

    def run(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        function: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        weight_part: WeightPart,
        bias_part: Callable[[Tensor, int, Layout], Tensor] = last_axis_bias,
        *,
        paired: bool = False,
        shareable: bool = False,
        maskable: bool = False,
        keep: bool = True,
    ) -> Tensor:
        """Run a function that is linear in its parameters, and record the use.

        Args:
            x: the input.
            weight: a parameter.
            bias: another, or None.
            function: (x, weight, bias) -> output.
            weight_part: see :class:`Use`.
            bias_part: see :class:`Use`.
            paired: see :class:`Use`.
            shareable: where the draws of a sample have equal inputs, ``weight_part`` wants them once.
            maskable: ``weight_part`` takes :class:`Masked` inputs.
            keep: whether ``weight_part`` wants the inputs at all.

        Returns:
            The output.
        """
        rooted = x.requires_grad
        weight_name, weight = self._claim(weight, rooted)  # type: ignore[assignment]
        bias_name, bias = self._claim(bias, rooted or weight.requires_grad)
        shared = shareable and self._shared(x)
        if shared and not rooted:
            # Draws that have not met a mask yet: compute the sample once. Not when x has a history, because the
            # gradient would then return to the first draw only.
            y = function(x[:: self.draws], weight, bias).repeat_interleave(self.draws, 0)
        else:
            y = function(x, weight, bias)
        masked = None
        if maskable and not shared and self._dropped is not None and x.dtype == y.dtype == weight.dtype:  # no autocast
            masked = self._dropped.operand(x)
        seen = x.detach() if keep else x.new_empty(0)
        inputs = masked or (seen[:: self.draws].contiguous() if shared else seen)
        edge = get_gradient_edge(y)
        self.uses.append(Use(weight_name, bias_name, edge, inputs, weight_part, bias_part, paired, y.dtype))
        return y
