"""What a recipe adds to the record of its run: all its arguments, and answers before and after training."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from trl import ModelConfig, SFTConfig

from grades_trl.config import GradESConfig
from grades_trl.recipe.arguments import RecipeArguments
from grades_trl.recipe.generation import text_of
from grades_trl.recipe.places import this_command
from grades_trl.recipe.secret import is_secret, without_secrets
from grades_trl.report.recipe_facts import Sample, thumbnail
from grades_trl.report.strict_json import jsonable
from grades_trl.report.tracking import Tracker


def record_arguments(trainer: Any, recipe: RecipeArguments, model_args: ModelConfig) -> None:
    """Tells the loggers of a run all its arguments when training begins.

    Args:
        trainer: not trained yet.
        recipe (`RecipeArguments`), model_args (`ModelConfig`): as [`arguments.parse`] gave them.
    """
    arguments = resolved_arguments(trainer, recipe, model_args)
    trainer.args.run_name = trainer.args.run_name or Path(trainer.args.output_dir).name
    trainer.add_callback(_LogArguments(trainer, arguments))


class _LogArguments(TrainerCallback):
    def __init__(self, trainer: Any, arguments: dict[str, Any]):
        self._trainer, self._arguments = trainer, arguments

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            Tracker.of(self._trainer).log_config(self._arguments)


def resolved_arguments(trainer: Any, recipe: RecipeArguments, model_args: ModelConfig) -> dict[str, dict[str, Any]]:
    """Group -> argument -> value, defaults included, as JSON knows them. Tokens and passwords are left out.

    Args:
        trainer: with `args` and `grades_config`.
        recipe (`RecipeArguments`), model_args (`ModelConfig`): as [`arguments.parse`] gave them.
    """
    return arguments_of(recipe, model_args, trainer.args, trainer.grades_config)


def arguments_of(
    recipe: RecipeArguments, model_args: ModelConfig, training: SFTConfig, grades: GradESConfig | None
) -> dict[str, dict[str, Any]]:
    """As `resolved_arguments`, before there is a trainer. `grades` is `None` for the baseline."""
    groups = {"recipe": asdict(recipe), "model": asdict(model_args), "training": training.to_dict()}
    if grades is not None:
        groups["grades"] = asdict(grades)
    return {
        group: jsonable({name: value for name, value in of.items() if not is_secret(name)})
        for group, of in groups.items()
    }


def command_line() -> str:
    """The command of this process, for a shell, without secrets."""
    return shlex.join([*this_command(), *public_argv()[1:]])


def public_argv() -> list[str]:
    """`sys.argv`, with `***` for every value of a flag that is a secret."""
    return without_secrets(sys.argv)


def samples_of(rows: Dataset, before: list[str], after: list[str]) -> list[Sample]:
    """Prompts with the answers of a model, for the report.

    Args:
        rows (`Dataset`): with `prompt` and `completion`, and `images` if there are any.
        before (`list[str]`), after (`list[str]`): the answers, one per row.
    """
    return [
        Sample(
            text_of(row["prompt"]),
            text_of(row["completion"]),
            first,
            last,
            thumbnail(row["images"][0]) if row.get("images") else None,
        )
        for row, first, last in zip(rows, before, after, strict=True)
    ]
