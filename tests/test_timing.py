"""Where the seconds of a run go, on a clock that only the test moves; and what the speed-up is made of."""

import itertools
import json
import math
import random
import statistics
import time

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch import nn
from toy_runs import Run
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from grades_trl.recipe import builtin
from grades_trl.report import timing
from grades_trl.report.summary import stop_reason
from grades_trl.report.timing import Evaluation, RunClock, Saving, Seconds, StepsNotRun, ValidationNotRun, speedup


@pytest.fixture
def now(monkeypatch):
    """The time, in a list of one: only the test moves it."""
    now = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


# ---- one clock, with a real trainer ----


class Spends(TrainerCallback):
    """Moves the time after the end of training, where reports are written."""

    def __init__(self, now):
        self.now = now

    def on_train_end(self, args, state, control, **kwargs):
        self.now[0] += 1000


def sft_trainer(tmp_path, callbacks, model, tokenizer, **changes):
    rows = Dataset.from_dict({"prompt": ["1 May 1998 "] * 8, "completion": ["1998-05-01"] * 8})
    arguments = {
        "output_dir": str(tmp_path),
        "max_steps": 7,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "logging_steps": 2,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
    }
    return SFTTrainer(
        model,
        SFTConfig(**(arguments | changes)),
        train_dataset=rows,
        eval_dataset={"a": rows, "b": rows} if changes.get("eval_on_start") else rows,
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def test_the_seconds_of_a_run_are_split_into_their_parts(tmp_path, monkeypatch, now):
    model, tokenizer = builtin.tiny_qwen3()
    clock = RunClock()
    saving = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 5}
    trainer = sft_trainer(tmp_path, [clock, Spends(now)], model, tokenizer, **saving)
    model.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + (1 if model.training else 10)))
    save_model, log = trainer.save_model, trainer.log

    def slow_save(*args, **kwargs):
        now[0] += 100
        save_model(*args, **kwargs)

    def slow_log(*args, **kwargs):
        now[0] += 0.25
        log(*args, **kwargs)

    monkeypatch.setattr(trainer, "save_model", slow_save)
    monkeypatch.setattr(trainer, "log", slow_log)
    trainer.evaluate()  # outside of training: not on the clock
    trainer.train()
    trainer.evaluate()
    # Steps of 1; two batches of 10 to validate after steps 3, 6 and 7 (the end); checkpoints of 100 after 5 and 7.
    # Logs of 0.25 after steps 2, 4, 6 and at the end belong to training, those of validations to validation.
    assert clock.seconds == Seconds(total=268.75, training=8.0, validation=60.75, saving=200.0, grades=0.0)
    assert [(entry.step, entry.eval_loss) for entry in clock.evaluations] == [
        (row["step"], row["eval_loss"]) for row in trainer.state.log_history if "eval_loss" in row
    ][:-1]
    assert clock.evaluations_run == clock.planned_evaluations == 3
    assert clock.peak_memory_mib > 0
    assert clock.steps == 7


def test_seconds_per_set_of_several_validation_sets(tmp_path, now):
    model, tokenizer = builtin.tiny_qwen3()
    clock = RunClock()
    changes = {"eval_strategy": "epoch", "eval_on_start": True, "max_steps": 6}
    trainer = sft_trainer(tmp_path, [clock], model, tokenizer, **changes)
    model.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + (1 if model.training else 10)))
    trainer.train()
    # 4 steps in an epoch: at the start, after epoch 1, and after the half epoch that is left; 2 batches in each set.
    found = [(entry.step, entry.seconds, entry.dataset) for entry in clock.evaluations]
    assert found == [(0, 20, "a"), (0, 40, "b"), (4, 64, "a"), (4, 84, "b"), (6, 106, "a"), (6, 126, "b")]
    assert all(entry.eval_loss > 0 for entry in clock.evaluations)
    assert clock.evaluations_run == clock.planned_evaluations == 3
    assert clock.seconds == Seconds(total=126.0, training=6.0, validation=120.0, saving=0.0, grades=0.0)


# ---- the parts of a step ----


def test_validation_and_saving_are_no_part_of_a_step(now):
    run = Run(now)
    run.steps(10, 2.0)
    run.control.should_evaluate = True
    run.evaluate(50.0)
    run.save(30.0)
    run.steps(10, 2.0)
    run.end()
    assert run.clock.seconds == Seconds(total=120.0, training=40.0, validation=50.0, saving=30.0, grades=0.0)
    assert run.clock.recent_step_seconds() == run.clock.baseline_step_seconds() == 2.0


def test_what_is_logged_before_a_validation_belongs_to_training(now):
    run = Run(now)
    run.step(2.0)
    run.now[0] += 3.0
    run.event("on_log", logs={"loss": 1.0})
    run.evaluate(50.0)
    run.step(2.0)
    run.end()
    assert run.clock.seconds == Seconds(total=57.0, training=7.0, validation=50.0, saving=0.0, grades=0.0)
    assert run.clock.recent_step_seconds() == (2 + 5) / 2  # and to the step that comes after it


def test_what_grades_takes_is_part_of_its_step_but_not_of_the_baseline(now):
    run = Run(now)
    run.steps(20, 2.5, overhead=0.5)
    run.end()
    assert run.clock.seconds == Seconds(total=50.0, training=40.0, validation=0.0, saving=0.0, grades=10.0)
    assert run.clock.baseline_step_seconds() == 2.0
    assert run.clock.recent_step_seconds() == 2.5
    assert run.clock.recent_overhead_seconds() == 0.5


def test_what_grades_takes_after_the_last_step_counts(now):
    run = Run(now)
    run.steps(20, 2.0)
    now[0] += 3.0
    run.clock.add_overhead(3.0)  # before the end of training is announced
    run.end()
    now[0] += 100.0  # a report: nobody's
    with run.clock.overhead():
        now[0] += 4.0
    run.clock.add_overhead(1.0)
    assert run.clock.seconds == Seconds(total=48.0, training=40.0, validation=0.0, saving=0.0, grades=8.0)
    assert run.clock.recent_step_seconds() == 2.0


def test_overhead_is_measured_and_counts_once_when_nested(now):
    run = Run(now)
    now[0] += 2.0
    with run.clock.overhead():
        now[0] += 0.5
        with run.clock.overhead():
            now[0] += 0.25
    run.step(0.0)
    assert run.clock.seconds == Seconds(total=2.75, training=2.0, validation=0.0, saving=0.0, grades=0.75)
    with pytest.raises(KeyboardInterrupt), run.clock.overhead():
        raise KeyboardInterrupt
    with run.clock.overhead():
        now[0] += 1.0
    assert run.clock.seconds.grades == 1.75


def test_overhead_between_a_step_and_its_validation_is_in_neither_twice(now):
    run = Run(now)
    run.step(2.0)
    with run.clock.overhead():
        now[0] += 4.0
    run.evaluate(50.0)
    run.end()
    assert run.clock.seconds == Seconds(total=56.0, training=2.0, validation=50.0, saving=0.0, grades=4.0)


class Device:
    """An accelerator that works through a queue. Waiting for it takes the time of what is left."""

    def __init__(self, now, monkeypatch):
        self.now, self.free_at = now, 0.0
        monkeypatch.setattr("torch.accelerator.synchronize", self.synchronize)
        monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda device: None)
        monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 3 * 2**20)
        monkeypatch.setattr("torch.cuda.Event", lambda enable_timing: DeviceEvent(self))

    def launch(self, seconds):
        self.free_at = max(self.free_at, self.now[0]) + seconds

    def synchronize(self):
        self.now[0] = max(self.now[0], self.free_at)


class DeviceEvent:
    def __init__(self, device):
        self.device = device

    def record(self):
        self.at = max(self.device.now[0], self.device.free_at)

    def synchronize(self):
        self.device.now[0] = max(self.device.now[0], self.at)

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


def test_on_an_accelerator_nothing_is_charged_for_what_runs_late(now, monkeypatch):
    device = Device(now, monkeypatch)
    run = Run(now, device=torch.device("cuda"))
    for step in range(1, 21):
        device.launch(2.0)  # forward and backward; the host goes on after a moment
        now[0] += 0.125
        with run.clock.overhead():
            device.launch(0.5)
            now[0] += 0.125
        device.launch(0.25)  # the update
        run.control.should_evaluate = run.control.should_save = step % 10 == 0
        run.step(0.125)
        if step % 10 == 0:
            device.launch(50.0)
            run.evaluate(0.125)
            device.launch(30.0)
            run.save(0.125)
    with run.clock.overhead():
        device.launch(4.0)
    run.end()
    with run.clock.overhead():
        device.launch(3.0)
    assert run.clock.seconds == Seconds(total=222.0, training=45.0, validation=100.0, saving=60.0, grades=17.0)
    assert run.clock.recent_step_seconds() == 2.75 and run.clock.baseline_step_seconds() == 2.25
    assert run.clock.peak_memory_mib == 3.0


def test_parts_add_up_to_the_total_at_any_moment(now):
    run, random_ = Run(now), random.Random(0)
    for _ in range(200):
        random_.choice(
            [
                lambda: run.step(random_.random(), overhead=random_.random() / 10),
                lambda: run.evaluate(random_.random()),
                lambda: run.save(random_.random()),
                lambda: run.clock.add_overhead(0.01),
            ]
        )()
        seconds = run.clock.seconds
        parts = seconds.training + seconds.validation + seconds.saving + seconds.grades
        assert seconds.total == pytest.approx(parts) and seconds.total == pytest.approx(now[0] - 1000)


# ---- medians of steps ----


def test_the_first_steps_after_a_start_are_no_baseline(now):
    run = Run(now)
    run.steps(timing.WARM_UP_STEPS, 2.25)
    for seconds in (1.875, 1.9375, 2.0, 2.0625):
        run.step(seconds)
    assert run.clock.baseline_step_seconds() is None  # too few
    run.step(2.125)
    assert run.clock.baseline_step_seconds() == 2.0

    clock = RunClock()
    clock.load_state_dict(run.clock.state_dict())
    resumed = Run(now, clock, step=8)
    resumed.steps(timing.WARM_UP_STEPS, 2.25)
    assert clock.baseline_step_seconds() == 2.0
    resumed.step(2.25)
    assert clock.baseline_step_seconds() == (2.0 + 2.0625) / 2


def test_the_baseline_is_the_last_steps_before_the_first_freeze(now):
    run = Run(now)
    run.steps(10, 2.0)
    run.steps(300, 3.0)
    run.step(3.0, freeze=True)
    run.steps(300, 1.0)
    assert run.clock.baseline_step_seconds() == 3.0
    run.step(1.0, freeze=True)
    run.steps(30, 0.5)
    assert run.clock.baseline_step_seconds() == 3.0
    assert run.clock.step_speedup() == 6.0


def test_step_speedup_after_a_freeze_waits_for_steps_of_one_kind(now):
    """Issue 12, 21: the window that mixed steps from before and after read 1.36 to 1.47 beside 1.09 predicted."""
    run = Run(now)
    run.steps(40, 2.0)
    assert run.clock.step_speedup() == 1.0
    run.step(9.0, freeze=True)
    assert run.clock.step_speedup() is None
    for _ in range(timing.MIN_STEPS - 1):
        run.step(1.25)
        assert run.clock.step_speedup() is None and run.clock.recent_step_seconds() == 1.25
    run.step(1.25)
    assert run.clock.step_speedup() == 2.0 / 1.25
    run.step(1.25, freeze=True)
    assert run.clock.step_speedup() is None
    run.steps(timing.MIN_STEPS, 1.0)
    assert run.clock.step_speedup() == 2.0


def test_the_step_of_a_freeze_says_nothing_about_later_steps(now):
    run = Run(now)
    run.steps(40, 2.0)
    run.clock.note_freeze(41)  # in step 41, which has not ended
    assert run.clock.step_speedup() is None


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.05])
def test_a_reported_speedup_is_right(now, noise):
    """Independent noise of up to 5 %: what is reported within 25 steps is within 10 % of the truth."""
    random_ = random.Random(0)
    reported = []
    for _ in range(100):
        run = Run(now)
        for _ in range(30):
            run.step(2.18 * random_.lognormvariate(0, noise))
        run.step(2.18, freeze=True)
        for _ in range(25):
            run.step(2.0 * random_.lognormvariate(0, noise))
            reported.append(run.clock.step_speedup())
    measured = [x for x in reported if x is not None]
    assert len(measured) > 0.75 * len(reported)
    assert statistics.fmean(abs(x / 1.09 - 1) <= timing.TOLERANCE for x in measured) > 0.99
    assert measured == pytest.approx([1.09] * len(measured)) or noise > 0


def test_a_noisy_run_says_how_sure_it_is(now):
    """A busy machine slows down for a while: neighbouring steps agree, windows do not."""
    run = Run(now)
    for i in range(40):
        run.step(2.0 if (i // 8) % 2 else 3.0)
    run.step(2.0, freeze=True)
    run.steps(25, 1.5)
    assert run.clock.step_speedup() is None
    baseline = [2.0 if (i // 8) % 2 else 3.0 for i in range(3, 40)]
    blocks = [statistics.median(baseline[start : start + 7]) for start in range(2, 37, 7)]
    error = statistics.stdev(blocks) / math.sqrt(5) / statistics.median(baseline)
    assert error > 0.05
    assert speedup(run.clock, 100).margin == run.clock.baseline_margin() == pytest.approx(2 * error)


def test_a_very_noisy_run_is_not_measurable(now):
    run = Run(now)
    for i in range(40):
        run.step(1.0 if (i // 8) % 2 else 20.0)
    run.step(1.0, freeze=True)
    assert run.clock.baseline_step_seconds() is None
    parts = speedup(run.clock, 100)
    assert parts.cheaper_steps == Saving() and parts.against_same_length is None
    assert parts.against_full_schedule is None and parts.margin is None


def test_one_stall_is_no_noise(now):
    run = Run(now)
    for i in range(40):
        run.step(60.0 if i == 20 else 2.0)
    assert run.clock.baseline_step_seconds() == 2.0
    assert run.clock.typical_seconds() == 80.0
    assert run.clock.seconds.total == 138.0


def test_before_the_first_step_nothing_is_told(now):
    """Issue 12, 23: a subclass that logs in the first step."""
    clock = Run(now).clock
    assert clock.recent_step_seconds() is None and clock.recent_overhead_seconds() is None
    assert clock.baseline_step_seconds() is None and clock.step_speedup() is None
    assert clock.typical_seconds() == 0.0


def test_a_clock_that_stands_still_is_no_division_by_zero(now):
    run = Run(now)
    run.steps(20, 0.0)
    assert run.clock.baseline_step_seconds() is None and run.clock.step_speedup() is None


def test_a_long_run_keeps_no_more_than_a_short_one(now):
    """Issue 12, 22: the baseline was sorted out of all steps at every log, 56 ms at 100,000 steps."""
    run = Run(now)
    run.steps(2000, 1.0)
    sizes = [len(value) for value in run.clock.state_dict().values() if isinstance(value, list)]
    assert max(sizes) == timing.BASELINE_WINDOW


# ---- the speed-up ----


def test_speedup_in_its_parts(now):
    run = Run(now, eval_strategy="steps")  # 100 steps, validation after each tenth
    for _ in range(2):
        run.steps(10, 2.5, overhead=0.5)  # 2 without GradES
        run.evaluate(6.0)
    run.step(2.5, overhead=0.5, freeze=True)
    run.steps(29, 1.25, overhead=0.25)
    run.evaluate(6.0)
    run.end()
    now[0] += 5.0
    run.clock.add_overhead(5.0)
    parts = speedup(run.clock, 120)
    # Windows of 25 at their medians, without GradES: 25 x 2, 25 x 1; and all of GradES.
    took = 50 + 25 + 21 * 0.5 + 29 * 0.25 + 5
    assert run.clock.typical_seconds() == took
    assert parts.cheaper_steps == Saving(50 * 2 / took, 50 * 2 - took)
    assert parts.steps_not_run == StepsNotRun(120 / 50, 2.0 * 70, 70)
    assert parts.validation_not_run == ValidationNotRun(10 - 3, 7 * 6.0)
    assert parts.against_same_length == 50 * 2 / took
    assert parts.against_full_schedule == (120 * 2 + 10 * 6) / (took + 3 * 6)


def test_speedup_of_a_run_too_short_to_tell(now):
    run = Run(now, eval_strategy="steps")
    run.steps(3, 2.0)
    run.end()
    parts = speedup(run.clock, 100)
    assert parts.cheaper_steps == Saving(None, None)
    assert parts.steps_not_run == StepsNotRun(100 / 3, None, 97)
    assert parts.validation_not_run == ValidationNotRun(10, None)  # none was run: nobody knows what one takes
    assert parts.against_same_length is None and parts.against_full_schedule is None


def test_speedup_without_validation(now):
    run = Run(now)
    run.steps(20, 2.0)
    run.end()
    parts = speedup(run.clock, 40)
    assert parts.validation_not_run == ValidationNotRun(0, 0.0)
    assert parts.against_full_schedule == 2.0 and parts.cheaper_steps == Saving(1.0, 0.0)


# ---- resuming ----


def scenario(run, first, last):
    for step in range(first, last + 1):
        run.step(2.0 + step % 3 / 8, overhead=step % 5 / 16, freeze=step in (33, 50))
        if step % 10 == 0:
            run.evaluate(7.0, loss=1 / step)
            run.save(3.0)


@pytest.mark.parametrize("loaded_before_training", [True, False])
def test_a_resumed_clock_goes_on_as_the_straight_one(now, loaded_before_training):
    straight = Run(now, eval_strategy="steps")
    scenario(straight, 1, 70)
    straight.end()

    killed = Run(now, eval_strategy="steps")
    scenario(killed, 1, 40)
    now[0] += 1.5  # the checkpoint is being written
    state = json.loads(json.dumps(killed.clock.state_dict()))
    scenario(killed, 41, 47)

    now[0] += 10_000.0
    clock = RunClock()
    if loaded_before_training:
        clock.load_state_dict(state)
        resumed = Run(now, clock, step=40, eval_strategy="steps")
    else:
        resumed = Run(now, clock, step=40, eval_strategy="steps")
        clock.load_state_dict(state)
    scenario(resumed, 41, 70)
    resumed.end()
    ignored = {"peak_memory_mib"}
    expected = straight.clock.state_dict()
    assert {k: v for k, v in clock.state_dict().items() if k not in ignored} == {
        key: value for key, value in expected.items() if key not in ignored
    }
    assert speedup(clock, 100) == speedup(straight.clock, 100)


def test_a_clock_that_was_interrupted_can_be_resumed(now):
    """Ctrl-C in a notebook, then `trainer.train(resume_from_checkpoint=True)`: nobody told the clock of an end."""
    run = Run(now)
    run.steps(10, 2.0)
    state = run.clock.state_dict()
    run.steps(5, 2.0)
    run.clock.load_state_dict(state)
    resumed = Run(now, run.clock, step=10)
    resumed.steps(10, 2.0)
    resumed.end()
    assert run.clock.seconds == Seconds(40.0, 40.0, 0.0, 0.0, 0.0) and run.clock.steps == 20


def test_a_second_training_starts_anew(now):
    run = Run(now)
    run.steps(20, 2.0)
    run.end()
    again = Run(now, run.clock)
    again.steps(timing.WARM_UP_STEPS + timing.MIN_STEPS - 1, 1.0)
    again.end()
    assert run.clock.seconds == Seconds(7.0, 7.0, 0.0, 0.0, 0.0)
    assert run.clock.baseline_step_seconds() is None


# ---- planned evaluations ----


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x, labels=None):
        return {"loss": (self.layer(x) - labels).square().mean()}


def rows(count):
    return Dataset.from_dict({"x": torch.ones(count, 3).tolist(), "labels": torch.ones(count, 1).tolist()})


def plain_trainer(tmp_path, clock, train, several=False, **changes):
    arguments = {"per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    arguments |= {"output_dir": str(tmp_path), "disable_tqdm": True}
    held_out = {"a": rows(2), "b": rows(2)} if several else rows(2)
    arguments = TrainingArguments(**(arguments | changes))
    return Trainer(Linear(), arguments, train_dataset=train, eval_dataset=held_out, callbacks=[clock])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_steps": 10, "eval_strategy": "steps", "eval_steps": 4}, 3),  # 4, 8 and the end
        ({"max_steps": 12, "eval_strategy": "steps", "eval_steps": 4}, 3),
        ({"max_steps": 3, "eval_strategy": "steps", "eval_steps": 4}, 1),
        ({"max_steps": 10, "eval_strategy": "steps", "eval_steps": 4, "eval_on_start": True}, 4),
        ({"max_steps": 10, "eval_strategy": "steps", "eval_steps": 4, "eval_delay": 5}, 2),
        ({"max_steps": 10, "eval_strategy": "steps", "eval_steps": 4, "eval_delay": 8}, 2),
        ({"max_steps": 10, "eval_strategy": "steps", "eval_steps": 4, "eval_delay": 9}, 1),
        ({"max_steps": 10, "eval_strategy": "steps", "eval_steps": 4, "eval_delay": 11}, 0),
        ({"max_steps": 10, "eval_strategy": "steps", "eval_steps": 0.25}, 4),
        ({"max_steps": 10, "eval_strategy": "no", "eval_on_start": True}, 1),
        ({"max_steps": 10, "eval_strategy": "epoch"}, 3),  # 4 steps in an epoch of 8 rows
        ({"max_steps": 10, "eval_strategy": "epoch", "eval_delay": 2.2}, 1),
        ({"max_steps": 10, "eval_strategy": "epoch", "eval_delay": 2.6}, 0),
        ({"num_train_epochs": 3, "eval_strategy": "epoch"}, 3),
        ({"num_train_epochs": 1.5, "eval_strategy": "epoch"}, 2),
        ({"num_train_epochs": 2, "eval_strategy": "epoch", "gradient_accumulation_steps": 3}, 2),
        ({"max_steps": 3, "eval_strategy": "epoch", "gradient_accumulation_steps": 3}, 2),
        ({"max_steps": 10, "eval_strategy": "epoch", "eval_on_start": True, "eval_delay": 1}, 4),
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_as_many_evaluations_are_planned_as_the_trainer_runs(tmp_path, changes, expected, several):
    clock = RunClock()
    plain_trainer(tmp_path, clock, rows(8), several, **changes).train()
    assert clock.planned_evaluations == clock.evaluations_run == expected
    assert len(clock.evaluations) == expected * (2 if several else 1)


def stream(count):
    return IterableDataset.from_generator(lambda: iter(rows(count)))


def test_how_often_a_stream_is_validated_by_epoch_is_not_known(tmp_path, now):
    clock = RunClock()
    plain_trainer(tmp_path, clock, stream(8), max_steps=6, eval_strategy="epoch").train()
    assert clock.planned_evaluations is None
    assert speedup(clock, 6).validation_not_run == ValidationNotRun(None, None)


def test_a_resumed_run_that_validates_at_its_start_has_one_more(now):
    run = Run(now, eval_strategy="steps", eval_on_start=True)
    run.evaluate(1.0)
    run.steps(5, 1.0)
    clock = RunClock()
    clock.load_state_dict(run.clock.state_dict())
    resumed = Run(now, clock, step=5, eval_strategy="steps", eval_on_start=True)
    resumed.evaluate(1.0)
    assert (clock.planned_evaluations, clock.evaluations_run) == (12, 2)
    assert clock.evaluations == [Evaluation(0, 1.0, 1.0), Evaluation(5, 7.0, 1.0)]


# ---- why a run ended ----


class Once(torch.utils.data.IterableDataset):
    """A stream that cannot be read again."""

    def __init__(self, count):
        self.rows = iter(rows(count).with_format("torch"))

    def __iter__(self):
        return itertools.islice(self.rows, None)


class Shorter(torch.utils.data.IterableDataset):
    """Has 8 rows and says that it has 100."""

    def __len__(self):
        return 100

    def __iter__(self):
        return iter(rows(8).with_format("torch"))


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize(
    ("train", "stop", "expected"),
    [
        (rows(8), None, "schedule finished"),
        (stream(8), None, "schedule finished"),  # read three times
        (Once(8), None, "data ended"),
        (Shorter(), None, "data ended"),
        (rows(8), 4, "early stopping"),  # with the last step of an epoch
        (stream(8), 5, "early stopping"),
    ],
)
def test_stop_reason(tmp_path, train, stop, expected):
    clock = RunClock()
    dispatch = {"dispatch_batches": False}  # else accelerate itself fails on a stream without a batch
    trainer = plain_trainer(tmp_path, clock, train, max_steps=10, accelerator_config=dispatch)
    if stop:
        trainer.add_callback(StopAt(stop))
    trainer.train()
    steps = trainer.state.global_step
    assert stop_reason(clock, steps, 10) == expected
    assert stop_reason(clock, steps, 10, "all matrices frozen") == "all matrices frozen"
    assert clock.steps == steps
