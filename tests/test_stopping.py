"""Stopping rules on their own: sequences of scores by hand, and what held-out measurements may cost."""

import json
import math

import pytest

from grades_trl.stopping import HELDOUT_METRICS, STOPPING_RULES, HeldoutScore
from grades_trl.stopping.heldout import MAX_MEASUREMENTS, MIN_SAMPLES, plan

DEFAULTS = dict(HeldoutScore.defaults)
NAN, INF = math.nan, math.inf


def rule(total_steps=100, **settings):
    return HeldoutScore(total_steps, **{**DEFAULTS, **settings})


@pytest.mark.parametrize(
    ("losses", "patience", "ends_at", "best_step"),
    [
        ([3, 2, 1, 0.5], 1, None, 4),
        ([3, 2, 2], 1, 3, 2),  # as low as the lowest one is no improvement
        ([3, 2, 2.5, 2.6], 2, 4, 2),
        ([3, 2, 2.5, 1.9, 2, 2], 2, 6, 4),  # a new lowest one starts the count anew
        ([3, 4, 3.5, 3.2], 3, 4, 1),
        ([3, NAN, INF, -INF, 2, NAN, 2.5, NAN, 2.5], 2, 9, 5),
        ([NAN, NAN, NAN, INF], 2, None, 0),
    ],
)
def test_a_run_ends_when_its_heldout_loss_has_stopped_improving(losses, patience, ends_at, best_step):
    stopping = rule(patience=patience)
    lowest = math.inf
    for step, loss in enumerate(losses, 1):
        improved = math.isfinite(loss) and loss < lowest
        assert stopping.update(step, loss) == improved
        lowest = loss if improved else lowest
        if stopping.reason:
            assert stopping.reason == "held-out loss stopped improving"
            break
    assert (step if stopping.reason else None) == ends_at
    assert (stopping.best_score, stopping.best_step) == (None if lowest == INF else lowest, best_step)


def test_a_loss_that_is_not_finite_changes_nothing():
    stopping = rule()
    for step, loss in enumerate([3.0, 2.0, 2.5], 1):
        stopping.update(step, loss)
    before = dict(vars(stopping))
    assert (stopping.score, stopping.evals_since_best, stopping.measurements) == (2.5, 1, 3)
    for step, loss in enumerate([NAN, INF, -INF] * 3, 4):
        assert stopping.update(step, loss) is False
        assert vars(stopping) == before


def test_a_heldout_loss_goes_on_where_it_was():
    """Its state survives JSON, which has no infinity, after any measurement."""
    losses = [NAN, 3.0, 2.0, 2.5, 1.9, NAN, 2.0, 2.1]
    straight = rule()
    expected = [straight.update(step, loss) for step, loss in enumerate(losses, 1)]
    assert straight.reason
    for end in range(len(losses) + 1):
        first, second = rule(), rule()
        got = [first.update(step, loss) for step, loss in enumerate(losses[:end], 1)]
        second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
        assert vars(second) == vars(first)
        got += [second.update(step, loss) for step, loss in enumerate(losses[end:], end + 1)]
        assert got == expected
        assert vars(second) == vars(straight)


@pytest.mark.parametrize(
    ("total", "settings", "every", "first"),
    [
        (1000, {}, 50, 100),
        (1000, {"grace": 0.0}, 50, 50),
        (1000, {"grace": 0.101}, 50, 150),
        (1000, {"every": 30}, 30, 120),
        (1000, {"grace": 1.0}, 50, 1000),
        (7, {}, 1, 1),
        (100, {"grace": 0.55, "every": 1}, 1, 55),  # .55 * 100 is 55.00000000000001
    ],
)
def test_when_a_heldout_loss_is_measured(total, settings, every, first):
    stopping = rule(total, **settings)
    assert (stopping.every, stopping.first_step) == (every, first)


@pytest.mark.parametrize(
    ("name", "goes_on"),
    [("all_frozen", False), ("heldout", False), ("train_accuracy", False), ("end_of_schedule", True)],
)
def test_whether_a_rule_trains_on_when_all_matrices_are_frozen(name, goes_on):
    stopping = STOPPING_RULES[name](10, **STOPPING_RULES[name].defaults)
    assert stopping.ends_when_all_frozen != goes_on
    assert stopping.reason == ""
    assert json.loads(json.dumps(stopping.state_dict())) == stopping.state_dict()


# ---- the plan ----


def measured(total_steps, every, **settings):
    """The steps in which the loss is measured, step by step, and one for the last weights."""
    if every > total_steps:
        return []
    stopping = rule(total_steps, **{**settings, "every": every})
    steps = range(1, total_steps + 1)
    return [*(step for step in steps if step % every == 0 and step >= stopping.first_step), "end"]


def cost_of(total_steps, rows_per_step, rows, every, **settings):
    """Of all measurements, over the FLOPs of training. A forward pass is a third of a step on the same row."""
    return len(measured(total_steps, every, **settings)) * rows / 3 / (total_steps * rows_per_step)


@pytest.mark.parametrize(
    ("steps", "per_step", "expected"),
    [
        # 2 % are 28.8 and 60 forward passes of a row, and 64 are at most 5 %: 4 measurements of 16 rows, the last one
        # at the end. Three multiples of 16 lie within 60 steps, and three of 32 within 125.
        (60, 8, (16, 16)),
        (125, 8, (16, 32)),
        # 2 % are 90, 180 and 197 forward passes: 5, 11 and 12 measurements of 16 rows, none in the first tenth.
        (188, 8, (16, 38)),
        (375, 8, (16, 32)),
        (411, 8, (16, 32)),
        # 2 % of 32,000 rows are 1,920 forward passes: 20 measurements of 96 rows.
        (1000, 32, (96, 50)),
        # ... and would be 960 rows here: no more than 128.
        (10_000, 32, (128, 500)),
    ],
)
def test_the_plan_of_a_run(steps, per_step, expected):
    rows, every, _ = plan(DEFAULTS, steps, per_step, available=10_000)
    assert (rows, every) == expected


@pytest.mark.parametrize(("steps", "per_step"), [(60, 8), (188, 8), (411, 8), (125, 8), (375, 8)])
def test_the_quick_starts_of_others_are_long_enough_for_a_heldout_loss(steps, per_step):
    rows, every, _ = plan(DEFAULTS, steps, per_step, available=10_000)
    assert rows >= MIN_SAMPLES
    # one, two that are no improvement, and one of the last weights
    assert len(measured(steps, every)) >= DEFAULTS["patience"] + 2
    assert cost_of(steps, per_step, rows, every) <= 0.05


@pytest.mark.parametrize(("steps", "per_step", "available"), [(30, 8, 1000), (60, 4, 1000), (10, 1, 5)])
def test_a_run_that_is_too_short_is_not_measured(steps, per_step, available):
    every = plan(DEFAULTS, steps, per_step, available)[1]
    assert every > steps
    assert measured(steps, every) == []
    assert not any(step % every == 0 for step in range(1, steps + 1))  # as the engine asks


def test_427_training_examples_are_the_fewest_that_are_measured():
    """64 forward passes cost what 21.3 examples of training do, 5 % of 426.7."""
    planned = {steps for steps in range(300, 500) if plan(DEFAULTS, steps, 1, available=1000)[1] <= steps}
    assert planned == set(range(427, 500))


@pytest.mark.parametrize("every", [1, 10, 25, 100, 400])
@pytest.mark.parametrize("budget", [0.02, 0.5])
def test_an_interval_that_is_set_is_kept_and_its_cost_bounds_the_rows(every, budget):
    settings = {**DEFAULTS, "every": every, "cost": budget}
    rows, kept, _ = plan(settings, 400, 16, available=1000)
    assert kept == every
    afforded = budget * 400 * 16 * 3 / len(measured(400, every))
    assert rows == min(128, max(1, math.floor(afforded)))


@pytest.mark.parametrize(
    ("settings", "available", "expected"),
    [
        ({}, 24, (24, 50)),  # 96 could be paid for
        ({}, 10, (10, 50)),
        ({}, 1, (1, 50)),
        ({"samples": 8}, 1000, (8, 50)),
        ({"samples": 40}, 1000, (40, 50)),
        ({"every": 5}, 2, (2, 5)),
        ({"every": 5, "samples": 3}, 1000, (3, 5)),
    ],
)
def test_there_are_no_more_rows_than_the_data_or_the_setting_says(settings, available, expected):
    assert plan({**DEFAULTS, **settings}, 1000, 32, available)[:2] == expected


def test_fewer_rows_are_measured_more_often():
    """Of 60 steps with 8 rows each, 64 forward passes are 4 of 16 rows, 8 of 8 and 16 of 4."""
    intervals = [plan({**DEFAULTS, "samples": samples}, 60, 8, 1000)[1] for samples in (16, 8, 4)]
    counts = [len(measured(60, every)) for every in intervals]
    assert [intervals, counts] == [[16, 8, 4], [4, 8, 15]]


@pytest.mark.parametrize(("patience", "expected"), [(1, 16), (2, 16), (3, 61), (10, 61)])
def test_a_run_that_could_not_be_ended_is_not_measured(patience, expected):
    """Three measurements before the end of 60 steps of 8: the first one, and two that are no improvement."""
    assert plan({**DEFAULTS, "patience": patience}, 60, 8, 1000)[1] == expected


@pytest.mark.parametrize("steps", [1, 7, 60, 200, 333, 1000, 5000])
@pytest.mark.parametrize("per_step", [1, 4, 7, 32, 128])
@pytest.mark.parametrize("settings", [{}, {"grace": 0.5}, {"patience": 5}, {"cost": 0.3}, {"samples": 12}])
def test_no_plan_costs_more_than_it_may(steps, per_step, settings):
    rows, every, _ = plan({**DEFAULTS, **settings}, steps, per_step, available=10_000)
    count = len(measured(steps, every, **settings))
    allowed = max(settings.get("cost", 0.02), 0.05 if count * rows <= 64 else 0.0)
    assert cost_of(steps, per_step, rows, every, **settings) <= allowed + 1e-12
    assert count <= MAX_MEASUREMENTS + 1
    assert count == 0 or count >= settings.get("patience", 2) + 2
