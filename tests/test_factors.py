"""Captured per-sample gradients against one backward a row, for every model and every route."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cases import CASES, sample_gradients
from dropscope.factors import Table
from dropscope.factors.blocks import DenseBlock, FactorBlock
from dropscope.factors.fallback import dense_rows
from dropscope.masks import MaskKey
from dropscope.problem import Problem


def table_of(problem, draws=3, seed=5, cache="factors", memory=None, sharing="sample"):
    return Table(problem, draws, seed, cache, sharing, memory, False)


def materialised(table):
    """All rows of a table through its own products, (rows, dim)."""
    eye = torch.eye(table.problem.dim, dtype=table.problem.dtype)
    return torch.cat([chunk.project(eye) for chunk in table.chunks()])


@pytest.mark.parametrize("name", CASES)
def test_rows_are_the_gradients_of_one_sample_and_draw(name):
    problem = CASES[name].problem()
    table = table_of(problem)
    truth = sample_gradients(problem, 5, 3).flatten(0, 1)
    torch.testing.assert_close(materialised(table), truth, rtol=0, atol=1e-10 * float(truth.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_every_answer_is_that_of_the_rows(name):
    """accumulate, Gram and per-sample Gram against the dense rows; several passes a batch by a small memory."""
    problem = CASES[name].problem()
    table = table_of(problem, draws=4)
    table.step = 6
    G = sample_gradients(problem, 5, 4)
    rows = G.flatten(0, 1)
    S = torch.randn(len(rows), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = torch.zeros(3, problem.dim, dtype=torch.float64)
    grams = []
    for chunk in table.chunks():
        start = int(chunk.ids[0]) * chunk.draws
        chunk.accumulate(S[start : start + chunk.rows], out)
        grams.append(chunk.sample_gram())
    close = {"rtol": 0, "atol": 1e-9 * max(1.0, float(rows.square().sum()))}
    torch.testing.assert_close(out, S.T @ rows, **close)
    torch.testing.assert_close(torch.cat(grams), G @ G.mT, **close)
    if table.complete:
        torch.testing.assert_close(table.gram(), rows @ rows.T, **close)


@pytest.mark.parametrize("name", ["mlp", "conv", "gpt", "transformer", "shared"])
def test_matrix_free_products_are_those_of_the_rows(name):
    """A budget with no room for materialised rows sends what has no rule to products; here, everything."""
    problem = CASES[name].problem()
    table = table_of(problem)
    for parameter in table.plan.routes:
        table.plan.routes[parameter] = type(table.plan.routes[parameter])("matrix_free", "forced")
    table.plan.biases.clear()
    truth = sample_gradients(problem, 5, 3)
    rows = truth.flatten(0, 1)
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(2, problem.dim, dtype=torch.float64, generator=generator)
    S = torch.randn(len(rows), 2, dtype=torch.float64, generator=generator)
    out, P, grams = torch.zeros_like(V), [], []
    for chunk in table.chunks():
        P.append(chunk.project(V))
        chunk.accumulate(S[int(chunk.ids[0]) * 3 :][: chunk.rows], out)
        grams.append(chunk.sample_gram())
    torch.testing.assert_close(torch.cat(P), rows @ V.T, rtol=0, atol=1e-12 * float(rows.norm() * V.norm()))
    torch.testing.assert_close(out, S.T @ rows, rtol=0, atol=1e-12 * float(rows.norm() * S.norm()))
    torch.testing.assert_close(torch.cat(grams), truth @ truth.mT)
    with pytest.raises(ValueError, match="products instead"):
        table.gram()


def test_linear_layers_go_by_factors_and_share_unmasked_inputs():
    table = table_of(CASES["mlp"].problem())
    routes = table.plan.routes
    assert {routes[name].kind for name in routes if name.endswith("weight")} == {"factors"}
    chunk = next(iter(table.chunks()))
    first = chunk.blocks[0]
    assert isinstance(first, FactorBlock)
    assert first.A.shape[0] == chunk.samples
    assert first.bias is not None
    later = chunk.blocks[1]
    assert later.A.shape[0] == chunk.rows
    assert "shared by the draws" in table.problem.plan()


@pytest.mark.parametrize("name", CASES)
def test_rows_by_groups_are_those_of_one_sample_at_a_time(name):
    """Groups that do not divide the batch, all parameters of every model, masks on and off."""
    problem = CASES[name].problem()
    batch = next(iter(problem.batches()))
    names = list(problem.params)
    for key, draws in ((MaskKey(3, 2), 3), (None, 1)):
        truth = dense_rows(problem, batch, names, key, draws)
        found = dense_rows(problem, batch, names, key, draws, group=4)
        for rows, expected in zip(found, truth, strict=True):
            torch.testing.assert_close(rows, expected, rtol=0, atol=1e-12 * max(1.0, float(expected.abs().max())))


def test_a_layer_used_thrice_is_the_sum_of_its_uses():
    table = table_of(CASES["shared"].problem())
    chunk = next(iter(table.chunks()))
    block = next(b for b in chunk.blocks if b.columns[0] == table.problem.blocks["layer.weight"])
    assert isinstance(block, (FactorBlock, DenseBlock))
    assert "layer.weight" in table.plan.names("factors", "rows")


class Scrambled(nn.Module):
    """A linear layer that sees its rows in reverse order: its factors sum to the gradient, with the wrong rows."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.out(F.dropout(torch.tanh(self.hidden(x.flip(0))).flip(0), 0.4, self.training))


class Sliced(nn.Module):
    """A parameter met through a slice, which no rule covers, beside one that is broadcast."""

    def __init__(self):
        super().__init__()
        self.scale, self.table, self.out = nn.Parameter(torch.ones(3)), nn.Parameter(torch.randn(2, 3)), nn.Linear(3, 1)

    def forward(self, x):
        return self.out(F.dropout(torch.sin(x * self.scale + self.table[1]), 0.5, self.training))


def seven_samples(model, batch_size):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = model().double()
        data = (torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 1, dtype=torch.float64))
    return Problem(net, nn.MSELoss(), data, batch_size=batch_size)


@pytest.mark.parametrize(("model", "failing"), [(Scrambled, "hidden.weight"), (Sliced, "table")])
def test_what_capture_gets_wrong_is_noticed_and_taken_otherwise(model, failing):
    problem = seven_samples(model, batch_size=3)
    table = table_of(problem)
    assert table.plan.routes[failing].kind == "dense"
    reason = "do not reproduce" if model is Scrambled else "no function with a rule"
    assert reason in problem.plan()
    torch.testing.assert_close(materialised(table), sample_gradients(problem, 5, 3).flatten(0, 1))


class Branching(Sliced):
    """Takes the sign of a number of the batch into an `if`, which vmap cannot."""

    def forward(self, x):
        scale = self.scale if float((x * 0).sum()) == 0.0 else -self.scale
        return self.out(F.dropout(torch.sin(x * scale + self.table[1]), 0.5, self.training))


@pytest.mark.parametrize(("model", "grouped"), [(Sliced, True), (Branching, False)])
def test_what_vmap_cannot_batch_goes_one_sample_at_a_time(model, grouped):
    problem = seven_samples(model, batch_size=4)
    table = table_of(problem)
    assert table.plan.names("dense")
    assert table.plan.grouped is grouped
    torch.testing.assert_close(materialised(table), sample_gradients(problem, 5, 3).flatten(0, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("most", [10, 150, 1 << 22])
def test_tables_too_large_for_factors_and_sums_go_elsewhere_however_many_rows(most, monkeypatch):
    """30 rows of 4, 6 tokens: 204 numbers as factors, 120 as sums; a trial on a few rows and passes of all agree."""
    monkeypatch.setattr("dropscope.factors.layers.MOST_NUMBERS", most)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(30, 4, padding_idx=1), nn.Dropout(0.3), nn.Flatten(), nn.Linear(24, 2))
        data = (torch.randint(0, 30, (40, 6)), torch.randint(0, 2, (40,)))
        problem = Problem(model.double(), nn.CrossEntropyLoss(), data)
    table = table_of(problem)
    assert table.plan.routes["0.weight"].kind == ("dense" if most == 10 else "rows")
    assert ("takes 120 numbers" in problem.plan()) == (most == 10)
    truth = sample_gradients(problem, 5, 3).flatten(0, 1)
    torch.testing.assert_close(materialised(table), truth, rtol=0, atol=1e-12)


class Conv1D(nn.Module):
    """GPT-2's linear layer: addmm with the weight transposed, on flattened rows; and a bare matrix product."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))
        self.mix = nn.Parameter(torch.randn(4, 2))
        self.norm, self.place = nn.LayerNorm(4), nn.Embedding(5, 3)
        self.conv, self.groups = nn.Conv1d(4, 4, 2, padding=1, stride=2), nn.GroupNorm(2, 4)

    def forward(self, x):
        x = x + self.place(torch.arange(x.shape[1]).expand(x.shape[:2]))
        h = torch.addmm(self.bias, x.view(-1, 3), self.weight).view(*x.shape[:2], 4)
        h = F.dropout(torch.tanh(self.norm(h)), 0.3, self.training)
        h = torch.tanh(self.groups(self.conv(h.mT))).mT
        return (h @ self.mix).mean(1)


def test_rules_of_the_other_functions():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        problem = Problem(
            Conv1D().double(),
            nn.MSELoss(),
            (torch.randn(6, 5, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)),
        )
    table = table_of(problem)
    assert set(problem.params) == set(table.plan.names("factors", "rows"))
    torch.testing.assert_close(materialised(table), sample_gradients(problem, 5, 3).flatten(0, 1))


CONVOLUTIONS = {
    "plain": (1, {"kernel_size": 3}),
    "strided": (1, {"kernel_size": 2, "stride": 3, "padding": 1, "dilation": 2}),
    "valid": (2, {"kernel_size": (2, 3), "padding": "valid"}),
    "same": (2, {"kernel_size": (2, 4), "padding": "same", "dilation": (3, 1), "bias": False}),
    "grouped": (2, {"kernel_size": 3, "padding": (0, 1), "stride": (2, 1), "groups": 2}),
    "depthwise": (1, {"kernel_size": 3, "padding": "same", "groups": 4}),
    "circular": (2, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}),
    "volume": (3, {"kernel_size": (1, 2, 2), "stride": (1, 2, 1), "padding": 1}),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_of_every_kind(name, memory_format):
    """One before any mask, whose input the draws share, and one after."""
    dims, options = CONVOLUTIONS[name]
    if memory_format == torch.channels_last and dims != 2:
        pytest.skip("of images only")
    conv, drop = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1], (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)[dims - 1]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.randn(5, 4, *(8, 7, 3)[:dims], dtype=torch.float64)
        x = x.contiguous(memory_format=memory_format) if dims == 2 else x
        net = nn.Sequential(conv(4, 4, **options), nn.Tanh(), drop(0.3), conv(4, 4, **options), nn.Tanh(), nn.Flatten())
        net = net.double()
        net.append(nn.Linear(net(x).shape[1], 2).double())
        problem = Problem(net, nn.MSELoss(), (x, torch.randn(5, 2, dtype=torch.float64)))
    table = table_of(problem)
    assert set(problem.params) == set(table.plan.names("factors", "rows")), problem.plan()
    truth = sample_gradients(problem, 5, 3).flatten(0, 1)
    torch.testing.assert_close(materialised(table), truth, rtol=0, atol=1e-12 * float(truth.abs().max()))


class Vision(nn.Module):
    """What vision and language transformers do with parameters beside matrix products, batch first or time first."""

    def __init__(self, time_major):
        super().__init__()
        place, self.time_major = ((6, 1, 4) if time_major else (1, 6, 4)), time_major
        self.token, self.place = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(place))
        self.gamma, self.gate = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(()))
        self.norm, self.mix, self.out = nn.RMSNorm(4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = torch.cat([self.token.expand(len(x), -1, -1), F.dropout(x, 0.3, self.training)], 1)
        h = (h.transpose(0, 1).contiguous() if self.time_major else h) + self.place
        h = h + torch.tanh(self.mix(self.norm(h))) * self.gamma
        return self.out((torch.mul(self.gate, h)).mean(0 if self.time_major else 1))


class Placed(nn.Module):
    """Positions looked up once for the whole batch, as GPT-2 and BERT do; tables of few rows and of many."""

    def __init__(self):
        super().__init__()
        self.few, self.many = nn.Embedding(5, 4), nn.Embedding(60, 4, padding_idx=2)
        self.kind, self.out = nn.Embedding(2, 4), nn.Linear(4, 2)

    def forward(self, x):
        where = torch.arange(5).unsqueeze(0)
        h = F.dropout(x, 0.3, self.training) + self.few(where)
        h = torch.tanh(self.many(where * 2) + h)
        return self.out(h + self.kind(torch.zeros_like(where))).mean(1)


class Normed(nn.Sequential):
    """Batch norms in eval mode, one without a weight."""

    def __init__(self):
        head = (nn.Dropout2d(0.3), nn.Conv2d(3, 2, 2), nn.BatchNorm2d(2, affine=False), nn.Flatten(), nn.Linear(8, 2))
        super().__init__(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), *head)
        for module in self:
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)


@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: Vision(False), (5, 4)), (lambda: Vision(True), (5, 4)), (Placed, (5, 4)), (Normed, (1, 4, 4))],
    ids=["batch_first", "time_first", "positions", "batch_norm"],
)
def test_parameters_that_scale_and_shift(make, shape):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        data = (torch.randn(7, *shape, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64))
        problem = Problem(make().double(), nn.MSELoss(), data, batch_size=3)
    table = table_of(problem)
    assert set(problem.params) == set(table.plan.names("factors", "rows")), problem.plan()
    truth = sample_gradients(problem, 5, 3).flatten(0, 1)
    torch.testing.assert_close(materialised(table), truth, rtol=0, atol=1e-12 * float(truth.abs().max()))


@pytest.mark.parametrize("batch_size", [1, 3, 11])
def test_rows_do_not_depend_on_the_batches(batch_size):
    whole = materialised(table_of(CASES["mlp"].problem(batch_size=11)))
    split = materialised(table_of(CASES["mlp"].problem(batch_size=batch_size)))
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-14)


@pytest.mark.parametrize("cache", ["disk", "recompute", "bf16"])
def test_caches_hold_the_same_rows(cache):
    problem = CASES["gpt"].problem()
    table = table_of(problem, cache=cache)
    truth = sample_gradients(problem, 5, 3).flatten(0, 1)
    close = {"rtol": 0.02, "atol": 0.02 * float(truth.abs().max())} if cache == "bf16" else {}
    torch.testing.assert_close(materialised(table), truth, **close)
    torch.testing.assert_close(materialised(table), truth, **close)
    folder = table.folder
    table.close()
    assert folder is None or not folder.exists()


def test_memory_decides_between_storing_and_making_again():
    plan = table_of(CASES["mlp"].problem()).plan
    need = 11 * (plan.shared_bytes + 3 * plan.draw_bytes)
    assert table_of(CASES["mlp"].problem(), cache="auto", memory=2 * need).cache == "factors"
    assert table_of(CASES["mlp"].problem(), cache="auto", memory=need - 1).cache == "recompute"
    with pytest.raises(ValueError, match=rf"memory must be at least {need} bytes"):
        table_of(CASES["mlp"].problem(), cache="factors", memory=need - 1)
    with pytest.raises(ValueError, match="memory must be at least"):
        table_of(CASES["mlp"].problem(), cache="auto", memory=100)


def test_counted_bytes_are_the_bytes_stored():
    for name in ("mlp", "gpt", "conv", "lstm"):
        problem = CASES[name].problem()
        table = table_of(problem)
        stored = sum(chunk.nbytes for chunk in table.chunks())
        biases = sum(problem.params[b].numel() for b in table.plan.biases.values()) * 8 * 3
        assert stored == (table.plan.shared_bytes + 3 * table.plan.draw_bytes - biases) * problem.n


class Lowered(nn.Sequential):
    """Computes in bfloat16 inside, though its parameters are float32."""

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


def test_autocast_inside_the_model_keeps_the_factors():
    """Inputs and output gradients rounded as the model's own weight gradients see them."""
    torch.manual_seed(0)
    model = Lowered(nn.Linear(6, 9), nn.LayerNorm(9), nn.Tanh(), nn.Dropout(0.3), nn.Linear(9, 3))
    problem = Problem(model, nn.CrossEntropyLoss(), (torch.randn(7, 6), torch.randint(0, 3, (7,))))
    table = table_of(problem)
    rows, truth = materialised(table), sample_gradients(problem, 5, 3).flatten(0, 1)
    assert problem.routes["0.weight"].startswith("factors")
    assert float((rows - truth).norm() / truth.norm()) < 0.01


class Explosive(nn.Module):
    """Its gradient, not its loss, is infinite for samples with a zero."""

    def __init__(self):
        super().__init__()
        self.first, self.out = nn.Linear(2, 2, bias=False), nn.Linear(2, 1)

    def forward(self, x):
        return self.out(F.dropout(self.first(x).abs().sqrt(), 0.2, self.training))


def test_a_gradient_that_is_not_finite_names_its_batch():
    X = torch.ones(9, 2)
    problem = Problem(Explosive(), nn.MSELoss(), (X, torch.zeros(9, 1)), batch_size=3)
    problem.check()
    X[7] = 0.0
    problem = Problem(problem.model, nn.MSELoss(), (X, torch.zeros(9, 1)), batch_size=3)
    with pytest.raises(ValueError, match="batch 2"):
        materialised(table_of(problem))


def test_an_interrupted_capture_leaves_the_model_clean():
    problem = CASES["mlp"].problem()
    table = table_of(problem)
    modes = [m.training for m in problem.model.modules()]
    state = torch.get_rng_state()

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = problem.model[3].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(table.chunks())
    handle.remove()
    assert [m.training for m in problem.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in problem.model.parameters())
    torch.testing.assert_close(materialised(table), sample_gradients(problem, 5, 3).flatten(0, 1))
