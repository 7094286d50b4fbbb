"""Every torch loss with a per-element form: the risk of ragged batches is torch's own loss of the whole data set."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dropscope.losses import causal_lm, masked_lm
from dropscope.problem import Problem

N = 11


class Head(nn.Module):
    """A linear map of each sample to an output of any shape."""

    def __init__(self, *shape, finish=lambda out: out):
        super().__init__()
        self.shape, self.finish = shape, finish
        self.map = nn.Linear(3, int(torch.Size(shape).numel()))

    def forward(self, x):
        return self.finish(torch.tanh(self.map(x)).unflatten(-1, self.shape))


def weight(*shape):
    return torch.linspace(0.5, 2.0, int(torch.Size(shape).numel()), dtype=torch.float64).view(shape)


def classes(k, *shape, ignore=None):
    target = torch.randint(0, k, (N, *shape), generator=torch.Generator().manual_seed(1))
    if ignore is not None:
        target.view(-1)[::4] = ignore
    return target


def normal(*shape, seed=2):
    return torch.randn(N, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def signs(*shape):
    return normal(*shape).sign()


def log_softmax(out):
    return out.log_softmax(1)


def multilabels():
    target = torch.full((N, 4), -1)
    target[:, 0], target[::2, 1] = classes(4)[:], 3 - classes(4)[::2]
    target[target[:, 1] == target[:, 0], 1] = -1
    return target


CASES = {
    "ce": (nn.CrossEntropyLoss(), Head(4), classes(4)),
    "ce sum": (nn.CrossEntropyLoss(reduction="sum"), Head(4), classes(4)),
    "ce weight": (nn.CrossEntropyLoss(weight=weight(4)), Head(4), classes(4)),
    "ce ignore": (nn.CrossEntropyLoss(ignore_index=2), Head(4), classes(4)),
    "ce ignore -100": (nn.CrossEntropyLoss(weight=weight(4)), Head(4, 5), classes(4, 5, ignore=-100)),
    "ce smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), Head(4), classes(4)),
    "ce all": (
        nn.CrossEntropyLoss(weight=weight(4), ignore_index=1, label_smoothing=0.1),
        Head(4, 2, 3),
        classes(4, 2, 3),
    ),
    "ce all sum": (
        nn.CrossEntropyLoss(weight=weight(4), ignore_index=1, label_smoothing=0.1, reduction="sum"),
        Head(4, 2),
        classes(4, 2),
    ),
    "ce probabilities": (nn.CrossEntropyLoss(), Head(4), normal(4).softmax(1)),
    "ce probabilities weight": (
        nn.CrossEntropyLoss(weight=weight(4), label_smoothing=0.1),
        Head(4, 3),
        normal(4, 3).softmax(1),
    ),
    "nll": (nn.NLLLoss(weight=weight(4), ignore_index=0), Head(4, finish=log_softmax), classes(4)),
    "nll image": (nn.NLLLoss(), Head(4, 2, 2, finish=log_softmax), classes(4, 2, 2)),
    "mse": (nn.MSELoss(), Head(2), normal(2)),
    "mse vector": (nn.MSELoss(), Head(1, finish=lambda out: out.squeeze(1)), normal()),
    "mse sum": (nn.MSELoss(reduction="sum"), Head(2, 3), normal(2, 3)),
    "l1": (nn.L1Loss(), Head(2), normal(2)),
    "smooth l1": (nn.SmoothL1Loss(beta=0.3), Head(2), normal(2)),
    "huber": (nn.HuberLoss(delta=0.3), Head(2), normal(2)),
    "bce": (nn.BCELoss(weight=weight(2)), Head(2, finish=torch.sigmoid), normal(2).sigmoid()),
    "bce logits": (nn.BCEWithLogitsLoss(weight=weight(1, 2), pos_weight=weight(2)), Head(2), normal(2).sigmoid()),
    "kl": (nn.KLDivLoss(), Head(4, finish=log_softmax), normal(4).softmax(1)),
    "kl batchmean": (nn.KLDivLoss(reduction="batchmean"), Head(4, finish=log_softmax), normal(4).softmax(1)),
    "kl log": (
        nn.KLDivLoss(reduction="batchmean", log_target=True),
        Head(4, finish=log_softmax),
        normal(4).log_softmax(1),
    ),
    "kl sum": (nn.KLDivLoss(reduction="sum"), Head(4, finish=log_softmax), normal(4).softmax(1)),
    "poisson": (nn.PoissonNLLLoss(full=True), Head(2), normal(2).abs().mul(3).round()),
    "poisson rate": (nn.PoissonNLLLoss(log_input=False), Head(2, finish=torch.exp), normal(2).abs().round()),
    "gaussian": (
        nn.GaussianNLLLoss(full=True),
        Head(2, 2, finish=lambda out: (out[:, 0], out[:, 1].exp())),
        normal(2),
    ),
    "soft margin": (nn.SoftMarginLoss(), Head(2), signs(2)),
    "multi margin": (nn.MultiMarginLoss(p=2, margin=0.7, weight=weight(4)), Head(4), classes(4)),
    "multi label margin": (nn.MultiLabelMarginLoss(), Head(4), multilabels()),
    "multi label soft margin": (nn.MultiLabelSoftMarginLoss(weight=weight(4)), Head(4), classes(2, 4).double()),
    "hinge embedding": (nn.HingeEmbeddingLoss(margin=0.4), Head(2), signs(2)),
    "cosine": (nn.CosineEmbeddingLoss(margin=0.1), Head(2, 3, finish=lambda out: (out[:, 0], out[:, 1])), signs()),
    "ranking": (nn.MarginRankingLoss(margin=0.1), Head(2, finish=lambda out: (out[:, 0], out[:, 1])), signs()),
    "triplet": (nn.TripletMarginLoss(margin=0.6), Head(3, 4, finish=lambda out: tuple(out.unbind(1))), classes(2)),
}


def torchs_own(loss, output, target):
    if isinstance(loss, nn.TripletMarginLoss):
        return loss(*output)
    if isinstance(loss, nn.GaussianNLLLoss):
        return loss(output[0], target, output[1])
    return loss(*output, target) if isinstance(output, tuple) else loss(output, target)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss by both the batch size:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_risk_and_gradient_are_torchs_of_the_full_batch(name):
    loss, head, target = CASES[name]
    model, X = head.double(), normal(3, seed=5)
    parameters = list(model.parameters())
    value = torchs_own(loss, model(X), target)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, parameters)])
    for batch_size in (N, 7, 3, 1):
        problem = Problem(model, loss, (X, target), batch_size=batch_size)
        assert abs(problem.risk() - value.item()) <= 1e-12 * max(1, abs(value.item()))
        torch.testing.assert_close(problem.gradient(), gradient, rtol=0, atol=1e-12)


def test_sample_values_and_weights_make_the_gradient():
    """∇R = (1/n) Σ gᵢ with gᵢ = scale·∇sᵢ, also where the weights differ."""
    loss, model, target = CASES["ce all"]
    problem = Problem(model.double(), loss, (normal(3), target), batch_size=4)
    total, count = 0.0, 0.0
    for batch in problem.batches():
        values, weights = problem.sample_losses(batch)
        assert values.shape == weights.shape == (batch.size,)
        assert not weights.requires_grad
        grads = torch.autograd.grad(problem.scale * values.sum(), list(problem.params.values()))
        total, count = total + problem.flatten(grads), count + float(weights.sum())
    torch.testing.assert_close(total / problem.n, problem.gradient(), rtol=0, atol=1e-13)
    assert count == pytest.approx(problem.total_weight, rel=1e-14)


def test_weights_sum_to_one_under_sum_reduction():
    problem = Problem(Head(2).double(), nn.MSELoss(reduction="sum"), (normal(3), normal(2)), batch_size=4)
    assert problem.total_weight == 1.0
    assert problem.scale == N
    assert sum(float(problem.sample_losses(batch)[1].sum()) for batch in problem.batches()) == pytest.approx(1.0)


def test_a_callable_gives_values_or_values_and_weights():
    X, y, model = normal(3), classes(4), Head(4).double()
    w = weight(4)
    problem = Problem(model, lambda out, t: F.cross_entropy(out, t, reduction="none"), (X, y), batch_size=4)
    assert problem.risk() == pytest.approx(F.cross_entropy(model(X), y).item(), abs=1e-13)
    weighted = Problem(model, lambda out, t: (F.cross_entropy(out, t, w, reduction="none"), w[t]), (X, y), batch_size=4)
    assert weighted.risk() == pytest.approx(F.cross_entropy(model(X), y, w).item(), abs=1e-13)
    unreduced = Problem(model, nn.CrossEntropyLoss(reduction="none"), (X, y), batch_size=4)
    assert unreduced.risk() == problem.risk()


def test_a_subclass_with_a_forward_of_its_own_is_a_callable():
    class Doubled(nn.MSELoss):
        def forward(self, out, target):
            return 2 * (out - target).square().mean(1)

    model, X, y = Head(2).double(), normal(3), normal(2)
    assert Problem(model, Doubled(), (X, y)).risk() == pytest.approx(2 * F.mse_loss(model(X), y).item(), abs=1e-13)


class Sequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(6, 4), nn.Linear(4, 6)

    def forward(self, input_ids, attention_mask=None):
        return self.out(torch.tanh(self.embed(input_ids).cumsum(1)))


@pytest.mark.parametrize("shift", [True, False])
def test_language_models_average_over_all_tokens(shift):
    model = Sequences().double()
    ids = classes(6, 5)
    labels = ids.clone()
    labels[2, 2:], labels[5, 1:], labels[7, :] = -100, -100, -100
    logits = model(ids)
    if shift:
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    else:
        expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss = causal_lm() if shift else masked_lm()
    for data in ((ids, labels), {"input_ids": ids, "labels": labels}):
        problem = Problem(model, loss, data, batch_size=3)
        assert problem.risk() == pytest.approx(expected.item(), abs=1e-13)


def test_causal_lm_takes_padding_from_the_attention_mask():
    model, ids = Sequences().double(), classes(6, 5)
    mask = torch.ones_like(ids)
    mask[3, 2:], mask[4, 4:] = 0, 0
    expected = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids.masked_fill(mask == 0, -100)[:, 1:].flatten())
    problem = Problem(model, causal_lm(), {"input_ids": ids, "attention_mask": mask}, batch_size=4)
    assert problem.risk() == pytest.approx(expected.item(), abs=1e-13)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (nn.CrossEntropyLoss, TypeError, r"loss must be an instance, e.g. CrossEntropyLoss\(\)"),
        ("ce", TypeError, "loss must be a torch loss or a callable, got str"),
        (nn.CTCLoss(), TypeError, "CTCLoss has no per-sample form"),
        (nn.BCEWithLogitsLoss(weight=torch.ones(N, 1)), ValueError, "weight must not vary along the sample"),
        (F.mse_loss, ValueError, "values of shape .*got a scalar; return one value per sample"),
        (lambda out, y: (out - y).square(), ValueError, r"got shape \(6, 2\)"),
        (lambda out, y: ((out - y).square().sum(1), torch.ones(())), ValueError, "weights of shape .*got a scalar"),
        (lambda out, y: 1.0, TypeError, "loss must return tensors, got float"),
        (nn.CosineEmbeddingLoss(), TypeError, "the model must return 2 tensors"),
    ],
)
def test_losses_without_a_value_per_sample_are_refused(loss, error, message):
    with pytest.raises(error, match=message):
        Problem(Head(2).double(), loss, (normal(3), normal(2))).risk()


def test_outputs_and_targets_must_have_one_shape():
    """torch would broadcast (n,) against (n, 1) to n² elements."""
    with pytest.raises(ValueError, match=r"one shape, got \(6, 1\) and \(6,\)"):
        Problem(Head(1).double(), nn.MSELoss(), (normal(3), normal())).risk()


def test_a_model_that_returns_a_tuple_is_refused_with_the_remedy():
    with pytest.raises(TypeError, match="a tuple of 2; give forward="):
        Problem(Head(2, finish=lambda out: (out, out)).double(), nn.MSELoss(), (normal(3), normal(2))).risk()


def test_a_risk_without_weight_is_refused():
    target = torch.full((N,), -100)
    with pytest.raises(ValueError, match="total weight must be positive, got 0"):
        Problem(Head(4).double(), nn.CrossEntropyLoss(), (normal(3), target)).check()
