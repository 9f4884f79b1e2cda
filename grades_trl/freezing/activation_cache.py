"""From the second epoch on, the output of the frozen prefix can be read from memory instead of being computed again.

The output of frozen blocks for a sample depends on that sample alone: on its tokens and pictures, not on the rest of
the batch nor, with causal attention, on the padding after it. So it is kept under a hash of the sample's own content:
shuffling and other batches do not matter, and a collator that changes samples at random finds nothing.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

# What the prefix reads, and what it does not. Any other tensor (position ids of packed samples, patches of several
# pictures in one row) could change its output in ways that the key does not know: then nothing is cached.
CONTENT = ("input_ids", "attention_mask", "pixel_values")
NOT_READ = ("labels", "num_items_in_batch")


class PrefixCache:
    """
    Outputs of the deepest cut language block, on CPU memory.

    Args:
        max_bytes (`int`): nothing is stored beyond. A batch is read from the cache only if all of its rows are there,
            so the bound should hold the whole data set: rows x tokens x hidden size x bytes per value.

    Attributes:
        hits (`int`), misses (`int`): training passes that were read from the cache, and that were not.
        bytes (`int`): held now.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.bytes = self.hits = self.misses = 0
        self.output: Tensor | None = None  # of the prefix, for the pass that is under way
        self._rows: dict[bytes, Tensor] = {}
        self._keys: list[bytes] = []
        self._lengths: list[int] = []

    def clear(self) -> None:
        """To be called when the cut moves: what is kept belongs to another depth."""
        self._rows.clear()
        self.bytes, self.output, self._keys = 0, None, []

    def begin_pass(self, inputs: dict[str, Any]) -> None:
        """Looks up the rows of a training batch; `output` is set if all are there."""
        self.output, self._keys = None, []
        if not _is_cacheable(inputs):
            return
        device = inputs["input_ids"].device
        # One transfer from the device for each, not for each row of each.
        inputs = {name: inputs[name].cpu() for name in CONTENT if isinstance(inputs.get(name), Tensor)}
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        self._lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(1).tolist()
        self._keys = [_key(inputs, row, length) for row, length in enumerate(self._lengths)]
        if any(key not in self._rows for key in self._keys):
            self.misses += 1
            return
        self.hits += 1
        rows = pad_sequence([self._rows[key] for key in self._keys], batch_first=True)
        # As wide as the batch, which may be padded further than its longest row.
        rows = nn.functional.pad(rows, (0, 0, 0, ids.shape[1] - rows.shape[1]))
        self.output = rows.to(device, non_blocking=True)

    def store(self, hidden: Tensor) -> None:
        """Keeps the output (batch, tokens, hidden) that was computed for the rows of this pass."""
        for key, length, row in zip(self._keys, self._lengths, hidden, strict=False):
            size = length * row.shape[-1] * row.element_size()
            if key not in self._rows and self.bytes + size <= self.max_bytes:
                self._rows[key] = row[:length].detach().cpu().clone()
                self.bytes += size


def draws_at_random(model: nn.Module) -> bool:
    """Whether the output of a model in training mode changes from pass to pass: it has dropout, or NEFTune's noise."""
    return any(
        (isinstance(module, nn.Dropout) and module.p > 0)
        or getattr(module, "attention_dropout", 0.0) > 0
        or hasattr(module, "neftune_noise_alpha")
        for module in model.modules()
    )


def _is_cacheable(inputs: dict[str, Any]) -> bool:
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and name not in NOT_READ}
    if "input_ids" not in tensors or not set(tensors) <= set(CONTENT):
        return False
    if any(len(value) != len(tensors["input_ids"]) for value in tensors.values()):
        return False
    mask = tensors.get("attention_mask")  # padding must come after the tokens
    return mask is None or (mask.ndim == 2 and bool((mask[:, :-1] >= mask[:, 1:]).all()))


def _key(inputs: dict[str, Any], row: int, length: int) -> bytes:
    digest = hashlib.blake2b(_bytes(inputs["input_ids"][row, :length]), digest_size=16)
    if isinstance(inputs.get("pixel_values"), Tensor):
        digest.update(_bytes(inputs["pixel_values"][row]))
    return digest.digest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
