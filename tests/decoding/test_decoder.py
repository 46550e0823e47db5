"""Properties of every row, for any network."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from illada_jax.config import DecodeConfig
from illada_jax.decoding import Decoder, SpecialIds, plain_logits_fn
from illada_jax.decoding import decoder as decoder_lib
from illada_jax.decoding.confidence import CONFIDENCES
from illada_jax.decoding.decoder import canvas_buckets, make_rules
from illada_jax.decoding.loop import Carry, run_blocks
from illada_jax.decoding.reveal import REVEALS
from illada_jax.decoding.sampling import RowSettings
from illada_jax.errors import InputError
from tests.decoding.toys import IDS, table

SETTINGS = DecodeConfig(max_new_tokens=24, block_length=8, steps_per_block=4, batch_size=4)
M = IDS.mask


def test_eos_stops_a_row_and_is_not_part_of_the_answer():
    results = Decoder(table(eos_bias=1.5)[0], SETTINGS, IDS, 96).generate([[4] * n for n in range(1, 9)])
    stopped = [r for r in results if r.stopped_by == "eos"]
    assert stopped
    for n, result in enumerate(results, 1):
        assert len(result.canvas) == len(result.canvas_step) and result.canvas_step[:n] == [-1] * n
        assert result.canvas_step[n : n + len(result.tokens)] == result.reveal_step
        assert IDS.eos not in result.tokens
        assert len(result.tokens) == len(result.reveal_step) == len(result.log_probs)
        if result.stopped_by == "length":
            assert len(result.tokens) == 24
    assert any(r.nfe < 12 for r in stopped)  # a row that stopped early did not pay for the rest


def test_a_stop_id_ends_a_row_after_its_block():
    decoder = Decoder(table(eos_bias=-20.0)[0], SETTINGS, IDS, 64)
    free = decoder.generate([[4], [5]])
    settings = dataclasses.replace(SETTINGS, stop_ids=(free[0].tokens[10],))
    for before, after in zip(free, Decoder(decoder.logits_fn, settings, IDS, 64).generate([[4], [5]]), strict=True):
        end = next((n for n, id_ in enumerate(before.tokens) if id_ in settings.stop_ids), 24)
        assert (after.tokens, after.stopped_by) == (before.tokens[:end], "stop_id" if end < 24 else "length")
        assert after.nfe == 4 * min(3, end // 8 + 1) and len(after.canvas) == 1 + 8 * min(3, end // 8 + 1)


def test_infilling_changes_gaps_only():
    """Also of a text that fills the context."""
    texts = [[4, M, M, 5, 1], [M] * 20 + [6], [7, 1, M]]
    results = Decoder(table(eos_bias=9.0)[0], SETTINGS, IDS, 21).generate(texts, infill=True)
    for text, result in zip(texts, results, strict=True):
        assert len(result.tokens) == len(text)
        for old, new, step in zip(text, result.tokens, result.reveal_step, strict=True):
            assert (old == new and step == -1) if old != M else (new not in (M, IDS.eos, IDS.pad) and step >= 0)
        assert result.stopped_by == "filled"
        blocks = [min(8, text.count(M) - start) for start in range(0, text.count(M), 8)]
        assert result.nfe == sum(min(4, masks) for masks in blocks)


def test_finished_rows_and_padding_do_not_change():
    rng = np.random.default_rng(0)
    tokens_BL = rng.integers(4, 11, (3, 64)).astype(np.int32)
    tokens_BL[:, 40:] = IDS.pad
    tokens_BL[1, 20:] = IDS.pad
    carry = Carry(
        tokens_BL=tokens_BL, length_B=np.int32([40, 20, 30]), prompt_B=np.int32([9, 20, 9]),
        limit_B=np.int32([60, 36, 60]),
        done_B=np.array([True, False, True]), keys_B2=np.zeros((3, 2), np.uint32), steps_B=np.int32([5, 0, 7]),
        reveal_step_BL=rng.integers(-1, 5, (3, 64)).astype(np.int32),
        log_prob_BL=rng.normal(size=(3, 64)).astype(np.float32),
        settings=jax.tree.map(lambda x: np.repeat(x, 3, axis=0), RowSettings.of(SETTINGS)))
    after, _ = run_blocks(table(eos_bias=-20.0)[0], carry, np.int32(99), rules=make_rules(SETTINGS, IDS))
    for before_B, after_B in zip(jax.tree.leaves(carry), jax.tree.leaves(jax.device_get(after)), strict=True):
        for row in (0, 2):
            np.testing.assert_array_equal(before_B[row], after_B[row])
    assert after.done_B.all() and after.length_B[1] == 36 and after.steps_B[1] == 8
    np.testing.assert_array_equal(after.tokens_BL[1, :20], tokens_BL[1, :20])
    np.testing.assert_array_equal(after.tokens_BL[1, 36:], tokens_BL[1, 36:])
    np.testing.assert_array_equal(after.reveal_step_BL[1, 36:], carry.reveal_step_BL[1, 36:])


def test_seeds_and_rows_change_samples_and_nothing_else_does():
    settings = dataclasses.replace(SETTINGS, temperature=1.0)
    logits_fn, _ = table(eos_bias=-20.0)
    first, second = Decoder(logits_fn, settings, IDS, 96).generate([[4], [4]])
    again = Decoder(logits_fn, settings, IDS, 96).generate([[4], [4]])
    other = Decoder(logits_fn, dataclasses.replace(settings, seed=1), IDS, 96).generate([[4]])[0]
    assert first.tokens != second.tokens
    assert [r.tokens for r in again] == [first.tokens, second.tokens]
    assert other.tokens != first.tokens


def test_compiled_shapes_are_bounded_and_params_are_arguments():
    traced = []

    def count_traces(scale, tokens_BL):
        traced.append(tokens_BL.shape)
        return jax.nn.one_hot((tokens_BL + 5) % 11, 12) * scale

    settings = dataclasses.replace(SETTINGS, batch_size=8)
    rng = np.random.default_rng(0)
    prompts = [[4] * int(n) for n in rng.integers(1, 200, 200)]
    for scale in (1.0, 2.0):  # as an evaluator does with new params
        logits_fn = plain_logits_fn(jax.tree_util.Partial(count_traces, np.float32(scale)))
        Decoder(logits_fn, settings, IDS, 256).generate(prompts)
        Decoder(logits_fn, dataclasses.replace(settings, max_new_tokens=9, seed=4), IDS, 256).generate(prompts)
    assert len(traced) <= len(canvas_buckets(256)) == 5


def test_buckets_cover_the_context():
    assert canvas_buckets(256) == (64, 96, 128, 192, 256)
    assert canvas_buckets(40) == (40,)
    assert canvas_buckets(100) == (64, 96, 100)
    for block_length, buckets in ((8, [64, 96]), (64, [64, 96]), (65, [96]), (96, [96])):  # all hold a block
        assert Decoder(None, dataclasses.replace(SETTINGS, block_length=block_length), IDS, 96).buckets == buckets


def test_cost_follows_the_answer_and_not_the_budget():
    """A budget of 1,024 tokens makes no larger canvas, and no more evaluations, than one of 64."""
    shapes = []

    def ends_after_40(tokens_BL):
        shapes.append(tokens_BL.shape)
        eos_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]) >= 50, tokens_BL.shape)
        return jax.nn.one_hot(jnp.where(eos_BL, IDS.eos, 5), 12) * 9.0

    settings = DecodeConfig(max_new_tokens=64, block_length=32, steps_per_block=32)
    results = []
    for budget in (64, 1024):
        settings = dataclasses.replace(settings, max_new_tokens=budget)
        results.append(Decoder(plain_logits_fn(ends_after_40), settings, IDS, 2048).generate([[4] * 10])[0])
    assert results[0] == results[1]
    assert len(results[0].tokens) == 40 and results[0].nfe == 64
    assert max(length for _, length in shapes) == 96


def test_over_budget_is_cut_to_whole_blocks(caplog):
    decoder = Decoder(table(eos_bias=-20.0)[0], dataclasses.replace(SETTINGS, max_new_tokens=62), IDS, 96)
    with caplog.at_level("WARNING", logger="absl"):
        lengths = [len(r.tokens) for r in decoder.generate([[4] * 34, [4] * 70, [4] * 90])]
    assert lengths == [62, 24, 6]  # it fits; 26 columns are left: three blocks of 8; 6 columns: less than a block
    assert "prompt 1: max_new_tokens cut from 62 to 24" in caplog.text and "prompt 0" not in caplog.text


def test_callback_sees_every_block_and_stops_rows():
    seen = {0: [], 1: []}

    def on_block(index, so_far):
        seen[index].append(so_far.tokens)
        assert len(so_far.canvas) == len(so_far.tokens) + index + 1 and so_far.nfe == 4 * len(seen[index])
        return index == 1 and len(seen[1]) == 2

    results = Decoder(table(eos_bias=-20.0)[0], SETTINGS, IDS, 96).generate([[4], [5, 6]], on_block=on_block)
    assert [len(tokens) for tokens in seen[0]] == [8, 16, 24]
    assert [r.stopped_by for r in results] == ["length", "callback"]
    assert results[1].tokens == seen[1][-1] and len(results[1].tokens) == 16
    unwatched = Decoder(table(eos_bias=-20.0)[0], SETTINGS, IDS, 96).generate([[4]])
    assert unwatched[0].tokens == results[0].tokens


def test_the_host_acts_after_every_block_only_where_it_must(monkeypatch):
    """A prompt that waits takes the slot of the first row that ends; with none left the loop runs to the end."""
    run, calls = decoder_lib.run_blocks, []

    def counted(logits_fn, carry, num_blocks, *cache, rules):
        calls.append(int(num_blocks))
        return run(logits_fn, carry, num_blocks, *cache, rules=rules)

    monkeypatch.setattr(decoder_lib, "run_blocks", counted)
    decoder = Decoder(table(eos_bias=-20.0)[0], SETTINGS, IDS, 64)
    for prompts, expected in (([[4]], [decoder_lib.UNLIMITED]), ([[4]] * 5, [1, 1, 1, decoder_lib.UNLIMITED])):
        calls.clear()
        decoder.generate(prompts)
        assert calls == expected


def test_special_ids_and_their_rules():
    """Unused ids are never chosen. The settings' string is boosted, or else the tokenizer's; in infilling none is."""
    tokenizer = types.SimpleNamespace(mask_id=0, eos_id=1, bos_id=2, pad_id=3, vocab_size=11, unused_ids=(7, 9),
                                      encode_behind=lambda text: [4, 5, 6] if text == "</think>" else [])
    plain, boosted = SETTINGS, dataclasses.replace(SETTINGS, end_of_thinking_boost=1.0)
    own = dataclasses.replace(boosted, end_of_thinking_ids=(8,))
    for settings, of_tokenizer, expected in ((plain, (), ()), (boosted, (4, 5, 6), (4, 5, 6)), (own, (), (8,))):
        ids = SpecialIds.of(tokenizer, settings)
        assert ids == (0, 1, 2, 3, 11, of_tokenizer, (7, 9))
        rules, infilling = make_rules(settings, ids), make_rules(settings, ids, infill=True)
        assert (rules.suppressed_ids, infilling.suppressed_ids) == ((0, 7, 9), (0, 1, 3, 7, 9))
        assert (rules.thinking_ids, infilling.thinking_ids) == (expected, ())


def halves(ranking, settings):
    """Half of the masked positions."""
    return ranking.masked_B // 2


def from_the_right(prediction):
    return jax.lax.broadcasted_iota(jnp.float32, prediction.tokens_BQ.shape, 1) - 1000


def test_a_strategy_is_added_by_its_registration_alone(monkeypatch):
    monkeypatch.setitem(REVEALS, "halves", halves)
    monkeypatch.setitem(CONFIDENCES, "from_the_right", from_the_right)
    settings = dataclasses.replace(SETTINGS, reveal="halves", confidence="from_the_right", max_new_tokens=8)
    result = Decoder(table(eos_bias=-20.0)[0], settings, IDS, 96).generate([[4]])[0]
    assert result.reveal_step == [3, 2, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("call, message", [
    (lambda d: d.generate([[4], [4] * 96]), "prompt 1: its 96 tokens leave no room in the context of 96"),
    (lambda d: d.generate([[4, M, 5]]), "prompt 0: contains MASK (id 0) at position 1"),
    (lambda d: d.generate([[4, 11]]), "id 11 is outside the vocabulary of 11"),
    (lambda d: d.generate([[4], [5, -1]]), "prompt 1: id -1 is outside the vocabulary of 11"),
    (lambda d: d.generate([[4, 5]], infill=True), "no gap to fill"),
    (lambda d: d.generate([[M] * 97], infill=True), "exceed the context of 96"),
    (lambda d: Decoder(None, dataclasses.replace(SETTINGS, block_length=97), IDS, 96), "decode.block_length = 97"),
    (lambda d: Decoder(None, dataclasses.replace(SETTINGS, reveal="best"), IDS, 96), "must be one of 'schedule'"),
    (lambda d: Decoder(None, dataclasses.replace(SETTINGS, confidence="x"), IDS, 96),
     "must be one of 'low_confidence', 'margin', 'entropy', 'random'"),
    (lambda d: Decoder(None, dataclasses.replace(SETTINGS, stop_ids=(11,)), IDS, 96), "stop_ids: id 11 is outside"),
    (lambda d: Decoder(None, dataclasses.replace(SETTINGS, cache="dual"), IDS, 96), "decode.cache = 'dual'"),
    (lambda d: Decoder(None, dataclasses.replace(SETTINGS, suppressed_ids=tuple(range(11))), IDS, 96),
     "config.decode.suppressed_ids: leaves no token"),
    (lambda d: Decoder(None, dataclasses.replace(SETTINGS, over_budget="error"), IDS, 96).generate([[4] * 80]),
     "prompt 0: its 80 tokens and config.decode.max_new_tokens = 24 exceed the context of 96"),
    (lambda d: d.generate([[4], [5]], rows=[1]), "1 row numbers for 2 prompts"),
    (lambda d: DecodeConfig(threshold=0.0), "config.decode.threshold = 0.0: must lie in (0, 1]"),
    (lambda d: DecodeConfig(threshold=1.1), "config.decode.threshold = 1.1: must lie in (0, 1]"),
    (lambda d: DecodeConfig(top_p=0.0), "config.decode.top_p = 0.0"),
    (lambda d: Decoder(None, dataclasses.replace(SETTINGS, end_of_thinking_boost=1.0), IDS, 96),
     "config.decode.end_of_thinking_boost = 1.0: needs config.decode.end_of_thinking_ids"),
    (lambda d: DecodeConfig(max_new_tokens=0), "config.decode.max_new_tokens = 0"),
    (lambda d: DecodeConfig(steps_per_block=0), "config.decode.steps_per_block = 0"),
    (lambda d: DecodeConfig(block_length=4, steps_per_block=5), "config.decode.steps_per_block = 5"),
])
def test_bad_input_is_one_line_that_names_it(call, message):
    with pytest.raises(InputError) as caught:
        call(Decoder(table()[0], SETTINGS, IDS, 96))
    assert message in str(caught.value) and "\n" not in str(caught.value)
