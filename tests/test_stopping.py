"""Stopping rules on their own: sequences of scores by hand, and what held-out measurements may cost."""

import itertools
import json
import math
import random

import pytest

from grades_trl.stopping import HELDOUT_METRICS, STOPPING_RULES, HeldoutScore
from grades_trl.stopping.heldout import MAX_MEASUREMENTS, MIN_SAMPLES, PATIENCE, plan

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


@pytest.mark.parametrize(
    ("metric", "every", "given", "expected"),
    [
        ("loss", 9, None, 2),
        ("loss", 10, None, 1),  # of 100 steps: as many steps as two measurements with half the interval
        ("loss", 25, None, 1),
        ("loss", 25, 2, 2),
        ("loss", 5, 1, 1),
        ("token_accuracy", 25, None, 2),
        ("exact_match", 25, None, 2),
    ],
)
def test_where_measurements_are_far_apart_one_without_improvement_ends_the_run(metric, every, given, expected):
    stopping = rule(100, metric=metric, every=every, patience=given)
    scores = [0.5, 0.6, 0.7, 0.8] if metric == "loss" else [0.5, 0.4, 0.3, 0.2]
    count = 0
    while not stopping.reason:
        stopping.update(count * every, scores[count], loss=1.0)
        count += 1
    assert count - 1 == expected == stopping.patience
    assert ("one measurement " if expected == 1 else "2 measurements ") in stopping.description


@pytest.mark.parametrize(
    ("steps", "every", "per_interval"), [(117, 30, 5), (117, 15, 3), (600, 30, 1), (60, 16, 5), (4, 2, 2)]
)
def test_an_average_has_about_20_updates_however_few_measurements_there_are(steps, every, per_interval):
    stopping = rule(steps, every=every)
    updates = [step for step in range(1, steps + 1) if stopping.updates_average(step)]
    measurements = range(every, steps + 1, every)
    assert set(measurements) <= set(updates)
    for end in measurements:  # evenly, as far as steps are whole
        own = [step for step in updates if end - every < step <= end]
        gaps = [b - a for a, b in itertools.pairwise([end - every, *own])]
        assert len(own) == per_interval and max(gaps) - min(gaps) <= 1


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


@pytest.mark.parametrize("metric", HELDOUT_METRICS)
def test_a_loss_improves_downwards_and_an_accuracy_upwards(metric):
    stopping = rule(metric=metric, patience=1)
    better, worse = (0.4, 0.6) if metric == "loss" else (0.6, 0.4)
    assert stopping.update(1, 0.5) and stopping.update(2, better)
    assert not stopping.reason
    assert not stopping.update(3, worse)
    assert stopping.reason == f"held-out {metric.replace('_', ' ')} stopped improving"
    assert (stopping.best_score, stopping.best_step) == (better, 2)
    assert stopping.is_below_best(worse) and stopping.is_below_best(NAN)
    assert not stopping.is_below_best(better)


def test_of_equal_scores_the_one_with_the_lower_loss_is_kept_and_is_no_improvement():
    stopping = rule(metric="token_accuracy", patience=3)
    measurements = [(0.5, 2.0), (0.75, 1.5), (0.75, 1.2), (0.75, 1.3), (0.5, 0.1)]
    kept = [stopping.update(step, *one) for step, one in enumerate(measurements, 1)]
    assert kept == [True, True, True, False, False]
    assert (stopping.best_step, stopping.evals_since_best, bool(stopping.reason)) == (3, 3, True)
    assert stopping.is_below_best(0.75, 1.25) and not stopping.is_below_best(0.75, 1.1)
    assert not stopping.update(6, 0.9, NAN)  # weights that are no numbers
    alone = rule(metric="exact_match")  # the loss is not known: the first of them
    assert [alone.update(step, score) for step, score in enumerate([0.5, 0.75, 0.75], 1)] == [True, True, False]


def test_a_run_does_not_end_before_its_first_right_answer():
    stopping = rule(metric="exact_match", patience=2)
    for step, score in enumerate([0.0, 0.0, 0.0, 0.0, 0.25], 1):
        stopping.update(step, score)
        assert (stopping.evals_since_best, stopping.reason) == (0, "")
    for step, score in enumerate([0.0, 0.25], 6):  # forgotten again
        stopping.update(step, score)
    assert stopping.reason and stopping.best_step == 5


def test_a_state_of_another_metric_is_refused():
    with pytest.raises(ValueError, match="heldout_metric 'loss' and this run has 'exact_match': resume with"):
        rule(metric="exact_match").load_state_dict(rule().state_dict())


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


# ---- the training accuracy ----


def ended_by_accuracy(accuracies, total=None):
    """The step after which a run ends, or `None`."""
    stopping = STOPPING_RULES["train_accuracy"](total or len(accuracies))
    for step, accuracy in enumerate(accuracies, 1):
        stopping.update(step, accuracy)
        if stopping.reason:
            assert stopping.reason == "training token accuracy saturated"
            return step
    return None


def noisy(curve, steps, scale, seed=0):
    noise = random.Random(seed)
    return [min(1.0, curve(step / steps) + noise.gauss(0, scale)) for step in range(1, steps + 1)]


@pytest.mark.parametrize("total", [12, 30, 60, 400])
def test_no_run_ends_in_its_first_half(total):
    assert ended_by_accuracy([1.0] * total) == max(8, total // 2 + 1)


def test_a_run_that_has_memorized_its_data_ends():
    """Full accuracy after 40 % of 200 steps: the last 50 are at it from step 130 on."""
    assert ended_by_accuracy([min(1.0, 0.5 + step / 160) for step in range(1, 201)]) == 129


def test_most_runs_end_whose_last_errors_do_not_go_away():
    ends = [ended_by_accuracy(with_hard_tokens(lambda t: 0.5, 200, seed)) for seed in range(40)]
    assert all(end is None or end > 100 for end in ends) and sum(end is not None for end in ends) > 20


def with_hard_tokens(right, steps, seed):
    """Accuracies of 8 rows of 200 tokens, of which one is right with a probability of `right(t)` and all others are
    always: answers with a fixed form."""
    noise = random.Random(seed)
    return [1 - sum(noise.random() > right(step / steps) for _ in range(8)) / 1600 for step in range(1, steps + 1)]


@pytest.mark.parametrize("steps", [30, 60, 200])
def test_answers_with_a_fixed_form_are_learned_as_long_as_the_tokens_that_count_improve(steps):
    ends = [ended_by_accuracy(with_hard_tokens(lambda t: 0.5 + 0.45 * t, steps, seed)) for seed in range(40)]
    assert sum(end is not None for end in ends) <= 2


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    "curve",
    [
        lambda t: 0.6 + 0.15 * t,  # one epoch, and it still improves
        lambda t: 0.7,  # one epoch on a plateau: who knows
        lambda t: 0.985,
        lambda t: 0.98 + 0.02 * t,  # nearly all tokens are easy, and the last ones improve
    ],
)
def test_a_run_that_improves_or_has_not_memorized_its_data_goes_on(curve, seed):
    for steps in (30, 60, 400):
        assert ended_by_accuracy(noisy(curve, steps, 0.001, seed)) is None


def test_an_accuracy_that_is_no_number_is_left_out():
    accuracies = [1.0, NAN] * 20
    assert ended_by_accuracy(accuracies) == ended_by_accuracy([1.0] * 40) == 21
    assert ended_by_accuracy([NAN] * 40) is None
    assert ended_by_accuracy([NAN] * 30 + [1.0] * 10) == 40  # eight or more that are numbers


def test_a_training_accuracy_goes_on_where_it_was():
    accuracies = noisy(lambda t: 1 - 0.4 * math.exp(-15 * t), 40, 0.01)
    straight = STOPPING_RULES["train_accuracy"](40)
    for step, accuracy in enumerate(accuracies, 1):
        straight.update(step, accuracy)
    for end in range(41):
        first, second = (STOPPING_RULES["train_accuracy"](40) for _ in range(2))
        for step, accuracy in enumerate(accuracies[:end], 1):
            first.update(step, accuracy)
        second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
        for step, accuracy in enumerate(accuracies[end:], end + 1):
            second.update(step, accuracy)
        assert vars(second) == vars(straight)


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


QUICK_STARTS = {
    "Unsloth's notebooks": (60, 8),
    "ms-swift, 1,500 x 1": (94, 16),
    "1,000 x 1": (125, 8),
    "1,500 x 1": (188, 8),
    "1,000 x 3": (375, 8),
    "LLaMA-Factory, 1,096 x 3": (411, 8),
    "1,000 x 1 row by row": (1000, 1),
}
SHORTER = {"Unsloth, shortened": (30, 8), "the GradES authors": (60, 4)}


@pytest.mark.parametrize(("steps", "per_step"), QUICK_STARTS.values(), ids=QUICK_STARTS)
def test_the_quick_starts_of_others_are_long_enough_for_a_heldout_score(steps, per_step):
    rows, every, cost = plan(DEFAULTS, steps, per_step, available=10_000)
    assert rows >= MIN_SAMPLES
    # one, two that are no improvement, and one of the last weights
    assert len(measured(steps, every)) >= PATIENCE + 2
    assert 0 < cost <= 0.05
    assert cost == pytest.approx(cost_of(steps, per_step, rows, every))


@pytest.mark.parametrize(("steps", "per_step"), SHORTER.values(), ids=SHORTER)
def test_shorter_quick_starts_are_decided_by_the_training_accuracy_which_costs_nothing(steps, per_step):
    _, every, cost = plan(DEFAULTS, steps, per_step, available=10_000)
    assert every > steps and cost == 0
    stopping = STOPPING_RULES["train_accuracy"](steps)
    for step in range(1, steps + 1):
        stopping.update(step, 1.0)
        if stopping.reason:
            break
    assert step == steps // 2 + 1


def test_an_answer_costs_more_passes_than_a_row_and_gets_fewer_measurements():
    """Twice a row's passes: half as many rows of a long run; 480 examples cannot pay for it, 2,400 can."""
    assert plan(DEFAULTS, 1000, 32, 10_000, passes_per_row=2.0)[:2] == (48, 50)
    assert plan(DEFAULTS, 60, 8, 10_000, passes_per_row=2.0).every > 60
    for steps, per_step, passes in ((300, 8, 2.0), (1000, 32, 2.0), (1000, 8, 1.3)):
        rows, every, cost = plan(DEFAULTS, steps, per_step, 10_000, passes)
        assert rows >= MIN_SAMPLES and len(measured(steps, every)) >= PATIENCE + 2
        assert cost == pytest.approx(passes * cost_of(steps, per_step, rows, every)) and cost <= 0.02


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


@pytest.mark.parametrize(
    ("rows", "once", "again"),
    [
        (426, None, None),  # 5 % are 63.9 forward passes,
        (427, (16, 4), (16, 4)),  # 64
        (640, (16, 4), (16, 6)),  # 96: of 16 rows 6
        (936, (16, 4), (16, 8)),  # and 140, of which 128 are used
        (1200, (16, 4), (16, 8)),  # 2 % are 72
        (3000, (16, 11), (16, 11)),  # 2 % are 180
    ],
)
def test_a_short_run_whose_rows_come_back_is_measured_more_often(rows, once, again):
    for comes_back, expected in ((False, once), (True, again)):
        found = plan(DEFAULTS, rows, 1, 1000, rows_come_back=comes_back)
        if expected is None:
            assert found.every > rows
        else:
            count = len(measured(rows, found.every))
            assert (found.rows, count) == expected
            assert found.cost == pytest.approx(cost_of(rows, 1, *found[:2])) and found.cost <= 0.05


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
    assert count == 0 or count >= settings.get("patience", PATIENCE) + 2
