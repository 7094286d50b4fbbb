"""One self-contained HTML page: headline numbers, tables, figures with captions, provenance. No network, no script."""

from __future__ import annotations

import base64
import io
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

import dropscope
from dropscope import _files
from dropscope.estimate import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS: tuple[Literal["svg", "pdf"], ...] = ("svg", "pdf")
PACKAGES = ("numpy", "scipy", "matplotlib", "scikit-learn", "safetensors")


@dataclass(frozen=True)
class Headline:
    """A number that the page opens with: the value, what it is, and what it means."""

    value: str
    name: str
    meaning: str


@dataclass(frozen=True)
class Table:
    """A table with a caption; ``notes`` explain marks in the cells."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Plate:
    """A figure with a caption: what is plotted, how it was estimated, what the error bars are; a shape on the page."""

    title: str
    figure: Figure
    caption: str
    shape: Literal["", "wide", "tall"] = ""


@dataclass
class Page:
    """A report.

    Attributes:
        title: heading of the page.
        lead: a sentence or two under it.
        headlines: the numbers that matter most.
        sections: tables and figures in order.
        notes: paragraphs on method and limits.
        provenance: what is needed to make the page again.
    """

    title: str
    lead: str
    headlines: list[Headline] = field(default_factory=list)
    sections: list[Table | Plate] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    provenance: dict[str, str] = field(default_factory=dict)

    def html(self) -> str:
        """Return the page.

        Raises:
            ImportError: if jinja2 is missing.
        """
        try:
            import jinja2
        except ImportError as error:  # pragma: no cover - an optional dependency
            raise ImportError("dropscope.report needs jinja2: pip install 'dropscope[report]'") from error
        source = resources.files("dropscope").joinpath("report.html.j2").read_text(encoding="utf-8")
        environment = jinja2.Environment(
            autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
        )
        environment.filters["svg"] = svg_uri
        environment.tests["table"] = lambda item: isinstance(item, Table)
        return environment.from_string(source).render(page=self)

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to ``path``, and each figure as SVG and PDF into the folder ``figures`` beside it."""
        for item in self.sections:
            if isinstance(item, Plate):
                name = re.sub(r"[^a-z0-9]+", "-", item.title.lower()).strip("-")
                for kind in KINDS:
                    _files.write_bytes(Path(path).parent / "figures" / f"{name}.{kind}", drawn(item.figure, kind))
        return _files.write_text(path, self.html())


def svg_uri(figure: Figure) -> str:
    """A figure as a data URI; text is drawn as paths, so that it looks the same everywhere."""
    return "data:image/svg+xml;base64," + base64.b64encode(drawn(figure, "svg")).decode()


def drawn(figure: Figure, kind: Literal["svg", "pdf", "png"]) -> bytes:
    """A figure as the bytes of a file, the same bytes each time."""
    from dropscope import plot_style

    dates: dict[str, dict[str, Any]] = {
        "svg": {"Date": None, "Creator": None},
        "pdf": {"CreationDate": None},
        "png": {},
    }
    buffer = io.BytesIO()
    with plot_style.style():
        figure.savefig(buffer, format=kind, metadata=dates[kind])
    return buffer.getvalue()


def number(value: float, digits: int = 3) -> str:
    """A number for reading: three digits, powers of ten written as such."""
    if value != value:
        return "–"
    if value in (float("inf"), float("-inf")):
        return "∞" if value > 0 else "−∞"
    if 1e3 <= abs(value) < 1e6:
        return f"{float(f'{value:.{digits}g}'):.0f}".replace("-", "−")
    text = f"{value:.{digits}g}"
    if "e" in text:
        mantissa, exponent = text.split("e")
        superscript = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{mantissa}·10{superscript}".replace("-", "−")
    return text.replace("-", "−")


def with_error(estimate: Estimate, digits: int = 3) -> str:
    """An estimate as value ± standard error; a dagger marks a heavy-tailed one."""
    mark = " †" if estimate.status == "heavy_tailed" else ""
    if estimate.status == "no_error" or estimate.stderr != estimate.stderr or estimate.stderr == 0.0:
        return number(estimate.value, digits) + mark
    if estimate.value == 0.0 or 1e-4 <= abs(estimate.value) < 1e6:
        return f"{number(estimate.value, digits)} ± {number(estimate.stderr, 2)}{mark}"
    percent = 100.0 * estimate.stderr / abs(estimate.value)
    return f"{number(estimate.value, digits)} ± {number(percent, 2)} %{mark}"


def provenance(command: str | None = None, **more: Any) -> dict[str, str]:
    """Versions, machine, threads and date, and whatever else made the numbers.

    Args:
        command: how to make them again; the command line by default.
        **more: further entries, such as seeds.

    Returns:
        Name to value, in reading order.
    """
    from dropscope.doctor import kernel_facts

    lines = {
        "command": command or " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "dropscope": version(),
        "torch": torch.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
    }
    lines |= {name: installed for name in PACKAGES if (installed := installed_version(name))}
    lines |= kernel_facts()
    return lines | {name: str(value) for name, value in more.items()}


def version() -> str:
    """The package's version, with the commit when it runs from a checkout."""
    git = Path(dropscope.__file__).resolve().parents[2] / ".git"
    return dropscope.__version__ + (f" ({commit})" if (commit := _commit(git)) else "")


def _commit(git: Path) -> str:
    """The commit a checkout stands at, read without running git; empty outside one."""
    try:
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head[:10]
        name = head[5:]
        loose = git / name
        if loose.exists():
            return loose.read_text().strip()[:10]
        for line in (git / "packed-refs").read_text().splitlines():
            if line.endswith(" " + name):
                return line[:10]
    except OSError:
        pass
    return ""


def installed_version(name: str) -> str:
    """Version of an installed distribution, empty when it is not."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal: first column to the left, the others to the right."""
    cells = [list(columns), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = []
    for row in cells:
        padded = [cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(padded).rstrip())
    return "\n".join([lines[0], "  ".join("─" * w for w in widths), *lines[1:]])


def plain_estimates(estimates: Mapping[str, Estimate] | Sequence[Estimate]) -> Any:
    """Estimates with their 95 % intervals, as JSON knows them."""

    def one(e: Estimate) -> dict[str, Any]:
        low, high = e.interval(0.95)
        return {"value": e.value, "stderr": e.stderr, "low": low, "high": high, "dof": e.dof, "status": e.status}

    if isinstance(estimates, Mapping):
        return {name: one(e) for name, e in estimates.items()}
    return [one(e) for e in estimates]
