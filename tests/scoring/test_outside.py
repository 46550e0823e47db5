"""The scorers on an outside network: a pretrained masked language model of chemical reactions."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from illada_jax.decoding import SpecialIds
from illada_jax.scoring import ScoreConfig, Scorer

STUDY = pathlib.Path(__file__).parents[2] / "experiments/studies/outside_model.py"
MISSING = [name for name in ("torch", "rxnmapper") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)} (the weights)")


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("outside_model", STUDY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def network(study):
    return study.load()


def ids_of(vocabulary):
    return SpecialIds(mask=vocabulary["[MASK]"], eos=vocabulary["[SEP]"], bos=vocabulary["[CLS]"], pad=0,
                      vocab_size=len(vocabulary))


def test_the_true_product_is_above_its_corruptions(study, network):
    logits_fn, vocabulary = network
    reaction, product = study.REACTIONS[1].split(">>")
    context, truth = study.tokenise(f"{reaction}>>", vocabulary), study.tokenise(product, vocabulary)
    common = [vocabulary[piece] for piece in study.COMMON]
    wrong = study.corruptions(truth, common, np.random.default_rng(0))[0]
    scorer = Scorer(logits_fn, ScoreConfig(bos=True, eos=True), ids_of(vocabulary), study.MAX_LENGTH)
    best, *rest = (score.value for score in scorer.score([(context, each) for each in (truth, *wrong)]))
    assert best > max(rest)


def test_our_forward_pass_is_that_of_the_library(study, network):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    import torch

    logits_fn, vocabulary = network
    directory = pathlib.Path(importlib.util.find_spec("rxnmapper").origin).parent / study.MODEL
    theirs = transformers.AlbertForMaskedLM.from_pretrained(directory, attn_implementation="eager").eval()
    tokens = np.array([[vocabulary["[CLS]"], *study.tokenise(study.REACTIONS[0], vocabulary), vocabulary["[SEP]"]]])
    columns = np.arange(tokens.shape[1])[None]
    ours = jax.jit(logits_fn)(tokens, columns, np.ones_like(tokens), columns, None)[0]
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4)
