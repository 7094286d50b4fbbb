"""The benchmarks as a pytest-benchmark suite: every contest is an item, and a group with a record for each member.

The members of a group cannot be timed one after another, since their ratios would then carry the drift of the
machine: one process takes all rounds of a contest in turn, and the samples are replayed into the group's records.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from pytest_benchmark.utils import NameWrapper

from bench import page
from bench.harness import Entry, Row
from bench.measure import load, machine, measure, modules


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("contests")
    group.addoption("--rounds", type=int, help="samples of each callable (default: each contest's own)")
    group.addoption("--no-memory", action="store_true", help="times only")
    group.addoption("--keep", action="store_true", help="keep the rows in bench/results")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if module_path in modules():
        return ContestFile.from_parent(parent, path=module_path)
    return None


class ContestFile(pytest.File):
    """A module that registers contests."""

    def collect(self) -> Iterator[pytest.Item]:
        try:
            entries = load(modules()[self.path])
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] in ("bench", "dropscope"):
                raise
            pytest.skip(f"{error}: pip install -c constraints.txt --group bench", allow_module_level=True)
        for entry in entries:
            yield ContestItem.from_parent(self, name=entry.build.__name__, entry=entry)


class ContestItem(pytest.Item):
    """One contest. A missed bar passes, as "missed": the suite measures; a wrong answer fails."""

    def __init__(self, *, entry: Entry, **rest: Any) -> None:
        super().__init__(**rest)
        self.entry = entry

    def runtest(self) -> None:
        config = self.config
        session = config._benchmarksession  # pytest-benchmark keeps its session there
        if session.skip:
            pytest.skip("benchmarks are skipped")
        rounds = 1 if session.disabled else config.getoption("rounds")
        row = measure(self.entry, rounds, not (config.getoption("no_memory") or session.disabled))
        terminal = config.pluginmanager.getplugin("terminalreporter")
        with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            terminal.ensure_newline()
            terminal.write_line(page.report(row))
        if config.getoption("keep"):
            page.keep(row, about(), page.file_of(about()))
        kind, _, reason = row.status.partition(": ")
        if kind == "skipped":
            pytest.skip(reason)
        if kind == "failed":
            raise ContestError(reason)
        self.user_properties.append(("status", row.status))
        for member in row.samples:
            record(self, member, row, session)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, ContestError):
            return f"{self.entry.work}: {excinfo.value}"
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, self.entry.build.__code__.co_firstlineno - 1, self.name


class ContestError(Exception):
    """A contest whose process failed; its output says where."""


@cache
def about() -> dict[str, Any]:
    """The machine as the suite found it."""
    return machine()


def record(item: ContestItem, member: str, row: Row, session: Any) -> None:
    """Add a member to its group, with a fixture of its own: pytest-benchmark has one a test, a contest several."""
    samples = row.samples[member]
    options = dict(session.options, timer=NameWrapper(replay(samples)), cprofile=False)
    fixture = BenchmarkFixture(
        item,
        add_stats=session.benchmarks.append,
        logger=session.logger,
        warner=item.warn,
        disabled=session.disabled,
        group=f"{row.name}: {row.work}",
        **options,
    )
    fixture.name, fixture.fullname = f"{item.name}[{member}]", f"{item.nodeid}[{member}]"
    fixture.extra_info.update(
        member=member,
        threads=row.threads,
        ratio=row.ratios.get(member),
        ours_over_ceiling=row.ceiling[1] if row.ceiling is not None and row.ceiling[0] == member else None,
        extra_memory_bytes=row.memory.get(member),
        bar=row.bars,
        status=row.status,
        agreement=row.note,
        errors=dict(row.errors),
    )
    fixture.pedantic(lambda: None, rounds=len(samples))


def replay(samples: list[float]) -> Any:
    """A clock that, read before and after each round, shows the recorded seconds."""
    ends = list(accumulate(samples))
    readings = iter([t for start, end in zip([0.0, *ends], ends, strict=False) for t in (start, end)])
    return lambda: next(readings)


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    if report.when == "call" and report.passed and dict(report.user_properties).get("status", "ok") != "ok":
        return "missed", "m", "MISSED"
    return None


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info.update(about())


def pytest_report_header() -> str:
    return "machine: " + ", ".join(f"{key} {value}" for key, value in about().items())
