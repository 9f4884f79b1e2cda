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
# one of 0.99. No fewer steps than 8, of which one half is compared with the other.
WINDOW, MIN_WINDOW = 1 / 4, 8


class TrainAccuracy(StoppingRule):
    """
    Ends a run that predicts its training tokens, and has stopped getting better at it.

    In the last quarter of the schedule's steps (at least 8) the mean accuracy is at least 0.99, and that of their
    second half is not above that of their first half. A level alone would end a run in which nearly all tokens are
    easy and the last few still improve; a plateau alone would end one that improves slowly. No run ends in the first
    half of its schedule. An accuracy that is not finite is left out.

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
        self._accuracies = [*self._accuracies, accuracy][-self.window :]
        if step < self.first_step or len(self._accuracies) < self.window:
            return
        half = self.window // 2
        earlier, later = self._accuracies[:half], self._accuracies[half:]
        rises = statistics.fmean(later) > statistics.fmean(earlier)
        if statistics.fmean(self._accuracies) >= SATURATED and not rises:
            self.reason = "training token accuracy saturated"

    def state_dict(self) -> dict[str, Any]:
        return {"accuracies": self._accuracies, "reason": self.reason}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._accuracies, self.reason = list(state["accuracies"]), state["reason"]
