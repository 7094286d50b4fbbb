"""Dropout's stochastic modified equations, simulated and held against gradient descent with dropout itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.func import vmap
from tqdm.auto import tqdm

from dropscope.analyses.power_law import PowerLaw, fit_power_law
from dropscope.analyses.saving import Result
from dropscope.estimate import Estimate
from dropscope.masks import Sharing
from dropscope.modes import twice_differentiable
from dropscope.problem import Problem
from dropscope.training.diffusion import LowRank
from dropscope.training.equation import Descent, Equation, Root, Scheme, choose_noise, directional
from dropscope.training.flat_risk import FlatRisk

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CHUNK_BYTES = 1 << 25  # of one (paths, masks, samples, units) tensor


@dataclass(frozen=True)
class Paths(Result):
    """Paths of a stochastic process at time T.

    Attributes:
        theta: θ_T, (paths, dim).
        fluctuation: the solution of the process linearised about its noiseless path, (paths, dim): its mean is zero,
            so it is subtracted from means as a control variate; None when it was not asked for.
        times: at which the risk was recorded, float64 (records,).
        risk: R_S, dropout off, on each path, (records, paths).
        epsilon: learning rate.
        process: ``"dropout"``, ``"order 1"`` or ``"order 2"``.
    """

    theta: Tensor
    fluctuation: Tensor | None
    times: Tensor
    risk: Tensor
    epsilon: float
    process: str

    def mean(self) -> tuple[Tensor, Tensor]:
        """E θ_T, (dim,), and the covariance of its Monte Carlo error, (dim, dim), in float64."""
        values = (self.theta if self.fluctuation is None else self.theta - self.fluctuation).double()
        if len(values) < 2:
            return values[0], torch.full((values.shape[1],) * 2, math.nan, dtype=torch.float64)
        return values.mean(0), torch.cov(values.T).reshape((values.shape[1],) * 2) / len(values)

    def plot(self) -> Figure:
        """Return a figure: the recorded risk, mean and spread over the paths."""
        from dropscope import plots_losses

        return plots_losses.path_risks(self)

    def __repr__(self) -> str:
        return f"Paths({self.process}, {len(self.theta)} paths of {self.theta.shape[1]}, epsilon={self.epsilon:g})"


@dataclass(frozen=True)
class WeakErrors(Result):
    """How far the mean of a modified equation is from that of dropout's gradient descent, against the learning rate.

    Attributes:
        order: 1 or 2.
        epsilons: learning rates.
        errors: ‖E Θ_T − E θ_{T/ε}‖₂ with its Monte Carlo error.
        law: error ~ ε^s; s is the weak order.
    """

    order: int
    epsilons: tuple[float, ...]
    errors: tuple[Estimate, ...]
    law: PowerLaw

    def plot(self) -> Figure:
        """Return a figure: error against learning rate, log–log, with the fitted law."""
        from dropscope import plots_losses

        return plots_losses.weak_errors({f"order {self.order}": self})

    def __repr__(self) -> str:
        return f"WeakErrors(order {self.order}: slope {self.law.slope.value:.3f} ± {self.law.slope.stderr:.2g})"


def simulate(
    problem: Problem,
    epsilon: float,
    time: float,
    *,
    order: Literal[1, 2] = 1,
    paths: int = 1,
    substeps: int = 8,
    scheme: Scheme = "rk4",
    noise: Root = "auto",
    masks: int = 16,
    rank: int | None = None,
    sharing: Sharing = "batch",
    control: bool = False,
    records: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> Paths:
    """Simulate a stochastic modified equation of gradient descent with dropout (arXiv:2305.15850).

    Order 1: dΘ = −∇L dt + √ε Σ^½ dW; order 2: dΘ = −∇(L + (ε/4)‖∇L‖²) dt + √ε Σ^½ dW, with L = E R^drop and Σ the
    covariance of ∇R^drop over masks, both at Θ. One step of dropout's descent is a time ε. Euler–Maruyama with steps
    h = ε/substeps: Θ ← Φ_h(Θ) + √(εh) Σ(Θ)^½ z, where Φ_h is the drift by Runge and Kutta's fourth-order scheme, or an
    Euler step. Σ^½z is the gradient of a random scalar, so Σ is neither formed nor factorised. At h = ε the order-1
    equation by Euler is dropout's descent with Gaussian noise in place of dropout's, and the drift's errors cancel.

    The start is the problem's current parameters. Where L is known only from N sampled masks, their own noise Σ/N is
    taken off the diffusion, so that a step's covariance is still εhΣ; the scheme is then Euler's.

    Args:
        problem: model, loss and data; ``nn.Dropout`` the only kind of dropout in it.
        epsilon: ε, the learning rate.
        time: T; steps of ε are rounded to a whole number.
        order: of the drift.
        paths: number of independent paths, simulated together.
        substeps: ε/h >= 1.
        scheme: ``"rk4"`` or ``"euler"``, of the drift.
        noise: ``"exact"`` (dropout before a linear read-out, squared loss), ``"enumerated"`` (all masks, up to 12
            units), ``"sampled"`` (fresh masks at each step), or ``"auto"``: the first of them that applies.
        masks: masks a step when sampled, >= 2 (>= 4 for order 2).
        rank: keep only that many principal components of the noise; not with ``"exact"``.
        sharing: ``"batch"`` for one mask for all samples, as the paper writes; ``"sample"`` for one each.
        control: carry along the linearised fluctuation, the control variate of :meth:`Paths.mean`.
        records: at how many times, evenly spaced up to T, to record the risk.
        seed: of the noise.
        progress: show a bar with the mean risk.

    Returns:
        The paths at time T.

    Raises:
        TypeError: if problem is not a Problem.
        ValueError: if a number is out of range, or the noise asked for does not apply; the message says why.
    """
    risk, steps = _prepare("simulate", problem, epsilon, time, paths, sharing, seed)
    if order not in (1, 2):
        raise ValueError(f"simulate: order must be 1 or 2, got {order!r}")
    if isinstance(substeps, bool) or not isinstance(substeps, int) or substeps < 1:
        raise ValueError(f"simulate: substeps must be an int >= 1, got {substeps!r}")
    if scheme not in ("rk4", "euler"):
        raise ValueError(f"simulate: scheme must be 'rk4' or 'euler', got {scheme!r}")
    root = choose_noise(risk, noise, masks, rank, order)
    if control and (not root.exact or isinstance(root, LowRank)):
        raise ValueError("simulate: control must be False for sampled masks or a low rank: the mean is not known there")
    step = Equation(root, epsilon, epsilon / substeps, order, scheme if root.exact else "euler")
    return _run(
        risk, step, root.draw, steps * substeps, paths, control, records, seed, progress, epsilon, f"order {order}"
    )


def dropout_descent(
    problem: Problem,
    epsilon: float,
    time: float,
    *,
    paths: int = 1,
    sharing: Sharing = "batch",
    control: bool = False,
    records: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> Paths:
    """Run gradient descent with dropout, θ ← θ − ε∇R^drop(θ; η), a fresh mask a step, on many paths at once.

    Step s of path j draws the masks of ``MaskKey(seed, s·paths + j)``. Arguments, result and errors are those of
    :func:`simulate`; ``control`` needs the noise to be exact or few enough masks to enumerate.
    """
    risk, steps = _prepare("dropout_descent", problem, epsilon, time, paths, sharing, seed)
    mean = choose_noise(risk, "auto", 2, None, 1) if control else None
    if mean is not None and not mean.exact:
        raise ValueError("dropout_descent: control needs the exact mean over masks, which this problem does not have")
    if steps * paths > 1 << 32:
        raise ValueError(f"dropout_descent: steps x paths must stay below 2**32, got {steps * paths}")

    def draw(count: int, generator: torch.Generator, step: int) -> Tensor:  # noqa: ARG001
        return torch.arange(count) + step * paths

    return _run(
        risk, Descent(risk, mean, epsilon), draw, steps, paths, control, records, seed, progress, epsilon, "dropout"
    )


def weak_error(
    problem: Problem,
    epsilons: Sequence[float],
    time: float,
    *,
    order: Literal[1, 2] = 1,
    paths: int = 10000,
    substeps: int = 8,
    sharing: Sharing = "batch",
    seed: int = 0,
    descents: Sequence[Paths] | None = None,
    progress: bool = False,
) -> WeakErrors:
    """‖E Θ_T − E θ_{T/ε}‖₂ between a modified equation and dropout's descent, for several learning rates.

    Both means are taken over independent paths with the linearised fluctuation as control variate, and the squared
    error is freed of its bias, the trace of the Monte Carlo covariance. The theorem of arXiv:2305.15850 says ε^order.

    Args:
        problem: a small network whose mean over masks is known (see :func:`simulate`).
        epsilons: learning rates, at least two; time must be a multiple of each.
        time: T.
        order: of the equation.
        paths: of each process at each learning rate.
        substeps: ε/h.
        sharing: of the masks.
        seed: the descents take ``seed``, the equations ``seed + 1``.
        descents: runs of :func:`dropout_descent` with ``control=True``, one for each learning rate, made before.
        progress: show bars.

    Returns:
        Errors with their Monte Carlo error bars, and the fitted slope.

    Raises:
        TypeError: if problem is not a Problem.
        ValueError: if a number is out of range or the mean over masks is not known exactly.
    """
    if len(epsilons) < 2:
        raise ValueError(f"weak_error: epsilons must be at least two, got {list(epsilons)}")
    for epsilon in epsilons:
        if abs(time / epsilon - round(time / epsilon)) > 1e-9 * time / epsilon:
            raise ValueError(f"weak_error: time must be a multiple of every epsilon, got {time} and {epsilon}")
    errors = []
    for index, epsilon in enumerate(epsilons):
        common = {"paths": paths, "sharing": sharing, "control": True, "progress": progress}
        if descents is None:
            descent = dropout_descent(problem, epsilon, time, seed=seed, **common)  # type: ignore[arg-type]
        else:
            descent = descents[index]
        equation = simulate(problem, epsilon, time, order=order, substeps=substeps, seed=seed + 1, **common)  # type: ignore[arg-type]
        errors.append(distance(equation, descent))
    law = fit_power_law(list(epsilons), [e.value for e in errors], [e.stderr for e in errors])
    return WeakErrors(order, tuple(epsilons), tuple(errors), law)


def distance(a: Paths, b: Paths) -> Estimate:
    """‖E a − E b‖₂ of two independent sets of paths, its bias by Monte Carlo taken off the square, with its error."""
    (mean_a, covariance_a), (mean_b, covariance_b) = a.mean(), b.mean()
    gap, covariance = mean_a - mean_b, covariance_a + covariance_b
    square = float(gap @ gap)
    unbiased = math.sqrt(max(square - float(covariance.trace()), 0.0))
    return Estimate(unbiased, math.sqrt(float(gap @ covariance @ gap) / square) if square > 0.0 else 0.0)


def _prepare(
    name: str, problem: Problem, epsilon: float, time: float, paths: int, sharing: Sharing, seed: int
) -> tuple[FlatRisk, int]:
    if not isinstance(problem, Problem):
        raise TypeError(f"{name}: problem must be a Problem, got {type(problem).__name__}")
    if not 0.0 < epsilon < math.inf or not 0.0 < time < math.inf:
        raise ValueError(f"{name}: epsilon and time must be positive numbers, got {epsilon!r} and {time!r}")
    if isinstance(paths, bool) or not isinstance(paths, int) or paths < 1:
        raise ValueError(f"{name}: paths must be an int >= 1, got {paths!r}")
    if sharing not in ("sample", "batch"):
        raise ValueError(f"{name}: sharing must be 'sample' or 'batch', got {sharing!r}")
    return FlatRisk(problem, sharing, seed), max(1, round(time / epsilon))


def _run(
    risk: FlatRisk,
    step: Equation | Descent,
    draw: Callable[[int, torch.Generator, int], Tensor],
    steps: int,
    paths: int,
    control: bool,
    records: int,
    seed: int,
    progress: bool,
    epsilon: float,
    process: str,
) -> Paths:
    """All paths, step by step; beside them the linearised fluctuation about the noiseless path."""
    generator = torch.Generator().manual_seed(seed & (2**63 - 1))
    theta = risk.theta.expand(paths, -1).clone()
    delta, centre = (torch.zeros_like(theta), risk.theta.clone()) if control else (None, None)
    marks = {round(i * steps / max(records - 1, 1)) for i in range(max(records, 1))} if records > 1 else {steps}
    times, risks = [], []
    size = max(1, _CHUNK_BYTES // (8 * risk.problem.n * (1 + sum(units for units, _ in risk.sites))))
    many = vmap(step, chunk_size=size)

    def tangent(z: Tensor, d: Tensor) -> Tensor:
        assert centre is not None
        value, moved = directional(lambda t: step(t, z), centre, d)
        return value + moved

    def record(index: int) -> None:
        with torch.no_grad():
            times.append(index * step.h)
            risks.append(vmap(risk.clean, chunk_size=size)(theta))

    bar = tqdm(range(steps), desc=f"{process}, epsilon {epsilon:g}", disable=not progress, leave=False)
    with torch.no_grad(), twice_differentiable(risk.problem.model, risk.problem.device):
        for index in bar:
            if index in marks:
                record(index)
                bar.set_postfix(risk=f"{float(risks[-1].mean()):.4g}", refresh=False)
            z = draw(paths, generator, index).to(theta.device)
            theta = many(theta, z)
            if delta is not None and centre is not None:
                ahead = step.noiseless(centre, z[0])
                delta = vmap(tangent, chunk_size=size)(z, delta) - ahead
                centre = ahead
            if not bool(torch.isfinite(theta).all()):
                raise ValueError(f"{process}: paths must stay finite, got NaN or Inf at step {index}; lower epsilon")
        if steps in marks:
            record(steps)
    return Paths(theta, delta, torch.tensor(times, dtype=torch.float64), torch.stack(risks).double(), epsilon, process)
