"""Everything that this project writes to Weights & Biases, beside the scalars that go through `trainer.log`."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grades_trl.extras import how_to_install, installed

if installed("wandb"):
    import PIL.Image
    import wandb

logger = logging.getLogger(__name__)


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
    if not os.environ.get("WANDB_MODE") and not wandb.login(prompt=False):
        os.environ["WANDB_MODE"] = "offline"
        wandb.teardown()  # login() has read the environment; init() must read it again
        folder = os.environ["WANDB_DIR"]
        logger.info(f"W&B: not logged in, recording offline. Later: wandb login; wandb sync {folder}/wandb/*")
    return run_name or Path(output_dir).name


def finish() -> None:
    """Ends the run, if there is one: what is recorded is complete when this returns."""
    if installed("wandb") and wandb.run is not None:
        wandb.finish()


def log_comparison(scores: dict[str, dict[str, float]], report_to: Sequence[str]) -> None:
    """Scores of several models: each as `<model>/<score>` in the summary of a run, and all as the table
    `evaluate/scores`, a row for each score and a column for each model. Nothing is done without W&B.

    Args:
        scores (`dict[str, dict[str, float]]`): model -> score -> its value.
        report_to (`Sequence[str]`): as in the training arguments.
    """
    if "wandb" not in report_to:
        return
    run = wandb.run or wandb.init(name=os.environ.get("WANDB_NAME"))
    run.summary.update({f"{model}/{name}": value for model, found in scores.items() for name, value in found.items()})
    names = dict.fromkeys(name for found in scores.values() for name in found)
    rows = [[name, *(found.get(name) for found in scores.values())] for name in names]
    run.log({"evaluate/scores": wandb.Table(columns=["score", *scores], data=rows)})


class Tracker:
    """
    The W&B run of a trainer. Every method does nothing if the trainer does not report to W&B.

    The Trainer's own callback makes the run when training begins, and logs the scalars under `train/`. Here no
    `step=` is ever given: W&B would drop rows that are logged beside that callback.

    Args:
        report_to (`Sequence[str]`): as in the training arguments.
    """

    def __init__(self, report_to: Sequence[str]):
        self._enabled = "wandb" in report_to

    @property
    def _run(self) -> Any:
        return wandb.run if self._enabled else None

    @property
    def is_on(self) -> bool:
        """Whether there is a run to write to."""
        return self._run is not None

    def log_settings(self, settings: dict[str, Any]) -> None:
        """The settings of GradES, under `grades` in the run's config."""
        if self._run is not None:
            self._run.config.update({"grades": settings}, allow_val_change=True)

    def log_figure(self, png: bytes, step: int) -> None:
        """A figure, under `grades/timeline`.

        Args:
            png (`bytes`): the figure as PNG.
            step (`int`): optimizer step that it shows.
        """
        self._log_image("grades/timeline", png, step)

    def log_gain(self, png: bytes, step: int) -> None:
        """The heatmap of the gain, under `grades/gain_heatmap`. Arguments as in `log_figure`."""
        self._log_image("grades/gain_heatmap", png, step)

    def _log_image(self, key: str, png: bytes, step: int) -> None:
        if self._run is not None:
            image = wandb.Image(PIL.Image.open(io.BytesIO(png)))
            self._run.log({key: image, "train/global_step": step})

    def log_table(self, columns: list[str], rows: list[list]) -> None:
        """One row per matrix, under `grades/matrices`."""
        if self._run is not None:
            self._run.log({"grades/matrices": wandb.Table(columns=columns, data=rows)})

    def log_summary(self, summary: dict[str, Any]) -> None:
        """The entries of `summary.json`, each under `grades/` in the run's summary: none may be called like a table or
        a figure."""
        if self._run is not None:
            self._run.summary.update({f"grades/{key}": value for key, value in summary.items()})

    def log_report(self, directory: Path) -> None:
        """The folder of the report, as an artifact; once more when something was added to it."""
        if self._run is not None:
            report = wandb.Artifact(f"grades-{self._run.id}", type="grades-report")
            report.add_dir(str(directory))
            self._run.log_artifact(report)

    def log_scores(self, scores: dict[str, float]) -> None:
        """The final scores, in the run's summary under their own names."""
        if self._run is not None:
            self._run.summary.update(scores)

    def log_samples(self, path: Path) -> None:
        """An image with prompts and answers, under `samples`."""
        if self._run is not None:
            self._run.log({"samples": wandb.Image(str(path))})
