"""The networks on which the noise of papers A and B is measured, and how their numbers are put together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropscope.losses import causal_lm
from dropscope.masks import MaskKey, replay_dropout
from dropscope.problem import Problem
from dropscope.reproduce import datasets
from dropscope.reproduce.entry import Scale

BLOCK = "3.weight"  # between the two hidden layers of the MLP


def mlp(features: int, classes: int, seed: int, drop: float, width: int = 50) -> nn.Sequential:
    """features - width - width - classes, ReLU, dropout after each hidden layer; torch's initialisation from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(features, width),
            nn.ReLU(),
            nn.Dropout(drop),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Dropout(drop),
            nn.Linear(width, classes),
        )


def classifier(scale: Scale, seed: int, n: int, drop: float = 0.2) -> tuple[nn.Module, tuple[Tensor, Tensor], str]:
    """An untrained MLP, its data, and what they are; the paper's 784-50-50-10 on 10 000 images with ``scale.full``."""
    images = datasets.images(scale, 10_000 if scale.full and scale.data else n)
    X = images.x.flatten(1)
    return mlp(images.features, images.classes, scale.seed + seed, drop), (X, images.y), images.name


def full_batch(
    model: nn.Module, data: tuple[Tensor, Tensor], steps: int, rate: float, seed: int, masks: bool = True
) -> Iterator[int]:
    """Full-batch Adam with cross entropy under replayed dropout, or without; yields the steps taken, 0 first."""
    X, y = data
    optimiser, ids = torch.optim.Adam(model.parameters(), rate), torch.arange(len(X))
    was = model.training
    try:
        for step in range(steps + 1):
            yield step
            model.train(masks)
            with replay_dropout(MaskKey(seed, step), ids, model=model):
                loss = F.cross_entropy(model(X), y)
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimiser.step()
    finally:
        model.train(was)
        optimiser.zero_grad(set_to_none=True)


def trained(scale: Scale, seed: int, n: int, steps: int, drop: float = 0.2) -> tuple[nn.Module, Any, str]:
    """The MLP after ``steps`` steps under dropout."""
    model, data, name = classifier(scale, seed, n, drop)
    for _ in full_batch(model, data, steps, 3e-3, scale.seed + seed):
        pass
    return model, data, name


def block_problem(model: nn.Module, data: tuple[Tensor, Tensor], names: str | None = BLOCK) -> Problem:
    """The risk as a function of a block of parameters, the others fixed."""
    return Problem(model, nn.CrossEntropyLoss(), data, params=names)


class Transformer(nn.Module):
    """A causal language model of two pre-norm blocks, dropout on the embedding, after attention and after each MLP."""

    def __init__(self, vocabulary: int, width: int, heads: int, layers: int, length: int, drop: float) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.drop = nn.Dropout(drop)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, drop, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.out = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (batch, time, vocabulary)."""
        T = ids.shape[1]
        x = self.drop(self.embed(ids) + self.place(torch.arange(T, device=ids.device)))
        causal = torch.triu(torch.ones(T, T, dtype=torch.bool, device=ids.device), 1)
        logits: Tensor = self.out(self.blocks(x, mask=causal))
        return logits


def language_model(
    scale: Scale, seed: int, sequences: int, length: int, width: int, steps: int, drop: float = 0.1
) -> tuple[nn.Module, tuple[Tensor, Tensor], str]:
    """A transformer trained on characters by full-batch Adam under dropout."""
    corpus = datasets.text(scale, sequences * length, length, vocabulary=64, level="character")
    ids = corpus.train[: sequences * length].view(sequences, length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(scale.seed + seed)
        model = Transformer(len(corpus.vocabulary), width, 4, 2, length, drop)
    optimiser, rows, loss = torch.optim.Adam(model.parameters(), 3e-3), torch.arange(sequences), causal_lm()
    model.train()
    for step in range(steps):
        with replay_dropout(MaskKey(scale.seed + seed, step), rows, model=model):
            values, weights = loss(model(ids), ids)
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(values.sum() / weights.sum())
        optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return model.eval(), (ids, ids), corpus.name


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and its standard error (NaN for one seed)."""
    x = np.asarray(values, float)
    return float(x.mean()), float(x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else float("nan")


def shown(values: Sequence[float], digits: int = 2) -> str:
    """``mean ± standard error`` over seeds."""
    mean, error = mean_error(values)
    return f"{mean:.{digits}f} ± {error:.{digits}f}"
