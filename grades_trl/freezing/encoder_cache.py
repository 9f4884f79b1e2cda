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

from grades_trl.freezing.batch_content import Images
from grades_trl.freezing.cache_use import CacheUse
from grades_trl.freezing.encoder_store import EncoderStore
from grades_trl.freezing.pass_state import PassState, same_state
from grades_trl.model.structure import base_path

logger = logging.getLogger(__name__)

MIB = 2**20


class EncoderCache:
    """
    Outputs of the layers of a frozen encoder, in CPU memory and, if wanted, on disk.

    It answers in training passes alone, if all images of the pass are there. It turns itself off, with a warning,
    where reading it would change the training: layers that draw random numbers (dropout), and outputs that do not
    belong to one image each.

    Args:
        max_bytes (`int`): in memory, nothing is kept beyond.
        directory (`str`, *optional*): keeps the outputs on disk too, for later runs, see `EncoderStore`.
        rows (`int`, *optional*): rows of an epoch, to say how much memory all of their images take.
        must_fit (`bool`, *optional*, defaults to `False`): turns it off if that is more than `max_bytes`. A batch is
            read only if all of its images are there.

    Attributes:
        use (`CacheUse`): hits, misses, seconds saved.
        bytes (`int`): held in memory now.
        off (`str`): why the cache is off; empty while it is on.
    """

    def __init__(self, max_bytes: int, directory: str | None = None, rows: int | None = None, must_fit: bool = False):
        self.max_bytes = max_bytes
        self.bytes = 0
        self.off = ""
        self.use = CacheUse()
        self._directory, self._rows, self._must_fit = directory, rows, must_fit
        self._store: EncoderStore | None = None
        self._layers: dict[str, str] = {}  # of the frozen encoder, in their order: path -> path in the base model
        self._read: set[str] = set()  # those whose output the rest of the model reads, by the path in the base model
        self._images: dict[bytes, dict[str, Tensor]] = {}  # hash -> layer -> output
        self._state: Any = None  # a PassState, from `start` on
        self._settings: Any = None  # that of the encoder alone
        self._announced = False
        self._learned: dict[bytes, dict[str, Tensor]] = {}  # outputs of the pass that showed what is read
        # Of the pass:
        self._keys: list[bytes] = []
        self._sizes: list[int] = []  # rows of the output that belong to each image
        self._batch_rows = 0
        self._found: list[dict[str, Tensor]] = []  # outputs of each image, if all are there
        self._computed: dict[str, list[Tensor]] = {}  # layer -> output of each image
        self._before: list[Any] = []
        self._seen: set[str] = set()

    def start(self, model: nn.Module, encoder: nn.Module, layers: list[str], rows_come_back: bool = True) -> None:
        """
        Begins anew, unless the layers are the same as before.

        Args:
            model (`nn.Module`): the whole model.
            encoder (`nn.Module`): an encoder in it that is frozen now.
            layers (`list[str]`): paths of its layers in the model, from input to output; empty if none is frozen.
            rows_come_back (`bool`, *optional*, defaults to `True`): an epoch or more is to come.
        """
        if layers == self.layers:
            return
        self.clear()
        self.use.next_layers()
        self.off, self._read, self._announced = "", set(), False
        worthwhile = bool(layers) and (rows_come_back or self._directory is not None)
        self._layers = {path: base_path(path) for path in layers} if worthwhile else {}
        if not self._layers:
            return
        self._state, self._settings = PassState(model), PassState(encoder)
        if self._directory is not None:
            self._store = EncoderStore(self._directory, encoder)
            if self._store.found:
                logger.info(
                    "%d images have been through this encoder in earlier runs: their outputs are read from %s.",
                    self._store.found,
                    self._store.directory,
                )

    def clear(self) -> None:
        """Forgets all outputs, and writes those that are for the disk. Call it when weights of the encoder get other
        values: only those of the weights at the start are ever kept on disk."""
        self.end_pass()
        self._images, self._learned = {}, {}
        self.bytes = 0
        if self._store is not None:
            self._store.flush()
            self._store = None

    @property
    def layers(self) -> list[str]:
        """Paths of the layers of the frozen encoder."""
        return [*self._layers]

    @property
    def waits(self) -> bool:
        """Whether there is a frozen encoder whose images are to be looked up."""
        return bool(self._layers) and not self.off

    @property
    def learns(self) -> bool:
        """Whether this pass shows which layers the rest of the model reads: it must compute gradients down to them."""
        return bool(self._keys) and not self._read

    @property
    def hit(self) -> bool:
        """Whether this pass is read from the cache."""
        return bool(self._found)

    def begin_pass(self, images: Images, rows: int, device: str) -> None:
        """Looks up the images of a training batch.

        Args:
            images (`Images`): from `images_of`.
            rows (`int`): of the batch.
            device (`str`): type of the device that the model runs on.
        """
        self.end_pass()
        if not self.waits or not (images.keys or images.problem):
            return
        if images.problem:
            self.turn_off(images.problem)
            return
        settings = repr((device, self._settings.settings(device))).encode()
        self._keys = [hashlib.blake2b(key, key=_short(settings), digest_size=16).digest() for key in images.keys]
        self._sizes, self._batch_rows = images.sizes, rows
        if self._learned:
            self._keep(self._learned, rows)
            self._learned = {}
        if self.off:  # they do not fit
            return
        found = [self._look_up(key) for key in self._keys] if self._read else [None]
        if all(outputs is not None for outputs in found):
            self._found = found  # type: ignore[assignment]
            self.use.hits += 1
        else:
            self.use.misses += 1
            self._before = self._state.random_state()

    def _look_up(self, key: bytes) -> dict[str, Tensor] | None:
        outputs = self._images.get(key)
        if outputs is not None and outputs.keys() >= self._read:
            return outputs
        return None if self._store is None else self._store.get(key, self._read)

    def end_pass(self) -> None:
        """Keeps what the batch has shown, and forgets the batch."""
        if self._computed and not self.off:
            outputs = zip(*self._computed.values(), strict=True)
            self._keep(
                {
                    key: dict(zip(self._computed, of_image, strict=True))
                    for key, of_image in zip(self._keys, outputs, strict=True)
                },
                self._batch_rows,
            )
        self.use.end_pass()
        self._keys, self._sizes, self._found, self._before = [], [], [], []
        self._computed, self._seen = {}, set()

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
        name = self._layers[layer]
        if layer in self._seen:
            self.turn_off("a layer of the encoder is called twice in a pass")
            with torch.no_grad():
                return forward(*args, **kwargs)
        if self.hit and isinstance(hidden, Tensor):
            self._seen.add(layer)
            if name not in self._read:
                return hidden  # nobody reads this one
            stored = torch.cat([outputs[name] for outputs in self._found])
            return stored.to(hidden.device, non_blocking=True).reshape(hidden.shape)
        if isinstance(hidden, Tensor):
            self.use.begin_forward(hidden.device)
        with torch.no_grad():
            output = forward(*args, **kwargs)
        self._seen.add(layer)
        if not isinstance(output, Tensor) or not isinstance(hidden, Tensor) or output.shape != hidden.shape:
            self.turn_off("a layer of the encoder passes on more than one tensor")
            return output
        if len(self._seen) == len(self._layers):
            self.use.end_forward(hidden.device)
            if not same_state(self._state.random_state(), self._before):
                self.turn_off("the encoder draws random numbers (dropout)")
                return output
        if name in self._read:
            self._computed[name] = self._of_images(output, self._sizes)
            return output
        return self._watched(name, output)

    def _watched(self, layer: str, output: Tensor) -> Tensor:
        """The same values. A gradient that comes back to them shows that the rest of the model reads this layer."""
        keys, sizes = self._keys, self._sizes
        leaf = output.detach().requires_grad_()
        leaf.register_hook(lambda _: self._reads(layer, keys, sizes, leaf.detach()))
        with torch.enable_grad():
            return leaf.clone()  # a leaf could not be changed in place

    def _reads(self, layer: str, keys: list[bytes], sizes: list[int], output: Tensor) -> None:
        if self.off or layer in self._read:
            return
        self._read.add(layer)  # images without its output are computed, and kept, once more
        for key, image in zip(keys, self._of_images(output, sizes), strict=False):
            self._learned.setdefault(key, {})[layer] = image

    def _of_images(self, output: Tensor, sizes: list[int]) -> list[Tensor]:
        """The output (images, tokens, hidden) or (all patches, hidden) of each image apart, in CPU memory."""
        rows = output.reshape(-1, output.shape[-1]) if sum(sizes) != len(output) else output
        if len(rows) != sum(sizes):
            self.turn_off("the encoder's output cannot be told apart by images")
            return []
        return [image.clone() for image in rows.detach().cpu().split(sizes)]

    def _keep(self, outputs: dict[bytes, dict[str, Tensor]], rows: int) -> None:
        """Keeps the outputs of the images of a batch of so many rows."""
        outputs = {key: of_image for key, of_image in outputs.items() if of_image.keys() >= self._read}
        sizes = {key: _bytes(of_image) for key, of_image in outputs.items()}
        if outputs and not self._announced:
            self._announced = True
            self._announce(len(self._keys) / rows, max(sizes.values()))
        if self.off:
            return
        for key, of_image in outputs.items():
            if self._store is not None:
                self._store.add(key, of_image)
            added = sizes[key] - _bytes(self._images.get(key, {}))
            if self.bytes + added <= self.max_bytes:
                self._images[key] = of_image
                self.bytes += added
        self.use.peak_bytes = max(self.use.peak_bytes, self.bytes)

    def _announce(self, per_row: float, size: int) -> None:
        if self._rows is None:
            logger.info("The outputs of the frozen vision tower are cached, in up to %.0f MiB.", self.max_bytes / MIB)
            return
        images = round(self._rows * per_row)
        fits = images * size <= self.max_bytes
        if not fits and self._must_fit and self._store is None:
            self.turn_off(
                f"those of {images:,} images take about {images * size / MIB:,.0f} MiB, and a tenth of the free "
                f"memory is {self.max_bytes / MIB:,.0f} MiB; set activation_cache_mib to give them more"
            )
            return
        logger.info(
            "The outputs of the frozen vision tower are cached: %s images, about %s MiB%s.",
            f"{images:,}",
            f"{images * size / MIB:,.0f}",
            "" if fits else f", of which {self.max_bytes / MIB:,.0f} MiB are kept in memory",
        )

    def turn_off(self, reason: str) -> None:
        """Stops keeping and reading outputs, until the encoder changes."""
        if not self.off:
            self.off = reason
            self._store = None
            self.clear()
            logger.warning("The outputs of the frozen vision tower are not cached: %s.", reason)


def _bytes(outputs: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in outputs.values())


def _short(settings: bytes) -> bytes:
    return hashlib.blake2b(settings, digest_size=32).digest()
