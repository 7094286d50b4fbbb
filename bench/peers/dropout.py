"""Dropout itself, and what tools make of a Hessian while dropout is on, or of batches of unequal size.

How a peer is wrong is asserted, with its number in the note: a peer that mends it fails the contest, and is to be
taken into the ratios.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.harness import Contest, contest
from bench.peers import _tools as tools
from bench.workloads import Network, network

SHAPE, P = (4096, 1024), 0.2


@contest(f"dropout forward and backward, {SHAPE[0]} samples of {SHAPE[1]} floats", memory=True, rounds=5)
def forward_backward() -> Contest:
    import dropscope as ds

    x = torch.rand(SHAPE).add_(0.5).requires_grad_()
    seedling, key = torch.rand(SHAPE).add_(0.5), ds.MaskKey(0, 0)

    def through(y: Tensor) -> tuple[Tensor, Tensor]:
        return y.detach(), torch.autograd.grad(y, x, seedling)[0]

    def check(answers: Mapping[str, Any]) -> str:
        keep = ds.keep_mask(SHAPE, P, key)
        scale = 1 / ds.keep_probability(P)
        torch.testing.assert_close(answers["ours"][0], x.detach() * keep * scale)
        torch.testing.assert_close(answers["ours"][1], seedling * keep * scale)
        for name, (y, g) in answers.items():
            assert torch.equal(y == 0, g == 0) or name == "two copies", f"{name}: another mask in the backward pass"
            rate = float((y == 0).double().mean())
            assert name == "two copies" or abs(rate - P) < 6 * (P * (1 - P) / y.numel()) ** 0.5, f"{name}: rate {rate}"
        return "one mask in both passes, at its rate; ours stores none"

    return Contest(
        ours=lambda: through(ds.dropout(x, P, key)),
        competitors={"F.dropout": lambda: through(F.dropout(x, P))},
        ceiling=("two copies", lambda: (x.detach().clone(), seedling.clone())),
        check=check,
    )


def in_train_mode(net: Network) -> Network:
    return dataclasses.replace(net, model=copy.deepcopy(net.model).train())


@contest("Hessian product under one draw of the masks, digits MLP", rounds=5)
def hessian_under_a_mask() -> Contest:
    import dropscope as ds

    net, key = network("digits MLP"), ds.MaskKey(0, 3)
    v = torch.randn(net.dim, generator=torch.Generator().manual_seed(0))
    H, noisy, samples = ds.Hessian(tools.problem(net), masks=key), in_train_mode(net), torch.arange(len(net.x))

    def masked_product() -> Tensor:
        """In float64, by double backward through a forward pass with the masks replayed."""
        model = copy.deepcopy(net.model).double().train()
        parameters = list(model.parameters())
        with ds.replay_dropout(key, samples, model=model):
            risk = F.cross_entropy(model(net.x.double()), net.y)
        gradient = tools.flat(torch.autograd.grad(risk, parameters, create_graph=True))
        return tools.flat(torch.autograd.grad(gradient, parameters, v.double()))

    def check(answers: Mapping[str, Any]) -> str:
        truth, plain = masked_product(), tools.exact_product(net)(v)
        error = tools.relative(answers["ours"], truth)
        assert error < 1e-4, f"ours is off by {error:.1e}"
        assert torch.equal(H @ v, answers["ours"]), "two products differ"
        operator = tools.eigenthings(noisy)
        jump = tools.relative(operator.matvec(v), operator.matvec(v))
        assert jump > 0.1, f"hessian-eigenthings: two products differ by {jump:.1e} only"
        refusal = tools.refuses(
            lambda: tools.curvlinops(noisy, check_deterministic=True), (RuntimeError, ValueError), "deterministic"
        )
        forced = tools.pyhessian_product(tools.pyhessian(noisy))(v)
        assert tools.relative(forced, plain) < 1e-4, "PyHessian no longer takes dropout off"
        gap = tools.relative(forced, truth)
        return (
            f"relative error {error:.0e}, the same bits again; hessian-eigenthings: the same product taken twice "
            f"differs by {jump:.0%}, unsaid; curvlinops refuses ({refusal}); PyHessian takes dropout off, "
            f"{gap:.0%} away; {backpack_trap()}"
        )

    return Contest(lambda: H @ v, check, ceiling=("a gradient", lambda: plain_gradient(net)))


def plain_gradient(net: Network) -> Any:
    return torch.autograd.grad(F.cross_entropy(net.model(net.x), net.y), list(net.model.parameters()))


def backpack_trap() -> str:
    """BackPACK reads dropout's mask off zeros of the output: a layer that starts at 0 loses its curvature."""
    from backpack import backpack, extend
    from backpack.extensions import DiagGGNExact

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        first = nn.Linear(4, 4)
        nn.init.zeros_(first.weight)
        nn.init.zeros_(first.bias)
        model, loss = extend(nn.Sequential(first, nn.Dropout(0.5), nn.Linear(4, 1))), extend(nn.MSELoss())
        with backpack(DiagGGNExact()):
            loss(model(torch.randn(16, 4)), torch.ones(16, 1)).backward()
    curvature, slope = float(first.weight.diag_ggn_exact.abs().max()), float(first.weight.grad.norm())
    assert curvature == 0.0 < slope, f"BackPACK: curvature {curvature}, gradient {slope}"
    return f"BackPACK's Gauss-Newton diagonal of a zero layer before dropout is 0 where its gradient is {slope:.2g}"


@contest("Hessian product over batches of 960 and 40, digits MLP", rounds=5)
def hessian_over_ragged_batches() -> Contest:
    import dropscope as ds

    net = network("digits MLP")
    v = torch.randn(net.dim, generator=torch.Generator().manual_seed(0))
    parts = [(net.x[:960], net.y[:960]), (net.x[960:], net.y[960:])]
    H = ds.Hessian(ds.Problem(net.model, nn.CrossEntropyLoss(), (net.x, net.y), batch_size=960))
    averaging, linop = tools.eigenthings(net, parts), tools.curvlinops(net, batches=parts)
    truth = tools.exact_product(net)(v)

    def check(answers: Mapping[str, Any]) -> str:
        errors = {name: tools.relative(answers[name], truth) for name in ("ours", "curvlinops") if name in answers}
        assert max(errors.values()) < 1e-4, f"relative errors {errors}"
        wrong = tools.relative(averaging.matvec(v), truth)
        assert wrong > 0.05, f"hessian-eigenthings is off by {wrong:.1e} only"
        return (
            f"relative errors below {max(errors.values()):.0e}; hessian-eigenthings weighs batches alike and is "
            f"{wrong:.0%} off, unsaid"
        )

    return Contest(lambda: H @ v, check, {"curvlinops": lambda: linop @ v}, ("a gradient", lambda: plain_gradient(net)))
