"""What a recipe shows on the terminal: the log of the library beside the progress bars."""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm


def set_up_console() -> None:
    """Shows what `grades_trl` and `vlm` log, from INFO on, on stderr.

    Characters that the terminal does not have are replaced: a row in Japanese must not end a run on a Windows console.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    for name in ("grades_trl", "vlm"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.handlers = [_TqdmHandler()]


class _TqdmHandler(logging.Handler):
    """Writes between the progress bars, which stay whole."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname}: "
        tqdm.write(level + self.format(record), file=sys.stderr)
