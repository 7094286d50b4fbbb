"""The model's mode while it is measured: switched for a block, then as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

# In train mode these couple the samples of a batch, or write to their buffers.
_COUPLING: tuple[type[nn.Module], ...] = (_NormBase, nn.utils.parametrizations._SpectralNorm)


@contextmanager
def mode(model: nn.Module, train: bool) -> Iterator[None]:
    """Run a block in train mode, batch and instance normalisation excepted, or in eval mode.

    The flags are written directly: a model's own ``train()`` may do more than set them.
    """
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, was in before:
            wanted = train and not isinstance(module, _COUPLING)
            if was != wanted:
                module.training = wanted
        yield
    finally:
        for module, was in before:
            if module.training != was:
                module.training = was
