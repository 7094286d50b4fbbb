"""The risk: exact for any split of the data, and its model left as found."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

from dropscope.problem import Problem


@pytest.mark.parametrize("batch_size", [60, 64, 7])
def test_risk_and_gradient_are_those_of_the_full_batch(batch_size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.3), nn.Linear(7, 3)).double()
    X, y = torch.randn(64, 5, dtype=torch.float64), torch.randint(0, 3, (64,))
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), label_smoothing=0.1)
    problem = Problem(model, loss, (X, y), batch_size=batch_size)
    value = loss(model.eval()(X), y)
    gradient = parameters_to_vector(torch.autograd.grad(value, list(model.parameters())))
    model.train()
    assert abs(problem.risk() - value.item()) < 1e-12
    torch.testing.assert_close(problem.gradient(), gradient, rtol=0, atol=1e-12)
    assert model.training
