"""Numbers over time -> which matrices have converged. Pure Python, no torch."""

from __future__ import annotations

import math
import statistics
from typing import Any

from .config import GradESConfig

# Fewer readings than this are no level: a matrix that was hardly seen in the grace period (a tower without images, an
# expert without tokens) goes on collecting after it.
MIN_LEVEL_READINGS = 3


class Criterion:
    """Decides from one reading per matrix and step (arXiv 2509.01842, algorithm 1, plus `patience` and `tau="auto"`).

    Args:
        config (`GradESConfig`): metric, tau, alpha, patience.
        towers (`dict[str, str]`): matrix -> tower.
        total_steps (`int`): optimizer steps of the whole schedule, T in the paper.
    """

    def __init__(self, config: GradESConfig, towers: dict[str, str], total_steps: int):
        self.config = config
        self.grace_steps = config.grace_steps(total_steps)
        tau_of_tower = {tower: config.tau_of(tower) for tower in set(towers.values())}
        self.taus: dict[str, float] = {
            name: tau for name, tower in towers.items() if (tau := tau_of_tower[tower]) is not None
        }
        self._grace: dict[str, list[float]] = {}
        self._seen: dict[str, int] = {}
        self._below: dict[str, int] = {}

    def update(self, step: int, readings: dict[str, float]) -> list[str]:
        """Takes the readings of one step and returns the matrices that have converged now.

        A matrix that is missing from `readings`, or whose reading is not finite, was not observed: nothing about it
        changes. Nothing converges in the grace period, nor on its first reading.

        Args:
            step (`int`): optimizer step, counted from 1.
            readings (`dict[str, float]`): matrix -> value of the metric.
        """
        converged = []
        for name, value in readings.items():
            if not math.isfinite(value):
                continue
            first = self._seen.get(name, 0) == 0
            self._seen[name] = self._seen.get(name, 0) + 1
            if name not in self.taus:
                self._collect(step, name, value)
            if step <= self.grace_steps or first or name not in self.taus:
                continue
            self._below[name] = self._below.get(name, 0) + 1 if value < self.taus[name] else 0
            if self._below[name] >= self.config.patience:
                converged.append(name)
        return converged

    def _collect(self, step: int, name: str, value: float) -> None:
        """`tau="auto"`: gathers the readings of the grace period and sets tau at its end."""
        readings = self._grace.setdefault(name, [])
        if step <= self.grace_steps or len(readings) < MIN_LEVEL_READINGS:
            readings.append(value)
        if step >= self.grace_steps and len(readings) >= MIN_LEVEL_READINGS:
            self.taus[name] = self.config.auto_ratio * statistics.median(self._grace.pop(name))

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"taus": self.taus, "grace": self._grace, "seen": self._seen, "below": self._below}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taus, self._grace = dict(state["taus"]), {name: list(v) for name, v in state["grace"].items()}
        self._seen, self._below = dict(state["seen"]), dict(state["below"])
