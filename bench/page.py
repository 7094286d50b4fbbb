"""What has been measured, kept a file for each machine, and its table in bench/README.md."""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.harness import Row

HERE = Path(__file__).parent
RESULTS = HERE / "results"
BEGIN, END = "<!-- table: written by `python -m bench --readme` -->", "<!-- end of table -->"


def file_of(about: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """The results of this machine: its device, else its CPU."""
    name = str(about.get("device") or str(about["cpu"]).partition(" @")[0]).lower()
    return folder / (re.sub(r"[^a-z0-9]+", "-", name).strip("-") + ".json")


def keep(row: Row, about: Mapping[str, Any], path: Path) -> None:
    """Put a row into a results file, in place of the one that it had; at once, so that no interruption loses it."""
    stored = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    fields = json.loads(row.to_json())
    stored["rows"][row.name] = {**fields, "date": datetime.date.today().isoformat()}
    stored["machine"] = dict(about)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(stored, indent=1) + "\n")
    os.replace(partial, path)


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Machine and rows of a results file."""
    stored = json.loads(path.read_text())
    rows = [{k: v for k, v in fields.items() if k != "date"} for fields in stored["rows"].values()]
    return stored["machine"], [Row.from_json(fields) for fields in rows]


def write(folder: Path = RESULTS, page: Path = HERE / "README.md", gone: Callable[[str], bool] | None = None) -> None:
    """Rewrite the tables of a page from all results; benchmarks that a machine cannot run are not shown.

    Args:
        folder: where the results are.
        page: has the marks BEGIN and END.
        gone: tells from its name whether a benchmark exists no more; its row is then left out.
    """
    parts = []
    for path in sorted(folder.glob("*.json")):
        about, rows = read(path)
        shown = [row for row in rows if not (gone and gone(row.name)) and not row.status.startswith("skipped")]
        if shown:
            parts.append("Machine: " + ", ".join(f"{key} {value}" for key, value in about.items()) + ".")
            parts.append(table(sorted(shown, key=lambda row: row.name)))
    replace_between(page, BEGIN, END, "\n\n".join(parts))


def replace_between(page: Path, begin: str, end: str, text: str) -> None:
    """Put text between two marks of a page, in place of what stood there."""
    head, rest = page.read_text().split(begin)
    page.write_text(f"{head}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}")


def table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table; a benchmark that failed or was skipped says why."""
    lines = [
        "| work | ours | peer | ratio | share of the ceiling | extra memory | bar | run it |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(line(row) for row in rows)])


def line(row: Row) -> str:
    """One line of the table."""
    peers = [f"{name}: {seconds(row.seconds(name))}" for name in row.ratios]
    ratios = [f"{ratio:.3g}x" for ratio in row.ratios.values()]
    peers += [f"{name}: {error}" for name, error in row.errors.items()]
    ratios += ["–" for _ in row.errors]
    ceiling = ""
    if row.ceiling is not None:
        ceiling = f"{1 / row.ceiling[1]:.0%} of {row.ceiling[0]} ({row.ceiling[1]:.2f} times it)"
    memory = [f"{name}: {size / 2**20:.0f} MiB" for name, size in row.memory.items()]
    state = row.status if row.status != "ok" else "met" if row.bars else ""
    bar = f"{row.bars}: {state}" if row.bars and state else row.bars or state
    threads = f", {row.threads} thread{'s' * (row.threads > 1)}" if row.threads else ""
    work = row.work + (f" ({row.note})" if row.note else "") + threads
    mine = seconds(row.seconds("ours")) if row.samples else ""
    cells = [work, mine, *map("<br>".join, (peers, ratios)), ceiling, "<br>".join(memory), bar]
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + f" | `python -m bench {row.name}` |"


def report(row: Row) -> str:
    """A row for the terminal."""
    lines = [f"{row.work}  [{row.name}, {row.threads} thread(s)]  {row.status}  {row.note}"]
    for name, samples in row.samples.items():
        middle = row.seconds(name)
        parts = [f"  {name:40s} {seconds(middle):>9s}  spread {(max(samples) - min(samples)) / middle:4.0%}"]
        if name in row.ratios:
            parts.append(f"ratio {row.ratios[name]:.3g}x")
        if row.ceiling is not None and name == row.ceiling[0]:
            parts.append(f"ceiling: ours is {row.ceiling[1]:.2f} times it")
        if name in row.memory:
            parts.append(f"extra memory {row.memory[name] / 2**20:.0f} MiB")
        lines.append("  ".join(parts))
    return "\n".join([*lines, *(f"  {name:40s} {error}" for name, error in row.errors.items())])


def seconds(value: float) -> str:
    """Seconds with a unit: 1.23 s, 45.6 ms, 7.89 us."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"
