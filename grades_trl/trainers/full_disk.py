"""A checkpoint that does not fit on the disk: it is said, its half is deleted, and training goes on."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from grades_trl.report.disk import is_of_the_disk

logger = logging.getLogger(__name__)


def saved_or_said(checkpoint: Path, save: Callable[[], None]) -> bool:
    """Saves a checkpoint. Earlier ones stay: the Trainer deletes old ones after it has written the new one.

    Args:
        checkpoint (`Path`): its folder.
        save (`Callable`): writes it.

    Returns:
        `bool`: whether it was saved. If it did not fit, a warning names the file, and the folder is deleted.
    """
    try:
        save()
    except Exception as error:
        if not is_of_the_disk(error):
            raise
        files = [path for path in checkpoint.rglob("*") if path.is_file()]
        torn = max(files, key=lambda path: path.stat().st_mtime, default=checkpoint)
        logger.warning(
            f"{checkpoint} was not saved: {torn.name} did not fit on the disk ({error}). Training goes on, and "
            "earlier checkpoints stay. Make room before the end: the model has to be saved."
        )
        shutil.rmtree(checkpoint, ignore_errors=True)
        return False
    return True
