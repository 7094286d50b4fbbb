"""Kernels of the factors room against their definition, and the laws that they must obey."""

from __future__ import annotations

import pytest
import torch

from dropscope import kernels, reference

# samples, samples that share a row of A, T, d_in, d_out, K
SHAPES = {
    "one": (1, 1, 1, 1, 1, 1),
    "odd": (7, 1, 1, 5, 3, 2),
    "wide_out": (33, 1, 1, 3, 70, 3),
    "shared": (24, 3, 1, 40, 33, 5),
    "many": (1230, 2, 1, 9, 17, 1),
    "sequence": (12, 1, 4, 8, 50, 3),
    "sequence_shared": (40, 4, 3, 12, 10, 2),
    "long": (6, 2, 130, 6, 5, 2),
    "one_long": (1, 1, 700, 3, 2, 1),
    "many_vectors": (30, 2, 9, 5, 70, 60),
}
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
ALL_SHAPES = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def factors(shape, dtype, seed=0):
    samples, group, steps, d_in, d_out, K = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    A, B = normal(samples // group, steps, d_in), normal(samples, steps, d_out)
    return A, B, normal(K, d_out, d_in), normal(samples, K)


def sums(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_near(actual, expected, dtype):
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < TOLERANCE[dtype], float(error)


def both(name, dtype, start, *args, **kwargs):
    """The kernel's and the reference's sums on top of the same start."""
    actual, expected = start.clone(), start.double().clone()
    getattr(kernels, name)(*args, actual, **kwargs)
    wide = [x.double() for x in args]
    getattr(reference, name)(*wide, expected, **kwargs)
    size = start.double().norm() + (expected - start.double()).norm()  # they may cancel
    assert (actual.double() - expected).norm() < TOLERANCE[dtype] * size
    return actual


@DTYPES
@ALL_SHAPES
def test_project_and_accumulate_equal_the_definition(shape, dtype):
    A, B, V, S = factors(shape, dtype)
    both("project", dtype, torch.randn(B.shape[0], V.shape[0], dtype=sums(dtype)), A, B, V)
    both("accumulate", dtype, torch.randn(V.shape, dtype=sums(dtype)), A, B, S)


@DTYPES
@ALL_SHAPES
@pytest.mark.parametrize("bias", [False, True])
def test_gram_and_norms_equal_the_definition(shape, dtype, bias):
    A, B, _, _ = factors(shape, dtype)
    K = both("gram", dtype, torch.randn(len(B), len(B), dtype=sums(dtype)), A, B, A, B, bias=bias)
    assert K.shape == (len(B), len(B))
    A2, B2, _, _ = factors((6, 2, 2, *shape[3:]), dtype, seed=1)
    both("gram", dtype, torch.randn(len(B), 6, dtype=sums(dtype)), A, B, A2, B2, bias=bias)
    norms = kernels.sq_norms(A, B, bias=bias)
    assert norms.dtype == torch.float64
    assert_near(norms, reference.sq_norms(A, B, bias=bias), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_both_routes_of_a_long_gram_agree(monkeypatch, dtype, bias):
    """The materialised one by slabs of two of six output units."""
    monkeypatch.setattr("dropscope.kernels._slabs._SLAB_BYTES", {"cpu": 1})
    monkeypatch.setattr("dropscope.kernels._slabs._FEWEST_UNITS", 2)
    A, B, _, _ = factors((20, 2, 5, 4, 6, 1), dtype)
    results = []
    for ghost in (False, True):
        monkeypatch.setattr("dropscope.kernels._gram._ghost_is_cheaper", lambda *_, ghost=ghost: ghost)
        results.append(torch.zeros(20, 20, dtype=dtype))
        kernels.gram(A, B, A, B, results[-1], bias=bias)
        other = torch.zeros(20, 8, dtype=dtype)
        kernels.gram(A, B, A[:4].clone(), B[:8].clone(), other, bias=bias)
        assert_near(other, results[-1][:, :8], dtype)
    assert_near(*results, dtype)


@DTYPES
@pytest.mark.parametrize("slab_bytes", [1, 1 << 12, 1 << 24])
def test_both_routes_of_products_with_many_vectors_agree(slab_bytes, dtype, monkeypatch):
    """Materialised by slabs of samples and of output units, and by factors."""
    monkeypatch.setattr("dropscope.kernels._slabs._SLAB_BYTES", {"cpu": slab_bytes})
    monkeypatch.setattr("dropscope.kernels._slabs._FEWEST_UNITS", 2)
    A, B, V, S = factors(SHAPES["many_vectors"], dtype)
    results = []
    for pays in (True, False):
        monkeypatch.setattr("dropscope.kernels._slabs.pays", lambda *_, pays=pays: pays)
        dots, total = torch.ones(S.shape, dtype=sums(dtype)), torch.ones(V.shape, dtype=sums(dtype))
        kernels.project(A, B, V, dots)
        kernels.accumulate(A, B, S, total)
        results.append((dots, total))
    for materialised, by_factors in zip(*results, strict=True):
        assert_near(materialised, by_factors, dtype)


@DTYPES
def test_any_strides(dtype):
    A, B, V, S = factors((12, 2, 2, 5, 6, 3), dtype)

    def strided(x):
        wide = torch.zeros(*(2 * n for n in x.shape), dtype=x.dtype)
        view = wide[tuple(slice(0, 2 * n, 2) for n in x.shape)]
        return view.copy_(x)

    def transposed(x):
        return x.mT.contiguous().mT

    for form in (strided, transposed):
        a, b, v, s = (form(x) for x in (A, B, V, S))
        assert not b.is_contiguous()
        both("project", dtype, transposed(torch.ones(12, 3, dtype=sums(dtype))), a, b, v)
        out, expected = form(torch.ones(V.shape, dtype=sums(dtype))), torch.ones(V.shape, dtype=torch.float64)
        kernels.accumulate(a, b, s, out)
        reference.accumulate(A.double(), B.double(), S.double(), expected)
        assert_near(out, expected, dtype)
        gram, expected = strided(torch.ones(12, 12, dtype=sums(dtype))), torch.ones(12, 12, dtype=torch.float64)
        kernels.gram(a, b, a, b, gram)
        reference.gram(*(x.double() for x in (A, B, A, B)), expected)
        assert_near(gram, expected, dtype)
        assert_near(kernels.sq_norms(a, b), reference.sq_norms(A, B), dtype)


@pytest.mark.parametrize("samples", [0, 4])
def test_nothing_to_add_leaves_out_alone(samples):
    A, B = torch.zeros(samples, 1, 3), torch.zeros(samples, 1, 2)
    out = torch.ones(samples, 0)
    kernels.project(A, B, torch.zeros(0, 2, 3), out)
    kernels.accumulate(A, B, out, torch.ones(0, 2, 3))
    total = torch.ones(1, 2, 3)
    kernels.accumulate(A, B, torch.zeros(samples, 1), total)
    assert torch.equal(total, torch.ones(1, 2, 3))
    kernels.gram(A, B, A, B, torch.ones(samples, samples))
    assert kernels.sq_norms(A, B).shape == (samples,)
    assert kernels.center(out, 2).shape == out.shape


@ALL_SHAPES
def test_project_is_the_adjoint_of_accumulate(shape):
    A, B, V, S = factors(shape, torch.float64)
    P, G = torch.zeros_like(S), torch.zeros_like(V)
    kernels.project(A, B, V, P)
    kernels.accumulate(A, B, S, G)
    left, right = (P * S).sum(0), (G * V).sum((1, 2))
    torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-11 * float(P.norm() * S.norm()))


def test_linear_in_V_and_S():
    A, B, V, S = factors((24, 3, 1, 7, 5, 4), torch.float64)
    mix = torch.randn(4, 2, dtype=torch.float64)
    P, PM = torch.zeros(24, 4, dtype=torch.float64), torch.zeros(24, 2, dtype=torch.float64)
    kernels.project(A, B, V, P)
    kernels.project(A, B, torch.einsum("koi,kc->coi", V, mix), PM)
    torch.testing.assert_close(PM, P @ mix)
    G, GM = torch.zeros(4, 5, 7, dtype=torch.float64), torch.zeros(2, 5, 7, dtype=torch.float64)
    kernels.accumulate(A, B, S, G)
    kernels.accumulate(A, B, S @ mix, GM)
    torch.testing.assert_close(GM, torch.einsum("koi,kc->coi", G, mix))


@ALL_SHAPES
@pytest.mark.parametrize("bias", [False, True])
def test_gram_is_symmetric_positive_and_has_the_norms_on_its_diagonal(shape, bias):
    A, B, _, _ = factors((min(shape[0], 60), *shape[1:]), torch.float64)
    K = torch.zeros(len(B), len(B), dtype=torch.float64)
    kernels.gram(A, B, A, B, K, bias=bias)
    torch.testing.assert_close(K, K.T, rtol=0, atol=1e-12 * float(K.norm()))
    torch.testing.assert_close(K.diagonal(), kernels.sq_norms(A, B, bias=bias))
    assert torch.linalg.eigvalsh(K)[0] > -1e-12 * K.trace()


@DTYPES
def test_symmetric_half_equals_the_whole(dtype):
    A, B, _, _ = factors((1300, 2, 1, 9, 11, 1), dtype)
    half, whole = torch.zeros(1300, 1300, dtype=sums(dtype)), torch.zeros(1300, 1300, dtype=sums(dtype))
    kernels.gram(A, B, A, B, half)
    kernels.gram(A, B, A.clone(), B.clone(), whole)
    assert torch.equal(half, half.T)
    assert_near(half, whole, dtype)


@DTYPES
def test_gram_sum_adds_the_layers(dtype):
    shapes = [(1200, 2, 1, 5, 7, 1), (1200, 1, 1, 7, 3, 1), (1200, 4, 3, 2, 2, 1), (1200, 3, 9, 2, 2, 1)]
    layers = [(*factors(shape, dtype, seed)[:2], seed % 2 == 0) for seed, shape in enumerate(shapes)]
    half, whole = (torch.ones(1200, 1200, dtype=sums(dtype)) for _ in range(2))
    kernels.gram_sum(layers, layers, half)
    for A, B, bias in layers:
        kernels.gram(A, B, A, B, whole, bias=bias)
    assert_near(half, whole, dtype)
    assert torch.equal(half, half.T)
    part = torch.ones(1200, 24, dtype=sums(dtype))
    cols = [(A[: 24 * len(A) // len(B)], B[:24], bias) for A, B, bias in layers]
    kernels.gram_sum(layers, cols, part)
    assert_near(part, whole[:, :24], dtype)
    with pytest.raises(ValueError, match=r"gram_sum: cols must have as many layers as rows \(4\), got 1"):
        kernels.gram_sum(layers, cols[:1], part)
    with pytest.raises(ValueError, match="gram_sum: both sides must count the bias alike"):
        kernels.gram_sum(layers[:1], [(*cols[0][:2], not cols[0][2])], part)


def test_any_split_into_batches_gives_the_same_sums():
    A, B, V, S = factors((30, 3, 2, 6, 5, 2), torch.float64)
    whole, parts = torch.zeros_like(V), torch.zeros_like(V)
    P, pieces = torch.zeros(30, 2, dtype=torch.float64), torch.zeros(30, 2, dtype=torch.float64)
    kernels.accumulate(A, B, S, whole)
    kernels.project(A, B, V, P)
    for start, stop in ((0, 3), (3, 21), (21, 30)):
        a, b = A[start // 3 : stop // 3], B[start:stop]
        kernels.accumulate(a, b, S[start:stop], parts)
        kernels.project(a, b, V, pieces[start:stop])
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(pieces, P)


def test_many_rows_and_many_vectors_cross_the_tiles():
    A, B, V, S = factors((2 * 5000, 2, 1, 6, 300, 17), torch.float32)
    both("project", torch.float32, torch.zeros(10000, 17), A, B, V)
    both("accumulate", torch.float32, torch.zeros(17, 300, 6), A, B, S)


def test_sums_in_double_on_request():
    """Products stay float32, sums over samples do not lose small terms."""
    A, B = torch.ones(1 << 15, 1, 1), torch.ones(1 << 15, 1, 1)
    out = torch.full((1, 1, 1), 2.0**40, dtype=torch.float64)
    kernels.accumulate(A, B, torch.ones(1 << 15, 1), out)
    assert float(out) == 2.0**40 + 2.0**15


@DTYPES
@pytest.mark.parametrize("draws", [1, 2, 5])
def test_center(dtype, draws):
    X = torch.randn(20 * draws, 70).to(dtype)
    expected = reference.center(X.double().clone(), draws, 0.5)
    actual = kernels.center(X, draws, 0.5)
    assert actual is X
    torch.testing.assert_close(X.double(), expected, rtol=0, atol=TOLERANCE[dtype] * 5)
    if draws == 1:
        assert not X.any()
    columns = torch.randn(6, 20 * draws, dtype=torch.float64)
    expected = reference.center(columns.T.clone(), draws)
    torch.testing.assert_close(kernels.center(columns.T, draws), expected)


@DTYPES
def test_our_passes_give_the_same_bits_for_every_thread_count(dtype):
    from dropscope.kernels import _tiles as tiles

    B, P = torch.randn(600, 130).to(dtype), torch.randn(200, 260).to(dtype)
    S, Q, X = torch.randn(600, 2).to(sums(dtype)), torch.randn(600, 300).to(dtype), torch.randn(600, 100)

    def run():
        dots, out, mirror = torch.zeros(600, 2), torch.zeros(600, 300), torch.zeros(300, 600)
        tiles.row_dots(P, B, dots, 3)
        of_sequences = torch.zeros(12, 2)
        tiles.row_dots(P, B, of_sequences, 3, 50)
        tiles.hadamard(P[:, :100].contiguous(), Q, out, mirror, groups=(3, 3), shift=1.0)
        long = torch.zeros(12, 30)
        tiles.hadamard(P[:, :100].contiguous(), Q, long, groups=(3, 3), steps=(50, 10))
        packed = tiles.scale_rows(B, S, B.new_empty(200, 260), 3)
        return dots, of_sequences, out, mirror, packed, kernels.center(X.clone(), 4), long

    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))
    out, mirror = results[0][2:4]
    assert torch.equal(out, mirror.T)


@DTYPES
@pytest.mark.parametrize("shape", ["many", "odd", "shared", "sequence"])
def test_sums_of_each_thread_add_up(shape, dtype):
    A, B, V, S = factors(SHAPES[shape], dtype)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            both("accumulate", dtype, torch.randn(V.shape, dtype=sums(dtype)), A, B, S)
    finally:
        torch.set_num_threads(threads)


def test_half_precision_and_mixed_out_take_the_reference():
    A, B, V, _ = factors((6, 1, 1, 3, 2, 1), torch.float16)
    out, expected = torch.zeros(6, 1), torch.zeros(6, 1)
    kernels.project(A, B, V, out)
    reference.project(A, B, V, expected)
    assert torch.equal(out, expected)


def test_nothing_enters_the_graph():
    A, B, V, _ = factors((6, 1, 1, 3, 2, 1), torch.float32)
    out = torch.zeros(6, 1)
    kernels.project(A.requires_grad_(), B.requires_grad_(), V.requires_grad_(), out)
    assert not out.requires_grad
    assert out.any()


def good():
    A, B, V, S = factors((6, 2, 1, 3, 2, 4), torch.float32)
    return {"A": A, "B": B, "V": V, "S": S}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"A": torch.ones(3, 1, 3, dtype=torch.int64)}, TypeError, "A must be floating point, got torch.int64"),
        ({"A": torch.ones(3, 3)}, ValueError, r"A must have shape \(samples, T, units\), got \(3, 3\)"),
        ({"A": torch.ones(3, 1, 3, dtype=torch.float64)}, TypeError, "one dtype"),
        ({"A": torch.ones(3, 1, 3, device="meta")}, ValueError, "one device"),
        ({"A": torch.ones(3, 2, 3)}, ValueError, "same T, got 2 and 1"),
        ({"A": torch.ones(4, 1, 3)}, ValueError, r"divide those of B \(6\), got 4"),
        ({"A": torch.ones(0, 1, 3)}, ValueError, r"divide those of B \(6\), got 0"),
        ({"A": torch.ones(12, 1, 3)}, ValueError, r"divide those of B \(6\), got 12"),
        ({"V": torch.ones(4, 2, 5)}, ValueError, r"V must have shape \(4, 2, 3\), got \(4, 2, 5\)"),
        ({"V": torch.tensor(1.0)}, ValueError, "V must have shape"),
        ({"V": torch.ones(4, 2, 3, dtype=torch.int32)}, TypeError, "V must be floating point"),
        ({"V": torch.ones(4, 2, 3, device="meta")}, ValueError, "V must be on the device"),
        ({"S": torch.ones(5, 4)}, ValueError, r"S must have shape \(6, 4\), got \(5, 4\)"),
    ],
)
def test_bad_factors_are_refused(change, error, words):
    arguments = good() | change
    name = "accumulate" if "S" in change else "project"
    last = arguments["S"] if name == "accumulate" else arguments["V"]
    out = torch.zeros(4, 2, 3) if name == "accumulate" else torch.zeros(6, 4)
    with pytest.raises(error, match=f"{name}: .*{words}"):
        getattr(kernels, name)(arguments["A"], arguments["B"], last, out)


def test_bad_outputs_and_pairs_are_refused():
    A, B, V, S = good().values()
    with pytest.raises(ValueError, match=r"project: out must have shape \(6, 4\)"):
        kernels.project(A, B, V, torch.zeros(6, 5))
    with pytest.raises(ValueError, match="accumulate: out must have shape"):
        kernels.accumulate(A, B, S, torch.zeros(4, 3, 2))
    with pytest.raises(ValueError, match=r"gram: out must have shape \(6, 6\)"):
        kernels.gram(A, B, A, B, torch.zeros(6, 3))
    with pytest.raises(TypeError, match="gram: out must be floating point"):
        kernels.gram(A, B, A, B, torch.zeros(6, 6, dtype=torch.int64))
    with pytest.raises(TypeError, match="gram: A2 must have the dtype of A"):
        kernels.gram(A, B, A.double(), B.double(), torch.zeros(6, 6))
    with pytest.raises(ValueError, match=r"gram: A2 must have shape \(3, 1, 3\)"):
        kernels.gram(A, B, A[..., :2], B, torch.zeros(6, 6))
    with pytest.raises(ValueError, match="sq_norms: the rows of A"):
        kernels.sq_norms(A[:2].repeat(2, 1, 1), B)
    with pytest.raises(ValueError, match="center: draws must divide the 6 rows of X, got 4"):
        kernels.center(torch.ones(6, 2), 4)
    with pytest.raises(ValueError, match="center: draws must divide"):
        kernels.center(torch.ones(6, 2), 0)
    with pytest.raises(TypeError, match="center: X must be floating point"):
        kernels.center(torch.ones(6, 2, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="center: X must have shape"):
        kernels.center(torch.ones(6), 2)
