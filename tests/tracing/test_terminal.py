"""The drawings of `generate --watch`."""

import io
import re

import numpy as np
import pytest
from rich.console import Console

from illada_jax import api
from illada_jax.config import Config, DataConfig, DecodeConfig, ModelConfig
from illada_jax.data.tokenizers import ByteTokenizer
from illada_jax.tracing import Watcher
from illada_jax.tracing.terminal import colour, frame
from tests.util import random_params

TOKENIZER = ByteTokenizer()
EOS, MASK = TOKENIZER.eos_id, TOKENIZER.mask_id
A, B, C, D, X = TOKENIZER.encode("abcdx")


def generation(**changes) -> api.Generation:
    """`ab` was given; `c` came third, `d` first, then EOS, with an `x` after it."""
    return api.Generation(**{"text": "cd", "tokens": [C, D], "nfe": 4, "stopped_by": "eos", "reveal_step": [2, 0],
                             "log_probs": [-3.0, -0.01], "canvas": [A, B, C, D, EOS, X],
                             "canvas_step": [-1, -1, 2, 0, 1, 3]} | changes)


@pytest.mark.parametrize(("now", "drawn"), [
    (0, "ab│▁▁│<mask>▁"), (1, "ab│▁d│<mask>▁"), (2, "ab│▁d│<eos>▁"), (3, "ab│cd│<eos>▁"), (4, "ab│cd│<eos>x"),
])
def test_a_frame_shows_what_was_written_by_then(now, drawn):
    text = frame(generation(), TOKENIZER, now, block_length=2)
    eos = TOKENIZER.id_to_piece(EOS)
    assert text.plain.split("\n")[0] == drawn.replace("<eos>", eos).replace("<mask>", "▁" * len(eos))
    assert f"step {now}, {now} evaluations" in text.plain
    newest = [text.plain[span.start : span.end] for span in text.spans if "reverse" in str(span.style)]
    assert newest == [{1: "d", 2: eos, 3: "c", 4: "x"}[now]] if now else not newest


def test_colours_follow_log_probs_and_unknown_ones_are_dim():
    text = frame(generation(), TOKENIZER, 9, block_length=0)
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles["c"] == colour(-3.0) != styles["d"] == colour(-0.01)
    assert styles["x"] == "dim" and styles["a"] == "bold"
    blue = [int(colour(p).strip("rgb()").split(",")[2]) for p in (-9.0, -1.0, -0.1, 0.0)]
    assert blue == sorted(blue) and len(set(blue)) == 4


def test_infilling_has_no_borders_and_keeps_its_columns():
    filled = generation(text="acbd", tokens=[A, C, B, D], log_probs=[0.0, -1.0, 0.0, -2.0], canvas=[A, C, B, D],
                        canvas_step=[-1, 1, -1, 0], reveal_step=[-1, 1, -1, 0], nfe=2, stopped_by="filled")
    text = frame(filled, TOKENIZER, 1)
    assert text.plain.startswith("a▁bd\n")
    assert colour(-2.0) in str([span.style for span in text.spans if text.plain[span.start : span.end] == "d"])


def test_lines_to_fill_are_as_long_as_what_fills_them():
    """Nothing moves: at every step the text wraps where the finished text does."""
    ids = TOKENIZER.encode("ab c\nd xy")
    row = generation(tokens=ids[1:], log_probs=[-1.0] * (len(ids) - 1), canvas=ids,
                     canvas_step=[-1, *range(len(ids) - 1)])
    last = frame(row, TOKENIZER, len(ids)).plain.rpartition("\nstep")[0]
    assert last == "ab c\nd xy"
    first = frame(row, TOKENIZER, 0).plain.rpartition("\nstep")[0]
    assert first == "a▁▁▁▁\n▁▁▁▁"  # a byte is a token here: its space is to be filled, too
    unknown = generation(canvas=[A, B, MASK, MASK], canvas_step=[-1, -1, -1, -1], tokens=[], log_probs=[])
    assert frame(unknown, TOKENIZER, 0).plain.startswith("ab▁▁▁▁▁▁▁▁\n")


def test_without_colours_there_are_none_and_no_key_to_them():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, _environ={"TERM": "xterm-256color", "NO_COLOR": "1"})
    with Watcher(TOKENIZER, 8, False, console, seconds_per_step=0) as watcher:
        watcher(0, generation())
    drawn = out.getvalue()
    assert "cd" in drawn.replace("\x1b[0m", "").replace("\x1b[7m", "") and "evaluations" in drawn
    assert "38;" not in drawn and "unsure" not in drawn


@pytest.fixture(scope="module")
def lm():
    network = ModelConfig(vocab_size=TOKENIZER.vocab_size, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1,
                          head_dim=8, d_ff=32, max_length=64)
    settings = DecodeConfig(max_new_tokens=16, block_length=8, steps_per_block=4, logits_eos_inf=True,
                            suppressed_ids=(*range(128, TOKENIZER.vocab_size),))
    return api.LanguageModel(Config(model=network, data=DataConfig(length=32), decode=settings),
                             random_params(network, scale=3.0), TOKENIZER)


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("infill", [False, True])
def test_every_step_is_drawn_once_and_no_control_codes_reach_a_pipe(lm, terminal, infill):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=200, color_system="truecolor" if terminal else None,
                      _environ={"TERM": "xterm-256color"})
    with Watcher(TOKENIZER, 8, infill, console, seconds_per_step=0) as watcher:
        write = lm.infill if infill else lm.generate
        result = write(["ab [[mask:9]] c" if infill else "ab"], on_block=watcher)[0]
    steps = int(np.max(result.canvas_step)) + 1
    drawn = out.getvalue()
    assert steps == (5 if infill else 8)
    if terminal:
        frames = [int(n) for n in re.findall(r"step (\d+), ", drawn)]
        assert sorted(set(frames)) == list(range(1, steps + 1)) and frames == sorted(frames)
    else:
        assert "\x1b" not in drawn and "step 4, 4 evaluations: " in drawn and f"step {steps}, " in drawn
