"""Leading eigenpairs of the dropout noise through the Gram matrix, against the dense covariance."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dropscope as ds
from dropscope.factors.blocks import DenseBlock, FactorBlock
from dropscope.factors.chunk import Chunk
from dropscope.factors.eigen import leading_eigenpairs
from dropscope.reference import per_sample_gradients

LAYERS = ((6, 5), (5, 4), (4, 3))


def chunked(tables, draws):
    """Chunks of blocks with their numbers of draws, of samples that follow each other."""
    draws = draws if isinstance(draws, (list, tuple)) else [draws] * len(tables)
    start, out = 0, []
    for blocks, M in zip(tables, draws, strict=True):
        ids = torch.arange(start, start := start + blocks[0].rows // M)
        out.append(Chunk(ids, M, tuple(blocks)))
    return out


def table(samples, draws, dtype, *, chunk=None, steps=1, dense=True, decay=0.0, seed=0):
    """Blocks of a small network, in chunks; the first layer's input is shared by the draws."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    chunk = chunk or samples
    chunks = []
    for start in range(0, samples, chunk):
        n, at, blocks = min(chunk, samples - start), 0, []
        for layer, (d_in, d_out) in enumerate(LAYERS):
            rows = n * draws
            A = normal(rows if layer else n, steps, d_in)
            B = normal(rows, steps, d_out) * torch.exp(-decay * torch.arange(d_out)).to(dtype)
            weight = slice(at, at + d_in * d_out)
            at = weight.stop
            bias = slice(at, at + d_out) if layer != 1 else None
            at += d_out if bias else 0
            blocks.append(FactorBlock(A, B, weight, bias))
        if dense:
            blocks.append(DenseBlock(normal(n * draws, 7), slice(at, at + 7)))
            at += 7
        chunks.append(blocks)
    return chunks, at


def covariance(chunks, dim, draws):
    """The definition, in float64."""
    rows = []
    for chunk in chunks:
        G = torch.zeros(chunk[0].rows, dim, dtype=torch.float64)
        for b in chunk:
            if isinstance(b, DenseBlock):
                G[:, b.columns[0]] = b.G.double()
                continue
            G[:, b.weight] = per_sample_gradients(b.A, b.B, torch.float64).flatten(1)
            if b.bias is not None:
                G[:, b.bias] = b.B.double().sum(1)
        rows.append(G)
    G = torch.cat(rows).view(-1, draws, dim)
    G = (G - G.mean(1, keepdim=True)).view(-1, dim)
    return G.T @ G / ((len(G) // draws) ** 2 * (draws - 1))


CASES = {
    "plain": {"samples": 60, "draws": 4},
    "chunks": {"samples": 61, "draws": 3, "chunk": 20},
    "sequence": {"samples": 40, "draws": 2, "steps": 3},
    "more_parameters_than_rows": {"samples": 10, "draws": 3},
    "large_chunks": {"samples": 1100, "draws": 2, "chunk": 600, "dense": False},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pairs_are_those_of_the_covariance(case, dtype):
    chunks, dim = table(dtype=dtype, **case)
    k, draws = 5, case["draws"]
    pairs = leading_eigenpairs(chunked(chunks, draws), k, dim, tol=1e-7)
    dense = covariance(chunks, dim, draws)
    expected = torch.linalg.eigvalsh(dense).flip(0)[:k]
    tolerance = 1e-8 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(pairs.values, expected, rtol=tolerance, atol=0)
    V = pairs.vectors.double()
    assert pairs.vectors.dtype == dtype
    torch.testing.assert_close(V.T @ V, torch.eye(k, dtype=torch.float64), rtol=0, atol=tolerance)
    residuals = (dense @ V - V * pairs.values).norm(dim=0)
    rounding = torch.finfo(dtype).eps * 100 * float(expected[0])
    assert float(residuals.square().mean().sqrt()) <= 2 * float(pairs.residuals.square().mean().sqrt()) + rounding
    assert float(residuals.max()) < tolerance * float(expected[0])


def test_all_pairs():
    """k up to the rank: the iteration spans all contrasts."""
    chunks, dim = table(5, 3, torch.float64)
    pairs = leading_eigenpairs(chunked(chunks, 3), 10, dim)
    expected = torch.linalg.eigvalsh(covariance(chunks, dim, 3)).flip(0)[:10]
    torch.testing.assert_close(pairs.values, expected)
    assert float(pairs.residuals.max()) < 1e-12


@pytest.mark.parametrize(("precision", "verify"), [("bf16", "each"), ("int8", "each"), ("int8", "together")])
def test_rounding_shows_in_the_residuals(precision, verify):
    chunks, dim = table(100, 4, torch.float32, decay=1.0)
    full = leading_eigenpairs(chunked(chunks, 4), 3, dim)
    rounded = leading_eigenpairs(chunked(chunks, 4), 3, dim, precision=precision, verify=verify)
    torch.testing.assert_close(rounded.values, full.values, rtol=1e-2, atol=0)
    assert not torch.equal(rounded.values, full.values)
    dense = covariance(chunks, dim, 4)
    V = rounded.vectors.double()
    true = (dense @ V - V * rounded.values).norm(dim=0)
    ratio = float(true.square().mean().sqrt() / rounded.residuals.square().mean().sqrt())
    assert 0.3 < ratio < 3.0
    assert 1e-5 < float(rounded.residuals.max() / full.values[0]) < 2e-2
    torch.testing.assert_close(V.T @ V, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-5)


def quiet_samples(direction):
    """Noise of one layer: 200 loud samples, then 200 quiet ones that all move along the leading direction, or any."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(400, 1, 12, generator=generator, dtype=torch.float64)
    B = torch.randn(800, 1, 10, generator=generator, dtype=torch.float64)
    A[:200, :, 0] *= 1.5
    B[:400, :, 0] *= 1.5
    if direction:
        A[200:, :, 1:], B[400:, :, 1:] = 0.0, 0.0
    A[200:] *= 0.45 if direction else 0.045  # 2 per thousand of the trace
    return [[FactorBlock(A, B, slice(0, 120))]], 120


@pytest.mark.parametrize(("direction", "attempts"), [(False, 1), (True, 2)])
@pytest.mark.parametrize("verify", ["each", "together"])
def test_quiet_samples_are_left_out_only_while_they_move_nothing(direction, attempts, verify, monkeypatch):
    """Those of one direction are several hundredths of the largest eigenvalue, which a product finds out."""
    from dropscope.factors import eigen

    sizes, gram, (chunks, dim) = [], eigen.CentredGram, quiet_samples(direction)

    def counted(chunks, *rest):
        sizes.append(sum(chunk.samples for chunk in chunks))
        return gram(chunks, *rest)

    monkeypatch.setattr(eigen, "CentredGram", counted)
    pairs = leading_eigenpairs(chunked(chunks, 2), 1, dim, tol=1e-2, verify=verify)
    dense, V = covariance(chunks, dim, 2), pairs.vectors
    residuals = (dense @ V - V * pairs.values).norm(dim=0)
    assert len(sizes) == attempts
    assert sizes[0] < 220
    assert sizes == sorted(set(sizes))
    assert float(residuals.max()) <= 1e-2 * float(pairs.values[0])
    assert float(pairs.residuals.max()) <= 1e-2 * float(pairs.values[0])


def test_no_noise_and_low_rank():
    chunks, dim = table(30, 2, torch.float64, dense=False)
    for block in chunks[0]:  # draws alike, but for one sample
        for x in (block.A, block.B):
            if len(x) == 60:
                x[1:59:2] = x[0:58:2]
    pairs = leading_eigenpairs(chunked(chunks, 2), 3, dim)
    assert float(pairs.values[0]) > 0
    assert float(pairs.values[1:].abs().max()) < 1e-14 * float(pairs.values[0])
    torch.testing.assert_close(pairs.vectors.T @ pairs.vectors, torch.eye(3, dtype=torch.float64))
    assert float(pairs.residuals.max()) < 1e-12 * float(pairs.values[0])
    for block in chunks[0]:
        for x in (block.A, block.B):
            x.zero_()
    pairs = leading_eigenpairs(chunked(chunks, 2), 3, dim)
    assert not pairs.values.any()
    assert not pairs.residuals.any()
    torch.testing.assert_close(pairs.vectors.T @ pairs.vectors, torch.eye(3, dtype=torch.float64))


def test_same_bits_again():
    chunks, dim = table(60, 4, torch.float32)
    first, second = (leading_eigenpairs(chunked(chunks, 4), 3, dim) for _ in range(2))
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(first.values, second.values)


def test_bad_input():
    chunks, dim = table(4, 2, torch.float64)
    for k in (0, 5, dim + 1):
        with pytest.raises(ValueError, match=rf"leading_eigenpairs: k must be in 1..4, got {k}"):
            leading_eigenpairs(chunked(chunks, 2), k, dim)
    with pytest.raises(ValueError, match="precision must be 'full', 'bf16' or 'int8', got 'half'"):
        leading_eigenpairs(chunked(chunks, 2), 1, dim, precision="half")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_do_not_lower_the_rank(dtype):
    """Vectors are rounded to the parameters' dtype, values are not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 2)).to(dtype)
    problem = ds.Problem(model, nn.CrossEntropyLoss(), (torch.randn(7, 3).to(dtype), torch.randint(0, 2, (7,))))
    with ds.GradientNoise(problem, draws=4) as noise:
        pairs, dense = noise.eigsh(5), noise.dropout.to_dense().double()
    expected = torch.linalg.eigvalsh(dense).flip(0)[:5]
    assert pairs.status is ds.EigenStatus.CONVERGED
    torch.testing.assert_close(pairs.values, expected, rtol=0, atol=0.02 * float(expected[0]))


@pytest.mark.parametrize("draws", [2, 4, 16])
def test_saved_pairs_come_back_with_their_cross_validated_values(draws, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 2))
    problem = ds.Problem(model, nn.CrossEntropyLoss(), (torch.randn(9, 3), torch.randint(0, 2, (9,))))
    with ds.GradientNoise(problem, draws=draws) as noise:
        pairs = noise.eigsh(3)
    path = pairs.save(tmp_path / "pairs.safetensors")
    back = type(pairs).load(path)
    assert repr(back) == repr(pairs)
    assert len(back.cross_validated) == (0 if draws == 2 else 3)
    assert repr(back.cross_validated) == repr(pairs.cross_validated)
    assert [e.dof for e in back.cross_validated] == pytest.approx([e.dof for e in pairs.cross_validated], nan_ok=True)
    assert torch.equal(ds.Eigenpairs.load(path).vectors, pairs.vectors)
