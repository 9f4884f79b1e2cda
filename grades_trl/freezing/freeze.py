"""Makes a frozen matrix cost nothing: its gradient, its optimizer state, its share of backward and clipping."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from grades_trl.model.matrices import WeightMatrix


def freeze(matrix: WeightMatrix, optimizer: Any = None) -> None:
    """Takes a matrix out of training for good: its values stay bit-identical from here on.

    `requires_grad=False` skips its share of backward; `grad=None` makes optimizers skip it altogether, weight decay
    and momentum included (a stale gradient would go on being clipped and applied). The tensor stays in the param
    groups, so that checkpoints keep loading; only its optimizer state is released. (bitsandbytes never frees the state
    of its paged optimizers: it is no longer touched, and the driver moves it to the host when memory is short.)

    Args:
        matrix (`WeightMatrix`): not an expert of a 3-D weight, see `FrozenExperts`.
        optimizer (`torch.optim.Optimizer`, *optional*): any with a `state` keyed by tensor, accelerate's wrapper too.
    """
    for parameter in matrix.parameters:
        freeze_parameter(parameter, optimizer)


def freeze_parameter(parameter: nn.Parameter, optimizer: Any = None) -> None:
    """`freeze` for a single tensor."""
    parameter.requires_grad_(False)
    parameter.grad = None
    if optimizer is not None:
        optimizer.state.pop(parameter, None)


class FrozenExperts:
    """Holds frozen experts of one 3-D weight still while the other experts of the same tensor train.

    Autograd and optimizers know only whole tensors. So the gradient of a frozen expert is zeroed (clipping must not
    count it) and its values are put back after each optimizer step (momentum and weight decay would move it).
    When the last expert of the tensor freezes, the whole tensor is frozen like any other.
    """

    def __init__(self, parameter: nn.Parameter, optimizer: Any):
        self.parameter = parameter
        self.values: dict[int, torch.Tensor] = {}
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps the real one
        self._hook = inner.register_step_post_hook(lambda *_: self._put_back())

    def freeze(self, expert: int) -> bool:
        """Freezes one expert; `True` when it was the last one, and the tensor can be frozen as a whole."""
        self.values[expert] = self.parameter.detach()[expert].clone()
        self.zero_gradients()
        if len(self.values) < self.parameter.shape[0]:
            return False
        self._hook.remove()
        return True

    def keep(self) -> None:
        """Holds the frozen experts where they are now, after they were given other values."""
        self.values = {expert: self.parameter.detach()[expert].clone() for expert in self.values}

    def zero_gradients(self) -> None:
        """To be called after backward and before clipping."""
        if self.parameter.grad is not None:
            self.parameter.grad[list(self.values)] = 0

    def _put_back(self) -> None:
        with torch.no_grad():
            for expert, values in self.values.items():
                self.parameter[expert] = values
