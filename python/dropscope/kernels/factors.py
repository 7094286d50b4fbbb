"""Kernels of the factors room."""

from __future__ import annotations

from dropscope.reference import accumulate, gram, project, sq_norms

__all__ = ["accumulate", "gram", "project", "sq_norms"]
