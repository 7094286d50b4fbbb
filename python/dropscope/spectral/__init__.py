"""Eigenpairs, spectral densities, traces and diagonals of any symmetric operator, each with its error."""

from dropscope.spectral.density import SpectralDensity, spectral_density
from dropscope.spectral.diagonal import DiagonalEstimate, diagonal
from dropscope.spectral.eigenpairs import Eigenpairs, EigenStatus
from dropscope.spectral.lanczos import eigsh
from dropscope.spectral.trace import trace

__all__ = [
    "DiagonalEstimate",
    "EigenStatus",
    "Eigenpairs",
    "SpectralDensity",
    "diagonal",
    "eigsh",
    "spectral_density",
    "trace",
]
