"""Each tool set up on a network as its documentation says, with the whole data set as one batch: its best case."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bench.workloads import Network

Product = Callable[[Tensor], Tensor]


def problem(net: Network) -> Any:
    """Ours, with the probes done."""
    import dropscope as ds

    found = ds.Problem(net.model, nn.CrossEntropyLoss(), (net.x, net.y), batch_size=len(net.x))
    found.check(masks=True)
    return found


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def split(v: Tensor, like: Iterable[Tensor]) -> list[Tensor]:
    parts = list(like)
    return [p.view(t.shape) for p, t in zip(v.split([t.numel() for t in parts]), parts, strict=True)]


def eigenthings(net: Network, batches: list[tuple[Tensor, Tensor]] | None = None) -> Any:
    """hessian-eigenthings' Hessian."""
    from hessian_eigenthings import HessianOperator, supervised_loss

    return HessianOperator(net.model, batches or [(net.x, net.y)], supervised_loss(nn.functional.cross_entropy))


def eigenthings_ggn(net: Network) -> Any:
    """hessian-eigenthings' Gauss-Newton matrix."""
    from hessian_eigenthings import GGNOperator, supervised_forward, supervised_loss_of_output

    loss = supervised_loss_of_output(nn.functional.cross_entropy)
    return GGNOperator(net.model, [(net.x, net.y)], supervised_forward, loss)


def curvlinops(
    net: Network,
    kind: str = "HessianLinearOperator",
    batches: list[tuple[Tensor, Tensor]] | None = None,
    check_deterministic: bool = False,
) -> Any:
    """A linear operator of curvlinops."""
    import curvlinops as package

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(package, kind)(
            net.model,
            nn.CrossEntropyLoss(),
            list(net.model.parameters()),
            batches or [(net.x, net.y)],
            check_deterministic=check_deterministic,
        )


def pyhessian(net: Network) -> Any:
    """PyHessian's object, which keeps one double-backward graph; it works on a copy, since it changes its model."""
    from pyhessian import hessian

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of backward(create_graph=True)
        return hessian(copy.deepcopy(net.model), nn.CrossEntropyLoss(), data=(net.x, net.y), cuda=False)


def pyhessian_product(operator: Any) -> Product:
    from pyhessian.utils import hessian_vector_product

    return lambda v: flat(hessian_vector_product(operator.gradsH, operator.params, split(v, operator.params)))


def functional_risk(net: Network) -> tuple[Callable[[dict[str, Tensor]], Tensor], dict[str, Tensor]]:
    """The risk as a function of named parameters, and these."""
    named = {name: p.detach() for name, p in net.model.named_parameters()}

    def risk(parameters: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(net.model, parameters, (net.x,)), net.y)

    return risk, named


def functional_product(net: Network) -> Product:
    """torch.func's jvp of grad."""
    risk, named = functional_risk(net)
    gradient = torch.func.grad(risk)

    def product(v: Tensor) -> Tensor:
        tangent = dict(zip(named, split(v, named.values()), strict=True))
        return flat(torch.func.jvp(gradient, (named,), (tangent,))[1].values())

    return product


def exact_product(net: Network) -> Product:
    """Hessian products in float64 by plain double backward: they belong to none of the tools."""
    model, x = copy.deepcopy(net.model).double(), net.x.double() if net.x.is_floating_point() else net.x
    parameters = list(model.parameters())
    risk = nn.functional.cross_entropy(model(x), net.y)
    gradient = flat(torch.autograd.grad(risk, parameters, create_graph=True))

    def product(v: Tensor) -> Tensor:
        """H v, or the rows H vᵢ for the rows of a matrix."""
        parts = torch.autograd.grad(
            gradient, parameters, grad_outputs=v.double(), retain_graph=True, is_grads_batched=v.ndim == 2
        )
        return torch.cat([part.flatten(v.ndim - 1) for part in parts], -1)

    return product


def exact_ggn_product(net: Network) -> Product:
    """Gauss-Newton products in float64: Jv by the double-backward trick, the loss's curvature, Jᵀ."""
    model, x = copy.deepcopy(net.model).double(), net.x.double() if net.x.is_floating_point() else net.x
    parameters = list(model.parameters())
    output = model(x)
    leaf = output.detach().requires_grad_()
    slope = torch.autograd.grad(nn.functional.cross_entropy(leaf, net.y), leaf, create_graph=True)[0]
    dual = torch.zeros_like(output, requires_grad=True)
    pulled = flat(torch.autograd.grad(output, parameters, dual, create_graph=True))

    def product(v: Tensor) -> Tensor:
        pushed = torch.autograd.grad(pulled, dual, v.double(), retain_graph=True)[0]
        bent = torch.autograd.grad(slope, leaf, pushed, retain_graph=True)[0]
        return flat(torch.autograd.grad(output, parameters, bent, retain_graph=True))

    return product


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    expected = expected.double()
    return float((found.detach().double() - expected).norm() / expected.norm())


def refuses(call: Callable[[], Any], error: type[BaseException] | tuple[type[BaseException], ...], words: str) -> str:
    """Assert that a call raises this error with these words, and return them for the note."""
    raised = error_of(call)
    assert isinstance(raised, error), f"expected {error} with {words!r}, got {raised!r}"
    assert words in str(raised), f"expected {words!r}, got {raised}"
    return f"{type(raised).__name__}: {words}"


def error_of(call: Callable[[], Any]) -> Exception | None:
    """What a call raises."""
    try:
        call()
    except Exception as raised:
        return raised
    return None


def prepared(make: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
    """Set a tool up; one that refuses the network raises when it is called, so that the table says why."""
    made: list[Callable[[], Any]] = []
    error = error_of(lambda: made.append(make()))

    def refuse() -> Any:
        raise error if error is not None else AssertionError

    return made[0] if error is None else refuse
