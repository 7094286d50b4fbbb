"""Operators: Hessian, gradient noise, and what can be built from them."""

from dropscope.operators.base import SymmetricOperator

__all__ = ["SymmetricOperator"]
