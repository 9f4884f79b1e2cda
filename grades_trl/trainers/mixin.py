"""`GradESMixin`: GradES in any `transformers.Trainer`. `GradESTrainer` is `GradESMixin` on TRL's `SFTTrainer`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback
from transformers.integrations.neftune import deactivate_neftune
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, TrainOutput, has_length

from grades_trl.config import GradESConfig
from grades_trl.distributed import (
    gathered,
    is_main,
    is_sharded,
    rank,
    refuse_devices_that_send_nothing,
    refuse_reentrant_checkpointing,
    refuse_unsupported,
    world_size,
    wrapper_of,
)
from grades_trl.engine import GradES, tracked_in
from grades_trl.freezing.frozen_prefix import checkpoints_reentrantly
from grades_trl.model.flops import StepCosts, forward_flops, step_flops
from grades_trl.model.matrices import describe, untracked_parameters
from grades_trl.report.environment import Environment
from grades_trl.report.history import restore_record
from grades_trl.report.run_report import RunReport
from grades_trl.report.summary import INTERRUPTED, CacheSummary, Outcome, RunSummary, format_ending, stop_reason
from grades_trl.report.timing import RunClock
from grades_trl.report.tracking import GroupedWandbCallback, Tracker
from grades_trl.stopping.heldout import EPOCHS_TO_OVERFIT, FORWARD_SHARE, MIN_SAMPLES, name_of, plan
from grades_trl.wording import counted

from .binding import is_sft_trainer, on_sft_trainer, refuse_stale_base
from .checkpoint import load_renamed_weights, load_state, save_state
from .divergence import HAS_DIVERGED, Divergence
from .first_step import first_step_checked
from .heldout import HeldoutAnswers, HeldoutRows, first_dataset, heldout_dataset, nothing_random_moves
from .whole_checkpoint import WholeCheckpoints

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


class GradESMixin(WholeCheckpoints):
    """
    Puts GradES into a trainer: `class MyTrainer(GradESMixin, SFTTrainer)`.

    Args:
        *args, **kwargs: of the trainer.
        grades (`GradESConfig`, *optional*, defaults to `GradESConfig()`): `None` is the trainer itself, bit for bit.
        heldout_answers (`HeldoutAnswers`, *optional*): answers held-out prompts, for `heldout_metric="exact_match"`.

    Attributes:
        tracked (`dict[str, WeightMatrix]`): the weight matrices that GradES measures.
        grades (`GradES` or `None`): the engine, from the beginning of `train()` on.
        grades_summary (`RunSummary` or `None`): what `summary.json` holds, after `train()`.
        diverged_at (`int` or `None`): the first optimizer step of a divergence that has ended the run.
        interrupted (`bool`): a signal has ended the run; set by who handles signals.
        nothing_left (`bool`): the checkpoint that is resumed is that of the last step; a callback may set it when
            training begins.

    Raises:
        TypeError: `grades` is no `GradESConfig`.
        ValueError: the model has nothing to track, or a tau or schedule does not fit it; held-out rows are needed and
            missing; DeepSpeed, the first version of FSDP, or several GPUs in one process.
    """

    def __init__(
        self,
        *args: Any,
        grades: GradESConfig | None = GradESConfig(),  # noqa: B008
        heldout_answers: HeldoutAnswers | None = None,
        **kwargs: Any,
    ):
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
        self._heldout_answers = heldout_answers
        self.grades: Any = None
        self.grades_summary: RunSummary | None = None
        self.diverged_at: int | None = None
        self.interrupted = self.nothing_left = False
        self._resumed: dict[str, Any] | None = None  # a checkpoint's state, until the report has taken its part
        if grades is None:
            return
        refuse_unsupported(self.accelerator, self.args)
        if not is_main():
            logging.getLogger("grades_trl").setLevel(logging.CRITICAL)
        self.tracked = tracked_in(self.model, grades)
        if grades.needs_heldout_rows:
            if self.eval_dataset is None:
                raise ValueError(
                    f"stopping {grades.stopping!r} and keep {grades.keep!r} measure a score of held-out rows: pass "
                    'eval_dataset=..., or set stopping="all_frozen" and keep="last".'
                )
            heldout_dataset(self)
        if grades.heldout_metric == "exact_match" and heldout_answers is None:
            raise ValueError(
                "heldout_metric 'exact_match' lets the model answer held-out prompts: pass heldout_answers=..., as "
                "the recipes do where rows have a prompt, or choose 'loss' or 'token_accuracy'."
            )
        if grades.stopping == "train_accuracy" and not self._computes_train_accuracy:
            raise ValueError(
                "stopping 'train_accuracy' reads the mean_token_accuracy of TRL's SFTTrainer, and "
                f"{type(self).__name__}{' through Unsloth' if 'unsloth' in sys.modules else ''} computes none: choose "
                "'heldout', 'all_frozen' or 'end_of_schedule'."
            )
        logger.debug("GradES tracks %d weight matrices\n%s", len(self.tracked), describe(self.model, self.tracked))
        self._environment = Environment.gather(self.model)
        clocks = [callback for callback in self.callback_handler.callbacks if isinstance(callback, RunClock)]
        self._clock = clocks[0] if clocks else RunClock()
        if not clocks:
            self.add_callback(self._clock)
        GroupedWandbCallback.put_into(self)
        self.add_callback(_GradESCallback(self))

    # ---- the run ----

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self.grades_summary, self.diverged_at = None, None
        self.interrupted = self.nothing_left = False
        checked = first_step_checked(self) if self.grades_config is not None else contextlib.nullcontext()
        try:
            with checked:
                output = super().train(*args, **kwargs)
        except NothingLeftToTrain:
            output = self._complete()
        finally:
            if self.grades is not None:
                self.grades.close()
        if self.grades is not None:
            self._write_report()
        return output

    def _complete(self) -> TrainOutput:
        """What the Trainer does after the last step, for a run that ended there and got no further."""
        logger.warning("All steps of this run have been done: only what comes after them is left.")
        if self.grades is not None:
            self._restore_best_average()
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        control: Any = self.control
        control.should_training_stop = True
        self.callback_handler.on_train_end(self.args, self.state, control)
        if self.neftune_noise_alpha is not None:
            deactivate_neftune(self.model, self.neftune_hook_handle, self.accelerator)
        self.is_in_train = False
        return TrainOutput(self.state.global_step, float("nan"), {})

    def _start_grades(self) -> None:
        """Called when the optimizer exists, before a checkpoint's optimizer state is loaded."""
        if self.grades is not None:  # a second train(), or a smaller batch size after running out of memory
            self.grades.close()
        config, score = self.grades_config, None
        self._heldout_rows, self._heldout_passes, self._heldout_cost = 0, 0.0, 0.0
        self._accuracies: list[float] | None = []  # of the micro-batches of a step; `None`: the trainer computes none
        # A longer schedule could pay for a held-out score that the run has begun without.
        begun_without = self._resumed is not None and self._resumed["heldout"] is None
        wanted = config.needs_heldout_rows or (self._has_heldout_rows() and not begun_without)
        if config.may_measure_heldout and wanted:
            config, score = self._plan_heldout(config)
        # In several processes, most rows of an epoch come back in another one than before.
        cache_bytes = psutil.virtual_memory().available // 10 if self._epochs > 1 and world_size() == 1 else 0
        ddp = wrapper_of(self.model_wrapped)
        refuse_devices_that_send_nothing(self.model)
        refuse_reentrant_checkpointing(ddp, any(checkpoints_reentrantly(module) for module in self.model.modules()))
        self.grades = GradES(
            self.model,
            config,
            self.state.max_steps,
            self.optimizer,
            score,
            cache_bytes,
            self._epoch(),
            knows_train_accuracy=self._computes_train_accuracy,
            ddp=ddp,
        )
        self._say_when_it_ends()
        prefix = self.grades.prefix
        if self.args.torch_compile:
            prefix.compiled, prefix.cache, prefix.encoder_cache = True, None, None
            if config.activation_cache_mib or config.encoder_cache_dir:
                logger.warning("With torch_compile, no outputs of frozen layers are cached.")
        if is_sharded(self.model.parameters()) and (config.activation_cache_mib or config.encoder_cache_dir):
            logger.warning("With FSDP, no outputs of frozen layers are cached.")
        self._skipped_updates, self._loss_scale = 0, 1.0
        self._divergence = Divergence.of(self.model)
        # Of the micro-batches so far: each has its share of the loss of the optimizer step.
        self._step_loss: torch.Tensor | None = None
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
        return rows, rows / self._rows_per_step

    @property
    def _epochs(self) -> float:
        """Of the schedule; 0 for streamed rows."""
        epoch = self._epoch()
        return 0.0 if epoch is None else self.state.max_steps / epoch[1]

    @property
    def _rows_per_step(self) -> int:
        return self._train_batch_size * self.args.gradient_accumulation_steps * world_size()

    def _has_heldout_rows(self) -> bool:
        dataset = first_dataset(self.eval_dataset)
        return hasattr(dataset, "__len__") and len(dataset) > 0  # not streamed

    @property
    def _computes_train_accuracy(self) -> bool:
        """Whether the training step leaves a token accuracy behind. Unsloth's fused loss has none."""
        return is_sft_trainer(type(self)) and "unsloth" not in sys.modules

    def _plan_heldout(self, config: GradESConfig) -> tuple[GradESConfig, Callable[[], Any] | None]:
        """Draws the rows that are measured; returns the config with the interval that their cost allows."""
        settings, steps, available = config.heldout_settings(), self.state.max_steps, len(heldout_dataset(self))
        metric, answers, passes = settings["metric"], self._heldout_answers, 1.0
        if metric == "exact_match":
            assert answers is not None  # checked when the trainer was made
            available, passes = answers.available, answers.passes_per_row(self)
        comes_back = self._epochs >= EPOCHS_TO_OVERFIT
        rows, every, cost = plan(settings, steps, self._rows_per_step, available, passes, comes_back)
        if every > steps:
            logger.log(
                logging.WARNING if config.needs_heldout_rows else logging.INFO,
                "%d examples of the schedule are too few to measure a held-out %s: it would cost more than "
                "heldout_cost (%g %%), or 5 %% in a short run.",
                steps * self._rows_per_step,
                name_of(metric),
                100 * settings["cost"],
            )
            if not config.needs_heldout_rows:
                return config, None
        if self._resumed is not None and self._resumed["heldout"] is not None:  # its scores so far are of these rows
            rows, every = self._resumed["heldout_rows"], self._resumed["settings"]["heldout_every"]
        config = dataclasses.replace(config, heldout_every=settings["every"] or every)
        if metric == "exact_match":
            self._heldout_rows = rows
        else:
            drawn = HeldoutRows(self, rows, metric)
            self._heldout_rows = len(drawn.rows)
        if self._heldout_rows < MIN_SAMPLES <= settings["samples"]:
            logger.warning(
                "The held-out %s is of %s only, too few to end a run by: give eval_dataset 64 or more (or measure "
                'less often, where heldout_every is set), or set stopping="end_of_schedule" and keep="last".',
                name_of(metric),
                counted(self._heldout_rows, "row"),
            )
        self._heldout_passes, self._heldout_cost = self._heldout_rows * passes, cost
        return config, self._exact_match if metric == "exact_match" else drawn

    def _exact_match(self) -> float:
        assert self._heldout_answers is not None
        with nothing_random_moves():
            return self._heldout_answers.exact_match(self._heldout_rows)

    def _say_when_it_ends(self) -> None:
        heldout, description, last = self.grades.heldout, self.grades.stopping.description, self.state.max_steps
        if heldout is None:
            logger.info("The run ends %s.", description)
        elif heldout.every > last:
            logger.info("The run ends %s.", "with its schedule" if heldout is self.grades.stopping else description)
        else:
            logger.info(
                "The held-out %s of %d rows is measured every %d steps from step %d on, %.1f %% of the training "
                "FLOPs; the run ends %s.",
                name_of(heldout.metric),
                self._heldout_rows,
                heldout.every,
                heldout.first_step,
                100 * self._heldout_cost * self._forward_share / FORWARD_SHARE,
                description,
            )

    @property
    def _forward_share(self) -> float:
        """Of a training step: a third with all parameters, nearly a half with adapters, since the base needs no
        gradient."""
        others = self.grades.others
        matrices, names = [*self.grades.matrices.values(), *others], {matrix.name for matrix in others}
        step = step_flops(matrices, frozen=names, checkpointing=self.args.gradient_checkpointing)
        return forward_flops(matrices) / step

    def _begin_training(self) -> None:
        if self.state.global_step == 0 or self.grades is None:
            self._start_grades()
        self.report = RunReport(
            Path(self.args.output_dir) / "grades" if is_main() else None,
            self.grades.matrices,
            self.state.max_steps,
            others=self.grades.others,
            metric=self.grades_config.metric,
            settings=dataclasses.asdict(self.grades_config) | self.grades_config.criterion_settings(),
            grace_steps=self.grades.criterion.grace_steps,
            environment=self._environment,
            clock=self._clock,
            checkpointing=self.args.gradient_checkpointing,
            resume_step=self.state.global_step,
            tracker=Tracker.of(self),
        )
        self.grades.criterion.costs = self._step_costs
        if self._resumed is not None:
            self.report.load_state_dict(self._resumed["report"])
            self._resumed = None
        self.nothing_left |= self.grades.done or self.state.global_step >= self.state.max_steps
        if self.grades.restored_best and not self.nothing_left:
            logger.warning(
                "The checkpoint of step %d is the end of a run: it has the best average of its weights, not those of "
                "its last step. Training goes on from the average, with the optimizer of the last step.",
                self.state.global_step,
            )

    def _step_costs(self) -> StepCosts:
        return dataclasses.replace(
            self.grades.step_costs(),
            tokens=self.report.tokens_per_batch(),
            experts_per_token=self.report.experts_per_token,
            checkpointing=self.args.gradient_checkpointing,
        )

    def _end_step(self, control: Any) -> None:
        if self.accelerator.scaler is not None:
            # Fused optimizers skip an update themselves, and accelerate does not see it; the scale falls in any case.
            self._skipped_updates += self.accelerator.scaler.get_scale() < self._loss_scale
        if self._divergence.since is not None:
            self.diverged_at = self._divergence.since
            control.should_training_stop = True
            logger.error(HAS_DIVERGED, self.diverged_at)
        if self.grades.done:
            self._end_like_the_schedule(control)
        schedule_ends = self.state.global_step >= self.state.max_steps
        if self.grades.done or self.diverged_at is not None or schedule_ends:
            self._restore_best_average()  # into the last checkpoint; of a run that a callback stops, that is resumed

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
            if self.grades.average is not None:
                # A schedule-free optimizer trains other weights than it evaluates. In its training mode it would
                # shift the restored average in the next evaluation.
                self.optimizer.eval()
            self.grades.restore_best_average()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        if self.nothing_left:
            raise NothingLeftToTrain
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
            before = len(self._logged_accuracies())
            loss = super().training_step(model, inputs, *args, **kwargs)
        self.report.count_read(self.grades.prefix.read_layers)
        if self._accuracies is not None:
            self._accuracies += self._logged_accuracies()[before:]
        self._step_loss = loss.detach() if self._step_loss is None else self._step_loss + loss.detach()
        # The last micro-batch of an optimizer step: gradients are complete and not clipped yet.
        if self.accelerator.sync_gradients:
            self._grades_step(self._step_loss)
            self._step_loss = None
        return loss

    def _logged_accuracies(self) -> list[float]:
        """Those of the micro-batches since the last log, which SFTTrainer collects in `compute_loss`."""
        if self.grades.stopping_name != "train_accuracy":
            return []
        return self._metrics["train"].get("mean_token_accuracy", [])

    def _train_accuracy(self) -> float | None:
        """The mean of the micro-batches of this optimizer step."""
        if self.grades.stopping_name != "train_accuracy" or self._accuracies is None:
            return None
        if not self._accuracies:
            logger.warning("The trainer logs no mean_token_accuracy: the run ends with its schedule.")
            self._accuracies = None
            return None
        accuracy = sum(self._accuracies) / len(self._accuracies)
        self._accuracies = []
        return accuracy

    def _grades_step(self, loss: torch.Tensor) -> None:
        step, scaler = self.state.global_step + 1, self.accelerator.scaler
        heldout = self.grades.heldout
        measured = 0 if heldout is None else heldout.measurements
        with self._clock.overhead():
            self._loss_scale = scaler.get_scale() if scaler is not None else 1.0
            events = self.grades.step(step, grad_scale=self._loss_scale, train_accuracy=self._train_accuracy())
        self._divergence.update(step, gathered(loss.float()).mean().item())  # the Trainer waits for it next
        if scaler is not None and self.grades.done and all(p.grad is None for p in self.model.parameters()):
            # A scaler refuses to step an optimizer when no tensor has a gradient: the run ends without that step.
            self.accelerator.gradient_state._set_sync_gradients(False)
        prefix = self.grades.prefix
        reads_caches = sum(use.reads for use, _ in prefix.cache_use.values())
        values, gains = self.grades.criterion.values, self.grades.gain.steps.get(step)
        skipped = dict(prefix.skipped_layers)
        self.report.record(step, events, values, skipped, gains, reads_caches, probing=prefix.paused)
        if heldout is not None and heldout.measurements > measured:
            self.report.record_heldout(heldout.metric, heldout.score, self._heldout_passes)
        elif heldout is not None and heldout.is_due(step):
            logger.warning(
                "The held-out %s in step %d is no finite number, and decides nothing.", name_of(heldout.metric), step
            )
        if events:
            logger.info(self.report.console_line(step, events))

    # ---- resuming ----

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.grades is not None:
            own: dict[str, Any] = {"clock": self._clock, "report": self.report, "divergence": self._divergence}
            state = self.grades.state_dict() | {name: it.state_dict() for name, it in own.items()}
            state |= {"heldout_rows": self._heldout_rows, "skipped_updates": self._skipped_updates}
            if is_main() or is_sharded(self.model.parameters()):
                save_state(output_dir, state, *self._shard)
            if is_main():
                self.report.save(Path(output_dir) / "grades")

    @property
    def _shard(self) -> tuple[int, int]:
        """Which piece of the model this process has, and how many there are."""
        return (rank(), world_size()) if is_sharded(self.model.parameters()) else (0, 1)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.grades_config is not None and checkpoint is not None:
            self._resumed = load_state(checkpoint, *self._shard)
            self._start_grades()
            self.grades.load_state_dict(self._resumed)
            for change in self.grades.setting_changes[len(self._resumed["setting_changes"]) :]:
                logger.info("The resumed run has another setting: %s.", change)
            self._divergence.load_state_dict(self._resumed["divergence"])
            self._skipped_updates = self._resumed["skipped_updates"]
            self._clock.load_state_dict(self._resumed["clock"])
            if is_main():
                restore_record(Path(checkpoint) / "grades", Path(self.args.output_dir) / "grades")
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, checkpoint: str, *args: Any, **kwargs: Any) -> None:
        # PEFT brings bf16 adapters of a quantized model back as float32, which would drift from the original run.
        dtypes = {name: p.dtype for name, p in self.model.named_parameters() if p.requires_grad}
        with self._renamed_weights_of(checkpoint):
            super()._load_from_checkpoint(checkpoint, *args, **kwargs)
        if is_sharded(self.model.parameters()):
            return
        if self.grades_config is not None:
            for name, parameter in self.model.named_parameters():
                if name in dtypes:
                    parameter.data = parameter.data.to(dtypes[name])

    def _load_best_model(self) -> None:
        with self._renamed_weights_of(self.state.best_model_checkpoint):
            super()._load_best_model()

    @contextlib.contextmanager
    def _renamed_weights_of(self, checkpoint: str) -> Iterator[None]:
        """Loads what the Trainer leaves out of a checkpoint because of its names. The Trainer would list those as
        missing and unexpected; the list is shown if weights really are."""
        load_results: list[Any] = []
        self._issue_warnings_after_load = load_results.append
        try:
            yield
        finally:
            del self._issue_warnings_after_load
        loaded = not is_sharded(self.model.parameters()) and load_renamed_weights(self.model, checkpoint)
        if not loaded:
            for load_result in load_results:
                self._issue_warnings_after_load(load_result)

    # ---- what people see ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.grades is not None and "loss" in logs:
            logs.update(self.report.logs())
        super().log(logs, start_time)
        if self.grades is not None:
            self.report.record_metrics(self.state.global_step, logs)

    def _write_report(self) -> None:
        """The run is over and its model safe: whatever fails here is said, and costs no more than the report."""
        self.report.add_up_tokens()
        try:
            self.grades_summary = self.report.summarize(self._outcome())
            self.report.write(self.grades_summary)
            self._say_how_it_ended(self.grades_summary)
        except Exception:
            logger.exception("The report in %s is not complete; the model is not affected.", self.report.directory)

    def _say_how_it_ended(self, summary: RunSummary) -> None:
        """A script that shows only warnings sees it too, where it is another end than that of SFTTrainer."""
        differs = summary.steps < summary.total_steps or summary.weights != "last"
        hidden = not logger.isEnabledFor(logging.INFO)
        logger.log(logging.WARNING if differs and hidden else logging.INFO, format_ending(summary))

    def _outcome(self) -> Outcome:
        grades, state = self.grades, self.state
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            weights = "best checkpoint"
        else:
            weights = "best average" if grades.restored_best else "last"
        own_reason = "diverged" if self.diverged_at is not None else grades.stop_reason
        if self.interrupted:
            own_reason = INTERRUPTED
        heldout = grades.heldout
        return Outcome(
            frozen=dict(grades.frozen),
            stop_reason=stop_reason(self._clock, state.global_step, state.max_steps, own_reason or None),
            weights=weights,
            steps=state.global_step,
            setting_changes=list(grades.setting_changes),
            diverged_at=self.diverged_at,
            losses_not_finite=self._divergence.not_finite,
            skipped_updates=self._skipped_updates,
            without_gradient=len(grades.without_gradient),
            untracked_parameters=sum(untracked_parameters(self.model, grades.matrices).values()),
            heldout_examples=self._heldout_rows,
            heldout_every=None if heldout is None else heldout.every,
            heldout_metric="loss" if heldout is None else heldout.metric,
            best_step=None if heldout is None else heldout.best_step,
            best_score=None if heldout is None else heldout.best_score,
            caches={
                name: CacheSummary(use.hits, use.misses, use.peak_bytes / 2**20, use.saved_seconds, off)
                for name, (use, off) in grades.prefix.cache_use.items()
            },
        )


class NothingLeftToTrain(Exception):
    """There is no step to run, see `GradESMixin.nothing_left`. Raised when all callbacks have seen training begin."""


class _GradESCallback(TrainerCallback):
    """The moments of a run that only callbacks see."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._begin_training()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.nothing_left:
            raise NothingLeftToTrain

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._end_step(control)


def __getattr__(name: str) -> Any:
    if name == "GradESTrainer":
        return on_sft_trainer(GradESMixin, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
