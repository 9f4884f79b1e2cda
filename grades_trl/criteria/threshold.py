"""A matrix has converged when a measured value is below a threshold: what the paper's metrics have in common."""

from __future__ import annotations

import math
import statistics
from abc import abstractmethod
from collections.abc import Collection
from typing import Any

from torch import Tensor

from grades_trl.model.matrices import WeightMatrix

from .base import Converged, Criterion
from .measurement import L1Measurement

# Fewer measurements than this are no level: a matrix that was hardly measured in the grace period (a tower without
# images, an expert without tokens) goes on collecting after it.
MIN_LEVEL_MEASUREMENTS = 3


class ThresholdCriterion(Criterion):
    """
    Freezes a matrix when `patience` consecutive values are below its threshold (arXiv 2509.01842, algorithm 1).

    Nothing freezes in the grace period of `ceil(alpha * total_steps)` steps, on its first measurement, or by a value
    that its own threshold was made of. A value that is not finite is no measurement: nothing about the matrix changes.

    Attributes:
        taus (`dict[str, float]`): matrix -> threshold. With `tau="auto"`, a matrix has none before the first
            measurement that its level is not made of.
    """

    metric = ""  # its name in `GradESConfig`, for the reason of a freeze
    compares = True  # with what it remembers of an earlier step
    defaults = {  # noqa: RUF012
        "tau": "auto",
        "auto_ratio": 0.5,
        "alpha": 0.55,
        "patience": 1,
        "measure_every": 1,
        "sample_fraction": 1 / 64,
    }

    def __init__(self, matrices: dict[str, WeightMatrix], total_steps: int, **settings: Any):
        super().__init__(matrices, total_steps)
        self.tau, self.auto_ratio, self.patience = settings["tau"], settings["auto_ratio"], settings["patience"]
        self.measure_every, self.sample_fraction = settings["measure_every"], settings["sample_fraction"]
        # The rounding guards against 0.55 * 100 being 55.00000000000001.
        self.grace_steps = math.ceil(round(settings["alpha"] * total_steps, 9))
        given = {name: threshold(settings["tau"], matrix.tower) for name, matrix in matrices.items()}
        self.taus = {name: tau for name, tau in given.items() if tau is not None}
        self._level: dict[str, list[float]] = {}  # with tau="auto": values of the grace period
        self._measurements: dict[str, int] = {}
        self._below: dict[str, int] = {}
        self._measurement = L1Measurement(matrices, self.sample_fraction)

    @abstractmethod
    def measure(self, step: int, live: Collection[str], grad_scale: float) -> dict[str, float]:
        """The value of every matrix that was measured in this step; the others are left out."""

    def update(self, step: int, live: Collection[str], grad_scale: float) -> list[Converged]:
        measured = self.measure(step, live, grad_scale)
        self.values = {name: value for name, value in measured.items() if math.isfinite(value)}
        return [
            Converged(name, f"{self.metric} below tau", value, self.taus[name])
            for name, value in self.values.items()
            if self._has_converged(step, name, value)
        ]

    def _has_converged(self, step: int, name: str, value: float) -> bool:
        self._measurements[name] = self._measurements.get(name, 0) + 1
        if name not in self.taus:  # tau="auto"
            level = self._level.setdefault(name, [])
            if step <= self.grace_steps or len(level) < MIN_LEVEL_MEASUREMENTS:
                level.append(value)
                return False
            self.taus[name] = self.auto_ratio * statistics.median(self._level.pop(name))
        if step <= self.grace_steps or self._measurements[name] == 1:
            return False
        self._below[name] = self._below.get(name, 0) + 1 if value < self.taus[name] else 0
        return self._below[name] >= self.patience

    def is_due(self, step: int) -> bool:
        """Whether values are wanted in this step."""
        return step % self.measure_every == 0

    @property
    def memory(self) -> int:
        return self._measurement.memory(self.compares)

    def forget(self, name: str) -> None:
        self._measurement.forget(name)

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        remembered, tensors = self._measurement.state_dict()
        state = {
            "sample_fraction": self.sample_fraction,
            "measure_every": self.measure_every,
            "auto_ratio": self.auto_ratio,
            "taus": self.taus,
            "level": self._level,
            "measurements": self._measurements,
            "below": self._below,
        }
        return state | remembered, tensors

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if state["sample_fraction"] != self.sample_fraction:
            raise ValueError(
                f"The checkpoint was written with sample_fraction {state['sample_fraction']} and this run has "
                f"{self.sample_fraction}: resume with --sample_fraction {state['sample_fraction']}."
            )
        taus = state["taus"]
        if self.tau == "auto":
            factor = self.auto_ratio / state["auto_ratio"]
            self.taus = {name: tau * factor for name, tau in taus.items()}
            self._level = {name: list(values) for name, values in state["level"].items()}
        self._measurements = dict(state["measurements"])
        # Values below another threshold do not count towards this one.
        self._below = {name: n for name, n in state["below"].items() if self.taus.get(name) == taus.get(name)}
        if state["measure_every"] == self.measure_every:  # else the neighbouring step is another one
            self._measurement.load_state_dict(state, tensors)


def threshold(tau: Any, tower: str) -> float | None:
    """The threshold of the matrices of a tower; `None` if every matrix finds its own (`tau="auto"`).

    Raises:
        ValueError: tau is given per tower, and not for this one.
    """
    if tau == "auto":
        return None
    if not isinstance(tau, dict):
        return float(tau)
    if tower not in tau:
        raise ValueError(
            f"tau gives thresholds for {', '.join(tau)}, but the model trains a {tower} tower: add "
            f'"{tower}" to tau, or give one number for all.'
        )
    return float(tau[tower])
