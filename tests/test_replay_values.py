"""What replayed calls compute: sites, attention, recurrent layers, channels, shared masks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import dropscope as ds
from dropouts import (
    CASES,
    KEY,
    SEQUENCE,
    N,
    Run,
    SelfAttention,
    encoder,
    forward,
    made,
    mask,
    recurrent,
)
from dropscope.masks import SHARED_SAMPLE, make_streams, replay_streams
from dropscope.replay import site_of

SITE = 13436946455120800057


def test_sites() -> None:
    """BLAKE2s-8 of path#k, little end first; each call of a path has its own."""
    assert site_of("layers.0.drop", 1) == SITE
    drop, x = nn.Dropout(0.5), torch.ones(4, 64)
    model = Run(lambda x: [F.dropout(x), drop(x), drop(x), F.dropout(x)])
    model.drop = drop
    with ds.replay_dropout(KEY, torch.arange(4), model=model):
        outs = model(x)
    for out, where in zip(outs, (("", 0), ("drop", 0), ("drop", 1), ("", 1)), strict=True):
        assert torch.equal(out != 0, mask((4, 64), 0.5, *where))


def test_an_unrelated_layer_changes_nothing() -> None:
    x = torch.ones(3, 50)
    plain = nn.ModuleDict({"a": nn.Dropout(), "b": nn.Dropout()})
    more = nn.ModuleDict({"c": nn.Dropout(), "a": nn.Dropout(), "b": nn.Dropout()})
    with ds.replay_dropout(KEY, torch.arange(3), model=plain):
        a, b = plain["a"](x), plain["b"](x)
    with ds.replay_dropout(KEY, torch.arange(3), model=more):
        again = {name: more[name](x) for name in ("c", "b", "a")}
    assert torch.equal(a, again["a"])
    assert torch.equal(b, again["b"])


def test_p_of_zero_still_counts_as_a_call() -> None:
    x = torch.ones(3, 50)
    with ds.replay_dropout(KEY, torch.arange(3)):
        assert F.dropout(x, 0.0) is x
        assert torch.equal(F.dropout(x, 0.5) != 0, mask((3, 50), 0.5, "", 1))
        assert not F.dropout(x, 1.0).any()
        assert F.dropout(x[:2], 0.0).shape == F.dropout2d(x[:2], 1.0).shape == (2, 50)  # no mask, so any shape


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_attention_is_explicit(kind: str) -> None:
    """Weights in the open; rows masked throughout give 0, and derivatives without NaN."""
    q, k, v = (torch.randn(3, 2, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    allowed = torch.rand(3, 1, 4, 4) < 0.6
    allowed[0, :, 2] = False
    with ds.replay_dropout(KEY, torch.arange(3)):
        bias = torch.zeros(3, 1, 4, 4, dtype=torch.float64).masked_fill(~allowed, -math.inf)
        out = F.scaled_dot_product_attention(q, k, v, allowed if kind == "bool" else bias, 0.3)
    weights = (q @ k.mT / math.sqrt(5)).masked_fill(~allowed, -math.inf).softmax(-1).nan_to_num(0.0)
    expected = (weights * mask((3, 2, 4, 4), 0.3) / ds.keep_probability(0.3)) @ v
    torch.testing.assert_close(out, expected)
    assert not out[0, :, 2].any()
    first = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (q, k, v))
    assert all(torch.isfinite(g).all() for g in (*first, *second))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_half_precision(dtype: torch.dtype) -> None:
    model, x = made(CASES[[case.name for case in CASES].index("attention")])
    out = forward(model, x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), forward(model, x), rtol=0.05, atol=0.05)


def test_weights_and_no_weights_have_the_same_masks() -> None:
    outs = []
    for options in ({}, {"need_weights": False}):
        torch.manual_seed(0)
        outs.append(forward(SelfAttention(**options), torch.ones(SEQUENCE, dtype=torch.float64)))
    torch.testing.assert_close(*outs)


def test_lstm_is_a_stack_of_layers_with_dropout_between() -> None:
    torch.manual_seed(0)
    whole, x = nn.LSTM(8, 6, 2, dropout=0.4, dtype=torch.float64), torch.randn(5, N, 8, dtype=torch.float64)
    layers = [nn.LSTM(size, 6, dtype=torch.float64) for size in (8, 6)]
    for index, layer in enumerate(layers):
        for name, value in layer.named_parameters():
            value.data.copy_(getattr(whole, name.replace("l0", f"l{index}")))
    start = tuple(torch.randn(2, N, 6, dtype=torch.float64) for _ in range(2))
    with ds.replay_dropout(KEY, torch.arange(N), batch_dim=1):
        out, last = whole(x, start)
    y, first = layers[0](x, tuple(s[:1] for s in start))
    y = y * mask((N, 5, 6), 0.4).transpose(0, 1) / ds.keep_probability(0.4)
    y, second = layers[1](y, tuple(s[1:] for s in start))
    torch.testing.assert_close(out, y)
    torch.testing.assert_close(last, tuple(torch.cat(pair) for pair in zip(first, second, strict=True)))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("sort", [True, False])
def test_packed_sequences_have_the_masks_of_padded_ones(kind: type[nn.RNNBase], sort: bool) -> None:
    model, x = recurrent(kind, batch_first=True)(), torch.randn(SEQUENCE, dtype=torch.float64)
    lengths = torch.tensor([5, 2, 4, 1, 3, 5, 2])
    lengths = lengths.sort(descending=True)[0] if sort else lengths
    padded = forward(model, x)
    with ds.replay_dropout(KEY, torch.arange(N), model=model):
        packed = model(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=sort))[0]
    out = pad_packed_sequence(packed, batch_first=True)[0]
    for row, length in enumerate(lengths):
        torch.testing.assert_close(out[row, :length], padded[row, :length])


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("kind", [nn.AlphaDropout, nn.FeatureAlphaDropout])
def test_alpha_dropout_keeps_mean_and_variance(kind: type[nn.Module], p: float) -> None:
    """Of a standard normal input, within 4σ, fourth moments bounded by 12: false alarm 3e-4; and torch's two values."""
    n = 1 << 16
    x = torch.randn(64, n // 64, 2 if kind is nn.FeatureAlphaDropout else 1, dtype=torch.float64)
    out = forward(kind(p), x)
    assert abs(out.mean()) < 4 * math.sqrt(2 / n)
    assert abs(out.var() - 1.0) < 4 * math.sqrt(2 * 12 / n)
    torch.manual_seed(0)
    theirs = kind(p)(torch.ones(4, 4, 1))
    ours = forward(kind(p), torch.ones(4, 4, 1))
    torch.testing.assert_close(ours.unique(), theirs.unique(), rtol=1e-4, atol=1e-4)


CHANNELS = ((9, 4, 6), (9, 4, 3, 2), (9, 4, 1, 3, 2))


def test_channels_drop_together() -> None:
    for layer, shape in (
        (nn.Dropout1d(), (9, 4, 6)),
        (nn.Dropout2d(), (9, 4, 3, 2)),
        (nn.Dropout3d(), (9, 4, 1, 3, 2)),
    ):
        out = forward(layer, torch.ones(shape)).flatten(2)
        assert torch.equal(out, out[..., :1].expand_as(out))
        assert torch.equal(out[..., 0] != 0, mask((9, 4), 0.5))


@pytest.mark.parametrize(("layer", "shape"), [(nn.Dropout1d(), (4, 6)), (nn.Dropout3d(), (4, 1, 3, 2))])
def test_channels_without_a_batch(layer: nn.Module, shape: tuple[int, ...]) -> None:
    out = forward(layer, torch.ones(shape), samples=torch.tensor([3]))
    assert torch.equal(out.flatten(1)[:, 0] != 0, ds.keep_mask((1, 4), 0.5, KEY, site_of("", 0), torch.tensor([3]))[0])
    with pytest.raises(ValueError, match="batch of 2 rows"):
        forward(layer, torch.ones(shape), samples=torch.arange(2))


def test_inplace_writes_into_its_argument() -> None:
    x = torch.ones(3, 8)
    with ds.replay_dropout(KEY, torch.arange(3)):
        out = F.dropout(x, 0.5, inplace=True)
    assert out is x
    assert torch.equal(x != 0, mask((3, 8), 0.5))


def test_rand_is_uniform_and_refines_across_types() -> None:
    """Kolmogorov–Smirnov distance below 1.95/√n: false alarm 1e-3; half precision has the leading digits."""
    with ds.replay_dropout(KEY, torch.arange(64)):
        fine = torch.rand(64, 256, dtype=torch.float64)
    with ds.replay_dropout(KEY, torch.arange(64)):
        coarse = torch.rand_like(torch.empty(64, 256, dtype=torch.bfloat16))
    ordered, n = fine.flatten().sort()[0], fine.numel()
    assert (ordered - torch.arange(n, dtype=torch.float64) / n).abs().max() < 1.95 / math.sqrt(n)
    assert torch.equal(coarse.double(), (fine * 256).floor() / 256)


def test_a_zero_layer_before_dropout_has_its_gradient() -> None:
    """The mask is not read off the output, where a kept zero looks dropped."""
    layer = nn.Linear(5, 6, bias=False)
    nn.init.zeros_(layer.weight)
    x, target = torch.randn(N, 5), torch.randn(N, 6)
    with ds.replay_dropout(KEY, torch.arange(N)):
        loss = (F.dropout(layer(x), 0.4) - target).square().sum()
    loss.backward()
    kept = mask((N, 6), 0.4) / ds.keep_probability(0.4)
    torch.testing.assert_close(layer.weight.grad, (-2 * target * kept).T @ x)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("reentrant", [True, False])
def test_masks_on_a_device_are_those_of_the_host(reentrant: bool) -> None:
    """Backward runs in another thread there, and checkpoints recompute in it."""
    outs = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model, x = encoder(True).to(device), torch.randn(SEQUENCE, dtype=torch.float64).to(device).requires_grad_()
        with ds.replay_dropout(KEY, torch.arange(N), model=model):
            out = checkpoint(model, x, use_reentrant=reentrant)
        out.square().sum().backward()
        outs.append((out.cpu(), x.grad.cpu()))
    torch.testing.assert_close(outs[0], outs[1])


# --- masks that a batch shares ---------------------------------------------------------------------------------------


class DropConnect(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(N, 30))

    def forward(self, x: Tensor) -> Tensor:
        return x @ F.dropout(self.weight).T


def test_a_mask_on_a_parameter_is_shared() -> None:
    model, x = DropConnect(), torch.ones(N, 30)
    with replay_streams(0, make_streams(KEY.draw, torch.arange(N)), model=model) as mode:
        out = model(x)
        swapped = functional_call(model, {"weight": torch.ones(N, 30)}, (x,))
    with replay_streams(0, make_streams(KEY.draw, torch.arange(1)) | SHARED_SAMPLE):
        first, second = (F.dropout(torch.ones(1, N * 30)).view(N, 30) for _ in range(2))
    assert torch.equal(out, x @ first.T)
    assert torch.equal(swapped, x @ second.T)
    assert mode.shared == {"dropout in module ''"}
    with (
        pytest.raises(ValueError, match="must be of one draw"),
        replay_streams(0, make_streams(torch.arange(N), torch.arange(N))),
    ):
        model(x)


def test_a_mask_on_a_childs_parameter_is_shared() -> None:
    """As the layer's own weights, and as what functional_call puts in their place; whole or transposed."""

    class Parent(nn.Module):
        def __init__(self, turn: bool) -> None:
            super().__init__()
            self.child, self.turn = nn.Linear(N, N, bias=False), turn

        def forward(self, x: Tensor) -> Tensor:
            weight = self.child.weight
            return F.dropout(weight.T).T @ x if self.turn else F.dropout(weight) @ x

    for turn in (False, True):
        model, outs = Parent(turn), []
        values = torch.randn(N, N)
        model.child.weight.data = values
        for swapped in ({}, {"child.weight": values * 1.0}):
            with replay_streams(0, make_streams(KEY.draw, torch.arange(N)), model=model) as mode:
                outs.append(functional_call(model, swapped, (torch.eye(N),)))
            assert mode.shared == {"dropout in module ''"}
        assert torch.equal(*outs)


def test_a_single_random_number_is_shared() -> None:
    """LayerDrop: the same number whatever the batch."""
    numbers = []
    for ids in (torch.arange(3), torch.tensor([9])):
        with replay_streams(0, make_streams(4, ids)) as mode:
            numbers.append(float(torch.rand([])))
            assert mode.shared
    assert numbers[0] == numbers[1]
