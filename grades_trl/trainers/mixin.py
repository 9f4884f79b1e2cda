"""GradES in TRL: `GradESMixin` for any SFTTrainer, and `GradESTrainer(GradESMixin, SFTTrainer)`."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import json
import math
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import PIL.Image
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from grades_trl.config import GradESConfig
from grades_trl.engine import GradES
from grades_trl.events import FreezeEvent
from grades_trl.freezing.activation_cache import draws_at_random
from grades_trl.model.matrices import blocks_of_matrices, describe, find_matrices, untracked_parameters
from grades_trl.report import timing as accounting
from grades_trl.report.history import Timeline

STATE_JSON, STATE_TENSORS = "grades_state.json", "grades_state.safetensors"
# Freeze events come in clusters; W&B gets a new picture when that much more of the model has frozen.
PICTURE_EVERY = 0.05
# Of `heldout_gain`: readings in a run, and examples in each at least (see `heldout_plan`).
HELDOUT_READINGS, MIN_HELDOUT = 20, 16


if TYPE_CHECKING:
    from typing import Any as _SFTTrainer  # a mixin: what it stands on is known when it is mixed
else:
    _SFTTrainer = object


class GradESMixin(_SFTTrainer):
    """
    Puts GradES into an `SFTTrainer`: `class MyTrainer(GradESMixin, MySFTTrainer)`.

    Args:
        *args, **kwargs: of the trainer.
        grades (`GradESConfig`, *optional*, defaults to `GradESConfig()`): `None` is the plain trainer, bit for bit.

    Attributes:
        watched (`dict[str, WeightMatrix]`): what is tracked.
        grades (`GradES` or `None`): the engine, from the beginning of `train()` on.
        grades_summary (`dict`): what `summary.json` holds, after `train()`.

    Raises:
        ValueError: the model has nothing to watch; several processes or GPUs, DeepSpeed or FSDP.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "sft", "grades"]
    _name = "SFT with GradES"

    def __init__(self, *args: Any, grades: GradESConfig | None = GradESConfig(), **kwargs: Any):  # noqa: B008
        _refuse_stale_base(type(self))
        super().__init__(*args, **kwargs)
        # Any, not Optional: all methods below but the first lines of the overridden ones run with an engine only.
        self.grades_config: Any = grades
        self.grades: Any = None
        self.grades_summary: dict[str, Any] = {}
        self._events: list[FreezeEvent] = []  # of the last step
        if grades is None:
            return
        if self.accelerator.distributed_type != DistributedType.NO:
            raise ValueError(
                f"GradES runs in one process on one device; this run is {self.accelerator.distributed_type.value}. "
                "Start it as `python recipes/...` without a launcher, or train without GradES (grades=None)."
            )
        if self.args.n_gpu > 1:  # the Trainer would copy the model to all of them in each step (DataParallel)
            raise ValueError(
                f"GradES runs in one process on one device; {self.args.n_gpu} GPUs are visible to this one. Start it "
                "as `CUDA_VISIBLE_DEVICES=0 python recipes/...`, or train without GradES (grades=None)."
            )
        self.watched = find_matrices(self.model, projector=grades.track_projector)
        for tower in {matrix.tower for matrix in self.watched.values()}:
            grades.tau_of(tower)  # a tower without a threshold is an error now, not after the grace period
        if grades.metric == "heldout_gain" and self.eval_dataset is None:
            raise ValueError(
                'metric "heldout_gain" reads the loss of held-out examples: pass eval_dataset=..., or take a metric '
                "of the training gradients (grad_change, agreement)."
            )
        tqdm.write(f"\nGradES watches {len(self.watched)} weight matrices\n{describe(self.model, self.watched)}\n")
        self.add_callback(_GradESCallback(self))

    # ---- the step ----

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        # The last micro-batch of an optimizer step: gradients are complete and not clipped yet.
        if self.grades is not None and self.accelerator.sync_gradients:
            self._grades_step()
        return loss

    def _grades_step(self) -> None:
        step = self.state.global_step + 1
        scaler = self.accelerator.scaler
        self._stopwatch.start()
        depths = dict(self.grades.cut.depths)
        self._events = self.grades.step(step, grad_scale=scaler.get_scale() if scaler is not None else 1.0)
        self._stopwatch.stop()
        if scaler is not None and self.grades.done and all(p.grad is None for p in self.model.parameters()):
            # A scaler refuses to step an optimizer when no tensor has a gradient: the run ends without that step.
            self.accelerator.gradient_state._set_sync_gradients(False)
        if self._events or self.grades.cut.depths != (self._states[-1]["cut"] if self._states else {}):
            self._states.append({"step": step, "frozen": len(self.grades.frozen), "cut": dict(self.grades.cut.depths)})
        self.timeline.record(step, self._events, self.grades.readings)
        self._unlogged |= self.grades.readings  # not every reading is in a step that is logged
        if self._events:
            self._announce(step, self._events)
        for stack, depth in self.grades.cut.depths.items():
            if depth > depths.get(stack, 0):
                whole = all(m.layer < depth for m in self.grades.matrices.values() if m.stack == stack)
                tqdm.write(f"step {step}: backward ends above {'all' if whole else depth} blocks of {stack}")

    def _announce(self, step: int, events: list[FreezeEvent]) -> None:
        shown = ", ".join(f"{e.tower} {e.layer} {e.role}" for e in events[:3]) + (" ..." if len(events) > 3 else "")
        total = len(self.grades.matrices)
        tqdm.write(f"step {step}: froze {len(events)} ({shown}); {len(self.grades.frozen)} of {total} frozen")

    # ---- the run ----

    def _start_grades(self) -> None:
        """Called when the optimizer exists, before a checkpoint's optimizer state is loaded."""
        if self.grades is not None:  # a second train() on the same model
            self.grades.unfreeze_all()
        config, heldout = self.grades_config, None
        self._heldout_batches: list[tuple[float, Any]] = []  # share of the mean loss, batch
        self._heldout_examples = 0
        if config.metric == "heldout_gain":
            config, heldout = self._hold_out(config), self._heldout_backward
        self.grades = GradES(self.model, config, self.state.max_steps, self.optimizer, heldout)
        self._events = []
        self._unlogged: dict[str, float] = {}
        self._clock = accounting.StepClock()
        self._stopwatch = Stopwatch()
        self._validation = accounting.Validation(planned=self._planned_evaluations())
        self._tokens: dict[str, list[int]] = {}
        # Where the cost of a step changed: number of frozen matrices, and blocks that backward does not enter.
        self._states: list[dict[str, Any]] = []
        self._pictured = 0.0

    def _hold_out(self, config: GradESConfig) -> GradESConfig:
        """Draws the examples that `heldout_gain` reads; returns the config with the interval their cost allows."""
        rows = self.eval_dataset
        if isinstance(rows, dict):
            rows = next(iter(rows.values()))
        if not hasattr(rows, "__len__"):
            raise ValueError(
                'metric "heldout_gain" reads the same held-out examples each time, and eval_dataset is streamed: '
                "pass a data set of known length (64 rows are enough)."
            )
        if len(rows) == 0:
            raise ValueError('metric "heldout_gain" reads held-out examples, and eval_dataset has no rows.')
        steps = self.state.max_steps
        per_step = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        count, interval = heldout_plan(config, steps, per_step, len(rows))
        if isinstance(rows, Dataset):
            rows = self._remove_unused_columns(rows, "evaluation")  # as for the collator in training
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count].tolist()
        size = self.args.per_device_train_batch_size
        parts = [chosen[start : start + size] for start in range(0, count, size)]
        self._heldout_batches = [(len(part) / count, self.data_collator([rows[i] for i in part])) for part in parts]
        self._heldout_examples = count
        if interval > steps:
            enough = math.ceil(100 * count * (HELDOUT_READINGS // 2) / (steps * per_step)) / 100
            tqdm.write(
                f"heldout_gain: {steps * per_step:,} training examples are too few: nothing will freeze. The "
                f"{config.heldout_cost:.0%} of them that readings may cost are not enough for the few readings of "
                f"{count} held-out examples that it takes; --heldout_cost {min(enough, 1.0)} is."
            )
        else:
            cost = count * (heldout_readings(config, steps, interval) + 1) / (steps * per_step)
            tqdm.write(
                f"heldout_gain: {count} held-out examples every {interval} steps, {cost:.1%} of the training examples"
            )
        if count < MIN_HELDOUT:
            tqdm.write(
                f"heldout_gain: {count} held-out examples decide, which is a matter of luck below {MIN_HELDOUT}"
            )
        return dataclasses.replace(config, interval=interval)

    def _heldout_backward(self) -> torch.Tensor:
        """Backward of the mean held-out loss, in the mode of training, leaving no trace in logs or random numbers."""
        logged = {key: getattr(self, key) for key in ("_metrics", "_total_train_tokens") if hasattr(self, key)}
        if "_metrics" in logged:
            self._metrics: Any = {mode: defaultdict(list) for mode in logged["_metrics"]}
        self.model.train()  # at the end of training, an evaluation may have come before
        total: Any = 0.0
        with torch.random.fork_rng():
            for share, batch in self._heldout_batches:
                with self.compute_loss_context_manager():
                    loss = share * self.compute_loss(self.model, self._prepare_inputs(copy.copy(batch)))
                scaler = self.accelerator.scaler
                (loss if scaler is None else scaler.scale(loss)).backward()
                total = total + loss.detach()
        self.__dict__.update(logged)
        return total

    def _begin_training(self) -> None:
        if self.grades is None or self.state.global_step == 0:
            self._start_grades()
        if self.grades.done:
            raise ValueError(
                f"Nothing is left to train: everything was frozen at step {max(self.grades.frozen.values())} of the "
                "run that is resumed. Use its model as it is, or start anew from its weights."
            )
        if self.state.global_step >= self.state.max_steps:
            raise ValueError(
                f"Nothing is left to train: the run that is resumed has finished its {self.state.max_steps} steps. "
                "Use its model as it is, or start anew from its weights."
            )
        if self.grades_config.cache_prefix and draws_at_random(self.model):
            tqdm.write("--cache_prefix is off: dropout or NEFTune's noise changes what it would keep in each pass")
        self.timeline = Timeline(
            Path(self.args.output_dir) / "grades",
            self.grades.matrices,
            self.state.max_steps,
            self.grades_config.metric,
            self.grades.criterion.grace_steps,
            resume_step=self.state.global_step,
        )
        first_blocks: dict[str, str] = {}
        for path, names in blocks_of_matrices(self.model, self.grades.matrices).items():
            first_blocks.setdefault(self.grades.matrices[names[0]].tower, path)
        self._token_hooks = accounting.count_tokens(self.model, first_blocks, self._tokens)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if (run := self._wandb_run()) is not None:
            run.config.update({"grades": dataclasses.asdict(self.grades_config)}, allow_val_change=True)
        self._clock.start()

    def _end_step(self) -> None:
        self._clock.step(self._stopwatch.read(), froze=bool(self._events))
        if self.state.global_step % accounting.WINDOW == 0:
            for hook in self._token_hooks:
                hook.remove()
        share = len(self.grades.frozen) / len(self.grades.matrices)
        if self._events and (share - self._pictured >= PICTURE_EVERY or self.grades.done):
            self._pictured = share
            if (run := self._wandb_run()) is not None:  # drawing takes a while: only where someone will look
                self._wandb_picture(run, _rendered(self.timeline.figure()))
            self._clock.start()

    def _end_training(self) -> None:
        for hook in self._token_hooks:
            hook.remove()
        start = accounting.now()
        if self.args.load_best_model_at_end:  # the user has chosen what is kept
            self.grades.close()
        else:
            self.grades.finish()
        seconds = accounting.now() - start
        self._clock.add(seconds)
        if self._heldout_weights() == "average":
            step, loss = self.grades.heldout.best_step, self.grades.heldout.best_loss
            tqdm.write(f"the model has the average of its weights up to step {step}: held-out loss {loss:.4f}")
        self.grades_summary = self._summarize(seconds)
        self.timeline.write_report(self.grades_summary)
        self._wandb_finish()

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        start = time.perf_counter()
        metrics = super().evaluate(eval_dataset, *args, **kwargs)
        several = isinstance(self.eval_dataset if eval_dataset is None else eval_dataset, dict)  # each comes here too
        if self.grades is not None and self.is_in_train and not several:
            seconds = time.perf_counter() - start
            self._clock.exclude(seconds)
            self._validation.run += 1
            self._validation.seconds += seconds
        return metrics

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        start = time.perf_counter()
        super()._save_checkpoint(*args, **kwargs)
        if self.grades is not None:
            self._clock.exclude(time.perf_counter() - start)

    # ---- resuming ----

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.grades is not None:
            state = self.grades.state_dict()
            state |= {"clock": vars(self._clock), "validation": vars(self._validation), "states": self._states}
            save_file({k: t.contiguous() for k, t in state.pop("tensors").items()}, Path(output_dir) / STATE_TENSORS)
            (Path(output_dir) / STATE_JSON).write_text(json.dumps(state))
            self.timeline.flush()  # a run that is killed is resumed with its history

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.grades_config is not None and checkpoint is not None:
            path = Path(checkpoint) / STATE_JSON
            if not path.exists():
                raise ValueError(
                    f"{checkpoint} has no {STATE_JSON}: it was written without GradES or with save_only_model. Resume "
                    "with grades=None, or start anew from its weights."
                )
            self._start_grades()
            state = json.loads(path.read_text())
            self.grades.load_state_dict(state | {"tensors": load_file(Path(checkpoint) / STATE_TENSORS)})
            self._states = state["states"]
            vars(self._clock).update(state["clock"])
            vars(self._validation).update(state["validation"])
            before, here = Path(checkpoint).parent / "grades", Path(self.args.output_dir) / "grades"
            if before.is_dir() and not here.exists():  # resumed into another folder: what happened so far comes along
                shutil.copytree(before, here)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, checkpoint: str, *args: Any, **kwargs: Any) -> None:
        # PEFT brings bf16 adapters of a quantized model back as float32, which would drift from the original run.
        dtypes = {name: p.dtype for name, p in self.model.named_parameters() if p.requires_grad}
        super()._load_from_checkpoint(checkpoint, *args, **kwargs)
        self._load_renamed(checkpoint)
        for name, parameter in self.model.named_parameters():
            if name in dtypes:
                parameter.data = parameter.data.to(dtypes[name])

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_renamed(self.state.best_model_checkpoint)

    def _load_renamed(self, checkpoint: str) -> None:
        """Weights that were saved under other names than the model has: vision-language models under those of earlier
        versions of Transformers. Its Trainer does not translate them back (5.17): it says that keys are missing, and
        goes on with the weights as they are."""
        path = Path(checkpoint) / SAFE_WEIGHTS_NAME
        index = Path(checkpoint) / SAFE_WEIGHTS_INDEX_NAME
        if path.exists():
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
        elif index.exists():
            names = set(json.loads(index.read_text())["weight_map"])
        else:
            return  # adapters alone
        if names - set(self.model.state_dict()):
            saved = type(self.model).from_pretrained(checkpoint, dtype=self.model.dtype)
            self.model.load_state_dict(saved.state_dict())

    # ---- what people see ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.grades is not None and "loss" in logs:
            logs.update(self._grades_logs())
        super().log(logs, start_time)

    def _grades_logs(self) -> dict[str, float]:
        matrices, frozen = self.grades.matrices, self.grades.frozen
        params = {name: m.params for name, m in matrices.items()}
        logs = {
            "grades/frozen_fraction": len(frozen) / len(matrices),
            "grades/frozen_params_fraction": sum(params[name] for name in frozen) / sum(params.values()),
            "grades/frozen_prefix_layers": float(self._frozen_prefix_layers()),
            "grades/step_time": self._clock.recent_step(),
            "grades/step_speedup_predicted": self._flops() / self._flops(frozen, self.grades.cut.depths),
            "grades/overhead_ms": 1e3 * statistics.fmean(self._clock.overhead_seconds[-accounting.WINDOW :]),
        }
        if (plain := self._clock.plain_step()) is not None:
            logs["grades/step_speedup"] = plain / self._clock.recent_step()
        for tower in sorted({m.tower for m in matrices.values()}):
            members = [name for name, m in matrices.items() if m.tower == tower]
            logs[f"grades/{tower}/frozen_fraction"] = sum(name in frozen for name in members) / len(members)
            stacks = {matrices[name].stack for name in members}
            logs[f"grades/{tower}/cut_layers"] = float(sum(self.grades.cut.depths.get(s, 0) for s in stacks))
        if self.grades.heldout is not None and self.grades.heldout.readings:
            logs["grades/heldout_loss"] = self.grades.heldout.loss  # of the average of the weights
        by_role: dict[str, list[float]] = {}
        for name, value in self._unlogged.items():
            prefix = "" if matrices[name].tower == "language" else f"{matrices[name].tower}/"
            by_role.setdefault(f"grades/{prefix}{matrices[name].role}/metric", []).append(value)
        self._unlogged = {}
        return logs | {key: statistics.fmean(values) for key, values in by_role.items()}

    def _frozen_prefix_layers(self) -> int:
        """Blocks of the language tower, counted from the input, whose tracked matrices are all frozen."""
        live = [
            m.layer
            for m in self.grades.matrices.values()
            if m.tower == "language" and m.name not in self.grades.frozen
        ]
        layers = {m.layer for m in self.grades.matrices.values() if m.tower == "language"}
        return min(live) if live else len(layers)

    def _flops(self, frozen: Collection[str] = (), depths: dict[str, int] | None = None) -> float:
        """Matmul FLOPs of one optimizer step, see `accounting.step_flops`."""
        matrices = self.grades.matrices
        cut = {name for name, m in matrices.items() if m.layer < depths.get(m.stack, 0)} if depths else ()
        per_step = self.args.gradient_accumulation_steps
        tokens = {tower: per_step * statistics.fmean(counts) for tower, counts in self._tokens.items()}
        tokens["projector"] = tokens.get("vision", 0.0)
        return accounting.step_flops(
            matrices.values(), frozen, tokens, checkpointing=self.args.gradient_checkpointing, cut=cut
        )

    def _flops_of_run(self) -> float:
        """Of all steps that were run: a state holds for the step after it was reached, and on to the next one."""
        frozen, total, start, cost = list(self.grades.frozen), 0.0, 0, self._flops()
        for state in self._states:
            total += cost * (state["step"] - start)
            start, cost = state["step"], self._flops(frozen[: state["frozen"]], state["cut"])
        per_step = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        readings = self.grades.heldout.readings if self.grades.heldout is not None else 0
        total += (
            self._flops() * readings * self._heldout_examples / per_step
        )  # at most: frozen prefixes are cut there too
        return total + cost * (self.state.global_step - start)

    def _planned_evaluations(self) -> int:
        strategy, steps = self.args.eval_strategy, self.state.max_steps
        if self.eval_dataset is None or strategy == "no":
            return 0
        sets = len(self.eval_dataset) if isinstance(self.eval_dataset, dict) else 1
        if strategy == "epoch":  # how many epochs there are of a streamed set, nobody knows
            return sets * self.state.num_train_epochs if self.state.num_train_epochs < sys.maxsize else 0
        return sets * int(steps // self.state.eval_steps)

    def _summarize(self, after_training: float) -> dict[str, Any]:
        grades, clock, steps = self.grades, self._clock, self.state.global_step
        towers: dict[str, dict[str, int]] = {}
        for name, matrix in grades.matrices.items():
            tower = towers.setdefault(matrix.tower, {"matrices": 0, "frozen": 0})
            tower["matrices"] += 1
            tower["frozen"] += name in grades.frozen
        flops_plain = self._flops()
        overhead = sum(clock.overhead_seconds)
        if grades.done:
            reason = "all matrices frozen"
        else:
            reason = "schedule finished" if steps >= self.state.max_steps else "early stopping"
        return {
            "model": self.model.config._name_or_path or type(self.model).__name__,
            "metric": self.grades_config.metric,
            "tau": self.grades_config.tau,
            "auto_ratio": self.grades_config.auto_ratio if self.grades_config.tau == "auto" else None,
            "alpha": self.grades_config.alpha,
            "patience": self.grades_config.patience,
            "steps": steps,
            "total_steps": self.state.max_steps,
            "stop_reason": reason,
            "matrices": len(grades.matrices),
            "frozen": len(grades.frozen),
            "without_gradient": len(grades.matrices) - len(grades.frozen) if grades.done else 0,
            "towers": towers,
            "cuts": [{"step": s["step"], **s["cut"]} for s in self._states if s["cut"]],
            "params_tracked": sum(m.params for m in grades.matrices.values()),
            "params_trained_untracked": sum(untracked_parameters(self.model, grades.matrices).values()),
            "speedup": accounting.speedup(clock, self.state.max_steps, self._validation),
            "seconds": {
                "training": clock.total,
                "validation": self._validation.seconds,
                "grades": overhead,
                "grades_after_training": after_training,
            },
            "overhead": {
                "ms_per_step": 1e3 * statistics.fmean(clock.overhead_seconds) if clock.overhead_seconds else None,
                "fraction": overhead / clock.total if clock.total else None,
            },
            "flops": {
                "run": self._flops_of_run(),
                "plain_same_length": flops_plain * steps,
                "plain_full_schedule": flops_plain * self.state.max_steps,
            },
            "heldout": self._heldout_summary(),
            "peak_memory_mib": accounting.peak_memory_mib(),
            "device": accounting.device_name(),
            "versions": accounting.versions(),
        }

    def _heldout_weights(self) -> str:
        """Which ones the model has in the end."""
        if self.args.load_best_model_at_end:  # after the engine went back, if it did
            return "best checkpoint"
        return "average" if self.grades.went_back else "last"

    def _heldout_summary(self) -> dict[str, Any] | None:
        if self.grades.heldout is None:
            return None
        per_step = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        examples = self._heldout_examples * self.grades.heldout.readings
        return {
            "examples": self._heldout_examples,
            "interval": self.grades.interval,
            "readings": self.grades.heldout.readings,
            "best_step": self.grades.heldout.best_step,
            "weights": self._heldout_weights(),
            "examples_per_training_example": examples / (per_step * self.state.global_step),
        }

    # ---- Weights & Biases: media and tables, beside the scalars that go through log() ----

    def _wandb_run(self) -> Any:
        if "wandb" not in self.args.report_to:
            return None
        import wandb

        return wandb.run

    def _wandb_picture(self, run: Any, picture: Any) -> None:
        import wandb

        # No `step=`: rows logged beside the Trainer's own would be dropped.
        run.log({"grades/timeline": wandb.Image(picture), "train/global_step": self.state.global_step})

    def _wandb_finish(self) -> None:
        run = self._wandb_run()
        if run is None:
            return
        import wandb

        columns, rows = self.timeline.table()
        run.log({"grades/matrices": wandb.Table(columns=list(columns), data=rows)})
        self._wandb_picture(run, str(self.timeline.directory / "timeline.png"))  # as the report has it
        for key, value in self.grades_summary.items():
            run.summary[f"grades/{key}"] = value
        self.log_report()

    def log_report(self) -> None:
        """The folder of the report to W&B, if that is on; once more after something was added to it."""
        if (run := self._wandb_run()) is None:
            return
        import wandb

        report = wandb.Artifact(f"grades-{run.id}", type="grades-report")
        report.add_dir(str(self.timeline.directory))
        run.log_artifact(report)


def _rendered(figure: Any) -> Any:
    """A PIL picture of a matplotlib figure (W&B renders figures itself only when pyplot is imported)."""
    data = io.BytesIO()
    figure.savefig(data, dpi=120)
    return PIL.Image.open(data)


class _GradESCallback(TrainerCallback):
    """The moments of a run that only callbacks see."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._begin_training()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer._end_step()
        if self.trainer.grades.done:  # in this very step: the next backward would find nothing that needs a gradient
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer._end_training()


def heldout_plan(config: GradESConfig, steps: int, per_step: int, available: int) -> tuple[int, int]:
    """How many held-out examples a reading takes, and how many steps lie between readings.

    `heldout_cost` allows `heldout_cost * steps * per_step` examples in all. They are spread over `HELDOUT_READINGS`
    readings, the one at the end of the schedule included, of at most `heldout_samples` examples each, and of at least
    `MIN_HELDOUT`: then there are fewer readings. Where not even those fit that freezing takes (a first one to compare
    with and `patience` more), the interval is longer than the schedule. An interval that is set is kept.

    Args:
        config (`GradESConfig`): heldout_cost, heldout_samples, interval, alpha.
        steps (`int`): optimizer steps of the whole schedule.
        per_step (`int`): training examples per optimizer step.
        available (`int`): held-out examples.
    """
    budget = config.heldout_cost * per_step * steps
    if config.interval is not None:
        count = int(config.heldout_cost * per_step * config.interval)
        return min(config.heldout_samples, available, max(1, count)), config.interval
    count = min(max(MIN_HELDOUT, int(budget / HELDOUT_READINGS)), config.heldout_samples, available)
    for interval in range(math.ceil(steps / HELDOUT_READINGS), steps + 1):
        readings = heldout_readings(config, steps, interval)
        if count * (readings + 1) <= budget:
            assert config.patience is not None  # since __post_init__
            return count, interval if readings > config.patience else steps + 1
    return count, steps + 1


def heldout_readings(config: GradESConfig, steps: int, interval: int) -> int:
    """Readings in a whole schedule, without the one at its end: the first is the last that does not come after the
    grace period."""
    return steps // interval - max(0, config.grace_steps(steps) // interval - 1)


class Stopwatch:
    """Seconds of a piece of work on the device it runs on, without waiting for that device."""

    def __init__(self):
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if torch.cuda.is_available() else []
        self._start = self._seconds = 0.0

    def start(self) -> None:
        self._start = time.perf_counter()
        if self._events:
            self._events[0].record()

    def stop(self) -> None:
        if self._events:
            self._events[1].record()
        else:
            self._seconds = time.perf_counter() - self._start

    def read(self) -> float:
        """To be called when a later transfer has waited for the device anyway."""
        if self._events:
            self._events[1].synchronize()
            return self._events[0].elapsed_time(self._events[1]) / 1e3
        return self._seconds


def _refuse_stale_base(trainer: type) -> None:
    import trl

    if "unsloth" in sys.modules and trl.SFTTrainer not in trainer.__mro__:
        raise ImportError(
            f"{trainer.__name__} was made before unsloth was imported, so it would train without Unsloth's loss and "
            "kernels. Import unsloth first, then GradESTrainer (or build your class on trl.SFTTrainer)."
        )


def on_sft_trainer(mixin: type, name: str) -> Any:
    """The class `name(mixin, SFTTrainer)`, on what `trl.SFTTrainer` is now: importing unsloth replaces it."""
    import trl

    return _bind(mixin, name, trl.SFTTrainer)


@functools.cache
def _bind(mixin: type, name: str, base: type) -> type:
    return type(name, (mixin, base), {"__module__": mixin.__module__, "__doc__": mixin.__doc__})


def __getattr__(name: str) -> Any:
    if name == "GradESTrainer":
        return on_sft_trainer(GradESMixin, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
