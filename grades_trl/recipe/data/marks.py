"""Marks with which the author of a conversation leaves some of its replies out of what is learned.

Each tool has a key of its own for them, all with the same meaning; without a mark, a reply is learned:

- `weight`, 0 or 1: OpenAI's fine-tuning API, Mistral, ShareGPT files such as SlimOrca
- `train` and `training`, true or false: axolotl (`message_field_training`), which has them on parts of a message too
- `loss`, true or false, and `loss_scale`, a number: ms-swift ("Custom dataset")
- `loss_weight`, a number: LLaMA-Factory's v1 files (`data/v1_sft_demo.jsonl`)
"""

from __future__ import annotations

import logging
from typing import Any

from datasets import Dataset, Json

from .errors import DataError

MARKS = ("weight", "train", "training", "loss", "loss_scale", "loss_weight")
SPANS = ("train_detail", "training_detail")  # axolotl's: which characters of a message are learned
LEFT_OUT = "left_out"  # the one key that all of them become

logger = logging.getLogger(__name__)


def marks_of(message: dict[str, Any]) -> dict[str, Any]:
    """The marks of a message, or of a part of one."""
    return {key: message[key] for key in MARKS if message.get(key) is not None}


def problem_in_marks(message: dict[str, Any]) -> str | None:
    """What is wrong with the marks of a message; `None` if nothing is."""
    marks = marks_of(message)
    for key, value in marks.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            return f"has {key} {value!r:.40}, expected 0 or 1 (false or true): a reply is learned, or it is not"
    if len({bool(value) for value in marks.values()}) > 1:
        said = ", ".join(f"{key} {value}" for key, value in marks.items())
        return f"has marks that contradict each other ({said}): keep one of them"
    if message["role"] != "assistant" or (marks and not any(marks.values())):
        return None
    of_parts = [value for part in _parts(message) for value in marks_of(part).values()]
    spans = [span for key in SPANS for span in message.get(key) or []]
    if not all(of_parts) or not all(isinstance(span, dict) and span.get("train") for span in spans):
        return (
            "has a part that is marked not to be learned: only whole messages can be left out. Mark the message, or "
            "remove the part"
        )
    return None


def asks(message: dict[str, Any]) -> bool:
    """Whether a message, or a part of it, is marked to be learned."""
    marks = [value for of in (message, *_parts(message)) for value in marks_of(of).values()]
    return any(marks) or any(message.get(key) for key in SPANS)


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Of its text, and of the reasoning that axolotl has beside it."""
    lists = [message[key] for key in ("content", "reasoning_content") if isinstance(message.get(key), list)]
    return [part for parts in lists for part in parts if isinstance(part, dict)]


def take_marks(message: dict[str, Any]) -> dict[str, Any]:
    """A message without its marks: `LEFT_OUT` is in a reply that is not learned."""
    is_left_out = message["role"] == "assistant" and any(not value for value in marks_of(message).values())
    rest = {key: value for key, value in message.items() if key not in (*MARKS, *SPANS, LEFT_OUT)}
    return rest | {LEFT_OUT: True} if is_left_out else rest


def without_marks(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as a chat template reads them."""
    return [{key: value for key, value in message.items() if key != LEFT_OUT} for message in messages]


def learned_replies(messages: list[dict[str, Any]]) -> list[int]:
    """The turns that are learned."""
    return [i for i, m in enumerate(messages) if m["role"] == "assistant" and not m.get(LEFT_OUT)]


def leave_rows_out(dataset: Dataset, name: str) -> Dataset:
    """
    Leaves out the conversations of which no reply is learned, and says how many that are.

    Args:
        dataset ([`~datasets.Dataset`]): one split as [`formats.clean`] returns it.
        name (`str`): what the split is called in messages.

    Raises:
        [`DataError`]: nothing is left.
    """
    if not isinstance(dataset.features.get("messages"), Json):  # marks are a third key, see `formats.clean`
        return dataset
    conversations = dataset.select_columns(["messages"])
    kept = [row for row, example in enumerate(conversations) if learned_replies(example["messages"])]
    if len(kept) == len(dataset):
        return dataset
    if not kept:
        raise DataError(f"{name}: every reply is marked not to be learned, expected at least one that is")
    logger.warning(
        f"{name}: {len(dataset) - len(kept):,} of {len(dataset):,} conversations left out: all of their replies "
        "are marked not to be learned."
    )
    return dataset.select(kept)
