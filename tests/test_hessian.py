"""The Hessian: dense references, any split, fixed masks, and what other tools get wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import cases
import dropscope as ds
from dropscope.masks import MaskKey, keep_mask, keep_probability
from dropscope.operators.hessian import Hessian
from dropscope.problem import Problem
from dropscope.replay import site_of

KEYS = [None, MaskKey(3, 2)]


@pytest.mark.parametrize("key", KEYS, ids=str)
@pytest.mark.parametrize("name", cases.CASES)
class TestDense:
    def test_is_the_second_derivative(self, name, key):
        problem = cases.CASES[name].problem()
        H = Hessian(problem, key).to_dense()
        torch.testing.assert_close(H, cases.dense_hessian(problem, key), rtol=0, atol=1e-10)
        torch.testing.assert_close(H, H.T, rtol=0, atol=1e-13)

    def test_is_the_difference_of_gradients(self, name, key):
        """An oracle that shares no derivative with the operator."""
        problem = cases.CASES[name].problem()
        v, step = cases.random_vector(problem), 1e-5
        ends = []
        for sign in (1, -1):
            with problem.displaced(sign * step * v):
                ends.append(problem.gradient(key))
        torch.testing.assert_close(Hessian(problem, key) @ v, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-7)

    def test_products_repeat_bit_for_bit(self, name, key):
        """Peers draw a new mask in every product: two of them on one vector then differ by 90 %."""
        problem = cases.CASES[name].problem(torch.float32)
        H, v = Hessian(problem, key), cases.random_vector(problem)
        first = H @ v
        torch.manual_seed(1)
        assert torch.equal(H @ v, first)
        assert torch.equal(Hessian(problem, key) @ v, first)

    def test_forward_over_reverse_is_the_same_operator(self, name, key):
        problem = cases.CASES[name].problem()
        H, other = Hessian(problem, key), Hessian(problem, key)
        other._forward_over_reverse = True
        V = cases.random_vector(problem, 2)
        torch.testing.assert_close(other @ V, H @ V, rtol=0, atol=1e-13)


def test_ragged_batches_are_weighted_by_their_samples():
    """60 + 4 of 64 samples: averaging the two batches' means is 116 % wrong."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    X, y = torch.randn(64, 5, dtype=torch.float64), torch.randint(0, 3, (64,))
    whole = Hessian(Problem(model, nn.CrossEntropyLoss(), (X, y), batch_size=64)).to_dense()
    split = Hessian(Problem(model, nn.CrossEntropyLoss(), (X, y), batch_size=60)).to_dense()
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-14)


def test_a_fixed_mask_is_the_network_with_the_mask_written_out():
    """The mask as an explicit factor, in a network without dropout."""
    torch.manual_seed(0)
    key, p = MaskKey(7, 5), 0.4
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(p), nn.Linear(4, 2)).double()
    X, y = torch.randn(9, 3, dtype=torch.float64), torch.randint(0, 2, (9,))
    factor = keep_mask((9, 4), p, key, site=site_of("2", 0)).double() / keep_probability(p)
    assert 0 < int((factor == 0).sum()) < 36

    class Explicit(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = model[0], model[3]

        def forward(self, x, m):
            return self.last(torch.tanh(self.first(x)) * m)

    masked = Hessian(Problem(model, nn.CrossEntropyLoss(), (X, y), batch_size=4), key)
    explicit = Hessian(Problem(Explicit(), nn.CrossEntropyLoss(), (X, factor, y), batch_size=4))
    torch.testing.assert_close(masked.to_dense(), explicit.to_dense(), rtol=0, atol=1e-14)
    assert (masked.to_dense() - Hessian(masked.problem).to_dense()).norm() > 0.01


@pytest.mark.parametrize("key", KEYS, ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_change_nothing(reentrant, key):
    """Neither kind can be differentiated twice, nor by dual numbers."""
    problem = cases.checkpointed(reentrant)
    V = cases.random_vector(problem, 2)
    for of in (Hessian, ds.GaussNewton):
        assert torch.equal(of(problem, key) @ V, of(cases.checkpointed(None), key) @ V)
    other = Hessian(problem, key)
    other._forward_over_reverse = True
    torch.testing.assert_close(other @ V, Hessian(problem, key) @ V, rtol=0, atol=1e-14)
    torch.testing.assert_close(other.to_dense(), cases.dense_hessian(cases.checkpointed(None), key), rtol=0, atol=1e-13)


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_a_compiled_model_runs_eagerly(key):
    """What aot_autograd compiles has no second derivative."""
    plain = cases.checkpointed(None)
    compiled = torch.compile(plain.model, backend="aot_eager")
    compiled(torch.ones(4, 3, dtype=torch.float64))
    problem = Problem(compiled, nn.CrossEntropyLoss(), plain.data._tensors, batch_size=4)
    v = cases.random_vector(plain)
    assert torch.equal(Hessian(problem, key) @ v, Hessian(plain, key) @ v)


@pytest.mark.parametrize("name", cases.SHARED_MASKS)
def test_a_mask_that_samples_share(name):
    problem = cases.shared_mask(name)
    H = Hessian(problem, draws=4)
    expected = torch.stack([cases.dense_hessian(problem, MaskKey(0, m)) for m in range(4)])
    assert not torch.allclose(expected, expected[:1])
    torch.testing.assert_close(H.to_dense(), expected.mean(0), rtol=0, atol=1e-13)
    H._forward_over_reverse = True
    torch.testing.assert_close(H.to_dense(), expected.mean(0), rtol=0, atol=1e-13)


def test_draws_are_averaged():
    problem = cases.CASES["mlp"].problem()
    alone = torch.stack([Hessian(problem, MaskKey(4, m)).to_dense() for m in range(3)])
    torch.testing.assert_close(Hessian(problem, draws=3, seed=4).to_dense(), alone.mean(0), rtol=0, atol=1e-14)


def test_zero_initialised_weights_behind_dropout_keep_their_curvature():
    """A second-order backward pass that guesses the mask from output == 0 sees none here."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    X = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    problem = Problem(model, nn.MSELoss(), (X, torch.ones(8, 2, dtype=torch.float64)))
    H = Hessian(problem, MaskKey(0)).restrict("0.*").to_dense()
    torch.testing.assert_close(Hessian(problem, MaskKey(0)).to_dense(), cases.dense_hessian(problem, MaskKey(0)))
    assert H.norm() > 0.01
    # The model is bilinear in the two layers and linear in the first, so there the Gauss-Newton matrix is all of it.
    torch.testing.assert_close(ds.GaussNewton(problem, MaskKey(0)).restrict("0.*").to_dense(), H, rtol=0, atol=1e-14)


def test_dropping_nothing_is_evaluation_bit_for_bit():
    problem = cases.CASES["mlp"].problem()
    v = cases.random_vector(problem)
    for layer in (2, 5):
        problem.model[layer].p = 0.0
    assert torch.equal(Hessian(problem, MaskKey(3)) @ v, Hessian(problem) @ v)


def test_unused_and_linear_parameters_have_zero_rows():
    """Peers crash on a parameter whose gradient is constant or absent."""
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)}).double()
    X = torch.randn(5, 2, dtype=torch.float64)
    problem = Problem(
        model, lambda out, y: (out - y).sum(1), (X, X[:, :1]), forward=lambda m, b: m["used"](b[0]), batch_size=3
    )
    assert torch.equal(Hessian(problem).to_dense(), torch.zeros(6, 6, dtype=torch.float64))
    square = Problem(model, nn.MSELoss(), (X, X[:, :1]), forward=lambda m, b: m["used"](b[0]))
    H = Hessian(square).to_dense()
    assert H[:3, :3].norm() > 1
    assert H[3:].norm() == H[:, 3:].norm() == 0


def test_only_the_chosen_parameters():
    full = cases.CASES["gpt"].problem()
    part = cases.CASES["gpt"].problem(params=["ln_1.*", "wte.weight"])
    expected = Hessian(full).restrict(list(part.params)).to_dense()
    torch.testing.assert_close(Hessian(part).to_dense(), expected, rtol=0, atol=1e-14)


def test_the_model_is_left_as_found():
    problem = cases.CASES["transformer"].problem()
    problem.model.train()
    H = Hessian(problem, MaskKey(0))
    modes, generator = [m.training for m in problem.model.modules()], torch.get_rng_state()
    H @ cases.random_vector(problem)
    assert [m.training for m in problem.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in problem.model.parameters())
    flags = torch.backends.cuda
    assert flags.flash_sdp_enabled()
    assert flags.mem_efficient_sdp_enabled()


def test_an_interruption_leaves_a_working_operator():
    problem = cases.CASES["mlp"].problem()
    calls = -1000  # none of the probes

    def forward(model, batch):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return model(batch[0])

    stopped = Problem(problem.model, nn.CrossEntropyLoss(), problem.data._tensors, batch_size=4, forward=forward)
    stopped.risk()
    calls = 0
    H, v = Hessian(stopped), cases.random_vector(problem)
    with pytest.raises(KeyboardInterrupt):
        H @ v
    assert torch.equal(H @ v, Hessian(problem) @ v)


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm_has_its_second_derivative(wrap, dim):
    """The double backward of torch's own kernel is wrong, and not even symmetric."""
    torch.manual_seed(0)
    hidden = wrap(nn.Linear(3, 4), dim=dim)
    model = nn.Sequential(hidden, nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 2)).double()
    X, y = torch.randn(7, 3, dtype=torch.float64), torch.randint(0, 2, (7,))
    problem, key, step = Problem(model, nn.CrossEntropyLoss(), (X, y), batch_size=4), MaskKey(1), 1e-5
    for v in torch.eye(problem.dim, dtype=torch.float64)[::3]:
        ends = []
        for sign in (1, -1):
            with problem.displaced(sign * step * v):
                ends.append(problem.gradient(key))
        torch.testing.assert_close(Hessian(problem, key) @ v, (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-8)


class Once(torch.autograd.Function):
    """exp without a second backward pass, but with a forward derivative."""

    @staticmethod
    def forward(x):
        return x.exp()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].exp()

    @staticmethod
    def jvp(ctx, tangent):
        return tangent * ctx.saved_tensors[0].exp()


class OnceOnly(torch.autograd.Function):
    """The same, without any forward derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].exp()


class TestWithoutDoubleBackward:
    def problem(self, fn):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.map = nn.Linear(3, 2).double()

            def forward(self, x):
                return fn(self.map(x))

        torch.manual_seed(0)
        X = torch.randn(5, 3, dtype=torch.float64)
        return Problem(Model(), nn.MSELoss(), (X, X[:, :2]), batch_size=3)

    def test_forward_over_reverse_takes_over(self):
        expected = Hessian(self.problem(torch.exp)).to_dense()
        H = Hessian(self.problem(Once.apply))
        torch.testing.assert_close(H.to_dense(), expected, rtol=0, atol=1e-13)
        assert H._forward_over_reverse

    def test_without_either_it_is_refused(self):
        H = Hessian(self.problem(OnceOnly.apply))
        for _ in range(2):
            with pytest.raises(ValueError, match=r"an operation has no second derivative .*once_differentiable"):
                H @ torch.ones(8, dtype=torch.float64)


class Tanh(torch.autograd.Function):
    """A backward pass that is right, and hides from autograd that it depends on x; or does not."""

    @staticmethod
    def forward(ctx, x, hidden):
        ctx.save_for_backward(x)
        ctx.hidden = hidden
        return x.tanh()

    @staticmethod
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        with torch.set_grad_enabled(torch.is_grad_enabled() and not ctx.hidden):
            derivative = 1 - x.tanh() ** 2
        return slope * derivative, None


class ByHand(nn.Module):
    """The function inside the network, or on its output, where the rest is a chain."""

    def __init__(self, hidden, last):
        super().__init__()
        self.first, self.out, self.hidden, self.last = nn.Linear(3, 6), nn.Linear(6, 3), hidden, last

    def forward(self, x):
        if self.last:
            return Tanh.apply(self.out(self.first(x).tanh()), self.hidden)
        return self.out(Tanh.apply(self.first(x), self.hidden))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("last", [False, True])
def test_a_backward_pass_that_hides_its_second_derivative_is_refused(last, dtype):
    """Its double backward is symmetric to rounding, a quarter of it wrong, and no spectrum can tell."""
    for seed in range(10):
        torch.manual_seed(seed)
        data = torch.randn(8, 3, dtype=dtype), torch.randint(0, 3, (8,))
        sound = Problem(ByHand(False, last).to(dtype), nn.CrossEntropyLoss(), data)
        v = torch.ones(sound.dim, dtype=dtype)
        assert (Hessian(sound) @ v).norm() > 0
        wrong = Problem(ByHand(True, last).to(dtype), nn.CrossEntropyLoss(), data)
        for _ in range(2):  # also the second time
            with pytest.raises(ValueError, match="the second derivative must be that of the loss"):
                Hessian(wrong) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kinks_are_no_fault_of_the_second_derivative(dtype):
    for seed in range(20):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(3, 30), nn.ReLU(), nn.LayerNorm(30), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 3)
        )
        for p in model.parameters():
            p.data.mul_(seed % 4)
        data = torch.randn(8, 3, dtype=dtype), torch.randint(0, 3, (8,))
        problem = Problem(model.to(dtype), nn.CrossEntropyLoss(), data)
        Hessian(problem) @ torch.ones(problem.dim, dtype=dtype)
        assert problem.curvature_checked


def test_float32_and_bfloat16():
    exact = Hessian(cases.CASES["mlp"].problem())
    v = cases.random_vector(exact)
    for dtype, slack in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        product = Hessian(cases.CASES["mlp"].problem(dtype)) @ v.to(dtype)
        assert product.dtype == dtype
        assert float((product.double() - exact @ v).norm() / (exact @ v).norm()) < slack


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"masks": 3}, TypeError, "masks must be a MaskKey or None, got int"),
        ({"masks": MaskKey(0), "draws": 2}, ValueError, "masks and draws must not both be given"),
        ({"draws": 0}, ValueError, "draws must be an int >= 1, got 0"),
        ({"draws": True}, ValueError, "draws must be an int >= 1, got True"),
        ({"draws": 2, "seed": -1}, ValueError, r"seed must lie in \[0, 2\*\*64\), got -1"),
        ({"memory": 0}, ValueError, "memory must be at least 1 byte, got 0"),
        ({"block": 0}, ValueError, "block must be a positive int or None, got 0"),
        ({"memory": 1.5}, TypeError, "memory must be a number of bytes"),
        ({"problem": 1}, TypeError, "problem must be a Problem, got int"),
    ],
)
def test_bad_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        Hessian(**{"problem": cases.CASES["mlp"].problem(), **options})


def test_a_loss_that_is_not_finite_names_its_batch():
    model = nn.Linear(3, 1).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    X, y = torch.ones(6, 3, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    y[3] = 1e6
    H = Hessian(Problem(model, lambda out, y: (out[:, 0] * y).exp(), (X, y), batch_size=2))
    H @ torch.ones(4, dtype=torch.float64)
    with torch.no_grad():
        model.bias.fill_(1.0)
    with pytest.raises(ValueError, match=r"losses must be finite, got inf at batch 1 \(sample 3\)"):
        H @ torch.ones(4, dtype=torch.float64)


def test_exported():
    assert ds.Hessian is Hessian
    assert ds.Problem is Problem
