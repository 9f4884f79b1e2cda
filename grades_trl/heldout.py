"""What each matrix's own updates buy in held-out loss, at the average of the weights. Pure torch.

Read are not the weights that train but their average over the readings so far, in which reading k counts k times
(polynomial-decay averaging with eta 1, Shamir & Zhang 2013, arXiv 1212.1824). The weights themselves jump about with
the noise of minibatches and the learning rate; their average has settled. It is what is kept in the end: where
a run overfits, its held-out loss is below that of the best of the weights it was made of (figures in `dev/LOG.md`).

The loss L of a fixed set of held-out examples changes between two readings, as the average goes from W to W', by

    L(W) - L(W') = sum over matrices of  -<(g + g') / 2, W' - W>  + O(|W' - W|^3),

g and g' being the held-out gradients at both ends (the trapezoid rule along the straight line). The end point alone,
-<g', W' - W>, counts the curvature twice: with the steps of a usual learning rate it is negative while the loss still
falls. The trapezoid is too large as well when a reading spans many large steps; but the losses at both ends are known,
so what the terms lack to their difference (and the part of what is not tracked) is spread evenly over the matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grades_trl.model.matrices import WeightMatrix


def gain(before: Sequence[Tensor], after: Sequence[Tensor], g: Sequence[Tensor], g_after: Sequence[Tensor]) -> Tensor:
    """`-<(g + g') / 2, W' - W>`, summed over the tensors of one matrix (the LoRA factors A and B).

    Args:
        before, after (`Sequence[Tensor]`): W and W', of any dtype.
        g, g_after (`Sequence[Tensor]`): the gradients of the held-out loss there.

    Returns:
        `Tensor`: float32 scalar, in the unit of the loss; positive if the updates made it smaller.
    """
    terms = [
        torch.dot((one.float() + two.float()).flatten(), (end.float() - start.float()).flatten())
        for start, end, one, two in zip(before, after, g, g_after, strict=True)
    ]
    return -torch.stack(terms).sum() / 2


class HeldoutGain:
    """Averages the weights and reads the gain of every matrix since the last reading.

    The average, the best one (both float32) and the held-out gradients at the last one lie in CPU memory. During a
    reading there are two sets of gradients on the device, those of training and these.

    Attributes:
        average (`dict[str, Tensor]`): name of a parameter that trains -> its average over the readings.
        best (`dict[str, Tensor]`): the average at the reading with the lowest held-out loss.
        best_step (`int`), best_loss (`float`): when that was, and the loss.
        idle (`int`): readings since then.
        gradients (`dict[str, list[Tensor]]`): matrix -> its held-out gradients at the last reading.
        loss (`float`): the held-out loss of the last reading.
        readings (`int`): how often the held-out examples were run.

    Args:
        model (`nn.Module`): what trains.
        backward (`Callable[[], Tensor]`): runs forward and backward of the mean loss of held-out examples, always the
            same ones; adds to `.grad` and returns the loss. Only the gradients carry a loss scale, as in training.
    """

    def __init__(self, model: nn.Module, backward: Callable[[], Tensor]):
        self._model = model
        self._backward = backward
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._averaged = 0  # how often
        self.average: dict[str, Tensor] = {}
        self.best: dict[str, Tensor] = {}
        self.best_step, self.best_loss, self.idle = 0, math.inf, 0
        self.gradients: dict[str, list[Tensor]] = {}
        self.loss = math.inf
        self.readings = 0

    @property
    def since_best(self) -> float:
        """By how much the loss of the last reading is above the lowest one."""
        return self.loss - self.best_loss

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def read(self, step: int, matrices: Collection[WeightMatrix], scale: float) -> dict[str, float]:
        """The gains in nats of the matrices that were read the last time too. Weights and training gradients are
        afterwards as they were, bit for bit.

        Args:
            step (`int`): optimizer step.
            matrices (`Collection[WeightMatrix]`): what is read; without any, the average goes on and that is all.
            scale (`float`): the loss scale that gradients are multiplied by.
        """
        trained = self._trained()
        weights = {name: p.to("cpu", copy=True) for name, p in trained.items()}
        before = self.average
        self._averaged += 1
        share = 2 / (self._averaged + 1)
        self.average = {}
        for name, weight in weights.items():
            now = weight.float()  # of one tensor at a time: for bf16 and fp16 it is a copy
            self.average[name] = torch.lerp(before.get(name, now), now, share)
        if not matrices:
            return {}
        self.readings += 1
        kept = {name: p.grad for name, p in trained.items()}
        for name, p in trained.items():
            p.copy_(self.average[name])
            p.grad = None
        with torch.enable_grad():
            loss = self._backward().detach().float()
        gradients = {}
        for matrix in matrices:
            found = [p.grad[matrix.part] for p in matrix.parameters if p.grad is not None]
            if scale != 1.0:
                found = [g / scale for g in found]
            if len(found) == len(matrix.parameters):
                gradients[matrix] = found
        for name, p in trained.items():
            p.copy_(weights[name])
            p.grad = kept[name]
        gains = self._gains(before, gradients, loss)
        if self.loss < self.best_loss:
            self.best, self.best_step, self.best_loss, self.idle = self.average, step, self.loss, 0
        else:
            self.idle += 1
        return gains

    def _gains(
        self, before: dict[str, Tensor], gradients: dict[WeightMatrix, list[Tensor]], loss: Tensor
    ) -> dict[str, float]:
        # The loss, and of each matrix the gain and the size of the gradient, with one transfer to the host.
        numbers = [loss.reshape(1)]
        for matrix, after in gradients.items():
            names, own = [self._names[id(p)] for p in matrix.parameters], matrix.part
            size = torch.stack([g.abs().sum(dtype=torch.float32) for g in after]).sum()
            bought = torch.zeros_like(size)
            if matrix.name in self.gradients:
                bought = gain(
                    [before[name][own].to(g.device) for name, g in zip(names, after, strict=True)],
                    [self.average[name][own].to(g.device) for name, g in zip(names, after, strict=True)],
                    [old.to(g.device) for old, g in zip(self.gradients[matrix.name], after, strict=True)],
                    after,
                )
            numbers.append(torch.stack([bought, size]))
        value, *rows = torch.cat([part.to(loss.device) for part in numbers]).tolist()
        drop, self.loss = self.loss - value, value
        seen, self.gradients = self.gradients, {}
        gains = {}
        for i, (matrix, after) in enumerate(gradients.items()):
            if not 0 < rows[2 * i + 1] < math.inf:
                continue  # no gradient flowed, or it overflowed: not observed
            if matrix.name in seen:
                gains[matrix.name] = rows[2 * i]
            self.gradients[matrix.name] = [g.cpu() for g in after]
        if not gains:
            return {}
        missing = drop - math.fsum(gains.values())
        return {name: own + missing / len(gains) for name, own in gains.items()}

    @torch.no_grad()
    def settle(self, parameter: nn.Parameter, part: Any = ...) -> None:
        """Gives a tensor, or a part of it (`WeightMatrix.part`), its average."""
        average = self.average.get(self._names[id(parameter)])
        if average is not None:
            parameter[part].copy_(average[part])

    @torch.no_grad()
    def go_back(self) -> None:
        """Gives the model its best average. Its gradients belong to other weights: they are dropped."""
        for name, parameter in self._model.named_parameters():
            if name in self.best:
                parameter.copy_(self.best[name])
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """JSON-able, but for the flat dict under `"tensors"`."""
        names = ("_averaged", "best_step", "best_loss", "idle", "loss", "readings")
        tensors = {f"average/{name}": t for name, t in self.average.items()}
        if self.best is not self.average:  # one tensor cannot be written twice
            tensors |= {f"best/{name}": t for name, t in self.best.items()}
        tensors |= {f"gradient/{i}/{name}": g for name, kept in self.gradients.items() for i, g in enumerate(kept)}
        return {name: getattr(self, name) for name in names} | {
            "at_best": self.best is self.average,
            "gradients": {name: len(kept) for name, kept in self.gradients.items()},
            "tensors": tensors,
        }

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Args:
        state (`dict`): of `state_dict()`, without its tensors.
        tensors (`dict[str, Tensor]`): these, among others.
        """
        state = dict(state)
        at_best, counts = state.pop("at_best"), state.pop("gradients")
        self.gradients = {name: [tensors[f"gradient/{i}/{name}"] for i in range(n)] for name, n in counts.items()}
        self.average, self.best = (
            {name.removeprefix(kind): t for name, t in tensors.items() if name.startswith(kind)}
            for kind in ("average/", "best/")
        )
        if at_best:
            self.best = self.average
        vars(self).update(state)

    def loss_now(self) -> float:
        """The held-out loss of the weights as they are. Drops the training gradients."""
        loss = self._backward().item()
        for parameter in self._trained().values():
            parameter.grad = None
        self.readings += 1
        return loss
