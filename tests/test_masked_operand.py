"""The masked first operand: every kernel as if the masked rows were stored, and where capture finds one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dropscope as ds
from cases import sample_gradients
from dropscope import kernels, reference
from dropscope.factors import FactorBlock, Table
from dropscope.kernels import Masked

# samples, samples that share a row of x, T, d_in, d_out, K
SHAPES = {
    "one": (1, 1, 1, 1, 1, 1),
    "own": (7, 1, 1, 5, 3, 2),
    "wide_out": (30, 2, 1, 3, 70, 3),
    "shared": (24, 3, 1, 40, 33, 5),
    "many": (1230, 5, 1, 9, 17, 1),
    "large_group": (1400, 700, 1, 6, 11, 1),
    "sequence": (12, 4, 4, 8, 50, 3),
    "long": (6, 2, 130, 6, 5, 1),
    "many_vectors": (30, 2, 9, 5, 70, 60),
}
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
ALL_SHAPES = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
MASK = {"seed": 2**64 - 3, "site": 2**63 + 9, "threshold": 40000}


def normal(*size, dtype=torch.float64, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def operand(shape, dtype, seed=0):
    """A masked operand with strides of its own, and the rows that it stands for by the definition."""
    samples, group, steps, d_in, _, _ = shape
    x = normal(samples // group, steps, d_in + 1, dtype=dtype, seed=seed)[..., 1:]
    streams = torch.arange(samples) % group << 32 | torch.arange(samples) // group + 7
    rows = reference.apply_mask(x.flatten(1), streams, group=group, **MASK).view(samples, steps, d_in)
    return Masked(x, streams, **MASK), rows


def sums(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_near(actual, expected, dtype):
    assert (actual.double() - expected).norm() <= TOLERANCE[dtype] * max(1.0, float(expected.norm()))


@DTYPES
@ALL_SHAPES
def test_products_are_those_of_the_stored_rows(shape, dtype):
    A, rows = operand(shape, dtype)
    samples, _, steps, d_in, d_out, K = shape
    B, V = normal(samples, steps, d_out, dtype=dtype, seed=1), normal(K, d_out, d_in, dtype=dtype, seed=2)
    S = normal(samples, K, dtype=dtype, seed=3)
    assert A.shape == rows.shape
    dots, total = torch.ones(S.shape, dtype=sums(dtype)), torch.ones(V.shape, dtype=sums(dtype))
    expected, expected_total = dots.double(), total.double()
    kernels.project(A, B, V, dots)
    reference.project(rows.double(), B.double(), V.double(), expected)
    assert_near(dots, expected, dtype)
    kernels.accumulate(A, B, S, total)
    reference.accumulate(rows.double(), B.double(), S.double(), expected_total)
    assert_near(total, expected_total, dtype)


@DTYPES
@ALL_SHAPES
@pytest.mark.parametrize("ghost", [True, False])
def test_gram_and_norms_are_those_of_the_stored_rows(shape, dtype, ghost, monkeypatch):
    monkeypatch.setattr("dropscope.kernels._gram._ghost_is_cheaper", lambda *_: ghost)
    monkeypatch.setattr("dropscope.kernels._slabs._SLAB_BYTES", {"cpu": 1 << 12})
    (A, rows), B = operand(shape, dtype), normal(shape[0], shape[2], shape[4], dtype=dtype, seed=1)
    out = torch.zeros(len(B), len(B), dtype=sums(dtype))
    kernels.gram(A, B, A, B, out, bias=True)
    expected = torch.zeros(len(B), len(B), dtype=torch.float64)
    reference.gram(rows.double(), B.double(), rows.double(), B.double(), expected, bias=True)
    assert_near(out, expected, dtype)
    assert torch.equal(out, out.T)
    # Against stored rows: neither side is the other, and one is no multiple of the groups.
    other = torch.zeros(len(B), len(B) // 2, dtype=sums(dtype))
    kernels.gram(A, B, rows[: len(B) // 2], B[: len(B) // 2], other, bias=True)
    assert_near(other, expected[:, : len(B) // 2], dtype)
    assert_near(kernels.sq_norms(A, B, bias=True), expected.diagonal(), dtype)


@DTYPES
def test_any_run_of_samples_has_the_bits_of_the_definition(dtype):
    A, rows = operand((60, 12, 3, 7, 1, 1), dtype)
    for start, stop in ((0, 60), (0, 1), (5, 12), (11, 13), (24, 60), (59, 80), (30, 30)):
        assert torch.equal(A.samples(start, stop), rows[start:stop])
    wide = torch.empty(20, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(A.samples(7, 27, wide), rows[7:27].double(), rtol=TOLERANCE[dtype], atol=0)
    assert torch.equal(kernels.whole(A), rows)
    assert kernels.whole(rows) is rows


def test_no_rows_add_nothing():
    A, B = Masked(torch.ones(0, 1, 3), torch.arange(0), **MASK), torch.ones(0, 1, 2)
    total = torch.ones(1, 2, 3)
    kernels.accumulate(A, B, torch.ones(0, 1), total)
    kernels.project(A, B, total, torch.ones(0, 1))
    assert torch.equal(total, torch.ones(1, 2, 3))
    assert kernels.sq_norms(A, B).shape == (0,)
    assert kernels.whole(A).shape == A.shape == (0, 1, 3)


def test_rounding_to_integers_is_that_of_the_stored_rows():
    A, rows = operand((1230, 5, 1, 19, 1, 1), torch.float32)
    for mine, stored in zip(kernels.round_rows(A), kernels.round_rows(rows.squeeze(1)), strict=True):
        assert torch.equal(mine, stored)
    with pytest.raises(ValueError, match=r"round_rows: x must have shape \(n, d\).*got \(12, 2, 3\)"):
        kernels.round_rows(operand((12, 4, 2, 3, 1, 1), torch.float32)[0])


def test_dtypes_without_kernels_take_the_reference():
    A, rows = operand((6, 2, 1, 3, 2, 1), torch.float16)
    B, V = normal(6, 1, 2, dtype=torch.float16), normal(1, 2, 3, dtype=torch.float16)
    out, expected = torch.zeros(6, 1), torch.zeros(6, 1)
    kernels.project(A, B, V, out)
    reference.project(rows, B, V, expected)
    assert torch.equal(out, expected)


def test_operands_that_do_not_fit_are_refused():
    streams = torch.arange(6)
    with pytest.raises(ValueError, match=r"Masked: x must have shape \(rows, T, units\), got \(6, 3\)"):
        Masked(torch.ones(6, 3), streams, **MASK)
    with pytest.raises(ValueError, match="Masked: the rows of x must divide the 6 streams, got 4"):
        Masked(torch.ones(4, 1, 3), streams, **MASK)
    A = Masked(torch.ones(3, 1, 3), streams, **MASK)
    with pytest.raises(ValueError, match=r"divide those of B \(4\), got 6"):
        kernels.sq_norms(A, torch.ones(4, 1, 2))
    with pytest.raises(TypeError, match="one dtype"):
        kernels.sq_norms(A, torch.ones(6, 1, 2, dtype=torch.float64))


# ---- where capture finds one -------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Queries, keys and values of one dropout: three uses of what the draws share."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        h = F.dropout(x, 0.3, self.training)
        h = (self.q(h) @ self.k(h).mT / 6**0.5).softmax(-1) @ self.v(h)
        return self.out(F.dropout(h, 0.2, self.training)).mean(1)[:, :2]


class Changed(nn.Module):
    """The masked rows are changed after the mask: they are no operand of their own."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(6, 7), nn.Linear(7, 2)

    def forward(self, x):
        h = F.dropout(torch.tanh(self.hidden(x.mean(1))) + 0.0, 0.3, self.training)
        return self.out(h.mul_(2.0))


class Source(Changed):
    """What was masked is changed before the layer runs, or after it."""

    late = False

    def forward(self, x):
        h = torch.tanh(self.hidden(x.mean(1))) + 0.0
        masked = F.dropout(h, 0.3, self.training)
        masked = masked.clone() if masked is h else masked
        out = self.out(masked) if self.late else None
        h.detach().add_(1.0)
        return self.out(masked) if out is None else out


class Flat(nn.Module):
    """Tokens as rows, so that the mask of a sample is on a group of rows."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(6, 40), nn.Linear(40, 2)

    def forward(self, x):
        h = torch.tanh(self.hidden(F.dropout(x.reshape(-1, 6), 0.3, self.training)))
        return self.out(h).view(len(x), -1, 2).mean(1)


class LateSource(Source):
    late = True


def flat_network():
    convolution = (nn.Conv1d(4, 3, 2), nn.Tanh(), nn.Dropout(0.4), nn.Flatten())
    return nn.Sequential(*convolution, nn.Linear(15, 8), nn.Tanh(), nn.Dropout(), nn.Linear(8, 2))


def problem_of(make, dtype=torch.float64, n=11, batch_size=4):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, x, y = make().to(dtype), torch.randn(n, 4, 6, dtype=dtype), torch.randn(n, 2, dtype=dtype)
    return ds.Problem(net, nn.MSELoss(), (x, y), batch_size=batch_size)


def table_of(problem, draws=6, cache="factors", allocation="uniform"):
    return Table(problem, draws, 5, cache, "sample", None, False, allocation)


def masked_names(table):
    """Weights whose blocks hold a masked operand, chunk by chunk."""
    where = {part.start: name for name, part in table.problem.blocks.items()}
    found = [
        {where[b.weight.start] for b in chunk.blocks if isinstance(b, FactorBlock) and isinstance(b.A, Masked)}
        for chunk in table.chunks()
    ]
    assert all(names == found[0] for names in found)
    return found[0]


NETWORKS = {
    "flattened": (flat_network, {"4.weight"}),
    "attention": (Attention, {"q.weight", "k.weight", "v.weight"}),
    "flat": (Flat, None),
    "changed": (Changed, set()),
    "source": (Source, set()),
    "late_source": (LateSource, {"out.weight"}),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("step", [4096, 9, 4])  # draws of a pass: all, two, one
def test_rows_are_the_gradients_of_one_sample_and_draw(name, step):
    make, expected = NETWORKS[name]
    problem = problem_of(make)
    table = table_of(problem)
    table.step = step
    if expected is not None:
        assert masked_names(table) == expected
        assert ("masks, which are remade" in problem.plan()) == bool(expected)
    truth = sample_gradients(problem, 5, 6)
    rows = truth.flatten(0, 1)
    eye = torch.eye(problem.dim, dtype=torch.float64)
    close = {"rtol": 0, "atol": 1e-11 * float(rows.square().sum())}
    torch.testing.assert_close(torch.cat([chunk.project(eye) for chunk in table.chunks()]), rows, **close)
    torch.testing.assert_close(table.gram(), rows @ rows.T, **close)
    grams = torch.cat([chunk.sample_gram() for chunk in table.chunks()])
    torch.testing.assert_close(grams, truth @ truth.mT, **close)


def test_uses_of_one_mask_hold_one_tensor():
    chunk = next(iter(table_of(problem_of(Attention, batch_size=11)).chunks()))
    operands = [b.A for b in chunk.blocks if isinstance(b, FactorBlock) and isinstance(b.A, Masked)]
    assert len(operands) == 3
    assert len({A.x.data_ptr() for A in operands}) == 1


@pytest.mark.parametrize("cache", ["disk", "recompute", "bf16"])
def test_caches_hold_masked_operands(cache):
    problem = problem_of(flat_network)
    table = table_of(problem, cache=cache)
    truth = sample_gradients(problem, 5, 6).flatten(0, 1)
    eye = torch.eye(problem.dim, dtype=torch.float64)
    found = torch.cat([chunk.project(eye) for chunk in table.chunks()])
    tolerance = 0.02 if cache == "bf16" else 1e-13
    torch.testing.assert_close(found, truth, rtol=0, atol=tolerance * float(truth.abs().max()))
    table.close()


def test_counted_bytes_are_the_bytes_stored_and_fewer():
    layers = (nn.Dropout(0.2), nn.Flatten(), nn.Linear(24, 60), nn.Tanh(), nn.Linear(60, 2))
    problem = problem_of(lambda: nn.Sequential(*layers))
    table = table_of(problem)
    assert masked_names(table) == {"2.weight"}
    biases = sum(problem.params[b].numel() for b in table.plan.biases.values()) * 8 * 6
    stored = sum(chunk.nbytes for chunk in table.chunks())
    assert stored == (table.plan.shared_bytes + 6 * table.plan.draw_bytes - biases) * problem.n
    assert table.plan.shared_bytes == 24 * 8


def test_the_whole_measurement_is_that_of_stored_rows(monkeypatch):
    """Products, Gram route, halves of the draws, quiet samples, unequal numbers of draws: with and without."""

    def measure(precision, allocation):
        problem = problem_of(flat_network, n=40, batch_size=16)
        with ds.GradientNoise(problem, draws=6, seed=3, allocation=allocation) as noise:
            pairs = noise.eigsh(4, precision=precision)
            product = noise.dropout @ torch.ones(problem.dim, dtype=torch.float64)
            numbers = [noise.trace.value, *(e.value for e in pairs.cross_validated)]
            return product, pairs.values, noise.gram(), torch.tensor(numbers, dtype=torch.float64)

    # Rows of a float64 network are rounded to float32 before or after their mask.
    cases = {("full", "uniform"): 1e-9, ("full", "gradient"): 1e-9, ("int8", "uniform"): 1e-5}
    masked = [measure(*case) for case in cases]
    monkeypatch.setattr("dropscope.factors.uses.Dropped.operand", lambda *_: None)
    for (case, tolerance), mine in zip(cases.items(), masked, strict=True):
        for one, other in zip(mine, measure(*case), strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))
