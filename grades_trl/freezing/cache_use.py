"""What a cache did for a run: passes read from it, memory, and the seconds that they would have taken."""

from __future__ import annotations

import statistics
import time
from collections import deque
from typing import Any

import torch


class CacheUse:
    """
    Counts what a cache does, over all frozen prefixes of a run.

    The time of a computed forward pass of the cached layers is measured on the device that they run on, without
    waiting for it. What hashing and copying take is not in it.

    Attributes:
        hits (`int`), misses (`int`): training passes that were read from the cache, and that were not.
        peak_bytes (`int`): of CPU memory, at most.
    """

    def __init__(self) -> None:
        self.hits = self.misses = self.peak_bytes = 0
        self._saved = 0.0  # by earlier prefixes
        self._hits_before = 0
        self._begin: Any = None
        self._times: deque[tuple[Any, Any]] = deque(maxlen=100)

    @property
    def saved_seconds(self) -> float:
        """The median time of a computed pass, times the passes that were read."""
        seconds = [_seconds(begin, end) for begin, end in self._times]
        return self._saved + (self.hits - self._hits_before) * (statistics.median(seconds) if seconds else 0.0)

    @property
    def reads(self) -> bool:
        """Whether a pass was read since the layers are these."""
        return self.hits > self._hits_before

    def next_layers(self) -> None:
        """Other layers are cached from now on: their passes take another time."""
        self._saved, self._hits_before = self.saved_seconds, self.hits
        self._times.clear()

    def begin_forward(self, device: torch.device) -> None:
        """A cached layer is about to run; only the first one of a pass counts."""
        if self._begin is None:
            self._begin = _mark(device)

    def end_forward(self, device: torch.device) -> None:
        """The last one has run."""
        if self._begin is not None:
            self._times.append((self._begin, _mark(device)))
        self.end_pass()

    def end_pass(self) -> None:
        """The pass is over, whatever became of it."""
        self._begin = None


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds(begin: Any, end: Any) -> float:
    if isinstance(end, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
