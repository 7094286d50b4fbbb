"""Dropout whose mask is a pure function of (seed, draw, site, sample, unit): made again wherever it is needed.

Mask format 1: Philox4x32-10 (Salmon et al. 2011) with key (seed low, seed high xor site high) and counter
(unit block, sample, draw, site low) gives eight 16-bit lanes a block; unit 8b + j is kept when lane j of block b is
below T = ⌊(1−p)·65536 + ½⌋. So the mask of a sample does not depend on its batch, the device, or the number of threads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dropscope.intercept import Handlers, Interceptor, chained
from dropscope.mask_op import UNITS_LIMIT, keep_rows, keep_threshold, mask_rows, signed
from dropscope.randomness import RANDOM, Generators, name_random_ops, refuse_hidden
from dropscope.replay import ELEMENTWISE, SHARED_SAMPLE, Replay
from dropscope.replay_layers import LAYERS

__all__ = [
    "SHARED_SAMPLE",
    "MaskKey",
    "dropout",
    "keep_mask",
    "keep_probability",
    "keep_threshold",
    "make_streams",
    "name_random_ops",
    "replay_dropout",
    "replay_streams",
]

Sharing = Literal["sample", "batch"]
_RULES = chained(ELEMENTWISE, LAYERS, RANDOM)


@dataclass(frozen=True)
class MaskKey:
    """One draw of every mask: a 64-bit seed (0 is a seed like any other) and a 32-bit draw.

    Raises:
        TypeError: seed or draw is not an integer.
        ValueError: seed is outside [0, 2**64) or draw outside [0, 2**32).
    """

    seed: int
    draw: int = 0

    def __post_init__(self) -> None:
        _check_word("MaskKey", "seed", self.seed, 64)
        _check_word("MaskKey", "draw", self.draw, 32)


def keep_probability(p: float) -> float:
    """The probability T/65536 with which a unit is kept: 1 − p to 16 bits.

    Every formula in the drop rate holds exactly with this value, not with 1 − p.

    >>> keep_probability(0.1)
    0.899993896484375
    """
    return keep_threshold(p, "keep_probability") / 65536.0


def make_streams(draws: int | Tensor, samples: Tensor) -> Tensor:
    """Draw and sample id of each row in one word, ``draw << 32 | sample``.

    Args:
        draws: one draw for all rows, or an integer tensor of shape (R,).
        samples: integer tensor (R,) of sample ids in [0, 2**32 − 2]; 2**32 − 1 is the mask shared by a batch.

    Returns:
        int64 (R,).

    Raises:
        TypeError: draws or samples are not integers.
        ValueError: wrong shapes, or a value out of range.
    """
    _check_ids("make_streams", "samples", samples)
    if isinstance(draws, Tensor):
        _check_ids("make_streams", "draws", draws)
        if draws.shape != samples.shape:
            raise ValueError(
                f"make_streams: draws must have the shape of samples, {tuple(samples.shape)}, got {tuple(draws.shape)}"
            )
        return draws.to(torch.int64) << 32 | samples.to(torch.int64)
    _check_word("make_streams", "draws", draws, 32)
    return samples.to(torch.int64) | signed(draws << 32)


def dropout(x: Tensor, p: float, key: MaskKey, site: int = 0, samples: Tensor | None = None) -> Tensor:
    """Drop units by a mask that can be made again: x ∘ keep · 65536/T.

    Linear in x; differentiable any number of times, in reverse and forward mode, under ``torch.func`` and
    ``torch.compile``. A dropped value is +0 whatever x was; p = 0 returns x itself.

    Args:
        x: floating-point tensor whose dimension 0 is the sample.
        p: probability to DROP a unit, as in torch.
        key: seed and draw.
        site: 64-bit name of this call; calls with different sites have independent masks.
        samples: integer ids (B,) of the rows; 0..B−1 when not given.

    Returns:
        Tensor of the shape and dtype of x.

    Raises:
        TypeError: an argument of the wrong type, or an x that is not floating point.
        ValueError: p outside [0, 1] or not representable, ids or site out of range, or the wrong number of them.

    >>> x = torch.ones(2, 4)
    >>> bool((dropout(x, 0.5, MaskKey(0)) == dropout(x, 0.5, MaskKey(0))).all())
    True
    """
    _check_floating("dropout", x)
    threshold = keep_threshold(p, "dropout")
    streams = _streams("dropout", x.shape, key, site, samples, x.device)
    return mask_rows(x, streams, key.seed, site, threshold)


def keep_mask(
    shape: Sequence[int],
    p: float,
    key: MaskKey,
    site: int = 0,
    samples: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The mask of :func:`dropout` itself, bool of the given shape; arguments and errors as there.

    ``device`` defaults to that of ``samples``, or the CPU.
    """
    place = torch.device(device) if device is not None else samples.device if isinstance(samples, Tensor) else None
    threshold = keep_threshold(p, "keep_mask")
    if not isinstance(shape, Sequence) or not all(isinstance(d, (int, torch.SymInt)) for d in shape):
        raise TypeError(f"keep_mask: shape must be a sequence of integers, got {shape!r}")
    if any(length < 0 for length in shape):
        raise ValueError(f"keep_mask: shape must not be negative, got {tuple(shape)}")
    shape = tuple(shape)
    streams = _streams("keep_mask", shape, key, site, samples, place)
    return keep_rows(streams, _units(shape), key.seed, site, threshold).view(shape)


@contextlib.contextmanager
def replay_dropout(
    key: MaskKey,
    samples: Tensor,
    *,
    model: nn.Module | None = None,
    sharing: Sharing = "sample",
    batch_dim: int = 0,
) -> Iterator[None]:
    """Inside, one forward pass draws every dropout mask from ``key``, or is refused by name.

    The mask of a dropout call depends on the key, the sample, the module that runs and the number of dropout calls this
    module has made since the context was entered: not on the batch, its order, the device or other layers. Modules in
    eval mode are left alone. Activation checkpoints see the same masks again, inside the context and after it; compiled
    callables run eagerly inside. torch's, Python's and numpy's generators are left where they stood.

    Args:
        key: seed and draw.
        samples: integer ids (B,) of the samples in the batch.
        model: names the dropout calls by the module they run in, so that masks do not depend on the order of calls.
        sharing: "sample" gives each sample its own mask; "batch" shares one mask over all samples.
        batch_dim: the dimension of the model's tensors that holds the samples. B·k rows are B groups of k.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: ids out of range; inside or on leaving, a random call that cannot be replayed.

    >>> layer, x = nn.Dropout(0.5), torch.randn(4, 8)
    >>> with replay_dropout(MaskKey(0), torch.arange(4)):
    ...     whole = layer(x)
    >>> with replay_dropout(MaskKey(0), torch.tensor([2])):
    ...     part = layer(x[2:3])
    >>> torch.equal(whole[2:3], part)
    True
    """
    if not isinstance(key, MaskKey):
        raise TypeError(f"replay_dropout: key must be a MaskKey, got {type(key).__name__}")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"replay_dropout: model must be a torch.nn.Module or None, got {type(model).__name__}")
    with replay_streams(key.seed, make_streams(key.draw, samples), model=model, sharing=sharing, batch_dim=batch_dim):
        yield


@contextlib.contextmanager
def replay_streams(
    seed: int,
    streams: Tensor,
    *,
    model: nn.Module | None = None,
    sharing: Sharing = "sample",
    batch_dim: int = 0,
    handlers: Handlers | None = None,
) -> Iterator[Interceptor]:
    """:func:`replay_dropout` with a stream per row (:func:`make_streams`), so that one pass may hold several draws.

    Args:
        seed: 64-bit seed.
        streams: int64 (R,) of ``draw << 32 | sample``.
        model: as in :func:`replay_dropout`.
        sharing: "batch" replaces every sample id by 2**32 − 1; each row keeps its draw.
        batch_dim: as in :func:`replay_dropout`.
        handlers: further functions to intercept.

    Yields:
        The open interceptor.
    """
    _check_word("replay_streams", "seed", seed, 64)
    if not isinstance(streams, Tensor) or streams.dtype != torch.int64 or streams.dim() != 1:
        raise TypeError("replay_streams: streams must be an int64 vector, as make_streams returns it")
    if sharing not in ("sample", "batch"):
        raise ValueError(f"replay_streams: sharing must be 'sample' or 'batch', got {sharing!r}")
    if isinstance(batch_dim, bool) or not isinstance(batch_dim, int) or batch_dim < 0:
        raise ValueError(f"replay_streams: batch_dim must be an integer >= 0, got {batch_dim!r}")
    if sharing == "batch":
        streams = streams | SHARED_SAMPLE
    mode = Replay(chained(handlers, _RULES) if handlers else _RULES, seed, streams, batch_dim, model)
    generators = Generators()
    try:
        with mode:
            yield mode
    except BaseException:
        generators.restore()
        raise
    refuse_hidden(generators.restore(), mode)


def _streams(
    name: str,
    shape: Sequence[int],
    key: MaskKey,
    site: int,
    samples: Tensor | None,
    device: torch.device | None,
) -> Tensor:
    """The streams of a tensor's rows, every argument checked."""
    if not isinstance(key, MaskKey):
        raise TypeError(f"{name}: key must be a MaskKey, got {type(key).__name__}")
    _check_word(name, "site", site, 64)
    if len(shape) == 0:
        raise ValueError(f"{name}: the tensor must have a batch dimension, got shape ()")
    if samples is None:
        samples = torch.arange(shape[0], device=device)
    else:
        _check_ids(name, "samples", samples)
    if samples.shape[0] != shape[0]:
        raise ValueError(f"{name}: samples must hold one id for each of the {shape[0]} rows, got {samples.shape[0]}")
    if _units(shape) > UNITS_LIMIT:
        raise ValueError(f"{name}: a sample must have at most 2**35 units, got {_units(shape)}")
    return samples.to(device=device, dtype=torch.int64) | signed(key.draw << 32)


def _units(shape: Sequence[int]) -> int:
    units = 1
    for length in shape[1:]:
        units *= length
    return units


def _check_word(name: str, argument: str, value: object, bits: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: {argument} must be an integer, got {value!r}")
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{name}: {argument} must lie in [0, 2**{bits}), got {value}")


def _check_floating(name: str, x: object) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        seen = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: x must be a real floating-point tensor, got {seen}")


def _check_ids(name: str, argument: str, ids: object) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name}: {argument} must be an integer tensor, got {type(ids).__name__}")
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise TypeError(f"{name}: {argument} must be an integer tensor, got {ids.dtype}")
    if ids.dim() != 1:
        raise ValueError(f"{name}: {argument} must be a vector, got shape {tuple(ids.shape)}")
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(ids) or not len(ids):
        return  # values cannot be read while tracing or under a transform
    low, high = (int(bound) for bound in ids.aminmax())
    limit = SHARED_SAMPLE if argument == "draws" else SHARED_SAMPLE - 1
    if low < 0 or high > limit:
        raise ValueError(f"{name}: {argument} must lie in [0, {limit}], got {low if low < 0 else high}")
