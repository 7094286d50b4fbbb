"""A forward pass without dropout that keeps what every dropout call would have masked."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropscope.entry_points import direct_checkpoints
from dropscope.intercept import Call, Handlers, chained
from dropscope.mask_op import keep_rows, keep_threshold, mask_rows
from dropscope.masks import MaskKey, make_streams
from dropscope.modes import twice_differentiable
from dropscope.randomness import RANDOM, Generators, refuse_hidden
from dropscope.replay import ELEMENTWISE, SHARED_SAMPLE, Replay, arguments, described, is_parameter
from dropscope.replay_layers import LAYERS
from dropscope.training.recurrent import lstm, without_weight_gradients

_HALF = 1 << 15


@dataclass(frozen=True)
class Site:
    """One dropout call of the pass: the units z that it would have multiplied by 1 + η, E η = 0, E η² = q/(1−q).

    Attributes:
        name: path of the module and number of the call in it.
        units: z: activations, weights (DropConnect), or the constant 1 for each group of values that share a mask.
        kept: keep probability, T/65536.
        shared: whether one mask serves the whole batch, as on weights.
        word: the site's 64-bit name in the masks.
        dim: dimension of ``units`` that holds the samples.
    """

    name: str
    units: Tensor
    kept: float
    shared: bool
    word: int
    dim: int = 0

    @property
    def variance(self) -> float:
        """E η² = q/(1−q), q the drop probability."""
        return (1.0 - self.kept) / self.kept


@dataclass(frozen=True)
class Sites:
    """The dropout calls of one pass; see :func:`dropout_sites`.

    Attributes:
        samples: ids of the samples.
        batch_dim: their dimension in the model's tensors.
        found: the calls, in order.
    """

    samples: Tensor
    batch_dim: int
    found: list[Site]

    def __len__(self) -> int:
        return len(self.found)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.found)

    def __repr__(self) -> str:
        inside = ", ".join(f"{site.name}: {tuple(site.units.shape)}, q={1 - site.kept:.4g}" for site in self.found)
        return f"Sites({inside})"

    def gradients(self, score: Tensor) -> list[tuple[Site, Tensor]]:
        """∂score/∂z at every site that the score depends on, differentiable again."""
        units = [site.units for site in self.found]
        with ExitStack() as stack:
            if not any(site.shared for site in self.found):
                stack.enter_context(without_weight_gradients())
            slopes = torch.autograd.grad(score, units, create_graph=True, allow_unused=True)
        return [(site, slope) for site, slope in zip(self.found, slopes, strict=True) if slope is not None]

    def signed(self, site: Site, x: Tensor, key: MaskKey) -> Tensor:
        """S∘x, with independent signs ±1 for every unit of a site that depend on the key and the sample alone."""
        rows = x.movedim(site.dim, 0) if site.dim else x
        if site.shared:
            stream = make_streams(key.draw, self.samples[:1]) | SHARED_SAMPLE
        else:
            stream = make_streams(key.draw, self.samples)
        rows = mask_rows(rows, stream.to(x.device), derived(key.seed, "signs"), site.word, _HALF) - rows
        return rows.movedim(0, site.dim) if site.dim else rows

    def halves(self, key: MaskKey) -> Tensor:
        """bool (B,): one sample of every two neighbours, drawn by the key."""
        stream = make_streams(key.draw, self.samples)
        coins = keep_rows(stream, 1, derived(key.seed, "halves"), 0, _HALF)[:, 0]
        chosen = coins[::2].repeat_interleave(2)[: len(coins)]
        return chosen ^ (torch.arange(len(coins), device=coins.device) % 2).bool()


def derived(seed: int, purpose: str) -> int:
    """A seed for another purpose, so that its numbers are independent of the masks of ``seed``: BLAKE2s-8."""
    return int.from_bytes(hashlib.blake2s(f"{seed}/{purpose}".encode(), digest_size=8).digest(), "little")


def checked(name: str, sites: object, key: object) -> None:
    """Refuse sites that are none or hold nothing, and a key that is none."""
    if not isinstance(sites, Sites):
        raise TypeError(f"{name}: sites must come from dropout_sites, got {type(sites).__name__}")
    if not len(sites):
        raise ValueError(f"{name}: sites must hold a dropout call, got none; is the model in train mode?")
    if not isinstance(key, MaskKey):
        raise TypeError(f"{name}: key must be a MaskKey, got {type(key).__name__}")


@contextmanager
def dropout_sites(samples: Tensor, *, model: nn.Module | None = None, batch_dim: int = 0) -> Iterator[Sites]:
    """Inside, one forward pass in train mode runs without dropout and records what each dropout call sees.

    What the calls would have masked is kept in the graph, so that a loss of the pass can be differentiated with respect
    to it, twice: this is what :func:`explicit_penalty` and :func:`implicit_noise` need, and both share the pass.
    Known are all forms of dropout on activations, by element, channel or row (``nn.Dropout``, ``Dropout1d`` to ``3d``,
    inside attention and recurrent networks, a mask of one's own from ``bernoulli_``), and on weights (DropConnect).
    Attention and recurrent networks run in kernels that have a second derivative.

    Args:
        samples: integer ids (B,) of the samples in the batch.
        model: names the calls by the module they run in.
        batch_dim: the dimension of the model's tensors that holds the samples.

    Yields:
        The sites, filled as the pass goes on.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a random call whose noise is no product with 1 + η, such as alpha dropout.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
        >>> with dropout_sites(torch.arange(4), model=net) as sites:
        ...     output = net(torch.ones(4, 2))
        >>> sites
        Sites(2#0: (4, 8), q=0.5)
    """
    streams = make_streams(0, samples)
    if isinstance(batch_dim, bool) or not isinstance(batch_dim, int) or batch_dim < 0:
        raise ValueError(f"dropout_sites: batch_dim must be an integer >= 0, got {batch_dim!r}")
    sites = Sites(samples, batch_dim, [])
    mode = _Recorder(_RULES, 0, streams, batch_dim, model)
    mode.found = sites.found
    generators = Generators()
    device = next((p.device for p in model.parameters()), samples.device) if model is not None else samples.device
    try:
        with twice_differentiable(model or nn.Module(), device), direct_checkpoints(), mode:
            yield sites
    except BaseException:
        generators.restore()
        raise
    refuse_hidden(generators.restore(), mode)


class _Recorder(Replay):
    """Lets every dropout call pass and keeps the units that it would have masked."""

    found: list[Site]

    def drop(self, call: Call, x: Tensor, p: float, dim: int | None = None) -> Tensor:
        threshold, word = _threshold(call, p), self.site(call)
        if threshold == 65536:
            return x
        shared = is_parameter(x)
        dim = 0 if shared else self.check(call, x.shape, dim)
        if not x.requires_grad:
            units = x.detach().requires_grad_()
        elif _in_place(call):
            units = x.clone()  # x itself is about to become the result
        else:
            units = x.view_as(x)
        self._record(word, units, threshold, shared, dim)
        return units

    def gate(
        self,
        call: Call,
        x: Tensor,
        p: float,
        shape: Sequence[int],
        dim: int | None,
        spread: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Masks shared by groups of values: the units are factors 1, one for each group."""
        threshold, word = _threshold(call, p), self.site(call)
        if threshold == 65536:
            return x
        dim = self.check(call, shape, dim)
        units = torch.ones(tuple(shape), dtype=x.dtype, device=x.device, requires_grad=True)
        self._record(word, units, threshold, False, dim)
        return x * spread(units)

    def fill(self, call: Call, x: Tensor, p: float) -> Tensor:
        """A mask that the model draws itself, x ← 1 with probability p: its mean, which is p."""
        threshold, word = _threshold(call, 1.0 - p), self.site(call)
        if threshold == 65536:
            return x.fill_(1.0)
        batched = x.dim() > self.batch_dim and x.shape[self.batch_dim] % self.rows == 0
        units = torch.full_like(x, threshold / 65536.0, requires_grad=True)
        self._record(word, units, threshold, not batched, self.batch_dim if batched else 0)
        return x.copy_(units)

    def _record(self, word: int, units: Tensor, threshold: int, shared: bool, dim: int) -> None:
        self.found.append(Site(self.sites[word], units, threshold / 65536.0, shared, word, dim))


def _in_place(call: Call) -> bool:
    """Whether a dropout call writes into its input; of those that take the argument, F.dropout alone comes here."""
    if call.func is F.dropout:
        return bool(arguments(call, ("input", "p", "training", "inplace")).get("inplace"))
    return call.func.__name__.endswith("_")


def _threshold(call: Call, p: float) -> int:
    threshold = keep_threshold(p)
    if threshold == 0:
        raise ValueError(f"dropout_sites: {described(call)} must drop with p < 1, got {p}")
    return threshold


def _recorder(call: Call) -> _Recorder:
    assert isinstance(call.mode, _Recorder)
    return call.mode


def _bernoulli(call: Call) -> Any:
    given = arguments(call, ("input", "p"))
    if isinstance(given.get("p", 0.5), Tensor) or given.get("generator") is not None:
        _refuse(call)
    return _recorder(call).fill(call, given["input"], given.get("p", 0.5))


def _refuse(call: Call) -> NoReturn:
    raise ValueError(f"dropout_sites: the noise must multiply by 1 + η with E η = 0, got {described(call)}")


_LSTM = ("input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")


def _lstm(call: Call) -> Any:
    """A padded LSTM of standard form in the one that has a fast second derivative; any other without oneDNN."""
    given = arguments(call, _LSTM)
    packed = len(call.args) > 3 and isinstance(call.args[3], Sequence)
    if packed or any(weight.shape[0] != 4 * given["hx"][0].shape[-1] for weight in given["params"]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's own, on devices that are not there
            with torch.backends.mkldnn.flags(enabled=False):
                result = LAYERS[torch.lstm](call)
                return call.proceed() if result is NotImplemented else result
    p = given["dropout"] if given["train"] else 0.0
    dim = 0 if given["batch_first"] else 1
    return lstm(
        given["input"],
        given["hx"],
        given["params"],
        biases=given["has_biases"],
        layers=given["num_layers"],
        bidirectional=given["bidirectional"],
        batch_first=given["batch_first"],
        between=lambda x: _recorder(call).drop(call, x, p, dim=dim) if p else x,
    )


def _refuse_in_training(call: Call) -> Any:
    given = arguments(call, ("input", "p", "training"))
    return _refuse(call) if given.get("training", given.get("train", False)) else NotImplemented


_ALPHA = (F.alpha_dropout, F.feature_alpha_dropout, torch.alpha_dropout, torch.feature_alpha_dropout)
_RULES: Handlers = {
    **chained(ELEMENTWISE, LAYERS, RANDOM),
    **dict.fromkeys(_ALPHA, _refuse_in_training),
    **dict.fromkeys((torch.alpha_dropout_, torch.feature_alpha_dropout_, torch.native_dropout), _refuse_in_training),
    **dict.fromkeys((torch.rand, torch.rand_like), _refuse),
    torch.Tensor.bernoulli_: _bernoulli,
    torch.lstm: _lstm,
}
