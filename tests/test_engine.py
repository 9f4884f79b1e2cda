"""The engine in a plain PyTorch loop: gradients set by hand with the freeze step worked out, and real training."""

import copy
import json

import pytest
import torch

from grades_trl import GradES, GradESConfig
from models import Toy, qwen3, qwen3_moe

ONE = "layers.0.proj"


def run(gradients, metric, tau, total_steps=20, lr=0.0, scale=1.0, **config):
    """Sets each gradient of the first matrix to `value * ones(2, 3)` in turn; returns its readings and freeze step."""
    model = Toy()
    model.layers[1].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    grades = GradES(model, GradESConfig(metric=metric, tau=tau, **config), total_steps, optimizer)
    weight = model.layers[0].proj.weight
    readings = []
    for step, value in enumerate(gradients, start=1):
        weight.grad = None if value is None else torch.full((2, 3), float(value) * scale)
        events = grades.step(step, grad_scale=scale)
        readings.append(round(grades.readings.get(ONE, float("nan")), 4))
        if events:
            assert [(e.matrix, e.step, e.frozen, e.total) for e in events] == [(ONE, step, 1, 1)]
            assert events[0].value < events[0].tau
            return readings, step
        if weight.grad is not None:
            weight.grad /= scale
        optimizer.step()
    return readings, None


NAN = pytest.approx(float("nan"), nan_ok=True)


def test_grad_norm_by_hand():
    # 6 elements: 6, 5.4, 3, 1.2
    assert run([1, -0.9, 0.5, 0.2], "grad_norm", 3.1, alpha=0.0) == ([6.0, 5.4, 3.0], 3)
    assert run([1, 0.9, 0.5, 0.2], "grad_norm", 3.0, alpha=0.0) == ([6.0, 5.4, 3.0, 1.2], 4)
    assert run([1, 0.1, 0.1, 0.1, 0.1], "grad_norm", 3.0, alpha=0.2)[1] == 5  # grace: steps 1 to 4
    assert run([1, 0.1, 1, 0.1, 0.1], "grad_norm", 3.0, alpha=0.0, patience=2)[1] == 5


def test_grad_change_by_hand():
    # differences .1, .4, .3, .01 of 6 elements; the first step has nothing to compare with
    readings, step = run([1, 0.9, 0.5, 0.2, 0.19], "grad_change", 1.0, alpha=0.0)
    assert readings == [NAN, 0.6, 2.4, 1.8, 0.06]
    assert step == 5  # .6 was below, but it was the first reading
    assert run([1, 0.9, 0.5, 0.2, 0.19], "grad_change", 2.0, alpha=0.0)[1] == 4


def test_weight_change_by_hand():
    # SGD with lr .5 moves each of the 6 weights by half its gradient; step t reads what update t - 1 did
    readings, step = run([1, 0.8, 0.4, 0.2, 0.1], "weight_change", 0.7, lr=0.5, alpha=0.0)
    assert readings == [NAN, 3.0, 2.4, 1.2, 0.6]
    assert step == 5


def test_a_zero_or_absent_gradient_never_freezes():
    for nothing in (0.0, None):
        for metric in ("grad_norm", "grad_change", "weight_change"):
            readings, step = run([1, 2, nothing, nothing, nothing, 4], metric, 1e-3, lr=0.1, alpha=0.0)
            assert step is None, (metric, nothing)
            assert readings[2:5] == [NAN, NAN, NAN]


def test_what_is_compared_survives_steps_without_a_gradient():
    assert run([1, None, 0.0, 0.5], "grad_change", 0.1, alpha=0.0)[0] == [NAN, NAN, NAN, 3.0]


def test_an_overflow_is_no_observation_and_keeps_the_previous_gradient():
    readings, step = run([1, float("inf"), float("nan"), 0.5, 0.4], "grad_change", 0.1, alpha=0.0)
    assert readings == [NAN, NAN, NAN, 3.0, 0.6]
    assert step is None


def test_loss_scale_is_divided_out():
    for metric in ("grad_norm", "grad_change", "weight_change"):
        plain = run([1, 0.9, 0.5, 0.2, 0.19], metric, 0.5, lr=0.5, alpha=0.0)
        scaled = run([1, 0.9, 0.5, 0.2, 0.19], metric, 0.5, lr=0.5, alpha=0.0, scale=1024.0)
        assert str(scaled) == str(plain)  # as text, where nan equals nan


def test_reading_every_third_step_keeps_the_meaning_of_a_reading():
    gradients = [1, 0.9, 0.5, 0.2, 0.19, 0.1, 0.3]
    for metric in ("grad_norm", "grad_change", "weight_change"):
        every = run(gradients, metric, 1e-9, lr=0.5, alpha=0.0)[0]
        third = run(gradients, metric, 1e-9, lr=0.5, alpha=0.0, interval=3)[0]
        assert third == [NAN, NAN, every[2], NAN, NAN, every[5], NAN]


def batches(seed, count, vocabulary=64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary, (4, 16), generator=generator) for _ in range(count)]


def train(model, config, steps=24, resume_at=None, lr=3e-3):
    """A plain loop with clipping and weight decay; the engine (and all else) saved and restored at `resume_at`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    grades = GradES(model, config, steps, optimizer)
    at_freeze = {}
    for step, batch in enumerate(batches(0, steps), start=1):
        if step == resume_at:
            model = copy.deepcopy(model)
            model.requires_grad_(True)
            state = optimizer.state_dict()
            saved = grades.state_dict()
            tensors = {name: tensor.clone() for name, tensor in saved.pop("tensors").items()}
            optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
            grades = GradES(model, config, steps, optimizer)
            grades.load_state_dict(json.loads(json.dumps(saved)) | {"tensors": tensors})
            optimizer.load_state_dict(state)
        model(input_ids=batch, labels=batch).loss.backward()
        for event in grades.step(step):
            at_freeze[event.matrix] = values(grades.matrices[event.matrix])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if grades.done:
            break
    return grades, optimizer, at_freeze


def values(matrix):
    whole = [p.detach() for p in matrix.parameters]
    return [(w if matrix.expert is None else w[matrix.expert]).clone() for w in whole]


@pytest.mark.parametrize("build", [qwen3, qwen3_moe])
def test_a_frozen_matrix_is_bit_identical_afterwards(build):
    model = build()
    grades, optimizer, at_freeze = train(model, GradESConfig(alpha=0.3, auto_ratio=1.0))
    assert len(at_freeze) > 5
    assert min(grades.frozen.values()) < max(grades.frozen.values())  # some trained on while others were frozen
    for name, before in at_freeze.items():
        for old, new in zip(before, values(grades.matrices[name]), strict=True):
            assert torch.equal(old, new), name
    live = [p for p in model.parameters() if p.requires_grad]
    assert set(map(id, optimizer.state)) == set(map(id, live))  # state of frozen tensors is released


def test_experts_freeze_one_by_one_and_the_whole_tensor_with_the_last():
    model = qwen3_moe()
    config = GradESConfig(metric="weight_change", alpha=0.3, auto_ratio=1.0)
    grades, _, at_freeze = train(model, config, steps=40)
    experts = [matrix for matrix in grades.matrices.values() if matrix.expert is not None]
    assert len(experts) == 16
    for matrix in experts:
        mates = [m.name in at_freeze for m in experts if m.parameters[0] is matrix.parameters[0]]
        assert matrix.parameters[0].requires_grad == (not all(mates))
    assert any(matrix.name in at_freeze for matrix in experts)


def test_experts_need_the_optimizer():
    with pytest.raises(ValueError, match="pass it, GradES"):
        GradES(qwen3_moe(), GradESConfig(), 10)


@pytest.mark.parametrize("metric", ["grad_change", "grad_norm", "weight_change"])
@pytest.mark.parametrize("build", [qwen3, qwen3_moe])
def test_a_resumed_run_is_the_same_run(build, metric):
    config = GradESConfig(metric=metric, alpha=0.3, auto_ratio=0.95, patience=2)
    straight, resumed = train(build(), config)[0], train(build(), config, resume_at=15)[0]
    assert straight.frozen == resumed.frozen
    assert straight.readings == resumed.readings
    assert straight.frozen


def test_a_state_of_something_else_is_refused():
    grades = GradES(qwen3(), GradESConfig(metric="grad_norm"), 10)
    with pytest.raises(ValueError, match="resume with --metric grad_norm"):
        GradES(qwen3(), GradESConfig(), 10).load_state_dict(grades.state_dict())
    with pytest.raises(ValueError, match=r"resume with --sample 0\.015625"):
        GradES(qwen3(), GradESConfig(metric="grad_norm", sample=1.0), 10).load_state_dict(grades.state_dict())
    state = grades.state_dict() | {"frozen": {"model.layers.7.mlp.up_proj": 3}}
    with pytest.raises(ValueError, match=r"1 matrices that this model does not train, model\.layers\.7"):
        grades.load_state_dict(state)


def test_steps_must_count_up():
    grades = GradES(qwen3(), GradESConfig(), 10)
    grades.step(1)
    with pytest.raises(ValueError, match="count up"):
        grades.step(1)


def test_done_when_all_are_frozen_and_the_rest_trains_on():
    model = qwen3()
    grades, _, _ = train(model, GradESConfig(metric="grad_norm", tau=1e9, alpha=0.5))
    assert grades.done
    assert set(grades.frozen.values()) == {13}  # ceil(.5 * 24) + 1
    assert model.model.embed_tokens.weight.requires_grad
    grades.unfreeze_all()
    assert all(p.requires_grad for p in model.parameters())
    assert not grades.done
