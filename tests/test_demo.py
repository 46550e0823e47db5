"""The demo models of the package: small, trained, and decoded like any other model."""

import pathlib

import numpy as np
import pytest

import illada_jax

DEMO = pathlib.Path(illada_jax.__file__).parent / "demo"
# From the documentation that the model was trained on.
SENTENCE = "If the file already exists, it is overwritten. The default value is None."


@pytest.fixture(scope="module")
def lm():
    return illada_jax.load("demo")


def test_they_are_small():
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) < 16e6


def test_the_model_is_trained(lm):
    """Every fourth token is masked in turn; always predicting the most common token would score far lower."""
    tokens = np.array(lm.tokenizer.encode(SENTENCE))
    masked = np.arange(len(tokens))[None] % 4 == np.arange(4)[:, None]
    predicted = np.asarray(lm.logits(np.where(masked, lm.tokenizer.mask_id, tokens))).argmax(-1)
    assert np.mean((predicted == tokens)[masked]) > 0.4


def test_texts_do_not_depend_on_the_batch(lm):
    """On a trained model, sampled: design law 3."""
    prompts = ["The with statement is", "Return", "If the file does not exist, it is created and", "A class"]
    batched = lm.generate(prompts, max_new_tokens=16)
    alone = [lm.generate([prompt], max_new_tokens=16, rows=[row])[0] for row, prompt in enumerate(prompts)]
    assert [result.tokens for result in batched] == [result.tokens for result in alone]
    assert all(result.text.strip() for result in batched)


def test_gaps_are_filled_and_nothing_else_changes(lm):
    text = lm.infill(["Return a list of [[mask:2]] in the file."])[0].text
    assert text.startswith("Return a list of") and text.endswith("in the file.") and "mask" not in text


def test_answers_end_by_themselves():
    lm = illada_jax.load("demo-chat")
    answers = [lm.chat([{"role": "user", "content": f"What does {name} do?"}])
               for name in ("shutil.copystat", "os.path.join", "str.split")]
    assert all(answer.stopped_by == "eos" and answer.text for answer in answers)
