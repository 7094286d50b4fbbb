"""The losses that dropout is said to minimise, as losses to train with: R1, R2 and their combinations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dropscope.masks import MaskKey, Sharing
from dropscope.modes import twice_differentiable
from dropscope.operators.read_out import ReadOutForm
from dropscope.problem import Batch, Problem

Kind = Literal["R_S", "R_drop", "L1", "L2", "L3", "L4", "R_regu", "expected_gradnorm", "mean_iterate"]


@dataclass(frozen=True)
class _Recipe:
    """R_S or R^drop, plus multiples of R1 and of a gradient norm: of R^drop, or of R_S + R1 itself."""

    dropout: bool
    r1: int
    r2: int
    own: bool = False


_RECIPES: dict[str, _Recipe] = {
    "R_S": _Recipe(False, 0, 0),
    "R_drop": _Recipe(True, 0, 0),
    "L1": _Recipe(False, 1, 0),
    "L2": _Recipe(False, 0, 1),
    "L3": _Recipe(True, 0, -1),
    "L4": _Recipe(True, -1, 0),
    "R_regu": _Recipe(True, 0, 1),
    "expected_gradnorm": _Recipe(False, 1, 1),
    "mean_iterate": _Recipe(False, 1, 1, own=True),
}


class modified_loss:  # noqa: N801  called like a function, as torch.no_grad is
    """A modified loss of dropout that trains in a user's own loop (arXiv:2207.05952, §III and §VII; 2305.15850).

    With R_S the risk, dropout off; R^drop(η) the risk under one draw of the masks; κ = (1 − k)/k for the keep
    probability k = T/65536; h the features that dropout masks and W the linear layer that reads them:

    * R1 = (cκ/2)(1/n) Σᵢ Σⱼ ‖W_j‖² h_j(xᵢ)² for the squared error (c/2)‖f − y‖²; then E R^drop = R_S + R1 exactly;
    * R̃2(η) = (ε/4)‖∇R^drop(η)‖², whose mean over masks is R2 = (ε/4)(‖∇(R_S + R1)‖² + Tr Σ), Σ the covariance of
      the gradient over masks.

    ========================  ==================================================================================
    ``"R_S"``, ``"R_drop"``   the two risks themselves
    ``"L1"``                  R_S + R1
    ``"L2"``                  R_S + R̃2
    ``"L3"``                  R^drop − R̃2, with the same masks in both
    ``"L4"``                  R^drop − R1
    ``"R_regu"``              R^drop + R̃2: at a small learning rate it mimics R^drop at the learning rate ε
    ``"expected_gradnorm"``   R_S + R1 + R̃2, in the mean the modified loss of 2207.05952
    ``"mean_iterate"``        R_S + R1 + (ε/4)‖∇(R_S + R1)‖²: what the mean of the iterates follows to second order
                              when every step draws fresh masks, the drift of 2305.15850; it lacks Tr Σ
    ========================  ==================================================================================

    Normalisation layers run on their running statistics, as everywhere in this package, whatever mode the model is in.
    The masks of a step are those of ``MaskKey(seed, step·draws + m)``: a run is repeated by its seed.

    Args:
        problem: model, loss and data.
        kind: one of the above.
        epsilon: ε, the learning rate whose effect is meant; needed by the kinds with a gradient norm.
        draws: masks a step, over which R^drop and R̃2 are averaged.
        seed: of the masks.
        sharing: ``"sample"`` for a mask per sample, as ``nn.Dropout`` draws; ``"batch"`` for one that all share, as
            the papers write.

    Raises:
        TypeError: if problem is not a Problem, or an argument is of the wrong kind.
        ValueError: for an unknown kind, an epsilon that is missing or not positive, or, for kinds with R1, a loss
            that is no squared error or a network without one dropout before its linear read-out.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Dropout(0.1))
        >>> net.append(torch.nn.Linear(8, 1)) and None
        >>> x = torch.linspace(-1, 1, 6)[:, None]
        >>> loss = modified_loss(Problem(net, torch.nn.MSELoss(), (x, x.abs())), "L1")
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> for step in range(3):
        ...     optimizer.zero_grad()
        ...     loss(step).backward()
        ...     optimizer.step()
    """

    def __init__(
        self,
        problem: Problem,
        kind: Kind,
        *,
        epsilon: float | None = None,
        draws: int = 1,
        seed: int = 0,
        sharing: Sharing = "sample",
    ) -> None:
        if not isinstance(problem, Problem):
            raise TypeError(f"modified_loss: problem must be a Problem, got {type(problem).__name__}")
        if kind not in _RECIPES:
            raise ValueError(f"modified_loss: kind must be one of {get_args(Kind)}, got {kind!r}")
        if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
            raise ValueError(f"modified_loss: draws must be an int >= 1, got {draws!r}")
        if sharing not in ("sample", "batch"):
            raise ValueError(f"modified_loss: sharing must be 'sample' or 'batch', got {sharing!r}")
        self.problem, self.kind, self.draws, self.sharing = problem, kind, draws, sharing
        self.seed = MaskKey(seed).seed
        self._recipe = _RECIPES[kind]
        if self._recipe.r2 and (epsilon is None or not 0.0 < epsilon < float("inf")):
            raise ValueError(f"modified_loss: epsilon must be a positive number for {kind!r}, got {epsilon!r}")
        self.epsilon = 0.0 if epsilon is None else float(epsilon)
        problem.check(masks=True)
        if self._recipe.r1:
            _ = self._form

    def __repr__(self) -> str:
        return f"modified_loss({self.kind!r}, epsilon={self.epsilon:g}, draws={self.draws}, seed={self.seed})"

    def __call__(self, step: int, batch: Any = None) -> Tensor:
        """Return the loss of a step, a scalar to differentiate with respect to the parameters.

        Args:
            step: number of the step, which chooses the masks.
            batch: tensors as the problem's data hold them, e.g. ``(x, y)``, for one mini-batch; default all data.

        Raises:
            ValueError: if step is out of range or the batch is not what the problem takes.
        """
        batches = self._batches(batch)
        recipe = self._recipe
        keys = self._keys(step)
        gradnorm: Tensor | None = None
        if recipe.r2 and recipe.dropout:
            total, gradnorm = self._norms_of_dropout(batches, keys)
        else:
            total = self._mean([self._risk(batches, key) for key in keys]) if recipe.dropout else self._clean(batches)
        if recipe.r1 and recipe.dropout:  # else R1 came with the clean risk, from the same forward pass
            total = total + recipe.r1 * self.r1(batch)
        if recipe.own:
            gradnorm = self._square_norm(total)
        elif recipe.r2 and gradnorm is None:
            gradnorm = self._norms_of_dropout(batches, keys)[1]
        return total if gradnorm is None else total + recipe.r2 * self.epsilon / 4.0 * gradnorm

    def r1(self, batch: Any = None) -> Tensor:
        """R1 at the current parameters, exact.

        Raises:
            ValueError: as the constructor does for kinds with R1.
        """
        parts = [self._with_penalty(part) for part in self._batches(batch)]
        return torch.stack([penalty for _, penalty, _ in parts]).sum() / torch.stack([w for *_, w in parts]).sum()

    def r2(self, step: int, batch: Any = None) -> Tensor:
        """R̃2 under the masks of a step: (ε/4)‖∇R^drop‖², averaged over the draws; differentiable."""
        return self.epsilon / 4.0 * self._norms_of_dropout(self._batches(batch), self._keys(step))[1]

    @cached_property
    def _form(self) -> ReadOutForm:
        return ReadOutForm(self.problem, "modified_loss", "else take training.explicit_penalty", noise=False)

    def _keys(self, step: int) -> list[MaskKey]:
        return [MaskKey(self.seed, step * self.draws + m) for m in range(self.draws)]

    def _batches(self, batch: Any) -> list[Batch]:
        if batch is None:
            return list(self.problem.data)
        if isinstance(batch, Batch):
            return [batch]
        first = next(iter(batch.values() if isinstance(batch, dict) else batch))
        size = first.shape[self.problem.batch_dim if first.ndim > self.problem.batch_dim else 0]
        return [Batch(0, torch.arange(size, device=self.problem.device), batch, self.problem.batch_dim)]

    def _risk(self, batches: list[Batch], key: MaskKey | None) -> Tensor:
        parts = [self.problem.raw_losses(batch, key, sharing=self.sharing) for batch in batches]
        return torch.stack([v.sum() for v, _ in parts]).sum() / torch.stack([w.sum() for _, w in parts]).sum()

    def _clean(self, batches: list[Batch]) -> Tensor:
        """R_S, with R1 added where the recipe holds it."""
        if not self._recipe.r1:
            return self._risk(batches, None)
        parts = [self._with_penalty(batch) for batch in batches]
        weight = torch.stack([w for _, _, w in parts]).sum()
        return torch.stack([risk + self._recipe.r1 * penalty for risk, penalty, _ in parts]).sum() / weight

    def _with_penalty(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Σ sᵢ, W·R1 and Σ wᵢ of a batch from one forward pass."""
        read = self._form.read(batch)
        values, weights = self.problem.losses_of(read.output, read.target, read.rows)
        return values.sum(), self._form.penalty(read), weights.sum()

    def _norms_of_dropout(self, batches: list[Batch], keys: list[MaskKey]) -> tuple[Tensor, Tensor]:
        """R^drop and ‖∇R^drop‖², averaged over the draws."""
        with twice_differentiable(self.problem.model, self.problem.device):
            risks = [self._risk(batches, key) for key in keys]
        return self._mean(risks), self._mean([self._square_norm(risk) for risk in risks])

    def _square_norm(self, risk: Tensor) -> Tensor:
        parameters = list(self.problem.params.values())
        gradient = torch.autograd.grad(risk, parameters, create_graph=True, materialize_grads=True)
        return torch.stack([g.square().sum() for g in gradient]).sum()

    @staticmethod
    def _mean(values: list[Tensor]) -> Tensor:
        return values[0] if len(values) == 1 else torch.stack(values).mean()
