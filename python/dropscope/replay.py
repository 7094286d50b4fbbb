"""What each dropout call becomes under replay: its site, the streams of a tensor's rows, the elementwise rules."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropscope.entry_points import running
from dropscope.intercept import Call, Handlers, Interceptor
from dropscope.mask_op import UNITS_LIMIT, keep_rows, keep_threshold, mask_rows, select, wide

SHARED_SAMPLE = (1 << 32) - 1
_ALPHA = 1.7580993408473766  # λα of SELU, arXiv:1706.02515: minus its limit at -infinity


@lru_cache(maxsize=1 << 16)
def site_of(path: str, number: int) -> int:
    """The 64-bit site of dropout call ``number`` of a path: BLAKE2s-8 of ``"{path}#{number}"``, little end first."""
    return int.from_bytes(hashlib.blake2s(f"{path}#{number}".encode(), digest_size=8).digest(), "little")


class Replay(Interceptor):
    """The interceptor of one replayed forward pass: a seed, a stream for each row of the batch, the sites used so far.

    Args:
        handlers: those that replay, with any others.
        seed: 64-bit seed.
        streams: int64 (R,), ``draw << 32 | sample`` of each row.
        batch_dim: the dimension of a tensor that holds the rows.
        model: names the running modules.
    """

    def __init__(self, handlers: Handlers, seed: int, streams: Tensor, batch_dim: int, model: nn.Module | None) -> None:
        super().__init__(handlers, model)
        self.seed = seed
        self.rows = streams.shape[0]
        self.batch_dim = batch_dim
        self.sites: dict[int, str] = {}
        self._first = streams
        self._streams = {streams.device: streams}

    def site(self, call: Call) -> int:
        """Number this dropout call and return its site."""
        path = call.path
        number = self.tally.get(path, 0)
        self.tally[path] = number + 1
        site, label = site_of(path, number), f"{path}#{number}"
        other = self.sites.setdefault(site, label)
        if other != label:
            raise ValueError(f"replay_dropout: calls {other!r} and {label!r} must differ in site; rename a module")
        return site

    def drop(self, call: Call, x: Tensor, p: float, dim: int | None = None) -> Tensor:
        """Mask x row by row, x ∘ keep · 65536/T; a mask on a parameter is shared by the batch."""
        threshold, site = keep_threshold(p), self.site(call)
        if threshold in (0, 65536):
            return select(torch.zeros((), dtype=torch.bool, device=x.device), threshold, x)
        if is_parameter(x):
            return mask_rows(x, self.shared_stream(call, x.device), self.seed, site, threshold)
        dim = self.check(call, x.shape, dim)
        rows = (x.movedim(dim, 0) if dim else x, self.streams(x.device), self.seed, site, threshold)
        masking = Call(mask_rows, rows, {}, self)  # for a handler that watches what is masked
        watched = self.handlers[mask_rows](masking) if mask_rows in self.handlers else NotImplemented
        out: Tensor = masking.proceed() if watched is NotImplemented else watched
        return out.movedim(0, dim) if dim else out

    def keep(
        self, call: Call, shape: Sequence[int], device: torch.device, p: float, dim: int | None = None
    ) -> tuple[Tensor, int]:
        """The bool mask of a tensor of this shape, and T."""
        threshold, site = keep_threshold(p), self.site(call)
        if threshold in (0, 65536):
            return torch.full(tuple(shape), threshold != 0, device=device), threshold
        dim = self.check(call, shape, dim)
        keep = keep_rows(self.streams(device), math.prod(shape) // self.rows, self.seed, site, threshold)
        return keep.reshape(shape[dim], *shape[:dim], *shape[dim + 1 :]).movedim(0, dim), threshold

    def gate(
        self,
        call: Call,
        x: Tensor,
        p: float,
        shape: Sequence[int],
        dim: int | None,
        spread: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Mask x by a mask of another shape, which ``spread`` makes broadcast against x."""
        keep, threshold = self.keep(call, shape, x.device, p, dim)
        return select(spread(keep), threshold, x)

    def streams(self, device: torch.device) -> Tensor:
        """The streams on a device."""
        if device not in self._streams:
            self._streams[device] = self._first.to(device)
        return self._streams[device]

    def shared_stream(self, call: Call, device: torch.device) -> Tensor:
        """The one stream of a mask that the whole batch shares."""
        draws = self._first >> 32
        if not torch._C._functorch.is_functorch_wrapped_tensor(draws) and not bool((draws == draws[:1]).all()):
            raise ValueError(f"replay_dropout: {described(call)} is shared by the batch, which must be of one draw")
        self.shared.add(described(call))
        return (draws[:1] << 32 | SHARED_SAMPLE).to(device)

    def check(self, call: Call, shape: Sequence[int], dim: int | None) -> int:
        """The dimension that holds the batch, refused when its rows are not those of the batch or groups of them."""
        dim = self.batch_dim if dim is None else dim
        if dim >= len(shape) or self.rows == 0 or shape[dim] % self.rows:
            raise ValueError(
                f"replay_dropout: {described(call)} must see a tensor whose dimension {dim} is the batch of "
                f"{self.rows} rows or groups of them, got shape {tuple(shape)}; samples and batch_dim must describe "
                "the model's tensors"
            )
        units = math.prod(shape) // self.rows
        if units > UNITS_LIMIT:
            raise ValueError(f"replay_dropout: {described(call)} must mask at most 2**35 units a sample, got {units}")
        return dim


def replaying(call: Call) -> Replay:
    """The interceptor of a call that is being replayed."""
    assert isinstance(call.mode, Replay)
    return call.mode


def described(call: Call) -> str:
    """A call by its function and the module it runs in."""
    return f"{call.func.__name__} in module {call.path!r}"


def arguments(call: Call, names: Sequence[str]) -> dict[str, Any]:
    """The arguments of a call by name."""
    return dict(zip(names, call.args, strict=False)) | call.kwargs


def is_parameter(x: Tensor) -> bool:
    """Whether x is weights (DropConnect): a parameter, a view of one, or what functional_call put in its place.

    What was put there is looked for in the modules that run and in their children, whose weights a parent may take.
    """
    kin = [x] if x._base is None else [x, x._base]
    if any(isinstance(tensor, nn.Parameter) for tensor in kin):
        return True
    parts = (part for module, _ in running() for part in (module, *module.children()))
    return any(tensor is other for part in parts for other in part._parameters.values() for tensor in kin)


_Kind = Callable[[Replay, Call, Tensor, float], Tensor]


def _functional(kind: _Kind, training: bool, call: Call) -> Any:
    given = arguments(call, ("input", "p", "training", "inplace"))
    if not given.get("training", training):
        return NotImplemented
    return _apply(kind, call, given["input"], given.get("p", 0.5), given.get("inplace", False))


def _native(kind: _Kind, inplace: bool, call: Call) -> Any:
    given = arguments(call, ("input", "p", "train"))
    return _apply(kind, call, given["input"], given["p"], inplace) if given["train"] else NotImplemented


def _apply(kind: _Kind, call: Call, x: Tensor, p: float, inplace: bool) -> Tensor:
    if not x.is_floating_point():
        raise TypeError(f"replay_dropout: {described(call)} must see a real floating-point tensor, got {x.dtype}")
    out = kind(replaying(call), call, x, p)
    return x.copy_(out) if inplace and out is not x else out


def _drop(replay: Replay, call: Call, x: Tensor, p: float) -> Tensor:
    return replay.drop(call, x, p)


def _feature(replay: Replay, call: Call, x: Tensor, p: float, unbatched: int | None = None) -> Tensor:
    """One unit for each pair of the first two dimensions."""
    if x.dim() == unbatched:
        return replay.gate(call, x, p, (1, x.shape[0]), 0, lambda keep: keep.view(-1, *(1 for _ in x.shape[1:])))
    return replay.gate(call, x, p, _pairs(call, x), None, lambda keep: _over(keep, x))


def _pairs(call: Call, x: Tensor) -> torch.Size:
    if x.dim() < 2:
        raise ValueError(f"replay_dropout: {described(call)} must see 2 dimensions or more, got shape {tuple(x.shape)}")
    return x.shape[:2]


def _over(keep: Tensor, x: Tensor) -> Tensor:
    return keep.view(*x.shape[:2], *(1 for _ in x.shape[2:]))


def _alpha(replay: Replay, call: Call, x: Tensor, p: float) -> Tensor:
    return _select_alpha(*replay.keep(call, x.shape, x.device, p), x)


def _feature_alpha(replay: Replay, call: Call, x: Tensor, p: float) -> Tensor:
    keep, threshold = replay.keep(call, _pairs(call, x), x.device, p)
    return _select_alpha(_over(keep, x), threshold, x)


def _select_alpha(keep: Tensor, threshold: int, x: Tensor) -> Tensor:
    """a·(x or −α) + aα(1−q), a = (q(1 + α²(1−q)))^(−½), q = T/65536: keeps mean 0 and variance 1 (arXiv:1706.02515)."""
    if threshold in (0, 65536):
        return select(keep, threshold, x)
    q = threshold / 65536.0
    a = (q * (1.0 + _ALPHA**2 * (1.0 - q))) ** -0.5
    high = x.to(wide(x.dtype)) * a + a * _ALPHA * (1.0 - q)
    low = torch.full((), -a * _ALPHA * q, dtype=high.dtype, device=x.device)
    return torch.where(keep, high, low).to(x.dtype)


def _native_dropout(call: Call) -> Any:
    given = arguments(call, ("input", "p", "train"))
    if given.get("train") is False:
        return NotImplemented
    keep, threshold = replaying(call).keep(call, given["input"].shape, given["input"].device, given["p"])
    return select(keep, threshold, given["input"]), keep


def _bernoulli(call: Call) -> Any:
    """DropPath draws its own mask, a row for each sample, with the probability to KEEP."""
    given, replay = arguments(call, ("input", "p")), replaying(call)
    x, p = given["input"], given.get("p", 0.5)
    if isinstance(p, Tensor) or given.get("generator") is not None:
        raise ValueError(f"replay_dropout: {described(call)} must take a number p and no generator")
    if x.dim() <= replay.batch_dim or x.shape[replay.batch_dim] != replay.rows:
        raise ValueError(
            f"replay_dropout: {described(call)} must fill a tensor whose dimension {replay.batch_dim} is the batch of "
            f"{replay.rows} rows, got shape {tuple(x.shape)}"
        )
    return x.copy_(replay.keep(call, x.shape, x.device, 1.0 - p)[0])


_FUNCTIONAL: dict[Callable[..., Any], tuple[_Kind, bool]] = {
    F.dropout: (_drop, True),
    F.dropout1d: (partial(_feature, unbatched=2), True),
    F.dropout2d: (_feature, True),
    F.dropout3d: (partial(_feature, unbatched=4), True),
    F.alpha_dropout: (_alpha, False),
    F.feature_alpha_dropout: (_feature_alpha, False),
}
_NATIVE: dict[str, _Kind] = {
    "dropout": _drop,
    "feature_dropout": _feature,
    "alpha_dropout": _alpha,
    "feature_alpha_dropout": _feature_alpha,
}
ELEMENTWISE: Handlers = {
    **{func: partial(_functional, kind, training) for func, (kind, training) in _FUNCTIONAL.items()},
    **{getattr(torch, name): partial(_native, kind, False) for name, kind in _NATIVE.items()},
    **{getattr(torch, f"{name}_"): partial(_native, kind, True) for name, kind in _NATIVE.items()},
    torch.native_dropout: _native_dropout,
    torch.Tensor.bernoulli_: _bernoulli,
}
"""The rule of every dropout function that masks one tensor, and of ``bernoulli_``."""
