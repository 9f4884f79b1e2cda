"""BEMA (arXiv 2508.00180): a bias-corrected running average of the weights, by TRL's callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from trl import BEMACallback

from grades_trl.trainers.whole_checkpoint import InCheckpoints

STATE = "bema_state.safetensors"


class BEMA(InCheckpoints, BEMACallback):
    """
    TRL's `BEMACallback`, whose average becomes the weights of the model when training ends.

    TRL's own class (1.14) saves the average of a second model beside the first. It cannot build one of a PEFT model,
    and it fails where some weights do not train. Here the average is of what trains alone, in float32 on the CPU (12
    bytes per trained parameter), and the model gets it: so it is what is saved and scored. Updates and coefficients
    are TRL's; the average moves in every step, since TRL's 400 steps between two updates are most of a short run.

    Each checkpoint has what the average is made of (8 bytes per trained parameter), and a resumed run goes on with it.

    Args:
        checkpoint (`str`, *optional*): of a run with BEMA, which is resumed.

    Raises:
        ValueError: the checkpoint was written without BEMA, or of other weights.
    """

    def __init__(self, checkpoint: str | None = None) -> None:
        super().__init__(update_freq=1)
        self._file = None if checkpoint is None else Path(checkpoint) / STATE
        if self._file is not None and not self._file.exists():
            raise ValueError(
                f"{self._file} is missing: the checkpoint was written without --bema. Resume without, or start again."
            )

    @torch.no_grad()
    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        named = [(name, p) for name, p in self._unwrap_model(model).named_parameters() if p.requires_grad]
        self.param_names, self.thetat_params = [name for name, _ in named], [p for _, p in named]
        self.theta0_params = [p.detach().float().to(self.device, copy=True) for p in self.thetat_params]
        self.ema_params = [theta0.clone() for theta0 in self.theta0_params]
        self.running_model = nn.ParameterList(nn.Parameter(theta0.clone()) for theta0 in self.theta0_params)
        if self._file is not None:
            self._load(self._file, state.global_step)

    def save_state(self, folder: Path) -> None:
        """Into a checkpoint, by `WholeCheckpoints`."""
        save_file(self._state(), folder / STATE)

    def _state(self) -> dict[str, torch.Tensor]:
        """What the average is made of."""
        first = {f"first/{name}": t for name, t in zip(self.param_names, self.theta0_params, strict=True)}
        means = {f"mean/{name}": t for name, t in zip(self.param_names, self.ema_params, strict=True)}
        return first | means

    def _load(self, file: Path, step: int) -> None:
        saved, own = load_file(file), self._state()
        if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in saved.items()}:
            raise ValueError(
                f"{file} has the averages of other weights than train now: resume with the model, the LoRA settings "
                "and the choice of what trains that the run had."
            )
        for name, tensor in own.items():
            tensor.copy_(saved[name])
        of_weights = zip(self.running_model, self.ema_params, self.thetat_params, self.theta0_params, strict=True)
        for running, mean, weight, first in of_weights:
            running.copy_(mean + self._bema_alpha(step) * (weight.to(self.device) - first))

    @torch.no_grad()
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gives the average to the model."""
        for parameter, average in zip(self.thetat_params, self.running_model, strict=True):
            parameter.copy_(average)
