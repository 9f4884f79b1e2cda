"""Gradient checkpointing with which a model fails in the stock Trainer: mended, or refused in the first pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from grades_trl.freezing.checkpointing import let_embeddings_be_changed, refuse_lost_gradients


class CheckpointingCheck(TrainerCallback):
    """Lets models train that change the output of frozen embeddings in place, and refuses reentrant checkpointing
    where it loses gradients: in the first forward pass, before a weight has changed. See `freezing/checkpointing.py`.

    Raises:
        ValueError: in the first pass, with what to set instead.
    """

    def __init__(self) -> None:
        self._of_run: list[Any] = []
        self._of_first_step: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.remove_hooks()  # of a run with a larger batch, which did not fit
        self._of_run = let_embeddings_be_changed(kwargs["model"])
        self._of_first_step = refuse_lost_gradients(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # From now on matrices freeze, and layers may get what requires no gradient.
        self._of_first_step = _removed(self._of_first_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.remove_hooks()

    def remove_hooks(self) -> None:
        self._of_run, self._of_first_step = _removed(self._of_run), _removed(self._of_first_step)


@contextmanager
def checkpointing_checked(trainer: Any) -> Iterator[None]:
    """With a `CheckpointingCheck` in the trainer, whose hooks are gone afterwards however the run ends."""
    check = CheckpointingCheck()
    trainer.add_callback(check)
    try:
        yield
    finally:
        check.remove_hooks()
        trainer.remove_callback(check)


def _removed(handles: list[Any]) -> list[Any]:
    for handle in handles:
        handle.remove()
    return []
