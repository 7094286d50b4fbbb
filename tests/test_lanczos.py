"""Eigenpairs: right values, honest residuals, no ghosts, every copy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from scipy.sparse.linalg import eigsh as scipy_eigsh
from torch import Tensor

from dropscope.spectral import EigenStatus, eigsh
from matrices import Matrix, check, spaced, wanted


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


def test_an_operator_may_return_its_argument() -> None:
    class Identity(Matrix):
        def _matmat(self, V: Tensor) -> Tensor:
            return V

    A = Identity(torch.ones(200, dtype=torch.float64))
    pairs = eigsh(A, 4)
    torch.testing.assert_close(pairs.values, torch.ones(4, dtype=torch.float64))
    assert float((pairs.vectors.T @ pairs.vectors - torch.eye(4)).abs().max()) < 1e-12
