"""On a device: every kernel against the CPU's, on side streams and in graphs, without waiting; whole measurements.

``pytest -m cuda`` runs these and the parts of the other files that need a device. Tests with ``sanitized`` in their
names are small: ``compute-sanitizer`` runs them in minutes (``python -m bench.on_device``). There our kernels read
nothing that a kernel of torch has written, since initcheck watches ours alone.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import dropscope as ds
from dropscope import _core, kernels
from dropscope.kernels import _tiles as tiles
from dropscope.problem import Problem

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and _core.cuda_built()), reason="needs a CUDA device and a build with nvcc"
    ),
]

DEVICE = "cuda"
KEY = {"seed": 0xFEDCBA9876543210, "site": 0x0123456789ABCDEF, "threshold": 52429}
# Of the norm of the result; bfloat16 rounds each product of a tile.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
# samples, samples that share a row of A, T, d_in, d_out, K
SHAPES = {
    "one": (1, 1, 1, 1, 1, 1),
    "odd": (7, 1, 1, 5, 3, 2),
    "shared": (24, 3, 1, 40, 33, 5),
    "aligned": (96, 2, 1, 64, 128, 4),
    "many": (5000, 2, 1, 9, 17, 1),
    "sequence": (12, 1, 4, 8, 50, 3),
    "sequence_shared": (40, 4, 3, 12, 10, 2),
    "long": (6, 2, 130, 6, 5, 2),
    "wide": (300, 1, 1, 1000, 4000, 1),
}


@pytest.fixture(autouse=True)
def full_precision():
    """float32 products in float32: TF32 is the user's choice and the benchmark's, not the comparison's."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sums(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_near(actual, expected, dtype):
    assert actual.device.type == DEVICE
    error = (actual.cpu().double() - expected.double()).norm()
    assert error <= TOLERANCE[dtype] * expected.double().norm(), float(error)


def factors(shape, dtype):
    samples, group, steps, d_in, d_out, K = shape
    A, B = normal(samples // group, steps, d_in, dtype=dtype), normal(samples, steps, d_out, dtype=dtype, seed=1)
    return A, B, normal(K, d_out, d_in, dtype=dtype, seed=2), normal(samples, K, dtype=sums(dtype), seed=3)


def all_factor_kernels(A, B, V, S, bias=True):
    """Every kernel of the factors room on these operands."""
    n, wide = B.shape[0], sums(A.dtype)
    P, G, K = (torch.zeros(shape, dtype=wide, device=A.device) for shape in ((n, len(V)), V.shape, (n, n)))
    kernels.project(A, B, V, P)
    kernels.accumulate(A, B, S, G)
    kernels.gram(A, B, A, B, K, bias=bias)
    part = torch.zeros(n, n // 2 or 1, dtype=wide, device=A.device)
    kernels.gram(A, B, A[: len(A) // 2 or 1].clone(), B[: n // 2 or 1].clone(), part) if len(A) == n else None
    return P, G, K, part, kernels.sq_norms(A, B, bias=bias), kernels.center(K.clone(), n // len(A), 0.5)


def on_device(*tensors):
    return [x.to(DEVICE) for x in tensors]


@DTYPES
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_factors_equal_the_cpus(shape, dtype):
    operands = factors(shape, dtype)
    for actual, expected in zip(all_factor_kernels(*on_device(*operands)), all_factor_kernels(*operands), strict=True):
        assert_near(actual, expected, dtype)


@DTYPES
def test_a_symmetric_gram_is_symmetric_to_the_bit(dtype):
    A, B, _, _ = on_device(*factors((4500, 2, 1, 9, 11, 1), dtype))
    K = torch.zeros(4500, 4500, dtype=sums(dtype), device=DEVICE)
    kernels.gram(A, B, A, B, K)
    assert torch.equal(K, K.T)


@DTYPES
@pytest.mark.parametrize("w_dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("m", "dim"), [(0, 10), (1, 1), (3, 7), (25, 4096), (8, 100_003), (140, 5000), (64, 1_000_000)]
)
def test_orthogonalize_equals_the_cpus(m, dim, dtype, w_dtype):
    Q = normal(m, dim, dtype=torch.float64)
    Q = (torch.linalg.qr(Q.T)[0].T if m <= dim <= 5000 else Q / math.sqrt(dim)).to(dtype)
    for force in (False, True):
        w = normal(dim, dtype=w_dtype, seed=1)
        v, scale = w.to(DEVICE), float(w.double().norm())
        c, norm, reads = kernels.orthogonalize(Q.to(DEVICE), v, force=force)
        expected = kernels.orthogonalize(Q, w, force=force)
        assert reads == expected[2]
        exact = torch.float64 in (dtype, w_dtype)
        torch.testing.assert_close(c, expected[0], rtol=0, atol=(1e-13 if exact else 2e-6) * scale)
        rounding = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[w_dtype]
        assert float((v.cpu().double() - w.double()).norm()) <= rounding * scale
        assert norm == pytest.approx(float(v.double().norm()), rel=1e-12)


def test_the_device_decides_on_the_second_read():
    Q = torch.linalg.qr(normal(50_000, 6, dtype=torch.float64))[0].T.contiguous().to(DEVICE)
    w = normal(50_000, dtype=torch.float64).to(DEVICE)
    assert kernels.orthogonalize(Q, w)[2] == 2
    before = w.clone()
    assert kernels.orthogonalize(Q, w)[2] == 1
    assert torch.equal(w, before)
    for share, reads in ((0.99e-5, 1), (1.01e-5, 2)):
        assert kernels.orthogonalize(Q, w / w.norm() + share * Q[3])[2] == reads
    c, norm, reads = kernels.orthogonalize(Q, torch.full_like(w, math.nan))
    assert (bool(c.isnan().all()), math.isnan(norm), reads) == (True, True, 2)


@DTYPES
@pytest.mark.parametrize(("m", "dim"), [(1, 1), (5, 37), (25, 100_003), (64, 40_000), (300, 5000)])
def test_rotate_equals_the_cpus(m, dim, dtype):
    for k in {1, m // 2 + 1, m}:
        S = torch.linalg.qr(normal(m, k, dtype=torch.float64))[0].contiguous()
        Q = normal(m, dim, dtype=dtype)
        P = Q.to(DEVICE)
        kernels.rotate(P, S)
        kernels.rotate(Q, S)
        assert_near(P, Q, dtype)
        assert torch.equal(P[k:].cpu(), Q[k:])


@DTYPES
def test_probes_equal_the_cpus(dtype):
    for n in (1, 7, 4097, 1_000_003):
        for kind in ("rademacher", "normal"):
            here = kernels.probe(torch.empty(n, dtype=dtype), seed=2**64 - 1, index=2**32 - 1, kind=kind)
            there = kernels.probe(
                torch.empty(n, dtype=dtype, device=DEVICE), seed=2**64 - 1, index=2**32 - 1, kind=kind
            )
            if kind == "rademacher":
                assert torch.equal(there.cpu(), here)
            else:
                assert_near(there, here, dtype)


def passes(dtype, device=DEVICE):
    """Callables that put every kernel on the stream, with what they write; inputs that may be changed between calls."""
    A, B, V, S = (x.to(device) for x in factors((48, 2, 1, 40, 64, 3), dtype))
    x, streams = normal(40, 64, dtype=dtype).to(device), torch.arange(40, device=device)
    Q, w = (normal(9, 5000, dtype=dtype) / 70).to(device), normal(5000, dtype=dtype, seed=5).to(device)
    R = torch.linalg.qr(normal(9, 9, dtype=torch.float64))[0].contiguous().to(device)
    inputs = (A, B, V, S, x, Q, w)

    def run():
        masked = kernels.apply_mask(x, streams, **KEY)
        shared = kernels.apply_mask(x[:8], streams[:37], group=5, skip=3, **KEY)
        operand = kernels.Masked(A, torch.arange(len(B), device=device), **KEY)
        dots = torch.zeros(len(B), len(V), dtype=sums(dtype), device=device)
        kernels.project(operand, B, V, dots)
        v, T = w.clone(), Q.clone()
        result = kernels.orthogonalize_async(Q, v)
        kernels.rotate(T, R)
        probes = [kernels.probe(torch.empty_like(w), seed=1, index=2, kind=kind) for kind in ("rademacher", "normal")]
        keep = kernels.keep_mask(streams, 100, **KEY)
        return [*all_factor_kernels(A, B, V, S), masked, shared, dots, keep, v, result, T, *probes]

    return inputs, run


@DTYPES
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_waits_for_the_device(dtype):
    _, run = passes(dtype)
    run()
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.synchronize()


@DTYPES
def test_the_same_bits_every_time(dtype):
    _, run = passes(dtype)
    first = run()
    for _ in range(5):
        assert all(torch.equal(x, y) for x, y in zip(run(), first, strict=True))


@DTYPES
def test_kernels_keep_the_order_of_a_side_stream(dtype):
    inputs, run = passes(dtype)
    fresh = [torch.randn_like(x) for x in inputs]
    kept = [x.clone() for x in inputs]
    for x, y in zip(inputs, fresh, strict=True):
        x.copy_(y)
    expected = run()
    for x, y in zip(inputs, kept, strict=True):
        x.copy_(y)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # what runs on another stream now sees the inputs before they change
        for x, y in zip(inputs, fresh, strict=True):
            x.copy_(y)
        actual = run()
    side.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


@DTYPES
def test_every_kernel_can_be_captured_in_a_graph(dtype):
    inputs, run = passes(dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the library of the products wants its workspace before the capture
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for scale in (1.0, -2.0):
        for x in inputs:
            x.mul_(scale)
        graph.replay()
        replayed = [x.clone() for x in captured]
        for x, y in zip(replayed, run(), strict=True):
            assert_near(x, y.cpu(), dtype)  # the library may take another algorithm in a graph


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_the_second_device_is_served_while_the_first_is_current():
    (_, here), (_, there) = passes(torch.float32, "cuda:0"), passes(torch.float32, "cuda:1")
    assert torch.cuda.current_device() == 0
    for x, y in zip(here(), there(), strict=True):
        assert y.device.index == 1
        torch.testing.assert_close(x.cpu(), y.cpu(), rtol=1e-5, atol=1e-5)


def test_rows_beyond_32_bits_of_bytes():
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of the device's memory")
    rows, units = 2**20 + 3, 2**12 + 1
    x = torch.ones(rows, units, dtype=torch.bfloat16, device=DEVICE)
    streams = torch.arange(rows, device=DEVICE)
    kernels.apply_mask(x, streams, out=x, **KEY)
    for part in (slice(0, 2), slice(rows - 2, rows)):
        expected = kernels.apply_mask(torch.ones(2, units, dtype=torch.bfloat16), streams[part].cpu(), **KEY)
        assert torch.equal(x[part].cpu(), expected)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Dropout(0.3), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 5))


def problem(device, dtype=torch.float64):
    with torch.random.fork_rng():
        model = network().to(device, dtype)
    X, y = normal(64, 20, dtype=dtype).to(device), torch.arange(64, device=device) % 5
    return Problem(model, nn.CrossEntropyLoss(), (X, y), batch_size=24)


def test_hessian_pairs_equal_the_cpus():
    pairs = [ds.eigsh(ds.Hessian(problem(device)), k=6, tol=1e-8) for device in ("cpu", DEVICE)]
    assert all(bool(x.converged.all()) for x in pairs)
    torch.testing.assert_close(pairs[1].values.cpu(), pairs[0].values.cpu(), rtol=1e-7, atol=1e-9)
    masked = [ds.Hessian(problem(device), masks=ds.MaskKey(3, 1)) for device in ("cpu", DEVICE)]
    v = normal(masked[0].dim, dtype=torch.float64)
    torch.testing.assert_close((masked[1] @ v.to(DEVICE)).cpu(), masked[0] @ v, rtol=1e-10, atol=1e-12)


def test_gradient_noise_equals_the_cpus():
    answers = []
    for device in ("cpu", DEVICE):
        with ds.GradientNoise(problem(device), draws=4, seed=1) as noise:
            v = normal(noise.dropout.dim, dtype=torch.float64).to(device)
            top = ds.eigsh(noise.dropout, k=4, tol=1e-8)
            trace = ds.trace(noise.sampling).value
            products = [A @ v for A in (noise.dropout, noise.sampling, noise.total)]
            answers.append([torch.tensor([noise.trace.value, trace]), top.values.cpu(), *(x.cpu() for x in products)])
    for here, there in zip(*answers, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-7, atol=1e-10)


@DTYPES
@pytest.mark.parametrize("cols", [1, 5, 37, 64, 130])
def test_small_shapes_sanitized(dtype, cols):
    def there(*shape, of=dtype, zero=False):
        return (torch.zeros(shape, dtype=of) if zero else normal(*shape, dtype=of)).to(DEVICE)

    wide, f64 = sums(dtype), torch.float64
    tiles.row_dots(there(3, 2 * cols), there(6, cols), there(6, 2, of=wide), 2)
    tiles.row_dots(there(6, cols), there(12, cols), there(6, 1, of=wide), 2, 2)
    tiles.scale_rows(there(12, cols), there(6, 2, of=wide), there(4, 2 * cols, zero=True), 3, 2)
    tiles.hadamard(there(3, cols), there(6, cols), there(6, cols, of=wide), there(cols, 6, of=wide), groups=(2, 1))
    square = there(cols, cols, of=wide)
    tiles.hadamard(there(cols, cols), there(cols, cols), square, square, shift=1.0)
    tiles.hadamard(there(6, 3 * cols), there(6, 3 * cols), there(3, cols, of=wide), steps=(2, 3))
    tiles.hadamard(there(100, 200), there(100, 200), there(2, 2, of=wide), steps=(50, 100))
    tiles.center_rows(there(6, cols, of=wide), 3, 2.0)
    for m in (0, 1, 13, 140):
        Q, w = there(m, 31 * cols), there(31 * cols)
        kernels.orthogonalize(Q, w, force=True)
        if m:
            kernels.rotate(Q, there(m, m // 2 + 1, of=f64))
    for kind in ("rademacher", "normal"):
        kernels.probe(there(cols), seed=0, index=0, kind=kind)
    streams = torch.arange(33).to(DEVICE)
    kernels.apply_mask(there(33, cols), streams, **KEY)
    kernels.keep_mask(streams, cols, **KEY)
    torch.cuda.synchronize()
