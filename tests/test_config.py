import dataclasses
import json
import math
import re

import pytest
from transformers import HfArgumentParser

from grades_trl import GradESConfig
from grades_trl.config import CRITERION_SETTINGS, HELDOUT_SETTINGS
from grades_trl.criteria import CRITERIA
from grades_trl.stopping import STOPPING_RULES

THRESHOLD_DEFAULTS = {
    "tau": "auto",
    "auto_ratio": 0.5,
    "alpha": 0.55,
    "patience": 1,
    "measure_every": 1,
    "sample_fraction": 1 / 64,
}


@pytest.fixture
def events(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text("")
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", "auto"),
        ("1.804456", 1.804456),
        ("0", 0),
        ('{"vision": 0.3, "language": 6}', {"vision": 0.3, "language": 6.0}),
    ],
)
def test_tau_is_read_from_a_command_line(text, expected):
    (config,) = HfArgumentParser(GradESConfig).parse_args_into_dataclasses(["--metric", "grad_change", "--tau", text])
    assert config.tau == expected
    assert GradESConfig(metric="grad_change", tau=expected).tau == expected


def test_a_schedule_is_read_from_a_command_line(events):
    def parsed(text):
        arguments = ["--metric", "schedule", "--schedule", text]
        return HfArgumentParser(GradESConfig).parse_args_into_dataclasses(arguments)[0].schedule

    assert parsed('{"vision": 1, "*.layers.[0-4].*": 20}') == {"vision": 1, "*.layers.[0-4].*": 20}
    assert parsed(str(events)) == str(events)
    assert GradESConfig(metric="schedule", schedule=events).schedule == str(events)


@pytest.mark.parametrize("metric", ["grad_change", "grad_norm", "weight_change"])
def test_defaults_of_a_threshold_metric(metric):
    assert GradESConfig(metric=metric).criterion_settings() == THRESHOLD_DEFAULTS
    given = GradESConfig(metric=metric, tau=0, alpha=0.0, patience=3, measure_every=5, sample_fraction=1.0)
    # 0 is a value, not a missing one.
    assert given.criterion_settings() == {
        "tau": 0, "auto_ratio": 0.5, "alpha": 0.0, "patience": 3, "measure_every": 5, "sample_fraction": 1.0,
    }  # fmt: skip


def test_defaults_of_the_other_metrics():
    assert GradESConfig(metric="none").criterion_settings() == {}
    assert GradESConfig(metric="schedule", schedule={"vision": 1}).criterion_settings() == {"schedule": {"vision": 1}}


def test_defaults_of_the_heldout_score():
    expected = {"metric": "loss", "every": None, "patience": None, "grace": 0.1, "cost": 0.02, "samples": 128}
    assert GradESConfig().heldout_settings() == expected
    assert GradESConfig(heldout_every=7, heldout_grace=0.0).heldout_settings() == expected | {"every": 7, "grace": 0.0}


@pytest.mark.parametrize(
    ("stopping", "keep", "may", "needs"),
    [
        ("auto", "auto", True, False),
        ("auto", "last", True, False),
        ("auto", "best_average", True, True),
        ("heldout", "last", True, True),
        ("all_frozen", "auto", False, False),
        ("all_frozen", "best_average", True, True),
        ("train_accuracy", "auto", False, False),
        ("train_accuracy", "best_average", True, True),
        ("end_of_schedule", "last", False, False),
        ("end_of_schedule", "best_average", True, True),
    ],
)
def test_whether_heldout_rows_are_used_and_needed(stopping, keep, may, needs):
    config = GradESConfig(stopping=stopping, keep=keep)
    assert (config.may_measure_heldout, config.needs_heldout_rows) == (may, needs)


CONFIGS = [
    {},
    {"metric": "weight_change", "tau": {"vision": 0.3}, "sample_fraction": 1.0, "stopping": "all_frozen"},
    {"metric": "grad_norm", "alpha": 0.3, "patience": 2, "heldout_every": 5, "heldout_samples": 64},
    {"metric": "schedule", "schedule": {"vision": 1}, "stopping": "end_of_schedule"},
    {"metric": "none", "stopping": "heldout", "keep": "last"},
]


@pytest.mark.parametrize("arguments", CONFIGS)
def test_replace_takes_a_config_back_and_forth(arguments):
    """Replaced by all that is set in another config, and by all that was set before, it is what it was."""
    default, config = GradESConfig(), GradESConfig(**arguments)
    assert dataclasses.replace(config) == config
    assert dataclasses.replace(default, **arguments) == config
    assert dataclasses.replace(config, **{name: getattr(default, name) for name in arguments}) == default
    assert GradESConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_replace_keeps_no_setting_that_the_new_metric_does_not_have():
    with pytest.raises(ValueError, match=r"tau is 1\.8, but metric 'none' has no tau"):
        dataclasses.replace(GradESConfig(metric="grad_change", tau=1.8), metric="none")
    with pytest.raises(ValueError, match="heldout_every is 5, but with stopping 'all_frozen' and keep 'auto'"):
        dataclasses.replace(GradESConfig(heldout_every=5), stopping="all_frozen")


@pytest.mark.parametrize("name", CRITERION_SETTINGS)
@pytest.mark.parametrize("metric", CRITERIA)
def test_a_setting_of_another_metric_is_an_error_that_names_it(metric, name):
    value = {"vision": 1} if name in ("tau", "schedule") else 1
    needed = {"schedule": {"vision": 1}} if metric == "schedule" else {}
    arguments = {"metric": metric, **needed, name: value}
    if name in CRITERIA[metric].defaults:
        assert GradESConfig(**arguments).criterion_settings()[name] == value
        return
    having = ", ".join(metric for metric, criterion in CRITERIA.items() if name in criterion.defaults)
    with pytest.raises(ValueError, match=f"^{name} is .*, but metric '{metric}' has no {name}.*a setting of {having}"):
        GradESConfig(**arguments)


@pytest.mark.parametrize("name", HELDOUT_SETTINGS)
@pytest.mark.parametrize("stopping", ["all_frozen", "train_accuracy", "end_of_schedule"])
def test_a_heldout_setting_where_no_heldout_score_is_measured_is_an_error_that_names_it(stopping, name):
    value = "loss" if name == "heldout_metric" else 1
    for keep in ("auto", "last"):
        with pytest.raises(
            ValueError, match=f"^{name} is {value!r}, but with stopping '{stopping}' and keep '{keep}'"
        ):
            GradESConfig(stopping=stopping, keep=keep, **{name: value})
    assert getattr(GradESConfig(stopping=stopping, keep="best_average", **{name: value}), name) == value


NO_NUMBER = (True, math.nan, math.inf, -math.inf, "1", [1])
OUT_OF_RANGE = {
    "auto_ratio": (-0.5, 0),
    "alpha": (-0.1, 1.1),
    "patience": (0, -1, 1.5),
    "measure_every": (0, -3, 2.5),
    "sample_fraction": (0, -0.1, 1.5),
    "margin": (0, -1),
    "heldout_every": (0, -1, 2.5),
    "heldout_patience": (0, -2, 1.5),
    "heldout_grace": (-0.1, 1.1),
    "heldout_cost": (0, -0.02, 1.5),
    "heldout_samples": (0, -16, 0.5, 16.5),
    "activation_cache_mib": (-1, 0.5),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in OUT_OF_RANGE.items() for value in (*values, *NO_NUMBER)]
)
def test_a_number_out_of_range_is_an_error_that_names_it(name, value):
    metric = "gain" if name in CRITERIA["gain"].defaults else "grad_change"
    with pytest.raises(ValueError, match=f"^{name} is .*; expected"):
        GradESConfig(metric=metric, **{name: value})


@pytest.mark.parametrize(
    "arguments",
    [
        {"metric": "grad_change", "auto_ratio": 1.5},
        {"alpha": 0},
        {"alpha": 1},
        {"margin": 0.1},
        {"metric": "grad_change", "alpha": 0, "tau": 0.0},
        {"metric": "grad_change", "sample_fraction": 1},
        {"heldout_grace": 0},
        {"heldout_grace": 1.0},
        {"heldout_cost": 1},
        {"activation_cache_mib": 0},
    ],
)
def test_the_ends_of_a_range_are_in_it(arguments):
    GradESConfig(**arguments)


def test_a_folder_for_a_cache_that_is_off():
    with pytest.raises(ValueError, match="activation_cache_mib is 0, which turns the cache off"):
        GradESConfig(encoder_cache_dir="cache", activation_cache_mib=0)


@pytest.mark.parametrize(
    "tau",
    ["much", "NaN", "Infinity", "true", "[1]", -1, True, math.nan, math.inf, {}, {"eyes": 1.0}, {"vision": -1},
     {"vision": "auto"}, {"vision": True}, [1.0]],
)  # fmt: skip
def test_a_tau_that_is_no_threshold(tau):
    with pytest.raises(ValueError, match=r"^tau is .*expected a number of at least 0"):
        GradESConfig(metric="grad_change", tau=tau)


@pytest.mark.parametrize(
    "schedule",
    [
        "nowhere/events.jsonl",
        '{"vision": 1,' + 300 * " ",  # no JSON, and longer than the name of a file may be
        "3",
        '{"vision": 1.5}',
        {"vision": 0},
        {"vision": "1"},
        {"vision": True},
        ["vision"],
        3,
    ],
)
def test_a_schedule_that_is_none(schedule):
    with pytest.raises(ValueError, match=r"^schedule is .*expected"):
        GradESConfig(metric="schedule", schedule=schedule)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "loss"}, "^metric is 'loss'; expected one of grad_change, grad_norm, weight_change"),
        (
            {"stopping": "never"},
            "^stopping is 'never'; expected one of auto, all_frozen, heldout, train_accuracy, end_of_schedule",
        ),
        ({"keep": "best"}, "^keep is 'best'; expected one of auto, last, best_average"),
        ({"heldout_metric": "accuracy"}, "^heldout_metric is 'accuracy'; expected one of loss, token_accuracy, exact"),
        ({"metric": "schedule"}, 'metric is "schedule", which needs schedule'),
        ({"metric": "grad_change", "alpha": 0}, 'alpha is 0 and tau is "auto"'),
        ({"metric": "grad_change", "alpha": 0, "tau": "auto"}, 'alpha is 0 and tau is "auto"'),
    ],
)
def test_answers_that_do_not_exist_or_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradESConfig(**arguments)


def test_every_setting_of_a_metric_or_rule_is_a_field_and_the_other_way_round():
    fields = {field.name for field in dataclasses.fields(GradESConfig)}
    of_criteria = {name for criterion in CRITERIA.values() for name in criterion.defaults}
    of_rules = {f"heldout_{name}" for name in STOPPING_RULES["heldout"].defaults}
    assert of_criteria == set(CRITERION_SETTINGS) <= fields
    assert of_rules == set(HELDOUT_SETTINGS) == {name for name in fields if name.startswith("heldout_")}


def test_every_field_is_documented():
    for field in dataclasses.fields(GradESConfig):
        assert re.search(rf"^ +{field.name} \(", GradESConfig.__doc__, re.MULTILINE), field.name
        assert field.metadata["help"]
