"""Gradient or weight tensors -> numbers. Pure torch.

A matrix may consist of several tensors (the LoRA factors A and B); its number is the sum over all of them
(arXiv 2509.01842, Eq. 3). All sums are taken in float32, whatever the dtype of the tensors.

Large tensors are sampled: the sum over n of N equal chunks, times N / n, is an unbiased estimate of the sum over all,
with a relative standard error of cv * sqrt((1 - n / N) / n), where cv is the standard deviation of the chunks' sums
over their mean. Chunks lie all over the tensor, so cv is small: about 0.1 for independent entries, below 1 for the
gradients we looked at. The same chunks are read in every step, so that what a matrix is compared with is itself.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 64  # consecutive elements: two memory sectors of 64 bytes in bf16
MIN_ELEMENTS = 2**14  # of a sample


@dataclass(frozen=True)
class Sample:
    """Which chunks of a tensor are read.

    Attributes:
        chunk (`int`): elements per chunk.
        index (`Tensor`): int64, the chunks, in increasing order, on the tensor's device.
        scale (`float`): all elements over those that are read.
    """

    chunk: int
    index: Tensor
    scale: float

    def take(self, tensor: Tensor) -> Tensor:
        """The sampled elements, (n, chunk), a copy."""
        return tensor.reshape(-1, self.chunk)[self.index]


def sample(tensor: Tensor, fraction: float, name: str) -> Sample | None:
    """Chunks of a tensor, drawn without replacement, the same ones whenever the name is the same.

    Args:
        tensor (`Tensor`): of any shape.
        fraction (`float`): of its elements, but at least `MIN_ELEMENTS`.
        name (`str`): seeds the draw.

    Returns:
        `Sample` or `None`: `None` where more than a quarter of the tensor would be read, or its size has no chunks:
        it is read as a whole.
    """
    chunk = math.gcd(tensor.numel(), CHUNK)
    wanted = max(MIN_ELEMENTS, math.ceil(fraction * tensor.numel()))
    if chunk < 8 or wanted > tensor.numel() / 4:
        return None
    chunks, count = tensor.numel() // chunk, math.ceil(wanted / chunk)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    index = torch.randperm(chunks, generator=generator)[:count].sort().values
    return Sample(chunk, index.to(tensor.device), chunks / count)


def l1_norms(tensors: Sequence[Tensor]) -> Tensor:
    """`sum |x|` of each tensor (paper v1; Eq. 3). Returns float32 of shape (len(tensors),)."""
    return torch.stack(torch._foreach_norm(list(tensors), 1, dtype=torch.float32))


def l1_distances(tensors: Sequence[Tensor], previous: Sequence[Tensor]) -> Tensor:
    """`sum |x - y|` of each pair (paper, Eq. 1). Returns float32 of shape (len(tensors),)."""
    # bf16 minus bf16 would round the difference to 8 bits before it is summed, hence float() first.
    differences = torch._foreach_sub([x.float() for x in tensors], [y.float() for y in previous])
    return torch.stack(torch._foreach_norm(differences, 1))
