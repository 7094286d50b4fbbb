"""What else is random: torch functions replayed or refused by name, generators watched, a diagnosis for what hides."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dropscope.intercept import Call, Handlers, Interceptor, module_names
from dropscope.mask_op import keep_rows
from dropscope.replay import arguments, described, replaying

_REFUSED = {
    torch: "_sample_dirichlet _standard_gamma bernoulli binomial multinomial normal pca_lowrank poisson randint "
    "randint_like randn randn_like randperm svd_lowrank",
    torch.Tensor: "bernoulli cauchy_ exponential_ geometric_ log_normal_ multinomial normal_ random_ uniform_",
    F: "gumbel_softmax",
    torch.nn.init: "kaiming_normal_ kaiming_uniform_ normal_ orthogonal_ sparse_ trunc_normal_ uniform_ xavier_normal_ "
    "xavier_uniform_",
}
_POOLS = [f"fractional_max_pool{size}d{kind}" for size in (2, 3) for kind in ("", "_with_indices")]
_DIGITS = 24


def _refuse(call: Call) -> Any:
    raise ValueError(f"replay_dropout: the model must draw only what can be replayed, got {described(call)}")


def _refuse_training(call: Call) -> Any:
    given = arguments(call, ("input", "lower", "upper", "training"))
    return _refuse(call) if given.get("training", False) else NotImplemented


def _refuse_pool(call: Call) -> Any:
    return _refuse(call) if call.kwargs.get("_random_samples") is None else NotImplemented


def _rand(call: Call) -> Any:
    """Uniform numbers of 24 binary digits, digit k of unit u being 1 where unit 24u + k of the mask at p = ½ drops.

    So DropPath as floor(keep + rand), a row for each sample, is replayed; a single number (LayerDrop) is shared.
    """
    options = {name: value for name, value in call.kwargs.items() if name not in ("generator", "out")}
    x: Tensor = (torch.empty_like if call.func is torch.rand_like else torch.empty)(*call.args, **options)
    replay = replaying(call)
    if any(call.kwargs.get(name) is not None for name in ("generator", "out")) or not x.is_floating_point():
        return _refuse(call)
    if x.dim() == 0:
        stream = replay.shared_stream(call, x.device)
        keep = keep_rows(stream, _DIGITS, replay.seed, replay.site(call), 1 << 15)[0]
    elif x.dim() > replay.batch_dim and x.shape[replay.batch_dim] == replay.rows:
        keep, _ = replay.keep(call, (*x.shape, _DIGITS), x.device, 0.5)
    else:
        return _refuse(call)
    digits = min(_DIGITS, 1 - round(np.log2(torch.finfo(x.dtype).eps)))
    places = torch.tensor([2.0**-k if k <= digits else 0.0 for k in range(1, _DIGITS + 1)], dtype=torch.float64)
    return ((~keep).double() @ places.to(x.device)).to(x.dtype)


RANDOM: Handlers = {
    **{getattr(owner, name): _refuse for owner, names in _REFUSED.items() for name in names.split()},
    **dict.fromkeys((torch.rand, torch.rand_like), _rand),
    **dict.fromkeys((F.rrelu, F.rrelu_, torch.rrelu, torch.rrelu_), _refuse_training),
    **dict.fromkeys((getattr(F, name) for name in _POOLS), _refuse_pool),
}
"""The functions that are refused by name because they cannot be replayed, and ``rand``."""


class HiddenDrawError(ValueError):
    """A pass moved a generator although no random function was seen."""


def refuse_hidden(moved: list[str], mode: Interceptor) -> None:
    """Refuse a pass that moved a generator although no random function was seen, naming what can have hidden it."""
    if not moved:
        return
    scripted = [
        f"scripted module {name!r}"
        for name, module in ({} if mode.model is None else module_names(mode.model)).items()
        if isinstance(module, torch.jit.ScriptModule)
    ]
    seen = ", ".join(scripted + sorted(mode.operators)) or "code of Python, numpy or an extension"
    raise HiddenDrawError(
        f"replay_dropout: the model must draw only what can be replayed, got a draw from {', '.join(moved)} hidden in "
        f"one of: {seen}; masks.name_random_ops names the operations of torch behind it"
    )


class Generators:
    """The states of the default generators of torch (CPU, CUDA), of Python and of numpy."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = [generator.get_state() for generator in _cuda()]
        self.python = random.getstate()
        self.numpy = np.random.get_state(legacy=False)  # noqa: NPY002

    def restore(self) -> list[str]:
        """Put back what moved and name it."""
        moved = []
        if not torch.equal(self.cpu, torch.get_rng_state()):
            torch.set_rng_state(self.cpu)
            moved.append("torch's CPU generator")
        for index, generator in enumerate(_cuda()):
            if index >= len(self.cuda) and generator.get_offset():  # CUDA came up inside
                generator.set_offset(0)
            elif index < len(self.cuda) and not torch.equal(self.cuda[index], generator.get_state()):
                generator.set_state(self.cuda[index])
            else:
                continue
            moved.append(f"torch's generator of cuda:{index}")
        if self.python != random.getstate():
            random.setstate(self.python)
            moved.append("Python's random")
        if not _same(self.numpy, np.random.get_state(legacy=False)):  # noqa: NPY002
            np.random.set_state(self.numpy)  # noqa: NPY002
            moved.append("numpy.random")
        return moved


def _cuda() -> tuple[torch.Generator, ...]:
    return torch.cuda.default_generators if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return all(_same(a[key], b[key]) for key in a)
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else bool(a == b)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def name_random_ops(run: Callable[[], Any]) -> list[str]:
    """Names of the operations tagged random that ``run()`` reaches, in order, scripted modules included.

    Generators are left as they were found.

    >>> name_random_ops(lambda: torch.rand(3))
    ['aten.rand.default']
    """
    before, watch = Generators(), _Watch()
    try:
        with watch:
            run()
    finally:
        before.restore()
    return watch.seen
