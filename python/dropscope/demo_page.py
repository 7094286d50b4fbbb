"""What the demo shows: the table in the terminal, results.json, arrays.safetensors and report.html."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from dropscope import _files
from dropscope.demo import Checkpoint, Settings
from dropscope.estimate import Estimate
from dropscope.report import Headline, Page, Plate, Table, number, plain_estimates, provenance, text_table, with_error

HEAVY = "† heavy-tailed: rare masks of a few samples carry this number, its interval is too narrow; more draws help."
UNRESOLVED = "– not resolved: the estimate is within two standard errors of zero."


def noise_rows(checkpoints: Sequence[Checkpoint]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: training, curvature and noise."""
    columns = ["", "step", "train loss", "test accuracy", "λ₁(H)", "Tr H", "dropout noise Tr W", "sampling noise Tr B",
               "samples Nₑ", "kurtosis K", "gain G", "status"]  # fmt: skip
    table = [
        [
            c.label,
            str(c.step),
            number(c.risk),
            f"{100 * c.test_accuracy:.1f} %",
            number(float(c.top.values[0])),
            resolved(c.trace_h),
            with_error(c.dropout),
            with_error(c.sampling),
            number(c.effective_samples),
            number(c.kurtosis, 2),
            number(c.gain),
            c.status.replace("_", "-"),
        ]
        for c in checkpoints
    ]
    return columns, table


def relation_rows(checkpoints: Sequence[Checkpoint]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: how noise relates to curvature and flatness."""
    columns = ["", "Var ~ λ^s: s", "r", "Tr(HΣ) / Tr(HΣ̄)", "cos(H, Σ)", "by chance", "Var ~ F^s: s", "r", "status"]
    table = []
    for c in checkpoints:
        law, inverse, a = c.relation.law, c.flatness.law, c.relation.alignment
        table.append([
            c.label,
            exponent(law.slope),
            f"{law.r:.2f}",
            resolved(a.ratio),
            with_error(a.cosine),
            resolved(a.null),
            exponent(inverse.slope),
            f"{inverse.r:.2f}".replace("-", "−"),
            f"{c.heavy} of {2 * len(c.noise_variances)} heavy-tailed †" if c.heavy else "ok",
        ])  # fmt: skip
    return columns, table


def exponent(estimate: Estimate) -> str:
    """An exponent with its standard error, to two decimals."""
    return f"{estimate.value:.2f} ± {estimate.stderr:.2f}".replace("-", "−")


def resolved(estimate: Estimate) -> str:
    """The estimate, or a dash where it cannot be told from zero."""
    return with_error(estimate) if abs(estimate.value) > 2.0 * estimate.stderr else "–"


def terminal(checkpoints: Sequence[Checkpoint]) -> str:
    """Both tables as text, narrow enough for a terminal, with their notes."""
    _, noise = noise_rows(checkpoints)
    short = ["", "loss", "test", "λ₁(H)", "dropout noise", "sampling noise", "Nₑ", "K", "G", "status"]
    kept = [0, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    columns, relation = relation_rows(checkpoints)
    narrow = [0, 1, 2, 3, 4, 6, 7, 8]
    text = [
        text_table(short, [[row[i] for i in kept] for row in noise]),
        "",
        text_table([columns[i] for i in narrow], [[row[i] for i in narrow] for row in relation]),
        "",
    ]
    cells = [cell for row in [*noise, *relation] for cell in row]
    text += [note for mark, note in (("†", HEAVY), ("–", UNRESOLVED)) if any(mark in cell for cell in cells)]
    return "\n".join(text)


def write(checkpoints: Sequence[Checkpoint], settings: Settings, out: str | os.PathLike[str], command: str) -> Path:
    """Write report.html, figures, results.json and arrays.safetensors into ``out``; return the path of the report."""
    out = Path(out)
    made = provenance(command, seed=settings.seed, settings=", ".join(f"{k}={v}" for k, v in asdict(settings).items()))
    _files.write_json(out / "results.json", results(checkpoints, made))
    _files.write_arrays(out / "arrays.safetensors", arrays(checkpoints), {"labels": [c.label for c in checkpoints]})
    return page(checkpoints, settings, made).write(out / "report.html")


def results(checkpoints: Sequence[Checkpoint], made: dict[str, str]) -> dict[str, Any]:
    """Every number, with its interval and status."""
    entries = []
    for c in checkpoints:
        a = c.relation.alignment
        estimates = {"trace_h": c.trace_h, "noise_dropout": c.dropout, "noise_sampling": c.sampling, "ratio": a.ratio,
                     "cosine": a.cosine, "null": a.null, "exponent_curvature": c.relation.law.slope,
                     "exponent_flatness": c.flatness.law.slope}  # fmt: skip
        entries.append({
            "label": c.label,
            "step": c.step,
            "risk": c.risk,
            "accuracy": c.accuracy,
            "test_accuracy": c.test_accuracy,
            "status": c.status,
            "estimates": plain_estimates(estimates),
            "effective_samples": c.effective_samples,
            "kurtosis": c.kurtosis,
            "gain": c.gain,
            "hessian_eigenvalues": c.top.values,
            "noise_eigenvalues": plain_estimates(c.noise_variances),
            "noise_along_curvature": c.relation.table(),
            "noise_against_flatness": c.flatness.table(),
            "seconds": c.seconds,
        })  # fmt: skip
    return {"checkpoints": entries, "provenance": made}


def arrays(checkpoints: Sequence[Checkpoint]) -> dict[str, Tensor]:
    """Arrays of checkpoint j under the prefix ``j.``; the parameters suffice to measure everything again."""
    found: dict[str, Tensor] = {}
    for j, c in enumerate(checkpoints):
        found[f"{j}.parameters"] = c.parameters
        found[f"{j}.hessian.values"], found[f"{j}.hessian.vectors"] = c.top.values, c.top.vectors
        found[f"{j}.noise.values"], found[f"{j}.noise.vectors"] = c.noise.values, c.noise.vectors
        found[f"{j}.density.nodes"], found[f"{j}.density.weights"] = c.density.nodes, c.density.weights
        found[f"{j}.flatness.left"], found[f"{j}.flatness.right"] = c.flatness.flatness.left, c.flatness.flatness.right
    return found


def page(checkpoints: Sequence[Checkpoint], settings: Settings, made: dict[str, str]) -> Page:
    """The report."""
    columns, table = noise_rows(checkpoints)
    noise = Table(
        "From initialisation to interpolation",
        columns,
        table,
        "Value ± standard error. H: Hessian of the training loss. W and B: covariance of one sample's gradient over "
        "its masks, and of its mean over samples. Nₑ: how many samples carry the dropout noise. K: its excess "
        "kurtosis over masks. G: full-batch draws that one draw of every sample is worth.",
        [HEAVY, UNRESOLVED],
    )
    columns, table = relation_rows(checkpoints)
    relation = Table(
        "How noise, curvature and flatness relate",
        columns,
        table,
        "Exponents of the variance of the noise: along Hessian eigenvectors against their eigenvalues λ, and along its "
        "own eigenvectors against the interval flatness F. Tr(HΣ)/Tr(HΣ̄) is 1 for isotropic noise of the same trace; "
        "“by chance” is the mean cosine for random eigenvectors at the same spectra.",
    )
    return Page(
        title="The noise of dropout, and the curvature it meets",
        lead=f"A 64-{settings.width}-{settings.width}-10 network with dropout (drop probability {settings.drop:g}) "
        f"trained on {settings.samples} of scikit-learn's handwritten digits, measured {len(checkpoints)} times "
        "between initialisation and interpolation. The loss is the cross-entropy in nats.",
        headlines=headlines(checkpoints, settings),
        sections=[
            noise,
            *relation_plates(checkpoints, settings),
            *spectral_plates(checkpoints, settings),
            relation,
        ],
        notes=[
            "Σ is the covariance, over dropout masks, of the full-batch gradient at fixed parameters and data. The "
            "masks of different samples are independent, so Σ = n⁻² Σᵢ Cov(gᵢ), estimated without bias from "
            f"{settings.draws} masks for every sample; H is the Hessian of the training loss with dropout off.",
            "Intervals of variances are χ² with effective degrees of freedom estimated from the draws of each sample; "
            "below 40 of these a number is marked heavy-tailed. Close to interpolation a few samples with rare masks "
            "are the noise, and no number of samples helps: only more draws do.",
            "Eigenvalues are of the estimated Σ; sampling biases the lower ones upwards.",
        ],
        provenance=made,
    )


def headlines(checkpoints: Sequence[Checkpoint], settings: Settings) -> list[Headline]:
    """The claims, in numbers of the checkpoint that shows them best resolved."""
    told = [c for c in checkpoints if c.status == "ok" and c.step > 0 and c.heavy <= settings.pairs // 10]
    best = told[-1] if told else checkpoints[-1]
    law, a, inverse = best.relation.law, best.relation.alignment, best.flatness.law
    largest = max(checkpoints, key=lambda c: c.gain)
    return [
        Headline(f"λ^{law.slope.value:.2f}", "noise grows with curvature λ",
                 f"variance along Hessian eigenvectors, exponent ± {law.slope.stderr:.2f}, r = {law.r:.2f}, "
                 f"at {best.label}"),
        Headline(f"{number(a.ratio.value)} ×", "more curvature than isotropic noise meets",
                 f"Tr(HΣ)/Tr(HΣ̄), ± {number(a.ratio.stderr, 2)}, at {best.label}"),
        Headline(f"{a.cosine.value:.2f}", "cosine of noise and Hessian",
                 f"± {number(a.cosine.stderr, 1)}; {number(a.null.value, 2)} for random eigenvectors, same spectra"),
        Headline(f"F^{inverse.slope.value:.2f}".replace("-", "−"), "noise falls with flatness F",
                 f"variance along its own directions, exponent ± {inverse.slope.stderr:.2f}, "
                 f"r = {number(inverse.r, 2)}"),
        Headline(f"{number(largest.gain)} ×", "fewer gradients than by full-batch draws",
                 f"gain of per-sample masks at {largest.label}; {number(checkpoints[-1].gain)} × at "
                 f"{checkpoints[-1].label}"),
    ]  # fmt: skip


def relation_plates(checkpoints: Sequence[Checkpoint], settings: Settings) -> list[Plate]:
    """The figures of noise against curvature and flatness."""
    from dropscope import plots

    k = settings.pairs
    return [
        Plate(
            "Noise is large where the loss is sharp",
            plots.hessian_variance({c.label: c.relation for c in checkpoints}),
            f"Variance of the dropout noise along the {k} leading eigenvectors vⱼ of the Hessian against their "
            "eigenvalues. Bars: 95 % intervals from the draws of every sample. Lines: weighted log–log fits with "
            "scatter; s is the exponent with its standard error, r the correlation of the logarithms.",
        ),
        Plate(
            "Noise falls where the loss is flat",
            plots.variance_flatness({c.label: c.flatness for c in checkpoints}),
            f"Variance along the {k} leading eigenvectors uᵢ of Σ against the interval flatness Fᵢ: the distance "
            "between the two points along ±uᵢ where the loss has doubled, dropout off. Bars: 95 % intervals; lines: "
            "weighted log–log fits.",
        ),
        Plate(
            "How strongly noise and curvature align",
            plots.alignment([c.risk for c in checkpoints], [c.relation for c in checkpoints]),
            "Left: mean curvature along the noise against isotropic noise of the same trace. Right: cosine of H and Σ, "
            "and its mean when the spectra stay and the eigenvectors are random. Estimated from the eigenvectors "
            f"exactly and from {checkpoints[0].relation.alignment.probes} random vectors beyond. Bars: 95 % intervals, "
            "probes and masks together. Training runs to the right.",
            "wide",
        ),
    ]


def spectral_plates(checkpoints: Sequence[Checkpoint], settings: Settings) -> list[Plate]:
    """The figures of the Hessian and of the noise, each by itself."""
    from dropscope import plots

    risks = [c.risk for c in checkpoints]
    k = settings.pairs
    return [
        Plate(
            "Spectral density of the Hessian",
            plots.spectral_density(
                {c.label: c.density for c in checkpoints}, top={c.label: c.top for c in checkpoints}
            ),
            f"Stochastic Lanczos quadrature, {settings.probes} probes of {settings.steps} steps, smoothed on the axis "
            "shown (linear near zero, logarithmic beyond); the peak at zero has the width of the smoothing. Band: 95 % "
            f"over probes. Ticks: the {k} largest eigenvalues, each with a residual below 10⁻³ λ₁.",
            "tall",
        ),
        Plate(
            "Eigenvalues of the dropout noise",
            plots.noise_eigenvalues({c.label: c.noise_variances for c in checkpoints}),
            f"The {k} largest eigenvalues of Σ, {settings.draws} masks for each of {settings.samples} samples. Bars: "
            "95 % intervals of the variance along the eigenvector.",
        ),
        Plate(
            "Where the noise comes from",
            plots.noise_split(risks, [c.dropout for c in checkpoints], [c.sampling for c in checkpoints]),
            "Traces of the two parts of the covariance of one sample's gradient, by the law of total covariance: over "
            "its masks (W), and over samples (B); a mini-batch of b samples has 1/b of both. Bars: 95 % intervals.",
        ),
    ]
