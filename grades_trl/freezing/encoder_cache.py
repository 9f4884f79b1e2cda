"""Reuses the outputs of a frozen encoder (a vision tower) from the second epoch on, instead of computing them again.

What an encoder makes of an image depends on that image alone. So the outputs of its layers that the rest of the model
reads are kept under a hash of the image: mostly that of the last layer, the last but one in LLaVA-1.5, several where
the language layers read features of several depths (Qwen3-VL). Which ones these are is seen from where gradients come
back to.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from grades_trl.freezing.pass_state import PassState, same_state

logger = logging.getLogger(__name__)


class EncoderCache:
    """
    Outputs of the layers of a frozen encoder, in CPU memory.

    It answers in training passes alone, if all images of the pass are there. It turns itself off, with a warning,
    where reading it would change the training: layers that draw random numbers (dropout), and outputs that do not
    belong to one image each.

    Args:
        max_bytes (`int`): nothing is kept beyond; 0 is off.

    Attributes:
        hits (`int`), misses (`int`): training passes that were read from the cache, and that were not.
        bytes (`int`): held now.
        off (`str`): why the cache is off; empty while it is on.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.bytes = self.hits = self.misses = 0
        self.off = ""
        self._layers: list[str] = []  # of the frozen encoder, from input to output
        self._read: set[str] = set()  # those whose output the rest of the model reads
        self._images: dict[bytes, dict[str, Tensor]] = {}  # hash -> layer -> output
        self._state: Any = None  # a PassState, from `start` on
        # Of the pass:
        self._keys: list[bytes] = []
        self._sizes: list[int] = []  # rows of the output that belong to each image
        self._hit = False
        self._before: list[Any] = []

    def start(self, model: nn.Module, layers: list[str]) -> None:
        """Begins anew, with the layers of an encoder that is frozen now; without any, it is off."""
        if layers == self._layers:
            return
        self.clear()
        self.off, self._read, self._layers, self._state = "", set(), layers, PassState(model)

    def clear(self) -> None:
        """Forgets all outputs. Call it when weights of the encoder get other values."""
        self._images.clear()
        self.bytes = 0
        self.end_pass()

    def begin_pass(self, inputs: dict[str, Any]) -> None:
        """Looks up the images of a training batch, given by the keyword arguments of the model."""
        self.end_pass()
        pixels, grid = inputs.get("pixel_values"), inputs.get("image_grid_thw")
        if self.off or not self._layers or not isinstance(pixels, Tensor):
            return
        if isinstance(grid, Tensor):  # patches of all images in one row, as many of each as its grid has
            self._sizes = grid.prod(dim=1).tolist()
            images = list(pixels.cpu().split(self._sizes))
        else:  # (images, channels, height, width), or several images in each row of the batch
            images = list(pixels.cpu().flatten(0, pixels.ndim - 4))
            self._sizes = [1] * len(images)
        settings = repr(self._state.settings(pixels.device.type)).encode()
        shapes = grid.tolist() if isinstance(grid, Tensor) else [list(image.shape) for image in images]
        self._keys = [_key(settings, shape, image) for shape, image in zip(shapes, images, strict=True)]
        self._hit = bool(self._read) and all(self._images.get(key, {}).keys() >= self._read for key in self._keys)
        if self._hit:
            self.hits += 1
        else:
            self.misses += 1
            self._before = self._state.random_state()

    def end_pass(self) -> None:
        """Forgets the batch."""
        self._keys, self._sizes, self._hit, self._before = [], [], False, []

    def handles(self, layer: str) -> bool:
        """Whether `run` is to be called for this layer in this pass."""
        return bool(self._keys) and layer in self._layers

    def run(self, layer: str, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The output of a layer of the encoder: from the cache, or computed and kept.

        Args:
            layer (`str`): its path.
            forward (`Callable`): the forward of the layer, called with `args` and `kwargs`.
        """
        hidden = args[0] if args else kwargs.get("hidden_states")
        if self._hit and isinstance(hidden, Tensor):
            if layer not in self._read:
                return hidden  # nobody reads this one
            stored = torch.cat([self._images[key][layer] for key in self._keys])
            return stored.to(hidden.device, non_blocking=True).reshape(hidden.shape)
        with torch.no_grad():
            output = forward(*args, **kwargs)
        if not isinstance(output, Tensor) or not isinstance(hidden, Tensor) or output.shape != hidden.shape:
            self.turn_off("a layer of the encoder passes on more than one tensor")
            return output
        if layer == self._layers[-1] and not same_state(self._state.random_state(), self._before):
            self.turn_off("the encoder draws random numbers (dropout)")
            return output
        if layer in self._read:
            self._store(layer, output)
            return output
        return self._watched(layer, output)

    def _watched(self, layer: str, output: Tensor) -> Tensor:
        """The same values. A gradient that comes back to them shows that the rest of the model reads this layer."""
        leaf = output.detach().requires_grad_()
        leaf.register_hook(lambda _: self._reads(layer))
        with torch.enable_grad():
            return leaf.clone()  # a leaf could not be changed in place

    def _reads(self, layer: str) -> None:
        if layer not in self._read:
            self._read.add(layer)
            self._images.clear()
            self.bytes = 0

    def _store(self, layer: str, output: Tensor) -> None:
        """Keeps the output (images, tokens, hidden) or (all patches, hidden) of each image apart."""
        rows = output.reshape(-1, output.shape[-1]) if sum(self._sizes) != len(output) else output
        if len(rows) != sum(self._sizes):
            self.turn_off("the encoder's output cannot be told apart by images")
            return
        for key, image in zip(self._keys, rows.split(self._sizes), strict=True):
            kept = self._images.get(key)
            size = image.numel() * image.element_size()
            if (kept is None or layer not in kept) and self.bytes + size <= self.max_bytes:
                self._images.setdefault(key, {})[layer] = image.detach().cpu().clone()
                self.bytes += size

    def turn_off(self, reason: str) -> None:
        """Stops keeping and reading outputs, until the encoder changes."""
        if not self.off:
            self.off = reason
            self.clear()
            logger.warning("The outputs of the frozen encoder are not cached: %s.", reason)


def _key(settings: bytes, shape: list[int], image: Tensor) -> bytes:
    digest = hashlib.blake2b(settings, digest_size=16)
    digest.update(repr(shape).encode())
    digest.update(image.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()
