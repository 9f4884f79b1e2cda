"""What shows in the first step that a model cannot be trained as it is set up: mended, or refused before a weight has
changed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from grades_trl.distributed import UnusedParameters, wrapper_of
from grades_trl.freezing.checkpointing import let_embeddings_be_changed, refuse_lost_gradients
from grades_trl.freezing.frozen_prefix import checkpoints_reentrantly

from .binding import is_sft_trainer
from .sft_loss import refuse_misplaced_labels


class FirstStep(TrainerCallback):
    """
    Lets models train that change the output of frozen embeddings in place, or that leave parameters unused with DDP.
    Refuses reentrant checkpointing where it loses gradients, and models that SFTTrainer's loss does not fit.

    Args:
        trainer (`transformers.Trainer`, *optional*): without it, which loss it computes and what wraps the model is
            not known, and neither is looked at.

    Raises:
        ValueError: in the first step, before a weight has changed; with what to set instead.
    """

    def __init__(self, trainer: Any = None) -> None:
        self._trainer = trainer
        self._of_run: list[Any] = []
        self._of_first_step: list[Any] = []
        self._unused: UnusedParameters | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.remove_hooks()  # of a run with a larger batch, which did not fit
        model = kwargs["model"]
        self._of_run = let_embeddings_be_changed(model)
        self._of_first_step = refuse_lost_gradients(model)
        if self._trainer is None:
            return
        if is_sft_trainer(type(self._trainer)) and not args.use_liger_kernel and "unsloth" not in sys.modules:
            self._of_first_step += refuse_misplaced_labels(model, args.loss_type)  # those have losses of their own
        ddp = wrapper_of(self._trainer.model_wrapped)
        if ddp is not None:
            self._unused = UnusedParameters(ddp, any(map(checkpoints_reentrantly, model.modules())))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._unused is not None:
            unused, self._unused = self._unused, None
            unused.decide()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # From now on matrices freeze, and layers may get what requires no gradient.
        self._of_first_step = _removed(self._of_first_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.remove_hooks()

    def remove_hooks(self) -> None:
        self._of_run, self._of_first_step = _removed(self._of_run), _removed(self._of_first_step)
        if self._unused is not None:
            self._unused.remove_hooks()
            self._unused = None


@contextmanager
def first_step_checked(trainer: Any) -> Iterator[None]:
    """With a `FirstStep` in the trainer, whose hooks are gone afterwards however the run ends."""
    check = FirstStep(trainer)
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
