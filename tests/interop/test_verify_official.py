"""The script for the official weights, on tiny stand-ins: directories with random weights and modelling code."""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from absl import flags

REASON = "needs torch, transformers and the extras eval and hub"
for library in ("torch", "transformers", "lm_eval", "huggingface_hub"):
    pytest.importorskip(library, reason=REASON)

from illada_jax.errors import InputError  # noqa: E402
from tests.fixtures import make_checkpoints  # noqa: E402
from tests.interop import torch_oracles  # noqa: E402
from tests.interop.util import TEMPLATE, tokenizer_json  # noqa: E402

SCRIPT = pathlib.Path(__file__).parents[2] / "experiments" / "verify_official.py"
SIZES = {"illada": {"max_position_embeddings": 128}, "llada": {"max_sequence_length": 128}}
# The modules that stand beside the published weights, with `torch_oracles.py` as their content.
CONFIGURATION = """
from transformers import PretrainedConfig


class StandInConfig(PretrainedConfig):
    model_type = "FAMILY"
"""
MODELING = """
import json
import pathlib
import re

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_standin import StandInConfig
from .torch_oracles import logits, random_state


class StandIn(PreTrainedModel):
    config_class = StandInConfig

    def __init__(self, config):
        super().__init__(config)
        self.values = json.loads((pathlib.Path(config.name_or_path) / "config.json").read_text())
        for name, tensor in random_state(self.values, seed=0).items():
            *path, leaf = name.split(".")
            module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, torch.nn.Module())
                module = module._modules[part]
            module.register_parameter(leaf, torch.nn.Parameter(tensor))
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, input_ids):
        return CausalLMOutput(logits=logits(self.values, self.state_dict(), input_ids, torch.ones_like(input_ids) > 0))
"""
QUESTIONS = "".join(json.dumps({"question": f"{n} and {n}", "answer": str(2 * n)}) + "\n" for n in range(12))
TASK = """
task: {task}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
fewshot_split: test
fewshot_config: {{sampler: first_n}}
output_type: generate_until
doc_to_text: "{{{{question}}}} ="
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["?"]}}
metric_list:
  - metric: exact_match
"""


def stand_in(directory: pathlib.Path, family: str) -> str:
    """A model as the Hub has one: weights, tokenizer, and the code that computes with them."""
    config = getattr(make_checkpoints, family)(2, family == "illada") | SIZES[family]
    config["auto_map"] = {"AutoConfig": "configuration_standin.StandInConfig",
                          "AutoModel" if family == "llada" else "AutoModelForCausalLM": "modeling_standin.StandIn"}
    tokenizer = tokenizer_json(family)
    # No id beyond the tokenizer: the published loop may choose it, our decoder never does.
    config["vocab_size"] = len(json.loads(tokenizer)["model"]["vocab"])
    if "embedding_size" in config:
        config["embedding_size"] = config["vocab_size"]
    make_checkpoints.save(directory, config, torch_oracles.random_state(config, seed=5), num_files=2)
    (directory / "tokenizer.json").write_text(tokenizer)
    names = {"chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    (directory / "configuration_standin.py").write_text(CONFIGURATION.replace("FAMILY", family))
    (directory / "modeling_standin.py").write_text(MODELING)
    shutil.copy(torch_oracles.__file__, directory / "torch_oracles.py")
    return str(directory)


def typed(tmp_path, *options, **environment):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HOME": str(tmp_path / "hub"),
                   "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, str(SCRIPT), f"--workdir={tmp_path / 'workdir'}", *options], cwd=tmp_path,
                          env=environment, capture_output=True, text=True, timeout=1800)


@pytest.fixture
def script():
    """The script as a module; its flags have the place of equal ones of commands that other tests imported."""
    names = re.findall(r'flags\.DEFINE_\w+\("(\w+)"', SCRIPT.read_text())
    replaced = {name: flags.FLAGS[name] for name in names if name in flags.FLAGS}
    for name in replaced:
        delattr(flags.FLAGS, name)
    spec = importlib.util.spec_from_file_location("verify_official", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in names:
        delattr(flags.FLAGS, name)
    for name, flag in replaced.items():
        flags.FLAGS[name] = flag
    flags.FLAGS.unparse_flags()


def test_both_families_are_verified_from_end_to_end(tmp_path):
    names = [stand_in(tmp_path / "tiny-Base", "illada"), stand_in(tmp_path / "tiny-Instruct", "llada")]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "questions.jsonl").write_text(QUESTIONS)
    for task in ("local_gsm8k", "local_gsm8k_zeroshot"):
        text = TASK.format(task=task, data=tmp_path / "tasks" / "questions.jsonl")
        (tmp_path / "tasks" / f"{task}.yaml").write_text(text)
    done = typed(tmp_path, f"--models={','.join(names)}", "--trust_remote_code", "--dtype=float32", "--blocks=1",
                 "--gsm8k=3", f"--include_path={tmp_path / 'tasks'}", f"--output={tmp_path / 'report.json'}")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["versions"]["torch"] and report["versions"]["jax"] and report["versions"]["python"]
    for name, family in zip(names, ("illada-base", "llada-instruct"), strict=True):
        result = report["models"][name]
        assert result["share_of_prompts_tokenized_alike"] == result["share_of_argmax_equal"] == 1.0, result
        assert 0 < result["largest_logit_difference"] < 1e-4 and 0 <= result["mean_kl_nats"] < 1e-8, result
        assert result["share_of_greedy_tokens_equal"] == result["share_of_answers_equal"] == 1.0, result
        assert len({tuple(tokens) for tokens in result["jax_tokens"]}) > 5  # the answers say something
        assert result["gsm8k_preset"] == f"{family}/gsm8k" and result["gsm8k_exact_match,none"] == 0.0
        assert result["revision"] == "local" and result["torch_device"] == "cpu"
        assert f"| {' | '.join(names)} |" in done.stdout and "| share of answers equal | 1 | 1 |" in done.stdout
    assert not list((tmp_path / "workdir").rglob("*.npy"))


def test_another_network_is_noticed(tmp_path):
    name = stand_in(tmp_path / "tiny-Base", "illada")
    code = tmp_path / "tiny-Base" / "modeling_standin.py"
    code.write_text(code.read_text().replace("self.state_dict(), input_ids,", "self.state_dict(), input_ids.flip(1),"))
    done = typed(tmp_path, f"--models={name}", "--trust_remote_code", "--gsm8k=0", "--blocks=1",
                 f"--output={tmp_path / 'report.json'}")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "report.json").read_text())["models"][name]
    assert result["largest_logit_difference"] > 1 and result["share_of_argmax_equal"] < 0.5
    assert result["share_of_greedy_tokens_equal"] < 0.5 and result["share_of_answers_equal"] == 0
    assert result["dtype"] == "bfloat16" and not [key for key in result if key.startswith("gsm8k")]


def test_code_that_cannot_be_loaded_is_one_line(tmp_path):
    name = stand_in(tmp_path / "tiny-Base", "illada")
    (tmp_path / "tiny-Base" / "modeling_standin.py").write_text("raise AttributeError('no such thing')\n")
    done = typed(tmp_path, f"--models={name}", "--trust_remote_code", "--gsm8k=0")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert "cannot load the published code (AttributeError: no such thing)" in errors[0]


@pytest.mark.parametrize("options, environment, message", [
    (["--models=someone/nothing"], {}, "--trust_remote_code is required"),
    (["--models=someone/nothing", "--trust_remote_code"], {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"},
     "--models=someone/nothing: no such directory, and it cannot be fetched from the Hugging Face Hub: "),
])
def test_wrong_use_is_one_line(tmp_path, options, environment, message):
    done = typed(tmp_path, *options, **environment)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and message in errors[0], done.stderr
    assert "Traceback" not in done.stderr


def test_missing_libraries_are_named(script, monkeypatch):
    script.flags.FLAGS(["verify", "--trust_remote_code", "--models=someone/nothing"])
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="torch, transformers, huggingface_hub, lm_eval: not installed; pip install"):
        script.check_requirements()


def test_logits_are_compared_by_hand_values(script):
    expected_QV = np.log([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]).astype(np.float32)
    got_QV = np.log([[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]]).astype(np.float32) + 3  # a constant is no difference of KL
    largest, kl, same = script.compare_logits(got_QV, expected_QV)
    np.testing.assert_allclose(largest, [3 + np.log(2), 3], rtol=1e-6)
    np.testing.assert_allclose(kl, [0.25 * np.log(2), 0], atol=1e-6)
    assert same.tolist() == [False, True]
    with pytest.raises(InputError, match=r"\[2, 3\] here, \[2, 2\] in the published code"):
        script.compare_logits(got_QV, expected_QV[:, :2])
