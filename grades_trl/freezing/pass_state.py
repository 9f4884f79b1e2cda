"""What the output of frozen layers depends on beside the example, and what shows that it depends on chance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from grades_trl.model.structure import is_adapter


class PassState:
    """
    The state of a model around a forward pass.

    Args:
        model (`nn.Module`): wrapped by PEFT or not.
    """

    def __init__(self, model: nn.Module):
        from peft.utils.other import AuxiliaryTrainingWrapper

        self._adapters: list[Any] = [
            m for m in model.modules() if is_adapter(m) or isinstance(m, AuxiliaryTrainingWrapper)
        ]
        self._buffers = list(model.buffers())
        self._devices = {p.device for p in model.parameters()}

    def settings(self, device: str) -> tuple[Any, ...]:
        """What `adapters` says, and autocast on a type of device (`"cuda"`)."""
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return self.adapters(), autocast

    def adapters(self) -> list[tuple[Any, ...]]:
        """Of each adapter whether it is active, and the numbers beside its weights that its output depends on."""
        return [
            (
                adapter.disable_adapters,
                adapter.active_adapters,
                *((adapter.merged_adapters, _plain_values(adapter)) if is_adapter(adapter) else ()),
            )
            for adapter in self._adapters
        ]

    def random_state(self) -> list[Any]:
        """What dropout, noise and batch statistics change."""
        states: list[Any] = [torch.get_rng_state()]
        for device in self._devices:
            if device.type == "mps":
                states.append(torch.mps.get_rng_state())
            elif device.type not in ("cpu", "meta"):
                states.append(torch.get_device_module(device).get_rng_state(device))
        return [*states, *(buffer._version for buffer in self._buffers)]


def _plain_values(adapter: Any) -> list[tuple[str, Any, Any]]:
    """Rank, alpha, scaling and the like of each adapter of a layer, by the names that PEFT declares for them."""
    declared = ((name, getattr(adapter, name, None)) for name in adapter.other_param_names)
    return [
        (name, key, value)
        for name, values in declared
        if isinstance(values, dict)
        for key, value in values.items()
        if isinstance(value, (bool, int, float, str))
    ]


def same_state(states: list[Any], others: list[Any]) -> bool:
    """Whether two results of `random_state` are equal."""
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(states, others, strict=True))
