"""Where the training loss comes down: how much each layer could gain, told by the gradients of two batches."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from torch import Tensor

from grades_trl.model.matrices import WeightMatrix, layers_in_order

from .measurement import Arriving, L1Measurement

SAMPLE_FRACTION = 1 / 64  # of each large matrix
# Every step is measured in the first fifth of a run, but in at least 25 steps and at most 1,000; later one step in
# ten, in long runs one in a two-hundredth of the run.
DENSE_FRACTION, MIN_DENSE, MAX_DENSE = 0.2, 25, 1000
SPARSE, MAX_SPARSE = 10, 200


class GainMeter:
    """
    Measures, in every run, how fast each layer could bring the training loss down.

    The gain of a matrix is `<g_t, g_{t-1}>`, the product of its gradients of two consecutive steps. The batches are
    independent and the weights have hardly moved, so that the noise of the two averages out: the product estimates the
    squared norm of the gradient of the whole training loss. To first order that is what a step of gradient descent in
    this matrix gains, in units of the loss and the step size. (McCandlish et al. 2018, arXiv 1812.06162, appendix A,
    take it for the norm of the whole model.) Shares of it say where the loss comes down. Both gradients are there
    anyway, so no held-out row and no further pass is needed.

    A matrix that consists of LoRA factors has the sum over its factors. Large tensors are sampled, with an unbiased
    estimate (`metrics.py`); of these samples the gradients of the step before are remembered.

    A step is no measurement if its gradients are not finite, or zero. What is not tracked (embeddings, norms, biases,
    the output head) has no gain here.

    Args:
        matrices (`dict[str, WeightMatrix]`): what is tracked.
        total_steps (`int`): optimizer steps of the whole schedule.
        sample_fraction (`float`, *optional*, defaults to `1 / 64`): of each large tensor that is measured.

    Attributes:
        layers (`list[str]`): the keys of the layers from input to output, `"<tower>/<path of the stack>/<layer>"`:
            encoders, projector, language. See `layers_in_order`.
        steps (`dict[int, dict[str, float]]`): optimizer step -> layer -> gain, of every measured step since the start
            of the run, in their order. Steps that were not measured are missing. So are, in a step, the layers of
            which nothing was measured: frozen ones, a tower without data.
        values (`dict[str, float]`): matrix -> gain, of the last call of `measure`; empty if it was no measurement.
        dense (`int`): steps at the beginning that are all measured.
        every (`int`): later, one step in that many is measured.
    """

    def __init__(self, matrices: dict[str, WeightMatrix], total_steps: int, sample_fraction: float = SAMPLE_FRACTION):
        members = layers_in_order(matrices)
        self.layers = list(members)
        self.dense = min(MAX_DENSE, max(MIN_DENSE, math.ceil(round(DENSE_FRACTION * total_steps, 9))))
        self.every = max(SPARSE, math.ceil(total_steps / MAX_SPARSE))
        self._layer_of = {matrix.name: layer for layer, own in members.items() for matrix in own}
        self._matrices = matrices
        self._measurement = L1Measurement(matrices, sample_fraction)
        self._steps: dict[int, dict[str, float]] = {}
        self._values: dict[str, float] = {}
        self._unread: tuple[int, list[str], Arriving] | None = None  # step, matrices, their numbers

    @property
    def steps(self) -> dict[int, dict[str, float]]:
        self.read()
        return self._steps

    @property
    def values(self) -> dict[str, float]:
        self.read()
        return self._values

    def measure(self, step: int, live: Collection[str], grad_scale: float, probing: bool = False) -> None:
        """Measures the matrices that still train, if this step is one of those measured.

        Called after the backward pass of every optimizer step, before clipping and the update. Nothing waits for the
        device before `steps` or `values` are read.

        Args:
            step (`int`): optimizer step, counted from 1.
            live (`Collection[str]`): names of the matrices that have a gradient: those that train or are probed.
            grad_scale (`float`): the loss scale that gradients are still multiplied by.
            probing (`bool`, *optional*, defaults to `False`): what is frozen is probed, so that the step is measured
                in any case.
        """
        self.read()
        self._values = {}
        due, due_next = probing or self._is_due(step), probing or self._is_due(step + 1)
        if not (due or due_next):
            return
        measurement = self._measurement
        gradients = measurement.gradients(live)
        known = {name: own for name, own in gradients.items() if measurement.remembered_at.get(name) == step - 1}
        if due and known:
            self._unread = step, list(known), measurement.products(known, grad_scale)
        if due_next:
            for name, own in gradients.items():
                measurement.remember(step, name, own, grad_scale)

    def _is_due(self, step: int) -> bool:
        return step <= self.dense or step % self.every == 0

    def read(self) -> None:
        """Takes in what was measured. The engine calls it after the criterion, which has waited for the device, and
        so do `steps` and `values`."""
        if self._unread is None:
            return
        (step, names, numbers), self._unread = self._unread, None
        products = self._measurement.totals(names, numbers)
        if not all(map(math.isfinite, products.values())):  # shares of a part of the layers would mislead
            return
        # Exactly 0: no gradient has flowed.
        self._values = {name: product for name, product in products.items() if product != 0.0}
        if self._values:
            gains: dict[str, float] = {}
            for name, gain in self._values.items():
                layer = self._layer_of[name]
                gains[layer] = gains.get(layer, 0.0) + gain
            self._steps[step] = gains

    @property
    def memory(self) -> int:
        """Bytes on the device while everything trains."""
        return self._measurement.memory()

    def forget(self, name: str) -> None:
        """Releases what is remembered of a matrix, which has frozen."""
        self.read()
        self._measurement.forget(name)

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that a resumed run needs: JSON-able values, and tensors."""
        remembered, tensors = self._measurement.state_dict()
        steps = [[step, [gains.get(layer) for layer in self.layers]] for step, gains in self.steps.items()]
        return {"steps": steps} | remembered, tensors

    def load_state_dict(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Restores what `state_dict` gave."""
        self._steps = {
            step: {layer: gain for layer, gain in zip(self.layers, gains, strict=True) if gain is not None}
            for step, gains in state["steps"]
        }
        self._measurement.load_state_dict(state, tensors)
