"""Training, validation and test: loaded, checked, held out, halved and limited."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Any

from datasets import Dataset, DatasetDict
from trl import SFTConfig

from grades_trl.recipe.arguments import BUILTIN_DATASETS, RecipeArguments

from .checks import check
from .errors import DataError
from .formats import clean, parse_columns
from .marks import leave_rows_out
from .overlap import warn_of_rows_in_both
from .replies import to_prompt_completion
from .sources import read

# Columns that say where a row comes from, which no model needs to read
ABOUT_ROWS = ("id", "idx", "index", "uuid", "row_id", "sample_id", "source", "url", "license", "__index_level_0__")

logger = logging.getLogger(__name__)


def load_data(
    recipe: RecipeArguments,
    training: SFTConfig,
    builtin: dict[str, Callable[..., Any]],
    *,
    vision: bool = False,
    test_only: bool = False,
    keep: Collection[str] = (),
) -> dict[str, Dataset]:
    """The rows of a recipe, from `--dataset_name`.

    One half of the held-out rows is used for decisions during training (validation), the other only for the scores at
    the end (test). They have one reply each, as the model will have to write it. Conversations to train on stay whole:
    [`training_rows`] needs to know the model's chat template.

    Args:
        recipe (`RecipeArguments`), training (`SFTConfig`): which data. `training.seed` splits and samples them.
        builtin (`dict[str, Callable]`): the built-in datasets of this kind, by name.
        vision (`bool`, *optional*, defaults to `False`): rows have images.
        test_only (`bool`, *optional*, defaults to `False`): leaves training and validation out.
        keep (`Collection[str]`, *optional*): columns to keep beside those that TRL reads.

    Returns:
        `dict[str, Dataset]`: `train`, `validation`, `test`; of some built-in datasets also a `test_...` of another
            kind.

    Raises:
        [`DataError`]: no data is named, or a built-in dataset of the other kind; and see [`load`].
    """
    name = recipe.dataset_name
    if name is None:
        columns = "`image` or `images`, and " if vision else ""
        raise DataError(
            "No data: give --dataset_name a hub id, a local folder or file (jsonl, parquet, ... with "
            f"{columns}`messages`, `prompt` and `completion`{'' if vision else ', or `text`'}, or in the format of "
            f"another tool), or a built-in dataset: {', '.join(builtin)}."
        )
    if name in BUILTIN_DATASETS and name not in builtin:
        raise DataError(
            f"The built-in dataset {name} is for {'language' if vision else 'vision-language'} models; expected "
            f"{' or '.join(builtin)}, or data of your own."
        )
    if name in builtin:
        of_files = ("dataset_config", "dataset_train_split", "dataset_test_split", "columns", "test_size")
        ignored = [flag for flag in of_files if getattr(recipe, flag) != getattr(type(recipe), flag)]
        if ignored:
            raise DataError(f"The built-in dataset {name} has no {' and no '.join(ignored)}: leave it out.")
        splits = builtin[name](seed=0, test=2000 if vision else 600)  # images can be drawn as many as wanted
    else:
        splits = load(
            name,
            config=recipe.dataset_config,
            train_split=recipe.dataset_train_split,
            test_split=recipe.dataset_test_split,
            test_size=recipe.test_size,
            seed=training.seed,
            vision=vision,
            text_column=recipe.dataset_text_field,
            columns=parse_columns(recipe.columns),
            keep=keep,
        )
    splits = with_validation(splits, recipe.max_eval_samples)
    held_out = [split for split in splits if split.startswith("test") or (split != "train" and not test_only)]
    rows = {split: to_prompt_completion(splits[split], recipe.train_on, keep) for split in held_out}
    if test_only:
        return rows
    train = splits["train"]
    if recipe.max_train_samples is not None:
        train = sample(train, recipe.max_train_samples, training.seed)
    if name not in builtin:
        warn_of_rows_in_both(train, {split: splits[split] for split in held_out})
    return {"train": train, **rows}


def load(
    name: str,
    *,
    config: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    test_size: int | float = 0.1,
    seed: int = 42,
    vision: bool = False,
    text_column: str = "text",
    columns: dict[str, str] | None = None,
    keep: Collection[str] = (),
) -> DatasetDict:
    """
    Loads a dataset from the hub or from a local path, checks it, and brings it into one shape.

    Local data: a `.jsonl`, `.json`, `.parquet` or `.csv` file, a folder of such files (a split is recognized by
    `train`, `validation`, `test`, ... in the name of the folder or file, as `datasets` does), a folder of images with
    a `metadata.jsonl` or `metadata.csv` (its `file_name` becomes `image`), or a folder written by `save_to_disk`.
    Paths of images are relative to the file they are written in. Formats of other tools (`formats.FORMATS`) are
    recognized by their columns and become messages.

    The result has only the columns that TRL reads: `messages`, or `prompt` and `completion`, or `text` (where several
    are there, the first of these), `images` for vision, and `tools` and `chat_template_kwargs` beside messages; see
    [`formats.clean`] for what happens to messages. Images are decoded as RGB ([`images.to_rgb`]) when they are read,
    not here.

    Args:
        name (`str`): id of a dataset on the hub, or path of a local file or folder.
        config (`str`, *optional*): configuration of a dataset on the hub.
        train_split (`str`, *optional*, defaults to `"train"`): split to train on.
        test_split (`str`, *optional*): split to test on. By default `test`, or else `validation`, or where there is
            neither, `test_size` of the training split.
        test_size (`int` or `float`, *optional*, defaults to `0.1`): rows (`int`) or fraction (`float`) of the training
            split that is held out where there is no test split.
        seed (`int`, *optional*, defaults to `42`): of the split into train and test, and of the order of the test
            rows, which a source may keep by topic. The same seed gives the same rows.
        vision (`bool`, *optional*, defaults to `False`): whether rows have images.
        text_column (`str`, *optional*, defaults to `"text"`): column that holds plain text. It is `text` in the
            result, since TRL adds the end-of-sequence token to that name only: leave
            `SFTConfig.dataset_text_field` as it is.
        columns (`dict[str, str]`, *optional*): names of columns in the source by what they stand for, see
            [`formats.rename_columns`].
        keep (`Collection[str]`, *optional*): columns to keep beside those that TRL reads.

    Returns:
        [`~datasets.DatasetDict`]: `train` and `test`.

    Raises:
        [`DataError`]: if the path or split is not there, the files cannot be read, or [`check`] finds a fault. Row
            numbers are those of the source, before anything is held out.
    """
    splits = read(name, config, text_column, columns, vision)
    for split in (train_split, test_split):
        if split is not None and split not in splits:
            raise DataError(f'{name}: there is no split "{split}"; there are: {", ".join(splits)}')
    if test_split is None:
        test_split = next((s for s in ("test", "validation") if s in splits and s != train_split), None)

    ready = []
    for split in (train_split, test_split) if test_split else (train_split,):
        check(splits[split], vision, name=split, text_column=text_column)
        missing = [column for column in keep if column not in splits[split].column_names]
        if missing:
            there = ", ".join(splits[split].column_names)
            raise DataError(f'{split}: there is no column "{missing[0]}"; there are: {there}')
        cleaned = clean(splits[split], text_column, keep)
        if split == train_split:
            _warn_of_columns_left_out(splits[split], cleaned, text_column)
        ready.append(leave_rows_out(cleaned, split))
    if test_split is not None:
        return DatasetDict(train=ready[0], test=ready[1].shuffle(seed=seed))
    try:
        return ready[0].train_test_split(test_size=test_size, seed=seed)
    except ValueError as error:
        raise DataError(f"{name}: cannot hold out test_size={test_size} of {len(ready[0])} rows: {error}") from error


def _warn_of_columns_left_out(dataset: Dataset, cleaned: Dataset, text_column: str) -> None:
    """A part of the question may be among them, as the choices of multiple choice are."""
    read = {*cleaned.column_names, text_column, "image", "images"}
    unread = [column for column in dataset.column_names if column not in read and column.lower() not in ABOUT_ROWS]
    if unread:
        logger.warning(
            f"Columns not read: {', '.join(unread)}. If the model should see one, write it into the question, or name "
            "it with --columns."
        )


def with_validation(splits: DatasetDict, limit: int | None = None) -> DatasetDict:
    """
    Halves the held-out rows: those used for decisions during training must not be those that the result is scored on.

    Args:
        splits ([`~datasets.DatasetDict`]): with `test`, as [`load`] returns it.
        limit (`int`, *optional*): rows in each half, at most.

    Returns:
        [`~datasets.DatasetDict`]: the same with `validation`, the first half of `test`, and `test`, the rest of it.

    Raises:
        [`DataError`]: if `test` has a single row.
    """
    held_out = splits["test"]
    if len(held_out) < 2:
        raise DataError(
            f"test: {len(held_out)} row is held out, expected at least 2: one half is for decisions during training, "
            "the other is scored at the end"
        )
    half = len(held_out) // 2
    end = len(held_out) if limit is None else min(len(held_out), half + limit)
    halves = {
        "validation": first(held_out, half if limit is None else min(half, limit)),
        "test": held_out.select(range(half, end)),
    }
    return DatasetDict({**splits, **halves})


def first(dataset: Dataset, count: int) -> Dataset:
    """At most `count` rows, from the beginning."""
    return dataset.select(range(min(count, len(dataset))))


def sample(dataset: Dataset, size: int, seed: int) -> Dataset:
    """At most `size` rows, drawn with `seed`: a source may be sorted by topic, its first rows be all alike."""
    return dataset if size >= len(dataset) else first(dataset.shuffle(seed=seed), size)
