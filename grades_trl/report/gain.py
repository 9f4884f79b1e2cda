"""Where the gain of a run is, and where its FLOPs go: shares of layers and towers, over steps and windows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from grades_trl.model.matrices import WeightMatrix
from grades_trl.report.summary import GainShare, GainSummary

MAX_WINDOWS = 60


@dataclass(frozen=True)
class GainTable:
    """
    What was measured of the gain, with the FLOPs of the same steps.

    Attributes:
        layers (`dict[str, list[WeightMatrix]]`): from input to output, see `layers_in_order`.
        steps (`list[int]`): the measured optimizer steps.
        gains (`np.ndarray`): of shape (steps, layers), see `GainMeter`; NaN where nothing of a layer trained.
        costs (`np.ndarray`): of shape (steps, layers), FLOPs.
        frozen_at (`dict[str, int]`): layer -> the step at which the last of its matrices froze.
    """

    layers: dict[str, list[WeightMatrix]]
    steps: list[int]
    gains: np.ndarray
    costs: np.ndarray
    frozen_at: dict[str, int]

    @classmethod
    def of(
        cls,
        layers: dict[str, list[WeightMatrix]],
        gains: Mapping[int, Mapping[str, float]],
        costs: Sequence[Mapping[str, float]],
        frozen: Mapping[str, int],
    ) -> GainTable:
        """
        Args:
            layers (`dict[str, list[WeightMatrix]]`): all of the model.
            gains (`Mapping[int, Mapping[str, float]]`): step -> layer -> gain.
            costs (`Sequence[Mapping[str, float]]`): layer -> FLOPs, for each of these steps.
            frozen (`Mapping[str, int]`): matrix -> the step at which it froze.
        """
        rows = [[of_step.get(layer, math.nan) for layer in layers] for of_step in gains.values()]
        return cls(
            layers,
            list(gains),
            np.array(rows, np.float64).reshape(-1, len(layers)),
            np.array([[of_step[layer] for layer in layers] for of_step in costs]).reshape(-1, len(layers)),
            {
                layer: max(frozen[m.name] for m in members)
                for layer, members in layers.items()
                if all(m.name in frozen for m in members)
            },
        )

    def windows(self) -> list[slice]:
        """At most 60 windows, of equally many measured steps."""
        parts = np.array_split(np.arange(len(self.steps)), min(MAX_WINDOWS, len(self.steps)))
        return [slice(int(part[0]), int(part[-1]) + 1) for part in parts]

    def gain_per_step(self) -> np.ndarray:
        """The mean gain of a step in each window, all layers together."""
        return np.array([np.nansum(self.gains[part]) / len(self.gains[part]) for part in self.windows()])

    def gain_per_cost(self) -> np.ndarray:
        """
        Of shape (layers, windows): a layer's share of the gain of a window over its share of the FLOPs. 1 is that of
        the model as a whole, negative where the gradients of two batches point apart. NaN where nothing of it trained.

        A share is one of the sum of absolute values: in a window in which gains of both signs cancel out, which is
        noise, shares of the sum would be anything.
        """
        columns = []
        for part in self.windows():
            gains = np.where(np.isnan(self.gains[part]).all(0), np.nan, np.nansum(self.gains[part], axis=0))
            costs = self.costs[part].sum(0)
            with np.errstate(divide="ignore", invalid="ignore"):  # a layer without FLOPs, a window without gains
                columns.append((gains / np.nansum(np.abs(gains))) / (costs / costs.sum()))
        return np.array(columns).T

    def summary(self) -> GainSummary | None:
        """The shares over all measured steps; `None` without any."""
        if not self.steps:
            return None
        towers: dict[str, list[int]] = {}
        for column, members in enumerate(self.layers.values()):
            towers.setdefault(members[0].tower, []).append(column)
        return GainSummary(
            steps=len(self.steps),
            total=float(np.nansum(self.gains)),
            towers={tower: self._share(columns) for tower, columns in towers.items()},
            layers={layer: self._share([column]) for column, layer in enumerate(self.layers)},
        )

    def _share(self, columns: list[int]) -> GainShare:
        """The share of some layers, and its standard error: that of a ratio of two means."""
        cost = float(self.costs[:, columns].sum() / self.costs.sum())
        total, own = np.nansum(self.gains, axis=1), np.nansum(self.gains[:, columns], axis=1)
        if total.sum() <= 0:
            return GainShare(None, None, cost)
        share = own.sum() / total.sum()
        if len(total) == 1:
            return GainShare(float(share), None, cost)
        error = np.std(own - share * total, ddof=1) / math.sqrt(len(total)) / total.mean()
        return GainShare(float(share), float(error), cost)
