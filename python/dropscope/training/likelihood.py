"""Losses seen from the model's output: the losses of its elements, and vectors whose mean square is their Hessian."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropscope.losses import TokenLoss
from dropscope.mask_op import keep_rows
from dropscope.masks import SHARED_SAMPLE, MaskKey
from dropscope.training.sites import Sites, derived

_FUNCTIONS: dict[Callable[..., Any], nn.Module] = {
    F.cross_entropy: nn.CrossEntropyLoss(),
    F.mse_loss: nn.MSELoss(),
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss(),
}
_DIGITS = 24


class Likelihood:
    """A loss ℓ = Σₜ wₜ ℓₜ / W, a sum over elements t of the output (tokens, images, numbers).

    Attributes:
        total: W.
        shape: shape of the elements.
    """

    total: Tensor
    shape: torch.Size

    @abstractmethod
    def losses(self) -> Tensor:
        """wₜ ℓₜ for every element, differentiable."""

    @abstractmethod
    def sampled(self, seed: int, draw: int) -> Tensor:
        """sₜ for every element, random with E ∇sₜ = 0 and E ∇sₜ ∇sₜᵀ = wₜ ∂²ℓₜ/∂F², ∇ with respect to the output F."""

    def either(self, mine: Tensor, seed: int, draw: int) -> Tensor:
        """:meth:`sampled` at the elements of ``mine``, :meth:`losses` at the others."""
        return torch.where(mine, self.sampled(seed, draw), self.losses())

    @abstractmethod
    def columns(self) -> Iterator[tuple[Tensor, Tensor]]:
        """sₜ of one column at a time with the factor of its square: Σ factorₜ ∇sₜ ∇sₜᵀ = wₜ ∂²ℓₜ/∂F² exactly."""

    def rows(self, sites: Sites) -> Tensor:
        """int64, for every element the place of its sample in the batch."""
        count, shape, dim = len(sites.samples), self.shape, sites.batch_dim
        places = torch.arange(count, device=self.total.device)
        if len(shape) > dim and shape[dim] == count:
            return places.view(-1, *(1 for _ in shape[dim + 1 :])).expand(shape)
        if len(shape) and shape[0] % count == 0 and dim <= 1:
            flat = places.repeat_interleave(shape[0] // count) if dim == 0 else places.repeat(shape[0] // count)
            return flat.view(-1, *(1 for _ in shape[1:])).expand(shape)
        raise ValueError(f"likelihood: output must hold the {count} samples in dimension {dim}, got {tuple(shape)}")


class _Categorical(Likelihood):
    """Cross entropy on logits: ∂²ℓ/∂F² = diag(p̂) − p̂ p̂ᵀ = E_ŷ ∇log p̂_ŷ ∇log p̂_ŷᵀ, ŷ drawn from p̂ itself."""

    def __init__(self, logits: Tensor, target: Tensor, loss: nn.CrossEntropyLoss) -> None:
        self.logits = logits.movedim(1, -1) if logits.dim() > 1 else logits.unsqueeze(0)
        if self.logits.dtype in (torch.float16, torch.bfloat16):
            self.logits = self.logits.float()
        self.shape = self.logits.shape[:-1]
        soft = target.is_floating_point()
        if loss.weight is not None and (soft or loss.label_smoothing):
            raise ValueError("likelihood: class weights must go with class labels and no label smoothing")
        self.labels = None if soft or loss.label_smoothing else target.reshape(self.shape)
        self._given = logits, target, loss
        if soft:
            self.weights = target.sum(1 if target.dim() > 1 else 0).reshape(self.shape).to(self.logits.dtype)
            self.counted = torch.ones(self.shape, dtype=torch.bool, device=target.device)
            self.total = self.weights.new_tensor(float(self.weights.numel()))
        else:
            target = target.reshape(self.shape)
            self.counted = target != loss.ignore_index
            place = torch.where(self.counted, target, 0)
            self.weights = self.counted.to(self.logits.dtype)
            if loss.weight is not None:
                self.weights = self.weights * loss.weight.to(self.logits.dtype)[place]
            self.total = self.weights.sum()
        if loss.reduction == "sum":
            self.total = torch.ones_like(self.total)
        self._log: Tensor | None = None

    @property
    def log(self) -> Tensor:
        if self._log is None:
            self._log = F.log_softmax(self.logits, -1)
        return self._log

    def losses(self) -> Tensor:
        if self.labels is None:
            logits, target, loss = self._given
            plain = F.cross_entropy(logits, target, None, None, loss.ignore_index, None, "none", loss.label_smoothing)
            return plain.reshape(self.shape)
        return -self.weights * self._at(torch.where(self.counted, self.labels, 0))

    def sampled(self, seed: int, draw: int) -> Tensor:
        return self.weights.sqrt() * self._at(self._drawn(seed, draw))

    def either(self, mine: Tensor, seed: int, draw: int) -> Tensor:
        """One look-up for both: every further one would write an array of the size of the logits, twice."""
        if self.labels is None:
            return super().either(mine, seed, draw)
        labels = torch.where(mine, self._drawn(seed, draw), torch.where(self.counted, self.labels, 0))
        return torch.where(mine, self.weights.sqrt(), -self.weights) * self._at(labels)

    def _drawn(self, seed: int, draw: int) -> Tensor:
        log = self.log
        with torch.no_grad():
            cumulated = log.exp().cumsum(-1)
            u = uniform(self.shape.numel(), seed, draw, cumulated).view(*self.shape, 1)
            drawn = torch.searchsorted(cumulated, u * cumulated[..., -1:], right=True)[..., 0]
            return drawn.clamp_(max=cumulated.shape[-1] - 1)

    def columns(self) -> Iterator[tuple[Tensor, Tensor]]:
        for k in range(self.logits.shape[-1]):
            yield self.weights.sqrt() * self.log[..., k], self.log[..., k].exp()

    def _at(self, labels: Tensor) -> Tensor:
        return self.log.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


class _Numbers(Likelihood):
    """Losses of single numbers: squared error, ∂²ℓ/∂f² = 2; binary cross entropy on logits, σ(f)(1 − σ(f))."""

    def __init__(self, output: Tensor, target: Tensor, loss: nn.MSELoss | nn.BCEWithLogitsLoss) -> None:
        if output.shape != target.shape:
            raise ValueError(
                f"likelihood: output and target must have one shape, got {tuple(output.shape)}, {tuple(target.shape)}"
            )
        if getattr(loss, "pos_weight", None) is not None:
            raise ValueError("likelihood: loss must be a likelihood, got one with pos_weight")
        self.binary = isinstance(loss, nn.BCEWithLogitsLoss)
        self.output, self.target, self.shape = output, target, output.shape
        weight = getattr(loss, "weight", None)
        self.weights = torch.ones_like(output, requires_grad=False)
        if weight is not None:
            self.weights = self.weights * weight
        self.total = self.weights.new_tensor(1.0 if loss.reduction == "sum" else float(output.numel()))

    def losses(self) -> Tensor:
        if self.binary:
            plain = F.binary_cross_entropy_with_logits(self.output, self.target, reduction="none")
        else:
            plain = (self.output - self.target).square()
        return self.weights * plain

    def sampled(self, seed: int, draw: int) -> Tensor:
        u = uniform(self.shape.numel(), seed, draw, self.output).view(self.shape)
        if self.binary:
            drawn = (u < self.output.detach().sigmoid()).to(self.output.dtype)
            return -self.weights.sqrt() * F.binary_cross_entropy_with_logits(self.output, drawn, reduction="none")
        return (2.0 * self.weights).sqrt() * torch.where(u < 0.5, 1.0, -1.0).to(u.dtype) * self.output

    def columns(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows = self.output.flatten(1) if self.output.dim() > 1 else self.output.unsqueeze(1)
        bend = 2.0 * torch.ones_like(rows) if not self.binary else rows.sigmoid() * (1.0 - rows.sigmoid())
        factor = bend * self.weights.reshape(rows.shape)
        for k in range(rows.shape[1]):
            yield rows[:, k], factor[:, k]


def likelihood(name: str, loss: Any, output: Any, target: Any) -> Likelihood:
    """The form of a loss that the penalties need.

    Args:
        name: of the caller, for errors.
        loss: cross entropy, squared error or binary cross entropy on logits, as torch's module or function, or
            ``losses.causal_lm()`` or ``losses.masked_lm()``.
        output: what the model returned; ``.logits`` of it where there is one.
        target: as the loss takes it.

    Raises:
        TypeError: for another loss, or if output or target is no tensor.
    """
    output = output if isinstance(output, Tensor) else getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise TypeError(f"{name}: output must be a tensor or have .logits, got {type(output).__name__}")
    if isinstance(loss, TokenLoss):
        labels = loss._labels(target)
        if loss.shift:
            output, labels = output[:, :-1], labels[:, 1:]
        return _Categorical(output.mT, labels, nn.CrossEntropyLoss(ignore_index=loss.ignore_index))
    loss = _FUNCTIONS.get(loss, loss) if callable(loss) else loss
    if not isinstance(target, Tensor):
        raise TypeError(f"{name}: target must be a tensor, got {type(target).__name__}")
    if isinstance(loss, nn.CrossEntropyLoss | nn.MSELoss | nn.BCEWithLogitsLoss):
        if loss.reduction not in ("mean", "sum"):
            raise ValueError(f"{name}: loss must have reduction 'mean' or 'sum', got {loss.reduction!r}")
        kind = _Categorical if isinstance(loss, nn.CrossEntropyLoss) else _Numbers
        return kind(output, target, loss)  # type: ignore[arg-type]
    raise TypeError(
        f"{name}: loss must be cross entropy, squared error or binary cross entropy on logits (torch's module or "
        f"function, or losses.causal_lm, losses.masked_lm), got {loss!r}"
    )


def uniform(count: int, seed: int, draw: int, like: Tensor) -> Tensor:
    """Numbers of 24 binary digits, uniform in [0, 1), a function of seed and draw."""
    stream = torch.tensor([draw << 32 | SHARED_SAMPLE], device=like.device) if draw < 1 << 31 else None
    if stream is None:
        stream = torch.tensor([(draw << 32 | SHARED_SAMPLE) - (1 << 64)], device=like.device)
    bits = keep_rows(stream, count * _DIGITS, seed, 0, 1 << 15).view(count, _DIGITS)
    places = 2.0 ** -torch.arange(1, _DIGITS + 1, dtype=like.dtype, device=like.device)
    return bits.to(like.dtype) @ places


def labels_seed(key: MaskKey) -> int:
    """Seed of the sampled labels of a key."""
    return derived(key.seed, "labels")
