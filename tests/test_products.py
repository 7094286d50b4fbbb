"""Products by the faster library are torch's products, to the rounding of float32, and leave everything else alone."""

import pytest
import torch
from torch.nn import functional as F

from dropscope import kernels
from dropscope.kernels import products

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@pytest.fixture
def calls(monkeypatch):
    """Counts the products that take the detour, and forces it on every machine."""
    seen = []
    detour = products._onednn
    monkeypatch.setattr(products, "prefer_onednn", lambda: True)
    monkeypatch.setattr(products, "_onednn", lambda a, b, bias=None: seen.append(1) or detour(a, b, bias))
    return seen


def error(x, reference):
    return float((x.double() - reference).abs().max() / reference.abs().max())


@needs_onednn
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("sizes", [(64, 64, 64), (1, 300, 257), (129, 1, 511), (257, 300, 1)])
def test_a_product_is_the_product_in_every_layout(sizes, transposed, calls):
    rows, inner, cols = sizes
    a = torch.randn(inner, rows).T if transposed[0] else torch.randn(rows, inner)
    b = torch.randn(cols, inner).T if transposed[1] else torch.randn(inner, cols)
    assert error(kernels.multiply(a, b), a.double() @ b.double()) < 1e-6 * inner**0.5
    assert calls


@needs_onednn
def test_second_derivatives_under_the_mode_are_those_without(calls):
    torch.manual_seed(0)
    x, w, v, c = torch.randn(200, 60), torch.randn(50, 60, requires_grad=True), torch.randn(50, 60), torch.randn(50)

    def product(*tensors):
        x, w, v, c = tensors
        (g,) = torch.autograd.grad(F.linear(x, w, c).tanh().square().sum(), w, create_graph=True)
        return torch.autograd.grad(g, w, v)[0]

    exact = product(*(t.detach().double().requires_grad_(t.requires_grad) for t in (x, w, v, c)))
    with kernels.faster_products(1e12):
        assert error(product(x, w, v, c), exact) < 1e-5
    assert len(calls) >= 4
    taken = len(calls)
    product(x, w, v, c)
    assert len(calls) == taken, "the mode outlived its context"


@needs_onednn
def test_what_does_not_fit_is_left_to_torch(calls):
    a = torch.randn(300, 300)
    with kernels.faster_products(1e12):
        for x in (a.double(), a.bfloat16(), a[:20, :20], a[:0]):
            assert torch.equal(x @ x.T, torch.mm(x, x.T))
        out = torch.empty(300, 300)
        assert torch.mm(a, a, out=out) is out
        torch.addmm(a, a, a, beta=0.5)
    assert not calls
    with kernels.faster_products(10.0):
        a @ a
    assert not calls, "little work should not pay for the detour"
