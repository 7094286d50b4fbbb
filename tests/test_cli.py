"""The command line: output, files, exit codes, and one line instead of a traceback."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from dropscope import _files, cli, demo, doctor
from dropscope.problem import Problem
from test_demo import SMALL

SOUND = """
import torch
from torch import nn
import dropscope as ds

def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Dropout(0.2), nn.Linear(12, 2))
    return ds.Problem(model, nn.CrossEntropyLoss(), (torch.randn(200, 4), torch.arange(200) % 2))
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    path = tmp_path / "sound.py"
    path.write_text(SOUND)
    return path


@pytest.mark.parametrize("command", ["spectrum", "noise", "relation"])
def test_commands_print_json_and_write_results(command: str, sound: Path, tmp_path: Path) -> None:
    got = run(command, sound, "-k", 3, "--json", "--quiet", "--out", tmp_path / "out")
    assert got.exit_code == 0, got.output
    content = json.loads(got.stdout)
    assert content["dim"] == 86
    assert content["samples"] == 200
    assert json.loads((tmp_path / "out" / "results.json").read_text())["risk"] == content["risk"]
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")
    assert _files.read_arrays(tmp_path / "out" / "arrays.safetensors")[0]


@pytest.mark.parametrize(
    ("command", "says"), [("spectrum", "eigenvalue"), ("noise", "effective samples"), ("relation", "cosine of H and Σ")]
)
def test_commands_print_text(command: str, says: str, sound: Path) -> None:
    got = run(command, sound, "-k", 3, "--quiet")
    assert got.exit_code == 0, got.output
    assert says in got.stdout
    assert "Estimate(" not in got.stdout


def test_the_numbers_are_those_of_the_library(sound: Path) -> None:
    content = json.loads(run("noise", sound, "-k", 2, "--json", "--quiet", "--draws", 5, "--seed", 3).stdout)
    import dropscope as ds

    problem = cli.load(sound)
    with ds.GradientNoise(problem, draws=5, seed=3) as noise:
        assert content["traces"]["dropout"]["value"] == pytest.approx(noise.trace.value, rel=1e-6)


def test_heavy_tails_have_their_own_exit_code(tmp_path: Path) -> None:
    path = tmp_path / "heavy.py"
    path.write_text(SOUND.replace("200", "4"))
    got = run("noise", path, "-k", 2, "--quiet", "--draws", 4)
    assert got.exit_code == cli.UNSOUND
    assert "heavy-tailed" in got.stderr


BAD = {
    "no such file": (None, "FILE must be a Python file that defines problem()"),
    "a syntax error": ("def problem(:\n", "SyntaxError"),
    "no problem()": ("x = 1\n", "must define problem()"),
    "another type": ("def problem():\n    return 3\n", "problem() must return a dropscope.Problem, got int"),
    "an error inside": ("def problem():\n    return 1 / 0\n", "line 2: ZeroDivisionError"),
    "a bad problem": (SOUND.replace("200, 4", "199, 4"), "line 9: ValueError: Problem"),
    "no trainable parameter": (SOUND.replace("    return", "    model.requires_grad_(False)\n    return"), "trainable"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    text, says = BAD[name]
    path = tmp_path / "bad.py"
    if text is not None:
        path.write_text(text)
    got = run("spectrum", path)
    assert got.exit_code == 2, got.output
    assert says in got.stderr
    assert "Traceback" not in got.output
    assert len(got.stderr.strip().splitlines()) == 1


def test_a_model_of_few_parameters_has_all_its_pairs(sound: Path) -> None:
    few = {"(4, 12)": "(4, 1)", "(12, 2)": "(1, 1)", "CrossEntropy": "MSE", "arange(200) % 2": "ones(200, 1)"}
    for old, new in few.items():
        sound.write_text(sound.read_text().replace(old, new))
    got = run("spectrum", sound, "--json", "--quiet")
    assert got.exit_code == 0, got.output
    assert len(json.loads(got.stdout)["eigenvalues"]) == 7


def test_bad_options_are_refused(sound: Path) -> None:
    assert run("spectrum", sound, "-k", 0).exit_code == 2
    got = run("relation", sound, "-k", 1000, "--quiet")
    assert got.exit_code == 2
    assert "k must be" in got.stderr
    got = run("relation", sound, "-k", 2, "--factor", 0.5, "--quiet")
    assert got.exit_code == 2
    assert "'--factor': 0.5 is not in the range x>1.0" in got.stderr
    assert run("demo", "--samples", 5, "--out", sound.parent / "demo").exit_code == 2
    (sound.parent / "file").write_text("")
    got = run("noise", sound, "--out", sound.parent / "file" / "results")
    assert got.exit_code == 2
    assert "must be a folder that can be written" in got.stderr


def test_errors_of_ours_are_not_hidden(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Problem:
        raise RuntimeError("a defect")

    monkeypatch.setattr("dropscope.measurements.spectrum", broken)
    got = run("spectrum", sound)
    assert got.exit_code == 1
    assert isinstance(got.exception, RuntimeError)


def test_interrupts_end_with_their_code(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> Problem:
        raise KeyboardInterrupt

    monkeypatch.setattr("dropscope.measurements.spectrum", interrupted)
    got = run("spectrum", sound)
    assert got.exit_code == 130


def test_demo_writes_and_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[demo.Settings] = []
    small = demo.run(replace(SMALL, levels=(1.0,)))
    monkeypatch.setattr(demo, "run", lambda settings, progress: asked.append(settings) or small)
    got = run("demo", "--out", tmp_path / "demo", "--seed", 7, "--draws", 6, "--quiet")
    assert got.exit_code == 0, got.output
    assert (asked[0].seed, asked[0].draws, asked[0].samples) == (7, 6, demo.Settings().samples)
    assert "initialisation" in got.stdout
    assert "dropscope demo --seed 7 --draws 6" in (tmp_path / "demo" / "report.html").read_text()
    written = {p.name for p in (tmp_path / "demo").iterdir()}
    assert written == {"report.html", "figures", "results.json", "arrays.safetensors"}


def test_doctor_finds_this_installation_sound() -> None:
    got = run("doctor")
    assert got.exit_code == 0, got.output
    for name in ("versions", "instruction set", "threads", "OpenMP", "CUDA", "masks"):
        assert name in got.stdout
    checks = {check["name"]: check for check in json.loads(run("doctor", "--json").stdout)}
    assert checks["masks"]["status"] == "ok"
    assert "torch" in checks["OpenMP"]["detail"]


def test_doctor_sees_wrong_masks_and_two_runtimes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dropscope.kernels.keep_mask", lambda streams, units, **_: torch.ones(3, units).bool())
    monkeypatch.setattr(doctor, "openmp_runtimes", lambda: ["/a/libgomp.so.1", "/b/libgomp-1234.so.1"])
    got = run("doctor")
    assert got.exit_code == cli.UNSOUND
    assert "use none of its results" in got.stdout
    assert "2 runtimes, none torch's own" in got.stdout


def test_help_states_the_exit_codes() -> None:
    for command in ([], ["demo"], ["spectrum"], ["doctor"]):
        got = run(*command, "--help")
        assert got.exit_code == 0
        assert "2 bad input" in got.output
