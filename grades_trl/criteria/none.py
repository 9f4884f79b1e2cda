"""`metric="none"`: nothing freezes. For runs that only end by their held-out loss, or keep an average."""

from __future__ import annotations

from collections.abc import Collection

from .base import Converged, Criterion


class NoFreezing(Criterion):
    """Measures nothing and freezes nothing."""

    def update(self, step: int, live: Collection[str], grad_scale: float) -> list[Converged]:
        return []
