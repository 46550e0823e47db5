"""Windows and padded rows of examples against expectations written by hand, and the laws of the order."""

import json

import jax
import numpy as np
import pytest

from illada_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, SftConfig, TrainConfig
from illada_jax.data.batch import Batch
from illada_jax.data.corpus import open_examples
from illada_jax.data.finetuning import example_batches
from illada_jax.data.tokenizers import ByteTokenizer
from illada_jax.diffusion.process import corrupt

TOKENIZER = ByteTokenizer()
BOS, PAD, EOS = TOKENIZER.bos_id, TOKENIZER.pad_id, TOKENIZER.eos_id
text = TOKENIZER.encode
PAIRS = [("1+1=", "2"), ("2+3=", "5"), ("9+9=", "18"), ("say hello:", "hello hello"), ("7*8=", "56")]
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"},
         {"role": "user", "content": "d"}, {"role": "assistant", "content": "e"}]


def prepared(path, records, seed=0, epochs=2, split=0.0, isolate=False, batch_size=4, length=16, cut=0.0, **sft):
    """The batches of records, and the examples."""
    source = path / "data.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = Config(
        seed=seed, model=ModelConfig(max_length=512), diffusion=DiffusionConfig(split_probability=split),
        data=DataConfig(sources=(f"chat:{source}",), tokenizer="bytes", heldout_fraction=0.0, length=length,
                        batch_size=batch_size, isolate_documents=isolate, random_length_probability=cut,
                        random_length_of="row", cache_dir=str(path / "cache")),
        sft=SftConfig(**{"format": "illada", "bucket": 8, **sft}),
        train=TrainConfig(epochs=epochs, steps=0 if epochs else 100))
    examples = open_examples(config, progress=False)
    return example_batches(config, examples), examples


def pairs(given=PAIRS):
    return [{"prompt": prompt, "response": response} for prompt, response in given]


def whole(batches) -> Batch:
    steps = [batches.rows(step, range(4)) for step in range(batches.num_steps)]
    return Batch(*(np.concatenate(arrays) for arrays in zip(*steps, strict=True)))


def numbered(count):
    """Pairs that are all different, of many lengths."""
    return [(f"{i}:", "x" * (i * 7 % 23) + "y") for i in range(count)]


def test_illada_windows_by_hand(tmp_path):
    batches, examples = prepared(tmp_path, pairs(), epochs=2)
    stream = []
    for number in range(2):
        for index in batches.epoch(number).order_N:
            prompt, response = PAIRS[index]
            stream += text(prompt) + text(response) + [EOS]
    assert len(stream) == 2 * examples.train.num_tokens
    got = whole(batches)
    used = len(stream)
    assert batches.num_steps == -(-used // 64)
    flat = got.tokens_BL.reshape(-1)
    assert flat[:used].tolist() == stream  # windows run on across the boundary of the epochs
    assert (flat[used:] == PAD).all()
    for field in (got.maskable_BL, got.segments_BL, got.weights_BL):  # prompts, answers, EOS: everything is learnt
        assert (field.reshape(-1)[:used] == 1).all() and not field.reshape(-1)[used:].any()
    full_rows = used // 16
    assert (got.positions_BL[:full_rows] == np.arange(16)).all()


def test_prompts_may_be_left_alone_in_windows(tmp_path):
    batches, _ = prepared(tmp_path, pairs(), epochs=2, mask_prompts=False, split=0.5)
    got, plain = whole(batches), whole(prepared(tmp_path, pairs(), epochs=2, split=0.5)[0])
    assert all(np.array_equal(a, b) for a, b in zip(got[:1] + got[2:4], plain[:1] + plain[2:4], strict=True))
    expected = []
    for number in range(2):
        for index in batches.epoch(number).order_N:
            prompt, response = PAIRS[index]
            expected += [False] * len(prompt) + [True] * (len(response) + 1)
    flat = got.maskable_BL.reshape(-1)
    assert flat[: len(expected)].tolist() == expected and not flat[len(expected) :].any()
    assert np.array_equal(got.weights_BL, got.maskable_BL.astype(np.float32))


@pytest.mark.parametrize("epochs", [1, 3])
def test_every_token_of_every_example_once_per_epoch(tmp_path, epochs):
    given = numbered(40)
    batches, _ = prepared(tmp_path, pairs(given), epochs=epochs)
    got = whole(batches)
    flat = got.tokens_BL[got.segments_BL > 0]
    examples = "".join(map(chr, flat)).split(chr(EOS))[:-1]
    expected = [prompt + response for prompt, response in given]
    seen = [TOKENIZER.decode(map(ord, example)) for example in examples]
    for epoch in range(epochs):
        part = seen[epoch * 40 : (epoch + 1) * 40]
        assert sorted(part) == sorted(expected)
        assert part != expected
    if epochs > 1:
        assert seen[:40] != seen[40:80]  # another order


def test_isolated_examples_are_segments(tmp_path):
    batches, _ = prepared(tmp_path, pairs(), isolate=True, epochs=1)
    got = whole(batches)
    for tokens, segments, positions in zip(got.tokens_BL, got.segments_BL, got.positions_BL, strict=True):
        for column in range(1, 16):
            if not segments[column]:
                continue
            starts = tokens[column - 1] == EOS
            assert segments[column] == segments[column - 1] + starts
            assert positions[column] == (0 if starts else positions[column - 1] + 1)
    plain, _ = prepared(tmp_path, pairs(), epochs=1)
    assert (plain.rows(0, range(4)).segments_BL <= 1).all()


def test_split_cuts_a_share_of_the_windows(tmp_path):
    batches, _ = prepared(tmp_path, pairs(numbered(400)), split=0.3, epochs=20)
    got = whole(batches)
    share = np.mean(got.segments_BL.max(axis=1) == 2)
    assert abs(share - 0.3) < 0.03, share


@pytest.mark.parametrize("form", ["illada", "llada"])
def test_rows_do_not_depend_on_hosts_and_a_run_resumes(tmp_path, form):
    records = pairs(numbered(60)) + [{"messages": TURNS}] * 9
    one, _ = prepared(tmp_path, records, split=0.5, isolate=True, epochs=3, format=form)
    two, _ = prepared(tmp_path, records, split=0.5, isolate=True, epochs=3, format=form)
    for step in (5, 0, 3):
        batched = one.rows(step, range(4))
        for rows in ([0, 1], [2, 3], [3, 1]):  # two hosts, and any other choice, asked for in any order
            part = two.rows(step, rows)
            assert all(np.array_equal(a, b[rows]) for a, b in zip(part, batched, strict=True))
    running = [batch for _, batch in zip(range(6), one.iterate(0, range(4)), strict=False)]
    resumed = [batch for _, batch in zip(range(3), two.iterate(3, range(4)), strict=False)]
    for late, batch in zip(running[3:], resumed, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(late, batch, strict=True))


def test_another_seed_is_another_order(tmp_path):
    orders = [prepared(tmp_path, pairs(numbered(60)), seed=seed)[0].epoch(0).order_N.tolist() for seed in (0, 1)]
    assert orders[0] != orders[1]


def test_llada_rows_by_hand(tmp_path):
    batches, _ = prepared(tmp_path, pairs(), format="llada", epochs=1, length=32)
    assert batches.num_steps == 2  # 5 examples in batches of 4
    seen = []
    for step in range(2):
        got = batches.rows(step, range(4))
        present = min(4, 5 - 4 * step)
        chosen = [PAIRS[i] for i in batches.epoch(0).order_N[4 * step : 4 * step + 4]]
        seen += chosen
        longest = max(len(prompt + response) + 1 for prompt, response in chosen)
        length = -(-longest // 8) * 8
        assert length <= 32
        assert got.tokens_BL.shape == (4, length)
        for row, (prompt, response) in enumerate(chosen):
            ids = (text(prompt) + text(response) + [EOS] * length)[:length]
            assert got.tokens_BL[row].tolist() == ids
            expected = [False] * len(prompt) + [True] * (length - len(prompt))  # not the prompt; padding is learnt
            assert got.maskable_BL[row].tolist() == expected
            assert got.weights_BL[row].tolist() == pytest.approx(np.array(expected) / sum(expected))
            assert got.segments_BL[row].tolist() == [1] * length
            assert got.positions_BL[row].tolist() == list(range(length))
        assert not got.segments_BL[present:].any() and not got.weights_BL[present:].any()
    assert sorted(seen) == sorted(PAIRS)


def test_llada_rows_are_never_longer_than_the_length(tmp_path):
    """Also where it is no multiple of the bucket."""
    batches, _ = prepared(tmp_path, pairs(), format="llada", epochs=1, length=23)
    assert max(batches.rows(step, range(4)).tokens_BL.shape[1] for step in range(2)) == 23


def test_llada_rows_may_be_cut_anywhere_behind_their_prompts(tmp_path):
    plain, _ = prepared(tmp_path, pairs(), format="llada", epochs=40, length=32)
    batches, _ = prepared(tmp_path, pairs(), format="llada", epochs=40, length=32, cut=0.5)
    shares, cut_rows = [], 0
    for step in range(batches.num_steps):
        before, got = plain.rows(step, range(4)), batches.rows(step, range(4))
        assert batches.rows(step, [2]).segments_BL.tolist() == got.segments_BL[2:3].tolist()
        for row in range(4):
            used, start = int(got.segments_BL[row].sum()), int(np.argmax(before.maskable_BL[row]))
            assert start < used <= before.tokens_BL.shape[1]
            assert np.array_equal(got.tokens_BL[row, :used], before.tokens_BL[row, :used])
            assert np.array_equal(got.maskable_BL[row, :used], before.maskable_BL[row, :used])
            assert not got.maskable_BL[row, used:].any() and (got.tokens_BL[row, used:] == PAD).all()
            assert got.weights_BL[row].sum() == pytest.approx(1)
            shares.append((used - start) / (before.tokens_BL.shape[1] - start))
            cut_rows += used < before.tokens_BL.shape[1]
    assert 0.35 < cut_rows / len(shares) < 0.6 and min(shares) < 0.2


def test_llada_prompts_are_never_masked(tmp_path):
    batches, _ = prepared(tmp_path, pairs(), format="llada", epochs=1, length=32)
    batch = batches.rows(0, range(4))
    for seed in range(20):
        corrupted = corrupt(jax.random.key(seed), batch, DiffusionConfig(mask_id=TOKENIZER.mask_id))
        masked = np.asarray(corrupted.masked_BL)
        for row, index in enumerate(batches.epoch(0).order_N[:4]):
            assert not masked[row, : len(PAIRS[index][0])].any()
        assert masked.any()


def test_conversations_end_each_answer_once(tmp_path):
    batches, _ = prepared(tmp_path, [{"messages": TURNS}], epochs=1, batch_size=1, length=64)
    turn = lambda role, words: [BOS, *text(role), BOS, *text(words)]  # noqa: E731
    expected = (turn("user", "a") + turn("assistant", "bc") + [EOS] + turn("user", "d")
              + turn("assistant", "e") + [EOS])
    row = batches.rows(0, [0])
    assert row.tokens_BL[0, : len(expected)].tolist() == expected
    assert row.maskable_BL[0].tolist() == [True] * len(expected) + [False] * (64 - len(expected))


def test_llada_takes_one_turn_of_a_conversation_and_over_the_epochs_all(tmp_path):
    batches, _ = prepared(tmp_path, [{"messages": TURNS}], format="llada", epochs=20, batch_size=1, length=64)
    turn = lambda role, words: [BOS, *text(role), BOS, *text(words)]  # noqa: E731
    first = [*turn("user", "a"), BOS, *text("assistant"), BOS], text("bc")
    second = first[0] + first[1] + [EOS] + turn("user", "d") + [BOS, *text("assistant"), BOS], text("e")
    seen = set()
    for step in range(20):
        row = batches.rows(step, [0])
        length = row.tokens_BL.shape[1]
        start = int(np.argmax(row.maskable_BL[0]))
        which = [first, second].index((row.tokens_BL[0, :start].tolist(),
                                       row.tokens_BL[0, start:][row.tokens_BL[0, start:] != EOS].tolist()))
        assert row.maskable_BL[0].tolist() == [False] * start + [True] * (length - start)
        seen.add(which)
    assert seen == {0, 1}


def test_examples_of_an_epoch_take_different_turns(tmp_path):
    batches, _ = prepared(tmp_path, [{"messages": TURNS}] * 20, format="llada", epochs=1, length=64)
    rows = [row for step in range(batches.num_steps) for row in batches.rows(step, range(4)).maskable_BL]
    assert len({int(np.argmax(row)) for row in rows}) == 2


def test_without_epochs_the_examples_go_round_for_ever(tmp_path):
    for form in ("illada", "llada"):
        batches, _ = prepared(tmp_path, pairs(), epochs=0, format=form)
        assert batches.num_steps == 100
        assert batches.rows(10_000, range(4)).maskable_BL.any(axis=1).all()


def test_epochs_count_what_was_seen(tmp_path):
    illada, examples = prepared(tmp_path, pairs(), epochs=2)
    assert list(illada.epochs(1).values()) == [pytest.approx(64 / examples.train.num_tokens)]
    assert list(illada.epochs(100).values()) == [2]
    llada, _ = prepared(tmp_path, pairs(), epochs=2, format="llada", length=32)
    assert list(llada.epochs(1).values()) == [pytest.approx(4 / 5)]


def test_heldout_windows_hold_all_that_is_held_out(tmp_path):
    batches, examples = prepared(tmp_path, pairs(numbered(20)))
    windows = batches.heldout_windows(examples.train, 16, 0)
    expected = np.concatenate([examples.train.document(i) for i in range(20)])
    assert np.array_equal(windows.tokens_BL[windows.segments_BL > 0], expected)
