"""Which parameters a problem differentiates."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
Params = str | nn.Parameter | Iterable[str | nn.Parameter]


def choose(model: nn.Module, params: Params | None) -> dict[str, nn.Parameter]:
    """Return the chosen parameters by name, in the model's order, each once.

    Raises:
        TypeError: if a parameter is not of a floating dtype, or the dtypes differ.
        ValueError: if nothing is chosen or trainable, a name is unknown, the devices differ, or a forward pass would
            write to a parameter.
    """
    every = dict(model.named_parameters())
    for name, module in model.named_modules():
        if getattr(module, "max_norm", None) is not None and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            raise ValueError(
                f"Problem: the forward pass must not write to parameters, got {name!r} with max_norm="
                f"{module.max_norm}: a pass rescales the rows that it uses; set max_norm=None to measure"
            )
    for name, p in every.items():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ValueError(f"Problem: parameters must be initialised, got lazy {name!r}: run the model once before")
    if params is None:
        chosen = {name: p for name, p in every.items() if p.requires_grad}
        if not chosen:
            raise ValueError(f"Problem: model must have trainable parameters, got none among {len(every)}")
    else:
        if not isinstance(params, Iterable):
            raise TypeError(f"Problem: params must be names, patterns or parameters, got {params!r}")
        # A tensor iterates over its rows, a string over its letters.
        wanted = [params] if isinstance(params, (str, nn.Parameter)) else list(params)
        chosen = _select(model, every, wanted)
    for name, p in chosen.items():
        if not p.is_floating_point():
            raise TypeError(f"Problem: parameters must be of a floating dtype, got {name!r} of {p.dtype}")
        if not p.requires_grad:
            raise ValueError(f"Problem: params must be trainable, got {name!r} with requires_grad=False")
        if not bool(torch.isfinite(p.detach()).all()):
            raise ValueError(f"Problem: parameters must be finite, got NaN or Inf in {name!r}")
    for field, error in (("dtype", TypeError), ("device", ValueError)):
        seen = {str(getattr(p, field)) for p in chosen.values()}
        if len(seen) > 1:
            raise error(f"Problem: parameters must have one {field}, got {sorted(seen)}; choose some with params=")
    return chosen


def _select(
    model: nn.Module, every: Mapping[str, nn.Parameter], wanted: Sequence[str | nn.Parameter]
) -> dict[str, nn.Parameter]:
    # A tied parameter may be asked for under any of its names.
    aliases = dict(model.named_parameters(remove_duplicate=False))
    ids: set[int] = set()
    for item in wanted:
        if isinstance(item, nn.Parameter):
            found = [item] if any(item is p for p in every.values()) else []
            seen = f"a parameter of shape {tuple(item.shape)} that is not the model's"
        elif isinstance(item, str):
            found = [p for name, p in aliases.items() if name == item or fnmatch.fnmatchcase(name, item)]
            seen = repr(item)
        else:
            raise TypeError(f"Problem: params must be names, patterns or parameters, got {type(item).__name__}")
        if not found:
            raise ValueError(f"Problem: params must be among {list(every)}, got {seen}")
        ids.update(id(p) for p in found)
    if not ids:
        raise ValueError("Problem: params must name at least one parameter, got none")
    return {name: p for name, p in every.items() if id(p) in ids}


def with_tensors(model: nn.Module, tensors: Mapping[str, Tensor], fn: Callable[[], T]) -> T:
    """Call ``fn`` with tensors in place of the model's parameters of these names, then put the parameters back.

    Every use of a parameter counts, under whatever name. ``torch.func.functional_call`` leaves a tensor behind in a
    module that is registered under two names.
    """
    places = {id(p): tensors[name] for name, p in model.named_parameters() if name in tensors}
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    flat: list[tuple[nn.Module, dict[str, object]]] = []  # the weights that RNNs hold besides
    try:
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None and id(p) in places:
                    replaced.append((module, name, p))
            if isinstance(module, nn.RNNBase):
                flat.append((module, {name: v for name, v in vars(module).items() if name.startswith("_flat_weight")}))
        for module, name, p in replaced:
            module._parameters[name] = places[id(p)]  # type: ignore[assignment]
        return fn()
    finally:
        for module, name, p in replaced:
            module._parameters[name] = p
        for module, held in flat:
            vars(module).update(held)
