"""The mask op: format, derivatives, refusals."""

import pytest
import torch
from torch import Tensor

import dropscope as ds
from dropscope import masks


def test_a_mask_does_not_depend_on_its_batch() -> None:
    x = torch.randn(9, 5, 3, dtype=torch.float64)
    ids, key = torch.randperm(9), ds.MaskKey(0, 2)
    whole = ds.dropout(x, 0.3, key, samples=ids)
    for size in (1, 4, 9):
        parts = [ds.dropout(a, 0.3, key, samples=i) for a, i in zip(x.split(size), ids.split(size), strict=True)]
        assert torch.equal(torch.cat(parts), whole)


def test_replay_uses_the_same_mask() -> None:
    from dropscope.replay import site_of

    drop, x, ids = torch.nn.Dropout(0.4), torch.randn(6, 7), torch.arange(6)
    with ds.replay_dropout(ds.MaskKey(3, 1), ids):
        out = drop(x)
    assert torch.equal(out, ds.dropout(x, 0.4, ds.MaskKey(3, 1), site_of("", 0), ids))


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), 1e-6, 1 - 1e-6])
def test_p_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match="p must"):
        ds.dropout(torch.ones(2, 2), p, ds.MaskKey(0))


def test_streams() -> None:
    streams: Tensor = masks.make_streams(3, torch.tensor([0, 5]))
    assert streams.tolist() == [3 << 32, 3 << 32 | 5]
