"""Losses and gradients that are no numbers, updates that are skipped, rows from which nothing is learned: nothing
freezes for them, nothing crashes that SFTTrainer survives, and the summary counts them."""

import json
import math

import pytest
import torch
from datasets import Dataset
from trl import SFTTrainer

from grades_trl import GradES, GradESConfig, GradESTrainer
from grades_trl.recipe import builtin
from grades_trl.recipe.results import exit_if_diverged, final_eval, train_and_save
from grades_trl.report.summary import format_summary
from grades_trl.report.timing import RunClock
from grades_trl.trainers.checkpoint import read_values
from helpers import IDS, arguments, model_for, qwen3, same, weights

pytestmark = pytest.mark.usefixtures("no_figures")

METRICS = ("grad_change", "grad_norm", "weight_change", "gain")


def config(metric, **changes):
    """Freezes a matrix with its second value; `gain` decides after 12 steps."""
    eager = {"alpha": 0.0, "margin": 1e-9} if metric == "gain" else {"alpha": 0.0, "tau": 1e9}
    return GradESConfig(**({"metric": metric, "stopping": "all_frozen", "keep": "last"} | eager | changes))


def poisoned(gradient, value):
    if value is None:
        return None
    return torch.full_like(gradient, value)


class Loop:
    """Trains by hand. In a bad step the gradients are no numbers, zero or none at all, and the update is skipped."""

    def __init__(self, metric, model=None):
        self.model = model or qwen3()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.grades = GradES(self.model, config(metric), 200, self.optimizer)
        self.step = 0

    def steps(self, count, bad="no", part=""):
        events = []
        for _ in range(count):
            self.step += 1
            torch.manual_seed(self.step)
            ids = torch.randint(0, 64, IDS.shape)
            self.model(input_ids=ids, labels=ids).loss.backward()
            for name, p in self.model.named_parameters():
                if bad != "no" and part in name and p.grad is not None:
                    p.grad = poisoned(p.grad, bad)
            events += self.grades.step(self.step)
            if bad == "no":
                self.optimizer.step()
            self.optimizer.zero_grad()
        return events


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, None], ids=["nan", "inf", "zero", "none"])
@pytest.mark.parametrize("metric", METRICS)
def test_bad_gradients_freeze_nothing_and_training_goes_on(metric, bad):
    loop = Loop(metric)
    assert loop.steps(15, bad) == []
    assert loop.grades.criterion.values == {} and not loop.grades.done and loop.grades.gain.steps == {}
    good = loop.steps(8)
    if metric != "gain":
        assert len(good) == 14  # in the second good step that can be compared


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("metric", METRICS)
def test_a_single_bad_step_is_no_measurement(metric, bad):
    loop = Loop(metric)
    loop.grades.criterion.grace_steps = 6
    loop.steps(5)
    before = len(loop.grades.gain.steps)
    assert loop.steps(1, bad) == [] and loop.grades.criterion.values == {}
    assert len(loop.grades.gain.steps) == before
    assert all(math.isfinite(v) for v in loop.grades.gain.steps[5].values())
    json.dumps(loop.grades.state_dict() | {"tensors": None}, allow_nan=False)


@pytest.mark.parametrize("metric", ["grad_change", "grad_norm", "weight_change"])
def test_a_part_whose_gradients_overflow_freezes_with_the_others_never(metric):
    loop = Loop(metric)
    for _ in range(4):
        loop.steps(1, math.inf, part="layers.0.")
    assert {name for name in loop.grades.frozen if ".layers.0." in name} == set()


# ---- in a trainer ----


@pytest.fixture(scope="module")
def tokenizer():
    return builtin.tiny_qwen3()[1]


def rows_of(lengths, learned=True):
    """Tokenized rows"""
    rows = []
    for i, length in enumerate(lengths):
        ids = [(7 * i + k) % 50 + 3 for k in range(length)]
        rows.append({"input_ids": ids, "labels": ids if learned else [-100] * length})
    return Dataset.from_list(rows)


def trainer_for(folder, tokenizer, rows, grades, cls=None, evaluated=None, **changes):
    extra = {} if cls is not None and not issubclass(cls, GradESTrainer) else {"grades": grades}
    settings = {"max_steps": 8, "dataset_kwargs": {"skip_prepare_dataset": True}, "shuffle_dataset": False}
    return (cls or GradESTrainer)(
        model=model_for(tokenizer),
        args=arguments(folder, **(settings | changes)),
        train_dataset=rows,
        eval_dataset=evaluated,
        processing_class=tokenizer,
        **extra,
    )


@pytest.mark.parametrize("metric", METRICS)
def test_data_of_one_row(tmp_path, tokenizer, metric):
    one = rows_of([12])
    trainer = trainer_for(tmp_path, tokenizer, one, config(metric, tau=0.0) if metric != "gain" else config(metric),
                          evaluated=one, per_device_train_batch_size=1)  # fmt: skip
    trainer.train()
    stock = trainer_for(tmp_path, tokenizer, one, None, SFTTrainer, per_device_train_batch_size=1)
    stock.train()
    assert trainer.grades.frozen == {} and trainer.state.global_step == 8
    assert same(weights(trainer.model), weights(stock.model))


@pytest.mark.parametrize("metric", METRICS)
def test_a_learning_rate_of_zero_freezes_nothing_by_the_change_of_weights(tmp_path, tokenizer, metric):
    rows = rows_of([12] * 16)
    trainer = trainer_for(tmp_path, tokenizer, rows, config(metric), learning_rate=0.0, lr_scheduler_type="constant")
    trainer.train()
    if metric == "weight_change":
        assert trainer.grades.frozen == {}
    assert trainer.grades_summary.losses_not_finite == 0


@pytest.mark.parametrize("metric", METRICS)
def test_batches_from_which_nothing_is_learned(tmp_path, tokenizer, metric):
    """Its loss is 0 / 0, in the stock trainer as well."""
    rows = rows_of([12] * 64, learned=False)
    grades = config(metric)
    trainer = trainer_for(tmp_path, tokenizer, rows, grades, max_steps=40)
    trainer.train()
    summary = json.loads((tmp_path / "grades" / "summary.json").read_text())
    assert trainer.grades.frozen == {}
    assert (summary["losses_not_finite"], trainer.diverged_at, trainer.state.global_step) == (10, 1, 10)
    with pytest.raises(SystemExit, match="The run has diverged at step 1: its model is of no use"):
        exit_if_diverged(trainer, {"final/test_loss": math.nan})


class Poisoned:
    """A trainer whose loss is no number in some steps."""

    def __new__(cls, base, value, at):
        class Trainer(base):
            def compute_loss(self, *args, **kwargs):
                loss = super().compute_loss(*args, **kwargs)
                is_bad = self.model.training and at(self.state.global_step + 1)
                return loss * value if is_bad else loss

        return Trainer


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
def test_a_loss_that_is_no_number_for_good_ends_the_run_and_says_since_when(
    tmp_path, tokenizer, metric, value, caplog
):
    rows = rows_of([12] * 64)
    trainer = trainer_for(tmp_path, tokenizer, rows, config(metric, alpha=0.1), Poisoned(
        GradESTrainer, value, lambda step: step >= 3), max_steps=40)  # fmt: skip
    trainer.train()
    assert (trainer.diverged_at, trainer.state.global_step, trainer.grades.frozen) == (3, 12, {})
    assert trainer.grades_summary.losses_not_finite == 10
    assert "since step 3" in caplog.text
    assert "10 steps was no finite number" in " ".join(format_summary(trainer.grades_summary).split())


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("grades", [None, config("grad_norm", tau=0.0)], ids=["baseline", "grades"])
def test_a_run_of_a_recipe_that_has_diverged_ends_and_says_since_when(tmp_path, tokenizer, grades, value, caplog):
    cls = Poisoned(GradESTrainer, value, lambda step: step >= 3)
    trainer = trainer_for(tmp_path, tokenizer, rows_of([12] * 64), grades, cls, max_steps=40)
    train_and_save(trainer, RunClock(), None)
    assert (trainer.diverged_at, trainer.state.global_step) == (3, 12)
    assert "since step 3" in caplog.text
    with pytest.raises(SystemExit, match="diverged at step 3: its model is of no use"):
        exit_if_diverged(trainer, final_eval(trainer, rows_of([12])))


def test_a_baseline_counts_the_bad_steps_before_it_was_resumed(tmp_path, tokenizer):
    def trained(checkpoint, steps):
        trainer = trainer_for(
            tmp_path, tokenizer, rows_of([12] * 64), None, Poisoned(GradESTrainer, math.nan, lambda step: step >= 3),
            max_steps=40, save_strategy="steps", save_steps=steps,
        )  # fmt: skip
        train_and_save(trainer, RunClock(), checkpoint)
        return trainer

    trained(None, 5)
    resumed = trained(str(tmp_path / "checkpoint-5"), 40)
    assert (resumed.diverged_at, resumed.state.global_step) == (3, 12)


def test_a_baseline_with_a_few_bad_steps_is_the_stock_run(tmp_path, tokenizer):
    def trained(cls, name, **changes):
        poisoned = Poisoned(cls, 1e4, lambda step: step in (3, 4, 5))
        return trainer_for(tmp_path / name, tokenizer, rows_of([12] * 64), None, poisoned, **changes)

    ours, stock = trained(GradESTrainer, "ours"), trained(SFTTrainer, "stock")
    train_and_save(ours, RunClock(), None)
    stock.train()
    assert ours.diverged_at is None and same(weights(ours.model), weights(stock.model))


def test_a_validation_loss_that_is_no_number_is_no_reason_not_to_save(tmp_path, tokenizer):
    rows = rows_of([12] * 64)

    class Trainer(GradESTrainer):
        def evaluate(self, *args, **kwargs):
            metrics = super().evaluate(*args, **kwargs)
            self.callback_handler.on_evaluate(
                self.args, self.state, self.control, metrics | {"eval_loss": math.nan, "eval_runtime": 1.0}
            )
            return metrics

    trainer = trainer_for(tmp_path, tokenizer, rows, config("grad_norm", tau=0.0), Trainer, evaluated=rows,
                          eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=4)  # fmt: skip
    trainer.train()
    assert (tmp_path / "checkpoint-8" / "grades_state.json").exists()


@pytest.mark.parametrize("metric", METRICS)
def test_updates_that_a_loss_scaler_skips_are_counted(tmp_path, tokenizer, metric):
    """The first scale is so high that the gradients overflow, and the next one is not."""
    rows = rows_of([12] * 64)
    trainer = trainer_for(tmp_path, tokenizer, rows, config(metric, alpha=0.5), save_strategy="steps", save_steps=4)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
    trainer.train()
    skipped = trainer.grades_summary.skipped_updates
    assert skipped == 1
    assert "1 update was skipped" in format_summary(trainer.grades_summary)
    assert all(step > skipped for step in trainer.grades.frozen.values())
    assert read_values(tmp_path / "checkpoint-4")["skipped_updates"] == skipped
