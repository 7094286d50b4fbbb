"""The Hessian of the risk by double backward, its graphs kept while they fit."""

from __future__ import annotations

import torch
from torch import Tensor

from dropscope.operators.base import SymmetricOperator
from dropscope.problem import Problem


class Hessian(SymmetricOperator):
    """∇²R."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.dim, self.dtype, self.device, self.blocks = problem.dim, problem.dtype, problem.device, problem.blocks

    def _matmat(self, V: Tensor) -> Tensor:
        out = torch.zeros_like(V)
        params = list(self.problem.params.values())
        weight = self.problem.total_weight
        for batch in self.problem.batches():
            with torch.enable_grad():
                values, _ = self.problem.raw_losses(batch)
                grads = torch.autograd.grad(values.sum() / weight, params, create_graph=True)
            for j, v in enumerate(V.unbind(1)):
                vs = list(self.problem.unflatten(v.contiguous()).values())
                hv = torch.autograd.grad(
                    grads, params, vs, retain_graph=True, materialize_grads=True, allow_unused=True
                )
                out[:, j] += self.problem.flatten(hv)
        return out
