"""Sequences of readings with the freeze step worked out by hand."""

import json
import math
import random

import pytest

from grades_trl.config import GradESConfig
from grades_trl.criteria.criterion import Criterion, Replay


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


def converged_at(readings, total_steps=20, **config):
    """Matrix -> step in which it converges, reading all matrices in each step."""
    names = list(readings[0])
    losses, idle = [0.0], 0  # held-out losses, of which the readings are the gains
    criterion = Criterion(GradESConfig(alpha=0.0, **config), dict.fromkeys(names, "language"), total_steps)
    found: dict[str, int] = {}
    for step, values in enumerate(readings, start=1):
        live = {name: value for name, value in values.items() if name not in found}
        if not live:
            break
        losses.append(losses[-1] - math.fsum(live.values()))
        idle = 0 if losses[-1] < min(losses[:-1]) else idle + 1
        whole = (idle, losses[-1] - min(losses)) if config["metric"] == "heldout_gain" else ()
        converged = criterion.update(step, live, *whole)
        found |= dict.fromkeys([name for name in converged if name not in found], step)
    return found, criterion


def test_agreement_is_the_running_mean_of_a_matrix():
    # means, the last weight 1, each earlier one .95 of the next: .5, (.475 + 0) / 1.95 = .2436, .4513 / 2.8525 = .1582
    found, criterion = converged_at([{"a": 0.5}, {"a": 0.0}, {"a": 0.0}], metric="agreement", tau=0.16)
    assert found == {"a": 3}
    assert math.isclose(criterion.values["a"], 0.5 * 0.95**2 / (1 + 0.95 + 0.95**2))


def test_a_matrix_whose_updates_no_longer_pay_has_converged():
    # b counts .3 b + .7 (3 + b) / 2 = 1.05 + .65 b: below 0 at 1 (the first reading, which does not count), 3, 5 and
    # 6, twice in a row at 6 only; at 2 and 4 it is drawn above it. At 6 the whole is at a new best; at 7 it is not.
    b = (-2.0, -1.6, -1.7, -1.6, -1.7, -1.7)
    gains = [{"a": 3.0, "b": x} for x in b] + [{"a": 1.0, "b": -1.7}]
    found, criterion = converged_at(gains, metric="heldout_gain", patience=2)
    assert found == {"b": 7}
    assert math.isclose(criterion.values["b"], -0.3 * 1.7 - 0.7 * 0.35)


def test_all_converge_when_the_whole_makes_no_new_best():
    # a gains what b loses and a little less: alone it would train on
    gains = [{"a": 1.0, "b": 1.0}] + [{"a": 3.0, "b": -3.1}] * 5
    found, criterion = converged_at(gains, metric="heldout_gain", patience=2)
    assert found == {"a": 3, "b": 3}
    assert math.isclose(criterion.values["a"], -0.2)
    assert math.isclose(criterion.values["b"], -0.3 * 3.1 - 0.7 * 0.05)

    # The sums 1, 3, 2, 2.5, 3.5, 3.4, 3.3: a new best after two readings that were none starts the count anew
    gains = [{"a": x} for x in (1.0, 2.0, -1.0, 0.5, 1.0, -0.1, -0.1)]
    assert converged_at(gains, metric="heldout_gain", patience=3)[0] == {}
    assert converged_at(gains, metric="heldout_gain", patience=2)[0] == {"a": 4}


def test_what_was_never_observed_converges_with_the_whole():
    criterion = Criterion(GradESConfig(metric="heldout_gain", alpha=0.5), dict.fromkeys("ab", "language"), 10)
    assert criterion.update(4, {"a": 1.0}) == []
    assert criterion.update(5, {"a": -1.0}, idle=2, since_best=1.0) == []  # in the grace period
    assert criterion.update(6, {"a": -1.0}, idle=1, since_best=1.0) == []
    assert criterion.update(7, {}, idle=2, since_best=3.0) == ["a", "b"]  # an overflow: the loss is known all the same
    assert criterion.values == {"a": -3.0, "b": -3.0}


def test_decisions_have_no_unit():
    """The same decisions when all readings are multiplied, as by another loss unit."""
    generator = random.Random(4)
    gains = [{n: generator.gauss(i + 2 - step / 4, 3) for i, n in enumerate("abcd")} for step in range(40)]
    smaller = [{name: 1e-4 * x for name, x in values.items()} for values in gains]
    plain, scaled = (converged_at(values, metric="heldout_gain", patience=2)[0] for values in (gains, smaller))
    assert plain == scaled
    assert len(set(plain.values())) > 2


def test_the_defaults_of_a_metric():
    paper, ours = GradESConfig(), GradESConfig(metric="heldout_gain")
    assert (paper.alpha, paper.patience, paper.tau) == (0.55, 1, "auto")
    assert (ours.alpha, ours.patience, ours.tau_of("vision")) == (0.1, 2, 0.0)
    assert GradESConfig(metric="heldout_gain", alpha=0.0, patience=1).patience == 1


def test_replay_follows_a_file(tmp_path):
    path = tmp_path / "events.jsonl"
    lines = [
        {"matrix": "a", "step": 3, "value": 0.5, "tau": 1.0},
        {"matrix": "b", "step": 2, "value": 0.6, "tau": 1.0},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = GradESConfig(replay=str(path), tau=9.0, alpha=0.0)  # by itself it would freeze all at step 2
    replay = Replay(config, dict.fromkeys("abc", "language"), 10)
    readings = dict.fromkeys("abc", 0.1)
    assert [replay.update(step, readings) for step in range(1, 4)] == [[], ["b"], ["a"]]
    assert (replay.values["a"], replay.taus["a"]) == (0.5, 1.0)
    with pytest.raises(ValueError, match="1 matrices that this model does not train, b among them"):
        Replay(config, {"a": "language"}, 10)
