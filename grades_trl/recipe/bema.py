"""BEMA (arXiv 2508.00180): a bias-corrected running average of the weights, by TRL's callback."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from trl import BEMACallback


class BEMA(BEMACallback):
    """
    TRL's `BEMACallback`, whose average becomes the weights of the model when training ends.

    TRL's own class (1.14) saves the average of a second model beside the first. It cannot build one of a PEFT model,
    and it fails where some weights do not train. Here the average is of what trains alone, in float32 on the CPU (12
    bytes per trained parameter), and the model gets it: so it is what is saved and scored. Updates and coefficients
    are TRL's; the average moves in every step, since TRL's 400 steps between two updates are most of a short run.
    """

    def __init__(self) -> None:
        super().__init__(update_freq=1)

    @torch.no_grad()
    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        named = [(name, p) for name, p in self._unwrap_model(model).named_parameters() if p.requires_grad]
        self.param_names, self.thetat_params = [name for name, _ in named], [p for _, p in named]
        self.theta0_params = [p.detach().float().to(self.device, copy=True) for p in self.thetat_params]
        self.ema_params = [theta0.clone() for theta0 in self.theta0_params]
        self.running_model = nn.ParameterList(nn.Parameter(theta0.clone()) for theta0 in self.theta0_params)

    @torch.no_grad()
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gives the average to the model."""
        for parameter, average in zip(self.thetat_params, self.running_model, strict=True):
            parameter.copy_(average)
