"""Makes local tasks for lm-evaluation-harness from what a model of this repository has not been trained on.

  python experiments/tasks/own.py --checkpoint=workdirs/quickstart --target=tasks
  python experiments/tasks/own.py --checkpoint=workdirs/sudoku --target=tasks
  python experiments/tasks/own.py --checkpoint=workdirs/sft_quickstart --target=tasks
  python -m illada_jax.evaluate --include_path=tasks --tasks=own_text --checkpoint=workdirs/quickstart --output_dir=…

Of a model of text `own_text`: which of four passages of six words goes on a held-out document? One is its own, the
others stand in the same place of other held-out documents.
Of a model of sudoku `own_sudoku`: which of four grids solves a held-out puzzle? The wrong ones have two of the empty
cells of one row swapped. And `own_sudoku_solve`: write the grid.
Of a model fine-tuned on prompts and responses `own_answers`: write the answer to a held-out prompt.
"""

import itertools
import json
import pathlib
import random
import re

import yaml
from absl import flags

from illada_jax import api, cli
from illada_jax.config import Config
from illada_jax.data.corpus import open_corpus
from illada_jax.data.example_store import open_examples
from illada_jax.errors import InputError

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "a training run of this repository", required=True)
TARGET = flags.DEFINE_string("target", None, "directory to write tasks and items to", required=True)
ITEMS = flags.DEFINE_integer("items", 400, "items, at most", lower_bound=1)

CONTEXT_WORDS, WORDS, CHOICES = 20, 6, 4
Item = dict[str, object]


def main(argv: list[str]) -> None:
    """Writes the tasks that fit the checkpoint's data."""
    del argv
    lm = api.load(CHECKPOINT.value)
    draw = random.Random(0)
    documents = [] if lm.config.sft.format != "none" else heldout_documents(lm.config)
    if not documents:
        items = {"own_answers": answer_items(lm)}
    elif all(len(document) == 33 and document[16] == "=" for document in documents):
        items = {"own_sudoku": [sudoku_item(document, draw) for document in documents]}
        items["own_sudoku_solve"] = [{"context": document[:17], "target": document[17:]} for document in documents]
    else:
        items = {"own_text": text_items(documents, draw)}
    target = pathlib.Path(TARGET.value).absolute()
    target.mkdir(parents=True, exist_ok=True)
    for name, rows in items.items():
        random.Random(1).shuffle(rows)
        write_task(target, name, rows[: ITEMS.value])
        print(f"{name}: {len(rows[: ITEMS.value])} items in {target}")


def heldout_documents(config: Config) -> list[str]:
    """The texts that the run holds out. Raises InputError if there are none."""
    corpus = open_corpus(config.data)
    if not corpus.heldout.num_documents:
        raise InputError(f"--checkpoint={CHECKPOINT.value}: nothing was held out")
    return [corpus.tokenizer.decode(corpus.heldout.document(index)) for index in range(corpus.heldout.num_documents)]


def answer_items(lm: api.LanguageModel) -> list[Item]:
    """The prompts that the run holds out, with their answers.

    Raises:
      InputError: there are none, or they are conversations, which are no plain text.
    """
    heldout = open_examples(lm.config, lm.tokenizer, progress=False).heldout
    questions = [heldout.question(index) for index in range(heldout.num_documents)]
    if not questions:
        raise InputError(f"--checkpoint={CHECKPOINT.value}: nothing was held out")
    decode = lm.tokenizer.decode
    if any(lm.tokenizer.encode(decode(question.prompt)) != question.prompt for question in questions):
        raise InputError(f"--checkpoint={CHECKPOINT.value}: was fine-tuned on conversations; a model of text, "
                         "sudoku or prompts and responses is wanted")
    return [{"context": decode(question.prompt), "target": decode(question.answer)} for question in questions]


def text_items(documents: list[str], draw: random.Random) -> list[Item]:
    """One item of each document that is long enough."""
    # Words with the blanks before them.
    found = [re.findall(r"\s*\S+", document) for document in documents]
    words = [words for words in found if len(words) >= CONTEXT_WORDS + WORDS]
    items = []
    for index, own in enumerate(words):
        others = draw.sample([other for number, other in enumerate(words) if number != index], CHOICES - 1)
        choices = ["".join(part[CONTEXT_WORDS : CONTEXT_WORDS + WORDS]) for part in (own, *others)]
        items.append(make_item("".join(own[:CONTEXT_WORDS]), choices, draw))
    return items


def sudoku_item(document: str, draw: random.Random) -> Item:
    """A puzzle, its solution and three near misses."""
    puzzle, grid = document[:16], document[17:]
    empty = [cell for cell in range(16) if puzzle[cell] == "."]
    pairs = [pair for pair in itertools.combinations(empty, 2) if pair[0] // 4 == pair[1] // 4]
    rest = [pair for pair in itertools.combinations(empty, 2) if grid[pair[0]] != grid[pair[1]] and pair not in pairs]
    draw.shuffle(pairs)
    draw.shuffle(rest)
    wrong = []
    for one, other in (pairs + rest)[: CHOICES - 1]:
        cells = list(grid)
        cells[one], cells[other] = cells[other], cells[one]
        wrong.append("".join(cells))
    return make_item(document[:17], [grid, *wrong], draw)


def make_item(context: str, choices: list[str], draw: random.Random) -> Item:
    """An item whose first choice is right, with the choices in random order."""
    order = draw.sample(range(len(choices)), len(choices))
    return {"context": context, "choices": [choices[index] for index in order], "answer": order.index(0)}


def write_task(target: pathlib.Path, name: str, items: list[Item]) -> None:
    """Items and task file."""
    path = target / f"{name}.jsonl"
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
    kind = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    if "choices" not in items[0]:
        kind = {"output_type": "generate_until", "doc_to_target": "target",
                "generation_kwargs": {"until": [], "do_sample": False}, "metric_list": [{"metric": "exact_match"}]}
    (target / f"{name}.yaml").write_text(yaml.safe_dump({
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test", "doc_to_text": "context", "target_delimiter": "", "num_fewshot": 0, **kind,
    }, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
