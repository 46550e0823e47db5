"""The plateau report: on series with known trends, and in the training loop."""

import numpy as np
import pytest

from illada_jax.training.plateau import PlateauWatch, slope_and_stderr

WINDOW, EVERY, TOLERANCE, LOSS = 2000, 50, 0.01, 4.0
P_K = (np.arange(10) + 0.5) / 10


def lines(rng, steps, fall, noise, correlation=0.0):
    """Sums per line: a loss of LOSS that falls by the share `fall` each window, with noise of that deviation per step.

    Numbers of masked tokens are Poisson; the noise of a step may be correlated with the one before (AR 1).
    """
    white = rng.standard_normal(steps) * noise * np.sqrt(1 - correlation**2)
    for step in range(1, steps):
        white[step] += correlation * white[step - 1]
    loss = LOSS * (1 - fall * np.arange(steps) / WINDOW) + white
    for stop in range(EVERY, steps + 1, EVERY):
        masked_K = rng.poisson(50 * EVERY * P_K)
        yield stop, masked_K, masked_K * loss[stop - EVERY : stop].mean()


def first_report(rng, windows, **series):
    """Steps after which the loss is reported to have stopped falling; None if it never is."""
    watch = PlateauWatch(WINDOW, TOLERANCE, (), windows * WINDOW)
    for step, masked_K, ce_K in lines(rng, windows * WINDOW, **series):
        trend = watch.add(step, masked_K, ce_K)
        if trend is not None and trend.stopped:
            return step
    return None


# A deviation of 0.15 a step makes a standard error of 0.3 tolerances on the fall over a window.
@pytest.mark.parametrize(
    ("series", "windows", "share"),
    [
        ({"fall": 0.0, "noise": 0.15}, 2, (0.9, 1.0)),  # flat: found within two windows
        ({"fall": 0.0, "noise": 0.05, "correlation": 0.9}, 2, (0.9, 1.0)),
        ({"fall": 0.03, "noise": 0.15}, 10, (0.0, 0.02)),  # falling by three times what is tolerated
        ({"fall": 0.03, "noise": 0.05, "correlation": 0.9}, 10, (0.0, 0.02)),
        ({"fall": 0.02, "noise": 0.15}, 10, (0.0, 0.02)),
        ({"fall": 0.02, "noise": 0.5}, 10, (0.0, 0.05)),  # too noisy to tell: late, not wrong
        ({"fall": -0.01, "noise": 0.15}, 2, (0.95, 1.0)),  # rising is not falling either
    ],
)
def test_detections_and_false_alarms(series, windows, share):
    rng = np.random.default_rng(0)
    reports = [first_report(rng, windows, **series) for _ in range(25)]
    assert share[0] <= np.mean([report is not None for report in reports]) <= share[1]


def test_a_loss_that_falls_and_then_stays_is_reported_after_it_stays():
    rng, reports = np.random.default_rng(0), []
    for _ in range(20):
        watch = PlateauWatch(WINDOW, TOLERANCE, (), 10**6)
        for step, masked_K, ce_K in lines(rng, 8 * WINDOW, 0.0, 0.1):
            factor = 1 + 0.1 * max(0.0, 1 - step / (4 * WINDOW))
            trend = watch.add(step, masked_K, ce_K * factor)
            if trend is not None and trend.stopped:
                reports.append(step)
                break
    assert len(reports) == 20
    assert min(reports) >= 4 * WINDOW and np.median(reports) <= 6 * WINDOW


def test_the_standard_error_is_the_spread_of_repeats():
    rng, trends = np.random.default_rng(0), []
    for _ in range(300):
        watch = PlateauWatch(WINDOW, TOLERANCE, (), WINDOW)
        trends.append([watch.add(*line) for line in lines(rng, WINDOW, 0.02, 0.2)][-1])
    slopes = np.array([trend.slope for trend in trends])
    assert abs(slopes.mean() + 0.02 * LOSS / WINDOW) < 4 * slopes.std() / np.sqrt(len(slopes))
    assert abs(np.sqrt(np.mean([trend.stderr**2 for trend in trends])) / slopes.std() - 1) < 0.12
    assert all(trend.loss == pytest.approx(0.99 * LOSS, rel=0.02) for trend in trends)


def test_which_probabilities_are_drawn_is_no_trend():
    """More and more tokens are masked, so the mean over masked tokens rises: at every probability nothing changes."""
    rng = np.random.default_rng(0)
    watch = PlateauWatch(WINDOW, TOLERANCE, (), WINDOW)
    raw = []
    for step in range(EVERY, WINDOW + 1, EVERY):
        masked_K = rng.poisson(500 * (P_K + P_K**4 * step / WINDOW))
        ce_K = masked_K * (1 + 4 * P_K)
        raw.append(ce_K.sum() / masked_K.sum())
        trend = watch.add(step, masked_K, ce_K)
    assert trend.loss == pytest.approx(1 + 4 * P_K.mean())
    assert abs(trend.slope) * WINDOW < 1e-9
    assert slope_and_stderr(np.arange(len(raw)), np.array(raw))[0] * len(raw) > 0.1


def test_the_slope_is_that_of_least_squares():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=30), rng.normal(size=30)
    coefficients, covariance = np.polyfit(x, y, 1, cov=True)
    np.testing.assert_allclose(slope_and_stderr(x, y), (coefficients[0], np.sqrt(covariance[0, 0])), rtol=1e-10)


def test_no_window_reaches_over_a_change_of_the_rate_or_into_the_decay():
    watch = PlateauWatch(200, TOLERANCE, (60, 500), 900)
    ones = np.ones(10)
    asked = [step for step in range(10, 1200, 10) if watch.add(step, ones, ones) is not None]
    assert asked == [260, 300, 350, 400, 450, 700, 750, 800, 850, 900]


@pytest.mark.slow
def test_the_loop_reports_tells_the_operator_once_and_remembers_over_a_restart(run, tmp_path, capsys):
    changes = {"optimizer__learning_rate": 1e-9, "optimizer__decay_steps": 0, "train__steps": 160,
               "train__plateau_window": 80, "train__log_every": 2, "train__plateau_tolerance": 0.5}
    _, whole_lines = run(tmp_path / "whole", **changes)
    told = [line for line in capsys.readouterr().out.split("\n") if "stopped falling" in line]
    assert len(told) == 1
    assert "--config.optimizer.decay_start=N --config.optimizer.decay_steps=M" in told[0]
    run(tmp_path / "parts", **changes, train__stop_step=90)
    _, lines = run(tmp_path / "parts", **changes)
    trends = [[{name: value for name, value in line.items() if name.startswith("trend/")} | {"step": line["step"]}
               for line in each if "trend/slope" in line] for each in (whole_lines, lines)]
    assert [trend["step"] for trend in trends[0]] == [82, 100, 120, 140, 160]
    for before, after in zip(*trends, strict=True):
        assert after == pytest.approx(before)
    assert trends[0][0]["trend/stopped"] is True
