"""Reuses the output of the frozen prefix from the second epoch on, instead of computing it again.

The output of frozen layers for an example depends on that example alone: on its tokens and images, not on the rest of
the batch nor, with causal attention, on the padding after it. So the output is kept under a hash of the example's own
content. Shuffling and other batches do not matter, and a collator that changes examples at random finds nothing.

Whether that holds for a model is seen from what its passes do, see `ActivationCache`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from grades_trl.freezing.pass_state import PassState, same_state

logger = logging.getLogger(__name__)

# Tensors that the prefix reads, and that it does not. Any other tensor (position ids of packed examples, patches of
# several images in one row) could change its output in ways that the key does not know. Such a pass is not cached.
CONTENT = ("input_ids", "attention_mask", "pixel_values")
NOT_READ = ("labels", "shift_labels", "num_items_in_batch")
SETTINGS = (bool, int, float, str, type(None))
NOT_ONE_TENSOR = "more than one (batch, tokens, hidden) tensor passes between the skipped layers"


class ActivationCache:
    """
    Outputs of the last skipped language layer, in CPU memory.

    The cache turns itself off, with a warning, as soon as a training pass shows that reading it would change the
    training. It is only used while
    - each skipped layer returns exactly one tensor, of the shape of its input; in the language tower that is
      (batch, tokens, hidden);
    - each skipped layer is called once in a pass;
    - the pass leaves the random state and the model's buffers untouched until the last skipped layer returns (no
      dropout, noise, jitter or batch statistics);
    - the loss reads nothing else of the skipped layers: no router logits, no keys that live layers share, no image
      features beside the embeddings. A gradient that comes back to a skipped layer shows that it does.

    It answers in training passes alone, and only with what was kept with the same active adapters and settings.

    Args:
        max_bytes (`int`): nothing is kept beyond. A batch is read from the cache only if all of its rows are there, so
            it should hold the whole dataset: rows x tokens x hidden size x bytes per value.

    Attributes:
        hits (`int`), misses (`int`): training passes that were read from the cache, and that were not.
        bytes (`int`): held now.
        off (`str`): why the cache is off; empty while it is on.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.bytes = self.hits = self.misses = 0
        self.off = ""
        self._rows: dict[bytes, Tensor] = {}
        self._rest: dict[str, tuple[None, ...] | None] = {}  # what a layer returns after its hidden state, if a tuple
        self._state: Any = None  # a PassState, from `reset` on
        # Of the pass:
        self._output: Tensor | None = None
        self._keys: list[bytes] = []
        self._lengths: list[int] = []
        self._shape: tuple[int, ...] = ()
        self._before: list[Any] = []
        self._seen: set[str] = set()

    @property
    def hit(self) -> bool:
        """Whether this pass is read from the cache."""
        return self._output is not None

    @property
    def stores(self) -> bool:
        """Whether this pass is kept."""
        return bool(self._keys) and not self.hit and not self.off

    def clear(self) -> None:
        """Forgets all outputs. Call it when weights of the prefix get other values."""
        self._rows.clear()
        self.bytes = 0
        self.end_pass()

    def reset(self, model: nn.Module) -> None:
        """Starts anew, for another prefix of `model`."""
        self.clear()
        self.off = ""
        self._rest.clear()
        self._state = PassState(model)

    def begin_pass(self, inputs: dict[str, Any]) -> None:
        """Looks up the rows of a training batch, given by the keyword arguments of the model."""
        self.end_pass()
        if self.off or not _is_cacheable(inputs):
            return
        ids = inputs["input_ids"]
        # One transfer from the device for each input, not for each row.
        content = {name: inputs[name].cpu() for name in CONTENT if isinstance(inputs.get(name), Tensor)}
        mask = content.get("attention_mask")
        self._lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(1).tolist()
        settings = self._settings(inputs)
        self._keys = [_key(content, settings, row, length) for row, length in enumerate(self._lengths)]
        if any(key not in self._rows for key in self._keys):
            self.misses += 1
            self._shape, self._before = tuple(ids.shape), self._state.random_state()
            return
        self.hits += 1
        rows = pad_sequence([self._rows[key] for key in self._keys], batch_first=True)
        # As wide as the batch, which may be padded further than its longest row.
        rows = nn.functional.pad(rows, (0, 0, 0, ids.shape[1] - rows.shape[1]))
        self._output = rows.to(ids.device, non_blocking=True)

    def end_pass(self) -> None:
        """Forgets the batch."""
        self._output, self._keys, self._before, self._seen = None, [], [], set()

    def read(self, layer: str, args: tuple, kwargs: dict[str, Any], *, last: bool) -> Any:
        """The output of a skipped layer in a pass that is read from the cache. Only that of the last one matters; the
        others hand on what they get."""
        hidden = self._output if last else _hidden(args, kwargs)
        rest = self._rest.get(layer)
        return hidden if rest is None else (hidden, *rest)

    def run_and_store(
        self, layer: str, forward: Callable, args: tuple, kwargs: dict[str, Any], *, first: bool, last: bool
    ) -> Any:
        """Runs a skipped layer, checks that the cache may stand for it, and keeps the output of the last one.

        Args:
            layer (`str`): its path.
            forward (`Callable`): the forward of the layer, called with `args` and `kwargs`.
            first (`bool`): it is the first of its list of layers.
            last (`bool`): it is the one whose output the cache keeps.
        """
        hidden = _hidden(args, kwargs)
        if hidden is None or layer in self._seen:
            self.turn_off(NOT_ONE_TENSOR if hidden is None else "a skipped layer is called twice in a pass")
            with torch.no_grad():
                return forward(*args, **kwargs)
        self._seen.add(layer)
        with torch.enable_grad():
            if first:
                args, kwargs = _with_hidden(self._watched(hidden), args, kwargs)
            output = forward(*args, **kwargs)
            result, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
            problem = self._problem(hidden, result, rest, last)
            if problem:
                self.turn_off(problem)
                return output
            result = result.detach() if last else self._watched(result)
        if last:
            self._store(result)
        self._rest[layer] = rest
        return result if rest is None else (result, *rest)

    def _problem(self, hidden: Tensor, result: Any, rest: tuple | None, last: bool) -> str:
        if not isinstance(result, Tensor) or any(value is not None for value in rest or ()):
            return NOT_ONE_TENSOR
        if result.shape != hidden.shape or (last and (result.ndim != 3 or result.shape[:2] != self._shape)):
            return NOT_ONE_TENSOR
        if last and not same_state(self._state.random_state(), self._before):
            return "the skipped layers draw random numbers or change buffers (dropout, noise, batch statistics)"
        return ""

    def _watched(self, hidden: Tensor) -> Tensor:
        """The same values, cut off from all before. Only what the cache does not keep could send a gradient back."""
        leaf = hidden.detach().requires_grad_()
        leaf.register_hook(lambda _: self.turn_off("the loss reads more of the skipped layers than their output"))
        return leaf.clone()  # a leaf could not be changed in place

    def turn_off(self, reason: str) -> None:
        """Stops keeping and reading outputs, until the prefix changes."""
        if not self.off:
            self.off = reason
            self.clear()
            logger.warning("The activation cache is off for this frozen prefix: %s.", reason)

    def _store(self, hidden: Tensor) -> None:
        for key, length, row in zip(self._keys, self._lengths, hidden, strict=True):
            size = length * row.shape[-1] * row.element_size()
            if key not in self._rows and self.bytes + size <= self.max_bytes:
                self._rows[key] = row[:length].cpu().clone()
                self.bytes += size

    def _settings(self, inputs: dict[str, Any]) -> bytes:
        """What the output depends on beside the example."""
        arguments = {name: value for name, value in inputs.items() if name not in CONTENT + NOT_READ}
        return repr((sorted(arguments.items()), *self._state.settings(inputs["input_ids"].device.type))).encode()


def _hidden(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden state that a layer is called with: Transformers passes it first, or by this name."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    return hidden if isinstance(hidden, Tensor) and hidden.is_floating_point() else None


def _with_hidden(hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


def _is_cacheable(inputs: dict[str, Any]) -> bool:
    read = {name: value for name, value in inputs.items() if name not in NOT_READ}
    tensors = {name: read.pop(name) for name in CONTENT if isinstance(read.get(name), Tensor)}
    if "input_ids" not in tensors or not all(isinstance(value, SETTINGS) for value in read.values()):
        return False
    if any(len(value) != len(tensors["input_ids"]) for value in tensors.values()):
        return False
    mask = tensors.get("attention_mask")  # padding must come after the tokens
    return mask is None or (mask.ndim == 2 and bool((mask[:, :-1] >= mask[:, 1:]).all()))


def _key(content: dict[str, Tensor], settings: bytes, row: int, length: int) -> bytes:
    digest = hashlib.blake2b(settings, digest_size=16)
    digest.update(_bytes(content["input_ids"][row, :length]))
    if "pixel_values" in content:
        digest.update(_bytes(content["pixel_values"][row]))
    return digest.digest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
