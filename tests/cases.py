"""Small models with dropout, their losses and data, and dense references that share no code with the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import dropscope as ds
from dropscope.losses import causal_lm
from dropscope.problem import Problem


class TinyGPT(nn.Module):
    """One block, attention with dropout, tied embedding."""

    def __init__(self, vocabulary: int = 5, width: int = 4, heads: int = 2, length: int = 4, p: float = 0.3) -> None:
        super().__init__()
        self.heads, self.p = heads, p
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.drop = nn.Dropout(p)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 6), nn.GELU(), nn.Linear(6, width), nn.Dropout(p))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        batch, time = ids.shape
        x = self.drop(self.wte(ids) + self.wpe(torch.arange(time, device=ids.device)))
        q, k, v = self.qkv(self.ln_1(x)).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        p = self.p if self.training else 0.0
        a = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        x = x + self.proj(a.transpose(1, 2).reshape(batch, time, -1))
        return self.head(x + self.mlp(self.ln_2(x)))


class Recurrent(nn.Module):
    """Two LSTM layers with dropout between them; ``batch_first`` or time-major."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.rnn = nn.LSTM(2, 3, num_layers=2, dropout=0.4, batch_first=batch_first)
        self.out = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.rnn(x)
        return self.out(states[:, -1] if self.batch_first else states[-1])


class Shared(nn.Module):
    """One linear layer used three times, each time with its own mask."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.out = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.drop = nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for _ in range(3):
            x = self.drop(torch.tanh(self.layer(x)))
        return self.out(x)


class Transformer(nn.Module):
    """torch's own encoder layer, pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.2, activation="gelu", batch_first=True)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x).mean(1))


@dataclass(frozen=True)
class Case:
    """A model, its loss, its data and the batch size that splits the data unevenly."""

    name: str
    model: Callable[[], nn.Module]
    loss: Callable[[], Any]
    data: Callable[[], tuple[Tensor, ...]]
    batch_size: int = 4
    options: dict[str, Any] = field(default_factory=dict)

    def parts(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[nn.Module, Any, tuple[Tensor, ...]]:
        """Model (in train mode), loss and data, seeded; torch's generator is left as it was."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model, loss = self.model().to(dtype), self.loss()
            data = tuple(t.to(dtype) if t.is_floating_point() else t for t in self.data())
            if isinstance(loss, nn.Module):
                loss = loss.to(dtype)
            for module in model.modules():  # as after some training: running statistics that are not 0 and 1
                if isinstance(module, nn.BatchNorm1d):
                    module.running_mean.normal_(0, 0.3)
                    module.running_var.uniform_(0.5, 2.0)
        return model, loss, data

    def problem(self, dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> Problem:
        """The case as a Problem; options override the case's own."""
        model, loss, data = self.parts(dtype, seed)
        return Problem(model, loss, data, **{"batch_size": self.batch_size, **self.options, **options})


def _classes(n: int, k: int, *shape: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randn(n, *shape), torch.randint(0, k, (n,)))


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 4), nn.GELU(), nn.Dropout(0.2), nn.Linear(4, 3)
    )


def _conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.GELU(), nn.Dropout2d(0.3), nn.Flatten(), nn.Linear(12, 3))


def _norm() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 3))


def _regression() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.25), nn.Linear(6, 2))


def _tokens() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 5, (7, 4))
    labels = ids.clone()
    labels[0, 2:], labels[3, 3:] = -100, -100  # sequences of unequal length
    return ids, labels


CASES = {
    case.name: case
    for case in (
        Case("mlp", _mlp, nn.CrossEntropyLoss, _classes(11, 3, 4)),
        Case("regression", _regression, nn.MSELoss, lambda: (torch.randn(9, 3), torch.randn(9, 2))),
        Case("conv", _conv, nn.CrossEntropyLoss, _classes(7, 3, 1, 4, 4)),
        Case("gpt", TinyGPT, causal_lm, _tokens, batch_size=3),
        Case("transformer", Transformer, nn.CrossEntropyLoss, _classes(6, 2, 3, 4)),
        Case("lstm", Recurrent, nn.CrossEntropyLoss, _classes(6, 2, 4, 2)),
        Case(
            "lstm_time_major",
            lambda: Recurrent(batch_first=False),
            nn.CrossEntropyLoss,
            lambda: (torch.randn(4, 6, 2), torch.randint(0, 2, (6,))),
            options={"batch_dim": 1},
        ),
        Case("batchnorm", _norm, nn.CrossEntropyLoss, _classes(9, 3, 3)),
        Case("shared", Shared, nn.CrossEntropyLoss, _classes(7, 2, 3)),
    )
}


class Block(nn.Module):
    """A hidden layer with dropout inside and after, which may be checkpointed."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.hidden, self.out = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.drop, self.reentrant = nn.Dropout(0.4), reentrant

    def inner(self, x: Tensor) -> Tensor:
        return self.hidden(self.drop(torch.tanh(x))).tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.inner(x) if self.reentrant is None else checkpoint(self.inner, x, use_reentrant=self.reentrant)
        return self.out(self.drop(x))


class DropConnect(nn.Module):
    """Dropout on a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = F.dropout(self.first.weight, 0.5, self.training)
        return self.out(F.linear(x, weight, self.first.bias).tanh())


class LayerDrop(DropConnect):
    """A layer left out as a whole."""

    def forward(self, x: Tensor) -> Tensor:
        left_out = self.training and bool(torch.rand([]) < 0.5)
        return self.out(torch.zeros(len(x), 4).to(x) if left_out else self.first(x).tanh())


def checkpointed(reentrant: bool | None) -> Problem:
    """A small network with a checkpointed block, or the same without (None), in float64."""
    return Case(
        "checkpointed", lambda: Block(reentrant), nn.CrossEntropyLoss, _classes(7, 3, 3), batch_size=4
    ).problem()


SHARED_MASKS = {"DropConnect": "dropout", "LayerDrop": "rand"}


def shared_mask(name: str, **options: Any) -> Problem:
    """A small network with a mask that all samples share, in float64, by the name of its class."""
    model = {"DropConnect": DropConnect, "LayerDrop": LayerDrop}[name]
    return Case(name, model, nn.CrossEntropyLoss, _classes(7, 3, 3), batch_size=4).problem(**options)


def risk_function(problem: Problem, masks: ds.MaskKey | None = None) -> Callable[[Tensor], Tensor]:
    """R as a function of the flat parameters, on the whole data set as one batch, by functional_call."""
    model, data = problem.model, problem.data._tensors
    names, shapes = list(problem.params), [p.shape for p in problem.params.values()]
    loss = problem.loss.loss

    def risk(theta: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in shapes])
        named = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        output = torch.func.functional_call(model, named, tuple(data[:-1]))
        value = loss(output, data[-1])
        return value[0].sum() / value[1].sum() if isinstance(value, tuple) else value

    def run(theta: Tensor) -> Tensor:
        before = [module.training for module in model.modules()]
        for module in model.modules():
            module.training = masks is not None and not isinstance(module, nn.BatchNorm1d)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                if masks is None:
                    return risk(theta)
                with ds.replay_dropout(masks, torch.arange(problem.n), model=model, batch_dim=problem.batch_dim):
                    return risk(theta)
        finally:
            for module, was in zip(model.modules(), before, strict=True):
                module.training = was

    return run


def theta(problem: Problem) -> Tensor:
    """The flat parameters, detached."""
    return torch.cat([p.detach().reshape(-1) for p in problem.params.values()])


def dense_gradient(problem: Problem, masks: ds.MaskKey | None = None) -> Tensor:
    """∇R of the whole data set."""
    return torch.func.grad(risk_function(problem, masks))(theta(problem))


def dense_hessian(problem: Problem, masks: ds.MaskKey | None = None) -> Tensor:
    """∇²R of the whole data set, row by row.

    Not by torch.func.hessian: in torch 2.13 its forward mode under vmap is wrong for a LayerNorm's weight.
    """
    point = theta(problem).requires_grad_()
    (gradient,) = torch.autograd.grad(risk_function(problem, masks)(point), point, create_graph=True)
    return torch.stack([torch.autograd.grad(entry, point, retain_graph=True)[0] for entry in gradient])


def sample_gradients(problem: Problem, seed: int, draws: int, sharing: str = "sample") -> Tensor:
    """gᵢₘ = (n/W)∇sᵢ under draw m, shape (n, draws, dim): one sample and one draw at a time."""
    parameters = list(problem.params.values())
    rows = []
    for batch in problem.batches():
        for i in range(batch.size):
            one = batch.select(slice(i, i + 1))
            for m in range(draws):
                values, _ = problem.sample_losses(one, ds.MaskKey(seed, m), sharing=sharing)
                grads = torch.autograd.grad(values.sum() * problem.scale, parameters, materialize_grads=True)
                rows.append(problem.flatten(grads))
    return torch.stack(rows).view(problem.n, draws, problem.dim)


def net(p=0.3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(p), nn.Linear(4, 3))


def state(model):
    """All that a problem must leave as it found it."""
    return (
        [(name, module.training, len(module._forward_hooks)) for name, module in model.named_modules()],
        [(name, p.data_ptr(), p.requires_grad, p.grad, p.tolist()) for name, p in model.named_parameters()],
        [(name, b.data_ptr(), b.tolist()) for name, b in model.named_buffers()],
        torch.get_rng_state().tolist(),
    )


class Custom(nn.Module):
    """A linear map followed by any function of (module, output, input)."""

    def __init__(self, fn):
        super().__init__()
        self.map, self.fn = nn.Linear(3, 3), fn
        self.register_buffer("count", torch.zeros(()))
        self.state = 0.0

    def forward(self, x):
        return self.fn(self, self.map(x), x)


class Matrix(ds.SymmetricOperator):
    """A matrix, or a diagonal, as an operator that counts its products."""

    def __init__(self, M: Tensor) -> None:
        self.M, self.count = M, 0
        self.dim, self.dtype, self.device, self.blocks = len(M), M.dtype, M.device, {}

    def _matmat(self, V: Tensor) -> Tensor:
        self.count += V.shape[1]
        return self.M @ V if self.M.ndim == 2 else self.M[:, None] * V


def random_vector(problem, *columns, seed=0):
    return torch.randn(problem.dim, *columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        problem.dtype
    )


class Bowl(nn.Module):
    """A risk offset + ½ Σ c_j θ_j² + Σ d_j θ_j³ whose base point is the origin."""

    def __init__(self, curvature: list[float], cubic: list[float] | None = None) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(len(curvature), dtype=torch.float64))
        self.register_buffer("curvature", torch.tensor(curvature, dtype=torch.float64))
        self.register_buffer("cubic", torch.tensor(cubic or [0.0] * len(curvature), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * (self.curvature * self.theta**2).sum() + (self.cubic * self.theta**3).sum()


def bowl(curvature: list[float], offset: float = 0.5, cubic: list[float] | None = None) -> Problem:
    return Problem(
        Bowl(curvature, cubic), lambda out, _: out, (torch.full((4,), offset, dtype=torch.float64), torch.zeros(4))
    )
