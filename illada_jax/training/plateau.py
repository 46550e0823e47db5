"""Has the loss stopped falling? Its slope with a standard error, over the last steps at a constant learning rate.

iLLaDA's rate was constant until the loss had stopped falling and decayed from then on (its paper, pre-training): the
decision is the operator's, this is the evidence. The loss of a step is noisy, since times and masks are drawn anew:

1. The window is cut into n = 20 blocks. The loss of a block is post-stratified by masking probability: the objective is
   ∫ CE(p) dp, so it is the mean over the parts k of (0, 1] of Σ CE of the masked tokens in part k ÷ their number. How
   many tokens were masked, and with which weight 1/p, drops out (Cochran, Sampling Techniques, §5A.9).
2. slope = Σ (x_b - x̄)·l_b / Σ (x_b - x̄)² by least squares over the blocks b, at steps x_b, and
   standard error = sqrt(Σ residual² / (n - 2) / Σ (x_b - x̄)²). Steps may be correlated as long as blocks hardly are:
   the method of batch means, 10 to 30 of them (Schmeiser, Operations Research 30, 1982).
3. The loss has stopped falling when with 99 % confidence it falls by less than a tolerated share in as many steps:
   (-slope + 2.552·standard error)·steps < tolerance·loss, 2.552 being Student's t for 18 degrees of freedom. So noise
   makes the report late, not wrong. It is asked four times a window.
"""

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from illada_jax.config import Config

BLOCKS = 20
_T_99 = 2.552
_QUESTIONS = 4  # per window; more often would add up to more false alarms


class Trend(NamedTuple):
    """The loss over a window.

    Attributes:
      steps: steps of the window.
      loss: its mean, nats per token.
      slope: nats per token and step.
      stderr: standard error of the slope.
      stopped: the loss has stopped falling.
    """

    steps: int
    loss: float
    slope: float
    stderr: float
    stopped: bool


class _Line(NamedTuple):
    """Sums over the steps of one line of metrics, which ended with `step`."""

    step: int
    masked_K: np.ndarray
    ce_K: np.ndarray


class PlateauWatch:
    """Collects the sums of lines of metrics and says four times a window how the loss goes."""

    def __init__(self, window: int, tolerance: float, changes: Iterable[int], last: int):
        """Starts empty.

        Args:
          window: steps that a trend is taken over; 0: there is none.
          tolerance: the share of the loss by which it may fall in as many steps and still count as flat.
          changes: steps at which the learning rate becomes another constant; a window lies between two of them.
          last: the last step at a constant rate.
        """
        self._window = window
        self._tolerance = tolerance
        self._changes = tuple(changes)
        self._last = last
        self._lines: deque[_Line] = deque()
        self._asked = 0

    @classmethod
    def of(cls, config: Config) -> "PlateauWatch":
        """What `config.train` asks for, with the rates of `config.optimizer`."""
        optimizer, train = config.optimizer, config.train
        changes = (optimizer.warmup_steps, *optimizer.change_steps)
        return cls(train.plateau_window, train.plateau_tolerance, changes, config.decay_start)

    def add(self, step: int, masked_K: np.ndarray, ce_K: np.ndarray) -> Trend | None:
        """Takes in the sums of the steps since the last call, up to `step`.

        Args:
          step: steps taken; ascending.
          masked_K: number of masked tokens by masking probability, see LossSums.
          ce_K: Σ of their cross-entropies in nats.

        Returns:
          A trend when a quarter of a window has passed since the last one and a whole one since the rate last changed.
        """
        if not self._window or step > self._last:
            return None
        self._lines.append(_Line(step, masked_K, ce_K))
        while self._lines[0].step <= step - self._window:
            self._lines.popleft()
        since = max((change for change in self._changes if change <= step), default=0)
        quarter = step * _QUESTIONS // self._window
        if step - self._window < since or quarter == self._asked:
            return None
        self._asked = quarter
        return self._trend(step)

    def _trend(self, step: int) -> Trend | None:
        ends = np.array([line.step for line in self._lines])
        block = (ends - 1 - (step - self._window)) * BLOCKS // self._window
        if len(np.unique(block)) < BLOCKS:
            return None  # lines of an earlier life of the run are missing
        sums = [np.zeros((BLOCKS, len(self._lines[0].ce_K))) for _ in range(2)]
        for total, parts in zip(sums, zip(*(line[1:] for line in self._lines), strict=True), strict=True):
            np.add.at(total, block, np.stack(parts))
        masked_NK, ce_NK = sums
        everywhere_K = (masked_NK > 0).all(axis=0)
        if not everywhere_K.any():
            return None
        loss_N = (ce_NK[:, everywhere_K] / masked_NK[:, everywhere_K]).mean(axis=1)
        steps_N = np.array([ends[block == b].mean() for b in range(BLOCKS)])
        slope, stderr = slope_and_stderr(steps_N, loss_N)
        loss = float(loss_N.mean())
        stopped = (-slope + _T_99 * stderr) * self._window < self._tolerance * loss
        return Trend(self._window, loss, slope, stderr, bool(stopped))


def advice(step: int, trend: Trend) -> str:
    """What the operator is told when the loss has stopped falling at `step`."""
    return (
        f"step {step}: the loss has stopped falling: over the last {trend.steps} steps its slope is "
        f"{trend.slope:.2g} ± {trend.stderr:.2g} nats per token and step, at {trend.loss:.4g} nats per token. To decay "
        "the learning rate, stop this run and type its command again with --config.optimizer.decay_start=N "
        "--config.optimizer.decay_steps=M --config.train.steps=N+M: N is the step at which it says that it saved, M "
        f"for example {max(1, step // 5)}.")


def slope_and_stderr(x_N: np.ndarray, y_N: np.ndarray) -> tuple[float, float]:
    """The least-squares slope of y over x and its standard error."""
    x_N, y_N = x_N - x_N.mean(), y_N - y_N.mean()
    spread = np.sum(x_N**2)
    slope = np.sum(x_N * y_N) / spread
    residual = np.sum((y_N - slope * x_N) ** 2)
    return float(slope), float(np.sqrt(residual / (len(x_N) - 2) / spread))
