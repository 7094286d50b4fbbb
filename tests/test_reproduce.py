"""The reproductions as a whole: what every entry must be, how records are written, read and shown, and the command."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from dropscope import cli
from dropscope.plots import Figure
from dropscope.reproduce import Claim, Entry, Findings, Scale, page, runner


def _run(scale):
    claims = (
        Claim("Noise falls | with p.", "1/p", f"{0.5 + scale.seed} ± 0.1", "reproduced"),
        Claim("Slope is 1.", "1", "2.0 ± 0.1", "not reproduced", "The network is too small."),
    )
    return Findings(claims, {"x": [1.0, 2.0], "seed": scale.seed}, "A toy of width 2.")


def _plot(numbers):
    figure = Figure()
    figure.subplots().plot(numbers["x"])
    return figure


TOY = Entry("A-toy", "A", "A, Fig. 0", "A toy", 0.1, _run, _plot)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(runner, "entries", lambda: {"A-toy": TOY})


def invoke(*arguments):
    return CliRunner().invoke(cli.main, ["reproduce", *map(str, arguments)])


def test_every_entry_is_well_formed():
    for name, entry in runner.entries().items():
        assert name == entry.name
        assert name.startswith(entry.paper + "-")
        assert entry.place
        assert entry.title
        assert 0 < entry.minutes <= 10


def test_entries_are_chosen_by_name_letter_or_all(monkeypatch):
    known = {n: replace(TOY, name=n, paper=n[0]) for n in ("A-fig1", "C-fig1", "C-fig2")}
    monkeypatch.setattr(runner, "entries", lambda: known)
    assert [e.name for e in runner.select(["c-FIG2", "A"])] == ["A-fig1", "C-fig2"]
    assert len(runner.select(["all"])) == 3
    with pytest.raises(ValueError, match="got 'E'"):
        runner.select(["E"])


def test_a_record_is_written_read_and_resumed(toy, tmp_path):
    record = runner.run(TOY, Scale(seed=3), tmp_path)
    assert runner.records(tmp_path) == [record]
    assert (tmp_path / "papers" / "A-toy.png").read_bytes().startswith(b"\x89PNG")
    assert runner.finished(TOY, Scale(seed=3), tmp_path) == record
    assert runner.finished(TOY, Scale(seed=4), tmp_path) is None
    assert record.provenance["command"] == "dropscope reproduce A-toy --seed 3"


def test_the_page_shows_every_claim_with_its_verdict(toy, tmp_path):
    text = page.write([runner.run(TOY, Scale(), tmp_path)], tmp_path).read_text()
    assert (
        r"| A, Fig. 0 | Noise falls \| with p. | 1/p | 0.5 ± 0.1 | ✓ reproduced | `dropscope reproduce A-toy` |" in text
    )
    assert "2 claims: 1 reproduced, 1 not reproduced" in text
    assert "The network is too small." in text
    assert "](papers/A-toy.png)" in text


def test_the_command_lists_runs_and_resumes(toy, tmp_path):
    assert "A-toy  A, Fig. 0  0.1 min  A toy" in invoke("--list").output
    got = invoke("all", "--out", tmp_path, "--quiet")
    assert got.exit_code == 0, got.output
    assert "not reproduced  Slope is 1." in got.output
    record = tmp_path / "papers" / "A-toy.json"
    written = record.stat().st_mtime_ns
    got = invoke("A-toy", "--out", tmp_path, "--quiet", "--resume", "--json")
    assert got.exit_code == 0, got.output
    assert json.loads(got.stdout)[0]["claims"][1]["verdict"] == "not reproduced"
    assert record.stat().st_mtime_ns == written
    assert invoke("nothing", "--out", tmp_path).exit_code == 2
