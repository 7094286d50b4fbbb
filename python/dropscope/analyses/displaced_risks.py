"""Risks at many displacements of the parameters: together under vmap where that is possible and pays."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from dropscope.memory import Live, budget
from dropscope.problem import Batch, Problem

MOST = 64  # displacements at once
SHARE = 0.25  # of the free memory of an accelerator, for a group
CACHE = 1 << 25  # bytes of a group on a CPU: beyond its caches a small convolutional network was twice as slow
AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative, of the two routes


class DisplacedRisks:
    """R(θ + V c) of many coefficient vectors c, dropout off.

    Parameters along which no column of V moves stay what they are, so that layers below the first that moves are
    computed once for a whole group. The first group is computed both ways: displacements go together under
    ``torch.func.vmap`` from then on if the model allows it (recurrent layers and control flow that reads values do
    not), the two agree, and it is the faster way; else one by one.

    Args:
        problem: the risk; its parameters are not touched.
        V: directions, (dim, k), of the problem's dtype.
        memory: bytes that a group may take, by default 32 MiB on a CPU, elsewhere a quarter of what is free.

    Attributes:
        evaluations: how many times the risk was evaluated on the whole data set.
        route: how, and why.
    """

    def __init__(self, problem: Problem, V: Tensor, memory: int | None = None) -> None:
        problem.check()
        self.problem, self.V, self.memory = problem, V, memory
        self.moved = [name for name, part in problem.blocks.items() if bool(V[part].count_nonzero())]
        self.evaluations = 0
        self.route = "one by one: no two were asked for at once"
        self._size: int | None = None  # of a group; 1 if one by one, None before the trial

    def __call__(self, C: Tensor, progress: bool = False) -> Tensor:
        """Return R(θ + V C) of every column of C, (k, m), float64 (m,) on the CPU; not finite where it overflows.

        Args:
            C: coefficients, (k, m).
            progress: show a bar.
        """
        C, out = C.to(self.V), []
        bar = tqdm(total=C.shape[1], desc="risks", unit="point", disable=not progress, leave=False)
        with torch.no_grad(), bar:
            if self._size is None and C.shape[1] > 1:
                out.append(self._trial(C))
                bar.update(len(out[0]))
            while (start := sum(map(len, out))) < C.shape[1]:
                out.append(self._group(C[:, start : start + (self._size or 1)]))
                bar.update(len(out[-1]))
        return torch.cat(out) if out else torch.zeros(0, dtype=torch.float64)

    def _trial(self, C: Tensor) -> Tensor:
        """The first group, both ways."""
        live = Live()
        with live:
            first = self._one_by_one(C[:, :1])
        each = max(live.peak, 1)
        # Rounds end with a few displacements each: a group of eight is representative, and cheap where it is slow.
        memory = CACHE if self.memory is None and self.problem.device.type == "cpu" else self.memory
        size = min(MOST, budget("DisplacedRisks", memory, self.problem.device, SHARE) // each)
        if size < 2:
            return self._alone("one by one: memory holds no two", first)
        C = C[:, : min(size, 8)]
        started = time.perf_counter()
        apart = torch.cat([first, self._one_by_one(C[:, 1:])])
        slow = (time.perf_counter() - started) / (C.shape[1] - 1)
        fast = float("inf")
        for _ in range(2):  # the first call of a kind is slower
            started = time.perf_counter()
            try:
                together = self._together(C)
            except Exception as error:  # a model may fail in any way on tensors that stand for many
                return self._alone(f"one by one: {type(error).__name__} under vmap", apart)
            fast = min(fast, (time.perf_counter() - started) / C.shape[1])
            if fast < slow:
                break
        if not torch.allclose(together, apart, AGREEMENT.get(self.problem.dtype, 1e-2), 0.0, equal_nan=True):
            return self._alone("one by one: vmap does not agree", apart)
        if fast >= slow:
            return self._alone("one by one: vmap is slower", apart)
        self._size, self.route = size, f"up to {size} at once"
        return together

    def _alone(self, why: str, risks: Tensor) -> Tensor:
        self._size, self.route = 1, why
        return risks

    def _group(self, C: Tensor) -> Tensor:
        return self._one_by_one(C) if C.shape[1] == 1 else self._together(C)

    def _one_by_one(self, C: Tensor) -> Tensor:
        return torch.cat([self._risks(c[None], lambda f, theta: f(_only(theta))[None]) for c in C.T])

    def _together(self, C: Tensor) -> Tensor:
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # vmap has no rules for it and for flash attention
        try:
            with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
                warnings.simplefilter("error")  # torch warns where it would loop inside one operation
                return self._risks(C.T, lambda f, theta: torch.func.vmap(f)(theta))
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)

    def _risks(self, rows: Tensor, over: Callable[[Callable[..., Tensor], dict[str, Tensor]], Tensor]) -> Tensor:
        """Risks of rows of coefficients, (m, k)."""
        problem, theta = self.problem, {}
        for name in self.moved:
            p, part = problem.params[name].detach(), problem.blocks[name]
            theta[name] = p + (rows @ self.V[part].T).view(-1, *p.shape)
        self.evaluations += len(rows)
        total = torch.zeros(len(rows), dtype=torch.float64, device=problem.device)
        for batch in problem.batches():
            total += over(partial(self._total, batch), theta) if theta else self._total(batch, {})
        return (total / problem.total_weight).cpu()

    def _total(self, batch: Batch, theta: dict[str, Tensor]) -> Tensor:
        values, _ = self.problem.substituted(theta, partial(self.problem.raw_losses, batch))
        return values.double().sum()


def _only(theta: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a group of one."""
    return {name: tensor[0] for name, tensor in theta.items()}
