"""dropscope: see the noise that dropout makes, and the curvature it meets."""

from __future__ import annotations

import torch as _torch  # noqa: F401  first: our extension shares torch's OpenMP runtime, which must be the one loaded

from dropscope import losses, training
from dropscope.analyses import (
    Condensation,
    HessianVariance,
    IntervalFlatness,
    LossLine,
    LossPlane,
    PowerLaw,
    VarianceFlatness,
    condensation,
    hessian_variance,
    interval_flatness,
    loss_line,
    loss_plane,
    variance_flatness,
)
from dropscope.estimate import Estimate
from dropscope.masks import MaskKey, dropout, keep_mask, keep_probability, replay_dropout
from dropscope.operators import Fisher, GaussNewton, GradientNoise, Hessian, SymmetricOperator
from dropscope.problem import Problem
from dropscope.spectral import (
    DiagonalEstimate,
    Eigenpairs,
    EigenStatus,
    SpectralDensity,
    diagonal,
    eigsh,
    spectral_density,
    trace,
)

__version__ = "0.1.0.dev0"

__all__ = [
    "Condensation",
    "DiagonalEstimate",
    "EigenStatus",
    "Eigenpairs",
    "Estimate",
    "Fisher",
    "GaussNewton",
    "GradientNoise",
    "Hessian",
    "HessianVariance",
    "IntervalFlatness",
    "LossLine",
    "LossPlane",
    "MaskKey",
    "PowerLaw",
    "Problem",
    "SpectralDensity",
    "SymmetricOperator",
    "VarianceFlatness",
    "condensation",
    "diagonal",
    "dropout",
    "eigsh",
    "hessian_variance",
    "interval_flatness",
    "keep_mask",
    "keep_probability",
    "loss_line",
    "loss_plane",
    "losses",
    "replay_dropout",
    "spectral_density",
    "trace",
    "training",
    "variance_flatness",
]
