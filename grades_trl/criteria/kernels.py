"""`metrics.l1_sums` on a GPU: one fused pass over memory, and two or three Triton launches, for all tensors together.

A tensor is cut into chunks, one program reads one chunk, and finds its tensor through a table of addresses. Each chunk
leaves one partial sum and a second launch adds those up in a fixed order: the numbers do not depend on timing, nor on
what else is read in the same call.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # comes with torch for CUDA, and there is nothing to do for it elsewhere
    triton = None

CHUNK = 8192  # elements read by one program: long enough to hide the look-up in the tables
BLOCK = 2048  # elements in flight in one program
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def available() -> bool:
    """Whether `l1_sums` works here: with Triton, on a GPU of compute capability 8.0 or later (Ampere).

    `TRITON_INTERPRET=1` makes it work on tensors of the CPU, slowly, for tests.
    """
    if triton is None:
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def l1_sums(tensors: Sequence[Tensor], previous: Sequence[Tensor | None], scale: float = 1.0) -> Tensor:
    """`sum |x / scale|` and `sum |x / scale - p|` of each tensor x, in one pass. Nothing waits for the device.

    Args:
        tensors (`Sequence[Tensor]`): n tensors on one device, of any shape, in bfloat16, float16 or float32, which may
            differ. Rows of a matrix may lie apart; what is neither that nor contiguous is copied first.
        previous (`Sequence[Tensor | None]`): p, contiguous, of the dtype and shape of its tensor. The second sum is
            NaN where there is none.
        scale (`float`, *optional*, defaults to `1.0`): the loss scale that gradients are still multiplied by.

    Returns:
        `Tensor`: float32 of shape `(n, 2)`, on the device.

    Raises:
        ValueError: a tensor has another device, dtype, shape or layout than described, or Triton is missing.
    """
    if triton is None:
        raise ValueError(
            "kernels.l1_sums needs Triton, which comes with torch for CUDA: ask kernels.available() first."
        )
    if not tensors:
        raise ValueError("kernels.l1_sums got no tensors.")
    device = tensors[0].device
    addresses: list[int] = []
    forms = []
    copies = []  # they must live until the launches
    for i, (x, p) in enumerate(zip(tensors, previous, strict=True)):
        if x.dtype not in DTYPES or x.device != device:
            raise ValueError(
                f"tensors[{i}] is {_describe(x)}: expected bfloat16, float16 or float32 on {device}, where the first "
                "one is."
            )
        if p is not None and not (
            p.shape == x.shape and p.dtype == x.dtype and p.device == device and p.is_contiguous()
        ):
            raise ValueError(
                f"previous[{i}] is {_describe(p)}: expected {tuple(x.shape)}, contiguous, in {x.dtype} on {device}."
            )
        if not x.is_contiguous() and not (x.dim() == 2 and (x.stride(1) == 1 or x.shape[1] == 1)):
            x = x.contiguous()
            copies.append(x)
        if x.is_contiguous():
            height, width, stride = 1, x.numel(), 0  # one long row
        else:
            height, width, stride = *x.shape, x.stride(0)
        here = (x.data_ptr(), 0 if p is None else p.data_ptr())
        addresses += here
        # Programs move 16 bytes at a time where everything begins, and every row ends, at a multiple of them.
        vector = 16 // x.element_size()
        aligned = (here[0] | here[1]) % 16 == 0 and width % vector == 0 and stride % vector == 0
        forms.append((x.dtype, vector if aligned else 1, height, width, stride))
    layout = _layout(tuple(forms), device)

    table = _to(device, torch.tensor(addresses, dtype=torch.int64))
    partial = torch.empty(len(layout.owners), 2, dtype=torch.float32, device=device)
    sums = torch.empty(len(forms), 2, dtype=torch.float32, device=device)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for launch in layout.launches:
            _read_chunks[(launch.chunks,)](
                table,
                layout.geometry,
                layout.owners,
                partial,
                launch.first,
                1.0 / scale,
                DTYPE=getattr(tl, str(launch.dtype).removeprefix("torch.")),
                VECTOR=launch.vector,
                CHUNK=CHUNK,
                BLOCK=BLOCK,
            )
        _sum_partials[(len(forms),)](partial, layout.geometry, sums, BLOCK=1024)
    return sums


def expected_bytes(tensors: Sequence[Tensor], previous: Sequence[Tensor | None]) -> int:
    """Bytes of memory that one call of `l1_sums` has to move: every tensor, and what it is compared with."""
    return sum(x.numel() * x.element_size() * (1 if p is None else 2) for x, p in zip(tensors, previous, strict=True))


class _Launch(NamedTuple):
    dtype: torch.dtype
    vector: int  # elements known to lie together at a multiple of 16 bytes
    first: int  # chunk
    chunks: int


class _Layout(NamedTuple):
    geometry: Tensor  # int64 (n, 5): width, stride, chunks per row, first chunk, chunks
    owners: Tensor  # int32: chunk -> tensor
    launches: list[_Launch]


@lru_cache(maxsize=16)  # up to two for each device, made anew when a matrix froze
def _layout(forms: tuple[tuple[torch.dtype, int, int, int, int], ...], device: torch.device) -> _Layout:
    """All that the programs need besides addresses, for tensors of (dtype, vector, height, width, stride)."""
    geometry = [[0] * 5 for _ in forms]
    order: list[int] = []
    launches = []
    first = 0
    for dtype, vector in dict.fromkeys(form[:2] for form in forms):
        begin = first
        for i, (_, _, height, width, stride) in enumerate(forms):
            if forms[i][:2] == (dtype, vector):
                per_row = max(1, -(-width // CHUNK))
                geometry[i] = [width, stride, per_row, first, height * per_row]
                order.append(i)
                first += height * per_row
        launches.append(_Launch(dtype, vector, begin, first - begin))
    owners = torch.tensor(order, dtype=torch.int32).repeat_interleave(torch.tensor([geometry[i][4] for i in order]))
    return _Layout(_to(device, torch.tensor(geometry)), _to(device, owners), launches)


def _to(device: torch.device, table: Tensor) -> Tensor:
    # Out of pinned memory nothing waits for the copy; torch's cache of it keeps the memory until the copy is done.
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def _describe(x: Tensor) -> str:
    return f"{tuple(x.shape)} in {x.dtype} on {x.device}, strides {x.stride()}"


if triton is not None:

    @triton.jit(do_not_specialize=["first"])
    def _read_chunks(
        table,
        geometry,
        owners,
        partial,
        first,
        inverse_scale,
        DTYPE: tl.constexpr,
        VECTOR: tl.constexpr,
        CHUNK: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        chunk = first + tl.program_id(0)
        owner = tl.load(owners + chunk)
        tensor = tl.load(table + owner * 2).to(tl.pointer_type(DTYPE))
        previous_address = tl.load(table + owner * 2 + 1)
        width = tl.load(geometry + owner * 5)
        stride = tl.load(geometry + owner * 5 + 1)
        per_row = tl.load(geometry + owner * 5 + 2)
        # These are int64, so nothing below overflows for tensors of more than 2^31 elements.
        position = chunk - tl.load(geometry + owner * 5 + 3)
        row = position // per_row
        column = (position % per_row) * CHUNK
        tensor += row * stride + column
        previous = previous_address.to(tl.pointer_type(DTYPE)) + (row * width + column)
        count = tl.minimum(width - column, CHUNK).to(tl.int32)
        previous_count = tl.where(previous_address != 0, count, 0)
        if VECTOR > 1:
            # An address out of a table says nothing about its alignment, without which Triton loads single values.
            tensor = tl.multiple_of(tensor, 16)
            previous = tl.multiple_of(previous, 16)
            count = tl.multiple_of(count, VECTOR)
            previous_count = tl.multiple_of(previous_count, VECTOR)

        norm = tl.zeros([BLOCK], dtype=tl.float32)
        distance = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, count, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            x = tl.load(tensor + offsets, mask=offsets < count, other=0.0).to(tl.float32) * inverse_scale
            y = tl.load(previous + offsets, mask=offsets < previous_count, other=0.0).to(tl.float32)
            norm += tl.abs(x)
            distance += tl.abs(x - y)
        tl.store(partial + chunk.to(tl.int64) * 2, tl.sum(norm))
        tl.store(partial + chunk.to(tl.int64) * 2 + 1, tl.where(previous_address != 0, tl.sum(distance), float("nan")))

    @triton.jit
    def _sum_partials(partial, geometry, sums, BLOCK: tl.constexpr):
        owner = tl.program_id(0)
        begin = partial + tl.load(geometry + owner * 5 + 3) * 2
        count = tl.load(geometry + owner * 5 + 4)
        norm = tl.zeros([BLOCK], dtype=tl.float32)
        distance = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, count, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            norm += tl.load(begin + offsets * 2, mask=offsets < count, other=0.0)
            distance += tl.load(begin + offsets * 2 + 1, mask=offsets < count, other=0.0)
        tl.store(sums + owner * 2, tl.sum(norm))
        tl.store(sums + owner * 2 + 1, tl.sum(distance))
