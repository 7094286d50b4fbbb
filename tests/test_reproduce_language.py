"""The entries of paper D at a tiny size, and the rules of their verdicts."""

import dataclasses
import importlib
import json

import pytest

from dropscope.reproduce import language, language_figures
from dropscope.reproduce.entry import Scale

TINY = dataclasses.replace(
    language.SMALL, train=500, held=200, vocabulary=50, width=8, batch=4, steps=8, epochs=1, least=1
)
FIGURES = [f"d_fig{number}" for number in range(1, 6)]


@pytest.mark.parametrize("name", FIGURES)
def test_every_claim_of_an_entry_is_of_methods_that_it_trains(name, monkeypatch):
    entry = importlib.import_module(f"dropscope.reproduce.{name}").ENTRY
    monkeypatch.setattr(
        language_figures,
        "runs",
        lambda methods, *_: {m.name: {"valid": [[9.0, 5.0], [8.0, 5.5]], "fidelity": [[1.0] * 3] * 2} for m in methods},
    )
    findings = entry.run(Scale())
    assert len(findings.claims) >= 2
    assert len(entry.plot(json.loads(json.dumps(findings.numbers))).axes[0].lines) >= 6


def test_every_method_trains_and_none_needs_the_generator():
    methods = [value for value in vars(language).values() if isinstance(value, language.Method)]
    assert len(methods) == 8
    found = language.runs(methods, 1, TINY, Scale(), workers=1)
    again = language.train(language.BOTH, 0, TINY, Scale())
    assert found[language.BOTH.name]["valid"] == [again["valid"]]
    assert again["fidelity"] == found[language.BOTH.name]["fidelity"][0]
    assert min(again["fidelity"]) > 0
    assert "fidelity" not in found[language.K4.name]
    values = [curves["valid"][0][0] for curves in found.values()]
    assert len(set(values)) == len(values)


def test_the_rules():
    def found(**values):
        return {name: {"valid": [[v] for v in seeds]} for name, seeds in values.items()}

    numbers = {language.NONE.name: [40.0, 40.2], language.DROPOUT.name: [30.0, 30.2], language.K4.name: [31.0, 31.3]}
    numbers |= {language.K8.name: [29.0, 33.0]}
    table = found(**numbers)
    table[language.DROPOUT.name]["fidelity"] = [[0.9, 0.8, 0.1], [0.9, 0.8, 0.3]]

    def judge(first, relation, second):
        return language_figures.judged("", "", table, first, relation, second).verdict

    assert judge(language.NONE, "worse", language.DROPOUT) == "reproduced"
    assert judge(language.K8, "worse", language.DROPOUT) == "partly"
    assert judge(language.DROPOUT, "worse", language.K4) == "not reproduced"
    assert judge(language.K4, "equal", language.DROPOUT) == "reproduced"
    assert judge(language.NONE, "equal", language.DROPOUT) == "not reproduced"
    why = language_figures.judged("", "", table, language.K8, "worse", language.DROPOUT).why
    assert "29.0 to 33.0" in why
    assert "0.20 ± 0.10 of the variance of the batches' own" in why
