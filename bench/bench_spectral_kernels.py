"""Kernels of the spectral room against torch's products and against reading the basis; answers checked in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bench.harness import Contest, contest
from dropscope import kernels, reference

M, DIM = 25, 2_000_000


def basis(dtype: torch.dtype) -> torch.Tensor:
    Q = torch.randn(M, DIM, generator=torch.Generator().manual_seed(0))
    return (Q / Q.norm(dim=1, keepdim=True)).to(dtype)


def orthogonalization(dtype: torch.dtype, force: bool) -> Contest:
    Q = basis(dtype)
    start = torch.randn(DIM, generator=torch.Generator().manual_seed(1))
    if not force:  # nothing to remove: one read
        start -= Q.T.float() @ torch.linalg.solve(Q.float() @ Q.T.float(), Q.float() @ start)
    w = start.clone()

    def ours() -> Any:
        return kernels.orthogonalize(Q, w, force=force)

    def torch_products() -> torch.Tensor:
        v = w.to(dtype)
        c = Q @ v
        if force:
            v = v - Q.T @ c
        return v.norm()

    def check(_: Mapping[str, Any]) -> str:
        v = start.clone()
        expected_v = start.clone()
        c, norm, reads = kernels.orthogonalize(Q, v, force=force)
        expected, expected_norm, expected_reads = reference.orthogonalize(Q, expected_v, force=force)
        assert reads == expected_reads == 1 + force
        torch.testing.assert_close(c, expected, rtol=0, atol=1e-9 * float(start.norm()))
        assert abs(norm - expected_norm) < 1e-6 * expected_norm
        torch.testing.assert_close(v, expected_v)
        return f"{kernels.isa()}, {reads} read(s)"

    bits = Q.view(torch.int64)  # a sum of integers reads as fast as memory gives

    def read() -> int:
        return sum(int(bits.sum()) for _ in range(1 + force))

    return Contest(ours, check, {"torch products": torch_products}, ("reading the basis", read))


WORK = f"orthogonalize against {M} vectors of {DIM:.0e}"


@contest(f"{WORK}, float32, one read", within=1.15)
def one_read() -> Contest:
    return orthogonalization(torch.float32, False)


@contest(f"{WORK}, float32, two reads", within=1.15)
def two_reads() -> Contest:
    return orthogonalization(torch.float32, True)


@contest(f"{WORK}, bfloat16, two reads")
def two_reads_bfloat16() -> Contest:
    return orthogonalization(torch.bfloat16, True)


@contest(f"rotate a basis of {M} vectors of {DIM:.0e} to 15, in place", memory={"torch.mm": 0.5})
def rotation() -> Contest:
    Q = basis(torch.float32)
    S = torch.linalg.qr(torch.randn(M, M, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    S = S[:, :15].contiguous()

    def ours() -> None:
        kernels.rotate(Q, S)

    def check(_: Mapping[str, Any]) -> str:
        part = basis(torch.float32)[:, :100_003].contiguous()
        expected = part.clone()
        kernels.rotate(part, S)
        reference.rotate(expected, S)
        torch.testing.assert_close(part, expected, rtol=1e-6, atol=1e-9)
        return kernels.isa()

    def product() -> None:
        Q[:15] = S.T.float() @ Q

    return Contest(ours, check, {"torch.mm": product}, ("copying the basis", lambda: Q.clone()))


@contest("Rademacher probe of 2^24", threads=1)
def rademacher() -> Contest:
    out = torch.empty(2**24)

    def check(_: Mapping[str, Any]) -> str:
        part = kernels.probe(torch.empty(100_003), seed=1, index=2)
        assert torch.equal(part, reference.probe(torch.empty(100_003), seed=1, index=2))
        return kernels.isa()

    return Contest(
        lambda: kernels.probe(out, seed=1, index=2),
        check,
        {"torch.bernoulli": lambda: out.bernoulli_(0.5).mul_(2).sub_(1)},
        ("a write", lambda: out.fill_(1.0)),
    )


@contest("normal probe of 2^22", threads=1)
def normal() -> Contest:
    out = torch.empty(2**22)

    def check(_: Mapping[str, Any]) -> str:
        part = kernels.probe(torch.empty(100_003), seed=1, index=2, kind="normal")
        expected = reference.probe(torch.empty(100_003), seed=1, index=2, kind="normal")
        torch.testing.assert_close(part, expected, rtol=1e-6, atol=1e-9)
        return kernels.isa()

    return Contest(
        lambda: kernels.probe(out, seed=1, index=2, kind="normal"), check, {"torch.randn": lambda: out.normal_()}
    )
