"""How time and memory grow with the number of samples, parameters, draws, pairs and threads.

`python -m bench.scaling` measures four jobs along five axes, each point in a fresh process, fits exponents by least
squares in logarithms, draws `bench/scaling.png` and rewrites the section of bench/README.md; `--largest` adds one run
at 10⁸ parameters. Networks are 784-w-w-10 with dropout 0.2 at their initialisation, data digits with a little noise.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import harness, page
from bench.measure import machine
from bench.workloads import digits, mlp

HERE = Path(__file__).parent
FIGURE = HERE / "scaling.png"
BEGIN, END = "<!-- scaling: written by `python -m bench.scaling` -->", "<!-- end of scaling -->"


@dataclass(frozen=True)
class Setting:
    """One point: samples, hidden width, draws of every sample, eigenpairs, threads of torch and of our kernels."""

    n: int = 1000
    width: int = 256
    draws: int = 4
    k: int = 10
    threads: int = 1

    @property
    def parameters(self) -> int:
        return 785 * self.width + (self.width + 1) * self.width + (self.width + 1) * 10


AXES: dict[str, tuple[Any, ...]] = {
    "n": (250, 500, 1000, 2000, 4000),
    "width": (64, 128, 256, 512, 1024),
    "draws": (2, 4, 8, 16),
    "k": (2, 5, 10, 20, 40),
    "threads": (1, 2),
}
TITLES = {"n": "samples n", "width": "parameters P", "draws": "draws M", "k": "pairs k", "threads": "threads"}
JOBS = {
    "noise product": ("n", "width", "draws", "threads"),
    "noise spectrum": ("n", "width", "draws", "k", "threads"),
    "Hessian product": ("n", "width", "threads"),
    "Hessian eigsh": ("n", "width", "k", "threads"),
}


def prepared(job: str, at: Setting) -> Callable[[], Any]:
    """What is timed: a product after its preparation, or an eigensolver from the capture, or the graph, on."""
    import dropscope as ds

    x, y = digits(1000)
    copies = -(-at.n // len(x))
    noise = 0.02 * torch.randn(at.n, x.shape[1], generator=torch.Generator().manual_seed(0))
    data = (x.repeat(copies, 1)[: at.n] + noise, y.repeat(copies)[: at.n])
    model = mlp((784, at.width, at.width, 10)).eval()
    problem = ds.Problem(model, torch.nn.CrossEntropyLoss(), data, batch_size=min(at.n, 500))
    problem.check(masks=True)
    if job == "noise spectrum":
        return lambda: ds.GradientNoise(problem, draws=at.draws).eigsh(at.k, tol=1e-2, cross_validate=False)
    if job == "Hessian eigsh":
        return lambda: ds.eigsh(ds.Hessian(problem), k=at.k, which="LM", tol=1e-2)
    v = torch.randn(problem.dim, generator=torch.Generator().manual_seed(1))
    made: list[Any] = []

    def product() -> Any:
        if not made:
            made.append(ds.GradientNoise(problem, draws=at.draws).dropout if job[0] == "n" else ds.Hessian(problem))
        return made[0] @ v

    return product


def measured(job: str, at: Setting, repeats: int = 3) -> dict[str, Any]:
    """Extra memory of the first call, which prepares all, and the median seconds of later ones."""
    torch.set_num_threads(at.threads)
    call = prepared(job, at)
    memory = harness.extra_memory(call)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        answer = call()
        seconds.append(time.perf_counter() - start)
        if sum(seconds) > 10.0:
            break
    products = getattr(answer, "matvecs", None)
    return {**asdict(at), "job": job, "seconds": statistics.median(seconds), "memory": memory, "products": products}


def in_a_process(job: str, at: Setting) -> dict[str, Any] | None:
    """A point in a process of its own; None, with the reason on the terminal, if it fails."""
    command = [sys.executable, "-m", "bench.scaling", "--point", job, json.dumps(asdict(at))]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    print(f"failed: {job} {at}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr, flush=True)
    return None


@dataclass(frozen=True)
class Fit:
    """y = c·x^exponent by least squares in logarithms, with the standard error of the exponent."""

    exponent: float
    error: float

    @staticmethod
    def of(x: Sequence[float], y: Sequence[float]) -> Fit:
        u, v = [math.log(a) for a in x], [math.log(b) for b in y]
        mean, middle = statistics.fmean(u), statistics.fmean(v)
        spread = sum((a - mean) ** 2 for a in u)
        slope = sum((a - mean) * (b - middle) for a, b in zip(u, v, strict=True)) / spread
        rest = sum((b - middle - slope * (a - mean)) ** 2 for a, b in zip(u, v, strict=True))
        return Fit(slope, math.sqrt(rest / (len(u) - 2) / spread) if len(u) > 2 else math.nan)

    def __str__(self) -> str:
        return f"{self.exponent:.2f}" + ("" if math.isnan(self.error) else f" ± {self.error:.2f}")


def place(point: Mapping[str, Any], axis: str) -> float:
    """Where a point stands on an axis; the width stands for the parameters."""
    if axis != "width":
        return float(point[axis])
    return float(Setting(width=point["width"]).parameters)


def line(points: Sequence[Mapping[str, Any]], job: str, axis: str) -> list[Mapping[str, Any]]:
    """The points of a job along an axis, all else as in the base setting."""
    base = asdict(Setting())
    others = [name for name in base if name != axis]
    found = [p for p in points if p["job"] == job and all(p[name] == base[name] for name in others)]
    return sorted(found, key=lambda p: place(p, axis))


def fits(points: Sequence[Mapping[str, Any]], quantity: str) -> dict[tuple[str, str], Fit]:
    """Exponent of a quantity for each job and axis that has at least three points."""
    table = {}
    for job, axes in JOBS.items():
        for axis in axes:
            found = line(points, job, axis)
            if len(found) >= 3 and all(p[quantity] > 0 for p in found):
                table[job, axis] = Fit.of([place(p, axis) for p in found], [p[quantity] for p in found])
    return table


def draw(points: Sequence[Mapping[str, Any]], path: Path = FIGURE) -> None:
    """Time above, memory below, a column for each axis, a line for each job with its exponent."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from dropscope.plot_style import STYLE

    colours = dict(zip(JOBS, ("#0072B2", "#56B4E9", "#D55E00", "#E69F00"), strict=True))
    with matplotlib.rc_context({**STYLE, "legend.fontsize": 7.0}):
        figure, grid = plt.subplots(2, len(AXES), figsize=(15, 5.6), squeeze=False, layout="constrained")
        for row, (quantity, label, unit) in enumerate((("seconds", "seconds", 1.0), ("memory", "extra MiB", 2.0**20))):
            exponents = fits(points, quantity)
            for column, axis in enumerate(AXES):
                axes = grid[row][column]
                for job, colour in colours.items():
                    found = line(points, job, axis) if axis in JOBS[job] else []
                    if not found:
                        continue
                    told = f"  {exponents[job, axis]}" if (job, axis) in exponents else ""
                    xs, ys = [place(p, axis) for p in found], [p[quantity] / unit for p in found]
                    axes.loglog(xs, ys, "o-", color=colour, markersize=3.5, label=job + told)
                axes.set_xlabel(TITLES[axis])
                if column == 0:
                    axes.set_ylabel(label)
                if axis != "width":
                    axes.set_xticks(AXES[axis], labels=[str(value) for value in AXES[axis]])
                    axes.minorticks_off()
                if axes.has_data():
                    low, high = axes.get_ylim()
                    axes.set_ylim(low, high * (high / low) ** 0.6)  # room for the legend
                    axes.legend(loc="upper left")
        figure.savefig(path, dpi=110)
        plt.close(figure)


def section(points: Sequence[Mapping[str, Any]], about: Mapping[str, Any], largest: Mapping[str, Any] | None) -> str:
    """The fitted exponents, and the largest run, in Markdown."""
    header = ["job"] + [f"{what}, {TITLES[a]}" for a in AXES if a != "threads" for what in ("time", "memory")]
    rows = ["| " + " | ".join([*header, "2 threads"]) + " |", "|---" * (len(header) + 1) + "|"]
    tables = {"time": fits(points, "seconds"), "memory": fits(points, "memory")}
    for job in JOBS:
        cells = [job]
        for axis in AXES:
            if axis != "threads":
                cells += [str(tables[what].get((job, axis), "")) for what in ("time", "memory")]
        found = line(points, job, "threads")
        cells.append(f"{found[0]['seconds'] / found[-1]['seconds']:.2f}x" if len(found) > 1 else "")
        rows.append("| " + " | ".join(cells) + " |")
    base = Setting()
    text = [
        "Machine: " + ", ".join(f"{key} {value}" for key, value in about.items()) + ".",
        f"Exponents of time and extra memory around 784-{base.width}-{base.width}-10, n = {base.n}, M = {base.draws}, "
        f"k = {base.k}, one thread, by least squares in logarithms; ± one standard error, which the curvature of the "
        "line is part of: fixed costs flatten its start.",
        "\n".join(rows),
        f"![Time and memory against n, P, M, k and threads]({FIGURE.name})",
    ]
    return "\n\n".join(text + ([] if largest is None else [told(largest)]))


def largest(width: int = 9620, n: int = 100, k: int = 3, draws: int = 4) -> dict[str, Any]:
    """Hessian pairs and a noise product of one network of about 10⁸ parameters, in this process."""
    import dropscope as ds

    at = Setting(n=n, width=width, draws=draws, k=k, threads=torch.get_num_threads())
    problem = ds.Problem(
        mlp((784, width, width, 10)).eval(), torch.nn.CrossEntropyLoss(), tuple(t[:n] for t in digits(1000))
    )
    found: dict[str, Any] = {**asdict(at), "parameters": problem.dim}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        kept: list[Any] = []
        start = time.perf_counter()
        memory = harness.extra_memory(lambda: kept.append(call()))
        found[name] = {"seconds": time.perf_counter() - start, "memory": memory}
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
        return kept[0]

    timed("noise product", lambda: _noise_product(problem, draws))
    pairs = timed("Hessian eigsh", lambda: ds.eigsh(ds.Hessian(problem), k=k, which="LM", tol=1e-2, progress=True))
    values, converged = torch.as_tensor(pairs.values), torch.as_tensor(pairs.converged)
    found["pairs"] = {"values": values.tolist(), "converged": converged.tolist(), "products": pairs.matvecs}
    return found


def _noise_product(problem: Any, draws: int) -> Any:
    import dropscope as ds

    with ds.GradientNoise(problem, draws=draws, cache="recompute") as noise:
        return noise.dropout @ torch.ones(problem.dim)


def told(run: Mapping[str, Any]) -> str:
    """The largest run in words."""
    noise, eigen, pairs = run["noise product"], run["Hessian eigsh"], run["pairs"]
    done = sum(pairs["converged"])
    return (
        f"**Size.** 784-{run['width']}-{run['width']}-10, {run['parameters']:.3g} parameters, n = {run['n']}, "
        f"{run['threads']} thread(s): the top {run['k']} Hessian pairs, {done} of them converged to 1e-2, in "
        f"{eigen['seconds']:.0f} s and {pairs['products']} products with {eigen['memory'] / 2**30:.1f} GiB above the "
        f"network; one product with the dropout noise of {run['draws']} draws, captured anew, in "
        f"{noise['seconds']:.1f} s with {noise['memory'] / 2**30:.1f} GiB."
    )


def measure_all(axes: Sequence[str]) -> list[dict[str, Any]]:
    """Every point once, in turn over jobs, so that a slow minute does not fall on one of them."""
    wanted: dict[tuple[str, Setting], None] = {}
    for axis in axes:
        for value in AXES[axis]:
            for job, along in JOBS.items():
                if axis in along:
                    wanted[job, replace(Setting(), **{axis: value})] = None
    points = []
    for i, (job, at) in enumerate(wanted):
        point = in_a_process(job, at)
        if point is not None:
            points.append(point)
            print(
                f"[{i + 1}/{len(wanted)}] {job:16s} n={at.n} P={at.parameters} M={at.draws} k={at.k} "
                f"threads={at.threads}: {page.seconds(point['seconds'])}, {point['memory'] / 2**20:.0f} MiB",
                flush=True,
            )
    return points


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    parser.add_argument("--axes", nargs="*", default=list(AXES), choices=list(AXES))
    parser.add_argument("--largest", action="store_true", help="only the run at 10⁸ parameters (some 12 GiB)")
    parser.add_argument("--width", type=int, default=9620, help="hidden width of the largest run")
    parser.add_argument("--point", nargs=2, metavar=("JOB", "SETTING"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        print(json.dumps(measured(args.point[0], Setting(**json.loads(args.point[1])))))
        return
    about = machine()
    path = page.file_of(about, HERE / "results" / "scaling")
    stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"points": []}
    if args.largest:
        stored["largest"] = largest(args.width)
    else:
        fresh = measure_all(args.axes)
        key = [(p["job"], *(p[name] for name in asdict(Setting()))) for p in fresh]
        kept = [p for p in stored["points"] if (p["job"], *(p[name] for name in asdict(Setting()))) not in key]
        stored.update(machine=about, points=kept + fresh)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(stored, indent=1) + "\n")
    draw(stored["points"])
    text = section(stored["points"], stored.get("machine", about), stored.get("largest"))
    page.replace_between(HERE / "README.md", BEGIN, END, text)


if __name__ == "__main__":
    main()
