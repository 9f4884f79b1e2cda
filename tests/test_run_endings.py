"""How runs end, and what is left on disk, in the logs and on the model."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import SFTTrainer

from grades_trl import GradESConfig, GradESTrainer
from grades_trl.recipe import builtin
from grades_trl.report.run_report import RunReport
from grades_trl.stopping import HeldoutScore
from grades_trl.trainers.divergence import PATIENCE, Divergence
from helpers import LORA, arguments, losses, model_for, never, same, weights


@pytest.fixture(scope="module")
def text():
    return builtin.dates(train=128, test=16), builtin.tiny_qwen3()[1]


def build(text, folder, grades, cls=GradESTrainer, callbacks=(), evaluated=False, lora=False, **changes):
    dataset, tokenizer = text
    return cls(
        model=model_for(tokenizer),
        args=arguments(folder, **changes),
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"] if evaluated else None,
        processing_class=tokenizer,
        grades=grades,
        callbacks=list(callbacks),
        peft_config=LORA if lora else None,
    )


ALL_AT_ONCE = GradESConfig(metric="grad_norm", tau=1e9, alpha=0.5)  # of 12 steps, in step 7
BY_HELDOUT_LOSS = GradESConfig(metric="none", heldout_every=2, heldout_cost=1.0, heldout_grace=0.0)


def hooks_and_forwards(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in model.modules())


class Raise(TrainerCallback):
    def __init__(self, step, error):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise self.error


@pytest.mark.parametrize("ending", [None, KeyboardInterrupt(), RuntimeError("lost")], ids=["end", "ctrl-c", "error"])
def test_the_model_can_be_trained_again_whatever_ended_the_run(tmp_path, text, ending):
    """The lower layers were frozen and skipped: the next trainer on the same model must train them."""
    grades = GradESConfig(metric="schedule", schedule={"*.layers.0.*": 2}, freeze_norms=True, freeze_embeddings=True)
    trainer = build(text, tmp_path, grades, callbacks=[Raise(6, ending)] if ending else [], lora=True)
    before = {name: p.requires_grad for name, p in trainer.model.named_parameters()}
    clean = hooks_and_forwards(trainer.model)
    if ending is None:
        trainer.train()
    else:
        with pytest.raises(type(ending)):
            trainer.train()
    assert len(trainer.grades.frozen) == 7
    assert {name: p.requires_grad for name, p in trainer.model.named_parameters()} == before
    assert hooks_and_forwards(trainer.model) == clean

    again = SFTTrainer(
        model=trainer.model,
        args=arguments(tmp_path, max_steps=3),
        train_dataset=text[0]["train"],
        processing_class=text[1],
    )
    values = weights(again.model)
    again.train()
    moved = {name for name, value in weights(again.model).items() if not torch.equal(value, values[name])}
    assert moved == {name for name, trains in before.items() if trains}


def test_an_error_inside_a_heldout_measurement_leaves_the_weights(tmp_path, text):
    class Failing(GradESTrainer):
        def compute_loss_context_manager(self):
            if not self.model.training:
                raise RuntimeError("out of memory")
            return super().compute_loss_context_manager()

    trainer = build(text, tmp_path, BY_HELDOUT_LOSS, cls=Failing, evaluated=True)
    stock = build(text, tmp_path, None, max_steps=1)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    stock.args.max_steps = 1
    assert trainer.model.training
    # The measurement was in step 2, before its update: weights are those after the first one.
    first = build(text, tmp_path, None, callbacks=[Raise(1, KeyboardInterrupt())])
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert same(weights(trainer.model), weights(first.model))


def test_buffers_are_released_after_training(tmp_path, text):
    trainer = build(text, tmp_path, GradESConfig(heldout_every=2, heldout_cost=1.0), evaluated=True)
    trainer.train()
    assert trainer.grades.average.state_dict()[1] == {}
    assert trainer.grades.criterion.state_dict()[1] == {}


def test_the_last_freezes_are_logged_evaluated_and_saved(tmp_path, text):
    trainer = build(
        text,
        tmp_path,
        ALL_AT_ONCE,
        evaluated=False,
        logging_steps=5,
        save_strategy="steps",
        save_steps=100,
    )
    trainer.train()
    assert trainer.state.global_step == 7
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows[-1]["step"] == 7
    assert rows[-1]["grades/frozen_fraction"] == 1.0
    saved = load_file(tmp_path / "checkpoint-7" / "model.safetensors")
    own = weights(trainer.model)
    assert all(torch.equal(saved[name], own[name]) for name in saved)


def test_a_run_that_grades_ends_is_evaluated_in_its_last_step(tmp_path, text):
    grades = GradESConfig(metric="grad_norm", tau=1e9, alpha=0.5, stopping="all_frozen", keep="last")
    trainer = build(text, tmp_path, grades, evaluated=True, eval_strategy="steps", eval_steps=5)
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history if "eval_loss" in row] == [5, 7]


def test_a_run_that_was_killed_after_its_last_step_is_completed(tmp_path, text, monkeypatch):
    """The last checkpoint has the best average already, and the summary says so."""
    monkeypatch.setattr(HeldoutScore, "is_below_best", lambda self, *_: not restored)
    restored: list = []
    ends = []
    for checkpoint in (None, str(tmp_path / "checkpoint-12")):
        trainer = build(text, tmp_path, BY_HELDOUT_LOSS, evaluated=True, save_strategy="steps", save_steps=4)
        trainer.train(resume_from_checkpoint=checkpoint)
        summary = json.loads((tmp_path / "grades" / "summary.json").read_text())
        ends.append([weights(trainer.model), *(summary[key] for key in ("weights", "steps", "stop_reason", "frozen"))])
        (tmp_path / "grades" / "summary.json").unlink()
        restored.append(True)  # a second time it is equal
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:] == ["best average", 12, "schedule finished", 0]


class Seen(TrainerCallback):
    """The weights that other callbacks see when training has ended."""

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.weights = weights(model)


@pytest.mark.parametrize("stopping", ["heldout", "end_of_schedule"])
def test_the_best_average_is_in_the_last_checkpoint_and_in_what_callbacks_see(tmp_path, text, stopping):
    grades = GradESConfig(
        metric="none",
        stopping=stopping,
        keep="best_average",
        heldout_every=1,
        heldout_cost=1.0,
        heldout_grace=0.0,
        heldout_patience=2 if stopping == "heldout" else 100,
    )
    seen = Seen()
    # The rate is so high that the last weights are worse than the average of some earlier ones.
    trainer = build(
        text,
        tmp_path,
        grades,
        callbacks=[seen],
        evaluated=True,
        save_strategy="steps",
        save_steps=100,
        learning_rate=0.1,
        lr_scheduler_type="constant",
    )
    trainer.train()
    assert trainer.grades.restored_best
    last = f"checkpoint-{trainer.state.global_step}"
    assert (trainer.state.global_step < 12) == (stopping == "heldout")
    own, saved = weights(trainer.model), load_file(tmp_path / last / "model.safetensors")
    assert all(torch.equal(saved[name], own[name]) for name in saved)
    assert same(seen.weights, own)
    summary = json.loads((tmp_path / "grades" / "summary.json").read_text())
    assert summary["weights"] == "best average"
    expected = "held-out loss stopped improving" if stopping == "heldout" else "schedule finished"
    assert summary["stop_reason"] == expected


def test_a_report_that_fails_costs_no_finished_run(tmp_path, text, monkeypatch, caplog):
    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(RunReport, "write", full)
    trainer = build(text, tmp_path, never(), max_steps=2)
    assert trainer.train().global_step == 2
    assert "is not complete; the model is not affected" in caplog.text


@pytest.mark.parametrize("step", [0, 1])
def test_a_run_that_ends_before_or_after_its_first_update_is_reported(tmp_path, text, step):
    class Stop(TrainerCallback):
        """As SIGTERM does it: in the first of two micro-batches, or in the first step."""

        def on_substep_end(self, args, state, control, **kwargs):
            control.should_training_stop = step == 0

        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    trainer = build(text, tmp_path, never(), callbacks=[Stop()], gradient_accumulation_steps=2)
    assert trainer.train().global_step == step
    summary = json.loads((tmp_path / "grades" / "summary.json").read_text())
    assert (summary["steps"], summary["stop_reason"]) == (step, "early stopping")


def test_a_log_in_the_first_step_has_what_is_known(tmp_path, text):
    class Early(GradESTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            self.log({"loss": 0.0})
            return loss

    build(text, tmp_path, never(), cls=Early, max_steps=2).train()


def test_nothing_is_printed(tmp_path, text, capsys):
    trainer = build(text, tmp_path, GradESConfig(metric="schedule", schedule={"language": 2}), max_steps=3)
    trainer.train()
    own = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("{'")]  # the Trainer's logs
    assert own == []


# ---- divergence ----


@pytest.mark.parametrize("bad", [math.nan, math.inf, 100.0])
def test_ten_bad_losses_in_a_row_are_a_divergence_since_the_first(bad):
    watch = Divergence(vocab_size=1000)  # twice the loss of guessing is 13.8
    for step, loss in enumerate([3.0, bad, 2.0] + [bad] * (PATIENCE - 1), 1):
        watch.update(step, loss)
        assert watch.since is None
    watch.update(13, bad)
    assert watch.since == 4


def test_a_loss_that_is_high_from_the_first_step_on_is_none():
    watch = Divergence(vocab_size=10)
    for step in range(1, 50):
        watch.update(step, 100.0)
    assert watch.since is None


def test_a_state_goes_on_where_it_was():
    watch, resumed = Divergence(vocab_size=1000), Divergence(vocab_size=1000)
    for step in range(1, 6):
        watch.update(step, math.nan)
    resumed.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    for step in range(6, 11):
        resumed.update(step, math.nan)
    assert resumed.since == 1


@pytest.mark.parametrize("changes", [{"learning_rate": 1e6, "max_grad_norm": 0.0}, {"nan": True}], ids=["rate", "nan"])
def test_a_run_that_diverges_is_not_called_converged(tmp_path, text, changes, caplog):
    poisoned = changes.pop("nan", False)
    grades = GradESConfig(heldout_every=4, heldout_cost=1.0)
    trainer = build(text, tmp_path, grades, evaluated=True, max_steps=40, **changes)
    if poisoned:
        with torch.no_grad():
            trainer.model.model.layers[0].self_attn.q_proj.weight.fill_(math.nan)
    trainer.train()
    assert trainer.diverged_at is not None
    assert trainer.diverged_at < trainer.state.global_step < 40
    text_of_summary = (tmp_path / "grades" / "summary.json").read_text()
    assert "NaN" not in text_of_summary
    summary = json.loads(text_of_summary)
    assert (summary["stop_reason"], summary["diverged_at"]) == ("diverged", trainer.diverged_at)
    assert summary["frozen"] == 0
    assert summary["speedup"]["against_full_schedule"] is None
    assert f"since step {trainer.diverged_at}" in caplog.text


class Threefold(GradESTrainer):
    """The loss is three times that of guessing from step 3 on."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss if self.state.global_step < 2 else loss * 3


def test_a_divergence_is_seen_in_the_loss_of_all_micro_batches(tmp_path, text):
    changes = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 0.0}
    trainer = build(text, tmp_path, never(), cls=Threefold, max_steps=15, **changes)
    trainer.train()
    assert (trainer.diverged_at, trainer.state.global_step) == (3, 2 + PATIENCE)


def test_losses_are_those_of_the_stock_trainer_while_a_heldout_loss_is_measured(tmp_path, text):
    measured = build(text, tmp_path, BY_HELDOUT_LOSS, evaluated=True, gradient_accumulation_steps=2)
    measured.train()
    stock = build(text, tmp_path, None, gradient_accumulation_steps=2)
    stock.train()
    assert measured.grades.heldout.measurements > 3
    assert losses(measured) == losses(stock)
