"""The engine in a plain PyTorch loop: what it freezes, when it ends, what it keeps, and that it does nothing else."""

import dataclasses
import json
import math
import random
import re
import subprocess
import sys
import warnings

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from test_kernels import DEVICE, INTERPRETED, check, triton_environment
from test_weight_average import equal, live_bytes, weights
from torch.utils._python_dispatch import TorchDispatchMode
from trl import ModelConfig

from grades_trl import FreezeEvent, GradES, GradESConfig
from grades_trl.criteria import kernels, measurement, metrics
from grades_trl.engine import tracked_in
from grades_trl.recipe.models import make_trainable
from grades_trl.stopping import STOPPING_RULES, HeldoutScore
from helpers import CHECKPOINTING, Toy, backward, checkpoint, llava, qwen3

METRICS = ["grad_change", "grad_norm", "weight_change"]
ONE, TWO = "layers.0.proj", "layers.1.proj"
NAN = math.nan


def qwen3_lora():
    torch.manual_seed(1)
    model = get_peft_model(qwen3(), LoraConfig(r=4, target_modules="all-linear"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)  # zeros would leave lora_A without a gradient
    return model


def batch_of(seed):
    return torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(seed))


def heldout_loss_of(model, seed=1000):
    """The loss of a batch that is not trained on."""
    ids = batch_of(seed)

    def loss():
        model.eval()
        value = model(input_ids=ids, labels=ids).loss.item()
        model.train()
        return value

    return loss


class Run:
    """A plain loop with clipping, weight decay and a learning rate that falls to zero."""

    def __init__(self, build, config, heldout=False, steps=24, lr=3e-3, batches=24):
        self.model = build()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr, weight_decay=0.1)
        self.steps, self.lr, self.batches = steps, lr, batches
        self.events, self.losses, self.at_freeze = [], [], {}
        self.grades = None
        if config is not None:
            loss = heldout_loss_of(self.model) if heldout else None
            self.grades = GradES(self.model, config, steps, self.optimizer, loss)

    def train(self, first=1, last=None):
        for step in range(first, (last or self.steps) + 1):
            ids = batch_of(step % self.batches)
            loss = self.model(input_ids=ids, labels=ids).loss
            loss.backward()
            self.losses.append(loss.item())
            for event in self.grades.step(step) if self.grades is not None else ():
                self.events.append(event)
                self.at_freeze[event.matrix] = values(self.grades.matrices[event.matrix])
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * (1 - step / self.steps)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.grades is not None and self.grades.done:
                break
        return self

    def finish(self):
        self.grades.finish()
        return self


def values(matrix):
    return [p.detach().clone() for p in matrix.parameters]


def toy(config, heldout_loss=None, total_steps=20):
    model = Toy()
    return model, GradES(model, config, total_steps, torch.optim.SGD(model.parameters(), lr=1.0), heldout_loss)


def give_gradients(model, value=1.0):
    for p in model.parameters():
        p.grad = torch.full_like(p, value) if p.requires_grad else None


# ---- freezing ----


@pytest.mark.parametrize("build", [qwen3, qwen3_lora])
@pytest.mark.parametrize("metric", METRICS)
def test_a_frozen_matrix_is_bit_identical_afterwards(build, metric):
    ratio = 0.4 if metric == "weight_change" else 0.85
    run = Run(build, GradESConfig(metric=metric, alpha=0.3, auto_ratio=ratio)).train()
    grades = run.grades
    assert len(run.at_freeze) > 3
    assert min(grades.frozen.values()) < max(grades.frozen.values())  # some trained on while others were frozen
    for name, before in run.at_freeze.items():
        for old, new in zip(before, values(grades.matrices[name]), strict=True):
            assert torch.equal(old, new), name
    live = [p for p in run.model.parameters() if p.requires_grad]
    assert set(map(id, run.optimizer.state)) == set(map(id, live))  # state of frozen tensors is released


def test_an_event_tells_which_matrix_when_and_why():
    model, grades = toy(GradESConfig(metric="grad_norm", tau={"language": 3.1}, alpha=0.0))
    seen = []
    for step, (one, two) in enumerate([(1.0, 1.0), (0.5, 1.0), (0.5, 0.25)], 1):
        for layer, value in zip(model.layers, (one, two), strict=True):
            if layer.proj.weight.requires_grad:
                layer.proj.weight.grad = torch.full_like(layer.proj.weight, value)
        seen += grades.step(step)
    common = {
        "role": "proj",
        "tower": "language",
        "tau": 3.1,
        "params": 6,
        "total": 2,
        "reason": "grad_norm below tau",
    }
    assert seen == [
        FreezeEvent(step=2, matrix=ONE, layer=0, value=3.0, frozen=1, **common),
        FreezeEvent(step=3, matrix=TWO, layer=1, value=1.5, frozen=2, **common),
    ]
    assert grades.frozen == {ONE: 2, TWO: 3}
    assert all(layer.proj.weight.grad is None and not layer.proj.weight.requires_grad for layer in model.layers)
    assert model.layers[0].proj.bias.requires_grad


@pytest.mark.parametrize("metric", METRICS)
def test_a_step_takes_the_loss_scale_of_its_gradients(metric):
    """Which may change from step to step, as that of a loss scaler does."""
    seen = []
    for scales in ([1.0] * 4, [1024.0, 512.0, 512.0, 1024.0]):
        model, grades = toy(GradESConfig(metric=metric, tau=0.0, alpha=0.0))
        for step, scale in enumerate(scales, 1):
            give_gradients(model, scale / step)
            grades.step(step, grad_scale=scale)
            for p in model.parameters():
                p.grad /= scale
            grades.optimizer.step()
        seen.append(grades.criterion.values)
    expected = {"grad_norm": 6 / 4, "grad_change": 6 * (1 / 3 - 1 / 4), "weight_change": 6 / 3}[metric]
    assert seen == [dict.fromkeys((ONE, TWO), pytest.approx(expected, rel=1e-5))] * 2


def test_steps_must_count_up():
    grades = toy(GradESConfig())[1]
    grades.step(3)
    for step in (3, 2):
        with pytest.raises(ValueError, match=rf"GradES\.step\({step}\) after step 3: steps count up"):
            grades.step(step)


def test_what_would_be_tracked_and_what_does_not_fit_is_known_before_training():
    model = llava()
    assert tracked_in(model, GradESConfig()).keys() == GradES(model, GradESConfig(), 10).matrices.keys()
    for config, message in (
        (GradESConfig(metric="grad_change", tau={"vision": 1.0}), "language"),
        (GradESConfig(metric="schedule", schedule={"audio": 1}), "'audio', which is no matrix"),
    ):
        for build in (lambda c: tracked_in(model, c), lambda c: GradES(model, c, 10)):
            with pytest.raises(ValueError, match=message):
                build(config)


# ---- schedules ----


def schedule(mapping, **settings):
    return GradESConfig(metric="schedule", schedule=mapping, **settings)


def images(seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (2, 24), generator=generator)
    model_inputs = {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    ids[:, :16] = 63  # one token for each patch of an image
    return {"input_ids": ids, "labels": ids, **model_inputs}


@pytest.mark.parametrize("lora", [False, True])
def test_a_tower_that_is_frozen_from_step_1_never_gets_an_update(lora):
    model = llava(image_token_index=63).train()
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    before = weights(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    grades = GradES(model, schedule({"vision": 1}), 5, optimizer)
    for step in range(1, 6):
        model(**images(step)).loss.backward()
        grades.step(step)
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    trained = {id(p): name for name, p in model.named_parameters()}
    for matrix in grades.matrices.values():
        for p in matrix.parameters:
            assert (trained[id(p)] in moved) == (matrix.tower == "language"), matrix.name
    assert set(grades.frozen.values()) == {1}
    assert not grades.done


def test_bottom_up_and_random_are_plain_schedules():
    names = list(tracked_in(qwen3(), GradESConfig()))
    bottom_up = {f"*.layers.{layer}.*": 4 * (layer + 1) for layer in range(2)}
    at_random = dict(zip(names, random.Random(0).sample(range(1, 25), len(names)), strict=True))
    for mapping, expected in (
        (bottom_up, {name: 4 * (int(name.split(".")[2]) + 1) for name in names}),
        (at_random, at_random),
    ):
        run = Run(qwen3, schedule(mapping, stopping="end_of_schedule")).train()
        assert run.grades.frozen == expected
        assert {event.matrix: event.step for event in run.events} == expected
        assert {(event.value, event.tau, event.reason) for event in run.events} == {(None, None, "schedule")}


@pytest.mark.parametrize("heldout", [False, True])
def test_a_replay_of_a_run_freezes_the_same_and_ends_the_same(tmp_path, heldout):
    settings = {"heldout_every": 4, "heldout_patience": 2} if heldout else {}
    config = GradESConfig(metric="grad_change", alpha=0.3, auto_ratio=0.95, **settings)
    first = Run(qwen3, config, heldout).train().finish()
    path = tmp_path / "events.jsonl"
    path.write_text("".join(json.dumps(dataclasses.asdict(event)) + "\n" for event in first.events))
    replayed = dataclasses.replace(
        config, metric="schedule", schedule=str(path), **dict.fromkeys(("alpha", "auto_ratio"))
    )
    second = Run(qwen3, replayed, heldout).train().finish()
    assert second.grades.frozen == first.grades.frozen != {}
    assert second.losses == first.losses
    assert equal(weights(second.model), weights(first.model))


# ---- when the run ends ----


@pytest.mark.parametrize(
    ("stopping", "heldout", "rule"),
    [
        ("auto", False, "all_frozen"),
        ("auto", True, "heldout"),
        ("all_frozen", False, "all_frozen"),
        ("all_frozen", True, "all_frozen"),
        ("heldout", True, "heldout"),
        ("end_of_schedule", False, "end_of_schedule"),
        ("end_of_schedule", True, "end_of_schedule"),
    ],
)
@pytest.mark.parametrize("keep", ["auto", "last", "best_average"])
def test_which_rule_ends_a_run_and_whether_a_heldout_loss_is_measured(stopping, heldout, rule, keep):
    config = GradESConfig(stopping=stopping, keep=keep)
    if keep == "best_average" and not heldout:
        with pytest.raises(
            ValueError, match="keep 'best_average' measure a score of held-out rows: pass heldout_score="
        ):
            toy(config)
        return
    grades = toy(config, (lambda: 1.0) if heldout else None)[1]
    assert type(grades.stopping) is STOPPING_RULES[rule]
    measured = heldout and (rule == "heldout" or keep == "best_average")
    assert isinstance(grades.heldout, HeldoutScore) == (grades.average is not None) == measured
    if rule == "heldout":
        assert grades.stopping is grades.heldout


def test_a_run_ends_by_the_training_accuracy_that_its_steps_are_given():
    with pytest.raises(ValueError, match="pass knows_train_accuracy=True"):
        toy(GradESConfig(stopping="train_accuracy"))
    for stopping in ("auto", "train_accuracy"):
        model = Toy()
        grades = GradES(model, GradESConfig(metric="none", stopping=stopping), 20, knows_train_accuracy=True)
        for step in range(1, 21):
            give_gradients(model)
            grades.step(step, train_accuracy=1.0)
            if grades.done:
                break
        assert (step, grades.stop_reason) == (11, "training token accuracy saturated")
        again = GradES(Toy(), GradESConfig(metric="none", stopping=stopping), 20, knows_train_accuracy=True)
        again.load_state_dict(grades.state_dict())
        assert again.stop_reason == grades.stop_reason


def test_a_score_may_come_with_its_loss():
    measurements = iter([(0.5, 2.0), (0.5, 1.0), (0.5, 1.5), (0.5, 1.2)])
    config = GradESConfig(metric="none", heldout_metric="token_accuracy", heldout_every=1, heldout_grace=0.0)
    _, grades = toy(config, measurements.__next__)
    for step in range(1, 4):
        grades.step(step)
    assert (grades.heldout.best_step, grades.stop_reason) == (2, "held-out token accuracy stopped improving")
    grades.finish()  # the last weights are as often right, at a higher loss
    assert grades.restored_best


def test_a_heldout_rule_without_rows_is_an_error():
    with pytest.raises(ValueError, match=r"stopping 'heldout' .* pass heldout_score="):
        toy(GradESConfig(stopping="heldout"))


@pytest.mark.parametrize("stopping", ["auto", "all_frozen", "end_of_schedule"])
def test_a_run_ends_with_the_last_freeze_or_trains_the_norms_on(stopping):
    every = schedule({"*.layers.0.*": 3, "*.layers.1.*": 5}, stopping=stopping)
    run = Run(qwen3, every)
    run.train(last=4)
    assert not run.grades.done
    run.train(first=5, last=5)
    goes_on = stopping == "end_of_schedule"
    assert run.grades.all_frozen
    assert (run.grades.done, run.grades.stop_reason) == (not goes_on, "" if goes_on else "all matrices frozen")
    before = weights(run.model)
    if goes_on:
        run.train(first=6)
        assert len(run.losses) == 24
        moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
        tracked = {f"{name}.weight" for name in run.grades.matrices}
        assert moved == before.keys() - tracked


@pytest.mark.parametrize("stopping", ["auto", "end_of_schedule"])
def test_a_lora_run_with_nothing_left_to_train_ends_whatever_the_rule(stopping):
    run = Run(qwen3_lora, schedule({"*": 3}, stopping=stopping)).train()
    assert len(run.losses) == 3
    assert run.grades.stop_reason == "all matrices frozen"


@CHECKPOINTING
@pytest.mark.parametrize("lora", [False, True])
def test_leading_layers_that_the_user_froze_are_skipped_after_the_first_step(lora, reentrant):
    model = make_trainable(
        qwen3(num_hidden_layers=4), ModelConfig(use_peft=lora, lora_r=4, lora_dropout=0), None, "2-3"
    )
    checkpoint(model, reentrant)
    first, expected = backward(model)
    grades = GradES(model, GradESConfig(metric="none"), 10)
    for step in (1, 2):
        count, found = backward(model)
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)
        grades.step(step)
        assert grades.prefix.skipped_layers == {"model.layers": 2}
    assert (count < first) == (reentrant is not None)  # without checkpointing, no gradient went down there before
    assert not grades.frozen
    grades.finish()


def test_a_tower_that_the_user_froze_is_read_from_the_cache_when_its_images_come_back():
    """The first rows have no images: that the tower is there is not seen before the second step."""
    model = make_trainable(llava(image_token_index=63), ModelConfig(), ["projector", "language"]).train()
    grades = GradES(model, GradESConfig(metric="none"), 10, encoder_cache_bytes=2**24)
    skipped, hits = [], []
    for step in range(1, 7):
        rows = {"input_ids": batch_of(0), "labels": batch_of(0)} if step == 1 else images(0)
        model(**rows).loss.backward()
        grades.step(step)
        model.zero_grad()
        skipped.append(sum(grades.prefix.skipped_layers.values()))
        hits.append(grades.prefix.encoder_cache.use.hits)
    assert skipped == [0, 2, 2, 2, 2, 2]
    assert hits == [0, 0, 0, 1, 2, 3]  # one pass shows which layer is read, and its output is kept


@pytest.mark.parametrize("stopping", ["all_frozen", "end_of_schedule"])
def test_a_tower_without_data_does_not_keep_a_run_from_ending(stopping):
    """LoRA on both towers, and rows of text alone: with the language tower frozen, backward would find nothing."""
    model = get_peft_model(llava(), LoraConfig(r=4, target_modules="all-linear"))
    grades = GradES(model, schedule({"language": 2}, stopping=stopping), 10)
    for step in (1, 2):
        model(input_ids=batch_of(step), labels=batch_of(step)).loss.backward()
        grades.step(step)
        model.zero_grad()
        assert grades.done == (step == 2)
    assert grades.without_gradient == {name for name, m in grades.matrices.items() if m.tower == "vision"}
    assert not grades.without_gradient & grades.frozen.keys()


def test_nothing_frozen_is_not_all_frozen():
    """Not before the first backward either, when no matrix has a gradient."""
    grades = toy(GradESConfig(metric="none"))[1]
    grades.step(1)
    assert not grades.all_frozen
    assert not grades.done


def follow(path, target, **config):
    """Sets the weights of a model to each number of a path, with the held-out loss mean((w - target)^2) / 2."""
    model = Toy().requires_grad_(False)
    weight = model.layers[0].proj.weight.requires_grad_(True)
    settings = {"metric": "none", "heldout_every": 1, "heldout_grace": 0.0} | config
    losses = []

    def heldout_loss():
        losses.append((weight - target).square().mean().item() / 2)
        return losses[-1]

    grades = GradES(model, GradESConfig(**settings), 20, None, heldout_loss)
    for step, value in enumerate(path, 1):
        weight.data.fill_(value)
        weight.grad = torch.ones_like(weight)
        grades.step(step)
        assert torch.equal(weight, torch.full_like(weight, value)) or math.isnan(value)
        if grades.done:
            break
    return grades, weight, losses


def test_a_heldout_loss_is_that_of_the_averaged_weights():
    """The weights 1, 4, 4, counting 1, 2 and 3 times, average to 1, 3 and 3.5."""
    grades, _, losses = follow([1.0, 4.0, 4.0], target=0.0, heldout_patience=5)
    assert losses == pytest.approx([1 / 2, 9 / 2, 3.5**2 / 2])
    assert (grades.heldout.score, grades.heldout.best_score, grades.heldout.best_step) == (losses[-1], 0.5, 1)
    assert (grades.heldout.evals_since_best, grades.heldout.measurements) == (2, 3)


def test_weights_are_averaged_from_the_first_interval_on_and_measured_after_the_grace_period():
    """Every second step of 20, at step 8 for the first time: the weights at 1, 2, ... 8 count as often, since 20
    updates of the average spread over 20 steps."""
    grades, _, losses = follow([float(step) for step in range(1, 9)], 0.0, heldout_every=2, heldout_grace=0.4)
    average = sum(step * step for step in range(1, 9)) / sum(range(1, 9))
    assert losses == pytest.approx([average**2 / 2])
    assert (grades.heldout.best_step, grades.heldout.measurements) == (8, 1)


@pytest.mark.parametrize(("patience", "last"), [(1, 3), (2, 4), (4, 6)])
def test_a_run_ends_by_its_heldout_loss_and_keeps_the_best_average(patience, last):
    """Away from the target, which was passed at step 2: averages 1, 1/3, 7/6 and so on."""
    path = [1.0, 0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    grades, weight, losses = follow(path, 0.0, stopping="heldout", heldout_patience=patience)
    assert len(losses) == last
    assert (grades.stop_reason, grades.heldout.best_step) == ("held-out loss stopped improving", 2)
    grades.finish()
    assert grades.restored_best
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, 1 / 3))


DOWN = ([1.0, -1.0, 1.5], 0.0)  # averages 1, -1/3, 7/12: the second is the best, and better than the last weights
TOWARDS = ([0.0, 1.0, 2.0], 2.0)  # averages 0, 2/3, 4/3: the last weights are better
LOST = ([1.0, -1.0, NAN], 0.0)  # the last weights are no numbers


@pytest.mark.parametrize(
    ("stopping", "keep", "way", "end"),
    [
        ("auto", "auto", DOWN, -1 / 3),
        ("auto", "auto", TOWARDS, 2.0),
        ("auto", "auto", LOST, -1 / 3),
        ("auto", "last", DOWN, 1.5),
        ("auto", "best_average", DOWN, -1 / 3),
        ("heldout", "auto", DOWN, -1 / 3),
        ("heldout", "last", DOWN, 1.5),
        ("heldout", "best_average", TOWARDS, 2.0),
        ("heldout", "best_average", LOST, -1 / 3),
        ("all_frozen", "best_average", DOWN, -1 / 3),
        ("end_of_schedule", "best_average", DOWN, -1 / 3),
        ("end_of_schedule", "best_average", TOWARDS, 2.0),
        ("end_of_schedule", "best_average", LOST, -1 / 3),
        ("all_frozen", "auto", DOWN, 1.5),
        ("all_frozen", "last", DOWN, 1.5),
        ("end_of_schedule", "auto", DOWN, 1.5),
        ("end_of_schedule", "last", DOWN, 1.5),
    ],
)
def test_which_weights_are_kept(stopping, keep, way, end):
    measured = stopping in ("auto", "heldout") or keep == "best_average"
    settings = {} if measured else {"heldout_every": None, "heldout_grace": None}
    grades, weight, losses = follow(*way, stopping=stopping, keep=keep, **settings)
    assert len(losses) == (len(way[0]) if measured else 0)
    grades.finish()
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, end))
    assert grades.restored_best == (end == -1 / 3)
    assert len(losses) == len(way[0]) + 1 if measured and keep != "last" else len(losses) in (0, len(way[0]))


@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_without_a_finite_heldout_loss_the_last_weights_are_kept(bad):
    grades, weight, losses = follow([1.0, 2.0, 3.0, 4.0], bad, heldout_patience=1)
    assert len(losses) == 4
    assert not grades.done
    grades.finish()
    assert not grades.restored_best
    assert torch.equal(weight, torch.full_like(weight, 4.0))


def test_the_best_average_is_restored_once_and_only_before_close():
    grades, weight, losses = follow(*DOWN)
    grades.restore_best_average()
    assert grades.restored_best
    weight.data.fill_(5.0)
    grades.restore_best_average()
    grades.finish()
    assert torch.equal(weight, torch.full_like(weight, 5.0))
    assert len(losses) == 4
    grades, weight, losses = follow(*DOWN)
    grades.close()
    grades.finish()
    assert not grades.restored_best
    assert torch.equal(weight, torch.full_like(weight, 1.5))
    assert len(losses) == 3


def test_the_best_average_has_the_value_of_then_of_what_was_unfrozen_later():
    model = Toy().requires_grad_(False)
    weight, late = (layer.proj.weight for layer in model.layers)
    weight.requires_grad_(True)
    first, losses = late.detach().clone(), iter(range(9))
    settings = {"metric": "none", "keep": "best_average", "heldout_every": 1, "heldout_grace": 0.0}
    grades = GradES(model, GradESConfig(**settings), 20, None, lambda: float(next(losses)))
    for step in (1, 2, 3):
        late.requires_grad_(step > 1)
        for p in (weight, late):
            p.grad = torch.ones_like(p) if p.requires_grad else None
        grades.step(step)
        for p in (weight, late):
            p.data += step * p.requires_grad
    grades.finish()
    assert (grades.restored_best, grades.heldout.best_step) == (True, 1)
    assert torch.equal(late, first)


def test_a_heldout_loss_is_measured_without_gradients():
    """In the step and at the end: forward passes keep nothing for a backward."""
    modes = []
    _, grades = toy(GradESConfig(metric="none", heldout_every=1), lambda: modes.append(torch.is_grad_enabled()) or 1.0)
    for step in range(1, 4):
        grades.step(step)
    grades.finish()
    assert modes == [False] * 3  # at steps 2 and 3, after a grace period of 2, and at the end


@pytest.mark.parametrize("build", [qwen3, qwen3_lora])
def test_the_best_average_reaches_what_is_frozen_and_cached(build):
    """Layer 0 freezes at step 4. The best average is that of step 2; after it, outputs in memory are other ones."""
    paths, ends = [], []
    for mib in (0, 16):
        config = schedule(
            {"*.layers.0.*": 4}, heldout_every=2, heldout_grace=0.0, heldout_patience=5, activation_cache_mib=mib
        )
        run = Run(build, config, heldout=True, lr=0.05, batches=3)
        tracked = {id(p) for matrix in run.grades.matrices.values() for p in matrix.parameters}
        for p in run.model.parameters():  # backward and the cache end where nothing trains
            p.requires_grad_(id(p) in tracked)
        at_two = []
        heldout_loss = run.grades._heldout_score

        def worse(model=run.model, heldout_loss=heldout_loss, at_two=at_two):
            at_two.append(weights(model))
            return heldout_loss() + len(at_two)

        run.grades._heldout_score = worse
        run.train()
        assert (run.grades.prefix.cache is not None and run.grades.prefix.cache.use.hits > 0) == (mib > 0)
        run.grades.restore_best_average()
        assert run.grades.restored_best
        assert equal(weights(run.model), at_two[0])
        ids = batch_of(1)
        loss = run.model(input_ids=ids, labels=ids).loss.item()
        run.grades.close()
        assert run.model(input_ids=ids, labels=ids).loss.item() == loss
        paths.append(run.losses)
        ends.append(loss)
    assert paths[0] == paths[1]
    assert ends[0] == ends[1]


# ---- after training, and after what went wrong ----


def traces(model):
    """What hangs on each module: attributes of its own, and how many hooks."""
    return {
        path: {name: len(value) if "hooks" in name else None for name, value in vars(module).items()}
        for path, module in model.named_modules()
    }


def frozen_by_the_user():
    model = qwen3().train()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[1].self_attn.q_proj.requires_grad_(False)
    return model


class Wrong(Exception):
    pass


def fail(*_):
    raise Wrong


@pytest.mark.parametrize("ends_with", ["close", "finish"])
@pytest.mark.parametrize(
    "what", ["end of schedule", "all frozen", "backward", "criterion", "heldout loss", "heldout loss at the end"]
)
def test_whatever_ends_a_run_nothing_of_it_is_left_on_the_model(monkeypatch, what, ends_with):
    """Layer 0 has frozen at step 2 and backward skips it; what goes wrong does so at step 4."""
    before = frozen_by_the_user()
    mapping = {"*.layers.0.*": 2, ("*.layers.1.*" if what == "all frozen" else "*.layers.1.mlp.*"): 4}
    heldout = {"heldout_every": 2, "heldout_grace": 0.0, "heldout_patience": 2}
    config = schedule(mapping, freeze_norms=True, freeze_embeddings=True, **heldout)
    run = Run(frozen_by_the_user, config, heldout=True, steps=4)
    run.train(last=3)
    model, grades = run.model, run.grades
    assert grades.prefix.skipped_layers == {"model.layers": 1}
    at_three = weights(model)

    if what == "backward":
        hook = model.lm_head.register_forward_hook(fail)
    elif what == "criterion":
        monkeypatch.setattr(grades.criterion, "update", fail)
    elif what == "heldout loss":
        grades._heldout_score = fail
    if what in ("end of schedule", "all frozen", "heldout loss at the end"):
        run.train(first=4)
        assert grades.done == (what == "all frozen")
    else:
        with pytest.raises(Wrong):
            run.train(first=4)
        assert equal(weights(model), at_three)
    if what == "backward":
        hook.remove()
    if what == "heldout loss":  # the gradients of the step, of all that has not frozen in it
        mlp = model.model.layers[1].mlp
        frozen = {id(p) for p in (*model.model.layers[0].parameters(), *mlp.parameters())}
        for name, p in before.named_parameters():
            own = model.get_parameter(name)
            assert (own.grad is not None) == (p.requires_grad and id(own) not in frozen), name
    elif what == "heldout loss at the end":
        grades._heldout_score = fail

    end, last = getattr(grades, ends_with), weights(model)
    if what.startswith("heldout loss") and ends_with == "finish":
        with pytest.raises(Wrong):
            end()
    else:
        end()
    for _ in range(2):
        assert {name: p.requires_grad for name, p in model.named_parameters()} == {
            name: p.requires_grad for name, p in before.named_parameters()
        }
        assert traces(model) == traces(before)
        grades.close()
        grades.finish()
    assert equal(weights(model), last) or grades.restored_best
    # Another run on the same model is the one that a copy of its weights would give.
    copy = frozen_by_the_user()
    copy.load_state_dict(model.state_dict())
    model.zero_grad()
    later = [Run(lambda model=model: model, None, steps=2).train() for model in (model, copy)]
    assert later[0].losses == later[1].losses
    assert equal(weights(later[0].model), weights(later[1].model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("error", [Wrong, KeyboardInterrupt])
def test_a_measurement_that_fails_leaves_the_weights_and_gradients_of_the_step(dtype, error):
    model = qwen3().to(dtype)

    def heldout_loss():
        assert not equal(weights(model), here)  # the average
        if armed:
            raise error
        return 1.0

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    grades = GradES(
        model, GradESConfig(metric="none", heldout_every=1, heldout_grace=0.2), 10, optimizer, heldout_loss
    )
    for step in range(1, 6):
        here, armed = weights(model), step == 5
        model(input_ids=batch_of(step), labels=batch_of(step)).loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        if armed:
            with pytest.raises(error):
                grades.step(step)
        else:
            grades.step(step)
        assert equal(weights(model), here)
        assert equal({name: p.grad for name, p in model.named_parameters()}, gradients)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("ends_with", ["close", "finish"])
@pytest.mark.parametrize("metric", [*METRICS, "gain"])
def test_everything_is_released_at_the_end(metric, ends_with):
    """The averages, what values were compared with, and which elements are sampled."""
    model = qwen3(intermediate_size=4096)
    with live_bytes() as held:
        grades = GradES(model, GradESConfig(metric=metric, heldout_every=1), 6, None, lambda: 1.0)
        for step in range(1, 5):
            give_gradients(model, 1.0 / step)
            grades.step(step)
        model.zero_grad()
        assert held() > grades.average.host_bytes / 2
        getattr(grades, ends_with)()
        assert held() == 0


# ---- resuming ----


def resumed(build, config, heldout, at):
    """A run that is saved before a step, in the files of a checkpoint, and goes on in other objects."""
    first = Run(build, config, heldout).train(last=at - 1)
    state = first.grades.state_dict()
    tensors = safetensors.torch.save(state.pop("tensors"))
    second = Run(build, config, heldout)
    second.model.load_state_dict(first.model.state_dict())
    values = json.loads(json.dumps(state, allow_nan=False))
    second.grades.load_state_dict(values | {"tensors": safetensors.torch.load(tensors)})
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.events, second.losses = first.events, first.losses
    return second.train(first=at)


RESUMED = {
    "grad_change": {"alpha": 0.3, "auto_ratio": 0.85, "patience": 2},
    "grad_change every 3": {"alpha": 0.3, "auto_ratio": 0.85, "measure_every": 3},
    "grad_norm": {"alpha": 0.3, "auto_ratio": 0.8},
    "weight_change": {"alpha": 0.3, "auto_ratio": 0.3, "patience": 2},
    "weight_change every 2": {"alpha": 0.3, "auto_ratio": 0.4, "sample_fraction": 1.0, "measure_every": 2},
    "schedule": {"schedule": {"*.layers.0.*": 6, "*.layers.1.mlp.*": 17}},
    "gain": {"alpha": 0.3, "margin": 1e9},
    "none": {},
}


@pytest.mark.parametrize(("build", "heldout"), [(qwen3, True), (qwen3_lora, False)], ids=["full-heldout", "lora"])
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_same_run(build, heldout, name):
    """To the last bit, resumed in the grace period and after the first freeze."""
    settings = {"heldout_every": 3, "heldout_patience": 9, "stopping": "heldout"} if heldout else {}
    config = GradESConfig(
        metric=name.split()[0], freeze_norms=True, freeze_embeddings=True, **RESUMED[name], **settings
    )
    straight = Run(build, config, heldout).train()
    frozen = straight.grades.frozen.values()
    assert bool(frozen) == (name not in ("gain", "none"))
    for at in (5, min(min(frozen, default=10) + 1, len(straight.losses))):
        again = resumed(build, config, heldout, at)
        assert again.losses == straight.losses
        assert again.events == straight.events
        assert again.grades.frozen == straight.grades.frozen
        assert again.grades.criterion.values == straight.grades.criterion.values
        assert again.grades.stop_reason == straight.grades.stop_reason
        assert equal(weights(again.model), weights(straight.model))
        one, other = straight.grades.state_dict(), again.grades.state_dict()
        assert equal(one.pop("tensors"), other.pop("tensors"))
        assert one == other
    again.finish()
    straight.finish()
    assert equal(weights(again.model), weights(straight.model))
    assert again.grades.restored_best == straight.grades.restored_best


@pytest.mark.parametrize("stopping", ["all_frozen", "heldout"])
def test_a_run_that_had_ended_is_done_when_it_is_resumed(stopping):
    settings = {"heldout_every": 1, "heldout_grace": 0.0, "stopping": stopping} if stopping == "heldout" else {}
    mapping = {"*": 4} if stopping == "all_frozen" else {}
    losses = [3.0, 2.0, 2.1, 2.2]
    first = toy(schedule(mapping, **settings), iter(losses).__next__)[1]
    for step in range(1, 5):
        give_gradients(first._model)
        first.step(step)
    assert first.done
    second = toy(schedule(mapping, **settings), lambda: 1.0)[1]
    second.load_state_dict(first.state_dict())
    assert (second.done, second.stop_reason) == (True, first.stop_reason)


def test_a_state_of_another_run_is_refused():
    def engine(build=qwen3, heldout=False, **settings):
        return GradES(build(), GradESConfig(**settings), 10, None, (lambda: 1.0) if heldout else None)

    state = engine(metric="grad_norm").state_dict()
    for other, message in (
        (engine(), r"with metric 'grad_norm' and this run has 'gain': resume with --metric grad_norm"),
        (engine(metric="grad_norm", sample_fraction=1.0), r"resume with --sample_fraction 0\.015625"),
        (engine(heldout=True, metric="grad_norm"), "was written without .* this run is with them"),
        (
            engine(lambda: qwen3(num_hidden_layers=3), metric="grad_norm"),
            r"differ in 7 matrices, model\.layers\.2.* among them",
        ),
        (
            engine(lambda: qwen3(num_hidden_layers=1), metric="grad_norm"),
            r"differ in 7 matrices, model\.layers\.1.* among them",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
        assert other.frozen == {}
        other.step(1)  # it has not taken over anything
    with pytest.raises(ValueError, match=r"was written with .* this run is without them"):
        engine(metric="grad_norm").load_state_dict(engine(heldout=True, metric="grad_norm").state_dict())


def test_a_state_of_a_model_with_other_matrices_is_refused_when_nothing_has_frozen_yet():
    run = Run(qwen3, GradESConfig()).train(last=2)
    assert run.grades.frozen == {}
    with pytest.raises(ValueError, match=r"differ in 7 matrices, model\.layers\.1"):
        GradES(qwen3(num_hidden_layers=1), GradESConfig(), 24).load_state_dict(run.grades.state_dict())


# ---- what measuring costs, and that it changes nothing ----


@pytest.mark.parametrize("heldout", [False, True], ids=["alone", "heldout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("metric", [*METRICS, "gain", "none"])
def test_measuring_changes_nothing_of_a_run(metric, dtype, heldout):
    """Where nothing freezes it is the run without GradES, bit for bit, dropout's random numbers included."""

    def build():
        model = qwen3(attention_dropout=0.1, attn_implementation="eager").to(dtype).train()
        torch.manual_seed(7)
        return model

    settings = {"none": {}, "gain": {"margin": 1e9, "alpha": 1.0}}.get(metric, {"tau": 0.0, "alpha": 0.0})
    config = GradESConfig(metric=metric, keep="last", heldout_every=3, heldout_patience=99, **settings)
    without, measured = Run(build, None).train(), Run(build, config, heldout).train()
    assert without.losses == measured.losses
    assert equal(weights(without.model), weights(measured.model))
    assert measured.grades.heldout.measurements == 8 if heldout else measured.grades.heldout is None
    assert (len(measured.grades.criterion.values) == 14) == (metric != "none")


def step_of(model, step, vocabulary=64, scale=1.0):
    """Backward of one batch; the gradients carry the loss scale."""
    batch = torch.randint(0, vocabulary, (2, 8), generator=torch.Generator().manual_seed(step)).to(model.device)
    (model(input_ids=batch, labels=batch).loss * scale).backward()


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_the_fused_measurements_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "give_the_same_values"],
        env=triton_environment(TRITON_INTERPRET="1"),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) == 4, run.stdout[-2000:]


@check
@pytest.mark.parametrize(("metric", "scale"), [("grad_change", 1.0), *((metric, 1024.0) for metric in METRICS)])
def test_the_kernels_give_the_same_values_as_torch(monkeypatch, metric, scale):
    """Two engines measure the same run, one of them with each form."""
    called = {kernels: 0, metrics: 0}
    for module in called:

        def counted(*args, module=module, l1_sums=module.l1_sums):
            called[module] += 1
            return l1_sums(*args)

        monkeypatch.setattr(module, "l1_sums", counted)
    model = qwen3(intermediate_size=2048, num_hidden_layers=1).to(DEVICE, torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = GradESConfig(metric=metric, tau=0.0, alpha=0.0)
    fused, unfused = (GradES(model, config, 10, optimizer) for _ in range(2))
    steps = 4
    for step in range(1, steps + 1):
        step_of(model, step, scale=scale)
        if step == 3:  # other tensors than in the step before
            model.model.layers[0].self_attn.q_proj.weight.grad = None
        for grades, device in ((unfused, "none"), (fused, DEVICE)):
            monkeypatch.setattr(measurement, "FUSED_ON", device)
            grades.step(step, grad_scale=scale)
        first, after_gap = metric != "grad_norm", metric == "weight_change"
        missing = {1: first * len(unfused.matrices), 3: 1, 4: int(after_gap)}.get(step, 0)
        assert len(unfused.criterion.values) == len(unfused.matrices) - missing
        assert fused.criterion.values == pytest.approx(unfused.criterion.values, rel=1e-5)
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(0.5 / scale)  # as clipping does, in place
        optimizer.step()
        optimizer.zero_grad()
    assert called == {kernels: steps, metrics: steps}
    assert unfused.criterion._measurement._samples["model.layers.0.mlp.up_proj"][0] is not None


class Waits(TorchDispatchMode):
    """Counts what brings values of tensors into Python."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2")
        if func.overloadpacket.__name__ in names:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("metric", [*METRICS, "gain", "schedule", "none"])
def test_a_step_waits_once_for_the_device(monkeypatch, metric, scale):
    transfers = []
    for name in ("tolist", "numpy", "cpu"):  # not seen by a dispatch mode on the CPU
        original = getattr(torch.Tensor, name)

        def counted(self, *args, name=name, original=original):
            transfers.append(name)
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    model = qwen3(intermediate_size=4096)
    others = {"gain": {"margin": 1e9}, "schedule": {"schedule": {"*": 4}}, "none": {}}
    settings = others.get(metric, {"tau": 1e9, "alpha": 0.3})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    grades = GradES(model, GradESConfig(metric=metric, **settings), 10, optimizer)
    lasts = {"gain": 0, "schedule": 0, "none": 0}.get(metric, 4)
    for step in range(1, 6):
        gain_is_measured = not grades.all_frozen
        step_of(model, step, scale=scale)
        transfers.clear()
        with Waits() as waits:
            grades.step(step, grad_scale=scale)
        if step > 1:  # in the first one, samples are drawn
            # The gain is read after the criterion has waited: its numbers are on the host by then.
            assert transfers == ["tolist"] * ((step <= lasts) + gain_is_measured)
            assert waits.count == 0
        optimizer.step()
        optimizer.zero_grad()
    assert grades.done == (metric not in ("gain", "none"))  # in step 4: there was nothing to measure in step 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("metric", METRICS)
def test_a_step_on_a_gpu_waits_once(metric):
    model = qwen3(intermediate_size=4096).to(DEVICE)
    grades = GradES(model, GradESConfig(metric=metric, tau=0.0, alpha=0.0), 10, None)
    for step in range(1, 5):
        step_of(model, step)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                grades.step(step, grad_scale=1024.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if step > 2:  # samples are drawn in the first, kernels compiled in the first two
            # That of the criterion: the numbers of the gain are on the way by then, and waited for without a stop.
            assert len([w for w in caught if "synchronizing" in str(w.message)]) == 1
