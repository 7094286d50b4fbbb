"""Four probes, on a few samples of the first batch, that model, loss and data make one risk."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode

from dropscope.intercept import Call, Handler
from dropscope.masks import MaskKey
from dropscope.modes import rounds_products
from dropscope.randomness import Generators, HiddenDrawError, name_random_ops

if TYPE_CHECKING:
    from dropscope.data import Batch
    from dropscope.problem import Problem

SAMPLES = 6  # of the first batch, looked at by the probes
_KEY = MaskKey(0x70726F6265, 1)
_COPIED = 1 << 24  # parameters of a model that is copied in float64 for the probe of the gradient


def run(problem: Problem, batch: Batch, *, masks: bool) -> None:
    """Run the probes: with dropout off repeat, split and gradient; under masks repeat, split and neutral.

    Raises:
        ValueError: if one fails; the message says what it means.
    """
    batch = batch.select(slice(0, SAMPLES))
    key = _KEY if masks else None
    with untouched(problem.model):
        repeat(problem, batch, key)
        split(problem, batch, key)
        if masks:
            neutral(problem, batch)
        else:
            gradient(problem, batch)


def repeat(problem: Problem, batch: Batch, key: MaskKey | None) -> None:
    """The same batch twice gives the same bits, wherever the random generators stand, and writes to no parameter."""
    before = [(name, p, p._version, p.detach().clone()) for name, p in problem.model.named_parameters()]
    try:
        first = _values(problem, batch, key)
    except HiddenDrawError as error:
        raise ValueError(f"{error}{_drawn(problem, batch, key)}") from error
    written = [(name, p, copy) for name, p, version, copy in before if p._version != version]
    del before
    if written:
        with torch.no_grad():
            for _, p, copy in written:
                p.copy_(copy)
        names = [name for name, _, _ in written]
        raise ValueError(f"Problem: the forward pass must not write to parameters, got a change of {names}")
    torch.default_generator.manual_seed(1)
    if problem.device.type == "cuda":
        torch.cuda.default_generators[problem.device.index or 0].manual_seed(1)
    second = _values(problem, batch, key)
    if not torch.equal(first, second) and bool(torch.isfinite(first).all()):
        where = "in eval mode" if key is None else f"under {key}"
        raise ValueError(
            f"Problem: losses must repeat bit for bit {where}, got a difference of {_gap(first, second):.3g}: the "
            "model or the loss draws random numbers whatever the mode (F.dropout without training=self.training, added "
            "noise), or keeps a state from one call to the next; on CUDA try torch.use_deterministic_algorithms(True)"
            f"{_drawn(problem, batch, key)}"
        )


def _drawn(problem: Problem, batch: Batch, key: MaskKey | None) -> str:
    """The random operations of torch that a pass reaches beside replayed ones, as the end of a message."""

    def run() -> None:
        with suppress(ValueError):
            _values(problem, batch, key)

    names = dict.fromkeys(name_random_ops(run))
    return f": here {', '.join(names)}" if names else ""


def split(problem: Problem, batch: Batch, key: MaskKey | None) -> None:
    """A batch's losses are its parts' losses; under masks also, two draws at once are each of them alone.

    Where samples share a mask, a pass has one draw; the noise then refuses to take samples as independent.
    """
    draws = 1 if key is None or problem.shared else 2
    whole = _values(problem, batch, key, draws)
    cut = max(1, batch.size // 2)
    parts = [slice(0, cut), slice(cut, batch.size)] if batch.size > 1 else [slice(0, 1)]
    # Under masks a ValueError is a refusal of the replay, which says itself what it means.
    errors = (RuntimeError, IndexError, ValueError)[: 3 if key is None else 2]
    try:
        if key is None:
            alone = torch.cat([_values(problem, batch.select(part), None) for part in parts])
        else:
            keys = [MaskKey(key.seed, key.draw + m) for m in range(draws)]
            alone = torch.stack([torch.cat([_values(problem, batch.select(p), k) for p in parts]) for k in keys], 1)
    except errors as error:
        raise ValueError(
            f"Problem: the model must run on {cut} of {batch.size} samples as on all, got {type(error).__name__}: "
            f"{error} (is batch_dim={problem.batch_dim} the dimension of the sample?)"
        ) from error
    gap, scale = _gap(whole, alone.reshape(-1)), float(whole.abs().max())
    if gap > _slack(whole):
        raise ValueError(
            f"Problem: a batch's losses must be those of its parts, got a difference of {gap:.3g} in losses of "
            f"{scale:.3g}: {_coupling(problem)}"
        )


def neutral(problem: Problem, batch: Batch) -> None:
    """Train mode with every drop probability 0 is eval mode."""
    handlers, undecided = _neutral_handlers()
    trained = _values(problem, batch, _KEY, handlers=handlers)
    if undecided:
        return
    still = _values(problem, batch, None)
    gap, scale = _gap(trained, still), float(still.abs().max())
    if gap > _slack(still):
        raise ValueError(
            f"Problem: train mode with every p=0 must equal eval mode, got a difference of {gap:.3g} in losses of "
            f"{scale:.3g}: something else than dropout depends on the mode (in the forward pass itself, or a layer)"
        )


def gradient(problem: Problem, batch: Batch) -> None:
    """⟨∇Σs, v⟩ is a central difference along v, in float64 where the model has a copy that computes in it.

    Steps of float32 are a thousand times as long, and pass over weights that are rounded before they are used.
    """
    found = _gradient(problem, batch)
    if found is None:
        return  # the passes over the data name batch and sample
    problem.require_finite(found[1], batch)
    finer = _in_float64(problem, batch)
    if finer is None or not _agrees(problem, batch, _derivative(*finer)):
        _derivative(problem, batch)


def _agrees(problem: Problem, batch: Batch, known: tuple[Tensor, Tensor] | None) -> bool:
    """Whether the gradient at a displacement is the one that is known there, as far as kinks and rounding let it."""
    if known is None:
        return False
    where, g = known
    with problem.displaced(where):
        found = _gradient(problem, batch)
    return found is not None and float((found[1].double() - g).norm()) <= 1e-2 * float(g.norm())


def _in_float64(problem: Problem, batch: Batch) -> tuple[Problem, Batch] | None:
    """A copy of the problem in float64; None where there is none, or where a part of it computes in less."""
    if problem.dtype == torch.float64 or sum(p.numel() for p in problem.model.parameters()) > _COPIED:
        return None
    watch, twin = _ShorterDtypes(), copy.copy(problem)
    # A model may refuse to be copied or to compute in float64 in any way that it likes.
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin.model = copy.deepcopy(problem.model).double()
        twin.params = {name: p for name, p in twin.model.named_parameters() if name in problem.params}
        twin.dtype = torch.float64
        if problem.loss.elements is not None:
            twin.loss = replace(problem.loss, elements=copy.deepcopy(problem.loss.elements).double())
        batch = batch.map(lambda t: t.double() if t.is_floating_point() else t)
        with watch:
            values = _values(twin, batch, None)
        if not watch.found and values.dtype == torch.float64 and len(twin.params) == len(problem.params):
            return twin, batch
    return None


class _ShorterDtypes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notices floating numbers of less than 64 bits: their rounding would pass for a fault of the gradient."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            self.found |= isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        return out


def _gradient(problem: Problem, batch: Batch) -> tuple[Tensor, Tensor] | None:
    """Values and the flat gradient of their sum; None if a value is not finite."""
    with torch.enable_grad():
        values, _ = problem.raw_losses(batch)
        if not values.requires_grad:
            raise ValueError(
                "Problem: losses must depend on the parameters, got losses without a graph (detach, no_grad, argmax?)"
            )
        if not bool(torch.isfinite(values).all()):
            return None
        grads = torch.autograd.grad(values.sum(), list(problem.params.values()), materialize_grads=True)
    return values.detach(), problem.flatten(grads).detach()


def _derivative(problem: Problem, batch: Batch) -> tuple[Tensor, Tensor] | None:
    """⟨∇Σs, v⟩ is a central difference along v: a random v, and the gradient itself.

    Looked at beside the parameters: zero biases and zero inputs put many kinks at them, where torch takes one side of
    each and a difference both. Returns the displacement and the gradient there; None if something is not finite.
    """
    parameters = problem.params.values()
    size = problem.flatten([torch.full_like(p, float(p.detach().double().square().mean().sqrt())) for p in parameters])
    size = size.masked_fill(size == 0, 1.0)
    generator = torch.Generator().manual_seed(0)
    signs, aside = (torch.randint(0, 2, (problem.dim,), generator=generator).to(size) * 2 - 1 for _ in range(2))
    step = torch.finfo(problem.dtype).eps ** (1 / 3)
    where = _without_paddings(problem, math.sqrt(step) * aside * size)
    with problem.displaced(where):
        found = _gradient(problem, batch)
        if found is None or not bool(torch.isfinite(found[1]).all()):
            return None
        g, norm = found[1], float(found[1].double().norm())
        directions = [signs * size]
        if norm > 0:
            directions.append(g / norm * size.double().norm().to(g.dtype))
        for v in directions:
            _along(problem, batch, found, _without_paddings(problem, v))
    return where, g


def _along(problem: Problem, batch: Batch, found: tuple[Tensor, Tensor], v: Tensor) -> None:
    """⟨g, v⟩ is a central difference along v, as far as kinks and rounding let it be known."""
    values, g = found
    eps, loss = torch.finfo(values.dtype).eps, float(values.double().sum())
    step = eps ** (1 / 3)
    rounding = 50 * eps * float((values.double().abs() + 1).sum())
    expected = float(g.double() @ v.double())
    wide, narrow = (_slopes(problem, batch, v, h, loss) for h in (step, step / 2))
    # Curvature and kinks show in the two steps' difference, rounding in the size of the losses.
    slack = 10 * abs(wide[0] - narrow[0]) + rounding / step + 1e-3 * abs(expected)
    if min(abs(narrow[0] - expected), abs(wide[0] - expected)) <= slack:
        return
    # Or the steps agree by chance: many kinks lie within both of them. Then the step decides where rounding and the
    # slopes to the two sides, which kinks set apart as they shift the mean, leave the least room. There too one kink
    # may make up for another, hardly so at the next step too.
    steps = [step / n for n in (1, 2, 4, 8, 16, 32)]
    looks = [wide, narrow, *(_slopes(problem, batch, v, h, loss) for h in steps[2:])]
    gaps = [gap for _, gap in looks]
    rooms = [1.5 * max(gaps[max(0, j - 1) : j + 2]) + rounding / h for j, h in enumerate(steps)]
    room, slope = min(zip(rooms, (slope for slope, _ in looks), strict=True))
    if not abs(slope - expected) <= room + 1e-3 * abs(expected):
        raise ValueError(
            f"Problem: the gradient must be the derivative of the loss, got <g, v> = {expected:.6g} and a "
            f"central difference of {slope:.6g}: part of the forward pass is detached, rounded, or has a "
            "backward pass that is not its derivative"
        )


def _without_paddings(problem: Problem, v: Tensor) -> Tensor:
    """Zero, in place, the rows of paddings: torch holds them fixed, though the loss depends on them."""
    parts = problem.unflatten(v)
    for module in problem.model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.padding_idx is not None:
            for name, p in problem.params.items():
                if p is module.weight:
                    parts[name][module.padding_idx] = 0.0
    return v


def _slopes(problem: Problem, batch: Batch, v: Tensor, step: float, loss: float) -> tuple[float, float]:
    """The central difference along v, and half of what the slopes to the two sides differ by."""
    ends = []
    for sign in (1.0, -1.0):
        with problem.displaced(v * (sign * step)):
            ends.append(float(_values(problem, batch, None).double().sum()))
    return (ends[0] - ends[1]) / (2 * step), abs(ends[0] + ends[1] - 2 * loss) / (2 * step)


def _values(problem: Problem, batch: Batch, key: MaskKey | None, draws: int = 1, **options: Any) -> Tensor:
    with torch.no_grad():
        return problem.raw_losses(batch, key, draws, **options)[0]


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def _slack(values: Tensor) -> float:
    """Rounding that another batch size may bring: far above it, far below any coupling.

    The floor is for a model that interpolates: a loss of 1e-6 has the rounding errors of logits, not of 1e-6.
    """
    # A library may take an algorithm with TF32 for one batch size and one without for another.
    rounding = 2.0**-8 if rounds_products(values) else math.sqrt(torch.finfo(values.dtype).eps)
    return rounding * max(0.01, float(values.abs().max()))


def _coupling(problem: Problem) -> str:
    for name, module in problem.model.named_modules():
        if isinstance(module, _NormBase) and module.running_mean is None:
            return f"{name!r} normalises over the batch also in eval mode (track_running_stats=False)"
    return f"a layer couples the samples (batch statistics), or batch_dim={problem.batch_dim} is not the sample's"


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore the generators and the buffers after a block; refuse a model whose forward writes to buffers."""
    generators = Generators()
    before = [
        (module, f"{path}.{name}".lstrip("."), name, b, b._version, b.detach().clone())
        for path, module in model.named_modules()
        for name, b in module._buffers.items()
        if b is not None
    ]
    changed = []
    try:
        yield
    finally:
        generators.restore()
        for module, label, name, buffer, version, copy in before:
            if module._buffers[name] is not buffer or buffer._version != version:
                changed.append(label)
                module._buffers[name] = buffer
                with torch.no_grad():
                    buffer.copy_(copy)
    if changed:
        raise ValueError(f"Problem: the forward pass must not write to buffers, got a change of {changed}")


def _neutral_handlers() -> tuple[dict[Callable[..., Any], Handler], list[str]]:
    """Handlers that switch every dropout off in train mode; the list names calls for which that cannot be done."""
    undecided: list[str] = []

    def identity(call: Call) -> Any:
        return call.args[0] if call.args else call.kwargs["input"]

    def attention(call: Call) -> Any:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        return call.func(**{**dict(zip(names, call.args, strict=False)), **call.kwargs, "dropout_p": 0.0})

    def native(call: Call) -> Any:
        x = identity(call)
        return x, torch.ones_like(x, dtype=torch.bool)

    def recurrent(call: Call) -> Any:
        args = list(call.args)
        args[5 if isinstance(args[5], float) else 6] = 0.0
        return call.func(*args, **call.kwargs)

    def fill(call: Call) -> Any:
        undecided.append(call.func.__name__)
        p = call.args[1] if len(call.args) > 1 else call.kwargs.get("p", 0.5)
        return call.args[0].copy_(torch.as_tensor(p))

    def middle(call: Call) -> Any:
        undecided.append(call.func.__name__)
        options = {name: value for name, value in call.kwargs.items() if name != "generator"}
        return (torch.zeros_like if call.func is torch.rand_like else torch.zeros)(*call.args, **options)

    functional = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
    unscoped = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
    handlers: dict[Callable[..., Any], Handler] = {getattr(F, name): identity for name in functional}
    handlers |= {getattr(torch, name + end): identity for name in unscoped for end in ("", "_")}
    handlers |= dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), recurrent)
    handlers |= {F.scaled_dot_product_attention: attention, torch.Tensor.bernoulli_: fill}
    handlers[torch.native_dropout] = native
    handlers |= {torch.rand: middle, torch.rand_like: middle}
    return handlers, undecided
