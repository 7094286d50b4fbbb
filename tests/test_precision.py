"""Mixed precision: the same laws as in full precision whatever the low-precision products do."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dropscope.masks import MaskKey
from dropscope.operators import SymmetricOperator
from dropscope.operators.gauss_newton import GaussNewton
from dropscope.operators.graphs import GraphOperator
from dropscope.operators.hessian import Hessian
from dropscope.problem import Problem
from dropscope.spectral import Eigenpairs, EigenStatus, eigsh
from dropscope.spectral.precision import Trial, pays

HALF = torch.bfloat16


class Rounded(SymmetricOperator):
    """A dense matrix; its low-precision products round matrix, vector and product to bfloat16, and may do worse."""

    def __init__(self, M: Tensor, spoil: Callable[[Tensor, int], Tensor] | None = None, *, low: bool = False) -> None:
        self.M, self.spoil, self.low, self.count = M, spoil, low, 0
        self.dim, self.dtype, self.device, self.blocks = len(M), M.dtype, M.device, {}
        self.cheap: Rounded | None = None
        self.hook: Callable[[], None] = lambda: None
        self.delay = 0.0

    def low_precision(self) -> SymmetricOperator | None:
        if self.cheap is None:
            self.cheap = Rounded(self.M.to(HALF).to(self.dtype), self.spoil, low=True)
            self.cheap.hook = self.hook
        return self.cheap

    def _matmat(self, V: Tensor) -> Tensor:
        self.count += V.shape[1]
        self.hook()
        time.sleep(self.delay)
        if not self.low:
            return self.M @ V
        out = (self.M @ V.to(HALF).to(self.dtype)).to(HALF).to(self.dtype)
        return out if self.spoil is None else self.spoil(out, self.count)


def matrix(values: Tensor, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    n = len(values)
    G = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    U = torch.linalg.qr(G)[0]
    M = (U * values.double()) @ U.T
    return ((M + M.T) / 2).to(dtype)


def check(A: Rounded, pairs: Eigenpairs) -> None:
    """The laws that hold for any result."""
    k, eps = len(pairs.values), torch.finfo(A.dtype).eps
    V = pairs.vectors.double()
    residuals = torch.linalg.vector_norm(A.M.double() @ V - V * pairs.values, dim=0)
    slack = 0.1 * pairs.residuals + 40 * eps * pairs.scale
    assert (residuals <= pairs.residuals + slack).all(), (residuals, pairs.residuals)
    assert (residuals[pairs.converged] <= pairs.tol * pairs.scale + slack[pairs.converged]).all()
    assert float((V.T @ V - torch.eye(k, dtype=torch.float64)).abs().max()) < (1e-4 if eps > 1e-10 else 1e-12)
    assert pairs.matvecs == A.count
    assert pairs.low_matvecs == (0 if A.cheap is None else A.cheap.count)
    assert (pairs.status is EigenStatus.CONVERGED) == bool(pairs.converged.all())


OUTLIERS = torch.cat((40 * 0.8 ** torch.arange(12.0), torch.linspace(-1, 1, 388)))
INDEFINITE = torch.cat((torch.linspace(-1, 1, 290), torch.tensor([3.0, 4, 5, 6, 8, -3.5, -4.5, -5.5, -6.5, -9])))
SLOW = torch.cat((8 * 0.85 ** torch.arange(12.0), torch.linspace(-2, 2, 288)))
CLUSTERS = torch.cat((torch.tensor([10.0, 10, 10.001, 10.002, 7, 7, 6.99, 5, 4.995]), torch.linspace(-1, 1, 291)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("values", [OUTLIERS, INDEFINITE, CLUSTERS], ids=["outliers", "indefinite", "clusters"])
def test_pairs_are_right_above_and_below_the_reach_of_low_precision(
    values: Tensor, tol: float, dtype: torch.dtype
) -> None:
    for which in ("LM", "LA", "BE"):
        A = Rounded(matrix(values, dtype))
        pairs = eigsh(A, 6, which, tol=tol, precision="mixed")
        check(A, pairs)
        assert pairs.status is EigenStatus.CONVERGED
        assert pairs.precision.startswith("mixed")
        assert pairs.low_matvecs > pairs.matvecs or tol < 1e-2
        rising = values.double().sort().values
        expected = {
            "LM": rising[rising.abs().argsort(descending=True)][:6],
            "LA": rising.flip(0)[:6],
            "BE": torch.cat((rising.flip(0)[:3], rising[:3].flip(0))),
        }[which]
        # An error of a value is at most its residual; where residuals are small values are, too.
        torch.testing.assert_close(pairs.values.abs().sort().values, expected.abs().sort().values,
                                   rtol=0, atol=1.01 * tol * pairs.scale + 1e-5)  # fmt: skip


def test_a_tolerance_below_rounding_is_said_so() -> None:
    A = Rounded(matrix(OUTLIERS))
    pairs = eigsh(A, 3, tol=1e-9, precision="mixed")
    check(A, pairs)
    assert pairs.status is EigenStatus.ROUNDING


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    kind=st.sampled_from(["power", "exponential", "normal", "clusters", "low rank"]),
    dim=st.integers(40, 150),
    k=st.integers(1, 8),
    which=st.sampled_from(["LM", "LA", "SA", "BE"]),
    tol=st.sampled_from([3e-1, 1e-2, 1e-3, 1e-6]),
    budget=st.integers(0, 150),
    seed=st.integers(0, 2**64 - 1),
    wide=st.booleans(),
    harm=st.sampled_from(["none", "noise", "bias", "late", "skew"]),
    precision=st.sampled_from(["mixed", "auto"]),
)
def test_never_a_wrong_converged(
    kind: str,
    dim: int,
    k: int,
    which: str,
    tol: float,
    budget: int,
    seed: int,
    wide: bool,
    harm: str,
    precision: str,
) -> None:
    generator = torch.Generator().manual_seed(seed % 2**31)
    i = torch.arange(dim, dtype=torch.float64)
    values = {
        "power": 1 / (1 + i),
        "exponential": 0.5**i * (-1) ** i,
        "normal": torch.randn(dim, generator=generator, dtype=torch.float64),
        "clusters": (i // 5).floor() + 1e-6 * i,
        "low rank": (i < 7).double() * (3 - (i // 3)) + 1e-7 * (i == 20),
    }[kind]
    M = matrix(values, torch.float64 if wide else torch.float32, seed % 1000)

    def spoil(out: Tensor, count: int) -> Tensor:
        if harm == "noise":
            return (
                out + 0.02 * float(values.abs().max()) * torch.randn(out.shape, generator=generator).to(out) / dim**0.5
            )
        if harm == "bias":
            return out + 0.05 * torch.roll(out, 1, 0)
        if harm == "late" and count > 6:
            return out * (1 + 0.3 * math.sin(count))
        return out + 0.3 * torch.roll(out, 1, 0) if harm == "skew" else out

    A = Rounded(M, spoil)
    A.delay = 2e-5 if precision == "auto" else 0.0
    basis = k + 10
    check(A, eigsh(A, k, which, tol=tol, max_matvecs=2 * basis + budget, seed=seed, basis=basis, precision=precision))


@pytest.mark.parametrize(("k", "budget"), [(1, 3), (2, 4)])
def test_products_that_run_out_after_slow_davidson_steps(k: int, budget: int) -> None:
    """Lanczos in full precision could not be begun anew with what is left."""
    basis, M = k + 10, matrix(1 / (1 + torch.arange(40, dtype=torch.float64)), torch.float32, 0)
    A = Rounded(M, lambda out, count: out + 0.05 * torch.roll(out, 1, 0))
    pairs = eigsh(A, k, "SA", tol=1e-3, max_matvecs=2 * basis + budget, basis=basis, precision="mixed")
    check(A, pairs)
    assert pairs.status is EigenStatus.MAX_MATVECS


class Stop(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("tol", [1e-2, 1e-5])
@pytest.mark.parametrize("at", [1, 2, 3, 4, 9, 24, 27, 31, 36, 44, 60])
def test_interrupted_runs_resume_to_the_same_bits(tmp_path: Path, at: int, tol: float) -> None:
    M = matrix(SLOW)
    whole = eigsh(Rounded(M), 5, tol=tol, seed=9, precision="mixed")
    if at >= whole.matvecs + whole.low_matvecs:
        pytest.skip("it is over by then")
    path, seen = tmp_path / "state", [0]

    def interrupt() -> None:
        seen[0] += 1
        if seen[0] == at:
            raise Stop

    A = Rounded(M)
    A.hook = interrupt
    with pytest.raises(Stop):
        eigsh(A, 5, tol=tol, seed=9, precision="mixed", checkpoint=path)
    pairs = eigsh(Rounded(M), 5, tol=tol, seed=9, precision="mixed", checkpoint=path)
    for name in ("values", "vectors", "residuals"):
        assert torch.equal(getattr(pairs, name), getattr(whole, name))
    assert pairs.matvecs == whole.matvecs
    assert not path.exists()


def test_a_checkpoint_goes_on_with_a_larger_budget(tmp_path: Path) -> None:
    M, path = matrix(SLOW), tmp_path / "state"
    whole = eigsh(Rounded(M), 5, tol=1e-6, precision="mixed")
    assert whole.matvecs + whole.low_matvecs > 50
    first = eigsh(Rounded(M), 5, tol=1e-6, precision="mixed", checkpoint=path, max_matvecs=46)
    assert first.status is EigenStatus.MAX_MATVECS
    pairs = eigsh(Rounded(M), 5, tol=1e-6, precision="mixed", checkpoint=path)
    assert pairs.status is EigenStatus.CONVERGED
    torch.testing.assert_close(pairs.values, whole.values, rtol=1e-6, atol=0)
    eigsh(Rounded(M), 5, tol=1e-6, precision="mixed", checkpoint=path, max_matvecs=46)
    with pytest.raises(ValueError, match="precision is 'mixed'"):
        eigsh(Rounded(M), 5, tol=1e-6, checkpoint=path)


@pytest.mark.parametrize("precision", ["mixed", "auto"])
@pytest.mark.parametrize("when", [1, 9])
def test_low_precision_products_that_fail_are_given_up(precision: str, when: int) -> None:
    A = Rounded(matrix(OUTLIERS), lambda out, count: out * math.nan if count >= when else out)
    A.delay = 2e-2
    pairs = eigsh(A, 4, tol=1e-2, precision=precision)
    check(A, pairs)
    assert pairs.status is EigenStatus.CONVERGED
    assert "NaN" in pairs.precision
    assert pairs.precision.startswith("full")
    assert "NaN" in repr(pairs)


def test_low_precision_products_that_are_wrong_are_given_up() -> None:
    A = Rounded(matrix(OUTLIERS), lambda out, count: -out)
    pairs = eigsh(A, 4, tol=1e-2, precision="mixed")
    check(A, pairs)
    assert pairs.precision == "full: low-precision products are off by 200%"


def test_full_precision_products_that_fail_are_reported() -> None:
    A = Rounded(matrix(OUTLIERS))

    def spoil() -> None:
        if A.count > 3:
            A.M = A.M * math.nan

    A.hook = spoil
    with pytest.raises(ValueError, match=r"eigsh: Davidson step 2: .*finite"):
        eigsh(A, 4, tol=1e-2, precision="mixed")


def test_a_matrix_that_is_not_symmetric_is_refused() -> None:
    M = matrix(OUTLIERS)
    M += torch.randn(M.shape, generator=torch.Generator().manual_seed(0)).triu() * 0.02
    with pytest.raises(ValueError, match="eigsh: A must be symmetric"):
        eigsh(Rounded(M), 4, tol=1e-3, precision="mixed")


def test_auto_declines_where_low_precision_is_not_faster() -> None:
    A = Rounded(matrix(OUTLIERS))
    pairs = eigsh(A, 4, tol=1e-2, precision="auto")
    check(A, pairs)
    assert pairs.low_matvecs == 2
    assert pairs.precision.startswith("full: a low-precision product takes")
    plain = eigsh(Rounded(A.M), 4, tol=1e-2)
    assert pairs.matvecs == plain.matvecs
    assert torch.equal(pairs.vectors, plain.vectors)


def test_auto_takes_what_is_five_times_faster() -> None:
    A = Rounded(matrix(OUTLIERS))
    A.delay = 2e-2
    pairs = eigsh(A, 10, tol=1e-2, precision="auto")
    check(A, pairs)
    assert pairs.precision.startswith("mixed")
    full = eigsh(Rounded(A.M), 10, tol=1e-2)
    assert full.matvecs >= 1.5 * (pairs.matvecs + pairs.low_matvecs / 5)


def test_products_that_are_accurate_enough_are_confirmed_by_two() -> None:
    M = matrix(OUTLIERS, torch.float64)
    A = SymmetricOperator.from_callable(
        lambda v: M @ v, len(M), torch.float64, low=lambda v: (M.float() @ v.float()).double()
    )
    pairs = eigsh(A, 10, tol=1e-3, precision="mixed")
    assert pairs.status is EigenStatus.CONVERGED
    assert pairs.matvecs == 4
    residuals = torch.linalg.vector_norm(M @ pairs.vectors - pairs.vectors * pairs.values, dim=0)
    assert float(residuals.max()) <= 1e-3 * 40


def test_the_prediction() -> None:
    assert pays(Trial(3e-3, 0.2, 2), tol=1e-2, k=10, steps=25)
    assert pays(Trial(1e-6, 0.6, 2), tol=1e-4, k=10, steps=25)
    assert not pays(Trial(1e-6, 1.2, 2), tol=1e-4, k=10, steps=25)
    assert not pays(Trial(3e-3, 0.2, 2), tol=1e-4, k=10, steps=25)
    assert not pays(Trial(3e-3, 0.01, 2, "it failed"), tol=1e-2, k=10, steps=25)


def test_sums_multiples_and_blocks_offer_what_their_terms_do() -> None:
    A = Rounded(matrix(OUTLIERS))
    plain = SymmetricOperator.from_callable(lambda v: 2 * v, A.dim)
    assert plain.low_precision() is None
    assert (plain + plain).low_precision() is None
    low = (3 * A + plain).low_precision()
    v = torch.ones(A.dim)
    assert low is not None
    torch.testing.assert_close(low @ v, 3 * (A.low_precision() @ v) + 2 * v)
    A.blocks = A.low_precision().blocks = {"a": slice(0, 100), "b": slice(100, 400)}  # type: ignore[union-attr]
    part = A.restrict("b").low_precision()
    assert part is not None
    torch.testing.assert_close(part @ v[100:], (A.low_precision() @ torch.cat((0 * v[:100], v[100:])))[100:])


@pytest.mark.parametrize("precision", ["mixed", "half", None])
def test_bad_precision_is_refused(precision: str | None) -> None:
    A = SymmetricOperator.from_callable(lambda v: 2 * v, 100)
    with pytest.raises(ValueError, match="eigsh: precision must be"):
        eigsh(A, 3, precision=precision)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="low must be callable or None, got int"):
        SymmetricOperator.from_callable(lambda v: v, 100, low=3)  # type: ignore[arg-type]


def test_auto_without_low_precision_products_is_full() -> None:
    A = SymmetricOperator.from_callable(lambda v: v * torch.arange(1.0, 101.0), 100)
    pairs = eigsh(A, 3, precision="auto")
    assert pairs.precision == "full: FromCallable offers no low-precision products"
    assert pairs.low_matvecs == 0


def digits_like(dtype: torch.dtype = torch.float32) -> Problem:
    generator = torch.Generator().manual_seed(0)
    X = torch.rand(120, 64, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Dropout(0.2), nn.Linear(24, 10)).to(dtype)
    y = torch.randint(0, 10, (120,), generator=generator)
    return Problem(model, nn.CrossEntropyLoss(), (X.to(dtype), y), batch_size=50)


@pytest.mark.parametrize("of", [Hessian, GaussNewton])
@pytest.mark.parametrize("key", [None, MaskKey(2, 1)], ids=str)
def test_networks_offer_bfloat16_where_there_are_units(
    of: type[GraphOperator], key: MaskKey | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    A, v = of(digits_like(), key), torch.randn(64 * 24 + 24 + 250, generator=torch.Generator().manual_seed(1))
    image = A @ v
    monkeypatch.setattr("dropscope.operators.graphs.fast_bfloat16", lambda device: False)
    assert A.low_precision() is None
    with pytest.raises(ValueError, match="offers no low-precision products"):
        eigsh(A, 3, precision="mixed")
    monkeypatch.setattr("dropscope.operators.graphs.fast_bfloat16", lambda device: True)
    low = A.low_precision()
    assert low is not None
    assert "bfloat16 products" in repr(low)
    assert low.low_precision() is None
    assert of(digits_like(torch.float64), key).low_precision() is None
    rough = low @ v
    assert rough.dtype == torch.float32
    assert 1e-5 < float((rough - image).norm() / image.norm()) < 2e-2
    assert torch.equal(low @ v, rough)
    assert torch.equal(A @ v, image)
    pairs = eigsh(A, 5, tol=1e-2, precision="mixed")
    residuals = torch.linalg.vector_norm(A @ pairs.vectors - pairs.vectors * pairs.values.float(), dim=0)
    assert pairs.status is EigenStatus.CONVERGED
    assert pairs.low_matvecs > pairs.matvecs
    assert float(residuals.max()) <= 1.01e-2 * pairs.scale
    full = eigsh(A, 5, tol=1e-4)
    torch.testing.assert_close(pairs.values, full.values, rtol=0, atol=1e-2 * full.scale)
