"""DropoutK: the mean over its masks, what it shares and computes again, and its covariance, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dropscope as ds
from dropscope import training
from dropscope.training.sites import derived
from test_dropout_effects import KEY, batch, flat_gradient, mlp


def gradients_over_keys(step, model, count):
    return torch.stack([flat_gradient(step(ds.MaskKey(5, draw)), model) for draw in range(count)])


@pytest.mark.parametrize(("k", "reinject", "share"), [(4, False, 0.25), (4, True, 1.0)])
def test_the_covariance_of_dropout_k(k, reinject, share):
    """Trace against that of one mask, within 3 standard errors: a false alarm of 0.3 % at a fixed seed."""
    model, (x, y) = mlp(), batch()
    samples, count = torch.arange(3), 300

    def trace(k, reinject):
        step = training.DropoutK(model, k, reinject=reinject)
        G = gradients_over_keys(lambda key: step(lambda: F.mse_loss(model(x), y), samples, key=key), model, count)
        squares = (G - G.mean(0)).square().sum(1) * count / (count - 1)
        return float(squares.mean()), float(squares.std()) / math.sqrt(count)

    (one, error), (many, other) = trace(1, False), trace(k, reinject)
    assert abs(many - share * one) < 3 * math.hypot(other, share * error)


def test_dropout_k_is_the_mean_over_its_masks_and_computes_the_prefix_once():
    model, (x, y) = mlp(), batch()
    calls = []
    model[0].weight.register_hook(lambda _: calls.append(1))
    step = training.DropoutK(model, 3)
    value = step(lambda: F.mse_loss(model(x), y), torch.arange(3), key=KEY)
    value.backward()
    shared = [p.grad.clone() for p in model.parameters()]
    nodes = _nodes(value)
    assert sum("TanhBackward" in name for name in nodes) == 1
    assert sum("AddmmBackward" in name for name in nodes) == 1 + 3
    model.zero_grad()
    total = 0.0
    for j in range(3):
        key = ds.MaskKey(derived(KEY.seed, f"mask {j}") if j else KEY.seed, KEY.draw)
        with ds.replay_dropout(key, torch.arange(3), model=model):
            total = total + F.mse_loss(model(x), y) / 3
    total.backward()
    assert float(value.detach()) == pytest.approx(float(total.detach()), rel=1e-15)
    for mine, p in zip(shared, model.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=1e-13, atol=1e-16)


def _nodes(value):
    """Names of the graph's nodes, each once."""
    seen, todo = {}, [value.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen[node] = node.name()
            todo.extend(parent for parent, _ in node.next_functions)
    return list(seen.values())


def test_dropout_k_computes_again_what_a_pass_has_changed():
    """A counter of the model's own that grows with every pass is no shared prefix."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("passes", torch.zeros(()))
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            self.passes += 1
            return (self.drop(x) * 0 + self.passes).mean()

    model = Counting()
    value = training.DropoutK(model, 2)(lambda: model(torch.ones(2, 3)), torch.arange(2), key=KEY)
    assert float(value) == 1.5
