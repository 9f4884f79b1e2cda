"""`metric="schedule"`: matrices freeze at given steps. Replaying a run, bottom-up, random, a tower from the start."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor

from grades_trl.model.matrices import WeightMatrix

from .base import Converged, Criterion

logger = logging.getLogger(__name__)


class Schedule(Criterion):
    """
    Freezes each matrix at its step. Measures nothing.

    Args:
        schedule (`str` or `dict[str, int]`): the `events.jsonl` of another run; or a mapping from the name of a
            matrix, a pattern of names, or a tower to a step. Where several entries fit a matrix, the last one counts.

    Raises:
        ValueError: an entry fits no matrix of the model, or the file is no list of freeze events.
    """

    defaults = {"schedule": None}  # noqa: RUF012

    def __init__(self, matrices: dict[str, WeightMatrix], total_steps: int, *, schedule: str | dict[str, int]):
        super().__init__(matrices, total_steps)
        entries = schedule if isinstance(schedule, dict) else read_events(Path(schedule))
        self.steps: dict[str, int] = {}  # matrix -> step
        for entry, step in entries.items():
            fitting = [
                name for name, matrix in matrices.items() if entry in (name, matrix.tower) or fnmatchcase(name, entry)
            ]
            if not fitting:
                raise ValueError(
                    f"The schedule freezes {entry!r}, which is no matrix, tower or pattern of matrices that this "
                    f"model trains; it trains {len(matrices)}, {next(iter(matrices))} among them."
                )
            self.steps |= dict.fromkeys(fitting, step)
        late = [name for name, step in self.steps.items() if step > total_steps]
        if late:
            logger.warning(
                f"{len(late)} of the {len(self.steps)} matrices of the schedule never "
                f"{'freezes: its step is' if len(late) == 1 else 'freeze: their steps are'} after the last one, "
                f"{total_steps}; that of {late[0]} is {self.steps[late[0]]}."
            )

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"steps": self.steps}, {}

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for name in [*self.steps, *state["steps"]]:
            before, now = state["steps"].get(name), self.steps.get(name)
            if before != now:
                when = ["never" if step is None else f"at step {step}" for step in (before, now)]
                raise ValueError(
                    f"The checkpoint was written with a schedule that freezes {name} {when[0]}, and this one freezes "
                    f"it {when[1]}: resume with the same schedule. It cannot change in a run, which would be neither."
                )

    def update(self, step: int, live: Collection[str], grad_scale: float) -> list[Converged]:
        # A step that was missed (a run that starts late) counts, too.
        return [Converged(name, "schedule") for name in live if self.steps.get(name, step + 1) <= step]


def read_events(path: Path) -> dict[str, int]:
    """Matrix -> step, from the `events.jsonl` of a run.

    Raises:
        ValueError: a line is no freeze event; it is named.
    """
    steps: dict[str, int] = {}
    for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
        try:
            event: Any = json.loads(line)
            name, step = event["matrix"], event["step"]
            if event.get("unfrozen") or type(step) is not int or step < 1:
                raise ValueError("a schedule freezes only, at whole steps from 1 on")
            steps[name] = step
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f'{path}, line {number}: expected a freeze event, {{"matrix": ..., "step": ...}}, found {line[:80]!r}.'
            ) from error
    return steps
