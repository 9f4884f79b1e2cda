"""GradES: watches every weight matrix while it trains and freezes it when it has converged. Works in any loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .config import GradESConfig
from .criterion import Criterion
from .freezing import FrozenExperts, freeze
from .matrices import find_matrices
from .metrics import l1_distance, l1_norm


@dataclass(frozen=True)
class FreezeEvent:
    """One matrix frozen. `step` counts optimizer steps from 1; its update is the first one not applied.

    Attributes:
        step (`int`), matrix (`str`), layer (`int`), role (`str`), tower (`str`): when and which.
        value (`float`), tau (`float`): the reading that froze it, and the threshold it was below.
        params (`int`): its trainable elements.
        frozen (`int`), total (`int`): matrices frozen so far, this one included, and tracked in all.
    """

    step: int
    matrix: str
    layer: int
    role: str
    tower: str
    value: float
    tau: float
    params: int
    frozen: int
    total: int


class GradES:
    """
    Gradient-based early stopping of single weight matrices (arXiv 2509.01842).

    ```python
    grades = GradES(model, GradESConfig(tau=1.8), total_steps=1000, optimizer=optimizer)
    for step in range(1, 1001):
        loss(model).backward()
        grades.step(step)  # before clipping and optimizer.step()
        optimizer.step()
        optimizer.zero_grad()
        if grades.done:
            break
    ```

    Args:
        model (`nn.Module`): the model that trains, not wrapped in DDP.
        config (`GradESConfig`): what counts as converged.
        total_steps (`int`): optimizer steps of the whole schedule, T in the paper.
        optimizer (`torch.optim.Optimizer`, *optional*): its state of frozen matrices is released. Needed for models
            with 3-D expert weights.

    Attributes:
        matrices (`dict[str, WeightMatrix]`): all that is tracked.
        frozen (`dict[str, int]`): matrix -> step.
        readings (`dict[str, float]`): the metric of every matrix observed in the last step.
        taus (`dict[str, float]`): matrix -> threshold, as far as known.
        done (`bool`): everything is frozen.

    Raises:
        ValueError: the model has no matrix to track, or experts and no optimizer.
    """

    def __init__(self, model: nn.Module, config: GradESConfig, total_steps: int, optimizer: Any = None):
        self.config = config
        self.total_steps = total_steps
        self.optimizer = optimizer
        self.matrices = find_matrices(model, projector=config.track_projector)
        if optimizer is None and any(matrix.expert is not None for matrix in self.matrices.values()):
            raise ValueError(
                "This model keeps its experts in 3-D weights, and frozen ones are held still after each step of the "
                "optimizer: pass it, GradES(model, config, total_steps, optimizer=optimizer)."
            )
        self.criterion = Criterion(config, {name: m.tower for name, m in self.matrices.items()}, total_steps)
        self.frozen: dict[str, int] = {}
        self.readings: dict[str, float] = {}
        self._last_step = 0
        # What a reading is compared with: the gradients, or weights, of an earlier step, and that step.
        self._previous: dict[str, list[Tensor]] = {}
        self._previous_step: dict[str, int] = {}
        self._experts: dict[int, FrozenExperts] = {}

    @property
    def done(self) -> bool:
        return len(self.frozen) == len(self.matrices)

    @property
    def taus(self) -> dict[str, float]:
        return self.criterion.taus

    @torch.no_grad()
    def step(self, step: int, grad_scale: float = 1.0) -> list[FreezeEvent]:
        """Reads all matrices and freezes the converged ones. Call it after backward, before clipping and the update.

        Args:
            step (`int`): number of the optimizer step, counted from 1.
            grad_scale (`float`, *optional*, defaults to `1.0`): the loss scale that gradients are still multiplied by
                (fp16). Readings are of the true gradients.

        Returns:
            `list[FreezeEvent]`: the matrices frozen now; this step's update is not applied to them.

        Raises:
            ValueError: `step` did not increase.
        """
        if step <= self._last_step:
            raise ValueError(f"GradES.step({step}) after step {self._last_step}: steps count up from 1.")
        self._last_step = step
        for experts in self._experts.values():
            experts.zero_gradients()
        self.readings = self._read(step, grad_scale) if self._wanted(step) or self._wanted(step + 1) else {}
        return self._freeze(step, self.criterion.update(step, self.readings))

    def _wanted(self, step: int) -> bool:
        return step % self.config.interval == 0

    def _read(self, step: int, grad_scale: float) -> dict[str, float]:
        """The metric of every matrix observed in this step, with one transfer from the device."""
        names, norms, values = [], [], []
        current: dict[str, Sequence[Tensor]] = {}
        for name, matrix in self.matrices.items():
            if name in self.frozen:
                continue
            gradients = [p.grad for p in matrix.parameters if p.grad is not None]
            if len(gradients) < len(matrix.parameters):
                continue  # no gradient: not observed
            if matrix.expert is not None:
                gradients = [g[matrix.expert] for g in gradients]
            norm = l1_norm(gradients) / grad_scale
            names.append(name)
            norms.append(norm)
            if self.config.metric == "grad_norm":
                values.append(norm)
                continue
            if self.config.metric == "weight_change":
                current[name] = [p[matrix.expert] if matrix.expert is not None else p for p in matrix.parameters]
            else:
                current[name] = [g / grad_scale for g in gradients] if grad_scale != 1.0 else gradients
            previous = self._comparable(step, name)
            values.append(l1_distance(current[name], previous) if previous else torch.full_like(norm, math.nan))
        if not names:
            return {}
        device = norms[0].device
        table = torch.stack([torch.stack([n.to(device), v.to(device)]) for n, v in zip(norms, values, strict=True)])

        readings = {}
        for name, (norm, value) in zip(names, table.tolist(), strict=True):
            if norm == 0.0 or not math.isfinite(norm):
                continue  # nothing flowed into it, or it overflowed: not observed, and what it is compared with stays
            if name in current and self._wanted(step + 1):
                self._remember(step, name, current[name])
            if self._wanted(step) and math.isfinite(value):
                readings[name] = value
        return readings

    def _comparable(self, step: int, name: str) -> list[Tensor] | None:
        """What the metric compares this step with. A weight change is that of one update, so it must be of step - 1;
        a gradient may be that of the last step in which the matrix was observed."""
        if not self._wanted(step) or name not in self._previous:
            return None
        if self.config.metric == "weight_change" and self._previous_step[name] != step - 1:
            return None
        return self._previous[name]

    def _remember(self, step: int, name: str, tensors: Sequence[Tensor]) -> None:
        if name in self._previous:
            for old, new in zip(self._previous[name], tensors, strict=True):
                old.copy_(new)
        else:
            self._previous[name] = [tensor.detach().clone() for tensor in tensors]
        self._previous_step[name] = step

    def _freeze(self, step: int, names: list[str]) -> list[FreezeEvent]:
        events = []
        for name in names:
            matrix = self.matrices[name]
            self._take_out(name, step)
            events.append(
                FreezeEvent(
                    step=step,
                    matrix=name,
                    layer=matrix.layer,
                    role=matrix.role,
                    tower=matrix.tower,
                    value=self.readings[name],
                    tau=self.taus[name],
                    params=matrix.params,
                    frozen=len(self.frozen),
                    total=len(self.matrices),
                )
            )
        return events

    def _take_out(self, name: str, step: int) -> None:
        matrix = self.matrices[name]
        self.frozen[name] = step
        self._previous.pop(name, None)
        self._previous_step.pop(name, None)
        if matrix.expert is None:
            freeze(matrix, self.optimizer)
            return
        parameter = matrix.parameters[0]
        if id(parameter) not in self._experts:
            self._experts[id(parameter)] = FrozenExperts(parameter, self.optimizer)
        if self._experts[id(parameter)].freeze(matrix.expert):
            freeze(matrix, self.optimizer)
            del self._experts[id(parameter)]

    def unfreeze_all(self) -> None:
        """Gives every tensor back to training, for a new run on the same model. Values stay as they are."""
        for matrix in self.matrices.values():
            for parameter in matrix.parameters:
                parameter.requires_grad_(True)
        for experts in self._experts.values():
            experts.values.clear()
        self.frozen.clear()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: JSON-able values, and under `"tensors"` a flat dict of tensors."""
        tensors = {f"{name}/{i}": t for name, kept in self._previous.items() for i, t in enumerate(kept)}
        return {
            "metric": self.config.metric,
            "last_step": self._last_step,
            "frozen": dict(self.frozen),
            "previous_step": dict(self._previous_step),
            "criterion": self.criterion.state_dict(),
            "tensors": tensors,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a run: its frozen matrices are frozen again, everything else goes on where it was.

        Raises:
            ValueError: the state is of another metric, or names matrices that this model does not have.
        """
        if state["metric"] != self.config.metric:
            raise ValueError(
                f"The checkpoint was written with metric {state['metric']!r} and this run has "
                f"{self.config.metric!r}: resume with --metric {state['metric']}."
            )
        unknown = (set(state["frozen"]) | set(state["previous_step"])) - set(self.matrices)
        if unknown:
            raise ValueError(
                f"The checkpoint knows {len(unknown)} matrices that this model does not train, {min(unknown)} "
                "among them: resume with the model and the LoRA settings it was written with."
            )
        self._last_step = state["last_step"]
        self._previous_step = dict(state["previous_step"])
        for name in self._previous_step:
            parameters = self.matrices[name].parameters
            self._previous[name] = [state["tensors"][f"{name}/{i}"].to(p.device) for i, p in enumerate(parameters)]
        self.criterion.load_state_dict(state["criterion"])
        for name, step in state["frozen"].items():
            self._take_out(name, step)
