"""Dropout masks, format 1: known answers, and the compiled kernels bit for bit against their definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dropscope import _core, kernels, reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16, torch.float16: torch.int16}
SHAPES = (
    *((rows, units) for rows in (1, 3, 700) for units in (1, 7, 8, 9, 10, 16, 56, 57, 63, 64, 65, 511, 513)),
    *((5, units) for units in (1000, 2047, 2048, 2049, 4096, 4097, 9001)),
    (2, 100_003),
    (0, 5),
    (5, 0),
)
KEY = {"seed": 0xFEDCBA9876543210, "site": 0x0123456789ABCDEF}
CUDA = pytest.param("cuda", marks=[pytest.mark.cuda])
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])


@pytest.fixture(autouse=True)
def skip_without_cuda(request):
    if request.node.get_closest_marker("cuda") and not (torch.cuda.is_available() and _core.cuda_built()):
        pytest.skip("needs a CUDA device and a build with nvcc")


def streams_for(rows, seed=0):
    draw = torch.randint(2**31, (rows,), generator=torch.Generator().manual_seed(seed))
    sample = torch.randint(2**32, (rows,), generator=torch.Generator().manual_seed(seed + 1))
    return draw << 32 | sample


def values(rows, units, dtype, seed=0):
    """Normal values with everything that a product can meet: infinities, NaN, zeros, subnormals, the largest."""
    x = torch.randn(rows, units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    info = torch.finfo(dtype)
    special = torch.tensor(
        [math.inf, -math.inf, math.nan, 0.0, -0.0, info.max, -info.max, info.tiny, -info.tiny / 2, info.tiny / 8]
    ).to(dtype)
    flat = x.view(-1)
    flat[::7][: len(special)] = special[: len(flat[::7])]
    return x


def assert_same_bits(a, b):
    """Equal bits, a NaN being equal to every NaN."""
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    nan = torch.isnan(a)
    assert torch.equal(nan, torch.isnan(b))
    assert torch.equal(a.contiguous().view(BITS[a.dtype])[~nan], b.contiguous().view(BITS[a.dtype])[~nan])


# Random123, tests/kat_vectors: philox4x32 with ten rounds; counter, key, output.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_the_definition_gives_random123s_known_answers(counter, key, output):
    words = [torch.tensor(int(word, 16)) for word in counter.split()]
    k0, k1 = (int(word, 16) for word in key.split())
    assert [int(w) for w in reference.philox4x32_10(tuple(words), (k0, k1))] == [int(w, 16) for w in output.split()]


def test_lanes_are_the_halves_of_the_known_words_low_half_first():
    # The mask at every threshold gives the lanes themselves: a lane is the number of thresholds at which it drops.
    streams = torch.zeros(1, dtype=torch.int64)
    lanes = sum((~kernels.keep_mask(streams, 8, seed=0, site=0, threshold=T))[0].int() for T in range(1, 65536))
    words = [int(word, 16) for word in KNOWN[0][2].split()]
    assert lanes.tolist() == [half for word in words for half in (word & 0xFFFF, word >> 16)]


def as_integer(mask):
    return sum(int(bit) << unit for unit, bit in enumerate(mask))


@DEVICES
def test_golden_masks(device):
    # Format 1, fixed for ever: 64 units, bit u for unit u.
    streams = torch.tensor([0, 3 << 32 | 5, (-1 << 32) | 7], device=device)
    masks = kernels.keep_mask(streams, 64, seed=2024, site=0x0123456789ABCDEF, threshold=52429).cpu()
    assert [as_integer(mask) for mask in masks] == [0xFF67FFCFFBFBECFF, 0x7BEECFEBF7F7E2E7, 0x3DFBFFEFFF37DFEF]


@DEVICES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_equal_the_definition_bit_for_bit(dtype, device):
    for rows, units in SHAPES:
        x, streams = values(rows, units, dtype).to(device), streams_for(rows).to(device)
        for T in (1, 32768, 52429, 65535):
            expected = reference.apply_mask(x.cpu(), streams.cpu(), threshold=T, **KEY)
            assert_same_bits(kernels.apply_mask(x, streams, threshold=T, **KEY).cpu(), expected)
            keep = reference.keep_mask(streams.cpu(), units, threshold=T, **KEY)
            assert torch.equal(kernels.keep_mask(streams, units, threshold=T, **KEY).cpu(), keep)


@DEVICES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropped_values_are_plus_zero_whatever_x_was(dtype, device):
    streams = streams_for(6).to(device)
    keep = kernels.keep_mask(streams, 83, threshold=20000, **KEY)
    for value in (math.nan, math.inf, -math.inf, -1.0, -0.0):
        x = torch.full((6, 83), value, dtype=dtype, device=device)
        dropped = kernels.apply_mask(x, streams, threshold=20000, **KEY)[~keep]
        assert torch.equal(dropped.view(BITS[dtype]), torch.zeros_like(dropped).view(BITS[dtype]))


@DEVICES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows_transposes_and_in_place(dtype, device):
    streams = streams_for(40).to(device)
    for units in (10, 64, 65, 700):
        wide = values(40, units + 5, dtype).to(device)
        untouched = wide.clone()
        expected = kernels.apply_mask(wide[:, 2:-3].contiguous(), streams, threshold=777, **KEY)
        assert_same_bits(kernels.apply_mask(wide[:, 2:-3], streams, threshold=777, **KEY), expected)
        columns = wide[:, 2:-3].T.contiguous().T
        assert_same_bits(kernels.apply_mask(columns, streams, threshold=777, **KEY), expected)
        spread = torch.zeros(40, 2 * units, dtype=dtype, device=device)[:, ::2]
        assert kernels.apply_mask(columns, streams, threshold=777, out=spread, **KEY) is spread
        assert_same_bits(spread, expected)
        for x in (wide[:, 2:-3], columns):  # in place
            assert kernels.apply_mask(x, streams, threshold=777, out=x, **KEY) is x
            assert_same_bits(x, expected)
        wide[:, 2:-3] = untouched[:, 2:-3]
        assert_same_bits(wide, untouched)  # nothing beside the view was written
    one = values(1, 64, dtype).to(device).expand(40, 64)
    assert_same_bits(
        kernels.apply_mask(one, streams, threshold=777, **KEY),
        kernels.apply_mask(one.contiguous(), streams, threshold=777, **KEY),
    )


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 600), st.integers(1, 65535), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)
)
def test_any_shape_and_key_equals_the_definition(rows, units, T, seed, site):
    streams, x = streams_for(rows, units), torch.randn(rows, units)
    actual = kernels.apply_mask(x, streams, seed=seed, site=site, threshold=T)
    assert_same_bits(actual, reference.apply_mask(x, streams, seed=seed, site=site, threshold=T))


def test_a_row_does_not_depend_on_the_rows_beside_it():
    streams, x = streams_for(513), torch.randn(513, 33)
    whole = kernels.apply_mask(x, streams, threshold=9999, **KEY)
    parts = [kernels.apply_mask(a, s, threshold=9999, **KEY) for a, s in zip(x.split(7), streams.split(7), strict=True)]
    assert torch.equal(whole, torch.cat(parts))


def test_units_are_kept_with_probability_threshold_over_65536():
    # 2^22 independent lanes: a bound of six standard errors fails once in 5e8 honest runs.
    for T in (655, 32768, 52429):
        rate = kernels.keep_mask(torch.arange(4096), 1024, threshold=T, **KEY).double().mean()
        q = T / 65536
        assert abs(rate - q) < 6 * math.sqrt(q * (1 - q) / 2**22)


def test_other_tensors_take_the_definition():
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, streams = torch.randn(4, 9), streams_for(4)
    with FakeTensorMode() as mode:
        fake = kernels.apply_mask(mode.from_tensor(x), mode.from_tensor(streams), threshold=9, **KEY)
    assert fake.shape == x.shape
    assert kernels.apply_mask(x.to("meta"), streams.to("meta"), threshold=9, **KEY).device.type == "meta"
    batched = torch.func.vmap(lambda a: kernels.apply_mask(a, streams, threshold=9, **KEY))(x.expand(3, 4, 9))
    assert torch.equal(batched[1], kernels.apply_mask(x, streams, threshold=9, **KEY))
    negative = torch.imag(torch.complex(x, x).conj())
    assert negative.is_neg()
    assert_same_bits(
        kernels.apply_mask(negative, streams, threshold=9, **KEY), kernels.apply_mask(-x, streams, threshold=9, **KEY)
    )


GOOD = {"x": torch.ones(3, 4), "streams": torch.arange(3), "seed": 0, "site": 0, "threshold": 9}


@pytest.mark.parametrize(
    ("bad", "error", "rule"),
    [
        ({"x": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "x must be floating point, got torch.int64"),
        ({"x": torch.ones(12)}, ValueError, r"x must have shape \(rows, units\), got \(12,\)"),
        ({"streams": torch.arange(3.0)}, TypeError, "streams must be an int64 vector, got torch.float32"),
        ({"streams": torch.arange(4)}, ValueError, r"one entry per row of x \(3\), got 4"),
        ({"seed": -1}, ValueError, r"seed must be in 0..2\^64-1, got -1"),
        ({"site": 2**64}, ValueError, r"site must be in 0..2\^64-1"),
        ({"group": 2}, ValueError, r"x must have a row for each 2 of 0 \+ 3 streams, got 3"),
        ({"group": 2, "skip": 2}, ValueError, "skip in 0..group-1, got 2 and 2"),
        ({"threshold": 0}, ValueError, "threshold must be in 1..65535, got 0"),
        ({"threshold": 65536}, ValueError, "threshold must be in 1..65535, got 65536"),
        ({"out": torch.ones(3, 4, dtype=torch.float64)}, TypeError, "out must have the dtype of x"),
        ({"out": torch.ones(4, 3)}, ValueError, r"out must have shape \(3, 4\), got \(4, 3\)"),
    ],
)
def test_bad_input_is_refused_before_any_work(bad, error, rule):
    with pytest.raises(error, match=f"apply_mask: .*{rule}"):
        kernels.apply_mask(**{**GOOD, **bad})


@DEVICES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("units", [1, 10, 64, 65, 500, 4097])
def test_rows_that_streams_share_are_masked_as_if_repeated(units, dtype, device):
    wide = values(5, units + 3, dtype).to(device)
    for x in (wide[:, :units].contiguous(), wide[:, 1:-2]):  # with rows that follow each other, and apart
        for group, skip, rows in ((4, 0, 20), (4, 3, 15), (7, 2, 27), (1, 0, 5), (30, 10, 130)):
            streams = streams_for(rows).to(device)
            own = x.repeat_interleave(group, 0)[skip : skip + rows]
            actual = kernels.apply_mask(x, streams, threshold=30000, group=group, skip=skip, **KEY)
            assert_same_bits(actual.cpu(), reference.apply_mask(own.cpu(), streams.cpu(), threshold=30000, **KEY))
            again = reference.apply_mask(x, streams, threshold=30000, group=group, skip=skip, **KEY)
            assert_same_bits(actual.cpu(), again.cpu())


def test_more_units_than_a_counter_holds_are_refused():
    with pytest.raises(ValueError, match=r"keep_mask: units must be in 0..2\^35"):
        kernels.keep_mask(torch.arange(1), 2**35 + 1, seed=0, site=0, threshold=9)
