"""The language model of paper D at a scale that fits: its dropout, and what stands in for it, trained side by side."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dropscope.masks import MaskKey
from dropscope.reproduce.datasets import text
from dropscope.reproduce.entry import Scale
from dropscope.training import DropoutK, dropout_sites, explicit_and_implicit, explicit_penalty, implicit_noise


@dataclass(frozen=True)
class Size:
    """Corpus, network and schedule of a run.

    As in the paper, plain gradient descent with a large rate and clipped gradients, and embeddings tied to the
    read-out: Adam divides the noise of the gradient out again. The small size was chosen by the best validation
    perplexities of no dropout and dropout with one seed, as one where no dropout loses much; no other method was looked
    at. The patience was then raised from 6 epochs to 10, as a run of k = 8 had ended while it still improved.
    """

    train: int = 6000
    held: int = 6000
    vocabulary: int = 600
    width: int = 96
    layers: int = 2
    drop: float = 0.4
    batch: int = 10
    steps: int = 30
    rate: float = 20.0
    clip: float = 0.25
    epochs: int = 40
    patience: int = 10
    least: int = 10


SMALL = Size()
FULL = Size(
    train=887_521, held=70_000, vocabulary=10_000, width=400, layers=3, batch=20, steps=70, rate=30.0, clip=0.25,
    epochs=100, patience=10,
)  # fmt: skip


@dataclass(frozen=True)
class Method:
    """What stands for dropout: its name in the figures, masks a step (0: none) and what is added."""

    name: str
    masks: int = 0
    reinject: bool = False
    explicit: bool = False
    implicit: bool = False


NONE = Method("no dropout")
DROPOUT = Method("dropout", masks=1)
K4, K8 = Method("dropout, k = 4", masks=4), Method("dropout, k = 8", masks=8)
K4_AGAIN = Method("k = 4, noise put back", masks=4, reinject=True)
K4_NOISE = Method("k = 4 + implicit noise", masks=4, implicit=True)
EXPLICIT = Method("explicit penalty", explicit=True)
BOTH = Method("explicit penalty + implicit noise", explicit=True, implicit=True)


class LanguageModel(nn.Module):
    """Embedding, LSTM layers, read-out by the embedding; dropout on the embedded, between layers and on the output."""

    def __init__(self, vocabulary: int, width: int, layers: int, drop: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.drop = nn.Dropout(drop)
        self.lstm = nn.LSTM(width, width, layers, dropout=drop if layers > 1 else 0.0, batch_first=True)
        self.out = nn.Linear(width, vocabulary)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.zeros_(self.out.bias)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of the next token, for tokens (B, T)."""
        hidden, _ = self.lstm(self.drop(self.embedding(tokens)))
        logits: Tensor = self.out(self.drop(hidden))
        return logits


def step_loss(model: LanguageModel, method: Method, x: Tensor, y: Tensor, key: MaskKey) -> Tensor:
    """The loss of one training step of a method (theory: algorithms 1, 2 and 4 of arXiv:2002.12915)."""
    samples = torch.arange(len(x))
    target = y.flatten()

    def loss() -> Tensor:
        return F.cross_entropy(model(x).flatten(0, 1), target)

    masked = None
    if method.masks:
        masked = DropoutK(model, method.masks, reinject=method.reinject)(loss, samples, key=key)
        if not method.implicit:
            return masked
    if not (method.explicit or method.implicit):
        model.eval()
        return loss()
    with dropout_sites(samples, model=model) as sites:
        output = model(x).flatten(0, 1)
    plain = F.cross_entropy(output, target)
    if masked is not None:
        return masked + implicit_noise(sites, plain, key=key, k=method.masks)
    if not method.implicit:
        return plain + explicit_penalty(sites, nn.CrossEntropyLoss(), output, target, key=key)
    penalty, noise = explicit_and_implicit(sites, nn.CrossEntropyLoss(), output, target, key=key)
    return plain + penalty + noise


def train(method: Method, seed: int, size: Size, scale: Scale) -> dict[str, Any]:
    """Train one model; validation and training perplexity after every epoch, until validation has stopped to improve.

    Returns:
        ``valid`` and ``train``: perplexities by epoch, the latter of the epoch's own losses as trained; for dropout and
        what has a penalty or noise in its place also ``fidelity``: :func:`fidelity` of the model after its last epoch.
    """
    corpus = text(scale, size.train, size.held, size.vocabulary)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LanguageModel(len(corpus.vocabulary), size.width, size.layers, size.drop)
    optimizer = torch.optim.SGD(model.parameters(), lr=size.rate)
    columns = _columns(corpus.train, size.batch)
    valid: list[float] = []
    trained: list[float] = []
    step = 0
    while len(valid) < size.least or len(valid) < min(size.epochs, _best(valid) + size.patience):
        losses = []
        for x, y in _windows(columns, size.steps, int(torch.randint(size.steps, (1,), generator=generator))):
            model.train()
            loss = step_loss(model, method, x, y, MaskKey(seed, step))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), size.clip)
            optimizer.step()
            losses.append(loss.item())
            step += 1
        trained.append(math.exp(min(sum(losses) / len(losses), 20.0)))
        valid.append(perplexity(model, corpus.valid))
    found: dict[str, Any] = {"valid": valid, "train": trained}
    if method == DROPOUT or method.explicit or method.implicit:
        found["fidelity"] = fidelity(model, columns, size.steps, MaskKey(seed, step))
    return found


def fidelity(model: LanguageModel, columns: Tensor, steps: int, key: MaskKey, draws: int = 16) -> list[float]:
    """How penalty, noise and the batches compare with dropout at a trained model, from ``draws`` draws of each.

    Returns:
        On the first window R / (E_η ℓ(F(x, η)) − ℓ(F(x))) and Tr Cov ∇ξ / Tr Cov_η ∇ℓ(F(x, η)), both 1 where
        penalty and noise stand for dropout; and Tr Cov_η ∇ℓ(F(x, η)) / Tr Cov ∇ℓ(F(x)), the latter over windows:
        dropout's noise against that of the batches, which is there without dropout.
    """
    windows = list(_windows(columns, steps, 0))
    x, y = windows[0]
    parameters = list(model.parameters())
    plain = step_loss(model, NONE, x, y, key).item()
    rises, penalties, masked, noises = [], [], [], []
    batches = [_gradient(step_loss(model, NONE, *window, key), parameters) for window in windows[: 2 * draws]]
    model.train()
    for draw in range(draws):
        at = MaskKey(key.seed, key.draw + draw)
        loss = step_loss(model, DROPOUT, x, y, at)
        rises.append(loss.item() - plain)
        masked.append(_gradient(loss, parameters))
        with dropout_sites(torch.arange(len(x)), model=model) as sites:
            output = model(x).flatten(0, 1)
        penalties.append(explicit_penalty(sites, nn.CrossEntropyLoss(), output, y.flatten(), key=at).item())
        noises.append(_gradient(implicit_noise(sites, F.cross_entropy(output, y.flatten()), key=at), parameters))
    noise, dropout, batch = (float(torch.stack(rows).var(0).sum()) for rows in (noises, masked, batches))
    return [sum(penalties) / sum(rises), noise / dropout, dropout / batch]


def _gradient(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, parameters)])


def perplexity(model: LanguageModel, tokens: Tensor, window: int = 100) -> float:
    """exp of the mean loss over windows of the text, dropout off."""
    model.eval()
    rows = tokens[: len(tokens) // window * window].view(-1, window)
    with torch.no_grad():
        losses = [
            F.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
            for part in torch.split(rows, 64)
        ]
    return math.exp(min(float(torch.stack(losses).sum()) / (rows.numel() - len(rows)), 20.0))


def _best(valid: Sequence[float]) -> int:
    """Number of epochs up to the best one."""
    return valid.index(min(valid)) + 1 if valid else 0


def _columns(tokens: Tensor, batch: int) -> Tensor:
    length = len(tokens) // batch
    return tokens[: length * batch].view(batch, length)


def _windows(columns: Tensor, steps: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    for i in range(start, columns.shape[1] - steps, steps):
        yield columns[:, i : i + steps], columns[:, i + 1 : i + 1 + steps]


_FINISHED: dict[tuple[Method, int, Size, Scale], dict[str, Any]] = {}


def runs(methods: Sequence[Method], seeds: int, size: Size, scale: Scale, workers: int = 2) -> dict[str, Any]:
    """Run every method with every seed, each once in a process's life; two at a time.

    Returns:
        For each method's name what :func:`train` returns, in lists with an element for each seed.
    """
    plain = Scale(full=scale.full, data=scale.data, seed=scale.seed)
    jobs = [(m, scale.seed + s, size, plain) for m in methods for s in range(seeds)]
    # The longest first, so that no worker is left with one at the end.
    missing = sorted(
        (job for job in jobs if job not in _FINISHED),
        key=lambda job: -(job[0].masks + 3 * (job[0].implicit + job[0].explicit) + 2 * job[0].reinject),
    )
    with tqdm(total=len(missing), desc="language models", disable=not scale.progress, leave=False) as bar:
        if workers < 2:
            results: Iterator[dict[str, Any]] = (train(*job) for job in missing)
            _collect(missing, results, bar)
        elif missing:
            with ProcessPoolExecutor(
                workers, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
            ) as pool:
                _collect(missing, pool.map(train, *zip(*missing, strict=True)), bar)
    found: dict[str, Any] = {}
    for job in jobs:
        curves: dict[str, Any] = found.setdefault(job[0].name, {})
        for part, curve in _FINISHED[job].items():
            curves.setdefault(part, []).append(curve)
    return found


def _collect(jobs: Sequence[tuple[Method, int, Size, Scale]], results: Iterator[dict[str, Any]], bar: Any) -> None:
    for job, result in zip(jobs, results, strict=True):
        _FINISHED[job] = result
        bar.set_postfix_str(f"{job[0].name}: {min(result['valid']):.1f}")
        bar.update()


def described(size: Size, seeds: int, corpus: str) -> str:
    """The setting in one line."""
    parts = asdict(size)
    return (
        "LSTM of {layers} layers of width {width}, dropout q = {drop} after the embedding, between layers and at the "
        "output (no DropConnect), tied embeddings, SGD {rate:g} with gradients clipped to {clip}, batch {batch} of "
        "{steps} tokens, each run at its best epoch; "
    ).format(**parts) + f"{corpus}; {seeds} seeds"
