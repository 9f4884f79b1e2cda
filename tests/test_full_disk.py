"""A full disk, a server that is away, a figure that fails: training goes on, and what did not fit is named."""

import errno
import json
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import wandb
from transformers import TrainerCallback

from grades_trl import GradESConfig, GradESTrainer
from grades_trl.recipe import builtin
from grades_trl.recipe.results import train_and_save
from grades_trl.report import figure, page, tracking
from grades_trl.report.disk import Lines
from grades_trl.report.strict_json import write_json
from grades_trl.report.timing import RunClock
from grades_trl.trainers.whole_checkpoint import what_is_wrong
from helpers import arguments, model_for, same, warnings_in, weights

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def text():
    return builtin.dates(train=64, test=8)["train"], builtin.tiny_qwen3()[1]


def build(text, folder, callbacks=(), grades=True, **changes):
    rows, tokenizer = text
    config = GradESConfig(metric="schedule", schedule={"*.layers.0.*": 2, "*.layers.1.mlp.*": 3})
    return GradESTrainer(
        model=model_for(tokenizer),
        args=arguments(folder, **({"max_steps": 6, "save_strategy": "steps", "save_steps": 2} | changes)),
        train_dataset=rows,
        processing_class=tokenizer,
        grades=config if grades else None,
        callbacks=list(callbacks),
    )


@contextmanager
def no_file_longer_than(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Fills(TrainerCallback):
    """The disk is full from one step to another."""

    def __init__(self, size, first, last):
        self.size, self.first, self.last = size, first, last

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.first:
            self.limit = no_file_longer_than(self.size)
            self.limit.__enter__()
        if state.global_step == self.last:
            self.limit.__exit__(None, None, None)


@pytest.mark.parametrize("grades", [True, False], ids=["grades", "baseline"])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "tokenizer.json"])
def test_a_checkpoint_that_does_not_fit_is_said_and_the_others_stay(tmp_path, text, file, grades, caplog):
    straight = build(text, tmp_path / "straight", grades=grades)
    straight.train()
    size = (tmp_path / "straight" / "checkpoint-4" / file).stat().st_size - 1
    trainer = build(text, tmp_path / "run", [Fills(size, 3, 5)], grades, save_total_limit=9)
    trainer.train()
    assert trainer.state.global_step == 6
    assert same(weights(trainer.model), weights(straight.model))
    said = [line for line in warnings_in(caplog) if "was not saved" in line]
    assert len(said) == 1 and "checkpoint-4 was not saved: " in said[0] and "did not fit on the disk" in said[0]
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]
    for step in (2, 6):
        assert what_is_wrong(tmp_path / "run" / f"checkpoint-{step}", with_grades=grades) is None


def test_another_error_while_saving_is_an_error(tmp_path, text, monkeypatch):
    trainer = build(text, tmp_path)
    monkeypatch.setattr(trainer, "_save_rng_state", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()


def test_events_that_do_not_fit_are_written_when_they_do(tmp_path, text, monkeypatch, caplog):
    straight = build(text, tmp_path / "straight")
    straight.train()
    own, full = Path.open, [True]

    def opened(path, *args, **kwargs):
        if full[0] and path.suffix in (".jsonl", ".parquet"):
            raise FULL
        return own(path, *args, **kwargs)

    class Room(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            full[0] = 1 <= state.global_step < 5

    full[0] = False
    monkeypatch.setattr(Path, "open", opened)
    build(text, tmp_path / "run", [Room()]).train()
    files = [tmp_path / name / "grades" / "events.jsonl" for name in ("straight", "run")]
    rows = [json.loads(line) for line in (tmp_path / "run" / "grades" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    said = [line for line in warnings_in(caplog) if "could not be written" in line]
    assert [Path(line.split()[0]).name for line in said] == ["events.jsonl", "metrics.jsonl"]
    assert all("No space left on device" in line for line in said)
    # No event came after there was room again, so they are written with the last report
    assert files[1].read_text() == files[0].read_text()


def test_half_a_line_is_taken_back(tmp_path):
    lines = Lines(tmp_path / "a.jsonl", set())
    lines.append([{"a": 1}])
    with no_file_longer_than(30):
        lines.append([{"b": "x" * 100}])
        assert lines.path.read_text() == '{"a": 1}\n'
    lines.append([{"c": 3}])
    assert [list(json.loads(line)) for line in lines.path.read_text().splitlines()] == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize("name", ["summary.json", "timeline.png", "report.html", "history.parquet"])
def test_a_part_of_the_report_that_does_not_fit_is_named_once_and_the_rest_is_there(
    tmp_path, text, name, monkeypatch, caplog
):
    straight = build(text, tmp_path / "straight")
    straight.train()
    folder = tmp_path / "run" / "grades"
    (folder / name).mkdir(parents=True)  # what cannot be written
    (folder / name / "x").touch()
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: None)
    trainer = build(text, tmp_path / "run")
    trainer.train()
    trainer.report.write(trainer.grades_summary)
    said = [line for line in warnings_in(caplog) if "could not be written" in line]
    assert len(said) == 1 and said[0].startswith(f"{folder / name} could not be written")
    assert {path.name for path in folder.iterdir()} >= {path.name for path in (tmp_path / "straight/grades").iterdir()}


def test_a_file_of_json_that_does_not_fit_is_named(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with no_file_longer_than(20), pytest.raises(OSError, match=r"a\.json") as refused:
        write_json(tmp_path / "a.json", {"a": "x" * 100})
    assert refused.value.errno == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


def test_a_figure_that_fails_is_said_once(tmp_path, text, monkeypatch, caplog):
    def fails(*args, **kwargs):
        raise ValueError("no font")

    monkeypatch.setattr(figure, "draw", fails)
    monkeypatch.setattr(tracking.Tracker, "is_on", True)
    trainer = build(text, tmp_path)
    assert trainer.train().global_step == 6
    said = [line for line in warnings_in(caplog) if "could not be drawn" in line]
    assert said == ["A figure could not be drawn (ValueError: no font). All else goes on."]
    assert (tmp_path / "grades" / "report.html").exists() and not (tmp_path / "grades" / "timeline.png").exists()


def test_a_report_that_cannot_be_built_costs_no_run(tmp_path, text, monkeypatch, caplog):
    monkeypatch.setattr(page, "build", lambda *args, **kwargs: 1 / 0)
    assert build(text, tmp_path).train().global_step == 6
    assert "is not complete; the model is not affected" in caplog.text


# ---- the model itself ----


def test_a_model_that_does_not_fit_is_an_error_that_says_what_to_do(tmp_path, text):
    clock = RunClock()
    trainer = build(text, tmp_path, [clock], save_steps=4)

    class Full(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                self.limit = no_file_longer_than(9000)
                self.limit.__enter__()

    full = Full()
    trainer.add_callback(full)
    with pytest.raises(SystemExit, match="is trained, and could not be saved") as ended:
        try:
            train_and_save(trainer, clock, None)
        finally:
            full.limit.__exit__(None, None, None)
    assert f"--resume auto, which goes on from {tmp_path / 'checkpoint-4'}" in str(ended.value)
    assert what_is_wrong(tmp_path / "checkpoint-4", with_grades=True) is None
    assert not (tmp_path / "model.safetensors").exists()


# ---- W&B ----


@pytest.fixture
def away(monkeypatch, tmp_path):
    """A server that cannot be reached, to a machine that is logged in."""
    wandb.teardown()
    monkeypatch.setattr(tracking, "_said", set())
    monkeypatch.setenv("WANDB_MODE", "")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    own = wandb.init

    def init(*args, **kwargs):
        import os

        if os.environ.get("WANDB_MODE") != "offline":
            raise wandb.errors.CommError("Run initialization has timed out after 90.0 sec.")
        return own(*args, **kwargs)

    monkeypatch.setattr(wandb, "init", init)
    yield
    wandb.finish()
    wandb.teardown()


@pytest.mark.parametrize("grades", [True, False], ids=["grades", "baseline"])
def test_a_server_that_is_away_is_said_and_the_run_recorded_offline(tmp_path, text, away, grades, caplog):
    clock = RunClock()
    trainer = build(text, tmp_path / "run", [clock], grades, report_to=["wandb"], max_steps=2)
    train_and_save(trainer, clock, None)
    (said,) = [line for line in warnings_in(caplog) if "W&B" in line]
    assert "W&B cannot be reached (Run initialization has timed out" in said and "recording offline" in said
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_a_server_that_goes_away_is_said_once(tmp_path, text, monkeypatch, caplog):
    monkeypatch.setattr(tracking, "_said", set())
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb.teardown()
    trainer = build(text, tmp_path / "run", report_to=["wandb"], max_steps=3)

    class Lost(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:

                def lost(*args, **kwargs):
                    raise BrokenPipeError("the service is gone")

                monkeypatch.setattr(type(wandb.run), "log", lost)

    trainer.add_callback(Lost())
    try:
        assert trainer.train().global_step == 3
    finally:
        monkeypatch.undo()
        wandb.finish()
        wandb.teardown()
    said = [line for line in warnings_in(caplog) if "has failed" in line]
    assert len(said) <= 2 and "BrokenPipeError: the service is gone" in said[0]
