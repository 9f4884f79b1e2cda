"""Hides messages of the libraries beneath, in a recipe: each by an entry of its own, with the reason why that is safe.

All others are shown, and `--debug` shows these too. To import this module hides them, and the progress bars of all
libraries where stderr is no terminal. The recipes do that before they import transformers, since some messages come
when a library is imported; nothing else in `grades_trl` imports it.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from functools import partialmethod
from typing import NamedTuple

from tqdm import tqdm

from grades_trl.recipe.bad_input import FLAG


class Message(NamedTuple):
    """
    A message that recipes hide.

    Attributes:
        logger (`str`): the logger that it comes from; of a warning, the module.
        pattern (`str`): a regular expression of the whole message.
        reason (`str`): why it is safe to hide.
    """

    logger: str
    pattern: str
    reason: str


HIDDEN = (
    Message(
        "bitsandbytes.backends.cpu.ops",
        r"Failed to load CPU gemm_4bit_forward from kernels-community: No module named 'kernels'\. .*",
        "an offer at import: a faster kernel for 4-bit weights on a CPU, from a package that no recipe needs",
    ),
    Message(
        "trl.trainer.sft_trainer",
        r"\[RANK \d+\] Padding-free training is enabled, but the attention implementation is not set to .*",
        "packed.py tests whether the model keeps packed examples apart, and warns if it does not",
    ),
    Message(
        "trl.trainer.sft_trainer",
        r"\[RANK \d+\] You are using packing, but the attention implementation is not set to .*",
        "the same fact again, see above",
    ),
    Message(
        "transformers.trainer",
        r"There were missing keys in the checkpoint model loaded: \['lm_head\.weight'\]\.",
        "a checkpoint leaves the output layer out if it is the input embedding, which it has",
    ),
    Message(
        "transformers.trainer_utils",
        r"mtime may not be reliable on this filesystem, falling back to numerical ordering",
        "checkpoints that were saved within a second are told apart by their steps, which is right",
    ),
    Message(
        "transformers.tokenization_utils_tokenizers",
        r"Ignoring clean_up_tokenization_spaces=True for BPE tokenizer .*",
        "it ignores a setting in the tokenizer's files that would spoil answers; nothing is to be done",
    ),
)

HIDDEN_WARNINGS = (
    Message(
        "peft.utils.save_and_load",
        r"Could not find a config file in .* - will assume that the vocabulary was not modified\.",
        "whenever an adapter is saved offline, or of a GGUF file; no recipe changes the vocabulary",
    ),
)


class _Hide(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not any(m.logger == record.name and re.fullmatch(m.pattern, text, re.DOTALL) for m in HIDDEN)


_HIDE = _Hide()


if not sys.stderr.isatty():  # a bar would fill a file with copies of itself
    os.environ.setdefault("TQDM_DISABLE", "1")  # for child processes: torch has imported tqdm, which read it then
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=os.environ["TQDM_DISABLE"] != "0")  # type: ignore[method-assign]

if FLAG not in sys.argv:
    for message in HIDDEN:
        logging.getLogger(message.logger).addFilter(_HIDE)
    for message in HIDDEN_WARNINGS:
        warnings.filterwarnings("ignore", message.pattern, module=re.escape(message.logger))
