"""Whether a model is still the one that was seen: its modules, parameters and buffers, down to their bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Fingerprint:
    """What a model's parameters and buffers were at one moment, compared with them later in microseconds.

    Noticed is that a module, parameter or buffer was replaced, added or removed; that a tensor's data lie elsewhere
    (``p.data = ...``); a write by torch, which its version counts; and a write that has no version (through
    ``p.data.add_()``, numpy, another process), by the sum of the bits as integers. So the one thing not noticed is a
    write of this last kind that leaves the sum as it was, as a permutation of entries does.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        # References are held, so that no other object can come to have the same id or address.
        modules = list(model.modules())
        self._tables = [table for m in modules for table in (m._parameters, m._buffers, m._modules)]
        self._members = [member for table in self._tables for member in table.values()]
        self._ids = [id(member) for member in self._members]
        tensors = dict.fromkeys(member for member in self._members if isinstance(member, Tensor))
        self._tensors = list(tensors)
        self._counted = [t for t in self._tensors if not t.is_inference()]  # the others have no version
        words = [_words(t.detach()) for t in self._tensors if t.element_size() in _INTEGERS and t.numel()]
        short = [w.dtype == torch.int64 and w.dim() == 1 and len(w) <= _SHORT for w in words]
        self._short = [w for w, together in zip(words, short, strict=True) if together]
        self._long = [w for w, together in zip(words, short, strict=True) if not together]
        self._state = self._now()

    def outdated(self) -> bool:
        """Whether the model differs from what it was."""
        if [id(member) for table in self._tables for member in table.values()] != self._ids:
            return True
        return self._now() != self._state

    def _now(self) -> tuple[list[int], list[int], list[int]]:
        sums = [w.sum() for w in self._long]
        if self._short:  # together: calls of torch are what a small model's products spend their time on
            sums.append(torch.cat(self._short).sum())
        bits: list[int] = torch.stack(sums).tolist() if len(sums) > 1 else [int(total) for total in sums]
        return [t.data_ptr() for t in self._tensors], [t._version for t in self._counted], bits


_SHORT = 1 << 13  # words of a tensor that is copied to be summed with others
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _words(t: Tensor) -> Tensor:
    """The tensor's memory as integers, a view; long ones where they can be, for torch sums these ten times faster."""
    if t.is_contiguous() and t.numel() * t.element_size() % 8 == 0 and t.data_ptr() % 8 == 0:
        return t.view(-1).view(torch.int64)
    return t.view(_INTEGERS[t.element_size()])
