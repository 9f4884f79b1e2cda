"""How much memory one training step takes beside weights, gradients and optimizer: known without running the model.

A forward pass runs on fake tensors, which have shapes and no numbers, and torch's hooks see what autograd would keep
for the backward pass. Layers of one kind keep the same, so only the first of each kind runs, and the others count as
it does. That layer also runs forward and backward alone, which tells how much is needed for a moment.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from grades_trl.model import find_layers
from grades_trl.model.flops import PLACEHOLDERS, TokenCounter

IMAGE_SIDE = 1024  # pixels of an image, for models that take images of any size
TEXT_TOKENS = 512  # beside the images of a row whose length nothing limits
LOSS_CHUNK = 256  # learned tokens that TRL's chunked loss computes at a time


@dataclass(frozen=True)
class StepMemory:
    """
    What one micro-batch takes on the device, in bytes.

    Attributes:
        saved (`int`): kept from the forward pass for the backward pass.
        layer (`int`): more than that for a moment, while the largest layer goes backward (with checkpointing: is
            computed again, and goes backward).
        logits (`int`): for a moment, between forward and backward: logits, their loss, and 16-bit copies of 32-bit
            weights, which autocast keeps as long as the forward pass runs.
        rows (`int`), length (`int`): of the micro-batch; tokens per row.
        image_tokens (`int`): of these, those of an image.
        tokens (`dict[str, float]`): tower -> tokens of the micro-batch.
    """

    saved: int
    layer: int
    logits: int
    rows: int
    length: int
    image_tokens: int
    tokens: dict[str, float]

    @property
    def peak(self) -> int:
        return self.saved + max(self.layer, self.logits)


def step_memory(
    model: Any,
    rows: int,
    length: int | None,
    *,
    checkpointing: bool = False,
    reentrant: bool = False,
    autocast: torch.dtype | None = None,
    loss: str = "chunked_nll",
    vision: bool = False,
    batch: dict[str, Any] | None = None,
) -> StepMemory:
    """Memory of a training step, found with fake tensors.

    Args:
        model (`nn.Module`): a Transformers model on the meta device, as it trains, wrapped by PEFT or not. It cannot
            be used for anything else afterwards.
        rows (`int`): per micro-batch.
        length (`int` or `None`): tokens per row; `None` for 512 beside the image, or 1,024 without.
        checkpointing (`bool`, *optional*, defaults to `False`), reentrant (`bool`, *optional*, defaults to `False`):
            as the trainer is told.
        autocast (`torch.dtype`, *optional*): of mixed precision.
        loss (`str`, *optional*, defaults to `"chunked_nll"`): `"chunked_nll"`, `"nll"`, or `"liger"`.
        vision (`bool`, *optional*, defaults to `False`): each row has one image: of the size that the config names,
            or of 1024 x 1024 pixels where the model takes any size.
        batch (`dict`, *optional*): a micro-batch of the run's own data, in the place of `rows`, `length` and `vision`.

    Raises:
        ValueError: `vision` and the model's config does not say which token stands for an image.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    _make_fake(model, fake)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if hasattr(model, "peft_config") or reentrant:
            model.enable_input_require_grads()
    else:
        model.gradient_checkpointing_disable()
    layers = _Layers(model, autocast)
    inputs, image_tokens = _inputs(model, rows, length, vision) if batch is None else (_without_labels(batch), 0)
    counter = TokenCounter()
    counter.add(inputs, model.config)
    with layers.watched():
        model(**inputs, use_cache=False, logits_to_keep=1)
    copies = _autocast_copies(model, autocast) if checkpointing else 0
    return StepMemory(
        saved=layers.saved,
        layer=layers.moment(checkpointing),
        logits=_loss_memory(model, inputs["input_ids"].numel(), loss, autocast, fake) + copies,
        rows=len(inputs["input_ids"]),
        length=inputs["input_ids"].shape[1],
        image_tokens=image_tokens,
        tokens=counter.per_batch() or {},
    )


def _make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Gives a model on the meta device weights that say they are on the CPU, where small tensors of indices are."""
    known: dict[int, Any] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:  # tied weights stay tied
            with torch.no_grad():
                made: Any = FakeTensor(mode, tensor.detach(), torch.device("cpu"))
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            known[id(tensor)] = made, tensor  # which keeps its id
        return known[id(tensor)][0]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    tensors[name] = fake(tensor)  # type: ignore[assignment]


class _Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is on: now, and at most."""

    def __init__(self, known: Iterator[Tensor] | list[Tensor] = ()):  # type: ignore[assignment]
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakKeyDictionary[Any, bool]()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._seen:
                    self._seen[storage] = True
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, storage.nbytes())
        return output

    def _free(self, size: int) -> None:
        self.now -= size


class _Sparse(TorchDispatchMode):
    """Fake tensors can be indexed by numbers, not by a mask: how many it selects is known only if it is real."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.index.Tensor:
            indices: list[Any] = []
            for index in args[1]:
                is_mask = isinstance(index, Tensor) and index.dtype == torch.bool
                indices += index.nonzero().unbind(1) if is_mask and not isinstance(index, FakeTensor) else [index]
            args = (args[0], indices)
        return function(*args, **(kwargs or {}))


class _Layers:
    """The repeated layers of a model in one forward pass: the first of each kind runs, the others stand in for it."""

    def __init__(self, model: nn.Module, autocast: torch.dtype | None):
        self._model = model
        self._autocast = autocast
        self._kinds: dict[Any, _Kind] = {}
        self._storages: dict[int, Any] = {}
        self._weights = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self._in_layer: dict[int, Any] = {}

    @property
    def saved(self) -> int:
        """Bytes that the backward pass needs: what was seen, and of the layers that did not run as much again."""
        seen = sum(storage.nbytes() for storage in self._storages.values())
        return seen + sum((kind.count - 1) * kind.saved for kind in self._kinds.values())

    def moment(self, checkpointing: bool) -> int:
        """Bytes that the largest layer needs beside them for a moment."""
        return max(kind.recomputed if checkpointing else kind.backward for kind in self._kinds.values())

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        layers: list[Any] = [self._model.get_submodule(path) for path in find_layers(self._model)]
        for layer in layers:
            layer.forward = functools.partial(self._run, layer, layer.forward)
        try:
            with (
                torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor),
                self.mixed_precision(),
                _Sparse(),
            ):
                yield
        finally:
            for layer in layers:
                layer.forward = layer.forward.args[1]

    def mixed_precision(self) -> Any:
        return torch.autocast("cpu", dtype=self._autocast, enabled=self._autocast is not None)

    def _save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._weights:
            self._storages[storage._cdata] = storage
        return tensor

    def _run(self, layer: nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        kind = _kind_of(layer, hidden)
        known = self._kinds.get(kind)
        if known is not None:
            known.count += 1
            moved = torch.empty_like(hidden, dtype=known.dtype).requires_grad_(known.requires_grad)
            return (moved, *known.output[1:]) if isinstance(known.output, tuple) else moved
        alone = self._alone(layer, forward, args, kwargs)
        # Masks and positions are the same tensors in all layers.
        before = {x.untyped_storage()._cdata for x in tree_leaves((args[1:], kwargs)) if isinstance(x, Tensor)}
        before = (before - {hidden.untyped_storage()._cdata}) | self._storages.keys()
        output = forward(*args, **kwargs)
        own = [storage.nbytes() for key, storage in self._storages.items() if key not in before]
        self._kinds[kind] = _Kind(1, sum(own), *alone, output)
        return output

    def _alone(self, layer: nn.Module, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
        """Bytes at most in a forward and backward pass of this layer; and more than the forward pass has left."""

        def detached(value: Any) -> Any:
            return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value

        args, kwargs = tree_map(detached, args), tree_map(detached, kwargs)
        parameters = list(layer.parameters())
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)  # of the micro-batch before
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        live = _Live([*given, *parameters, *(p.grad for p in parameters if p.grad is not None), *layer.buffers()])
        with (
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
            live,
        ):
            with self.mixed_precision():
                output = forward(*args, **kwargs)
            first = output[0] if isinstance(output, tuple) else output
            left = live.now
            if first.requires_grad:
                first.backward(torch.ones_like(first))
        for parameter in parameters:
            parameter.grad = None
        return live.peak, max(0, live.peak - left)


@dataclass
class _Kind:
    """Layers that keep the same: how many there are, what each keeps, and what it needs for a moment, in bytes."""

    count: int
    saved: int
    recomputed: int
    backward: int
    output: Any

    @property
    def _first(self) -> Tensor:
        return self.output[0] if isinstance(self.output, tuple) else self.output

    @property
    def dtype(self) -> torch.dtype:
        return self._first.dtype

    @property
    def requires_grad(self) -> bool:
        return self._first.requires_grad


def _kind_of(layer: nn.Module, hidden: Tensor) -> Any:
    weights = tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters())
    # Attention to a window, or to a part of the image, has other masks.
    attention = {
        str(getattr(m, a)) for m in layer.modules() for a in ("sliding_window", "layer_type") if hasattr(m, a)
    }
    return type(layer), weights, frozenset(attention), tuple(hidden.shape), hidden.dtype, hidden.requires_grad


def _autocast_copies(model: nn.Module, autocast: torch.dtype | None) -> int:
    """Bytes of the copies in lower precision that autocast keeps of trained weights until the forward pass is over."""
    if autocast is None:
        return 0
    return sum(p.numel() * autocast.itemsize for p in model.parameters() if p.requires_grad and p.dtype != autocast)


def _loss_memory(model: Any, tokens: int, loss: str, autocast: torch.dtype | None, mode: FakeTensorMode) -> int:
    """Bytes at most while logits and their loss are computed forward and backward, per micro-batch."""
    weight = model.get_output_embeddings().weight
    vocabulary, width = weight.shape
    if loss == "liger":  # as many chunks as the logits are wider than the hidden states; its gradients come at once
        chunk = 2 ** math.ceil(math.log2(max(1, math.ceil(tokens / math.ceil(vocabulary / width)))))
    else:
        chunk = LOSS_CHUNK if loss == "chunked_nll" else tokens
    dtype = autocast or weight.dtype
    with mode:
        hidden = torch.empty(min(chunk, tokens), width, dtype=dtype, requires_grad=True)
        labels = torch.empty(len(hidden), dtype=torch.long)
    if weight.requires_grad:
        weight.grad = torch.zeros_like(weight)
    live = _Live([hidden, labels, weight, *([] if weight.grad is None else [weight.grad])])
    with live:
        logits = hidden @ weight.to(dtype).t()
        if loss != "nll":  # in the place of the 16-bit ones
            logits = logits.float()
        of_token = F.log_softmax(logits.float(), dim=-1)
        with torch.no_grad():  # the entropy that TRL logs
            entropy = logits.clone() if loss == "nll" else (of_token.exp() * of_token).sum(-1)
        del entropy, logits
        F.nll_loss(of_token, labels).backward()
    weight.grad = None
    return live.peak + (tokens * width * dtype.itemsize if loss == "liger" else 0)


def _inputs(model: Any, rows: int, length: int | None, vision: bool) -> tuple[dict[str, Any], int]:
    """A micro-batch as the collator makes it, and the tokens of an image in it."""
    config = model.config
    images: dict[str, Tensor] = {}
    image_tokens, token = 0, None
    if vision:
        token = next((getattr(config, name) for name in PLACEHOLDERS if getattr(config, name, None) is not None), None)
        if token is None or not hasattr(model, "get_image_features"):
            raise ValueError(
                f"{type(model).__name__} takes no images, or its config does not say which token stands for one "
                f"(expected one of {', '.join(PLACEHOLDERS)}). For text alone, use recipes/sft_text.py."
            )
        images = _images(model, rows)
        with torch.no_grad(), _Sparse():
            features = model.get_image_features(**images)
        features = getattr(features, "pooler_output", features)
        width = config.get_text_config().hidden_size
        image_tokens = sum(x.numel() for x in tree_leaves(features)) // width // rows
    length = length or image_tokens + (TEXT_TOKENS if vision else 2 * TEXT_TOKENS)
    length = max(length, image_tokens + 2)
    text = next(i for i in range(3, 100) if i not in [getattr(config, name, None) for name in PLACEHOLDERS])
    ids = torch.full((rows, length), text)
    ids[:, 1 : 1 + image_tokens] = token if token is not None else text
    types = (ids == token).long() if token is not None else torch.zeros_like(ids)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images}
    accepted = inspect.signature(_base(model).forward).parameters
    for name in ("mm_token_type_ids", "token_type_ids"):
        if vision and name in accepted:
            inputs[name] = types
    return inputs, image_tokens


def _without_labels(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "labels"}


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _images(model: Any, rows: int) -> dict[str, Tensor]:
    """One image per row, as the model's processor hands it over."""
    vision = model.config.vision_config
    accepted = inspect.signature(_base(model).get_image_features).parameters
    channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", None) or 3
    if "image_grid_thw" in accepted:  # patches of images of any size
        patch, merge = vision.patch_size, vision.spatial_merge_size
        side = max(1, IMAGE_SIDE // (patch * merge)) * merge
        pixels = torch.ones(rows * side**2, channels * getattr(vision, "temporal_patch_size", 1) * patch**2)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, side, side]] * rows)}
    size = vision.image_size
    if "pixel_attention_mask" in accepted:  # an image is cut into pieces of that size, and comes once more as a whole
        pieces = math.ceil(IMAGE_SIDE / size) ** 2 + 1
        shape = (rows, pieces)
        return {
            "pixel_values": torch.ones(*shape, channels, size, size),
            "pixel_attention_mask": torch.ones(*shape, size, size, dtype=torch.bool),
        }
    return {"pixel_values": torch.ones(rows, channels, size, size)}
