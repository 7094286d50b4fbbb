"""The command line: thin, with exit codes that mean something.

0: measured, and every number is sound. 1: an error that is ours. 2: bad input, or a missing extra, said in one line.
3: measured, but something is not converged or heavy-tailed (named on stderr), or ``doctor`` found a fault.
130: interrupted.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn, ParamSpec

import click

import dropscope
from dropscope import _files

UNSOUND = 3
FOLDER = click.Path(file_okay=False, path_type=Path)
P = ParamSpec("P")

CODES = """\b
Exit codes: 0 measured and sound, 2 bad input, 3 measured but something is not
converged or heavy-tailed (named on stderr), 130 interrupted.
"""


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Turn errors of input into one line and exit code 2; interrupts into 130."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (TypeError, ValueError, ImportError) as error:
            if not _ours_to_say(error):
                raise
            fail(str(error))
        except KeyboardInterrupt:
            click.echo("interrupted: nothing was written", err=True)
            sys.exit(130)

    return run


def _ours_to_say(error: BaseException) -> bool:
    """Whether dropscope refused something, rather than failed: its messages name the function first."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = Path(dropscope.__file__).parent
    refused = bool(frames) and inside in Path(frames[-1].filename).parents and re.match(r"[\w.@+ ]+: ", str(error))
    return isinstance(error, ImportError) or bool(refused)


def fail(message: str) -> NoReturn:
    """Say what is wrong and leave with code 2."""
    click.echo(f"dropscope: {message}", err=True)
    sys.exit(2)


def _folder(_: click.Context, option: click.Parameter, path: Path | None) -> Path | None:
    """Make the folder before the work whose results it is for; one that was not there stays empty if that fails."""
    if path is not None:
        try:
            path.mkdir(parents=True, exist_ok=True)
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        except OSError as error:
            raise click.BadParameter(f"must be a folder that can be written, got {error}", param=option) from error
    return path


def finish(unsound: list[str]) -> None:
    """Name what is not sound and leave with its code."""
    for line in unsound:
        click.echo(f"not sound: {line}", err=True)
    if unsound:
        sys.exit(UNSOUND)


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=CODES)
@click.version_option(dropscope.__version__, prog_name="dropscope")
def main() -> None:
    """See the noise that dropout makes, and the curvature it meets."""


@main.command(epilog=CODES)
@click.option("--out", type=FOLDER, callback=_folder, default=Path("dropscope-demo"), show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option("--samples", type=int, default=None, help="Training samples.")
@click.option("--draws", type=click.IntRange(4), default=None, help="Masks for every sample.")
@click.option("--json", "as_json", is_flag=True, help="Print results.json instead of the table.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@guarded
def demo(out: Path, seed: int, samples: int | None, draws: int | None, as_json: bool, quiet: bool) -> None:
    """Train on digits with dropout; measure noise and curvature along the way.

    Writes report.html, figures, results.json and arrays.safetensors into --out. Rows that turn heavy-tailed on the way
    to interpolation are part of what it shows: they are marked, and the exit code stays 0.
    """
    from dropscope import demo as module
    from dropscope import demo_page

    chosen: dict[str, Any] = {name: n for name, n in (("samples", samples), ("draws", draws)) if n is not None}
    settings = replace(module.Settings(seed=seed), **chosen)
    checkpoints = module.run(settings, progress=not quiet)
    arguments = "".join(f" --{name} {value}" for name, value in {"seed": seed, **chosen}.items())
    report = demo_page.write(checkpoints, settings, out, "dropscope demo" + arguments)
    click.echo((out / "results.json").read_text() if as_json else demo_page.terminal(checkpoints))
    click.echo(f"\nreport: {report}", err=as_json)
    finish([f"{c.label}: eigenpairs not converged" for c in checkpoints if c.status == "not converged"])


def measurement(command: Callable[..., None]) -> Callable[..., None]:
    """The arguments that spectrum, noise and relation share."""
    for option in (
        click.argument("file", type=click.Path(path_type=Path)),
        click.option(
            "-k", "pairs", type=click.IntRange(1), help="Eigenpairs.  [default: 10, or all of fewer parameters]"
        ),
        click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True),
        click.option("--out", type=FOLDER, callback=_folder, help="Folder for results and a report."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text."),
        click.option("--quiet", is_flag=True, help="No progress bars."),
    )[::-1]:
        command = option(command)
    return main.command(epilog=CODES)(command)


@measurement
@click.option("--tol", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=1e-3, show_default=True)
@click.option("--probes", type=click.IntRange(2), default=8, show_default=True, help="Probes of the density.")
@click.option("--steps", type=click.IntRange(2), default=80, show_default=True, help="Lanczos steps for each.")
@guarded
def spectrum(file: Path, pairs: int | None, seed: int, out: Path | None, as_json: bool, quiet: bool, tol: float,
             probes: int, steps: int) -> None:  # fmt: skip
    """Hessian: leading eigenpairs, trace and spectral density.

    FILE is a Python file that defines problem(), which returns a dropscope.Problem.
    """
    from dropscope import measurements

    problem = load(file)
    deliver(
        measurements.spectrum(problem, pairs or min(10, problem.dim), seed, tol, probes, steps, not quiet), out, as_json
    )


@measurement
@click.option("--draws", type=click.IntRange(2), default=8, show_default=True, help="Masks for every sample.")
@guarded
def noise(file: Path, pairs: int | None, seed: int, out: Path | None, as_json: bool, quiet: bool, draws: int) -> None:
    """Dropout noise: its trace, its share of the gradient noise, its leading eigenpairs.

    FILE is a Python file that defines problem(), which returns a dropscope.Problem.
    """
    from dropscope import measurements

    problem = load(file)
    deliver(measurements.noise(problem, pairs or min(10, problem.dim), seed, draws, not quiet), out, as_json)


@measurement
@click.option("--draws", type=click.IntRange(2), default=8, show_default=True, help="Masks for every sample.")
@click.option(
    "--factor",
    type=click.FloatRange(min=1.0, min_open=True),
    default=2.0,
    show_default=True,
    help="Growth of the loss that bounds flatness.",
)
@guarded
def relation(file: Path, pairs: int | None, seed: int, out: Path | None, as_json: bool, quiet: bool, draws: int,
             factor: float) -> None:  # fmt: skip
    """How the dropout noise relates to curvature and to flatness.

    FILE is a Python file that defines problem(), which returns a dropscope.Problem.
    """
    from dropscope import measurements

    problem = load(file)
    deliver(measurements.relation(problem, pairs or min(10, problem.dim), seed, draws, factor, not quiet), out, as_json)


def load(file: Path) -> Any:
    """Run a user's Python file and return its ``problem()``; every way this can fail is said in one line."""
    import importlib.util

    from dropscope.problem import Problem

    if not file.is_file():
        fail(f"FILE must be a Python file that defines problem(), got {str(file)!r}, which is no file")
    spec = importlib.util.spec_from_file_location("dropscope_user_problem", file)
    if spec is None or spec.loader is None:
        fail(f"FILE must be a Python file (.py), got {str(file)!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # so that classes defined in the file can be found by name
    sys.path.insert(0, str(file.resolve().parent))
    try:
        spec.loader.exec_module(module)
        define = getattr(module, "problem", None)
        if not callable(define):
            fail(f"{file} must define problem(), which returns a dropscope.Problem; it defines no such function")
        problem = define()
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == file]
        where = f", line {frames[-1].lineno}" if frames else ""
        fail(f"{file}{where}: {type(error).__name__}: {error}")
    finally:
        sys.path.pop(0)
    if not isinstance(problem, Problem):
        fail(f"{file}: problem() must return a dropscope.Problem, got {type(problem).__name__}")
    return problem


def deliver(measured: Any, out: Path | None, as_json: bool) -> None:
    """Print, write into ``out``, and leave with the code that fits."""
    content = _files.plain(measured.content)
    if out is not None:
        _files.write_json(out / "results.json", content)
        _files.write_arrays(out / "arrays.safetensors", measured.arrays)
        measured.page.write(out / "report.html")
    click.echo(json.dumps(content, indent=2) if as_json else measured.text)
    if out is not None:
        click.echo(f"\nreport: {out / 'report.html'}", err=as_json)
    finish(measured.unsound)


@main.command(epilog="\b\nExit codes: 0 computed, whatever the verdicts, 2 bad input, 130 interrupted.")
@click.argument("names", nargs=-1)
@click.option("--list", "listing", is_flag=True, help="List the entries and leave.")
@click.option("--full", is_flag=True, help="The papers' own sizes, for hours and for --data.")
@click.option(
    "--data", type=click.Path(exists=True, path_type=Path), help="MNIST or CIFAR folder, text file or folder."
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option("--out", type=FOLDER, callback=_folder, default=Path("dropscope-papers"), show_default=True)
@click.option("--resume", is_flag=True, help="Keep what --out already holds of this version and scale.")
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON instead of text.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
@guarded
def reproduce(names: tuple[str, ...], listing: bool, full: bool, data: Path | None, seed: int, out: Path, resume: bool,
              as_json: bool, quiet: bool) -> None:  # fmt: skip
    """Compute figures and tables of the four papers and judge their claims.

    NAMES are entries (see --list), a paper's letter (A, B, C, D), or all. Each entry writes papers/NAME.json and
    papers/NAME.png into --out, and papers.md lists every claim beside the measured numbers.
    """
    from dropscope.reproduce import Scale, page, runner

    if listing or not names:
        rows = [[e.name, e.place, f"{e.minutes:g} min", e.title] for e in runner.entries().values()]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        for row in rows:
            click.echo("  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]))
        return
    scale = Scale(full=full, data=data, seed=seed, progress=not quiet)
    records = []
    for entry in runner.select(names):
        record = (runner.finished(entry, scale, out) if resume else None) or runner.run(entry, scale, out)
        records.append(record)
        page.write(runner.records(out), out)
        if not as_json:
            click.echo(f"{record.name}: {record.title} ({record.seconds:.0f} s)")
            for claim in record.claims:
                click.echo(f"  {claim.verdict:<14}  {claim.text}\n{'':<18}paper {claim.paper}; here {claim.ours}")
    if as_json:
        click.echo(json.dumps(_files.plain(records), indent=2))
    click.echo(f"\nclaims: {out / 'papers.md'}", err=as_json)


@main.command(epilog=CODES)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def doctor(as_json: bool) -> None:
    """Check this installation: versions, kernels, threads, OpenMP, CUDA, masks."""
    from dropscope.doctor import diagnose

    checks = diagnose()
    if as_json:
        click.echo(json.dumps(_files.plain(checks), indent=2))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            click.echo(f"{check.status:<8} {check.name:<{width}}  {check.detail}")
            if check.remedy:
                click.echo(f"{'':<8} {'':<{width}}  remedy: {check.remedy}")
    if any(check.status == "failed" for check in checks):
        sys.exit(UNSOUND)
