"""`python -m bench`: run the benchmarks, print the table, write the JSON and the table in bench/README.md."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from bench import harness

HERE = Path(__file__).parent
BEGIN, END = "<!-- table: written by `python -m bench --readme` -->", "<!-- end of table -->"


def modules() -> list[str]:
    """Every module that registers benchmarks, bench_*.py and peers/*.py, by name."""
    files = [*sorted(HERE.glob("bench_*.py")), *sorted(HERE.glob("peers/[!_]*.py"))]
    return [".".join(("bench", *file.relative_to(HERE).with_suffix("").parts)) for file in files]


def load(names: list[str]) -> dict[str, str]:
    """Import the modules; returns those that cannot be imported with the reason (a peer that is not installed)."""
    reasons = {name: _import(name) for name in names}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _import(name: str) -> str | None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        return str(error)
    return None


def child(name: str, mode: str, out: Path, rounds: int | None) -> None:
    """One benchmark in this process; `mode` is "time" or the name of the callable whose memory is measured."""
    load(["bench." + name.partition(":")[0]])
    entry = harness.REGISTRY[name]
    if mode == "time":
        out.write_text(json.dumps(harness.run(entry, rounds).to_json()))
    else:
        if entry.threads is not None:
            harness.torch.set_num_threads(entry.threads)
        out.write_text(json.dumps(harness.extra_memory(entry.build().callables()[mode])))


def spawn(name: str, mode: str, rounds: int | None) -> tuple[str | None, str]:
    """What a child wrote, or None, and the last line of its errors. A process each shares no caches and no peaks."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "bench", "--child", name, mode, str(out)]
        command += [] if rounds is None else ["--rounds", str(rounds)]
        done = subprocess.run(command, cwd=HERE.parent, text=True, stderr=subprocess.PIPE, check=False)
        if done.returncode == 0:
            return out.read_text(), ""
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        sys.stderr.write(done.stderr)
        return None, lines[-1]


def measure(entry: harness.Entry, rounds: int | None, with_memory: bool) -> harness.Row:
    """One row: times from one process, the memory of each callable from a process of its own."""
    text, error = spawn(entry.name, "time", rounds)
    if text is None:
        return harness.Row(entry.name, entry.work, f"failed: {error}", 0, {}, {}, {}, None, {}, "")
    row = harness.read_row(text)
    if not (with_memory and entry.memory):
        return row
    memory = {}
    for call in row.seconds:
        text, error = spawn(entry.name, call, None)
        if text is None:
            return replace(row, status=f"failed: memory of {call}: {error}")
        memory[call] = int(text)
    missed = [
        f"{memory['ours'] / memory[n]:.2f} of the memory of {n}, asked {bar:g}"
        for n, bar in entry.bars.memory.items()
        if memory["ours"] > bar * memory[n]
    ]
    status = row.status if not missed else "; ".join([row.status.replace("ok", "missed:", 1), *missed])
    return replace(row, memory=memory, status=status)


def table(rows: list[harness.Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| work | ours | competitor | ratio | ceiling | extra memory | bar | command |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        bars = harness.REGISTRY[row.name].bars
        others = "<br>".join(f"{name}: {seconds(row.seconds[name])}" for name in row.ratios)
        ratios = "<br>".join(f"{ratio:.3g}x" for ratio in row.ratios.values())
        ceiling = "" if row.ceiling is None else f"{row.ceiling[1]:.2f} times {row.ceiling[0]}"
        memory = "<br>".join(f"{name}: {size / 2**20:.0f} MiB" for name, size in row.memory.items())
        asked = [f"{bar:g}x {name}" for name, bar in bars.faster.items()]
        asked += [] if bars.within is None else [f"{bars.within:g} times the ceiling"]
        asked += [f"{bar:g} of the memory of {name}" for name, bar in bars.memory.items()]
        verdict = (
            "; ".join(asked)
            + (": " if asked else "")
            + (row.status if not row.status.startswith("ok") else "met" if asked else "")
        )
        work = (
            row.work
            + (f" ({row.note})" if row.note else "")
            + (f", {row.threads} thread{'s' * (row.threads > 1)}" if row.threads else "")
        )
        mine = seconds(row.seconds["ours"]) if row.seconds else ""
        command = f"`python -m bench {row.name}`"
        lines.append(f"| {work} | {mine} | {others} | {ratios} | {ceiling} | {memory} | {verdict} | {command} |")
    return "\n".join(lines)


def seconds(value: float) -> str:
    """Seconds with a unit: 1.23 s, 45.6 ms, 7.89 us."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("patterns", nargs="*", help="run the benchmarks whose name contains one of these; default all")
    parser.add_argument("--list", action="store_true", help="print the names and leave")
    parser.add_argument("--rounds", type=int, help="samples of each callable (default: each benchmark's own)")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--json", type=Path, help="write rows and machine to this file")
    parser.add_argument("--readme", action="store_true", help="replace the table in bench/README.md")
    parser.add_argument("--child", nargs=3, metavar=("NAME", "MODE", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], args.child[1], Path(args.child[2]), args.rounds)
        return 0
    for name, reason in load(modules()).items():
        print(f"left out: {name}: {reason} (pip install -c constraints.txt --group bench)", file=sys.stderr)
    entries = [e for e in harness.REGISTRY.values() if not args.patterns or any(p in e.name for p in args.patterns)]
    if args.list or not entries:
        print("\n".join(e.name for e in harness.REGISTRY.values()))
        return 0 if args.list else 2
    about = harness.machine()
    print("  ".join(f"{key}: {value}" for key, value in about.items()), file=sys.stderr)
    rows = []
    for entry in entries:
        print(f"... {entry.name}", file=sys.stderr, flush=True)
        rows.append(measure(entry, args.rounds, not args.no_memory))
        report(rows[-1])
    text = table(rows)
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "rows": [row.to_json() for row in rows]}, indent=1) + "\n")
    if args.readme:
        page = (HERE / "README.md").read_text()
        head, rest = page.split(BEGIN)
        title = "Machine: " + ", ".join(f"{key} {value}" for key, value in about.items()) + "."
        (HERE / "README.md").write_text(f"{head}{BEGIN}\n\n{title}\n\n{text}\n\n{END}{rest.split(END)[1]}")
    return 1 if any(row.status.startswith("failed") for row in rows) else 0


def report(row: harness.Row) -> None:
    """One benchmark on the terminal."""
    print(f"{row.work}  [{row.name}, {row.threads} thread(s)]  {row.status}  {row.note}")
    for name, value in row.seconds.items():
        parts = [f"  {name:32s} {seconds(value):>9s}  spread {row.spread[name]:.0%}"]
        if name in row.ratios:
            parts.append(f"ratio {row.ratios[name]:.3g}x")
        if row.ceiling is not None and name == row.ceiling[0]:
            parts.append(f"ceiling: ours is {row.ceiling[1]:.2f} times it")
        if name in row.memory:
            parts.append(f"extra memory {row.memory[name] / 2**20:.0f} MiB")
        print("  ".join(parts), flush=True)


if __name__ == "__main__":
    sys.exit(main())
