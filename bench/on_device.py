"""`python -m bench.on_device --out folder`: all that can only be done on a machine with a CUDA device, in one command.

Builds the package for this device, runs the tests that need one, measures, and lets compute-sanitizer's four tools look
at a small selection: in this order, within a budget of seconds, each step in processes of its own. What is found is
on disk as soon as it is there, so a machine that is taken away keeps nothing back: `log.txt` grows with every line of
every step, `NAME-rows.json` with every contest, and `NAME.json` and `NAME.md` are written anew after each step.

Where commands are cut off after ten minutes and no package index is reached:

    python -m pip download --no-deps --dest .whl 'pybind11>=3.1' 'scikit-build-core>=1.1'     # before, elsewhere
    python -m bench.on_device --out out --wheels .whl --budget 570 --stages build tests ceilings contests
    python -m bench.on_device --out out --budget 570 --stages measurements sanitizers tiles
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench import page

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
STAGES = ("build", "tests", "ceilings", "contests", "measurements", "sanitizers", "tiles")
# Another torch than the one of development may warn of what this one does not: here that is no failure.
PYTEST = [PYTHON, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", "-W", "default", "-v", "--tb=short"]
KERNELS = ["tests/test_cuda.py"]
# A fault on a device takes the rest of its process with it.
TESTS = {
    "masks": ["tests/test_mask_kernels.py", "tests/test_replay_values.py"],
    "factors": [*KERNELS, "-k", "factors or gram"],
    "spectral": [*KERNELS, "-k", "orthogonalize or rotate or probes or second_read"],
    "streams and graphs": [*KERNELS, "-k", "waits or bits or stream or graph or small_shapes or 32_bits"],
    "whole measurements": [*KERNELS, "-k", "hessian_pairs or gradient_noise or second_device"],
}


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


class Session:
    """Steps within a budget of seconds, all output in one log."""

    def __init__(self, out: Path, budget: float) -> None:
        self.log, self.end = out / "log.txt", time.monotonic() + budget

    @property
    def left(self) -> float:
        """Seconds of the budget, less those that writing the report may take."""
        return self.end - time.monotonic() - 5

    def run(self, name: str, command: list[str], longest: float, env: dict[str, str] | None = None) -> Step:
        """Run a command in the repository's root; its whole process group is ended with it."""
        start, timeout, text = time.monotonic(), min(longest, self.left), " ".join(map(str, command))
        print(f"... {name}", file=sys.stderr, flush=True)
        with self.log.open("ab") as log:
            log.write(f"\n=== {name}: {text}\n".encode())
            log.flush()
            begin = log.tell()
            status = "skipped: no time left" if self.left < 5 else _status(command, log, timeout, env)
        with self.log.open("rb") as log:
            log.seek(begin)
            output = log.read().decode(errors="replace")
        print(f"    {status}", file=sys.stderr, flush=True)
        return Step(name, text, status, round(time.monotonic() - start, 1), output[-6000:])


def _status(command: list[str], log: Any, timeout: float, env: dict[str, str] | None) -> str:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
    try:
        child = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    except OSError as error:
        return f"failed: {error}"
    try:
        code = child.wait(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # the group that this child began
        child.wait()
        return f"failed: no end after {timeout:.0f} s"
    return "passed" if code == 0 else f"failed: exit status {code}"


def tested(step: Step) -> Step:
    """A run of pytest that skipped all its tests has not passed."""
    ran = re.search(r"\d+ passed", step.output)
    return step if ran or not step.passed else replace(step, status="failed: no test ran")


def build(session: Session, wheels: Path | None) -> Iterator[Step]:
    """The package for this device alone; first the tools to build it, where they are given."""
    install = [PYTHON, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    if wheels is not None:
        yield session.run("wheels", [*install, "--no-index", *map(str, sorted(wheels.glob("*.whl")))], 120)
    capability = "import torch; print('%d%d' % torch.cuda.get_device_capability())"
    found = subprocess.run([PYTHON, "-c", capability], capture_output=True, text=True, check=False)
    options = ["-C", "cmake.define.DROPSCOPE_CUDA=ON"]
    if found.returncode == 0:
        options += ["-C", f"cmake.define.CMAKE_CUDA_ARCHITECTURES={found.stdout.strip()}-real"]
    yield session.run("build", [*install, "--verbose", *options, "--editable", "."], 400)


def contests(session: Session, rows: Path, rounds: int) -> Iterator[Step]:
    """All contests of bench_cuda; a process that a fault on the device has ended is followed by another."""
    for _ in range(8):
        room = session.left - 10
        command = [PYTHON, "-m", "bench.device_rows", str(rows), "--rounds", str(rounds), "--seconds", f"{room:.0f}"]
        yield (step := session.run("contests", command, room))
        if step.passed or session.left < 30 or step.status == "failed: exit status 1":
            return


def sanitizers(session: Session) -> Iterator[Step]:
    """compute-sanitizer over the tests named for it; torch's own allocator is told to keep no memory, for memcheck."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for tool in TOOLS:
        # Of torch's own kernels nothing is asked. What a kernel that is not watched writes, initcheck takes for never
        # written: so these tests give ours only what the host has copied.
        options = ["--tool", tool, "--error-exitcode", "1", "--kernel-name", "kernel_substring=dropscope"]
        command = [program, *options, *PYTEST, "-k", "sanitized", *KERNELS]
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        yield tested(session.run(f"compute-sanitizer {tool}", command, 150, alone))


def about_device() -> dict[str, Any]:
    """The device and the versions behind the numbers; without a device, why."""
    code = (
        "import json, torch; p = torch.cuda.get_device_properties(0);"
        "print(json.dumps({'device': p.name, 'capability': f'{p.major}.{p.minor}', 'memory': p.total_memory,"
        "'multiprocessors': p.multi_processor_count, 'L2': p.L2_cache_size, 'torch': torch.__version__,"
        "'cuda': torch.version.cuda}))"
    )
    done = subprocess.run([PYTHON, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"device": "none", "reason": (done.stderr.strip().splitlines() or ["unknown"])[-1]}
    return dict(json.loads(done.stdout))


def report(about: dict[str, Any], steps: list[Step], rows: Path) -> str:
    """The report in Markdown."""
    facts = ", ".join(f"{key} {value}" for key, value in about.items() if key != "device")
    lines = [f"# {about['device']}", "", facts + ".", "", "| step | status | seconds |", "|---|---|---|"]
    lines += [f"| {step.name} | {step.status} | {step.seconds:g} |" for step in steps]
    if rows.exists():
        lines += ["", page.table(page.read(rows)[1])]
    for step in steps:
        if not step.passed:
            lines += ["", f"## {step.name}: {step.status}", "", f"`{step.command}`", "", "```", step.output, "```"]
    return "\n".join(lines) + "\n"


def stages(session: Session, args: argparse.Namespace, rows: Path, about: dict[str, Any]) -> Iterator[Step]:
    """The steps that were asked for, the most telling first."""
    if "build" in args.stages:
        yield from build(session, args.wheels)
    if about["device"] == "none":
        return
    if "tests" in args.stages:
        for name, selection in TESTS.items():
            yield tested(session.run(f"tests: {name}", [*PYTEST, *selection], 180))
    if "ceilings" in args.stages:
        code = "import json; from bench.bench_cuda import ceilings; print(json.dumps(ceilings()))"
        yield (step := session.run("ceilings", [PYTHON, "-c", code], 90))
        if step.passed:
            about.update(json.loads(step.output.strip().splitlines()[-1]))
    if "contests" in args.stages:
        yield from contests(session, rows, args.rounds)
    if "measurements" in args.stages:
        command = [PYTHON, "-m", "pytest", "-p", "no:cacheprovider", "-W", "default", "-v", "--tb=short"]
        environment = {"DROPSCOPE_OTHER_DEVICE": "cuda", "PYTHONPATH": str(ROOT / "tests" / "other_device")}
        yield tested(session.run("measurements", [*command, "tests/other_device/checks.py"], 200, environment))
    if "sanitizers" in args.stages:
        yield from sanitizers(session)
    if "tiles" in args.stages:
        yield session.run("tiles", [PYTHON, "-m", "bench.device_tiles", str(rows.with_name("tiles.json"))], 120)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.on_device", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "device", help="folder of the files")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all, in this order")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install first, e.g. scikit-build-core")
    parser.add_argument("--budget", type=float, default=3600, help="seconds for all of it")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each callable of a contest")
    args = parser.parse_args()
    args.out, args.wheels = args.out.resolve(), args.wheels and args.wheels.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    session, steps, about = Session(args.out, args.budget), list[Step](), about_device()
    name = re.sub(r"\W+", "-", str(about["device"])).strip("-").lower()
    rows = args.out / f"{name}-rows.json"
    for step in stages(session, args, rows, about):
        steps.append(step)
        record = {"machine": about, "steps": [asdict(step) for step in steps]}
        (args.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        (args.out / f"{name}.md").write_text(report(about, steps, rows))
    print((args.out / f"{name}.md").read_text() if steps else about)
    return 0 if about["device"] != "none" and steps and all(step.passed for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
