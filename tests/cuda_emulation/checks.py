"""What only the emulation can show of the CUDA kernels; run by ../test_cuda_emulation.py."""

from __future__ import annotations

import ctypes
import hashlib
import math
import mmap

import pytest
import torch

from dropscope import kernels, reference
from dropscope.kernels import _tiles as tiles

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
KEY = {"seed": 0xFEDCBA9876543210, "site": 0x0123456789ABCDEF, "threshold": 52429}
PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def memory(size: int) -> int:
    """The address of so many bytes of untouched memory, which cost nothing until they are written."""
    address = libc.mmap(None, size, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, -1, 0)  # MAP_NORESERVE
    assert address not in (None, ctypes.c_void_p(-1).value), "no address space"
    return int(address)


def at(address: int, dtype: torch.dtype, size: int) -> torch.Tensor:
    """A vector in that memory."""
    return torch.frombuffer((ctypes.c_char * (size * dtype.itemsize)).from_address(address), dtype=dtype)


def against_a_wall(x: torch.Tensor) -> torch.Tensor:
    """A copy of x whose last byte is followed by a page that nobody may touch."""
    size = x.numel() * x.dtype.itemsize
    pages = -(-size // PAGE) * PAGE
    start = memory(pages + PAGE)
    assert libc.mprotect(start + pages, PAGE, 0) == 0
    return at(start + pages - size, x.dtype, x.numel()).view(x.shape).copy_(x)


def test_the_kernels_are_the_emulated_ones():
    assert kernels.isa() == "emulated CUDA"


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("units", [1, 2, 7, 8, 9, 10, 12, 63, 64, 66, 500, 513, 1000])
def test_masks_equal_the_definition_bit_for_bit(dtype, units):
    streams = torch.randint(2**62, (70,), generator=torch.Generator().manual_seed(units))
    for rows in (1, 3, 70):
        x, stream = torch.randn(rows, units).to(dtype), streams[:rows]
        assert torch.equal(kernels.apply_mask(x, stream, **KEY), reference.apply_mask(x, stream, **KEY))
        assert torch.equal(kernels.keep_mask(stream, units, **KEY), reference.keep_mask(stream, units, **KEY))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("units", [1, 8, 10, 64, 500, 513])
def test_rows_that_share_what_is_masked(dtype, units):
    # Threads stride over many rows: what they carry from one to the next is what a division would give.
    for group, skip, rows in ((1, 0, 400), (2, 1, 401), (5, 3, 137), (7, 0, 203), (1000, 990, 60)):
        x = torch.randn(-(-(skip + rows) // group), units).to(dtype)
        actual = kernels.apply_mask(x, torch.arange(rows), group=group, skip=skip, **KEY)
        assert torch.equal(actual, reference.apply_mask(x, torch.arange(rows), group=group, skip=skip, **KEY))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [1, 5, 37, 64, 130])
def test_nothing_is_read_or_written_beyond_the_end(dtype, cols):
    def wall(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return against_a_wall(torch.randn(*shape).to(of))

    sums = torch.float64 if dtype == torch.float64 else torch.float32
    streams = against_a_wall(torch.arange(5))
    kernels.apply_mask(wall(5, cols), streams, out=wall(5, cols), **KEY)
    kernels.orthogonalize(wall(5, cols), wall(cols), force=True)
    kernels.orthogonalize(wall(5, cols), wall(cols, of=torch.float32), force=True)
    kernels.rotate(wall(5, cols), wall(5, 3, of=torch.float64))
    for kind in ("rademacher", "normal"):
        kernels.probe(wall(cols), seed=1, index=2, kind=kind)
    tiles.row_dots(wall(3, 2 * cols), wall(6, cols), wall(6, 2, of=sums), 2)
    tiles.row_dots(wall(6, cols), wall(12, cols), wall(6, 1, of=sums), 2, 2)
    tiles.scale_rows(wall(12, cols), wall(6, 2, of=sums), wall(4, 2 * cols), 3, 2)
    tiles.hadamard(wall(3, cols), wall(6, cols), wall(6, cols, of=sums), wall(cols, 6, of=sums), groups=(2, 1))
    tiles.hadamard(wall(6, 3 * cols), wall(6, 3 * cols), wall(3, cols, of=sums), steps=(2, 3))
    tiles.center_rows(wall(6, cols, of=sums), 3, 2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [5, 37, 63, 129])
def test_padding_between_aligned_rows_is_neither_read_nor_written(dtype, cols):
    # Rows start at multiples of 16 bytes and end inside a vector: the tails of the vector loads and stores.
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    made: list[torch.Tensor] = []

    def padded(rows: int, width: int, of: torch.dtype = dtype, zero: bool = False) -> torch.Tensor:
        wide = torch.full((rows, (width + 8) // 8 * 8), math.nan, dtype=of)
        generator = torch.Generator().manual_seed(len(made))
        wide[:, :width] = 0 if zero else torch.randn(rows, width, generator=generator)
        made.append(wide[:, width:])
        return wide[:, :width]

    def dense(x: torch.Tensor) -> torch.Tensor:
        return x.contiguous().clone()

    streams = torch.arange(6)
    P, Q, S = padded(3, cols), padded(6, cols), torch.randn(6, 2, dtype=sums)
    out, mirror = padded(6, cols, sums, zero=True), padded(cols, 6, sums, zero=True)
    tiles.hadamard(P, Q, out, mirror, groups=(2, 1), shift=1.0)
    expected = (dense(P).repeat_interleave(2, 0).to(sums) + 1) * dense(Q).to(sums)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mirror, out.T)
    dots = padded(6, 1, sums, zero=True)
    tiles.row_dots(P, Q, dots, 2)
    torch.testing.assert_close(dots[:, 0], (dense(P).repeat_interleave(2, 0).to(sums) * dense(Q).to(sums)).sum(1))
    packed = padded(2, cols)
    tiles.scale_rows(Q, S[:, :1], packed, 3)
    exact = (S[:, :1] * dense(Q).to(sums)).view(2, 3, cols).sum(1).to(dtype)
    torch.testing.assert_close(packed, exact, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    X = padded(6, cols, sums)
    centred = reference.center(dense(X), 3, 2.0)
    torch.testing.assert_close(kernels.center(X, 3, 2.0), centred)
    x, masked = padded(6, cols), padded(6, cols)
    kernels.apply_mask(x, streams, out=masked, **KEY)
    assert torch.equal(masked, reference.apply_mask(dense(x), streams, **KEY))
    shared = {"group": 3, "skip": 1, **KEY}
    kernels.apply_mask(x[:3], streams, out=masked, **shared)
    assert torch.equal(masked, reference.apply_mask(dense(x)[:3], streams, **shared))
    basis, w, R = padded(6, cols), torch.randn(cols).to(dtype), torch.randn(6, 4, dtype=torch.float64)
    rotated = dense(basis)
    c = kernels.orthogonalize(basis, w.clone(), force=True)[0]
    torch.testing.assert_close(c, dense(basis).double() @ w.double(), rtol=1e-5, atol=1e-5)
    kernels.rotate(basis, R)
    reference.rotate(rotated, R)
    torch.testing.assert_close(basis, rotated, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert all(bool(padding.isnan().all()) for padding in made)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [0, 3])
def test_offsets_beyond_32_bits(dtype, shift):
    # Rows 2^32 elements and some apart: an index kept in 32 bits falls on another row or outside.
    stride, cols = 2**32 + 8 + shift, 300
    buffer = at(memory((2 * stride + cols) * dtype.itemsize), dtype, 2 * stride + cols)

    def far() -> torch.Tensor:
        x = buffer.as_strided((3, cols), (stride, 1))
        return x.copy_(torch.randn(3, cols, generator=torch.Generator().manual_seed(0)))

    def close() -> torch.Tensor:  # aligned alike, so that sums run in the same order
        return torch.zeros(3, 304 + shift, dtype=dtype)[:, :cols].copy_(far())

    near, streams = close(), torch.arange(3)
    assert torch.equal(kernels.apply_mask(far(), streams, **KEY), kernels.apply_mask(near, streams, **KEY))
    assert torch.equal(kernels.apply_mask(far(), streams, out=far(), **KEY), kernels.apply_mask(near, streams, **KEY))
    w, v = near[1].clone(), near[1].clone()
    assert torch.equal(kernels.orthogonalize(far(), w, force=True)[0], kernels.orthogonalize(near, v, force=True)[0])
    assert torch.equal(w, v)
    x, y, S = far(), close(), torch.randn(3, 2, dtype=torch.float64)
    kernels.rotate(x, S)
    kernels.rotate(y, S)
    assert torch.equal(x, y)
    dots, near_dots = torch.zeros(3, 1), torch.zeros(3, 1)
    tiles.row_dots(far(), far(), dots)
    tiles.row_dots(near, near, near_dots)
    assert torch.equal(dots, near_dots)
    weights = torch.ones(3, 1, dtype=torch.promote_types(dtype, torch.float32))
    packed = [tiles.scale_rows(x, weights, torch.empty(1, cols, dtype=dtype), 3) for x in (far(), near)]
    assert torch.equal(*packed)
    out, near_out = torch.zeros(3, cols), torch.zeros(3, cols)
    tiles.hadamard(far(), far(), out)
    tiles.hadamard(near, near, near_out)
    assert torch.equal(out, near_out)
    if dtype != torch.bfloat16:
        centred = kernels.center(far(), 3).clone()  # close() fills the same memory anew
        assert torch.equal(centred, kernels.center(close(), 3))


def test_coefficients_of_more_rows_than_a_block_keeps():
    Q = torch.linalg.qr(torch.randn(700, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0].T
    Q = Q.contiguous()
    w = torch.randn(700, dtype=torch.float64)
    expected = w.clone()
    c, norm, _ = kernels.orthogonalize(Q, w, force=True)
    exact, exact_norm, _ = reference.orthogonalize(Q, expected, force=True)
    torch.testing.assert_close(c, exact)
    torch.testing.assert_close(w, expected)
    assert norm == pytest.approx(exact_norm)


def test_print_a_digest_of_all_sums(capsys):
    # The same for every order in which threads and blocks run: the caller compares several.
    generator, digest = torch.Generator().manual_seed(0), hashlib.sha256()

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    for dtype in DTYPES:
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        Q, w = normal(13, 20011, dtype=dtype) / math.sqrt(20011), normal(20011, dtype=dtype)
        c, norm, _ = kernels.orthogonalize(Q, w, force=True)
        kernels.rotate(Q, normal(13, 9, dtype=torch.float64))
        results = [c, torch.tensor([norm]), w, Q]
        A, B = normal(60, 1, 33, dtype=dtype), normal(120, 1, 70, dtype=dtype)
        K, P, G = torch.zeros(120, 120, dtype=sums), torch.zeros(120, 2, dtype=sums), torch.zeros(2, 70, 33, dtype=sums)
        kernels.gram(A, B, A, B, K)
        kernels.project(A, B, normal(2, 70, 33, dtype=dtype), P)
        kernels.accumulate(A, B, P, G)
        long = torch.zeros(4, 4, dtype=sums)
        tiles.hadamard(normal(200, 240, dtype=dtype), normal(200, 240, dtype=dtype), long, steps=(50, 60))
        for x in (*results, K, P, G, long, kernels.center(K.clone(), 3)):
            digest.update(x.contiguous().view(torch.uint8).numpy().tobytes())
    with capsys.disabled():
        print(f"\ndigest {digest.hexdigest()}")
