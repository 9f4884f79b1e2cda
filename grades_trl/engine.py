"""`GradES`: measures every weight matrix while it trains and freezes it when it has converged. Works in any loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from grades_trl.config import GradESConfig
from grades_trl.criteria import CRITERIA, Converged, GainMeter
from grades_trl.distributed import Reducer, from_main, in_any, is_sharded, reshard, world_size
from grades_trl.events import FreezeEvent, SettingChange
from grades_trl.freezing.activation_cache import ActivationCache
from grades_trl.freezing.encoder_cache import EncoderCache
from grades_trl.freezing.freeze import Freezer
from grades_trl.freezing.frozen_prefix import FrozenPrefix
from grades_trl.freezing.unsloth_lora import skip_frozen_pairs
from grades_trl.model.flops import StepCosts
from grades_trl.model.matrices import WeightMatrix, find_matrices, matrices_by_layer, untracked_matrices
from grades_trl.model.structure import embeddings_train
from grades_trl.model.towers import towers_of_parameters
from grades_trl.resumed_settings import changed_settings, resolved_settings
from grades_trl.stopping import STOPPING_RULES, HeldoutScore, StoppingRule, TrainAccuracy
from grades_trl.weight_average import WeightAverage

ALL_FROZEN = "all matrices frozen"


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
        config (`GradESConfig`): which matrices freeze, when the run ends, which weights are kept.
        total_steps (`int`): optimizer steps of the whole schedule, T in the paper.
        optimizer (`torch.optim.Optimizer`, *optional*): its state of frozen matrices is released.
        heldout_score (`Callable`, *optional*): returns the score of held-out rows that `config.heldout_metric` names
            (by default their mean loss), always the same rows, at the weights that the model has. It runs forward
            passes only, in evaluation mode. Or the score and the loss: of equal scores the one with the lower loss is
            the best.
        encoder_cache_bytes (`int`, *optional*, defaults to `0`): CPU memory for the outputs of a frozen encoder, where
            `config.activation_cache_mib` says nothing. They are not cached if they do not fit.
        epoch (`tuple[int, float]`, *optional*): rows and optimizer steps of an epoch. An encoder that freezes in the
            last epoch is not cached.
        knows_train_accuracy (`bool`, *optional*, defaults to `False`): `step` is given the accuracy on the training
            tokens.
        ddp (`DistributedDataParallel`, *optional*): what wraps the model, in a run of several processes. All of them
            call the methods here in the same steps; they decide by the numbers of the main one.

    Attributes:
        matrices (`dict[str, WeightMatrix]`): all that is tracked.
        others (`list[WeightMatrix]`): the weights of the layers that do not train, whose FLOPs count.
        frozen (`dict[str, int]`): matrix -> step.
        stop_reason (`str`): why nothing is left to train; empty while the run goes on.
        gain (`GainMeter`): how fast each layer could bring the loss down; measured in every run.
        criterion (`Criterion`): what decides which matrices freeze; `criterion.values` has the last measurements.
        heldout (`HeldoutScore` or `None`): the held-out scores so far, where they are measured.
        stopping (`StoppingRule`): what decides when the run ends.
        restored_best (`bool`): the model has its best average, of step `heldout.best_step`.
        setting_changes (`list[SettingChange]`): settings that differ from those of a checkpoint that was resumed.
        prefix (`FrozenPrefix`): the leading layers that backward skips.

    Raises:
        ValueError: the model has no matrix to track; a schedule or tau that does not fit it; a configuration that
            needs held-out rows or the training accuracy, which are not given.
    """

    def __init__(
        self,
        model: nn.Module,
        config: GradESConfig,
        total_steps: int,
        optimizer: Any = None,
        heldout_score: Callable[[], float | tuple[float, float]] | None = None,
        encoder_cache_bytes: int = 0,
        epoch: tuple[int, float] | None = None,
        knows_train_accuracy: bool = False,
        ddp: DistributedDataParallel | None = None,
    ):
        if config.needs_heldout_rows and heldout_score is None:
            raise ValueError(
                f"stopping {config.stopping!r} and keep {config.keep!r} measure a score of held-out rows: pass "
                "heldout_score=<function that returns it>. GradESTrainer takes the rows from its eval_dataset."
            )
        if config.stopping == "train_accuracy" and not knows_train_accuracy:
            raise ValueError(
                "stopping 'train_accuracy' reads the accuracy on the training tokens: pass knows_train_accuracy=True, "
                "and the accuracy to each step(). GradESTrainer takes it from TRL's SFTTrainer."
            )
        self.config = config
        self._is_sharded = is_sharded(model.parameters())
        self.optimizer = optimizer
        self.matrices = find_matrices(model, projector=config.track_projector)
        self.others = untracked_matrices(model, self.matrices.values())
        self.criterion = CRITERIA[config.metric](self.matrices, total_steps, **config.criterion_settings())
        self.criterion.costs = self.step_costs
        self.criterion.gain_meter = self.gain = GainMeter(self.matrices, total_steps)
        self.frozen: dict[str, int] = {}
        self.stop_reason = ""

        self.heldout: HeldoutScore | None = None
        self.average: WeightAverage | None = None
        self._heldout_score = heldout_score
        if heldout_score is not None and config.may_measure_heldout:
            self.heldout = HeldoutScore(total_steps, **config.heldout_settings())
            self.average = WeightAverage(model)
        self.stopping_name = config.stopping
        if config.stopping == "auto":
            fallback = "train_accuracy" if knows_train_accuracy else "all_frozen"
            self.stopping_name = "heldout" if self.heldout is not None else fallback
        self.stopping = self._stopping_rule(total_steps)
        self.restored_best = False
        self.setting_changes: list[SettingChange] = []

        self._model = model
        self._total_steps = total_steps
        self._last_step = 0
        self._finished = False
        self._freezer = Freezer(model, optimizer)
        self._reducer = Reducer(ddp)
        self._reducer.follow()  # it may be that of an earlier run, in which other matrices froze
        self._without_gradient = {name: p for name, p in model.named_parameters() if p.requires_grad}
        skip_frozen_pairs(model)  # where Unsloth's fused LoRA kernels compute the gradients
        caches = self._caches(encoder_cache_bytes, None if epoch is None else epoch[0])
        self.prefix = FrozenPrefix(model, *caches, before_pass=self._freezer.hold)
        # Rows that are seen from this step on will not be seen again.
        self._last_epoch = math.inf if epoch is None else total_steps - epoch[1]
        self._prefix_is_stale = False

    def step_costs(self) -> StepCosts:
        """What a step costs as far as the model tells: the criterion's default, see `Criterion.costs`."""
        tracked = {id(p) for matrix in self.matrices.values() for p in matrix.parameters}
        towers = towers_of_parameters(self._model)
        projector = any(
            p.requires_grad and id(p) not in tracked and towers[name] == "projector"
            for name, p in self._model.named_parameters()
        )
        cache = self.prefix.encoder_cache
        return StepCosts(
            others=tuple(self.others),
            language_prefix_can_be_skipped=not embeddings_train(self._model) and not projector,
            # In several processes, most rows of an epoch come back in another one than before.
            encoder_is_cached=cache is not None
            and not cache.off
            and self._last_step < self._last_epoch
            and world_size() == 1,
        )

    def _caches(self, default: int, rows: int | None) -> tuple[ActivationCache | None, EncoderCache | None]:
        mib, directory = self.config.activation_cache_mib, self.config.encoder_cache_dir
        if self._is_sharded:  # a pass that is read in one process alone would gather other weights than in the others
            return None, None
        encoder_bytes = default if mib is None else mib * 2**20
        cache = ActivationCache(mib * 2**20, rows) if mib else None
        if not encoder_bytes and directory is None:
            return cache, None
        return cache, EncoderCache(encoder_bytes, directory, rows, must_fit=mib is None)

    def _stopping_rule(self, total_steps: int) -> StoppingRule:
        if self.stopping_name == "heldout":
            assert self.heldout is not None  # checked above
            return self.heldout
        return STOPPING_RULES[self.stopping_name](total_steps)

    @property
    def done(self) -> bool:
        """Whether the run should end now."""
        return bool(self.stop_reason)

    @torch.no_grad()
    def step(self, step: int, grad_scale: float = 1.0, train_accuracy: float | None = None) -> list[FreezeEvent]:
        """Measures all matrices and freezes the converged ones. Call it after backward, before clipping and update.

        Args:
            step (`int`): number of the optimizer step, counted from 1.
            grad_scale (`float`, *optional*, defaults to `1.0`): the loss scale that gradients are still multiplied by
                (fp16). Values are those of the true gradients.
            train_accuracy (`float`, *optional*): accuracy on the training tokens of this step, from 0 to 1, for
                `stopping="train_accuracy"`.

        Returns:
            `list[FreezeEvent]`: the matrices frozen now; this step's update is not applied to them. Or those that
                train again from the next step on.

        Raises:
            ValueError: `step` did not increase.
        """
        if step <= self._last_step:
            raise ValueError(f"GradES.step({step}) after step {self._last_step}: steps count up from 1.")
        self._last_step = step
        self.restored_best = False  # of a checkpoint that is trained on
        self._freezer.hold()
        called = self.prefix.called  # in the training pass, before those of a held-out measurement
        self._without_gradient = {name: p for name, p in self._without_gradient.items() if p.grad is None}
        live = [name for name in self.matrices if name not in self.frozen]
        probing = self.prefix.paused
        # Before the criterion, which waits for the device.
        self.gain.measure(step, list(self.matrices) if probing else live, grad_scale, probing)
        converged = self.criterion.update(step, live, grad_scale)
        self.gain.read()
        self._freezer.forget_gradients()
        events = self._unfreeze(step) if self.criterion.unfreeze_reason else self._freeze(step, converged)
        unreached = list(self._without_gradient.values())
        moves = bool(events) or self._prefix_is_stale or self._some_process_has_new_calls()
        if moves:
            called = self.prefix.share_calls(called)
        if (events and not self.criterion.unfreeze_reason) or self._prefix_is_stale:
            self._freezer.freeze(self.prefix.parameters_without_gradient(called, unreached))
            self._freeze_norms_and_embeddings()
        if moves or self.prefix.has_new_calls:  # a tower may be frozen from the start
            self.prefix.update(unreached, rows_come_back=step < self._last_epoch)
            self._prefix_is_stale = False
        self._probe_if_wanted(step + 1)
        self._reducer.follow()
        self._measure_heldout_score(step)
        if train_accuracy is not None and isinstance(self.stopping, TrainAccuracy):
            self.stopping.update(step, *self._agreed(train_accuracy))
        self._update_stop_reason()
        return events

    def _some_process_has_new_calls(self) -> bool:
        """Of a sharded model, which needs the same frozen prefix everywhere: the backward pass of a layer gathers its
        weights from all processes. Copies of a model may skip other layers each."""
        return self._is_sharded and in_any(self.prefix.has_new_calls, next(self._model.parameters()).device)

    def _measure_heldout_score(self, step: int) -> None:
        heldout, average = self.heldout, self.average
        if heldout is None or average is None:
            return
        average.follow()
        if heldout.updates_average(step):
            average.update()
        if not heldout.is_due(step):
            return
        with average.in_model():
            score, loss = self._heldout_score_and_loss()
        if heldout.update(step, score, loss):
            average.mark_best()

    def _heldout_score_and_loss(self) -> tuple[float, float]:
        assert self._heldout_score is not None
        measured = self._heldout_score()
        reshard(self._model)
        score, loss = measured if isinstance(measured, tuple) else (measured, 0.0)
        score, loss = self._agreed(score, loss)
        return score, loss

    def _agreed(self, *numbers: float) -> list[float]:
        """What the main process has measured."""
        if world_size() == 1:
            return list(numbers)
        device = next(self._model.parameters()).device
        return from_main(torch.tensor(numbers, dtype=torch.float64, device=device)).tolist()

    def _update_stop_reason(self) -> None:
        self.stop_reason = self.stopping.reason
        if not self.stop_reason and self.all_frozen:
            untouched = {id(p) for p in self._without_gradient.values()}
            something_trains = any(p.requires_grad and id(p) not in untouched for p in self._model.parameters())
            self.stop_reason = ALL_FROZEN if self.stopping.ends_when_all_frozen or not something_trains else ""

    @property
    def all_frozen(self) -> bool:
        """Whether every tracked matrix is frozen that a gradient has ever reached."""
        return bool(self.frozen) and self.frozen.keys() >= self.matrices.keys() - self.without_gradient

    @property
    def without_gradient(self) -> set[str]:
        """Tracked matrices that no gradient has reached so far: a tower without data, a layer that is not used."""
        untouched = {id(p) for p in self._without_gradient.values()}
        return {name for name, m in self.matrices.items() if any(id(p) in untouched for p in m.parameters)}

    def finish(self) -> None:
        """Ends the run. To be called after the last step, whatever ended it.

        The model gets the best average of its weights, if one is to be kept and its held-out score is better than that
        of the weights it has. What GradES froze can be trained again, its hooks are gone, its buffers are released.
        """
        try:
            self.restore_best_average()
        finally:
            self.close()

    @torch.no_grad()
    def restore_best_average(self) -> None:
        """Gives the model the best average of its weights, if one is to be kept and its held-out score is better
        than that of the weights it has. Only the first call does anything."""
        if self._finished:
            return
        self._finished = True
        if self.config.keep == "last" or self.average is None or not self.average.has_best:
            return
        assert self.heldout is not None  # it comes with the average
        score, loss = self._heldout_score_and_loss()
        self.heldout.measurements += 1
        if self.heldout.is_below_best(score, loss):
            self.average.restore_best()
            self.restored_best = True
            self.prefix.forget_outputs()

    def close(self) -> None:
        """Takes everything off the model that GradES has put on it, and releases all buffers. Weights stay as they
        are; what it froze can be trained again. May be called at any time, and more than once."""
        self.prefix.close()
        self._freezer.unfreeze()
        self._reducer.follow()
        for name in self.matrices:
            self.criterion.forget(name)
            self.gain.forget(name)
        if self.average is not None:
            self.average.release()

    def _freeze(self, step: int, converged: list[Converged]) -> list[FreezeEvent]:
        events = []
        for found in converged:
            self._freeze_matrix(found.name, step)
            events.append(self._event(step, found.name, found.reason, value=found.value, tau=found.tau))
        return events

    def _unfreeze(self, step: int) -> list[FreezeEvent]:
        """Lets all that GradES froze train again."""
        names, self.frozen = list(self.frozen), {}
        self._end_probe(names)
        self._freezer.unfreeze()
        return [self._event(step, name, self.criterion.unfreeze_reason, unfrozen=True) for name in names]

    def _event(self, step: int, name: str, reason: str, **of_the_event: Any) -> FreezeEvent:
        matrix = self.matrices[name]
        return FreezeEvent(
            step=step,
            matrix=name,
            layer=matrix.layer,
            role=matrix.role,
            tower=matrix.tower,
            params=matrix.params,
            frozen=len(self.frozen),
            total=len(self.matrices),
            reason=reason,
            **({"value": None, "tau": None} | of_the_event),
        )

    def _freeze_matrix(self, name: str, step: int) -> None:
        self.frozen[name] = step
        self.criterion.forget(name)
        self.gain.forget(name)
        self._freezer.freeze(self.matrices[name].parameters)

    def _probe_if_wanted(self, step: int) -> None:
        """Before the pass of `step`: lets what is frozen have gradients, or no longer. Not where passes are compiled,
        which would be compiled anew."""
        wanted = bool(self.frozen) and not self.prefix.compiled and self.criterion.probes(step)
        if wanted and not self.prefix.paused:
            self._freezer.probe(p for name in self.frozen for p in self.matrices[name].parameters)
            self.prefix.paused = True
        elif not wanted and self.prefix.paused:
            self._end_probe(list(self.frozen))

    def _end_probe(self, names: list[str]) -> None:
        self._freezer.end_probe()
        self.prefix.paused = False
        for name in names:
            self.gain.forget(name)

    def _freeze_norms_and_embeddings(self) -> None:
        """Norms, biases and embeddings of layers that are frozen otherwise, where the user allows it."""
        whole_layers = self.criterion.freezes_whole_layers
        freeze_norms = self.config.freeze_norms or whole_layers
        if not (freeze_norms or self.config.freeze_embeddings):
            return
        for path, names in matrices_by_layer(self._model, self.matrices).items():
            if any(name not in self.frozen for name in names):
                continue
            if freeze_norms:
                self._freezer.freeze(self._model.get_submodule(path).parameters())
            first = self.matrices[names[0]]
            if first.layer == 0 and (self.config.freeze_embeddings or (whole_layers and first.tower != "language")):
                for module in self.prefix.embeddings_before(path, norms=freeze_norms):
                    self._freezer.freeze(module.parameters(recurse=False))
        projector = [name for name, matrix in self.matrices.items() if matrix.tower == "projector"]
        if freeze_norms and projector and all(name in self.frozen for name in projector):
            towers = towers_of_parameters(self._model)
            self._freezer.freeze(p for name, p in self._model.named_parameters() if towers[name] == "projector")

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: JSON-able values, and under `"tensors"` a flat dict of tensors.

        Beside what the criterion and the gain compare with, it holds the average of the weights (4 bytes per trained
        parameter) and the best one (as large as the weights), where they are kept.
        """
        criterion, of_criterion = self.criterion.state_dict()
        gain, of_gain = self.gain.state_dict()
        tensors = {f"criterion/{name}": t for name, t in of_criterion.items()}
        tensors |= {f"gain/{name}": t for name, t in of_gain.items()}
        state: dict[str, Any] = {
            "settings": resolved_settings(self.config),
            "setting_changes": [asdict(change) for change in self.setting_changes],
            "total_steps": self._total_steps,
            "last_step": self._last_step,
            "matrices": list(self.matrices),
            "frozen": dict(self.frozen),
            "without_gradient": list(self._without_gradient),
            "criterion": criterion,
            "gain": gain,
            "stopping": {"rule": self.stopping_name, "state": self.stopping.state_dict()},
            "heldout": None,
            "restored_best": self.restored_best,
        }
        if self.heldout is not None and self.average is not None:
            average, of_average = self.average.state_dict()
            state["heldout"] = {"rule": self.heldout.state_dict(), "average": average}
            tensors |= {f"weights/{name}": t for name, t in of_average.items()}
        return state | {"tensors": tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a run: its frozen matrices are frozen again, everything else goes on where it was. Settings that
        have changed since then take effect, and are in `setting_changes`.

        Raises:
            ValueError: a setting has changed that may not (see `GradESConfig`); the state is of a run with or without
                held-out measurements where this is the other, or of a model with other matrices.
        """
        changed = changed_settings(state, self.config)
        if state["total_steps"] != self._total_steps:
            changed["total_steps"] = (state["total_steps"], self._total_steps)
        if (state["heldout"] is None) != (self.heldout is None):
            was, is_now = ("without", "with") if state["heldout"] is None else ("with", "without")
            raise ValueError(
                f"The checkpoint was written {was} measurements of a held-out score and this run is {is_now} them: "
                "resume with the same stopping, keep and eval_dataset."
            )
        other = set(state["matrices"]) ^ set(self.matrices)
        if other:
            raise ValueError(
                f"The checkpoint and this run differ in {len(other)} matrices, {min(other)} among them: resume with "
                "the model, the LoRA settings and the track_projector that it was written with."
            )

        def tensors_of(kind: str) -> dict[str, Tensor]:
            return {name.removeprefix(kind): t for name, t in state["tensors"].items() if name.startswith(kind)}

        for name, step in state["frozen"].items():
            self._freeze_matrix(name, step)
        if self.heldout is not None:
            self.heldout.load_state_dict(state["heldout"]["rule"])
        self.criterion.load_state_dict(state["criterion"], tensors_of("criterion/"))
        self.gain.load_state_dict(state["gain"], tensors_of("gain/"))
        if state["stopping"]["rule"] == self.stopping_name:
            self.stopping.load_state_dict(state["stopping"]["state"])
        self._last_step = step = state["last_step"]
        self.restored_best = state["restored_best"]
        self.setting_changes = [SettingChange(**change) for change in state["setting_changes"]]
        self.setting_changes += [SettingChange(step + 1, name, *values) for name, values in changed.items()]
        before = set(state["without_gradient"])
        self._without_gradient = {name: p for name, p in self._without_gradient.items() if name in before}
        if self.average is not None:
            self.average.load_state_dict(state["heldout"]["average"], tensors_of("weights/"))
        self._probe_if_wanted(self._last_step + 1)
        self._reducer.follow()
        self._update_stop_reason()
        self._prefix_is_stale = True  # it is built in the next step: the order of layers is seen in a forward pass


def tracked_in(model: nn.Module, config: GradESConfig) -> dict[str, WeightMatrix]:
    """What `GradES` would track in a model; raises its errors for a model or a configuration that do not fit."""
    matrices = find_matrices(model, projector=config.track_projector)
    # More steps than any schedule has: how many there are is not known yet.
    CRITERIA[config.metric](matrices, total_steps=10**9, **config.criterion_settings())
    return matrices
