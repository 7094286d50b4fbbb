"""Which route each parameter's per-sample gradients take, decided on the first batch and proved there.

Nothing is assumed about the network: the captured factors of a parameter must reproduce one gradient with random
weights on the rows. Module hooks pass weaker tests ("the sum equals the gradient") with wrong rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dropscope import kernels
from dropscope.factors.capture import Part, part_of, record
from dropscope.factors.fallback import groups_work
from dropscope.factors.uses import LAYOUTS, Layout, UnfitError, Use
from dropscope.kernels import Masked
from dropscope.masks import MaskKey, Sharing
from dropscope.problem import Batch, Problem

Kind = Literal["factors", "rows", "dense", "matrix_free"]
# An odd number, so that it is not by chance the length of a sequence.
TRIAL_SAMPLES = 13
TRIAL_DRAWS = 2
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
COARSE = 5e-2  # of the shorter dtypes


@dataclass(frozen=True)
class Route:
    """How the per-sample gradients of one parameter are had.

    Attributes:
        kind: ``"factors"``: Σ_t b_t a_tᵀ, kept as a and b; ``"rows"``: materialised from the same capture, where that
            is smaller; ``"dense"``: materialised by ``vmap`` or one sample at a time; ``"matrix_free"``: products only.
        reason: why, in words.
        layout: which axis of the captured tensors is the row.
    """

    kind: Kind
    reason: str
    layout: Layout = "rows"


@dataclass
class Plan:
    """Routes of all parameters, and what they cost.

    Attributes:
        routes: parameter -> route.
        biases: weight -> bias that has the very same uses, so that one block serves both.
        shared_bytes: bytes that the stored gradients of one sample take whatever the number of its draws.
        draw_bytes: bytes that each of its draws takes besides.
        pass_bytes: bytes that one row of a pass keeps for its backward.
        grouped: ``vmap`` over samples gives the rows of the ``"dense"`` parameters.
    """

    routes: dict[str, Route] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    shared_bytes: int = 0
    draw_bytes: int = 0
    pass_bytes: int = 0
    grouped: bool = False

    def names(self, *kinds: Kind) -> list[str]:
        """Parameters on these routes."""
        return [name for name, route in self.routes.items() if route.kind in kinds]


def make_plan(problem: Problem, batch: Batch, seed: int, draws: int, budget: int) -> Plan:
    """Decide the routes on a few samples of the first batch.

    Args:
        problem: the problem; its ``routes`` are filled.
        batch: the first batch.
        seed: seed of the masks.
        draws: draws M that will be taken.
        budget: bytes for stored gradients; decides between materialised and matrix-free.

    Returns:
        The plan.

    Raises:
        ValueError: if a gradient is not finite.
    """
    trial = batch.select(slice(0, min(batch.size, TRIAL_SAMPLES)))
    trial_draws = min(draws, TRIAL_DRAWS)
    rows = trial.size * trial_draws
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(rows, generator=generator, dtype=torch.float64).to(problem.device, problem.dtype)
    plan = Plan()
    truth = _weighted_gradient(problem, trial, MaskKey(seed, 0), trial_draws, weights, plan)
    ids = {id(p): name for name, p in problem.params.items()}
    uses, gradients = record(problem, trial, ids, MaskKey(seed, 0), trial_draws)
    dense_room = budget // 2
    for name, parameter in problem.params.items():
        found, reason = _find(name, uses, gradients, trial.size, trial_draws, weights, truth)
        if found is not None:
            layout, part = found
            plan.routes[name], shared, each = _stored(part, layout, parameter.numel(), trial.size, draws)
            plan.shared_bytes += shared * parameter.element_size()
            plan.draw_bytes += each * parameter.element_size()
            continue
        size = parameter.numel() * parameter.element_size()
        if size * draws * problem.n <= dense_room:
            dense_room -= size * draws * problem.n
            plan.draw_bytes += size
            plan.routes[name] = Route("dense", f"{reason}; small enough to materialise")
        else:
            plan.routes[name] = Route("matrix_free", f"{reason}; too large to materialise")
    _pair(plan, uses)
    dense = plan.names("dense")
    if dense:
        plan.grouped = groups_work(problem, trial, dense, MaskKey(seed, 0), weights, truth)
    problem.routes.update({name: f"{route.kind}: {route.reason}" for name, route in plan.routes.items()})
    return plan


def draws_masks(problem: Problem, batch: Batch, seed: int, sharing: Sharing) -> bool:
    """Whether a pass draws a mask at all; where none is drawn the draws are equal, and not to rounding only."""
    seen = _MaskWatch()
    with torch.no_grad(), seen:
        problem.sample_losses(batch.select(slice(0, 1)), MaskKey(seed, 0), sharing=sharing)
    return seen.found


class _MaskWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notices the mask operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found = self.found or func.namespace == "dropscope"
        return func(*args, **(kwargs or {}))


def _weighted_gradient(
    problem: Problem, batch: Batch, key: MaskKey, draws: int, weights: Tensor, plan: Plan
) -> dict[str, Tensor]:
    """Σ_r weights_r g_r by plain autograd, flat per parameter; counts what a row keeps."""
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return t

    parameters = list(problem.params.values())
    own = {p.untyped_storage().data_ptr() for p in problem.model.parameters()}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        values, _ = problem.sample_losses(batch, key, draws)
        gradients = torch.autograd.grad(
            values, parameters, weights.to(values.dtype) * problem.scale, allow_unused=True, materialize_grads=True
        )
    kept = sum(size for address, size in seen.items() if address not in own)
    plan.pass_bytes = max(1, kept // len(values))
    return {name: g.detach().reshape(-1) for name, g in zip(problem.params, gradients, strict=True)}


def _find(
    name: str,
    uses: list[Use],
    gradients: list[Tensor | None],
    samples: int,
    draws: int,
    weights: Tensor,
    truth: Mapping[str, Tensor],
) -> tuple[tuple[Layout, Part] | None, str]:
    """The first layout whose rows reproduce the weighted gradient, or None and why."""
    reason = ""
    dtypes = {weights.dtype, *(use.dtype for use in uses if name in (use.weight, use.bias))}
    tolerance = max(TOLERANCE.get(dtype, COARSE) for dtype in dtypes)
    expected = truth[name].double()
    floor = 1e-6 * max(float(g.double().norm()) for g in truth.values())
    for layout in LAYOUTS:
        try:
            part = part_of(name, uses, gradients, samples, draws, layout)
        except (UnfitError, RuntimeError) as error:
            reason = reason or f"no factors ({error})"
            continue
        gap = float((_combine(part, weights).double() - expected).norm())
        if gap <= tolerance * max(float(expected.norm()), floor):
            return (layout, part), ""
        reason = "its factors do not reproduce a gradient with random sample weights"
    return None, reason


def _combine(part: Part, weights: Tensor) -> Tensor:
    """Σ_r weights_r g_r of a part, flat."""
    if isinstance(part, Tensor):
        return weights @ part
    out = part.B.new_zeros(1, part.B.shape[2], part.A.shape[2])
    kernels.accumulate(part.A, part.B, weights.unsqueeze(1), out)
    return out.reshape(-1)


def _stored(part: Part, layout: Layout, numel: int, samples: int, draws: int) -> tuple[Route, int, int]:
    """Route of a captured parameter, and how many numbers a sample stores, once and for each of its draws."""
    if isinstance(part, Tensor):
        return Route("rows", "the rule gives its rows", layout), 0, numel
    masked = isinstance(part.A, Masked)
    shared = masked or (draws > 1 and part.A.shape[0] == samples)
    a, b = part.A.shape[1] * part.A.shape[2], part.B.shape[1] * part.B.shape[2]
    b += -(-8 // part.B.element_size()) if masked else 0  # a stream each
    size = a * (1 if shared else draws) + b * draws
    if size < numel * draws:
        reason = f"{part.A.shape[1]} x ({part.A.shape[2]} + {part.B.shape[2]}) numbers instead of {numel}"
        reason += ", inputs shared by the draws" if shared else ""
        reason += " up to their masks, which are remade" if masked else ""
        return Route("factors", reason, layout), a if shared else 0, b if shared else a + b
    return Route("rows", f"{numel} numbers are fewer than its factors {a} + {b}", layout), 0, numel


def _pair(plan: Plan, uses: list[Use]) -> None:
    """Find the biases that can ride with their weight."""
    for name in plan.names("factors"):
        mine = [use for use in uses if use.weight == name]
        bias = mine[0].bias if mine else None
        if bias is None or bias not in plan.routes or plan.routes[bias].kind != "rows":
            continue
        same = [use for use in uses if bias in (use.weight, use.bias)]
        fits = len(same) == len(mine) and all(use.paired and use.bias == bias for use in mine)
        if fits and plan.routes[bias].layout == plan.routes[name].layout:
            plan.biases[name] = bias
