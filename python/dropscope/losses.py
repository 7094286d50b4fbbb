"""Losses as the (value, weight) of each sample, so that a risk is an exact mean over the whole data set."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Losses whose elements carry the class weight of their target into the mean's denominator.
_CLASS_WEIGHTED = (nn.CrossEntropyLoss, nn.NLLLoss)
# Losses of two tensors of one shape; torch would broadcast them, which is never what was meant.
_ELEMENTWISE = (
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.KLDivLoss,
    nn.PoissonNLLLoss,
    nn.SoftMarginLoss,
    nn.HingeEmbeddingLoss,
)
_OF_SCORES = (nn.MultiMarginLoss, nn.MultiLabelMarginLoss, nn.MultiLabelSoftMarginLoss)
_OF_PAIRS = (nn.CosineEmbeddingLoss, nn.MarginRankingLoss)
_OF_TRIPLES = (nn.TripletMarginLoss, nn.TripletMarginWithDistanceLoss)
_KNOWN = (*_CLASS_WEIGHTED, *_ELEMENTWISE, nn.GaussianNLLLoss, *_OF_SCORES, *_OF_PAIRS, *_OF_TRIPLES)

REMEDY = (
    "return one value per sample, shape (batch,), or a pair (values, weights) of such vectors; "
    "for a torch loss pass the module, e.g. torch.nn.CrossEntropyLoss()"
)

Loss = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class SampleLoss:
    """A loss in the form that a risk needs: (output, target, rows) -> values and weights, one of each per row.

    The risk is R = Σᵢ sᵢ / W. Under ``reduction="mean"`` sᵢ sums the losses of sample i's elements and wᵢ their
    weights, W = Σᵢ wᵢ; under ``"batchmean"`` wᵢ = 1; under ``"sum"`` W = 1, whatever the weights.

    Attributes:
        loss: what the user passed.
        reduction: ``"mean"``, ``"batchmean"`` or ``"sum"``.
        elements: the same torch loss without its reduction; None for a callable.
        batch_dim: the dimension of the sample in the elements.
    """

    loss: Loss
    reduction: str
    elements: nn.Module | None
    batch_dim: int

    @staticmethod
    def of(loss: Loss, batch_dim: int = 0, device: torch.device | None = None) -> SampleLoss:
        """Return the per-sample form of a loss.

        Args:
            loss: a torch loss module, or a callable ``loss(output, target)`` with one value per sample.
            batch_dim: the dimension of the sample.
            device: where the loss's own weights shall live.

        Raises:
            TypeError: if it is not callable, or a torch loss that has no per-sample form.
            ValueError: if its reduction or its weight cannot be told apart by sample.
        """
        if isinstance(loss, type):
            raise TypeError(f"Problem: loss must be an instance, e.g. {loss.__name__}(), got the class itself")
        if not callable(loss):
            raise TypeError(f"Problem: loss must be a torch loss or a callable, got {type(loss).__name__}")
        module = type(loss).__module__
        kind = next((base for base in type(loss).__mro__ if base in _KNOWN), None)
        inherited = kind is not None and type(loss).forward is kind.forward  # type: ignore[attr-defined]
        if not inherited or getattr(loss, "reduction", None) == "none":
            if kind is None and module in ("torch.nn.modules.loss", "torch.nn.modules.adaptive"):
                raise TypeError(f"Problem: loss {type(loss).__name__} has no per-sample form here; {REMEDY}")
            return SampleLoss(loss, "mean", None, batch_dim)
        assert isinstance(loss, nn.Module)
        reduction = str(loss.reduction)
        allowed = ("mean", "sum", "batchmean") if isinstance(loss, nn.KLDivLoss) else ("mean", "sum")
        if reduction not in allowed:
            raise ValueError(f"Problem: loss reduction must be one of {allowed}, got {reduction!r}")
        elements = copy.deepcopy(loss).to(device)
        elements.__dict__["reduction"] = "none"
        return SampleLoss(loss, reduction, elements, batch_dim)

    def __call__(self, output: Any, target: Any, rows: int) -> tuple[Tensor, Tensor]:
        """Return values (graph attached) and weights (detached), both of shape (rows,).

        Raises:
            TypeError: if the model's output or the target is not what the loss takes.
            ValueError: if shapes do not fit, or a callable returned something else than one value per sample.
        """
        if self.elements is None:
            return self._of_callable(self.loss(output, target), rows)
        if isinstance(target, Mapping):
            if "labels" not in target:
                name = type(self.loss).__name__
                raise ValueError(f"Problem: a mapping batch must have 'labels' for {name}, got keys {list(target)}")
            target = target["labels"]
        losses = self._elementwise(output, target)
        values = self._by_sample(losses, rows)
        if self.reduction != "mean":
            return values, torch.ones_like(values, requires_grad=False)
        if isinstance(self.loss, _CLASS_WEIGHTED) and not target.is_floating_point():
            return values, self._by_sample(self._class_weights(target).to(values.dtype), rows)
        return values, torch.full_like(values, losses.numel() / rows, requires_grad=False)

    def _elementwise(self, output: Any, target: Any) -> Tensor:
        """The loss of every element, as torch computes it under ``reduction="none"``."""
        assert self.elements is not None
        name = type(self.loss).__name__
        if not isinstance(output, (Tensor, tuple, list)) and hasattr(output, "logits"):
            output = output.logits
        count = 2 if isinstance(self.loss, (*_OF_PAIRS, nn.GaussianNLLLoss)) else 3
        if isinstance(self.loss, (*_OF_PAIRS, *_OF_TRIPLES, nn.GaussianNLLLoss)):
            if not isinstance(output, (tuple, list)) or len(output) != count:
                raise TypeError(f"Problem: for {name} the model must return {count} tensors, got {_describe(output)}")
            if isinstance(self.loss, nn.GaussianNLLLoss):
                output = (output[0], target, output[1])
            elif isinstance(self.loss, _OF_PAIRS):
                output = (*output, target)
            return _tensor(self.elements(*output))
        if not isinstance(output, Tensor):
            raise TypeError(
                f"Problem: for {name} the model must return a tensor, got {_describe(output)}; "
                "give forward=lambda model, batch: ... to pick one"
            )
        if not isinstance(target, Tensor):
            raise TypeError(f"Problem: the target of {name} must be a tensor, got {_describe(target)}")
        if isinstance(self.loss, _ELEMENTWISE):
            self._check_elementwise(output, target)
            if torch._C._are_functorch_transforms_active():
                # Two nested vmaps over the output alone break torch 2.13's rule for the squared and Huber losses.
                target = target + torch.zeros_like(output)
        return _tensor(self.elements(output, target))

    def _check_elementwise(self, output: Tensor, target: Tensor) -> None:
        name = type(self.loss).__name__
        if output.shape != target.shape:
            raise ValueError(
                f"Problem: {name} needs output and target of one shape, got {tuple(output.shape)} and "
                f"{tuple(target.shape)}"
            )
        for field in ("weight", "pos_weight"):
            weight = getattr(self.elements, field, None)
            dim = self.batch_dim + (0 if weight is None else weight.ndim - output.ndim)
            if weight is not None and dim >= 0 and weight.shape[dim] != 1:
                raise ValueError(
                    f"Problem: {name}'s {field} must not vary along the sample dimension (its rows would belong to "
                    f"positions in a batch, not to samples), got shape {tuple(weight.shape)}; return (values, weights)"
                )

    def _class_weights(self, target: Tensor) -> Tensor:
        """Weight of each element: its class's weight, 0 where the target is ignored."""
        ignore = int(self.elements.ignore_index)  # type: ignore[union-attr, arg-type]
        counts = target != ignore
        weight = self.elements.weight  # type: ignore[union-attr]
        if not isinstance(weight, Tensor):
            return counts
        return weight[torch.where(counts, target, 0)] * counts

    def _by_sample(self, elements: Tensor, rows: int) -> Tensor:
        """Sum all but the sample's dimension; B·k rows are k rows of each sample, batch-major."""
        if elements.ndim > self.batch_dim and elements.shape[self.batch_dim] == rows:
            return elements.movedim(self.batch_dim, 0).reshape(rows, -1).sum(1)
        if elements.ndim and elements.shape[0] and elements.shape[0] % rows == 0:
            return elements.reshape(rows, -1).sum(1)
        raise ValueError(
            f"Problem: {type(self.loss).__name__} gave elements of shape {tuple(elements.shape)}; dimension "
            f"{self.batch_dim} must be the {rows} samples of the batch (see batch_dim=)"
        )

    def _of_callable(self, result: Any, rows: int) -> tuple[Tensor, Tensor]:
        values, weights = result if isinstance(result, (tuple, list)) and len(result) == 2 else (result, None)
        for name, part in (("values", values), ("weights", weights)):
            if part is None and name == "weights":
                continue
            if not isinstance(part, Tensor):
                raise TypeError(f"Problem: loss must return tensors, got {_describe(part)} for the {name}; {REMEDY}")
            if part.shape != (rows,):
                what = "a scalar" if part.ndim == 0 else f"shape {tuple(part.shape)}"
                raise ValueError(f"Problem: loss must return {name} of shape ({rows},), got {what}; {REMEDY}")
        if not values.is_floating_point():
            raise TypeError(f"Problem: loss must return floating values, got {values.dtype}")
        if weights is None:
            return values, torch.ones_like(values, requires_grad=False)
        return values, weights.detach().to(values.dtype)


@dataclass(frozen=True)
class TokenLoss:
    """Cross entropy summed over a sequence's tokens, weighted by their number; see :func:`causal_lm`."""

    ignore_index: int = -100
    shift: bool = True

    def __call__(self, output: Any, batch: Any) -> tuple[Tensor, Tensor]:
        """Return per-sequence sums of token losses and token counts."""
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits.ndim != 3:
            raise TypeError(f"token loss: logits must have shape (batch, time, vocabulary), got {_describe(logits)}")
        labels = self._labels(batch)
        if labels.shape != logits.shape[:2]:
            raise ValueError(f"token loss: labels must have shape {tuple(logits.shape[:2])}, got {tuple(labels.shape)}")
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        losses = F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=self.ignore_index, reduction="none"
        )
        return losses.reshape(labels.shape).sum(1), (labels != self.ignore_index).sum(1).to(losses.dtype)

    def _labels(self, batch: Any) -> Tensor:
        if isinstance(batch, Tensor):
            return batch
        if isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor):
            labels: Tensor = batch["labels"]
            return labels
        if self.shift and isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
            mask = batch.get("attention_mask")
            ids: Tensor = batch["input_ids"]
            return ids if mask is None else ids.masked_fill(mask == 0, self.ignore_index)
        raise TypeError(f"token loss: the target must be a tensor or a mapping with 'labels', got {_describe(batch)}")


def causal_lm(ignore_index: int = -100) -> TokenLoss:
    """Next-token cross entropy: R is the mean over all predicted tokens of the data set.

    sᵢ = Σₜ −log softmax(logits[i, t])[labels[i, t+1]], wᵢ = the number of terms.

    Args:
        ignore_index: label that does not count.

    Returns:
        A loss for :class:`dropscope.Problem`. Targets are labels of shape (batch, time), or a mapping with
        ``"labels"``, else with ``"input_ids"`` and ``"attention_mask"``. Half-precision logits are summed in float32.

    Example:
        >>> causal_lm()(torch.zeros(1, 3, 2), torch.tensor([[0, 1, -100]]))[1]
        tensor([1.])
    """
    return TokenLoss(ignore_index, shift=True)


def masked_lm(ignore_index: int = -100) -> TokenLoss:
    """Cross entropy of the labelled tokens (BERT's pre-training loss); as :func:`causal_lm` without the shift."""
    return TokenLoss(ignore_index, shift=False)


def _tensor(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"Problem: the loss must return a tensor, got {_describe(value)}")
    return value


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__
