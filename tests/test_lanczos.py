"""Eigenpairs: right values, honest residuals, no ghosts, every copy, bits that survive an interruption."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from scipy.sparse.linalg import eigsh as scipy_eigsh
from torch import Tensor

from dropscope.operators import SymmetricOperator
from dropscope.spectral import Eigenpairs, EigenStatus, eigsh
from dropscope.spectral.krylov import uninterrupted


class Matrix(SymmetricOperator):
    """A dense matrix, or the diagonal one of a vector; ``hook`` sees the number of each product."""

    def __init__(self, M: Tensor, hook: Callable[[int], None] | None = None) -> None:
        self.M, self.hook, self.count = M, hook, 0
        self.dim, self.dtype, self.device, self.blocks = len(M), M.dtype, M.device, {}

    def _matmat(self, V: Tensor) -> Tensor:
        self.count += V.shape[1]
        if self.hook is not None:
            self.hook(self.count)
        return self.M @ V if self.M.ndim == 2 else self.M[:, None] * V


def true_residuals(A: Matrix, pairs: Eigenpairs) -> Tensor:
    wide = Matrix(A.M.double())
    V = pairs.vectors.double()
    return torch.linalg.vector_norm(wide @ V - V * pairs.values, dim=0)


def check(A: Matrix, pairs: Eigenpairs) -> None:
    """The laws that hold for any result."""
    k, eps = len(pairs.values), torch.finfo(A.dtype).eps
    residuals = true_residuals(A, pairs)
    slack = 0.1 * pairs.residuals + 20 * eps * pairs.scale
    assert (residuals <= pairs.residuals + slack).all(), (residuals, pairs.residuals)
    assert (residuals[pairs.converged] <= pairs.tol * pairs.scale + slack[pairs.converged]).all()
    V = pairs.vectors.double()
    assert float((V.T @ V - torch.eye(k, dtype=torch.float64)).abs().max()) < (1e-4 if eps > 1e-10 else 1e-12)
    assert pairs.matvecs == A.count
    assert (pairs.status is EigenStatus.CONVERGED) == bool(pairs.converged.all())


def wanted(values: Tensor, k: int, which: str) -> Tensor:
    rising = values.double().sort().values
    if which == "LM":
        return rising[rising.abs().argsort(descending=True)][:k]
    if which == "SA":
        return rising[:k]
    falling = rising.flip(0)
    return falling[:k] if which == "LA" else torch.cat((falling[: k - k // 2], falling[len(falling) - k // 2 :]))


def spaced(n: int) -> Tensor:
    values = torch.linspace(0, 1, n, dtype=torch.float64)
    values[-3:] = torch.tensor([10.0, 20.0, 40.0])
    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
def test_ends_of_an_indefinite_spectrum(dtype: torch.dtype, which: str) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.cat((torch.linspace(-1, 1, 290), torch.tensor([3.0, 4, 5, 6, 8, -3.5, -4.5, -5.5, -6.5, -9])))
    U = torch.linalg.qr(torch.randn(300, 300, generator=generator, dtype=torch.float64))[0]
    A = Matrix(((U * values.double()) @ U.T).to(dtype))
    for k in (1, 4, 5):
        A.count = 0
        pairs = eigsh(A, k, which, tol=1e-4)
        check(A, pairs)
        assert pairs.status is EigenStatus.CONVERGED
        torch.testing.assert_close(pairs.values, wanted(values, k, which), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, -1.0, 1e-30, 1e30])
def test_no_ghosts_of_isolated_values(dtype: torch.dtype, scale: float) -> None:
    A = Matrix((spaced(2000) * scale).to(dtype))
    pairs = eigsh(A, 6, tol=1e-5)
    check(A, pairs)
    values = pairs.values / scale
    torch.testing.assert_close(values[:3], torch.tensor([40.0, 20, 10]).double(), rtol=1e-6, atol=0)
    assert (values[3:] <= 0.9985 + 1e-6).all()
    assert (values[3:] >= 0.99).all()


CLOSED = {
    "identity": (torch.ones(500), [1.0] * 7),
    "zero": (torch.zeros(500), [0.0] * 7),
    "low rank": (torch.tensor([5.0, 5, 5, 3, 3] + [0.0] * 495), [5.0, 5, 5, 3, 3, 0, 0]),
    "two values": (torch.tensor([2.0] * 250 + [-1.0] * 250), [2.0] * 7),
    "one": (torch.tensor([0.0] * 499 + [-7.0]), [-7.0] + [0.0] * 6),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("k", [1, 2, 4, 7])
def test_every_copy_of_a_multiple_value_when_the_krylov_space_closes(name: str, k: int, dtype: torch.dtype) -> None:
    diagonal, expected = CLOSED[name]
    A = Matrix(diagonal.to(dtype))
    pairs = eigsh(A, k, seed=3)
    check(A, pairs)
    assert pairs.status is EigenStatus.CONVERGED
    torch.testing.assert_close(pairs.values, torch.tensor(expected[:k]).double(), rtol=1e-5, atol=1e-5)


def test_wilkinson_pairs_come_apart() -> None:
    n = 201
    M = torch.diag((torch.arange(n) - n // 2).abs().double())
    M += torch.diag(torch.ones(n - 1, dtype=torch.float64), 1) + torch.diag(torch.ones(n - 1, dtype=torch.float64), -1)
    pairs = eigsh(Matrix(M), 6, "LA", tol=1e-11)
    torch.testing.assert_close(pairs.values, wanted(torch.linalg.eigvalsh(M), 6, "LA"), rtol=0, atol=1e-10)


def test_toeplitz_closed_form() -> None:
    n = 400
    ones = torch.ones(n - 1, dtype=torch.float64)
    A = Matrix(2 * torch.eye(n, dtype=torch.float64) - torch.diag(ones, 1) - torch.diag(ones, -1))
    pairs = eigsh(A, 4, "LA", tol=1e-9, max_matvecs=4000)
    expected = 2 - 2 * torch.cos((n - torch.arange(4.0, dtype=torch.float64)) * math.pi / (n + 1))
    check(A, pairs)
    torch.testing.assert_close(pairs.values, expected, rtol=0, atol=1e-10)


def test_small_dimensions_are_diagonalised() -> None:
    generator = torch.Generator().manual_seed(0)
    for dim, k in ((1, 1), (2, 2), (7, 7), (12, 3)):
        M = torch.randn(dim, dim, generator=generator)
        A = Matrix(M + M.T)
        pairs = eigsh(A, k, "SA")
        check(A, pairs)
        torch.testing.assert_close(pairs.values, wanted(torch.linalg.eigvalsh(A.M), k, "SA"), rtol=0, atol=1e-5)


def test_too_few_products_are_said_so() -> None:
    values = torch.linspace(0, 1, 3000)
    for budget in (8, 20, 45):
        A = Matrix(values)
        pairs = eigsh(A, 5, tol=1e-6, max_matvecs=budget)
        check(A, pairs)
        assert pairs.status is EigenStatus.MAX_MATVECS
        assert pairs.matvecs <= budget
        assert "max_matvecs" in repr(pairs)


def test_a_tolerance_below_rounding_is_said_so() -> None:
    generator = torch.Generator().manual_seed(0)
    M = torch.randn(300, 300, generator=generator)
    A = Matrix(M + M.T)
    pairs = eigsh(A, 3, tol=1e-8)
    check(A, pairs)
    assert pairs.status is EigenStatus.ROUNDING


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    kind=st.sampled_from(["power", "exponential", "step", "normal", "clusters", "low rank"]),
    dim=st.integers(30, 150),
    k=st.integers(1, 8),
    which=st.sampled_from(["LM", "LA", "SA", "BE"]),
    tol=st.sampled_from([1e-2, 1e-3, 1e-5, 1e-9]),
    budget=st.integers(0, 120),
    seed=st.integers(0, 2**64 - 1),
    wide=st.booleans(),
)
def test_never_a_wrong_converged(
    kind: str, dim: int, k: int, which: str, tol: float, budget: int, seed: int, wide: bool
) -> None:
    generator = torch.Generator().manual_seed(seed % 2**31)
    i = torch.arange(dim, dtype=torch.float64)
    values = {
        "power": 1 / (1 + i),
        "exponential": 0.5**i * (-1) ** i,
        "step": (i < 5).double() * (1 + 0.01 * i) - 0.001 * i / dim,
        "normal": torch.randn(dim, generator=generator, dtype=torch.float64),
        "clusters": (i // 5).floor() + 1e-6 * i,
        "low rank": (i < 7).double() * (3 - (i // 3)) + 1e-7 * (i == 20),
    }[kind]
    U = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
    A = Matrix(((U * values) @ U.T).to(torch.float64 if wide else torch.float32))
    check(A, eigsh(A, k, which, tol=tol, max_matvecs=k + 2 + budget, seed=seed, basis=k + 10))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_copies_are_found_when_the_pairs_converge_at_once(dtype: torch.dtype) -> None:
    top = torch.tensor([100.0, 100, 50, 50, 20])
    A = Matrix(torch.cat((top, torch.linspace(0, 0.01, 3000))).to(dtype))
    pairs = eigsh(A, 5)
    check(A, pairs)
    torch.testing.assert_close(pairs.values, top.double(), rtol=1e-5, atol=0)


def test_products_are_about_those_of_arpack() -> None:
    generator = torch.Generator().manual_seed(0)
    bulk = torch.randn(2980, generator=generator, dtype=torch.float64) ** 3 * 0.15
    spectra = {
        "network": torch.cat((50 * 0.75 ** torch.arange(20.0), bulk)),
        "semicircle": 2 * torch.cos(math.pi * (torch.arange(1000) + 0.5) / 1000),
        "root": (1 + torch.arange(3000.0)) ** -0.5,
    }
    for values in spectra.values():
        diagonal, count = values.double().numpy(), [0]

        def product(x: NDArray[np.float64], d: NDArray[np.float64] = diagonal, n: list[int] = count) -> object:
            n[0] += 1
            return d * x.ravel()

        v0 = np.random.default_rng(0).normal(size=len(diagonal))
        L = LinearOperator((len(diagonal),) * 2, matvec=product, dtype=np.float64)
        theta, V = scipy_eigsh(L, 10, which="LM", ncv=25, tol=1e-3, v0=v0)
        worst = float(np.linalg.norm(diagonal[:, None] * V - V * theta, axis=0).max() / np.abs(diagonal).max())
        pairs = eigsh(Matrix(values.double()), 10, tol=max(worst, 1e-12), basis=25)
        assert pairs.status is EigenStatus.CONVERGED
        assert pairs.matvecs <= 1.25 * count[0] + 3


def test_noise_of_the_products_is_not_taken_for_convergence() -> None:
    A, generator = Matrix(spaced(20000)), torch.Generator().manual_seed(0)
    noise = 40 * 3e-4 / math.sqrt(20000)

    class Noisy(Matrix):
        def _matmat(self, V: Tensor) -> Tensor:
            return super()._matmat(V) + noise * torch.randn(V.shape, generator=generator, dtype=V.dtype)

    pairs = eigsh(Noisy(A.M), 3, tol=1e-4)
    assert pairs.status is EigenStatus.ROUNDING
    assert not pairs.converged.any()
    assert (pairs.residuals > 40 * 1e-4).all()


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


def test_an_operator_may_return_its_argument() -> None:
    class Identity(Matrix):
        def _matmat(self, V: Tensor) -> Tensor:
            return V

    A = Identity(torch.ones(200, dtype=torch.float64))
    pairs = eigsh(A, 4)
    torch.testing.assert_close(pairs.values, torch.ones(4, dtype=torch.float64))
    assert float((pairs.vectors.T @ pairs.vectors - torch.eye(4)).abs().max()) < 1e-12
