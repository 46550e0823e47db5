"""Counts and reports of the studies."""

import importlib
import json
import pathlib
import sys

import numpy as np
import pytest

from illada_jax import api
from illada_jax.data.shards import answer_spans
from illada_jax.errors import InputError
from tests.evaluation import lm_eval_toys as toys

STUDIES = pathlib.Path(__file__).parent.parent / "experiments" / "studies"


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, str(STUDIES))
    try:
        return {name: importlib.import_module(name) for name in ("study", "variable_length", "epochs",
                                                                 "split_isolation", "scoring")}
    finally:
        sys.path.remove(str(STUDIES))


def test_computed_tokens_by_hand(modules):
    study = modules["study"]
    variable, canvas, blocks = study.DECODINGS.values()
    assert study.computed_tokens(variable, 10, 16) == 16 * 26
    assert study.computed_tokens(variable, 10, 48) == 16 * 26 + 16 * 42 + 16 * 58
    assert study.computed_tokens(canvas, 10, 128) == 128 * 138
    assert study.computed_tokens(blocks, 10, 32) == 32 * 138


def test_cells_are_valid_and_shared(modules):
    study = modules["study"]
    cells = {name: modules[name].CELLS for name in ("variable_length", "epochs", "split_isolation")}
    assert set(cells["epochs"]) <= set(cells["variable_length"]) & set(cells["split_isolation"])
    everything = {cell for group in cells.values() for cell in group}
    assert len({cell.name for cell in everything}) == len(everything) == 21
    for cell in everything:
        study.config_of(cell, pathlib.Path("x"), 100 if cell.format == "llada" else 0)
    assert list(study.base_configs(pathlib.Path("x"))) == ["base_answers", "base"]


def fake(cell):
    decoded = {"exact_match": 0.5 + cell.seed / 10, "by_task": {"sort": 0.5}, "unfinished": 0.0, "too_long": 0.1,
               "evaluations": 32.0, "answer_length": 20.0, "longest_answer": 100, "processor_seconds": 0.1}
    costs = {"variable": 1000.0, "canvas": 20000.0 + cell.seed, "canvas in blocks": 5000.0}
    if cell.format == "illada":
        costs = {"variable": 1000.0}
    return {"curve": [{"epoch": e, "exact_match": e / 12, "unfinished": 0.0} for e in (0, 3, 6, 9, 12)],
            "decoded": {name: {**decoded, "tokens": cost} for name, cost in costs.items()}}


@pytest.mark.parametrize(("name", "expected"), [
    ("variable_length", "| llada | canvas | 0.600 ± 0.058 | 32 ± 0 | 20,001 ± 1 |" + " 0.100 ± 0.000 | 0.000 ± 0.000"
     " | 0.100 ± 0.000 | 20 ± 0 |"),
    ("epochs", "| 9 | 0.750 ± 0.000 |"),
    ("split_isolation", "| 0.3 | no | 3 | 0.600 ± 0.058 |"),
])
def test_finished_cells_make_a_table(modules, tmp_path, monkeypatch, capsys, name, expected):
    module = modules[name]
    for cell in module.CELLS[:-1]:
        (tmp_path / f"{cell.name}.json").write_text(json.dumps(fake(cell)))
    monkeypatch.setattr(sys, "argv", [name, f"--results={tmp_path}", "--cells=0"])
    modules["study"].main(module.__doc__, module.CELLS, module.report)
    printed = capsys.readouterr().out
    assert f"{len(module.CELLS) - 1} of {len(module.CELLS)} cells are finished" in printed
    for cell in module.CELLS[-1:]:
        (tmp_path / f"{cell.name}.json").write_text(json.dumps(fake(cell)))
    modules["study"].main(module.__doc__, module.CELLS, module.report)
    assert expected in capsys.readouterr().out
    assert expected in (tmp_path / f"{name}.md").read_text()


def test_scoring_counts_what_is_right_and_what_it_costs(modules, tmp_path, monkeypatch):
    scoring, lm = modules["scoring"], api.LanguageModel(toys.CONFIG, toys.params(), toys.TOKENIZER)
    items = [{"context": "a b", "choices": [" cd", " ef", " g"], "answer": 1}] * 2
    exact, choice = (scoring.evaluate(lm, items, method) for method in ("confidence", scoring.CHOICE))
    values = [score.value / score.length for score in lm.score("a b", items[0]["choices"])]
    assert exact["chosen"] == choice["chosen"] == [int(np.argmax(values))] * 2
    assert 0 < choice["evaluations"] <= exact["evaluations"] <= 8
    monkeypatch.setattr(scoring, "METHODS", {"confidence": {}, scoring.CHOICE: {}, "Monte-Carlo, 1": {}})
    got = {"evaluations": 8.0, "seconds": 0.5}
    task = {"answers": [0, 1, 2, 3], "methods": {"confidence": {**got, "chosen": [0, 1, 2, 0]},
                                                 scoring.CHOICE: {**got, "chosen": [0, 1, 2, 0]},
                                                 "Monte-Carlo, 1": {**got, "chosen": [0, 1, 3, 1]}}}
    table = scoring.report({"items": task}, tmp_path)
    assert "| items | confidence | 0.750 ± 0.250 | 1.000 | 8.0 | 500.0 |" in table
    assert "| items | Monte-Carlo, 1 | 0.500 ± 0.289 | 0.500 | 8.0 | 500.0 |" in table
    (tmp_path / "bad.jsonl").write_text('{"context": "x", "choices": ["a"], "answer": 1}\n')
    with pytest.raises(InputError, match=r"bad\.jsonl: not JSON lines with context, choices and answer"):
        scoring.main(["--task", "nowhere", str(tmp_path / "bad.jsonl"), f"--results={tmp_path}"])


def test_answer_spans_by_hand():
    assert answer_spans(np.array([0, 1, 1, 0, 0, 1], bool)).tolist() == [[1, 3], [5, 6]]
