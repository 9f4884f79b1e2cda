"""Gradient or weight tensors -> one number per matrix. Pure torch.

A matrix may consist of several tensors (the LoRA factors A and B); its number is the sum over all of them
(arXiv 2509.01842, Eq. 3). All sums are taken in float32, whatever the dtype of the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def l1_norm(tensors: Sequence[Tensor]) -> Tensor:
    """`sum |x|` over all elements (paper v1; Eq. 3). Returns a float32 scalar on the tensors' device."""
    return torch.stack([torch.linalg.vector_norm(x, 1, dtype=torch.float32) for x in tensors]).sum()


def l1_distance(tensors: Sequence[Tensor], previous: Sequence[Tensor]) -> Tensor:
    """`sum |x - y|` over all elements (paper, Eq. 1). Returns a float32 scalar on the tensors' device."""
    # bf16 minus bf16 would round the difference to 8 bits before it is summed, hence float() first.
    return torch.stack(
        [torch.linalg.vector_norm(x.float() - y.float(), 1) for x, y in zip(tensors, previous, strict=True)]
    ).sum()
