"""`metric="gain"`: when leading layers freeze, by what the updates of each layer gain."""

import json
import math

import pytest
import torch
from torch import nn

from grades_trl import GradES, GradESConfig
from grades_trl.criteria.gain import MIN_STEPS, Gain
from grades_trl.criteria.gain_meter import GainMeter
from grades_trl.model.flops import StepCosts
from grades_trl.model.matrices import WeightMatrix
from grades_trl.model.towers import towers_of_parameters
from helpers import llava

SETTINGS = {"alpha": 0.1, "margin": 0.02}


def matrix(tower, layer, size=10):
    weight = nn.Parameter(torch.zeros(size, size))
    name = f"{tower}.layers.{layer}.proj"
    return WeightMatrix(name, layer, "proj", tower, f"{tower}.layers", (size, size), (weight,))


def criterion(towers=("vision", "language"), layers=2, total_steps=100, **costs):
    """Equal layers in each tower; each costs as much as any other, per token."""
    matrices = [matrix(tower, layer) for tower in towers for layer in range(layers)]
    made = Gain({m.name: m for m in matrices}, total_steps, **SETTINGS)
    made.costs = lambda: StepCosts(**costs)
    made.gain_meter = GainMeter(made.matrices, total_steps)
    return made


def feed(made, gains, steps, noise=0.0):
    """The same gain of every layer in each step, in the order of the layers, up to noise that averages out."""
    for step in range(steps):
        sign = 1 if step % 2 else -1
        made._steps.append({layer: g * (1 + sign * noise) for layer, g in zip(made.layers, gains, strict=True)})


def frozen_layers(made):
    live = set(made.matrices)
    return sorted({made._layer_of[found.name] for found in made._decide(live)})


def test_the_share_of_the_gain_and_its_error_are_those_of_a_ratio_of_means():
    made = criterion()
    made._steps = [dict(zip(made.layers, row, strict=True)) for row in ([1, 0, 2, 1], [2, 1, 1, 0], [0, 0, 3, 3])]
    share, error = made._share_of(set(made.layers[:2]))
    assert share == pytest.approx((1 + 3 + 0) / (4 + 4 + 6))
    rest = [1 - 4 * share, 3 - 4 * share, 0 - 6 * share]
    mean = sum(rest) / 3
    deviation = math.sqrt(sum((r - mean) ** 2 for r in rest) / 2)
    assert error == pytest.approx(deviation / math.sqrt(3) / (14 / 3))


def test_an_encoder_that_gains_less_than_it_costs_freezes_as_a_whole():
    """Two of four equal layers: backward is two thirds of a step, so the tower costs a third of it."""
    made = criterion()
    feed(made, [0.05, 0.05, 0.45, 0.45], MIN_STEPS)
    assert frozen_layers(made) == ["vision/vision.layers/0", "vision/vision.layers/1"]
    assert made._steps == []


@pytest.mark.parametrize(
    ("gains", "noise"),
    [
        ([0.25, 0.25, 0.25, 0.25], 0.0),  # half of the gain for a third of the cost
        ([-1.0, -1.0, -1.0, -1.0], 0.0),  # the loss does not come down
    ],
    ids=["worth its cost", "no gain"],
)
def test_an_encoder_keeps_training(gains, noise):
    made = criterion()
    feed(made, gains, MIN_STEPS, noise)
    assert frozen_layers(made) == []


def test_what_is_not_sure_does_not_freeze():
    made = criterion()
    for step in range(MIN_STEPS):  # a fifth of the gain, but none or more than a third of it in single steps
        vision = 0.3 if step % 2 else 0.0
        made._steps.append(dict(zip(made.layers, [vision, vision, 0.5, 0.5], strict=True)))
    assert frozen_layers(made) == []


def test_language_layers_freeze_only_where_backward_can_skip_them():
    # Skipped, half of the layers save a third of a step; else only their weight gradients, a sixth.
    for can, expected in ((True, 2), (False, 0)):
        made = criterion(towers=("language",), layers=4, language_prefix_can_be_skipped=can)
        feed(made, [0.12, 0.12, 0.38, 0.38], MIN_STEPS)
        assert len(frozen_layers(made)) == expected


def test_it_is_asked_after_the_grace_period_and_after_twice_as_many_steps():
    made = criterion(total_steps=100)
    asked = []
    made._decide = lambda live: asked.append(step) or []
    for step in range(1, 101):
        made.update(step, [], 1.0)
    assert asked == [10, 20, 40, 80]


def test_it_goes_by_what_the_meter_has_measured():
    made = criterion()
    weights = [m.parameters[0] for m in made.matrices.values()]
    for step in range(1, 4):
        for p in weights:
            p.grad = torch.ones_like(p)
        made.gain_meter.measure(step, list(made.matrices), 1.0)
        made.update(step, list(made.matrices), 1.0)
        assert made.values == made.gain_meter.values
        with torch.no_grad():
            torch._foreach_sub_(weights, 0.5)
    assert made._steps == list(made.gain_meter.steps.values()) == [dict.fromkeys(made.layers, 50.0)] * 2


def test_a_state_goes_on_where_it_was():
    made, resumed = criterion(), criterion()
    feed(made, [0.05, 0.05, 0.45, 0.45], MIN_STEPS)
    state, tensors = made.state_dict()
    resumed.load_state_dict(json.loads(json.dumps(state)), tensors)
    assert frozen_layers(resumed) == frozen_layers(made) != []


def test_the_whole_encoder_freezes_with_its_norms_and_patches_and_nothing_else():
    model = llava(image_token_index=60).train()
    grades = GradES(model, GradESConfig(metric="gain"), total_steps=100)
    ids = torch.tensor([[60] * 16 + [3, 4, 5]])
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    layers = grades.criterion.layers
    share = {layer: 0.01 if layer.startswith("vision") else 1.0 for layer in layers}
    for step in range(1, 12):
        optimizer.zero_grad()
        model(input_ids=ids, pixel_values=images, labels=ids.masked_fill(ids == 60, -100)).loss.backward()
        grades.criterion._steps = [share] * (MIN_STEPS + 1)
        events = grades.step(step)
        optimizer.step()
        if events:
            break
    assert {event.tower for event in events} == {"vision"}
    assert events[0].reason.startswith("1% of the gain, ")
    for name, tower in towers_of_parameters(model).items():
        parameter = model.get_parameter(name)
        if parameter.requires_grad:
            assert tower != "vision" or "post_layernorm" in name, name
        else:
            assert tower == "vision", name
    assert grades.prefix.skipped_layers == {"model.vision_tower.encoder.layers": 2}
    grades.close()
    assert all(parameter.requires_grad for parameter in model.parameters())
