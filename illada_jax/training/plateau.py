"""Detection of a plateau: the slope of the loss, with a standard error, over recent steps at a constant learning rate.

iLLaDA kept its learning rate constant until the loss had stopped falling, and then decayed it (its paper,
pre-training). The decision is the operator's; this is the evidence. The loss of a step is noisy, as times and masks are
drawn anew:

1. The window is cut into n = 20 blocks. The loss of a block is post-stratified by masking probability: the objective is
   ∫ CE(p) dp, so it is the mean over buckets k of (0, 1] of Σ CE of the masked tokens in bucket k ÷ their number. The
   number of masked tokens and their weights 1/p cancel (Cochran, Sampling Techniques, §5A.9).
2. slope = Σ (x_b - x̄)·l_b / Σ (x_b - x̄)² by least squares over the blocks b, at steps x_b, and
   standard error = sqrt(Σ residual² / (n - 2) / Σ (x_b - x̄)²). Steps may be correlated as long as blocks hardly are:
   the method of batch means, with 10 to 30 batches (Schmeiser, Operations Research 30, 1982).
3. The loss has stopped falling if, with 99 % confidence, it falls by less than a tolerated share over the window:
   (-slope + 2.552·standard error)·steps < tolerance·loss, where 2.552 is Student's t for 18 degrees of freedom. Noise
   therefore delays the report instead of making it wrong. The test runs four times per window.
"""

import dataclasses
from collections import deque
from typing import NamedTuple

import numpy as np

from illada_jax.config import Config

BLOCKS = 20
_T_99 = 2.552
_TESTS = 4  # per window; more tests would raise more false alarms


class Trend(NamedTuple):
    """The loss over a window."""

    steps: int  # of the window
    loss: float  # its mean, nats per token
    slope: float  # nats per token and step
    stderr: float  # standard error of the slope
    stopped: bool  # it has stopped falling


@dataclasses.dataclass
class PlateauWatch:
    """Collects the sums of lines of metrics and reports the trend of the loss four times per window.

    Attributes:
      window: steps that a trend is computed over; 0 disables trends.
      tolerance: the share of the loss by which it may fall over a window and still count as flat.
      changes: steps at which the learning rate changes to another constant; a window never contains one.
      last: the last step at a constant rate.
    """

    window: int
    tolerance: float
    changes: tuple[int, ...]
    last: int
    _lines: deque[tuple[int, np.ndarray, np.ndarray]] = dataclasses.field(default_factory=deque)  # step, masked_K, ce_K
    _tested: int = 0

    @classmethod
    def of(cls, config: Config) -> "PlateauWatch":
        """The watch configured by `config.train` and the schedule of `config.optimizer`."""
        train, changes = config.train, (config.warmup_steps, *config.change_steps)
        return cls(train.plateau_window, train.plateau_tolerance, changes, config.decay_start)

    def add(self, step: int, masked_K: np.ndarray, ce_K: np.ndarray) -> Trend | None:
        """Adds the sums of the steps since the last call, up to `step`; see LossSums for masked_K and ce_K.

        Returns:
          A trend if a quarter of a window has passed since the last trend, and a window since the rate last changed.
        """
        if not self.window or step > self.last:
            return None
        self._lines.append((step, masked_K, ce_K))
        while self._lines[0][0] <= step - self.window:
            self._lines.popleft()
        since = max((change for change in self.changes if change <= step), default=0)
        quarter = step * _TESTS // self.window
        if step - self.window < since or quarter == self._tested:
            return None
        self._tested = quarter
        return self._trend(step)

    def _trend(self, step: int) -> Trend | None:
        ends, masked_lines, ce_lines = map(np.stack, zip(*self._lines, strict=True))
        block = (ends - 1 - (step - self.window)) * BLOCKS // self.window
        if len(np.unique(block)) < BLOCKS:
            return None  # lines from before a restart are missing
        masked_NK, ce_NK = (np.stack([lines[block == b].sum(axis=0) for b in range(BLOCKS)])
                            for lines in (masked_lines, ce_lines))
        everywhere_K = (masked_NK > 0).all(axis=0)
        if not everywhere_K.any():
            return None
        loss_N = (ce_NK[:, everywhere_K] / masked_NK[:, everywhere_K]).mean(axis=1)
        steps_N = np.array([ends[block == b].mean() for b in range(BLOCKS)])
        slope, stderr = slope_and_stderr(steps_N, loss_N)
        loss = float(loss_N.mean())
        stopped = (-slope + _T_99 * stderr) * self.window < self.tolerance * loss
        return Trend(self.window, loss, slope, stderr, bool(stopped))


def advice(step: int, trend: Trend) -> str:
    """The message to the operator when the loss has stopped falling at `step`."""
    return (
        f"step {step}: the loss has stopped falling: over the last {trend.steps} steps its slope is "
        f"{trend.slope:.2g} ± {trend.stderr:.2g} nats per token and step, at {trend.loss:.4g} nats per token. To decay "
        "the learning rate, stop this run and run its command again with --config.optimizer.decay_start=N "
        "--config.optimizer.decay_steps=M --config.train.steps=N+M, where N is the step that it reports as saved and "
        f"M is for example {max(1, step // 5)}.")


def slope_and_stderr(x_N: np.ndarray, y_N: np.ndarray) -> tuple[float, float]:
    """The least-squares slope of y over x and its standard error."""
    x_N, y_N = x_N - x_N.mean(), y_N - y_N.mean()
    spread = np.sum(x_N**2)
    slope = np.sum(x_N * y_N) / spread
    residual = np.sum((y_N - slope * x_N) ** 2)
    return float(slope), float(np.sqrt(residual / (len(x_N) - 2) / spread))
