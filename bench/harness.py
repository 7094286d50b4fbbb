"""Interleaved timing of our code, its competitors and its ceiling, with the answers checked.

A benchmark is a function decorated with `contest` that returns a `Contest`. The callables run in turn, round after
round, so that a slow minute of the machine hurts all of them alike; the table shows medians, and ratios of them.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

MIN_SAMPLE_SECONDS = 0.02  # calls shorter than this are repeated inside one sample


class Unavailable(Exception):  # noqa: N818  (nothing went wrong)
    """Raised while a contest is built that this machine cannot run: the contest is skipped, with the reason."""


def wall_clock(call: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Seconds per call, and the answer of the last."""
    start = time.perf_counter()
    for _ in range(repeats):
        answer = call()
    return (time.perf_counter() - start) / repeats, answer


@dataclass(frozen=True)
class Contest:
    """What one benchmark runs.

    Attributes:
        ours: our code; its return value is its answer.
        competitors: name -> callable of the same work done by another tool. One that raises is left out of the
            contest, and the table says with what error.
        ceiling: name and callable of the work that no implementation can avoid (a copy, the bare products).
        check: gets {"ours" or name: answer of the last round}; raises AssertionError where an answer is wrong; may
            return a note for the table. A benchmark without a check is refused.
        once: names that are too slow for every round and run a single time.
        clock: runs a callable so many times, at least once; seconds per call, and the last answer. Work that a device
            does while the host goes on needs a clock of the device's.
    """

    ours: Callable[[], Any]
    check: Callable[[Mapping[str, Any]], str | None]
    competitors: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    ceiling: tuple[str, Callable[[], Any]] | None = None
    once: tuple[str, ...] = ()
    clock: Callable[[Callable[[], Any], int], tuple[float, Any]] = wall_clock

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

    def __str__(self) -> str:
        asked = [f"{bar:g}x {name}" for name, bar in self.faster.items()]
        asked += [] if self.within is None else [f"{self.within:g} times the ceiling"]
        return "; ".join(asked + [f"{bar:g} of the memory of {name}" for name, bar in self.memory.items()])


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


@dataclass
class Timings:
    """Seconds per call of each callable, sample by sample, the last answers, and why a competitor is missing."""

    seconds: dict[str, list[float]]
    answers: dict[str, Any]
    failed: dict[str, str]


def time_in_turn(trial: Contest, rounds: int) -> Timings:
    """Time every callable of a contest, `rounds` samples of each taken in turn.

    Raises:
        Exception: what our own code or the ceiling raises; a competitor's error takes only itself out.
    """
    calls = trial.callables()
    found = Timings({}, {}, {})
    repeats: dict[str, int] = {}
    for name, call in calls.items():  # the first call warms caches and sets how many calls make a sample
        try:
            first, found.answers[name] = trial.clock(call, 1)
        except Exception as error:
            if name not in trial.competitors:
                raise
            found.failed[name] = described(error)
            continue
        found.seconds[name] = []
        if name in trial.once:
            found.seconds[name].append(first)
            continue
        if first < MIN_SAMPLE_SECONDS:
            first, _ = trial.clock(call, 1)
        repeats[name] = max(1, int(MIN_SAMPLE_SECONDS / max(first, 1e-7)))
    order = list(repeats)
    for turn in range(rounds):
        for name in order if turn % 2 == 0 else order[::-1]:
            seconds, found.answers[name] = trial.clock(calls[name], repeats[name])
            found.seconds[name].append(seconds)
    return found


def described(error: BaseException) -> str:
    """An error in one line of a table."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:200]}".replace("|", "/")


def extra_memory(call: Callable[[], Any]) -> int:
    """Bytes by which the peak resident memory of this process rises above its present size during `call`."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present size
    before = _status("VmRSS")
    answer = call()
    del answer
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


@dataclass(frozen=True)
class Row:
    """One line of the table. Times in seconds, memory in bytes, ratios of medians.

    Attributes:
        status: "ok", "missed: ...", "skipped: ..." or "failed: ...".
        samples: seconds per call of each callable, in the order in which the rounds were run.
        ratios: competitor's time over ours.
        ceiling: its name, and our time over its.
        errors: why a competitor has no time.
    """

    name: str
    work: str
    status: str
    bars: str = ""
    threads: int = 0
    samples: Mapping[str, list[float]] = field(default_factory=dict)
    ratios: Mapping[str, float] = field(default_factory=dict)
    ceiling: tuple[str, float] | None = None
    memory: Mapping[str, int] = field(default_factory=dict)
    errors: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    def seconds(self, name: str) -> float:
        """Median seconds per call."""
        return statistics.median(self.samples[name])

    def missing(self, *misses: str) -> Row:
        """The row with bars missed besides those that it has."""
        if not misses:
            return self
        before = [self.status.removeprefix("missed: ")] if self.status.startswith("missed") else []
        return dataclasses.replace(self, status="missed: " + "; ".join([*before, *misses]))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> Row:
        ceiling = fields["ceiling"]
        return Row(**{**fields, "ceiling": None if ceiling is None else (ceiling[0], ceiling[1])})


def run(entry: Entry, rounds: int | None = None) -> Row:
    """Build a benchmark in this process, time it, check its answers and hold it against its bars."""
    if entry.threads is not None:
        torch.set_num_threads(entry.threads)
    threads = torch.get_num_threads()
    try:
        trial = entry.build()
    except Unavailable as error:
        return Row(entry.name, entry.work, f"skipped: {error}", str(entry.bars), threads)
    found = time_in_turn(trial, rounds or entry.rounds)
    if set(trial.competitors) == set(found.failed) != set():
        raise RuntimeError("no competitor ran: " + "; ".join(f"{n}: {e}" for n, e in found.failed.items()))
    note = trial.check(found.answers) or ""
    median = {name: statistics.median(s) for name, s in found.seconds.items()}
    ratios = {name: median[name] / median["ours"] for name in trial.competitors if name in median}
    ceiling = None if trial.ceiling is None else (trial.ceiling[0], median["ours"] / median[trial.ceiling[0]])
    misses = [
        f"{ratios[n]:.2g}x {n}, asked {bar:g}x"
        for n, bar in entry.bars.faster.items()
        if n in ratios and ratios[n] < bar
    ]
    if ceiling is not None and entry.bars.within is not None and ceiling[1] > entry.bars.within:
        misses.append(f"{ceiling[1]:.2f} times {ceiling[0]}, asked {entry.bars.within:g}")
    row = Row(
        entry.name, entry.work, "ok", str(entry.bars), threads, found.seconds, ratios, ceiling, {}, found.failed, note
    )
    return row.missing(*misses)
