"""Numbers over time -> which matrices have converged. Pure Python, no torch.

The paper compares each reading with tau. What is compared of the two metrics that go beyond it:

- `agreement`: the running mean of the matrix's own readings.
- `heldout_gain`: the sum of the gains since the matrix was at its best. Above tau, this is its new best; below tau for
  `patience` readings in a row, it has converged, unless the whole is at a new best. Each gain is first drawn towards
  the mean over all matrices that train. They are measured on the same examples and share most of their noise: the mean
  tells whether training still pays, the own part which matrix stops first (figures in `dev/LOG.md`). When the sum over
  all matrices, which is the change of the held-out loss, has made no new best for `patience` readings, all of them
  have converged.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from .config import GradESConfig

# Fewer readings than this are no level: a matrix that was hardly seen in the grace period (a tower without images, an
# expert without tokens) goes on collecting after it.
MIN_LEVEL_READINGS = 3
MEMORY = 0.95  # weight of all earlier readings in the running mean of `agreement`
ALL = ""  # not the name of a matrix: the sum over all
OWN_SHARE = 0.3  # of a matrix's own gain in what counts of `heldout_gain`; the rest is the mean over all matrices


class Criterion:
    """Decides from one reading per matrix and step (arXiv 2509.01842, algorithm 1, plus `patience` and `tau="auto"`).

    Args:
        config (`GradESConfig`): metric, tau, alpha, patience.
        towers (`dict[str, str]`): matrix -> tower.
        total_steps (`int`): optimizer steps of the whole schedule, T in the paper.

    Attributes:
        values (`dict[str, float]`): matrix -> what was compared with tau last.
        taus (`dict[str, float]`): matrix -> threshold, as far as known.
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
        self._new_best = float(config.tau) if isinstance(config.tau, (int, float)) else 0.0  # of the whole, in nats
        self._idle = 0  # readings since the best one
        self._grace: dict[str, list[float]] = {}
        self._seen: dict[str, int] = {}
        self._below: dict[str, int] = {}
        self._sums: dict[str, float] = {}

    def update(self, step: int, readings: dict[str, float]) -> list[str]:
        """Takes the readings of one step and returns the matrices that have converged now.

        A matrix that is missing from `readings`, or whose reading is not finite, was not observed: nothing about it
        changes. Nothing converges in the grace period, nor on its first reading.

        Args:
            step (`int`): optimizer step, counted from 1.
            readings (`dict[str, float]`): matrix -> value of the metric.
        """
        converged = []
        finite = {name: value for name, value in readings.items() if math.isfinite(value)}
        for name, value in self._compared(finite).items():
            self.values[name] = value
            if name not in self.taus:
                self._collect(step, name, value)
            if step <= self.grace_steps or self._seen[name] == 1 or name not in self.taus:
                continue
            self._below[name] = self._below.get(name, 0) + 1 if value < self.taus[name] else 0
            alone = self.config.metric != "heldout_gain" or self._idle > 0  # not while the whole still makes new bests
            if self._below[name] >= self._patience and alone:
                converged.append(name)
            elif self._idle >= self._patience:
                self.values[name] = self._sums[ALL]  # not its own, which would have let it train on
                converged.append(name)
        return converged

    def _compared(self, readings: dict[str, float]) -> dict[str, float]:
        """What is compared with tau: the readings themselves, or what they add up to."""
        for name in readings:
            self._seen[name] = self._seen.get(name, 0) + 1
        if self.config.metric == "agreement":
            for name, value in readings.items():
                self._sums[name] = MEMORY * self._sums.get(name, 0.0) + (1 - MEMORY) * value
            return {name: self._sums[name] / (1 - MEMORY ** self._seen[name]) for name in readings}
        if self.config.metric == "heldout_gain" and readings:
            average = statistics.fmean(readings.values())
            shares = {name: OWN_SHARE * value + (1 - OWN_SHARE) * average for name, value in readings.items()}
            for name, value in (shares | {ALL: math.fsum(readings.values())}).items():
                since_best = self._sums.get(name, 0.0)
                # The last reading was the best so far if the sum up to it was above tau: it starts anew from there.
                was_best = since_best > self.taus.get(name, self._new_best)
                self._sums[name] = value + (0.0 if was_best else since_best)
            self._idle = 0 if self._sums[ALL] > self._new_best else self._idle + 1
            return {name: self._sums[name] for name in readings}
        return readings

    @property
    def at_best(self) -> bool:
        """`heldout_gain`: the last reading found the lowest held-out loss so far."""
        return self._idle == 0

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
            "seen": self._seen,
            "below": self._below,
            "sums": self._sums,
            "idle": self._idle,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taus, self._grace = dict(state["taus"]), {name: list(v) for name, v in state["grace"].items()}
        self._seen, self._below = dict(state["seen"]), dict(state["below"])
        self.values, self._sums = dict(state["values"]), dict(state["sums"])
        self._idle = state["idle"]


class Replay:
    """In place of a `Criterion`: the decisions of another run, from its `events.jsonl`.

    Args:
        path (`str`): the file; of each line `decided` (the step), `matrix`, `value` and `tau` are used.
        matrices (`Collection[str]`): what this model has.

    Raises:
        ValueError: the file names a matrix that this model does not have.
    """

    grace_steps = 0
    at_best = False

    def __init__(self, path: str, matrices: Any):
        events = [json.loads(line) for line in Path(path).read_text().splitlines()]
        unknown = sorted({event["matrix"] for event in events} - set(matrices))
        if unknown:
            raise ValueError(
                f"{path} freezes {len(unknown)} matrices that this model does not train, {unknown[0]} among them: "
                "replay it on the model and the LoRA settings it was written with."
            )
        self.values = {event["matrix"]: event["value"] for event in events}
        self.taus = {event["matrix"]: event["tau"] for event in events}
        self._steps = {event["matrix"]: event["decided"] for event in events}

    def update(self, step: int, readings: dict[str, float]) -> list[str]:
        return [name for name, decided in self._steps.items() if decided == step]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
