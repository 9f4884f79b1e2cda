"""When the run ends: one rule per file. A new one is a file here, a line below and a test."""

from .all_frozen import AllFrozen
from .base import StoppingRule
from .end_of_schedule import EndOfSchedule
from .heldout import HELDOUT_METRICS, HeldoutScore
from .train_accuracy import TrainAccuracy

__all__ = ["HELDOUT_METRICS", "STOPPING_RULES", "HeldoutScore", "StoppingRule", "TrainAccuracy"]

STOPPING_RULES: dict[str, type[StoppingRule]] = {
    "all_frozen": AllFrozen,
    "heldout": HeldoutScore,
    "train_accuracy": TrainAccuracy,
    "end_of_schedule": EndOfSchedule,
}
