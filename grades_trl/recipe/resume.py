"""`--resume auto`: a run goes on from the newest whole checkpoint of its output folder, starts, or had finished.

`arguments.json` in the output folder says which run it holds.
"""

from __future__ import annotations

import json
import logging
import shlex
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import sort_checkpoints
from trl import ModelConfig, SFTConfig

from grades_trl.config import GradESConfig
from grades_trl.distributed import decided_by_main
from grades_trl.recipe.arguments import RecipeArguments
from grades_trl.recipe.folder_lock import lock
from grades_trl.recipe.other_settings import changes, refuse_another_run_than
from grades_trl.recipe.places import command_of
from grades_trl.recipe.record import arguments_of, command_line
from grades_trl.report.strict_json import write_json
from grades_trl.trainers.whole_checkpoint import SAVING, newest_whole, what_is_wrong

logger = logging.getLogger(__name__)

ARGUMENTS = "arguments.json"
# Settings that begin like this make no other run: where it is written and shown, how often it is saved, what is asked
# after training, and on what it runs. (hub_ has tokens.)
NOT_OF_THE_RUN = (
    *("resume", "output_dir", "overwrite", "run_name", "report_to", "project", "trackio", "log", "disable_tqdm"),
    *("save_", "hub_", "push_to_hub", "num_eval_generations", "num_samples", "max_new_tokens", "export"),
    *("backend", "use_cpu", "dataloader_", "dataset_num_proc", "local_rank", "preview", "plan"),
)


class RecordRun(TrainerCallback):
    """
    Writes down which run the output folder holds, and removes what another has left: after the first step, so that a
    run that is refused leaves the folder as it was.

    Args:
        output_dir (`str`): of the run.
        arguments (`dict`): as [`record.arguments_of`] gives them.
        starts (`bool`): the run goes on from no checkpoint.
    """

    def __init__(self, output_dir: str, arguments: dict[str, Any], starts: bool):
        self._output_dir, self._arguments, self._starts = Path(output_dir), arguments, starts
        self._written = False

    def write(self) -> None:
        """Writes it, once."""
        if self._written:
            return
        self._written = True
        shutil.rmtree(self._output_dir / SAVING, ignore_errors=True)  # of a process that was killed
        if self._starts:
            (self._output_dir / "result.json").unlink(missing_ok=True)  # of another run
        write_json(self._output_dir / ARGUMENTS, {"command": command_line(), **self._arguments})

    def on_step_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.write()

    def on_train_end(self, args, state, control, **kwargs):  # nothing was left to train
        self.on_step_end(args, state, control)


def set_up_resume(
    recipe: RecipeArguments, training: SFTConfig, model_args: ModelConfig, grades: GradESConfig
) -> RecordRun | None:
    """Puts the checkpoint to go on from into `training.resume_from_checkpoint` (`None`: the run starts), and locks the
    output folder. Arguments as [`arguments.parse`] gives them. Of several processes, the main one reads the folder,
    and all go on from what it has found.

    `auto` and `true` take the newest whole checkpoint of the output folder, and go on with the settings that the run
    had: a job that is submitted again is the same run. Everything else is the folder of a checkpoint, and settings
    that may change take effect (see `other_settings.py` and `GradESConfig`).

    Returns:
        [`RecordRun`]: a callback for the trainer. `None` if nothing is to be done: with `auto` or `true`, the run has
            finished already, as when a job is requeued. That is said.

    Raises:
        ValueError: both flags are given; the checkpoint is not whole, or there is none; the output folder holds a run
            with another model, other data or settings, or one that is not known; a setting has changed that may not;
            another process trains into it.
    """
    arguments = arguments_of(recipe, model_args, training, grades if recipe.grades else None)

    def find() -> tuple[bool, str | None]:
        goes_on = _set_up(recipe, training, grades, arguments)
        return goes_on, training.resume_from_checkpoint

    goes_on, checkpoint = decided_by_main(find)
    recipe.resume, training.resume_from_checkpoint = None, checkpoint
    return RecordRun(training.output_dir, arguments, starts=checkpoint is None) if goes_on else None


def _set_up(recipe: RecipeArguments, training: SFTConfig, grades: GradESConfig, arguments: dict[str, Any]) -> bool:
    given = [str(value) for value in (recipe.resume, training.resume_from_checkpoint) if value is not None]
    if len(given) > 1:
        raise ValueError("--resume and --resume_from_checkpoint mean the same: give one of them.")
    output_dir = Path(training.output_dir)
    writes = not recipe.preview
    if writes and output_dir.is_dir():
        lock(output_dir)
    wanted = given[0] if given else "false"
    checkpoint: Path | None = None
    if wanted.lower() in ("auto", "true"):
        _refuse_another_run(output_dir, arguments)
        if _record(output_dir).get("finished") and not recipe.preview:
            _say_that_it_has_finished(output_dir, recipe.export)
            return False
        checkpoint = newest_whole(output_dir, recipe.grades)
        if checkpoint is None:
            logger.info(f"There is no whole checkpoint in {output_dir}: the run starts.")
        else:
            logger.info(f"The run goes on from {checkpoint}.")
    else:
        if wanted.lower() not in ("false", "none", ""):
            checkpoint = Path(wanted)
            _refuse_part(checkpoint, output_dir, recipe.grades)
            before = _of_the_run(_record(checkpoint.parent))
            refuse_another_run_than(checkpoint, before, _of_the_run(arguments), grades if recipe.grades else None)
        if _record(output_dir) and _other_checkpoints(output_dir, checkpoint):
            _refuse_another_run(output_dir, arguments)  # its checkpoints would pass for those of this run
    training.resume_from_checkpoint = None if checkpoint is None else str(checkpoint)
    if writes:
        lock(output_dir)
    return True


def mark_finished(training: SFTConfig) -> None:
    """Writes down that all of a run is done: training, scores, exports, the upload. For the main process."""
    output_dir = Path(training.output_dir)
    write_json(output_dir / ARGUMENTS, _record(output_dir) | {"finished": True})


def _other_checkpoints(output_dir: Path, checkpoint: Path | None) -> list[Path]:
    """Those in a folder that a run from `checkpoint`, or from the start, has not come from."""
    found = [Path(path).resolve() for path in sort_checkpoints(str(output_dir))]
    own = None if checkpoint is None else checkpoint.resolve()
    return found[found.index(own) + 1 :] if own in found else found


def _say_that_it_has_finished(output_dir: Path, export: list[str] | None) -> None:
    print(f"This run has finished: {output_dir} has its model and its result.json.")
    if export:
        command = shlex.join([*command_of("export"), str(output_dir), "--export", *export])
        print(f"What --export asks for is written by:\n  {command}")


def _record(output_dir: Path) -> dict[str, Any]:
    """What the output folder holds; empty if it does not say."""
    path = output_dir / ARGUMENTS
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def _refuse_part(checkpoint: Path, output_dir: Path, with_grades: bool) -> None:
    """
    Raises:
        ValueError: it is no checkpoint, or not a whole one.
    """
    if not checkpoint.is_dir():
        raise ValueError(
            f"--resume {checkpoint}: there is no such folder; expected that of a checkpoint, or auto for the newest "
            f"one in {output_dir}."
        )
    wrong = what_is_wrong(checkpoint, with_grades)
    if wrong is not None:
        without = " A run with GradES goes on from the checkpoints of one." if "GradES" in wrong else ""
        raise ValueError(
            f"--resume {checkpoint}: {wrong}, so the run would go on with other weights than it had.{without} Take "
            f"the newest whole checkpoint with --resume auto, or start a run from these weights with "
            f"--model_name_or_path {checkpoint}."
        )


def _of_the_run(arguments: dict[str, Any]) -> dict[str, Any]:
    """All settings that make the run, of all groups."""
    groups = [group for group in arguments.values() if isinstance(group, dict)]
    settings = {name: value for group in groups for name, value in group.items()}
    return {name: value for name, value in settings.items() if not name.startswith(NOT_OF_THE_RUN)}


def _refuse_another_run(output_dir: Path, arguments: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: `output_dir` holds a run with other settings, or checkpoints of an unknown run.
    """
    record = _record(output_dir)
    if not record:
        if any(output_dir.glob("checkpoint-*")):
            raise ValueError(
                f"{output_dir} has checkpoints, but no {ARGUMENTS} that says of which run: name the checkpoint to go "
                "on from (--resume FOLDER), or choose another --output_dir."
            )
        return
    before, settings = _of_the_run(record), _of_the_run(arguments)
    # A setting that only one version has makes no other run.
    changed = [name for name in settings if name in before and before[name] != settings[name]]
    if changed:
        raise ValueError(
            f"{output_dir} holds another run: {changes(changed, before, settings)}. Choose another "
            "--output_dir, go on with the settings that it had, or delete that folder. "
            "Some settings may change where a checkpoint is named: "
            "--resume FOLDER."
        )
