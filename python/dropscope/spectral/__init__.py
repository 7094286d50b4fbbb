"""Eigenpairs, spectral densities, traces and diagonals of any symmetric operator, each with its error."""

from dropscope.spectral.eigenpairs import Eigenpairs, EigenStatus
from dropscope.spectral.lanczos import eigsh

__all__ = ["EigenStatus", "Eigenpairs", "eigsh"]
