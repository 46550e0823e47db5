"""Every example in a command's help and in every README is run: the cheap ones as they are, the dear ones shortened.

An example that this test does not know fails it.
"""

import gzip
import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from illada_jax.__main__ import COMMANDS
from tests.compilation import FAST_COMPILATION

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "illada_jax"
READMES = [path for path in sorted(ROOT.rglob("README.md"))
           if not any(part.startswith(".") or part in ("workdirs", "corpora") for part in path.relative_to(ROOT).parts)]
# Examples that no test runs as they are, by a part of them.
NOT_HERE = {
    "…": "has a part to fill in",
    "checkpoint=DIRECTORY": "has a part to fill in",
    "--config=FILE": "has a part to fill in",
    ".venv": "`.ci/run` runs it",
    "illada_jax.aot": "needs the compiler for TPUs: tests/planning",
    "BUCKET": "needs a pod",
    "--set=help": "tests/evaluation",
    "GSAI-ML/iLLaDA-8B-Base --dtype=bfloat16 --preset": "needs a benchmark from the Hub: tests/evaluation",
    "arc_*": "needs a benchmark from the Hub: tests/evaluation",
    "parquet:": "needs pyarrow: tests/data",
    "lm_eval_cli": "needs a benchmark from the Hub: tests/evaluation",
    "demo_text.py": "needs a package of the system",
    "experiments/demo": "needs the corpus of demo_text.py",
    "workdirs/demo": "needs the corpus of demo_text.py",
    "chitchat": "needs a package with the conversations: test_a_small_file_of_ones_own",
    "experiments/benchmarks/": "takes minutes",
    "experiments/studies/": "takes minutes: tests/test_studies.py",
    "experiments/tasks/prepare.py": "needs a download",
    "build.py": "tests/notebooks",
    "verify_official.py": "needs the official weights: tests/interop",
    "pytest": "this is it",
}
_TINY = {"model.d_model": 16, "model.num_layers": 1, "model.num_heads": 4, "model.num_kv_heads": 2, "model.head_dim": 4,
         "model.d_ff": 32, "train.steps": 4, "train.tensorboard": False, "eval.windows": 4, "eval.draws": 1,
         "eval.rows": 2, "decode.max_new_tokens": 16, "decode.batch_size": 2}
TRAINED = {  # what shortens a run, beside its example's own flags
    "quickstart": {"data.sources": "('text:books/',)", "data.tokenizer_vocab_size": 400, "data.heldout_fraction": 0.3},
    "sft_quickstart": {"data.sources": "('tasks:reverse:200',)"},
    "sudoku": {},
    "pretrain_small": {"data.sources": "('text:books/',)", "data.tokenizer_vocab_size": 400},
}


def commands(text: str) -> list[str]:
    """The commands in indented or fenced blocks of a text, and in its inline code."""
    text = text.replace("\\\\\n", "\n").replace("\\\n", " ")
    inline = re.findall(r"`((?:python|illada) [^`\n]+)`", text)
    blocks = re.findall(r"^(?: {4})?((?:[\w./]*python3?|illada|echo|pip) .+?)(?: +#.*)?$", text, re.MULTILINE)
    return [re.sub(r" +", " ", line).strip() for line in [*blocks, *inline] if "python " in line or "illada " in line]


def of_helps() -> list[str]:
    """The examples in the help of every command, each once."""
    paths = [*(PACKAGE / f"{module}.py" for module, _ in COMMANDS.values()), PACKAGE / "__main__.py",
             PACKAGE / "evaluation" / "lm_eval_cli.py"]
    texts = [path.read_text(encoding="utf-8").split('"""')[1] for path in paths]
    return list(dict.fromkeys(line for text in texts for line in commands(text)))


def examples() -> list[str]:
    """All examples, each once."""
    texts = [path.read_text(encoding="utf-8").split('"""')[1] for path in (ROOT / "experiments").glob("*.py")]
    texts += [path.read_text(encoding="utf-8") for path in READMES]
    return list(dict.fromkeys([*of_helps(), *(line for text in texts for line in commands(text))]))


MADE = ["python -m illada_jax.convert --source=GSAI-ML/LLaDA-8B-Base --target=workdirs/quickstart",
        "python -m illada_jax.convert --source=GSAI-ML/LLaDA-8B-Base --target=workdirs/sft_quickstart"]
RUN = [line for line in examples() if not any(part in line for part in NOT_HERE)]
TRAIN = [line for line in RUN if "--config=" in line and "--dry_run" not in line]
# These need runs, and tasks that `own.py` makes.
AFTER = sorted((line for line in RUN if "workdirs/sudoku" in line or "illada_jax.plot" in line),
               key=lambda line: "own.py" not in line)
CHEAP = [line for line in RUN if line not in TRAIN + AFTER]
HELPS = [line for line in CHEAP if line in of_helps()]


def parsed(line: str) -> dict:
    """A command of `run_commands`, shortened if it trains."""
    before, _, command = line.rpartition(" | ")
    words = shlex.split(command)
    if words[0] == "illada":
        words = ["python", "-m", "illada_jax", *words[1:]]
    config = next((word.partition("=")[2] for word in words if word.startswith("--config=")), None)
    if config and "--dry_run" not in words:
        given = {word.partition("=")[0] for word in words}
        short = {**_TINY, **TRAINED[pathlib.Path(config).stem]}
        if "train.epochs" in " ".join(words) or "sft" in config:
            short["eval.every_epochs"] = 0
        words += [f"--config.{key}={value}" for key, value in short.items() if f"--config.{key}" not in given]
    return {"argv": words, "stdin": shlex.split(before)[1] + "\n" if before else "What is a list?\n/exit\n"}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A directory with what the examples name: this repository's files, texts, tokenizers and stand-ins for models."""
    path = tmp_path_factory.mktemp("examples")
    for name in ("experiments", "tpu"):
        (path / name).symlink_to(ROOT / name)
    books = path / "books"
    books.mkdir()
    for number, source in enumerate(sorted(pathlib.Path(json.__file__).parent.glob("*.py"))):
        (books / f"{number}.txt").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    (path / "web").mkdir()
    with gzip.open(path / "web" / "0.jsonl.gz", "wt") as file:
        for number in range(50):
            file.write(json.dumps({"content": f"Page {number} says what it says."}) + "\n")
    (path / "prompts.jsonl").write_text('{"prompt": "A list is"}\n')
    for family in ("LLaDA-8B-Base", "LLaDA-8B-Instruct", "iLLaDA-8B-Base", "iLLaDA-8B-Instruct"):
        shutil.copytree(PACKAGE / "demo" / "pretrained", path / "GSAI-ML" / family)
    write_tokenizer(path / "tokenizer.json")
    return path


def write_tokenizer(path):
    """A Hugging Face tokenizer of bytes and special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<pad>", "<mask>"]
    tokenizer.train_from_iterator(["a text"], trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.save(str(path))


def run_all(here, lines):
    """{line: result} of examples that run one after another in one process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(here / "cache"),
                   "XLA_FLAGS": FAST_COMPILATION}
    done = subprocess.run([sys.executable, "-m", "tests.run_commands"], input=json.dumps(list(map(parsed, lines))),
                          capture_output=True, text=True, cwd=here, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    return dict(zip(lines, json.loads(done.stdout), strict=True))


def check(results):
    """All succeeded without a traceback or an error."""
    failed = {line: result for line, result in results.items() if result["code"] or "rror:" in result["stderr"]}
    assert not failed, "\n\n".join(f"{line}\n{result['stderr'][-1500:]}" for line, result in failed.items())


def test_no_example_is_left_out():
    """Parts that excuse an example excuse at least one; the examples of every command are found."""
    every = examples()
    assert [part for part in NOT_HERE if not any(part in line for line in every)] == []
    for module, _ in COMMANDS.values():
        assert any(f"illada_jax.{module} " in line for line in every), module
    assert len(HELPS) >= 12 and len(TRAIN) >= 5 and AFTER


@pytest.mark.slow
def test_examples_of_helps(here):
    check(run_all(here, [*MADE, *HELPS]))
    assert (here / "out.html").is_file() and (here / "corpora" / "books" / "manifest.json").is_file()


@pytest.mark.slow
def test_other_examples_and_those_that_train(here):
    shutil.rmtree(here / "workdirs", ignore_errors=True)
    extra = {"lm_eval": "workdirs/sudoku", "matplotlib": "illada_jax.plot"}
    able = [line for line in AFTER for package, part in extra.items()
            if part in line and importlib.util.find_spec(package)]
    for name in ("run1", "run2"):
        (here / "workdirs").mkdir(exist_ok=True)
        (here / "workdirs" / name).symlink_to("quickstart")
    check(run_all(here, [line for line in CHEAP if line not in HELPS] + TRAIN + able))
    assert (here / "out" / "trace.html").is_file() and (here / "out" / "books" / "manifest.json").is_file()
