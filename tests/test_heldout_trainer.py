"""When a trainer's run ends: its held-out scores and what measuring them leaves alone, its training accuracy."""

import logging
import math
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import SFTTrainer

from grades_trl import GradESConfig, GradESTrainer
from grades_trl.recipe import builtin
from grades_trl.recipe.generation import answers, exact_match
from grades_trl.stopping.heldout import plan
from grades_trl.trainers import mixin
from grades_trl.trainers.heldout import HeldoutAnswers, HeldoutRows
from helpers import LORA, arguments, losses, model_for, never, same, weights
from vlm import GradESVLMTrainer
from vlm import builtin as vlm_builtin

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def text():
    return builtin.dates(train=64, test=16), builtin.tiny_qwen3()[1]


def build(text, folder, grades=None, cls=GradESTrainer, rows=None, model=None, **changes):
    dataset, tokenizer = text
    peft, answering = changes.pop("peft_config", None), changes.pop("heldout_answers", None)
    callbacks = changes.pop("callbacks", None)
    return cls(
        model=model or model_for(tokenizer),
        args=arguments(folder, **changes),
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"] if rows is None else rows,
        processing_class=tokenizer,
        peft_config=peft,
        callbacks=callbacks,
        **({} if cls is SFTTrainer else {"grades": grades, "heldout_answers": answering}),
    )


def by_hand(trainer, rows):
    """The mean negative log-likelihood per learned token, and the fraction of them predicted, row by row."""
    total = count = right = 0
    trainer.model.eval()
    for row in rows:
        batch = trainer.data_collator([trainer.eval_dataset[row]])
        with torch.no_grad():
            logits = trainer.model(input_ids=batch["input_ids"]).logits[:, :-1].float()
        labels = batch["labels"][:, 1:]
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        count += (labels != -100).sum().item()
        right += (logits.argmax(-1) == labels).sum().item()
    trainer.model.train()
    return total / count, right / count


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("loss_type", ["nll", "chunked_nll", "dft"])
def test_it_is_per_token_whatever_the_training_loss_and_the_batch_size(tmp_path, text, loss_type, lora):
    trainer = build(text, tmp_path, loss_type=loss_type, peft_config=LORA if lora else None, learning_rate=1e-2)
    trainer.train()  # for tokens that are right
    rows = HeldoutRows(trainer, 11)
    assert len(set(rows.rows)) == 11
    loss, accuracy = by_hand(trainer, rows.rows)
    also = HeldoutRows(trainer, 11, "token_accuracy")
    for size in (1, 4, 11):
        trainer._train_batch_size = size
        assert rows() == pytest.approx(loss, rel=1e-5)
        assert also() == pytest.approx((accuracy, loss), rel=1e-5)
    assert accuracy > 0


def test_experts_are_measured_without_the_loss_of_their_router(tmp_path, text):
    from helpers import qwen3_moe

    torch.manual_seed(0)
    model = qwen3_moe(vocab_size=len(text[1]), bos_token_id=None, output_router_logits=True, router_aux_loss_coef=10.0)
    trainer = build(text, tmp_path, model=model)
    rows = HeldoutRows(trainer, 8)
    assert rows() == pytest.approx(by_hand(trainer, rows.rows)[0], rel=1e-4)


def test_dropout_and_noise_are_off_and_nothing_random_moves(tmp_path, text):
    def run(heldout):
        torch.manual_seed(0)
        model = model_for(text[1], attention_dropout=0.3)
        grades = never(heldout_every=2, heldout_cost=1.0, heldout_grace=0.0, keep="last") if heldout else None
        trainer = build(text, tmp_path, grades, model=model, neftune_noise_alpha=5.0, max_steps=6)
        states = []

        class States(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                states.append((torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()))

        trainer.add_callback(States())
        trainer.train()
        return trainer, states

    measured, states = run(True)
    stock, expected = run(False)
    assert measured.grades.heldout.measurements == 3
    assert states == expected
    assert losses(measured) == losses(stock)
    assert same(weights(measured.model), weights(stock.model))
    rows = HeldoutRows(measured, 8)
    assert rows() == rows()


def test_modes_of_single_modules_are_put_back(tmp_path, text):
    trainer = build(text, tmp_path)
    frozen_norm = trainer.model.model.norm
    trainer.model.train()
    frozen_norm.eval()
    HeldoutRows(trainer, 4)()
    assert trainer.model.training
    assert not frozen_norm.training


def test_rows_without_a_learned_token_are_left_out(tmp_path, text):
    prepared = build(text, tmp_path).eval_dataset
    masked = prepared.map(
        lambda row, i: {"labels": [-100] * len(row["input_ids"])} if i % 4 else row, with_indices=True
    )
    trainer = build(text, tmp_path, rows=masked)
    trainer.eval_dataset = masked
    assert sorted(HeldoutRows(trainer, 16).rows) == [0, 4, 8, 12]
    trainer.eval_dataset = masked.select([1, 2, 3])
    with pytest.raises(ValueError, match="None of the 3 rows of eval_dataset has a token to learn"):
        HeldoutRows(trainer, 16)


def test_a_row_whose_only_token_is_its_first_has_nothing_to_learn(tmp_path, text):
    """No token is predicted there. (TRL makes such a row of an empty text.)"""
    prepared = build(text, tmp_path).eval_dataset
    first = prepared.map(
        lambda row, i: {"input_ids": row["input_ids"][:1], "labels": row["input_ids"][:1]} if i % 4 else row,
        with_indices=True,
        remove_columns=[name for name in prepared.column_names if name != "input_ids"],
    )
    trainer = build(text, tmp_path, loss_type="nll")
    trainer.eval_dataset = first
    assert sorted(HeldoutRows(trainer, 16).rows) == [0, 4, 8, 12]


def test_what_a_collator_draws_at_random_is_the_same_in_each_measurement(tmp_path, text):
    trainer = build(text, tmp_path)
    collate = trainer.data_collator

    def masked(rows):
        """As for masked language models: which tokens are learned is drawn anew in each epoch."""
        batch = collate(rows)
        shape = batch["labels"].shape
        hidden = (torch.rand(shape) < 0.3) | torch.tensor(np.random.rand(*shape) < 0.3)
        hidden[:, random.randrange(shape[1])] = True
        batch["labels"] = batch["labels"].masked_fill(hidden, -100)
        return batch

    trainer.data_collator = masked
    rows = HeldoutRows(trainer, 8)
    losses = set()
    for _ in range(4):
        losses.add(rows())
        torch.rand(7), np.random.rand(7), random.random()  # training goes on
    assert len(losses) == 1
    assert HeldoutRows(trainer, 8).rows == rows.rows


class Poisoned(GradESTrainer):
    """The loss of one row is no number."""

    poisoned = 5

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        if not self.model.training and "input_ids" in inputs:
            bad = torch.tensor(self.eval_dataset[self.poisoned]["input_ids"])
            inputs = dict(inputs)
            inputs["is_bad"] = any(torch.equal(row[: len(bad)], bad) for row in inputs["input_ids"])
        return inputs


def test_a_row_whose_loss_is_no_number_is_named(tmp_path, text):
    trainer = build(text, tmp_path, cls=Poisoned)
    bad = trainer.eval_dataset[Poisoned.poisoned]["input_ids"]
    forward = trainer.model.forward

    def poisoned(*args, is_bad=False, **kwargs):
        output = forward(*args, **kwargs)
        if is_bad:
            output.loss = output.loss * float("nan")
        return output

    trainer.model.forward = poisoned
    assert bad
    with pytest.raises(ValueError, match=r"The loss of row 5 of eval_dataset is nan, that of 15 others is a number"):
        HeldoutRows(trainer, 16)()


def test_rows_are_measured_in_the_batch_size_that_fits(tmp_path, text):
    """auto_find_batch_size halves it until a step fits, and a measurement must fit, too."""
    largest = []

    class Small(GradESTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            if len(inputs["input_ids"]) > 2:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

        def compute_loss_context_manager(self):
            if not self.model.training:
                largest.append(self._train_batch_size)
            return super().compute_loss_context_manager()

    grades = never(heldout_every=2, heldout_cost=1.0)
    trainer = build(text, tmp_path, grades, cls=Small, auto_find_batch_size=True, max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4
    assert set(largest) == {2}


@pytest.mark.parametrize("stopping", ["auto", "heldout"])
def test_a_run_too_short_for_measurements_is_the_stock_one(tmp_path, text, stopping):
    trainer = build(text, tmp_path, GradESConfig(metric="none", stopping=stopping))
    stock = build(text, tmp_path, cls=SFTTrainer)
    trainer.train()
    stock.train()
    assert trainer.grades.heldout is None or trainer.grades.heldout.measurements == 0
    assert same(weights(trainer.model), weights(stock.model))


def test_what_is_needed_and_missing_is_said_before_training(tmp_path, text):
    dataset, tokenizer = text

    def trainer(rows, grades):
        return GradESTrainer(
            model=model_for(tokenizer),
            args=arguments(tmp_path),
            train_dataset=dataset["train"],
            eval_dataset=rows,
            processing_class=tokenizer,
            grades=grades,
        )

    for grades in (GradESConfig(stopping="heldout"), GradESConfig(keep="best_average")):
        with pytest.raises(ValueError, match="pass eval_dataset"):
            trainer(None, grades)
        with pytest.raises(ValueError, match="eval_dataset is streamed"):
            trainer(dataset["test"].to_iterable_dataset(), grades)
    assert trainer(None, GradESConfig()).grades_config is not None  # the default does without


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_run_that_ends_by_its_heldout_loss_resumes_exactly(tmp_path, text, lora):
    grades = GradESConfig(metric="none", heldout_every=2, heldout_cost=1.0, heldout_grace=0.0, heldout_patience=2)

    def trainer(**changes):
        return build(
            text,
            tmp_path,
            grades,
            max_steps=24,
            learning_rate=1.0,
            lr_scheduler_type="constant",
            peft_config=LORA if lora else None,
            save_strategy="steps",
            save_steps=3,
            **changes,
        )

    straight = trainer()
    straight.train()
    assert 4 < straight.state.global_step < 24
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == straight.state.global_step
    assert resumed.grades.heldout.state_dict() == straight.grades.heldout.state_dict()
    assert same(weights(resumed.model), weights(straight.model))


def test_a_vision_language_run_measures_its_heldout_loss(tmp_path):
    images = vlm_builtin.digit_images(train=16, test=6)
    model, processor = vlm_builtin.tiny_llava()
    trainer = GradESVLMTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=4, max_length=None),
        train_dataset=images["train"],
        eval_dataset=images["test"],
        processing_class=processor,
        grades=never(heldout_every=2, heldout_cost=1.0, heldout_grace=0.0),
    )
    rows = HeldoutRows(trainer, 6)
    batch = trainer.data_collator([images["test"][row] for row in rows.rows])
    model.eval()
    with torch.no_grad():
        expected = model(**batch).loss.item()
    assert rows() == pytest.approx(expected, rel=1e-5)
    trainer.train()
    assert trainer.grades.heldout.measurements >= 2


def test_load_best_model_at_end_has_the_last_word(tmp_path, text):
    grades = never(heldout_every=2, heldout_cost=1.0, heldout_grace=0.0)
    changes = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    trainer = build(text, tmp_path, grades, load_best_model_at_end=True, learning_rate=0.3, **changes)
    trainer.train()
    assert not trainer.grades.restored_best
    assert trainer.grades_summary.weights == "best checkpoint"


def test_without_an_evaluation_there_is_no_best_checkpoint(tmp_path, text):
    changes = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    trainer = build(text, tmp_path, never(), load_best_model_at_end=True, eval_delay=100, max_steps=4, **changes)
    trainer.train()
    assert trainer.state.best_model_checkpoint is None
    assert trainer.grades_summary.weights == "last"


class TimeIsUp(TrainerCallback):
    """As on a cluster: a checkpoint, and the end of the process."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def test_a_run_that_a_callback_stops_and_saves_resumes_exactly(tmp_path, text):
    """Its model has the best average, and its checkpoint the weights to go on with."""
    heldout = {"heldout_every": 1, "heldout_cost": 1.0, "heldout_grace": 0.0, "heldout_patience": 100}
    grades = GradESConfig(metric="none", **heldout)
    changes = {"learning_rate": 0.3, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 100}
    straight = build(text, tmp_path / "straight", grades, **changes)
    straight.train()
    stopped = build(text, tmp_path / "stopped", grades, callbacks=[TimeIsUp(7)], **changes)
    stopped.train()
    assert (stopped.state.global_step, stopped.grades_summary.weights) == (7, "best average")
    resumed = build(text, tmp_path / "stopped", grades, **changes)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(straight)
    assert same(weights(resumed.model), weights(straight.model))


class ScheduleFree(torch.optim.SGD):
    """Trains other weights than it evaluates, as schedule-free optimizers do."""

    trains = False

    def _move(self, trains, by):
        if self.trains != trains:
            self.trains = trains
            with torch.no_grad():
                for parameter in self.param_groups[0]["params"]:
                    parameter += by

    def train(self):
        self._move(True, 0.01)

    def eval(self):
        self._move(False, -0.01)


def test_the_best_average_outlasts_an_evaluation_whatever_the_optimizer(tmp_path, text):
    grades = GradESConfig(metric="none", heldout_every=1, heldout_cost=1.0, heldout_grace=0.0)
    model = model_for(text[1])
    optimizer = ScheduleFree(model.parameters(), lr=3.0)
    trainer = GradESTrainer(
        model=model,
        args=arguments(tmp_path, max_grad_norm=0.0, save_strategy="steps", save_steps=100),
        train_dataset=text[0]["train"],
        eval_dataset=text[0]["test"],
        processing_class=text[1],
        grades=grades,
        optimizers=(optimizer, None),
    )
    trainer.train()
    assert trainer.grades.restored_best
    restored = weights(model)
    saved = load_file(tmp_path / f"checkpoint-{trainer.state.global_step}" / "model.safetensors")
    assert all(torch.equal(saved[name], restored[name]) for name in saved)
    assert HeldoutRows(trainer, 16)() == pytest.approx(trainer.grades.heldout.best_score, rel=1e-5)
    trainer.evaluate()
    assert same(weights(model), restored)


def test_a_heldout_loss_that_is_no_number_is_said_and_not_reported(tmp_path, text, caplog, monkeypatch):
    own = HeldoutRows._scores
    monkeypatch.setattr(
        HeldoutRows, "_scores", lambda rows: (torch.nan, 0.0) if rows._trainer.state.global_step == 5 else own(rows)
    )
    heldout = {"heldout_every": 2, "heldout_cost": 1.0, "heldout_grace": 0.0, "keep": "last"}
    trainer = build(text, tmp_path, never(**heldout), max_steps=8)
    trainer.train()
    key = "grades/heldout_loss"
    assert [row["step"] for row in trainer.state.log_history if key in row] == [2, 4, 8]
    assert "The held-out loss in step 6 is no finite number, and decides nothing." in caplog.messages


@pytest.mark.parametrize(("rows", "samples", "expected"), [(15, None, True), (16, None, False), (16, 4, False)])
def test_a_handful_of_heldout_rows_that_nobody_asked_for_is_said(tmp_path, text, caplog, rows, samples, expected):
    grades = never(heldout_every=2, heldout_cost=1.0, heldout_samples=samples)
    build(text, tmp_path, grades, rows=text[0]["test"].select(range(rows)), max_steps=2).train()
    assert any("is of 15 rows only" in message for message in caplog.messages) == expected


# ---- by which score, and what is said about it ----


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="grades_trl")
    return caplog


def test_a_run_is_measured_by_its_token_accuracy(tmp_path, text, said):
    settings = {"heldout_metric": "token_accuracy", "heldout_every": 4, "heldout_cost": 1.0, "heldout_patience": 9}
    trainer = build(text, tmp_path, never(**settings), learning_rate=1e-2)
    trainer.train()
    heldout = trainer.grades_summary.heldout
    assert (heldout.metric, heldout.examples, heldout.measurements) == ("token_accuracy", 16, 3)
    assert 0 < heldout.best_score <= 1
    key = "grades/heldout_token_accuracy"
    logged = {row["step"]: row[key] for row in trainer.state.log_history if key in row}
    assert (list(logged), max(logged.values())) == ([4, 8, 12], heldout.best_score)
    assert (
        "The held-out token accuracy of 16 rows is measured every 4 steps from step 4 on, 22.2 % of the training "
        "FLOPs; the run ends after 9 measurements without improvement." in said.messages
    )
    ended = f"The run ended after step 12 of 12: schedule finished. Weights of the model: {said_weights(trainer)}."
    assert ended in said.messages


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_cost_that_is_said_is_that_of_the_forward_passes(tmp_path, text, said, lora):
    """2 of 3 products with all parameters, hardly more than 1 of 2 with adapters: no gradient of the base."""
    settings = never(heldout_every=4, heldout_cost=1.0)
    trainer = build(text, tmp_path, settings, peft_config=LORA if lora else None, max_steps=8)
    trainer.train()
    passes, steps = 3 * 16, 8 * trainer._rows_per_step
    said_cost = float(next(m for m in said.messages if "is measured every" in m).split("on, ")[1].split(" %")[0])
    if lora:
        weights = sum(m.shape[0] * m.shape[1] for m in trainer.grades.matrices.values())
        factors = sum(m.params for m in trainer.grades.matrices.values())
        share = (weights + factors) / (2 * weights + 3 * factors)
    assert said_cost == pytest.approx(100 * passes / steps * (share if lora else 1 / 3), abs=0.051)


@pytest.mark.parametrize(("epochs", "again"), [(1.04, False), (1.5, True)])
def test_a_little_more_than_an_epoch_is_measured_like_one(tmp_path, text, monkeypatch, epochs, again):
    asked = []
    monkeypatch.setattr(mixin, "plan", lambda *a: asked.append(a) or plan(*a))
    rows = len(text[0]["train"])
    trainer = build(text, tmp_path, never(), max_steps=math.ceil(epochs * rows / 2), per_device_train_batch_size=2)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    trainer.add_callback(Stop())
    trainer.train()
    assert [arguments[-1] for arguments in asked] == [again]


@pytest.mark.parametrize(("rate", "shown"), [(10.0, True), (1e-6, False)], ids=["ends early", "as SFTTrainer"])
def test_a_script_that_shows_warnings_alone_sees_another_end_than_that_of_sft_trainer(
    tmp_path, text, caplog, rate, shown
):
    caplog.set_level(logging.WARNING, logger="grades_trl")
    keep = "best_average" if shown else "last"
    grades = never(heldout_every=1, heldout_cost=1.0, heldout_patience=2, keep=keep)
    trainer = build(text, tmp_path, grades, learning_rate=rate)
    trainer.train()
    assert any("The run ended after step" in message for message in caplog.messages) == shown
    assert (trainer.state.global_step < 12) == shown


def said_weights(trainer):
    heldout = trainer.grades_summary.heldout
    if not trainer.grades.restored_best:
        return "last"
    return f"best average, of step {heldout.best_step}: held-out token accuracy {heldout.best_score:.4f}"


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_run_is_measured_by_its_answers(tmp_path, text, lora):
    """Also after a freeze, while the backward pass of a layer is skipped; and nothing of the training changes."""
    dataset, tokenizer = text
    asked, scores = [], []

    def score(count):
        asked.append(count)
        rows = dataset["test"].select(range(count))
        scores.append(exact_match(answers(trainer.model, tokenizer, rows, max_new_tokens=12), rows))
        torch.rand(1)  # a score may draw numbers
        return scores[-1]

    config = {"metric": "schedule", "schedule": {"*layers.0.*": 3}, "keep": "last"}
    settings = {"heldout_metric": "exact_match", "heldout_every": 4, "heldout_cost": 1.0, "heldout_samples": 6}
    measured = GradESConfig(**config, **settings)
    common = {"peft_config": LORA if lora else None}
    answering = HeldoutAnswers(score, 16, max_new_tokens=12)
    trainer = build(text, tmp_path, measured, heldout_answers=answering, **common)
    stock = build(text, tmp_path, GradESConfig(stopping="end_of_schedule", **config), **common)
    trainer.train()
    stock.train()
    assert asked == [6, 6, 6]
    heldout = trainer.grades_summary.heldout
    assert (heldout.metric, heldout.examples, heldout.best_score) == ("exact_match", 6, max(scores))
    lengths = [len(row["input_ids"]) for row in trainer.eval_dataset]
    passes = 3 * 6 * (1 + 12 / (sum(lengths) / 16)) / (12 * 8)
    assert heldout.passes_per_training_example == pytest.approx(passes)
    assert losses(trainer) == losses(stock)
    assert same(weights(trainer.model), weights(stock.model))


def test_a_score_that_a_trainer_cannot_compute_is_an_error(tmp_path, text):
    with pytest.raises(ValueError, match="pass heldout_answers"):
        build(text, tmp_path, GradESConfig(heldout_metric="exact_match"))
    trainer = build(text, tmp_path)
    rows = HeldoutRows(trainer, 4, "token_accuracy")
    forward = trainer.model.forward

    def fused(*args, **kwargs):
        output = forward(*args, **kwargs)
        return type(output)(loss=output.loss)

    trainer.model.forward = fused
    with pytest.raises(ValueError, match=r'returns no logits .*set heldout_metric="loss"'):
        rows()


# ---- the training accuracy ----


def memorizing(text, folder, grades, **changes):
    """The same four rows, again and again."""
    few = ({split: rows.select(range(4)) for split, rows in text[0].items()}, text[1])
    changes = {"max_steps": 60, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "weight_decay": 0.0} | changes
    return build(few, folder, grades, per_device_train_batch_size=4, **changes)


def test_a_run_too_short_for_heldout_rows_ends_when_it_has_memorized_its_own(tmp_path, text, said):
    """240 examples; the accuracies are those that SFTTrainer logs."""
    trainer = memorizing(text, tmp_path, GradESConfig(metric="none"))
    trainer.train()
    assert (trainer.grades.stopping_name, trainer.grades.heldout) == ("train_accuracy", None)
    logged = [row["mean_token_accuracy"] for row in trainer.state.log_history if "mean_token_accuracy" in row]
    assert trainer.grades.stopping.state_dict()["accuracies"] == logged[-30:]  # two windows
    summary = trainer.grades_summary
    assert 31 <= summary.steps < 60
    assert (summary.stop_reason, summary.weights) == ("training token accuracy saturated", "last")
    assert "240 examples of the schedule are too few to measure a held-out loss" in said.text
    assert "ends when the accuracy on its training tokens, 99 % or more over 15 steps, has stopped rising" in said.text
    assert (
        f"after step {summary.steps} of 60: training token accuracy saturated. Weights of the model: last."
        in said.text
    )


def test_a_run_that_ends_by_its_training_accuracy_resumes_exactly(tmp_path, text):
    grades = GradESConfig(metric="none", stopping="train_accuracy")
    changes = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 25, "logging_steps": 7}
    straight = memorizing(text, tmp_path, grades, **changes)
    straight.train()
    assert 31 <= straight.state.global_step < 60
    resumed = memorizing(text, tmp_path, grades, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-25"))
    assert resumed.state.global_step == straight.state.global_step
    assert resumed.grades.stopping.state_dict() == straight.grades.stopping.state_dict()
    assert same(weights(resumed.model), weights(straight.model))


def test_a_trainer_that_logs_no_accuracy_goes_on_and_says_so_once(tmp_path, text, said):
    class Silent(GradESTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            self._metrics["train"].pop("mean_token_accuracy", None)
            return loss

    trainer = build(text, tmp_path, GradESConfig(metric="none"), cls=Silent)
    trainer.train()
    assert trainer.state.global_step == 12
    assert [m for m in said.messages if "mean_token_accuracy" in m] == [
        "The trainer logs no mean_token_accuracy: the run ends with its schedule."
    ]
