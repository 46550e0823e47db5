"""A small model on disk and small tasks for the harness, for the tests of the evaluation command."""

import json
import pathlib

import jax.numpy as jnp
from etils import epath

from illada_jax.config import Config, DataConfig, DecodeConfig, ModelConfig
from illada_jax.data.tokenizers import ByteTokenizer
from illada_jax.training.checkpoints import Checkpoints
from illada_jax.training.faults import FaultCounts
from illada_jax.training.step import TrainState
from tests.util import random_params

TOKENIZER = ByteTokenizer()
MODEL = ModelConfig(vocab_size=TOKENIZER.vocab_size, d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
                    d_ff=32, max_length=64)
# It writes capital letters only.
CONFIG = Config(model=MODEL, data=DataConfig(length=64), decode=DecodeConfig(
    max_new_tokens=8, block_length=8, steps_per_block=8, batch_size=4,
    suppressed_ids=(*range(4 + 65), *range(4 + 91, 4 + 256))))


def params():
    return random_params(MODEL, scale=4.0)


def save(workdir: pathlib.Path) -> str:
    """Saves the model as a checkpoint of a training run."""
    with Checkpoints(epath.Path(workdir), CONFIG, TOKENIZER, "none") as checkpoints:
        checkpoints.save(1, TrainState(jnp.int32(1), params(), {"nothing": jnp.zeros(1)}, None), {}, FaultCounts())
    return str(workdir)


QUESTIONS = [{"question": f"{n} and {n + 1}", "choices": [str(n + i) * (1 + i % 2) for i in range(4)], "answer": n % 4}
             for n in range(10)]
TEXTS = [{"text": "word " * n + "end"} for n in (2, 9, 30)]
PROGRAMS = [{"prompt": "one", "code": "def f():\n    return 1\n", "test": f"assert f() == {n}"} for n in (1, 2)]

TASKS = {
    "toy_choice": """
output_type: multiple_choice
doc_to_text: "{{question}} ="
doc_to_choice: "{{choices}}"
doc_to_target: answer
num_fewshot: 0
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "toy_shots": """
output_type: multiple_choice
doc_to_text: "{{question}}<mask>"
doc_to_choice: "{{choices}}"
doc_to_target: answer
fewshot_split: test
fewshot_config: {sampler: first_n}
num_fewshot: 1
metric_list:
  - metric: acc
""",
    "toy_writing": """
output_type: generate_until
doc_to_text: "{{question}} ="
doc_to_target: "{{choices[0]}}"
num_fewshot: 0
generation_kwargs: {until: ["A", "Q"], max_gen_toks: 12, do_sample: true, temperature: 0.9}
metric_list:
  - metric: exact_match
""",
    "toy_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: bits_per_byte
""",
    "toy_program": """
output_type: generate_until
unsafe_code: true
doc_to_text: "{{prompt}}"
doc_to_target: "{{test}}"
num_fewshot: 0
generation_kwargs: {until: ["Z"]}
filter_list:
  - name: programs
    filter:
      - {function: custom, filter_fn: !function functions.programs}
metric_list:
  - metric: !function functions.passes
    aggregation: mean
    higher_is_better: true
""",
}
# It runs a program by other means than the metric.
TASKS["toy_unconfined"] = """
output_type: generate_until
unsafe_code: true
doc_to_text: "{{prompt}}"
doc_to_target: "{{test}}"
generation_kwargs: {until: ["Z"]}
metric_list:
  - metric: !function unconfined.runs
    aggregation: mean
    higher_is_better: true
"""
GROUPS = {"toy_group": "group: toy_group\ntask: [toy_choice, {group: inner, task: [{task: toy_program}]}]\n"}
# As in the harness's own code tasks, the metric is loaded when the file is imported.
FUNCTIONS = """
import evaluate

metric = evaluate.load("code_eval")


def programs(resps, docs):
    return [[doc["code"] for _ in resp] for resp, doc in zip(resps, docs)]


def passes(references, predictions):
    return metric.compute(references=references, predictions=predictions, k=[1])[0]["pass@1"]
"""
UNCONFINED = """
def runs(references, predictions):
    return eval("1 + 1")
"""


def write_tasks(directory: pathlib.Path) -> str:
    """Writes items and task files."""
    directory.mkdir(parents=True)
    items = {"toy_choice": QUESTIONS, "toy_shots": QUESTIONS, "toy_writing": QUESTIONS, "toy_text": TEXTS,
             "toy_program": PROGRAMS, "toy_unconfined": PROGRAMS}
    (directory / "functions.py").write_text(FUNCTIONS)
    (directory / "unconfined.py").write_text(UNCONFINED)
    for group, text in GROUPS.items():
        (directory / f"{group}.yaml").write_text(text)
    for task, text in TASKS.items():
        data = directory / f"{task}.jsonl"
        data.write_text("".join(json.dumps(item) + "\n" for item in items[task]))
        (directory / f"{task}.yaml").write_text(
            f"task: {task}\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {data}}}\ntest_split: test\n"
            + text.lstrip())
    return str(directory)
