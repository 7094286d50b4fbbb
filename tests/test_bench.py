"""The benchmark harness: it times in turn, takes out a competitor that fails, holds bars, keeps and shows its rows."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "bench").exists(), reason="needs the source tree")


@pytest.fixture(autouse=True)
def source_tree(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`bench` is a folder of the source tree, no installed package."""
    monkeypatch.syspath_prepend(str(ROOT))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "bench"]:
        sys.modules.pop(name)


def sleeper(seconds: float, answer: object = 1):
    def call() -> object:
        time.sleep(seconds)
        return answer

    return call


def entry_of(trial, **options):
    """An entry of this contest that is in no registry."""
    from bench import harness

    def build():
        return trial

    registered = dict(harness.REGISTRY)
    harness.contest("some work", **options)(build)
    (name,) = set(harness.REGISTRY) - set(registered)
    return harness.REGISTRY.pop(name)


def equal(answers) -> str:
    assert answers["ours"] == answers["other"]
    return "the same"


def test_ratios_bars_and_samples_of_a_contest():
    from bench.harness import Contest, run

    trial = Contest(sleeper(0.02), equal, {"other": sleeper(0.06), "slow": sleeper(0.2)}, ("floor", sleeper(0.01)))
    row = run(entry_of(trial, faster={"other": 2.0}, within=5.0, rounds=3))
    assert row.status == "ok"
    assert row.note == "the same"
    assert 2.0 < row.ratios["other"] < 3.5
    assert 5.0 < row.ratios["slow"] < 11.0
    assert {name: len(s) for name, s in row.samples.items()} == {"ours": 3, "other": 3, "slow": 3, "floor": 3}
    assert row.ceiling is not None
    assert row.ceiling[0] == "floor"
    missed = run(entry_of(trial, faster={"other": 50.0}, within=1.01, rounds=1))
    assert re.fullmatch(r"missed: \S+x other, asked 50x; \S+ times floor, asked 1.01", missed.status)


def test_the_callables_run_in_turn():
    from bench.harness import Contest, time_in_turn

    seen: list[str] = []

    def noted(name: str):
        return lambda: (seen.append(name), time.sleep(0.02))

    trial = Contest(
        noted("ours"), lambda answers: None, {"other": noted("other"), "slow": noted("slow")}, None, ("slow",)
    )
    found = time_in_turn(trial, 4)
    assert seen[:3] == ["ours", "other", "slow"]
    rounds = seen[3:]
    assert rounds == ["ours", "other", "other", "ours"] * 2
    assert len(found.seconds["slow"]) == 1


def test_short_calls_are_repeated_inside_a_sample():
    from bench.harness import Contest, time_in_turn

    calls = 0

    def quick() -> None:
        nonlocal calls
        calls += 1

    seconds = time_in_turn(Contest(quick, lambda answers: None), 2).seconds["ours"]
    assert calls > 1000
    assert max(seconds) < 1e-3


def test_a_competitor_that_fails_takes_out_only_itself():
    from bench.harness import Contest, run

    def dead() -> None:
        raise AttributeError("'Tensor' object has no attribute 'symeig'")

    trial = Contest(sleeper(0.0), lambda answers: None, {"dead": dead, "other": sleeper(0.001)})
    row = run(entry_of(trial, faster={"dead": 10.0}, rounds=1))
    assert row.status == "ok"
    assert row.errors == {"dead": "AttributeError: 'Tensor' object has no attribute 'symeig'"}
    assert set(row.ratios) == {"other"}
    with pytest.raises(RuntimeError, match="no competitor ran: dead: AttributeError"):
        run(entry_of(Contest(sleeper(0.0), lambda answers: None, {"dead": dead}), rounds=1))
    with pytest.raises(AttributeError):
        run(entry_of(Contest(dead, lambda answers: None), rounds=1))


def test_a_wrong_answer_fails():
    from bench.harness import Contest, run

    with pytest.raises(AssertionError):
        run(entry_of(Contest(sleeper(0.0, 1), equal, {"other": sleeper(0.0, 2)}), rounds=1))


def test_a_contest_may_be_skipped():
    from bench import harness

    def build():
        raise harness.Unavailable("no such device")

    entry = harness.Entry("work", build, harness.Bars(), 1, None, False)
    assert harness.run(entry).status == "skipped: no such device"


def test_extra_memory_is_the_rise_of_the_peak():
    from bench.harness import extra_memory

    size = 64 * 2**20
    assert 0.9 * size < extra_memory(lambda: bytearray(size)) < 1.5 * size
    assert extra_memory(lambda: None) < 0.1 * size


def test_rows_are_kept_and_shown(tmp_path: Path):
    from bench import page
    from bench.harness import Row

    about = {"cpu": "Some CPU @ 2.5GHz", "threads": 2}
    path = page.file_of(about, tmp_path)
    assert path.name == "some-cpu.json"
    assert page.file_of({**about, "device": "A Device"}, tmp_path).name == "a-device.json"
    samples = {"ours": [0.001, 0.003, 0.002], "other": [0.02], "copy": [0.001]}
    row = Row("m:f", "work", "ok", "5x other", 2, samples, {"other": 10.0}, ("copy", 2.0), {"ours": 2**20}, {}, "a | b")
    page.keep(Row("m:g", "gone", "failed: it died"), about, path)
    page.keep(row.missing("too slow"), about, path)
    page.keep(row, about, path)
    assert page.read(path) == (about, [Row("m:g", "gone", "failed: it died"), row])
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    page.write(tmp_path, readme)
    page.write(tmp_path, readme)  # the same again
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "Machine: cpu Some CPU @ 2.5GHz, threads 2." in text
    assert "| work (a / b), 2 threads | 2 ms | other: 20 ms | 10x | 50% of copy (2.00 times it) | ours: 1 MiB |" in text
    assert "failed: it died" in text
    page.keep(Row("m:h", "elsewhere", "skipped: no such device"), about, path)
    page.write(tmp_path, readme, gone=lambda name: name == "m:g")
    assert "elsewhere" not in readme.read_text()
    assert "it died" not in readme.read_text()
    assert readme.read_text().count("\n| ") == 2


def test_exponents_of_scaling_lines(tmp_path: Path):
    from dataclasses import asdict, replace

    from bench import scaling
    from bench.scaling import AXES, JOBS, Fit, Setting

    fit = Fit.of([1.0, 2.0, 4.0, 8.0], [3.0, 12.0, 48.0, 192.0])
    assert fit.exponent == pytest.approx(2.0)
    assert fit.error < 1e-6
    bent = Fit.of([1.0, 2.0, 4.0], [1.0, 2.0, 8.0])  # slopes 1 and 2 in logarithms to base 2
    assert bent.exponent == pytest.approx(1.5)
    assert bent.error == pytest.approx((1 / 6 / 2) ** 0.5)

    def cost(at: Setting) -> float:
        return 1e-9 * at.n * at.parameters * at.draws**0.5

    settings = [replace(Setting(), **{axis: value}) for axis, values in AXES.items() for value in values]
    points = [
        {**asdict(at), "job": job, "seconds": cost(at) / at.threads, "memory": 1000 * at.n, "products": None}
        for job in JOBS
        for at in dict.fromkeys(settings)
    ]
    found = scaling.fits(points, "seconds")
    assert found["noise product", "n"].exponent == pytest.approx(1.0)
    assert found["noise product", "width"].exponent == pytest.approx(1.0)
    assert found["noise spectrum", "draws"].exponent == pytest.approx(0.5)
    assert scaling.fits(points, "memory")["Hessian product", "n"].exponent == pytest.approx(1.0)
    run = {"seconds": 1.0, "memory": 2**30}
    pairs = {"values": [1.0], "converged": [True], "products": 3}
    largest = {**asdict(Setting()), "parameters": 10**8, "noise product": run, "Hessian eigsh": run, "pairs": pairs}
    text = scaling.section(points, {"cpu": "x"}, largest)
    assert "| noise product | 1.00 ± 0.00 | 1.00 ± 0.00 |" in text
    assert "2.00x" in text
    assert "1e+08 parameters" in text
    scaling.draw(points, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


SUITE = """
from bench.harness import Contest, Unavailable, contest

def check(answers):
    assert answers["ours"] == answers["other"]
    return "the same"

@contest("good work", memory=True, rounds=2)
def good():
    return Contest(lambda: bytes(10**6), check, {"other": lambda: bytes(10**6)}, ("floor", lambda: None))

@contest("missed work", faster={"other": 1e9}, rounds=1)
def missed():
    return Contest(lambda: 1, check, {"other": lambda: 1})

@contest("wrong work", rounds=1)
def wrong():
    return Contest(lambda: 1, check, {"other": lambda: 2})

@contest("impossible work")
def impossible():
    raise Unavailable("no such device")
"""


@pytest.mark.slow
def test_the_suite_gives_groups_with_a_record_for_each_member(tmp_path: Path):
    """In a copy of the suite with one module of contests: one passes, one misses, one is wrong, one is skipped."""
    bench = tmp_path / "bench"
    bench.mkdir()
    for name in ("__init__.py", "conftest.py", "harness.py", "measure.py", "page.py", "pytest.ini"):
        (bench / name).write_text((ROOT / "bench" / name).read_text())
    (bench / "bench_toys.py").write_text(SUITE)
    (bench / "bench_peer.py").write_text("import a_peer_that_is_not_installed\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench",
        "-q",
        "--keep",
        "--benchmark-json=out.json",
        "-k",
        "toys or peer",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed, 2 skipped, 1 missed" in done.stdout, done.stdout
    assert "AssertionError" in done.stdout
    assert "a_peer_that_is_not_installed" in done.stdout
    records = {r["name"]: r for r in json.loads((tmp_path / "out.json").read_text())["benchmarks"]}
    assert set(records) == {"good[ours]", "good[other]", "good[floor]", "missed[ours]", "missed[other]"}
    assert len({records[f"good[{member}]"]["group"] for member in ("ours", "other", "floor")}) == 1
    mine, other = records["good[ours]"], records["good[other]"]
    assert mine["stats"]["rounds"] == 2
    ratio = other["stats"]["median"] / mine["stats"]["median"]
    assert other["extra_info"]["ratio"] == pytest.approx(ratio, rel=1e-6)
    assert mine["extra_info"]["agreement"] == "the same"
    assert mine["extra_info"]["extra_memory_bytes"] >= 0
    assert records["missed[ours]"]["extra_info"]["status"].startswith("missed: ")
    (kept,) = (bench / "results").glob("*.json")
    rows = json.loads(kept.read_text())["rows"]
    assert {name: row["status"].partition(":")[0] for name, row in rows.items()} == {
        "bench_toys:good": "ok",
        "bench_toys:missed": "missed",
        "bench_toys:wrong": "failed",
        "bench_toys:impossible": "skipped",
    }


def test_a_step_on_a_device_ends_with_its_budget_and_loses_no_output(tmp_path: Path):
    from bench.on_device import Session, tested

    session = Session(tmp_path, 60.0)
    step = session.run("slow", [sys.executable, "-c", "import time; print('begun'); time.sleep(60)"], 2)
    assert step.status.startswith("failed: no end after")
    assert step.output == "begun\n"
    late = Session(tmp_path, 6.0).run("late", [sys.executable, "-c", ""], 60)
    assert late.status == "skipped: no time left"
    log = (tmp_path / "log.txt").read_text()
    assert "=== slow" in log
    assert "begun" in log
    assert session.run("wrong", [sys.executable, "-c", "exit(3)"], 60).status == "failed: exit status 3"
    assert tested(session.run("empty", [sys.executable, "-c", "print('2 skipped')"], 60)).status.endswith("no test ran")
    assert tested(session.run("full", [sys.executable, "-c", "print('= 2 passed')"], 60)).passed


def test_contests_of_a_device_go_on_after_the_one_that_ended_the_process(tmp_path: Path):
    from bench import device_rows, page
    from bench.harness import Row

    entries = [entry_of(object()) for _ in range(2)]
    entries = [dataclasses.replace(entry, build=build) for entry, build in zip(entries, (print, len), strict=True)]
    results = tmp_path / "rows.json"
    assert device_rows.left(entries, results) == entries
    page.keep(Row(entries[0].name, entries[0].work, device_rows.LOST), {"device": "none"}, results)
    assert device_rows.left(entries, results) == entries[1:]
    assert "failed: the process ended" in page.table(page.read(results)[1])
