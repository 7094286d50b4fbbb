"""One forward and one activation-gradient pass -> the per-sample gradients of every parameter that has a rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dropscope import kernels
from dropscope.factors.blocks import materialise
from dropscope.factors.recorder import Recorder
from dropscope.factors.uses import Factors, Layout, UnfitError, Use
from dropscope.kernels import FirstOperand, Masked
from dropscope.masks import MaskKey
from dropscope.problem import Batch, Problem

Part = Factors | Tensor


def record(
    problem: Problem, batch: Batch, names: Mapping[int, str], key: MaskKey | None, draws: int
) -> tuple[list[Use], list[Tensor | None]]:
    """Run one pass over a batch under the draws key.draw, key.draw + 1, ...

    Args:
        problem: the problem.
        batch: one of its batches.
        names: id of a parameter -> its name, for the parameters to capture; no weight gradient of these is computed.
        key: the first draw; None switches dropout off.
        draws: number of draws.

    Returns:
        The uses of the parameters, and the gradient of scale·s_r with respect to the output of each.

    Raises:
        ValueError: if a gradient is not finite.
    """
    recorder = Recorder(names, batch.size, draws)
    with torch.enable_grad(), kernels.faster_products(2.0 * recorder.rows * problem.dim):
        values, _ = problem.sample_losses(batch, key, draws, handlers=recorder.handlers())
        if not recorder.uses:
            return [], []
        seedling = torch.full_like(values, problem.scale)
        recorder.forget()
        found = torch.autograd.grad([values], [use.edge for use in recorder.uses], [seedling], allow_unused=True)
    gradients: list[Tensor | None] = list(found)
    for i, (use, gradient) in enumerate(zip(recorder.uses, list(gradients), strict=True)):
        if gradient is None:
            continue
        require_finite(gradient, batch, key, draws)
        if use.dtype != problem.dtype:  # autocast inside the model, which rounds the inputs too
            gradients[i] = gradient.to(problem.dtype)
            if isinstance(use.inputs, Tensor) and use.inputs.is_floating_point():
                use.inputs = use.inputs.to(use.dtype).to(problem.dtype)
    return recorder.uses, gradients


def require_finite(gradient: Tensor, batch: Batch, key: MaskKey | None, draws: int) -> None:
    """Raise ValueError naming the batch if a gradient holds NaN or Inf; its sum does if and only if one does."""
    if not bool(torch.isfinite(gradient.sum())):
        masks = "dropout off" if key is None else f"draws {key.draw} to {key.draw + draws - 1} of seed {key.seed}"
        raise ValueError(
            f"GradientNoise: gradients must be finite, got NaN or Inf in batch {batch.index} "
            f"(samples {int(batch.samples[0])} to {int(batch.samples[-1])}, {masks})"
        )


def part_of(
    name: str, uses: Sequence[Use], gradients: Sequence[Tensor | None], samples: int, draws: int, layout: Layout
) -> Part:
    """Gradients of one parameter, summed over its uses.

    Args:
        name: the parameter.
        uses: all uses of the pass.
        gradients: the gradient of each use's output.
        samples: samples in the pass.
        draws: draws of each.
        layout: which axis of the captured tensors is the row.

    Returns:
        Factors, or (rows, numel) gradients where a rule gives these.

    Raises:
        UnfitError: if nothing was captured, or a use has no row per sample and draw.
    """
    rows = samples * draws
    found: list[Part] = []
    for use, b in zip(uses, gradients, strict=True):
        if name not in (use.weight, use.bias):
            continue
        if b is None:  # an output that the loss does not depend on
            continue
        if name == use.weight:
            found.append(use.weight_part(use.inputs, b, rows, layout))
        if name == use.bias:
            found.append(use.bias_part(b, rows, layout))
    if not found:
        raise UnfitError("no function with a rule consumes it")
    for part in found:
        if (part.B if isinstance(part, Factors) else part).shape[0] != rows:
            raise UnfitError("its gradient has no row for each sample and draw")
    if len(found) == 1:
        return found[0]
    if all(isinstance(part, Factors) for part in found):
        # The sum over t runs over all uses of a tied weight.
        factors = [part for part in found if isinstance(part, Factors)]
        return Factors(torch.cat([spread(f.A, rows) for f in factors], 1), torch.cat([f.B for f in factors], 1))
    return torch.stack([rows_of(part) for part in found]).sum(0)


def rows_of(part: Part) -> Tensor:
    """(rows, numel) gradients of a part."""
    return materialise(part.A, part.B) if isinstance(part, Factors) else part


def spread(A: FirstOperand, rows: int) -> Tensor:
    """One row per draw of a tensor that the draws share."""
    A = kernels.whole(A)
    return A if A.shape[0] == rows else A.repeat_interleave(rows // A.shape[0], 0)


def join_draws(parts: Sequence[Part], samples: int) -> Part:
    """Parts of groups of draws of the same samples -> one part, sample-major."""
    if len(parts) == 1:
        part = parts[0]
        if isinstance(part, Factors) and isinstance(part.A, Masked) and part.B.shape[0] == samples:
            return Factors(kernels.whole(part.A), part.B)  # a single draw shares nothing
        return part
    factors = [part for part in parts if isinstance(part, Factors)]
    if not factors:
        return _interleave([part for part in parts if isinstance(part, Tensor)], samples)
    B = _interleave([f.B for f in factors], samples)
    shared = _shared([f.A for f in factors], samples)
    if shared is not None:
        return Factors(shared, B)
    return Factors(_interleave([spread(f.A, f.B.shape[0]) for f in factors], samples), B)


def _shared(operands: Sequence[FirstOperand], samples: int) -> FirstOperand | None:
    """One operand for all groups of draws where they share it, or share what their masks are on."""
    masked = [A for A in operands if isinstance(A, Masked)]
    plain = [A.x if isinstance(A, Masked) else A for A in operands]
    if any(A.shape[0] != samples or not torch.equal(A, plain[0]) for A in plain):
        return None
    if not masked:
        return plain[0]
    if len(masked) < len(operands) or any(A.mask != masked[0].mask for A in masked):
        return None
    streams = _interleave([A.streams for A in masked], samples)
    return Masked(plain[0], streams, *masked[0].mask)


def _interleave(tensors: Sequence[Tensor], samples: int) -> Tensor:
    return torch.cat([t.reshape(samples, -1, *t.shape[1:]) for t in tensors], 1).flatten(0, 1)
