"""`stopping="heldout_loss"`: the run ends when the held-out loss of the averaged weights has stopped improving."""

from __future__ import annotations

import math
from typing import Any

from .base import StoppingRule

MAX_MEASUREMENTS = 20
MIN_SAMPLES = 16
# A forward pass costs a third of a training step on the same row: backward is two more.
FORWARD_SHARE = 1 / 3
MIN_FORWARD_PASSES = 64  # of a row, which a run may use even where `cost` allows fewer,
MAX_SHORT_RUN_COST = 0.05  # if they are at most this fraction of its training FLOPs


class HeldoutLoss(StoppingRule):
    """
    Counts measurements without a new lowest held-out loss.

    A loss that is not finite is no measurement: it neither improves nor counts as "no improvement".

    Args:
        total_steps (`int`): optimizer steps of the whole schedule.
        every (`int` or `None`): optimizer steps between measurements; `ceil(total_steps / 20)` if not given.
        patience (`int`): measurements without a new lowest loss that end the run.
        grace (`float`): fraction of all steps before the first measurement.
        cost (`float`), samples (`int`): see [`plan`].

    Attributes:
        every (`int`): steps between measurements.
        first_step (`int`): the first step in which the loss is measured.
        loss (`float` or `None`): the last one measured.
        best_loss (`float`), best_step (`int`): the lowest one, and when it was measured.
        evals_since_best (`int`): measurements since then.
        measurements (`int`): how many there were.
    """

    defaults = {"every": None, "patience": 2, "grace": 0.1, "cost": 0.02, "samples": 128}  # noqa: RUF012

    def __init__(self, total_steps: int, **settings: Any):
        super().__init__(total_steps)
        self.every: int = settings["every"] or math.ceil(total_steps / MAX_MEASUREMENTS)
        self.patience: int = settings["patience"]
        self.first_step = first_measurement(total_steps, self.every, settings["grace"])
        self.loss: float | None = None
        self.best_loss, self.best_step = math.inf, 0
        self.evals_since_best = self.measurements = 0

    def update(self, step: int, loss: float) -> bool:
        """Takes in a held-out loss, in nats per token, and returns whether it is the lowest one so far."""
        if not math.isfinite(loss):
            return False
        self.loss = loss
        self.measurements += 1
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.evals_since_best = loss, step, 0
            return True
        self.evals_since_best += 1
        if self.evals_since_best >= self.patience:
            self.reason = "held-out loss stopped improving"
        return False

    def state_dict(self) -> dict[str, Any]:
        names = ("loss", "best_loss", "best_step", "evals_since_best", "measurements", "reason")
        state = {name: getattr(self, name) for name in names}
        return state | {"best_loss": self.best_loss if math.isfinite(self.best_loss) else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.best_loss = math.inf if state["best_loss"] is None else state["best_loss"]


def first_measurement(total_steps: int, every: int, grace: float) -> int:
    """The first multiple of `every` that does not come before the end of the grace period."""
    grace_steps = math.ceil(round(grace * total_steps, 9))
    return max(1, math.ceil(grace_steps / every)) * every


def plan(settings: dict[str, Any], total_steps: int, rows_per_step: int, available: int) -> tuple[int, int]:
    """How many held-out rows a measurement takes, and how many optimizer steps lie between measurements.

    All measurements together, with the one at the end of the schedule, may cost `cost` of the training FLOPs, a
    forward pass being a third of a training step on the same row; or 64 forward passes, where that is more and at
    most 5 %. They are spread over at most 20 measurements of at most `samples` rows and, unless `samples` or the data
    say so, of no fewer than 16. An interval that is set is kept; then the rows follow from it.

    Args:
        settings (`dict`): `every`, `patience`, `grace`, `cost` and `samples`.
        total_steps (`int`): optimizer steps of the whole schedule.
        rows_per_step (`int`): training rows per optimizer step.
        available (`int`): held-out rows.

    Returns:
        `tuple[int, int]`: rows and steps; an interval longer than the schedule where the budget does not pay for the
        measurements that it takes to end a run (`patience` more than the first).
    """
    training_rows = total_steps * rows_per_step
    budget = settings["cost"] * training_rows / FORWARD_SHARE  # in forward passes of a row
    if MAX_SHORT_RUN_COST * training_rows >= MIN_FORWARD_PASSES * FORWARD_SHARE:
        budget = max(budget, MIN_FORWARD_PASSES)
    most = min(settings["samples"], available)

    def measurements(every: int) -> int:
        """In the whole schedule, and one more of the last weights."""
        first = first_measurement(total_steps, every, settings["grace"])
        return max(0, (total_steps - first) // every + 1) + 1

    if settings["every"] is not None:
        return max(1, min(most, int(budget / measurements(settings["every"])))), settings["every"]
    rows = min(max(MIN_SAMPLES, int(budget / MAX_MEASUREMENTS)), most)
    for every in range(math.ceil(total_steps / MAX_MEASUREMENTS), total_steps + 1):
        count = measurements(every)
        if count * rows <= budget:
            # The last of them is of the last weights, at the end of the schedule.
            return rows, every if count - 1 > settings["patience"] else total_steps + 1
    return rows, total_steps + 1
