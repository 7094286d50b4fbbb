"""Factor kernels against the bare matrix products of the same shapes and against plain torch.

python bench/bench_factors.py [--rows 10000] [--draws 4] [--threads 2] [--rounds 15]

The network is 784-500-500-10 with one sequence step. Rounds are interleaved and medians printed; every answer is
checked against float64. "bare" are the products alone, torch.mm(out=) on whole float32 matrices; "shared" is the
first layer's input held once for all draws.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from dropscope import kernels

SIZES = (784, 500, 500, 10)


def interleaved(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for candidate in candidates.values():
        candidate()
    for _ in range(rounds):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


class Layers:
    """Factors, one vector and outputs of every layer in one dtype."""

    def __init__(self, rows: int, draws: int, dtype: torch.dtype, shared: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        self.rows, self.draws, self.dtype = rows, draws, dtype
        self.A, self.B, self.V = [], [], []
        for layer, (d_in, d_out) in enumerate(itertools.pairwise(SIZES)):
            A = normal(rows // draws, 1, d_in)
            if layer or not shared:
                A = A.repeat_interleave(draws, 0) + 0.5 * normal(rows, 1, d_in)
            self.A.append(A.to(dtype))
            self.B.append(normal(rows, 1, d_out).to(dtype))
            self.V.append((normal(1, d_out, d_in) / d_in).to(dtype if dtype == torch.float64 else torch.float32))
        self.wide = self.V[0].dtype
        self.out = [torch.zeros_like(v) for v in self.V]
        self.products = [torch.empty(rows, d, dtype=self.wide) for d in SIZES[1:]]

    def plain_factors(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(A, B, V) as full float matrices, A repeated."""
        repeat = [self.rows // len(A) for A in self.A]
        return [
            (A[:, 0].repeat_interleave(r, 0).to(self.wide), B[:, 0].to(self.wide), V[0])
            for A, B, V, r in zip(self.A, self.B, self.V, repeat, strict=True)
        ]

    def ours(self) -> list[Tensor]:
        """The product of the dropout-noise covariance with one vector, up to its scale."""
        s = torch.zeros(self.rows, 1, dtype=self.wide)
        for A, B, V in zip(self.A, self.B, self.V, strict=True):
            kernels.project(A, B, V, s)
        kernels.center(s, self.draws)
        for A, B, out in zip(self.A, self.B, self.out, strict=True):
            kernels.accumulate(A, B, s, out.zero_())
        return [x[0] for x in self.out]


def plain(factors: list[tuple[Tensor, Tensor, Tensor]], draws: int) -> list[Tensor]:
    """The same in torch, as one would write it."""
    s = sum(((A @ V.T) * B).sum(1) for A, B, V in factors)
    s = (s.view(-1, draws) - s.view(-1, draws).mean(1, keepdim=True)).view(-1, 1)
    return [(s * B).T @ A for A, B, _ in factors]


def relative_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Of all layers together."""
    pairs = list(zip(actual, expected, strict=True))
    error = sum(float((x.double() - y).square().sum()) for x, y in pairs)
    return float((error / sum(float(y.square().sum()) for _, y in pairs)) ** 0.5)


def bench_product(rows: int, draws: int, rounds: int) -> None:
    """One product with the covariance."""
    layers = {
        "ours": Layers(rows, draws, torch.float32, shared=False),
        "ours, shared input": Layers(rows, draws, torch.float32),
        "ours, bf16": Layers(rows, draws, torch.bfloat16, shared=False),
        "ours, bf16, shared input": Layers(rows, draws, torch.bfloat16),
    }
    factors = layers["ours"].plain_factors()
    buffers = [(torch.empty(rows, B.shape[1]), torch.empty_like(V)) for _, B, V in factors]

    def bare() -> None:
        for (A, B, V), (product, sums) in zip(factors, buffers, strict=True):
            torch.mm(A, V.T, out=product)
            torch.mm(B.T, A, out=sums)

    for name, case in layers.items():
        wide = [tuple(x.double() for x in layer) for layer in case.plain_factors()]
        error = relative_error(case.ours(), plain(wide, draws))
        print(f"  {name:28s} relative error {error:.1e}")
        assert error < (1e-5 if "bf16" not in name else 1e-2)
    times = interleaved(
        {"bare": bare, "plain torch": lambda: plain(factors, draws)} | {n: c.ours for n, c in layers.items()}, rounds
    )
    report("Σ-product", times)


def bench_gram(rows: int, draws: int, rounds: int) -> None:
    """The Gram matrix of all layers."""
    layers = {
        "ours": Layers(rows, draws, torch.float32, shared=False),
        "ours, shared input": Layers(rows, draws, torch.float32),
        "ours, bf16": Layers(rows, draws, torch.bfloat16, shared=False),
        "ours, bf16, shared input": Layers(rows, draws, torch.bfloat16),
    }
    factors = layers["ours"].plain_factors()
    out, buffer = torch.zeros(rows, rows), torch.empty(rows, rows)

    def ours(case: Layers) -> Tensor:
        layers = [(A, B, False) for A, B in zip(case.A, case.B, strict=True)]
        kernels.gram_sum(layers, layers, out.zero_())
        return out

    def bare() -> None:
        for A, B, _ in factors:
            torch.mm(A, A.T, out=buffer)
            torch.mm(B, B.T, out=buffer)

    def plain_gram(factors: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        return torch.stack([torch.zeros(())]).to(factors[0][0].dtype) + sum(
            (A @ A.T) * (B @ B.T) for A, B, _ in factors
        )

    for name, case in layers.items():
        expected = plain_gram([tuple(x.double() for x in layer) for layer in case.plain_factors()])
        error = relative_error([ours(case)], [expected])
        print(f"  {name:28s} relative error {error:.1e}")
        assert error < (1e-5 if "bf16" not in name else 1e-2)
    times = interleaved(
        {"bare": bare, "plain torch": lambda: plain_gram(factors)}
        | {n: (lambda c=c: ours(c)) for n, c in layers.items()},
        rounds,
    )
    report(f"Gram matrix, {rows} rows", times)


def report(title: str, times: dict[str, float]) -> None:
    """Medians and their ratio to the bare products."""
    print(title)
    for name, value in times.items():
        print(f"  {name:28s} {value:9.1f} ms   {value / times['bare']:5.2f} of the bare products")


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--gram-rows", type=int, default=4000)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, net {SIZES}, {arguments.draws} draws")
    bench_product(arguments.rows, arguments.draws, arguments.rounds)
    bench_gram(arguments.gram_rows, arguments.draws, max(3, arguments.rounds // 3))


if __name__ == "__main__":
    main()
