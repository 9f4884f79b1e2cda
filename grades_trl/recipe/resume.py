"""`--resume auto`: a run goes on from the newest whole checkpoint of its output folder, or starts.

`settings.json` in the output folder says which run it holds.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from trl import ModelConfig, SFTConfig

from grades_trl.config import GradESConfig
from grades_trl.recipe.arguments import RecipeArguments
from grades_trl.recipe.other_settings import refuse_another_run_than
from grades_trl.report.strict_json import write_json
from grades_trl.trainers.whole_checkpoint import newest_whole, what_is_wrong

logger = logging.getLogger(__name__)

SETTINGS = "settings.json"
# Settings that begin like this make no other run: where it is written and shown, how often it is saved, what is asked
# after training, and on what it runs. (hub_ has tokens.)
NOT_OF_THE_RUN = (
    *("resume", "output_dir", "overwrite", "run_name", "report_to", "project", "trackio", "log", "disable_tqdm"),
    *("save_", "hub_", "push_to_hub", "num_eval_generations", "num_samples", "max_new_tokens"),
    *("backend", "use_cpu", "dataloader_", "dataset_num_proc", "local_rank"),
)


def set_up_resume(recipe: RecipeArguments, training: SFTConfig, model_args: ModelConfig, grades: GradESConfig) -> None:
    """Puts the checkpoint to go on from into `training.resume_from_checkpoint` (`None`: the run starts), and writes
    down which run the output folder holds. Arguments as [`arguments.parse`] gives them.

    `auto` and `true` take the newest whole checkpoint of the output folder, and go on with the settings that the run
    had: a job that is submitted again is the same run. Everything else is the folder of a checkpoint, and settings
    that may change take effect (see `other_settings.py` and `GradESConfig`).

    Raises:
        ValueError: both flags are given; the checkpoint is not whole, or there is none; the output folder holds a run
            with another model, other data or settings, or one that is not known; a setting has changed that may not.
    """
    given = [str(value) for value in (recipe.resume, training.resume_from_checkpoint) if value is not None]
    if len(given) > 1:
        raise ValueError("--resume and --resume_from_checkpoint mean the same: give one of them.")
    output_dir = Path(training.output_dir)
    wanted = given[0] if given else "false"
    settings = _settings(recipe, training, model_args, grades)
    checkpoint: Path | None = None
    if wanted.lower() in ("auto", "true"):
        _refuse_another_run(output_dir, settings)
        checkpoint = newest_whole(output_dir, recipe.grades)
        if checkpoint is None:
            logger.info(f"There is no whole checkpoint in {output_dir}: the run starts.")
        else:
            logger.info(f"The run goes on from {checkpoint}.")
    elif wanted.lower() in ("false", "none", ""):
        if any(output_dir.glob("checkpoint-*")) and (output_dir / SETTINGS).exists():
            _refuse_another_run(output_dir, settings)  # its checkpoints would pass for those of this run
    else:
        checkpoint = Path(wanted)
        if not checkpoint.is_dir():
            raise ValueError(
                f"--resume {wanted}: there is no such folder; expected that of a checkpoint, or auto for the newest "
                f"one in {output_dir}."
            )
        wrong = what_is_wrong(checkpoint, recipe.grades)
        if wrong is not None:
            without = " A run with GradES goes on from the checkpoints of one." if "GradES" in wrong else ""
            raise ValueError(
                f"--resume {wanted}: {wrong}, so the run would go on with other weights than it had.{without} Take "
                f"the newest whole checkpoint with --resume auto, or start a run from these weights with "
                f"--model_name_or_path {wanted}."
            )
        record = checkpoint.parent / SETTINGS
        refuse_another_run_than(checkpoint, settings, record, grades if recipe.grades else None)
    recipe.resume, training.resume_from_checkpoint = None, None if checkpoint is None else str(checkpoint)
    if recipe.preview:  # it is no run, and what it is asked with would pass for the settings of one
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / SETTINGS, settings)


def _settings(
    recipe: RecipeArguments, training: SFTConfig, model_args: ModelConfig, grades: GradESConfig
) -> dict[str, Any]:
    """All settings that make the run, as JSON gives them back."""
    everything = dataclasses.asdict(model_args) | training.to_dict() | vars(recipe)
    everything |= dataclasses.asdict(grades) if recipe.grades else {}
    of_the_run = {name: value for name, value in everything.items() if not name.startswith(NOT_OF_THE_RUN)}
    return json.loads(json.dumps(of_the_run, default=str))


def _refuse_another_run(output_dir: Path, settings: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: `output_dir` holds a run with other settings, or checkpoints of an unknown run.
    """
    record = output_dir / SETTINGS
    if not record.exists():
        if any(output_dir.glob("checkpoint-*")):
            raise ValueError(
                f"{output_dir} has checkpoints, but no {SETTINGS} that says of which run: name the checkpoint to go "
                "on from (--resume FOLDER), or choose another --output_dir."
            )
        return
    before = json.loads(record.read_text("utf-8"))
    # A setting that only one version has makes no other run.
    changed = [name for name in settings if name in before and before[name] != settings[name]]
    if changed:
        shown = [f"{name} was {before[name]!r} and is {settings[name]!r}" for name in changed[:5]]
        more = f", and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise ValueError(
            f"{output_dir} holds another run: {', '.join(shown)}{more}. Choose another --output_dir, go on with the "
            "settings that it had, or delete that folder. Some settings may change where a checkpoint is named: "
            "--resume FOLDER."
        )
