"""Rows that are trained on and held out as well."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping

from datasets import Dataset

from grades_trl.wording import counted

MOST_BYTES = 2**30  # of rows to look through: a few seconds

logger = logging.getLogger(__name__)


def warn_of_rows_in_both(train: Dataset, held_out: Mapping[str, Dataset]) -> None:
    """
    Says how many held-out rows are equal to a row that is trained on, as in data with duplicates. Their loss falls as
    long as they are memorized, so that a run ends too late and its scores are too good. Data of more than 1 GiB are
    not looked through.

    Args:
        train ([`~datasets.Dataset`]): rows to train on.
        held_out (`Mapping[str, Dataset]`): splits with the same columns, by name.
    """
    if train.data.nbytes > MOST_BYTES:
        return
    columns = sorted(train.column_names)
    held = {
        name: list(_fingerprints(rows, columns))
        for name, rows in held_out.items()
        if sorted(rows.column_names) == columns
    }
    wanted = set().union(*held.values())
    trained = {row for row in _fingerprints(train, columns) if row in wanted}  # not of all: there may be millions
    if trained:
        parts = (
            f"{sum(row in trained for row in rows):,} of {counted(len(rows), 'row')} of {name}"
            for name, rows in held.items()
        )
        logger.warning(
            f"Held-out rows are among the rows to train on: {', '.join(parts)}. Their scores say little about other "
            "rows, and the run may end too late. Remove the duplicates, or hold out others with --dataset_test_split."
        )


def _fingerprints(rows: Dataset, columns: list[str]) -> Iterator[bytes]:
    """A hash of each row. Images are not decoded: of a file its path counts, else its bytes."""
    for batch in rows.select_columns(columns).with_format("arrow").iter(1000):
        for row in batch.to_pylist():
            text = json.dumps(row, sort_keys=True, default=lambda value: hashlib.blake2b(value).hexdigest())
            yield hashlib.blake2b(text.encode(), digest_size=16).digest()
