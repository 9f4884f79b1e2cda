"""What a run leaves in W&B, read back from its offline files."""

import os

import numpy as np
import pytest
import wandb
from matplotlib.image import imread
from PIL import Image
from toy_runs import ENVIRONMENT, Run, freeze, toy_matrices

from grades_trl.report import run_report, tracking
from grades_trl.report.run_report import RunReport
from grades_trl.report.summary import Outcome
from grades_trl.report.tracking import Tracker
from wandb_reader import read_run

VARIABLES = ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR")


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
        matrices, tracker, now = toy_matrices(layers=50), Tracker(["wandb"]), [0.0]
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
            run.step(10.0 if step < 13 else 0.25)
        run.end()
        seconds = run.clock.seconds
        summary = report.summarize(Outcome({}, "schedule finished", "last", 20))
        report.write(summary)
        summary.results = {"final/test_loss": 1.5}
        report.write(summary)
        tracker.log_scores(summary.results)
        sheet = directory / "samples.png"
        Image.new("RGB", (6, 8)).save(sheet)
        tracker.log_samples(sheet)
        tracking.finish()
        wandb.teardown()
        assert wandb.run is None
    (path,) = directory.rglob("offline-run-*")
    return directory, path, seconds


def test_settings_are_in_the_config(recorded):
    assert read_run(recorded[1])["config"] == {"grades": {"tau": "auto", "alpha": 0.5}}


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
    assert (seconds.total, seconds.training, seconds.grades) == (122.75, 122.0, 0.75)


def test_figures_take_no_more_than_their_share_of_a_run(tmp_path, monkeypatch):
    now, drawn, matrices = [0.0], [], toy_matrices(layers=50)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(wandb, "run", object())
    monkeypatch.setattr(Tracker, "log_settings", lambda self, settings: None)
    monkeypatch.setattr(Tracker, "log_figure", lambda self, png, step: drawn.append(step))
    monkeypatch.setattr(run_report.figure, "render", lambda figure: now.__setitem__(0, now[0] + 0.5))
    run = Run(now)
    report = make_report(tmp_path, matrices, run.clock, Tracker(["wandb"]))
    for step, name in enumerate(matrices, 1):
        report.record(step, [freeze(matrices, name, step)], {}, {})
        run.step(1.0)
    # The first one when 5 % have frozen; then when 0.5 s are 2 % of what has passed (25 s), 1 s, and so on.
    assert drawn == [5, 26, 50, 75, 99]


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
    (samples,) = [row["samples"] for row in found["history"] if "samples" in row]
    assert samples["width"] == 6


@pytest.mark.parametrize("report_to", [["wandb"], ["tensorboard"], []])
def test_without_a_run_nothing_is_written(tmp_path, report_to):
    tracker = Tracker(report_to)
    assert not tracker.is_on
    tracker.log_settings({})
    tracker.log_figure(b"", 1)
    tracker.log_gain(b"", 1)
    tracker.log_table([], [])
    tracker.log_summary({})
    tracker.log_report(tmp_path)
    tracker.log_scores({})
    tracker.log_samples(tmp_path)
    tracking.finish()


def test_a_run_of_the_user_s_own_is_left_alone(monkeypatch):
    monkeypatch.setattr(wandb, "run", object())
    assert Tracker(["wandb"]).is_on and not Tracker(["tensorboard"]).is_on


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
