"""Where an answer ends: the tokens at which generation stops."""

from __future__ import annotations

from typing import Any

from transformers.trainer_utils import align_special_tokens


def set_stop_tokens(trainer: Any) -> None:
    """
    Lets answers end at the tokenizer's end-of-sequence token from now on.

    The Trainer does the same when training begins. Answers that are asked for earlier would end elsewhere than those
    after training, and the two could not be compared.

    Args:
        trainer: not trained yet. The generation config and the config of its model change.
    """
    align_special_tokens(trainer.model, trainer.processing_class)
