"""The report: one file that needs nothing else, and says what it was given."""

from __future__ import annotations

import base64
import math
import re

import pytest
from matplotlib.figure import Figure

import dropscope
from dropscope import report
from dropscope.estimate import Estimate
from dropscope.report import Headline, Page, Plate, Table, number, provenance, text_table, with_error


def page() -> Page:
    figure = Figure()
    figure.add_subplot().plot([1, 2], [1, 2])
    return Page(
        "A <title>",
        "Lead.",
        [Headline("λ^0.97", "exponent", "± 0.01")],
        [Table("T", ["", "x"], [["row", "1 †"]], "Caption."), Plate("P", figure, "What is plotted.", "wide")],
        ["A note."],
        provenance("dropscope demo", seed=3),
    )


def test_page_is_self_contained_and_escaped(tmp_path) -> None:
    text = page().write(tmp_path / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    assert "<script" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert "A &lt;title&gt;" in text
    for said in ("Lead.", "λ<sup>0.97</sup>", "Caption.", "What is plotted.", "A note.", "dropscope demo"):
        assert said in text
    assert '<td class="heavy">1 †</td>' in text
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["p.pdf", "p.svg"]


def test_figures_are_embedded_as_svg_and_are_reproducible() -> None:
    uris = re.findall(r'src="(data:image/svg\+xml;base64,[^"]+)"', page().html())
    assert len(uris) == 1
    svg = base64.b64decode(uris[0].split(",")[1]).decode()
    assert "<svg" in svg
    assert "<text" not in svg  # drawn as paths: no font is needed
    assert uris == re.findall(r'src="(data:image/svg\+xml;base64,[^"]+)"', page().html())


def test_provenance_names_what_made_the_numbers() -> None:
    made = provenance("dropscope demo", seed=3)
    assert made["command"] == "dropscope demo"
    assert made["dropscope"].startswith(dropscope.__version__)
    assert made["seed"] == "3"
    assert {"date", "torch", "threads", "kernels", "numpy"} <= set(made)


def test_version_reads_the_commit_of_a_checkout(tmp_path, monkeypatch) -> None:
    package = tmp_path / "python" / "dropscope" / "__init__.py"
    monkeypatch.setattr(dropscope, "__file__", str(package))
    assert report.version() == dropscope.__version__
    git = tmp_path / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "packed-refs").write_text("# pack-refs\n" + "a" * 40 + " refs/heads/main\n")
    assert report.version().endswith("(aaaaaaaaaa)")
    (git / "refs" / "heads" / "main").write_text("b" * 40 + "\n")
    assert report.version().endswith("(bbbbbbbbbb)")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1.5, "1.5"), (-0.0312, "−0.0312"), (1234.5, "1230"), (3.2e-7, "3.2·10⁻⁷"), (math.inf, "∞"),
     (math.nan, "–"), (2.5e9, "2.5·10⁹"), (-1e-9, "−1·10⁻⁹")],
)  # fmt: skip
def test_numbers_read_well(value: float, text: str) -> None:
    assert number(value) == text


def test_estimates_show_their_error_and_mark_heavy_tails() -> None:
    assert with_error(Estimate(12.34, 0.56)) == "12.3 ± 0.56"
    assert with_error(Estimate(2e-6, 1e-7, 20.0, "heavy_tailed", scale=True)) == "2·10⁻⁶ ± 5 % †"
    assert with_error(Estimate(3.0, math.nan, 0.0, "no_error")) == "3"


def test_text_table_aligns() -> None:
    lines = text_table(["", "x"], [["long name", "1"], ["b", "22"]]).splitlines()
    assert lines[2] == "long name   1"
    assert lines[3] == "b          22"
