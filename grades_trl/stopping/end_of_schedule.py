"""`stopping="end_of_schedule"`: the run ends when its schedule does."""

from typing import Any

from .base import StoppingRule


class EndOfSchedule(StoppingRule):
    """Trains on what is not tracked (norms, embeddings) when all matrices are frozen."""

    ends_when_all_frozen = False

    def __init__(self, total_steps: int, **settings: Any):
        super().__init__(total_steps)
        self.description = "with its schedule"
