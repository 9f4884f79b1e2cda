"""`metric="weight_change"`: `sum |W_t - W_{t-1}|`, what the authors' package `grades` 1.0.6 measures.

The thresholds that the paper publishes are on this scale.
"""

from __future__ import annotations

from collections.abc import Collection

from .measurement import is_measured
from .threshold import ThresholdCriterion


class WeightChange(ThresholdCriterion):
    """
    How much the last update has changed a matrix.

    It is measured before the update of the step, so it is that of the step before. A step whose update was skipped (by
    a loss scaler, or because the learning rate is 0) changes nothing: a change of exactly 0 is no measurement.
    """

    metric = "weight_change"

    def measure(self, step: int, live: Collection[str], grad_scale: float) -> dict[str, float]:
        due, due_next = self.is_due(step), self.is_due(step + 1)
        if not (due or due_next):
            return {}
        remembered_at = self._measurement.remembered_at
        gradients = self._measurement.gradients(live)
        weights = {
            name: self._measurement.sampled(name, [p.detach() for p in self.matrices[name].parameters])
            for name in gradients
        }
        # An update is the difference of two neighbouring steps. Gradients only tell whether one has flowed.
        compared = {name: own for name, own in weights.items() if due and remembered_at.get(name) == step - 1}
        norms, changes = self._measurement.norms_and_changes(gradients, compared)
        measured = [name for name, norm in norms.items() if is_measured(norm)]
        if due_next:
            for name in measured:
                self._measurement.remember(step, name, weights[name], scale=1.0)
        return {name: changes[name] for name in measured if changes.get(name, 0.0) != 0.0}
