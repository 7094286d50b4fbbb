"""What each dropout call becomes under replay: sites, the streams of a tensor's rows, and the elementwise rules."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropscope.intercept import Call, Handler
from dropscope.mask_op import UNITS_LIMIT, keep_rows, keep_threshold, mask_rows, select, wide

SHARED_SAMPLE = (1 << 32) - 1
_ALPHA = 1.7580993408473766  # minus the limit of SELU at -infinity: λα of Klambauer et al., arXiv:1706.02515


@lru_cache(maxsize=1 << 16)
def site_of(path: str, number: int) -> int:
    """The 64-bit site of dropout call ``number`` of a path: BLAKE2s-8 of ``"{path}#{number}"``, little end first."""
    return int.from_bytes(hashlib.blake2s(f"{path}#{number}".encode(), digest_size=8).digest(), "little")


class Replay:
    """The masks of one forward pass: a seed, a stream per row, and the sites used so far.

    Args:
        seed: 64-bit seed.
        streams: int64 (R,), ``draw << 32 | sample`` of each row.
        batch_dim: the dimension of a tensor that holds the rows.
    """

    def __init__(self, seed: int, streams: Tensor, batch_dim: int) -> None:
        self.seed = seed
        self.rows = streams.shape[0]
        self.batch_dim = batch_dim
        self.sites: dict[int, str] = {}
        self._streams = {streams.device: streams}
        self._first = streams

    def site(self, call: Call) -> int:
        """Number this dropout call and return its site."""
        path = call.path
        number = call.mode.tally.get(path, 0)
        call.mode.tally[path] = number + 1
        site, label = site_of(path, number), f"{path}#{number}"
        if self.sites.setdefault(site, label) != label:
            raise ValueError(
                f"replay_dropout: dropout calls {self.sites[site]!r} and {label!r} hash to one site; rename one"
            )
        return site

    def streams(self, device: torch.device) -> Tensor:
        """The streams on a device."""
        if device not in self._streams:
            self._streams[device] = self._first.to(device)
        return self._streams[device]

    def shared_stream(self, device: torch.device, name: str) -> Tensor:
        """One stream, shared by the batch: for a mask on a parameter."""
        draws = self._first >> 32
        if not bool((draws == draws[:1]).all()):
            raise ValueError(
                f"replay_dropout: {name} masks a parameter, which cannot have several draws in one forward pass"
            )
        return (draws[:1] << 32 | SHARED_SAMPLE).to(device)

    def check(self, shape: Sequence[int], dim: int, name: str) -> None:
        """Refuse a tensor whose rows are not those of the batch, or groups of them."""
        size = shape[dim] if dim < len(shape) else None
        if size is None or self.rows == 0 or size % self.rows:
            raise ValueError(
                f"replay_dropout: {name} sees a tensor of shape {tuple(shape)}, whose dimension {dim} must hold the "
                f"batch of {self.rows} rows, or groups of them; samples and batch_dim must describe the model's tensors"
            )
        units = 1
        for length in shape:
            units *= length
        if units // self.rows > UNITS_LIMIT:
            raise ValueError(f"replay_dropout: {name} must mask at most 2**35 units a sample, got {units // self.rows}")

    def drop(self, x: Tensor, threshold: int, site: int, name: str, dim: int | None = None) -> Tensor:
        """X ∘ keep · 65536/T, row by row."""
        if is_parameter(x):
            return mask_rows(x, self.shared_stream(x.device, name), self.seed, site, threshold)
        dim = self.batch_dim if dim is None else dim
        self.check(x.shape, dim, name)
        if dim == 0:
            return mask_rows(x, self.streams(x.device), self.seed, site, threshold)
        return mask_rows(x.movedim(dim, 0), self.streams(x.device), self.seed, site, threshold).movedim(0, dim)

    def keep(
        self, shape: Sequence[int], device: torch.device, threshold: int, site: int, name: str, dim: int | None = None
    ) -> Tensor:
        """The bool mask of a tensor of this shape."""
        dim = self.batch_dim if dim is None else dim
        self.check(shape, dim, name)
        units = 1
        for length in shape:
            units *= length
        keep = keep_rows(self.streams(device), units // self.rows, self.seed, site, threshold)
        return keep.view(shape[dim], *shape[:dim], *shape[dim + 1 :]).movedim(0, dim)


def is_parameter(x: Tensor) -> bool:
    """Whether a mask on x is a mask on weights (DropConnect)."""
    return isinstance(x, nn.Parameter) or isinstance(x._base, nn.Parameter)


def elementwise_rules(replay: Replay) -> dict[Callable[..., Any], Handler]:
    """The handler of every dropout function that masks one tensor, and of ``bernoulli_``."""
    functional = ("input", "p", "training", "inplace")
    native = ("input", "p", "train")
    rules: dict[Callable[..., Any], Handler] = {}

    def rule(
        func: Callable[..., Any], names: Sequence[str], kind: _Kind, training: bool, inplace: bool = False
    ) -> None:
        rules[func] = lambda call: _elementwise(replay, call, names, kind, training, inplace)

    rule(F.dropout, functional, _plain, True)
    rule(F.dropout1d, functional, _feature(2), True)
    rule(F.dropout2d, functional, _feature(0), True)
    rule(F.dropout3d, functional, _feature(4), True)
    rule(F.alpha_dropout, functional, _alpha, False)
    rule(F.feature_alpha_dropout, functional, _feature_alpha, False)
    for name, kind in {
        "dropout": _plain,
        "feature_dropout": _feature(0),
        "alpha_dropout": _alpha,
        "feature_alpha_dropout": _feature_alpha,
    }.items():
        rule(getattr(torch, name), native, kind, True)
        rule(getattr(torch, name + "_"), native, kind, True, inplace=True)
    rules[torch.native_dropout] = lambda call: _native_dropout(replay, call)
    rules[torch.Tensor.bernoulli_] = lambda call: _bernoulli(replay, call)
    return rules


_Kind = Callable[[Replay, Tensor, int, int, str], Tensor]


def arguments(call: Call, names: Sequence[str]) -> dict[str, Any]:
    """The arguments of a call by name."""
    return dict(zip(names, call.args, strict=False)) | call.kwargs


def _elementwise(replay: Replay, call: Call, names: Sequence[str], kind: _Kind, training: bool, inplace: bool) -> Any:
    given = arguments(call, names)
    if not given.get(names[2], training):
        return NotImplemented
    x, name = given["input"], call.func.__name__
    if not x.is_floating_point():
        raise TypeError(f"replay_dropout: {name} must see a real floating-point tensor, got {x.dtype}")
    threshold, site = keep_threshold(given.get("p", 0.5)), replay.site(call)
    out = x if threshold == 65536 else kind(replay, x, threshold, site, name)
    return x.copy_(out) if (inplace or given.get("inplace", False)) and out is not x else out


def _plain(replay: Replay, x: Tensor, threshold: int, site: int, name: str) -> Tensor:
    return replay.drop(x, threshold, site, name)


def _feature(unbatched: int) -> _Kind:
    """Whole channels: one unit for each pair of the first two dimensions; ``unbatched``: that many mean no batch."""

    def drop(replay: Replay, x: Tensor, threshold: int, site: int, name: str) -> Tensor:
        if x.dim() == unbatched:
            keep = _channels(replay, x.unsqueeze(0), threshold, site, name, dim=0).squeeze(0)
        else:
            keep = _channels(replay, x, threshold, site, name)
        return x.masked_fill(~keep, 0.0) if threshold == 0 else select(keep, x, threshold)

    return drop


def _channels(replay: Replay, x: Tensor, threshold: int, site: int, name: str, dim: int | None = None) -> Tensor:
    if x.dim() < 2:
        raise ValueError(
            f"replay_dropout: {name} must see a tensor of at least 2 dimensions, got shape {tuple(x.shape)}"
        )
    keep = replay.keep(x.shape[:2], x.device, threshold, site, name, dim)
    return keep.view(*x.shape[:2], *(1 for _ in x.shape[2:]))


def _alpha(replay: Replay, x: Tensor, threshold: int, site: int, name: str) -> Tensor:
    return _to_alpha(replay.keep(x.shape, x.device, threshold, site, name), x, threshold)


def _feature_alpha(replay: Replay, x: Tensor, threshold: int, site: int, name: str) -> Tensor:
    return _to_alpha(_channels(replay, x, threshold, site, name), x, threshold)


def _to_alpha(keep: Tensor, x: Tensor, threshold: int) -> Tensor:
    """a·(x or −α) + aαp with a = ((1−p)(1+α²p))^(−½): mean 0 and variance 1 stay (arXiv:1706.02515, §3)."""
    if threshold == 0:
        return x.masked_fill(~keep, 0.0)
    kept = threshold / 65536.0
    a = (kept * (1.0 + _ALPHA**2 * (1.0 - kept))) ** -0.5
    high = x.to(wide(x.dtype)) * a + a * _ALPHA * (1.0 - kept)
    return torch.where(keep, high, torch.full((), -a * _ALPHA * kept, dtype=high.dtype, device=x.device)).to(x.dtype)


def _native_dropout(replay: Replay, call: Call) -> Any:
    given = arguments(call, ("input", "p", "train"))
    if given.get("train") is False:
        return NotImplemented
    x, threshold = given["input"], keep_threshold(given["p"])
    keep = replay.keep(x.shape, x.device, threshold, replay.site(call), "native_dropout")
    return (x.masked_fill(~keep, 0.0) if threshold == 0 else select(keep, x, threshold)), keep


def _bernoulli(replay: Replay, call: Call) -> Any:
    given = arguments(call, ("input", "p"))
    x, p = given["input"], given.get("p", 0.5)
    if isinstance(p, Tensor) or given.get("generator") is not None:
        raise ValueError("replay_dropout: bernoulli_ must take a number p and no generator to be replayed")
    if x.dim() == 0 or x.shape[min(replay.batch_dim, x.dim() - 1)] != replay.rows:
        raise ValueError(
            f"replay_dropout: bernoulli_ must fill a tensor whose dimension {replay.batch_dim} is the batch of "
            f"{replay.rows} rows, got shape {tuple(x.shape)}"
        )
    keep = replay.keep(x.shape, x.device, keep_threshold(1.0 - p), replay.site(call), "bernoulli_")
    return x.copy_(keep)
