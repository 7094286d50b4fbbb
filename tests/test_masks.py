"""The mask: its format, its statistics, its derivatives, its refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap

import dropscope as ds
from dropscope import mask_op, masks

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own jvp

KEY = ds.MaskKey(seed=0x0123456789ABCDEF, draw=7)
words = st.integers(0, 2**32 - 1)


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's own integers, from the paper."""
    c, k, full = list(counter), list(key), 2**32 - 1
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & full, (a >> 32) ^ c[3] ^ k[1], a & full]
        k = [(k[0] + 0x9E3779B9) & full, (k[1] + 0xBB67AE85) & full]
    return c


def format_1(seed: int, draw: int, site: int, sample: int, unit: int, threshold: int) -> bool:
    full = 2**32 - 1
    key = [seed & full, (seed >> 32) ^ (site >> 32)]
    word = philox([unit // 8, sample, draw, site & full], key)[unit % 8 // 2]
    return (word >> 16 * (unit % 2)) & 0xFFFF < threshold


def test_random123_known_answers() -> None:
    """kat_vectors of Random123."""
    assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    assert philox(*pi) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**64 - 1), words, st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 2), st.floats(0.01, 0.99))
def test_mask_format(seed: int, draw: int, site: int, sample: int, p: float) -> None:
    keep = ds.keep_mask((1, 19), p, ds.MaskKey(seed, draw), site, torch.tensor([sample]))
    threshold = math.floor((1.0 - p) * 65536 + 0.5)
    assert keep[0].tolist() == [format_1(seed, draw, site, sample, unit, threshold) for unit in range(19)]


def test_golden_vectors() -> None:
    """Bits that no release may change: 2 samples of 3 x 8 units, p = 0.3."""
    samples = torch.tensor([0, 4294967294])
    keep = ds.keep_mask((2, 3, 8), 0.3, ds.MaskKey(0), 0, samples).reshape(-1)
    assert "".join("01"[bit] for bit in keep.tolist()) == GOLDEN_ZERO
    keep = ds.keep_mask((2, 3, 8), 0.3, KEY, 0xFEDCBA9876543210, samples).reshape(-1)
    assert "".join("01"[bit] for bit in keep.tolist()) == GOLDEN_KEY
    assert ds.keep_probability(0.3) == 45875 / 65536


GOLDEN_ZERO = "010010010011110111111111000001111101011100011001"
GOLDEN_KEY = "101101011101101001111110111111001011111011101111"


@pytest.mark.parametrize("size", [1, 7, 64, 130])
def test_a_mask_does_not_depend_on_batch_or_order(size: int) -> None:
    x, ids = torch.randn(130, 3, 5), torch.randperm(130)
    whole = ds.dropout(x, 0.3, KEY)
    parts = [ds.dropout(a, 0.3, KEY, samples=i) for a, i in zip(x[ids].split(size), ids.split(size), strict=True)]
    assert torch.equal(torch.cat(parts), whole[ids])


def test_dropout_is_the_mask_over_the_keep_probability() -> None:
    x = torch.randn(9, 11, dtype=torch.float64)
    keep = ds.keep_mask((9, 11), 0.3, KEY, 5)
    torch.testing.assert_close(ds.dropout(x, 0.3, KEY, 5), x * keep / ds.keep_probability(0.3), rtol=1e-15, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kept_values_are_rounded_once(dtype: torch.dtype) -> None:
    x = torch.randn(64, 33).to(dtype)
    keep = ds.keep_mask(x.shape, 0.3, KEY)
    scale = torch.tensor(65536 / 45875, dtype=torch.float32)
    assert torch.equal(ds.dropout(x, 0.3, KEY), torch.where(keep, (x.float() * scale).to(dtype), 0))


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_dropped_values_are_positive_zero(p: float) -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, -1.0]).repeat(50, 1)
    out = ds.dropout(x, p, KEY)[~ds.keep_mask(x.shape, p, KEY)]
    assert len(out) > 50
    assert (out == 0.0).all()
    assert not out.signbit().any()


def test_ends_of_the_range_of_p() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    assert ds.dropout(x, 0.0, KEY) is x
    out = ds.dropout(x, 1.0, KEY)
    assert torch.equal(out, torch.zeros(3, 4))
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.zeros(3, 4))
    assert ds.keep_mask((3, 4), 0.0, KEY).all()
    assert not ds.keep_mask((3, 4), 1.0, KEY).any()


def signs(keys: list[ds.MaskKey], sites: list[int], samples: list[Tensor]) -> Tensor:
    """Rows of ±1, one for each combination, p = ½."""
    rows = [ds.keep_mask((1, 1 << 16), 0.5, key, site, ids) for key in keys for site in sites for ids in samples]
    return torch.cat(rows).double() * 2 - 1


def test_masks_that_differ_in_any_number_are_uncorrelated() -> None:
    """32 masks of 65536 units: all 496 correlations below 5σ, a false alarm of 3e-4."""
    keys = [ds.MaskKey(0), ds.MaskKey(1), ds.MaskKey(2 << 32), ds.MaskKey(0, 1)]
    rows = signs(keys, [0, 1, 1 << 32, 1 << 63], [torch.tensor([0]), torch.tensor([1])])
    correlation = (rows @ rows.T / rows.shape[1]).fill_diagonal_(0.0)
    assert correlation.abs().max() < 5 / math.sqrt(rows.shape[1])


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_keep_rate(p: float) -> None:
    """Within 4σ of T/65536 over 2^20 units: false alarm 6e-5 each."""
    n, q = 1 << 20, ds.keep_probability(p)
    kept = int(ds.keep_mask((1 << 10, 1 << 10), p, KEY).sum())
    assert abs(kept - n * q) < 4 * math.sqrt(n * q * (1 - q))


def test_seed_zero_is_a_seed() -> None:
    masks_of = [ds.keep_mask((4, 64), 0.5, ds.MaskKey(seed)) for seed in (0, 0, 1)]
    assert torch.equal(masks_of[0], masks_of[1])
    assert not torch.equal(masks_of[0], masks_of[2])


# --- derivatives: each form of differentiation against x * mask -------------------------------------------------------

X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
V = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Function = Callable[[Tensor], Tensor]


def ours(x: Tensor) -> Tensor:
    return ds.dropout(x, 0.4, KEY, 3)


def plain(x: Tensor) -> Tensor:
    return x * ds.keep_mask(x.shape, 0.4, KEY, 3) / ds.keep_probability(0.4)


def scalar(drop: Function) -> Function:
    return lambda x: (drop(x).sin() * drop(x.exp())).sum()


def double_backward(f: Function) -> Any:
    x = X.clone().requires_grad_()
    first = torch.autograd.grad(f(x), x, create_graph=True)[0]
    return torch.autograd.grad(first, x, V, create_graph=True)[0].detach()


def batched_gradients(f: Function) -> Any:
    x = X.clone().requires_grad_()
    first = torch.autograd.grad(f(x), x, create_graph=True)[0]
    return torch.autograd.grad(first, x, torch.stack((V, X)), is_grads_batched=True)[0]


def dual_numbers(f: Function) -> Any:
    with torch.autograd.forward_ad.dual_level():
        out = f(torch.autograd.forward_ad.make_dual(X, V))
        return torch.autograd.forward_ad.unpack_dual(out)


DERIVATIVES: dict[str, Callable[[Function], Any]] = {
    "grad": lambda f: grad(f)(X),
    "jvp": lambda f: jvp(f, (X,), (V,)),
    "jvp of grad": lambda f: jvp(grad(f), (X,), (V,)),
    "grad of jvp": lambda f: grad(lambda x: jvp(f, (x,), (V,))[1])(X),
    "jvp of jvp": lambda f: jvp(lambda x: jvp(f, (x,), (V,))[1], (X,), (V,)),
    "hessian": lambda f: hessian(f)(X),
    "double backward": double_backward,
    "is_grads_batched": batched_gradients,
    "dual numbers": dual_numbers,
    "vmap of jvp": lambda f: vmap(lambda v: jvp(f, (X,), (v,))[1])(torch.stack((V, X))),
    "vmap of grad": lambda f: vmap(grad(f))(torch.stack((V, X))),
    "vmap in_dims 1": lambda f: vmap(grad(f), in_dims=1)(torch.stack((V, X), 1)),
    "vmap of vmap": lambda f: vmap(vmap(f))(torch.stack((V, X)).expand(3, 2, 4, 6)),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_every_derivative_is_that_of_x_times_mask(name: str) -> None:
    torch.testing.assert_close(
        DERIVATIVES[name](scalar(ours)), DERIVATIVES[name](scalar(plain)), rtol=1e-13, atol=1e-13
    )


def test_gradcheck_in_every_mode() -> None:
    x = X.clone().requires_grad_()
    assert torch.autograd.gradcheck(ours, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradcheck(ours, x, check_forward_ad=True, check_batched_forward_grad=True)
    f = scalar(ours)
    assert torch.autograd.gradgradcheck(f, x, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True)


def test_vmap_over_streams() -> None:
    streams, xs = torch.arange(12).view(3, 4), torch.stack((X, V, X))

    def drop(x: Tensor, rows: Tensor) -> Tensor:
        return mask_op.mask_rows(x, rows, 5, 7, 40000)

    def keep(rows: Tensor) -> Tensor:
        return mask_op.keep_rows(rows, 6, 5, 7, 40000)

    expected = torch.stack([drop(x, rows) for x, rows in zip(xs, streams, strict=True)])
    assert torch.equal(vmap(drop)(xs, streams), expected)
    assert torch.equal(vmap(drop, in_dims=(0, 1))(xs, streams.T), expected)
    one = torch.stack([drop(X, rows) for rows in streams])
    assert torch.equal(vmap(drop, in_dims=(None, 0))(X, streams), one)
    torch.testing.assert_close(torch.where(vmap(keep, in_dims=1)(streams.T), X * 65536 / 40000, 0), one)
    gradient = vmap(grad(lambda x, rows: (drop(x, rows) ** 2).sum()))(xs, streams)
    torch.testing.assert_close(gradient, 2 * expected * 65536 / 40000)


def test_library_ops() -> None:
    rows = torch.arange(4)
    for x in (X, X.bfloat16(), X.T.contiguous().T):
        torch.library.opcheck(torch.ops.dropscope.mask.default, (x, rows, -5, 7, 40000))
    torch.library.opcheck(torch.ops.dropscope.keep.default, (rows, 6, -5, 7, 40000))


def test_the_scale_of_kept_values_is_rounded_to_float() -> None:
    exact = 65536.0 / torch.arange(1, 65537, dtype=torch.float64)
    assert [mask_op.keep_scale(T, torch.float32) for T in range(1, 65537)] == exact.float().tolist()
    assert [mask_op.keep_scale(T, torch.float64) for T in range(1, 65537)] == exact.tolist()


def test_compiled_is_eager() -> None:
    """One graph, no break, first and second derivatives; other ids do not compile again."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(x: Tensor, ids: Tensor) -> Tensor:
        return scalar(lambda y: ds.dropout(y, 0.4, KEY, 3, ids))(x)

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for ids in (torch.arange(4), torch.tensor([9, 2, 0, 2**32 - 2])):
        a, b = X.clone().requires_grad_(), X.clone().requires_grad_()
        torch.testing.assert_close(compiled(a, ids), loss(b, ids))
        compiled(a, ids).backward()
        loss(b, ids).backward()
        torch.testing.assert_close(a.grad, b.grad)
    assert counter.frame_count == 1
    dtype = torch.bfloat16
    half = torch.compile(lambda x: ds.dropout(x, 0.3, KEY), fullgraph=True, backend="aot_eager")
    assert torch.equal(half(X.to(dtype)), ds.dropout(X.to(dtype), 0.3, KEY))
    torch._dynamo.reset()
    breaks = torch._dynamo.explain(lambda x: ds.dropout(x, 0.3, KEY))(X.float())  # fullgraph lets scalars through
    assert breaks.graph_break_count == 0


# --- refusals --------------------------------------------------------------------------------------------------------

BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ds.MaskKey(-1), ValueError, r"MaskKey: seed must lie in \[0, 2\*\*64\), got -1"),
    (lambda: ds.MaskKey(1 << 64), ValueError, "seed"),
    (lambda: ds.MaskKey(0, 1 << 32), ValueError, r"draw must lie in \[0, 2\*\*32\)"),
    (lambda: ds.MaskKey(0.5), TypeError, "seed must be an integer"),
    (lambda: ds.MaskKey(True), TypeError, "seed must be an integer"),
    (lambda: ds.dropout(X, -0.1, KEY), ValueError, r"dropout: p must lie in \[0, 1\], got -0.1"),
    (lambda: ds.dropout(X, 1.1, KEY), ValueError, "p must lie"),
    (lambda: ds.dropout(X, math.nan, KEY), ValueError, "p must lie"),
    (lambda: ds.dropout(X, 1e-6, KEY), ValueError, "p must be 0, 1, or"),
    (lambda: ds.dropout(X, 1 - 1e-6, KEY), ValueError, "p must be 0, 1, or"),
    (lambda: ds.dropout(X, "0.5x", KEY), TypeError, "p must be a real number"),
    (lambda: ds.dropout(X, 0.5, 3), TypeError, "key must be a MaskKey, got int"),
    (lambda: ds.dropout(X.long(), 0.5, KEY), TypeError, "x must be a real floating-point tensor, got torch.int64"),
    (lambda: ds.dropout(X + 0j, 0.5, KEY), TypeError, "floating-point tensor"),
    (lambda: ds.dropout(X[0, 0], 0.5, KEY), ValueError, "batch dimension"),
    (lambda: ds.dropout(X, 0.5, KEY, -1), ValueError, "site must lie"),
    (lambda: ds.dropout(X, 0.5, KEY, 0, torch.arange(5)), ValueError, "one id for each of the 4 rows, got 5"),
    (lambda: ds.dropout(X, 0.5, KEY, 0, torch.rand(4)), TypeError, "samples must be an integer tensor"),
    (lambda: ds.dropout(X, 0.5, KEY, 0, [0, 1, 2, 3]), TypeError, "samples must be an integer tensor, got list"),
    (lambda: ds.dropout(X, 0.5, KEY, 0, torch.tensor([0, 1, 2, -1])), ValueError, "got -1"),
    (lambda: ds.dropout(X, 0.5, KEY, 0, torch.tensor([0, 1, 2, 2**32 - 1])), ValueError, "got 4294967295"),
    (lambda: ds.dropout(X, 0.5, KEY, 0, torch.zeros(4, 1).long()), ValueError, "must be a vector"),
    (lambda: ds.keep_mask((1, 2**35 + 1), 0.5, KEY), ValueError, r"2\*\*35 units"),
    (lambda: ds.keep_mask((), 0.5, KEY), ValueError, "batch dimension"),
    (lambda: ds.keep_mask(3, 0.5, KEY), TypeError, "keep_mask: shape must be a sequence of integers, got 3"),
    (lambda: ds.keep_mask((3, 2.0), 0.5, KEY), TypeError, "keep_mask: shape must be a sequence of integers"),
    (lambda: ds.keep_mask((3, -1), 0.5, KEY), ValueError, r"keep_mask: shape must not be negative, got \(3, -1\)"),
    (lambda: ds.keep_mask((3, 2), 2.0, KEY), ValueError, "keep_mask: p must lie"),
    (lambda: ds.keep_probability(2.0), ValueError, "keep_probability: p must lie"),
    (
        lambda: ds.replay_dropout(KEY, torch.arange(4), model=3).__enter__(),
        TypeError,
        "torch.nn.Module or None, got int",
    ),
    (lambda: masks.make_streams(1 << 32, torch.arange(2)), ValueError, "draws must lie"),
    (lambda: masks.make_streams(torch.tensor([0, 1 << 32]), torch.arange(2)), ValueError, "draws must lie"),
    (lambda: masks.make_streams(torch.arange(3), torch.arange(2)), ValueError, "draws must have the shape"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_refusals(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_streams() -> None:
    high = 2**32 - 1
    streams = masks.make_streams(torch.tensor([3, high]), torch.tensor([5, high - 1], dtype=torch.int64))
    assert [word % 2**64 for word in streams.tolist()] == [3 << 32 | 5, high << 32 | high - 1]
    assert masks.make_streams(high, torch.tensor([0, 5])).tolist() == [-(1 << 32), -(1 << 32) + 5]
    assert masks.make_streams(1, torch.tensor([4], dtype=torch.int32)).dtype == torch.int64
