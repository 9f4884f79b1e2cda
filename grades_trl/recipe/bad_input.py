"""Wrong arguments, files, data and models: one or two lines on stderr and exit code 2. `--debug` shows the traceback.

What TRL, Transformers or the hub refuse before training ends in the same way. All other errors keep their traceback:
they are not the user's. It imports the standard library and `terminal.py` alone, since Unsloth must be imported before
all else.
"""

from __future__ import annotations

import dis
import itertools
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from grades_trl.recipe.terminal import wrapped

OURS = ("grades_trl", "vlm", "recipes", "__main__")
# Modules of other libraries that check arguments and the login. Before training, their errors are the user's.
CHECKS = (
    *("trl.trainer", "trl.chat_template_utils", "transformers.trainer", "transformers.training_args"),
    *("transformers.optimization", "transformers.integrations", "accelerate.accelerator", "accelerate.utils"),
    "huggingface_hub",
)
EXIT_CODE = 2  # that of argparse
LONGEST = 600  # characters of a message
FLAG = "--debug"
# All control characters but tab and line feed, and those that turn the direction of the text around them
CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

_training_has_begun = False


class BadInput(ValueError):
    """What the user has given cannot be used. Made of an error of another library, see [`blamed_on`]."""


def printable(text: str) -> str:
    r"""A text of data, answers, names or paths for the terminal: its escape sequences are shown (`\x1b[31m`), and not
    carried out. Line feeds and tabs stay."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


@contextmanager
def blamed_on(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turns errors of other libraries while something of the user's is read into a `BadInput` that names it.

    Args:
        what (`str`): what is read, as in `"my_model: cannot be loaded"`; empty if the errors say it.
        kinds (`type[Exception]`): the errors that mean that it cannot be read.
    """
    try:
        yield
    except kinds as error:
        if _raised_by_us(error):
            raise
        reason = str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
        raise BadInput(f"{what}: {reason}" if what else reason) from error


def training_begins() -> None:
    """From now on all errors keep their traceback."""
    global _training_has_begun
    _training_has_begun = True


def run(main: Callable[[], None]) -> None:
    """Runs the `main` of a recipe. `--debug` without a value is taken out of `sys.argv`.

    Raises:
        SystemExit: with code 2, after a message on stderr, for what the user has to correct before training.
    """
    with bad_input_ends_here():
        # With a value, it is a flag of the Trainer.
        words = itertools.pairwise([*sys.argv[1:], "--"])
        sys.argv[1:] = [word for word, after in words if word != FLAG or not after.startswith("-")]
        main()


@contextmanager
def bad_input_ends_here() -> Iterator[None]:
    """Ends the process as [`run`] says."""
    global _training_has_begun
    _training_has_begun = False
    debug = FLAG in sys.argv
    try:
        yield
    except Exception as error:
        refused = isinstance(error, BadInput) or _raised_by_us(error) or _refused_by_trainer(error)
        if _training_has_begun or not refused:
            raise
        if debug:
            print(printable("".join(traceback.format_exception(error))), file=sys.stderr)
        else:
            process = f"[process {os.environ['RANK']}] " if os.environ.get("RANK", "0") != "0" else ""
            print(wrapped(f"{process}Error: {_in_short(error)}", sys.stderr), file=sys.stderr)
            print(f"{FLAG} shows where it was found.", file=sys.stderr)
        raise SystemExit(EXIT_CODE) from None


def _raised_by_us(error: BaseException) -> bool:
    """Whether the error comes from a `raise` in our own code: a check that has found something. What `int("x")` or
    another library raises is not."""
    return _raised_in(OURS, error)


def _refused_by_trainer(error: BaseException) -> bool:
    """Whether TRL, Transformers or the hub have raised it in a check."""
    return _raised_in(CHECKS, error, RuntimeError, NotImplementedError)


def _raised_in(modules: tuple[str, ...], error: BaseException, *more_kinds: type[Exception]) -> bool:
    """Whether the error comes from a `raise` in one of these modules, or in one below or beside it that begins with
    its name (`transformers.trainer_utils`)."""
    last: TracebackType | None = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or not isinstance(error, (ValueError, TypeError, OSError, ImportError, *more_kinds)):
        return False
    is_there = last.tb_frame.f_globals.get("__name__", "").startswith(modules)
    return is_there and last.tb_frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _in_short(error: BaseException) -> str:
    """The message in one line: other libraries write paragraphs."""
    text = printable(" ".join(str(error).split()))
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ..."
