"""Reuses the output of the frozen prefix from the second epoch on, instead of computing it again.

The output of frozen layers for an example depends on that example alone: on its tokens and images, not on the rest of
the batch nor, with causal attention, on the padding after it. So the output is kept under a hash of the example's own
content: tokens, images, position ids. Shuffling and other batches do not matter, and a collator that changes examples
at random finds nothing. Packed examples that do not see each other are examples like others; whether they do is tried
on the first packed row, since not every model makes a mask of its position ids.

Whether that holds for a model is seen from what its passes do, see `ActivationCache`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from grades_trl.freezing.batch_content import Images, Segment, segments_of
from grades_trl.freezing.cache_use import CacheUse
from grades_trl.freezing.pass_state import PassState, same_state

logger = logging.getLogger(__name__)

MIB = 2**20
# A part of what a layer adds to a token. Packed examples that change it by no more are independent: rounding.
MIXING = 0.01
NOT_ONE_TENSOR = "more than one (batch, tokens, hidden) tensor passes between the skipped layers"


class ActivationCache:
    """
    Outputs of the last skipped language layer, in CPU memory.

    The cache turns itself off, with a warning, as soon as a training pass shows that reading it would change the
    training. It is only used while
    - each skipped layer returns exactly one tensor, of the shape of its input; in the language tower that is
      (batch, tokens, hidden);
    - each skipped layer is called once in a pass;
    - no rotary embedding looks at the longest row of the batch (`longrope`, dynamic NTK);
    - the pass leaves the random state and the model's buffers untouched until the last skipped layer returns (no
      dropout, noise, jitter or batch statistics);
    - the loss reads nothing else of the skipped layers: no router logits, no keys that live layers share, no image
      features beside the embeddings. A gradient that comes back to a skipped layer shows that it does.

    It answers in training passes alone, and only with what was kept with the same active adapters and settings. Passes
    whose examples cannot be told apart are computed, and the reason is said once.

    Args:
        max_bytes (`int`): nothing is kept beyond. A batch is read from the cache only if all of its rows are there, so
            it should hold the whole dataset: rows x tokens x hidden size x bytes per value.
        rows (`int`, *optional*): of an epoch, to say how much memory that is.

    Attributes:
        use (`CacheUse`): hits, misses, seconds saved.
        bytes (`int`): held now.
        off (`str`): why the cache is off; empty while it is on.
    """

    def __init__(self, max_bytes: int, rows: int | None = None):
        self.max_bytes = max_bytes
        self.bytes = 0
        self.off = ""
        self.use = CacheUse()
        self._dataset_rows = rows
        self._model: Any = None
        self._rows: dict[bytes, Tensor] = {}
        self._said: set[str] = set()
        self._announced = False
        self._rest: dict[str, tuple[None, ...] | None] = {}  # what a layer returns after its hidden state, if a tuple
        self._state: Any = None  # a PassState, from `reset` on
        self._apart: bool | None = None  # packed examples do not see each other; `None` until that was tried
        # Of the pass:
        self._output: Tensor | None = None
        self._segments: list[Segment] = []
        self._shape: tuple[int, ...] = ()
        self._before: list[Any] = []
        self._seen: set[str] = set()
        self._tries = False  # whether packed examples see each other

    @property
    def hit(self) -> bool:
        """Whether this pass is read from the cache."""
        return self._output is not None

    @property
    def stores(self) -> bool:
        """Whether this pass is kept."""
        return bool(self._segments) and not self.hit and not self.off

    def clear(self) -> None:
        """Forgets all outputs. Call it when weights of the prefix get other values."""
        self._rows.clear()
        self.bytes = 0
        self.end_pass()

    def reset(self, model: nn.Module) -> None:
        """Starts anew, for another prefix of `model`."""
        self.clear()
        self.use.next_layers()
        self.off, self._announced, self._apart = "", False, None
        self._rest.clear()
        self._model, self._state = model, PassState(model)
        if _positions_depend_on_the_batch(model):
            self.turn_off("the frequencies of its rotary embeddings depend on the longest row of a batch")

    def begin_pass(self, inputs: dict[str, Any], images: Images | None) -> None:
        """Looks up the examples of a training batch.

        Args:
            inputs (`dict[str, Any]`): keyword arguments of the model.
            images (`Images` or `None`): from `images_of`.
        """
        self.end_pass()
        if self.off or "input_ids" not in inputs:
            return
        ids = inputs["input_ids"]
        settings = repr(self._state.settings(ids.device.type)).encode()
        found = segments_of(self._model, inputs, images, settings, apart=self._apart is not False)
        for remark in {found.problem, found.remark} - self._said - {""}:
            self._said.add(remark)
            logger.warning("The activation cache of the frozen layers: %s.", remark)
        self._segments = found.segments
        self._tries = self._apart is None and len(ids) == 1 < len(self._segments)
        if found.problem or self._tries or any(segment.key not in self._rows for segment in self._segments):
            self.use.misses += 1
            if not found.problem:
                self._shape, self._before = tuple(ids.shape), self._state.random_state()
            return
        self.use.hits += 1
        row = self._rows[self._segments[0].key]
        output = torch.zeros(*ids.shape, row.shape[-1], dtype=row.dtype)
        for segment in self._segments:
            output[segment.row, segment.start : segment.end] = self._rows[segment.key]
        self._output = output.to(ids.device, non_blocking=True)

    def end_pass(self) -> None:
        """Forgets the batch."""
        self.use.end_pass()
        self._output, self._segments, self._before, self._seen, self._tries = None, [], [], set(), False

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
        if self._tries and not self._keeps_apart(forward, hidden, args, kwargs):
            self._apart = False  # the next packed row is kept as a whole
            self.end_pass()
            with torch.no_grad():
                return forward(*args, **kwargs)
        if not self._tries:  # which takes more time
            self.use.begin_forward(hidden.device)
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
            if self._tries:
                self._apart = True
            self.use.end_forward(result.device)
            self._store(result)
        self._rest[layer] = rest
        return result if rest is None else (result, *rest)

    def _keeps_apart(self, forward: Callable, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether what a layer makes of every second packed example stays the same when those between them change."""
        from transformers import Cache  # not before unsloth

        if hidden.shape[:-1] != self._shape:
            return False
        others = torch.zeros(*self._shape, 1, dtype=torch.bool)
        for segment in self._segments[::2]:
            others[segment.row, segment.start : segment.end] = True
        others = others.to(hidden.device)
        # No trace is left in the KV cache and in the random state, so that the run is the one without this.
        args = tuple(None if isinstance(value, Cache) else value for value in args)
        kwargs = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
        outputs = []
        with torch.no_grad():
            for example in (hidden.clone(), torch.where(others, -hidden, hidden)):
                with torch.random.fork_rng([hidden.device] if hidden.device.type == "cuda" else []):
                    its_args, its_kwargs = _with_hidden(example, args, kwargs)
                    output = forward(*its_args, **its_kwargs)
                outputs.append(output[0] if isinstance(output, tuple) else output)
            if any(not isinstance(output, Tensor) or output.shape != hidden.shape for output in outputs):
                return False
            output, behind_others = outputs
            change = (behind_others - output).float().norm(dim=-1, keepdim=True)
            added = (output - hidden).float().norm(dim=-1, keepdim=True)
            return bool(((change <= MIXING * added) | others).all())

    def _problem(self, hidden: Tensor, result: Any, rest: tuple | None, last: bool) -> str:
        if not isinstance(result, Tensor) or any(value is not None for value in rest or ()):
            return NOT_ONE_TENSOR
        if result.shape != hidden.shape or (last and (result.ndim != 3 or result.shape[:2] != self._shape)):
            return NOT_ONE_TENSOR
        if last and not same_state(self._state.random_state(), self._before):
            return "the skipped layers draw random numbers or change buffers (dropout, noise, batch statistics)"
        return ""

    def run_encoder_layer(self, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Runs a layer that an `EncoderCache` stands for, in a pass that is kept. What comes of it may be read by
        way of the last skipped layer alone."""
        hidden = _hidden(args, kwargs)
        if hidden is not None:
            self.use.begin_forward(hidden.device)
        output = forward(*args, **kwargs)
        if not isinstance(output, Tensor):
            self.end_pass()  # the encoder's cache is off from now on
            return output
        if not output.requires_grad:
            return self._watched(output)
        output.register_hook(self._comes_back)  # the encoder's cache watches it too
        return output

    def _comes_back(self, gradient: Tensor) -> None:
        self.turn_off("the loss reads more of the skipped layers than their output")

    def _watched(self, hidden: Tensor) -> Tensor:
        """The same values, cut off from all before. Only what the cache does not keep could send a gradient back."""
        leaf = hidden.detach().requires_grad_()
        leaf.register_hook(self._comes_back)
        with torch.enable_grad():
            return leaf.clone()  # a leaf could not be changed in place

    def turn_off(self, reason: str) -> None:
        """Stops keeping and reading outputs, until the prefix changes."""
        if not self.off:
            self.off = reason
            self.clear()
            logger.warning("The activation cache is off for this frozen prefix: %s.", reason)

    def _store(self, hidden: Tensor) -> None:
        hidden = hidden.cpu()
        if not self._announced:
            self._announced = True
            self._announce(hidden)
        for segment in self._segments:
            row = hidden[segment.row, segment.start : segment.end]
            size = row.numel() * row.element_size()
            if segment.key not in self._rows and self.bytes + size <= self.max_bytes:
                self._rows[segment.key] = row.clone()
                self.bytes += size
        self.use.peak_bytes = max(self.use.peak_bytes, self.bytes)

    def _announce(self, hidden: Tensor) -> None:
        if self._dataset_rows is None:
            logger.info("The outputs of the frozen layers are cached, in up to %.0f MiB.", self.max_bytes / MIB)
            return
        tokens = sum(segment.end - segment.start for segment in self._segments) / len(self._segments)
        needed = self._dataset_rows * tokens * hidden.shape[-1] * hidden.element_size()
        logger.info(
            "The outputs of the frozen layers are cached: %s rows, about %s MiB%s.",
            f"{self._dataset_rows:,}",
            f"{needed / MIB:,.0f}",
            "" if needed <= self.max_bytes else f", of which activation_cache_mib allows {self.max_bytes / MIB:,.0f}",
        )


def _positions_depend_on_the_batch(model: nn.Module) -> bool:
    """Whether rotary embeddings take other frequencies for all rows of a batch as soon as one of them is long."""
    types = (getattr(module, "rope_type", None) for module in model.modules())  # a name, or one for each kind of layer
    names = (name for rope in types for name in (rope.values() if isinstance(rope, dict) else (rope,)))
    return any(isinstance(name, str) and ("dynamic" in name or name == "longrope") for name in names)


def _hidden(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """The hidden state that a layer is called with: Transformers passes it first, or by this name."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    return hidden if isinstance(hidden, Tensor) and hidden.is_floating_point() else None


def _with_hidden(hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})
