"""One folder, one run: the process that trains into a folder holds a lock on a file in it."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

LOCK = "_run.lock"  # nothing that begins with "_" is uploaded

_held: dict[Path, IO[str]] = {}  # by this process: to close a file gives up its lock


def lock(folder: Path) -> None:
    """Locks a folder until this process ends, however it ends: the system lets go of the lock of a process that is
    gone, on this machine or, in a shared folder, on another one. The file says who has it, and stays.

    Raises:
        ValueError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = (folder / LOCK).resolve()
    if path in _held:
        return
    file = path.open("a+", encoding="utf-8")
    try:
        _take(file)
    except (BlockingIOError, PermissionError) as error:
        raise ValueError(
            f"{folder} is in use: {_owner(file)} trains into it. Wait for its end, or choose another --output_dir."
        ) from error
    except OSError as error:
        logger.warning(f"{path} cannot be locked ({error}): a second run in this folder would not be noticed.")
    file.truncate(0)
    file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}) + "\n")
    file.flush()
    _held[path] = file


def _take(file: IO[str]) -> None:
    if sys.platform == "win32":
        import msvcrt

        os.lseek(file.fileno(), 2**30, os.SEEK_SET)  # far behind what is in it: nobody can read what is locked
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        # Not flock: processes that a killed run has left behind, such as its data loader's, would still hold it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _owner(file: IO[str]) -> str:
    file.seek(0)
    try:
        owner = json.loads(file.read())
        return f"process {owner['pid']} on {owner['host']}"
    except ValueError:  # it has only just begun
        return "another process"
