"""Where an answer ends: the tokens at which generation stops."""

from __future__ import annotations

import logging
import shlex
from typing import Any

from datasets import Dataset
from transformers import ProcessorMixin
from transformers.trainer_utils import align_special_tokens

from grades_trl.distributed import is_main

logger = logging.getLogger(__name__)

REPLY = "This is a reply."


def set_stop_tokens(trainer: Any) -> None:
    """
    Lets answers end at the tokenizer's end-of-sequence token from now on.

    The Trainer does the same when training begins. Answers that are asked for earlier would end elsewhere than those
    after training, and the two could not be compared.

    Args:
        trainer: not trained yet. The generation config and the config of its model change.
    """
    align_special_tokens(trainer.model, trainer.processing_class)


def warn_if_answers_do_not_end(trainer: Any, rows: Dataset) -> None:
    """
    Warns if the chat template ends a reply otherwise than answers stop, as it does with a base model and the template
    of a chat model. The model then learns its replies, and goes on after each until `max_new_tokens`.

    A template that writes nothing after a reply is left alone: some models, as GLM-4.5, stop at the next role.

    Args:
        trainer: see [`set_stop_tokens`], which comes first.
        rows ([`~datasets.Dataset`]): to train on, as [`data.training_rows`] returns them. Only the first is read.
    """
    conversations = rows.select_columns([c for c in ("messages", "prompt", "completion") if c in rows.column_names])
    if not is_main() or not conversations.column_names or isinstance(conversations[0].get("prompt"), str):
        return  # TRL ends a text with the end-of-sequence token
    row = conversations[0]
    processor = trainer.processing_class
    tokenizer = getattr(processor, "tokenizer", processor)
    end = _end_of_reply(processor, row.get("messages") or [*row["prompt"], *row["completion"]])
    stops = trainer.model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    tokens = tokenizer(end, add_special_tokens=False)["input_ids"]
    if not tokens or set(tokens) & set(stops):
        return
    named = " or ".join(tokenizer.convert_ids_to_tokens([stop for stop in stops if stop is not None])) or "no token"
    added = [token for token in tokens if token in tokenizer.added_tokens_decoder]
    if added:
        last = tokenizer.convert_ids_to_tokens(added[-1])
        what, advice = last, f"add --eos_token {shlex.quote(last)}"
    else:
        what = f"{end[:60]!r}, which is not a token of this model"
        advice = f"--chat_template_path takes a template that ends a reply with {named}"
    logger.warning(
        f"The chat template ends a reply with {what}. Answers stop at {named}, so that they will not end: {advice}."
    )


def _end_of_reply(processor: Any, messages: list[dict]) -> str:
    """What the chat template writes after the last reply, without outer spaces."""
    last = max(turn for turn, message in enumerate(messages) if message["role"] == "assistant")
    messages = [*messages[:last], {"role": "assistant", "content": REPLY}]
    if isinstance(processor, ProcessorMixin):  # their templates expect lists of parts
        messages = [
            {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m.get("content"), str) else m
            for m in messages
        ]
    written = processor.apply_chat_template(messages, tokenize=False)
    return written.rpartition(REPLY)[2].strip() if REPLY in written else ""
