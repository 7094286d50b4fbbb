"""Gauss–Newton and Fisher against dense Jacobians, and against scores of labels drawn from the model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cases
from dropscope.masks import MaskKey
from dropscope.operators.gauss_newton import Fisher, GaussNewton
from dropscope.operators.hessian import Hessian
from dropscope.problem import Problem


def vjp_jacobian(outputs, parameters):
    """Rows of the Jacobian, one backward each."""
    rows = []
    for entry in outputs.reshape(-1):
        grads = torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows)


def dense(problem, key):
    """Σᵢ Jᵢᵀ Lᵢ Jᵢ / W, one sample at a time."""
    total, parameters = 0.0, list(problem.params.values())
    for batch in problem.batches():
        for i in range(batch.size):
            output, target, _ = problem.raw_outputs(batch.select(slice(i, i + 1)), key)
            J = vjp_jacobian(output, parameters)
            L = torch.autograd.functional.hessian(
                lambda z, target=target: problem.losses_of(z, target, 1)[0].sum(), output.detach()
            ).reshape(len(J), len(J))
            total = total + J.T @ L @ J
    return total / problem.total_weight


@pytest.mark.parametrize("key", [None, MaskKey(3, 2)], ids=str)
@pytest.mark.parametrize("name", ["mlp", "regression", "conv", "gpt", "lstm_time_major", "batchnorm"])
def test_is_the_dense_matrix(name, key):
    problem = cases.CASES[name].problem()
    G = GaussNewton(problem, key, block=1)  # a trial decides by the clock, and with it the last bits
    matrix = G.to_dense()
    torch.testing.assert_close(matrix, dense(problem, key), rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-14)
    assert torch.linalg.eigvalsh(matrix)[0] > -1e-12
    assert torch.equal(Fisher(problem, key, block=1).to_dense(), matrix)
    v = torch.ones(problem.dim, dtype=torch.float64)
    assert torch.equal(G @ v, G @ v)


def test_is_the_hessian_of_a_linear_model_and_of_vanishing_residuals():
    X = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(9) % 2
    linear = Problem(nn.Linear(3, 2).double(), nn.CrossEntropyLoss(), (X, y), batch_size=4)
    torch.testing.assert_close(GaussNewton(linear).to_dense(), Hessian(linear).to_dense(), rtol=0, atol=1e-14)
    model = cases.CASES["regression"].parts()[0]
    fitted = Problem(model, nn.MSELoss(), (X, model.eval()(X).detach()), batch_size=4)
    torch.testing.assert_close(GaussNewton(fitted).to_dense(), Hessian(fitted).to_dense(), rtol=0, atol=1e-13)
    other = cases.CASES["regression"].problem()
    assert (GaussNewton(other).to_dense() - Hessian(other).to_dense()).norm() > 0.1


def test_draws_are_averaged_and_memory_bounded():
    problem = cases.CASES["mlp"].problem(batch_size=3)
    alone = torch.stack([GaussNewton(problem, MaskKey(4, m)).to_dense() for m in range(2)])
    G = GaussNewton(problem, draws=2, seed=4, block=1)  # a trial by the clock would decide the last bits
    torch.testing.assert_close(G.to_dense(), alone.mean(0), rtol=0, atol=1e-14)
    assert len(G._kept) == 8
    size = sum(size for _, size in G._kept.values())
    small = GaussNewton(problem, draws=2, seed=4, memory=size // 2, block=1)
    assert torch.equal(small.to_dense(), G.to_dense())
    assert 0 < len(small._kept) < 8


def test_fisher_is_the_second_moment_of_scores():
    """E over every label of the squared score, the labels weighted by the model's own probabilities."""
    problem = cases.CASES["mlp"].problem()
    X, model = problem.data._tensors[0], problem.model.eval()
    parameters, total = list(problem.params.values()), 0.0
    for x in X:
        logits = model(x[None])
        for label, p in enumerate(logits.softmax(1)[0]):
            grads = torch.autograd.grad(F.cross_entropy(logits, torch.tensor([label])), parameters, retain_graph=True)
            g = problem.flatten(grads)
            total = total + p.detach() * torch.outer(g, g)
    torch.testing.assert_close(Fisher(problem).to_dense(), total / len(X), rtol=0, atol=1e-13)


def test_outputs_that_are_not_tensors():
    class Output:
        def __init__(self, logits):
            self.logits = logits

    plain = cases.CASES["mlp"].problem()
    model, data = plain.model, plain.data._tensors
    wrapped = Problem(model, nn.CrossEntropyLoss(), data, batch_size=4, forward=lambda m, b: Output(m(b[0])))
    assert torch.equal(GaussNewton(wrapped, block=1).to_dense(), GaussNewton(plain, block=1).to_dense())
    pair = Problem(
        model,
        lambda out, y: F.cross_entropy(out["a"] + out["b"], y, reduction="none"),
        data,
        batch_size=4,
        forward=lambda m, b: {"a": m(b[0]) / 2, "b": m(b[0]) / 2},
    )
    torch.testing.assert_close(GaussNewton(pair).to_dense(), GaussNewton(plain).to_dense(), rtol=0, atol=1e-14)


def test_a_loss_linear_in_the_outputs_has_none():
    problem = cases.CASES["mlp"].problem()
    linear = Problem(problem.model, lambda out, y: out.sum(1), problem.data._tensors)
    assert torch.equal(GaussNewton(linear) @ torch.ones(64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64))


def test_bad_arguments_are_refused():
    problem = cases.CASES["mlp"].problem()
    with pytest.raises(ValueError, match="GaussNewton: draws must be an int >= 1, got 0"):
        GaussNewton(problem, draws=0)
    with pytest.raises(ValueError, match="GaussNewton: memory must hold the graph of one batch"):
        GaussNewton(problem, memory=10) @ torch.ones(64, dtype=torch.float64)
    probabilities = Problem(problem.model, nn.L1Loss(), (problem.data._tensors[0], torch.zeros(11, 3).double()))
    with pytest.raises(
        TypeError, match=r"Fisher: loss must be a negative log-likelihood .* got L1Loss: use GaussNewton"
    ):
        Fisher(probabilities)
