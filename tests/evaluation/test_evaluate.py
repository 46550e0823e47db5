"""The evaluation command through lm-evaluation-harness, on a small random model and local tasks."""

import functools
import importlib.metadata
import json
import math
import os
import pathlib
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="needs the extra: eval")

import lm_eval
from lm_eval import tasks

from illada_jax import api
from illada_jax.data.tokenizers.chat import DEFAULT_TEMPLATE, encode_chat
from illada_jax.errors import InputError
from illada_jax.evaluation import code_execution, lm_eval_cli, work
from illada_jax.evaluation.lm_eval_model import LmEvalModel
from illada_jax.evaluation.settings import make_settings
from illada_jax.parallel.fingerprints import fingerprint
from tests.evaluation import lm_eval_toys as toys

ONLY_LOCAL = {"include_defaults": False}
ALL = "--tasks=toy_choice,toy_writing,toy_text"


def results(directory):
    return json.loads((directory / "results.json").read_text())


def without_times(directory):
    return {key: value for key, value in results(directory).items() if key != "times"}


@pytest.fixture(scope="module")
def expected_choice(lm):
    """Accuracies of toy_choice by hand: scores of the candidates behind the question."""
    values = [[score.value for score in lm.score(f"{q['question']} =", [f" {c}" for c in q["choices"]], bos=True)]
              for q in toys.QUESTIONS]
    lengths = [[len(c) for c in q["choices"]] for q in toys.QUESTIONS]
    answers = [q["answer"] for q in toys.QUESTIONS]
    acc = np.mean([np.argmax(v) == a for v, a in zip(values, answers, strict=True)])
    norm = np.mean([np.argmax(np.divide(v, n)) == a for v, n, a in zip(values, lengths, answers, strict=True)])
    return acc, norm


def test_results_are_what_the_model_says(run, lm, tmp_path, expected_choice):
    printed = run(ALL, "--set=bos=True,rolling_stride=20,rolling_mc_num=8", f"--output_dir={tmp_path}")
    found = results(tmp_path)
    choice = found["results"]["toy_choice"]
    assert (choice["acc,none"], choice["acc_norm,none"]) == expected_choice
    assert choice["acc_stderr,none"] == pytest.approx(
        math.sqrt(expected_choice[0] * (1 - expected_choice[0]) / (len(toys.QUESTIONS) - 1)))
    # Rolling: windows of 20 new tokens after as many of the earlier ones as fit into 63 beside BOS.
    total = 0.0
    for item in toys.TEXTS:
        ids = toys.TOKENIZER.encode(item["text"])
        for start in range(0, len(ids), 20):
            new = ids[start : start + 20]
            context = ids[max(0, start + len(new) - 63) : start]
            total += lm.score(context, [new], method="monte_carlo", mc_num=8, bos=True)[0].value
    size = sum(len(item["text"]) for item in toys.TEXTS)
    assert found["results"]["toy_text"]["bits_per_byte,none"] == pytest.approx(-total / size / math.log(2), rel=1e-5)
    # Writing: up to a stop string, whatever else is decoded.
    rows = [json.loads(line) for line in (tmp_path / "samples" / "toy_writing.jsonl").read_text().splitlines()]
    assert len(rows) == 10 and all("A" not in row["resps"][0][0] and "Q" not in row["resps"][0][0] for row in rows)
    assert any(len(row["resps"][0][0]) < 12 for row in rows) and len({row["resps"][0][0] for row in rows}) > 5
    stored = found["manifest"]
    assert stored["score"]["bos"] is True and stored["score"]["method"] == "confidence"
    assert stored["decode"]["block_length"] == 8 and stored["evaluation"]["tasks"][0] == "toy_choice"
    assert stored["checkpoint"]["params"] == fingerprint(lm.params) and stored["libraries"]["jax"]
    assert found["configs"]["toy_writing"]["generation_kwargs"]["max_gen_toks"] == 12
    assert f"| toy_choice | 0 | 10 | acc | none | {expected_choice[0]:.4f} | " in printed
    assert (tmp_path / "results.md").read_text() == printed


@pytest.mark.slow
def test_killed_and_run_again_the_same(run, tmp_path, monkeypatch):
    monkeypatch.setattr(work.Work.__init__, "__defaults__", (None, "", 8))
    run(ALL, f"--output_dir={tmp_path / 'one'}")
    run(ALL, f"--output_dir={tmp_path / 'two'}")
    compute, count = work.Work._chunk_answers, iter(range(100))

    def dies(self, *arguments):
        if next(count) == 7:  # in the middle of what is written
            raise KeyboardInterrupt
        return compute(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(work.Work, "_chunk_answers", dies)
        run(ALL, f"--output_dir={tmp_path / 'three'}")
    assert not (tmp_path / "three" / "results.json").exists()
    assert len(list((tmp_path / "three" / "chunks").iterdir())) == 7
    run(ALL, f"--output_dir={tmp_path / 'three'}")
    assert without_times(tmp_path / "one") == without_times(tmp_path / "two") == without_times(tmp_path / "three")
    samples = [(tmp_path / name / "samples" / "toy_writing.jsonl").read_text() for name in ("one", "two", "three")]
    assert samples[0] == samples[1] == samples[2]
    with pytest.raises(InputError, match=r"holds another evaluation \(evaluation.limit: None → 3\)"):
        run(ALL, f"--output_dir={tmp_path / 'one'}", "--limit=3")


def test_a_request_does_not_depend_on_the_others(run, tmp_path):
    run("--tasks=toy_choice,toy_writing", f"--output_dir={tmp_path / 'all'}")
    run("--tasks=toy_writing", "--limit=3", "--set=batch_size=2", f"--output_dir={tmp_path / 'few'}")
    written = [[json.loads(line)["resps"] for line in (tmp_path / name / "samples/toy_writing.jsonl").read_text()
                .splitlines()][:3] for name in ("all", "few")]
    assert written[0] == written[1]


def test_conversations(lm, run, monkeypatch):
    """Few-shot examples are turns; special tokens come from the template, never from text."""
    chatting = api.LanguageModel(toys.CONFIG, lm.params, toys.TOKENIZER)
    seen = []
    monkeypatch.setattr(api.LanguageModel, "scorer", _noting(api.LanguageModel.scorer, seen))
    with pytest.raises(InputError, match="--apply_chat_template: the checkpoint has no chat template"):
        run("--tasks=toy_shots", "--limit=2", "--apply_chat_template", "--set=over_length=error")
    tokenizer = type(toys.TOKENIZER)()
    tokenizer.chat_files = {"chat_template.jinja": b"{% for m in messages %}<bos>{{ m.role[0] }}{{ m.content }}"
                                                   b"{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
                                                   b"{% if add_generation_prompt %}<bos>a{% endif %}"}
    chatting.tokenizer = tokenizer
    monkeypatch.setattr(api, "load", lambda *_: chatting)
    run("--tasks=toy_shots", "--limit=2", "--apply_chat_template", "--set=over_length=error")
    first, second = toys.QUESTIONS[0], toys.QUESTIONS[1]
    turns = [{"role": "user", "content": f"{first['question']}<mask>"},
             {"role": "assistant", "content": first["choices"][first["answer"]]},
             {"role": "user", "content": f"{second['question']}<mask>"}]
    context = encode_chat(tokenizer, turns, True)
    assert context.count(tokenizer.bos_id) == 4 and tokenizer.mask_id not in context
    assert [pair for pair in seen if pair[0] == context] == [
        (context, tokenizer.encode(choice)) for choice in second["choices"]]


def test_the_demo_for_conversations_is_evaluated_with_its_template():
    """It is an export of a model that was fine-tuned here."""
    model = LmEvalModel(api.load("demo-chat"))
    messages = [{"role": "user", "content": "What does zip do?"}]
    assert model._chat_ids(model.apply_chat_template(messages)) == encode_chat(model.lm.tokenizer, messages, True)
    assert model.chat_template(True) == DEFAULT_TEMPLATE


def _noting(make, seen):
    def scorer(self, **settings):
        made = make(self, **settings)
        score = made.score
        made.score = lambda pairs: seen.extend(pairs) or score(pairs)
        return made

    return scorer


def test_programs_are_run_in_the_sandbox_when_allowed(run, tmp_path):
    refused = "task toy_program: runs generated programs; allow it with --allow_code_execution=sandbox"
    for tasks_ in ("toy_program", "toy_choice,toy_group"):
        with pytest.raises(InputError, match=refused):
            run(f"--tasks={tasks_}")
    try:
        run("--tasks=toy_program", "--allow_code_execution=sandbox", f"--output_dir={tmp_path}")
    except InputError as error:
        pytest.skip(str(error))
    assert results(tmp_path)["results"]["toy_program"]["passes,programs"] == 0.5
    assert results(tmp_path)["manifest"]["evaluation"]["allow_code_execution"] == "sandbox"
    with pytest.raises(InputError, match="task toy_unconfined: does not run its programs through the metric code_eval"):
        run("--tasks=toy_unconfined", "--allow_code_execution=sandbox")


def test_without_isolation_only_when_that_is_typed(run, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    monkeypatch.setattr(code_execution.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="bubblewrap is not installed"):
        run("--tasks=toy_unconfined", "--allow_code_execution=sandbox")
    run("--tasks=toy_unconfined", "--allow_code_execution=unsafe", f"--output_dir={tmp_path}")
    assert results(tmp_path)["results"]["toy_unconfined"]["runs,none"] == 2


def test_answers_after_a_thought(lm):
    model = LmEvalModel(lm, make_settings({"think_end": "</t>"}))
    assert model._answer(SimpleNamespace(text="a</t>b</t> c", tokens=[])) == " c"
    assert model._answer(SimpleNamespace(text="abc", tokens=[])) == "abc"
    # A special token does not show in the text.
    model = LmEvalModel(lm, make_settings({"think_end": "<pad>"}))
    tokens = [*toys.TOKENIZER.encode("thought"), toys.TOKENIZER.pad_id, *toys.TOKENIZER.encode("it")]
    assert model._answer(SimpleNamespace(text="thoughtit", tokens=tokens)) == "it"


@pytest.mark.parametrize("arguments, message", [
    ([], "--tasks: give at least one task, or a --preset"),
    (["--tasks=toy_choise"], "--tasks=toy_choise: unknown; did you mean 'toy_choice'"),
    (["--preset=illada-bas/gsm8k"], "--preset=illada-bas/gsm8k: unknown; did you mean 'illada-base/gsm8k'"),
    (["--preset=qwen2.5-base/gsm8k"], "not a diffusion model; run instead: lm_eval --model hf"),
    (["--tasks=toy_choice", "--set=mc=3"], "setting 'mc': unknown"),
    (["--tasks=toy_choice", "--set=help"], "--set takes: batch_size, block_length"),
    (["--tasks=toy_choice", "--include_path=nowhere"], "--include_path=nowhere: no such directory"),
    (["--tasks=toy_choice", "--system_instruction=x"], "--system_instruction: requires --apply_chat_template"),
    (["--tasks=toy_choice", "--set=rolling_stride=-1"], "rolling_stride = -1: must be 0 or more"),
])
def test_bad_flags(run, arguments, message, monkeypatch):
    # The index of the harness's own tasks takes long.
    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, **ONLY_LOCAL))
    with pytest.raises(InputError) as caught:
        run(*arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_without_the_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match=r"pip install 'illada_jax\[eval\]'"):
        run("--tasks=toy_choice")


def test_long_contexts_lose_their_beginning_and_are_counted(run, tmp_path, lm):
    run("--tasks=toy_shots", "--num_fewshot=5", "--limit=1", f"--output_dir={tmp_path}")
    assert results(tmp_path)["truncated_contexts"] == {"loglikelihood": 4}
    with pytest.raises(InputError, match=r"does not fit into .*; over_length=truncate drops its beginning"):
        run("--tasks=toy_shots", "--num_fewshot=5", "--limit=1", "--set=over_length=error")


# A stand-in for PyTorch, first in the path, that notes which module imports it.
TORCH = """
import sys
frame = sys._getframe(1)
while frame and frame.f_globals.get("__name__", "").startswith("importlib"):
    frame = frame.f_back
print(frame.f_globals.get("__name__") if frame else "unknown", file=open({path!r}, "a"))
raise ImportError("torch")
"""


def test_two_processes_give_the_numbers_of_one(places, tmp_path, run):
    """And nothing imports PyTorch, whether it is installed or not: a stand-in would record it."""
    stub = tmp_path / "stub" / "torch"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text(TORCH.format(path=str(tmp_path / "importers")))
    path = os.pathsep.join([str(stub.parent), *filter(None, sys.path)])
    xla = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)
    environment = {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": xla, "JAX_PLATFORMS": "cpu"}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = [f"--checkpoint={places[0]}", f"--include_path={places[1]}", "--tasks=toy_choice,toy_writing", "--limit=8"]
    command = [sys.executable, "-m", "illada_jax.evaluate", *common, f"--output_dir={tmp_path / 'two'}"]
    started = [subprocess.Popen([*command, f"--processes=localhost:{port},2,{number}"], env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for number in range(2)]
    outputs = [process.communicate(timeout=240) for process in started]
    for process, (_, error) in zip(started, outputs, strict=True):
        assert process.returncode == 0, error[-2000:]
    run("--tasks=toy_choice,toy_writing", "--limit=8", f"--output_dir={tmp_path / 'one'}")
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert (one["results"], one["network_evaluations"]) == (two["results"], two["network_evaluations"])
    for task in ("toy_choice", "toy_writing"):
        rows = [[json.loads(line)["resps"] for line in (tmp_path / name / "samples" / f"{task}.jsonl").read_text()
                 .splitlines()] for name in ("one", "two")]
        assert rows[0] == rows[1]
    assert "| toy_choice |" in outputs[0][0] and "| toy_choice |" not in outputs[1][0]
    importers = (tmp_path / "importers").read_text().split() if (tmp_path / "importers").exists() else []
    assert not importers, f"torch was imported by {importers}"


def test_registered_in_the_harness(places, expected_choice):

    manager = tasks.TaskManager(include_path=places[1], **ONLY_LOCAL)
    found = lm_eval.simple_evaluate(
        model="illada_jax", model_args=f"checkpoint={places[0]},method=confidence,bos=True", batch_size=16,
        tasks=["toy_choice"], task_manager=manager, torch_random_seed=None)
    assert found["results"]["toy_choice"]["acc,none"] == expected_choice[0]
    for arguments, message in [("method=confidence", "checkpoint=…: is required"),
                               (f"checkpoint={places[0]},colour=red", "setting 'colour': unknown")]:
        with pytest.raises(InputError, match=message):
            lm_eval_cli.IlladaJax.create_from_arg_string(arguments)
    points = {point.name: point.value for point in importlib.metadata.entry_points(group="lm_eval.models")}
    assert points.get("illada_jax") == "illada_jax.evaluation.lm_eval_cli:IlladaJax"


@pytest.mark.slow
def test_heldout_examples_of_fine_tuning_become_a_task(tmp_path):
    """After two steps of training the answers are wrong, and each of them is evaluated."""
    root = pathlib.Path(__file__).parents[2]
    workdir, tasks_dir, output = (str(tmp_path / name) for name in ("sft", "tasks", "output"))

    def command(*arguments):
        done = subprocess.run([sys.executable, *arguments], cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    command("-m", "illada_jax.main", "--config=experiments/sft_quickstart.py", f"--workdir={workdir}",
            "--config.data.sources=('tasks:reverse:300',)", f"--config.data.cache_dir={tmp_path / 'cache'}",
            "--config.train.epochs=0", "--config.eval.every_epochs=0", "--config.train.steps=2",
            "--config.eval.evaluators=()",
            "--config.optimizer.warmup_steps=1", "--config.model.num_layers=1", "--config.model.scan_unroll=1")
    assert "own_answers" in command("experiments/tasks/own.py", f"--checkpoint={workdir}", f"--target={tasks_dir}")
    items = [json.loads(line) for line in (tmp_path / "tasks/own_answers.jsonl").read_text().splitlines()]
    assert all(item["context"] == f"reverse {item['target'][::-1]}=" for item in items) and len(items) > 2
    command("-m", "illada_jax.evaluate", f"--checkpoint={workdir}", f"--include_path={tasks_dir}",
            "--tasks=own_answers", "--limit=3", f"--output_dir={output}")
    assert results(tmp_path / "output")["results"]["own_answers"]["exact_match,none"] == 0
