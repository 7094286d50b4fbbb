"""Products written out for chains of linear layers: the same operator, and what is declined."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cases
from dropscope.masks import MaskKey
from dropscope.operators.chain import Chain, record_chain
from dropscope.operators.hessian import Hessian
from dropscope.problem import Problem

KEY = MaskKey(3, 2)
KEYS = [None, KEY]
ACTIVATIONS = [
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.LeakyReLU(0.1),
    nn.ELU(),
    nn.GELU(),
    nn.SiLU(),
    nn.Softplus(),
    nn.Sigmoid(),
    nn.Tanh(),
    nn.Identity(),
    nn.Sequential(nn.Tanh(), nn.Sigmoid()),
]


def data(classes: int | None = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    if classes is None:
        return X, torch.randn(12, 3, generator=generator, dtype=torch.float64)
    return X, torch.randint(0, classes, (12,), generator=generator)


def network(activation: nn.Module, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    first, second = nn.Linear(4, 5, bias=bias), nn.Linear(5, 6)
    layers = [first, activation, nn.Dropout(0.3), second, activation, nn.Dropout(0.2), nn.Linear(6, 3, bias=bias)]
    return nn.Sequential(*layers).double()


def is_chain(H: Hessian) -> bool:
    H @ torch.ones(H.dim, dtype=H.dtype)
    return all(isinstance(graph, Chain) for graph, _ in H._kept.values())


def differences(problem: Problem, step: float = 1e-4) -> Tensor:
    """The Hessian by fourth-order differences of gradients, which know nothing of second derivatives."""
    columns = []
    for e in torch.eye(problem.dim, dtype=problem.dtype):
        at = {}
        for n in (-2, -1, 1, 2):
            with problem.displaced(n * step * e):
                at[n] = problem.gradient()
        columns.append((8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step))
    return torch.stack(columns, 1)


def agrees(problem: Problem, key: MaskKey | None, expected: Tensor | None = None) -> None:
    """Single products and blocks, against a reference that shares no code."""
    tolerance = 1e-12 if expected is None else 1e-8
    expected = cases.dense_hessian(problem, key) if expected is None else expected
    for block in (1, 4):
        H = Hessian(problem, key, block=block)
        torch.testing.assert_close(H.to_dense(), expected, rtol=0, atol=tolerance)
    assert float(expected.abs().max()) > 1e-3


@pytest.mark.parametrize("key", KEYS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_is_the_second_derivative(activation: nn.Module, bias: bool, key: MaskKey | None) -> None:
    problem = Problem(network(activation, bias), nn.CrossEntropyLoss(), data(), batch_size=5)
    assert is_chain(Hessian(problem, key))
    agrees(problem, key)


@pytest.mark.parametrize(
    ("loss", "classes"),
    [
        (nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), label_smoothing=0.1), 3),
        (nn.CrossEntropyLoss(reduction="sum"), 3),
        (nn.MSELoss(), None),
        (nn.SmoothL1Loss(), None),
        (nn.L1Loss(), None),
    ],
    ids=["weights", "sum", "squares", "huber", "absolute"],
)
def test_every_loss(loss: Callable[..., Tensor], classes: int | None) -> None:
    """A loss without curvature leaves that of the model."""
    problem = Problem(network(nn.Tanh()), loss, data(classes))
    assert is_chain(Hessian(problem))
    agrees(problem, None)


def test_a_loss_of_ones_own() -> None:
    problem = Problem(network(nn.Tanh()), lambda output, target: (output - target).pow(4).sum(1), data(None))
    assert is_chain(Hessian(problem))
    agrees(problem, None, differences(problem))


class Functional(nn.Module):
    """The same network as a user writes it, its layers stored in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = nn.Linear(5, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(torch.tanh(self.first(x)), 0.3, self.training)
        return F.log_softmax(self.last(x), 1)


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_a_module_of_ones_own(key: MaskKey | None) -> None:
    torch.manual_seed(0)
    problem = Problem(Functional().double(), nn.NLLLoss(), data())
    assert is_chain(Hessian(problem, key))
    agrees(problem, key)


def test_the_model_and_its_gradients_are_left_alone() -> None:
    model = network(nn.ReLU(inplace=True)).train()
    problem = Problem(model, nn.CrossEntropyLoss(), data())
    before = [p.detach().clone() for p in model.parameters()]
    assert is_chain(Hessian(problem, KEY))
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(model.parameters(), before, strict=True))
    assert all(module.training for module in model.modules())


class Skip(nn.Module):
    """A branch around the second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.tanh(self.first(x))
        return self.last(a + torch.tanh(self.second(a)))


class Sideways(Skip):
    """The output depends on an earlier layer than the last."""

    def forward(self, x: Tensor) -> Tensor:
        a = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.second(a))) * a.sum(1, keepdim=True)


class Penalised(Skip):
    """A parameter enters twice: once through its layer, once by itself."""

    def forward(self, x: Tensor) -> Tensor:
        a = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.last(a) * self.last.bias.exp()


class Swallowing(Skip):
    """A forward pass that hides what is raised in it."""

    def forward(self, x: Tensor) -> Tensor:
        a = torch.tanh(self.first(x))
        b = torch.tanh(self.second(a))
        try:
            return self.last(a + b)
        except Exception:
            return self.last(b)


def tied() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 3))


def hooked() -> nn.Module:
    """A hook that changes what a layer returns to something that is not element-wise."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].register_forward_hook(lambda module, args, out: out.cumsum(1))
    return model


def parametrized() -> nn.Module:
    """The layer's weight is no parameter, but the tangent of one."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Tanh())
    return model


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "skip": Skip,
    "sideways": Sideways,
    "penalised": Penalised,
    "swallowing": Swallowing,
    "tied": tied,
    "hooked": hooked,
    "softmax": lambda: nn.Sequential(nn.Linear(4, 5), nn.Softmax(1), nn.Linear(5, 3)),
    "normalised": lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)),
    "prelu": lambda: nn.Sequential(nn.Linear(4, 5), nn.PReLU(), nn.Linear(5, 3)),
    "parametrized": parametrized,
    "sequences": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.Linear(2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_chain_takes_double_backward(name: str) -> None:
    torch.manual_seed(0)
    problem = Problem(OTHERS[name]().double(), nn.CrossEntropyLoss(), data())
    assert not is_chain(Hessian(problem))
    agrees(problem, None, differences(problem))


class Lowered(nn.Sequential):
    """Computes in bfloat16 inside, though its parameters are float32."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


def test_autocast_inside_the_model_takes_double_backward() -> None:
    torch.manual_seed(0)
    plain = network(nn.Tanh()).float()
    X, y = data()
    problem = Problem(Lowered(*plain), nn.CrossEntropyLoss(), (X.float(), y))
    assert not is_chain(Hessian(problem))
    found, exact = (
        Hessian(problem).to_dense(),
        Hessian(Problem(plain, nn.CrossEntropyLoss(), (X.float(), y))).to_dense(),
    )
    assert float((found - exact).norm() / exact.norm()) < 0.03  # bfloat16 rounds every number to 2⁻⁹


def test_chosen_parameters_take_double_backward() -> None:
    """The others' part of the vector is no part of it."""
    model = network(nn.Tanh())
    problem = Problem(model, nn.CrossEntropyLoss(), data(), params=["3.weight", "3.bias"])
    assert not is_chain(Hessian(problem))
    whole = Hessian(Problem(model, nn.CrossEntropyLoss(), data())).restrict(["3.weight", "3.bias"])
    torch.testing.assert_close(Hessian(problem).to_dense(), whole.to_dense(), rtol=0, atol=1e-12)


def test_a_gradient_that_is_not_finite_is_left_to_the_general_route() -> None:
    """Which names it."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Identity(), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.fill_(0.0)
        model[2].weight.fill_(1.0)
    batch = (torch.ones(2, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64))
    problem = Problem(model, lambda output, target: (output - target).abs().sqrt().sum(1), batch)
    problem.__dict__["_weight"], problem.sample = 1.0, next(iter(problem.data))
    with torch.enable_grad():
        assert record_chain(problem, problem.sample, None, 1.0) is None
    with pytest.raises(ValueError, match="gradients must be finite"):
        Hessian(problem) @ torch.ones(2, dtype=torch.float64)
