"""The networks and data that benchmarks share: deterministic, trained to a stated loss, no download.

Trained parameters are kept in a folder of the temporary directory, by the text of this file: the processes of one run
of the suite train once.
"""

from __future__ import annotations

import hashlib
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

Trained = tuple[nn.Sequential, Tensor, Tensor, float]


@cache
def digits(n: int = 1000, size: int = 28) -> tuple[Tensor, Tensor]:
    """The first n of scikit-learn's digits, upsampled bilinearly to size x size: x (n, size**2) in [0, 1], y (n,)."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[:n] / 16.0, dtype=torch.float32).reshape(-1, 1, 8, 8)
    if size != 8:
        x = nn.functional.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
    return x.reshape(n, size * size).contiguous(), torch.tensor(labels[:n], dtype=torch.int64)


@cache
def text(n: int = 16, length: int = 32) -> tuple[Tensor, Tensor]:
    """Bytes of the standard library's sources: x (n, length) and the bytes that follow y (n, length), below 128."""
    folder = Path(sysconfig.get_path("stdlib"))
    source = b"".join((folder / name).read_bytes() for name in ("argparse.py", "ast.py", "heapq.py", "statistics.py"))
    tokens = torch.tensor([byte for byte in source if byte < 128], dtype=torch.int64)
    starts = torch.arange(n) * ((len(tokens) - length - 1) // n)
    rows = tokens[starts[:, None] + torch.arange(length + 1)]
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def mlp(widths: tuple[int, ...] = (784, 500, 500, 10), p: float = 0.2, seed: int = 0) -> nn.Sequential:
    """Linear, ReLU, Dropout(p) for each hidden layer, then a linear read-out; initialised from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for wide, narrow in pairwise(widths[:-1]):
            layers += [nn.Linear(wide, narrow), nn.ReLU(), nn.Dropout(p)]
        return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


class ResidualBlock(nn.Module):
    """x + conv(relu(norm(conv(x)))), then ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(4, channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.middle, self.end = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.end(x + self.second(self.middle(self.norm(self.first(x)))))


def resnet(channels: int = 16, blocks: int = 2, p: float = 0.2, seed: int = 0) -> nn.Sequential:
    """A small residual network for 8 x 8 images, with GroupNorm: BatchNorm would couple the samples."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stem: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, channels, 3, padding=1), nn.ReLU()]
        body: list[nn.Module] = [ResidualBlock(channels) for _ in range(blocks)]
        head: list[nn.Module] = [nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(p), nn.Linear(16 * channels, 10)]
        return nn.Sequential(*stem, *body, *head)


class Embedded(nn.Module):
    """Token and position embeddings."""

    def __init__(self, vocabulary: int, length: int, width: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.token(x) + self.position(torch.arange(x.shape[1], device=x.device).expand_as(x))


class TransformerBlock(nn.Module):
    """Causal attention and a perceptron, each after a LayerNorm and around a residual; attention is written out, for
    no fused kernel can be differentiated twice."""

    def __init__(self, width: int, heads: int, p: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.act, self.down = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        self.drop1, self.drop2 = nn.Dropout(p), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, 2))
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        mixed = scores.masked_fill(future, -1e9).softmax(3) @ v
        x = x + self.drop1(self.out(mixed.transpose(1, 2).flatten(2)))
        return x + self.drop2(self.down(self.act(self.up(self.norm2(x)))))


class ClassesSecond(nn.Module):
    """(B, T, classes) -> (B, classes, T), as nn.CrossEntropyLoss wants it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def gpt(width: int = 64, layers: int = 2, length: int = 32, p: float = 0.1, seed: int = 0) -> nn.Sequential:
    """A small GPT over bytes, read-out untied."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks: list[nn.Module] = [TransformerBlock(width, 4, p) for _ in range(layers)]
        return nn.Sequential(
            Embedded(128, length, width), *blocks, nn.LayerNorm(width), nn.Linear(width, 128), ClassesSecond()
        )


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    target: float,
    *,
    lr: float = 0.05,
    batch: int = 100,
    seed: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
) -> float:
    """Train with dropout on until the mean cross-entropy with dropout off is at most `target`; that loss is returned.

    By default with SGD; the model is left in eval mode.
    """
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
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


def once_trained(name: str, model: nn.Module, x: Tensor, y: Tensor, fit: Callable[[], float]) -> float:
    """Load what an earlier process trained, or train and keep it; the loss is returned, the model is in eval mode."""
    stamp = hashlib.blake2s(Path(__file__).read_bytes() + torch.__version__.encode(), digest_size=6).hexdigest()
    path = Path(tempfile.gettempdir()) / f"dropscope-bench-{stamp}" / f"{name}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return risk(model, x, y)
    loss = fit()
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".tmp")
    torch.save(model.state_dict(), partial)
    partial.replace(path)
    return loss


@cache
def trained_mlp(target: float = 0.2, p: float = 0.2, n: int = 1000) -> Trained:
    """784-500-500-10 trained on n digits to a loss just below the target: model (in eval mode), x, y, loss.

    Every caller in a process gets the same objects; none may change them.
    """
    x, y = digits(n)
    model = mlp(p=p)
    loss = once_trained(f"mlp-{target}-{p}-{n}", model, x, y, lambda: train(model, x, y, target))
    return model.eval(), x, y, loss


@dataclass(frozen=True)
class Network:
    """A trained network and its data: mean cross-entropy over x, y, dropout off. None may change them."""

    name: str
    model: nn.Sequential
    x: Tensor
    y: Tensor
    loss: float

    @property
    def dim(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


NETWORKS = ("digits MLP", "784-500-500-10", "ResNet", "GPT")


@cache
def network(name: str) -> Network:
    """One of the four networks on which peers are met, trained to a stated loss.

    "digits MLP": 64-32-32-10 on 1000 digits; "784-500-500-10" on the same digits upsampled; "ResNet": 2 residual
    blocks of 16 channels on 100 digits; "GPT": 2 layers of width 64 on 16 rows of 32 bytes of Python.
    """
    if name == "784-500-500-10":
        return Network(name, *trained_mlp())
    if name == "digits MLP":
        (x, y), model, target, options = digits(1000, 8), mlp((64, 32, 32, 10)), 0.2, {"lr": 0.05}
    elif name == "ResNet":
        (x, y), model, target, options = digits(100, 8), resnet(), 0.3, {"lr": 0.02, "batch": 50}
    elif name == "GPT":
        (x, y), model, target = text(), gpt(), 1.5
        options = {"optimizer": torch.optim.Adam(model.parameters(), 2e-3), "batch": 8}
    else:
        raise ValueError(f"network: name must be one of {NETWORKS}, got {name!r}")
    stem = name.replace(" ", "-").lower()
    loss = once_trained(stem, model, x, y, lambda: train(model, x, y, target, **options))  # type: ignore[arg-type]
    return Network(name, model.eval(), x, y, loss)
