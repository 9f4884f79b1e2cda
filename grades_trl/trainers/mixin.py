"""`GradESMixin`: GradES in any `transformers.Trainer`. `GradESTrainer` is `GradESMixin` on TRL's `SFTTrainer`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from transformers import TrainerCallback
from transformers.integrations.neftune import deactivate_neftune
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, TrainOutput, has_length

from grades_trl.config import GradESConfig
from grades_trl.distributed import refuse_several_devices
from grades_trl.engine import GradES, tracked_in
from grades_trl.model.flops import StepCosts
from grades_trl.model.matrices import describe, untracked_parameters
from grades_trl.report.environment import Environment
from grades_trl.report.run_report import RunReport
from grades_trl.report.summary import CacheSummary, Outcome, RunSummary, stop_reason
from grades_trl.report.timing import RunClock
from grades_trl.report.tracking import Tracker
from grades_trl.stopping import heldout_loss

from .binding import on_sft_trainer, refuse_stale_base
from .checkpoint import load_renamed_weights, load_state, save_state
from .divergence import Divergence
from .heldout import HeldoutRows, first_dataset, heldout_dataset

if TYPE_CHECKING:
    from typing import Any as _Trainer  # a mixin: what it stands on is known when it is mixed
else:
    _Trainer = object

logger = logging.getLogger(__name__)

PAPER = {
    "title": "GradES: Significantly Faster Training in Transformers with Gradient-Based Early Stopping",
    "id": "2509.01842",
    "citation": (
        "@article{wen2025grades,\n"
        "    title  = {{GradES: Significantly Faster Training in Transformers with Gradient-Based Early Stopping}},\n"
        "    year   = 2025,\n"
        "    eprint = {arXiv:2509.01842},\n"
        "}"
    ),
}


class GradESMixin(_Trainer):
    """
    Puts GradES into a trainer: `class MyTrainer(GradESMixin, SFTTrainer)`.

    Args:
        *args, **kwargs: of the trainer.
        grades (`GradESConfig`, *optional*, defaults to `GradESConfig()`): `None` is the trainer itself, bit for bit.

    Attributes:
        tracked (`dict[str, WeightMatrix]`): the weight matrices that GradES measures.
        grades (`GradES` or `None`): the engine, from the beginning of `train()` on.
        grades_summary (`RunSummary` or `None`): what `summary.json` holds, after `train()`.
        diverged_at (`int` or `None`): the first optimizer step of a divergence that has ended the run.

    Raises:
        TypeError: `grades` is no `GradESConfig`.
        ValueError: the model has nothing to track, or a tau or schedule does not fit it; held-out rows are needed and
            missing; several processes or GPUs, DeepSpeed or FSDP.
    """

    def __init__(self, *args: Any, grades: GradESConfig | None = GradESConfig(), **kwargs: Any):  # noqa: B008
        if grades is not None and not isinstance(grades, GradESConfig):
            raise TypeError(f"grades is {grades!r}; expected a GradESConfig, or None to train without GradES.")
        refuse_stale_base(type(self))
        if grades is not None:
            self._tag_names = [*getattr(type(self), "_tag_names", []), "grades"]
            self._name = f"{getattr(type(self), '_name', 'Trainer')} with GradES"
            self._paper = PAPER
        super().__init__(*args, **kwargs)
        # Any, not Optional: all methods below but the first lines of the overridden ones run with an engine only.
        self.grades_config: Any = grades
        self.grades: Any = None
        self.grades_summary: RunSummary | None = None
        self.diverged_at: int | None = None
        self._resumed: dict[str, Any] | None = None  # a checkpoint's state, until the report has taken its part
        if grades is None:
            return
        refuse_several_devices(self.accelerator, self.args)
        self.tracked = tracked_in(self.model, grades)
        if grades.needs_heldout_rows:
            if self.eval_dataset is None:
                raise ValueError(
                    f"stopping {grades.stopping!r} and keep {grades.keep!r} measure the loss of held-out rows: pass "
                    'eval_dataset=..., or set stopping="all_frozen" and keep="last".'
                )
            heldout_dataset(self)
        logger.info("GradES tracks %d weight matrices\n%s", len(self.tracked), describe(self.model, self.tracked))
        self._environment = Environment.gather(self.model)
        clocks = [callback for callback in self.callback_handler.callbacks if isinstance(callback, RunClock)]
        self._clock = clocks[0] if clocks else RunClock()
        if not clocks:
            self.add_callback(self._clock)
        self.add_callback(_GradESCallback(self))

    # ---- the run ----

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        if self.grades_config is None:
            return super().train(*args, **kwargs)
        self.grades_summary, self.diverged_at = None, None
        try:
            output = super().train(*args, **kwargs)
        except _AlreadyFinished:
            logger.warning("This run has already finished: the model is that of its last checkpoint.")
            if self.neftune_noise_alpha is not None:
                deactivate_neftune(self.model, self.neftune_hook_handle, self.accelerator)
            self.is_in_train = False
            return TrainOutput(self.state.global_step, float("nan"), {})
        finally:
            if self.grades is not None:
                self.grades.close()
        self._write_report()
        return output

    def _start_grades(self) -> None:
        """Called when the optimizer exists, before a checkpoint's optimizer state is loaded."""
        if self.grades is not None:  # a second train(), or a smaller batch size after running out of memory
            self.grades.close()
        config, rows = self.grades_config, None
        if config.may_measure_heldout_loss and (config.needs_heldout_rows or self._has_heldout_rows()):
            config, rows = self._plan_heldout(config)
        epoch = self._epoch()
        comes_back = epoch is not None and self.state.max_steps > epoch[1]
        cache_bytes = psutil.virtual_memory().available // 10 if comes_back else 0
        self.grades = GradES(self.model, config, self.state.max_steps, self.optimizer, rows, cache_bytes, epoch)
        prefix = self.grades.prefix
        if self.args.torch_compile:
            prefix.compiled, prefix.cache, prefix.encoder_cache = True, None, None
            if config.activation_cache_mib or config.encoder_cache_dir:
                logger.warning("With torch_compile, no outputs of frozen layers are cached.")
        self._heldout_rows = 0 if rows is None else len(rows.rows)
        text_config = self.model.config.get_text_config() if hasattr(self.model, "config") else None
        self._divergence = Divergence(getattr(text_config, "vocab_size", None))
        if self.grades.average is not None and self.grades.average.host_bytes > 2**30:
            logger.info(
                "The averages of the weights take up to %.1f GB of CPU memory (8 bytes per trained parameter); "
                'keep="last" with stopping="all_frozen" takes none.',
                self.grades.average.host_bytes / 1e9,
            )

    def _epoch(self) -> tuple[int, float] | None:
        """Rows and optimizer steps of an epoch; `None` for streamed rows."""
        if not has_length(self.train_dataset):
            return None
        rows = len(self.train_dataset)
        return rows, rows / (self._train_batch_size * self.args.gradient_accumulation_steps)

    def _has_heldout_rows(self) -> bool:
        dataset = first_dataset(self.eval_dataset)
        return hasattr(dataset, "__len__") and len(dataset) > 0  # not streamed

    def _plan_heldout(self, config: GradESConfig) -> tuple[GradESConfig, HeldoutRows | None]:
        """Draws the rows whose loss is measured; returns the config with the interval that their cost allows."""
        steps, dataset = self.state.max_steps, heldout_dataset(self)
        per_step = self._train_batch_size * self.args.gradient_accumulation_steps
        count, every = heldout_loss.plan(config.heldout_settings(), steps, per_step, len(dataset))
        if every > steps:
            if config.needs_heldout_rows:
                logger.warning(
                    "%d training examples are too few to measure a held-out loss: its cost would be more than "
                    "heldout_cost (%.0f %%) or 5 %%. The run ends with its schedule.",
                    steps * per_step,
                    100 * config.heldout_settings()["cost"],
                )
                return dataclasses.replace(config, heldout_every=every), HeldoutRows(self, 1)
            logger.info("%d training examples are too few to measure a held-out loss.", steps * per_step)
            return config, None
        rows = HeldoutRows(self, count)
        logger.info("The loss of %d held-out rows is measured every %d steps.", len(rows.rows), every)
        return dataclasses.replace(config, heldout_every=every), rows

    def _begin_training(self) -> None:
        if self.state.global_step == 0 or self.grades is None:
            self._start_grades()
        if self.grades.done or self.state.global_step >= self.state.max_steps:
            raise _AlreadyFinished
        self.report = RunReport(
            Path(self.args.output_dir) / "grades",
            self.grades.matrices,
            self.state.max_steps,
            metric=self.grades_config.metric,
            settings=dataclasses.asdict(self.grades_config) | self.grades_config.criterion_settings(),
            grace_steps=self.grades.criterion.grace_steps,
            environment=self._environment,
            clock=self._clock,
            checkpointing=self.args.gradient_checkpointing,
            resume_step=self.state.global_step,
            tracker=Tracker(self.args.report_to),
        )
        self.grades.criterion.costs = self._step_costs
        if self._resumed is not None:
            self.report.load_state_dict(self._resumed["report"])
            self._resumed = None

    def _step_costs(self) -> StepCosts:
        return dataclasses.replace(
            self.grades.step_costs(),
            tokens=self.report.tokens_per_batch(),
            experts_per_token=self.report.experts_per_token,
            checkpointing=self.args.gradient_checkpointing,
        )

    def _end_step(self, control: Any) -> None:
        if self._divergence.since is not None:
            self.diverged_at = self._divergence.since
            control.should_training_stop = True
            logger.error(
                "The run has diverged: since step %d its loss is no number, or far above that of guessing. Lower "
                "--learning_rate, or look at the rows of that step.",
                self.diverged_at,
            )
        if self.grades.done:
            self._end_like_the_schedule(control)
        if control.should_training_stop:
            self._restore_best_average()

    def _end_like_the_schedule(self, control: Any) -> None:
        """What the Trainer does at `max_steps` (`DefaultFlowCallback`): log, evaluate and save in the last step. The
        next backward would find nothing that needs a gradient."""
        args, state = self.args, self.state
        control.should_training_stop = control.should_log = True
        control.should_save |= args.save_strategy == SaveStrategy.STEPS
        control.should_evaluate |= (
            args.eval_strategy == IntervalStrategy.STEPS and args.eval_delay <= state.global_step
        )

    def _restore_best_average(self) -> None:
        if self.args.load_best_model_at_end:  # the user has chosen what is kept
            return
        with self._clock.overhead():
            self.grades.restore_best_average()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        # Before the callbacks' on_train_end, some of which save the model.
        if self.grades is not None:
            self._restore_best_average()
        return super()._finalize_training(*args, **kwargs)

    # ---- the step ----

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.grades is None:
            return super().training_step(model, inputs, *args, **kwargs)
        self.report.count_batch(inputs, getattr(self.model, "config", None))
        # The order of the layers is seen in a first pass that is not compiled.
        eager = self.args.torch_compile and not self.grades.prefix.called
        with torch.compiler.set_stance("force_eager") if eager else contextlib.nullcontext():
            loss = super().training_step(model, inputs, *args, **kwargs)
        # The last micro-batch of an optimizer step: gradients are complete and not clipped yet.
        if self.accelerator.sync_gradients:
            self._grades_step(loss)
        return loss

    def _grades_step(self, loss: torch.Tensor) -> None:
        step, scaler = self.state.global_step + 1, self.accelerator.scaler
        with self._clock.overhead():
            events = self.grades.step(step, grad_scale=scaler.get_scale() if scaler is not None else 1.0)
        self._divergence.update(step, loss.item())  # the Trainer waits for it next
        if scaler is not None and self.grades.done and all(p.grad is None for p in self.model.parameters()):
            # A scaler refuses to step an optimizer when no tensor has a gradient: the run ends without that step.
            self.accelerator.gradient_state._set_sync_gradients(False)
        prefix = self.grades.prefix
        reads_caches = sum(use.reads for use, _ in prefix.cache_use.values())
        values, gains = self.grades.criterion.values, self.grades.gain.steps.get(step)
        self.report.record(step, events, values, dict(prefix.skipped_layers), gains, reads_caches)
        heldout = self.grades.heldout
        if heldout is not None and heldout.loss is not None and step % heldout.every == 0:
            self.report.record_heldout(step, heldout.loss, self._heldout_rows)
        if events:
            logger.info(self.report.console_line(step, events))

    # ---- resuming ----

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.grades is not None:
            own: dict[str, Any] = {"clock": self._clock, "report": self.report, "divergence": self._divergence}
            save_state(output_dir, self.grades.state_dict() | {name: it.state_dict() for name, it in own.items()})
            self.report.flush()  # a run that is killed is resumed with its history

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.grades_config is not None and checkpoint is not None:
            self._resumed = load_state(checkpoint)
            self._start_grades()
            self.grades.load_state_dict(self._resumed)
            self._divergence.load_state_dict(self._resumed["divergence"])
            self._clock.load_state_dict(self._resumed["clock"])
            before, here = Path(checkpoint).parent / "grades", Path(self.args.output_dir) / "grades"
            if before.is_dir() and not here.exists():  # resumed into another folder: what happened so far comes along
                shutil.copytree(before, here)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, checkpoint: str, *args: Any, **kwargs: Any) -> None:
        # PEFT brings bf16 adapters of a quantized model back as float32, which would drift from the original run.
        dtypes = {name: p.dtype for name, p in self.model.named_parameters() if p.requires_grad}
        super()._load_from_checkpoint(checkpoint, *args, **kwargs)
        load_renamed_weights(self.model, checkpoint)
        if self.grades_config is not None:
            for name, parameter in self.model.named_parameters():
                if name in dtypes:
                    parameter.data = parameter.data.to(dtypes[name])

    def _load_best_model(self) -> None:
        super()._load_best_model()
        load_renamed_weights(self.model, self.state.best_model_checkpoint)

    # ---- what people see ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.grades is not None and "loss" in logs:
            logs.update(self.report.logs())
        super().log(logs, start_time)

    def _write_report(self) -> None:
        """The run is over and its model safe: whatever fails here is said, and costs no more than the report."""
        try:
            self.grades_summary = self.report.summarize(self._outcome())
            self.report.write(self.grades_summary)
        except Exception:
            logger.exception("The report in %s is not complete; the model is not affected.", self.report.directory)

    def _outcome(self) -> Outcome:
        grades, state = self.grades, self.state
        if self.args.load_best_model_at_end:
            weights = "best checkpoint"
        else:
            weights = "best average" if grades.restored_best else "last"
        own_reason = "diverged" if self.diverged_at is not None else grades.stop_reason
        heldout = grades.heldout
        return Outcome(
            frozen=dict(grades.frozen),
            stop_reason=stop_reason(self._clock, state.global_step, state.max_steps, own_reason or None),
            weights=weights,
            steps=state.global_step,
            diverged_at=self.diverged_at,
            without_gradient=len(grades.without_gradient),
            untracked_parameters=sum(untracked_parameters(self.model, grades.matrices).values()),
            heldout_examples=self._heldout_rows,
            heldout_every=None if heldout is None else heldout.every,
            best_step=None if heldout is None else heldout.best_step,
            best_loss=None if heldout is None else heldout.best_loss,
            caches={
                name: CacheSummary(use.hits, use.misses, use.peak_bytes / 2**20, use.saved_seconds, off)
                for name, (use, off) in grades.prefix.cache_use.items()
            },
        )


class _AlreadyFinished(Exception):
    """The checkpoint that is resumed is that of a finished run."""


class _GradESCallback(TrainerCallback):
    """The moments of a run that only callbacks see."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._begin_training()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._end_step(control)


def __getattr__(name: str) -> Any:
    if name == "GradESTrainer":
        return on_sft_trainer(GradESMixin, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
