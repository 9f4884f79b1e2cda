"""What each layer could gain: closed forms, the sample, what is no measurement, which steps count."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from grades_trl import GradES, GradESConfig
from grades_trl.criteria import GainMeter
from grades_trl.model.matrices import WeightMatrix, find_matrices, layers_in_order
from helpers import Toy, llava, qwen3

ONE, TWO = "layers.0.proj", "layers.1.proj"


def toy(total_steps=100, sample_fraction=1.0):
    torch.manual_seed(0)
    matrices = find_matrices(Toy())
    weights = [m.parameters[0] for m in matrices.values()]
    return SimpleNamespace(
        meter=GainMeter(matrices, total_steps, sample_fraction),
        matrices=matrices,
        weights=weights,
        live=list(matrices),
    )


def step_with(run, step, gradient=1.0, scale=1.0):
    """One measurement with constant gradients, and an update after it; returns what was measured."""
    for p in run.weights:
        p.grad = torch.full_like(p, gradient * scale)
    run.meter.measure(step, run.live, grad_scale=scale)
    measured = dict(run.meter.values)
    with torch.no_grad():
        for p in run.weights:
            p.grad.mul_(0.1)  # clipping changes gradients in place
            p.sub_(0.25)
    return measured


def test_a_gain_is_the_product_of_the_gradients_of_two_steps():
    """Quadratic losses, other ones in each step."""
    run = toy()
    optimizer = torch.optim.SGD(run.weights, lr=0.1)
    before = None
    for step in range(1, 5):
        optimizer.zero_grad()
        sum((w**2).sum() * (i + step) for i, w in enumerate(run.weights)).backward()
        run.meter.measure(step, run.live, grad_scale=1.0)
        now = [2 * (i + step) * w.detach() for i, w in enumerate(run.weights)]
        if before is None:
            assert run.meter.values == run.meter.steps == {}
        else:
            for i, name in enumerate(run.matrices):
                assert run.meter.values[name] == pytest.approx((now[i] * before[i]).sum().item(), rel=1e-5)
        before = now
        optimizer.step()
    assert list(run.meter.steps) == [2, 3, 4]


def test_the_noise_of_the_batches_averages_out():
    """Gradients with three times more noise than signal: the squared norm of the signal, within three standard errors.
    That of a single batch would be ten times too large."""
    generator = torch.Generator().manual_seed(2)
    run = toy(total_steps=2000)
    run.meter.dense = 2000
    signals = [torch.full_like(w, 0.1 * (i + 1)) for i, w in enumerate(run.weights)]
    for step in range(1, 2001):
        for w, signal in zip(run.weights, signals, strict=True):
            w.grad = signal + signal.mean() * 3 * torch.randn(w.shape, generator=generator)
        run.meter.measure(step, run.live, 1.0)
    for layer, signal in zip(run.meter.layers, signals, strict=True):
        found = torch.tensor([gains[layer] for gains in run.meter.steps.values()])
        expected = signal.square().sum().item()
        assert abs(found.mean().item() - expected) < 3 * found.std().item() / math.sqrt(len(found)) < 0.5 * expected


def test_the_estimate_from_a_sample_is_unbiased():
    """Over 60 draws, each of a sixteenth: their mean is within three standard errors, and they differ."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(1024, 256, generator=generator) + 1.0 for _ in range(2)]
    whole = (gradients[0] * gradients[1]).sum().item()
    found = []
    for draw in range(60):
        weight = nn.Parameter(torch.zeros(1024, 256))
        name = f"layers.0.proj{draw}"  # seeds the draw
        matrices = {name: WeightMatrix(name, 0, "proj", "language", "layers", (1024, 256), (weight,))}
        meter = GainMeter(matrices, 100)
        for step, weight.grad in enumerate(gradients, 1):
            meter.measure(step, [name], 1.0)
        assert sum(t.numel() for t in meter.state_dict()[1].values()) == 1024 * 256 / 16  # no less than 2**14
        found.append(meter.values[name])
    mean, deviation = torch.tensor(found).mean().item(), torch.tensor(found).std().item()
    assert 0.001 * whole < deviation < 0.1 * whole
    assert abs(mean - whole) < 3 * deviation / math.sqrt(60)


def test_the_loss_scale_is_divided_out():
    plain, scaled = toy(), toy()
    for step in (1, 2):
        values = [step_with(plain, step, 0.5), step_with(scaled, step, 0.5, scale=1024.0)]
    assert values[0] == pytest.approx(values[1])
    assert values[0] == {ONE: pytest.approx(6 * 0.5 * 0.5), TWO: pytest.approx(6 * 0.5 * 0.5)}


def test_what_is_no_measurement():
    """A gradient that is zero or not finite, in one matrix alone too, and steps that were left out."""
    run = toy()
    assert step_with(run, 1) == {}
    assert step_with(run, 2) != {}
    assert step_with(run, 3, gradient=0.0) == {}
    assert step_with(run, 4) == {}
    assert step_with(run, 5, gradient=math.nan, scale=2.0) == {}
    assert step_with(run, 6, gradient=math.inf) == {}
    assert step_with(run, 7) == {}
    run.weights[0].grad[0, 0] = math.nan
    run.meter.measure(8, run.live, 1.0)
    assert run.meter.values == {}
    assert step_with(run, 10) == {}  # step 9 was not seen
    assert step_with(run, 11) != {}
    assert list(run.meter.steps) == [2, 11]
    assert json.dumps(run.meter.state_dict()[0], allow_nan=False)


def test_frozen_and_untouched_matrices_have_no_value():
    run = toy()
    step_with(run, 1)
    run.live.remove(ONE)
    run.meter.forget(ONE)
    run.weights[0].grad = None
    assert step_with(run, 2).keys() == {TWO}
    assert run.meter.steps == {2: {"language/layers/1": 6.0}}
    assert {name.split("/")[0] for name in run.meter.state_dict()[1]} == {TWO}
    run.weights[1].grad = None
    run.meter.measure(3, run.live, 1.0)
    assert run.meter.values == {}


def test_a_pair_of_lora_factors_has_the_sum_over_both():
    torch.manual_seed(0)
    model = get_peft_model(qwen3(), LoraConfig(r=4, target_modules=["q_proj"]))
    matrices = find_matrices(model)
    meter = GainMeter(matrices, 100)
    generator = torch.Generator().manual_seed(0)
    expected = dict.fromkeys(matrices, 0.0)
    for step in (1, 2):
        for name, m in matrices.items():
            assert len(m.parameters) == 2
            for p in m.parameters:
                before, p.grad = p.grad, torch.randn(p.shape, generator=generator)
                expected[name] += (p.grad * before).sum().item() if before is not None else 0.0
        meter.measure(step, list(matrices), 1.0)
    assert meter.values == pytest.approx(expected, rel=1e-4)


def test_products_of_bf16_gradients_are_summed_in_float32():
    weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16))
    matrices = {"a": WeightMatrix("a", 0, "a", "language", "layers", (64, 64), (weight,))}
    meter = GainMeter(matrices, 100)
    for step in (1, 2):
        weight.grad = torch.full_like(weight, 1.0078125)
        meter.measure(step, ["a"], 1.0)
    assert meter.values == {"a": 64 * 64 * 1.0078125**2}


@pytest.mark.parametrize(
    ("total_steps", "dense", "every"),
    [(60, 25, 10), (100, 25, 10), (1000, 200, 10), (5000, 1000, 25), (10**6, 1000, 5000)],
)
def test_which_steps_are_measured(total_steps, dense, every):
    run = toy(total_steps)
    first = 4 * every if total_steps < 1000 else dense + every
    for step in range(1, min(total_steps, first) + 1):
        step_with(run, step)
    assert list(run.meter.steps) == [*range(2, dense + 1), *range(dense - dense % every + every, first + 1, every)]


def test_between_the_measurements_nothing_is_done():
    run = toy(1000)
    for step in range(1, 203):
        step_with(run, step)
    run.live = None  # would fail
    for step in range(203, 209):
        assert step_with(run, step) == {}


def test_layers_are_ordered_from_input_to_output():
    matrices = find_matrices(llava(), projector=True)
    vision, language = "vision/model.vision_tower.encoder.layers", "language/model.language_model.layers"
    assert list(layers_in_order(matrices)) == [
        f"{vision}/0", f"{vision}/1", "projector//-1", f"{language}/0", f"{language}/1"
    ]  # fmt: skip
    assert GainMeter(matrices, 10).layers == list(layers_in_order(matrices))


def test_a_resumed_meter_goes_on_where_it_was():
    straight, first, second = toy(), toy(), toy()
    for step in range(1, 8):
        step_with(straight, step)
    for step in range(1, 5):
        step_with(first, step)
    state, tensors = first.meter.state_dict()
    second.meter.load_state_dict(json.loads(json.dumps(state)), tensors)
    with torch.no_grad():
        torch._foreach_copy_(second.weights, first.weights)
    for step in range(5, 8):
        step_with(second, step)
    assert second.meter.steps == straight.meter.steps
    assert list(second.meter.steps) == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("metric", ["grad_change", "none", "gain", "schedule"])
def test_it_is_measured_in_every_run(metric):
    model = qwen3()
    settings = {"schedule": {"*.layers.0.*": 4}} if metric == "schedule" else {}
    grades = GradES(model, GradESConfig(metric=metric, **settings), 100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.arange(32).view(2, 16)
    for step in range(1, 6):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        grades.step(step)
        optimizer.step()
    assert grades.criterion.gain_meter is grades.gain
    zero, one = grades.gain.layers
    assert [list(gains) for gains in grades.gain.steps.values()] == [
        [zero, one] if step <= 4 or metric != "schedule" else [one] for step in (2, 3, 4, 5)
    ]
    assert all(gain > 0 for gain in grades.gain.steps[2].values())
