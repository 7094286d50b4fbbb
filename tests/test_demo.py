"""The demo in miniature: what it measures, writes and says."""

from __future__ import annotations

import json

import pytest
import torch

from dropscope import _files, demo, demo_page

SMALL = demo.Settings(
    samples=120, width=12, rate=2e-2, levels=(1.0, 0.3), max_steps=200, draws=4, pairs=4, probes=2, steps=10, matvecs=12
)


@pytest.fixture(scope="module")
def checkpoints() -> list[demo.Checkpoint]:
    return demo.run(SMALL)


def test_checkpoints_stand_where_they_were_asked_for(checkpoints) -> None:
    assert [c.label for c in checkpoints] == ["initialisation", "loss 1", "loss 0.3"]
    assert checkpoints[0].step == 0
    for checkpoint, level in zip(checkpoints[1:], SMALL.levels, strict=True):
        assert checkpoint.risk <= level
    assert [c.step for c in checkpoints] == sorted(c.step for c in checkpoints)
    assert checkpoints[-1].accuracy > checkpoints[0].accuracy + 0.3


def test_measurements_belong_to_the_checkpoint_and_agree_with_each_other(checkpoints) -> None:
    training = demo.Training(SMALL)
    for c in checkpoints:
        offset = c.parameters - training.problem.flatten([p.detach() for p in training.problem.params.values()])
        with training.problem.displaced(offset):
            assert training.problem.risk() == pytest.approx(c.risk, rel=1e-5)
        assert c.relation.alignment.trace_noise.value * SMALL.samples == pytest.approx(c.dropout.value, rel=1e-4)
        assert c.flatness.flatness.risk == pytest.approx(c.risk)
        assert c.trace_h.value == pytest.approx(
            c.relation.alignment.trace_h.value, abs=5 * (c.trace_h.stderr + c.relation.alignment.trace_h.stderr)
        )
        assert 1.0 <= c.effective_samples <= SMALL.samples


def test_the_run_is_reproducible() -> None:
    first = [(r, step) for _, step, r in demo.Training(SMALL).until_levels(demo.tqdm(disable=True))]
    again = [(r, step) for _, step, r in demo.Training(SMALL).until_levels(demo.tqdm(disable=True))]
    assert first == again


def test_the_default_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    demo.Training(SMALL)
    assert torch.equal(torch.get_rng_state(), before)


def test_training_that_stalls_measures_its_last_step() -> None:
    settings = demo.Settings(samples=120, width=8, levels=(1e-9,), max_steps=3)
    labels = [label for label, _, _ in demo.Training(settings).until_levels(demo.tqdm(disable=True))]
    assert labels == ["initialisation", "last step"]


def test_everything_is_written(checkpoints, tmp_path) -> None:
    report = demo_page.write(checkpoints, SMALL, tmp_path, "dropscope demo --seed 0")
    text = report.read_text()
    assert text.count("data:image/svg+xml") == 6
    assert "Noise is large where the loss is sharp" in text
    assert "dropscope demo --seed 0" in text
    results = json.loads((tmp_path / "results.json").read_text())
    assert [c["label"] for c in results["checkpoints"]] == [c.label for c in checkpoints]
    assert results["provenance"]["seed"] == "0"
    assert results["checkpoints"][1]["estimates"]["ratio"]["value"] == checkpoints[1].relation.alignment.ratio.value
    arrays, rest = _files.read_arrays(tmp_path / "arrays.safetensors")
    assert rest["labels"] == [c.label for c in checkpoints]
    torch.testing.assert_close(arrays["2.hessian.values"], checkpoints[2].top.values)
    assert torch.equal(arrays["0.parameters"], checkpoints[0].parameters)


def test_heavy_tailed_rows_say_so(checkpoints) -> None:
    text = demo_page.terminal(checkpoints)
    heavy = [c for c in checkpoints if c.heavy or c.dropout.status == "heavy_tailed"]
    assert heavy, "4 masks of 120 samples cannot be enough near interpolation"
    assert text.count("heavy-tailed †") == sum(bool(c.heavy) for c in checkpoints)
    assert demo_page.HEAVY in text


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"demo: samples must lie in \[100, 1796\], got 1797"):
        demo.run(demo.Settings(samples=1797))
