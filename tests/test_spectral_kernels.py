"""Kernels of the spectral room against their definition, and the laws that they must obey."""

from __future__ import annotations

import math

import pytest
import torch

from dropscope import kernels, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ROUNDING = {torch.float64: 2e-16, torch.float32: 1.2e-7, torch.bfloat16: 8e-3}
FLOAT_RUN = 17 * 2.0**-24  # of |w|: 16 products and sums in float32, the bound that orthogonalize states
SIZES = [(0, 10), (1, 1), (3, 7), (4, 8), (5, 37), (8, 4096), (7, 4097), (13, 40011)]
ALL_SIZES = pytest.mark.parametrize(("m", "dim"), SIZES)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def basis(m, dim, dtype):
    """Orthonormal rows as far as there is room for them, in a wider tensor: its row stride is not its width."""
    Q = torch.randn(m, dim, generator=generator(), dtype=torch.float64)
    Q = torch.linalg.qr(Q.T)[0].T if m <= dim else Q / math.sqrt(dim)
    wide = torch.full((m, dim + 3), math.nan, dtype=dtype)
    wide[:, :dim] = Q
    return wide[:, :dim]


@ALL_DTYPES
@ALL_SIZES
@pytest.mark.parametrize("force", [False, True])
def test_orthogonalize_equals_the_definition(m, dim, dtype, force):
    Q = basis(m, dim, dtype)
    for w_dtype in DTYPES:
        w = torch.randn(dim, generator=generator(1), dtype=torch.float64).to(w_dtype)
        expected_w, scale = w.clone(), float(w.double().norm())
        c, norm, reads = kernels.orthogonalize(Q, w, force=force)
        expected_c, expected_norm, expected_reads = reference.orthogonalize(Q, expected_w, force=force)
        assert reads == expected_reads
        assert c.dtype == torch.float64
        exact = torch.float64 in (dtype, w_dtype)
        torch.testing.assert_close(c, expected_c, rtol=0, atol=(1e-14 if exact else FLOAT_RUN) * max(scale, 1.0))
        # Where w lies in the span of Q what is left is rounding of what came in.
        assert float((w.double() - expected_w.double()).norm()) <= 2 * ROUNDING[w_dtype] * scale
        # The norm is that of the w that was written.
        assert norm == pytest.approx(float(w.double().norm()), rel=1e-13)
        assert norm == pytest.approx(expected_norm, abs=(4 * ROUNDING[w_dtype] + 1e-14) * scale)


def test_orthogonalize_reads_twice_only_when_a_coefficient_is_large():
    Q = basis(6, 500, torch.float64)
    w = torch.randn(500, generator=generator(2), dtype=torch.float64)
    assert kernels.orthogonalize(Q, w)[2] == 2
    assert float((Q @ w).abs().amax()) < 1e-14 * float(w.norm())
    before = w.clone()
    _, norm, reads = kernels.orthogonalize(Q, w)
    assert reads == 1
    assert torch.equal(w, before)
    assert norm == pytest.approx(float(w.norm()), rel=1e-14)
    for share, expected in ((0.99e-5, 1), (1.01e-5, 2)):  # the threshold is 1e-5 of the norm of what comes in
        u = w / w.norm() + share * Q[3]
        assert kernels.orthogonalize(Q, u)[2] == expected
    assert kernels.orthogonalize(Q, before, force=True)[2] == 2


def test_orthogonalize_does_not_hide_nan():
    Q, w = basis(3, 50, torch.float64), torch.full((50,), math.nan, dtype=torch.float64)
    c, norm, _ = kernels.orthogonalize(Q, w)
    assert bool(c.isnan().all())
    assert math.isnan(norm)


@ALL_DTYPES
def test_long_sums_are_double_for_every_basis(dtype):
    # 1 + 1e5 terms of 2^-24: a float32 sum stays at 1; a run of 16 terms loses 15 of them.
    n = 100_001
    Q = torch.ones(1, n, dtype=dtype)
    w = torch.full((n,), 2.0**-24)
    w[0] = 1.0
    c, _, _ = kernels.orthogonalize(Q, w)
    assert float(c[0]) == pytest.approx(1 + 1e5 * 2.0**-24, rel=1e-13 if dtype == torch.float64 else FLOAT_RUN)


def test_coefficients_and_what_is_left_are_as_good_as_float32_vectors():
    # Rounding is random, 2^-24 |w| / sqrt(dim) a product; sums of one sign grow to 16 products before they leave
    # float32. A large coefficient, removed as one float32, would leave ten times the tolerance.
    dim = 100_003
    Q = basis(20, dim, torch.float32)
    w = torch.randn(dim, generator=generator(6)) + 1000 * Q[3] + 300 * Q[11]
    tolerance = 16 * 2.0**-24 * float(w.double().norm()) / math.sqrt(dim)
    expected = Q.double() @ w.double()
    c, _, _ = kernels.orthogonalize(Q, w, force=True)
    assert float((c - expected).abs().max()) < tolerance
    # The rows are orthonormal to float32 only: what they share shows in what is left.
    shared = expected - Q.double() @ (Q.double().T @ expected)
    assert float((Q.double() @ w.double() - shared).abs().max()) < tolerance


@ALL_DTYPES
@ALL_SIZES
def test_rotate_equals_the_definition(m, dim, dtype):
    for k in sorted({0, 1, m // 2, m}):
        if k > m:
            continue
        Q = basis(m, dim, dtype)
        expected = Q.clone()
        S = torch.randn(m, k, generator=generator(3), dtype=torch.float64)
        kernels.rotate(Q, S)
        reference.rotate(expected, S)
        torch.testing.assert_close(Q, expected, rtol=2 * ROUNDING[dtype], atol=40 * ROUNDING[dtype] / math.sqrt(dim))
        assert torch.equal(Q[k:], expected[k:])


def test_rotate_keeps_a_basis_orthonormal_and_writes_nothing_beside_it():
    Q = basis(30, 5000, torch.float64)
    S = torch.linalg.qr(torch.randn(30, 30, generator=generator(4), dtype=torch.float64))[0]
    kernels.rotate(Q, S[:, :11].T.contiguous().T)  # a strided S
    assert float((Q[:11] @ Q[:11].T - torch.eye(11, dtype=torch.float64)).abs().max()) < 1e-13
    assert bool(Q._base.isnan()[:, -3:].all())


def test_a_basis_too_long_for_the_block_still_rotates():
    Q = torch.randn(2051, 3, generator=generator(), dtype=torch.float64)
    S = torch.randn(2051, 2, generator=generator(5), dtype=torch.float64)
    expected = S.T @ Q
    kernels.rotate(Q, S)
    torch.testing.assert_close(Q[:2], expected)


def test_columns_that_are_not_contiguous_take_the_definition():
    Q = basis(5, 300, torch.float64).T.contiguous().T
    w = torch.randn(600, generator=generator(), dtype=torch.float64)[::2]
    expected = w.clone()
    reference.orthogonalize(Q, expected, force=True)
    kernels.orthogonalize(Q, w, force=True)
    torch.testing.assert_close(w, expected)


LENGTHS = (0, 1, 2, 7, 8, 9, 2047, 2048, 2049, 4095, 4097, 40_001)


@ALL_DTYPES
def test_rademacher_probes_equal_the_definition(dtype):
    for n in LENGTHS:
        actual, expected = torch.empty(n, dtype=dtype), torch.empty(n, dtype=dtype)
        assert kernels.probe(actual, seed=2**64 - 1, index=2**32 - 1) is actual
        assert torch.equal(actual, reference.probe(expected, seed=2**64 - 1, index=2**32 - 1))


@ALL_DTYPES
def test_normal_probes_equal_the_definition_to_rounding(dtype):
    for n in LENGTHS:
        actual, expected = torch.empty(n, dtype=dtype), torch.empty(n, dtype=dtype)
        kernels.probe(actual, seed=7, index=3, kind="normal")
        reference.probe(expected, seed=7, index=3, kind="normal")
        torch.testing.assert_close(actual, expected, rtol=max(1e-12, ROUNDING[dtype]), atol=1e-14)


def test_probes_have_the_moments_of_their_laws():
    # 2^20 values, six standard errors: fails once in 5e8 honest runs a moment.
    n = 2**20
    z = kernels.probe(torch.empty(n, dtype=torch.float64), seed=0, index=0, kind="normal")
    s = kernels.probe(torch.empty(n, dtype=torch.float64), seed=0, index=1)
    for moment, expected, variance in ((z, 0, 1), (z**2, 1, 2), (z**3, 0, 15), (z**4, 3, 96), (s, 0, 1), (s * z, 0, 1)):
        assert abs(float(moment.mean()) - expected) < 6 * math.sqrt(variance / n)
    assert bool((s.abs() == 1).all())


def test_probes_are_functions_of_seed_and_index():
    def probe(seed, index):
        return kernels.probe(torch.empty(256), seed=seed, index=index)

    assert torch.equal(probe(0, 0), probe(0, 0))
    assert not torch.equal(probe(0, 0), probe(1, 0))
    assert not torch.equal(probe(0, 0), probe(0, 1))
    assert torch.equal(probe(0, 5)[:100], kernels.probe(torch.empty(100), seed=0, index=5))


Q, W = torch.ones(2, 3), torch.ones(3)
S = torch.ones(2, 1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "error", "rule"),
    [
        (lambda: kernels.orthogonalize(Q.int(), W), TypeError, "orthogonalize: Q must be floating point"),
        (
            lambda: kernels.orthogonalize(Q[0], W),
            ValueError,
            r"Q must have shape \(m, dim\), got \(3,\)",
        ),
        (lambda: kernels.orthogonalize(Q, W.int()), TypeError, "orthogonalize: w must be floating point"),
        (lambda: kernels.orthogonalize(Q, W[:2]), ValueError, r"orthogonalize: w must have shape \(3,\)"),
        (lambda: kernels.rotate(Q, S.float()), TypeError, "rotate: S must be float64, got torch.float32"),
        (lambda: kernels.rotate(Q, S.T), ValueError, r"rotate: S must have shape \(2, k\) with k <= 2, got \(1, 2\)"),
        (lambda: kernels.rotate(Q, torch.ones(2, 3).double()), ValueError, "k <= 2"),
        (lambda: kernels.probe(W.int(), seed=0, index=0), TypeError, "probe: out must be floating point"),
        (lambda: kernels.probe(Q, seed=0, index=0), ValueError, "probe: out must be a vector"),
        (lambda: kernels.probe(W, seed=-1, index=0), ValueError, "probe: seed must be in"),
        (lambda: kernels.probe(W, seed=0, index=2**32), ValueError, "probe: index must be in"),
        (lambda: kernels.probe(W, seed=0, index=0, kind="cauchy"), ValueError, "probe: kind must be"),
    ],
)
def test_bad_input_is_refused(call, error, rule):
    with pytest.raises(error, match=rule):
        call()
