"""What cannot be replayed is refused by name, and generators stand where they stood."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dropscope as ds
from dropouts import (
    KEY,
    N,
    Run,
    forward,
    mask,
)
from dropscope.masks import name_random_ops, replay_streams
from dropscope.replay import site_of

REFUSED: list[tuple[str, Callable[[Tensor], Any]]] = [
    ("randn_like", torch.randn_like),
    ("randn", lambda x: torch.randn(3)),
    ("rand", lambda x: torch.rand(N + 1, 2)),
    ("rand", lambda x: torch.rand(N, generator=torch.Generator())),
    ("randint", lambda x: torch.randint(3, (2,))),
    ("randperm", lambda x: torch.randperm(4)),
    ("bernoulli", lambda x: torch.bernoulli(x.sigmoid())),
    ("bernoulli_", lambda x: torch.empty(N + 1).bernoulli_(0.5)),
    ("bernoulli_", lambda x: torch.empty(N).bernoulli_(0.5, generator=torch.Generator())),
    ("bernoulli_", lambda x: torch.empty(N).bernoulli_(torch.full((N,), 0.5))),
    ("multinomial", lambda x: torch.multinomial(torch.ones(4), 2)),
    ("normal", lambda x: torch.distributions.Normal(0.0, 1.0).sample()),
    ("uniform_", lambda x: x.clone().uniform_()),
    ("normal_", lambda x: nn.init.normal_(torch.empty(3))),
    ("rrelu", lambda x: F.rrelu(x, training=True)),
    ("gumbel_softmax", F.gumbel_softmax),
    ("fractional_max_pool2d", lambda x: F.fractional_max_pool2d(x[None, None], 2, 2)),
    ("aten.randn.default", lambda x: torch.ops.aten.randn.default([2])),
    ("Python's random", lambda x: random.random()),
    ("numpy.random", lambda x: np.random.rand()),  # noqa: NPY002
    ("CPU generator", lambda x: torch.manual_seed(5)),
]


@pytest.mark.parametrize(("name", "function"), REFUSED, ids=[f"{i} {name}" for i, (name, _) in enumerate(REFUSED)])
def test_other_draws_are_refused_by_name(name: str, function: Callable[[Tensor], Any]) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[2]  # noqa: NPY002
    with pytest.raises(ValueError, match=f"replay_dropout: .*{name}"):
        forward(Run(function), torch.ones(N, 4))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[2])  # noqa: NPY002


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_scripted_module_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Dropout()))
    with pytest.raises(ValueError, match="scripted module '1'"):
        forward(model, torch.ones(N, 4))
    state = torch.get_rng_state()
    assert name_random_ops(lambda: model(torch.ones(N, 4))) == ["aten.bernoulli_.float"]
    assert torch.equal(state, torch.get_rng_state())


def test_every_random_operation_of_torch_is_known() -> None:
    """Whatever is tagged random and public has a handler; private kernels are left to the watch on generators."""
    with replay_streams(0, torch.arange(1)) as mode:
        known = set(mode.handlers)
    unknown = set()
    for full in torch._C._dispatch_get_all_op_names():
        space, _, rest = full.partition("::")
        name, _, overload = rest.partition(".")
        if space != "aten" or name.startswith("_"):
            continue
        if torch.Tag.nondeterministic_seeded in getattr(getattr(torch.ops.aten, name), overload or "default").tags:
            owners = (torch, torch.Tensor, F)
            unknown |= {
                f"{owner.__name__}.{name}" for owner in owners if getattr(owner, name, None) not in {*known, None}
            }
    assert unknown <= {"torch.random", "torch.miopen_rnn"}  # a module; ROCm's


def test_randomness_that_leaves_no_trace_passes() -> None:
    def model(x: Tensor) -> Tensor:
        return F.rrelu(F.fractional_max_pool2d(x, 2, 2, _random_samples=torch.full((N, 1, 2), 0.5)))

    forward(Run(model), torch.ones(N, 1, 4, 4))


def test_generators_are_restored_when_the_model_fails() -> None:
    state = torch.get_rng_state()

    def model(x: Tensor) -> Tensor:
        torch.manual_seed(9)
        raise KeyError

    with pytest.raises(KeyError):
        forward(Run(model), torch.ones(N, 4))
    assert torch.equal(state, torch.get_rng_state())


SHAPES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: forward(nn.Dropout(), torch.ones(8, 3), samples=torch.arange(3)), ValueError, r"got shape \(8, 3\)"),
    (
        lambda: forward(nn.Dropout(), torch.ones(6), batch_dim=1, samples=torch.arange(6)),
        ValueError,
        "dimension 1 is",
    ),
    (lambda: forward(nn.Dropout(0.5), torch.ones(3, 2).long()), TypeError, "floating-point tensor, got torch.int64"),
    (lambda: forward(nn.Dropout2d(), torch.ones(3)), ValueError, "2 dimensions or more"),
    (lambda: forward(nn.Dropout(1e-7), torch.ones(3, 2)), ValueError, "p must be 0, 1"),
    (
        lambda: forward(nn.Dropout(), torch.ones(3, 2), sharing="none"),
        ValueError,
        "sharing must be 'sample' or",
    ),
    (lambda: forward(nn.Dropout(), torch.ones(3, 2), batch_dim=-1), ValueError, "batch_dim must be an integer >= 0"),
    (lambda: forward(nn.Dropout(), torch.ones(3, 2), key=3), TypeError, "key must be a MaskKey, got int"),
    (lambda: forward(nn.Dropout(), torch.ones(3, 2), samples=torch.ones(3)), TypeError, "samples must be an integer"),
    (lambda: forward(nn.Dropout(), torch.ones(3, 2), samples=-torch.ones(3).long()), ValueError, "samples must lie in"),
    (lambda: replay_streams(0, torch.ones(3)).__enter__(), TypeError, "streams must be an int64 vector"),
    (lambda: replay_streams(-1, torch.arange(3)).__enter__(), ValueError, "seed must lie in"),
]


@pytest.mark.parametrize(("call", "error", "message"), SHAPES, ids=[str(i) for i in range(len(SHAPES))])
def test_refusals(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_two_calls_with_one_site_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from dropscope import replay

    monkeypatch.setattr(replay, "site_of", lambda path, number: 7)
    with pytest.raises(ValueError, match="'#0' and '#1' must differ in site"):
        forward(Run(lambda x: F.dropout(F.dropout(x))), torch.ones(3, 4))


def test_contexts_nest() -> None:
    """The inner one replays; the outer goes on where it was."""
    x = torch.ones(3, 50)
    with ds.replay_dropout(KEY, torch.arange(3)):
        first = F.dropout(x)
        with ds.replay_dropout(ds.MaskKey(9), torch.arange(3)):
            inner = F.dropout(x)
        second = F.dropout(x)
    assert torch.equal(first != 0, mask((3, 50), 0.5, "", 0))
    assert torch.equal(second != 0, mask((3, 50), 0.5, "", 1))
    assert torch.equal(inner != 0, ds.keep_mask((3, 50), 0.5, ds.MaskKey(9), site_of("", 0)))
