"""The function mode: handlers, module paths, checkpoints, and that nothing stays behind."""

from __future__ import annotations

import copy
import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import dropscope as ds
from dropscope.entry_points import here, running
from dropscope.intercept import Call, Interceptor, module_names

KEY, IDS = ds.MaskKey(0, 3), torch.arange(7)
X = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Dropout as layers, as functions, one layer used twice; the middle can be checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.twice = nn.Linear(5, 6), nn.Linear(6, 2), nn.Dropout(0.5)
        self.middle = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3), nn.Tanh(), nn.Dropout(0.3))
        self.wrap: Callable[..., Tensor] = lambda f, x: f(x)

    def block(self, x: Tensor) -> Tensor:
        return F.dropout(self.middle(self.twice(self.twice(x))), 0.2, self.training)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.first(x), 0.1, self.training)
        return self.last(F.dropout(self.wrap(self.block, x), 0.1, self.training))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(autouse=True)
def nothing_stays_patched() -> Any:
    checkpoints = torch.utils.checkpoint
    before = (nn.Module.__call__, checkpoints.CheckpointFunction, checkpoints._checkpoint_without_reentrant_generator)
    yield
    assert torch._dynamo.eval_frame._stance.stance == "default"
    after = (nn.Module.__call__, checkpoints.CheckpointFunction, checkpoints._checkpoint_without_reentrant_generator)
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert not torch.overrides._get_current_function_mode_stack()
    assert not here.modes


def gradients(net: nn.Module, inside: bool = False) -> list[Tensor]:
    net.zero_grad()
    with ds.replay_dropout(KEY, IDS, model=net):
        loss = net(X).square().sum()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    return [parameter.grad.clone() for parameter in net.parameters()]


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("early", [True, False])
def test_a_checkpoint_recomputes_the_same_masks(net: Net, reentrant: bool, inside: bool, early: bool) -> None:
    model = nn.Sequential(net)  # so that the function runs in a module with a name
    expected = gradients(model)
    net.wrap = functools.partial(checkpoint, use_reentrant=reentrant)
    with torch.utils.checkpoint.set_checkpoint_early_stop(early):
        assert all(torch.equal(a, b) for a, b in zip(gradients(model, inside), expected, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_nested_checkpoints(net: Net, reentrant: bool) -> None:
    expected = gradients(net)
    inner = functools.partial(checkpoint, use_reentrant=reentrant)
    net.wrap = lambda f, x: checkpoint(lambda y: inner(f, y), x, use_reentrant=reentrant)
    assert all(torch.equal(a, b) for a, b in zip(gradients(net), expected, strict=True))


def test_checkpoint_wrapper_and_double_backward(net: Net) -> None:
    def product(model: nn.Module) -> list[Tensor]:
        parameters = list(model.parameters())
        with ds.replay_dropout(KEY, IDS, model=model):
            loss = model(X).square().sum()
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), parameters))

    expected = product(net)
    wrapped = copy.deepcopy(net)
    wrapped.middle = checkpoint_wrapper(wrapped.middle)
    assert set(module_names(wrapped)) == set(module_names(net))
    for a, b in zip(product(wrapped), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_recomputation_in_another_thread(net: Net) -> None:
    """Where CUDA runs backward."""
    expected = gradients(net)
    net.wrap = functools.partial(checkpoint, use_reentrant=False)
    net.zero_grad()
    with ds.replay_dropout(KEY, IDS, model=net):
        loss = net(X).square().sum()
        worker = threading.Thread(target=loss.backward)
        worker.start()
        worker.join()
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), expected, strict=True))


def test_threads_have_their_own_masks(net: Net) -> None:
    keys = [ds.MaskKey(seed) for seed in range(4)]

    def outputs(key: ds.MaskKey) -> list[Tensor]:
        runs = []
        for _ in range(20):
            with ds.replay_dropout(key, IDS, model=net):
                runs.append(net(X).detach())
        return runs

    expected = [outputs(key)[0] for key in keys]
    results: dict[int, list[Tensor]] = {}
    threads = [threading.Thread(target=lambda i=i: results.__setitem__(i, outputs(keys[i]))) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(run, expected[i]) for i in range(4) for run in results[i])


@pytest.mark.parametrize("hooked", [False, True])
def test_paths(net: Net, hooked: bool) -> None:
    seen: list[str] = []
    if hooked:  # torch calls such a module by a longer way
        for module in net.modules():
            module.register_forward_hook(lambda *_: None)

    def handler(call: Call) -> Any:
        seen.append(call.path)
        return NotImplemented

    with Interceptor({F.dropout: handler, F.linear: handler}, net):
        net.eval()(X)
        F.dropout(X, 0.5, False)
    middle = ["middle.0", "middle.1", "middle.3"]
    assert seen == ["first", "", "twice", "twice", *middle, "", "", "last", ""]


def test_paths_are_exact_after_exceptions(net: Net) -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    net.middle.append(Fails())
    with Interceptor({}, net) as mode:
        with pytest.raises(KeyboardInterrupt):
            net(X)
        assert mode.path == ""
        assert list(running()) == []
    with pytest.raises(KeyboardInterrupt), ds.replay_dropout(KEY, IDS, model=net):
        net(X)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wrappers_do_not_change_names(net: Net) -> None:
    names = dict(net.named_modules())
    assert module_names(net) == names
    assert module_names(torch.compile(net, backend="eager")) == names
    assert set(module_names(torch.optim.swa_utils.AveragedModel(net))) == set(names)
    inner = copy.deepcopy(net)
    inner.middle = torch.compile(inner.middle, backend="eager")
    assert set(module_names(inner)) == set(names)
    own = nn.ModuleDict({"module": nn.ModuleDict({"module": nn.Dropout()})})
    assert set(module_names(own)) == {"", "module", "module.module"}


def test_compiled_callables_run_eagerly_inside(net: Net) -> None:
    compiled, inner = torch.compile(net, backend="eager"), copy.deepcopy(net)
    inner.middle.compile(backend="eager")
    compiled(X), inner(X)
    outputs = []
    for model, run in ((net, net), (net, compiled), (compiled, compiled), (inner, inner)):
        with ds.replay_dropout(KEY, IDS, model=model):
            outputs.append(run(X))
    assert all(torch.equal(out, outputs[0]) for out in outputs)


def test_handlers_chain_and_nest() -> None:
    def add(amount: float) -> Callable[[Call], Any]:
        return lambda call: call.proceed() + amount

    def nothing(call: Call) -> Any:
        return NotImplemented

    with Interceptor({torch.relu: add(1.0)}):
        with Interceptor({torch.relu: add(10.0), torch.sin: nothing}):
            assert torch.relu(torch.zeros(())) == 11.0
            assert torch.sin(torch.zeros(())) == 0.0
        assert torch.relu(torch.zeros(())) == 1.0
    assert torch.relu(torch.zeros(())) == 0.0
    with ds.masks.replay_streams(0, IDS, handlers={F.dropout: nothing}):
        a = F.dropout(X)
    with ds.masks.replay_streams(0, IDS):
        assert torch.equal(F.dropout(X), a)


def test_attention_shows_its_inside() -> None:
    attention, seen = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True).eval(), []

    def handler(call: Call) -> Any:
        seen.append((call.func, call.path))
        return NotImplemented

    x, functions = torch.randn(3, 4, 8), (F.linear, F.scaled_dot_product_attention)
    expected = attention(x, x, x, need_weights=False)[0]
    with Interceptor(dict.fromkeys(functions, handler), attention):
        out = attention(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(out, expected)
    assert [function for function, _ in seen] == [F.linear, F.scaled_dot_product_attention, F.linear]


def test_the_fast_path_is_off() -> None:
    """An encoder in eval mode without gradients would hide its linear layers in one fused call."""
    layer, seen = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), []

    def handler(call: Call) -> Any:
        seen.append(call.path)
        return NotImplemented

    with torch.no_grad(), warnings.catch_warnings(), Interceptor({F.linear: handler}, layer):
        layer(torch.randn(3, 4, 8))
    assert seen == ["self_attn", "self_attn", "linear1", "linear2"]


def test_recomputing_is_told(net: Net) -> None:
    told: list[bool] = []

    def handler(call: Call) -> Any:
        told.append(call.mode.recomputing)
        return NotImplemented

    net.wrap = functools.partial(checkpoint, use_reentrant=False)
    with Interceptor({torch.tanh: handler}, net) as mode:
        loss = net.eval()(X).sum()
        loss.backward()
    assert told == [False, True]
    assert not mode.recomputing
