"""Interleaved timing of our code, its competitors and its ceiling, with the answers checked.

A benchmark is a function decorated with `contest` that returns a `Contest`. The callables run in turn, round after
round, so that a slow minute of the machine hurts all of them alike; the table shows medians, and ratios of them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

MIN_SAMPLE_SECONDS = 0.02  # calls shorter than this are repeated inside one sample


@dataclass(frozen=True)
class Contest:
    """What one benchmark runs.

    Attributes:
        ours: our code; its return value is its answer.
        competitors: name -> callable of the same work done by another tool.
        ceiling: name and callable of the work that no implementation can avoid (a copy, the bare products).
        check: gets {"ours" or name: answer of the last round}; raises AssertionError where an answer is wrong; may
            return a note for the table. A benchmark without a check is refused.
        once: names that are too slow for every round and run a single time.
    """

    ours: Callable[[], Any]
    check: Callable[[Mapping[str, Any]], str | None]
    competitors: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    ceiling: tuple[str, Callable[[], Any]] | None = None
    once: tuple[str, ...] = ()

    def callables(self) -> dict[str, Callable[[], Any]]:
        calls = {"ours": self.ours, **self.competitors}
        return calls if self.ceiling is None else {**calls, self.ceiling[0]: self.ceiling[1]}


@dataclass(frozen=True)
class Bars:
    """What is asked for: at least `faster[name]` times the competitor, at most `within` times the ceiling.

    `memory[name]` is the largest share of the competitor's extra memory that ours may take.
    """

    faster: Mapping[str, float] = field(default_factory=dict)
    within: float | None = None
    memory: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A registered benchmark."""

    work: str
    build: Callable[[], Contest]
    bars: Bars
    rounds: int
    threads: int | None
    memory: bool

    @property
    def name(self) -> str:
        return f"{self.build.__module__.removeprefix('bench.')}:{self.build.__name__}"


REGISTRY: dict[str, Entry] = {}


def contest(
    work: str,
    *,
    faster: Mapping[str, float] | None = None,
    within: float | None = None,
    memory: bool | Mapping[str, float] = False,
    rounds: int = 7,
    threads: int | None = None,
) -> Callable[[Callable[[], Contest]], Callable[[], Contest]]:
    """Register a benchmark.

    Args:
        work: what is done, as the table says it.
        faster: competitor -> how many times faster we must be.
        within: our time may be at most this many times the ceiling's.
        memory: measure the extra peak memory of each callable; as a mapping competitor -> largest share we may take.
        rounds: how often each callable is timed, in turn.
        threads: torch threads; None leaves torch's default.
    """

    def register(build: Callable[[], Contest]) -> Callable[[], Contest]:
        bars = Bars(dict(faster or {}), within, dict(memory) if isinstance(memory, Mapping) else {})
        entry = Entry(work, build, bars, rounds, threads, bool(memory))
        REGISTRY[entry.name] = entry
        return build

    return register


def time_in_turn(
    calls: Mapping[str, Callable[[], Any]], rounds: int, once: tuple[str, ...] = ()
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds per call of each callable, `rounds` samples of each taken in turn, and the last answers."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    answers: dict[str, Any] = {}
    repeats: dict[str, int] = {}
    for name, call in calls.items():  # the first call warms caches and sets how many calls make a sample
        start = time.perf_counter()
        answers[name] = call()
        first = time.perf_counter() - start
        if name in once:
            seconds[name].append(first)
            continue
        start = time.perf_counter()
        if first < MIN_SAMPLE_SECONDS:
            call()
            first = time.perf_counter() - start
        repeats[name] = max(1, int(MIN_SAMPLE_SECONDS / max(first, 1e-7)))
    order = list(repeats)
    for turn in range(rounds):
        for name in order if turn % 2 == 0 else order[::-1]:
            call = calls[name]
            start = time.perf_counter()
            for _ in range(repeats[name]):
                answers[name] = call()
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return seconds, answers


def extra_memory(call: Callable[[], Any]) -> int:
    """Bytes by which the peak resident memory of this process rises above its present size during `call`."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present size
    before = _status("VmRSS")
    answer = call()
    del answer
    return _status("VmHWM") - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def machine() -> dict[str, Any]:
    """The machine and the versions behind a set of numbers."""
    cpu = platform.processor()
    model: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        model.setdefault(key.strip(), value.strip())
    cpu = f"{model.get('model name', cpu)}, family {model.get('cpu family', '?')} model {model.get('model', '?')}"
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "isa": _isa(),
        "torch": torch.__version__,
        "torch isa": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "load": round(os.getloadavg()[0], 2),
    }


def _isa() -> str:
    from dropscope import kernels

    isa = getattr(kernels, "isa", None)
    return str(isa() if callable(isa) else isa)


@dataclass(frozen=True)
class Row:
    """One line of the table. Times in seconds, memory in bytes; `status` is "ok", "missed: ..." or "failed: ..."."""

    name: str
    work: str
    status: str
    threads: int
    seconds: Mapping[str, float]
    spread: Mapping[str, float]
    ratios: Mapping[str, float]
    ceiling: tuple[str, float] | None
    memory: Mapping[str, int]
    note: str

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def run(entry: Entry, rounds: int | None = None) -> Row:
    """Build a benchmark in this process, time it, check its answers and hold it against its bars."""
    if entry.threads is not None:
        torch.set_num_threads(entry.threads)
    trial = entry.build()
    samples, answers = time_in_turn(trial.callables(), rounds or entry.rounds, trial.once)
    note = trial.check(answers) or ""
    seconds = {name: statistics.median(s) for name, s in samples.items()}
    spread = {name: (max(s) - min(s)) / statistics.median(s) for name, s in samples.items()}
    ratios = {name: seconds[name] / seconds["ours"] for name in trial.competitors}
    ceiling = None if trial.ceiling is None else (trial.ceiling[0], seconds["ours"] / seconds[trial.ceiling[0]])
    missed = [
        f"{ratios[n]:.2g}x {n}, asked {bar:g}x"
        for n, bar in entry.bars.faster.items()
        if n in ratios and ratios[n] < bar
    ]
    if ceiling is not None and entry.bars.within is not None and ceiling[1] > entry.bars.within:
        missed.append(f"{ceiling[1]:.2f} times {ceiling[0]}, asked {entry.bars.within:g}")
    status = "missed: " + "; ".join(missed) if missed else "ok"
    return Row(entry.name, entry.work, status, torch.get_num_threads(), seconds, spread, ratios, ceiling, {}, note)


def read_row(text: str) -> Row:
    """The row that a child process wrote."""
    return Row(**json.loads(text))
