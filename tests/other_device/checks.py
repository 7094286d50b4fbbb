"""Every measurement on a device that is not the CPU: no tensor is made on the wrong one, and the numbers are the CPU's.

Run by ../test_other_device.py on a pretended device, and by ``python -m bench.on_device`` on the one that
DROPSCOPE_OTHER_DEVICE names. What is compared are numbers that do not depend on signs of eigenvectors.
"""

from __future__ import annotations

import os
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import dropscope as ds
from cases import CASES, Case
from dropscope import analyses, training
from dropscope.problem import Problem

if name := os.environ.get("DROPSCOPE_OTHER_DEVICE"):
    DEVICE, MODELS = torch.device(name, 0), list(CASES)
    pretending, Elsewhere, inside = nullcontext, lambda x: x.to(DEVICE), lambda x: x.cpu()
    moved = Elsewhere
else:
    from pretended import DEVICE, Elsewhere, inside, moved, pretending

    # An LSTM on a device takes fused cells that the CPU has not.
    MODELS = [name for name in CASES if not name.startswith("lstm")]


def problem(device, name="mlp", dtype=torch.float64, **options):
    model, loss, data = CASES[name].parts(dtype)
    if device != "cpu":
        model, data = moved(model), tuple(Elsewhere(x) for x in data)
    return Problem(model, loss, data, **{"batch_size": CASES[name].batch_size, **CASES[name].options, **options})


def read_out(device):
    """One dropout before a linear map to a number, squared loss: the covariance is known."""
    case = Case(
        "read-out",
        lambda: nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.25), nn.Linear(6, 1)),
        nn.MSELoss,
        lambda: (torch.randn(9, 3), torch.randn(9, 1)),
    )
    model, loss, data = case.parts()
    if device != "cpu":
        model, data = moved(model), tuple(Elsewhere(x) for x in data)
    return Problem(model, loss, data)


def ramp(operator):
    return torch.linspace(-1, 1, operator.dim, dtype=operator.dtype).to(operator.device)


def compared(measure, tolerance=1e-6):
    """What measure(device) answers on both devices is the same."""
    here = [torch.as_tensor(x) for x in measure("cpu")]
    with pretending():
        there = [inside(x).detach() if isinstance(x, torch.Tensor) else torch.tensor(x) for x in measure(DEVICE)]
    assert len(here) == len(there) > 0
    for x, y in zip(there, here, strict=True):
        torch.testing.assert_close(x.double(), y.detach().double(), rtol=tolerance, atol=1e-9)


def test_the_device_refuses_to_be_mixed():
    with pretending():
        x, y = Elsewhere(torch.ones(3)), torch.ones(3)
        assert (x + 1).device == DEVICE
        assert torch.zeros(2, device=DEVICE).device == DEVICE
        assert x.to("cpu").device.type == "cpu"
        for mixed in (lambda: x + y, lambda: y.add_(x), lambda: torch.stack([x, y]), lambda: y[x.long()]):
            with pytest.raises(RuntimeError, match="device"):
                mixed()


@pytest.mark.parametrize("name", MODELS)
def test_products_of_every_model(name):
    def measure(device):
        H = ds.Hessian(problem(device, name), masks=ds.MaskKey(1, 2))
        v, out = ramp(H), []
        for draws, cache in ((4, "auto"), (4, "recompute")):
            with ds.GradientNoise(problem(device, name), draws=draws, seed=1, cache=cache) as noise:
                out += [noise.dropout @ v, noise.sampling @ v]
        return [H @ v, H @ torch.stack((v, v * v), 1), *out]

    compared(measure)


@pytest.mark.parametrize("kind", [ds.GaussNewton, ds.Fisher])
def test_products_of_curvature(kind):
    def measure(device):
        plain, masked = kind(problem(device)), kind(problem(device), masks=ds.MaskKey(1, 2))
        v = ramp(plain)
        return [plain @ v, masked @ v, kind(problem(device), draws=2) @ v]

    compared(measure)


@pytest.mark.parametrize("which", ["LM", "SA", "BE"])
def test_eigenpairs(which):
    compared(lambda device: [ds.eigsh(ds.Hessian(problem(device)), k=4, which=which, tol=1e-7).values])
    compared(lambda device: [ds.eigsh(ds.Hessian(problem(device)).restrict(["0.weight"]), k=2).values])


def test_low_precision_on_trial():
    H = lambda device: ds.Hessian(problem(device, dtype=torch.float32))  # noqa: E731
    compared(lambda device: [ds.eigsh(H(device), k=3, tol=1e-2, precision="auto").values], 1e-3)


def test_densities_traces_and_diagonals():
    def measure(device):
        H = ds.Hessian(problem(device))
        traces = [ds.trace(H, method=method).value for method in ("xtrace", "hutch++", "hutchinson")]
        return [*traces, ds.diagonal(H).values, ds.spectral_density(H, probes=3, steps=8).nodes.sort()[0]]

    compared(measure)


@pytest.mark.parametrize(
    "options",
    [{}, {"allocation": "gradient"}, {"sharing": "batch"}, {"cache": "recompute"}, {"cache": "factors"}],
    ids=str,
)
def test_noise(options):
    def measure(device):
        with ds.GradientNoise(problem(device), draws=4, seed=1, **options) as noise:
            v = ramp(noise.dropout)
            out = [noise.dropout @ v, noise.trace.value, noise.effective_samples, noise.kurtosis]
            out += [ds.eigsh(noise.dropout, k=3, tol=1e-7).values]
            out += [x.value for x in noise.variance_along(torch.stack((v, v * v), 1))]
            return out

    compared(measure)


def test_noise_in_half_the_memory():
    def measure(device):
        with ds.GradientNoise(problem(device, dtype=torch.float32), draws=4, seed=1, cache="bf16") as noise:
            return [ds.eigsh(noise.dropout, k=2, tol=1e-2).values]

    compared(measure, 1e-3)


def test_relations():
    def measure(device):
        here = problem(device)
        with ds.GradientNoise(here, draws=4, seed=1) as noise:
            relation = ds.hessian_variance(ds.Hessian(here), noise.dropout, k=4)
            flatness = ds.variance_flatness(here, noise.dropout, k=3)
        data = analyses.gradient_data(here, 12)
        collected = ds.hessian_variance(ds.Hessian(here), data, k=2)
        walked = analyses.trajectory_data(here, 8, 0.01, runs=2)
        structure = analyses.noise_structure(here, draws=4)
        assert flatness is not None
        assert structure is not None
        return [relation.eigenvalues, collected.eigenvalues, data.rows.norm(), walked.rows.norm()]

    compared(measure)


def test_landscapes():
    def measure(device):
        here = problem(device)
        top = ds.eigsh(ds.Hessian(here), k=2, tol=1e-7)
        flatness = ds.interval_flatness(here, top.vectors)
        line, plane = (f(here, alphas=[-1.0, 0.0, 1.0]) for f in (ds.loss_line, ds.loss_plane))
        condensed = ds.condensation(here.model, "0", "3")
        assert all(x is not None for x in (flatness, line, plane, condensed))
        return [top.values]

    compared(measure)


def test_training():
    def measure(device):
        here = read_out(device)
        out = [training.modified_loss(here, kind, epsilon=0.1)(3) for kind in ("L1", "expected_gradnorm")]
        model, loss, (x, y) = CASES["mlp"].parts()
        if device != "cpu":
            model, x, y = moved(model), Elsewhere(x), Elsewhere(y)
        with training.dropout_sites(torch.arange(len(x)), model=model) as sites:
            output = model(x)
        penalty = lambda how: training.explicit_penalty(sites, loss, output, y, key=ds.MaskKey(0, 1), curvature=how)  # noqa: E731
        out += [penalty("sampled"), penalty("exact")]
        out.append(training.implicit_noise(sites, loss(output, y), key=ds.MaskKey(0, 1), k=2))
        repeated = training.DropoutK(model, 4)
        out.append(repeated(lambda: loss(model(x), y), torch.arange(len(x)), key=ds.MaskKey(0, 1)))
        assert training.sde.simulate(here, 0.1, 0.2, paths=2) is not None
        return out

    compared(measure)


def test_masks():
    def measure(device):
        key, x = ds.MaskKey(1, 2), torch.ones(5, 16, dtype=torch.float64)
        x = x if device == "cpu" else Elsewhere(x)
        drop = lambda x: ds.dropout(x, 0.3, key, samples=torch.arange(5))  # noqa: E731
        return [drop(x), torch.func.jvp(drop, (x,), (x,))[1], torch.func.vmap(drop)(torch.stack((x, 2 * x)))]

    compared(measure)
