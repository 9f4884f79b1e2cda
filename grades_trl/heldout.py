"""What each matrix's own updates buy in held-out loss. Pure torch.

The loss L of a fixed set of held-out examples changes between two readings, as the weights go from W to W', by

    L(W) - L(W') = sum over matrices of  -<(g + g') / 2, W' - W>  + O(|W' - W|^3),

g and g' being the held-out gradients at both ends (the trapezoid rule along the straight line). The end point alone,
-<g', W' - W>, counts the curvature twice: with the steps of a usual learning rate it is negative while the loss still
falls. The trapezoid is too large as well when a reading spans many large steps; but the losses at both ends are known,
so what the terms lack to their difference (and the part of what is not tracked) is spread evenly over the matrices.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from .matrices import WeightMatrix


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
    """Reads the gain of every matrix since its last reading. Weights and gradients in between lie in CPU memory, the
    best weights too. During a reading there are two sets of gradients on the device, those of training and these.

    Attributes:
        kept (`dict[str, tuple]`): matrix -> its weights, its gradients, and the loss, at its last reading.
        best (`dict[str, Tensor]`): name of a parameter -> what it was at the best reading.
        readings (`int`): how often the held-out examples were run.

    Args:
        backward (`Callable[[], Tensor]`): runs forward and backward of the mean loss of held-out examples, always the
            same ones; adds to `.grad` and returns the loss. Only the gradients carry a loss scale, as in training.
    """

    def __init__(self, backward: Callable[[], Tensor]):
        self._backward = backward
        self.kept: dict[str, tuple[list[Tensor], list[Tensor], float]] = {}
        self.best: dict[str, Tensor] = {}
        self.readings = 0

    @torch.no_grad()
    def read(
        self, parameters: Iterable[nn.Parameter], matrices: Iterable[WeightMatrix], scale: float
    ) -> dict[str, float]:
        """The gains in nats of the matrices that were read before; leaves the training gradients as they were.

        Args:
            parameters (`Iterable[nn.Parameter]`): all of the model.
            matrices (`Iterable[WeightMatrix]`): what is read.
            scale (`float`): the loss scale that gradients are multiplied by.
        """
        self.readings += 1
        trained = [(p, p.grad) for p in parameters if p.requires_grad]
        for p, _ in trained:
            p.grad = None
        with torch.enable_grad():
            loss = self._backward().detach().float()
        now = {}
        for matrix in matrices:
            part = ... if matrix.expert is None else matrix.expert
            gradients = [p.grad[part] / scale for p in matrix.parameters if p.grad is not None]
            if len(gradients) == len(matrix.parameters):
                now[matrix.name] = [p.detach()[part] for p in matrix.parameters], gradients
        for p, gradient in trained:
            p.grad = gradient
        # The loss, and of each matrix the gain and the size of the gradient, with one transfer to the host.
        numbers = [loss.reshape(1)]
        for name, (weights, gradients) in now.items():
            before, before_gradients, _ = self.kept.get(name, (weights, gradients, None))
            before = [t.to(w.device) for t, w in zip(before, weights, strict=True)]
            before_gradients = [t.to(w.device) for t, w in zip(before_gradients, weights, strict=True)]
            size = torch.stack([g.abs().sum(dtype=torch.float32) for g in gradients]).sum()
            numbers.append(torch.stack([gain(before, weights, before_gradients, gradients), size]))
        value, *rows = torch.cat([part.to(loss.device) for part in numbers]).tolist()
        gains: dict[str, float] = {}
        drops = {}
        for i, (name, (weights, gradients)) in enumerate(now.items()):
            if not 0 < rows[2 * i + 1] < math.inf:
                continue  # no gradient flowed, or it overflowed: not observed
            if name in self.kept:
                gains[name] = rows[2 * i]
                drops[name] = self.kept[name][2] - value
            self.kept[name] = [t.to("cpu", copy=True) for t in weights], [t.cpu() for t in gradients], value
        if not gains:
            return {}
        missing = statistics.fmean(drops.values()) - math.fsum(gains.values())
        return {name: own + missing / len(gains) for name, own in gains.items()}

    @torch.no_grad()
    def keep_best(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """This is the best reading so far: keeps all that trains, matrices and the rest, in CPU memory."""
        self.best = {name: p.to("cpu", copy=True) for name, p in parameters if p.requires_grad}

    @torch.no_grad()
    def go_back(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Gives the model what it had at its best reading. Its gradients belong to other weights: they are dropped."""
        for name, parameter in parameters:
            if name in self.best:
                parameter.copy_(self.best[name])
            parameter.grad = None
