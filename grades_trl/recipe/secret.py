"""Tokens and passwords of a command line: used, and written nowhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

SECRET = ("token", "password", "secret", "api_key")  # at the end of a name,
NO_SECRET = ("eos_token", "pad_token")  # if it is none of these


def is_secret(name: str) -> bool:
    """Whether a flag or a setting of that name holds a secret."""
    name = name.removeprefix("--").replace("-", "_")
    return name.endswith(SECRET) and name not in NO_SECRET


def without_secrets(argv: Sequence[str]) -> list[str]:
    """The words of a command, with `***` for every value of a flag that is a secret."""
    words: list[str] = []
    for word in argv:
        flag, equals, _ = word.partition("=")
        if words and words[-1].startswith("--") and is_secret(words[-1]):
            words.append("***")
        elif equals and flag.startswith("--") and is_secret(flag):
            words.append(f"{flag}=***")
        else:
            words.append(word)
    return words


def hide_secrets(training: Any) -> None:
    """
    Takes the secrets of this process to where its libraries look for them, and nobody writes them down.

    The Trainer pickles its arguments beside every checkpoint, and W&B records `sys.argv`. So `--hub_token` becomes the
    environment's `HF_TOKEN`, which huggingface_hub reads where no token is given.

    Args:
        training (`TrainingArguments`): their `hub_token` is `None` afterwards.
    """
    if training.hub_token is not None:
        os.environ["HF_TOKEN"] = training.hub_token
        training.hub_token = None
    sys.argv[:] = without_secrets(sys.argv)
