"""Evaluators: the bound's scale by hand, and results that depend on neither devices nor batch sizes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from illada_jax.data.batch import Batch
from illada_jax.data.corpus import open_corpus
from illada_jax.data.pipeline import Pipeline
from illada_jax.diffusion.process import corrupt_fixed_count
from illada_jax.evaluation.evaluators import make_evaluators
from illada_jax.parallel.mesh import make_mesh
from illada_jax.training.run import resolve
from tests.training.conftest import make_config
from tests.util import random_params


@pytest.fixture(scope="module")
def evaluate(text_file, tmp_path_factory):
    """evaluate(name, num_devices, scale of the params, **changes): the results of one evaluator."""
    opened = {}

    def evaluate(name, num_devices=1, scale=2.0, **changes):
        config = make_config(text_file, tmp_path_factory.getbasetemp() / "cache", model__num_layers=1, **changes)
        corpus = opened.setdefault("corpus", open_corpus(config.data))
        config = resolve(config, corpus.tokenizer)
        mesh = make_mesh(config.mesh, jax.devices()[:num_devices])
        evaluator = make_evaluators((name,), config, corpus, Pipeline(config, corpus), mesh)[name]
        return evaluator(jax.tree.map(jnp.asarray, random_params(config.model, scale)), 0)

    return evaluate


def test_bits_per_byte_of_a_model_that_knows_nothing(evaluate, text_file, tmp_path):
    """Every token, the end of each document too, costs log2 of the vocabulary."""
    config = make_config(text_file, tmp_path)
    corpus = open_corpus(config.data)
    texts = [path.read_bytes() for path in text_file.iterdir()]
    held_out = corpus.heldout.num_bytes
    documents = corpus.heldout.num_documents
    assert 0 < documents < len(texts) and 0 < held_out < sum(map(len, texts))
    results = evaluate("bits_per_byte", scale=0.0, eval__windows=0)
    assert results["eval/bits_per_byte"] == pytest.approx(math.log2(264) * (held_out + documents) / held_out, rel=1e-5)
    assert results["eval/nats_per_token"] == pytest.approx(math.log(264), rel=1e-5)


def test_the_bound_depends_on_neither_devices_nor_batches(evaluate):
    """The number of windows is no multiple of the batches."""
    found = {(devices, batch): evaluate("bits_per_byte", devices, eval__batch_size=batch, eval__windows=27,
                                        eval__draws=2)
             for devices, batch in ((1, 32), (1, 5), (2, 5), (4, 8), (8, 32))}
    for results in found.values():
        for name, value in found[1, 32].items():
            assert results[name] == pytest.approx(value, abs=1e-5), found
    assert found[1, 32]["eval/bits_per_byte_stderr"] > 1e-3


def test_the_masks_of_a_window_depend_on_its_number_alone():
    """In any batch and order; counts hit every stratum once over all windows."""
    rng = np.random.default_rng(0)
    ones = np.ones((12, 24))
    batch = Batch(rng.integers(0, 9, ones.shape).astype(np.int32), ones > 0, ones.astype(np.int32),
                  ones.astype(np.int32), ones.astype(np.float32))
    key = jax.random.key(3)
    draw = jax.jit(lambda batch, rows_B: corrupt_fixed_count(key, batch, 9, rows_B, 12))
    whole = draw(batch, jnp.arange(12))
    counts_B = np.asarray(whole.masked_BL).sum(axis=1)
    assert sorted((counts_B - 1) // 2) == list(range(12))
    for rows in ([11, 3, 7], rng.permutation(12)):
        part = draw(jax.tree.map(lambda x: x[rows], batch), jnp.array(rows))  # noqa: B023
        for some, all_rows in zip(part, whole, strict=True):
            np.testing.assert_array_equal(some, np.asarray(all_rows)[rows])


def test_decoded_evaluations_depend_on_neither_devices_nor_batches(evaluate):
    sampled = {"decode__max_new_tokens": 8, "decode__block_length": 4, "decode__steps_per_block": 2,
               "decode__confidence": "random", "decode__temperature": 1.0, "eval__rows": 5, "eval__prompts": ("a", "")}
    results = [evaluate("samples", devices, decode__batch_size=batch, **sampled) for devices, batch in ((1, 8), (8, 3))]
    assert all(result == results[0] for result in results[1:]), results
