"""A disk that is full: it is said once, by the name of the file that cannot be written, and training goes on."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grades_trl.report.strict_json import jsonable

logger = logging.getLogger(__name__)

# What the libraries that write checkpoints say when a file does not fit; none of them raises the OSError itself.
NO_SPACE = (
    *("no space left", "file too large", "disk quota exceeded", "input/output error"),
    *("failed writing file", "file write failed", "unexpected pos", "iostream error"),  # torch
)


def is_of_the_disk(error: Exception) -> bool:
    """Whether a file could not be written, as an `OSError` or in the words of torch and safetensors."""
    text = str(error).lower()
    return isinstance(error, OSError) or any(words in text for words in NO_SPACE)


@contextmanager
def tolerated(path: Path, said: set[Path] | None = None) -> Iterator[None]:
    """Turns an error of the disk into a warning that names the file.

    Args:
        path (`Path`): what is written inside.
        said (`set[Path]`, *optional*): files that a warning has named; they are named once.
    """
    try:
        yield
    except OSError as error:
        if said is None or path not in said:
            logger.warning(f"{path} could not be written ({error.strerror or error}). All else goes on.")
        if said is not None:
            said.add(path)


class Lines:
    """
    A file of JSON lines that grows. Lines that do not fit are kept, and written when there is room again; half a line
    is taken back.

    Args:
        path (`Path`): of the file.
        said (`set[Path]`): see [`tolerated`].
    """

    def __init__(self, path: Path, said: set[Path]):
        self.path = path
        self._said = said
        self._waiting: list[str] = []

    def append(self, rows: list[dict[str, Any]]) -> None:
        """They are on disk when it returns, unless they do not fit."""
        self._waiting += [json.dumps(jsonable(row), allow_nan=False) + "\n" for row in rows]
        if not self._waiting:
            return
        # Without a buffer, which would try again when the file is closed
        with tolerated(self.path, self._said), self.path.open("ab", buffering=0) as file:
            end, data = file.tell(), "".join(self._waiting).encode()
            if file.write(data) < len(data):
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._waiting = []
