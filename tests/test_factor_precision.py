"""Factor kernels on bfloat16: how packing rounds, what meets products in float, and what rounding costs."""

from __future__ import annotations

import pytest
import torch

from dropscope import kernels
from dropscope.kernels import _tiles as tiles


def test_bfloat16_packing_rounds_to_nearest_even_and_keeps_nan():
    B = torch.randn(50, 40).bfloat16()
    B[3, 4], B[5, 6] = float("nan"), float("inf")
    S = torch.randn(50, 1)
    B[:2], S[0], S[1] = 1.0, 1 + 2.0**-8, 1 + 2.0**-7 + 2.0**-8  # ties: to even is down, then up
    expected = (B.float() * S).bfloat16()
    assert expected[:2, 0].tolist() == [1.0, 1 + 2.0**-6]
    packed = tiles.scale_rows(B, S, torch.empty_like(B))
    assert torch.equal(packed.view(torch.int16)[expected == expected], expected.view(torch.int16)[expected == expected])
    assert torch.isnan(packed[3, 4])


def test_bfloat16_factors_meet_products_in_float():
    """Passes over a product in float and factors in bfloat16 are those over the widened factors, to the bit."""
    B, P, S = torch.randn(60, 40).bfloat16(), torch.randn(20, 80), torch.randn(60, 2)
    for dtype in (torch.float32, torch.float64):
        dots, expected = torch.zeros(60, 2, dtype=dtype), torch.zeros(60, 2, dtype=dtype)
        tiles.row_dots(P, B, dots, 3)
        tiles.row_dots(P, B.float(), expected, 3)
        assert torch.equal(dots, expected)
        assert dots.all()
    packed = tiles.scale_rows(B, S, torch.empty(20, 80), 3)
    assert torch.equal(packed, tiles.scale_rows(B.float(), S, torch.empty(20, 80), 3))


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_products_by_units_and_without(native, monkeypatch):
    """Both ways are within the stated error of the product with float32 factors: 3e-3 of its norm, here up to 6e-3."""
    monkeypatch.setattr(tiles, "native_bfloat16", lambda: native)
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(300, 1, 50, generator=generator), torch.randn(600, 1, 40, generator=generator)
    V, S = torch.randn(3, 40, 50, generator=generator), torch.randn(600, 3, generator=generator)

    def answers(A, B):
        dots, sums, gram = torch.zeros(600, 3), torch.zeros(3, 40, 50), torch.zeros(600, 600)
        kernels.project(A, B, V, dots)
        kernels.accumulate(A, B, S, sums)
        kernels.gram(A, B, A, B, gram)
        return dots, sums, gram

    for half, full in zip(answers(A.bfloat16(), B.bfloat16()), answers(A, B), strict=True):
        assert 1e-4 < float((half - full).norm() / full.norm()) < 6e-3
