"""What only images need: the vision-language trainer, the built-in model and data, generation."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .trainer import GradESVLMMixin

    GradESVLMTrainer: Any

__all__ = ["GradESVLMMixin", "GradESVLMTrainer"]


def __getattr__(name: str) -> Any:
    # Bound late: unsloth must be imported before transformers, and replaces trl.SFTTrainer.
    if name in __all__:
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
