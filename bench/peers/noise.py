"""The loop that people write today for the covariance of dropout noise: full-batch gradients, then PCA."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def gradient_loop(model: nn.Module, x: Tensor, y: Tensor, draws: int, *, seed: int = 0) -> Tensor:
    """Full-batch gradients of the mean cross-entropy, one draw of torch's own dropout each: (draws, dim)."""
    parameters = list(model.parameters())
    training, rows = model.training, torch.empty(draws, sum(p.numel() for p in parameters))
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for row in rows:
            gradients = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), parameters)
            torch.cat([g.reshape(-1) for g in gradients], out=row)
    model.train(training)
    return rows


def loop_pca(
    model: nn.Module, x: Tensor, y: Tensor, *, draws: int = 500, k: int = 10, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Top-k eigenpairs of the sample covariance of `draws` full-batch gradients: values (k,), vectors (dim, k).

    The eigenvectors come from the draws x draws Gram matrix of the centred gradients, the cheapest PCA there is.
    """
    rows = gradient_loop(model, x, y, draws, seed=seed)
    rows -= rows.mean(0)
    values, U = torch.linalg.eigh((rows @ rows.T).double() / (draws - 1))
    values, U = values[-k:].flip(0), U[:, -k:].flip(1)
    vectors = rows.T @ (U / ((draws - 1) * values).sqrt()).to(rows.dtype)
    return values, vectors


def subspace_error(vectors: Tensor, reference: Tensor) -> float:
    """1 − ‖V_refᵀ V‖²_F / k, for spans of k columns: 0 for equal spaces, 1 for orthogonal ones."""
    V, R = (torch.linalg.qr(Q.double())[0] for Q in (vectors, reference))
    return 1.0 - float((R.T @ V).square().sum()) / R.shape[1]


def captured(vectors: Tensor, gradients: Tensor) -> float:
    """The variance that the span of `vectors` holds in independent gradients, as a share of all of it."""
    rows = gradients - gradients.mean(0)
    Q = torch.linalg.qr(vectors)[0]
    return float((rows @ Q).square().sum() / rows.square().sum())
