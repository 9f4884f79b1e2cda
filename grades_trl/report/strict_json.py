"""JSON that every reader takes: no NaN, no infinity, UTF-8, and never half a file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from grades_trl.durable import put_in_place


def jsonable(value: Any) -> Any:
    """`value` with everything that JSON cannot hold replaced.

    Args:
        value: dicts, lists and tuples of numbers and strings, nested in any way.

    Returns:
        The same with NaN and infinities as `None`, NumPy numbers as Python's, tuples as lists, and all other objects
        as their `str`.
    """
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def write_json(path: Path, value: Any) -> None:
    """Writes `jsonable(value)` to `path`, which is replaced as a whole: neither a kill nor a power
    cut leaves a torn file."""
    text = json.dumps(jsonable(value), indent=2, allow_nan=False, ensure_ascii=False)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text + "\n", encoding="utf-8")
        put_in_place(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error  # the original one does not name the file
