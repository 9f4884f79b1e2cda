"""What the engine tells: the record of one freeze, or of its end, which the report writes and a schedule reads back;
and of a setting that has changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FreezeEvent:
    """
    One weight matrix was frozen, or trains again.

    Attributes:
        step (`int`): optimizer step, counted from 1. The update of this step is the first one that was not applied.
            Where the matrix trains again, that of the next step is the first one that is applied.
        matrix (`str`): name of the matrix, as in `GradES.matrices`.
        layer (`int`): index of its layer; -1 outside the layers (projectors).
        role (`str`): what it is in its layer, e.g. `"q_proj"`.
        tower (`str`): `"language"`, `"vision"`, `"audio"` or `"projector"`.
        value (`float` or `None`): the metric value that was compared with `tau`. `None` if nothing was measured, as
            in a schedule.
        tau (`float` or `None`): the threshold that the value was below. `None` if there was none.
        params (`int`): number of trainable elements of the matrix.
        frozen (`int`): number of matrices that are frozen now.
        total (`int`): number of matrices that are tracked.
        reason (`str`): why, e.g. `"grad_change below tau"` or `"schedule"`.
        unfrozen (`bool`): the matrix trains again.
    """

    step: int
    matrix: str
    layer: int
    role: str
    tower: str
    value: float | None
    tau: float | None
    params: int
    frozen: int
    total: int
    reason: str
    unfrozen: bool = False


@dataclass(frozen=True)
class SettingChange:
    """
    A setting that a resumed run has changed.

    Attributes:
        step (`int`): the first optimizer step that the new value holds for.
        setting (`str`): its name in `GradESConfig`, or `"total_steps"`.
        before, after: its values.
    """

    step: int
    setting: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.setting} is {self.after} from step {self.step} on, and was {self.before}"
