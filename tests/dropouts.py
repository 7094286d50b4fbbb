"""The registry of dropout calls: one case for every way to drop that torch has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dropscope as ds
from dropscope.replay import site_of

KEY = ds.MaskKey(0, 2)
N = 7


class Run(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Attend(nn.Module):
    """Attention of (B, heads, T, E) to itself."""

    def __init__(self, key_heads: int = 4, **options: Any) -> None:
        super().__init__()
        self.key_heads, self.dropout, self.options = key_heads, 0.3, options

    def forward(self, x: Tensor) -> Tensor:
        k, v = x.cos()[:, : self.key_heads], x.sin()[:, : self.key_heads]
        return F.scaled_dot_product_attention(x, k, v, dropout_p=self.dropout * self.training, **self.options)


class SelfAttention(nn.Module):
    def __init__(self, batch_first: bool = True, **options: Any) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, 0.3, batch_first=batch_first, dtype=torch.float64)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, **self.options)[0]


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Transformer(8, 2, 1, 1, 16, 0.3, batch_first=True, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.flip(1))


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch_dim: int = 0


def encoder(batch_first: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, 0.3, batch_first=batch_first, dtype=torch.float64)


def recurrent(kind: type[nn.RNNBase], **options: Any) -> Callable[[], nn.Module]:
    return lambda: kind(8, 6, 3, dropout=0.4, dtype=torch.float64, **options)


def timm_drop_path(x: Tensor) -> Tensor:
    mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.6)
    return x * mask.div_(0.6)


def huggingface_drop_path(x: Tensor) -> Tensor:
    noise = 0.6 + torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device)
    return x.div(0.6) * noise.floor_()


IMAGE, SEQUENCE, HEADS = (N, 4, 5, 5), (N, 5, 8), (N, 4, 3, 6)
BOOLS = torch.ones(3, 3, dtype=torch.bool).tril()
BIAS = torch.linspace(-1, 1, 9, dtype=torch.float64).view(3, 3)
CASES = [
    Case("Dropout", lambda: nn.Dropout(0.4), IMAGE),
    Case("Dropout inplace", lambda: Run(lambda x: F.dropout(x * 1.0, 0.4, inplace=True)), IMAGE),
    Case("Dropout time-major", lambda: nn.Dropout(0.4), (5, N, 8), 1),
    Case("Dropout1d", lambda: nn.Dropout1d(0.4), (N, 6, 5)),
    Case("Dropout2d", lambda: nn.Dropout2d(0.4), IMAGE),
    Case("Dropout2d of 3 dimensions", lambda: nn.Dropout2d(0.4), (N, 6, 5)),
    Case("Dropout3d", lambda: nn.Dropout3d(0.4), (N, 6, 2, 2, 2)),
    Case("AlphaDropout", lambda: nn.AlphaDropout(0.4), IMAGE),
    Case("FeatureAlphaDropout", lambda: nn.FeatureAlphaDropout(0.4), IMAGE),
    Case("torch.dropout", lambda: Run(lambda x: torch.dropout(x, 0.4, True)), IMAGE),
    Case("torch.dropout_", lambda: Run(lambda x: torch.dropout_(x * 1.0, 0.4, train=True)), IMAGE),
    Case("torch.feature_dropout", lambda: Run(lambda x: torch.feature_dropout(x, 0.4, True)), IMAGE),
    Case("torch.alpha_dropout_", lambda: Run(lambda x: torch.alpha_dropout_(x * 1.0, 0.4, True)), IMAGE),
    Case("torch.feature_alpha_dropout", lambda: Run(lambda x: torch.feature_alpha_dropout(x, 0.4, True)), IMAGE),
    Case("torch.native_dropout", lambda: Run(lambda x: torch.native_dropout(x, 0.4, True)[0]), IMAGE),
    Case("rows in groups", lambda: Run(lambda x: F.dropout(x.flatten(0, 1)).view(x.shape)), SEQUENCE),
    Case("DropPath, bernoulli_", lambda: Run(timm_drop_path), IMAGE),
    Case("DropPath, rand", lambda: Run(huggingface_drop_path), IMAGE),
    Case("attention", Attend, HEADS),
    Case("attention causal", lambda: Attend(is_causal=True), HEADS),
    Case("attention bool mask", lambda: Attend(attn_mask=BOOLS), HEADS),
    Case("attention float mask, scale", lambda: Attend(attn_mask=BIAS, scale=0.7), HEADS),
    Case("attention grouped queries", lambda: Attend(2, enable_gqa=True), HEADS),
    Case("MultiheadAttention", SelfAttention, SEQUENCE),
    Case("MultiheadAttention without weights", lambda: SelfAttention(need_weights=False), SEQUENCE),
    Case("MultiheadAttention time-major", lambda: SelfAttention(False), (5, N, 8), 1),
    Case("TransformerEncoderLayer", lambda: encoder(True), SEQUENCE),
    Case("TransformerEncoderLayer time-major", lambda: encoder(False), (5, N, 8), 1),
    Case("Transformer", Transformer, SEQUENCE),
    Case("LSTM", recurrent(nn.LSTM), (5, N, 8), 1),
    Case("LSTM batch_first", recurrent(nn.LSTM, batch_first=True), SEQUENCE),
    Case("LSTM bidirectional", recurrent(nn.LSTM, batch_first=True, bidirectional=True), SEQUENCE),
    Case("LSTM proj_size", recurrent(nn.LSTM, batch_first=True, proj_size=3), SEQUENCE),
    Case("GRU bidirectional", recurrent(nn.GRU, batch_first=True, bidirectional=True), SEQUENCE),
    Case("RNN without bias", recurrent(nn.RNN, batch_first=True, bias=False), SEQUENCE),
    Case("RNN relu", recurrent(nn.RNN, nonlinearity="relu"), (5, N, 8), 1),
]


def each(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


LAYERS = [case for case in CASES if not isinstance(case.make(), Run)]
STATELESS = [case for case in CASES if not isinstance(case.make(), nn.RNNBase)]
each_case = each(CASES)


def made(case: Case) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return case.make().train(), torch.randn(case.shape, dtype=torch.float64)


def forward(
    model: nn.Module, x: Tensor, key: ds.MaskKey = KEY, samples: Tensor | None = None, **options: Any
) -> Tensor:
    ids = torch.arange(x.shape[options.get("batch_dim", 0)]) if samples is None else samples
    with ds.replay_dropout(key, ids, model=model, **options):
        out = model(x)
    return out[0] if isinstance(out, tuple) else out


def mask(shape: tuple[int, ...], p: float, path: str = "", number: int = 0) -> Tensor:
    return ds.keep_mask(shape, p, KEY, site_of(path, number))
