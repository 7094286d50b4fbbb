"""The entries on noise structure run at tiny sizes, judge by their rules, and draw what JSON holds."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from dropscope._files import plain
from dropscope.reproduce import Scale, a_alignment, a_exact, a_gradient, a_trajectory, a_transformer, b_minima

TINY = {
    a_gradient: {"seeds": 2, "n": 60, "steps": 3, "count": 12, "k": 4},
    a_trajectory: {"seeds": 2, "n": 40, "steps": 3, "count": 12, "runs": 2, "k": 4},
    a_alignment: {"seeds": 2, "n": 40, "at": (1, 3), "k": 3, "draws": 4},
    a_exact: {"seeds": 2, "widths": (2, 4), "n": 3},
    a_transformer: {"seeds": 2, "sequences": 6, "length": 6, "width": 8, "steps": 2, "draws": 4, "k": 3},
    b_minima: {"seeds": 2, "n": 40, "steps": 3, "directions": 2},
}


@pytest.mark.parametrize("module", list(TINY), ids=lambda m: m.ENTRY.name)
def test_an_entry_runs_judges_and_draws(module) -> None:
    findings = module._run(Scale(), **TINY[module])
    numbers = json.loads(json.dumps(plain(findings.numbers)))
    assert len(findings.claims) >= 1
    assert all(claim.verdict in ("reproduced", "partly", "not reproduced") for claim in findings.claims)
    assert module.ENTRY.plot(numbers).axes
    assert "seeds" in findings.setting


def test_verdicts_follow_the_numbers() -> None:
    noises = {
        noise: [{"slope": slope, "r": r, "steep": slope}] * 2
        for noise, slope, r in (
            ("dropout", -1.5, -0.95), ("minibatch", -1.4, -0.6), ("gradient", 0.01, 0.1), ("weights", -4.0, -1.0),
        )
    }  # fmt: skip
    verdicts = [c.verdict for c in a_gradient._claims({"noises": noises, "slopes_e": [-1.52, -1.48]})]
    assert verdicts == ["reproduced", "partly", "reproduced", "reproduced"]
    noises["dropout"] = [{"slope": 0.5, "r": 0.9}] * 2
    noises["gradient"] = [{"slope": -1.0, "r": -0.9}] * 2
    verdicts = [c.verdict for c in a_gradient._claims({"noises": noises, "slopes_e": [0.5, 0.5]})]
    assert verdicts[0] == "not reproduced"
    assert verdicts[3] == "not reproduced"
    short, long = [{"slope": -2.5, "r": -0.7}, {"slope": -2.3, "r": -0.7}], [{"slope": 2.0, "r": 0.5}] * 2
    for control, verdict in ((0.1, "reproduced"), (4.0, "partly"), (-1.0, "not reproduced")):
        ends = (-control, 1.1 * control) if control > 0 else (control, 1.01 * control)
        runs = [short, long, [{"slope": s, "r": 0.0} for s in ends]]
        verdicts = [c.verdict for c in a_trajectory._claims({"runs": runs})]
        assert verdicts == ["reproduced", "not reproduced", verdict]
    minima = {"flatness": [[1.0, 1.1], [1.5, 1.6]], "sharpness": [[1.0, 1.0]] * 2, "risk": [[0.1, 0.1]] * 2}
    assert b_minima._claims(minima)[0].verdict == "reproduced"
    assert b_minima._claims(minima | {"flatness": minima["flatness"][::-1]})[0].verdict == "not reproduced"


def test_the_wide_net_form_is_the_per_sample_sum_by_autograd() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4, bias=False), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(4, 1, bias=False)
    ).double()
    X = torch.randn(3, 3, dtype=torch.float64)
    problem = a_exact.Problem(model, a_exact._half_square, (X, torch.zeros(3, 1, dtype=torch.float64)))
    kappa, total = 0.25, 0.0
    for x in X:
        u = model[3].weight[0] * torch.relu(model[0].weight @ x)
        rows = [problem.flatten(torch.autograd.grad(v, model.parameters(), retain_graph=True)) for v in u]
        parts = sum(torch.outer(g, g) for g in rows)
        total = total + kappa * u.square().sum() * (torch.outer(sum(rows), sum(rows)) + kappa * parts)
    np.testing.assert_allclose(a_exact._structure(problem, X, kappa), (total / 9).detach(), rtol=1e-12, atol=1e-14)
