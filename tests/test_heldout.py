"""Held-out gains: against closed forms, and in whole runs."""

import json

import pytest
import torch
from test_engine import batches
from test_trainer import LORA, arguments, losses, model_for, same, text, weights  # noqa: F401

from grades_trl import GradES, GradESConfig, GradESTrainer
from grades_trl.heldout import HeldoutGain, gain
from grades_trl.trainer import heldout_plan
from models import Toy, qwen3, qwen3_moe


def test_the_trapezoid_is_exact_for_a_quadratic_loss():
    # L = sum c w^2 / 2 has the gradient c w; one matrix of two tensors, as a LoRA pair
    curvature = [torch.tensor([[1.0, 4.0]]), torch.tensor([2.0])]
    before = [torch.tensor([[3.0, -1.0]]), torch.tensor([0.5])]
    after = [torch.tensor([[1.0, 0.5]]), torch.tensor([-2.0])]

    def loss(weights):
        return sum((c * w * w).sum().item() / 2 for c, w in zip(curvature, weights, strict=True))

    def gradients(weights):
        return [c * w for c, w in zip(curvature, weights, strict=True)]

    measured = gain(before, after, gradients(before), gradients(after)).item()
    assert measured == pytest.approx(loss(before) - loss(after))  # 4.5 + 2 + .25 - (.5 + .5 + 4) = 1.75
    assert measured == pytest.approx(1.75)
    assert gain(after, before, gradients(after), gradients(before)).item() == pytest.approx(-1.75)
    assert gain(before, before, gradients(before), gradients(before)).item() == 0.0


@pytest.mark.parametrize("build", [qwen3, qwen3_moe])
def test_gains_of_all_matrices_add_up_to_the_change_of_the_heldout_loss(build):
    """Only tracked matrices train; small steps, so that the third order is small."""
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    heldout, training = batches(7, 1)[0], batches(0, 6)

    def backward():
        loss = model(input_ids=heldout, labels=heldout).loss
        loss.backward()
        return loss

    def loss():
        with torch.no_grad():
            return model(input_ids=heldout, labels=heldout).loss.item()

    config = GradESConfig(metric="heldout_gain", interval=3, alpha=0.0, tau=-1e9)
    grades = GradES(model, config, 6, optimizer, heldout=backward)
    tracked = {id(p) for matrix in grades.matrices.values() for p in matrix.parameters}
    for p in model.parameters():
        p.requires_grad_(id(p) in tracked)
    at = {}
    for step, batch in enumerate(training, start=1):
        model(input_ids=batch, labels=batch).loss.backward()
        if step % 3 == 0:
            at[step] = loss()
        before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        grades.step(step)
        for name, gradient in before.items():  # the training gradients are as they were
            assert torch.equal(gradient, model.get_parameter(name).grad)
        optimizer.step()
        optimizer.zero_grad()
    assert len(grades.readings) == len(grades.matrices)
    assert sum(grades.readings.values()) == pytest.approx(at[3] - at[6], rel=0.05)  # routing to experts is not smooth
    assert grades.heldout.readings == 2


def toy_run(scale=1.0, vision=True):
    """Two matrices under a loss of which the second takes no part unless `vision`."""
    model = Toy()
    torch.manual_seed(0)
    for p in model.parameters():
        p.data.normal_()

    def backward():
        x = torch.ones(1, 3)
        loss = model.layers[0]["proj"](x).square().sum()
        if vision:
            loss = loss + model.layers[1]["proj"](x).square().sum()
        (loss * scale).backward()
        return loss

    reader = HeldoutGain(backward)
    matrices = GradES(model, GradESConfig(), 10).matrices.values()
    first = reader.read(model.parameters(), matrices, scale)
    for layer in model.layers:
        layer["proj"].weight.data *= 0.5
    return first, reader.read(model.parameters(), matrices, scale)


def test_the_first_reading_has_nothing_to_compare_with_and_no_gradient_is_no_observation():
    first, second = toy_run()
    assert first == {}
    assert set(second) == {"layers.0.proj", "layers.1.proj"}
    assert set(toy_run(vision=False)[1]) == {"layers.0.proj"}
    assert toy_run(scale=1024.0)[1] == pytest.approx(second)  # a loss scale is divided out


def test_heldout_gain_needs_examples_and_an_interval():
    for heldout, interval in ((None, 5), (lambda: None, None)):
        with pytest.raises(ValueError, match="needs held-out examples and an interval"):
            config = GradESConfig(metric="heldout_gain", interval=interval, cooldown=0.0)
            GradES(qwen3(), config, 10, heldout=heldout)
    with pytest.raises(ValueError, match="cool-down shrinks"):
        GradES(qwen3(), GradESConfig(metric="heldout_gain", interval=5), 10, heldout=lambda: None)


def test_plan_by_hand():
    config = GradESConfig(metric="heldout_gain")  # 2 %, at most 64 examples
    # 1,000 steps of 32: 640 examples in all, 20 readings of 32, one each 50 steps
    assert heldout_plan(config, 1000, 32, available=500) == (32, 50)
    # 10,000 steps of 32: 64 examples each 100 steps
    assert heldout_plan(config, 10_000, 32, available=500) == (64, 100)
    assert heldout_plan(config, 10_000, 32, available=24) == (24, 38)
    # 200 steps of 8: 32 examples in all, two readings of 16
    assert heldout_plan(config, 200, 8, available=500) == (16, 100)
    # a given interval is kept; the cost bounds the examples
    assert heldout_plan(GradESConfig(metric="heldout_gain", interval=25), 1000, 32, available=500) == (16, 25)
    for steps, per_step in ((100, 8), (1000, 32), (333, 7), (5000, 128)):
        count, interval = heldout_plan(config, steps, per_step, available=10_000)
        assert count / (interval * per_step) <= config.heldout_cost + 1e-12


@pytest.mark.parametrize("metric, tau", [("agreement", 0.1), ("heldout_gain", "auto")])
def test_decisions_do_not_depend_on_units(metric, tau):
    """The loss times 8 with an eighth of the learning rate is the same training: it freezes the same, step by step."""
    frozen = []
    for unit in (1.0, 8.0):
        model = qwen3()
        optimizer = torch.optim.SGD(model.parameters(), lr=2.0 / unit)
        held_out = batches(7, 1)[0]

        def heldout(model=model, held_out=held_out, unit=unit):
            loss = unit * model(input_ids=held_out, labels=held_out).loss
            loss.backward()
            return loss

        config = GradESConfig(
            metric=metric, tau=tau, alpha=0.1, interval=2 if metric == "heldout_gain" else 1, patience=2
        )
        grades = GradES(model, config, 40, optimizer, heldout)
        for step, batch in enumerate(batches(0, 4) * 10, start=1):  # four batches, over and over: it overfits
            (unit * model(input_ids=batch, labels=batch).loss).backward()
            grades.step(step)
            if grades.done:
                break
            optimizer.step()
            optimizer.zero_grad()
        frozen.append(grades.frozen)
    assert frozen[0] == frozen[1]
    assert len(frozen[0]) == 14


HELDOUT = {"metric": "heldout_gain", "interval": 3, "heldout_cost": 0.5, "alpha": 0.0}


@pytest.mark.parametrize("lora", [False, True])
def test_reading_changes_nothing_of_the_run(tmp_path, text, lora):  # noqa: F811
    """Never freezing, it equals the plain trainer bit for bit, dropout's random numbers and logs included."""
    dataset, tokenizer = text
    runs = []
    for grades in (None, GradESConfig(tau=-1e9, **HELDOUT)):
        model = model_for(tokenizer)
        model.config.attention_dropout = 0.1
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        trainer = GradESTrainer(
            model=model,
            args=arguments(tmp_path, gradient_accumulation_steps=2),
            train_dataset=dataset["train"],
            eval_dataset=dataset["test"],
            processing_class=tokenizer,
            peft_config=LORA if lora else None,
            grades=grades,
        )
        trainer.train()
        runs.append(trainer)
    plain, watched = runs
    assert losses(plain) == losses(watched)
    assert same(weights(plain), weights(watched))
    for key in ("num_tokens", "entropy", "mean_token_accuracy"):
        assert [r[key] for r in plain.state.log_history if key in r] == [
            r[key] for r in watched.state.log_history if key in r
        ]
    assert watched.grades.heldout.readings == 4
    assert watched.grades_summary["heldout"]["examples_per_training_example"] == pytest.approx(8 * 4 / (16 * 12))


def test_a_run_freezes_cools_down_resumes_and_is_the_same_run(tmp_path, text):  # noqa: F811
    """No gain is ever a new best: the readings at 6 and 9 are none, so all converge at 9 and cool down to 14."""
    dataset, tokenizer = text
    config = GradESConfig(tau=10.0, patience=2, cooldown=0.5, **HELDOUT)

    def train(name, config, checkpoint=None):
        trainer = GradESTrainer(
            model=model_for(tokenizer),
            args=arguments(tmp_path / name, max_steps=24, save_strategy="steps", save_steps=5),
            train_dataset=dataset["train"],
            eval_dataset=dataset["test"],
            processing_class=tokenizer,
            grades=config,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    straight = train("straight", config)
    path = tmp_path / "straight" / "grades" / "events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert {(event["decided"], event["step"]) for event in events} == {(9, 14)}
    assert straight.grades.done
    assert straight.state.global_step == 14

    for step in (5, 10):  # before the first reading that counts, and within the cool-down
        resumed = train(f"resumed-{step}", config, str(tmp_path / f"straight/checkpoint-{step}"))
        assert resumed.grades.frozen == straight.grades.frozen
        assert same(weights(resumed), weights(straight))

    replayed = train("replayed", GradESConfig(replay=str(path), cooldown=0.5))  # nothing is read
    assert replayed.grades.frozen == straight.grades.frozen
    assert replayed.grades_summary["heldout"] is None


def test_a_cool_down_shrinks_the_updates_to_nothing_and_starts_from_the_best_weights():
    """Plain SGD on a quadratic that climbs: readings at 2, 4, 6; the best is the first one, at 2."""
    model = Toy()
    weight, other = model.layers[0]["proj"].weight, model.head.weight
    model.layers[1].requires_grad_(False)
    for p in model.parameters():
        p.data.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def heldout():
        loss = (weight.square().sum() + other.square().sum()) / 2
        loss.backward()
        return loss

    config = GradESConfig(metric="heldout_gain", interval=2, alpha=0.0, patience=1, cooldown=0.5)
    grades = GradES(model, config, 20, optimizer, heldout)
    path = []
    for step in range(1, 12):
        for p in (weight, other):
            p.grad = torch.full_like(p, -1.0)  # every update adds 1, away from the minimum at 0
        grades.step(step)
        if grades.done:
            break
        optimizer.step()
        optimizer.zero_grad()
        path.append((weight[0, 0].item(), other[0, 0].item()))
    # Readings at 2 (weights 1), 4 (3; the first one that is compared) and 6 (5): decided at 6, back to what it was at
    # 2, no update in that step. The updates of steps 7 and 8 count 2/4 and 1/4, and at 9 all is frozen.
    assert grades.frozen == {"layers.0.proj": 9}
    expected = [1, 2, 3, 4, 5, 1, 1.5, 1.75]
    assert [a for a, _ in path] == pytest.approx(expected)
    assert [b for _, b in path] == pytest.approx(expected)  # what is not tracked goes along


@pytest.mark.parametrize("build", [qwen3, qwen3_moe])
def test_going_back_reaches_what_is_frozen_and_cached(monkeypatch, build):
    """Layer 0 freezes at step 6; at 12 all the rest converges, and everything goes back to what it was at step 2."""
    held_out, ends = batches(7, 1)[0], []
    for megabytes in (0, 16):
        model = build()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

        def heldout(model=model):
            loss = model(input_ids=held_out, labels=held_out).loss
            loss.backward()
            return loss

        config = GradESConfig(metric="heldout_gain", interval=2, alpha=0.0, cooldown=0.5, cache_prefix=megabytes)
        grades = GradES(model, config, 30, optimizer, heldout)
        tracked = {id(p) for matrix in grades.matrices.values() for p in matrix.parameters}
        for p in model.parameters():  # backward and the cache end where nothing trains
            p.requires_grad_(id(p) in tracked)
        early = [name for name, m in grades.matrices.items() if m.layer == 0]
        if build is qwen3_moe:  # of one tensor some experts freeze and others train on
            early = [name for name in early if grades.matrices[name].expert in (None, 0, 1)]
        plan = {4: early, 12: [name for name in grades.matrices if name not in early]}  # cool-down from 4 to 6
        monkeypatch.setattr(grades.criterion, "update", lambda step, readings, plan=plan: plan.get(step, []))
        monkeypatch.setattr(type(grades.criterion), "at_best", property(lambda self: False))
        grades.criterion.values = dict.fromkeys(grades.matrices, 0.0)
        first, path = None, []
        for step, batch in enumerate(batches(0, 3) * 10, start=1):
            if step == 2:
                first = {name: p.detach().clone() for name, p in model.named_parameters()}
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            grades.step(step)
            path.append(loss.item())
            optimizer.step()
            if step == 12:  # there is no gradient in that step
                assert all(torch.equal(p, first[name]) for name, p in model.named_parameters())
            optimizer.zero_grad()
            if grades.done:
                break
        assert {grades.frozen[name] for name in early} == {6}
        assert set(grades.frozen.values()) == {6, 18}
        assert len(path) == 18
        grades.close()
        ends.append((path, weights_of(model)))
    assert ends[0][0] == ends[1][0]
    assert same(ends[0][1], ends[1][1])


def weights_of(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def test_no_heldout_rows_is_an_error(tmp_path, text):  # noqa: F811
    dataset, tokenizer = text

    def trainer(held_out):
        return GradESTrainer(
            model=model_for(tokenizer),
            args=arguments(tmp_path),
            train_dataset=dataset["train"],
            eval_dataset=held_out,
            processing_class=tokenizer,
            grades=GradESConfig(metric="heldout_gain"),
        )

    with pytest.raises(ValueError, match="pass eval_dataset"):
        trainer(None)
    with pytest.raises(ValueError, match="eval_dataset is streamed"):
        trainer(dataset["test"].to_iterable_dataset()).train()
