"""The explicit penalty and the implicit noise against their definitions, in float64."""

import gc
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dropscope as ds
from dropscope import training
from dropscope.training import explicit as explicit_module
from dropscope.training import likelihood as likelihood_module
from dropscope.training.sites import Sites, derived

KEY = ds.MaskKey(3, 7)


class Tokens(nn.Module):
    """A tiny language model: dropout after the embedding, between the layers, at the output."""

    def __init__(self, vocabulary=3, width=3, q=0.3):
        super().__init__()
        self.embedding, self.drop = nn.Embedding(vocabulary, width), nn.Dropout(q)
        self.lstm = nn.LSTM(width, width, 2, dropout=q, batch_first=True)
        self.out = nn.Linear(width, vocabulary)

    def forward(self, x):
        return self.out(self.drop(self.lstm(self.drop(self.embedding(x)))[0]))


class WeightDrop(nn.Module):
    """Linear with DropConnect."""

    def __init__(self, q):
        super().__init__()
        self.weight, self.q = nn.Parameter(torch.randn(2, 2)), q

    def forward(self, x):
        return F.linear(x, F.dropout(self.weight, self.q, self.training))


def mlp(width=4, outputs=2, q=0.3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Dropout(q), nn.Linear(width, outputs)).double()


def batch(n=3, outputs=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, dtype=torch.float64, generator=generator)
    return x, torch.randn(n, outputs, dtype=torch.float64, generator=generator)


def recorded(model, x, **options):
    with training.dropout_sites(torch.arange(len(x)), model=model, **options) as sites:
        output = model(x)
    return sites, output


def flat_gradient(value, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()), retain_graph=True)])


def masks_of(units, kept):
    """Every mask of so many units, scaled, with its probability."""
    for bits in itertools.product((0.0, 1.0), repeat=units):
        mask = torch.tensor(bits, dtype=torch.float64)
        yield mask / kept, float((kept**mask * (1 - kept) ** (1 - mask)).prod())


def labels_forced(monkeypatch, u):
    monkeypatch.setattr(likelihood_module, "uniform", lambda *_: u.flatten())


def test_explicit_penalty_is_exactly_what_dropout_adds_to_a_squared_loss():
    model, (x, y) = mlp(), batch()
    kept = ds.keep_probability(0.3)
    h = model[:2](x)
    mean = sum(weight * (model[3](h * mask) - y).square().mean() for mask, weight in masks_of(4, kept))
    sites, output = recorded(model, x)
    penalty = training.explicit_penalty(sites, nn.MSELoss(), output, y, key=KEY, curvature="exact")
    assert float((mean - F.mse_loss(output, y)).detach()) == pytest.approx(float(penalty.detach()), rel=1e-12)
    # C's R1 in closed form, for (1/W) Σ (f − y)²
    r1 = (1 - kept) / kept * (h.square() @ model[3].weight.square().sum(0)).sum() / y.numel()
    assert float(penalty.detach()) == pytest.approx(float(r1.detach()), rel=1e-12)


def dense_penalty(sites, logits):
    """Σᵢ κ/2 ⟨Jᵀ H J, diag(z²)⟩ / W from dense Jacobians, for cross entropy on logits (tokens, V)."""
    total = 0.0
    for site in sites:
        rows = [torch.autograd.grad(f, site.units, retain_graph=True)[0].flatten() for f in logits.flatten()]
        J = torch.stack(rows).view(*logits.shape, -1)
        p = logits.softmax(-1)
        H = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
        squares = torch.einsum("tak,tab,tbk->k", J, H, J) * site.units.flatten().square()
        total = total + site.variance / 2 * squares.sum()
    return total / len(logits)


def test_the_mean_over_sampled_labels_is_the_gauss_newton_form(monkeypatch):
    torch.manual_seed(0)
    model, x, y = Tokens().double(), torch.tensor([[0, 2]]), torch.tensor([1, 2])
    sites, output = recorded(model, x)
    logits = output.flatten(0, 1)
    assert [site.name for site in sites] == ["drop#0", "lstm#0", "drop#1"]
    p, mean = logits.softmax(-1).detach(), 0.0
    for labels in itertools.product(range(3), repeat=2):
        chosen = torch.tensor(labels)
        at = p.gather(1, chosen[:, None])[:, 0]
        labels_forced(monkeypatch, p.cumsum(1).gather(1, chosen[:, None])[:, 0] - at / 2)
        value = training.explicit_penalty(sites, F.cross_entropy, logits, y, key=KEY)
        mean = mean + at.prod() * value
    assert float(mean.detach()) == pytest.approx(float(dense_penalty(sites, logits).detach()), rel=1e-12)


def test_the_exact_penalty_of_a_classifier_is_the_gauss_newton_form_and_so_is_its_gradient():
    model, (x, _) = mlp(outputs=3), batch()
    sites, logits = recorded(model, x)
    exact = training.explicit_penalty(
        sites, nn.CrossEntropyLoss(), logits, torch.tensor([0, 1, 2]), key=KEY, curvature="exact"
    )
    h, W, p = model[:2](x), model[3].weight, logits.softmax(-1)
    kappa = sites.found[0].variance
    mean = p @ W
    direct = kappa / 2 * (h.square() * (p @ W.square() - mean.square())).sum() / len(x)
    assert float(exact.detach()) == pytest.approx(float(direct.detach()), rel=1e-12)
    torch.testing.assert_close(flat_gradient(exact, model), flat_gradient(direct, model), rtol=1e-11, atol=1e-14)


def test_dropconnect_of_a_linear_model(monkeypatch):
    torch.manual_seed(0)
    model, kept = WeightDrop(0.25).double(), ds.keep_probability(0.25)
    x, y = torch.randn(2, 2, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    mean = sum(
        weight * (x @ (model.weight * mask.view(2, 2)).T - y).square().mean() for mask, weight in masks_of(4, kept)
    )
    sites, output = recorded(model, x)
    assert sites.found[0].shared
    found = 0.0
    for signs in itertools.product((0.25, 0.75), repeat=4):
        labels_forced(monkeypatch, torch.tensor(signs, dtype=torch.float64))
        found = found + training.explicit_penalty(sites, nn.MSELoss(), output, y, key=KEY) / 16
    assert float(found.detach()) == pytest.approx(float((mean - F.mse_loss(output, y)).detach()), rel=1e-12)


@pytest.mark.parametrize("form", ["channels", "own mask"])
def test_masks_shared_by_groups_of_values(form):
    """One unit for each channel: E R^drop by enumeration of the 2³ masks."""
    torch.manual_seed(0)
    kept = ds.keep_probability(0.4)
    read = nn.Linear(12, 2).double()
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    y = torch.randn(1, 2, dtype=torch.float64)

    def model(x):
        if form == "channels":
            return read(F.dropout2d(x, 0.4).flatten(1))
        return read((x * x.new_empty(1, 3, 1, 1).bernoulli_(0.6).div_(kept)).flatten(1))

    sites, output = recorded(model, x) if isinstance(model, nn.Module) else _pass(model, x)
    mean = sum(w * (read((x * m.view(1, 3, 1, 1)).flatten(1)) - y).square().mean() for m, w in masks_of(3, kept))
    penalty = training.explicit_penalty(sites, nn.MSELoss(), output, y, key=KEY, curvature="exact")
    assert float(penalty.detach()) == pytest.approx(float((mean - F.mse_loss(output, y)).detach()), rel=1e-12)


def _pass(function, x):
    with training.dropout_sites(torch.arange(len(x))) as sites:
        return sites, function(x)


def test_the_covariance_of_the_implicit_noise_by_enumeration_of_signs(monkeypatch):
    model, (x, y) = mlp(), batch(1)
    sites, output = recorded(model, x)
    loss = F.mse_loss(output, y)
    site = sites.found[0]
    slope = torch.autograd.grad(loss, site.units, create_graph=True)[0]
    parts = torch.stack([flat_gradient(term, model) for term in (slope * site.units).flatten()])
    expected = site.variance * parts.T @ parts
    found = torch.zeros_like(expected)
    mean = torch.zeros(len(expected), dtype=torch.float64)
    for bits in itertools.product((-1.0, 1.0), repeat=4):
        signs = torch.tensor([bits], dtype=torch.float64)
        monkeypatch.setattr(Sites, "signed", lambda self, site, x, key, signs=signs: x * signs)
        gradient = flat_gradient(training.implicit_noise(sites, loss, key=KEY), model)
        found += torch.outer(gradient, gradient) / 16
        mean += gradient / 16
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    assert float(mean.abs().max()) < 1e-14


def test_signs_are_those_of_the_mask_at_one_half_and_depend_on_the_sample_alone():
    model, (x, _) = mlp(), batch(5)
    whole, _ = recorded(model, x)
    signs = whole.signed(whole.found[0], torch.ones(5, 4, dtype=torch.float64), KEY)
    keep = ds.keep_mask((5, 4), 0.5, ds.MaskKey(derived(3, "signs"), 7), whole.found[0].word)
    assert torch.equal(signs, torch.where(keep, 1.0, -1.0).double())
    with training.dropout_sites(torch.tensor([4, 2]), model=model) as part:
        model(x[[4, 2]])
    assert torch.equal(part.signed(part.found[0], torch.ones(2, 4, dtype=torch.float64), KEY), signs[[4, 2]])


def test_the_noise_scale_beside_k_masks():
    model, (x, y) = mlp(), batch()
    sites, output = recorded(model, x)
    loss = F.mse_loss(output, y)
    whole = training.implicit_noise(sites, loss, key=KEY)
    part = training.implicit_noise(sites, loss, key=KEY, k=4)
    assert float(part.detach()) == pytest.approx(math.sqrt(0.75) * float(whole.detach()), rel=1e-14)
    assert float(training.implicit_noise(sites, loss, key=KEY, k=1).detach()) == 0.0


def test_one_pass_for_both_has_the_mean_of_the_penalty_and_the_covariance_of_the_noise(monkeypatch):
    """Over which sample serves which, R has the mean of R from all samples, and √2 ξ sums to ξ from all."""
    torch.manual_seed(0)
    model, x, y = Tokens().double(), torch.tensor([[0, 2], [1, 1]]), torch.tensor([1, 2, 0, 1])
    sites, output = recorded(model, x)
    logits = output.flatten(0, 1)
    penalties, noises = [], []
    for first in (True, False):
        monkeypatch.setattr(Sites, "halves", lambda self, key, first=first: torch.tensor([first, not first]))
        penalty, noise = training.explicit_and_implicit(sites, nn.CrossEntropyLoss(), logits, y, key=KEY)
        penalties.append(float(penalty.detach()))
        noises.append(float(noise.detach()))
    whole = training.explicit_penalty(sites, nn.CrossEntropyLoss(), logits, y, key=KEY)
    assert sum(penalties) / 2 == pytest.approx(float(whole.detach()), rel=1e-12)
    noise = training.implicit_noise(sites, F.cross_entropy(logits, y), key=KEY)
    assert sum(noises) / math.sqrt(2) == pytest.approx(float(noise.detach()), rel=1e-12)


def test_padded_sequences_have_the_penalty_of_unpadded_ones():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.2, batch_first=True, dtype=torch.float64)
    x, y = torch.randn(4, 5, 8, dtype=torch.float64), torch.randint(8, (4,))
    longer = torch.cat((x, torch.randn(4, 2, 8, dtype=torch.float64)), 1)
    found = []
    for inputs in (x, longer):
        padding = (torch.arange(inputs.shape[1]) >= 5).expand(4, -1)
        with training.dropout_sites(torch.arange(4), model=layer) as sites:
            output = layer(inputs, src_key_padding_mask=padding)[:, :5].mean(1)
        penalty = training.explicit_penalty(sites, nn.CrossEntropyLoss(), output, y, key=KEY, curvature="jacobian")
        found.append(penalty)
    assert found[0] > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_a_transformer_has_every_site_and_its_penalty_falls(causal):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.2, batch_first=True)
    model = nn.Sequential(nn.Embedding(5, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    read = nn.Linear(8, 5)
    x, y = torch.randint(5, (4, 6)), torch.randint(5, (24,))
    mask = nn.Transformer.generate_square_subsequent_mask(6) if causal else None
    samples, rng = torch.arange(4), torch.get_rng_state()
    parameters = [*model.parameters(), *read.parameters()]
    optimizer = torch.optim.Adam(parameters, 3e-2)
    found = []
    for step in range(12):
        with training.dropout_sites(samples, model=model) as sites:
            output = read(model[1](model[0](x), mask=mask)).flatten(0, 1)
        penalty, noise = training.explicit_and_implicit(
            sites, nn.CrossEntropyLoss(), output, y, key=ds.MaskKey(0, step)
        )
        found.append(float(penalty.detach()))
        optimizer.zero_grad()
        noise.backward(retain_graph=True)
        assert all(p.grad.isfinite().all() for p in parameters)
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
    assert len(sites) == 2 * 4  # attention weights, its output, and the two of the feed-forward part
    assert sum(found[-3:]) < 0.5 * sum(found[:3])
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_step_leaves_no_memory_behind():
    """Without the collector's help: a graph held by a cycle through autograd would never be freed at all."""
    from dropscope.training.recurrent import _Adjoints, _Run

    torch.manual_seed(0)
    model, x, y = Tokens(), torch.randint(3, (4, 5)), torch.randint(3, (20,))

    def step():
        sites, output = recorded(model, x)
        logits = output.flatten(0, 1)
        penalty, noise = training.explicit_and_implicit(sites, F.cross_entropy, logits, y, key=KEY)
        penalty = penalty + training.explicit_penalty(sites, F.cross_entropy, logits, y, key=KEY)
        noise = noise + training.implicit_noise(sites, F.cross_entropy(logits, y), key=KEY)
        (F.cross_entropy(logits, y) + penalty + noise).backward()

    step()  # the first one imports parts of torch, whose frames the collector has to free
    gc.collect()
    gc.disable()
    try:
        step()
        alive = [type(thing).__name__ for thing in gc.get_objects() if type(thing) in (_Run, _Adjoints)]
    finally:
        gc.enable()
    assert not alive


def test_it_runs_under_autocast():
    torch.manual_seed(0)
    model, x, y = Tokens(q=0.5), torch.randint(3, (4, 5)), torch.randint(3, (20,))
    with torch.autocast("cpu", torch.bfloat16):
        sites, output = recorded(model, x)
        logits = output.flatten(0, 1)
        loss = F.cross_entropy(logits, y)
        penalty, noise = training.explicit_and_implicit(sites, F.cross_entropy, logits, y, key=KEY)
    (loss + penalty + noise).backward()
    assert float(penalty.detach()) > 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_class_weights_and_ignored_labels_are_heeded():
    """Two tokens ignored: the penalty is that of the others; twice the weight of every class changes nothing."""
    model, (x, _) = mlp(outputs=3), batch(4)
    y = torch.tensor([0, -100, 2, -100])
    sites, logits = recorded(model, x)
    whole = training.explicit_penalty(sites, nn.CrossEntropyLoss(), logits, y, key=KEY, curvature="exact")
    part_sites, part = recorded(model, x[[0, 2]])
    wanted = training.explicit_penalty(part_sites, nn.CrossEntropyLoss(), part, y[[0, 2]], key=KEY, curvature="exact")
    assert float(whole.detach()) == pytest.approx(float(wanted.detach()), rel=1e-13)
    twice = nn.CrossEntropyLoss(weight=torch.full((3,), 2.0, dtype=torch.float64))
    again = training.explicit_penalty(sites, twice, logits, y, key=KEY, curvature="exact")
    assert float(again.detach()) == pytest.approx(float(whole.detach()), rel=1e-13)


def test_the_curvature_of_the_true_labels_is_the_square_of_the_loss_slope():
    model, (x, _) = mlp(outputs=3), batch()
    y = torch.tensor([2, 0, 1])
    sites, logits = recorded(model, x)
    value = training.explicit_penalty(sites, nn.CrossEntropyLoss(), logits, y, key=KEY, curvature="jacobian")
    slope = (logits.softmax(-1) - F.one_hot(y, 3)) @ model[3].weight
    wanted = sites.found[0].variance / 2 * (model[:2](x) * slope).square().sum() / len(x)
    assert float(value.detach()) == pytest.approx(float(wanted.detach()), rel=1e-12)


def test_the_identity_in_place_of_the_curvature_by_enumeration_of_signs(monkeypatch):
    model, (x, _) = mlp(outputs=3), batch(n=1)
    sites, logits = recorded(model, x)
    values = []
    for signs in itertools.product((0.25, 0.75), repeat=3):
        u = torch.tensor(signs, dtype=torch.float64)
        monkeypatch.setattr(explicit_module, "uniform", lambda *_, u=u: u)
        values.append(
            training.explicit_penalty(
                sites, nn.CrossEntropyLoss(), logits, torch.tensor([1]), key=KEY, curvature="identity"
            )
        )
    wanted = sites.found[0].variance / 2 * (model[:2](x) * model[3].weight).square().sum() / 3
    assert float(torch.stack(values).mean().detach()) == pytest.approx(float(wanted.detach()), rel=1e-12)


def test_refusals():
    model, (x, y) = mlp(), batch()
    sites, output = recorded(model, x)
    with pytest.raises(ValueError, match="is the model in train mode"):
        training.explicit_penalty(recorded(model.eval(), x)[0], nn.MSELoss(), output, y, key=KEY)
    model.train()
    with pytest.raises(TypeError, match="loss must be cross entropy"):
        training.explicit_penalty(sites, nn.L1Loss(), output, y, key=KEY)
    with pytest.raises(TypeError, match="key must be a MaskKey"):
        training.implicit_noise(sites, F.mse_loss(output, y), key=0)
    with pytest.raises(ValueError, match="loss must be a scalar"):
        training.implicit_noise(sites, output, key=KEY)
    with pytest.raises(ValueError, match="curvature must be one of"):
        training.explicit_penalty(sites, nn.MSELoss(), output, y, key=KEY, curvature="full")
    with pytest.raises(ValueError, match="alpha_dropout"):
        recorded(nn.AlphaDropout(0.2), x)
    with pytest.raises(ValueError, match="k must be at least 1"):
        training.DropoutK(model, 0)
    with pytest.raises(TypeError, match="k must be an integer"):
        training.implicit_noise(sites, F.mse_loss(output, y), key=KEY, k=2.0)
