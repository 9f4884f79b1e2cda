"""`metric="gain"`: leading layers freeze when their updates buy less loss than their backward pass costs.

What an update of a matrix has bought is told by the next batch (`gain_meter.py`). Summed over steps it says where the
training loss comes down; the FLOPs of the same layers say where the time goes. Freezing the leading layers pays where
the first share is well below the second (figures in `dev/LOG.md`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection
from typing import Any

from torch import Tensor

from grades_trl.model.flops import StepCosts, step_flops
from grades_trl.model.matrices import WeightMatrix, layers_in_order

from .base import Converged, Criterion

MIN_STEPS = 5  # of a decision
SURE = 2.0  # standard errors


class Gain(Criterion):
    """
    Freezes leading layers: of the vision tower first, then the projector, then the language layers from below.

    With s the share of the gain and c the share of the cost of a step that the leading layers have, freezing them
    leaves `1 - s` of the gain for `1 - c` of the time. They freeze when `(1 - s) / (1 - c)` is above `1 + margin` by
    two standard errors. It is asked at the end of the grace period, and again after twice, four times, ... as many
    steps: late in a run the gain is noise, and then nothing is sure.

    Args:
        alpha (`float`): grace period as a fraction of all steps; at least 5 steps are measured.
        margin (`float`): by how much the gain per time must rise.
    """

    defaults = {"alpha": 0.1, "margin": 0.02}  # noqa: RUF012
    freezes_whole_layers = True

    def __init__(self, matrices: dict[str, WeightMatrix], total_steps: int, **settings: Any):
        super().__init__(matrices, total_steps)
        self.margin = settings["margin"]
        self.grace_steps = max(MIN_STEPS + 1, math.ceil(round(settings["alpha"] * total_steps, 9)))
        self._steps: list[dict[str, float]] = []  # layer -> gain, of every measured step since the last freeze
        self._ask_at = self.grace_steps
        self._members = layers_in_order(matrices)
        self._layer_of = {m.name: layer for layer, members in self._members.items() for m in members}
        self.layers = list(self._members)  # from input to output

    def update(self, step: int, live: Collection[str], grad_scale: float) -> list[Converged]:
        self.values = self.gain_meter.values
        if self.values:
            self._steps.append(self.gain_meter.steps[step])
        if step < self._ask_at:
            return []
        self._ask_at *= 2
        return self._decide(set(live))

    def _decide(self, live: set[str]) -> list[Converged]:
        if len(self._steps) < MIN_STEPS:
            return []
        frozen, costs = self.matrices.keys() - live, self.costs()
        cost_now = self._cost(frozen, costs)
        best: tuple[float, int, str] = (1 + self.margin, 0, "")
        for count in range(1, len(self.layers)):
            leading = set(self.layers[:count])
            members = {name for name in live if self._layer_of[name] in leading}
            if not members:
                continue
            cost = self._cost(frozen | members, costs) / cost_now
            share, error = self._share_of(leading)
            lowest = (1 - share - SURE * error) / cost
            if lowest > best[0]:
                reason = f"{share:.0%} of the gain, {1 - cost:.0%} of the cost"
                best = (lowest, count, reason)
        _, count, reason = best
        if not count:
            return []
        self._steps.clear()
        leading = set(self.layers[:count])
        return [Converged(name, reason) for name in self.matrices if name in live and self._layer_of[name] in leading]

    def _share_of(self, leading: set[str]) -> tuple[float, float]:
        """The share of the gain that leading layers have, and its standard error: that of a ratio of two means."""
        total = [math.fsum(gains.values()) for gains in self._steps]
        own = [math.fsum(gain for layer, gain in gains.items() if layer in leading) for gains in self._steps]
        mean = statistics.fmean(total)
        if mean <= 0:  # the loss does not come down
            return 0.0, math.inf
        share = statistics.fmean(own) / mean
        rest = [mine - share * all_ for mine, all_ in zip(own, total, strict=True)]
        return share, statistics.stdev(rest) / math.sqrt(len(rest)) / mean

    def _skipped_layers(self, frozen: set[str], costs: StepCosts) -> dict[str, int]:
        """Path of a layer list -> leading layers that backward skips when these matrices are frozen."""
        skipped: dict[str, int] = {}
        in_front_of_language = True
        for members in self._members.values():
            tower, stack = members[0].tower, members[0].stack
            done = all(m.name in frozen for m in members)
            if tower == "language" and not (in_front_of_language and costs.language_prefix_can_be_skipped):
                break
            if done and skipped.get(stack, 0) == members[0].layer:
                skipped[stack] = members[0].layer + 1
            in_front_of_language = in_front_of_language and done
        return skipped

    def _cost(self, frozen: set[str], costs: StepCosts) -> float:
        """FLOPs of a step with these matrices frozen."""
        return step_flops(
            self.matrices.values(),
            frozen=frozen,
            skipped_layers=self._skipped_layers(frozen, costs),
            tokens=costs.tokens,
            checkpointing=costs.checkpointing,
            experts_per_token=costs.experts_per_token,
        )

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"steps": self._steps, "ask_at": self._ask_at}, {}

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self._steps, self._ask_at = [dict(gains) for gains in state["steps"]], state["ask_at"]
