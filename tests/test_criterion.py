"""Sequences of readings with the freeze step worked out by hand."""

import json
import math

from grades_trl.config import GradESConfig
from grades_trl.criterion import Criterion


def freeze_step(readings, total_steps=20, tower="language", **config):
    """The step in which a matrix with these readings (from step 1 on) converges; `None` if it does not."""
    criterion = Criterion(GradESConfig(**config), {"w": tower}, total_steps)
    for step, value in enumerate(readings, start=1):
        if criterion.update(step, {} if value is None else {"w": value}):
            return step
    return None


def test_paper_freezes_at_the_first_reading_below_tau_after_the_grace_period():
    falling = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0.5]
    assert freeze_step(falling, tau=5.0, alpha=0.1) == 6  # the 5 is not below 5
    assert freeze_step(falling, tau=5.0, alpha=0.4) == 9  # grace is steps 1 to 8
    assert freeze_step(falling, tau=0.1, alpha=0.1) is None


def test_nothing_freezes_on_its_first_reading():
    assert freeze_step([0.0, 0.0], tau=1.0, alpha=0.0) == 2
    # ... nor when the first reading comes late, as that of a tower which saw no image for long
    assert freeze_step([None] * 15 + [0.1, 0.1], tau=1.0, alpha=0.5) == 17


def test_patience_counts_consecutive_readings():
    assert freeze_step([9, 9, 1, 9, 1, 1, 9, 1, 1, 1], tau=5.0, alpha=0.0, patience=3) == 10
    # a step without a reading neither counts nor starts anew
    assert freeze_step([9, 9, 1, None, 1, None, 1], tau=5.0, alpha=0.0, patience=3) == 7


def test_readings_in_the_grace_period_do_not_count_towards_patience():
    assert freeze_step([1] * 20, tau=5.0, alpha=0.25, patience=3) == 8


def test_a_reading_that_is_not_finite_is_no_observation():
    assert freeze_step([9, math.nan, math.inf, -math.inf, 1], tau=5.0, alpha=0.0) == 5


def test_auto_takes_half_the_median_of_the_grace_period():
    # grace: steps 1 to 5, median of 8, 10, 100, 12, 9 is 10, so tau is 5
    readings = [8, 10, 100, 12, 9, 6, 5, 4.9]
    assert freeze_step(readings, tau="auto", alpha=0.25, auto_ratio=0.5) == 8
    assert freeze_step(readings, tau="auto", alpha=0.25, auto_ratio=0.7) == 6


def test_auto_goes_on_collecting_when_a_matrix_was_hardly_seen():
    # one reading in the grace period; level from the first three, 10, 8, 6: tau is 4
    readings = [None, None, None, None, 10, 8, 6, 4, 3.9]
    assert freeze_step(readings, tau="auto", alpha=0.25) == 9


def test_each_matrix_has_its_own_level():
    criterion = Criterion(GradESConfig(tau="auto", alpha=0.5), {"a": "language", "b": "language"}, 6)
    for step in (1, 2, 3):
        criterion.update(step, {"a": 10.0, "b": 1.0})
    assert criterion.taus == {"a": 5.0, "b": 0.5}
    assert criterion.update(4, {"a": 4.0, "b": 0.6}) == ["a"]


def test_each_tower_has_its_own_tau():
    config = GradESConfig(tau={"vision": 1.0, "language": 10.0}, alpha=0.0)
    criterion = Criterion(config, {"eye": "vision", "ear": "language"}, 10)
    criterion.update(1, {"eye": 5.0, "ear": 5.0})
    assert criterion.update(2, {"eye": 5.0, "ear": 5.0}) == ["ear"]


def test_state_survives_json_in_the_middle_of_the_grace_period():
    config = GradESConfig(tau="auto", alpha=0.5, patience=2)
    values = [4.0, 6.0, 5.0, 2.0, 9.0, 2.0, 2.0, 1.0]
    straight = Criterion(config, {"w": "language"}, 6)
    expected = [straight.update(step, {"w": v}) for step, v in enumerate(values, start=1)]
    for cut in range(1, len(values)):
        first = Criterion(config, {"w": "language"}, 6)
        got = [first.update(step, {"w": v}) for step, v in enumerate(values[:cut], start=1)]
        second = Criterion(config, {"w": "language"}, 6)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        got += [second.update(step, {"w": v}) for step, v in enumerate(values[cut:], start=cut + 1)]
        assert got == expected
