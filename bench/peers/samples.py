"""Per-sample gradients: their norms, their centred Gram matrix, their random projections.

Dropout is off for all (its rate is 0), so that every tool has the same gradients; the time is from the data to the
answer, forward and backward included, after whatever a tool prepares once. Ours keeps nothing between two calls.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import Contest, contest
from bench.peers import _tools as tools
from bench.workloads import NETWORKS, Network, network

TOLERANCE = 1e-4
PROJECTED = 64


def without_dropout(name: str, n: int | None = None) -> Network:
    """A copy of a network with every dropout rate 0, on its first n samples."""
    net = network(name)
    model = copy.deepcopy(net.model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return dataclasses.replace(net, model=model, x=net.x[:n], y=net.y[:n])


def table(net: Network, cache: str) -> Any:
    """Ours: the per-sample gradients in the smallest form for each parameter."""
    import dropscope as ds

    return ds.GradientNoise(tools.problem(net), draws=2, cache=cache).table  # one draw is stored: no mask is drawn


def functional(net: Network) -> Callable[[], list[Tensor]]:
    """torch.func: vmap of grad; (n, *shape) for each parameter."""
    named = {name: p.detach() for name, p in net.model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        output = torch.func.functional_call(net.model, parameters, (x[None],))
        return nn.functional.cross_entropy(output, y[None])

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    return lambda: list(gradients(named, net.x, net.y).values())


def opacus(net: Network) -> Callable[[], list[Tensor]]:
    """Opacus' hooks; they work in train mode only."""
    from opacus import GradSampleModule

    module = GradSampleModule(copy.deepcopy(net.model).train())

    def call() -> list[Tensor]:
        module.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of its full backward hooks
            nn.functional.cross_entropy(module(net.x), net.y).backward()
        return [p.grad_sample for p in module.parameters()]

    return call


def opacus_ghost(net: Network) -> Callable[[], Tensor]:
    """Opacus' norms without gradients, as in its fast gradient clipping."""
    from opacus import GradSampleModuleFastGradientClipping

    module = GradSampleModuleFastGradientClipping(
        copy.deepcopy(net.model).train(), max_grad_norm=1.0, use_ghost_clipping=True
    )

    def call() -> Tensor:
        module.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.functional.cross_entropy(module(net.x), net.y).backward()
        return module.get_norm_sample().square()

    return call


def backpack(net: Network, extension: Callable[[], Any], hook: Callable[[], Any] | None = None) -> Callable[[], Any]:
    """BackPACK: a backward pass with an extension; the parameters, or the hook, carry what it found."""
    from backpack import backpack as context
    from backpack import extend

    model, loss = extend(copy.deepcopy(net.model)), extend(nn.CrossEntropyLoss())

    def call() -> Any:
        model.zero_grad()
        found = None if hook is None else hook()
        with context(extension(), extension_hook=found):
            loss(model(net.x), net.y).backward()
        return list(model.parameters()) if found is None else found

    return call


def backpack_norms(net: Network) -> Callable[[], Tensor]:
    from backpack.extensions import BatchL2Grad

    call, n = backpack(net, BatchL2Grad), len(net.x)

    def norms() -> Tensor:
        parameters = call()
        missing = [tuple(p.shape) for p in parameters if not hasattr(p, "batch_l2")]
        if missing:
            raise NotImplementedError(f"BatchL2Grad says nothing of {len(missing)} of {len(parameters)} parameters")
        return n**2 * torch.stack([p.batch_l2 for p in parameters]).sum(0)  # of gradients of the mean, 1/n each

    return norms


def vivit_gram(net: Network) -> Callable[[], Tensor]:
    """ViViT's centred Gram matrix, gradients freed parameter by parameter; it scales by 1/n² under mean reduction."""
    from backpack.extensions import BatchGrad
    from vivit.extensions.firstorder.batch_grad.gram_batch_grad import CenteredGramBatchGrad

    call, n = backpack(net, BatchGrad, lambda: CenteredGramBatchGrad(free_grad_batch=True)), len(net.x)
    return lambda: n**2 * call().get_result()


def squares(gradients: list[Tensor]) -> Tensor:
    return torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0)


def centred_gram(gradients: list[Tensor]) -> Tensor:
    total = torch.zeros(len(gradients[0]), len(gradients[0]))
    for g in gradients:
        rows = g.detach().flatten(1)
        rows -= rows.mean(0)
        total.addmm_(rows, rows.T)
    return total


def forward_backward(net: Network) -> tuple[str, Callable[[], Any]]:
    parameters = list(net.model.parameters())
    risk = nn.functional.cross_entropy
    return "a gradient", lambda: torch.autograd.grad(risk(net.model(net.x), net.y), parameters)


def exact(net: Network, job: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """The answer in float64 from gradients by a loop of single samples."""
    model, x = copy.deepcopy(net.model).double(), net.x.double() if net.x.is_floating_point() else net.x
    parameters = list(model.parameters())
    rows = []
    for i in range(len(x)):
        risk = nn.functional.cross_entropy(model(x[i : i + 1]), net.y[i : i + 1])
        rows.append([g.float() for g in torch.autograd.grad(risk, parameters)])
    return job([torch.stack(part) for part in zip(*rows, strict=True)])


def held(expected: Callable[[], Tensor]) -> Callable[[Mapping[str, Any]], str]:
    def check(answers: Mapping[str, Any]) -> str:
        truth = expected()
        errors = {name: tools.relative(v, truth) for name, v in answers.items() if name != "a gradient"}
        assert max(errors.values()) <= TOLERANCE, f"other answers, relative errors {errors}"
        return f"relative errors below {max(errors.values()):.0e}"

    return check


def norms(name: str, n: int | None = None) -> Contest:
    net = without_dropout(name, n)
    stored, materialised = table(net, "recompute"), functional(net)
    hooks = tools.prepared(lambda: opacus(net))
    return Contest(
        ours=lambda: torch.cat([chunk.sample_gram().view(-1) for chunk in stored.chunks()]),
        competitors={
            "torch.func": lambda: squares(materialised()),
            "Opacus": lambda: squares(hooks()),
            "Opacus, ghost": tools.prepared(lambda: opacus_ghost(net)),
            "BackPACK": tools.prepared(lambda: backpack_norms(net)),
        },
        ceiling=forward_backward(net),
        check=held(lambda: exact(net, squares)),
    )


def gram(name: str, n: int | None = None) -> Contest:
    from dropscope import kernels

    net = without_dropout(name, n)
    stored, materialised = table(net, "factors"), functional(net)
    hooks = tools.prepared(lambda: opacus(net))

    def ours() -> Tensor:
        stored.close()  # so that the gradients are taken anew
        rows = kernels.center(stored.gram(), len(stored))
        return kernels.center(rows.T.contiguous(), len(stored))

    return Contest(
        ours=ours,
        competitors={
            "torch.func": lambda: centred_gram(materialised()),
            "Opacus": lambda: centred_gram(hooks()),
            "BackPACK + ViViT": tools.prepared(lambda: vivit_gram(net)),
        },
        ceiling=forward_backward(net),
        check=held(lambda: exact(net, centred_gram)),
    )


def projection(name: str, n: int | None = None) -> Contest:
    """⟨gᵢ, v_k⟩ for K random sign vectors, TRAK's own: its CPU projector multiplies materialised gradients."""
    from trak.projectors import BasicProjector

    net = without_dropout(name, n)
    projector = BasicProjector(net.dim, PROJECTED, seed=0, proj_type="rademacher", device="cpu", block_size=PROJECTED)
    stored, materialised = table(net, "recompute"), functional(net)
    Vt = projector.proj_matrix.T.contiguous()

    def trak() -> Tensor:
        return projector.project(torch.cat([g.flatten(1) for g in materialised()], 1), model_id=0)

    def check(answers: Mapping[str, Any]) -> str:
        def job(gradients: list[Tensor]) -> Tensor:
            return torch.cat([g.flatten(1) for g in gradients], 1).double() @ Vt.T.double()

        refusal = tools.refuses(cuda_projector, ValueError, "only works on a CUDA device")
        return f"{held(lambda: exact(net, job))(answers)}; TRAK's CudaProjector: {refusal}"

    def cuda_projector() -> Any:
        from trak.projectors import CudaProjector

        return CudaProjector(net.dim, 512, 0, "rademacher", "cpu", max_batch_size=32)

    return Contest(
        ours=lambda: torch.cat([chunk.project(Vt) for chunk in stored.chunks()]),
        competitors={"torch.func + TRAK": trak},
        ceiling=forward_backward(net),
        check=check,
    )


def register(title: str, stem: str, make: Callable[[str], Contest], names: tuple[str, ...], **options: Any) -> None:
    for name in names:

        def build(name: str = name) -> Contest:
            return make(name)

        build.__name__ = f"{stem}_{name.replace('-', '_').replace(' ', '_').lower()}"
        contest(f"{title}, {name}", rounds=5, **options)(build)


MATERIALISING = ("torch.func", "Opacus", "BackPACK + ViViT")
OTHERS = tuple(name for name in NETWORKS if name != "784-500-500-10")
register("norms of per-sample gradients", "norms", norms, OTHERS)
register("centred Gram matrix of per-sample gradients", "gram", gram, OTHERS)


@contest("norms of 200 per-sample gradients, 784-500-500-10", memory=True, rounds=3)
def norms_784_500_500_10() -> Contest:
    return norms("784-500-500-10", 200)


@contest(
    "centred Gram matrix of 200 per-sample gradients, 784-500-500-10",
    faster=dict.fromkeys(MATERIALISING, 20.0),
    memory=dict.fromkeys(MATERIALISING, 0.1),
    rounds=3,
)
def gram_784_500_500_10() -> Contest:
    return gram("784-500-500-10", 200)


@contest(f"{PROJECTED} projections of 200 per-sample gradients, 784-500-500-10", memory=True, rounds=3)
def projection_784_500_500_10() -> Contest:
    return projection("784-500-500-10", 200)


@contest(f"{PROJECTED} projections of per-sample gradients, GPT", rounds=3)
def projection_gpt() -> Contest:
    return projection("GPT")
