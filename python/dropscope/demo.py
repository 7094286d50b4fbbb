"""The demo: a network trained with dropout on scikit-learn's digits, measured from initialisation to interpolation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from dropscope.analyses import HessianVariance, VarianceFlatness, hessian_variance, variance_flatness
from dropscope.estimate import Estimate
from dropscope.masks import MaskKey, replay_dropout
from dropscope.operators.gradient_noise import GradientNoise
from dropscope.operators.hessian import Hessian
from dropscope.problem import Problem
from dropscope.spectral import Eigenpairs, SpectralDensity, eigsh, spectral_density, trace


@dataclass(frozen=True)
class Settings:
    """What the demo trains and how finely it measures.

    Attributes:
        seed: seed of data split, initialisation, masks and probes.
        samples: training samples; the remaining digits test.
        width: units in each of the two hidden layers.
        drop: drop probability after each hidden layer.
        rate: learning rate of Adam, full batch.
        levels: training losses (dropout off) at which to measure, falling; initialisation is measured as well.
        max_steps: where training stops if the last level is not reached.
        draws: masks drawn for every sample.
        pairs: eigenpairs of Hessian and noise.
        probes: random vectors for the density.
        steps: Lanczos steps for each.
        matvecs: Hessian products for the trace.
    """

    seed: int = 0
    samples: int = 1000
    width: int = 128
    drop: float = 0.2
    rate: float = 1e-3
    levels: tuple[float, ...] = (0.5, 0.1, 0.02, 0.002)
    max_steps: int = 3000
    draws: int = 8
    pairs: int = 20
    probes: int = 6
    steps: int = 60
    matvecs: int = 90


@dataclass(frozen=True)
class Checkpoint:
    """Everything measured at one moment of training.

    Attributes:
        label: name in tables and figures.
        step: optimiser steps taken.
        risk: training loss, dropout off.
        accuracy: on the training data, dropout off.
        test_accuracy: on the test data.
        parameters: the flat parameter vector.
        top: leading eigenpairs of the Hessian.
        density: its spectral density.
        trace_h: its trace.
        dropout: trace of the dropout part W of one sample's gradient noise.
        sampling: trace of the sampling part B.
        effective_samples: N_e, how many samples carry the noise.
        kurtosis: its excess kurtosis over masks.
        gain: full-batch draws that one draw of every sample is worth.
        noise: leading eigenpairs of the covariance of the full-batch gradient under dropout.
        noise_variances: the variance along each of its eigenvectors, with errors.
        relation: noise against curvature.
        flatness: noise against interval flatness.
        seconds: what the measurement took.
    """

    label: str
    step: int
    risk: float
    accuracy: float
    test_accuracy: float
    parameters: Tensor
    top: Eigenpairs
    density: SpectralDensity
    trace_h: Estimate
    dropout: Estimate
    sampling: Estimate
    effective_samples: float
    kurtosis: float
    gain: float
    noise: Eigenpairs
    noise_variances: tuple[Estimate, ...]
    relation: HessianVariance
    flatness: VarianceFlatness
    seconds: float

    @property
    def status(self) -> str:
        """``"ok"``, ``"heavy_tailed"`` when rare masks of a few samples carry the noise, or ``"not converged"``."""
        if not (bool(self.top.converged.all()) and bool(self.noise.converged.all())):
            return "not converged"
        return self.dropout.status

    @property
    def heavy(self) -> int:
        """How many of the variances behind the two relations are heavy-tailed."""
        return sum(v.status == "heavy_tailed" for v in (*self.relation.variances, *self.flatness.variances))


@dataclass
class Training:
    """The network, its data, and full-batch Adam under replayed dropout: the masks of step t are draw t of the seed."""

    settings: Settings
    model: nn.Module = field(init=False)
    problem: Problem = field(init=False)
    train: tuple[Tensor, Tensor] = field(init=False)
    test: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        s = self.settings
        self.train, self.test = digits(s.samples, s.seed)
        self.model = network(s.width, s.drop, s.seed)
        self.problem = Problem(self.model, nn.CrossEntropyLoss(), self.train, batch_size=1024)

    def until_levels(self, bar: tqdm[Any]) -> Iterator[tuple[str, int, float]]:
        """Yield label, step and training loss at initialisation and when each level is first reached."""
        s, (X, y) = self.settings, self.train
        ids = torch.arange(len(X))
        optimiser = torch.optim.Adam(self.model.parameters(), lr=s.rate)
        waiting = list(s.levels)
        risk = self.problem.risk()
        yield "initialisation", 0, risk
        for step in range(1, s.max_steps + 1):
            self.model.train()
            with replay_dropout(MaskKey(s.seed, step), ids, model=self.model):
                loss = nn.functional.cross_entropy(self.model(X), y)
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimiser.step()
            if step % 5 and step < s.max_steps:
                continue
            risk = self.problem.risk()
            bar.set_postfix_str(f"training: step {step}, loss {risk:.3g}", refresh=step % 50 == 0)
            while waiting and risk <= waiting[0]:
                yield f"loss {waiting.pop(0):g}", step, risk
            if not waiting:
                return
        yield "last step", s.max_steps, risk

    def accuracy(self, X: Tensor, y: Tensor) -> float:
        """Share of right answers, dropout off."""
        self.model.eval()
        with torch.no_grad():
            return float((self.model(X).argmax(1) == y).double().mean())


def digits(samples: int, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """scikit-learn's 8×8 digits, scaled to [0, 1], shuffled and split.

    Raises:
        ImportError: if scikit-learn is missing.
        ValueError: if fewer than 100 samples, or none for the test, are left.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:  # pragma: no cover - an optional dependency
        raise ImportError("dropscope demo needs scikit-learn: pip install 'dropscope[demo]'") from error
    images, labels = load_digits(return_X_y=True)
    if not 100 <= samples < len(images):
        raise ValueError(f"demo: samples must lie in [100, {len(images) - 1}], got {samples}")
    X, y = torch.tensor(images, dtype=torch.float32) / 16.0, torch.tensor(labels)
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed))
    X, y = X[order], y[order]
    return (X[:samples], y[:samples]), (X[samples:], y[samples:])


def network(width: int, drop: float, seed: int) -> nn.Module:
    """64 - width - width - 10 with ReLU and dropout after each hidden layer; torch's default initialisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(64, width),
            nn.ReLU(),
            nn.Dropout(drop),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Dropout(drop),
            nn.Linear(width, 10),
        )


def run(settings: Settings | None = None, *, progress: bool = False) -> list[Checkpoint]:
    """Train and measure.

    Args:
        settings: sizes and accuracies.
        progress: show a bar.

    Returns:
        The checkpoints, from initialisation on.

    Raises:
        ImportError: if scikit-learn is missing.
        ValueError: if a setting is out of range.
    """
    settings = settings or Settings()
    training = Training(settings)
    checkpoints = []
    total = 6 * (len(settings.levels) + 1)
    with tqdm(total=total, desc="demo", unit="measurement", disable=not progress) as bar:
        for label, step, risk in training.until_levels(bar):
            checkpoints.append(measure(training, label, step, risk, bar))
    return checkpoints


def measure(training: Training, label: str, step: int, risk: float, bar: tqdm[Any]) -> Checkpoint:
    """Measure curvature, noise and their relations at the present parameters."""
    s, problem, started = training.settings, training.problem, time.perf_counter()

    def stage(name: str) -> None:
        bar.update(1 if name else 0)
        bar.set_postfix_str(f"{label}: {name}")

    bar.set_postfix_str(f"{label}: Hessian eigenpairs")
    H = Hessian(problem)
    top = eigsh(H, s.pairs, which="LA", tol=1e-3, seed=s.seed)
    stage("spectral density")
    density = spectral_density(H, probes=s.probes, steps=s.steps, seed=s.seed)
    stage("trace")
    trace_h = trace(H, matvecs=s.matvecs, seed=s.seed)
    stage("dropout noise")
    with GradientNoise(problem, draws=s.draws, seed=s.seed) as noise:
        split = noise.split()
        pairs = noise.eigsh(s.pairs, tol=1e-3, seed=s.seed)
        variances = tuple(noise.variance_along(pairs.vectors))
        stage("noise against curvature")
        relation = hessian_variance(H, noise, s.pairs, top=top, seed=s.seed)
        stage("noise against flatness")
        flatness = variance_flatness(problem, noise, s.pairs, top=pairs)
        checkpoint = Checkpoint(
            label=label,
            step=step,
            risk=risk,
            accuracy=training.accuracy(*training.train),
            test_accuracy=training.accuracy(*training.test),
            parameters=problem.flatten([p.detach() for p in problem.params.values()]),
            top=top,
            density=density,
            trace_h=trace_h,
            dropout=scaled(split.dropout, problem.n),
            sampling=scaled(split.sampling, problem.n),
            effective_samples=noise.effective_samples,
            kurtosis=noise.kurtosis,
            gain=noise.gain,
            noise=pairs,
            noise_variances=variances,
            relation=relation,
            flatness=flatness,
            seconds=time.perf_counter() - started,
        )
    bar.update(1)
    return checkpoint


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """An estimate of ``factor`` times the quantity."""
    return Estimate(
        factor * estimate.value, factor * estimate.stderr, estimate.dof, estimate.status, scale=estimate.scale
    )
