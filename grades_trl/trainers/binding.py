"""Trainer classes on what `trl.SFTTrainer` is when they are asked for: importing unsloth replaces it."""

from __future__ import annotations

import functools
import sys
from typing import Any


def on_sft_trainer(mixin: type, name: str) -> Any:
    """The class `name(mixin, SFTTrainer)`."""
    import trl

    return _bind(mixin, name, trl.SFTTrainer)


@functools.cache
def _bind(mixin: type, name: str, base: type) -> type:
    return type(name, (mixin, base), {"__module__": mixin.__module__, "__doc__": mixin.__doc__})


def is_sft_trainer(trainer: type) -> bool:
    """Whether the class stands on TRL's SFTTrainer."""
    return any(base.__name__ == "SFTTrainer" for base in trainer.__mro__)


def refuse_stale_base(trainer: type) -> None:
    """
    Raises:
        ImportError: the class stands on the SFTTrainer of before unsloth was imported.
    """
    import trl

    if "unsloth" in sys.modules and is_sft_trainer(trainer) and trl.SFTTrainer not in trainer.__mro__:
        raise ImportError(
            f"{trainer.__name__} was made before unsloth was imported, so it would train without Unsloth's loss and "
            "kernels. Import unsloth first, then GradESTrainer (or build your class on trl.SFTTrainer)."
        )
