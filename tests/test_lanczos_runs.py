"""Runs of eigsh: bits that survive an interruption, checkpoints, refusals, what is saved and shown."""

from __future__ import annotations

import math
import signal
from pathlib import Path

import pytest
import torch

from dropscope.spectral import Eigenpairs, EigenStatus, eigsh
from dropscope.spectral.krylov import uninterrupted
from matrices import Matrix, spaced


class Stop(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("stops", [[1], [7, 2], [30, 11, 12], [20, 1, 1, 9]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_interrupted_runs_resume_to_the_same_bits(tmp_path: Path, stops: list[int], dtype: torch.dtype) -> None:
    values, tol = torch.cat((spaced(400), torch.zeros(50))).to(dtype), 1e-6
    whole = eigsh(Matrix(values), 5, tol=tol, seed=9)
    assert whole.matvecs > sum(stops) + 20
    path = tmp_path / "state"
    for stop in stops:

        def interrupt(count: int, stop: int = stop) -> None:
            if count == stop:
                raise Stop

        with pytest.raises(Stop):
            eigsh(Matrix(values, interrupt), 5, tol=tol, seed=9, checkpoint=path)
        assert path.exists()
    pairs = eigsh(Matrix(values), 5, tol=tol, seed=9, checkpoint=path)
    assert torch.equal(pairs.values, whole.values)
    assert torch.equal(pairs.vectors, whole.vectors)
    assert torch.equal(pairs.residuals, whole.residuals)
    assert pairs.matvecs == whole.matvecs
    assert not path.exists()


def test_a_checkpoint_goes_on_with_a_larger_budget(tmp_path: Path) -> None:
    values = spaced(500)
    path = tmp_path / "state"
    first = eigsh(Matrix(values), 5, max_matvecs=30, tol=1e-8, checkpoint=path)
    assert first.status is EigenStatus.MAX_MATVECS
    pairs = eigsh(Matrix(values), 5, tol=1e-8, checkpoint=path)
    whole = eigsh(Matrix(values), 5, tol=1e-8)
    assert torch.equal(pairs.vectors, whole.vectors)


def test_a_checkpoint_of_another_problem_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    values = spaced(500)
    eigsh(Matrix(values), 5, max_matvecs=30, tol=1e-8, checkpoint=path)
    with pytest.raises(ValueError, match=r"seed is 0 .* and 1 here"):
        eigsh(Matrix(values), 5, seed=1, checkpoint=path)
    with pytest.raises(ValueError, match="dim"):
        eigsh(Matrix(values[1:]), 5, checkpoint=path)
    with pytest.raises(ValueError, match="dtype"):
        eigsh(Matrix(values.float()), 5, checkpoint=path)
    with pytest.raises(ValueError, match="same at every product"):
        eigsh(Matrix(values.flip(0)), 5, tol=1e-8, checkpoint=path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="must be a file that eigsh wrote"):
        eigsh(Matrix(values), 5, checkpoint=path)


def test_the_same_seed_gives_the_same_bits_and_leaves_the_generator() -> None:
    before = torch.get_rng_state()
    first, second = (eigsh(Matrix(spaced(500)), 4, seed=5) for _ in range(2))
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dim", [10, 400])
def test_a_matrix_that_is_not_symmetric_is_refused(dim: int) -> None:
    M = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0))
    for bad in (M, M + M.T + 0.3 * (M - M.T)):
        A = Matrix(bad)
        with pytest.raises(ValueError, match="symmetric"):
            eigsh(A, 3)
        assert A.count <= max(3, min(dim, 18))


def test_an_operator_that_changes_between_products_is_refused() -> None:
    A = Matrix(spaced(400).float())

    def change(count: int) -> None:
        A.M = spaced(400).float() * (1 + 0.1 * math.sin(count))

    A.hook = change
    with pytest.raises(ValueError, match="same at every product"):
        eigsh(A, 3)


def test_a_product_that_is_not_finite_is_reported_with_its_step() -> None:
    A = Matrix(spaced(400))

    def spoil(count: int) -> None:
        if count == 12:
            A.M = A.M * math.nan

    A.hook = spoil
    with pytest.raises(ValueError, match=r"step 12: .*finite"):
        eigsh(A, 5)


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ValueError, "k must be", {"k": 0}),
        (ValueError, "k must be an int with 1 <= k <= dim = 50, got 51", {"k": 51}),
        (ValueError, "k must be", {"k": 2.0}),
        (ValueError, "which must be", {"which": "SM"}),
        (ValueError, "tol must lie in", {"tol": 0.0}),
        (ValueError, "tol must lie in", {"tol": math.nan}),
        (ValueError, "seed must be", {"seed": -1}),
        (ValueError, "basis must be", {"k": 5, "basis": 7}),
        (ValueError, "max_matvecs must be", {"k": 5, "max_matvecs": 6}),
        (TypeError, "checkpoint must be a path or None, got 3", {"checkpoint": 3}),
        (ValueError, "checkpoint must be a file, got the folder", {"checkpoint": "/"}),
        (TypeError, "dtype", {"A": Matrix(torch.ones(50, dtype=torch.bfloat16))}),
        (TypeError, "A must be a SymmetricOperator", {"A": torch.eye(3)}),
    ],
)
def test_bad_input_is_refused_before_any_product(
    error: type[Exception], match: str, arguments: dict[str, object]
) -> None:
    A = Matrix(torch.ones(50))
    with pytest.raises(error, match=match):
        eigsh(**{"A": A, "k": 3, **arguments})  # type: ignore[arg-type]
    assert A.count == 0


def test_saved_pairs_come_back(tmp_path: Path) -> None:
    pairs = eigsh(Matrix(spaced(100)), 3)
    back = Eigenpairs.load(pairs.save(tmp_path / "pairs.safetensors"))
    for name in ("values", "vectors", "residuals", "converged"):
        assert torch.equal(getattr(back, name), getattr(pairs, name))
    assert repr(back) == repr(pairs)


def test_ctrl_c_waits_for_the_state_to_be_whole() -> None:
    steps = []

    def change() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            steps.append("whole")
        steps.append("never")

    with pytest.raises(KeyboardInterrupt):
        change()
    assert steps == ["whole"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_progress_shows_converged_pairs_and_the_worst_residual(capsys: pytest.CaptureFixture[str]) -> None:
    eigsh(Matrix(spaced(300)), 3, progress=True)
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "residual=" in shown
