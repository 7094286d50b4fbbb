"""The probes: every way in which model, loss and data fail to make one risk, and checkpoints and shared masks."""

from __future__ import annotations

import contextlib
import functools
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import cases
import dropscope as ds
from cases import Custom, net, state
from dropscope.masks import MaskKey, replay_dropout
from dropscope.problem import Problem

KEYS = [None, MaskKey(3, 2)]
X, Y = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 3


def remember(module, out, x):
    module.state = module.state + 0.1
    return out * (1 + module.state)


def count(module, out, x):
    module.count += 1
    return out


def straight_through(module, out, x):
    w = module.map.weight
    return F.linear(x, w + ((w * 4).round() / 4 - w).detach(), module.map.bias)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)

    @torch.jit.script
    def hidden_dropout(x: torch.Tensor, training: bool):
        return F.dropout(x, 0.5, training)


def clip(module, out, x):
    with torch.no_grad():
        module.map.weight.clamp_(-0.1, 0.1)
    return module.map(x)


PROBES = [
    (Custom(lambda m, out, x: F.dropout(out, 0.5)), None, "repeat bit for bit in eval mode.*random numbers"),
    (Custom(remember), None, "repeat bit for bit.*keeps a state"),
    (Custom(lambda m, out, x: out - out.mean(0)), None, "must be those of its parts.*couples the samples"),
    (
        nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)),
        None,
        "must be those of its parts.*'1' normalises over the batch",
    ),
    (Custom(lambda m, out, x: out * 2 if m.training else out), MaskKey(0), "every p=0 must equal eval mode"),
    (
        Custom(lambda m, out, x: F.linear(x, m.map.weight.detach()) + 0 * out),
        None,
        "must be the derivative of the loss",
    ),
    (Custom(straight_through), None, "must be the derivative of the loss"),
    (Custom(lambda m, out, x: out.detach()), None, "must depend on the parameters, got losses without a graph"),
    (Custom(count), None, r"must not write to buffers, got a change of \['count'\]"),
    (Custom(clip), None, r"must not write to parameters, got a change of \['map.weight'\]"),
    (Custom(lambda m, out, x: hidden_dropout(out, True)), None, r"random numbers.*: here aten.bernoulli_.float$"),
    (Custom(lambda m, out, x: hidden_dropout(out, m.training)), MaskKey(0), r"CPU.*behind it: here aten.bernoulli_.fl"),
    (
        Custom(lambda m, out, x: out * torch.ops.aten.bernoulli.p(out, 0.5) if m.training else out),
        MaskKey(0),
        r"hidden in one of: aten.bernoulli.p in module ''.*: here aten.bernoulli.p$",
    ),
    (Custom(lambda m, out, x: out * random.random() if m.training else out), MaskKey(0), "Python's random.*behind it$"),
]


@pytest.mark.parametrize(("model", "key", "message"), PROBES)
def test_probes_say_what_is_wrong(model, key, message):
    before = state(model)
    with pytest.raises(ValueError, match=message):
        Problem(model.train(), nn.CrossEntropyLoss(), (X, Y)).gradient(key)
    assert state(model) == before


@pytest.mark.parametrize("key", KEYS, ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("draws", [1, 3])
def test_checkpoints_change_nothing(reentrant, key, draws):
    plain, other = (cases.checkpointed(how) for how in (None, reentrant))
    before = state(other.model)
    if key is not None:
        assert torch.equal(other.gradient(key, draws), plain.gradient(key, draws))
        assert not torch.allclose(plain.gradient(key), plain.gradient())
    assert torch.equal(other.gradient(), plain.gradient())
    assert other.risk(key) == plain.risk(key)
    assert state(other.model) == before


def test_a_checkpoint_in_the_loss_changes_nothing():
    def loss(out, y, call=lambda f, x: f(x)):
        return call(lambda x: F.cross_entropy(x, y, reduction="none"), out)

    wrapped = functools.partial(loss, call=functools.partial(checkpoint, use_reentrant=True))
    expected = Problem(net(), loss, (X, Y)).gradient(MaskKey(0))
    assert torch.equal(Problem(net(), wrapped, (X, Y)).gradient(MaskKey(0)), expected)


def test_checkpoints_work_as_ever_outside():
    """Passing over them ends with each pass, in an interrupted one too."""
    problem = cases.checkpointed(False)
    problem.gradient(MaskKey(0))
    problem.forward = lambda model, batch: model()
    with pytest.raises(TypeError):
        problem.risk()
    calls = []
    x = torch.ones(2, 3, requires_grad=True)
    for context in (contextlib.nullcontext(), replay_dropout(MaskKey(0), torch.arange(2))):
        with context:
            checkpoint(lambda y: (calls.append(0), y.sin())[1], x, use_reentrant=False).sum().backward()
    assert len(calls) == 4


@pytest.mark.parametrize("name", cases.SHARED_MASKS)
def test_a_mask_that_samples_share_is_one_draw_of_the_network(name):
    """DropConnect and LayerDrop: the risk under a key is that of one network, and has its gradient."""
    problem = cases.shared_mask(name)
    key = next(MaskKey(0, m) for m in range(99) if abs(problem.risk(MaskKey(0, m)) - problem.risk()) > 1e-3)
    v, step = torch.randn(problem.dim, dtype=torch.float64), 1e-5
    ends = []
    for sign in (1, -1):
        with problem.displaced(sign * step * v):
            ends.append(problem.risk(key))
    assert float(problem.gradient(key) @ v) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6)
    assert [call.split()[0] for call in problem.shared] == [cases.SHARED_MASKS[name]]
    whole = cases.shared_mask(name, batch_size=99)
    torch.testing.assert_close(whole.gradient(key), problem.gradient(key), rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="is shared by the batch, which must be of one draw"):
        problem.sample_losses(next(iter(problem.batches())), key, draws=2)


def test_a_wrong_batch_dim_is_refused():
    model, loss, data = cases.CASES["lstm_time_major"].parts()
    square = torch.cat([data[0], data[0][:2]])  # as many steps as samples
    with pytest.raises(ValueError, match=r"must run on 3 of 6 samples as on all.*is batch_dim=0 the dimension"):
        Problem(model, loss, (square, data[1]), batch_dim=0).risk()


def test_models_without_a_defect_pass_the_probes_in_float32():
    for case in cases.CASES.values():
        case.problem(torch.float32).check(masks=True)
    spectral = nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 3)
    )
    Problem(spectral, nn.CrossEntropyLoss(), (X, Y)).check(masks=True)


def test_a_model_that_interpolates_passes_the_probes():
    """Its losses of 1e-6 carry the rounding errors of logits, which may depend on the size of the batch."""

    def loss(out, y):
        return 1e-6 + 1e-8 * len(y) + 1e-9 * F.cross_entropy(out, y, reduction="none")

    Problem(net(), loss, (X, Y)).check(masks=True)


class Scaled(torch.autograd.Function):
    """The identity, with a backward pass that is off by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, slope):
        return ctx.factor * slope, None


class TestKinks:
    """Networks of ReLUs at a large start in float32: kinks lie within the steps of the gradient probe."""

    def problem(self, seed, scale, factor=1.0):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.wide, self.out = nn.Linear(8, 50), nn.Linear(50, 3)

            def forward(self, x):
                h = self.wide(x).relu()
                return self.out(h if factor == 1.0 else Scaled.apply(h, factor))

        generator = torch.Generator().manual_seed(seed)
        model = Net()
        for p in model.parameters():
            p.data = scale * torch.randn(p.shape, generator=generator)
        X, y = torch.randn(6, 8, generator=generator), torch.randn(6, 3, generator=generator)
        return Problem(model, nn.MSELoss(), (X, y))

    @pytest.mark.parametrize("scale", [3.0, 100.0])
    def test_a_right_gradient_passes(self, scale):
        for seed in range(30):
            self.problem(seed, scale).check()

    @pytest.mark.parametrize("factor", [0.5, 0.8])
    def test_a_wrong_gradient_does_not(self, factor):
        refused = 0
        for seed in range(20):
            with contextlib.suppress(ValueError):
                self.problem(seed, 3.0, factor).check()
                continue
            refused += 1
        assert refused >= 18  # a kink at the start itself, to rounding, leaves slopes of both sides to choose from


def refused(model, X, Y):
    """Whether the probe of the gradient refuses a model."""
    try:
        Problem(model, nn.CrossEntropyLoss(), (X, Y)).check()
    except ValueError as error:
        if "must be the derivative of the loss" not in str(error):
            raise
        return True
    return False


class Rounded(nn.Module):
    """Weights on a grid, straight through: differences in float32 pass over many points of the grid."""

    def __init__(self, grid):
        super().__init__()
        self.layers, self.grid = nn.ModuleList([nn.Linear(3, 8), nn.Linear(8, 3)]), grid

    def forward(self, x):
        for layer in self.layers:
            w = layer.weight
            x = F.linear(x.tanh(), w + ((w * self.grid).round() / self.grid - w).detach(), layer.bias)
        return x


class InFloat32(nn.Module):
    """Sound, and computes in float32 whatever its parameters are, as the normalisations of language models do."""

    def __init__(self):
        super().__init__()
        self.first, self.out = nn.Linear(3, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.first(x)
        return self.out((h.float() * h.float().pow(2).mean(-1, keepdim=True).rsqrt()).to(h.dtype))


class Wrong32(nn.Module):
    """A backward pass that is wrong in float32 alone."""

    def __init__(self):
        super().__init__()
        self.first, self.out = nn.Linear(3, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.first(x).tanh()
        return self.out(Scaled.apply(h, 0.5) if h.dtype == torch.float32 else h)


class Uncopied(Wrong32):
    """A model that cannot be copied."""

    def __deepcopy__(self, memo):
        raise RuntimeError("no copy")


class TestFloat64:
    """The probe of a float32 model looks at a copy in float64 first."""

    @pytest.mark.parametrize("grid", [4, 64])
    def test_rounded_weights_are_refused(self, grid):
        """In float32 alone one model in ten is refused at a grid of 1/64, three in four at 1/4."""
        for seed in range(30):
            torch.manual_seed(seed)
            assert refused(Rounded(grid), X, Y)

    def test_what_computes_in_float32_inside_is_no_fault(self):
        for seed in range(20):
            torch.manual_seed(seed)
            assert not refused(InFloat32(), X, Y)
            assert not refused(InFloat32().double(), X.double(), Y)

    @pytest.mark.parametrize("model", [Wrong32, Uncopied])
    def test_a_fault_of_float32_alone_is_found(self, model):
        torch.manual_seed(0)
        assert refused(model(), X, Y)
        assert not refused(model().double(), X.double(), Y)

    def test_the_model_keeps_its_dtype(self):
        torch.manual_seed(0)
        model = net()
        parameters = [(p, p.data_ptr(), p.dtype) for p in model.parameters()]
        assert not refused(model, X, Y)
        assert [(p, p.data_ptr(), p.dtype) for p in model.parameters()] == parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU])
def test_kinks_at_the_parameters_themselves_are_no_fault(activation, dtype):
    """Zero biases meet zero inputs: torch takes one side of every kink, a difference along a line both."""
    for seed in range(20):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 16), activation(), nn.Linear(16, 16), activation(), nn.Linear(16, 3))
        for layer in model[::2]:
            nn.init.zeros_(layer.bias)
        assert not refused(model.to(dtype), X.to(dtype) * (torch.arange(10)[:, None] % 2), Y)


class Padded(nn.Module):
    """Tokens of which the last kind is padding; the table may also be the read-out."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table, self.drop = nn.Embedding(5, 4, padding_idx=4), nn.Dropout(0.3)
        self.out = nn.Linear(4, 5, bias=False)
        if tied:
            self.out.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.drop(self.table(ids).mean(1)).tanh())


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_padding_are_held_fixed_as_torch_does(tied):
    torch.manual_seed(0)
    model = Padded(tied).double()
    ids = torch.randint(0, 5, (7, 3))
    ids[:3, -1] = 4
    problem = Problem(model, nn.CrossEntropyLoss(), (ids, ids[:, 0]), batch_size=4)
    row = problem.blocks["table.weight"]
    row = slice(row.stop - 4, row.stop)
    H = ds.Hessian(problem, MaskKey(1)).to_dense()
    torch.testing.assert_close(H, cases.dense_hessian(problem, MaskKey(1)), rtol=0, atol=1e-14)
    torch.testing.assert_close(H, H.T, rtol=0, atol=1e-15)
    with ds.GradientNoise(problem, draws=4) as noise:
        W = noise.dropout.to_dense()
    rows = cases.sample_gradients(problem, 0, 4)
    c = rows - rows.mean(1, keepdim=True)
    torch.testing.assert_close(W, torch.einsum("imp,imq->pq", c, c) / 3 / 7**2, rtol=0, atol=1e-14)
    if not tied:
        assert H[row].norm() == W[row].norm() == 0


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_table_that_rescales_its_rows_is_refused_before_it_does(kind):
    model = nn.Sequential(kind(5, 4, max_norm=0.5), nn.Flatten())
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"must not write to parameters, got '0' with max_norm=0\.5"):
        Problem(model, nn.CrossEntropyLoss(), (torch.zeros(3, 1, dtype=torch.long), torch.zeros(3, dtype=torch.long)))
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_device_that_rounds_products_is_allowed_their_error(device, dtype):
    from types import SimpleNamespace

    from dropscope.modes import rounds_products

    x = SimpleNamespace(is_cuda=device == "cuda", dtype=dtype)
    rounded = device == "cuda" and dtype == torch.float32
    assert rounds_products(x) is rounded  # torch's default, of convolutions
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert rounds_products(x) is False
        torch.set_float32_matmul_precision("high")
        try:
            assert rounds_products(x) is rounded
        finally:
            torch.set_float32_matmul_precision("highest")
