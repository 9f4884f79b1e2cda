"""See before you train: one example as the model will read it, with what it learns marked, and whether that is what it
should learn."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig

from grades_trl.distributed import is_main
from grades_trl.recipe.bad_input import printable
from grades_trl.recipe.scored import RowsLeft, evenly, untruncated
from grades_trl.trainers.heldout import IGNORED, nothing_random_moves
from grades_trl.wording import counted

from .errors import DataError
from .formats import text_of_content
from .replies import learns_prompts, squeezed

CHECKED = 8  # rows whose learned tokens are compared with their replies
MEASURED = 64  # rows with images whose tokens `--preview` counts: each has to be processed for that
LINE = 100  # characters of an end of the example in the line that is always shown
BEGIN, END = "[[", "]]"


def show_example(trainer: Any, rows: dict[str, RowsLeft], whole: bool = False) -> None:
    """
    Prints the first example as the model will read it, with the learned tokens in double brackets.

    Args:
        trainer: an SFTTrainer, which has prepared its data.
        rows (`dict[str, RowsLeft]`): split -> what is left of it, see [`scored.rows_left`].
        whole (`bool`, *optional*, defaults to `False`): the whole example, and how long the examples are; else two
            lines.

    Raises:
        [`DataError`]: an example from which nothing is learned, or its prompt, or not its reply. It is about the chat
            template, which alone decides that.
    """
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    prepared = trainer.train_dataset
    with nothing_random_moves():
        batches = [(row, *_batch(trainer, row)) for row in evenly(len(prepared), CHECKED)]
    first_ids, first_labels = batches[0][1:]

    learned = sum(label != IGNORED for label in first_labels)
    print(f"First example, {len(first_ids):,} tokens, of which {learned:,} are learned, in {BEGIN} {END}:")
    text = printable(marked(first_ids, first_labels, tokenizer))
    print(f"\n{text}\n" if whole else f"  {_shortened(text)}")
    for row, ids, labels in batches:
        _check(prepared, row, ids, labels, tokenizer, trainer.args)
    if whole:
        print("\n".join(_lengths(trainer, rows)))


class LeaveNoFolder(TrainerCallback):
    """Removes the output folder that a trainer makes, with those above it that were not there either. For a preview.

    Args:
        output_dir (`str`): of the trainer, which is not made yet.
    """

    def __init__(self, output_dir: str):
        folder = Path(output_dir).resolve()
        self._new = [path for path in (folder, *folder.parents) if not path.exists()]

    def on_init_end(self, args, state, control, **kwargs):
        if is_main():
            for folder in self._new:
                folder.rmdir()


def _batch(trainer: Any, row: int) -> tuple[list[int], list[int]]:
    """`input_ids` and `labels` of a row, as the collator makes them."""
    rows = trainer._remove_unused_columns(trainer.train_dataset, "training")
    batch = trainer.data_collator([dict(rows[row])])
    return batch["input_ids"][0].tolist(), batch["labels"][0].tolist()


def marked(ids: list[int], labels: list[int], tokenizer: Any) -> str:
    """
    The text of an example, with what is learned in double brackets, and a token that is repeated often (as those of
    images are) written once with its number.

    Args:
        ids (`list[int]`), labels (`list[int]`): of one example; -100 is not learned.
        tokenizer: which has made them.
    """
    text = ""
    for is_learned, run in itertools.groupby(zip(ids, labels, strict=True), lambda pair: pair[1] != IGNORED):
        piece = _decoded([token for token, _ in run], tokenizer)
        text += f"{BEGIN}{piece}{END}" if is_learned else piece
    return text


def _decoded(ids: list[int], tokenizer: Any) -> str:
    text, waiting = "", []
    for token, run in itertools.groupby(ids):
        count = len(list(run))
        if count < 4:
            waiting += [token] * count
            continue
        text += tokenizer.decode(waiting) + f"{tokenizer.decode([token])} x {count} "
        waiting = []
    return text + tokenizer.decode(waiting)


def _shortened(text: str) -> str:
    text = text.replace("\n", "\\n")
    return text if len(text) <= 2 * LINE else f"{text[:LINE]} ... {text[-LINE:]}"


def _check(rows: Dataset, row: int, ids: list[int], labels: list[int], tokenizer: Any, args: SFTConfig) -> None:
    """Compares the learned tokens with the replies of the row; packed rows have no replies of their own."""
    max_length = args.max_length
    here = f"train: row {row} as it is prepared (the first is 0)"
    learned = [token for token, label in zip(ids, labels, strict=True) if label != IGNORED]
    cut_off = max_length is not None and len(ids) >= max_length
    if not learned and cut_off:
        raise DataError(f"{here}: --max_length {max_length} ends before its reply, so nothing is learned: raise it")
    if not learned:
        raise DataError(
            f"{here}: nothing is learned from it: the chat template leaves the reply out, or does not tell where it "
            "is. --chat_template_path takes another one"
        )
    example = {c: rows[row][c] for c in ("messages", "prompt", "completion") if c in rows.column_names}
    if not example or cut_off:
        return
    learned_text = squeezed(tokenizer.decode(learned))
    rest = [token for token, label in zip(ids, labels, strict=True) if label == IGNORED]
    unlearned_text = squeezed(tokenizer.decode(rest))
    replies = [_as_decoded(reply, tokenizer) for reply in _texts(example, "reply")]
    for prompt in () if learns_prompts(args) else _texts(example, "prompt"):
        text = _as_decoded(prompt, tokenizer)
        said_again = any(text in reply for reply in replies)
        if text and text in learned_text and text not in unlearned_text and not said_again:
            raise DataError(
                f"{here}: its prompt is learned ({prompt[:60]!r}): the chat template writes a prompt alone otherwise "
                "than before its reply. --chat_template_path takes another one"
            )
    for reply in replies:
        if reply[-20:] not in learned_text:
            raise DataError(
                f"{here}: its reply is not learned (it ends in {reply[-20:]!r}): the chat template leaves it out, or "
                "does not tell that it is a reply. --chat_template_path takes another one"
            )


def _texts(example: dict[str, Any], what: str) -> Iterator[str]:
    """The texts of a row that are to be learned (`"reply"`), or not (`"prompt"`)."""
    prompt, learned = example.get("prompt", []), example.get("messages") or example["completion"]
    if isinstance(learned, str):
        prompt, learned = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": learned}]
    # The replies of a prompt are not learned, but they are no sign of a mistake if they are said again
    replies = [m for m in learned if m["role"] == "assistant"]
    wanted = replies if what == "reply" else [m for m in [*prompt, *learned] if m["role"] != "assistant"]
    yield from (text for m in wanted if (text := text_of_content(m.get("content")).strip()))


def _as_decoded(text: str, tokenizer: Any) -> str:
    """A text as it comes back from the tokenizer, which may not know all of its characters."""
    return squeezed(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]))


def _lengths(trainer: Any, rows: dict[str, RowsLeft]) -> list[str]:
    """How long the examples are, in tokens, and what `max_length` does to them."""
    limit = trainer.args.max_length
    if "input_ids" not in trainer.train_dataset.column_names:
        return [_lengths_with_images(trainer, limit)]
    lines = []
    for split, prepared in (("train", trainer.train_dataset), ("validation", trainer.eval_dataset)):
        if prepared is None or split not in rows:
            continue
        tables = prepared.select_columns("input_ids").with_format("arrow").iter(1000)
        lengths = [length for table in tables for length in pc.list_value_length(table["input_ids"]).to_pylist()]
        line = f"{split}: {_summary(lengths)}"
        if trainer.args.packing:
            line += f", packed from {counted(rows[split].given, 'example')}"
        elif limit is not None:
            of = rows[split]
            line += f"; {of.full:,} reach --max_length {limit} and {of.cut:,} of them lose their end"
            line += f", {of.given - of.left:,} of {of.given:,} have no reply left and are dropped"
        lines.append(line)
    return lines


def _lengths_with_images(trainer: Any, limit: int | None) -> str:
    rows = trainer.train_dataset
    lengths = [len(labels) for labels in untruncated(trainer, rows, MEASURED)]
    line = f"train: {_summary(lengths)} of the {len(rows):,}, their images included"
    if limit is not None:
        line += f"; {sum(length > limit for length in lengths):,} are longer than --max_length {limit}"
    return line


def _summary(lengths: list[int]) -> str:
    median = statistics.median(lengths)
    return f"{counted(len(lengths), 'row')} of {min(lengths):,} to {max(lengths):,} tokens, median {median:,.0f}"
