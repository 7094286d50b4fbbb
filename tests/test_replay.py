"""Laws that hold for every dropout call of torch, replayed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import dropscope as ds
from dropouts import (
    KEY,
    LAYERS,
    STATELESS,
    Case,
    N,
    each,
    each_case,
    forward,
    made,
)
from dropscope.masks import make_streams, replay_streams

pytestmark = pytest.mark.filterwarnings("ignore:.*Received a 3D input to dropout2d:UserWarning")


@each_case
def test_masks_follow_the_sample(case: Case) -> None:
    """The same again, other with another key, equal rows from permuted and split batches; generators stand still."""
    model, x = made(case)
    state, dim = torch.get_rng_state(), case.batch_dim
    whole = forward(model, x, batch_dim=dim)
    assert torch.equal(forward(model, x, batch_dim=dim), whole)
    assert not torch.allclose(forward(model, x, ds.MaskKey(0, 3), batch_dim=dim), whole)
    assert not torch.allclose(forward(model, x, ds.MaskKey(1, 2), batch_dim=dim), whole)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    for ids in (order, *order.split(3), *order.split(1)):
        part = forward(model, x.index_select(dim, ids), KEY, ids, batch_dim=dim)
        torch.testing.assert_close(part, whole.index_select(dim, ids), rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), state)


@each_case
def test_samples_have_masks_of_their_own_or_share_one(case: Case) -> None:
    model, x = made(case)
    same = x.index_select(case.batch_dim, torch.zeros(N, dtype=torch.int64))
    rows = forward(model, same, batch_dim=case.batch_dim).movedim(case.batch_dim, 0)
    shared = forward(model, same, batch_dim=case.batch_dim, sharing="batch").movedim(case.batch_dim, 0)
    assert len({tuple(row.flatten().tolist()) for row in rows}) > 1
    torch.testing.assert_close(shared, shared[:1].expand_as(shared), rtol=1e-12, atol=1e-12)


@each_case
def test_several_draws_in_one_pass(case: Case) -> None:
    """Rows of B samples x M draws equal M passes of one draw."""
    model, x = made(case)
    draws = torch.tensor([2, 5])
    streams = make_streams(draws.repeat(N), torch.arange(N).repeat_interleave(2))
    with replay_streams(0, streams, model=model, batch_dim=case.batch_dim):
        out = model(x.repeat_interleave(2, case.batch_dim))
    out = (out[0] if isinstance(out, tuple) else out).movedim(case.batch_dim, 0)
    for index, draw in enumerate(draws.tolist()):
        one = forward(model, x, ds.MaskKey(0, draw), batch_dim=case.batch_dim).movedim(case.batch_dim, 0)
        torch.testing.assert_close(out[index::2], one, rtol=1e-12, atol=1e-12)


@each(LAYERS)
def test_evaluation_is_left_alone(case: Case) -> None:
    model, x = made(case)
    model.eval()
    out = model(x)
    torch.testing.assert_close(forward(model, x, batch_dim=case.batch_dim), out[0] if isinstance(out, tuple) else out)


def near_zero(module: nn.Module) -> nn.Module:
    for part in module.modules():
        for name in ("p", "dropout"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 2.0**-16)
    return module


@each(LAYERS)
def test_hardly_any_dropout_is_none(case: Case) -> None:
    """With p = 2^-16 and a few hundred units nothing is dropped: what remains is torch's own answer."""
    model, x = made(case)
    expected = copy.deepcopy(model).eval()(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    out = forward(near_zero(model), x, batch_dim=case.batch_dim)
    torch.testing.assert_close(out, expected, rtol=3e-4, atol=3e-4)


@each_case
def test_gradients_of_first_and_second_order(case: Case) -> None:
    model, x = made(case)
    x = x.requires_grad_()
    weight = torch.randn(forward(model, x.detach(), batch_dim=case.batch_dim).shape, dtype=torch.float64)

    def value(x: Tensor) -> Tensor:
        return (forward(model, x, batch_dim=case.batch_dim).sin() * weight).sum()

    assert torch.autograd.gradcheck(value, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(value, x, fast_mode=True)


@each(STATELESS)
def test_per_sample_gradients_by_vmap(case: Case) -> None:
    """The context inside vmap, one stream an example, against one pass over the batch (torch has no vmap of RNNs)."""
    model, x = made(case)
    parameters, streams = {k: p.detach() for k, p in model.named_parameters()}, make_streams(KEY.draw, torch.arange(N))

    def loss(x: Tensor, stream: Tensor) -> Tensor:
        with replay_streams(0, stream[None], model=model, batch_dim=case.batch_dim):
            out = functional_call(model, parameters, (x.unsqueeze(case.batch_dim),))
        return out.square().sum()

    gradient = vmap(grad(loss), in_dims=(case.batch_dim, 0))(x, streams)
    x = x.requires_grad_()
    expected = torch.autograd.grad(forward(model, x, batch_dim=case.batch_dim).square().sum(), x)[0]
    torch.testing.assert_close(gradient, expected.movedim(case.batch_dim, 0), rtol=1e-11, atol=1e-11)
