"""
What goes to Weights & Biases, TensorBoard and trackio, beside the scalars that go through `trainer.log`.

In W&B a run has these sections: `train` and `eval` (the Trainer's own scalars), `grades` (scalars, the two figures,
and the tables of matrices, events and samples) and `result` (in the run's summary: what runs are sorted by).
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from transformers.integrations import TensorBoardCallback, WandbCallback

from grades_trl.distributed import is_main
from grades_trl.extras import how_to_install, installed
from grades_trl.report.recipe_facts import Sample
from grades_trl.report.strict_json import jsonable

if installed("wandb"):
    import wandb

logger = logging.getLogger(__name__)

MAX_TEXT_ROWS = 200  # of a table that TensorBoard shows as text
SAMPLE_COLUMNS = ["prompt", "expected", "before", "after", "right"]


def drop_if_missing(report_to: list[str]) -> list[str]:
    """Where to report to: without W&B if that is not installed, and then one line says so.

    Args:
        report_to (`list[str]`): as in the training arguments.
    """
    if "wandb" not in report_to or installed("wandb"):
        return report_to
    logger.warning(f"This run is not recorded in W&B, which is not installed: {how_to_install('wandb')}.")
    return [name for name in report_to if name != "wandb"]


def start(output_dir: str, run_name: str | None = None) -> str:
    """
    Prepares W&B before a trainer is built: online if this machine is logged in, else offline with one line that says
    so. It never asks. `WANDB_MODE`, `WANDB_PROJECT` and `WANDB_DIR` in the environment are respected.

    Args:
        output_dir (`str`): of the run; what is recorded offline lies there.
        run_name (`str`, *optional*): by default the name of that folder.

    Returns:
        `str`: the name, for the trainer's `run_name`.
    """
    os.environ.setdefault("WANDB_PROJECT", "grades-trl")
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_DIR", output_dir)
    Path(os.environ["WANDB_DIR"]).mkdir(parents=True, exist_ok=True)
    if not os.environ.get("WANDB_MODE") and not _logged_in():
        os.environ["WANDB_MODE"] = "offline"
        wandb.teardown()  # login() has read the environment; init() must read it again
        folder = os.environ["WANDB_DIR"]
        logger.info(f"W&B: not logged in, recording offline. Later: wandb login; wandb sync {folder}/wandb/*")
    return run_name or Path(output_dir).name


def _logged_in() -> bool:
    try:
        return bool(wandb.login(prompt=False))
    except wandb.Error as error:  # it asks the server whether the key is right
        logger.warning(f"W&B cannot be reached ({str(error)[:300]}).")
        return False


def finish() -> None:
    """Ends the run, if there is one: what is recorded is complete when this returns."""
    if installed("wandb") and wandb.run is not None:
        with said_once("W&B"):
            wandb.finish()
    trackio = sys.modules.get("trackio")
    if trackio is not None and trackio.context_vars.current_run.get() is not None:
        trackio.finish()


_said: set[str] = set()


@contextmanager
def said_once(name: str) -> Iterator[None]:
    """Turns an error of a logger (a server that is away, a full disk) into a warning, the first time: no run ends for
    that."""
    try:
        yield
    except Exception as error:
        if name not in _said:
            _said.add(name)
            reason = f"{type(error).__name__}: {error}"
            logger.warning(f"{name} has failed ({reason[:300]}): what it records is incomplete. All else goes on.")


def _offline(error: Exception) -> None:
    """Records in files what was to go to a server that cannot be reached."""
    folder = os.environ.get("WANDB_DIR", ".")
    logger.warning(
        f"W&B cannot be reached ({str(error)[:300]}), recording offline. Later: wandb sync {folder}/wandb/*"
    )
    wandb.teardown()
    os.environ["WANDB_MODE"] = "offline"


class GroupedWandbCallback(WandbCallback):
    """
    The Trainer's callback, which puts all that it logs under `train/`, with sections that can be found: `grades/...`
    keeps its own name, and the scores of the test rows, one number each, go into the run's summary alone.
    """

    @classmethod
    def put_into(cls, trainer: Any) -> None:
        """Takes the place of the Trainer's own callback, if it has that."""
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [cls() if type(callback) is WandbCallback else callback for callback in callbacks]

    def setup(self, args, state, model, **kwargs):
        try:
            super().setup(args, state, model, **kwargs)
        except wandb.Error as error:
            _offline(error)
            super().setup(args, state, model, **kwargs)

    def on_train_begin(self, *args, **kwargs):
        with said_once("W&B"):
            super().on_train_begin(*args, **kwargs)

    def on_save(self, *args, **kwargs):
        with said_once("W&B"):
            super().on_save(*args, **kwargs)

    def on_train_end(self, *args, **kwargs):
        with said_once("W&B"):
            super().on_train_end(*args, **kwargs)

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        with said_once("W&B"):
            self._log(args, state, control, model, logs, **kwargs)

    def _log(self, args, state, control, model, logs, **kwargs):
        grades = {key: value for key, value in logs.items() if key.startswith("grades/")}
        scores = {key: value for key, value in logs.items() if key.startswith("test_")}
        others = {key: value for key, value in logs.items() if key not in grades and key not in scores}
        super().on_log(args, state, control, model=model, logs=others, **kwargs)
        if wandb.run is None or not state.is_world_process_zero:
            return
        wandb.run.summary.update({key.replace("test_", "test/", 1): value for key, value in scores.items()})
        # Held-out scores are logged when they are measured, not when the next line is due.
        shown = {key: value for key, value in grades.items() if not key.startswith("grades/heldout_")}
        if shown:
            wandb.run.log({**shown, "train/global_step": state.global_step})


def log_comparison(scores: dict[str, dict[str, float]], report_to: Sequence[str]) -> None:
    """Scores of several models: each as `<model>/<score>` in the summary of a run, and all as the table
    `evaluate/scores`, a row for each score and a column for each model. Nothing is done without W&B.

    Args:
        scores (`dict[str, dict[str, float]]`): model -> score -> its value.
        report_to (`Sequence[str]`): as in the training arguments.
    """
    if "wandb" not in report_to:
        return
    try:
        run = wandb.run or wandb.init(name=os.environ.get("WANDB_NAME"))
    except wandb.Error as error:
        _offline(error)
        run = wandb.init(name=os.environ.get("WANDB_NAME"))
    run.summary.update({f"{model}/{name}": value for model, found in scores.items() for name, value in found.items()})
    names = dict.fromkeys(name for found in scores.values() for name in found)
    rows = [[name, *(found.get(name) for found in scores.values())] for name in names]
    run.log({"evaluate/scores": wandb.Table(columns=["score", *scores], data=rows)})


class Tracker:
    """
    The loggers of a trainer. Every method does nothing where the trainer reports to none of them.

    The Trainer's own callbacks make the runs when training begins, and log the scalars. Here no `step=` is ever given
    to W&B: it would drop rows that are logged beside that callback.

    Args:
        *loggers: those that the trainer reports to.
    """

    def __init__(self, *loggers: Any):
        self._loggers = loggers

    @classmethod
    def of(cls, trainer: Any) -> Tracker:
        """The loggers that a trainer reports to, of those known here; none in a process that is not the main one.

        Args:
            trainer: with `args` and `callback_handler`, as a `transformers.Trainer` has them.
        """
        if not is_main():
            return cls()
        report_to, loggers = trainer.args.report_to, list[Any]()
        if "wandb" in report_to:
            loggers.append(_Wandb())
        boards = [c for c in trainer.callback_handler.callbacks if isinstance(c, TensorBoardCallback)]
        if "tensorboard" in report_to and boards:
            loggers.append(_TensorBoard(boards[0]))
        if "trackio" in report_to:
            loggers.append(_Trackio(trainer.args.project, trainer.args.run_name))
        return cls(*loggers)

    @property
    def is_on(self) -> bool:
        """Whether there is a run to write to."""
        return any(logger.is_on for logger in self._loggers)

    def log_config(self, config: dict[str, Any]) -> None:
        """Adds to the config of the run.

        Args:
            config (`dict[str, Any]`): name of a group -> its settings.
        """
        self._each("config", jsonable(config))

    def log_image(self, key: str, png: bytes, step: int) -> None:
        """A figure.

        Args:
            key (`str`): its name, e.g. `"grades/timeline"`.
            png (`bytes`): the figure as PNG.
            step (`int`): optimizer step that it shows.
        """
        self._each("image", key, png, step)

    def log_table(self, key: str, columns: list[str], rows: list[list], step: int) -> None:
        """A table; an image in it is given as bytes, in the last column."""
        self._each("table", key, columns, rows, step)

    def log_samples(self, samples: list[Sample], step: int) -> None:
        """Answers before and after training, under `grades/samples`, with the images where there are any."""
        if not samples:
            return
        columns = [*SAMPLE_COLUMNS, *(["image"] if samples[0].image is not None else [])]
        rows = [
            [s.prompt, s.expected, s.before, s.after, s.is_right, *([s.image] if "image" in columns else [])]
            for s in samples
        ]
        self.log_table("grades/samples", columns, rows, step)

    def log_heldout(self, metric: str, score: float, step: int) -> None:
        """One held-out measurement, as `grades/heldout_<metric>`, in the step in which it was made."""
        self._each("heldout", f"grades/heldout_{metric}", score, step)

    def log_summary(self, summary: dict[str, Any]) -> None:
        """The entries of `summary.json`, each under `grades/` in the run's summary: none may be called like a table or
        a figure. W&B only: the others have no such place."""
        self._each("summary", {f"grades/{key}": value for key, value in summary.items()})

    def log_result(self, result: dict[str, Any], scores: dict[str, float], step: int) -> None:
        """What runs are sorted by, under `result/`, and the final scores under their own names.

        Args:
            result (`dict[str, Any]`): numbers and short texts, see [`result_fields`].
            scores (`dict[str, float]`): e.g. `{"final/test_loss": 1.5}`.
            step (`int`): the last optimizer step.
        """
        named = {f"result/{key}": value for key, value in result.items() if value is not None}
        self._each("result", named | scores, step)

    def log_report(self, directory: Path) -> None:
        """The folder of the report, as an artifact of W&B; once more when something was added to it."""
        self._each("report", directory)

    def _each(self, what: str, *arguments: Any) -> None:
        for tracker in self._loggers:
            if tracker.is_on:
                with said_once(type(tracker).__name__.strip("_")):
                    getattr(tracker, what)(*arguments)


class _Wandb:
    @property
    def is_on(self) -> bool:
        return wandb.run is not None

    @property
    def _run(self) -> Any:
        return wandb.run

    def config(self, config: dict[str, Any]) -> None:
        self._run.config.update(config, allow_val_change=True)

    def image(self, key: str, png: bytes, step: int) -> None:
        self._run.log({key: wandb.Image(PIL.Image.open(io.BytesIO(png))), "train/global_step": step})

    def table(self, key: str, columns: list[str], rows: list[list], step: int) -> None:
        rows = [[_pillow(cell, wandb.Image) for cell in row] for row in rows]
        self._run.log({key: wandb.Table(columns=columns, data=rows)})

    def heldout(self, key: str, score: float, step: int) -> None:
        self._run.log({key: score, "train/global_step": step})

    def summary(self, summary: dict[str, Any]) -> None:
        self._run.summary.update(summary)

    def result(self, result: dict[str, Any], step: int) -> None:
        self._run.summary.update(result)

    def report(self, directory: Path) -> None:
        artifact = wandb.Artifact(f"grades-{self._run.id}", type="grades-report")
        artifact.add_dir(str(directory))
        self._run.log_artifact(artifact)


class _TensorBoard:
    """Images, texts and scalars; it has no config, no summary and no artifacts."""

    def __init__(self, callback: TensorBoardCallback):
        self._callback, self._own = callback, None

    @property
    def is_on(self) -> bool:
        return self._callback.logging_dir is not None  # since training began

    @property
    def _writer(self) -> Any:
        # The callback closes its own at the end of training, before scores and report are there.
        if self._callback.tb_writer is not None:
            return self._callback.tb_writer
        if self._own is None:
            self._own = self._callback._SummaryWriter(log_dir=self._callback.logging_dir)
        return self._own

    def config(self, config: dict[str, Any]) -> None:
        rows = [[group, name, value] for group, of in config.items() for name, value in _entries(of)]
        self.table("arguments", ["group", "argument", "value"], rows, 0)

    def image(self, key: str, png: bytes, step: int) -> None:
        self._writer.add_image(key, np.asarray(_pillow(png).convert("RGB")), step, dataformats="HWC")
        self._writer.flush()

    def table(self, key: str, columns: list[str], rows: list[list], step: int) -> None:
        for number, row in enumerate(rows):
            for cell in row:
                if isinstance(cell, bytes):
                    self.image(f"{key}/{number}", cell, step)
        shown = [["see images" if isinstance(cell, bytes) else cell for cell in row] for row in rows[:MAX_TEXT_ROWS]]
        self._writer.add_text(key, markdown(columns, shown), step)
        self._writer.flush()

    def heldout(self, key: str, score: float, step: int) -> None:
        """It comes with `trainer.log`."""

    def summary(self, summary: dict[str, Any]) -> None:
        """There is no place for it."""

    def result(self, result: dict[str, Any], step: int) -> None:
        for key, value in result.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(key, value, step)
        self.table("result", ["field", "value"], [list(item) for item in result.items()], step)

    def report(self, directory: Path) -> None:
        """There are no artifacts; the folder is beside the run."""


class _Trackio:
    """Config, scalars, images and tables. Its callback ends the run with training; what comes later resumes it."""

    def __init__(self, project: str, name: str | None):
        self._project, self._name = project, name

    @property
    def is_on(self) -> bool:
        return "trackio" in sys.modules  # its callback has imported it

    def _run(self) -> Any:
        trackio = sys.modules["trackio"]
        run = trackio.context_vars.current_run.get()
        if run is None:
            trackio.init(project=self._project, name=self._name, resume="allow")
        else:
            self._name = run.name
        return trackio

    def config(self, config: dict[str, Any]) -> None:
        self._run().config.update(config, allow_val_change=True)

    def image(self, key: str, png: bytes, step: int) -> None:
        trackio = self._run()
        trackio.log({key: trackio.Image(_pillow(png)), "train/global_step": step})

    def table(self, key: str, columns: list[str], rows: list[list], step: int) -> None:
        trackio = self._run()
        rows = [[_pillow(cell, trackio.Image) for cell in row] for row in rows]
        trackio.log({key: trackio.Table(columns=columns, data=rows)})

    def heldout(self, key: str, score: float, step: int) -> None:
        """It comes with `trainer.log`."""

    def summary(self, summary: dict[str, Any]) -> None:
        """There is no place for it."""

    def result(self, result: dict[str, Any], step: int) -> None:
        self._run().log({**result, "train/global_step": step})

    def report(self, directory: Path) -> None:
        """The folder is beside the run."""


def _pillow(cell: Any, wrap: Any = lambda image: image) -> Any:
    """An image in bytes as Pillow knows it, in what a logger wraps it in; everything else as it is."""
    return wrap(PIL.Image.open(io.BytesIO(cell))) if isinstance(cell, bytes) else cell


def _entries(settings: Any) -> list[tuple[str, Any]]:
    return list(settings.items()) if isinstance(settings, dict) else [("", settings)]


def markdown(columns: list[str], rows: list[list]) -> str:
    """A table in Markdown, each row on its line."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def result_fields(result: Any) -> dict[str, Any]:
    """The numbers that runs are compared by, the same for runs with GradES and without.

    Args:
        result (`RunResult`): of a finished run.

    Returns:
        `dict[str, Any]`: `test_loss`, `validation_loss`, `exact_match`, `steps`, `fraction_of_schedule`, `seconds`,
            `flops` (fraction of a baseline over the whole schedule), `frozen_fraction`, `peak_memory_mib` and
            `stop_reason`; `None` where a run has no such number.
    """
    scores, tracked = result.results, len(result.tracked)
    return {
        "test_loss": scores.get("final/test_loss"),
        "validation_loss": scores.get("final/validation_loss"),
        "exact_match": scores.get("final/exact_match", scores.get("final/exact_match_test")),
        "steps": result.steps,
        "fraction_of_schedule": result.steps / result.total_steps,
        "seconds": result.seconds.total,
        "flops": result.flops,
        "frozen_fraction": result.frozen / tracked if tracked else 0.0,
        "peak_memory_mib": result.peak_memory_mib,
        "stop_reason": result.stop_reason,
    }
