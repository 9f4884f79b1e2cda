"""GradES: watches every weight matrix while it trains and freezes it when it has converged. Works in any loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grades_trl.config import GradESConfig
from grades_trl.criteria import kernels, metrics
from grades_trl.criteria.criterion import Criterion, Replay
from grades_trl.criteria.metrics import Sample, sample
from grades_trl.events import FreezeEvent
from grades_trl.freezing.freeze import FrozenExperts, freeze, freeze_parameter
from grades_trl.freezing.frozen_prefix import PrefixCut
from grades_trl.freezing.unsloth_lora import skip_frozen_pairs
from grades_trl.heldout import HeldoutGain
from grades_trl.model.matrices import WeightMatrix, blocks_of_matrices, find_matrices, towers_of_parameters

FUSED_ON = "cuda"  # the devices that the kernels are for; tests in Triton's interpreter say "cpu"


def _sums(tensors: Sequence[Tensor], previous: Sequence[Tensor | None], scale: float) -> list[list[float]]:
    """`[sum |x / scale|, sum |x / scale - p|]` of each tensor x, NaN without p, with one transfer to the host."""
    groups: dict[tuple[torch.device, bool], list[int]] = {}  # a model may lie on several devices
    for i, x in enumerate(tensors):
        groups.setdefault((x.device, x.device.type == FUSED_ON and x.dtype in kernels.DTYPES), []).append(i)
    tables = []
    for (_, fused), members in groups.items():
        read = kernels.read if fused and kernels.available() else metrics.read
        tables.append(read([tensors[i] for i in members], [previous[i] for i in members], scale))
    # The one wait for the device; the Trainer makes the same one next.
    rows = torch.cat([table.to(tables[0].device) for table in tables]).tolist()
    sums = dict(zip((i for members in groups.values() for i in members), rows, strict=True))
    return [sums[i] for i in range(len(tensors))]


def _cosines(tensors: Sequence[Tensor], previous: Sequence[Tensor | None], scale: float) -> list[list[float]]:
    """`[|x|, cosine of x and p]` of each tensor x, with one transfer to the host."""
    devices: dict[torch.device, list[int]] = {}  # a model may lie on several
    for i, tensor in enumerate(tensors):
        devices.setdefault(tensor.device, []).append(i)
    parts = [metrics.cosines([tensors[i] for i in g], [previous[i] for i in g], scale) for g in devices.values()]
    rows = iter(torch.cat([part.to(parts[0].device) for part in parts]).tolist())
    found = {i: next(rows) for group in devices.values() for i in group}
    return [found[i] for i in range(len(tensors))]


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
    grades.finish()
    ```

    Args:
        model (`nn.Module`): the model that trains, not wrapped in DDP.
        config (`GradESConfig`): what counts as converged.
        total_steps (`int`): optimizer steps of the whole schedule, T in the paper.
        optimizer (`torch.optim.Optimizer`, *optional*): its state of frozen matrices is released. Needed for models
            with 3-D expert weights.
        heldout (`Callable[[], Tensor]`, *optional*): for `metric="heldout_gain"`. Runs forward and backward of the
            mean loss of held-out examples, always the same ones, and returns the loss. With a loss scaler, the
            gradients must carry its scale.

    Attributes:
        matrices (`dict[str, WeightMatrix]`): all that is tracked.
        frozen (`dict[str, int]`): matrix -> step.
        readings (`dict[str, float]`): the metric of every matrix observed in the last step.
        taus (`dict[str, float]`): matrix -> threshold, as far as known.
        done (`bool`): everything is frozen that a gradient has ever reached.
        went_back (`bool`): the model has its best average, of `heldout.best_step`.
        cut (`PrefixCut`): how far backward is kept out of the frozen prefix.

    Raises:
        ValueError: the model has no matrix to track; experts and no optimizer; `heldout_gain` without
            `heldout` or `config.interval`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: GradESConfig,
        total_steps: int,
        optimizer: Any = None,
        heldout: Callable[[], Tensor] | None = None,
    ):
        self.config = config
        self.optimizer = optimizer
        self.matrices = find_matrices(model, projector=config.track_projector)
        skip_frozen_pairs(model)  # where Unsloth's fused LoRA kernels compute the gradients
        if optimizer is None and any(matrix.expert is not None for matrix in self.matrices.values()):
            raise ValueError(
                "This model keeps its experts in 3-D weights, and frozen ones are held still after each step of the "
                "optimizer: pass it, GradES(model, config, total_steps, optimizer=optimizer)."
            )
        criterion = Criterion if config.replay is None else Replay
        self.criterion = criterion(config, {name: m.tower for name, m in self.matrices.items()}, total_steps)
        self.heldout: Any = None
        if config.metric == "heldout_gain":
            if heldout is None or config.interval is None:
                raise ValueError(
                    'metric "heldout_gain" needs held-out examples and an interval between readings: pass '
                    "heldout=<function that runs backward of their loss> and GradESConfig(interval=...). "
                    "GradESTrainer does both from its eval_dataset."
                )
            self.heldout = HeldoutGain(model, heldout)
        self.interval = config.interval or 1
        self.went_back = False
        self.frozen: dict[str, int] = {}
        # What no gradient has come to so far.
        self._unreached = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.readings: dict[str, float] = {}
        self._last_step = 0
        # What a reading is compared with: the gradients, or weights, of an earlier step, and that step.
        self._previous: dict[str, list[Tensor]] = {}
        self._previous_step: dict[str, int] = {}
        self._samples: dict[str, list[Sample | None]] = {}
        self._experts: dict[int, FrozenExperts] = {}
        self.cut = PrefixCut(model, cache_bytes=config.cache_prefix * 2**20)
        self._model = model
        self._companions: list[nn.Parameter] = []
        self._stale_cut = False

    @property
    def done(self) -> bool:
        unreached = {id(p) for p in self._unreached.values()}

        def trains(matrix: WeightMatrix) -> bool:
            if matrix.expert is not None:  # its tensor has a gradient for the sake of others
                return matrix.name in self.criterion.seen
            return not any(id(p) in unreached for p in matrix.parameters)

        return bool(self.frozen) and not any(trains(m) for n, m in self.matrices.items() if n not in self.frozen)

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
        called = self.cut.called  # in the pass of training, before those of a reading
        self._unreached = {name: p for name, p in self._unreached.items() if p.grad is None}
        for experts in self._experts.values():
            experts.zero_gradients()
        self.readings = self._readings(step, grad_scale)
        held = self.heldout
        whole = {} if held is None else {"idle": held.idle, "since_best": held.since_best}
        converged = self.criterion.update(step, self.readings, **whole)
        events = self._freeze(step, [name for name in converged if name not in self.frozen])
        if events or self._stale_cut:
            self._freeze_rest(self.cut.dead_ends(called, self._unreached.values()))
            self._freeze_companions()
            self.cut.update()
            self._stale_cut = False
        if events and self.done and self.heldout is not None and self.heldout.best:
            self._go_back()
        return events

    def finish(self) -> None:
        """To be called after training, in place of `close()`: if `heldout_gain` has read a lower held-out loss of an
        average than the last weights have, the model gets that average."""
        averaged = self.heldout is not None and bool(self.heldout.best) and not self.done
        if averaged and self.heldout.loss_now() > self.heldout.best_loss:
            self._go_back()
        self.close()

    def _go_back(self) -> None:
        """All that trained at the best reading gets its average of then, what has frozen since too."""
        self.went_back = True
        self.heldout.go_back()
        for experts in self._experts.values():
            experts.keep()
        if self.cut.cache is not None:
            self.cut.cache.clear()

    def _wanted(self, step: int) -> bool:
        return step % self.interval == 0

    def _readings(self, step: int, grad_scale: float) -> dict[str, float]:
        live = [name for name in self.matrices if name not in self.frozen]
        if not live:
            return {}
        if self.heldout is None:
            # a norm is compared with nothing, all else with the step before
            kept = self.config.metric != "grad_norm" and self._wanted(step + 1)
            return self._read(step, grad_scale, live) if self._wanted(step) or kept else {}
        if not self._wanted(step):
            return {}
        # The first reading that can count is compared with the last one of the grace period.
        early = step + self.interval <= self.criterion.grace_steps
        return self.heldout.read(step, [] if early else [self.matrices[name] for name in live], grad_scale)

    def _read(self, step: int, grad_scale: float, live: list[str]) -> dict[str, float]:
        """The metric of every matrix observed in this step, with one transfer from the device."""
        observed = [name for name in live if self._has_gradient(name)]
        if not observed:
            return {}
        gradients = {name: self._sampled(name, [p.grad for p in self.matrices[name].parameters]) for name in observed}
        before: dict[str, Sequence[Tensor | None]] = {
            name: self._previous[name] for name in observed if self._comparable(step, name)
        }
        if self.config.metric == "agreement":
            return self._read_agreement(step, gradients, before, grad_scale)
        tensors: list[Tensor] = []
        if self.config.metric == "weight_change":
            current = {name: self._sampled(name, self.matrices[name].parameters) for name in observed}
            tensors += [g for name in observed for g in gradients[name]]  # for 0 and overflow alone, at any scale
            scale = 1.0
        else:  # norm and distance in one pass
            current, scale = gradients, grad_scale
            before = {name: before.get(name, [None] * len(gradients[name])) for name in observed}
        skip = len(tensors)
        tensors += [x for name in before for x in current[name]]
        sums = _sums(tensors, [None] * skip + [p for kept in before.values() for p in kept], scale)

        numbers = iter(norm for norm, _ in sums)
        norms = {name: self._total(name, numbers) for name in observed}
        numbers = iter(distance for _, distance in sums[skip:])
        changes = {name: self._total(name, numbers) for name in before}
        values = norms if self.config.metric == "grad_norm" else changes
        readings = {}
        for name, norm in norms.items():
            if norm == 0.0 or not math.isfinite(norm):
                continue  # nothing flowed into it, or it overflowed: not observed, and what it is compared with stays
            if self.config.metric != "grad_norm" and self._wanted(step + 1):
                self._remember(step, name, current[name], scale)
            if self._wanted(step) and math.isfinite(values.get(name, math.nan)):
                readings[name] = values[name]
        return readings

    def _read_agreement(
        self,
        step: int,
        gradients: dict[str, list[Tensor]],
        before: dict[str, Sequence[Tensor | None]],
        scale: float,
    ) -> dict[str, float]:
        """The cosine of this gradient and the last one: the mean over the tensors of a matrix, for LoRA's A and B have
        scales of their own."""
        tensors = [x for kept in gradients.values() for x in kept]
        previous = [p for name, kept in gradients.items() for p in before.get(name, [None] * len(kept))]
        numbers = iter(_cosines(tensors, previous, scale))
        readings = {}
        for name, kept in gradients.items():
            pairs = [next(numbers) for _ in kept]
            if not all(math.isfinite(norm) for norm, _ in pairs) or not any(norm for norm, _ in pairs):
                continue  # not observed
            if self._wanted(step + 1):
                self._remember(step, name, kept, scale)
            agreements = [cosine for _, cosine in pairs if math.isfinite(cosine)]  # A has no gradient while B is 0
            if self._wanted(step) and agreements:
                readings[name] = math.fsum(agreements) / len(agreements)
        return readings

    def _has_gradient(self, name: str) -> bool:
        return all(p.grad is not None for p in self.matrices[name].parameters)

    def _sampled(self, name: str, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """What is read of the tensors of a matrix: its own expert, and of large ones a sample."""
        own = self._own(name, tensors)
        if name not in self._samples:
            self._samples[name] = [
                sample(t, self.config.sample, f"{name}/{i}") if self.config.sample < 1 else None
                for i, t in enumerate(own)
            ]
        return [t if s is None else s.take(t) for t, s in zip(own, self._samples[name], strict=True)]

    def _own(self, name: str, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """The part of each tensor that belongs to this matrix: its expert, or all."""
        return [t[self.matrices[name].part].detach() for t in tensors if t is not None]

    def _total(self, name: str, numbers: Iterator[float]) -> float:
        """The sum over the tensors of a matrix, each scaled up to all of its elements."""
        return sum(next(numbers) * (1.0 if s is None else s.scale) for s in self._samples[name])

    def _comparable(self, step: int, name: str) -> bool:
        """Whether there is something to compare this step with. A weight change is that of one update, so it must be
        of step - 1; a gradient may be that of the last step in which the matrix was observed."""
        if not self._wanted(step) or name not in self._previous:
            return False
        return self.config.metric != "weight_change" or self._previous_step[name] == step - 1

    def _remember(self, step: int, name: str, tensors: Sequence[Tensor], scale: float) -> None:
        """Keeps `tensors / scale`: a sample as it is, for it is a copy already, and of the rest a copy, for clipping
        changes gradients and the optimizer weights. The kernels want it contiguous."""
        self._previous[name] = [
            x if chosen is not None and scale == 1.0 else (x / scale).contiguous()
            for x, chosen in zip(tensors, self._samples[name], strict=True)
        ]
        self._previous_step[name] = step

    def _freeze(self, step: int, names: list[str]) -> list[FreezeEvent]:
        events = []
        for name in names:
            matrix = self.matrices[name]
            if self.heldout is not None:
                for parameter in matrix.parameters:
                    self.heldout.settle(parameter, matrix.part)
            self._take_out(name, step)
            events.append(
                FreezeEvent(
                    step=step,
                    matrix=name,
                    layer=matrix.layer,
                    role=matrix.role,
                    tower=matrix.tower,
                    value=self.criterion.values[name],
                    tau=self.taus[name],
                    params=matrix.params,
                    frozen=len(self.frozen),
                    total=len(self.matrices),
                    reason="schedule" if self.config.replay else f"{self.config.metric} below tau",
                )
            )
        return events

    def _take_out(self, name: str, step: int) -> None:
        matrix = self.matrices[name]
        self.frozen[name] = step
        self._forget(name)
        if matrix.expert is None:
            freeze(matrix, self.optimizer)
            return
        parameter = matrix.parameters[0]
        if id(parameter) not in self._experts:
            self._experts[id(parameter)] = FrozenExperts(parameter, self.optimizer)
        if self._experts[id(parameter)].freeze(matrix.expert):
            freeze(matrix, self.optimizer)
            del self._experts[id(parameter)]

    def _forget(self, name: str) -> None:
        """Drops what readings were compared with."""
        self._previous.pop(name, None)
        self._previous_step.pop(name, None)
        if self.heldout is not None:
            self.heldout.gradients.pop(name, None)

    def _freeze_companions(self) -> None:
        """Norms, biases and embeddings of layers that are frozen otherwise, where the user allows it."""
        if not (self.config.freeze_norms or self.config.freeze_embeddings):
            return
        for path, names in blocks_of_matrices(self._model, self.matrices).items():
            if any(name not in self.frozen for name in names):
                continue
            if self.config.freeze_norms:
                self._freeze_rest(self._model.get_submodule(path).parameters())
            if self.config.freeze_embeddings and self.matrices[names[0]].layer == 0:
                for module in self.cut.upstream(path):
                    self._freeze_rest(module.parameters(recurse=False))
        projector = [name for name, matrix in self.matrices.items() if matrix.tower == "projector"]
        if self.config.freeze_norms and projector and all(name in self.frozen for name in projector):
            towers = towers_of_parameters(self._model)
            self._freeze_rest(p for name, p in self._model.named_parameters() if towers[name] == "projector")

    def _freeze_rest(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            if parameter.requires_grad:
                if self.heldout is not None:
                    self.heldout.settle(parameter)
                freeze_parameter(parameter, self.optimizer)
                self._companions.append(parameter)

    def close(self) -> None:
        """Takes everything off the model that this object put on it. What is frozen stays frozen."""
        self.cut.close()

    def unfreeze_all(self) -> None:
        """Gives every tensor back to training, for a new run on the same model. Values stay as they are."""
        self.close()
        for parameter in (*self._companions, *(p for matrix in self.matrices.values() for p in matrix.parameters)):
            parameter.requires_grad_(True)
        for experts in self._experts.values():
            experts.values.clear()
        self.frozen.clear()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: JSON-able values, and under `"tensors"` a flat dict of tensors."""
        tensors = {f"{name}/{i}": t for name, kept in self._previous.items() for i, t in enumerate(kept)}
        heldout = self.heldout.state_dict() if self.heldout is not None else {}
        tensors |= heldout.pop("tensors", {})
        return {
            "metric": self.config.metric,
            "sample": self.config.sample,
            "last_step": self._last_step,
            "frozen": dict(self.frozen),
            "unreached": list(self._unreached),
            "heldout": heldout,
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
        if state["sample"] != self.config.sample:
            raise ValueError(
                f"The checkpoint was written with sample {state['sample']} and this run has {self.config.sample}: "
                f"resume with --sample {state['sample']}."
            )
        unknown = (set(state["frozen"]) | set(state["previous_step"])) - set(self.matrices)
        if unknown:
            raise ValueError(
                f"The checkpoint knows {len(unknown)} matrices that this model does not train, {min(unknown)} "
                "among them: resume with the model and the LoRA settings it was written with."
            )
        self._last_step = state["last_step"]
        self._unreached = {name: self._unreached[name] for name in state["unreached"]}
        self._previous_step = dict(state["previous_step"])
        for name in self._previous_step:
            parameters = self.matrices[name].parameters
            self._previous[name] = [state["tensors"][f"{name}/{i}"].to(p.device) for i, p in enumerate(parameters)]
        if self.heldout is not None:
            self.heldout.load_state_dict(state["heldout"], state["tensors"])
        self.criterion.load_state_dict(state["criterion"])
        for name, step in state["frozen"].items():
            self._take_out(name, step)
        self._stale_cut = True  # to be made in the next step: a cut needs to have seen one forward pass
