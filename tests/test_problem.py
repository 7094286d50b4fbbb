"""The problem: its risk under any split and mask, its data and parameters, and the model left as found."""

from __future__ import annotations

import collections
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import cases
from cases import Custom, net, state
from dropscope.masks import MaskKey
from dropscope.problem import Problem

KEYS = [None, MaskKey(3, 2)]
X, Y = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 3


class TestRisk:
    @pytest.mark.parametrize("key", KEYS, ids=str)
    @pytest.mark.parametrize("name", cases.CASES)
    def test_risk_and_gradient_are_those_of_the_whole_data(self, name, key):
        problem = cases.CASES[name].problem()
        reference = cases.risk_function(problem, key)(cases.theta(problem))
        assert problem.risk(key) == pytest.approx(reference.item(), abs=1e-13)
        torch.testing.assert_close(problem.gradient(key), cases.dense_gradient(problem, key), rtol=0, atol=1e-13)

    @pytest.mark.parametrize("sharing", ["sample", "batch"])
    @pytest.mark.parametrize("name", cases.CASES)
    def test_several_draws_are_each_draw_alone(self, name, sharing):
        problem = cases.CASES[name].problem()
        for batch in problem.batches():
            together, weights = problem.sample_losses(batch, MaskKey(5, 1), draws=3, sharing=sharing)
            alone = [problem.sample_losses(batch, MaskKey(5, 1 + m), sharing=sharing)[0] for m in range(3)]
            assert together.shape == weights.shape == (3 * batch.size,)
            torch.testing.assert_close(together.view(-1, 3), torch.stack(alone, 1), rtol=0, atol=1e-13)

    def test_masks_do_not_depend_on_the_batch_size(self):
        values = []
        for batch_size in (11, 4, 1):
            problem = cases.CASES["mlp"].problem(batch_size=batch_size)
            batches = list(problem.batches())
            values.append(torch.cat([problem.sample_losses(batch, MaskKey(0), draws=2)[0] for batch in batches]))
        torch.testing.assert_close(values[1], values[0], rtol=0, atol=1e-14)
        torch.testing.assert_close(values[2], values[0], rtol=0, atol=1e-14)

    def test_the_gradient_of_several_draws_is_their_mean(self):
        problem = cases.CASES["regression"].problem()
        alone = torch.stack([problem.gradient(MaskKey(1, 4 + m)) for m in range(3)])
        torch.testing.assert_close(problem.gradient(MaskKey(1, 4), draws=3), alone.mean(0), rtol=0, atol=1e-15)
        assert (alone[0] - alone[1]).norm() > 1e-3

    def test_batch_statistics_stay_those_of_eval_mode_under_masks(self):
        problem = cases.CASES["batchnorm"].problem()
        before = copy.deepcopy(dict(problem.model.named_buffers()))
        problem.gradient(MaskKey(0))
        assert all(torch.equal(before[name], b) for name, b in problem.model.named_buffers())

    def test_float32_and_bfloat16_models_are_measured_in_their_own_type(self):
        exact = cases.CASES["mlp"].problem()
        for dtype, slack in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
            problem = cases.CASES["mlp"].problem(dtype)
            gradient = problem.gradient()
            assert gradient.dtype == problem.dtype == dtype
            torch.testing.assert_close(gradient.double(), exact.gradient(), rtol=0, atol=slack)


class TestData:
    @pytest.mark.parametrize(
        "data",
        [
            [X, Y],
            TensorDataset(X, Y),
            DataLoader(TensorDataset(X, Y), batch_size=4),
            [(X[:7], Y[:7]), (X[7:], Y[7:])],
        ],
        ids=["list", "dataset", "loader", "batches"],
    )
    def test_every_source_gives_the_same_risk(self, data):
        model = net()
        expected = Problem(model, nn.CrossEntropyLoss(), (X, Y))
        problem = Problem(model, nn.CrossEntropyLoss(), data)
        assert problem.risk(MaskKey(1)) == pytest.approx(expected.risk(MaskKey(1)), rel=1e-6)
        assert problem.n == 10
        assert torch.equal(torch.cat([batch.samples for batch in problem.batches()]), torch.arange(10))

    def test_longer_tuples_mappings_and_forward(self):
        class Sum(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = net()

            def forward(self, a, b):
                return self.net(a + b)

        model = Sum()
        risk = Problem(model, nn.CrossEntropyLoss(), (X, X, Y), batch_size=4).risk()
        mapping = {"a": X, "b": X, "labels": Y}
        assert Problem(model, nn.CrossEntropyLoss(), mapping, batch_size=4).risk() == risk
        loader = [collections.UserDict(a=X[i : i + 4], b=X[i : i + 4], labels=Y[i : i + 4]) for i in (0, 4, 8)]
        assert Problem(model, nn.CrossEntropyLoss(), loader).risk() == risk
        problem = Problem(model, nn.CrossEntropyLoss(), (X, Y), batch_size=4, forward=lambda m, b: m(b[0], b[0]))
        assert problem.risk() == risk
        Output = collections.namedtuple("Output", "logits extra")
        loss = lambda out, batch: F.cross_entropy(out.logits, batch["labels"], reduction="none")  # noqa: E731
        problem = Problem(model, loss, mapping, batch_size=4, forward=lambda m, b: Output(m(b["a"], b["b"]), 0))
        assert problem.risk() == pytest.approx(risk, rel=1e-6)

    def test_batches_repeat_and_select_rows(self):
        batch = next(iter(cases.CASES["lstm_time_major"].problem().batches()))
        twice = batch.repeat(2)
        assert twice.samples.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert torch.equal(twice.content[0][:, 1::2], batch.content[0])
        assert torch.equal(twice.content[1][::2], batch.content[1])
        one = batch.select(slice(1, 3))
        assert torch.equal(one.content[0], batch.content[0][:, 1:3])
        assert one.samples.tolist() == [1, 2]

    def test_a_loader_does_not_move_torchs_generator(self):
        before = torch.get_rng_state()
        Problem(net(), nn.CrossEntropyLoss(), DataLoader(TensorDataset(X, Y), batch_size=4)).gradient()
        assert torch.equal(torch.get_rng_state(), before)


class Shuffled(IterableDataset):
    """Draws its order from torch's generator, as a hand-written loader does."""

    def __iter__(self):
        return ((X[i], Y[i]) for i in torch.randperm(10))


class Dropping:
    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return iter([(X[:5], Y[:5]), (X[5:], Y[5:])][: 2 if self.passes < 3 else 1])


class Empty(Dataset):
    def __len__(self):
        return 0


def first_of(dataset, **options):
    return DataLoader(dataset, batch_size=4, **options)


BAD_DATA = [
    (iter([(X, Y)]), TypeError, "iterable more than once, got a one-shot list_iterator"),
    (((X, Y) for _ in range(2)), TypeError, "one-shot generator"),
    (3, TypeError, "data must be a tuple of tensors .* got int"),
    ([], ValueError, "data must not be empty, got an empty list"),
    ((X[:0], Y[:0]), ValueError, r"data must not be empty, got shapes \[\(0, 3\), \(0,\)\]"),
    (Empty(), ValueError, "data must not be empty, got a Dataset of length 0"),
    ((X, Y[:9]), ValueError, r"one length, got shapes \[\(10, 3\), \(9,\)\]"),
    ([(X, Y[:9])], ValueError, r"tensors of a batch must have one length, got \[10, 9\] in batch 0"),
    ((X.clone().fill_(float("nan")), Y), ValueError, "data must be finite, got NaN or Inf in tensor 0"),
    ([(X, Y), (X * float("inf"), Y)], ValueError, "data must be finite, got NaN or Inf in tensor 0 of batch 1"),
    (first_of(TensorDataset(X, Y), shuffle=True), ValueError, "keep its order, got a DataLoader with RandomSampler"),
    (first_of(TensorDataset(X, Y), drop_last=True), ValueError, "keep all samples, got a DataLoader with drop_last"),
    (first_of(Shuffled()), ValueError, "same at every pass, got a different batch 0 in pass"),
    (Dropping(), ValueError, "same at every pass, got 1 batches in pass 3 and 2 in the first"),
    ([("a", "b")], TypeError, "a batch must hold tensors, got tuple in batch 0"),
    ([(X,)], TypeError, r"a batch must be \(x, y\), a longer tuple or a mapping, got a tuple of 1"),
]


@pytest.mark.parametrize(("data", "error", "message"), BAD_DATA)
def test_bad_data_are_refused(data, error, message):
    with pytest.raises(error, match=message):
        Problem(net(), nn.CrossEntropyLoss(), data).risk()


def test_data_written_to_between_passes_are_noticed():
    inputs = X.clone()
    problem = Problem(net(), nn.CrossEntropyLoss(), (inputs, Y))
    problem.risk()
    inputs[0] += 1
    with pytest.raises(ValueError, match="different batch 0"):
        problem.risk()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": 3}, TypeError, "model must be a torch.nn.Module, got int"),
        ({"forward": 3}, TypeError, "forward must be callable"),
        ({"batch_dim": -1}, ValueError, "batch_dim must be an int >= 0, got -1"),
        ({"batch_dim": True}, ValueError, "batch_dim must be an int >= 0, got True"),
        ({"batch_size": True}, ValueError, "batch_size must be a positive int, got True"),
        ({"batch_size": 0}, ValueError, "batch_size must be a positive int, got 0"),
        ({"data": first_of(TensorDataset(X, Y)), "batch_size": 3}, ValueError, "batch_size must be None when data is"),
    ],
)
def test_bad_arguments_are_refused(options, error, message):
    arguments = {"model": net(), "loss": nn.CrossEntropyLoss(), "data": (X, Y)} | options
    with pytest.raises(error, match=message):
        Problem(**arguments)


def test_bad_vectors_and_draws_are_refused():
    problem = Problem(net(), nn.CrossEntropyLoss(), (X, Y))
    with pytest.raises(ValueError, match=r"v must have shape \(31,\), got \(3,\)"):
        problem.unflatten(torch.ones(3))
    with pytest.raises(TypeError, match=r"unflatten: v must be a torch.Tensor, got int"):
        problem.unflatten(3)
    with pytest.raises(ValueError, match="flatten: tensors must be 4"):
        problem.flatten([torch.ones(3)])
    with pytest.raises(ValueError, match="flatten: names must be"):
        problem.flatten({"x": torch.ones(3)})
    with pytest.raises(ValueError, match=r"flatten: 0.weight must have shape \(4, 3\), got \(3, 4\)"):
        problem.flatten([p.T if p.ndim == 2 else p for p in problem.params.values()])
    with pytest.raises(ValueError, match="draws must be an int >= 1, got 0"):
        problem.gradient(MaskKey(0), draws=0)
    with pytest.raises(ValueError, match="draws must be 1 when masks is None"):
        problem.sample_losses(next(iter(problem.batches())), draws=2)
    with pytest.raises(ValueError, match="delta must be finite"), problem.displaced(torch.full((31,), float("nan"))):
        pass


@pytest.mark.parametrize("method", ["risk", "gradient", "sample_losses"])
def test_a_key_of_another_kind_is_refused_before_the_model_runs(method):
    problem = Problem(net(), nn.CrossEntropyLoss(), (X, Y))
    problem.model.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    arguments = (next(iter(problem.data)),) if method == "sample_losses" else ()
    with pytest.raises(TypeError, match=f"{method}: masks must be a MaskKey or None, got int"):
        getattr(problem, method)(*arguments, masks=3)


class TestLeftAsFound:
    @pytest.mark.parametrize("name", cases.CASES)
    def test_after_a_computation(self, name):
        problem = cases.CASES[name].problem()
        problem.model.train()
        next(problem.model.children()).eval()
        before = state(problem.model)
        problem.gradient()
        problem.gradient(MaskKey(0), draws=2)
        problem.risk(MaskKey(0))
        assert state(problem.model) == before

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    @pytest.mark.parametrize("call", [0, 3, 8, 12, 20])
    def test_after_an_interruption(self, error, call):
        calls = 0

        def interrupt(module, out, x):
            nonlocal calls
            calls += 1
            if calls > call:
                raise error("stop")
            return F.dropout(out, 0.5, module.training)

        model = Custom(interrupt)
        problem = Problem(model, nn.CrossEntropyLoss(), (X, Y), batch_size=4)
        before = state(model)
        with pytest.raises((error, ValueError)):
            list(map(problem.gradient, [MaskKey(0)] * 9))
        assert state(model) == before

    def test_gradients_of_the_user_stay(self):
        model = net()
        model[0].weight.grad = torch.ones_like(model[0].weight)
        problem = Problem(model, nn.CrossEntropyLoss(), (X, Y))
        problem.gradient(MaskKey(0))
        assert torch.equal(model[0].weight.grad, torch.ones(4, 3))
        assert model[3].weight.grad is None

    def test_displaced_puts_back_the_very_tensors(self):
        problem = cases.CASES["lstm"].problem()
        delta = torch.randn(problem.dim, dtype=torch.float64)
        before, risk = state(problem.model), problem.risk()
        theta = cases.theta(problem)
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            with problem.displaced(delta):
                torch.testing.assert_close(cases.theta(problem), theta + delta, rtol=0, atol=0)
                assert problem.risk() != risk
                raise KeyboardInterrupt
        assert state(problem.model) == before
        assert problem.risk() == risk

    def test_under_no_grad_gradients_are_still_taken(self):
        problem = Problem(net(), nn.CrossEntropyLoss(), (X, Y))
        expected = problem.gradient()
        with torch.no_grad():
            assert torch.equal(problem.gradient(), expected)
        with torch.inference_mode():
            assert torch.equal(problem.gradient(), expected)


class TestNotFinite:
    @pytest.mark.parametrize("sample", [1, 7])  # the probes look at the first few
    def test_a_loss_names_batch_and_sample(self, sample):
        scale = X.clone()
        scale[sample] = 1e30
        problem = Problem(net(0.0), lambda out, y: (out * y).square().sum(1), (X, scale), batch_size=4)
        with pytest.raises(ValueError, match=rf"losses must be finite, got inf at batch .* \(sample {sample}\)"):
            problem.risk()

    @pytest.mark.parametrize("sample", [1, 6])
    def test_a_gradient_names_parameter_and_batch(self, sample):
        inputs = X.clone()
        inputs[sample] = 0.0

        def loss(out, y):
            return (out - torch.zeros(3)).abs().sum(1)

        model = Custom(lambda m, out, x: (m.map.weight * x[:, None]).pow(2).sum(2).sqrt() + m.map.bias)
        problem = Problem(model, loss, (inputs, Y), batch_size=4)
        with pytest.raises(ValueError, match=rf"gradients must be finite, .*'map.weight' at batch {sample // 4}"):
            problem.gradient()


def test_plan_and_repr_can_be_read():
    problem = Problem(net(), nn.CrossEntropyLoss(), (X, Y))
    assert repr(problem) == "Problem(Sequential, CrossEntropyLoss(), n=10, dim=31, torch.float32)"
    assert problem.plan().splitlines()[0].split() == ["0.weight", "(4,", "3)", "not", "measured", "yet"]
