"""Runs entries and keeps what they found: one JSON and one figure each, and one page of claims over all of them."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dropscope
from dropscope import _files
from dropscope.report import drawn, provenance
from dropscope.reproduce import MODULES
from dropscope.reproduce.entry import Claim, Entry, Scale

FOLDER = "papers"


@dataclass(frozen=True)
class Record:
    """An entry that has run, as it stands in its JSON.

    Attributes:
        name, paper, place, title: of the entry.
        setting, claims, numbers: what it found.
        seconds: wall time of the run.
        scale: ``full``, ``data`` and ``seed``.
        provenance: versions, machine and date.
    """

    name: str
    paper: str
    place: str
    title: str
    setting: str
    claims: tuple[Claim, ...]
    numbers: dict[str, Any]
    seconds: float
    scale: dict[str, Any]
    provenance: dict[str, str]


def entries() -> dict[str, Entry]:
    """Every entry by its name, in the order in which ``all`` runs them."""
    found = [importlib.import_module(f"dropscope.reproduce.{name}").ENTRY for name in MODULES]
    return {entry.name: entry for entry in found}


def select(names: Sequence[str]) -> list[Entry]:
    """Return the entries of these names; ``all`` is every one, a paper's letter all of its entries.

    Raises:
        ValueError: if a name is none of these.
    """
    known = entries()
    chosen: dict[str, Entry] = {}
    for name in names:
        matching = {n: e for n, e in known.items() if name.lower() in ("all", e.paper.lower(), n.lower())}
        if not matching:
            raise ValueError(f"reproduce: name must be 'all', A, B, C, D or one of {', '.join(known)}, got {name!r}")
        chosen |= matching
    return [entry for name, entry in known.items() if name in chosen]


def run(entry: Entry, scale: Scale, out: Path) -> Record:
    """Run an entry and write ``papers/NAME.json`` and ``papers/NAME.png`` under ``out``."""
    started = time.perf_counter()
    findings = entry.run(scale)
    record = Record(
        name=entry.name,
        paper=entry.paper,
        place=entry.place,
        title=entry.title,
        setting=findings.setting,
        claims=findings.claims,
        numbers=_files.plain(findings.numbers),
        seconds=round(time.perf_counter() - started, 1),
        scale=_plain(scale),
        provenance=provenance(f"dropscope reproduce {entry.name}{_options(scale)}"),
    )
    _files.write_json(out / FOLDER / f"{entry.name}.json", record)
    draw(entry, record, out)
    return record


def draw(entry: Entry, record: Record, out: Path) -> Path:
    """Draw the figure of a record again from its numbers."""
    figure = entry.plot(record.numbers)
    return _files.write_bytes(out / FOLDER / f"{entry.name}.png", drawn(figure, "png"))


def finished(entry: Entry, scale: Scale, out: Path) -> Record | None:
    """The record of an earlier run of this version with the same scale, or None."""
    record = next((r for r in records(out) if r.name == entry.name), None)
    if record is None or record.scale != _plain(scale):
        return None
    return record if record.provenance["dropscope"].split(" ")[0] == dropscope.__version__ else None


def records(out: Path) -> list[Record]:
    """Every record under ``out``, in the order of the entries; files of other entries are left alone."""
    found = []
    for name in entries():
        path = out / FOLDER / f"{name}.json"
        if path.is_file():
            content = json.loads(path.read_text())
            found.append(Record(**content | {"claims": tuple(Claim(**claim) for claim in content["claims"])}))
    return found


def _plain(scale: Scale) -> dict[str, Any]:
    return {"full": scale.full, "data": str(scale.data) if scale.data else None, "seed": scale.seed}


def _options(scale: Scale) -> str:
    options = {"--data": scale.data, "--seed": scale.seed or None}
    return (" --full" if scale.full else "") + "".join(f" {k} {v}" for k, v in options.items() if v is not None)
