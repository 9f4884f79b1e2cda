"""The examples and images of a training batch, told apart and hashed: what the caches keep outputs under.

All that a model is given beside the tokens is either known to belong to one row or one image, and is hashed with it,
or the batch is refused with a reason. An unknown tensor is never left out of a key.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# What no layer reads.
NOT_READ = ("labels", "shift_labels", "num_items_in_batch")
# Where packed examples begin, which their position ids say as well.
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
SETTINGS = (bool, int, float, str, type(None))


@dataclass
class Images:
    """
    The images of a batch, in the order of their pixels.

    Attributes:
        keys (`list[bytes]`): a hash of each: its pixels and all tensors that describe it.
        sizes (`list[int]`): patches of each in `pixel_values`, where it holds patches, else 1.
        per_entry (`int`): images of each entry of `pixel_values`, or of `image_grid_thw` where there is one.
        weights (`list[int]`): numbers in proportion to the tokens that each becomes; empty if that is not known.
        problem (`str`): why the images cannot be told apart; empty if they can.
    """

    keys: list[bytes] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    per_entry: int = 1
    weights: list[int] = field(default_factory=list)
    problem: str = ""


def images_of(inputs: dict[str, Any]) -> Images | None:
    """
    Finds and hashes the images of a batch, with one transfer from the device for each tensor.

    Known forms of `pixel_values` are `(images, channels, height, width)`, `(rows, images, channels, height, width)`
    and, with `image_grid_thw (images, 3)`, the patches of all images one below the other.

    Args:
        inputs (`dict[str, Any]`): keyword arguments of the model.

    Returns:
        `Images` or `None`: `None` if there are none.
    """
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    if any("video" in name for name in tensors):
        return Images(problem="videos are not told apart")
    if "pixel_values" not in tensors:
        return None
    pixels = tensors["pixel_values"].detach().cpu()
    about = {name: t.detach().cpu() for name, t in tensors.items() if _describes_images(name)}
    grid = about.get("image_grid_thw")
    if grid is not None:
        sizes = grid.prod(dim=1).tolist()
        if sum(sizes) != len(pixels):
            return Images(problem="pixel_values has not as many patches as image_grid_thw says")
        images, per_entry, weights = list(pixels.split(sizes)), 1, sizes
    else:
        per_entry = pixels.shape[1] if pixels.ndim == 5 else 1
        images = list(pixels.flatten(0, 1) if pixels.ndim == 5 else pixels)
        sizes = [1] * len(images)
        # Images of one size become as many tokens each, unless something says that they are cut out of a larger one.
        weights = sizes if pixels.ndim == 4 and not about else []
    entries = len(images) // max(1, per_entry)
    described = []
    for name, tensor in about.items():
        if tensor.ndim and len(tensor) == entries:
            by_image = pixels.ndim == 5 and tensor.shape[:2] == pixels.shape[:2]
            described.append(tensor.flatten(0, 1) if by_image else tensor.repeat_interleave(per_entry, 0))
        else:
            return Images(problem=f"{name} does not have one entry for each image")
    keys = [digest(image, *(t[i] for t in described)) for i, image in enumerate(images)]
    return Images(keys, sizes, per_entry, weights)


@dataclass
class Segment:
    """Tokens of a batch whose hidden states depend on nothing else in it: from `start` to `end` of row `row`."""

    row: int
    start: int
    end: int
    key: bytes = b""


@dataclass
class Segments:
    """
    The examples of a batch.

    Attributes:
        segments (`list[Segment]`): an example each.
        problem (`str`): why the examples cannot be told apart; empty if they can.
        remark (`str`): what will keep them from being found again; empty if nothing does.
    """

    segments: list[Segment] = field(default_factory=list)
    problem: str = ""
    remark: str = ""


def segments_of(
    model: nn.Module, inputs: dict[str, Any], images: Images | None, settings: bytes, *, apart: bool = True
) -> Segments:
    """
    Finds and hashes the examples of a batch: its rows without their padding, or the packed examples of a single row.

    Args:
        model (`nn.Module`): tells which token stands for an image, and whether packed examples see each other.
        inputs (`dict[str, Any]`): its keyword arguments.
        images (`Images` or `None`): those of the batch, from `images_of`.
        settings (`bytes`): all else that the hidden states depend on.
        apart (`bool`, *optional*, defaults to `True`): a packed row is taken apart where its examples may be
            independent. Whether they are is for the caller to see.
    """
    read = {name: value for name, value in inputs.items() if name not in NOT_READ}
    ids = read.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return Segments(problem="there are no input_ids of shape (rows, tokens)")
    if images is not None and images.problem:
        return Segments(problem=images.problem)
    # Some models call the pixels otherwise, and `images_of` knows nothing of them: they count like other tensors.
    hashed = [name for name in read if images is not None and (name == "pixel_values" or _describes_images(name))]
    tensors = {
        name: value.detach().cpu() for name, value in read.items() if isinstance(value, Tensor) and name not in hashed
    }
    starts = _packed_starts(model, read, tensors) if images is None and apart else None
    for name in BOUNDARIES if starts is not None else ():
        read.pop(name, None)
        tensors.pop(name, None)
    others = {name: value for name, value in read.items() if not isinstance(value, Tensor)}
    unknown = next((name for name, value in others.items() if not isinstance(value, SETTINGS)), None)
    if unknown is not None:
        return Segments(problem=f"{unknown} is neither a tensor nor a plain value")
    settings += repr(sorted(others.items())).encode()

    rows, width = ids.shape
    ids, mask = tensors.pop("input_ids"), tensors.pop("attention_mask", None)
    if mask is not None and (mask.shape != ids.shape or not bool((mask[:, :-1] >= mask[:, 1:]).all())):
        return Segments(problem="attention_mask is more than padding after the tokens (padding_side is not 'right'?)")
    lengths = [width] * rows if mask is None else mask.sum(1).tolist()
    by_row = []
    for name, tensor in tensors.items():
        if name == "position_ids" and tensor.ndim == 3 and tensor.shape[1:] == ids.shape:  # (axes, rows, tokens)
            by_row.append(tensor.movedim(0, -1))
        elif name == "position_ids" and tensor.shape == (1, width):
            by_row.append(tensor.expand(rows, -1))
        elif tensor.shape[:2] == ids.shape:
            by_row.append(tensor)
        elif rows == 1:  # the whole batch is one example
            settings += digest(tensor)
        else:
            return Segments(problem=f"{name} does not have one entry for each token of each row")

    found = [Segment(row, 0, length) for row, length in enumerate(lengths)]
    if starts is not None:
        found = [Segment(0, start, end) for start, end in itertools.pairwise([*starts, width])]
    of_rows: list[list[bytes]] = [[] for _ in range(rows)]
    if images is not None:
        assigned = _images_of_rows(images, ids, _image_token(model))
        if assigned is None:
            return Segments(problem="it cannot be told which images belong to which row")
        of_rows = assigned
    for segment in found:
        span = segment.row, slice(segment.start, segment.end)
        segment.key = digest(ids[span], *(t[span] for t in by_row), extra=[settings, *of_rows[segment.row]])
    restarts = rows == 1 and starts is None and "position_ids" in tensors and _restarts(tensors["position_ids"])
    remark = "a packed row is kept as a whole, and is found again only with per_device_train_batch_size=1"
    return Segments(found, remark=remark if restarts else "")


def digest(*tensors: Tensor, extra: list[bytes] | None = None) -> bytes:
    """16 bytes that stand for values, shapes and dtypes of tensors on the CPU, and for some bytes."""
    hashed = hashlib.blake2b(digest_size=16)
    for part in extra or ():
        hashed.update(len(part).to_bytes(8, "little") + part)
    for tensor in tensors:
        hashed.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        hashed.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hashed.digest()


def _describes_images(name: str) -> bool:
    return name.startswith(("image_", "pixel_")) and name != "pixel_values"


def _image_token(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    names = ("image_token_id", "image_token_index")
    return next((token for name in names if (token := getattr(config, name, None)) is not None), None)


def _images_of_rows(images: Images, ids: Tensor, token: int | None) -> list[list[bytes]] | None:
    """The images of each row, in the order of their placeholder tokens; `None` if it cannot be told."""
    counts = [1] * len(ids) if token is None else (ids == token).sum(1).tolist()
    entries = len(images.keys) // max(1, images.per_entry)
    if len(ids) == 1:
        return [images.keys]
    if entries == len(ids) and all(counts):  # one each: no row has fewer, and there are no more
        ends = range(images.per_entry, len(images.keys) + 1, images.per_entry)
    else:
        # The tokens of a row must be those of whole images. How many tokens an image becomes need not be known.
        tokens, weight = sum(counts), sum(images.weights)
        image_ends = {0: 0} | {end * tokens: i for i, end in enumerate(itertools.accumulate(images.weights), 1)}
        row_ends = [end * weight for end in itertools.accumulate(counts)]
        if token is None or not tokens or not weight or not all(end in image_ends for end in row_ends):
            return None
        ends = [image_ends[end] for end in row_ends]  # type: ignore[assignment]
    return [images.keys[start:end] for start, end in itertools.pairwise([0, *ends])]


def _packed_starts(model: nn.Module, inputs: dict[str, Any], tensors: dict[str, Tensor]) -> list[int] | None:
    """Where packed examples begin that may be independent; `None` if there are none, or they see each other.

    Transformers mostly takes position ids that start again, without a mask, for packed examples: its flash attention
    always does, its other attentions only without a KV cache. Recurrent layers hand their state on.
    """
    positions, ids = tensors.get("position_ids"), tensors["input_ids"]
    if positions is None or "attention_mask" in tensors or len(ids) != 1 or positions.shape != ids.shape:
        return None
    peft: Any = model
    inner: Any = peft.get_base_model() if hasattr(model, "get_base_model") else model
    if not type(inner).__module__.startswith("transformers.") or inner._is_stateful:
        return None
    config = inner.config.get_text_config()
    if not {*(getattr(config, "layer_types", None) or ())} <= {"full_attention", "sliding_attention"}:
        return None  # chunks of a row do not begin where examples do
    if inputs.get("output_router_logits") or getattr(config, "output_router_logits", False):
        return None  # the loss reads them all, also those of a pass that only tries whether examples are independent
    cached = inputs.get("use_cache")
    cached = config.use_cache if cached is None else cached
    if cached and "flash" not in (config._attn_implementation or ""):
        return None
    starts = torch.nonzero(positions[0].diff(prepend=positions[0, :1] - 2) != 1).flatten().tolist()
    at_zero = all(positions[0, start] == 0 for start in starts)
    boundaries = [tensors[name].flatten().tolist() for name in BOUNDARIES if name in tensors and tensors[name].ndim]
    return starts if at_zero and all(b == [*starts, ids.shape[1]] for b in boundaries) else None


def _restarts(positions: Tensor) -> bool:
    return bool((positions.diff(dim=-1) < 0).any())
