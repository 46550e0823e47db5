"""Generation arguments, tasks, limits and candidates as lm-evaluation-harness takes them."""

import functools
import json
import pathlib

import pytest

pytest.importorskip("lm_eval", reason="needs the extra: eval")

from lm_eval import tasks
from lm_eval.api.instance import Instance

from illada_jax.errors import InputError
from illada_jax.evaluation import lm_eval_cli
from illada_jax.evaluation.lm_eval_model import LmEvalModel
from illada_jax.evaluation.settings import make_settings
from tests.evaluation import lm_eval_toys as toys

DEFAULT = {"stop": [], "max_new_tokens": 8, "temperature": 0.0}
SAMPLED = {**DEFAULT, "temperature": 0.7, "top_k": 0, "top_p": 1.0}


@pytest.mark.parametrize("arguments, expected", [
    ({}, DEFAULT),
    ({"do_sample": False}, DEFAULT),
    ({"do_sample": False, "temperature": 0.7, "top_p": 0.5, "top_k": 3}, DEFAULT),
    ({"temperature": 0.0, "top_p": 0.5}, DEFAULT),
    ({"temperature": 0.7}, SAMPLED),  # without do_sample
    ({"temperature": 0.7, "do_sample": None}, SAMPLED),
    ({"temperature": 0.7, "do_sample": True}, SAMPLED),
    ({"do_sample": True}, {**SAMPLED, "temperature": 1.0}),
    ({"do_sample": True, "temperature": None}, {**SAMPLED, "temperature": 1.0}),
    ({"do_sample": True, "temperature": 0}, {**SAMPLED, "temperature": 0.0}),
    ({"temperature": 0.7, "top_p": 0.5, "top_k": 3}, {**SAMPLED, "top_p": 0.5, "top_k": 3}),
    ({"temperature": 0.7, "top_k": -1}, SAMPLED),
    *[({name: 5}, {**DEFAULT, "max_new_tokens": 5})
      for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")],
    ({"max_tokens": 5, "max_gen_toks": 6, "max_new_tokens": 7}, {**DEFAULT, "max_new_tokens": 6}),
    ({"max_tokens": "5"}, {**DEFAULT, "max_new_tokens": 5}),
    ({"until": "Q"}, {**DEFAULT, "stop": ["Q"]}),
    ({"until": ["Q", "A", "", None]}, {**DEFAULT, "stop": ["A", "Q"]}),
    ({"until": None}, DEFAULT),
    ({"num_beams": 4, "repetition_penalty": 1.0}, DEFAULT),  # ignored, with a warning
])
def test_generation_arguments(lm, arguments, expected):
    given = json.dumps(arguments)
    assert LmEvalModel(lm)._options("some_task", arguments) == expected
    assert json.dumps(arguments) == given  # the harness's own
    settings = make_settings({"temperature": 0.3, "max_new_tokens": 4})
    assert LmEvalModel(lm, settings)._options("t", arguments) == {**expected, "temperature": 0.3, "max_new_tokens": 4}


@pytest.mark.parametrize("arguments, message", [
    ({"until": 3}, "until"), ({"max_tokens": "many"}, "many"), ({"max_new_tokens": 0}, "max_new_tokens = 0: must be"),
    ({"temperature": "hot"}, "hot"), ({"temperature": -1, "do_sample": True}, "temperature = -1.0: must be 0 or more"),
    ({"temperature": 1, "top_p": 0}, "top_p = 0.0: must lie in"), ({"temperature": float("inf")}, "temperature = inf"),
])
def test_bad_generation_arguments_are_named_with_their_task(lm, arguments, message):
    with pytest.raises(InputError, match=f"task some_task: generation arguments .*{message}") as caught:
        LmEvalModel(lm)._options("some_task", arguments)
    assert "\n" not in str(caught.value)


def test_a_temperature_alone_samples(lm):
    def texts(**arguments):
        requests = [Instance("generate_until", {}, (q["question"], arguments), 0, ("t", n, 1))
                    for n, q in enumerate(toys.QUESTIONS)]
        return LmEvalModel(lm).generate_until(requests)

    greedy = texts(max_tokens=3)
    assert all(len(text) == 3 for text in greedy)
    assert texts(max_tokens=3, temperature=5.0) != greedy == texts(max_tokens=3, temperature=5.0, top_k=1)


@pytest.fixture
def selection(run, places, monkeypatch, tmp_path):
    """(Items by task, manifest of the evaluation) of the given flags; without the harness's own tasks."""
    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))
    numbers = iter(range(100))

    def select(*flags):
        output = tmp_path / f"output{next(numbers)}"
        run(*flags, "--set=max_new_tokens=1", f"--output_dir={output}")
        found = json.loads((output / "results.json").read_text())
        return {task: count["effective"] for task, count in found["n-samples"].items()}, found["manifest"]["evaluation"]

    return select


def test_patterns_groups_and_files(selection, places, tmp_path):
    """Each gives the tasks of the harness's own command, and the manifest has their names."""
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    other = (pathlib.Path(places[1]) / "toy_choice.yaml").read_text()
    (outside / "other.yaml").write_text(other.replace("task: toy_choice", "task: other_choice\ntag: toy_tag"))
    (outside / "second.yml").write_text("task: second_choice\ninclude: other.yaml\n")
    for given, expected in [
            ("toy_ch*", ["toy_choice"]), ("toy_[cs]*", ["toy_choice", "toy_shots"]), ("toy_shot?", ["toy_shots"]),
            ("toy_choice,toy_ch*", ["toy_choice"]), (f"{outside}/other.yaml", ["other_choice"]),
            (f"{outside}/*.yaml", ["other_choice"]), (f"{outside}", ["other_choice"]),
            (f"{outside}/second.yml", ["second_choice"]),
            (f"{places[1]}/toy_choice.yaml,toy_shots", ["toy_choice", "toy_shots"])]:
        counts, recorded = selection(f"--tasks={given}", "--limit=1")
        assert (counts, recorded["tasks"]) == (dict.fromkeys(expected, 1), expected), given


def test_members_of_a_group_that_a_pattern_matches(selection, places):
    group = pathlib.Path(places[1]) / "all_choices.yaml"
    group.write_text("group: toy_all\ntask: [toy_choice, toy_shots]\n")
    for given, expected in [("toy_all", ["toy_all"]), ("toy_[acs]*", ["toy_all"]), (str(group), ["toy_all"])]:
        counts, recorded = selection(f"--tasks={given}", "--limit=1")
        assert (counts, recorded["tasks"]) == ({"toy_choice": 1, "toy_shots": 1}, expected)
    group.unlink()


@pytest.mark.parametrize("given, count, recorded", [
    ("2", 2, 2), ("2.0", 2, 2), ("1", 1, 1), ("0.5", 5, 0.5), ("0.01", 1, 0.01), ("0.99", 10, 0.99), ("99", 10, 99)])
def test_limits(selection, given, count, recorded):
    counts, evaluation = selection("--tasks=toy_shots", f"--limit={given}")
    assert counts == {"toy_shots": count}
    assert evaluation["limit"] == recorded and isinstance(evaluation["limit"], type(recorded))


@pytest.mark.parametrize("flags, message", [
    *[([f"--limit={value}"], f"--limit={value}: must be a number of items, or a share") for value in
      ("0", "-1", "2.5", "nan", "inf", "-0.5")],
    (["--tasks=toy_x*"], "--tasks=toy_x*: unknown"),
    (["--tasks=nowhere/t.yaml"], "--tasks=nowhere/t.yaml: no such file"),
    (["--tasks={bad}/list.yaml"], "list.yaml: not the file of a task: "),
    (["--tasks={bad}/broken.yaml"], "broken.yaml: not the file of a task: "),
    (["--tasks={bad}/none.yaml"], "none.yaml: not the file of a task: "),
    (["--tasks={tasks}/toy_program.yaml"], "task toy_program: runs generated programs; allow it with"),
    (["--tasks=toy_p*"], "task toy_program: runs generated programs; allow it with"),
    (["--tasks={tasks}/toy_group.yaml"], "task toy_program: runs generated programs; allow it with"),
    (["--tasks={bad}/included.yaml"], "task included: runs generated programs; allow it with"),
])
def test_what_cannot_be_selected(selection, places, tmp_path, flags, message):
    for name, text in {"list": "[1]", "broken": "task: [", "none": "x: 1",
                       "included": f"task: included\ninclude: {places[1]}/toy_program.yaml"}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    given = [flag.format(bad=tmp_path, tasks=places[1]) for flag in flags]
    with pytest.raises(InputError) as caught:
        selection("--tasks=toy_shots", *given)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("settings, kept", [({}, 64), ({"bos": True}, 63), ({"bos": True, "eos": True}, 62)])
def test_candidates_longer_than_the_context(lm, settings, kept):
    """By over_length they lose their beginning, as in lm-eval, and are counted; or are an error."""
    def request(context, candidate):
        return Instance("loglikelihood", {}, (context, candidate), 0, ("some_task", 3, 1))

    model = LmEvalModel(lm, make_settings(settings))
    long, cut = model.loglikelihood([request("question", "b" * 9 + "a" * kept), request("", "a" * kept)])
    assert long == cut and model.truncated == {"candidates": 1}
    model = LmEvalModel(lm, make_settings({**settings, "over_length": "error"}))
    model.loglikelihood([request("", "a" * kept)])
    with pytest.raises(InputError, match=f"task some_task, item 3: candidate 'a.* has {kept + 1} tokens, which exceed "
                                         "the context of 64; over_length=truncate drops its beginning"):
        model.loglikelihood([request("", "a" * (kept + 1))])
    with pytest.raises(InputError, match="task some_task, item 3: candidate '' is empty"):
        model.loglikelihood([request("question", "")])


@pytest.mark.parametrize("given, rows", [("auto", 4), ("auto:8", 4), ("16", 16), (16, 16), (None, 4)])
def test_batch_sizes_of_the_harness(places, given, rows):
    model = lm_eval_cli.IlladaJax.create_from_arg_string(f"checkpoint={places[0]}", {"batch_size": given})
    assert model.lm.decode_settings(model.settings.decode).batch_size == rows
    with pytest.raises(InputError, match="--batch_size automatic: must be a number or auto"):
        lm_eval_cli.IlladaJax.create_from_arg_string("checkpoint=x", {"batch_size": "automatic"})
