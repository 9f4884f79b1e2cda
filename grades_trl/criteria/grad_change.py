"""`metric="grad_change"`: the paper's metric, `sum |g_t - g_{t-1}|` (arXiv 2509.01842 v3, Eq. 1)."""

from __future__ import annotations

from collections.abc import Collection

from .measurement import is_measured
from .threshold import ThresholdCriterion


class GradChange(ThresholdCriterion):
    """
    How much the gradient of a matrix has changed since the last step in which it had one.

    The gradient is that of the whole optimizer step, before clipping. A step without a gradient, or with one that is
    zero or not finite, is no measurement, and what is compared with stays.
    """

    metric = "grad_change"

    def measure(self, step: int, live: Collection[str], grad_scale: float) -> dict[str, float]:
        due, due_next = self.is_due(step), self.is_due(step + 1)
        if not (due or due_next):
            return {}
        gradients = self._measurement.gradients(live)
        compared = {name: own for name, own in gradients.items() if due and name in self._measurement.remembered_at}
        norms, changes = self._measurement.norms_and_changes(gradients, compared, grad_scale)
        measured = [name for name, norm in norms.items() if is_measured(norm)]
        if due_next:
            for name in measured:
                self._measurement.remember(step, name, gradients[name], grad_scale)
        # Exactly 0: the same batch once more, after an update that was skipped.
        return {name: changes[name] for name in measured if changes.get(name, 0.0) != 0.0}
