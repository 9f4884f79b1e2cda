"""Numbers over time -> which matrices have converged. Pure Python, no torch.

The paper compares each reading with tau, and so it is here, with two additions.

- `agreement`: the running mean of the matrix's own readings is compared.
- `heldout_gain`: below 0, the updates of the matrix have made the held-out loss worse. The readings of all matrices
  are of the same few examples, whose noise would choose single ones: they are drawn towards their mean first, and none
  freezes alone in a reading at which the whole is at a new best (figures in `dev/LOG.md`). When the sum over all
  matrices, which is the change of the held-out loss, has made no new best for `patience` readings, all of them have
  converged.
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
        self._since_best, self._idle = 0.0, 0  # `heldout_gain`: sum over all matrices and readings since the best one
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
            alone = self.config.metric != "heldout_gain" or self._idle > 0
            if self._below[name] >= self._patience and alone:
                converged.append(name)
            elif self._idle >= self._patience:
                self.values[name] = self._since_best  # not its own, which would have let it train on
                converged.append(name)
        return converged

    def _compared(self, readings: dict[str, float]) -> dict[str, float]:
        """What is compared with tau."""
        for name in readings:
            self._seen[name] = self._seen.get(name, 0) + 1
        if self.config.metric == "agreement":
            for name, value in readings.items():
                self._sums[name] = MEMORY * self._sums.get(name, 0.0) + (1 - MEMORY) * value
            return {name: self._sums[name] / (1 - MEMORY ** self._seen[name]) for name in readings}
        if self.config.metric == "heldout_gain" and readings:
            # The last reading was the best so far if what came since the best before it was a gain.
            self._since_best = math.fsum(readings.values()) + min(self._since_best, 0.0)
            self._idle = 0 if self._since_best > 0 else self._idle + 1
            mean = statistics.fmean(readings.values())
            return {name: OWN_SHARE * value + (1 - OWN_SHARE) * mean for name, value in readings.items()}
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
            "since_best": self._since_best,
            "idle": self._idle,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taus, self._grace = dict(state["taus"]), {name: list(v) for name, v in state["grace"].items()}
        self._seen, self._below = dict(state["seen"]), dict(state["below"])
        self.values, self._sums = dict(state["values"]), dict(state["sums"])
        self._since_best, self._idle = state["since_best"], state["idle"]


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

    def update(self, step: int, readings: dict[str, float]) -> list[str]:
        super().update(step, readings)
        due = [name for name, when in self._steps.items() if when == step]
        for name in due:
            self.values[name], self.taus[name] = self._compared_there[name]
        return due
