"""`stopping="train_accuracy"`: the run ends when the accuracy on its training tokens has saturated.

For runs that are too short to pay for held-out measurements: trainers compute this accuracy anyway. Where examples are
repeated, further epochs stop helping when they are memorized, and the training token accuracy says when that is
(arXiv 2602.11149).
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from .base import StoppingRule

SATURATED = 0.99
# Of the schedule. The last quarter of 60 steps with 8 rows holds thousands of tokens: an accuracy of 0.98 is told from
# one of 0.99. No fewer steps than 8.
WINDOW, MIN_WINDOW = 1 / 4, 8
# Errors have stopped falling if this fraction of those of the quarter before is left, with so many standard errors to
# be sure. Simulated with one hard token in 200 that gets from 50 to 95 % right over the run, 1 % of the runs end
# early; without standard errors it is half of them.
STILL_THERE, STANDARD_ERRORS = 0.9, 2


class TrainAccuracy(StoppingRule):
    """
    Ends a run that predicts its training tokens, and has stopped getting better at it.

    That is so when all of them were right in the last quarter of the schedule's steps (at least 8); or when 99 % were,
    and the errors, less two standard errors, are at least 0.9 of those of the quarter before. A level alone would end
    a run in which nearly all tokens are easy, as in answers with a fixed form, and the few that count still improve.
    No run ends in the first half of its schedule. An accuracy that is not finite is left out.

    Attributes:
        window (`int`): steps that are looked at.
        first_step (`int`): the first step after which the run can end.
    """

    def __init__(self, total_steps: int, **settings: Any):
        super().__init__(total_steps)
        self.window = max(MIN_WINDOW, math.ceil(total_steps * WINDOW))
        self.first_step = max(self.window, total_steps // 2 + 1)
        self.description = (
            f"when the accuracy on its training tokens, {100 * SATURATED:g} % or more over {self.window} steps, has "
            f"stopped rising, from step {self.first_step} on"
        )
        self._accuracies: list[float] = []

    def update(self, step: int, accuracy: float) -> None:
        """Takes in the accuracy on the training tokens of an optimizer step, from 0 to 1."""
        if not math.isfinite(accuracy):
            return
        self._accuracies = [*self._accuracies, accuracy][-2 * self.window :]
        if step < self.first_step or len(self._accuracies) < self.window:
            return
        errors = [1 - accuracy for accuracy in self._accuracies]
        before, now = errors[: -self.window], errors[-self.window :]
        none_is_left = max(now) == 0
        if none_is_left or (statistics.fmean(now) <= 1 - SATURATED and _stopped_falling(before, now)):
            self.reason = "training token accuracy saturated"

    def state_dict(self) -> dict[str, Any]:
        return {"accuracies": self._accuracies, "reason": self.reason}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._accuracies, self.reason = list(state["accuracies"]), state["reason"]


def _stopped_falling(before: list[float], now: list[float]) -> bool:
    """Whether the mean of the errors is what it was, as far as their noise lets tell."""
    if len(before) < len(now):
        return False
    noise = math.hypot(statistics.stdev(now), STILL_THERE * statistics.stdev(before)) / math.sqrt(len(now))
    return statistics.fmean(now) - STANDARD_ERRORS * noise >= STILL_THERE * statistics.fmean(before)
