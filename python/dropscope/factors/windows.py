"""The windows of a convolution: what each of its outputs saw of the input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """Where a kernel of 1 to 3 dimensions is laid on its input.

    Attributes:
        kernel: lengths.
        stride: places from one output to the next.
        padding: zeros before and after, of each dimension.
        dilation: places from one entry of the kernel to the next.
        groups: channels are cut into.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(
        cls,
        weight: Tensor,
        stride: int | Sequence[int],
        padding: str | int | Sequence[int],
        dilation: int | Sequence[int],
        groups: int,
    ) -> Window:
        """The window of a call of ``F.conv1d``, ``F.conv2d`` or ``F.conv3d``, which has accepted these arguments."""
        kernel = tuple(weight.shape[2:])
        steps, spread = _each(stride, len(kernel)), _each(dilation, len(kernel))
        if isinstance(padding, str):  # "valid", or "same": odd zeros go to the end
            total = [0 if padding == "valid" else d * (k - 1) for k, d in zip(kernel, spread, strict=True)]
            around = tuple((zeros // 2, zeros - zeros // 2) for zeros in total)
        else:
            around = tuple((zeros, zeros) for zeros in _each(padding, len(kernel)))
        return cls(kernel, steps, around, spread, groups)

    def patches(self, x: Tensor) -> Tensor:
        """What each output saw, channels before kernel entries, as the weight's rows are laid out.

        Args:
            x: (n, channels, *places).

        Returns:
            (n, groups, channels / groups · kernel entries, outputs), a copy.
        """
        x = F.pad(x, [zeros for pair in reversed(self.padding) for zeros in pair])
        n, channels, *places = x.shape
        batch, channel, *apart = x.stride()
        reach = [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]
        outputs = [(p - r) // s + 1 for p, r, s in zip(places, reach, self.stride, strict=True)]
        steps = [a * d for a, d in zip(apart, self.dilation, strict=True)]
        jumps = [a * s for a, s in zip(apart, self.stride, strict=True)]
        # Half of the time of F.unfold, which serves images only.
        view = x.as_strided((n, channels, *self.kernel, *outputs), (batch, channel, *steps, *jumps))
        return view.reshape(n, self.groups, channels // self.groups * math.prod(self.kernel), math.prod(outputs))


def _each(value: int | Sequence[int], length: int) -> tuple[int, ...]:
    """One number for each dimension."""
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * length if len(numbers) == 1 else numbers
