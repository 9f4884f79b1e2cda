"""GradES inside TRL's SFTTrainer: every weight matrix freezes when it has converged (arXiv 2509.01842)."""

from typing import TYPE_CHECKING, Any

from .config import GradESConfig
from .engine import FreezeEvent, GradES

if TYPE_CHECKING:
    from .trainer import GradESMixin

    GradESTrainer: Any

__all__ = ["FreezeEvent", "GradES", "GradESConfig", "GradESMixin", "GradESTrainer"]


def __getattr__(name: str) -> Any:
    # Bound late: unsloth must be imported before transformers, and replaces trl.SFTTrainer.
    if name in ("GradESMixin", "GradESTrainer"):
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
