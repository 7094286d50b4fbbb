"""The model while it is measured: its mode switched and its kernels chosen for a block, then as it was found."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

_SPECTRAL = getattr(nn.utils.parametrizations, "_SpectralNorm", _NormBase)
# In train mode these couple the samples of a batch, or write to their buffers.
_COUPLING: tuple[type[nn.Module], ...] = (_NormBase, _SPECTRAL)
_WEIGHT_NORM: type = getattr(nn.utils.parametrizations, "_WeightNorm", WeightNorm)


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


@contextmanager
def twice_differentiable(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Run a block in kernels with a right second derivative: plain attention and weight norm, RNNs without cuDNN."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(map(_weight_normed, model.modules())):
            stack.enter_context(_PlainWeightNorm())
        if device.type == "cuda" and any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


def _weight_normed(module: nn.Module) -> bool:
    hooks = module._forward_pre_hooks.values()  # where torch's older weight_norm lives
    return isinstance(module, _WEIGHT_NORM) or any(isinstance(hook, WeightNorm) for hook in hooks)


class _PlainWeightNorm(TorchFunctionMode):
    """Weight norm by elementary operations: the second derivative of torch's fused one is wrong, without an error."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._weight_norm:
            return _plain_weight_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _plain_weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device has units that multiply bfloat16 matrices; elsewhere torch takes longer than in float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def rounds_products(x: Tensor) -> bool:
    """Whether torch may round the operands of products of x to 11 bits: float32 on a device, unless TF32 is off.

    By default it is on in convolutions and recurrent layers, off in matrix products.
    """
    if not x.is_cuda or x.dtype != torch.float32:
        return False
    return bool(torch.backends.cudnn.allow_tf32) or torch.get_float32_matmul_precision() != "highest"


def dual(value: Tensor, tangent: Tensor) -> Tensor:
    """Return value + tangent·ε inside a dual level, differentiable by autograd too."""
    with warnings.catch_warnings():
        # The first dual number of a process makes torch compile rules with its own, deprecated, compiler.
        warnings.simplefilter("ignore", DeprecationWarning)
        number: Tensor = forward_ad.make_dual(value, tangent)  # type: ignore[no-untyped-call]
    return number
