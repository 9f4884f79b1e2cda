"""`metric="grad_norm"`: `sum |g_t|`, the metric of the paper's first version, and of its LoRA form (Eq. 3)."""

from __future__ import annotations

from collections.abc import Collection

from .measurement import is_measured
from .threshold import ThresholdCriterion


class GradNorm(ThresholdCriterion):
    """The L1 norm of a matrix's gradient, that of the whole optimizer step, before clipping."""

    metric = "grad_norm"
    compares = False

    def measure(self, step: int, live: Collection[str], grad_scale: float) -> dict[str, float]:
        if not self.is_due(step):
            return {}
        norms = self._measurement.norms(self._measurement.gradients(live), grad_scale)
        return {name: norm for name, norm in norms.items() if is_measured(norm)}
