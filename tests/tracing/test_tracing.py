"""Traces of a small random model: they show what the decoder did."""

import json
import re

import numpy as np
import pytest

from illada_jax import api
from illada_jax.config import Config, DataConfig, DecodeConfig, ModelConfig
from illada_jax.data.tokenizers import ByteTokenizer
from illada_jax.errors import InputError
from illada_jax.tracing import Trace, compare, make_trace, write_page, write_picture
from illada_jax.tracing.trace import Candidate, display
from tests.util import random_params

TOKENIZER = ByteTokenizer()
MODEL = ModelConfig(vocab_size=TOKENIZER.vocab_size, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
                    d_ff=32, max_length=64)
CONFIG = Config(model=MODEL, data=DataConfig(length=64), decode=DecodeConfig(
    max_new_tokens=12, block_length=4, steps_per_block=4, suppressed_ids=(*range(128, 256),)))


@pytest.fixture(scope="module")
def lm():
    return api.LanguageModel(CONFIG, random_params(MODEL, scale=3.0), TOKENIZER)


def check(trace, lm, generation):
    """A greedy trace, one token per step: the surest column's best candidate is written, with its probability."""
    for step, candidates in enumerate(trace.candidates):
        surest = max(candidates, key=lambda column: candidates[column][0].probability)
        written = [column for column, at in enumerate(trace.written_at) if at == step]
        assert written == [surest]
        assert candidates[surest][0].piece == trace.pieces[surest]
        assert trace.probability[surest] == pytest.approx(candidates[surest][0].probability, rel=1e-4)


def test_a_trace_replays_what_the_decoder_did(lm):
    never = (*range(128, 256), TOKENIZER.eos_id)
    generation = lm.generate(["abc"], suppressed_ids=never)[0]
    trace = make_trace(lm, generation, suppressed_ids=never)
    assert trace.num_steps == generation.nfe == 12
    check(trace, lm, generation)
    assert trace.visible == [7] * 4 + [11] * 4 + [15] * 4
    assert trace.block == [-1] * 3 + [0] * 4 + [1] * 4 + [2] * 4
    np.testing.assert_allclose(np.log(trace.probability[3:]), generation.log_probs, rtol=1e-3)


def test_a_guided_trace_shows_the_probabilities_that_wrote_the_text(lm):
    settings = {"cfg_scale": 1.5, "suppressed_ids": (*range(128, 256), TOKENIZER.eos_id)}
    generation = lm.generate(["abc"], **settings)[0]
    trace = make_trace(lm, generation, **settings)
    check(trace, lm, generation)
    np.testing.assert_allclose(np.log(trace.probability[3:]), generation.log_probs, rtol=1e-3)


def test_a_fixed_canvas_is_visible_from_the_start(lm):
    generation = lm.generate(["abc"], length="fixed")[0]
    trace = make_trace(lm, generation, length="fixed")
    assert set(trace.visible) == {15}
    check(trace, lm, generation)


def test_gaps_and_several_tokens_a_step(lm):
    generation = lm.infill(["a[[mask:5]]b[[mask:2]]"], steps_per_block=2)[0]
    trace = make_trace(lm, generation, infill=True, steps_per_block=2)
    assert trace.block == [-1, 0, 0, 0, 0, 1, -1, 1, 1]
    assert [trace.written_at.count(step) for step in range(trace.num_steps)] == [2, 2, 2, 1]
    assert "".join(trace.pieces) == generation.text


def test_what_was_never_written_stays_masked(lm):
    """A fixed canvas that stops at EOS in an early block."""
    eos = TOKENIZER.eos_id
    generation = lm.generate(["abc"], length="fixed", suppressed_ids=tuple(i for i in range(MODEL.vocab_size)
                                                                           if i != eos))[0]
    assert generation.stopped_by == "eos"
    trace = make_trace(lm, generation, length="fixed")
    assert trace.written_at[-8:] == [trace.num_steps] * 8 and trace.probability[-1] == 0


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_trace_says_how_far_a_cache_agrees_with_exact_decoding(lm, cache, tmp_path):
    settings = {"cache": cache, "suppressed_ids": (*range(128, 256), TOKENIZER.eos_id), "max_new_tokens": 32,
                "block_length": 16, "steps_per_block": 16}
    prompts = ["abc", "de [fg] "]
    approximate = lm.generate(prompts, **settings)
    exact = lm.generate(prompts, **{**settings, "cache": "none"})
    traces = [make_trace(lm, result, row=row, **settings) for row, result in enumerate(approximate)]
    for trace, one, other in zip(traces, approximate, exact, strict=True):
        same = [a == b for a, b in zip(one.tokens, other.tokens, strict=True)]
        assert trace.agrees[-32:] == same and trace.agreement == np.mean(same)
    assert min(trace.agreement for trace in traces) < 1
    assert make_trace(lm, exact[0], **{**settings, "cache": "none"}).agreement is None
    write_page(tmp_path / "p.html", traces)
    assert f'"agreement":{traces[0].agreement}' in (tmp_path / "p.html").read_text()
    filled = lm.infill(["ab[[mask:9]]"], cache=cache, cache_refresh=1)[0]
    assert make_trace(lm, filled, infill=True, cache=cache, cache_refresh=1).agreement == 1


def test_display_shows_half_a_character_as_a_piece():
    assert display(TOKENIZER, TOKENIZER.encode("a")[0]) == "a"
    assert "\ufffd" not in display(TOKENIZER, TOKENIZER.encode("é")[0])


TRACE = Trace(title="</script><b>", pieces=["a", "</script>", "\n", "long " * 30], written_at=[-1, 1, 0, 2],
              block=[-1, 0, 0, 1], probability=[1, 0.5, 0.25, 0.125], visible=[3, 3, 4],
              candidates=[{1: [Candidate("x", 0.5)], 2: [Candidate("\n", 0.25)]}, {1: [Candidate("</script>", 0.5)]},
                          {3: [Candidate("</b>", 1.0)]}])


def test_strategies_of_one_prompt_are_what_decoding_them_gives(lm):
    strategies = [{}, {"confidence": "random"}, {"reveal": "threshold", "threshold": 0.05}]
    traces = compare(lm, "abc", strategies, max_new_tokens=8, row=3)
    assert [trace.strategy for trace in traces] == [
        "confidence=low_confidence, reveal=schedule, steps_per_block=4", "confidence=random, reveal=schedule, "
        "steps_per_block=4", "confidence=low_confidence, reveal=threshold, threshold=0.05"]
    for trace, strategy in zip(traces, strategies, strict=True):
        result = lm.generate(["abc"], rows=[3], max_new_tokens=8, **strategy)[0]
        assert (trace.title, trace.nfe) == ("abc", result.nfe)
        assert [at for at in trace.written_at if at >= 0] == [step for step in result.canvas_step if step >= 0]
    assert traces[0].written_at != traces[1].written_at and traces[2].nfe < traces[0].nfe
    filled = compare(lm, "a[[mask:3]]b", strategies[:2], infill=True)
    assert all(trace.pieces[0] == "a" and trace.pieces[-1] == "b" for trace in filled)
    alone = compare(lm, "abc", [{"confidence": "margin"}])[0]
    assert alone.strategy == "the clearest choices first, 4 steps for a block of 4 tokens"
    with pytest.raises(InputError, match="confidnce: unknown key"):
        compare(lm, "abc", [{}, {"confidnce": "random"}])


def test_what_stands_behind_the_answer_is_told_apart(lm):
    """EOS is written into the middle of a fixed canvas: the answer ends before it."""
    eos, settings = TOKENIZER.eos_id, {"length": "fixed", "block_length": 12, "suppressed_ids": (*range(128, 256),)}
    free = lm.generate(["abc"], **settings)[0]
    stop = free.canvas[9]
    result = lm.generate(["abc"], stop_ids=(stop,), **settings)[0]
    trace = make_trace(lm, result, stop_ids=(stop,), **settings)
    assert stop != eos and trace.end == 3 + len(result.tokens) < len(result.canvas)
    assert "".join(trace.pieces[3 : trace.end]) == result.text
    whole = lm.infill(["a[[mask:3]]b"])[0]
    assert make_trace(lm, whole, infill=True).end is None


def test_a_page_holds_the_traces_and_no_text_of_the_model_ends_its_script(tmp_path):
    write_page(tmp_path / "p.html", [TRACE, TRACE])
    page = (tmp_path / "p.html").read_text()
    assert page.count("</script>") == 1 and "http" not in page
    data = json.loads(re.search(r"const traces = (.*);\n", page).group(1))
    assert len(data) == 2 and data[0]["pieces"] == TRACE.pieces
    assert data[0]["candidates"][1] == {"1": [["</script>", 0.5]]}


def test_pictures_have_a_frame_for_each_state(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    from PIL import Image

    write_picture(tmp_path / "t.gif", TRACE)
    write_picture(tmp_path / "t.png", TRACE)
    with Image.open(tmp_path / "t.gif") as image:
        assert image.n_frames == 4
    with Image.open(tmp_path / "t.png") as image:
        assert image.width > 500


def test_bad_input(lm, tmp_path):
    with pytest.raises(InputError, match=r"must be \.gif or \.png"):
        write_picture(tmp_path / "t.jpg", TRACE)
    generation = lm.generate(["abc"])[0]
    generation.canvas_step[:] = [-1] * len(generation.canvas_step)
    with pytest.raises(InputError, match="nothing was written"):
        make_trace(lm, generation)
