"""A text coming into focus in the terminal: `generate --watch`."""

import time
from typing import Any

import numpy as np
from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.text import Text

from illada_jax.console import visible
from illada_jax.tracing.trace import display

_MASK = "▁"
_UNSURE, _SURE = np.array([200, 110, 40]), np.array([70, 130, 225])  # legible on black and on white


class Watcher:
    """Draws a row of the decoder while it is written: an `on_block` callback and a context manager.

    The compiled loop returns after each block, and the steps of the block are then drawn one by one. On a console that
    is not a terminal, one plain line per block reports progress.
    """

    def __init__(self, tokenizer: Any, block_length: int, infill: bool = False, console: Console | None = None,
                 seconds_per_step: float = 0.08):
        """Watches one row; borders between blocks are drawn unless gaps are filled.

        The default console is standard error, so that the text itself can be piped.
        """
        self._tokenizer = tokenizer
        self._block_length = 0 if infill else block_length
        self._console = console or Console(stderr=True, highlight=False)
        self._seconds = seconds_per_step
        self._shown = 0
        self._animated = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="visible")

    def __enter__(self) -> "Watcher":
        if self._animated:
            self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._animated:
            self._live.stop()
            self._console.print()  # the text itself follows on standard output

    def __call__(self, index: int, generation: Any) -> None:
        """Draws the steps of `generation` that have not been drawn."""
        del index
        steps = max(generation.canvas_step, default=-1) + 1
        if not self._animated:
            self._console.print(f"step {steps}, {generation.nfe} evaluations: {generation.text!r}", markup=False,
                                soft_wrap=True)
            return
        for now in range(self._shown + 1, steps + 1):
            text = frame(generation, self._tokenizer, now, self._block_length, not self._console.no_color)
            self._live.update(text, refresh=True)
            time.sleep(self._seconds)
        self._shown = steps


def frame(generation: Any, tokenizer: Any, now: int, block_length: int = 0, key: bool = True) -> Text:
    """The canvas after `now` steps: tokens coloured by log-probability, the newest reversed, masks as lines.

    The line of a mask is as long as the token that is written there later, if known, so that the text does not move.
    Borders separate blocks of `block_length`, if it is not 0; `key` adds a key to the colours.
    """
    step = np.asarray(generation.canvas_step)
    canvas = np.asarray(generation.canvas)
    given = (step < 0) & (canvas != tokenizer.mask_id)
    start = int(np.argmin(given)) if not given.all() else len(canvas)
    # Log-probabilities are known for the answer's tokens only, not for those after its end.
    first = 0 if len(generation.tokens) == len(canvas) else start
    log_probs = dict(enumerate(generation.log_probs, start=first))
    text = Text()

    def piece(id_: int) -> str:
        return visible(display(tokenizer, id_))

    for column, id_ in enumerate(canvas.tolist()):
        if block_length and column >= start and (column - start) % block_length == 0:
            text.append("│", "dim")
        if given[column]:
            text.append(piece(id_), "bold")
        elif not 0 <= step[column] < now:
            text.append(_lines(piece(id_) if id_ != tokenizer.mask_id else "mask"), "dim")
        else:
            style = "dim" if column not in log_probs else colour(log_probs[column])
            text.append(piece(id_), f"{style} reverse" if step[column] == now - 1 else style)
    steps = max(step.max(initial=-1) + 1, 1)
    text.append(f"\nstep {now}, {now * generation.nfe // steps} evaluations", "dim")
    if key:
        text.append("; ", "dim").append("sure", colour(0.0)).append(" … ", "dim").append("unsure", colour(-5.0))
    return text


def _lines(piece: str) -> str:
    """The piece with characters replaced by lines; kept spaces make it wrap as the text does."""
    if not piece.strip():
        return piece.replace(" ", _MASK).replace("\n", f"{_MASK}\n")
    return "".join(c if c.isspace() else _MASK * cell_len(c) for c in piece)


def colour(log_prob: float) -> str:
    """Style of a token with the given log-probability."""
    red, green, blue = (_UNSURE + np.exp(min(log_prob, 0.0)) * (_SURE - _UNSURE)).round().astype(int)
    return f"rgb({red},{green},{blue})"
