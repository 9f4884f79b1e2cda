"""Numbers and texts in sentences."""

from __future__ import annotations


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number and what it counts: "1 row", "2 rows", "1,000 matrices were".

    Args:
        number (`int`): how many.
        one (`str`): the word for one, with its verb where there is one.
        many (`str`, *optional*): for all other numbers; by default `one` with an "s".
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def shortened(text: str, width: int) -> str:
    """The beginning of a text, in one line. It may end within a word: some languages have no spaces."""
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 4].rstrip()} ..."
