"""A text coming into focus in the terminal: `generate --watch`."""

import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text

from illada_jax.tracing.trace import display

_SECONDS_PER_STEP = 0.08
_MASK = "░░"
_UNSURE, _SURE = np.array([205, 60, 50]), np.array([60, 110, 220])


class Watcher:
    """Shows a row of the decoder as it is written: an `on_block` callback, and a context manager.

    The compiled loop returns after each block; its steps are then shown one after the other. Where the console is no
    terminal, a plain line a block says how far it is.
    """

    def __init__(self, tokenizer: Any, block_length: int, infill: bool = False, console: Console | None = None,
                 seconds_per_step: float = _SECONDS_PER_STEP):
        """Watches one row.

        Args:
          tokenizer: of the model.
          block_length: where borders are drawn.
          infill: gaps are filled: no borders.
          console: where to draw; None is standard error, so that the text itself can be piped.
          seconds_per_step: how long a step is shown, at least.
        """
        self._tokenizer = tokenizer
        self._block_length = 0 if infill else block_length
        self._console = console or Console(stderr=True, highlight=False)
        self._seconds = seconds_per_step
        self._shown = 0
        self._moves = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="visible")

    def __enter__(self) -> "Watcher":
        if self._moves:
            self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._moves:
            self._live.stop()

    def __call__(self, index: int, generation: Any) -> None:
        """Shows the steps that are new in `generation`."""
        del index
        steps = max(generation.canvas_step, default=-1) + 1
        if not self._moves:
            self._console.print(f"step {steps}, {generation.nfe} evaluations: {generation.text!r}", markup=False,
                                soft_wrap=True)
            return
        for now in range(self._shown + 1, steps + 1):
            self._live.update(frame(generation, self._tokenizer, now, self._block_length), refresh=True)
            time.sleep(self._seconds)
        self._shown = steps


def frame(generation: Any, tokenizer: Any, now: int, block_length: int = 0) -> Text:
    """The canvas after `now` steps: written tokens coloured by confidence, the newest reversed, masks as blocks.

    Args:
      generation: an `api.Generation`, finished or on its way.
      tokenizer: of the model.
      now: steps that have been taken.
      block_length: borders are drawn before every so many new columns; 0 draws none.
    """
    step = np.asarray(generation.canvas_step)
    canvas = np.asarray(generation.canvas)
    given = (step < 0) & (canvas != tokenizer.mask_id)
    start = int(np.argmin(given)) if not given.all() else len(canvas)
    # Only of the answer's own tokens the confidence is known, not of what stands behind its end.
    first = 0 if len(generation.tokens) == len(canvas) else start
    confidence = dict(enumerate(generation.confidence, start=first))
    text = Text()
    for column, id_ in enumerate(canvas.tolist()):
        if block_length and column >= start and (column - start) % block_length == 0:
            text.append("│", "dim")
        if given[column]:
            text.append(display(tokenizer, id_), "bold")
        elif not 0 <= step[column] < now:
            text.append(_MASK, "dim")
        else:
            style = "dim" if column not in confidence else colour(confidence[column])
            text.append(display(tokenizer, id_), f"{style} reverse" if step[column] == now - 1 else style)
    steps = max(step.max(initial=-1) + 1, 1)
    text.append(f"\nstep {now}, {now * generation.nfe // steps} evaluations; sure ", "dim")
    text.append("■", colour(0.0)).append(" … ", "dim").append("■", colour(-5.0)).append(" unsure", "dim")
    return text


def colour(log_prob: float) -> str:
    """The style of a token that was written with this log-probability."""
    red, green, blue = (_UNSURE + np.exp(min(log_prob, 0.0)) * (_SURE - _UNSURE)).round().astype(int)
    return f"rgb({red},{green},{blue})"
