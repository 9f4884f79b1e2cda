"""Sums over whole matrices, over their change since an earlier step, and products with them then: what all metrics are
made of.

A matrix may consist of several tensors (the LoRA factors A and B): its value is the sum over all of them
(arXiv 2509.01842, Eq. 3). Large tensors are sampled (see `metrics.py`). In several processes, all get the numbers of
the main one, or the sums over their pieces.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from grades_trl.distributed import from_main, gathered, is_sharded, local
from grades_trl.model.matrices import WeightMatrix

from . import kernels, metrics
from .metrics import Sample, sample, sample_size

FUSED_ON = "cuda"  # the devices that the kernels are for; tests in Triton's interpreter say "cpu"


class L1Measurement:
    """
    Measures matrices against what was remembered of them.

    Args:
        matrices (`dict[str, WeightMatrix]`): what is tracked.
        sample_fraction (`float`): of each large tensor, that is measured and remembered.

    Attributes:
        remembered_at (`dict[str, int]`): matrix -> the step that its remembered tensors are of.
    """

    def __init__(self, matrices: dict[str, WeightMatrix], sample_fraction: float):
        self.matrices = matrices
        self.sample_fraction = sample_fraction
        self.remembered_at: dict[str, int] = {}
        self._previous: dict[str, list[Tensor]] = {}
        self._samples: dict[str, list[Sample | None]] = {}
        self._is_sharded = is_sharded(p for matrix in matrices.values() for p in matrix.parameters)

    def gradients(self, live: Collection[str]) -> dict[str, list[Tensor]]:
        """The sampled gradients of all matrices that have one."""
        found: dict[str, list[Tensor]] = {}
        for name in live:
            gradients = [p.grad for p in self.matrices[name].parameters]
            complete = [g.detach() for g in gradients if g is not None]
            if len(complete) == len(gradients):
                found[name] = self.sampled(name, complete)
        return found

    def sampled(self, name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What is measured of the tensors of a matrix: of large ones a sample, of sharded ones their piece here."""
        tensors = [local(tensor) for tensor in tensors]
        if name not in self._samples:
            self._samples[name] = [
                sample(t, self.sample_fraction, f"{name}/{i}") if self.sample_fraction < 1 else None
                for i, t in enumerate(tensors)
            ]
        return [t if s is None else s.take(t) for t, s in zip(tensors, self._samples[name], strict=True)]

    def norms(self, tensors: dict[str, list[Tensor]], scale: float = 1.0) -> dict[str, float]:
        """`sum |x / scale|` of each matrix."""
        return self.norms_and_changes(tensors, {}, scale)[0]

    def norms_and_changes(
        self, normed: dict[str, list[Tensor]], compared: dict[str, list[Tensor]], scale: float = 1.0
    ) -> tuple[dict[str, float], dict[str, float]]:
        """`sum |x / scale|` of each matrix in `normed`, and `sum |y / scale - p|` of each in `compared`, p being what
        was remembered. One transfer to the host; one pass over memory where x and y are the same tensors."""
        in_one_pass = {name for name, own in compared.items() if normed.get(name) is own}
        apart = {name: own for name, own in compared.items() if name not in in_one_pass}
        tensors = [x for group in (normed, apart) for own in group.values() for x in own]
        if not tensors:
            return {}, {}
        previous: list[Tensor | None] = []
        for name, own in normed.items():
            previous += self._previous[name] if name in in_one_pass else [None] * len(own)
        for name in apart:
            previous += self._previous[name]
        scales = [number for group in (normed, apart) for name in group for number in self._scales(name)]
        rows = iter(l1_sums(tensors, previous, scale, lambda found, order: self._of_all(found, scales, order)))
        norms, changes = {}, {}
        for name, own in normed.items():
            pairs = [next(rows) for _ in own]
            norms[name] = self._total(name, [norm for norm, _ in pairs])
            if name in in_one_pass:
                changes[name] = self._total(name, [change for _, change in pairs])
        for name, own in apart.items():
            changes[name] = self._total(name, [next(rows)[1] for _ in own])
        return norms, changes

    def products(self, tensors: dict[str, list[Tensor]], scale: float) -> Arriving:
        """`<x / scale, p>` of the tensors of each matrix, p being what was remembered, in float32. For `totals`."""
        rows = [
            torch.dot(x.float().flatten(), p.float().flatten())
            for name, own in tensors.items()
            for x, p in zip(own, self._previous[name], strict=True)
        ]
        scales = [number for name in tensors for number in self._scales(name)]
        numbers = torch.stack([row.to(rows[0].device) for row in rows]) / scale
        return Arriving(self._of_all(numbers, scales, range(len(rows))))

    def totals(self, names: Collection[str], numbers: Arriving) -> dict[str, float]:
        """The sum over each of these matrices, from one number for each of their tensors."""
        each = iter(numbers.tolist())
        return {name: self._total(name, [next(each) for _ in self._samples[name]]) for name in names}

    def _total(self, name: str, sums: Sequence[float]) -> float:
        """The sum over the tensors of a matrix, each scaled up to all of its elements."""
        scales = [1.0] * len(sums) if self._is_sharded else self._scales(name)
        return math.fsum(number * scale for number, scale in zip(sums, scales, strict=True))

    def _scales(self, name: str) -> list[float]:
        """All elements over those that are read, of each tensor of a matrix."""
        return [1.0 if s is None else s.scale for s in self._samples[name]]

    def _of_all(self, numbers: Tensor, scales: list[float], order: Sequence[int]) -> Tensor:
        """The numbers of the main process; of sharded tensors the sums over all pieces, scaled up. `order` says which
        of the tensors a number is of."""
        if not self._is_sharded:
            return from_main(numbers)
        factors = torch.tensor([scales[i] for i in order], dtype=numbers.dtype, device=numbers.device)
        return gathered(numbers * factors.view(-1, *[1] * (numbers.ndim - 1))).sum(0)

    def remember(self, step: int, name: str, tensors: Sequence[Tensor], scale: float) -> None:
        """Keeps `tensors / scale`: a sample as it is, for it is a copy already, and of whole tensors a copy, since
        clipping changes gradients and the optimizer weights. The kernels want it contiguous."""
        self._previous[name] = [
            x if chosen is not None and scale == 1.0 else (x / scale).contiguous()
            for x, chosen in zip(tensors, self._samples[name], strict=True)
        ]
        self.remembered_at[name] = step

    def forget(self, name: str) -> None:
        """Releases what is remembered of a matrix, and which of its elements are sampled."""
        self._previous.pop(name, None)
        self._samples.pop(name, None)
        self.remembered_at.pop(name, None)

    def memory(self, remembers: bool = True) -> int:
        """Bytes on the device while everything trains: what is remembered, if anything, and which elements these are.
        Known from the shapes alone."""
        total = 0
        for parameter in (p for matrix in self.matrices.values() for p in matrix.parameters):
            fraction = self.sample_fraction
            size = sample_size(parameter.numel(), fraction) if fraction < 1 else None
            elements = parameter.numel() if size is None else math.prod(size)
            total += elements * parameter.element_size() if remembers else 0
            total += 0 if size is None else size[1] * torch.int64.itemsize
        return total

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors = {f"{name}/{i}": t for name, kept in self._previous.items() for i, t in enumerate(kept)}
        return {"remembered_at": dict(self.remembered_at)}, tensors

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.remembered_at = dict(state["remembered_at"])
        for name in self.remembered_at:
            parameters = self.matrices[name].parameters
            self._previous[name] = [tensors[f"{name}/{i}"].to(p.device) for i, p in enumerate(parameters)]


class Arriving:
    """
    Numbers on their way from the device to the host. The transfer begins now, and nothing waits for it before they are
    read: whoever waits for later work on the device has waited for them too.

    Args:
        numbers (`Tensor`): on any device.
    """

    def __init__(self, numbers: Tensor):
        self._numbers = numbers.to("cpu", non_blocking=numbers.is_cuda)  # from CUDA into pinned memory
        self._arrived = None
        if numbers.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(numbers.device))

    def tolist(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.tolist()


def is_measured(norm: float) -> bool:
    """Whether a sum of absolute values is of anything: not where no gradient has flowed, nor after an overflow."""
    return 0.0 < norm < math.inf


def l1_sums(
    tensors: Sequence[Tensor],
    previous: Sequence[Tensor | None],
    scale: float,
    of_all: Callable[[Tensor, list[int]], Tensor] = lambda rows, order: rows,
) -> list[list[float]]:
    """`[sum |x / scale|, sum |x / scale - p|]` of each tensor x, NaN without p, with one transfer to the host.

    `of_all` makes numbers of all processes out of those of this one, (tensors, 2), in the order that it is given too.
    """
    groups: dict[tuple[torch.device, bool], list[int]] = {}  # a model may lie on several devices
    for i, x in enumerate(tensors):
        groups.setdefault((x.device, x.device.type == FUSED_ON and x.dtype in kernels.DTYPES), []).append(i)
    tables = []
    for (_, fused), members in groups.items():
        measure = kernels.l1_sums if fused and kernels.available() else metrics.l1_sums
        tables.append(measure([tensors[i] for i in members], [previous[i] for i in members], scale))
    # The one wait for the device; the Trainer makes the same one next.
    order = [i for members in groups.values() for i in members]
    rows = of_all(torch.cat([table.to(tables[0].device) for table in tables]), order).tolist()
    sums = dict(zip(order, rows, strict=True))
    return [sums[i] for i in range(len(tensors))]
