"""Whether autograd's derivatives are those of the losses: first ones for every problem, second ones for a Hessian."""

from __future__ import annotations

import copy
import math
import warnings
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dropscope import kernels
from dropscope.modes import twice_differentiable

if TYPE_CHECKING:
    from dropscope.data import Batch
    from dropscope.problem import Problem

_COPIED = 1 << 24  # parameters of a model that is copied in float64


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
        with torch.no_grad(), watch:
            values = twin.raw_losses(batch)[0]
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
    where, v = _beside(problem)
    with problem.displaced(where):
        found = _gradient(problem, batch)
        if found is None or not bool(torch.isfinite(found[1]).all()):
            return None
        g, norm = found[1], float(found[1].double().norm())
        _along(problem, batch, found, v)
        if norm > 0:
            _along(problem, batch, found, _without_paddings(problem, g / norm * v.double().norm().to(g.dtype)))
    return where, g


def _beside(problem: Problem) -> tuple[Tensor, Tensor]:
    """A displacement to look from, and a direction, of random signs at the parameters' sizes."""
    reach = math.sqrt(torch.finfo(problem.dtype).eps ** (1 / 3))
    v, aside = (torch.empty(problem.dim, dtype=problem.dtype, device=problem.device) for _ in range(2))
    for index, signs in enumerate((v, aside)):
        kernels.probe(signs, seed=0, index=index)
    for name, p in problem.params.items():
        norm = float(torch.linalg.vector_norm(p.detach(), dtype=torch.float64))
        size = norm / math.sqrt(max(1, p.numel())) or 1.0
        v[problem.blocks[name]] *= size
        aside[problem.blocks[name]] *= reach * size
    return _without_paddings(problem, aside), _without_paddings(problem, v)


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
            with torch.no_grad():
                ends.append(float(problem.raw_losses(batch)[0].double().sum()))
    return (ends[0] - ends[1]) / (2 * step), abs(ends[0] + ends[1] - 2 * loss) / (2 * step)


def curvature(problem: Problem, batch: Batch) -> None:
    """∇⟨∇Σs, v⟩ is a central difference of ∇Σs along v, in float64; without a look where no copy computes in it.

    A backward pass written by hand may be right and yet hide from autograd what it depends on (``torch.no_grad``,
    ``detach``); the double backward is then wrong, mostly symmetric, and nothing else tells.

    Raises:
        ValueError: if it is not.
    """
    finer = (problem, batch) if problem.dtype == torch.float64 else _in_float64(problem, batch)
    if finer is None:
        return
    problem, batch = finer
    where, v = _beside(problem)
    with problem.displaced(where), twice_differentiable(problem.model, problem.device):
        g = _flat_gradient(problem, batch, create_graph=True)
        if not g.requires_grad or not bool(torch.isfinite(g).all()):
            return  # a zero Hessian has no graph; the passes over the data name what is not finite
        parts = torch.autograd.grad(g @ v, list(problem.params.values()), materialize_grads=True)
        product = problem.flatten(parts)
        wide, narrow = (_gradient_slope(problem, batch, v, h) for h in (1e-7, 5e-8))  # few kinks within
    # A kink within the steps moves the narrow slope by twice what the two differ by.
    slack = 1e-3 * float(narrow.norm()) + 3 * float((wide - narrow).norm()) + 1e-6 * float(g.detach().norm())
    gap = float((product - narrow).norm())
    if gap > slack:
        raise ValueError(
            "Hessian: the second derivative must be that of the loss, got a product of norm "
            f"{float(product.norm()):.4g} that differs by {gap:.3g} from a central difference of gradients: a backward "
            "pass written by hand hides what it depends on (torch.no_grad, detach, saved numbers)"
        )


def _flat_gradient(problem: Problem, batch: Batch, *, create_graph: bool = False) -> Tensor:
    with torch.enable_grad():
        values, _ = problem.raw_losses(batch)
        parameters = list(problem.params.values())
        return problem.flatten(
            torch.autograd.grad(values.sum(), parameters, create_graph=create_graph, materialize_grads=True)
        )


def _gradient_slope(problem: Problem, batch: Batch, v: Tensor, step: float) -> Tensor:
    ends = []
    for sign in (1.0, -1.0):
        with problem.displaced(v * (sign * step)):
            ends.append(_flat_gradient(problem, batch))
    return (ends[0] - ends[1]) / (2 * step)
