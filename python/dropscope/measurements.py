"""What the commands spectrum, noise and relation measure on a user's problem, as text, numbers, arrays and a page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dropscope.analyses import HessianVariance, VarianceFlatness, hessian_variance, variance_flatness
from dropscope.estimate import Estimate
from dropscope.operators.gradient_noise import GradientNoise
from dropscope.operators.hessian import Hessian
from dropscope.problem import Problem
from dropscope.report import Page, Plate, Table, number, plain_estimates, provenance, text_table, with_error
from dropscope.spectral import Eigenpairs, eigsh, spectral_density, trace


@dataclass(frozen=True)
class Measured:
    """Results in every form that the command line hands out.

    Attributes:
        text: for the terminal.
        content: numbers, for JSON.
        arrays: for safetensors.
        page: the report.
        unsound: what is not converged or heavy-tailed, a line each.
    """

    text: str
    content: dict[str, Any]
    arrays: dict[str, Tensor]
    page: Page
    unsound: list[str]


def spectrum(
    problem: Problem, pairs: int, seed: int, tol: float, probes: int, steps: int, progress: bool = False
) -> Measured:
    """Leading eigenpairs, trace and density of the Hessian, dropout off."""
    _check_pairs(problem, pairs)
    from dropscope import plots

    risk, H = problem.risk(), Hessian(problem)
    top = eigsh(H, pairs, which="LM", tol=tol, seed=seed, progress=progress)
    density = spectral_density(H, probes=probes, steps=steps, seed=seed, progress=progress)
    total = trace(H, seed=seed, progress=progress)
    rows = [
        [str(i + 1), number(value, 6), number(residual, 2), "yes" if converged else "no"]
        for i, (value, residual, converged) in enumerate(
            zip(top.values.tolist(), top.residuals.tolist(), top.converged.tolist(), strict=True)
        )
    ]
    table = Table("Leading eigenvalues", ["", "eigenvalue", "residual", "converged"], rows, f"Status: {top.status}")
    summary = f"{problem!r}\nrisk {number(risk, 6)}   Tr H {with_error(total)}   mean λ {with_error(density.moment(1))}"
    plates = [
        Plate(
            "Spectral density of the Hessian",
            plots.spectral_density({"": density}, top={"": top}),
            f"Stochastic Lanczos quadrature, {probes} probes of {steps} steps. Band: 95 % over probes. Ticks: the "
            f"{pairs} eigenvalues of largest magnitude.",
        ),
        Plate("Leading eigenvalues", plots.eigenpairs(top), "Bars: norm of the residual, which bounds the error."),
    ]
    return Measured(
        f"{summary}\n\n{text_table(table.columns, rows)}\n{top.status}",
        {
            "risk": risk,
            "dim": problem.dim,
            "samples": problem.n,
            "eigenvalues": top.values,
            "residuals": top.residuals,
            "converged": top.converged,
            "status": top.status.name,
            "trace": plain_estimates([total])[0],
            "provenance": provenance(seed=seed),
        },
        {
            "values": top.values,
            "vectors": top.vectors,
            "density.nodes": density.nodes,
            "density.weights": density.weights,
        },
        Page("Spectrum of the Hessian", repr(problem), sections=[table, *plates], provenance=provenance(seed=seed)),
        _unconverged(top, "Hessian"),
    )


def noise(problem: Problem, pairs: int, seed: int, draws: int, progress: bool = False) -> Measured:
    """The dropout noise: trace, split, effective samples, kurtosis, gain, leading eigenpairs."""
    _check_pairs(problem, pairs)
    from dropscope import plots

    risk = problem.risk()
    with GradientNoise(problem, draws=draws, seed=seed, progress=progress) as measured:
        split = measured.split()
        top = measured.eigsh(pairs, tol=1e-3, seed=seed, progress=progress)
        variances = measured.variance_along(top.vectors)
        numbers = {
            "effective_samples": measured.effective_samples,
            "kurtosis": measured.kurtosis,
            "gain": measured.gain,
        }
    facts = [
        ["trace of the dropout noise", with_error(split.dropout)],
        ["trace of the sampling noise", with_error(split.sampling)],
        ["trace of both", with_error(split.total)],
        ["effective samples Nₑ", number(numbers["effective_samples"])],
        ["excess kurtosis over masks K", number(numbers["kurtosis"])],
        ["gain over full-batch draws G", number(numbers["gain"])],
    ]
    rows = [[str(i + 1), with_error(v), v.status.replace("_", "-")] for i, v in enumerate(variances)]
    columns = ["", "eigenvalue", "status"]
    caption = f"Covariance of the full-batch gradient; {draws} masks for each of {problem.n} samples."
    sections: list[Table | Plate] = [
        Table("Noise of the full-batch gradient", ["", "value ± standard error"], facts, caption),
        Table("Leading eigenvalues of the dropout noise", columns, rows, "Variance along each eigenvector."),
        Plate("Eigenvalues", plots.noise_eigenvalues(variances), "Bars: 95 % intervals. Hollow: heavy-tailed."),
    ]
    text = f"{problem!r}\nrisk {number(risk, 6)}\n\n"
    text += "\n".join(f"{name:<30} {value}" for name, value in facts) + "\n\n" + text_table(columns, rows)
    text += "\n\n" + problem.plan()
    if split.dropout.value == 0.0:
        text += "\n\nThere is no dropout noise: the masks change no gradient of this model."
    return Measured(
        text,
        {
            "risk": risk,
            "dim": problem.dim,
            "samples": problem.n,
            **numbers,
            "traces": plain_estimates(split._asdict()),
            "eigenvalues": plain_estimates(variances),
            "provenance": provenance(seed=seed, draws=draws),
        },
        {"values": top.values, "vectors": top.vectors},
        Page("Noise of dropout", repr(problem), sections=sections, provenance=provenance(seed=seed, draws=draws)),
        _unconverged(top, "noise") + _heavy({"trace": split.dropout, **_numbered("eigenvalue", variances)}),
    )


def relation(problem: Problem, pairs: int, seed: int, draws: int, factor: float, progress: bool = False) -> Measured:
    """Noise against curvature and against flatness."""
    _check_pairs(problem, pairs)
    from dropscope import plots

    risk, H = problem.risk(), Hessian(problem)
    with GradientNoise(problem, draws=draws, seed=seed, progress=progress) as measured:
        curvature = hessian_variance(H, measured, pairs, seed=seed, progress=progress)
        flatness = variance_flatness(problem, measured, pairs, factor, seed=seed, progress=progress)
    relations, directions = _relation_tables(problem, curvature, flatness, draws)
    unsound = [] if bool(curvature.converged.all()) else ["Hessian eigenpairs: not all converged"]
    unsound += _heavy(_numbered("along curvature", curvature.variances))
    unsound += _heavy(_numbered("own direction", flatness.variances))
    plates = [
        Plate(
            "Noise against curvature",
            plots.hessian_variance(curvature),
            "Variance of the dropout noise along Hessian eigenvectors against their eigenvalues. Bars: 95 % intervals.",
        ),
        Plate(
            "Noise against flatness",
            plots.variance_flatness(flatness),
            f"Variance along the noise's eigenvectors against the distance over which the loss grows {factor:g} times.",
        ),
    ]
    text = f"{problem!r}\nrisk {number(risk, 6)}\n\n"
    text += "\n".join(f"{name:<30} {value}" for name, value in relations.rows)
    text += "\n\n" + text_table(directions.columns, directions.rows)
    a, made = curvature.alignment, provenance(seed=seed, draws=draws)
    estimates = {"exponent_curvature": curvature.law.slope, "exponent_flatness": flatness.law.slope}
    content = {
        "risk": risk,
        "dim": problem.dim,
        "samples": problem.n,
        "estimates": plain_estimates(estimates | {"ratio": a.ratio, "cosine": a.cosine, "null": a.null}),
        "noise_along_curvature": curvature.table(),
        "noise_against_flatness": flatness.table(),
        "provenance": made,
    }
    sides = {"flatness.left": flatness.flatness.left, "flatness.right": flatness.flatness.right}
    page = Page("Noise, curvature and flatness", repr(problem), sections=[relations, *plates, directions],
                provenance=made)  # fmt: skip
    return Measured(text, content, {"eigenvalues": curvature.eigenvalues} | sides, page, unsound)


def _relation_tables(
    problem: Problem, curvature: HessianVariance, flatness: VarianceFlatness, draws: int
) -> tuple[Table, Table]:
    """The relations in numbers, and what they were fitted to."""
    a, law, inverse = curvature.alignment, curvature.law, flatness.law
    facts = [
        ["exponent of Var ~ λ(H)^s", f"{with_error(law.slope)}, r = {number(law.r, 2)}"],
        ["exponent of Var ~ F^s", f"{with_error(inverse.slope)}, r = {number(inverse.r, 2)}"],
        ["Tr(HΣ) / Tr(HΣ̄)", with_error(a.ratio)],
        ["cosine of H and Σ", with_error(a.cosine)],
        ["the same by chance", with_error(a.null)],
    ]
    columns = ["", "curvature λ", "noise along it", "noise along its own", "flatness F"]
    parts = zip(curvature.eigenvalues.tolist(), curvature.variances, flatness.variances,
                flatness.flatness.flatness.tolist(), strict=True)  # fmt: skip
    rows = [
        [str(i + 1), number(value), with_error(along), with_error(own), number(flat)]
        for i, (value, along, own, flat) in enumerate(parts)
    ]
    return (
        Table("Relations", ["", "value ± standard error"], facts, f"{draws} masks for each of {problem.n} samples."),
        Table("By direction", columns, rows, "Largest first."),
    )


def _check_pairs(problem: Problem, pairs: int) -> None:
    if pairs > problem.dim:
        raise ValueError(f"eigenpairs: k must be at most the number of parameters, {problem.dim}, got {pairs}")


def _numbered(name: str, estimates: list[Estimate] | tuple[Estimate, ...]) -> dict[str, Estimate]:
    return {f"{name} {i + 1}": e for i, e in enumerate(estimates)}


def _heavy(estimates: dict[str, Estimate]) -> list[str]:
    """One line for all that is heavy-tailed."""
    names = [name for name, e in estimates.items() if e.status == "heavy_tailed"]
    if not names:
        return []
    remedy = next(iter(estimates[name].remedy for name in names))
    return [f"heavy-tailed: {', '.join(names)} ({remedy})"]


def _unconverged(pairs: Eigenpairs, name: str) -> list[str]:
    return [] if bool(pairs.converged.all()) else [f"{name} eigenpairs: {pairs.status}"]
