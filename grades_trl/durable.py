"""Files that are whole after a power cut: a rename alone can reach the disk before what is in the file."""

from __future__ import annotations

import os
from pathlib import Path


def put_in_place(partial: Path, path: Path) -> None:
    """Renames a complete file to `path`, or a complete folder where there is none. After a power cut there is either
    what was at `path` before, or all of the new one.

    Args:
        partial (`Path`): in the same folder as `path`, or on the same disk.
        path (`Path`): its place.
    """
    for file in (partial, *partial.rglob("*")):
        _wait_for(file)
    os.replace(partial, path)
    _wait_for(path.parent)


def _wait_for(path: Path) -> None:
    """Until the disk has what is in a file, or the names in a folder. Windows knows no such thing of folders, and of
    files only where they are open for writing."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
