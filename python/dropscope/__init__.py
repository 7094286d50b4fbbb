"""dropscope: see the noise that dropout makes, and the curvature it meets."""

from __future__ import annotations

import torch as torch  # first: our extension shares torch's OpenMP runtime, which must be the one loaded

from dropscope import losses as losses
from dropscope.analyses import HessianVariance as HessianVariance
from dropscope.analyses import IntervalFlatness as IntervalFlatness
from dropscope.analyses import PowerLaw as PowerLaw
from dropscope.analyses import VarianceFlatness as VarianceFlatness
from dropscope.analyses import hessian_variance as hessian_variance
from dropscope.analyses import interval_flatness as interval_flatness
from dropscope.analyses import variance_flatness as variance_flatness
from dropscope.masks import MaskKey as MaskKey
from dropscope.masks import dropout as dropout
from dropscope.masks import keep_mask as keep_mask
from dropscope.masks import keep_probability as keep_probability
from dropscope.masks import replay_dropout as replay_dropout
from dropscope.operators.base import SymmetricOperator as SymmetricOperator
from dropscope.operators.gradient_noise import GradientNoise as GradientNoise
from dropscope.operators.hessian import Hessian as Hessian
from dropscope.problem import Problem as Problem
from dropscope.spectral import DiagonalEstimate as DiagonalEstimate
from dropscope.spectral import Eigenpairs as Eigenpairs
from dropscope.spectral import EigenStatus as EigenStatus
from dropscope.spectral import SpectralDensity as SpectralDensity
from dropscope.spectral import diagonal as diagonal
from dropscope.spectral import eigsh as eigsh
from dropscope.spectral import spectral_density as spectral_density
from dropscope.spectral import trace as trace

__version__ = "0.1.0.dev0"
