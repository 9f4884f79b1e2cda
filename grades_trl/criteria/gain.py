"""`metric="gain"`: leading layers freeze when they could gain far less than they cost.

What a layer could gain is measured by `gain_meter.py`: the part that it has in the squared norm of the gradient of the
training loss. The FLOPs of the same layers say where the time goes. A vision tower that came well trained, for images
of the kind it knows, has a hundredth of the gain for half of the time; one that meets images of another kind has most
of it (figures in `dev/LOG.md`).
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Collection
from typing import Any

from torch import Tensor

from grades_trl.model.flops import StepCosts, step_flops
from grades_trl.model.matrices import WeightMatrix, layers_in_order

from .base import Converged, Criterion

MIN_STEPS = 5  # measured, in each of the two windows of a decision
SURE = 2.0  # standard errors
ENCODERS = ("vision", "audio")


class Gain(Criterion):
    """
    Freezes leading layers: of the vision tower first, then the projector, then the language layers from below.

    They freeze when their share of the gain is below a `margin`-th of their share of the cost of a step, by two
    standard errors, in two windows of steps one after the other. The cost of an encoder includes its forward pass
    where later epochs read its outputs from memory. One window is not enough: at the beginning of a run the output
    layers have most of the gain, whatever the task. Whether the layers before them have to move shows only later. The
    windows end at the end of the grace period, and after twice, four times, ... as many steps. So the earliest freeze
    comes after twice the grace period. Late in a run the gain is noise, and nothing freezes any more. A tower that is
    measured in fewer than 5 steps of a window, because few rows have an image, does not freeze, nor what comes after
    it.

    What is frozen is probed: its gradients are computed in 6 steps, first after half as many steps again, and then
    always after half as many more. All of it trains again if its share of the gain has risen above a `margin`-th of
    its share of the cost, by one standard error.

    Args:
        alpha (`float`): grace period as a fraction of all steps; at least 5 steps are measured.
        margin (`float`): how many times smaller than the share of the cost the share of the gain must be.
    """

    defaults = {"alpha": 0.08, "margin": 2.0}  # noqa: RUF012
    freezes_whole_layers = True

    def __init__(self, matrices: dict[str, WeightMatrix], total_steps: int, **settings: Any):
        super().__init__(matrices, total_steps)
        self.margin = settings["margin"]
        self.grace_steps = max(MIN_STEPS + 1, math.ceil(round(settings["alpha"] * total_steps, 9)))
        self._last_window: list[dict[str, float]] = []
        self._window: list[dict[str, float]] = []  # layer -> gain, of every step measured since the last one ended
        self._ends_at = self.grace_steps
        self._probe_at = math.inf  # the first step of the next probe
        self._members = layers_in_order(matrices)
        self._layer_of = {m.name: layer for layer, members in self._members.items() for m in members}
        self.layers = list(self._members)  # from input to output

    def update(self, step: int, live: Collection[str], grad_scale: float) -> list[Converged]:
        self.values, self.unfreeze_reason = self.gain_meter.values, ""
        if self.values:
            self._window.append(self.gain_meter.steps[step])
        if step == self._probe_at + MIN_STEPS:
            self.unfreeze_reason = self._pays_again(step, set(live))
            if self.unfreeze_reason:  # a decision needs two whole windows, in which all is measured
                self._last_window, self._window, self._probe_at = [], [], math.inf
                return []
            self._probe_at = math.ceil(1.5 * step)
        if step < self._ends_at:
            return []
        self._ends_at *= 2
        converged = self._decide(set(live))
        self._last_window, self._window = self._window, []
        if converged:
            self._probe_at = math.ceil(1.5 * step)
        return converged

    def probes(self, step: int) -> bool:
        return self._probe_at <= step <= self._probe_at + MIN_STEPS

    def _pays_again(self, step: int, live: set[str]) -> str:
        """Why what is frozen should train again, by the steps of the probe that ends now; empty if it should not."""
        frozen = {self._layer_of[name] for name in self.matrices if name not in live}
        probed = [self.gain_meter.steps.get(at, {}) for at in range(step - MIN_STEPS + 1, step + 1)]
        window = [gains for gains in probed if frozen <= gains.keys()]
        if len(window) < 2:
            return ""
        costs = self.costs()
        cost = 1 - self._cost(self.matrices.keys() - live, costs) / self._cost(set(), costs)
        share, error = share_of_gain(window, frozen, self.layers)
        pays = share - error > cost / self.margin
        return f"{100 * share:.0f} % of the gain for {100 * cost:.0f} % of the FLOPs of a step" if pays else ""

    def _decide(self, live: set[str]) -> list[Converged]:
        windows = (self._last_window, self._window)
        if min(map(len, windows)) < MIN_STEPS:
            return []
        trained = {self._layer_of[name] for name in live}
        frozen, costs = self.matrices.keys() - live, self.costs()
        cost_now = self._cost(frozen, costs)
        best, reason, leading = 0.0, "", set[str]()
        measured_towers = self._measured_towers()
        for count, layer in enumerate(self.layers[:-1], 1):
            if layer in trained and self._members[layer][0].tower not in measured_towers:
                break
            layers = trained & set(self.layers[:count])
            members = {name for name in live if self._layer_of[name] in layers}
            cost = 1 - self._cost(frozen | members, costs) / cost_now
            shares = [share_of_gain(window, layers, trained) for window in windows]
            highest = max(share + SURE * error for share, error in shares)
            if cost / self.margin - highest > best:
                best, leading = cost / self.margin - highest, members
                gain = 100 * max(0.0, shares[-1][0])
                reason = f"{gain:.1f} % of the gain for {100 * cost:.0f} % of the FLOPs of a step"
        return [Converged(name, reason) for name in self.matrices if name in leading]

    def _measured_towers(self) -> set[str]:
        """Those that enough rows have reached in both windows. (A layer of them without a gradient, whose output
        nothing uses, has no gain.)"""
        tower_of = {layer: members[0].tower for layer, members in self._members.items()}
        counts = [
            Counter(tower for gains in window for tower in {tower_of[layer] for layer in gains})
            for window in (self._last_window, self._window)
        ]
        return {tower for tower in tower_of.values() if min(count[tower] for count in counts) >= MIN_STEPS}

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
        skipped = self._skipped_layers(frozen, costs)
        cached: set[str] = set()  # layer lists whose outputs come from memory
        if costs.encoder_is_cached:
            stacks = {m.stack: m.layer for m in self.matrices.values() if m.tower in ENCODERS}  # to their last layer
            cached = {stack for stack, last in stacks.items() if skipped.get(stack, 0) > last}
        return step_flops(
            [matrix for matrix in (*self.matrices.values(), *costs.others) if matrix.stack not in cached],
            frozen=frozen.union(matrix.name for matrix in costs.others),
            skipped_layers=skipped,
            tokens=costs.tokens,
            checkpointing=costs.checkpointing,
            experts_per_token=costs.experts_per_token,
        )

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        probe_at = None if self._probe_at == math.inf else self._probe_at
        windows = {"last_window": self._last_window, "window": self._window}
        return windows | {"ends_at": self._ends_at, "probe_at": probe_at}, {}

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self._last_window = [dict(gains) for gains in state["last_window"]]
        self._window = [dict(gains) for gains in state["window"]]
        self._ends_at = state["ends_at"]
        self._probe_at = math.inf if state["probe_at"] is None else state["probe_at"]


def share_of_gain(
    window: list[dict[str, float]], layers: Collection[str], trained: Collection[str]
) -> tuple[float, float]:
    """The share of the gain that some layers have, and its standard error: that of a ratio of two means.

    Each step is divided by the sum of all absolute gains in it. Gains fall by orders of magnitude within a window, and
    a single spike of the loss would be all that counts.

    Args:
        window (`list[dict[str, float]]`): layer -> gain, of each measured step.
        layers (`Collection[str]`): those whose share it is,
        trained (`Collection[str]`): of the gain of these.

    Returns:
        `tuple[float, float]`: the error is infinite where the gain of all is not above 0.
    """
    sizes = [math.fsum(abs(gains.get(layer, 0.0)) for layer in trained) or 1.0 for gains in window]
    totals, own = (
        [math.fsum(g.get(layer, 0.0) for layer in of) / size for g, size in zip(window, sizes, strict=True)]
        for of in (trained, layers)
    )
    mean = statistics.fmean(totals)
    if mean <= 0:
        return 0.0, math.inf
    share = statistics.fmean(own) / mean
    rest = [mine - share * total for mine, total in zip(own, totals, strict=True)]
    return share, statistics.stdev(rest) / math.sqrt(len(rest)) / mean
