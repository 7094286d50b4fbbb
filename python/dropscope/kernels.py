"""The one caller of the compiled kernels: checks, choice of device, fallback to :mod:`dropscope.reference`."""

from __future__ import annotations

from dropscope.reference import (
    PROBE_SITE,
    ProbeKind,
    accumulate,
    apply_mask,
    gram,
    keep_mask,
    orthogonalize,
    probe,
    project,
    rotate,
    sq_norms,
)

__all__ = [
    "PROBE_SITE",
    "ProbeKind",
    "accumulate",
    "apply_mask",
    "gram",
    "keep_mask",
    "orthogonalize",
    "probe",
    "project",
    "rotate",
    "sq_norms",
]
