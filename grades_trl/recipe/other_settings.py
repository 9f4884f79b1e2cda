"""`--resume FOLDER` with other flags than the run had: what may change, and what would be another run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grades_trl.config import GradESConfig
from grades_trl.resumed_settings import changed_settings
from grades_trl.trainers.checkpoint import read_values

# Settings of the trainer that begin like this take effect in a run that is resumed, and leave it the same run: how
# long it is, how it is validated, and what only costs time or memory. Those of GradES are in `GradESConfig`.
MAY_CHANGE = (
    *("max_steps", "num_train_epochs", "eval_", "do_eval", "per_device_eval_batch_size", "gradient_checkpointing"),
    *("early_stopping_patience", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "torch_"),
)


def changes(names: Sequence[str], before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What the first five settings were and are, and how many more there are."""
    shown = ", ".join(f"{name} was {before[name]!r} and is {now[name]!r}" for name in names[:5])
    return f"{shown}, and {len(names) - 5} more" if len(names) > 5 else shown


def refuse_another_run_than(
    checkpoint: Path, before: dict[str, Any], settings: dict[str, Any], grades: GradESConfig | None
) -> None:
    """
    Checks the settings of a run that goes on from a checkpoint that was named.

    Args:
        checkpoint (`Path`): its folder.
        before (`dict[str, Any]`): all settings that made the run that wrote it, by name; empty if they are not known.
        settings (`dict[str, Any]`): those of the run that goes on.
        grades (`GradESConfig` or `None`): of the run that goes on; `None` without GradES.

    Raises:
        ValueError: one has changed that may not; with its values.
    """
    own = {field.name for field in dataclasses.fields(GradESConfig)}
    changed = [
        name
        for name, value in settings.items()
        if name in before and before[name] != value and name not in own and not name.startswith(MAY_CHANGE)
    ]
    if "grades" in changed:
        has, goes_on = ("GradES", "without") if before["grades"] else ("no GradES", "with it")
        raise ValueError(
            f"--resume {checkpoint}: the run had {has} and would go on {goes_on}: it would be neither. Start the "
            "other run from the beginning, in another --output_dir and without --resume."
        )
    if changed:
        raise ValueError(
            f"--resume {checkpoint} is of another run: {changes(changed, before, settings)}. These "
            f"cannot change in a run: go on with what it had, or start one from these weights with "
            f"--model_name_or_path {checkpoint}."
        )
    if grades is not None:
        changed_settings(read_values(checkpoint), grades)
