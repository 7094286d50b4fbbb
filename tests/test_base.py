"""The operator interface: products, algebra, restriction, scipy, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

from dropscope.operators.base import SymmetricOperator, check_symmetric


class Dense(SymmetricOperator):
    """A matrix with two named parameters."""

    def __init__(self, A, names=("a", "b")):
        self.A, self.dim, self.dtype, self.device = A, len(A), A.dtype, A.device
        cut = len(A) // 3
        self.blocks = dict(zip(names, (slice(0, cut), slice(cut, len(A))), strict=True)) if names else {}
        self.products = 0

    def _matmat(self, V):
        self.products += 1
        return self.A @ V


def symmetric(n=7, seed=0, dtype=torch.float64):
    A = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((A + A.T) / 2).to(dtype)


def vectors(n=7, k=3, dtype=torch.float64):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)


def test_vectors_columns_and_the_dense_matrix():
    A, V = symmetric(), vectors()
    op = Dense(A)
    torch.testing.assert_close(op @ V, A @ V)
    torch.testing.assert_close(op @ V[:, 0], A @ V[:, 0])
    assert (op @ V[:, 0]).shape == (7,)
    assert (op @ V[:, :0]).shape == (7, 0)
    assert op.shape == (7, 7)
    assert torch.equal(op.to_dense(), A)


def test_a_product_carries_no_graph():
    v = vectors()[:, 0].requires_grad_()
    assert not (Dense(symmetric()) @ v).requires_grad


def test_sums_differences_and_multiples():
    A, B, V = symmetric(), symmetric(seed=1), vectors()
    a, b = Dense(A), Dense(B)
    combined = 2 * (a + b) - a * 3.0 + (-b)
    torch.testing.assert_close(combined @ V, (2 * (A + B) - 3 * A - B) @ V)
    assert combined.blocks == a.blocks
    assert (a + Dense(B, names=("c", "d"))).blocks == {}
    with pytest.raises(TypeError):
        a + 1
    with pytest.raises(TypeError):
        a * b


@pytest.mark.parametrize("names", ["a", ["b"], ["b", "a"], "*", ["a*", "b"]])
def test_restriction_is_the_block_in_the_order_asked_for(names):
    A = symmetric()
    op = Dense(A)
    order = {"a": [0, 1], "b": [2, 3, 4, 5, 6]}
    chosen = (
        {"a": ["a"], "*": ["a", "b"]}.get(names, names) if isinstance(names, str) else [n.strip("*") for n in names]
    )
    rows = [i for name in chosen for i in order[name]]
    small = op.restrict(names)
    assert torch.equal(small.to_dense(), A[rows][:, rows])
    assert list(small.blocks) == chosen
    assert small.restrict(chosen[-1]).dim == len(order[chosen[-1]])


def test_scipy_finds_the_same_eigenvalues():
    A = symmetric(12)
    values = scipy.sparse.linalg.eigsh(Dense(A).to_scipy(), k=3, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(values), torch.linalg.eigvalsh(A)[-3:].numpy(), atol=1e-10)
    op = Dense(A.float()).to_scipy()
    assert op.dtype == np.float32
    x = vectors(12)
    np.testing.assert_allclose(op.matmat(x.numpy()), (A @ x).numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(op.matvec(x[:, :1].numpy()).ravel(), (A @ x[:, 0]).numpy(), rtol=1e-5, atol=1e-5)


def test_repr_tells_kind_and_size():
    assert repr(Dense(symmetric()).restrict("a")) == "Restricted(dim=2, torch.float64)"


def test_from_callable():
    A = symmetric()
    op = SymmetricOperator.from_callable(lambda v: A @ v, dim=7, dtype=torch.float64)
    assert torch.equal(op.to_dense(), torch.stack([A @ e for e in torch.eye(7, dtype=torch.float64)], 1))
    assert op.blocks == {}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SymmetricOperator.from_callable(3, 2), TypeError, "fn must be callable, got int"),
        (lambda: SymmetricOperator.from_callable(lambda v: v, 0), ValueError, "dim must be a positive int, got 0"),
        (lambda: SymmetricOperator.from_callable(lambda v: v, 2.0), ValueError, r"dim must be a positive int, got 2.0"),
        (lambda: SymmetricOperator.from_callable(lambda v: v, 2, torch.int64), TypeError, "dtype must be a floating"),
        (lambda: SymmetricOperator.from_callable(lambda v: v, 2, "float32"), TypeError, "dtype must be a floating"),
        (
            lambda: SymmetricOperator.from_callable(lambda v: v, True),
            ValueError,
            "dim must be a positive int, got True",
        ),
        (lambda: SymmetricOperator.from_callable(lambda v: v[:1], 2), ValueError, r"of shape \(2,\), got \(1,\)"),
        (lambda: SymmetricOperator.from_callable(lambda v: 0.0, 2), ValueError, r"of shape \(2,\), got float"),
        (lambda: Dense(symmetric()) @ [1.0], TypeError, "Dense @ v: v must be a torch.Tensor, got list"),
        (lambda: Dense(symmetric()) @ torch.ones(7), TypeError, "v must have dtype torch.float64, got torch.float32"),
        (lambda: Dense(symmetric()) @ vectors(6), ValueError, r"shape \(7,\) or \(7, k\), got \(6, 3\)"),
        (lambda: Dense(symmetric()) @ vectors()[None], ValueError, r"got \(1, 7, 3\)"),
        (lambda: Dense(symmetric()) @ (vectors() / 0), ValueError, "v itself is not finite"),
        (lambda: Dense(symmetric() / 0) @ vectors(), ValueError, "got NaN or Inf .v is finite"),
        (lambda: Dense(symmetric()).restrict("c"), ValueError, r"names must be among \['a', 'b'\], got 'c'"),
        (lambda: Dense(symmetric()).restrict(3), TypeError, "restrict: names must be parameter names, got 3"),
        (lambda: Dense(symmetric()).restrict([3]), TypeError, r"restrict: names must be parameter names, got \[3\]"),
        (lambda: Dense(symmetric()).restrict([]), ValueError, "at least one parameter, got none"),
        (lambda: Dense(symmetric()).restrict(["a", "*"]), ValueError, "each parameter once, got 'a' twice"),
        (lambda: float("nan") * Dense(symmetric()), ValueError, "c must be finite, got nan"),
        (lambda: Dense(symmetric(), names=None).restrict("a"), ValueError, "must know parameter names"),
        (lambda: Dense(symmetric()) + Dense(symmetric(8)), ValueError, "the same dim, got 7 and 8"),
        (lambda: Dense(symmetric()) + Dense(symmetric().float()), ValueError, "the same dtype"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [2, 50, 400])
def test_the_probe_tells_symmetric_from_not(n, dtype):
    A = symmetric(n, dtype=dtype)
    check_symmetric(Dense(A, names=None))
    A[0, 1] += 3.0 * float(A.double().norm())
    with pytest.raises(ValueError, match="operator must be symmetric"):
        check_symmetric(Dense(A, names=None))


def test_the_probe_sees_an_operator_that_draws_at_random():
    """As a Hessian product that draws new dropout masks in every call."""
    A = symmetric()

    def product(v):
        return A @ (v * (torch.rand(7, generator=generator, dtype=torch.float64) > 0.3))

    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="from_callable: fn must be symmetric"):
        SymmetricOperator.from_callable(product, 7, torch.float64)
