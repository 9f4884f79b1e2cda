"""What a run leaves in W&B, read back from its offline files, and in TensorBoard and trackio."""

import json
import os
import re
import sys
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import wandb
from matplotlib.image import imread
from PIL import Image
from toy_runs import ENVIRONMENT, Run, freeze, matrix, toy_matrices
from transformers.integrations import TensorBoardCallback, WandbCallback

from grades_trl.report import run_report, tracking
from grades_trl.report.recipe_facts import Sample, thumbnail
from grades_trl.report.run_report import RunReport
from grades_trl.report.summary import Outcome
from grades_trl.report.timing import Seconds
from grades_trl.report.tracking import GroupedWandbCallback, Tracker
from wandb_reader import read_run

VARIABLES = ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR")

RESULT = {"test_loss": 1.5, "exact_match": None, "stop_reason": "schedule finished"}
LOGGED_METRICS = Path(__file__).parents[1] / "docs" / "logged_metrics.md"


def trainer_reporting_to(report_to, *callbacks):
    args = SimpleNamespace(report_to=report_to, project="grades-trl", run_name="run")
    return SimpleNamespace(args=args, callback_handler=SimpleNamespace(callbacks=list(callbacks)))


def make_report(directory, matrices, clock, tracker):
    return RunReport(
        directory,
        matrices,
        100,
        metric="grad_change",
        settings={"tau": "auto", "alpha": 0.5},
        grace_steps=0,
        environment=ENVIRONMENT,
        clock=clock,
        checkpointing=False,
        tracker=tracker,
    )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run of 20 matrices, 2 of which freeze in each of 10 steps, with scores that come after it."""
    directory = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        for variable in VARIABLES:
            patch.setenv(variable, str(directory / variable.lower()))
        wandb.init(mode="offline", dir=str(directory), project="test", settings=wandb.Settings(silent=True))
        matrices, tracker, now = toy_matrices(layers=50), Tracker.of(trainer_reporting_to(["wandb"])), [0.0]
        patch.setattr("time.perf_counter", lambda: now[0])
        draw = run_report.figure.draw

        def slow_draw(history):
            now[0] += 0.125
            return draw(history)

        patch.setattr(run_report.figure, "draw", slow_draw)
        run = Run(now)
        report = make_report(directory / "grades", matrices, run.clock, tracker)
        names = iter(matrices)
        for step in range(1, 21):  # 2 % of the matrices in each
            events = [freeze(matrices, next(names), step) for _ in range(2)]
            gains = {"language/layers/0": 1.0, "language/layers/1": 3.0} if step > 13 else None
            report.record(step, events, {}, {}, gains)
            if step % 7 == 0:
                report.record_heldout("loss", 10.0 / step, 16)
            run.step(100.0 if step < 13 else 0.25)
        run.end()
        seconds = run.clock.seconds
        summary = report.summarize(Outcome({}, "schedule finished", "last", 20))
        report.write(summary)
        summary.results = {"final/test_loss": 1.5}
        report.write(summary)
        tracker.log_result(RESULT, summary.results, 20)
        tracker.log_samples([Sample("read", "12", "1", "12", thumbnail(Image.new("RGB", (6, 8))))], 20)
        tracker.log_config({"recipe": {"dataset_name": "digits"}})
        tracking.finish()
        wandb.teardown()
        assert wandb.run is None
    (path,) = directory.rglob("offline-run-*")
    return directory, path, seconds


def test_settings_are_in_the_config(recorded):
    config = {"grades": {"tau": "auto", "alpha": 0.5}, "recipe": {"dataset_name": "digits"}}
    assert read_run(recorded[1])["config"] == config


def test_a_figure_for_every_twentieth_of_the_model_and_at_the_end(recorded):
    directory, path, _ = recorded
    rows = [row for row in read_run(path)["history"] if "grades/timeline" in row]
    # At 2 % a step, three steps pass 5 %; then one at the end, though the report is written twice.
    assert [row["train/global_step"] for row in rows] == [3, 6, 9, 12, 15, 18, 20]
    last = imread(path / "files" / rows[-1]["grades/timeline"]["path"])
    assert np.array_equal(last[..., :3], imread(directory / "grades" / "timeline.png")[..., :3])


def test_the_heatmap_of_the_gain_comes_with_every_figure(recorded):
    directory, path, _ = recorded
    rows = [row for row in read_run(path)["history"] if "grades/gain_heatmap" in row]
    assert [row["train/global_step"] for row in rows] == [15, 18, 20]  # measured from step 14 on
    last = imread(path / "files" / rows[-1]["grades/gain_heatmap"]["path"])
    assert np.array_equal(last[..., :3], imread(directory / "grades" / "gain.png")[..., :3])


def test_drawing_counts_as_what_grades_takes(recorded):
    """Six figures while it trained."""
    seconds = recorded[2]
    assert (seconds.total, seconds.training, seconds.grades) == (1202.75, 1202.0, 0.75)


def test_figures_take_no_more_than_their_share_of_a_run(tmp_path, monkeypatch):
    now, drawn, matrices = [0.0], [], toy_matrices(layers=50)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(wandb, "run", object())
    monkeypatch.setattr(Tracker, "log_config", lambda self, config: None)
    monkeypatch.setattr(Tracker, "log_image", lambda self, key, png, step: drawn.append(step))
    monkeypatch.setattr(run_report.figure, "render", lambda figure: now.__setitem__(0, now[0] + 0.5) or b"")
    run = Run(now)
    report = make_report(tmp_path, matrices, run.clock, Tracker.of(trainer_reporting_to(["wandb"])))
    for step, name in enumerate(matrices, 1):
        report.record(step, [freeze(matrices, name, step)], {}, {})
        run.step(1.0)
    # The first one when the 1.5 s that it may take are 2 % of what has passed (75 s), though more than 5 % have frozen
    # long since; then at every 5 %; and when four of 0.5 s are 2 % (100 s with them).
    assert drawn == [76, 81, 87, 92, 99]


def test_the_table_of_matrices_is_there_once(recorded):
    _, path, _ = recorded
    (table,) = [row["grades/matrices"] for row in read_run(path)["history"] if "grades/matrices" in row]
    assert (table["nrows"], table["ncols"]) == (100, 9)


def test_the_summary_is_that_of_the_file(recorded):
    found = read_run(recorded[1])["summary"]
    assert found["grades/seconds"]["grades"] == 0.75
    assert found["grades/results"] == {"final/test_loss": 1.5} and found["final/test_loss"] == 1.5
    assert found["grades/matrices"]["_type"] == "table-file"
    assert found["grades/gain"]["steps"] == 7
    assert found["grades/gain"]["towers"]["language"] == {"gain": 1, "error": 0, "cost": 1}
    assert found["grades/gain"]["layers"]["language/layers/1"]["gain"] == 0.75


def test_the_folder_is_an_artifact_and_the_samples_an_image(recorded):
    found = read_run(recorded[1])
    (report,) = [name for name, a in found["artifacts"].items() if a["type"] == "grades-report"]
    assert {"summary.json", "report.html", "events.jsonl"} <= set(found["artifacts"][report]["files"])


def test_the_samples_are_a_table_with_their_images(recorded):
    _, path, _ = recorded
    run = read_run(path)
    (table,) = [row["grades/samples"] for row in run["history"] if "grades/samples" in row]
    found = json.loads((path / "files" / table["path"]).read_text())
    assert found["columns"] == ["prompt", "expected", "before", "after", "right", "image"]
    (row,) = found["data"]
    assert row[:5] == ["read", "12", "1", "12", True]
    # The image itself is in the artifact that W&B makes of a table.
    (stored,) = [a["files"] for name, a in run["artifacts"].items() if "gradessamples" in name.replace("_", "")]
    assert [name for name in stored if name.startswith("media/images/") and name.endswith(".png")]


def test_the_events_are_a_table_with_their_reasons(recorded):
    _, path, _ = recorded
    (table,) = [row["grades/events"] for row in read_run(path)["history"] if "grades/events" in row]
    found = json.loads((path / "files" / table["path"]).read_text())
    assert found["columns"] == ["step", "event", "what", "reason", "matrices", "frozen in all"]
    assert len(found["data"]) == 20
    assert found["data"][1] == [2, "frozen", "language layer 1", "grad_change below tau", 2, 4]


def test_every_heldout_measurement_is_a_point_of_its_curve(recorded):
    rows = [row for row in read_run(recorded[1])["history"] if "grades/heldout_loss" in row]
    assert [(row["train/global_step"], row["grades/heldout_loss"]) for row in rows] == [(7, 10 / 7), (14, 10 / 14)]


def test_runs_can_be_sorted_by_their_results(recorded):
    found = read_run(recorded[1])["summary"]
    assert {key: value for key, value in found.items() if key.startswith("result/")} == {
        "result/test_loss": 1.5,
        "result/stop_reason": "schedule finished",
    }


def test_the_fields_to_sort_by_are_those_of_every_run():
    """With GradES or without."""
    common = {"results": {"final/test_loss": 1.5, "final/exact_match_test": 0.25}, "steps": 30, "total_steps": 40}
    common |= {"seconds": Seconds(70.0, 60.0, 6.0, 3.0, 1.0), "flops": 0.5, "peak_memory_mib": None}
    common |= {"stop_reason": "schedule finished"}
    found = tracking.result_fields(SimpleNamespace(**common, frozen=3, tracked=[{}] * 4))
    assert found["fraction_of_schedule"] == found["frozen_fraction"] == 0.75
    assert (found["exact_match"], found["seconds"], found["flops"]) == (0.25, 70.0, 0.5)
    assert tracking.result_fields(SimpleNamespace(**common, frozen=0, tracked=[]))["frozen_fraction"] == 0.0


@pytest.mark.parametrize("report_to", [["wandb"], ["tensorboard"], []])
def test_without_a_run_nothing_is_written(tmp_path, report_to):
    tracker = Tracker.of(trainer_reporting_to(report_to))
    assert not tracker.is_on
    tracker.log_config({})
    tracker.log_image("grades/timeline", b"", 1)
    tracker.log_table("grades/events", [], [], 1)
    tracker.log_heldout("loss", 1.0, 1)
    tracker.log_summary({})
    tracker.log_report(tmp_path)
    tracker.log_result({}, {}, 1)
    tracker.log_samples([Sample("a", "b", "c", "d")], 1)
    tracking.finish()


def test_a_run_of_the_user_s_own_is_left_alone(monkeypatch):
    monkeypatch.setattr(wandb, "run", object())
    assert Tracker.of(trainer_reporting_to(["wandb"])).is_on
    assert not Tracker.of(trainer_reporting_to(["tensorboard"])).is_on


@pytest.fixture
def environment(monkeypatch):
    """The variables of W&B, as they were before and after."""
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_SILENT", "WANDB_DIR"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(wandb, "teardown", lambda: None)
    return os.environ


@pytest.mark.parametrize("logged_in", [True, False])
def test_start_never_asks(tmp_path, monkeypatch, caplog, environment, logged_in):
    caplog.set_level("INFO")
    monkeypatch.setattr(wandb, "login", lambda prompt: logged_in and prompt is False)
    assert tracking.start(str(tmp_path / "a" / "b")) == "b"
    assert environment.get("WANDB_MODE") == (None if logged_in else "offline")
    assert ("recording offline" in caplog.text) != logged_in
    assert environment["WANDB_DIR"] == str(tmp_path / "a" / "b") and (tmp_path / "a" / "b").is_dir()


def test_start_respects_the_environment(tmp_path, monkeypatch, environment):
    monkeypatch.setattr(wandb, "login", lambda prompt: pytest.fail("asked"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    assert tracking.start(str(tmp_path / "run"), "name") == "name"
    assert environment["WANDB_MODE"] == "disabled" and environment["WANDB_PROJECT"] == "mine"
    assert (tmp_path / "elsewhere").is_dir() and not (tmp_path / "run").exists()


# ---- which panels a run has ----


class Logged(GroupedWandbCallback):
    """The callback, with what it would log."""

    def __init__(self):
        self.rows, self.summary = [], {}
        self._initialized, self._wandb = True, self
        self.run = self

    def log(self, row):
        self.rows.append(row)


def seven_billion():
    """The matrices of Qwen2.5-VL-7B: 32 vision layers, a projector, 28 language layers."""
    found = [
        matrix(f"visual.{i}.{role}", i, role, "vision", "visual")
        for i in range(32)
        for role in ("qkv", "proj", "gate_proj", "up_proj", "down_proj")
    ]
    found += [matrix(f"merger.{i}", -1, "mlp", "projector", "") for i in range(2)]
    roles = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    found += [matrix(f"layers.{i}.{role}", i, role) for i in range(28) for role in roles]
    return {m.name: m for m in found}


@pytest.fixture
def everything_logged(tmp_path, monkeypatch):
    """All that a run of a 7B VLM logs, of GradES and of TRL, under the keys that it has in the Trainer."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    matrices = seven_billion()
    run = Run(now)
    report = make_report(tmp_path, matrices, run.clock, Tracker())
    report.count_batch({"input_ids": np.zeros((2, 8)), "attention_mask": np.ones((2, 8))}, None)
    for step in range(1, 41):
        events = [freeze(matrices, "visual.0.qkv", 20)] if step == 20 else []
        report.record(step, events, dict.fromkeys(matrices, 1.0), {"visual": 1} if step >= 20 else {})
        run.step(1.0 if step < 20 else 0.8, overhead=0.01)
    for metric in ("loss", "token_accuracy", "exact_match"):
        report.record_heldout(metric, 1.0, 16)
    of_trl = ("entropy", "num_tokens", "mean_token_accuracy")
    train = dict.fromkeys(("loss", "grad_norm", "learning_rate", "epoch", *of_trl), 1.0)
    runtime = ("loss", "runtime", "samples_per_second", "steps_per_second", *of_trl)
    grades = report.logs()
    evaluations = [dict.fromkeys((f"{split}_{key}" for key in runtime), 1.0) for split in ("eval", "test")]
    return grades, [train | grades, *evaluations]


def test_a_run_of_a_large_model_has_fewer_than_40_panels_in_named_groups(everything_logged, monkeypatch):
    _, logs = everything_logged
    callback = Logged()
    monkeypatch.setattr(wandb, "run", callback)
    state = SimpleNamespace(is_world_process_zero=True, global_step=40)
    for row in logs:
        callback.on_log(None, state, None, logs=row)
    keys = {key for row in callback.rows for key in row} | {"grades/heldout_loss"}
    assert 20 < len(keys) < 40, sorted(keys)
    assert {key.split("/")[0] for key in keys} == {"train", "eval", "grades"}
    assert not any(key.startswith("train/grades") for key in keys)
    assert {"test/loss", "test/mean_token_accuracy"} <= callback.summary.keys()
    assert all(row["train/global_step"] == 40 for row in callback.rows)


def test_the_callback_takes_the_place_of_the_trainer_s_own():
    before, after = object(), object()
    own = WandbCallback()
    trainer = trainer_reporting_to(["wandb"], before, own, after)
    GroupedWandbCallback.put_into(trainer)
    first, middle, last = trainer.callback_handler.callbacks
    assert (first, last) == (before, after) and type(middle) is GroupedWandbCallback


def test_every_logged_key_is_described(everything_logged):
    """In docs/logged_metrics.md: a key as it is, or with `<tower>` in the place of a tower."""
    described = set(re.findall(r"`(grades/[^`]+)`", LOGGED_METRICS.read_text("utf-8")))
    grades, _ = everything_logged
    media = {"grades/timeline", "grades/gain_heatmap", "grades/matrices", "grades/events", "grades/samples"}
    towers = re.compile("grades/(vision|language|audio|projector)/")
    keys = {towers.sub("grades/<tower>/", key) for key in [*grades, *media]}
    assert len(keys) >= 15
    assert keys <= described, keys - described
    # And none that is logged no more.
    scalars = {key for key in described if not key.startswith("grades/<entry>")} - media
    assert scalars <= keys, scalars - keys


# ---- the other loggers ----


class Writer:
    """Takes the place of TensorBoard's SummaryWriter."""

    def __init__(self, log_dir=None):
        self.images, self.texts, self.scalars = {}, {}, {}

    def add_image(self, key, image, step, dataformats):
        self.images[key] = (image.shape, step, dataformats)

    def add_text(self, key, text, step):
        self.texts[key] = text

    def add_scalar(self, key, value, step):
        self.scalars[key] = value

    def flush(self):
        pass


class Board(TensorBoardCallback):
    def __init__(self, logging_dir):
        self.tb_writer, self.logging_dir, self._SummaryWriter = None, logging_dir, Writer


def tell(tracker):
    """All that a recipe tells a logger."""
    image = thumbnail(Image.new("RGB", (6, 8)))
    tracker.log_config({"grades": {"tau": "auto"}})
    tracker.log_image("grades/timeline", image, 3)
    tracker.log_table("grades/events", ["step", "what"], [[3, "a | b"]], 3)
    tracker.log_samples([Sample("read", "12", "1", "12", image)], 3)
    tracker.log_heldout("loss", 1.0, 3)
    tracker.log_summary({"steps": 3})
    tracker.log_result(RESULT, {"final/test_loss": 1.5}, 3)
    tracker.log_report(Path())


def test_tensorboard_gets_what_it_can_hold(tmp_path):
    board = Board(str(tmp_path))
    tracker = Tracker.of(trainer_reporting_to(["tensorboard"], board))
    assert tracker.is_on
    tell(tracker)  # after training: the writer of the callback is closed
    (logger,) = tracker._loggers
    written = logger._own
    assert written.images == {"grades/timeline": ((8, 6, 3), 3, "HWC"), "grades/samples/0": ((8, 6, 3), 3, "HWC")}
    assert "| 3 | a \\| b |" in written.texts["grades/events"]
    assert "| read | 12 | 1 | 12 | True | see images |" in written.texts["grades/samples"]
    assert "| grades | tau | auto |" in written.texts["arguments"]
    assert written.scalars == {"result/test_loss": 1.5, "final/test_loss": 1.5}
    assert not Tracker.of(trainer_reporting_to(["tensorboard"], Board(None))).is_on  # before training


def test_trackio_gets_what_it_can_hold(monkeypatch):
    runs, rows = [], []
    run = ContextVar("run", default=None)

    def init(**arguments):
        runs.append(arguments)
        run.set(SimpleNamespace(name=arguments["name"]))

    trackio = SimpleNamespace(
        context_vars=SimpleNamespace(current_run=run),
        init=init,
        log=rows.append,
        finish=lambda: run.set(None),
        config=SimpleNamespace(update=lambda config, allow_val_change: rows.append(config)),
        Image=lambda image: ("image", image.size),
        Table=lambda columns, data: [dict(zip(columns, row, strict=True)) for row in data],
    )
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    tell(Tracker.of(trainer_reporting_to(["trackio"])))
    # Its callback has ended the run: it goes on, once.
    assert runs == [{"project": "grades-trl", "name": "run", "resume": "allow"}]
    logged = {key: value for row in rows for key, value in row.items()}
    assert logged["grades"] == {"tau": "auto"} and logged["result/test_loss"] == 1.5
    assert logged["grades/timeline"] == ("image", (6, 8))
    assert logged["grades/events"] == [{"step": 3, "what": "a | b"}]
    assert logged["grades/samples"][0]["image"] == ("image", (6, 8))
    tracking.finish()
    assert run.get() is None
