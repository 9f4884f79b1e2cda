"""The one clock of a run, with GradES or without: where its seconds go, and what freezing saved of them."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from grades_trl.report.environment import peak_memory_mib

# The first steps after a start or a resume are warm-up (allocator, caches, compilation) and are no baseline.
WARM_UP_STEPS = 3
# Steps that a median needs at least, before the first freeze and after the last one.
MIN_STEPS = 5
# Recent steps, and steps before the first freeze, that are kept.
WINDOW, BASELINE_WINDOW = 25, 100
# The live speed-up of a step is reported if twice its standard error is at most this fraction of it. That of a run is
# reported with its margin, up to the second fraction.
TOLERANCE, WIDEST_MARGIN = 0.1, 0.3
# Steps are correlated (busy machine, rows sorted by length), so errors come from the medians of that many blocks.
BLOCKS = 5


@dataclass(frozen=True)
class Seconds:
    """Where the seconds of a run went. The last four add up to `total`."""

    total: float
    training: float
    validation: float
    saving: float
    grades: float


@dataclass(frozen=True)
class Evaluation:
    """One validation set evaluated during training.

    Attributes:
        step (`int`): optimizer step after which it was evaluated.
        seconds (`float`): since training began, at its end.
        eval_loss (`float` or `None`): its loss, if the trainer computed one, and it is a finite number.
        dataset (`str` or `None`): its key in a dict of validation sets.
    """

    step: int
    seconds: float
    eval_loss: float | None
    dataset: str | None = None


@dataclass
class _State:
    """All that a resumed clock needs. JSON-able by `asdict`, of bounded size but for the evaluations."""

    steps: int = 0
    total: float = 0.0
    validation: float = 0.0
    saving: float = 0.0
    grades: float = 0.0
    step: float = 0.0  # of the running step so far
    step_overhead: float = 0.0  # of it, GradES
    typical: float = 0.0  # of the closed windows, each counted at its median, without GradES
    window: list[float] = field(default_factory=list)  # the open one
    baseline: list[float] = field(default_factory=list)  # the last steps before the first freeze, without GradES
    recent: list[float] = field(default_factory=list)  # the last steps, none of them from before the last freeze
    overheads: list[float] = field(default_factory=list)  # of GradES, in the last steps
    last_step: int = 0
    last_freeze: int | None = None
    planned_evaluations: int | None = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    peak_memory_mib: float | None = None


class RunClock(TrainerCallback):
    """
    Measures one `train()`. Pass it in the trainer's `callbacks`; it works with GradES and without.

    It runs from the first step to the last. Loading the best checkpoint of early stopping belongs to training;
    evaluation, generation and reports afterwards do not. Validation and saving are measured with the device
    synchronised. A step lasts from the end of the one before to its own end, without validation and saving in between.

    ```python
    clock = RunClock()
    trainer = SFTTrainer(..., callbacks=[clock])
    trainer.train()
    clock.seconds
    ```

    Attributes:
        data_ended (`bool`): the run ended since there were no more rows: a streamed dataset had been read, or one was
            shorter than it said.
    """

    def __init__(self) -> None:
        self._state = _State()
        self._mark = 0.0  # everything up to here is accounted for
        self._device = torch.device("cpu")
        self._running = self._resumed = self._in_overhead = False
        self._warm_up = WARM_UP_STEPS
        self._epoch_batches = 0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.data_ended = False

    # ---- the moments of a run ----

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if not self._resumed or state.global_step == 0:
            self._state = _State(planned_evaluations=plan_evaluations(args, state, train_dataloader))
        elif args.eval_on_start and self._state.planned_evaluations is not None:
            repeated = state.global_step in {entry["step"] for entry in self._state.evaluations}
            self._state.planned_evaluations += not repeated
        self._resumed, self._running, self.data_ended = False, True, False
        self._warm_up = WARM_UP_STEPS
        self._events.clear()
        self._device = args.device
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._mark = self._now()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._epoch_batches = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self._epoch_batches += 1

    def on_step_end(self, args, state, control, **kwargs):
        run = self._state
        run.step += self._advance(_something_follows(control))
        self._read_events()
        seconds, overhead = run.step, run.step_overhead
        run.step = run.step_overhead = 0.0
        run.steps += 1

        run.window.append(seconds - overhead)
        if len(run.window) == WINDOW:
            run.typical += WINDOW * statistics.median(run.window)
            run.window = []
        run.overheads = [*run.overheads, overhead][-WINDOW:]
        if run.last_freeze is None and self._warm_up == 0:
            run.baseline = [*run.baseline, seconds - overhead][-BASELINE_WINDOW:]
        self._warm_up = max(0, self._warm_up - 1)
        run.last_step = state.global_step
        alike = WINDOW if run.last_freeze in (None, run.last_step) else run.last_step - run.last_freeze
        run.recent = [*run.recent, seconds][-min(WINDOW, alike) :]

    def on_epoch_end(self, args, state, control, **kwargs):
        self._state.step += self._advance(_something_follows(control))
        # The Trainer itself ends a run when an epoch had no batch. Callbacks end it after a step or an evaluation.
        self.data_ended = self._epoch_batches == 0 and control.should_training_stop

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._running and "loss" in (logs or {}):  # of training; validation and saving come next, if they are due
            self._state.step += self._advance(_something_follows(control))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if not self._running:
            return
        self._state.validation += self._advance(synchronise=True)
        prefix = next((key for key in metrics if key.endswith("_runtime")), "eval_runtime").removesuffix("_runtime")
        loss = metrics.get(f"{prefix}_loss")
        entry = Evaluation(
            state.global_step,
            self._state.total,
            loss if loss is not None and math.isfinite(loss) else None,
            prefix.removeprefix("eval_") if prefix.startswith("eval_") else None,
        )
        self._state.evaluations.append(asdict(entry))

    def on_save(self, args, state, control, **kwargs):
        if self._running:
            self._state.saving += self._advance(synchronise=True)

    def on_train_end(self, args, state, control, **kwargs):
        if not self._running:  # ended already, by a recipe that saves the model before the other callbacks
            return
        self._state.step += self._advance(synchronise=True)
        self._read_events()
        self.data_ended = self.data_ended or not control.should_training_stop
        self._state.peak_memory_mib = self.peak_memory_mib
        self._running = False

    # ---- what GradES itself takes ----

    @contextmanager
    def overhead(self) -> Iterator[None]:
        """
        Measures the work inside as GradES's own, on the device that it runs on and without waiting for that device.

        During a step, it is part of the step. Between the last step and the end of training, and after that, it is
        added to the total. One inside another counts once.
        """
        if self._in_overhead:
            yield
            return
        self._in_overhead = True
        try:
            if self._running and self._device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                yield
                end.record()
                self._events.append((begin, end))
            else:
                start = time.perf_counter() if self._running else self._now()
                yield
                self.add_overhead((time.perf_counter() if self._running else self._now()) - start)
        finally:
            self._in_overhead = False

    def add_overhead(self, seconds: float) -> None:
        """Counts `seconds`, which have just passed, as GradES's own."""
        if self._running:
            self._state.step += self._advance()
        else:
            self._state.total += seconds
        self._add(seconds)

    def note_freeze(self, step: int) -> None:
        """Says that what a step costs changes after the running step `step`: something froze, or backward skips other
        layers. The steps before the first such one are the baseline."""
        self._state.last_freeze = step

    # ---- what it tells ----

    @property
    def steps(self) -> int:
        """Optimizer steps measured."""
        return self._state.steps

    @property
    def seconds(self) -> Seconds:
        """Where they went, up to now or to the end of training."""
        if self._running:
            self._state.step += self._advance()
        run = self._state
        training = run.total - run.validation - run.saving - run.grades
        return Seconds(run.total, training, run.validation, run.saving, run.grades)

    @property
    def evaluations(self) -> list[Evaluation]:
        """Validation sets evaluated so far, in order."""
        return [Evaluation(**entry) for entry in self._state.evaluations]

    @property
    def evaluations_run(self) -> int:
        """How often validation was run; all validation sets of one moment count as one."""
        return len({entry["step"] for entry in self._state.evaluations})

    @property
    def planned_evaluations(self) -> int | None:
        """How often the whole schedule runs validation, see [`plan_evaluations`]."""
        return self._state.planned_evaluations

    @property
    def peak_memory_mib(self) -> float | None:
        """MiB at most, see [`environment.peak_memory_mib`]; after training, up to its end."""
        peaks = [self._state.peak_memory_mib]
        if self._running:
            peaks.append(peak_memory_mib(self._device))
        return max((peak for peak in peaks if peak is not None), default=None)

    def baseline_step_seconds(self) -> float | None:
        """Median seconds of a step before anything froze, without GradES's own; `None` without enough steps, or if
        they vary too much to say."""
        baseline = self._state.baseline
        return None if _margin(baseline) > WIDEST_MARGIN else statistics.median(baseline)

    def baseline_margin(self) -> float:
        """Twice the standard error of `baseline_step_seconds`, as a fraction of it; infinite without enough steps."""
        return _margin(self._state.baseline)

    def recent_step_seconds(self) -> float | None:
        """Median seconds of the last steps, none of them from before the last freeze; `None` before the first step."""
        return statistics.median(self._state.recent) if self._state.recent else None

    def recent_overhead_seconds(self) -> float | None:
        """Mean seconds that GradES took in each of the last steps; `None` before the first step."""
        return statistics.fmean(self._state.overheads) if self._state.overheads else None

    def step_speedup(self) -> float | None:
        """Seconds of a step before anything froze, over those of a step since the last freeze, GradES's own included;
        `None` without enough steps, or if they vary too much to say."""
        run = self._state
        just_froze = run.last_freeze is not None and run.last_freeze >= run.last_step
        if just_froze or _margin(run.baseline, run.recent) > TOLERANCE:
            return None
        return statistics.median(run.baseline) / statistics.median(run.recent)

    def typical_seconds(self) -> float:
        """Seconds of all steps, each window of them counted at its median so that one stall does not pass for a cost,
        and of all that GradES took."""
        run = self._state
        rest = len(run.window) * statistics.median(run.window) if run.window else 0.0
        return run.typical + rest + run.grades

    # ---- resuming ----

    def state_dict(self) -> dict[str, Any]:
        """JSON-able. What is going on right now, such as writing the checkpoint, is not in it."""
        return asdict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the clock of a checkpoint was. May come before `on_train_begin` or after."""
        self._state = _State(**state)
        self._resumed = True

    # ---- inside ----

    def _now(self) -> float:
        """Seconds, when the device has done all that it was given."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    def _advance(self, synchronise: bool = False) -> float:
        """Seconds since the last call, which are added to the total."""
        now = self._now() if synchronise else time.perf_counter()
        passed, self._mark = now - self._mark, now
        self._state.total += passed
        return passed

    def _read_events(self) -> None:
        for begin, end in self._events:
            end.synchronize()  # in most steps, a later transfer has waited for it already
            self._add(begin.elapsed_time(end) / 1e3)
        self._events.clear()

    def _add(self, seconds: float) -> None:
        self._state.grades += seconds
        if self._running:
            self._state.step_overhead += seconds


def _something_follows(control: Any) -> bool:
    """Whether validation or saving come next: before them, the device must have finished."""
    return control.should_evaluate or control.should_save


def _margin(*samples: Sequence[float]) -> float:
    """Twice the standard error of the ratio of the samples' medians, as a fraction of it."""
    if any(len(sample) < MIN_STEPS for sample in samples):
        return math.inf
    return 2 * math.hypot(*map(_relative_error, samples))


def _relative_error(sample: Sequence[float]) -> float:
    """Standard error of a median over that median, from the medians of consecutive blocks."""
    size = len(sample) // BLOCKS
    ends = [len(sample) - size * (BLOCKS - i) for i in range(BLOCKS + 1)]
    medians = [statistics.median(sample[start:end]) for start, end in itertools.pairwise(ends)]
    middle = statistics.median(sample)
    return statistics.stdev(medians) / math.sqrt(BLOCKS) / middle if middle > 0 else math.inf


def plan_evaluations(args: Any, state: Any, train_dataloader: Any = None) -> int | None:
    """
    How often the Trainer runs validation in the whole schedule; all validation sets of one moment count as one.

    Args:
        args (`TrainingArguments`): eval_strategy, eval_on_start, eval_delay, gradient_accumulation_steps.
        state (`TrainerState`): at the beginning of training: max_steps, eval_steps, num_train_epochs.
        train_dataloader (`DataLoader`, *optional*): needed for validation by epoch.

    Returns:
        `int` or `None`: `None` for validation by epoch of a streamed dataset, whose length is not known.
    """
    at_start, delay, steps = int(args.eval_on_start), args.eval_delay, state.max_steps
    if args.eval_strategy == "no":
        return at_start
    if args.eval_strategy == "steps":
        every = int(state.eval_steps)
        before_delay = (math.ceil(delay) - 1) // every if delay > 0 else 0
        regular = max(0, steps // every - before_delay)
        return at_start + regular + (steps % every != 0 and delay <= steps)
    if train_dataloader is None or not has_length(train_dataloader):
        return None
    batches, accumulation = len(train_dataloader), args.gradient_accumulation_steps
    per_epoch = max(1, math.ceil(batches / accumulation))
    whole, rest = divmod(steps, per_epoch)
    ends = [*range(1, whole + 1), *([whole + min(1.0, rest * accumulation / batches)] if rest else [])]
    return at_start + sum(delay <= end for end in ends)


@dataclass(frozen=True)
class Saving:
    """What one part of the speed-up comes to; `None` where it could not be measured.

    Attributes:
        ratio (`float` or `None`): baseline over this run.
        seconds_saved (`float` or `None`): negative if GradES cost more than it saved.
    """

    ratio: float | None = None
    seconds_saved: float | None = None


@dataclass(frozen=True)
class StepsNotRun(Saving):
    """`steps` (`int` or `None`): optimizer steps of the schedule that were not run."""

    steps: int | None = None


@dataclass(frozen=True)
class ValidationNotRun:
    """`evaluations` (`int` or `None`): validations of the schedule that were not run; `seconds_saved` as above."""

    evaluations: int | None = None
    seconds_saved: float | None = None


@dataclass(frozen=True)
class Speedup:
    """The speed-up in its three parts; never one merged number without them.

    Attributes:
        cheaper_steps (`Saving`): the steps that were run, against as many baseline steps.
        steps_not_run (`StepsNotRun`), validation_not_run (`ValidationNotRun`): what the schedule had left.
        against_same_length (`float` or `None`): against a baseline of as many steps.
        against_full_schedule (`float` or `None`): against a baseline of all steps, both with their validation.
        margin (`float` or `None`): twice the standard error of these ratios, as a fraction of them. It is that of the
            steps before the first freeze.
    """

    cheaper_steps: Saving = Saving()
    steps_not_run: StepsNotRun = StepsNotRun()
    validation_not_run: ValidationNotRun = ValidationNotRun()
    against_same_length: float | None = None
    against_full_schedule: float | None = None
    margin: float | None = None

    @property
    def in_words(self) -> str:
        """`against_full_schedule` with its margin; empty if it could not be measured."""
        ratio = self.against_full_schedule
        if ratio is None:
            return ""
        return f"{ratio:.2f}x" if self.margin is None else f"{ratio:.2f}x (+/- {ratio * self.margin:.2f})"


def speedup(clock: RunClock, total_steps: int) -> Speedup:
    """The speed-up of a run over a baseline of `total_steps`, from the baseline steps that it began with itself.

    Args:
        clock (`RunClock`): of the run, which has ended.
        total_steps (`int`): optimizer steps that the baseline runs.
    """
    steps, validation = clock.steps, clock.seconds.validation
    not_run = total_steps - steps
    each = validation / clock.evaluations_run if clock.evaluations_run else None
    planned = clock.planned_evaluations
    missing = None if planned is None else max(0, planned - clock.evaluations_run)
    saved = None if missing is None or (missing and each is None) else missing * (each or 0.0)
    ratio = total_steps / steps if steps else None
    validation_not_run = ValidationNotRun(missing, saved)
    baseline = clock.baseline_step_seconds()
    if baseline is None:
        return Speedup(steps_not_run=StepsNotRun(ratio, None, not_run), validation_not_run=validation_not_run)
    run = clock.typical_seconds()
    full = baseline * total_steps + validation + (saved or 0.0)
    return Speedup(
        cheaper_steps=Saving(baseline * steps / run, baseline * steps - run),
        steps_not_run=StepsNotRun(ratio, baseline * not_run, not_run),
        validation_not_run=validation_not_run,
        against_same_length=baseline * steps / run,
        against_full_schedule=full / (run + validation),
        margin=clock.baseline_margin(),
    )
