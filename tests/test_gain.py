"""`metric="gain"`: when leading layers freeze, by what each layer could gain."""

import json
import math

import pytest
import torch
from torch import nn

from grades_trl import GradES, GradESConfig
from grades_trl.criteria.gain import MIN_STEPS, Gain, share_of_gain
from grades_trl.criteria.gain_meter import GainMeter
from grades_trl.model.flops import StepCosts
from grades_trl.model.matrices import WeightMatrix
from grades_trl.model.towers import towers_of_parameters
from helpers import llava

SETTINGS = {"alpha": 0.1, "margin": 4.0}


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


def feed(made, gains, last=None, noise=0.0, steps=MIN_STEPS + 1):
    """The same gain of every layer in each step of both windows, or another one in the last window but one; up to
    noise that averages out."""

    def window(of_layers):
        return [
            {layer: g * (1 + (noise if step % 2 else -noise)) for layer, g in zip(made.layers, of_layers, strict=True)}
            for step in range(steps)
        ]

    made._last_window, made._window = window(last or gains), window(gains)


def frozen_layers(made):
    live = set(made.matrices)
    return sorted({made._layer_of[found.name] for found in made._decide(live)})


def test_the_share_of_the_gain_and_its_error_are_those_of_a_ratio_of_means():
    """Of steps of the same size, whatever their gains are: each is divided by the sum of its absolute gains."""
    rows = ([1, 0, 2, 1, 9], [20, 10, 10, 0, 9], [0, 0, -0.3, 0.5, 9])
    window = [dict(zip("abcde", row, strict=True)) for row in rows]
    share, error = share_of_gain(window, "ab", "abcd")  # e is frozen
    own, totals = [1 / 4, 30 / 40, 0.0], [1.0, 1.0, 0.2 / 0.8]
    assert share == pytest.approx(sum(own) / sum(totals))
    rest = [mine - total * share for mine, total in zip(own, totals, strict=True)]
    mean = sum(rest) / 3
    deviation = math.sqrt(sum((r - mean) ** 2 for r in rest) / 2)
    assert error == pytest.approx(deviation / math.sqrt(3) / (sum(totals) / 3))


def test_the_forward_pass_of_an_encoder_is_saved_where_its_outputs_are_cached():
    """Two of four equal layers are half of a step; without the cache, backward through them is a third of it."""
    for cached, expected in ((True, 2), (False, 0)):
        made = criterion(encoder_is_cached=cached)
        feed(made, [0.1, 0.1, 0.4, 0.4])  # between a half of a third and a half of a half
        made.margin = 2.0
        assert len(frozen_layers(made)) == expected


def test_an_encoder_that_could_gain_far_less_than_it_costs_freezes_as_a_whole():
    """Two of four equal layers: backward is two thirds of a step, so the tower costs a third of it."""
    made = criterion()
    feed(made, [0.03, 0.03, 0.47, 0.47])
    assert frozen_layers(made) == ["vision/vision.layers/0", "vision/vision.layers/1"]
    assert {found.reason for found in made._decide(set(made.matrices))} == {
        "6.0 % of the gain for 33 % of the FLOPs of a step"
    }


@pytest.mark.parametrize(
    ("gains", "last"),
    [
        ([0.05, 0.05, 0.45, 0.45], None),  # a tenth of the gain for a third of the time
        ([0.03, 0.03, 0.47, 0.47], [0.10, 0.10, 0.40, 0.40]),  # the window before said otherwise
        ([0.10, 0.10, 0.40, 0.40], [0.03, 0.03, 0.47, 0.47]),
        ([-1.0, -1.0, -1.0, -1.0], None),  # the gradients are noise
    ],
    ids=["worth its cost", "worth it before", "worth it now", "noise"],
)
def test_an_encoder_keeps_training(gains, last):
    made = criterion()
    feed(made, gains, last)
    assert frozen_layers(made) == []


def test_layers_in_front_of_the_one_that_gains_freeze():
    made = criterion(layers=3)
    feed(made, [0.01, 0.01, 0.2, 0.2, 0.3, 0.3])
    assert frozen_layers(made) == ["vision/vision.layers/0", "vision/vision.layers/1"]


def test_what_is_not_sure_does_not_freeze():
    made = criterion()
    feed(made, [0.03, 0.03, 0.47, 0.47])
    for step, gains in enumerate(made._window):  # the same share on the whole, from large values of both signs
        for layer in made.layers[:2]:
            gains[layer] += 0.2 if step % 2 else -0.2
    assert share_of_gain(made._window, made.layers[:2], made.layers)[0] == pytest.approx(0.05, abs=0.02)
    assert frozen_layers(made) == []


def test_language_layers_freeze_only_where_backward_can_skip_them():
    # Skipped, half of the layers save a third of a step; else only their weight gradients, a sixth.
    for can, expected in ((True, 2), (False, 0)):
        made = criterion(towers=("language",), layers=4, language_prefix_can_be_skipped=can)
        feed(made, [0.03, 0.03, 0.47, 0.47])
        assert len(frozen_layers(made)) == expected


@pytest.mark.parametrize(
    ("total_steps", "expected"),
    [
        (100, [(10, 0, 10), (20, 10, 10), (40, 10, 20), (80, 20, 40)]),
        (60, [(6, 0, 6), (12, 6, 6), (24, 6, 12), (48, 12, 24)]),  # Unsloth's quick start
    ],
)
def test_windows_end_after_the_grace_period_and_after_twice_as_many_steps(total_steps, expected):
    made = criterion(total_steps=total_steps)
    asked = []
    made._decide = lambda live: asked.append((step, len(made._last_window), len(made._window))) or []
    for step in range(1, total_steps + 1):
        made.gain_meter._values, made.gain_meter._steps[step] = {"a": 1.0}, {"layer": 1.0}
        made.update(step, [], 1.0)
    assert asked == expected


def test_too_few_measurements_decide_nothing():
    made = criterion()
    feed(made, [0.03, 0.03, 0.47, 0.47], steps=MIN_STEPS - 1)
    assert frozen_layers(made) == []


@pytest.mark.parametrize("which", ["_last_window", "_window"])
def test_a_tower_that_hardly_any_row_has_reached_does_not_freeze(which):
    """Nothing says that it gains nothing: no image has come, or few."""
    made = criterion()
    feed(made, [0.03, 0.03, 0.47, 0.47], steps=2 * MIN_STEPS)

    def without_images(steps):
        window = getattr(made, which)
        setattr(made, which, [{k: g for k, g in gains.items() if "language" in k} for gains in window[:steps]])
        getattr(made, which).extend(window[steps:])

    without_images(MIN_STEPS)
    assert frozen_layers(made) == ["vision/vision.layers/0", "vision/vision.layers/1"]
    without_images(MIN_STEPS + 1)
    assert frozen_layers(made) == []


def test_a_layer_that_no_gradient_reaches_freezes_with_its_tower():
    """The last one of a tower whose output before it is used."""
    made = criterion(encoder_is_cached=True)
    feed(made, [0.03, 0.0, 0.47, 0.47])
    for gains in (*made._last_window, *made._window):
        del gains["vision/vision.layers/1"]
    assert frozen_layers(made) == ["vision/vision.layers/0", "vision/vision.layers/1"]


def test_it_goes_by_what_the_meter_has_measured():
    made = criterion()
    weights = [m.parameters[0] for m in made.matrices.values()]
    for step in range(1, 4):
        for p in weights:
            p.grad = torch.ones_like(p)
        made.gain_meter.measure(step, list(made.matrices), 1.0)
        made.update(step, list(made.matrices), 1.0)
        assert made.values == made.gain_meter.values
    assert made._window == list(made.gain_meter.steps.values()) == [dict.fromkeys(made.layers, 100.0)] * 2


def test_a_state_goes_on_where_it_was():
    made, resumed = criterion(), criterion()
    feed(made, [0.03, 0.03, 0.47, 0.47])
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
    for step in range(1, 20):
        optimizer.zero_grad()
        model(input_ids=ids, pixel_values=images, labels=ids.masked_fill(ids == 60, -100)).loss.backward()
        grades.criterion._last_window = grades.criterion._window = [share] * (MIN_STEPS + 1)
        events = grades.step(step)
        optimizer.step()
        if events:
            break
    assert {event.tower for event in events} == {"vision"}
    assert float(events[0].reason.partition(" % of the gain")[0]) <= 1.0
    for name, tower in towers_of_parameters(model).items():
        parameter = model.get_parameter(name)
        if parameter.requires_grad:
            assert tower != "vision" or "post_layernorm" in name, name
        else:
            assert tower == "vision", name
    assert grades.prefix.skipped_layers == {"model.vision_tower.encoder.layers": 2}
    grades.close()
    assert all(parameter.requires_grad for parameter in model.parameters())
