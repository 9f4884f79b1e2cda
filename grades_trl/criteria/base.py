"""What a criterion is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from grades_trl.model.flops import StepCosts
from grades_trl.model.matrices import WeightMatrix

from .gain_meter import GainMeter


@dataclass(frozen=True)
class Converged:
    """A matrix that has converged: by which value, below which threshold, and why in words. A freeze of whole
    layers (`gain`) and a scheduled one have neither value nor threshold."""

    name: str
    reason: str
    value: float | None = None
    tau: float | None = None


class Criterion(ABC):
    """
    Decides which matrices have converged. Knows the model and its gradients, no optimizer, trainer or report.

    Args:
        matrices (`dict[str, WeightMatrix]`): what is tracked.
        total_steps (`int`): optimizer steps of the whole schedule, T in the paper.
        **settings: those named in `defaults`.

    Attributes:
        defaults (`dict`): the settings of `GradESConfig` that this criterion has, and their defaults.
        grace_steps (`int`): optimizer steps in which nothing may freeze.
        freezes_whole_layers (`bool`): norms and biases freeze with the matrices of their layer, and what feeds the
            first layer of an encoder with that.
        costs (`Callable[[], StepCosts]`): what a step costs now; set by whoever knows the batches.
        gain_meter (`GainMeter`): how fast each layer could bring the loss down; the engine's, which has measured the
            step when `update` is called.
        values (`dict[str, float]`): matrix -> what was measured in the last `update`.
        unfreeze_reason (`str`): why all that is frozen is to train again, as found in the last `update`; mostly empty.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}
    freezes_whole_layers: ClassVar[bool] = False
    grace_steps: int = 0
    gain_meter: GainMeter

    def __init__(self, matrices: dict[str, WeightMatrix], total_steps: int, **settings: Any):
        self.matrices = matrices
        self.costs: Callable[[], StepCosts] = StepCosts
        self.values: dict[str, float] = {}
        self.unfreeze_reason = ""

    @abstractmethod
    def update(self, step: int, live: Collection[str], grad_scale: float) -> list[Converged]:
        """Measures the matrices that still train and returns those that have converged now.

        Called after the backward pass of every optimizer step, before clipping and the update.

        Args:
            step (`int`): optimizer step, counted from 1.
            live (`Collection[str]`): names of the matrices that are not frozen.
            grad_scale (`float`): the loss scale that gradients are still multiplied by.
        """

    def probes(self, step: int) -> bool:
        """Whether the gradients of what is frozen are wanted in this step. No update is applied to it."""
        return False

    @property
    def memory(self) -> int:
        """Bytes on the device while everything trains, the gain meter's apart. Known from the shapes alone."""
        return 0

    def forget(self, name: str) -> None:  # noqa: B027
        """Releases what is kept about a matrix, which has frozen."""

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that a resumed run needs: JSON-able values, and tensors."""
        return {}, {}

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:  # noqa: B027
        """Restores what `state_dict` gave."""
