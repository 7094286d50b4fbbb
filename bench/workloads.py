"""The networks and data that benchmarks share: deterministic, trained to a stated loss, no download."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn


@cache
def digits(n: int = 1000, size: int = 28) -> tuple[Tensor, Tensor]:
    """The first n of scikit-learn's digits, upsampled bilinearly to size x size: x (n, size**2) in [0, 1], y (n,)."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[:n] / 16.0, dtype=torch.float32).reshape(-1, 1, 8, 8)
    x = nn.functional.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
    return x.reshape(n, size * size).contiguous(), torch.tensor(labels[:n], dtype=torch.int64)


def mlp(widths: tuple[int, ...] = (784, 500, 500, 10), p: float = 0.2, seed: int = 0) -> nn.Sequential:
    """Linear, ReLU, Dropout(p) for each hidden layer, then a linear read-out; initialised from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for wide, narrow in pairwise(widths[:-1]):
            layers += [nn.Linear(wide, narrow), nn.ReLU(), nn.Dropout(p)]
        return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def train(
    model: nn.Module, x: Tensor, y: Tensor, target: float, *, lr: float = 0.05, batch: int = 100, seed: int = 0
) -> float:
    """SGD with dropout on until the mean cross-entropy with dropout off is at most `target`; that loss is returned."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(200):
            for rows in torch.randperm(len(x), generator=generator).split(batch):
                model.train()
                optimizer.zero_grad(set_to_none=True)
                nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
                loss = risk(model, x, y)
                if loss <= target:
                    model.zero_grad(set_to_none=True)
                    return loss
    raise RuntimeError(f"train: the loss is {loss:.3g} after 200 epochs and never reached {target}")


@torch.no_grad()
def risk(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Mean cross-entropy with dropout off."""
    model.eval()
    return float(nn.functional.cross_entropy(model(x), y))


@cache
def trained_mlp(target: float = 0.2, p: float = 0.2, n: int = 1000) -> tuple[nn.Sequential, Tensor, Tensor, float]:
    """784-500-500-10 trained on n digits to a loss just below `target`: model (in eval mode), x, y, loss.

    Every caller in a process gets the same objects; none may change them.
    """
    x, y = digits(n)
    model = mlp(p=p)
    loss = train(model, x, y, target)
    return model.eval(), x, y, loss
