"""The noise structure followed along training: a user's own loop, measured at chosen steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from dropscope.analyses.alignment import Alignment
from dropscope.analyses.hessian_variance import HessianVariance, hessian_variance
from dropscope.analyses.noise_source import Noise
from dropscope.analyses.saving import Result
from dropscope.analyses.variance_flatness import VarianceFlatness, variance_flatness
from dropscope.estimate import Estimate
from dropscope.operators.base import SymmetricOperator
from dropscope.operators.gradient_noise import GradientNoise
from dropscope.operators.hessian import Hessian
from dropscope.problem import Problem

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class NoiseStructure:
    """The relations between noise, curvature and flatness at one moment of training.

    Attributes:
        step: of the training.
        risk: R, dropout off.
        curvature: variance along the Hessian's eigenvectors, and the alignment with its nulls.
        flatness: variance along the noise's own directions against interval flatness; None where not asked for.
    """

    step: int
    risk: float
    curvature: HessianVariance
    flatness: VarianceFlatness | None

    @property
    def alignment(self) -> Alignment:
        """Tr(HΣ) against the isotropic and the same-spectrum null."""
        return self.curvature.alignment


def noise_structure(
    problem: Problem,
    noise: Noise | None = None,
    *,
    step: int = 0,
    names: str | Sequence[str] | None = None,
    k: int = 20,
    factor: float = 2.0,
    flatness: bool = True,
    draws: int = 8,
    probes: int = 16,
    tol: float = 1e-3,
    seed: int = 0,
    progress: bool = False,
) -> NoiseStructure:
    """Measure every relation of arXiv:2111.01022 and arXiv:2305.15850 (§5.2) at the present parameters.

    Args:
        problem: the risk.
        noise: any noise; by default ``GradientNoise(problem, draws, seed)``.
        step: what the moment is called.
        names: a block of parameters, as of ``SymmetricOperator.restrict``; its dropout noise then has no errors beyond
            those of the probes unless ``noise`` is data of this block.
        k: eigenpairs of Hessian and noise.
        factor: of the interval flatness.
        flatness: whether to measure it.
        draws: masks per sample of the default noise.
        probes: random vectors for the traces.
        tol: relative tolerance of the eigenpairs.
        seed: of masks, eigensolvers and probes.
        progress: show bars.
    """
    H: SymmetricOperator = Hessian(problem)
    own = GradientNoise(problem, draws, seed) if noise is None else None
    try:
        source: Noise = own if own is not None else noise  # type: ignore[assignment]
        if names is not None:
            H = H.restrict(names)
            whole = source.dropout if isinstance(source, GradientNoise) else source
            source = whole.restrict(names) if isinstance(whole, SymmetricOperator) and whole.dim != H.dim else whole
        return NoiseStructure(
            step=step,
            risk=problem.risk(),
            curvature=hessian_variance(H, source, k, probes=probes, tol=tol, seed=seed, progress=progress),
            flatness=variance_flatness(problem, source, k, factor, tol=tol, seed=seed, progress=progress)
            if flatness
            else None,
        )
    finally:
        if own is not None:
            own.close()


@dataclass(frozen=True)
class NoiseTrace(Result):
    """What :func:`follow` measured, a moment after the other.

    Attributes:
        moments: one for each checkpoint.
    """

    moments: tuple[NoiseStructure, ...]

    def table(self) -> list[dict[str, Any]]:
        """One row per checkpoint: every measurement with its standard error."""
        rows = []
        for moment in self.moments:
            a, row = moment.alignment, {"step": moment.step, "risk": moment.risk}
            measured: dict[str, Estimate] = {
                "trace_noise": a.trace_noise,
                "trace_h": a.trace_h,
                "trace_product": a.trace_product,
                "isotropic_product": a.isotropic,
                "ratio": a.ratio,
                "cosine": a.cosine,
                "null": a.null,
                "exponent_curvature": moment.curvature.law.slope,
            }
            row |= {"null_spread": a.null_spread, "r_curvature": moment.curvature.law.r}
            if moment.flatness is not None:
                measured["exponent_flatness"] = moment.flatness.law.slope
                row["r_flatness"] = moment.flatness.law.r
            for name, estimate in measured.items():
                row |= {name: estimate.value, f"{name}_stderr": estimate.stderr}
            row["sharpness"] = float(moment.curvature.eigenvalues[0])
            rows.append(row)
        return rows

    def plot(self) -> Figure:
        """Return a figure: Tr(HΣ) and its isotropic null, and the cosine with its same-spectrum null, over steps."""
        from dropscope import plots

        return plots.noise_trace(self)

    def __repr__(self) -> str:
        head = f"{'step':>8} {'risk':>10} {'ratio':>16} {'cosine':>8} {'chance':>8} {'s(λ)':>7} {'s(F)':>7}"
        lines = [f"NoiseTrace of {len(self.moments)} checkpoints", head]
        lines += [
            f"{row['step']:>8} {row['risk']:>10.4g} {row['ratio']:>8.3g} ± {row['ratio_stderr']:<5.2g} "
            f"{row['cosine']:>8.3g} {row['null']:>8.2g} {row['exponent_curvature']:>7.2f} "
            f"{row.get('exponent_flatness', float('nan')):>7.2f}"
            for row in self.table()
        ]
        return "\n".join(lines)


def follow(
    problem: Problem,
    training: Iterable[int],
    at: Sequence[int],
    *,
    noise: Callable[[Problem], Noise] | None = None,
    progress: bool = False,
    **options: Any,
) -> NoiseTrace:
    """Run a user's own training loop and measure the noise structure at chosen steps.

    Args:
        problem: on the model that is trained.
        training: the loop, as a generator that yields the number of the step it has reached, 0 before the first; it is
            closed after the last checkpoint.
        at: steps to measure at.
        noise: makes the noise of a checkpoint, e.g. ``lambda problem: gradient_data(problem, 500)``; by default
            ``GradientNoise``.
        progress: show a bar.
        options: of :func:`noise_structure`: ``k``, ``draws``, ``names``, ``factor``, ``flatness``, ``probes``, ...

    Returns:
        The checkpoints, with ``.table()``, ``.plot()`` and ``.save()``.

    Raises:
        TypeError: if problem is not a Problem.
        ValueError: if ``at`` is empty, or the loop ends before its last step.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1)).double()
        >>> X = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> def training():
        ...     optimizer = torch.optim.SGD(model.parameters(), 0.1)
        ...     for step in range(100):
        ...         yield step
        ...         optimizer.zero_grad()
        ...         model(X).square().mean().backward()
        ...         optimizer.step()
        >>> problem = Problem(model, torch.nn.MSELoss(), (X, X[:, :1]))
        >>> trace = follow(problem, training(), at=[0, 5], k=3)
        >>> [row["step"] for row in trace.table()]
        [0, 5]
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"follow: problem must be a Problem, got {type(problem).__name__}")
    wanted = sorted(set(at))
    if not wanted:
        raise ValueError("follow: at must name at least one step, got none")
    moments: list[NoiseStructure] = []
    loop = iter(training)
    try:
        with tqdm(total=len(wanted), desc="follow", unit="checkpoint", disable=not progress, leave=False) as bar:
            for step in loop:
                if step in wanted:
                    measured = noise(problem) if noise is not None else None
                    moments.append(noise_structure(problem, measured, step=step, **options))
                    bar.set_postfix(ratio=f"{moments[-1].alignment.ratio.value:.3g}", refresh=False)
                    bar.update()
                if step >= wanted[-1]:
                    break
    finally:
        close = getattr(loop, "close", None)
        if close is not None:
            close()
    if [m.step for m in moments] != wanted:
        raise ValueError(f"follow: training must reach the steps {wanted}, got only {[m.step for m in moments]}")
    return NoiseTrace(tuple(moments))
