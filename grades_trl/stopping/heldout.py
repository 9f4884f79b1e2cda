"""`stopping="heldout"`: the run ends when a score of held-out rows has stopped improving, at the averaged weights."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .base import StoppingRule

HELDOUT_METRICS = ("loss", "token_accuracy", "exact_match")
MAX_MEASUREMENTS = 20
MAX_UPDATES = 20  # of the average of the weights, about: an update costs no forward pass
MIN_SAMPLES = 16
# Measurements without improvement that end a run. One is enough where this fraction of the schedule lies between two:
# two of 20 measurements are as many steps apart.
PATIENCE, LONG_INTERVAL = 2, 1 / 10
# A forward pass costs a third of a training step on the same row: backward is two more.
FORWARD_SHARE = 1 / 3
# Forward passes of a row that a run may use even where `cost` allows fewer, if they cost at most this fraction of its
# training FLOPs. A schedule of this many epochs may overfit. It may use more, to end at the right moment.
MIN_FORWARD_PASSES, IF_ROWS_COME_BACK = 64, 128
EPOCHS_TO_OVERFIT = 1.5
MAX_SHORT_RUN_COST = 0.05


class HeldoutScore(StoppingRule):
    """
    Counts measurements without a new best held-out score.

    The lowest loss is the best; of the accuracies it is the highest. A score as good as the best one is no
    improvement. Of equal scores the one with the lower loss is the best, where the loss is known. A score that is not
    finite is no measurement: it neither improves nor counts as "no improvement". The same holds for an accuracy of 0
    as long as none was higher: the model has not begun to answer.

    Args:
        total_steps (`int`): optimizer steps of the whole schedule.
        metric (`str`): `"loss"`, `"token_accuracy"` or `"exact_match"`.
        every (`int` or `None`): optimizer steps between measurements; `ceil(total_steps / 20)` if not given.
        patience (`int` or `None`): measurements without a new best score that end the run; if not given 2, or 1 of
            the loss where a tenth of the schedule or more lies between two of them.
        grace (`float`): fraction of all steps before the first measurement.
        cost (`float`), samples (`int`): see [`plan`].

    Attributes:
        metric (`str`): what the score is.
        every (`int`): steps between measurements.
        first_step (`int`): the first step in which the score is measured.
        score (`float` or `None`): the last one measured.
        best_score (`float` or `None`), best_step (`int`): the best one, and when it was measured.
        evals_since_best (`int`): measurements since the score has improved.
        measurements (`int`): how many there were.
    """

    defaults = {  # noqa: RUF012
        "metric": "loss",
        "every": None,
        "patience": None,
        "grace": 0.1,
        "cost": 0.02,
        "samples": 128,
    }

    def __init__(self, total_steps: int, **settings: Any):
        super().__init__(total_steps)
        self._total_steps = total_steps
        self.metric: str = settings["metric"]
        self.every: int = settings["every"] or math.ceil(total_steps / MAX_MEASUREMENTS)
        self.patience: int = settings["patience"] or default_patience(self.metric, self.every, total_steps)
        self.first_step = first_measurement(total_steps, self.every, settings["grace"])
        count = "one measurement" if self.patience == 1 else f"{self.patience} measurements"
        self.description = f"after {count} without improvement"
        self.score: float | None = None
        self.best_score: float | None = None
        self.best_step = self.evals_since_best = self.measurements = 0
        self._loss_of_best = math.inf

    def update(self, step: int, score: float, loss: float = 0.0) -> bool:
        """Takes in a score.

        Args:
            step (`int`): of the measurement.
            score (`float`): a loss in nats per token, or a fraction of tokens or answers.
            loss (`float`, *optional*): of the same rows, where it is known; it decides between equal scores.

        Returns:
            `bool`: whether these weights are the best so far.
        """
        if not (math.isfinite(score) and math.isfinite(loss)):
            return False
        self.score = score
        self.measurements += 1
        is_best = self.best_score is None or self._rank(score, loss) > self._rank(self.best_score, self._loss_of_best)
        if self.best_score is None or self._rank(score) > self._rank(self.best_score):
            self.evals_since_best = 0
        elif self.metric == "loss" or self.best_score > 0:
            self.evals_since_best += 1
        if is_best:
            self.best_score, self._loss_of_best, self.best_step = score, loss, step
        self._update_reason()
        return is_best

    def is_due(self, step: int) -> bool:
        """Whether the score is measured in a step."""
        return step >= self.first_step and step % self.every == 0

    def updates_average(self, step: int) -> bool:
        """Whether the average takes in the weights of a step: those of each measurement, and of others, evenly spread
        between measurements that are far apart, so that a schedule has about 20 of them."""
        updates = min(self.every, max(1, round(self.every * MAX_UPDATES / self._total_steps)))
        return step * updates % self.every < updates

    def _update_reason(self) -> None:
        ended = self.evals_since_best >= self.patience
        self.reason = f"held-out {name_of(self.metric)} stopped improving" if ended else ""

    def is_below_best(self, score: float, loss: float = 0.0) -> bool:
        """Whether a score is worse than the best one, or no number."""
        if not (math.isfinite(score) and math.isfinite(loss)):
            return True
        return self.best_score is not None and self._rank(score, loss) < self._rank(
            self.best_score, self._loss_of_best
        )

    def _rank(self, score: float, loss: float = 0.0) -> tuple[float, float]:
        return (-score if self.metric == "loss" else score), -loss

    def state_dict(self) -> dict[str, Any]:
        names = ("metric", "score", "best_score", "best_step", "evals_since_best", "measurements")
        state = {name: getattr(self, name) for name in names}
        return state | {"loss_of_best": None if self.best_score is None else self._loss_of_best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave.

        Raises:
            ValueError: the state is of another metric.
        """
        if state["metric"] != self.metric:
            raise ValueError(
                f"The checkpoint was written with heldout_metric {state['metric']!r} and this run has "
                f"{self.metric!r}: resume with --heldout_metric {state['metric']}."
            )
        state = dict(state)
        loss = state.pop("loss_of_best")
        vars(self).update(state)
        self._loss_of_best = math.inf if loss is None else loss
        self._update_reason()  # the patience may be another one


def name_of(metric: str) -> str:
    """A metric in words: "token accuracy"."""
    return metric.replace("_", " ")


def default_patience(metric: str, every: int, total_steps: int) -> int:
    """Measurements without a new best score that end a run, if nothing else is set.

    The rows are always the same and the averaged weights move slowly, so that their loss is a smooth curve: one
    measurement above the lowest is enough where many steps lie between two of them (`dev/LOG.md`, 2026-11-28). An
    accuracy of few rows has few values, and two measurements are often equal.
    """
    return 1 if metric == "loss" and every >= LONG_INTERVAL * total_steps else PATIENCE


def first_measurement(total_steps: int, every: int, grace: float) -> int:
    """The first multiple of `every` that does not come before the end of the grace period."""
    grace_steps = math.ceil(round(grace * total_steps, 9))
    return max(1, math.ceil(grace_steps / every)) * every


class Plan(NamedTuple):
    """
    What is measured.

    Attributes:
        rows (`int`): held-out rows of a measurement.
        every (`int`): optimizer steps between measurements; more than the schedule has where they cannot be paid.
        cost (`float`): of all measurements in the whole schedule, as a fraction of the training FLOPs.
    """

    rows: int
    every: int
    cost: float


def plan(
    settings: dict[str, Any],
    total_steps: int,
    rows_per_step: int,
    available: int,
    passes_per_row: float = 1.0,
    rows_come_back: bool = False,
) -> Plan:
    """How many held-out rows a measurement takes, and how many optimizer steps lie between measurements.

    All measurements together, with the one at the end of the schedule, may cost `cost` of the training FLOPs, a
    forward pass being a third of a training step on the same row. Short runs may use 64 forward passes, and up to 128
    where the schedule has 1.5 epochs or more, if that is at most 5 %. They are spread over at most 20 measurements of
    at most `samples` rows and, unless `samples` or the data say so, of no fewer than 16. An interval that is set is
    kept; then the rows follow from it.

    Args:
        settings (`dict`): `every`, `patience`, `grace`, `cost` and `samples`.
        total_steps (`int`): optimizer steps of the whole schedule.
        rows_per_step (`int`): training rows per optimizer step.
        available (`int`): held-out rows.
        passes_per_row (`float`, *optional*, defaults to `1.0`): forward passes of a row that its score costs.
        rows_come_back (`bool`, *optional*, defaults to `False`): the schedule has 1.5 epochs or more.

    Returns:
        [`Plan`]: with an interval longer than the schedule where the budget does not pay for the first measurement,
        `patience` more (2 if not set), and the one of the last weights.
    """
    training_rows = total_steps * rows_per_step
    budget = settings["cost"] * training_rows / FORWARD_SHARE  # in forward passes of a row
    of_short_run = MAX_SHORT_RUN_COST * training_rows / FORWARD_SHARE
    if of_short_run >= MIN_FORWARD_PASSES:
        budget = max(budget, min(of_short_run, IF_ROWS_COME_BACK if rows_come_back else MIN_FORWARD_PASSES))
    budget /= passes_per_row  # in rows
    most = min(settings["samples"], available)

    def measurements(every: int) -> int:
        """In the whole schedule, and one more of the last weights."""
        first = first_measurement(total_steps, every, settings["grace"])
        return max(0, (total_steps - first) // every + 1) + 1

    def planned(rows: int, every: int) -> Plan:
        passes = measurements(every) * rows * passes_per_row
        return Plan(rows, every, passes * FORWARD_SHARE / training_rows)

    if settings["every"] is not None:
        every = settings["every"]
        return planned(max(1, min(most, int(budget / measurements(every)))), every)
    rows = min(max(MIN_SAMPLES, int(budget / MAX_MEASUREMENTS)), most)
    for every in range(math.ceil(total_steps / MAX_MEASUREMENTS), total_steps + 1):
        count = measurements(every)
        if count * rows <= budget:
            if count - 1 > (settings["patience"] or PATIENCE):  # the last of them is of the last weights, at the end
                return planned(rows, every)
            break
    return Plan(rows, total_steps + 1, 0.0)
