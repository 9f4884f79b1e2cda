"""Held-out gains: against closed forms, and in whole runs."""

import copy
import json

import pytest
import torch
from test_engine import batches
from test_trainer import LORA, arguments, losses, model_for, same, text, weights  # noqa: F401
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from grades_trl import GradES, GradESConfig, GradESTrainer
from grades_trl.heldout import HeldoutGain, gain
from grades_trl.trainers.mixin import heldout_plan
from helpers import Toy, qwen3, qwen3_moe


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

    def loss(weights):
        averaged = copy.deepcopy(model)
        averaged.load_state_dict(weights, strict=False)
        with torch.no_grad():
            return averaged(input_ids=heldout, labels=heldout).loss.item()

    config = GradESConfig(metric="heldout_gain", interval=3, alpha=0.0, tau=-1e9)
    grades = GradES(model, config, 6, optimizer, heldout=backward)
    tracked = {id(p) for matrix in grades.matrices.values() for p in matrix.parameters}
    for p in model.parameters():
        p.requires_grad_(id(p) in tracked)
    at = {}
    for step, batch in enumerate(training, start=1):
        model(input_ids=batch, labels=batch).loss.backward()
        before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        grades.step(step)
        for name, gradient in before.items():  # the training gradients are as they were
            assert torch.equal(gradient, model.get_parameter(name).grad)
        if step % 3 == 0:
            at[step] = loss(grades.heldout.average)
        optimizer.step()
        optimizer.zero_grad()
    assert len(grades.readings) == len(grades.matrices)
    assert sum(grades.readings.values()) == pytest.approx(at[3] - at[6], rel=0.05)  # routing to experts is not smooth
    assert grades.heldout.readings == 2


def toy_run(scale=1.0, vision=True):
    """Two matrices under a loss of which the second takes no part unless `vision`; halved between two readings."""
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

    reader = HeldoutGain(model, backward)
    matrices = list(GradES(model, GradESConfig(), 10).matrices.values())
    first = reader.read(1, matrices, scale)
    for layer in model.layers:
        layer["proj"].weight.data *= 0.5
    return first, reader.read(2, matrices, scale)


def test_the_first_reading_has_nothing_to_compare_with_and_no_gradient_is_no_observation():
    first, second = toy_run()
    assert first == {}
    assert set(second) == {"layers.0.proj", "layers.1.proj"}
    assert set(toy_run(vision=False)[1]) == {"layers.0.proj"}
    assert toy_run(scale=1024.0)[1] == pytest.approx(second)  # a loss scale is divided out


def test_reading_number_k_counts_k_times():
    """The average after n readings is sum k W_k / sum k; reading leaves the weights as they are, bit for bit."""
    model = Toy()
    reader = HeldoutGain(model, lambda: (model.head.weight.square().sum()).backward() or torch.tensor(0.0))
    torch.manual_seed(0)
    path = []
    for step in range(5):
        for p in model.parameters():
            p.data.normal_()
        path.append({name: p.detach().clone() for name, p in model.named_parameters()})
        reader.read(step, [], 1.0)
        assert all(torch.equal(p, path[-1][name]) for name, p in model.named_parameters())
    for name, average in reader.average.items():
        expected = sum((k + 1) * weights[name] for k, weights in enumerate(path)) / 15
        torch.testing.assert_close(average, expected)
    assert reader.readings == 0  # without matrices nothing is run


def test_gains_are_those_of_the_average():
    """L = w^2 / 2 of one matrix. The weights 1, 4, 4 average to 1, 3 (counting 1, 2) and 3.5 (counting 1, 2, 3)."""
    model = Toy()
    weight = model.layers[0]["proj"].weight

    def backward():
        loss = weight.square().sum() / 2
        loss.backward()
        return loss

    reader = HeldoutGain(model, backward)
    matrix = [GradES(model, GradESConfig(), 10).matrices["layers.0.proj"]]
    gains = []
    for step, value in enumerate((1.0, 4.0, 4.0)):
        weight.data.fill_(value)
        gains.append(reader.read(step, matrix, 1.0).get("layers.0.proj"))
    count = weight.numel()
    assert gains == [None, pytest.approx(count * (1 - 3**2) / 2), pytest.approx(count * (3**2 - 3.5**2) / 2)]
    assert reader.loss == pytest.approx(count * 3.5**2 / 2)


def test_heldout_gain_needs_examples_and_an_interval():
    for heldout, interval in ((None, 5), (lambda: None, None)):
        with pytest.raises(ValueError, match="needs held-out examples and an interval"):
            GradES(qwen3(), GradESConfig(metric="heldout_gain", interval=interval), 10, heldout=heldout)


def test_plan_by_hand():
    config = GradESConfig(metric="heldout_gain")  # 2 %, at most 128 examples, nothing freezes in the first 10 %
    # 1,000 steps of 32: 640 examples in all, 20 readings of 32: each 50 steps from 100 on, and one at the end
    assert heldout_plan(config, 1000, 32, available=500) == (32, 50)
    # 10,000 steps of 32 could pay for more than 128 examples
    assert heldout_plan(config, 10_000, 32, available=500) == (128, 500)
    assert heldout_plan(config, 10_000, 32, available=24) == (24, 500)
    # 400 steps of 8: 64 examples in all, readings of 16 at 134, 268 and 400
    assert heldout_plan(config, 400, 8, available=500) == (16, 101)
    # a given interval is kept; the cost bounds the examples
    assert heldout_plan(GradESConfig(metric="heldout_gain", interval=25), 1000, 32, available=500) == (16, 25)
    for steps, per_step in ((60, 8), (1, 4), (200, 8), (240, 32), (1000, 32), (333, 7), (5000, 128)):
        count, interval = heldout_plan(config, steps, per_step, available=10_000)
        grace = config.grace_steps(steps)
        read = [step for step in range(interval, steps + 1, interval) if step + interval > grace]
        cost = count * (len(read) + 1) if read else 0  # without a reading there is none at the end either
        assert cost <= config.heldout_cost * steps * per_step + 1e-9
        # One to compare with and two that are no new best are what a stop takes: fewer would be paid for nothing.
        assert not 0 < len(read) < 3


def test_a_run_too_short_for_readings_says_so_and_is_the_plain_one(tmp_path, text, capsys):  # noqa: F811
    dataset, tokenizer = text
    runs = []
    for grades in (None, GradESConfig(metric="heldout_gain")):
        trainer = GradESTrainer(
            model=model_for(tokenizer),
            args=arguments(tmp_path),
            train_dataset=dataset["train"],
            eval_dataset=dataset["test"],
            processing_class=tokenizer,
            grades=grades,
        )
        trainer.train()
        runs.append(trainer)
    assert runs[1].grades.heldout.readings == 0
    assert same(weights(runs[0]), weights(runs[1]))
    said = capsys.readouterr().out
    assert "96 training examples are too few: nothing will freeze" in said
    flag = float(said.split("--heldout_cost ")[1].split()[0])
    _, interval = heldout_plan(GradESConfig(metric="heldout_gain", heldout_cost=flag), 12, 8, available=8)
    assert 12 // interval > 4  # what is advised is enough


def test_the_collator_sees_the_columns_it_sees_in_training(tmp_path, text):  # noqa: F811
    dataset, tokenizer = text
    seen = []

    class Collator(DataCollatorForLanguageModeling):
        def torch_call(self, examples):
            seen.append(set(examples[0]))
            return super().torch_call(examples)

    trainer = GradESTrainer(
        model=model_for(tokenizer),
        args=arguments(tmp_path, max_steps=2),
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        processing_class=tokenizer,
        data_collator=Collator(tokenizer.pad_token_id),
        grades=GradESConfig(**HELDOUT),
    )
    trainer.train()
    assert seen[0] == seen[1] != set(trainer.eval_dataset.column_names)  # the held-out batch, and the first step's


def test_the_best_checkpoint_is_not_called_an_average(tmp_path, text, capsys):  # noqa: F811
    dataset, tokenizer = text
    trainer = GradESTrainer(
        model=model_for(tokenizer),
        args=arguments(
            tmp_path, learning_rate=0.1, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
            load_best_model_at_end=True,
        ),
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        processing_class=tokenizer,
        grades=GradESConfig(metric="heldout_gain", interval=1, heldout_cost=1.0, alpha=0.0, patience=1),
    )  # fmt: skip
    trainer.train()
    assert trainer.grades.went_back
    assert trainer.grades_summary["heldout"]["weights"] == "best checkpoint"
    assert "the model has the average" not in capsys.readouterr().out


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
def test_reading_changes_nothing_of_the_run(tmp_path, monkeypatch, text, lora):  # noqa: F811
    """Never freezing, it equals the plain trainer bit for bit, dropout's random numbers and logs included."""
    monkeypatch.setattr(HeldoutGain, "loss_now", lambda self: -1.0)  # no average is better than the last weights
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


def test_a_run_freezes_resumes_and_can_be_replayed(tmp_path, text):  # noqa: F811
    """The held-out loss grows from the first reading on, at 3. Those at 6, 9 and 12 are no new best: all converge."""
    dataset, tokenizer = text

    class Worse(GradESTrainer):
        def _heldout_backward(self):
            return super()._heldout_backward() * self.state.global_step

    config = {"patience": 3, **HELDOUT}

    def train(name, config, checkpoint=None):
        trainer = Worse(
            model=model_for(tokenizer),
            args=arguments(tmp_path / name, max_steps=24, save_strategy="steps", save_steps=5, logging_steps=5),
            train_dataset=dataset["train"],
            eval_dataset=dataset["test"],
            processing_class=tokenizer,
            grades=GradESConfig(**config),
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    straight = train("straight", config)
    path = tmp_path / "straight" / "grades" / "events.jsonl"
    assert {json.loads(line)["step"] for line in path.read_text().splitlines()} == {12}
    assert straight.grades.done
    assert straight.state.global_step == 12
    (row,) = (row for row in straight.state.log_history if row.get("step") == 10 and "loss" in row)
    assert row["grades/heldout_loss"] > 0
    assert "grades/q_proj/metric" in row  # of the reading at 9
    heldout = straight.grades_summary["heldout"]
    assert (heldout["readings"], heldout["weights"], heldout["best_step"]) == (4, "average", 3)

    for step in (5, 10):  # after one reading and after three
        resumed = train(f"resumed-{step}", config, str(tmp_path / f"straight/checkpoint-{step}"))
        assert resumed.grades.frozen == straight.grades.frozen
        assert same(weights(resumed), weights(straight))

    replayed = train("replayed", config | {"replay": str(path)})
    assert replayed.grades.frozen == straight.grades.frozen
    assert same(weights(replayed), weights(straight))
    paper = train("paper", {"replay": str(path)})  # of a metric that holds nothing out: no average, no way back
    assert paper.grades.frozen == straight.grades.frozen
    assert paper.grades_summary["heldout"] is None


def test_an_overflow_hides_the_gains_of_a_reading_and_not_its_loss():
    """Held-out losses 4, 3, 3.5, 3.2 of which the gradients of the second overflow: 3 stays the best one."""
    model = Toy()
    weight = model.layers[0]["proj"].weight
    losses = iter([4.0, 3.0, 3.5, 3.2])

    def backward():
        loss = next(losses)
        weight.grad = torch.full_like(weight, torch.inf if loss == 3.0 else 1.0)
        return torch.tensor(loss)

    reader = HeldoutGain(model, backward)
    matrix = [GradES(model, GradESConfig(), 10).matrices["layers.0.proj"]]
    best = []
    for step in (1, 2, 3, 4):
        weight.data.fill_(float(step))
        gains = reader.read(step, matrix, 1024.0)
        assert gains == ({"layers.0.proj": pytest.approx(0.3)} if step == 4 else {})
        best.append((reader.best_step, reader.best_loss, reader.idle))
    assert best == [(1, 4.0, 0), (2, 3.0, 0), (2, 3.0, 1), (2, 3.0, 2)]
    torch.testing.assert_close(reader.best["layers.0.proj.weight"], torch.full_like(weight, (1 + 2 * 2) / 3))


def test_what_heldout_rows_never_reach_does_not_keep_a_run_from_ending():
    """As with an expert that none of their tokens is routed to; the training rows reach it."""
    model = Toy()
    first, second = (layer["proj"].weight for layer in model.layers)

    def heldout():
        loss = first.square().sum() / 2  # grows in each step
        loss.backward()
        return loss

    grades = GradES(model, GradESConfig(metric="heldout_gain", interval=1, alpha=0.0, patience=2), 20, heldout=heldout)
    for step in range(1, 5):
        first.data.fill_(float(step))
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        events = grades.step(step)
        assert grades.done == (step == 3)
        if grades.done:
            break
    assert grades.frozen == {"layers.0.proj": 3, "layers.1.proj": 3}
    # two readings after the best at step 1: averages 1 and (1 + 2 * 2 + 3 * 3) / 6
    assert events[0].value == pytest.approx(-first.numel() * ((14 / 6) ** 2 - 1) / 2)
    assert not second.requires_grad


@pytest.mark.parametrize("steps, ends", [(6, 2 / 3), (3, 2.0)])
def test_the_end_of_a_schedule_keeps_what_is_better(steps, ends):
    """A quadratic: with a reading at each step, the average of -1, 1, 1 is 2/3 and that of -1, 1 is 1/3."""
    model = Toy()
    weight = model.layers[0]["proj"].weight
    model.layers[1].requires_grad_(False)

    def heldout():
        loss = (weight - (0.0 if steps == 6 else 2.0)).square().sum() / 2
        loss.backward()
        return loss

    config = GradESConfig(metric="heldout_gain", interval=1, alpha=0.0, patience=9)
    grades = GradES(model, config, steps, torch.optim.SGD(model.parameters(), lr=1.0), heldout)
    for step, value in enumerate((-1.0, 1.0, 1.0) if steps == 6 else (0.0, 1.0, 2.0), start=1):
        weight.data.fill_(value)
        grades.step(step)
    if steps == 6:
        grades.heldout.best = grades.heldout.average
        grades.heldout.best_loss = heldout().item() - 1e-3  # that of the weights as they are is a little worse
    grades.finish()
    assert weight.mean().item() == pytest.approx(ends)
    assert grades.went_back == (steps == 6)


def test_what_freezes_takes_its_average_and_the_end_goes_back_to_the_best():
    """Updates of +1 away from the minimum at 0: weights 1, 2, 3 at readings 2, 3, 4, averages 1, 5/3, 14/6."""
    model = Toy()
    first, second, other = model.layers[0]["proj"].weight, model.layers[1]["proj"].weight, model.head.weight
    for p in model.parameters():
        p.data.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def heldout():
        loss = sum(p.square().sum() for p in (first, second, other)) / 2
        loss.backward()
        return loss

    config = GradESConfig(metric="heldout_gain", interval=1, alpha=0.0, patience=2)
    grades = GradES(model, config, 20, optimizer, heldout)
    plan = {3: ["layers.0.proj"], 4: ["layers.1.proj"]}
    grades.criterion.update = lambda step, readings, **_: plan.get(step, [])
    grades.criterion.values = dict.fromkeys(grades.matrices, 0.0)
    seen = []
    for step in range(1, 5):
        for p in (first, second, other):
            p.grad = torch.full_like(p, -1.0) if p.requires_grad else None
        grades.step(step)
        seen.append([p[0, 0].item() for p in (first, second, other)])
        optimizer.step()
        optimizer.zero_grad()
    # read 0, 1, 2: the average at step 3 is (0 + 2 + 6) / 6; at step 4 all go back to the best, of step 1
    assert seen == [[0, 0, 0], [1, 1, 1], [pytest.approx(8 / 6), 2, 2], [0, 0, 0]]
    assert grades.done
    assert grades.heldout.best_step == 1


@pytest.mark.parametrize("build", [qwen3, qwen3_moe])
def test_going_back_reaches_what_is_frozen_and_cached(monkeypatch, build):
    """Layer 0 freezes at step 4; at 12 all the rest converges, and everything goes back to its average at step 2."""
    held_out, ends = batches(7, 1)[0], []
    for megabytes in (0, 16):
        model = build()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

        def heldout(model=model):
            loss = model(input_ids=held_out, labels=held_out).loss
            loss.backward()
            return loss

        config = GradESConfig(metric="heldout_gain", interval=2, alpha=0.0, activation_cache_mib=megabytes)
        grades = GradES(model, config, 30, optimizer, heldout)
        tracked = {id(p) for matrix in grades.matrices.values() for p in matrix.parameters}
        for p in model.parameters():  # backward and the cache end where nothing trains
            p.requires_grad_(id(p) in tracked)
        early = [name for name, m in grades.matrices.items() if m.layer == 0]
        plan = {4: early, 12: [name for name in grades.matrices if name not in early]}
        monkeypatch.setattr(grades.criterion, "update", lambda step, readings, plan=plan, **_: plan.get(step, []))
        grades.criterion.values = dict.fromkeys(grades.matrices, 0.0)
        first, path = None, []
        for step, batch in enumerate(batches(0, 3) * 10, start=1):
            if step == 2:  # the only reading so far: its average is itself
                first = {name: p.detach().clone() for name, p in model.named_parameters()}
            if step == 3:
                grades.heldout.best_loss = -1.0  # none is better
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            grades.step(step)
            path.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
            if grades.done:
                break
        assert {grades.frozen[name] for name in early} == {4}
        assert set(grades.frozen.values()) == {4, 12}
        assert all(torch.equal(p, first[name]) for name, p in model.named_parameters())
        grades.close()
        ends.append(path)
    assert ends[0] == ends[1]


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


def test_a_reading_holds_the_heldout_gradients_once():
    """Beside those of training. With a loss scale they are divided by it, which is another copy."""
    model = qwen3()
    seen = {}

    def backward():
        loss = model(input_ids=batches(7, 1)[0], labels=batches(7, 1)[0]).loss
        loss.backward()
        seen.update({name: p.grad.data_ptr() for name, p in model.named_parameters()})
        return loss

    heldout = HeldoutGain(model, backward)
    matrices = GradES(model, GradESConfig(), 10).matrices
    heldout.read(1, matrices.values(), scale=1.0)
    for name, (gradient,) in heldout.gradients.items():
        assert gradient.data_ptr() == seen[f"{name}.weight"], name
    expected = {name: gradient.clone() for name, (gradient,) in heldout.gradients.items()}
    again = HeldoutGain(model, lambda: (backward(), [p.grad.mul_(8.0) for p in model.parameters()])[0])
    again.read(1, matrices.values(), scale=8.0)
    assert all(torch.equal(gradient, expected[name]) for name, (gradient,) in again.gradients.items())
