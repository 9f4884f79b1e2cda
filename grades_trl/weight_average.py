"""The running average of the weights, the best one so far, and putting it back.

The k-th update counts k times (polynomial-decay averaging with eta 1, Shamir & Zhang 2013, arXiv 1212.1824): early
weights fade, and there is no horizon to choose. The weights themselves move with the noise of minibatches and the
learning rate; their average does not. Where a run overfits, its held-out loss is below that of the best of the
weights it is made of (figures in `dev/LOG.md`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from grades_trl.distributed import local, reshard


class WeightAverage:
    """
    Averages all parameters that train, also those that freeze later. Of a sharded model each process averages its
    pieces.

    The average is float32 in CPU memory. The best one has the dtype of the weights, which is what it becomes; it is
    the average itself until the average moves on. So there are at most 8 bytes per trained parameter on the host: two
    float32 buffers for float32 weights; for 16-bit ones the average, the best one, and the weights while the average
    takes their place in the model.

    Buffers that are saved with the model (the statistics of BatchNorm) are not averaged. The best average keeps copies
    of them: it was measured with these.

    Args:
        model (`nn.Module`): what trains. `follow` takes in what begins to train later.

    Attributes:
        updates (`int`): how often the average was updated.
    """

    def __init__(self, model: nn.Module):
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._others = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        self._model = model
        self._average: dict[str, Tensor] = {}
        self._best: dict[str, Tensor] = {}
        self._best_buffers: dict[str, Tensor] = {}
        self.updates = 0

    @property
    def host_bytes(self) -> int:
        """CPU memory that this takes at most, in bytes."""
        of_weights = 8 * sum(local(p.detach()).numel() for p in self._parameters.values())
        return of_weights + sum(b.numel() * b.element_size() for b in self._buffers().values())

    def _buffers(self) -> dict[str, Tensor]:
        """Floating-point buffers that a checkpoint has, as they are now: a model may put others in their place."""
        return {
            f"{path}.{name}": buffer
            for path, module in self._model.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set
        }

    @torch.no_grad()
    def follow(self) -> None:
        """Takes in the parameters that have begun to train since the last call (gradual unfreezing).

        To be called before each update of the optimizer: they have not moved yet, so that their average at any earlier
        moment is their present value.
        """
        begun = [name for name, p in self._others.items() if p.requires_grad]
        shared = bool(begun) and self._best_is_average
        for name in begun:
            self._parameters[name] = parameter = self._others.pop(name)
            weight = local(parameter.detach()).to("cpu", copy=True)
            if self.updates:
                self._average[name] = weight.float()
            if self._best:
                self._best[name] = self._average[name] if shared else weight.clone()

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights as they are into the average."""
        self.updates += 1
        share = 2 / (self.updates + 1)
        shared = self._best_is_average
        for name, parameter in self._parameters.items():
            weight = local(parameter.detach()).to("cpu", torch.float32)
            if name not in self._average:
                self._average[name] = weight.clone()
            elif shared:  # the best one keeps the buffer
                self._average[name] = torch.lerp(self._average[name], weight, share)
                self._best[name] = self._best[name].to(parameter.dtype)
            else:
                self._average[name].lerp_(weight, share)

    @property
    def _best_is_average(self) -> bool:
        return any(self._best.get(name) is average for name, average in self._average.items())

    @property
    def has_best(self) -> bool:
        """Whether an average has been marked as the best one."""
        return bool(self._best)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """The model has its average inside, and its weights again, bit for bit, afterwards, whatever happens."""
        weights: dict[str, Tensor] = {}
        reshard(self._model)
        try:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    weights[name] = local(parameter.detach()).to("cpu", copy=True)
                    local(parameter.detach()).copy_(self._average[name])
                    if parameter.dtype == torch.float32:  # they change places: no third buffer
                        weights[name] = self._average[name].copy_(weights[name])
            yield
        finally:
            reshard(self._model)
            self._put_back(weights)

    @torch.no_grad()
    def _put_back(self, weights: dict[str, Tensor]) -> None:
        try:
            while weights:
                name, weight = next(iter(weights.items()))
                parameter = local(self._parameters[name].detach())
                if weight is self._average[name]:
                    average = parameter.to("cpu", copy=True)
                    parameter.copy_(weight)
                    weight.copy_(average)
                else:
                    parameter.copy_(weight)
                del weights[name]
        except KeyboardInterrupt:  # which arrives when a copy of gigabytes is done: not half of the weights
            self._put_back(weights)
            raise

    def mark_best(self) -> None:
        """The average as it is now is the best one."""
        self._best = dict(self._average)
        self._best_buffers = {name: local(b.detach()).to("cpu", copy=True) for name, b in self._buffers().items()}

    @torch.no_grad()
    def restore_best(self) -> None:
        """Gives the model its best average, and the buffers of then."""
        reshard(self._model)
        buffers = self._buffers()
        try:
            for name, best in self._best.items():
                local(self._parameters[name].detach()).copy_(best)
            for name, buffer in self._best_buffers.items():
                local(buffers[name].detach()).copy_(buffer)
        except KeyboardInterrupt:  # all of it, or none
            self.restore_best()
            raise

    def release(self) -> None:
        """Frees all buffers."""
        self._average, self._best, self._best_buffers = {}, {}, {}

    def state_dict(self) -> tuple[dict[str, int | bool], dict[str, Tensor]]:
        """JSON-able values, and tensors: 4 bytes per trained parameter, and as much again as the weights have where
        the best average is an earlier one."""
        tensors = {f"average/{name}": t for name, t in self._average.items()}
        if not self._best_is_average:  # one tensor cannot be written twice
            tensors |= {f"best/{name}": t for name, t in self._best.items()}
        tensors |= {f"buffer/{name}": t for name, t in self._best_buffers.items()}
        return {"updates": self.updates, "best_is_average": self._best_is_average}, tensors

    def load_state_dict(self, state: dict[str, int | bool], tensors: dict[str, Tensor]) -> None:
        """Restores what `state_dict` gave."""
        self.updates = int(state["updates"])
        self._average, self._best, self._best_buffers = (
            {name.removeprefix(kind): t for name, t in tensors.items() if name.startswith(kind)}
            for kind in ("average/", "best/", "buffer/")
        )
        if state["best_is_average"]:
            self._best = dict(self._average)
        # With those that a callback has unfrozen, and will unfreeze again later on
        self._parameters |= {name: self._others.pop(name) for name in self._average.keys() & self._others.keys()}
