"""Factor kernels on 784-500-500-10, and on long sequences, against bare matrix products and against plain torch.

The bare products are torch.mm(out=) of the same shapes on whole float32 matrices, nothing else done; answers are held
against float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bench.harness import REGISTRY, Contest, contest
from dropscope import kernels

SIZES = (784, 500, 500, 10)
DRAWS = 4
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.int8: 1e-2}


Layers = list[tuple[kernels.FirstOperand, Tensor]]


def factors(rows: int, dtype: torch.dtype, shared: bool, masked: bool = False) -> Layers:
    """(A, B) of every layer; where `shared`, the first layer's input is held once for all draws.

    Where `masked`, the second layer's is too, and masked where it is used: what follows the first dropout.
    """
    generator = torch.Generator().manual_seed(0)
    streams = torch.arange(rows) % DRAWS << 32 | torch.arange(rows) // DRAWS
    layers: Layers = []
    for layer, (d_in, d_out) in enumerate(pairwise(SIZES)):
        A = torch.randn(rows // DRAWS, 1, d_in, generator=generator)
        if layer > masked or not shared:
            A = A.repeat_interleave(DRAWS, 0) + 0.5 * torch.randn(rows, 1, d_in, generator=generator)
        B = torch.randn(rows, 1, d_out, generator=generator).to(dtype)
        if layer and masked and len(A) < rows:
            layers.append((kernels.Masked(A.to(dtype), streams, seed=0, site=1, threshold=52429), B))
        else:
            layers.append((A.to(dtype), B))
    return layers


def plain(layers: Layers, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """(A, B) as matrices of one row per sample and draw."""
    return [
        (kernels.whole(A)[:, 0].repeat_interleave(len(B) // A.shape[0], 0).to(dtype), B[:, 0].to(dtype))
        for A, B in layers
    ]


def checked(expected: Callable[[], Any], dtype: torch.dtype) -> Callable[[Mapping[str, Any]], str]:
    """A check of our answer, a list of tensors, against float64."""

    def check(answers: Mapping[str, Any]) -> str:
        pairs = list(zip(answers["ours"], expected(), strict=True))
        error = sum(float((x.double() - y).square().sum()) for x, y in pairs) ** 0.5
        error /= sum(float(y.square().sum()) for _, y in pairs) ** 0.5
        assert error < TOLERANCE[dtype], error
        return f"relative error {error:.0e}"

    return check


def product(rows: int, dtype: torch.dtype, shared: bool, masked: bool = False) -> Contest:
    """One product with the covariance of the dropout noise, up to its scale."""
    layers = factors(rows, dtype, shared, masked)
    V = [torch.randn(1, b, a, generator=torch.Generator().manual_seed(1)) / a for a, b in pairwise(SIZES)]
    out, wide = [torch.zeros_like(v) for v in V], plain(layers, torch.float32)
    buffers = [(torch.empty_like(B), torch.empty_like(v[0])) for (_, B), v in zip(wide, V, strict=True)]

    def ours(layers: Layers = layers) -> list[Tensor]:
        s = torch.zeros(rows, 1)
        for (A, B), v in zip(layers, V, strict=True):
            kernels.project(A, B, v, s)
        kernels.center(s, DRAWS)
        for (A, B), o in zip(layers, out, strict=True):
            kernels.accumulate(A, B, s, o.zero_())
        return [o[0] for o in out]

    def torch_loop(wide: list[tuple[Tensor, Tensor]] = wide, V: list[Tensor] = V) -> list[Tensor]:
        s = torch.stack([((A @ v[0].T) * B).sum(1) for (A, B), v in zip(wide, V, strict=True)]).sum(0)
        s = s.view(-1, DRAWS)
        s = (s - s.mean(1, keepdim=True)).view(-1, 1)
        return [(s * B).T @ A for A, B in wide]

    def bare() -> None:
        for (A, B), v, (rows_out, sums_out) in zip(wide, V, buffers, strict=True):
            torch.mm(A, v[0].T, out=rows_out)
            torch.mm(B.T, A, out=sums_out)

    check = checked(lambda: torch_loop(plain(layers, torch.float64), [v.double() for v in V]), dtype)
    competitors: dict[str, Callable[[], Any]] = {"plain torch": torch_loop}
    if masked:
        stored: Layers = [(kernels.whole(A), B) for A, B in layers]
        competitors[f"stored masked rows, {held(stored)} MB of factors, not {held(layers)}"] = lambda: ours(stored)
    return Contest(ours, check, competitors, ("bare products", bare))


def held(layers: Layers) -> int:
    """Megabytes of factors."""
    tensors = [x for A, B in layers for x in ((A.x, A.streams, B) if isinstance(A, kernels.Masked) else (A, B))]
    return round(sum(x.numel() * x.element_size() for x in tensors) / 1e6)


def gram(rows: int, dtype: torch.dtype, shared: bool) -> Contest:
    """The Gram matrix of all layers."""
    layers = factors(rows, torch.float32 if dtype == torch.int8 else dtype, shared)
    with_bias = [(A, B, False) for A, B in layers]
    out, buffer, wide = torch.zeros(rows, rows), torch.empty(rows, rows), plain(layers, torch.float32)

    def ours() -> list[Tensor]:
        if dtype == torch.int8:
            rounded = [(kernels.round_rows(A[:, 0]), kernels.round_rows(B[:, 0]), False) for A, B in layers]
            kernels.gram_rounded(rounded, rounded, out.zero_())
        else:
            kernels.gram_sum(with_bias, with_bias, out.zero_())
        return [out]

    def torch_loop(wide: list[tuple[Tensor, Tensor]] = wide) -> list[Tensor]:
        total = torch.zeros(rows, rows, dtype=wide[0][0].dtype)
        for A, B in wide:
            total += (A @ A.T) * (B @ B.T)
        return [total]

    def bare() -> None:
        for A, B in wide:
            torch.mm(A, A.T, out=buffer)
            torch.mm(B, B.T, out=buffer)

    check = checked(lambda: torch_loop(plain(layers, torch.float64)), dtype)
    return Contest(ours, check, {"plain torch": torch_loop}, ("bare products", bare))


@contest("Σ-product from factors, 10^4 rows, float32", within=1.1)
def product_float32() -> Contest:
    return product(10_000, torch.float32, shared=False)


@contest("Σ-product from factors, 10^4 rows, float32, input shared by 4 draws", within=1.0)
def product_shared() -> Contest:
    return product(10_000, torch.float32, shared=True)


@contest("Σ-product from factors, 10^4 rows, float32, input shared by 4 draws, first dropout remade", within=1.0)
def product_masked() -> Contest:
    return product(10_000, torch.float32, shared=True, masked=True)


@contest("Σ-product from factors, 10^4 rows, bfloat16 (bare: float32)", within=1.0)
def product_bfloat16() -> Contest:
    return product(10_000, torch.bfloat16, shared=False)


@contest("Gram matrix from factors, 4000 rows, float32", within=1.0, rounds=5)
def gram_float32() -> Contest:
    return gram(4000, torch.float32, shared=False)


@contest("Gram matrix from factors, 4000 rows, bfloat16 (bare: float32)", within=1.0, rounds=5)
def gram_bfloat16() -> Contest:
    return gram(4000, torch.bfloat16, shared=False)


@contest("Gram matrix from factors rounded to 8-bit integers, 4000 rows (bare: float32)", within=1.0, rounds=5)
def gram_int8() -> Contest:
    return gram(4000, torch.int8, shared=False)


@contest("Σ-product of 10 vectors at once, 64 sequences of 256 tokens, width 512", within=1.25, rounds=5)
def columns_sequences() -> Contest:
    """Against bare products with materialised gradients, which are the fewest multiply-adds."""
    (A, B), K = sequences(64, 256, 512), 10
    V = torch.randn(K, 512, 512, generator=torch.Generator().manual_seed(1)) / 512
    out, made, dots = torch.zeros(K, 512, 512), torch.empty(64, 512, 512), torch.empty(64, K)
    sums = torch.empty(K, 512 * 512)

    def ours() -> list[Tensor]:
        s = torch.zeros(64, K)
        kernels.project(A, B, V, s)
        kernels.accumulate(A, B, kernels.center(s, DRAWS), out.zero_())
        return [out]

    def exact() -> list[Tensor]:
        G = (B.double().mT @ A.double()).flatten(1)
        s = (G @ V.double().flatten(1).T).view(-1, DRAWS, K)
        return [((s - s.mean(1, keepdim=True)).view(-1, K).T @ G).view(K, 512, 512)]

    def bare() -> None:
        torch.bmm(B.mT, A, out=made)
        torch.mm(made.flatten(1), V.flatten(1).T, out=dots)
        torch.bmm(B.mT, A, out=made)
        torch.mm(dots.T, made.flatten(1), out=sums)

    return Contest(ours, checked(exact, torch.float32), ceiling=("bare products", bare))


def sequences(samples: int, steps: int, width: int) -> tuple[Tensor, Tensor]:
    """(A, B) of one layer on sequences."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(samples, steps, width, generator=generator) for _ in range(2))  # type: ignore[return-value]


@contest("Σ-product from factors, 64 sequences of 256 tokens, width 512, float32", within=1.1)
def product_sequences() -> Contest:
    A, B = sequences(64, 256, 512)
    V = torch.randn(1, 512, 512, generator=torch.Generator().manual_seed(1)) / 512
    out, flat = torch.zeros_like(V), (A.flatten(0, 1), B.flatten(0, 1))
    rows_out, sums_out = torch.empty_like(flat[1]), torch.empty_like(V[0])

    def ours() -> list[Tensor]:
        s = torch.zeros(64, 1)
        kernels.project(A, B, V, s)
        kernels.center(s, DRAWS)
        kernels.accumulate(A, B, s, out.zero_())
        return [out[0]]

    def torch_loop(A: Tensor = A, B: Tensor = B, V: Tensor = V) -> list[Tensor]:
        s = ((A @ V[0].T) * B).sum((1, 2)).view(-1, DRAWS)
        s = (s - s.mean(1, keepdim=True)).view(-1, 1, 1)
        return [(s * B).flatten(0, 1).T @ A.flatten(0, 1)]

    def bare() -> None:
        torch.mm(flat[0], V[0].T, out=rows_out)
        torch.mm(flat[1].T, flat[0], out=sums_out)

    check = checked(lambda: torch_loop(A.double(), B.double(), V.double()), torch.float32)
    return Contest(ours, check, {"plain torch": torch_loop}, ("bare products", bare))


def gram_sequences(samples: int, steps: int, width: int, ghost: bool) -> Contest:
    """The Gram matrix of one layer; the ceiling is the bare products of the cheaper of its two routes."""
    A, B = sequences(samples, steps, width)
    out, rows = torch.zeros(samples, samples), samples * steps
    wide = torch.empty(rows, rows) if ghost else torch.empty(samples, width, width)

    def ours() -> list[Tensor]:
        kernels.gram(A, B, A, B, out.zero_())
        return [out]

    def materialised(A: Tensor = A, B: Tensor = B) -> list[Tensor]:
        G = (B.mT @ A).flatten(1)
        return [G @ G.T]

    def bare() -> None:
        if ghost:
            for X in (A, B):
                torch.mm(X.flatten(0, 1), X.flatten(0, 1).T, out=wide)
        else:
            torch.bmm(B.mT, A, out=wide)
            torch.mm(wide.flatten(1), wide.flatten(1).T, out=out)

    check = checked(lambda: materialised(A.double(), B.double()), torch.float32)
    return Contest(ours, check, {"materialised": materialised}, ("bare products", bare))


@contest("Gram matrix from factors, 64 sequences of 256 tokens, width 512 (materialised route)", within=1.1, rounds=5)
def gram_long() -> Contest:
    return gram_sequences(64, 256, 512, ghost=False)


@contest("Gram matrix from factors, 400 sequences of 8 tokens, width 512 (ghost route)", within=1.1, rounds=5)
def gram_short() -> Contest:
    return gram_sequences(400, 8, 512, ghost=True)


@contest("squared norms of 10^4 per-sample gradients", within=1.5)
def sq_norms() -> Contest:
    """Against one sum over all factors, which reads the same bytes."""
    layers = factors(10_000, torch.float32, shared=False)

    def ours() -> list[Tensor]:
        return [sum((kernels.sq_norms(A, B) for A, B in layers), torch.zeros(10_000, dtype=torch.float64))]

    def torch_loop(layers: list[tuple[Tensor, Tensor]] = layers) -> list[Tensor]:
        parts = [A.square().sum((1, 2)) * B.square().sum((1, 2)) for A, B in layers]
        return [torch.stack(parts).sum(0)]

    def read() -> None:
        for A, B in layers:
            A.sum(), B.sum()

    check = checked(lambda: torch_loop([(A.double(), B.double()) for A, B in layers]), torch.float32)
    return Contest(ours, check, {"plain torch": torch_loop}, ("reading the factors", read))


@contest("product of Σ with 10 columns at once, 10^4 rows, input shared by 4 draws", faster={"column by column": 1.0})
def columns() -> Contest:
    rows, K = 10_000, 10
    layers = factors(rows, torch.float32, shared=True)
    V = [torch.randn(K, b, a, generator=torch.Generator().manual_seed(1)) / a for a, b in pairwise(SIZES)]

    def product(V: list[Tensor]) -> list[Tensor]:
        s, out = torch.zeros(rows, len(V[0])), [torch.zeros_like(v) for v in V]
        for (A, B), v in zip(layers, V, strict=True):
            kernels.project(A, B, v, s)
        kernels.center(s, DRAWS)
        for (A, B), o in zip(layers, out, strict=True):
            kernels.accumulate(A, B, s, o)
        return out

    def one_by_one() -> list[Tensor]:
        columns = [product([v[k : k + 1] for v in V]) for k in range(K)]
        return [torch.cat(parts) for parts in zip(*columns, strict=True)]

    def check(answers: Mapping[str, Any]) -> str:
        pairs = list(zip(answers["ours"], answers["column by column"], strict=True))
        error = max(float((x - y).norm() / y.norm()) for x, y in pairs)
        assert error < 1e-5, error
        return f"relative difference {error:.0e}"

    return Contest(lambda: product(V), check, {"column by column": one_by_one})


@contest(
    "Gram matrix of 200 per-sample gradients",
    faster={"materialised": 20},
    memory={"materialised": 0.1},
    rounds=3,
)
def gram_materialised() -> Contest:
    rows = 200
    layers = factors(rows, torch.float32, shared=False)
    with_bias = [(A, B, False) for A, B in layers]

    def ours() -> Tensor:
        out = torch.zeros(rows, rows)
        kernels.gram_sum(with_bias, with_bias, out)
        return out

    def materialised() -> Tensor:
        G, start = torch.empty(rows, sum(a * b for a, b in pairwise(SIZES))), 0
        for A, B in layers:
            end = start + A.shape[2] * B.shape[2]
            G[:, start:end].unflatten(1, (B.shape[2], A.shape[2])).copy_(B.mT * A)
            start = end
        return G @ G.T

    def check(answers: Mapping[str, Any]) -> str:
        error = float((answers["ours"] - answers["materialised"]).norm() / answers["materialised"].norm())
        assert error < 1e-5, error
        return f"relative difference {error:.0e}"

    return Contest(ours, check, {"materialised": materialised}, once=("materialised",))


def on_two_threads(one: Callable[[], Contest], within: float) -> None:
    """The same with two threads of torch and of our kernels."""

    def build() -> Contest:
        return one()

    build.__name__, build.__module__ = f"{one.__name__}_threads_2", __name__
    contest(REGISTRY[f"bench_factors:{one.__name__}"].work, within=within, threads=2)(build)


for ONE, WITHIN in ((product_float32, 1.1), (product_sequences, 1.1), (gram_float32, 1.0), (gram_long, 1.1)):
    on_two_threads(ONE, WITHIN)
