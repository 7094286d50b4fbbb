"""Operators: Hessian, gradient noise, and what can be built from them."""

from dropscope.operators.base import SymmetricOperator
from dropscope.operators.gauss_newton import Fisher, GaussNewton
from dropscope.operators.gradient_noise import GradientNoise
from dropscope.operators.hessian import Hessian

__all__ = ["Fisher", "GaussNewton", "GradientNoise", "Hessian", "SymmetricOperator"]
