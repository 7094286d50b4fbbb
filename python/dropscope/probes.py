"""Four probes, on a few samples of the first batch, that model, loss and data make one risk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dropscope import derivatives
from dropscope.intercept import Call, Handler
from dropscope.masks import MaskKey
from dropscope.modes import rounds_products
from dropscope.randomness import Generators, HiddenDrawError, name_random_ops

if TYPE_CHECKING:
    from dropscope.data import Batch
    from dropscope.problem import Problem

SAMPLES = 6  # of the first batch, looked at by the probes
_KEY = MaskKey(0x70726F6265, 1)


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
            derivatives.gradient(problem, batch)


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
