"""Outputs of a frozen encoder on disk, for the next run with the same encoder on the same images."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from grades_trl.freezing.batch_content import digest
from grades_trl.freezing.pass_state import PassState
from grades_trl.model.structure import base_path

logger = logging.getLogger(__name__)

SHARD_BYTES = 64 * 2**20
# The files of all encoders take at most that fraction of what is free on the disk without them.
DISK_FRACTION = 0.1


class EncoderStore:
    """
    Outputs of one frozen encoder, in `<directory>/<fingerprint>/*.safetensors`.

    A file holds the outputs of many images and is complete as soon as it has its name, so several runs may share the
    directory. A file that cannot be read is left out, with one warning.

    Args:
        directory (`str` or `Path`): for the outputs of all encoders.
        encoder (`nn.Module`): with the weights that it is frozen at.

    Attributes:
        found (`int`): images that earlier runs have left.
    """

    def __init__(self, directory: str | Path, encoder: nn.Module):
        self.directory = Path(directory).expanduser() / fingerprint(encoder)
        self._images: dict[str, tuple[Any, list[str]]] = {}  # hash -> open file, layers
        self._shard: dict[str, Tensor] = {}
        self._shard_bytes = 0
        self._written: set[str] = set()  # by this run
        self.directory.mkdir(parents=True, exist_ok=True)
        used = sum(file.stat().st_size for file in self.directory.parent.glob("*/*.safetensors"))
        self._room = int(DISK_FRACTION * (used + shutil.disk_usage(self.directory).free)) - used
        self._warned = False
        for file in sorted(self.directory.glob("*.safetensors")):
            self._open(file)
        self.found = len(self._images)

    def _open(self, file: Path) -> None:
        try:
            opened = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            self._warn(f"{file} cannot be read ({error}) and is left out")
            return
        layers: dict[str, list[str]] = {}
        for name in opened.keys():  # noqa: SIM118 - it is no dict
            image, _, layer = name.partition("/")
            layers.setdefault(image, []).append(layer)
        self._images |= {image: (opened, names) for image, names in layers.items()}

    def get(self, key: bytes, layers: set[str]) -> dict[str, Tensor] | None:
        """What these layers gave for an image, in CPU memory; `None` if one of them is missing."""
        opened, names = self._images.get(key.hex(), (None, []))
        if opened is None or not layers <= set(names):
            return None
        return {layer: opened.get_tensor(f"{key.hex()}/{layer}") for layer in layers}

    def add(self, key: bytes, outputs: dict[str, Tensor]) -> None:
        """Takes in what layers gave for an image. It is written with others, see `flush`."""
        known = self._images.get(key.hex(), (None, []))[1]
        if key.hex() in self._written or outputs.keys() <= set(known) or self._room <= 0:
            return
        self._written.add(key.hex())
        self._shard |= {f"{key.hex()}/{layer}": output.contiguous() for layer, output in outputs.items()}
        self._shard_bytes += sum(t.numel() * t.element_size() for t in outputs.values())
        if self._shard_bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes what has been taken in since the last file."""
        if not self._shard:
            return
        if self._shard_bytes > self._room:
            self._room = 0
            logger.warning(
                "The encoder's outputs take %.0f %% of the free disk space: no more are kept in %s. Delete the "
                "folders there that you no longer need.",
                100 * DISK_FRACTION,
                self.directory.parent,
            )
        else:
            name = uuid.uuid4().hex
            partial = self.directory / f"{name}.partial"
            save_file(self._shard, partial)
            os.replace(partial, self.directory / f"{name}.safetensors")
            self._room -= self._shard_bytes
        self._shard, self._shard_bytes = {}, 0

    def _warn(self, problem: str) -> None:
        if not self._warned:
            logger.warning("A file of the encoder cache is damaged: %s.", problem)
        self._warned = True


def fingerprint(encoder: nn.Module) -> str:
    """A hash of all that the outputs of an encoder depend on beside the image: its class and config, its attention,
    the version of Transformers, the device, the scales of its adapters, and names, dtypes and values of its weights.
    PEFT's wrapping of a layer that it does not change makes no difference."""
    hashed = hashlib.blake2b(digest_size=16)
    config: Any = getattr(encoder, "config", None)
    if config is not None:
        settings = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
        hashed.update(json.dumps(settings, sort_keys=True, default=str).encode())
        hashed.update(repr(config._attn_implementation).encode())
    hashed.update(repr(PassState(encoder).adapters()).encode())
    tensors = {base_path(name): t for name, t in encoder.state_dict().items() if isinstance(t, Tensor)}
    for name in sorted(tensors):
        hashed.update(f"{name} {tensors[name].device.type}".encode())
        hashed.update(digest(tensors[name].detach().cpu()))
    return hashed.hexdigest()
