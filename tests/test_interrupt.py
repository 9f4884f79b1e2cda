"""SIGTERM and Ctrl-C: a checkpoint, a report, and the command that goes on."""

import json
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from grades_trl import GradESConfig, GradESTrainer
from grades_trl.recipe import builtin
from grades_trl.recipe.interrupt import SIGNALS, EndOnSignal
from grades_trl.recipe.results import train_and_save
from grades_trl.report.timing import RunClock
from grades_trl.stopping import HeldoutScore
from grades_trl.trainers.whole_checkpoint import newest_whole
from helpers import arguments, model_for, same

AVERAGED = GradESConfig(
    metric="none",
    stopping="end_of_schedule",
    keep="best_average",
    heldout_every=2,
    heldout_cost=1.0,
    heldout_grace=0.0,
)


class Send(TrainerCallback):
    """Signals to this process while a step runs."""

    def __init__(self, step, *signals):
        self._step, self._signals = step, signals

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self._step:
            for number in self._signals:
                os.kill(os.getpid(), number)


def train(folder, *callbacks, resume=None, grades=AVERAGED, **changes):
    dataset, (_, tokenizer) = builtin.dates(train=64, test=16), builtin.tiny_qwen3()
    clock = RunClock()
    trainer = GradESTrainer(
        model=model_for(tokenizer),
        args=arguments(folder, max_steps=8, **changes),
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        processing_class=tokenizer,
        grades=grades,
        callbacks=[clock, *callbacks],
    )
    train_and_save(trainer, clock, resume)
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return train(tmp_path_factory.mktemp("straight"))


@pytest.fixture(autouse=True)
def no_signal_is_ignored():
    """A shell that starts the tests in the background lets them ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["recipes/sft_text.py", "--seed", "3", "--resume", "old", "--hub_token", "x"])


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_run_after_its_step_and_it_goes_on_from_there(
    tmp_path, straight, command_line, number, capsys, monkeypatch
):
    before = [signal.getsignal(each) for each in SIGNALS]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(HeldoutScore, "is_below_best", lambda *_: True)  # the model gets the average, the checkpoint not
        train(tmp_path, Send(5, number))
    assert ended.value.code == 128 + number
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert newest_whole(tmp_path, with_grades=True) == tmp_path / "checkpoint-5"
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]  # save_strategy "no"
    summary = json.loads((tmp_path / "grades" / "summary.json").read_text())
    assert (summary["stop_reason"], summary["steps"], summary["weights"]) == ("interrupted", 5, "best average")
    assert not same(load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "checkpoint-5/model.safetensors"))
    printed = capsys.readouterr().out
    assert f"{number.name} has ended the run after step 5 of 8" in printed
    assert "python recipes/sft_text.py --seed 3 --hub_token '***' --resume auto" in printed

    assert same(train(tmp_path, resume=str(tmp_path / "checkpoint-5")), straight)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_data_loader_s_processes_do_not_end_before_the_run(tmp_path, command_line, number, capfd):
    """Ctrl-C goes to all processes of a terminal, and SIGTERM of a scheduler to all of a job."""

    class SendToAll(Send):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step + 1 == self._step:
                workers = [str(worker.pid) for worker in psutil.Process().children()]
                assert len(workers) == 2
                subprocess.run(["kill", f"-{int(number)}", *workers])
                time.sleep(0.3)
            super().on_step_begin(args, state, control, **kwargs)

    with pytest.raises(SystemExit) as ended:
        train(tmp_path, SendToAll(3, number), dataloader_num_workers=2)
    assert ended.value.code == 128 + number
    assert newest_whole(tmp_path, with_grades=True) == tmp_path / "checkpoint-3"
    assert capfd.readouterr().err.count("training ends after this step") == 1


@pytest.mark.parametrize("persistent", [False, True], ids=["new_workers", "persistent_workers"])
@pytest.mark.parametrize("number", SIGNALS)
def test_those_of_an_evaluation_neither(tmp_path, command_line, number, persistent):
    class SendToAllInEvaluation(TrainerCallback):
        evaluated = 0

        def on_prediction_step(self, args, state, control, **kwargs):
            if not self.evaluated:
                workers = [str(worker.pid) for worker in psutil.Process().children()]
                assert len(workers) == 4  # of training and of evaluation
                subprocess.run(["kill", f"-{int(number)}", *workers])
                time.sleep(0.3)
                os.kill(os.getpid(), number)
            self.evaluated += 1

    signals = SendToAllInEvaluation()
    workers = {"dataloader_num_workers": 2, "dataloader_persistent_workers": persistent}
    with pytest.raises(SystemExit) as ended:
        train(tmp_path, signals, grades=None, **workers, eval_strategy="steps", eval_steps=2)
    assert ended.value.code == 128 + number
    assert signals.evaluated == 2  # 16 rows
    assert multiprocessing.active_children() == []  # the process could not end before them
    assert newest_whole(tmp_path, with_grades=False) == tmp_path / "checkpoint-3"


def test_no_data_loader_s_process_outlives_a_run_that_fails(tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        train(tmp_path, Fails(), dataloader_num_workers=2)
    assert multiprocessing.active_children() == []


def test_a_second_signal_ends_at_once(tmp_path, command_line):
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Send(3, signal.SIGTERM, signal.SIGINT))
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert not list(tmp_path.glob("checkpoint-*"))


def test_what_is_due_at_the_end_of_an_epoch_is_not_done_in_its_middle(tmp_path, command_line):
    evaluated = []

    class Seen(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            evaluated.append(state.global_step)

    # Epochs of eight steps; the best checkpoint alone would be kept, without what a run needs to go on
    changes = {"save_strategy": "epoch", "eval_strategy": "epoch", "save_only_model": True, "save_total_limit": 1}
    with pytest.raises(SystemExit):
        train(tmp_path, Send(3, signal.SIGTERM), Seen(), load_best_model_at_end=True, **changes)
    assert evaluated == []
    assert newest_whole(tmp_path, with_grades=True) == tmp_path / "checkpoint-3"


def test_a_signal_in_the_last_step_lets_the_run_end_without_its_scores(tmp_path, straight, command_line):
    with pytest.raises(SystemExit):
        train(tmp_path, Send(8, signal.SIGTERM))
    assert json.loads((tmp_path / "grades" / "summary.json").read_text())["stop_reason"] == "schedule finished"
    assert same(load_file(tmp_path / "model.safetensors"), straight)


def test_the_baseline_too(tmp_path, command_line):
    with pytest.raises(SystemExit):
        train(tmp_path, Send(3, signal.SIGTERM), grades=None)
    assert newest_whole(tmp_path, with_grades=False) == tmp_path / "checkpoint-3"


def test_ignored_signals_stay_so_and_other_threads_change_nothing():
    before = [signal.getsignal(each) for each in SIGNALS]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup and `&` in a script do it
    try:
        with EndOnSignal(SimpleNamespace(_get_dataloader=None)).handlers():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not before[0]
    finally:
        signal.signal(signal.SIGINT, before[1])
    seen = []

    def inside():
        with EndOnSignal(SimpleNamespace(_get_dataloader=None)).handlers():
            seen.extend(signal.getsignal(each) for each in SIGNALS)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == before
