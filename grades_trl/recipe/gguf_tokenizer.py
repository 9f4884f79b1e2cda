"""The tokenizer of a GGUF file, as the model was pretrained with it.

Transformers (5.17) gives the byte-level BPE of a file of the architecture `llama` the splits of GPT-2 and, for unknown
bytes, SentencePiece's fallback and decoder. By these llama.cpp's converter takes the saved tokenizer for a
SentencePiece one, and llama.cpp aborts as soon as it reads a text with the file that it has made.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, pre_tokenizers

from grades_trl.extras import require

logger = logging.getLogger(__name__)

# Llama 3's pattern, which is in its tokenizer.json too
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
    r"|\s+"
)


def _gpt_2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digits() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt_2()])


def _llama_3() -> Any:
    split = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# `tokenizer.ggml.pre` -> how a text is split before the merges; the names are those of llama.cpp (src/llama-vocab.cpp)
SPLITS = {
    **dict.fromkeys(("default", "gpt-2"), _gpt_2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), _digits),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _llama_3),
}


def mend_tokenizer(tokenizer: Any, path: Path) -> None:
    """
    Gives a tokenizer that Transformers has read from a GGUF file the splits and the decoder of the model.

    Args:
        tokenizer: from `AutoTokenizer.from_pretrained(..., gguf_file=...)`. One without the fallback, as Qwen's, is
            right already.
        path (`Path`): the file.
    """
    backend = tokenizer.backend_tokenizer
    if not getattr(backend.model, "byte_fallback", False):
        return
    kind, split = vocabulary_of(path)
    if kind != "gpt2":
        return
    split = split or "default"
    if split in SPLITS:
        backend.pre_tokenizer = SPLITS[split]()
    else:
        logger.warning(
            f"{path}: its tokenizer splits texts in the way {split}, which is not known here: numbers and spaces may "
            "become other tokens than in its pretraining. Use the model's own folder instead of a GGUF file."
        )
    backend.model.byte_fallback = backend.model.fuse_unk = False
    backend.decoder = decoders.ByteLevel()


def vocabulary_of(path: Path) -> tuple[str | None, str | None]:
    """The kind of a file's vocabulary (`gpt2` is byte-level BPE, `llama` SentencePiece), and how it splits texts."""
    require("gguf", "GGUF files")
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = (reader.get_field(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    kind, split = (field.contents() if field else None for field in fields)
    return kind, split
