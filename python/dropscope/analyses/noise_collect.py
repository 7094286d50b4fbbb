"""Random gradient and trajectory data of a network, under dropout and under the noises it is held against."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from dropscope.analyses.noise_data import NoiseData, NoiseName, noise_data
from dropscope.masks import MaskKey, Sharing
from dropscope.memory import budget, readable
from dropscope.operators.hessian import Hessian
from dropscope.problem import Batch, Problem
from dropscope.spectral import eigsh

Names = str | Sequence[str] | None


def gradient_data(
    problem: Problem,
    count: int = 1000,
    *,
    noise: NoiseName = "dropout",
    names: Names = None,
    batch_size: int | None = None,
    scale: float | None = None,
    sharing: Sharing = "sample",
    seed: int = 0,
    memory: int | None = None,
    progress: bool = False,
) -> NoiseData:
    """Random gradient data: gradients at fixed parameters under ``count`` draws of a noise (arXiv:2305.15850, §5.2).

    - ``"dropout"``: the full-batch gradient under draw m of every mask, or a mini-batch's with ``batch_size``;
    - ``"minibatch"``: the gradient of ``batch_size`` samples drawn without replacement, dropout off;
    - ``"gradient"``: ∇R + scale·z, z standard normal: isotropic, Σ = scale² I;
    - ``"weights"``: ∇R(θ + scale·z): isotropic in the weights, so that Σ = scale² H² for small scales: it is aligned
      with the Hessian by construction;
    - ``"none"``: ∇R each time.

    Args:
        problem: at its present parameters; left as it was.
        count: N, at least 4.
        noise: one of the above.
        names: parameters that are recorded, as for ``SymmetricOperator.restrict``; all by default.
        batch_size: samples of a mini-batch.
        scale: standard deviation per coordinate, for the two isotropic noises.
        sharing: ``"sample"`` gives each sample its own mask, ``"batch"`` shares one over all.
        seed: seed of masks, mini-batches and isotropic noise.
        memory: bytes that the rows may take, by default half of what is free.
        progress: show a bar.

    Returns:
        The rows, less their mean.

    Raises:
        TypeError: if problem is not a Problem.
        ValueError: if an argument is out of range, missing or not of this noise, or memory does not hold the rows.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
        >>> problem = Problem(model, torch.nn.MSELoss(), (torch.ones(6, 2), torch.zeros(6, 1)))
        >>> gradient_data(problem, 20, names="2.weight").rows.shape
        torch.Size([20, 8])
    """
    source = _Source("gradient_data", problem, noise, batch_size, scale, sharing, seed)
    block = _Block("gradient_data", problem, names)
    rows = block.rows(count, memory)
    with tqdm(total=count, desc="gradient data", unit="draw", disable=not progress, leave=False) as bar:
        for m in range(count):
            rows[m] = block.take(source.gradient(m, once=True))
            bar.update()
    return noise_data(rows, "gradient", noise=noise, blocks=block.blocks)


def trajectory_data(
    problem: Problem,
    count: int,
    rate: float,
    *,
    noise: NoiseName = "dropout",
    names: Names = None,
    runs: int = 4,
    batch_size: int | None = None,
    scale: float | None = None,
    sharing: Sharing = "sample",
    limit: float = 4.0,
    refuse: bool = False,
    sharpness: float | None = None,
    seed: int = 0,
    memory: int | None = None,
    progress: bool = False,
) -> NoiseData:
    """Random trajectory data: the parameters after each of ``count`` steps θ ← θ - rate · g under a noise.

    Every run starts at the parameters as they are, near a minimum, takes ``count`` steps and is freed of its linear
    trend, which is relaxation and drift. The window rule: along a direction of curvature λ the memory is 1/(rate·λ)
    steps; a run of many memories of the sharpest direction is stationary there, Var ~ 1/λ, and still drifts elsewhere,
    so that the relation to be measured turns round. rate · count · λ_max(H) should not exceed 1 to 4. All parameters of
    the problem move; ``names`` says which are recorded. Weight noise is added after each step, scale · z.

    Args:
        problem: at its present parameters; left as it was.
        count: steps of a run, at least 4.
        rate: constant learning rate, > 0.
        noise: as of :func:`gradient_data`.
        names: parameters that are recorded; all by default.
        runs: independent runs; errors need 2, those of traces 3.
        batch_size: samples of a mini-batch.
        scale: standard deviation per coordinate, for the two isotropic noises.
        sharing: of the masks.
        limit: of rate · count · λ_max(H); beyond it the result has the status ``"window_too_long"``.
        refuse: raise instead, before any step.
        sharpness: λ_max(H) where it is known; else it is measured.
        seed: seed of all noise.
        memory: bytes that the rows may take.
        progress: show a bar.

    Returns:
        The rows, less the trend of each run, with window, status and the share of the trend (``drift``).

    Raises:
        TypeError: if problem is not a Problem.
        ValueError: as of :func:`gradient_data`; with ``refuse``, if the window is too long.
    """
    source = _Source("trajectory_data", problem, noise, batch_size, scale, sharing, seed)
    if not 0.0 < rate < math.inf:
        raise ValueError(f"trajectory_data: rate must be positive and finite, got {rate!r}")
    if isinstance(runs, bool) or not isinstance(runs, int) or runs < 1:
        raise ValueError(f"trajectory_data: runs must be an int of at least 1, got {runs!r}")
    block = _Block("trajectory_data", problem, names)
    rows = block.rows(count, memory, runs)
    if sharpness is None:
        sharpness = float(eigsh(Hessian(problem), 1, which="LA", tol=1e-2, seed=seed).values[0])
    if refuse and rate * count * sharpness > limit:
        raise ValueError(
            f"trajectory_data: rate * count * λ_max(H) must be at most {limit:g}, got {rate * count * sharpness:.3g}: "
            f"with λ_max(H) = {sharpness:.3g} take at most {max(int(limit / (rate * sharpness)), 0)} steps"
        )
    with tqdm(total=runs * count, desc="trajectory data", unit="step", disable=not progress, leave=False) as bar:
        for run in range(runs):
            with _moving(problem) as parameters:
                for step in range(count):
                    index = run * count + step
                    _step(problem, parameters, source, index, rate)
                    torch.cat([parameters[name].reshape(-1) for name in block.blocks], out=rows[index])
                    bar.update()
    return noise_data(
        rows,
        "trajectory",
        noise=noise,
        blocks=block.blocks,
        runs=runs,
        rate=rate,
        sharpness=sharpness,
        limit=limit,
    )


def _step(problem: Problem, parameters: dict[str, Tensor], source: _Source, index: int, rate: float) -> None:
    """One step of gradient descent, in place."""
    g = source.gradient(index)
    kick = source.normal(index, 1) if source.noise == "weights" else None
    for name, where in problem.blocks.items():
        p = parameters[name]
        p.sub_(g[where].view_as(p), alpha=rate)
        if kick is not None:
            p.add_(kick[where].view_as(p))
    if not all(bool(torch.isfinite(p).all()) for p in parameters.values()):
        raise ValueError(f"trajectory_data: rate must not make the parameters diverge, got {rate!r} (row {index})")


@contextmanager
def _moving(problem: Problem) -> Iterator[dict[str, Tensor]]:
    """Copies of the parameters stand in their place inside; then the very tensors of before."""
    before = {name: p.data for name, p in problem.params.items()}
    try:
        copies = {name: data.clone() for name, data in before.items()}
        for name, p in problem.params.items():
            p.data = copies[name]
        yield copies
    finally:
        for name, p in problem.params.items():
            p.data = before[name]


class _Block:
    """The recorded parameters."""

    def __init__(self, caller: str, problem: Problem, names: Names) -> None:
        self.caller, self.problem = caller, problem
        wanted = [names] if isinstance(names, str) else list(problem.blocks if names is None else names)
        self.blocks: dict[str, slice] = {}
        self.dim = 0
        for name in wanted:
            found = [b for b in problem.blocks if b == name or (name.endswith("*") and b.startswith(name[:-1]))]
            if not found:
                raise ValueError(f"{caller}: names must be among {list(problem.blocks)}, got {name!r}")
            for match in found:
                if match in self.blocks:
                    raise ValueError(f"{caller}: names must choose each parameter once, got {match!r} twice")
                size = problem.params[match].numel()
                self.blocks[match] = slice(self.dim, self.dim + size)
                self.dim += size

    def rows(self, count: int, memory: int | None, runs: int = 1) -> Tensor:
        """Room for the rows."""
        if isinstance(count, bool) or not isinstance(count, int) or count < 4:
            raise ValueError(f"{self.caller}: count must be an int of at least 4, got {count!r}")
        problem, limit = self.problem, budget(self.caller, memory, self.problem.device)
        size = runs * count * self.dim * torch.empty(0, dtype=problem.dtype).element_size()
        if size > limit:
            raise ValueError(
                f"{self.caller}: memory must hold {runs * count} rows of {self.dim}, {readable(size)}, got "
                f"{readable(limit)}; name fewer parameters, or take GradientNoise, which stores no rows"
            )
        return torch.empty(runs * count, self.dim, dtype=problem.dtype, device=problem.device)

    def take(self, g: Tensor) -> Tensor:
        """The recorded part of a flat vector."""
        if len(self.blocks) == len(self.problem.blocks) and list(self.blocks) == list(self.problem.blocks):
            return g
        return torch.cat([g[self.problem.blocks[name]] for name in self.blocks])


@dataclass
class _Source:
    """Gradients under a noise, each a function of seed and index."""

    caller: str
    problem: Problem
    noise: NoiseName
    batch_size: int | None
    scale: float | None
    sharing: Sharing
    seed: int
    batches: list[Batch] = field(init=False, default_factory=list)
    _still: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        who, noise = self.caller, self.noise
        if not isinstance(self.problem, Problem):
            raise TypeError(f"{who}: problem must be a Problem, got {type(self.problem).__name__}")
        if noise not in get_args(NoiseName):
            raise ValueError(f"{who}: noise must be one of {get_args(NoiseName)}, got {noise!r}")
        if self.sharing not in ("sample", "batch"):
            raise ValueError(f"{who}: sharing must be 'sample' or 'batch', got {self.sharing!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"{who}: seed must be an int in [0, 2**63), got {self.seed!r}")
        wants_scale = noise in ("gradient", "weights")
        if wants_scale != (self.scale is not None) or (self.scale is not None and not 0.0 < self.scale < math.inf):
            rule = "a positive number" if wants_scale else "left out"
            raise ValueError(f"{who}: scale must be {rule} for {noise!r} noise, got {self.scale!r}")
        if (noise == "minibatch") > (self.batch_size is not None) or (
            self.batch_size is not None and noise not in ("minibatch", "dropout")
        ):
            raise ValueError(f"{who}: batch_size must be given for mini-batches only, got {self.batch_size!r}")
        if self.batch_size is not None:
            if isinstance(self.batch_size, bool) or not 1 <= self.batch_size <= self.problem.n:
                raise ValueError(f"{who}: batch_size must lie in 1..{self.problem.n}, got {self.batch_size!r}")
            self.batches = list(self.problem.batches())

    def gradient(self, index: int, once: bool = False) -> Tensor:
        """The gradient of draw ``index`` at the present parameters; ``once`` if these never change."""
        key = MaskKey(self.seed, index) if self.noise == "dropout" else None
        if self.batch_size is not None:
            return self._of_samples(self._chosen(index), key)
        if key is not None:
            return self.problem.gradient(key, sharing=self.sharing)
        if self.noise == "weights" and once:
            with self.problem.displaced(self.normal(index, 1)):
                return self.problem.gradient()
        if self._still is None or not once:
            self._still = self.problem.gradient()
        return self._still + self.normal(index, 0) if self.noise == "gradient" else self._still

    def normal(self, index: int, stream: int) -> Tensor:
        """scale · z of draw ``index``."""
        assert self.scale is not None
        generator = self._generator(index, stream)
        z = torch.randn(self.problem.dim, generator=generator, dtype=self.problem.dtype)
        return z.to(self.problem.device) * self.scale

    def _generator(self, index: int, stream: int) -> torch.Generator:
        # torch mixes a seed through MT19937's initialisation, so that neighbours are unrelated streams.
        return torch.Generator().manual_seed((self.seed * 1_000_003 + index) * 4 + stream)

    def _chosen(self, index: int) -> Tensor:
        order = torch.randperm(self.problem.n, generator=self._generator(index, 2))
        return order[: self.batch_size].sort().values

    @torch.inference_mode(False)
    def _of_samples(self, ids: Tensor, key: MaskKey | None) -> Tensor:
        """Gradient of the mean loss of some samples."""
        problem, parts, start, weight = self.problem, [], 0, 0.0
        self.problem.check(masks=key is not None)
        for batch in self.batches:
            own = ids[(ids >= start) & (ids < start + batch.size)] - start
            start += batch.size
            if not len(own):
                continue
            with torch.enable_grad():
                values, weights = problem.raw_losses(batch.take(own), key, sharing=self.sharing)
                grads: Any = torch.autograd.grad(values.sum(), list(problem.params.values()), materialize_grads=True)
            parts.append(problem.flatten(grads).detach())
            weight += float(weights.double().sum())
            problem.require_finite(parts[-1], batch)
        return torch.stack(parts).sum(0) / max(weight, 1e-300)
