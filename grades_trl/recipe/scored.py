"""How many rows there are to train on and to score, and of how many a score is: `max_length` can leave few of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset

from grades_trl.trainers.heldout import IGNORED, nothing_random_moves

MEASURED = 32  # rows of a split with images whose tokens are counted: each has to be processed for that


@dataclass(frozen=True)
class RowsLeft:
    """
    What truncation leaves of a split.

    Attributes:
        given (`int`): rows of the dataset.
        left (`int`): those with a reply, or a part of it, within `max_length`. The others are dropped; with images,
            nothing is learned from them.
        full (`int`): of these, rows that reach `max_length`.
        cut (`int`): of these, rows whose end is cut off, and with it the end-of-sequence token.
        measured (`int`, *optional*): rows that `left`, `full` and `cut` are of, if they are not of all.
    """

    given: int
    left: int
    full: int = 0
    cut: int = 0
    measured: int | None = None

    def __str__(self) -> str:
        is_known = self.measured is None and self.left < self.given
        return f"{self.left:,} of {self.given:,}" if is_known else f"{self.given:,}"


def rows_left(trainer: Any, given: dict[str, Dataset]) -> dict[str, RowsLeft]:
    """
    What TRL leaves of each split. Rows with images are truncated when they are collated: up to `MEASURED` of them are,
    spread evenly.

    Args:
        trainer: an SFTTrainer, which has prepared its data.
        given (`dict[str, Dataset]`): what it was given as `train` and `validation`, and the rows of other splits as
            `evaluate` will be given them.
    """
    args = trainer.args
    if args.max_length is None or args.packing:
        return {split: RowsLeft(len(rows), len(rows)) for split, rows in given.items()}
    if "input_ids" not in trainer.train_dataset.column_names:
        return {split: _left_with_images(trainer, rows, args.max_length) for split, rows in given.items()}
    prepared = {"train": trainer.train_dataset, "validation": trainer.eval_dataset}
    found = {}
    for split, rows in given.items():
        if split not in prepared:
            prepared[split] = trainer._prepare_dataset(rows, trainer.processing_class, args, False, None, split)
        found[split] = _left(len(rows), prepared[split], args.max_length, trainer.processing_class)
    return found


def _left(given: int, prepared: Dataset, limit: int, tokenizer: Any) -> RowsLeft:
    ends = {tokenizer.eos_token_id}
    last_of_full: list[int] = []
    for table in prepared.select_columns("input_ids").with_format("arrow").iter(1000):
        ids = table["input_ids"]
        lengths = pc.list_value_length(ids)
        ends_of_rows = pc.subtract(pc.cumulative_sum(lengths), 1)
        last = pc.take(pc.list_flatten(ids), ends_of_rows).to_pylist()
        for token, length in zip(last, lengths.to_pylist(), strict=True):
            if length < limit:
                ends.add(token)  # what a whole row of this chat template ends with
            else:
                last_of_full.append(token)
    return RowsLeft(given, len(prepared), len(last_of_full), sum(token not in ends for token in last_of_full))


def _left_with_images(trainer: Any, rows: Dataset, limit: int) -> RowsLeft:
    left = full = cut = 0
    measured = untruncated(trainer, rows, MEASURED)
    for labels in measured:
        if any(label != IGNORED for label in labels[:limit]):
            left, full, cut = left + 1, full + (len(labels) >= limit), cut + (len(labels) > limit)
    return RowsLeft(len(rows), left, full, cut, len(measured))


def untruncated(trainer: Any, rows: Dataset, count: int) -> list[list[int]]:
    """The labels of rows with images, spread evenly, as the collator would make them without `max_length`.

    Args:
        trainer: an SFTTrainer for images.
        rows ([`~datasets.Dataset`]): as the trainer takes them.
        count (`int`): of how many rows, at most.
    """
    rows, collate = trainer._remove_unused_columns(rows, "training"), trainer.data_collator
    if dataclasses.is_dataclass(collate) and hasattr(collate, "max_length"):
        collate = dataclasses.replace(collate, max_length=None)  # type: ignore[type-var]
    with nothing_random_moves():
        return [collate([dict(rows[row])])["labels"][0].tolist() for row in evenly(len(rows), count)]


def evenly(length: int, count: int) -> list[int]:
    """At most `count` rows of a dataset of this length, spread evenly."""
    return [k * length // count for k in range(min(count, length))] if length > count else list(range(length))


class ScoredRows:
    """How many rows a loss is of, see [`rows_scored`].

    Attributes:
        count (`int`): rows with a learned token that the model has seen.
    """

    def __init__(self) -> None:
        self.count: Any = 0

    def add(self, inputs: dict[str, Any]) -> None:
        labels, positions = inputs.get("labels"), inputs.get("position_ids")
        if not isinstance(labels, torch.Tensor):
            return
        is_learned = labels != IGNORED
        if positions is not None and positions.shape == labels.shape and labels.shape[0] == 1:  # several in a row
            row = (positions[0] == 0).cumsum(0)
            self.count = self.count + len(torch.unique(row[is_learned[0]]))
        else:
            self.count = self.count + is_learned[:, 1:].any(-1).sum()


@contextmanager
def rows_scored(model: torch.nn.Module) -> Iterator[ScoredRows]:
    """Counts the rows with a learned token in what a model is given inside."""
    rows = ScoredRows()

    def see(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rows.add(kwargs)

    handle = model.register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()
        rows.count = int(rows.count)
