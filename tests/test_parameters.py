"""Which parameters a problem differentiates, and tensors put in their place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import cases
import dropscope as ds
from cases import net, state
from dropscope.problem import Problem

X, Y = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 3


class TestParameters:
    def test_a_subset_keeps_the_models_order(self):
        model = net()
        full = Problem(model, nn.CrossEntropyLoss(), (X, Y))
        for chosen in (["3.bias", "0.weight"], [model[3].bias, "0.weight"], ["3.b*", "0.w*"]):
            problem = Problem(model, nn.CrossEntropyLoss(), (X, Y), params=chosen)
            assert list(problem.params) == ["0.weight", "3.bias"]
            assert problem.dim == 15
            expected = torch.cat([full.gradient()[full.blocks[name]] for name in problem.params])
            torch.testing.assert_close(problem.gradient(), expected)

    def test_tied_parameters_count_once_under_any_name(self):
        model = cases.TinyGPT()
        problem = Problem(model, cases.causal_lm(), cases._tokens(), params="head.*")
        assert list(problem.params) == ["wte.weight"]
        assert problem.params["wte.weight"] is model.head.weight

    def test_frozen_parameters_are_left_out(self):
        model = net()
        model[0].requires_grad_(False)
        assert list(Problem(model, nn.CrossEntropyLoss(), (X, Y)).params) == ["3.weight", "3.bias"]

    def test_flatten_and_unflatten_are_inverse(self):
        problem = cases.CASES["gpt"].problem()
        v = torch.randn(problem.dim, dtype=torch.float64)
        parts = problem.unflatten(v)
        assert torch.equal(problem.flatten(parts), v)
        assert torch.equal(problem.flatten(list(parts.values())), v)
        assert [tuple(t.shape) for t in parts.values()] == [tuple(p.shape) for p in problem.params.values()]
        assert list(problem.blocks) == [name for name, _ in problem.model.named_parameters()]

    @pytest.mark.parametrize(
        ("change", "params", "error", "message"),
        [
            (lambda m: m.requires_grad_(False), None, ValueError, "model must have trainable parameters, got none"),
            (lambda m: m, "nothing*", ValueError, r"params must be among \['0.weight', .* got 'nothing\*'"),
            (lambda m: m, [], ValueError, "params must name at least one parameter"),
            (lambda m: m, [nn.Parameter(torch.ones(2))], ValueError, "that is not the model's"),
            (lambda m: m, 3, TypeError, "params must be names, patterns or parameters, got 3"),
            (lambda m: m, torch.ones(2), TypeError, "params must be names, patterns or parameters, got Tensor"),
            (lambda m: m, [3], TypeError, "params must be names, patterns or parameters, got int"),
            (lambda m: m[0].requires_grad_(False), "0.*", ValueError, "'0.weight' with requires_grad=False"),
            (lambda m: m[0].double(), None, TypeError, "parameters must have one dtype"),
            (lambda m: m[0].weight.data.fill_(float("nan")), None, ValueError, "finite, got NaN or Inf in '0.weight'"),
            (lambda m: m.append(nn.LazyLinear(2)), None, ValueError, "initialised, got lazy '4.weight'"),
            (lambda m: m.to(torch.complex64), None, TypeError, "floating dtype, got '0.weight' of torch.complex64"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
    @pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
    def test_bad_parameters_are_refused(self, change, params, error, message):
        model = net()
        change(model)
        with pytest.raises(error, match=message):
            Problem(model, nn.CrossEntropyLoss(), (X, Y), params=params)

    def test_integer_parameters_are_refused(self):
        model = net()
        model.register_parameter("table", nn.Parameter(torch.arange(3), requires_grad=False))
        with pytest.raises(TypeError, match=r"floating dtype, got 'table' of torch.int64"):
            Problem(model, nn.CrossEntropyLoss(), (X, Y), params="table")
        assert "table" not in Problem(model, nn.CrossEntropyLoss(), (X, Y)).params


def test_substituted_tensors_reach_every_use():
    problem = cases.CASES["lstm"].problem()
    doubled = {name: 2 * p for name, p in problem.params.items()}
    batch = next(iter(problem.batches()))
    values, _ = problem.substituted(doubled, lambda: problem.sample_losses(batch))
    with problem.displaced(cases.theta(problem)):
        expected, _ = problem.sample_losses(batch)
    torch.testing.assert_close(values, expected)
    assert torch.autograd.grad(values.sum(), list(problem.params.values()))[0].abs().sum() > 0


@pytest.mark.parametrize("make", [lambda: nn.LSTM(3, 3, 2, batch_first=True), lambda: nn.Linear(3, 3)])
def test_substituted_parameters_are_put_back_in_a_module_of_two_names(make):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = self.second = make()

        def forward(self, x):
            for layer in (self.first, self.second):
                x = layer(x)[0] if isinstance(layer, nn.LSTM) else layer(x)
            return x

    model = Twice()
    problem = Problem(model, nn.MSELoss(), (torch.ones(4, 2, 3), torch.zeros(4, 2, 3)))
    before, copied = state(model), list(copy.deepcopy(model.state_dict()).values())
    assert ds.interval_flatness(problem, torch.eye(problem.dim)[:, :2]).evaluations > 0
    with pytest.raises(KeyboardInterrupt):
        problem.substituted({name: 2 * p for name, p in problem.params.items()}, interrupt)
    assert state(model) == before
    assert all(torch.equal(a, b) for a, b in zip(copied, copy.deepcopy(model).state_dict().values(), strict=True))


def interrupt():
    raise KeyboardInterrupt
