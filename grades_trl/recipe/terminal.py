"""Text for a terminal: it breaks between words. It imports the standard library alone, see `bad_input.py`."""

from __future__ import annotations

import os
import textwrap
from typing import TextIO

USUAL = 80  # columns, of a terminal that does not know its own
NARROWEST = 20  # columns: below that, a terminal may break words


def wrapped(text: str, stream: TextIO) -> str:
    """Breaks lines that are longer than the terminal between words, with a small indent after a break. Paths and
    flags stay whole. In a pipe and in a file every line stays one line, for those who search it.

    Args:
        text (`str`): one line or several, each with an indent of its own.
        stream (`TextIO`): what it will be written to.
    """
    if not stream.isatty():
        return text
    # One less: some terminals go to the next line as soon as one is full.
    columns = max((os.get_terminal_size(stream.fileno()).columns or USUAL) - 1, NARROWEST)
    return "\n".join(broken for line in text.split("\n") for broken in _broken(line, columns))


def _broken(line: str, columns: int) -> list[str]:
    if len(line) <= columns:
        return [line]
    indent = line[: len(line) - len(line.lstrip())] + "  "
    return textwrap.wrap(line, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
