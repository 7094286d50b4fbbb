"""Whether several vectors go through a graph together: a trial on the first batch."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WIDEST = 8  # columns that go together, where they do
LEAST = 4  # columns from which a trial is made
GAIN = 0.85  # of the time of vectors one by one: noise of the clock shall not decide
SHORT = 5e-3  # seconds of a product: below, the trial is repeated
ROUNDS = 3  # so many times
LONG = (2e-2, 1e-1)  # on the CPU and on CUDA: beyond, overhead is nothing and a trial would only cost

Product = Callable[[Sequence[Tensor], bool], Sequence[Tensor] | None]  # directions by parameter, batched


@dataclass(frozen=True)
class BlockPlan:
    """How columns go through the graphs, and why.

    Attributes:
        width: columns that go together; 1 is one after the other.
        reason: what decided.
    """

    width: int
    reason: str


def try_block(product: Product, rows: Sequence[Sequence[Tensor]], device: torch.device) -> BlockPlan:
    """Time products one by one and together, the fastest of a few rounds of each.

    Args:
        product: the product through a kept graph; batched directions have the columns in dim 0.
        rows: vectors by parameter, at least :data:`LEAST`.
        device: where they are.
    """
    if torch.are_deterministic_algorithms_enabled():
        return BlockPlan(1, "one by one: deterministic algorithms are asked for, and a trial decides by the clock")
    _warm(device)
    one = _seconds(lambda: product(rows[0], False), device)
    if one > LONG[device.type == "cuda"]:
        return BlockPlan(1, f"one by one: a product takes {1e3 * one:.0f} ms, which is work and no overhead")
    width = min(len(rows), WIDEST if one < SHORT else LEAST)
    stacked = [torch.stack(parts) for parts in zip(*rows[:width], strict=True)]
    together = math.inf
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns where it loops over the columns by itself
            # By turns, so that a machine that slows down or speeds up does so for both.
            for row in rows[:ROUNDS] if one < SHORT else rows[:1]:
                together = min(together, _seconds(lambda: product(stacked, True), device) / width)
                one = min(one, _seconds(lambda row=row: product(row, False), device))  # type: ignore[misc]
    except (RuntimeError, NotImplementedError, UserWarning) as error:
        return BlockPlan(1, f"one by one: torch cannot batch this graph ({str(error).splitlines()[0]})")
    ratio = together / one
    timing = f"{width} together take {ratio:.2f} of the time a vector"
    return BlockPlan(WIDEST, f"together: {timing}") if ratio <= GAIN else BlockPlan(1, f"one by one: {timing}")


def _warm(device: torch.device) -> None:
    """Let torch load what its first batched derivative of a process loads."""
    x = torch.ones(2, device=device, requires_grad=True)
    with torch.enable_grad():
        torch.autograd.grad(x * x, x, torch.ones(2, 2, device=device), is_grads_batched=True)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """What a call takes; where this thread does all the work, of its own time, which other processes hardly change."""
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start
