"""Fine-tuning and chat from the command line, with a tiny model."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from etils import epath

from illada_jax import api, config
from illada_jax.data.tokenizers import train_sentencepiece
from illada_jax.data.tokenizers.chat import encode_chat
from illada_jax.errors import ConfigError, InputError
from illada_jax.evaluation.evaluators import make_evaluators
from illada_jax.parallel.mesh import make_mesh
from illada_jax.training import run as run_setup
from illada_jax.training.loop import RunSetup, train

ROOT = pathlib.Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu",
               "PYTHONPATH": str(ROOT)}
NAMES = ("Ann", "Bob", "Eve")


def conversation(name, filler):
    """The second answer needs the first turn."""
    return {"messages": [{"role": "user", "content": f"I am {name}{filler}"}, {"role": "assistant", "content": "ok"},
                         {"role": "user", "content": "who?"}, {"role": "assistant", "content": name}]}


def tiny(directory, **changes):
    return {
        "data.sources": (f"chat:{directory}/talk.jsonl",), "data.cache_dir": str(directory / "cache"),
        "data.length": 64, "data.batch_size": 12, "data.heldout_fraction": 0.2, "sft.bucket": 64, "model.d_model": 32,
        "model.num_layers": 2, "model.head_dim": 8, "model.d_ff": 64, "model.scan_unroll": 2, "model.max_length": 96,
        "optimizer.warmup_steps": 5, "eval.rows": 8, "eval.every_epochs": 0.0, "eval.every": 10_000,
        "decode.block_length": 8, "decode.steps_per_block": 8, "decode.max_new_tokens": 16, "train.epochs": 150,
        "train.tensorboard": False, "checkpoint.every": 10_000, **changes}


def run(*arguments, stdin=None):
    return subprocess.run([sys.executable, "-m", *map(str, arguments)], cwd=ROOT, env=ENVIRONMENT, input=stdin,
                          capture_output=True, text=True, timeout=300)


def run_main(directory, workdir, **changes):
    return run("illada_jax.main", "--config=experiments/sft_quickstart.py", f"--workdir={workdir}",
               *(f"--config.{key}={value}" for key, value in tiny(directory, **changes).items()))


def opened(directory, **changes):
    """The config, examples and batches of the same run, in this process."""
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "experiments" / "sft_quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    values = module.get_config()
    values.update_from_flattened_dict(tiny(directory, **changes))
    return run_setup.open_data(config.from_config_dict(values))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("sft")
    lines = [json.dumps(conversation(name, "!" * n)) for name in NAMES for n in range(10)]
    (path / "talk.jsonl").write_text("\n".join([*lines, '{"messages": ', json.dumps({"prompt": "x"})]) + "\n")
    return path


@pytest.fixture(scope="module")
def trained(directory):
    done = run_main(directory, directory / "run")
    assert done.returncode == 0, done.stderr
    return directory / "run", done.stderr


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().split("\n") if line]


@pytest.mark.slow
def test_rejected_examples_are_reported_and_answers_are_scored(trained):
    workdir, printed = trained
    assert "1 of 32 examples left out: not JSON: " in printed and "line 31" in printed
    assert "left out: neither messages nor prompt and response" in printed
    last = metrics(workdir)[-1]
    assert last["eval/ended"] >= 0.99 and last["eval/exact_match"] >= 0.9, last
    assert last["eval/nfe"] == 8 and 1 <= last["eval/answer_tokens"] <= 4
    assert "who?" in last["eval/answers"] and "✓" in last["eval/answers"]


@pytest.mark.slow
def test_a_chat_keeps_its_history_stops_per_turn_and_forgets_the_oldest_messages(trained):
    talk = run("illada_jax.generate", f"--checkpoint={trained[0]}", "--chat",
               stdin="I am Bob!\n\nwho?\n" + "who?\n" * 3 + "/exit\nx")
    assert talk.returncode == 0, talk.stderr
    first, second, *others = talk.stdout.split("\n")[:-1]
    assert len(first) <= 4 and second == "Bob" and len(others) == 3
    assert "the context is full: dropped the oldest 2 messages" in talk.stderr


@pytest.mark.slow
def test_chat_in_python_applies_the_template_and_stops(trained):
    lm = api.load(str(trained[0]))
    messages = conversation("Eve", "!")["messages"][:3]
    answer = lm.chat(messages)
    assert (answer.text, answer.stopped_by) == ("Eve", "eos")
    assert answer == lm.generate([encode_chat(lm.tokenizer, messages, True)])[0]


@pytest.mark.parametrize("option", ["--prompt=x", "--output=json"])
def test_chat_goes_with_no_other_mode(option):
    got = run("illada_jax.generate", "--checkpoint=nowhere", "--chat", option, stdin="")
    assert got.returncode == 2 and got.stderr.startswith("error: --chat: cannot be combined with --"), got.stderr


def losses(directory, workdir, form, **changes):
    settled, examples, batches = opened(directory, **{"sft.format": form, "train.epochs": 4, "train.log_every": 1,
                                                  "optimizer.warmup_steps": 1, "optimizer.name": "adamw",
                                                  "model.num_layers": 1, "model.scan_unroll": 1, **changes})
    mesh = make_mesh(settled.mesh, jax.devices()[:1])
    train(RunSetup(settled, epath.Path(workdir), mesh, batches, examples.tokenizer, {}))
    return [line["train/loss"] for line in metrics(workdir)]


@pytest.mark.parametrize("form", ["illada", "llada"])
@pytest.mark.slow
def test_a_stopped_run_resumes_as_if_it_had_not_been_stopped(directory, tmp_path, form):
    whole = losses(directory, tmp_path / "whole", form)
    losses(directory, tmp_path / "parts", form, **{"train.stop_step": 3})
    assert len(whole) >= 6 and losses(directory, tmp_path / "parts", form) == whole


@pytest.mark.slow
def test_initialising_from_a_checkpoint_uses_its_tokenizer(directory, trained):
    changes = {"init.checkpoint": str(trained[0]), "data.tokenizer": "checkpoint", "train.epochs": 3,
               "optimizer.warmup_steps": 1}
    settled, examples, batches = opened(directory, **changes)
    mesh = make_mesh(settled.mesh, jax.devices()[:1])
    evaluators = make_evaluators(("exact_match",), settled, examples, batches, mesh)
    outcome = train(RunSetup(settled, epath.Path(directory / "second"), mesh, batches, examples.tokenizer, evaluators))
    assert outcome.final["eval/exact_match"] >= 0.5  # far more than three epochs from scratch would teach
    other, *_ = opened(directory, **changes, **{"model.num_layers": 4})
    with pytest.raises(InputError, match=r"another architecture: model.num_layers: 2 → 4"):
        train(RunSetup(other, epath.Path(directory / "third"), mesh, batches, examples.tokenizer, {}))
    pieces = train_sentencepiece(["who is it"] * 9, 270)
    with pytest.raises(InputError, match="trained with another tokenizer"):
        train(RunSetup(settled, epath.Path(directory / "third"), mesh, batches, pieces, {}))
    assert not (directory / "third").exists()


@pytest.mark.parametrize(("changes", "message"), [
    ({"sft.strict": True}, "config.sft.strict: 1 of 32 examples left out"),
    ({"data.sources": ("text:x",)}, "reads chat:PATH and tasks:NAME:COUNT"),
    ({"train.steps": 500}, "config.train.steps = 500: must be 0 if config.train.epochs = 150 is given"),
    ({"sft.format": "none", "train.epochs": 0, "train.steps": 500}, "unknown kind 'chat'"),
    ({"sft.format": "none"}, "config.train.epochs = 150: is for fine-tuning"),
    ({"data.tokenizer": "checkpoint"}, "config.data.tokenizer = 'checkpoint': needs init.checkpoint"),
    ({"data.tokenizer": "checkpoint", "init.checkpoint": "/nowhere"}, "/nowhere: not a checkpoint"),
    ({"optimizer.decay_steps": 5}, "one of them must be 0"),
    ({"data.weights": (1.0,)}, "weights are for prepared corpora"),
])
def test_bad_settings(directory, changes, message):
    with pytest.raises(InputError, match=message):
        opened(directory, **changes)


def test_bad_input_is_one_line_and_leaves_nothing(directory):
    got = run_main(directory, directory / "bad", **{"eval.answer_metric": "similar"})
    assert got.returncode == 2
    assert "config.eval.answer_metric = 'similar': must be one of 'exact', 'numeric'" in got.stderr
    assert "Traceback" not in got.stderr and not (directory / "bad").exists()


def test_epochs_decide_steps_and_schedule(tmp_path):
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps({"prompt": f"{i}=", "response": "x"}) + "\n"
                                                 for i in range(100)))
    settled, *_ = opened(tmp_path, **{"train.epochs": 12, "data.batch_size": 8, "data.heldout_fraction": 0.0,
                                      "eval.every_epochs": 3.0, "optimizer.decay_fraction": 0.1})
    assert settled.train.steps == 150  # 12 · 100 / 8
    assert (settled.decay_start, settled.decay_steps, settled.eval.every) == (135, 15, 38)
    with pytest.raises(ConfigError, match="must be 0 if"):
        run_setup.resolve_epochs(settled, 150)


@pytest.mark.parametrize("changes", [[], ["--config.train.steps=5"], ["--config.model.num_layers=2"]])
@pytest.mark.slow
def test_a_small_file_of_ones_own(tmp_path, changes):
    """Twenty examples train with the settings of a larger data set: nothing is held out, and the schedule fits."""
    lines = [json.dumps(conversation(f"{name}{n}", "!")) for name in NAMES for n in range(10)][:20]
    (tmp_path / "chitchat.jsonl").write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "illada_jax.main", f"--config={ROOT}/experiments/chitchat.py", *changes], cwd=tmp_path,
        env={**ENVIRONMENT, "XDG_CACHE_HOME": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "skipping bits_per_byte, exact_match: none of 20 documents is held out" in done.stderr
    assert "scaled by" in done.stdout and "Finished at step" in done.stdout
