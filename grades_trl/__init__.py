"""GradES inside TRL's SFTTrainer: every weight matrix freezes when it has converged (arXiv 2509.01842)."""

from typing import TYPE_CHECKING, Any

from grades_trl.config import GradESConfig
from grades_trl.engine import GradES
from grades_trl.events import FreezeEvent

if TYPE_CHECKING:
    from grades_trl.trainers.mixin import GradESMixin

    GradESTrainer: Any

__all__ = ["FreezeEvent", "GradES", "GradESConfig", "GradESMixin", "GradESTrainer"]


def __getattr__(name: str) -> Any:
    # Bound late: unsloth must be imported before transformers, and replaces trl.SFTTrainer.
    if name in ("GradESMixin", "GradESTrainer"):
        from grades_trl.trainers import mixin

        return getattr(mixin, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
