"""The risk as a function of the flat parameters, under masks that differ from path to path, for ``torch.func``."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dropscope.intercept import Call, Handlers
from dropscope.mask_op import keep_threshold, mask_rows
from dropscope.masks import SHARED_SAMPLE, MaskKey, Sharing
from dropscope.operators.read_out import ReadOut, ReadOutForm
from dropscope.problem import Batch, Problem
from dropscope.randomness import Generators
from dropscope.replay import ELEMENTWISE, arguments, described, site_of


class FlatRisk:
    """R_S(θ) and R^drop(θ; η) of flat parameters, made to be differentiated and batched by ``torch.func``.

    Args:
        problem: model, loss and data; only ``F.dropout`` (``nn.Dropout``) may be active in it.
        sharing: ``"batch"`` for one mask that all samples share, ``"sample"`` for one each.
        seed: of the masks.

    Attributes:
        theta: the problem's parameters, flat and detached.
        sites: units of a sample and drop probability of each dropout call, in the order of the calls.
    """

    def __init__(self, problem: Problem, sharing: Sharing, seed: int) -> None:
        problem.check(masks=True)
        self.problem, self.sharing, self.seed = problem, sharing, MaskKey(seed).seed
        self.batches = list(problem.data)
        self.theta = problem.flatten([p.detach() for p in problem.params.values()]).clone()
        self.sites: list[tuple[int, float]] = []
        generators = Generators()
        with torch.no_grad():
            self._values(self.theta, self._look)
        if generators.restore():
            raise ValueError("simulate: the only random call must be nn.Dropout or F.dropout, got another")

    def clean(self, theta: Tensor) -> Tensor:
        """R_S."""
        parts = [
            self.problem.substituted(self.problem.unflatten(theta), partial(self.problem.raw_losses, batch))[0].sum()
            for batch in self.batches
        ]
        return torch.stack(parts).sum() / self.problem.total_weight

    def under_draw(self, theta: Tensor, draw: Tensor) -> Tensor:
        """The samples' shares of R^drop(θ; ``MaskKey(seed, draw)``), shape (n,); draw is an int64 scalar."""
        return self._values(theta, lambda call, _, batch: self._draw(call, draw, batch))

    def under_mask(self, theta: Tensor, kept: Tensor) -> Tensor:
        """The same under a mask given as zeros and ones, shape (units of all sites,), shared by all samples."""
        return self._values(theta, lambda call, start, _: self._given(call, kept, start))

    def read_outs(self, theta: Tensor, form: ReadOutForm) -> list[ReadOut]:
        """What stands around the network's one dropout, a batch each."""
        named = self.problem.unflatten(theta)
        return [self.problem.substituted(named, partial(form.read, batch)) for batch in self.batches]

    def _values(self, theta: Tensor, answer: Callable[[Call, int, Batch], Any]) -> Tensor:
        named, parts = self.problem.unflatten(theta), []
        for batch in self.batches:
            start = 0

            def drop(call: Call, batch: Batch = batch) -> Any:
                nonlocal start
                given = arguments(call, ("input", "p", "training", "inplace"))
                if not given.get("training", True) or float(given.get("p", 0.5)) == 0.0:
                    return NotImplemented
                first, start = start, start + math.prod(given["input"].shape) // batch.size
                return answer(call, first, batch)

            handlers: Handlers = dict.fromkeys(ELEMENTWISE, _refuse) | {F.dropout: drop}
            run = partial(self.problem.raw_losses, batch, handlers=handlers, train=True)
            parts.append(self.problem.substituted(named, run)[0])
        return torch.cat(parts) / self.problem.total_weight

    def _look(self, call: Call, start: int, batch: Batch) -> Any:  # noqa: ARG002
        given = arguments(call, ("input", "p"))
        if batch.index == 0:
            self.sites.append((math.prod(given["input"].shape) // batch.size, float(given.get("p", 0.5))))
        return given["input"]

    def _draw(self, call: Call, draw: Tensor, batch: Batch) -> Tensor:
        given, path, tally = arguments(call, ("input", "p")), call.path, call.mode.tally
        tally[path] = tally.get(path, 0) + 1
        ids = torch.full_like(batch.samples, SHARED_SAMPLE) if self.sharing == "batch" else batch.samples
        site, threshold = site_of(path, tally[path] - 1), keep_threshold(float(given.get("p", 0.5)))
        return mask_rows(given["input"], (draw << 32) | ids, self.seed, site, threshold)

    def _given(self, call: Call, kept: Tensor, start: int) -> Tensor:
        given = arguments(call, ("input", "p"))
        x = given["input"]
        keep = keep_threshold(float(given.get("p", 0.5))) / 65536.0
        part = kept[start : start + math.prod(x.shape[1:])].reshape(x.shape[1:])
        masked: Tensor = x * (part / keep)
        return masked


def _refuse(call: Call) -> Any:
    raise ValueError(f"simulate: the only active dropout must be nn.Dropout or F.dropout, got {described(call)}")
