"""A baseline that has diverged ends, as a run with GradES does."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from grades_trl.distributed import gathered
from grades_trl.trainers.divergence import HAS_DIVERGED, Divergence

logger = logging.getLogger(__name__)


class EndDiverged(TrainerCallback):
    """
    Ends a run without GradES whose loss has been no number, or far above that of guessing, for ten steps in a row (see
    `Divergence`), and sets `diverged_at` of its trainer.

    ```python
    watch = EndDiverged(trainer)
    trainer.add_callback(watch)
    with watch.watching():
        trainer.train()
    ```
    """

    KEY = "divergence"  # among the states of callbacks in trainer_state.json

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._divergence = Divergence.of(trainer.model)
        self._loss: Any = None  # of the last micro-batch

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Reads the losses of the trainer: what it logs has no NaN (`logging_nan_inf_filter`)."""
        own = self._trainer.training_step

        def training_step(*args: Any, **kwargs: Any) -> Any:
            self._loss = own(*args, **kwargs)
            return self._loss

        self._trainer.training_step = training_step
        try:
            yield
        finally:
            del self._trainer.training_step

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step and self.KEY in state.stateful_callbacks:
            self._divergence.load_state_dict(state.stateful_callbacks[self.KEY])

    def on_step_end(self, args, state, control, **kwargs):
        # The Trainer waits for the loss in each step, too.
        self._divergence.update(state.global_step, gathered(self._loss.detach().float()).mean().item())
        state.stateful_callbacks[self.KEY] = self._divergence.state_dict()
        if self._divergence.since is not None:
            self._trainer.diverged_at = self._divergence.since
            control.should_training_stop = True
            logger.error(HAS_DIVERGED, self._trainer.diverged_at)
