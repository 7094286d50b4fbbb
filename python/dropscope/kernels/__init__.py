"""The one caller of the compiled kernels: checks, choice of device, fallback to :mod:`dropscope.reference`.

A kernel runs compiled where it can: on ordinary CPU tensors, and on CUDA tensors where the build has it for CUDA.
Everything else (fake, functional and wrapped tensors, other devices, other dtypes) takes the reference.
Kernels are not differentiable; the operations built on them are.
"""

from __future__ import annotations

from dropscope.kernels._launch import isa
from dropscope.kernels.factors import accumulate, center, gram, gram_sum, project, sq_norms
from dropscope.kernels.integers import Rounded, gram_rounded, native_int8, round_rows
from dropscope.kernels.masked import FirstOperand, Masked, whole
from dropscope.kernels.masks import apply_mask, keep_mask
from dropscope.kernels.products import faster_products, multiply
from dropscope.kernels.spectral import orthogonalize, orthogonalize_async, probe, rotate
from dropscope.reference import PROBE_SITE, ProbeKind

__all__ = [
    "PROBE_SITE",
    "FirstOperand",
    "Masked",
    "ProbeKind",
    "Rounded",
    "accumulate",
    "apply_mask",
    "center",
    "faster_products",
    "gram",
    "gram_rounded",
    "gram_sum",
    "isa",
    "keep_mask",
    "multiply",
    "native_int8",
    "orthogonalize",
    "orthogonalize_async",
    "probe",
    "project",
    "rotate",
    "round_rows",
    "sq_norms",
    "whole",
]
