"""The LSTM with derivatives of its own, and dropout inside LSTMs of other forms, in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dropscope import training
from dropscope.training.recurrent import lstm
from test_dropout_effects import KEY, dense_penalty, labels_forced, recorded


@pytest.mark.parametrize(("bidirectional", "batch_first"), list(itertools.product((False, True), repeat=2)))
def test_the_lstm_and_its_two_derivatives_are_torchs(bidirectional, batch_first):
    torch.manual_seed(0)
    layer = nn.LSTM(3, 4, 2, bidirectional=bidirectional, batch_first=batch_first).double()
    weights, rows = list(layer._flat_weights), 2 * (1 + bidirectional)
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    batch = 2 if batch_first else 5
    hx = [torch.randn(rows, batch, 4, dtype=torch.float64, requires_grad=True) for _ in "hc"]
    options = {"biases": True, "layers": 2, "bidirectional": bidirectional, "batch_first": batch_first}
    results = []
    for ours in (True, False):
        if ours:
            outputs = lstm(x, hx, weights, **options, between=lambda out: out)
        else:
            outputs = torch.lstm(x, hx, weights, True, 2, 0.0, True, bidirectional, batch_first)
        first = torch.autograd.grad(sum((o * o).sum() for o in outputs), [x, *hx, *weights], create_graph=True)
        second = torch.autograd.grad(sum(g.pow(3).sum() for g in first), [x, *hx, *weights])
        results.append([*outputs, *first, *second])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


class OtherLstm(nn.Module):
    """An LSTM on packed rows or with projections, with dropout between its layers and on its output."""

    def __init__(self, form):
        super().__init__()
        self.form, width = form, 2 if form == "projected" else 3
        self.lstm = nn.LSTM(3, 3, 2, dropout=0.3, batch_first=True, proj_size=2 if form == "projected" else 0)
        self.drop, self.out = nn.Dropout(0.3), nn.Linear(width, 3)

    def forward(self, x):
        if self.form == "projected":
            return self.out(self.drop(self.lstm(x)[0]))
        rows = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([1, 2]), batch_first=True, enforce_sorted=False)
        return self.out(self.drop(nn.utils.rnn.pad_packed_sequence(self.lstm(rows)[0], batch_first=True)[0]))


@pytest.mark.parametrize("form", ["packed", "projected"])
def test_lstms_of_other_forms_have_the_gauss_newton_penalty_of_their_dropout(form, monkeypatch):
    torch.manual_seed(0)
    model, x = OtherLstm(form).double(), torch.randn(2, 2, 3, dtype=torch.float64)
    sites, output = recorded(model, x)
    assert [site.name for site in sites] == ["lstm#0", "drop#0"]
    torch.testing.assert_close(output, model.eval()(x), rtol=1e-12, atol=1e-14)
    logits, y = output.flatten(0, 1), torch.tensor([0, 1, 2, 2])
    p, mean = logits.softmax(-1).detach(), 0.0
    for labels in itertools.product(range(3), repeat=4):
        chosen = torch.tensor(labels)
        at = p.gather(1, chosen[:, None])[:, 0]
        labels_forced(monkeypatch, p.cumsum(1).gather(1, chosen[:, None])[:, 0] - at / 2)
        value = training.explicit_penalty(sites, F.cross_entropy, logits, y, key=KEY).detach()
        mean += float(at.prod() * value)
    assert mean == pytest.approx(float(dense_penalty(sites, logits).detach()), rel=1e-12)
    noise = training.implicit_noise(sites, F.cross_entropy(logits, y), key=KEY)
    assert all(float(g.norm()) > 0 for g in torch.autograd.grad(noise, list(model.lstm.parameters())))
