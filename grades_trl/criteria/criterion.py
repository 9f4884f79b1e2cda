"""Numbers over time -> which matrices have converged. Pure Python, no torch.

The paper compares each reading with tau, and so it is here, with two additions.

- `agreement`: the running mean of the matrix's own readings is compared.
- `heldout_gain`: below 0, the updates of the matrix have made the held-out loss worse. The readings of all matrices
  are of the same few examples, whose noise would choose single ones: they are drawn towards their mean first, and none
  freezes alone in a reading at which the whole is at a new best (figures in `dev/LOG.md`). When the held-out loss has
  made no new best for `patience` readings, all matrices have converged, also those that the held-out examples never
  reach (an expert without tokens).
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from grades_trl.config import GradESConfig

# Fewer readings than this are no level: a matrix that was hardly seen in the grace period (a tower without images, an
# expert without tokens) goes on collecting after it.
MIN_LEVEL_READINGS = 3
MEMORY = 0.95  # weight of all earlier readings in the running mean of `agreement`
OWN_SHARE = 0.3  # of a matrix's own gain in what is compared of `heldout_gain`; the rest is the mean over all


class Criterion:
    """Decides from one reading per matrix and step (arXiv 2509.01842, algorithm 1, plus `patience` and `tau="auto"`).

    Args:
        config (`GradESConfig`): metric, tau, alpha, patience.
        towers (`dict[str, str]`): matrix -> tower.
        total_steps (`int`): optimizer steps of the whole schedule, T in the paper.

    Attributes:
        values (`dict[str, float]`): matrix -> what was compared with tau last.
        taus (`dict[str, float]`): matrix -> threshold, as far as known.
        seen (`dict[str, int]`): matrix -> how often it was observed.
    """

    def __init__(self, config: GradESConfig, towers: dict[str, str], total_steps: int):
        self.config = config
        self._patience = config.patience or 1
        self.grace_steps = config.grace_steps(total_steps)
        tau_of_tower = {tower: config.tau_of(tower) for tower in set(towers.values())}
        self.taus: dict[str, float] = {
            name: tau for name, tower in towers.items() if (tau := tau_of_tower[tower]) is not None
        }
        self.values: dict[str, float] = {}
        self._grace: dict[str, list[float]] = {}
        self.seen: dict[str, int] = {}
        self._below: dict[str, int] = {}
        self._sums: dict[str, float] = {}

    def update(self, step: int, readings: dict[str, float], idle: int = 0, since_best: float = 0.0) -> list[str]:
        """Takes the readings of one step and returns the matrices that have converged now.

        A matrix that is missing from `readings`, or whose reading is not finite, was not observed: nothing about it
        changes. Nothing converges in the grace period, nor on its first reading.

        Args:
            step (`int`): optimizer step, counted from 1.
            readings (`dict[str, float]`): matrix -> value of the metric.
            idle (`int`, *optional*, defaults to `0`), since_best (`float`, *optional*, defaults to `0.0`): of
                `heldout_gain`, readings since the lowest held-out loss, and by how much that is below the last one.
                When the whole has converged, matrices are returned that were before, too.
        """
        converged = []
        finite = {name: value for name, value in readings.items() if math.isfinite(value)}
        for name, value in self._compared(finite).items():
            self.values[name] = value
            if name not in self.taus:
                self._collect(step, name, value)
            if step <= self.grace_steps or self.seen[name] == 1 or name not in self.taus:
                continue
            self._below[name] = self._below.get(name, 0) + 1 if value < self.taus[name] else 0
            alone = self.config.metric != "heldout_gain" or idle > 0
            if self._below[name] >= self._patience and alone:
                converged.append(name)
        if idle >= self._patience and step > self.grace_steps:
            # not by their own values, which would have let them train on
            self.values |= {name: -since_best for name in self.taus if name not in converged}
            return list(self.taus)
        return converged

    def _compared(self, readings: dict[str, float]) -> dict[str, float]:
        """What is compared with tau."""
        for name in readings:
            self.seen[name] = self.seen.get(name, 0) + 1
        if self.config.metric == "agreement":
            for name, value in readings.items():
                self._sums[name] = MEMORY * self._sums.get(name, 0.0) + (1 - MEMORY) * value
            return {name: self._sums[name] / (1 - MEMORY ** self.seen[name]) for name in readings}
        if self.config.metric == "heldout_gain" and readings:
            mean = statistics.fmean(readings.values())
            return {name: OWN_SHARE * value + (1 - OWN_SHARE) * mean for name, value in readings.items()}
        return readings

    def _collect(self, step: int, name: str, value: float) -> None:
        """`tau="auto"`: gathers the readings of the grace period and sets tau at its end."""
        readings = self._grace.setdefault(name, [])
        if step <= self.grace_steps or len(readings) < MIN_LEVEL_READINGS:
            readings.append(value)
        if step >= self.grace_steps and len(readings) >= MIN_LEVEL_READINGS:
            self.taus[name] = self.config.auto_ratio * statistics.median(self._grace.pop(name))

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "taus": self.taus,
            "values": self.values,
            "grace": self._grace,
            "seen": self.seen,
            "below": self._below,
            "sums": self._sums,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taus, self._grace = dict(state["taus"]), {name: list(v) for name, v in state["grace"].items()}
        self.seen, self._below = dict(state["seen"]), dict(state["below"])
        self.values, self._sums = dict(state["values"]), dict(state["sums"])


class Replay(Criterion):
    """The decisions of another run, from its `events.jsonl`; readings are taken as in any run, and decide nothing.

    Raises:
        ValueError: the file names a matrix that this model does not have.
    """

    def __init__(self, config: GradESConfig, towers: dict[str, str], total_steps: int):
        super().__init__(config, towers, total_steps)
        path = Path(str(config.replay))
        events = [json.loads(line) for line in path.read_text().splitlines()]
        unknown = sorted({event["matrix"] for event in events} - set(towers))
        if unknown:
            raise ValueError(
                f"{path} freezes {len(unknown)} matrices that this model does not train, {unknown[0]} among them: "
                "replay it on the model and the LoRA settings it was written with."
            )
        self._steps = {event["matrix"]: event["step"] for event in events}
        self._compared_there = {event["matrix"]: (event["value"], event["tau"]) for event in events}

    def update(self, step: int, readings: dict[str, float], idle: int = 0, since_best: float = 0.0) -> list[str]:
        super().update(step, readings, idle, since_best)
        due = [name for name, when in self._steps.items() if when == step]
        for name in due:
            self.values[name], self.taus[name] = self._compared_there[name]
        return due
