"""Judging gradient norms.

Oracles: numpy's median over a list kept by hand; the outlier of figures 1, 2, ..., whose median and deviation are
known; another guard that was never saved.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from lcl_megatron.config import ConfigError, GuardConfig
from lcl_megatron.training.guard import Guard, Skip

WINDOW = 16


def guard_of(threshold: float = 20.0, window: int = WINDOW, limit: int = 3) -> Guard:
    return Guard(GuardConfig(spike_threshold=threshold, spike_window=window, max_skipped_steps=limit))


def healthy(count: int, seed: int = 0) -> list[float]:
    """Norms that scatter by a tenth."""
    return np.random.default_rng(seed).normal(1.0, 0.1, count).tolist()


def judged(guard: Guard, norms: list[float], first: int = 1) -> list[int]:
    """Return the numbers of the skipped steps."""
    return [step for step, norm in enumerate(norms, first) if guard.judge(step, norm) is not None]


def test_one_spike_is_one_skipped_step() -> None:
    norms = healthy(600)
    norms[300] *= 20
    guard = guard_of(window=128)
    assert judged(guard, norms) == [301]
    assert guard.skipped_steps == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_does_not_poison_the_window(value: float) -> None:
    """A mean and a variance over a window that keeps rejected values would skip all of the next 128 steps."""
    norms = healthy(600)
    norms[300] = value
    assert judged(guard_of(window=128), norms) == [301]
    norms[300] = 1e30
    assert judged(guard_of(window=128), norms) == [301]


def test_the_limit_is_median_plus_threshold_times_deviation() -> None:
    """Of 1, 2, ..., 9 the median is 5 and the median deviation 2."""
    for norm, is_spike in ((11.0, False), (math.nextafter(11.0, 12.0), True)):
        guard = guard_of(threshold=3.0, window=9)
        assert judged(guard, [float(value) for value in (1, 9, 2, 8, 3, 7, 4, 6, 5)]) == []
        skip = guard.judge(10, norm)
        assert (skip is not None) == is_spike
    assert skip is not None
    assert str(skip) == (
        "step 10: gradient norm 11, a spike: above 3 median absolute deviations (2 each) over 5, the median of "
        "the last 9 steps"
    )


def test_decisions_are_those_of_numpy_over_accepted_norms() -> None:
    random = np.random.default_rng(1)
    norms = (np.abs(random.standard_t(3, 800)) + 0.5).tolist()
    accepted: list[float] = []
    expected = []
    for step, norm in enumerate(norms, 1):
        last = np.asarray(accepted[-WINDOW:])
        if len(last) >= WINDOW / 2:
            median = np.median(last)
            deviation = max(np.median(np.abs(last - median)), 0.01 * median)
            if norm > median + 5 * deviation:
                expected.append(step)
                continue
        accepted.append(norm)
    assert 20 < len(expected) < 400
    assert judged(guard_of(threshold=5.0, limit=1000), norms) == expected


def test_nothing_is_a_spike_before_half_of_the_window_is_there() -> None:
    norms = healthy(WINDOW // 2 - 1)
    assert judged(guard_of(), [*norms, 1e9]) == []
    assert judged(guard_of(), [*norms, 1.0, 1e9]) == [WINDOW // 2 + 1]


def test_norms_that_do_not_differ_make_no_spike_of_the_next() -> None:
    """Their median deviation is 0; it counts as a hundredth of the median."""
    assert judged(guard_of(), [1.0] * WINDOW + [1.19, 1.0, 1.21]) == [WINDOW + 3]
    assert judged(guard_of(), [0.0] * WINDOW + [0.0]) == []


def test_spikes_are_taken_unless_a_threshold_is_set() -> None:
    assert judged(guard_of(threshold=0.0), [*healthy(100), 1e9, math.nan]) == [102]


def test_both_kinds_count_towards_the_limit() -> None:
    guard = guard_of(limit=2)
    for count, norm in enumerate([math.nan, 100.0, math.inf]):
        if count == 0:
            judged(guard, healthy(WINDOW))
        assert not guard.is_exhausted
        guard.judge(WINDOW + 1 + count, norm)
    assert guard.is_exhausted
    assert guard.describe_row().startswith("step 17: gradient norm nan; step 18: gradient norm 100, a spike: ")
    assert guard.describe_row().endswith("; step 19: gradient norm inf")
    assert guard.judge(20, 1.0) is None
    assert not guard.is_exhausted
    assert guard.in_a_row == []


def test_of_a_long_row_the_last_are_named() -> None:
    guard = guard_of(limit=100)
    judged(guard, [math.nan] * 13)
    assert guard.describe_row().startswith("3 earlier ones; step 4: ")
    assert guard.describe_row().count("; step ") == 10


@pytest.mark.parametrize("stop", [3, WINDOW - 1, 40, 41, 42, 60])
def test_after_a_restart_decisions_are_the_same(stop: int) -> None:
    norms = healthy(100, seed=2)
    norms[40] = math.nan
    norms[41] = 50.0
    norms[70] = 7.0
    whole = guard_of()
    assert judged(whole, norms) == [41, 42, 71]
    before = guard_of()
    skipped = judged(before, norms[:stop])
    after = guard_of()
    after.load_state_dict(json.loads(json.dumps(before.state_dict(), allow_nan=False)))
    assert [str(skip) for skip in after.in_a_row] == [str(skip) for skip in before.in_a_row]
    assert skipped + judged(after, norms[stop:], stop + 1) == [41, 42, 71]
    assert after.skipped_steps == 3
    assert json.dumps(after.state_dict()) == json.dumps(whole.state_dict())


def test_a_shorter_window_keeps_the_newest() -> None:
    guard = guard_of(window=32)
    judged(guard, [100.0] * 24 + healthy(8))
    short = guard_of(window=8)
    short.load_state_dict(guard.state_dict())
    assert short.judge(33, 50.0) is not None
    assert guard.judge(33, 50.0) is None


def test_a_skip_names_its_step() -> None:
    assert str(Skip(7, math.inf, "gradient norm inf")) == "step 7: gradient norm inf"


@pytest.mark.parametrize(
    ("field", "value"),
    [("spike_threshold", -1.0), ("spike_threshold", math.nan), ("spike_window", 7), ("max_skipped_steps", -1)],
)
def test_settings_that_mean_nothing_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"guard.{field} = {value}"):
        GuardConfig(**{field: value})  # type: ignore[arg-type]
