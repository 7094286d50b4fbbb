"""`python -m bench.on_device --out folder`: all that can only be done on a machine with a CUDA device, in one command.

Builds the package with the CUDA kernels, runs the tests that need a device, then compute-sanitizer's four tools over a
small selection of them, then the device's benchmarks, and writes one JSON and one Markdown page that carry the device's
name. Whatever fails is written down with the end of its output, and the exit status says so.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
TESTS = [PYTHON, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider"]


@dataclass(frozen=True)
class Step:
    """One command and what became of it."""

    name: str
    command: str
    status: str
    seconds: float
    output: str

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def run(name: str, command: list[str], timeout: int) -> Step:
    """Run a command in the repository's root."""
    print(f"... {name}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
        status, output = "passed" if done.returncode == 0 else f"failed: exit status {done.returncode}", done.stdout
    except subprocess.TimeoutExpired as error:
        kept = error.stdout or b""
        status, output = (
            f"failed: no end after {timeout} s",
            kept if isinstance(kept, str) else kept.decode(errors="replace"),
        )
    except OSError as error:
        status, output = f"failed: {error}", ""
    print(f"    {status}", file=sys.stderr, flush=True)
    return Step(name, " ".join(map(str, command)), status, round(time.perf_counter() - start, 1), output[-6000:])


def sanitizer(tool: str, timeout: int) -> Step:
    """compute-sanitizer over the tests named for it; torch's own allocator is told to keep no memory, for memcheck."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    options = ["--tool", tool, "--error-exitcode", "1", "--target-processes", "all"]
    # Of torch's own kernels and of cuBLAS nothing is asked here.
    options += ["--kernel-name", "kernel_substring=dropscope"]
    command = [
        "env",
        "PYTORCH_NO_CUDA_MEMORY_CACHING=1",
        program,
        *options,
        *TESTS,
        "-k",
        "sanitized",
        "tests/test_cuda.py",
    ]
    return run(f"compute-sanitizer {tool}", command, timeout)


def device() -> dict[str, Any]:
    """The device and the versions behind the numbers; without a device, why."""
    code = (
        "import json, torch; from dropscope import _core; p = torch.cuda.get_device_properties(0);"
        "print(json.dumps({'device': p.name, 'capability': f'{p.major}.{p.minor}', 'memory': p.total_memory,"
        "'multiprocessors': p.multi_processor_count, 'L2': p.L2_cache_size, 'torch': torch.__version__,"
        "'cuda': torch.version.cuda, 'built': _core.cuda_built()}))"
    )
    done = subprocess.run([PYTHON, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"device": "none", "reason": (done.stderr.strip().splitlines() or ["unknown"])[-1]}
    return dict(json.loads(done.stdout))


def page(about: dict[str, Any], steps: list[Step], rows: list[dict[str, Any]]) -> str:
    """The report in Markdown."""
    facts = ", ".join(f"{key} {value}" for key, value in about.items() if key != "device")
    lines = [f"# {about['device']}", "", facts + ".", "", "| step | status | seconds |", "|---|---|---|"]
    lines += [f"| {step.name} | {step.status} | {step.seconds:g} |" for step in steps]
    lines += ["", "| work | member | median | iqr |", "|---|---|---|---|"]
    for row in rows:
        stats = row["stats"]
        lines.append(f"| {row['group']} | {row['name']} | {stats['median']:.3e} s | {stats['iqr']:.1e} s |")
    for step in steps:
        if not step.passed:
            lines += ["", f"## {step.name}: {step.status}", "", f"`{step.command}`", "", "```", step.output, "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.on_device", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of the two files")
    parser.add_argument("--no-build", action="store_true", help="take the installed package as it is")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds that one step may take")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    build = [
        PYTHON,
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        "--no-deps",
        "-C",
        "cmake.define.DROPSCOPE_CUDA=ON",
    ]
    steps = [] if args.no_build else [run("build", [*build, "--editable", "."], args.timeout)]
    about = device()
    name = "device-" + re.sub(r"\W+", "-", str(about["device"])).strip("-").lower()
    results = args.out / f"{name}-benchmarks.json"
    rows: list[dict[str, Any]] = []
    if about["device"] != "none":
        steps.append(run("tests", TESTS, args.timeout))
        steps += [sanitizer(tool, args.timeout) for tool in TOOLS]
        steps.append(run("benchmarks", [PYTHON, "-m", "bench", "bench_cuda", "--json", str(results)], args.timeout))
        if results.exists():
            rows = json.loads(results.read_text())["benchmarks"]
    report = {"machine": about, "steps": [asdict(step) for step in steps], "benchmarks": rows}
    (args.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / f"{name}.md").write_text(page(about, steps, rows))
    print(f"{about['device']}: {args.out / name}.md", file=sys.stderr)
    return 0 if about["device"] != "none" and all(step.passed for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
