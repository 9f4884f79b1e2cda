"""When the run ends: one rule per file. A new one is a file here, a line below and a test."""

from .all_frozen import AllFrozen
from .base import StoppingRule
from .end_of_schedule import EndOfSchedule
from .heldout_loss import HeldoutLoss

__all__ = ["STOPPING_RULES", "HeldoutLoss", "StoppingRule"]

STOPPING_RULES: dict[str, type[StoppingRule]] = {
    "all_frozen": AllFrozen,
    "heldout_loss": HeldoutLoss,
    "end_of_schedule": EndOfSchedule,
}
