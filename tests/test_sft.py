"""Fine-tuning and chat as typed, on a tiny model."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from illada_jax import api, experiment
from illada_jax.config import Config, DataConfig, SftConfig, TrainConfig
from illada_jax.data.chat import encode_chat
from illada_jax.errors import ConfigError

ROOT = pathlib.Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu",
               "PYTHONPATH": str(ROOT)}
NAMES = ("Ann", "Bob", "Eve")


def conversation(name, filler):
    """The second answer needs the first turn."""
    return {"messages": [{"role": "user", "content": f"I am {name}{filler}"}, {"role": "assistant", "content": "ok"},
                         {"role": "user", "content": "who?"}, {"role": "assistant", "content": name}]}


def run(*arguments, stdin=None):
    return subprocess.run([sys.executable, "-m", *map(str, arguments)], cwd=ROOT, env=ENVIRONMENT, input=stdin,
                          capture_output=True, text=True, timeout=300)


def train(place, workdir, *changes):
    tiny = {
        "data.sources": f"('chat:{place}/talk.jsonl',)", "data.cache_dir": place / "cache", "data.length": 64,
        "data.batch_size": 12, "data.heldout_fraction": 0.1, "sft.bucket": 64, "model.d_model": 32,
        "model.num_layers": 2, "model.head_dim": 8, "model.d_ff": 64, "model.scan_unroll": 2, "model.max_length": 96,
        "optimizer.warmup_steps": 5, "eval.rows": 8, "eval.every_epochs": 0.0, "eval.every": 10_000,
        "decode.block_length": 8, "decode.steps_per_block": 8, "decode.max_new_tokens": 16, "train.epochs": 40,
        "train.tensorboard": False, "checkpoint.every": 10_000,
    }
    return run("illada_jax.main", "--config=experiments/sft_quickstart.py", f"--workdir={workdir}",
               *(f"--config.{key}={value}" for key, value in tiny.items()), *changes)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("sft")
    lines = [json.dumps(conversation(name, "!" * n)) for name in NAMES for n in range(20)]
    (path / "talk.jsonl").write_text("\n".join([*lines, '{"messages": ', json.dumps({"prompt": "x"})]) + "\n")
    done = train(path, path / "run")
    assert done.returncode == 0, done.stderr
    return path, done


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().split("\n") if line]


def test_what_was_left_out_is_said_and_answers_are_scored(place):
    path, done = place
    assert "1 of 62 examples left out: not JSON: " in done.stderr and "line 61" in done.stderr
    assert "left out: neither messages nor prompt and response" in done.stderr
    last = metrics(path / "run")[-1]
    assert last["eval/ended"] >= 0.99 and last["eval/exact_match"] >= 0.9, last
    assert last["eval/nfe"] == 8 and 1 <= last["eval/answer_tokens"] <= 4
    assert "who?" in last["eval/answers"] and "✓" in last["eval/answers"]
    assert last["epochs/" + f"chat:{path}/talk.jsonl"] == 40 if f"epochs/chat:{path}/talk.jsonl" in last else True


def test_a_chat_keeps_its_history_and_stops_per_turn(place):
    path, _ = place
    for name in NAMES:
        talk = run("illada_jax.generate", f"--checkpoint={path}/run", "--chat", stdin=f"I am {name}!\n\nwho?\n/exit\nx")
        assert talk.returncode == 0, talk.stderr
        assert talk.stdout == f"ok\n{name}\n"


def test_a_conversation_that_gets_too_long_forgets_its_beginning(place):
    path, _ = place
    talk = run("illada_jax.generate", f"--checkpoint={path}/run", "--chat", stdin="I am Ann!\n" + "who?\n" * 4)
    assert talk.returncode == 0, talk.stderr
    assert len(talk.stdout.splitlines()) == 5
    assert "the context is full: the oldest 2 messages are forgotten" in talk.stderr


def test_chat_in_python_is_the_template_and_a_stop(place):
    path, _ = place
    lm = api.load(str(path / "run"))
    messages = conversation("Eve", "!")["messages"][:3]
    answer = lm.chat(messages)
    assert (answer.text, answer.stopped_by) == ("Eve", "eos")
    assert answer == lm.generate([encode_chat(lm.tokenizer, messages, True)])[0]


@pytest.mark.parametrize("option", ["--prompt=x", "--input=x.jsonl", "--infill", "--stream", "--output=json"])
def test_chat_goes_with_no_other_mode(place, option):
    path, _ = place
    got = run("illada_jax.generate", f"--checkpoint={path}/run", "--chat", option, stdin="")
    assert got.returncode == 2 and got.stderr.startswith("error: --chat: does not go with --"), got.stderr


def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(place):
    path, _ = place
    for form in ("illada", "llada"):
        whole, parts = path / f"whole_{form}", path / f"parts_{form}"
        changes = [f"--config.sft.format={form}", "--config.train.epochs=3", "--config.eval.evaluators=()",
                   "--config.train.log_every=1"]
        assert train(path, whole, *changes).returncode == 0
        assert train(path, parts, *changes, "--config.train.stop_step=5").returncode == 0
        resumed = train(path, parts, *changes)
        assert resumed.returncode == 0, resumed.stderr
        losses = [[line["train/loss"] for line in metrics(run_)] for run_ in (whole, parts)]
        assert len(losses[0]) > 10 and losses[0] == losses[1]


def test_starting_from_a_checkpoint_takes_its_tokenizer(place):
    path, _ = place
    changes = [f"--config.init.checkpoint={path}/run", "--config.data.tokenizer=checkpoint", "--config.train.epochs=1",
               "--config.eval.rows=4"]
    done = train(path, path / "second", *changes)
    assert done.returncode == 0, done.stderr
    assert metrics(path / "second")[-1]["eval/exact_match"] >= 0.75  # it starts with what the first has learnt
    other = train(path, path / "third", *changes, "--config.model.num_layers=4")
    assert other.returncode == 2 and "another architecture: model.num_layers: 2 → 4" in other.stderr


@pytest.mark.parametrize(("changes", "message"), [
    (["--config.sft.strict=True"], "config.sft.strict: 1 of 62 examples left out"),
    (["--config.data.sources=('text:x',)"], "reads chat:PATH and tasks:NAME:COUNT"),
    (["--config.train.steps=5"], "config.train.steps = 5: must be 0 where config.train.epochs = 40 decides"),
    (["--config.eval.scorer=similar"], "config.eval.scorer = 'similar': must be one of 'exact', 'numeric'"),
    (["--config.sft.format=none", "--config.train.epochs=0", "--config.train.steps=5"], "unknown kind 'chat'"),
    (["--config.data.tokenizer=checkpoint"], "config.data.tokenizer = 'checkpoint': needs init.checkpoint"),
])
def test_bad_input_is_one_line_and_leaves_nothing(place, changes, message):
    path, _ = place
    got = train(path, path / "bad", *changes)
    assert got.returncode == 2 and message in got.stderr, got.stderr
    assert "Traceback" not in got.stderr and not (path / "bad").exists()


def test_epochs_decide_steps_and_schedule(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"prompt": f"{i}=", "response": "x"}) + "\n"
                                              for i in range(100)))
    config = Config(sft=SftConfig(format="llada"), train=TrainConfig(epochs=12, steps=0), data=DataConfig(
        sources=(f"chat:{tmp_path}/a.jsonl",), tokenizer="bytes", heldout_fraction=0.0, batch_size=8,
        cache_dir=str(tmp_path)))
    resolved, _, _ = experiment.open_data(config)
    assert resolved.train.steps == 150  # 12 · 100 / 8
    changed = experiment.resolve_epochs(
        Config(sft=config.sft, train=config.train, optimizer=type(config.optimizer)(decay_fraction=0.1),
               eval=type(config.eval)(every_epochs=3.0)), 150)
    assert (changed.decay_start, changed.decay_steps, changed.eval.every) == (135, 15, 38)
    with pytest.raises(ConfigError, match="must be 0 where"):
        experiment.resolve_epochs(resolved, 150)
