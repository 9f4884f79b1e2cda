"""What a recipe does when training ends."""

import pytest
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from grades_trl import GradESTrainer
from grades_trl.recipe import builtin
from grades_trl.recipe.arguments import RecipeArguments, configure_early_stopping
from grades_trl.recipe.results import final_eval, next_commands, train_and_save
from grades_trl.report import timing
from grades_trl.report.timing import RunClock
from helpers import arguments, same, warnings_in


class SlowSaving(SFTTrainer):
    """Saving takes 1,000 seconds by a clock that else stands still."""

    grades_config, nothing_left = None, False
    seconds = 0.0

    def save_model(self, *args, **kwargs):
        type(self).seconds += 1000
        self.saved_before = list(self.ended)


@pytest.fixture
def trainer(tmp_path):
    model, tokenizer = builtin.tiny_qwen3()
    rows = Dataset.from_list([{"prompt": "1", "completion": "2"}] * 4)
    args = SFTConfig(str(tmp_path), max_steps=2, use_cpu=True, bf16=False, report_to=[], save_strategy="no")
    trainer = SlowSaving(model, args, train_dataset=rows, processing_class=tokenizer, callbacks=[RunClock()])
    trainer.ended = []
    return trainer


def test_the_clock_does_not_run_while_the_model_is_saved(trainer, monkeypatch):
    monkeypatch.setattr(timing.time, "perf_counter", lambda: SlowSaving.seconds)
    clock = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, RunClock))
    train_and_save(trainer, clock, None)
    assert SlowSaving.seconds >= 1000
    assert clock.seconds.total == 0
    assert clock.peak_memory_mib > 0


def test_the_model_is_saved_before_other_callbacks_see_the_end(trainer):
    class Late(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            trainer.ended.append(self)

    trainer.add_callback(Late)
    trainer.callback_handler.callbacks.insert(0, Late())
    clock = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, RunClock))
    train_and_save(trainer, clock, None)
    assert trainer.saved_before == []
    assert len(trainer.ended) == 2


def test_a_resumed_run_waits_no_longer_for_a_better_loss_and_one_that_has_ended_is_completed(tmp_path):
    """The first validation is the best. With a patience of two, the run ends after the third."""
    model, tokenizer = builtin.tiny_qwen3()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = builtin.dates(train=64, test=8)
    ends = []
    for checkpoint in (None, "checkpoint-2", "checkpoint-3"):
        model.load_state_dict(start)
        args = arguments(tmp_path, max_steps=8, eval_strategy="steps", eval_steps=1)
        callbacks = [RunClock(), *configure_early_stopping(RecipeArguments(early_stopping_patience=2), args)]
        args.save_total_limit = None  # all are there until the run ends
        trainer = GradESTrainer(
            model,
            args,
            train_dataset=rows["train"],
            eval_dataset=rows["test"],
            processing_class=tokenizer,
            grades=None,
            callbacks=callbacks,
        )

        def evaluate(*_, trainer=trainer, **__):
            metrics = {"eval_loss": float(trainer.state.global_step), "eval_runtime": 0.0}
            trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
            return metrics

        trainer.evaluate = evaluate
        train_and_save(trainer, callbacks[0], checkpoint and str(tmp_path / checkpoint))
        assert trainer.state.global_step == 3
        ends.append(load_file(tmp_path / "model.safetensors"))
        (tmp_path / "model.safetensors").unlink()
    best = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert all(same(end, best) for end in ends)


def test_what_to_run_next(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["recipes/sft_text.py", "--seed", "3"])
    monkeypatch.chdir(tmp_path)
    first = next_commands(tmp_path.joinpath("run").relative_to(tmp_path), with_grades=True)
    assert [command for _, command in first] == [
        "python recipes/compare.py --recipe sft_text",
        "python recipes/evaluate.py run",
    ]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").touch()
    ((_, then),) = next_commands(tmp_path.joinpath("run_baseline").relative_to(tmp_path), with_grades=False)
    assert then == "python recipes/evaluate.py run run_baseline"


def test_the_test_rows_are_scored_whatever_the_workers_do(tmp_path):
    """With persistent workers, the Trainer keeps its first evaluation's rows, and scores them again (5.17)."""
    model, tokenizer = builtin.tiny_qwen3()
    rows = builtin.dates(train=8, test=16, seed=0)
    args = SFTConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to=[],
        dataloader_num_workers=1,
        dataloader_persistent_workers=True,
    )
    validation, test = rows["test"].select(range(4)), rows["test"].select(range(4, 16))
    trainer = GradESTrainer(
        model, args, train_dataset=rows["train"], eval_dataset=validation, processing_class=tokenizer
    )
    scores = final_eval(trainer, test)
    assert scores["final/test_loss"] != scores["final/validation_loss"]


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({"warmup_steps": 2}, "takes 2 steps and the run has 2: the learning rate never reaches 0.125. Lower "),
        ({"warmup_steps": 40, "max_steps": -1, "num_train_epochs": 3.0}, "takes 40 steps and the run has 3"),
        ({"warmup_steps": 1}, None),
        ({"warmup_steps": 0.5}, None),
        ({"warmup_steps": 0.9}, "takes 2 steps and the run has 2"),
        ({"warmup_steps": 40, "lr_scheduler_type": "constant"}, None),
        ({"warmup_steps": 40, "lr_scheduler_type": "constant_with_warmup"}, "takes 40 steps"),
        ({}, None),
    ],
)
def test_a_warm_up_as_long_as_the_run_is_said_before_the_first_step(tmp_path, caplog, changes, warned):
    """It is said of no other: in these the learning rate reaches its full value."""
    model, tokenizer = builtin.tiny_qwen3()
    rates = []

    class Note(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
            said = [text for text in warnings_in(caplog) if "warm-up" in text]
            assert len(said) == (warned is not None) and (warned or "") in "".join(said)
            rates.append(optimizer.param_groups[0]["lr"])

    args = {"max_steps": 2, "learning_rate": 0.125, "lr_scheduler_type": "constant_with_warmup"} | changes
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], save_strategy="no", **args)
    rows = Dataset.from_list([{"prompt": "1", "completion": "2"}] * 4)
    trainer = SlowSaving(model, args, train_dataset=rows, processing_class=tokenizer, callbacks=[RunClock(), Note()])
    trainer.ended = []
    clock = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, RunClock))
    with caplog.at_level("WARNING", "grades_trl"):
        train_and_save(trainer, clock, None)
    assert (max(rates) == 0.125) == (warned is None)
