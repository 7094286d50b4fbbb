"""Gram matrices from factors rounded to 8-bit integers: exact for the rounded factors, near for the others."""

from __future__ import annotations

import pytest
import torch

from dropscope import kernels, reference
from dropscope.kernels import integers

# samples, samples that share a row of A, d_in, d_out
SHAPES = {"one": (1, 1, 1, 1), "odd": (7, 1, 5, 3), "shared": (24, 3, 40, 33), "tiles": (1230, 5, 19, 500)}
ALL_SHAPES = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
NATIVE = pytest.mark.parametrize("native", [True, False], ids=["units", "float"])


@pytest.fixture
def choose(monkeypatch):
    """Products by integer units, where torch has them, or in float32."""

    def choose(native):
        if native and not hasattr(torch, "_int_mm"):
            pytest.skip("torch has no product of integers")
        monkeypatch.setattr(integers, "native_int8", lambda: native)

    return choose


def layer(shape, bias=True, seed=0):
    samples, group, d_in, d_out = shape
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(*size, generator=generator) for size in ((samples // group, d_in), (samples, d_out)))
    return kernels.round_rows(A), kernels.round_rows(B * 3), bias


def widened(layer):
    A, B = ((x.values.double() * x.scales.double().unsqueeze(1)).unsqueeze(1) for x in layer[:2])
    return A, B


def expected(rows, cols, start):
    out = start.double().clone()
    for x, y in zip(rows, cols, strict=True):
        reference.gram(*widened(x), *widened(y), out, bias=x[2])
    return out


@ALL_SHAPES
@NATIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_is_that_of_the_rounded_factors(shape, native, dtype, choose):
    choose(native)
    rows = [layer(shape), layer((shape[0], 1, 6, 2), bias=False, seed=1)]
    start = torch.randn(shape[0], shape[0], generator=torch.Generator().manual_seed(2), dtype=dtype)
    start = start + start.T
    half = start.clone()
    kernels.gram_rounded(rows, rows, half)
    truth = expected(rows, rows, start)
    assert float((half.double() - truth).norm() / truth.norm()) < 1e-6
    assert torch.equal(half, half.T)
    cols = [layer((6, 2, *shape[2:]), seed=3), layer((6, 3, 6, 2), bias=False, seed=4)]
    out = torch.ones(shape[0], 6, dtype=dtype)
    truth = expected(rows, cols, out)
    kernels.gram_rounded(rows, cols, out)
    assert float((out.double() - truth).norm() / truth.norm()) < 1e-6


def test_rounding_is_to_the_nearest_and_scales_with_the_row():
    x = torch.randn(700, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x *= torch.logspace(-20, 20, 700, dtype=torch.float64).unsqueeze(1)
    x[3] = 0.0
    values, scales = kernels.round_rows(x)
    assert values.dtype == torch.int8
    assert not values[3].any()
    step = x.abs().amax(1) / 127
    torch.testing.assert_close(scales.double(), step, rtol=1e-6, atol=0)
    assert bool(((values.double() * scales.double().unsqueeze(1) - x).abs() <= 0.5001 * step.unsqueeze(1)).all())
    assert values.abs().amax(1)[step > 0].eq(127).all()
    assert not kernels.round_rows(torch.full((2, 3), 1e-35)).scales.any()


def test_rounding_costs_a_gram_matrix_what_it_says():
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(300, 500, generator=generator), torch.randn(300, 400, generator=generator)
    out, truth = torch.zeros(300, 300), torch.zeros(300, 300, dtype=torch.float64)
    rounded = [(kernels.round_rows(A), kernels.round_rows(B), False)]
    kernels.gram_rounded(rounded, rounded, out)
    reference.gram(*(x.double().unsqueeze(1) for x in (A, B, A, B)), truth)
    norms = truth.diagonal().sqrt()
    error = (out - truth) / torch.outer(norms, norms)
    assert 1e-5 < float(error.abs().max()) < 3e-3


def test_the_same_bits_for_every_thread_count(choose):
    choose(True)
    rows, threads, results = [layer(SHAPES["tiles"])], torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(torch.zeros(1230, 1230))
            kernels.gram_rounded(rows, rows, results[-1])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_units_are_found_only_where_products_are_exact(monkeypatch):
    integers.native_int8.cache_clear()
    try:
        monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.float() @ b.float()).clamp(-32768, 32767).int())
        assert not integers.native_int8()
        integers.native_int8.cache_clear()
        monkeypatch.delattr(torch, "_int_mm")
        assert not integers.native_int8()
    finally:
        integers.native_int8.cache_clear()


def test_bad_input():
    with pytest.raises(TypeError, match=r"round_rows: x must be floating point, got torch\.int64"):
        kernels.round_rows(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"round_rows: x must have shape \(n, d\), d at most 133144, got \(2,\)"):
        kernels.round_rows(torch.ones(2))
    with pytest.raises(ValueError, match=r"d at most 133144, got \(1, 133145\)"):
        kernels.round_rows(torch.ones(1, 133145))
    with pytest.raises(ValueError, match="round_rows: x must be finite"):
        kernels.round_rows(torch.tensor([[1.0, float("nan")]]))
    rows = [layer(SHAPES["shared"])]
    for cols, size in (([], 24), ([layer(SHAPES["odd"])], 7), (rows, 23)):
        with pytest.raises(ValueError, match="gram_rounded: layers must fit each other and out"):
            kernels.gram_rounded(rows, cols, torch.zeros(24, size))
