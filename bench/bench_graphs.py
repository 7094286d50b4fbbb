"""Hessian products through kept graphs, through rebuilt ones, and with room for half of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bench.harness import Contest, contest
from bench.workloads import trained_mlp
from dropscope.memory import readable
from dropscope.operators.hessian import Hessian
from dropscope.problem import Problem


class Pooled(nn.Module):
    """Two encoder layers of width 64 over 32 tokens, pooled."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 256, activation="gelu", batch_first=True)
        self.embed = nn.Embedding(100, 64)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(64, 10)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.layers(self.embed(ids)).mean(1))


def _budgets(problem: Problem) -> Contest:
    v = torch.randn(problem.dim, generator=torch.Generator().manual_seed(0))
    whole = Hessian(problem)
    whole @ v
    size, count = whole._held, len(whole._kept)
    least = size // count + whole.peak - size + (1 << 20)
    operators = {
        "ours": whole,
        "half kept": Hessian(problem, memory=least + size // 2),
        "all rebuilt": Hessian(problem, memory=least),
    }

    def check(answers: Mapping[str, Tensor]) -> str:
        notes = []
        for name, H in operators.items():
            torch.testing.assert_close(answers[name], answers["ours"], rtol=1e-4, atol=1e-6)
            assert H.peak <= H.memory
            kept = "all kept" if H is whole else name
            notes.append(f"{kept}: {len(H._kept)} of {count}, peak {readable(H.peak)}")
        return "; ".join(notes)

    calls = {name: (lambda H=H: H @ v) for name, H in operators.items()}  # type: ignore[misc]
    return Contest(calls.pop("ours"), check, competitors=calls)


@contest("a Hessian product, 784-500-500-10, n=1000 in 8 batches, graphs kept", faster={"all rebuilt": 1.2}, rounds=5)
def network() -> Contest:
    model, x, y, _ = trained_mlp()
    return _budgets(Problem(model, nn.CrossEntropyLoss(), (x, y), batch_size=125))


@contest(
    "a Hessian product, two encoder layers of width 64, 64 sequences of 32 in 8 batches, graphs kept",
    faster={"all rebuilt": 1.2},
    rounds=5,
)
def transformer() -> Contest:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Pooled().eval()
        ids, y = torch.randint(0, 100, (64, 32)), torch.randint(0, 10, (64,))
    return _budgets(Problem(model, nn.CrossEntropyLoss(), (ids, y), batch_size=8))
