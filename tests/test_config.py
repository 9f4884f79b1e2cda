import dataclasses

import pytest

from grades_trl import GradESConfig


@pytest.mark.parametrize(
    ("text", "expected"),
    [("auto", "auto"), ("1.804456", 1.804456), ('{"vision": 0.3, "language": 6}', {"vision": 0.3, "language": 6.0})],
)
def test_tau_is_read_from_a_command_line(text, expected):
    assert GradESConfig(tau=text).tau == expected


def test_tau_of_a_tower():
    config = GradESConfig(tau={"vision": 0.3, "language": 6.0})
    assert config.tau_of("vision") == 0.3
    assert GradESConfig(tau=2).tau_of("audio") == 2.0
    assert GradESConfig().tau_of("language") is None
    with pytest.raises(ValueError, match="trains a audio tower"):
        config.tau_of("audio")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "loss"}, "expected one of grad_change"),
        ({"tau": "much"}, "expected a number"),
        ({"tau": -1}, "expected a number"),
        ({"tau": {"eyes": 1.0}}, "expected a number"),
        ({"tau": {}}, "expected a number"),
        ({"alpha": 1.5}, "fraction of the training steps"),
        ({"alpha": 0.0}, "Set alpha"),
        ({"patience": 0}, "expected 1 or more"),
        ({"interval": 0}, "expected 1 or more"),
        ({"auto_ratio": 0.0}, "above 0"),
        ({"sample": 0.0}, "above 0 and at most 1"),
        ({"sample": 2.0}, "above 0 and at most 1"),
    ],
)
def test_values_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradESConfig(**arguments)


@pytest.mark.parametrize(
    ("alpha", "total", "steps"), [(0.55, 100, 55), (0.55, 101, 56), (0.3, 10, 3), (0, 10, 0), (1, 7, 7)]
)
def test_grace_period_is_the_papers_ceiling(alpha, total, steps):
    assert GradESConfig(alpha=alpha, tau=1.0).grace_steps(total) == steps


def test_every_field_is_documented():
    for field in dataclasses.fields(GradESConfig):
        assert f"        {field.name} (" in GradESConfig.__doc__, field.name
        assert field.metadata["help"]


def test_replay_of_a_file_that_is_not_there():
    with pytest.raises(
        ValueError, match=r"replay is 'nowhere/events.jsonl'; expected the events.jsonl of another run"
    ):
        GradESConfig(replay="nowhere/events.jsonl")
