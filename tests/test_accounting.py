"""Where the seconds of a run go, on a clock that only the test moves."""

import time

import pytest
from datasets import Dataset
from trl import SFTConfig

from grades_trl import GradESTrainer
from grades_trl.recipe import builtin
from grades_trl.report.timing import RunClock


def test_run_clock_splits_a_run_into_training_validation_and_saving(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    model, tokenizer = builtin.tiny_qwen3()
    rows = Dataset.from_dict({"prompt": ["1 May 1998 "] * 8, "completion": ["1998-05-01"] * 8})
    clock = RunClock()
    trainer = GradESTrainer(
        model,
        SFTConfig(
            output_dir=str(tmp_path),
            max_steps=7,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=4,
            eval_strategy="steps",
            eval_steps=3,
            save_strategy="steps",
            save_steps=5,
            logging_steps=2,
            report_to="none",
            bf16=False,
            use_cpu=True,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        grades=None,
        callbacks=[clock],
    )
    model.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + (1 if model.training else 10)))
    save_model = trainer.save_model

    def slow_save(*args, **kwargs):
        now[0] += 100
        save_model(*args, **kwargs)

    monkeypatch.setattr(trainer, "save_model", slow_save)
    trainer.evaluate()  # outside of training: not on the clock
    trainer.train()
    trainer.evaluate()
    # Steps of 1; two batches of 10 to validate after steps 3, 6 and 7 (the end); checkpoints of 100 after 5 and 7.
    assert clock.validation == 60
    assert clock.saving == 200
    assert clock.total == 7 + 60 + 200
    assert [(entry["step"], entry["seconds"]) for entry in clock.history] == [(3, 23), (6, 146), (7, 167)]
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["eval_loss"] for entry in clock.history] == pytest.approx(logged[:-1])
    assert clock.peak_memory_mib > 0
