"""Kernels of the spectral room."""

from __future__ import annotations

from dropscope.reference import orthogonalize, probe, rotate

__all__ = ["orthogonalize", "probe", "rotate"]
