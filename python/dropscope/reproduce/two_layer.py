"""Many two-layer networks trained at once by full-batch gradient descent or Adam, one loss for all, a seed for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from dropscope.masks import MaskKey, dropout, keep_probability

# (dropout in the risk, multiple of R1, multiple of the sampled gradient norm), as in training.modified_loss.
RECIPES: dict[str, tuple[bool, int, int]] = {
    "R_S": (False, 0, 0),
    "R_drop": (True, 0, 0),
    "L1": (False, 1, 0),
    "L2": (False, 0, 1),
    "L3": (True, 0, -1),
    "L4": (True, -1, 0),
}


@dataclass
class TwoLayer:
    """S networks f_s(x) = A_s σ(W_s x + b_s) + c_s as stacked tensors.

    Attributes:
        W, b, A, c: (S, m, d), (S, m), (S, outputs, m), (S, outputs), leaves with gradients.
        activation: σ.
    """

    W: Tensor
    b: Tensor
    A: Tensor
    c: Tensor
    activation: Callable[[Tensor], Tensor]

    @classmethod
    def init(
        cls, seeds: list[int], d: int, m: int, outputs: int, std: float, activation: Callable[[Tensor], Tensor]
    ) -> TwoLayer:
        """All parameters N(0, std²), each network from its own seed, whatever the others are."""
        parts: list[list[Tensor]] = [[], [], [], []]
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for part, shape in zip(parts, ((m, d), (m,), (outputs, m), (outputs,)), strict=True):
                part.append(torch.randn(shape, generator=generator) * std)
        W, b, A, c = (torch.stack(part).requires_grad_() for part in parts)
        return cls(W, b, A, c, activation)

    @property
    def parameters(self) -> list[Tensor]:
        """The four stacked tensors."""
        return [self.W, self.b, self.A, self.c]

    def features(self, X: Tensor) -> Tensor:
        """σ(W x + b), (S, n, m)."""
        return self.activation(torch.baddbmm(self.b[:, None], X.expand(len(self.W), *X.shape), self.W.mT))

    def read(self, h: Tensor) -> Tensor:
        """A h + c, (S, n, outputs)."""
        return torch.baddbmm(self.c[:, None], h, self.A.mT)

    @torch.no_grad()
    def __call__(self, X: Tensor) -> Tensor:
        """Outputs with dropout off."""
        return self.read(self.features(X))

    def interpolated(self, other: TwoLayer, alpha: float) -> TwoLayer:
        """(1 − α) of this and α of the other."""
        pairs = zip(self.parameters, other.parameters, strict=True)
        W, b, A, c = (torch.lerp(mine.detach(), theirs.detach(), alpha) for mine, theirs in pairs)
        return TwoLayer(W, b, A, c, self.activation)


def losses(
    nets: TwoLayer, kind: str, X: Tensor, Y: Tensor, p: float, epsilon: float, step: int, seed: int, half: bool = False
) -> Tensor:
    """The loss of every network, (S,): mean squared error, or half the squared error of a sample, averaged.

    The same as :func:`dropscope.training.modified_loss` gives for each by itself, under other masks: network s takes
    the sample ids s·n, ..., s·n + n − 1.
    """
    drop, r1, r2 = RECIPES[kind]
    h = nets.features(X)
    scale = 0.5 if half else 1.0 / Y.shape[-1]

    def risk(features: Tensor) -> Tensor:
        return scale * (nets.read(features) - Y).square().sum(2).mean(1)

    masked = risk(dropout(h.flatten(0, 1), p, MaskKey(seed, step)).view_as(h)) if drop or r2 else None
    total = masked if drop and masked is not None else risk(h)
    if r1:
        keep = keep_probability(p)
        squares = (h.square().mean(1) * nets.A.square().sum(1)).sum(1)
        total = total + r1 * scale * (1.0 - keep) / keep * squares
    if r2 and masked is not None:
        gradient = torch.autograd.grad(masked.sum(), nets.parameters, create_graph=True)
        norms = torch.stack([g.square().flatten(1).sum(1) for g in gradient]).sum(0)
        total = total + r2 * epsilon / 4.0 * norms
    return total


def train(
    nets: TwoLayer,
    kind: str,
    X: Tensor,
    Y: Tensor,
    *,
    p: float,
    lr: float,
    steps: int,
    adam: bool = False,
    half: bool = False,
    seed: int = 0,
    watch: Callable[[int], None] | None = None,
    every: int = 0,
    progress: bool = False,
) -> TwoLayer:
    """Train in place by gradient descent (or Adam) on all data at a constant rate; ε of the gradient norm is the rate.

    ``watch(step)`` is called every so many steps, and before the first and after the last.
    """
    optimizer = (torch.optim.Adam if adam else torch.optim.SGD)(nets.parameters, lr=lr)
    bar = tqdm(range(steps), desc=f"{kind}, p {p:g}", disable=not progress, leave=False)
    for step in bar:
        if watch is not None and every and step % every == 0:
            watch(step)
        loss = losses(nets, kind, X, Y, p, lr, step, seed, half).sum()
        for tensor, g in zip(nets.parameters, torch.autograd.grad(loss, nets.parameters), strict=True):
            tensor.grad = g
        optimizer.step()
        if step % 100 == 0:
            bar.set_postfix(loss=f"{loss.item() / len(nets.W):.3g}", refresh=False)
    if watch is not None:
        watch(steps)
    return nets
