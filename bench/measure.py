"""One benchmark in processes of its own: the times in one, the memory of each callable in another.

A process each shares no caches and no peaks with the others, and one that dies or hangs stops nothing else.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import harness

HERE = Path(__file__).parent
TIMEOUT = 900  # seconds that one process may take


def modules() -> dict[Path, str]:
    """Every file that registers benchmarks, bench_*.py and peers/*.py, and its module."""
    files = [*sorted(HERE.glob("bench_*.py")), *sorted(HERE.glob("peers/[!_]*.py"))]
    return {file: ".".join(("bench", *file.relative_to(HERE).with_suffix("").parts)) for file in files}


def load(module: str) -> list[harness.Entry]:
    """Import a module and return what it registers.

    Raises:
        ModuleNotFoundError: if a peer that it imports is not installed.
    """
    importlib.import_module(module)
    return [entry for entry in harness.REGISTRY.values() if entry.build.__module__ == module]


def machine() -> dict[str, Any]:
    """The machine and the versions behind a set of numbers."""
    model: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        model.setdefault(key.strip(), value.strip())
    family = f"family {model.get('cpu family', '?')} model {model.get('model', '?')}"
    about = {
        "cpu": f"{model.get('model name', platform.processor())}, {family}",
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "isa": _isa(),
        "torch": torch.__version__,
        "torch isa": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "load": round(os.getloadavg()[0], 2),
    }
    return about if not torch.cuda.is_available() else {"device": torch.cuda.get_device_name(), **about}


def _isa() -> str:
    from dropscope import kernels

    return str(kernels.isa())


def measure(entry: harness.Entry, rounds: int | None = None, with_memory: bool = True) -> harness.Row:
    """Run one benchmark; whatever goes wrong becomes the status of its row."""
    text, error = _spawn(entry.name, "time", rounds)
    if text is None:
        return harness.Row(entry.name, entry.work, f"failed: {error}", str(entry.bars))
    row = harness.Row.from_json(json.loads(text))
    if not (with_memory and entry.memory and row.samples):
        return row
    memory, errors = {}, dict(row.errors)
    for call in row.samples:
        text, error = _spawn(entry.name, call, None)
        if text is None:
            errors[f"memory of {call}"] = error
        else:
            memory[call] = int(text)
    misses = [
        f"{memory['ours'] / memory[n]:.2f} of the memory of {n}, asked {bar:g}"
        for n, bar in entry.bars.memory.items()
        if n in memory and "ours" in memory and memory["ours"] > bar * memory[n]
    ]
    return replace(row, memory=memory, errors=errors).missing(*misses)


def _spawn(name: str, mode: str, rounds: int | None) -> tuple[str | None, str]:
    """What a child process wrote, or None, and the last line of its errors."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "bench.measure", name, mode, str(out)]
        command += [] if rounds is None else ["--rounds", str(rounds)]
        try:
            done = subprocess.run(
                command, cwd=HERE.parent, text=True, stderr=subprocess.PIPE, check=False, timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired:
            return None, f"did not end within {TIMEOUT} s"
        if done.returncode == 0 and out.exists():
            return out.read_text(), ""
        sys.stderr.write(done.stderr)
        lines = done.stderr.strip().splitlines()
        return None, " ".join(lines[-1].split())[:400] if lines else f"exit status {done.returncode}"


def main() -> None:
    """The child: one benchmark here; the mode is "time" or the name of the callable whose memory is measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.measure")
    parser.add_argument("name")
    parser.add_argument("mode")
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int)
    args = parser.parse_args()
    load("bench." + args.name.partition(":")[0])
    entry = harness.REGISTRY[args.name]
    if args.mode == "time":
        args.out.write_text(harness.run(entry, args.rounds).to_json())
        return
    if entry.threads is not None:
        torch.set_num_threads(entry.threads)
    args.out.write_text(json.dumps(harness.extra_memory(entry.build().callables()[args.mode])))


if __name__ == "__main__":
    main()
