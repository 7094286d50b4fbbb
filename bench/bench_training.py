"""A regularised step against plain dropout steps, on a language model and on a classifier.

Ours computes what a training step needs, without the optimizer: loss and gradient. The bars are stated against the same
number of plain dropout steps with torch's own LSTM and dropout, so a ratio of 1 means "costs as much as these".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.harness import Contest, contest
from bench.workloads import digits, mlp
from dropscope import MaskKey
from dropscope.training import DropoutK, dropout_sites, explicit_and_implicit, explicit_penalty, implicit_noise

VOCABULARY, WIDTH, LAYERS, Q = 2000, 400, 2, 0.4
BATCH, STEPS = 20, 35


class Words(nn.Module):
    """Embedding, LSTM, read-out, with dropout after the embedding, between the layers and at the output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.drop = nn.Embedding(VOCABULARY, WIDTH), nn.Dropout(Q)
        self.lstm = nn.LSTM(WIDTH, WIDTH, LAYERS, dropout=Q, batch_first=True)
        self.out = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.drop(self.lstm(self.drop(self.embedding(tokens)))[0]))


def language_model() -> tuple[Words, Tensor, Tensor]:
    """A language model and random tokens: nothing here depends on which tokens they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Words(), torch.randint(VOCABULARY, (BATCH, STEPS)), torch.randint(VOCABULARY, (BATCH * STEPS,))


def gradient(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def plain_steps(count: int, model: nn.Module, x: Tensor, y: Tensor) -> list[list[Tensor]]:
    """So many gradients under `nn.Dropout`, as a training loop takes them."""
    model.train()
    with torch.random.fork_rng(devices=[]):
        return [gradient(F.cross_entropy(model(x).flatten(0, -2), y), model) for _ in range(count)]


def regularised(one_pass: bool) -> Contest:
    model, x, y = language_model()
    samples, loss = torch.arange(BATCH), nn.CrossEntropyLoss()

    def ours() -> list[Tensor]:
        model.train()
        with dropout_sites(samples, model=model) as sites:
            output = model(x).flatten(0, 1)
        plain, key = loss(output, y), MaskKey(0, 1)
        if one_pass:
            penalty, noise = explicit_and_implicit(sites, loss, output, y, key=key)
        else:
            penalty = explicit_penalty(sites, loss, output, y, key=key)
            noise = implicit_noise(sites, plain, key=key)
        return gradient(plain + penalty + noise, model)

    def check(answers: Mapping[str, Any]) -> str:
        ours, theirs = answers["ours"], answers["one plain dropout step"][0]
        assert all(g.isfinite().all() for g in ours)
        a, b = (torch.cat([g.flatten() for g in gradients]) for gradients in (ours, theirs))
        cosine, ratio = float(F.cosine_similarity(a, b, dim=0)), float(a.norm() / b.norm())
        # The mean is dropout's and the noise is independent, of dropout's variance: half of the square here.
        assert cosine > 0.35, cosine
        assert 0.85 < ratio < 1.15, ratio
        return f"norm {ratio:.2f} of a dropout gradient's, cosine {cosine:.2f} under independent noise"

    return Contest(ours, check, {"one plain dropout step": lambda: plain_steps(1, model, x, y)})


NAME = f"LSTM language model, {LAYERS} x {WIDTH}, {BATCH} x {STEPS} tokens of {VOCABULARY}"


@contest(f"explicit + implicit from one backward pass, {NAME}", faster={"one plain dropout step": 1 / 3}, rounds=7)
def both_in_one_pass() -> Contest:
    return regularised(one_pass=True)


@contest(f"explicit + implicit from a backward pass each, {NAME}", rounds=7)
def both_in_two_passes() -> Contest:
    return regularised(one_pass=False)


def against_plain(k: int, model: nn.Module, x: Tensor, y: Tensor) -> Contest:
    samples, step = torch.arange(len(x)), DropoutK(model, k)

    def ours() -> list[Tensor]:
        model.train()
        return gradient(step(lambda: F.cross_entropy(model(x).flatten(0, -2), y), samples, key=MaskKey(0, 1)), model)

    name = f"{k} plain dropout steps"

    def check(answers: Mapping[str, Any]) -> str:
        mean = [torch.stack(parts).mean(0).flatten() for parts in zip(*answers[name], strict=True)]
        a, b = torch.cat([g.flatten() for g in answers["ours"]]), torch.cat(mean)
        cosine = float(F.cosine_similarity(a, b, dim=0))
        assert cosine > 0.6, cosine  # with one mask each, the noise of the language model leaves 0.46
        return f"cosine with the mean of other masks {cosine:.3f}"

    return Contest(ours, check, {name: lambda: plain_steps(k, model, x, y)})


@contest(f"Dropout_4, {NAME}", faster={"4 plain dropout steps": 1.0}, rounds=5)
def dropout_4_language_model() -> Contest:
    return against_plain(4, *language_model())


@contest("Dropout_4, 784-500-10, 1000 digits: the first layer is shared", faster={"4 plain dropout steps": 1.0})
def dropout_4_classifier() -> Contest:
    return against_plain(4, mlp((784, 500, 10)), *digits())
