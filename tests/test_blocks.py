"""Several vectors at once: the same products, only where a trial shows a gain, within the memory."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import cases
import dropscope as ds
from dropscope.masks import MaskKey
from dropscope.memory import Live
from dropscope.operators import SymmetricOperator, blocks
from dropscope.operators.blocks import BlockPlan, try_block
from dropscope.operators.gauss_newton import GaussNewton
from dropscope.operators.hessian import Hessian
from dropscope.problem import Problem

BATCHES = ["mlp", "batchnorm", "gpt", "transformer", "shared"]
CPU = torch.device("cpu")


def vectors(dim: int, k: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(dim, k, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("of", [Hessian, GaussNewton])
@pytest.mark.parametrize("key", [None, MaskKey(3, 2)], ids=str)
@pytest.mark.parametrize("name", [name for name in BATCHES if name in cases.CASES])
def test_together_is_one_by_one(name: str, key: MaskKey | None, of: type[Hessian]) -> None:
    problem = cases.CASES[name].problem()
    V = vectors(problem.dim, 11)
    together = of(problem, key, block=4)
    torch.testing.assert_close(together @ V, of(problem, key, block=1) @ V, rtol=1e-11, atol=1e-13)
    assert together.block == 4
    assert "as asked for" in together.plan()


@pytest.mark.parametrize("name", cases.SHARED_MASKS)
def test_parameters_outside_the_graph_have_zero_rows(name: str) -> None:
    problem = cases.shared_mask(name)
    V = vectors(problem.dim, 5)
    torch.testing.assert_close(
        Hessian(problem, MaskKey(1), block=5) @ V, Hessian(problem, MaskKey(1), block=1) @ V, rtol=1e-11, atol=1e-13
    )


def delayed(one: float, together: float) -> Callable[[object, bool], None]:
    """Products that keep the thread busy for so many seconds."""

    def product(vs: object, batched: bool) -> None:
        end = time.thread_time() + (together if batched else one)
        while time.thread_time() < end:
            pass

    return product


def test_other_work_on_the_machine_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time in which the thread waited is no time of the product."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    work = delayed(0.004, 0.008)

    def product(vs: object, batched: bool) -> None:
        work(vs, batched)
        time.sleep(0.1 * batched)

    assert try_block(product, [[torch.zeros(3)]] * 8, CPU).width == blocks.WIDEST


def test_a_slow_start_does_not_decide() -> None:
    """The first calls take ten times what the others do, in both ways of going."""
    calls = {False: 0, True: 0}

    def product(vs: object, batched: bool) -> None:
        calls[batched] += 1
        delayed(0.004, 0.008)(vs, batched) if calls[batched] > 1 else delayed(0.0045, 0.08)(vs, batched)

    assert try_block(product, [[torch.zeros(3)]] * 8, CPU).width == blocks.WIDEST


def test_the_trial_takes_what_is_faster() -> None:
    rows = [[torch.zeros(3)]] * 8
    gain, loss = try_block(delayed(0.004, 0.008), rows, CPU), try_block(delayed(0.004, 0.3), rows, CPU)
    long = try_block(delayed(0.03, 0.0), rows, CPU)
    assert gain.width == blocks.WIDEST
    assert "together take 0." in gain.reason
    assert loss.width == long.width == 1
    assert " together take " in loss.reason
    assert "which is work and no overhead" in long.reason


def test_what_cannot_be_batched_goes_one_by_one() -> None:
    def product(vs: object, batched: bool) -> None:
        if batched:
            raise RuntimeError("Batching rule not implemented for aten::x\nmore")

    plan = try_block(product, [[torch.zeros(3)]] * 4, CPU)
    assert plan == BlockPlan(1, "one by one: torch cannot batch this graph (Batching rule not implemented for aten::x)")


def test_deterministic_algorithms_are_not_decided_by_the_clock() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        plan = try_block(delayed(0.1, 0.0), [[torch.zeros(3)]] * 4, CPU)
    finally:
        torch.use_deterministic_algorithms(False)
    assert plan.width == 1
    assert "deterministic" in plan.reason


def test_the_result_of_the_trial_is_kept_and_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def trial(*arguments: object) -> BlockPlan:
        calls.append(arguments)
        return BlockPlan(3, "together: as the test says")

    monkeypatch.setattr("dropscope.operators.graphs.try_block", trial)
    problem = cases.CASES["mlp"].problem()
    H = Hessian(problem)
    assert "not tried yet" in H.plan()
    H @ vectors(problem.dim, 2)
    assert not calls  # too few columns to learn from
    for _ in range(2):
        torch.testing.assert_close(H @ vectors(problem.dim, 7), Hessian(problem, block=1) @ vectors(problem.dim, 7))
    assert H.block == (2 * H).block == (H + H).block == 3
    assert len(calls) == 1
    assert "columns  together: as the test says" in H.plan()


def test_a_block_takes_no_more_than_the_memory() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 64), nn.Tanh(), nn.Linear(64, 5))
    X = torch.randn(1000, 30)
    problem = Problem(model, nn.CrossEntropyLoss(), (X, torch.randint(0, 5, (1000,))), batch_size=500)
    V = vectors(problem.dim, 16, torch.float32)
    H = Hessian(problem, block=16)
    expected = H @ V
    held = sum(size for _, size in H._kept.values())
    work = int(held * H._work / H._size) // 2  # of a product through one of the two graphs
    tight = Hessian(problem, block=16, memory=held + 4 * work)
    with Live() as live:
        torch.testing.assert_close(tight @ V, expected, rtol=1e-4, atol=1e-6)
    assert 1 < tight._width(held // 2, True) <= 4
    assert tight.peak <= tight.memory
    assert live.peak <= tight.memory + 4 * V.nbytes


class Lockstep(SymmetricOperator):
    """A dense matrix that says it takes columns together."""

    def __init__(self, M: Tensor, block: int) -> None:
        self.M, self.width, self.widths = M, block, set[int]()
        self.dim, self.dtype, self.device, self.blocks = len(M), M.dtype, M.device, {}

    @property
    def block(self) -> int:
        return self.width

    def _matmat(self, V: Tensor) -> Tensor:
        self.widths.add(V.shape[1])
        return torch.stack([self.M @ v for v in V.T], 1)


@pytest.mark.parametrize("closing", [False, True])
def test_probes_in_lockstep_are_the_probes_one_by_one(closing: bool) -> None:
    i = torch.arange(60, dtype=torch.float64)
    M = torch.diag((i < 3).double() if closing else i)
    alone, together = Lockstep(M, 1), Lockstep(M, 3)
    first, second = (ds.spectral_density(A, probes=5, steps=20, seed=3) for A in (alone, together))
    assert torch.equal(first.nodes, second.nodes)
    assert torch.equal(first.weights, second.weights)
    assert first.matvecs == second.matvecs
    assert max(alone.widths) == 1
    assert max(together.widths) == 3
