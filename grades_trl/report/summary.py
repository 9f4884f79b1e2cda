"""What came of a run, as typed objects: the files, the page, the console and W&B all read the same ones."""

from __future__ import annotations

import textwrap
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from grades_trl.events import SettingChange
from grades_trl.model.matrices import WeightMatrix
from grades_trl.report.environment import Environment
from grades_trl.report.strict_json import jsonable
from grades_trl.report.timing import Evaluation, RunClock, Seconds, Speedup
from grades_trl.wording import counted

FINISHED, DATA_ENDED, EARLY_STOPPING = "schedule finished", "data ended", "early stopping"
INTERRUPTED = "interrupted"  # by a signal


@dataclass(frozen=True)
class CacheSummary:
    """
    What a cache of outputs of frozen layers did since the run began, or was resumed.

    Attributes:
        hits (`int`), misses (`int`): training passes that were read from it, and that were computed.
        mib (`float`): MiB of CPU memory that it held, at most.
        saved_seconds (`float`): the median time of a computed forward pass of these layers, times the hits. What
            hashing and copying take is not deducted.
        off (`str`): why it was off in the end; empty if it was on.
    """

    hits: int
    misses: int
    mib: float
    saved_seconds: float
    off: str


@dataclass
class Outcome:
    """
    How a run ended: the facts that only the trainer knows.

    Attributes:
        frozen (`dict[str, int]`): matrix -> optimizer step at which it was frozen.
        stop_reason (`str`): see [`stop_reason`].
        weights (`str`): what the model has now: `"last"`, `"best average"` or `"best checkpoint"`.
        steps (`int`): optimizer steps that were run.
        setting_changes (`list[SettingChange]`): settings that differ from those that the run began with.
        diverged_at (`int` or `None`): the step at which the loss was no longer finite.
        losses_not_finite (`int`): optimizer steps whose loss was no finite number.
        skipped_updates (`int`): optimizer steps whose update the loss scaler of fp16 skipped, after an overflow.
        without_gradient (`int`): tracked matrices that no gradient ever reached.
        untracked_parameters (`int`): trained elements outside the tracked matrices.
        heldout_examples (`int`): examples of one held-out measurement; 0 if there is none.
        heldout_every (`int` or `None`): optimizer steps from one held-out measurement to the next.
        heldout_metric (`str`): what the held-out score is: `"loss"`, `"token_accuracy"` or `"exact_match"`.
        best_step (`int` or `None`), best_score (`float` or `None`): the best held-out measurement.
        caches (`dict[str, CacheSummary]`): `"encoder"` and `"frozen_layers"`, those that were used.
    """

    frozen: dict[str, int]
    stop_reason: str
    weights: str
    steps: int
    setting_changes: list[SettingChange] = field(default_factory=list)
    diverged_at: int | None = None
    losses_not_finite: int = 0
    skipped_updates: int = 0
    without_gradient: int = 0
    untracked_parameters: int = 0
    heldout_examples: int = 0
    heldout_every: int | None = None
    heldout_metric: str = "loss"
    best_step: int | None = None
    best_score: float | None = None
    caches: dict[str, CacheSummary] = field(default_factory=dict)


@dataclass(frozen=True)
class TowerCount:
    """Tracked and frozen matrices of one tower."""

    matrices: int
    frozen: int


@dataclass(frozen=True)
class SkippedLayers:
    """From optimizer step `step` on: path of a layer list -> number of its leading layers that backward skips."""

    step: int
    layers: dict[str, int]


@dataclass(frozen=True)
class Overhead:
    """What GradES took: milliseconds per optimizer step, and as a fraction of training; `None` without steps."""

    ms_per_step: float | None
    fraction: float | None


@dataclass(frozen=True)
class Flops:
    """
    FLOPs in the tracked layers, see `flops.py`.

    Attributes:
        run (`float` or `None`): of the run, held-out measurements included, without the forward passes whose outputs
            were read from a cache. `None` if no tokens could be counted.
        baseline_same_length (`float` or `None`), baseline_full_schedule (`float` or `None`): of a baseline.
        fraction (`float` or `None`): of the baseline over the full schedule, also where tokens could not be counted.
            `None` if the run diverged.
    """

    run: float | None
    baseline_same_length: float | None
    baseline_full_schedule: float | None
    fraction: float | None


@dataclass(frozen=True)
class Heldout:
    """
    The held-out measurements of a run.

    Attributes:
        metric (`str`): what was measured: `"loss"`, `"token_accuracy"` or `"exact_match"`.
        examples (`int`): of one measurement.
        every (`int` or `None`): optimizer steps from one to the next.
        measurements (`int`): how many there were.
        passes_per_training_example (`float` or `None`): their cost, in forward passes of an example.
        best_step (`int` or `None`), best_score (`float` or `None`): the best one.
    """

    metric: str
    examples: int
    every: int | None
    measurements: int
    passes_per_training_example: float | None
    best_step: int | None
    best_score: float | None

    @property
    def metric_in_words(self) -> str:
        return self.metric.replace("_", " ")


@dataclass(frozen=True)
class GainShare:
    """
    What a layer or a tower could gain, and what it costs.

    Attributes:
        gain (`float` or `None`): fraction of the gain of all layers. `None` if that is not above 0.
        error (`float` or `None`): its standard error, from step to step.
        cost (`float`): fraction of the FLOPs of the same steps, see `flops.py`.
    """

    gain: float | None
    error: float | None
    cost: float


@dataclass(frozen=True)
class GainSummary:
    """
    Where the gain is: the share of each layer in the squared gradient of the training loss, that is how fast its
    weights could bring the loss down.

    Attributes:
        steps (`int`): measured steps: all in the first fifth of a run, later one in ten or fewer, see `GainMeter`.
        total (`float`): the sum of their gains, all layers together. Not above 0 if the gradients of consecutive
            batches do not agree.
        towers (`dict[str, GainShare]`), layers (`dict[str, GainShare]`): their shares, from input to output.
    """

    steps: int
    total: float
    towers: dict[str, GainShare]
    layers: dict[str, GainShare]

    def __str__(self) -> str:
        """Whether parts pay for themselves, in one sentence."""
        over = "in the one step measured" if self.steps == 1 else f"over the {self.steps:,} steps measured"
        if self.total <= 0:
            return f"No layer has a share of the gain: the gradients of consecutive batches do not agree, {over}."
        if len(self.towers) > 1:
            parts = {f"the {tower}{'' if tower == 'projector' else ' tower'}": s for tower, s in self.towers.items()}
            told = [f"{part} has {_shares(share.gain, share.cost, share.error)}" for part, share in parts.items()]
        else:
            layers, half = list(self.layers.values()), len(self.layers) // 2
            if half == 0:
                return f"One layer has all of the gain, {over}."
            gain, cost = sum(s.gain or 0.0 for s in layers[:half]), sum(s.cost for s in layers[:half])
            first = "the first" if half == 1 else f"the first {half}"
            told = [f"{first} of {len(layers)} layers {'has' if half == 1 else 'have'} {_shares(gain, cost)}"]
        text = "; ".join(told)
        return f"{text[0].upper()}{text[1:]}, {over}."


@dataclass
class RunSummary:
    """
    A run with GradES: `summary.json`.

    Attributes:
        environment (`Environment`): model, device, versions.
        metric (`str`): what was measured of the matrices.
        settings (`dict[str, Any]`): of GradES, at the end.
        setting_changes (`list[SettingChange]`): those of them that the run, resumed, did not begin with.
        steps (`int`), total_steps (`int`): optimizer steps that were run, and of the schedule.
        stop_reason (`str`), diverged_at (`int` or `None`), weights (`str`): as in [`Outcome`].
        tracked_matrices (`int`), frozen (`int`), without_gradient (`int`): all tracked matrices, those of them that
            were frozen, and those that no gradient ever reached.
        tracked_parameters (`int`), untracked_parameters (`int`): trained elements inside and outside of them.
        towers (`dict[str, TowerCount]`): tower -> its matrices.
        skipped_layers (`list[SkippedLayers]`): in which layers backward was saved, in order of the steps.
        speedup (`Speedup`), overhead (`Overhead`), seconds (`Seconds`): measured. Nothing is, if the run diverged.
        flops (`Flops`): predicted.
        heldout (`Heldout` or `None`): the held-out measurements, if there were any.
        caches (`dict[str, CacheSummary]`): outputs of frozen layers that were read from memory or disk: of the
            `"encoder"`, and of the leading `"frozen_layers"` of the language tower. Only those that were used.
        peak_memory_mib (`float` or `None`): of training.
        gain (`GainSummary` or `None`): which layers have the gain, if any step was measured.
        losses_not_finite (`int`), skipped_updates (`int`): as in [`Outcome`].
        results (`dict[str, float]`): the final scores, once they are known, and with `rows/` before the name of one,
            how many rows it is of.
    """

    environment: Environment
    metric: str
    settings: dict[str, Any]
    steps: int
    total_steps: int
    stop_reason: str
    diverged_at: int | None
    weights: str
    tracked_matrices: int
    frozen: int
    without_gradient: int
    tracked_parameters: int
    untracked_parameters: int
    towers: dict[str, TowerCount]
    skipped_layers: list[SkippedLayers]
    speedup: Speedup
    overhead: Overhead
    seconds: Seconds
    flops: Flops
    heldout: Heldout | None
    peak_memory_mib: float | None
    gain: GainSummary | None = None
    results: dict[str, float] = field(default_factory=dict)
    caches: dict[str, CacheSummary] = field(default_factory=dict)
    setting_changes: list[SettingChange] = field(default_factory=list)
    losses_not_finite: int = 0
    skipped_updates: int = 0

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON knows it: a number that is not finite is `None`."""
        return jsonable(asdict(self))


@dataclass
class RunResult:
    """
    A run with GradES or without, for comparisons: `result.json`.

    Attributes:
        id (`str`): random, new with every run: tells a result from one that another process left in the same place.
        steps (`int`), total_steps (`int`), stop_reason (`str`), diverged_at (`int` or `None`): how it ended.
        seconds (`Seconds`): where they went.
        flops (`float` or `None`): in the tracked layers, as a fraction of a baseline over the full schedule.
        validation (`list[Evaluation]`): the validations during training.
        results (`dict[str, float]`): the final scores, and with `rows/` before the name of one, how many rows it is
            of.
        peak_memory_mib (`float` or `None`): of training.
        warmup_steps (`float`): of the learning rate, as the trainer was given it.
        environment (`Environment`): model, device, versions.
        argv (`list[str]`): the command line.
        scored_with (`dict[str, Any]`): the settings that the scores depend on.
        frozen (`int`): matrices frozen; 0 without GradES.
        tracked (`list[dict[str, Any]]`): `matrix`, `layer`, `role`, `tower` and `params` of all tracked matrices, in
            the keys of a freeze event; empty without GradES.
    """

    id: str
    steps: int
    total_steps: int
    stop_reason: str
    diverged_at: int | None
    seconds: Seconds
    flops: float | None
    validation: list[Evaluation]
    results: dict[str, float]
    peak_memory_mib: float | None
    warmup_steps: float
    environment: Environment
    argv: list[str]
    scored_with: dict[str, Any]
    frozen: int
    tracked: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON knows it: a number that is not finite is `None`."""
        return jsonable(asdict(self))


def run_result(
    summary: RunSummary | None,
    clock: RunClock,
    *,
    steps: int,
    total_steps: int,
    environment: Environment,
    scores: dict[str, float],
    warmup_steps: float,
    argv: Sequence[str],
    scored_with: dict[str, Any],
    matrices: Iterable[WeightMatrix] = (),
    diverged_at: int | None = None,
) -> RunResult:
    """
    What `result.json` holds. Where there is a summary, both say the same: its facts are taken from there.

    Args:
        summary (`RunSummary` or `None`): of a run with GradES.
        clock (`RunClock`): of the run.
        steps (`int`), total_steps (`int`): `state.global_step` and `state.max_steps` of the trainer.
        environment (`Environment`): gathered before training.
        scores (`dict[str, float]`): the final ones.
        warmup_steps (`float`), argv (`Sequence[str]`), scored_with (`dict`): see [`RunResult`].
        matrices (`Iterable[WeightMatrix]`, *optional*): the tracked ones.
        diverged_at (`int`, *optional*): for a run without a summary, see [`Outcome`].
    """
    if summary is None:
        reason = stop_reason(clock, steps, total_steps)
        fraction = steps / (steps if reason == DATA_ENDED else total_steps) if steps else 0.0
        ended = (steps, total_steps, reason, diverged_at, clock.seconds)
        flops = None if diverged_at is not None else fraction
    else:
        ended = (summary.steps, summary.total_steps, summary.stop_reason, summary.diverged_at, summary.seconds)
        flops = summary.flops.fraction
    return RunResult(
        uuid.uuid4().hex,
        *ended,
        flops=flops,
        validation=clock.evaluations,
        results=dict(scores),
        peak_memory_mib=clock.peak_memory_mib if summary is None else summary.peak_memory_mib,
        warmup_steps=warmup_steps,
        environment=environment if summary is None else summary.environment,
        argv=list(argv),
        scored_with=dict(scored_with),
        frozen=0 if summary is None else summary.frozen,
        tracked=[
            {"matrix": m.name, "layer": m.layer, "role": m.role, "tower": m.tower, "params": m.params}
            for m in matrices
        ],
    )


def stop_reason(clock: RunClock, steps: int, total_steps: int, grades: str | None = None) -> str:
    """
    Names the reason why a run ended.

    Args:
        clock (`RunClock`): of the run.
        steps (`int`), total_steps (`int`): optimizer steps that were run, and of the schedule.
        grades (`str`, *optional*): why GradES ended the run, if it did, e.g. `"all matrices frozen"`.

    Returns:
        `str`: `grades`, else `"schedule finished"`, `"data ended"` (a streamed dataset had no more rows) or
        `"early stopping"` (a callback ended the run).
    """
    if grades is not None:
        return grades
    if steps >= total_steps:
        return FINISHED
    return DATA_ENDED if clock.data_ended else EARLY_STOPPING


def before_and_after(results: Mapping[str, float]) -> list[tuple[str, float | None, float | None]]:
    """Scores by their names, each before training (`before/x`) and after it (`final/x`, or `x` alone)."""
    scores = [key for key in results if not key.startswith("rows/")]
    names = dict.fromkeys(key.removeprefix("before/").removeprefix("final/") for key in scores)
    return [(name, results.get(f"before/{name}"), results.get(f"final/{name}", results.get(name))) for name in names]


def format_score(name: str, number: float) -> str:
    """A loss or perplexity as it is, all else in percent."""
    is_fraction = not any(word in name for word in ("loss", "perplexity"))
    return f"{100 * number:.1f} %" if is_fraction and abs(number) <= 10 else f"{number:.4g}"


def rows_of(results: Mapping[str, float]) -> dict[str, int]:
    """How many rows each score is of, by its name: `rows/x`, where it is known."""
    return {key.removeprefix("rows/"): int(count) for key, count in results.items() if key.startswith("rows/")}


def format_summary(summary: RunSummary) -> str:
    """A run in a few lines for the console, in ASCII and 80 columns. What could not be measured says so."""
    speedup, seconds, heldout = summary.speedup, summary.seconds, summary.heldout
    never = f" ({summary.without_gradient} never got a gradient)" if summary.without_gradient else ""
    rows = [
        ("weights", _weights(summary)),
        ("frozen", f"{summary.frozen} of {summary.tracked_matrices} matrices{never}"),
        (
            "time",
            f"{seconds.total:.1f} s: training {seconds.training:.1f}, GradES {seconds.grades:.1f}, "
            f"validation {seconds.validation:.1f}, saving {seconds.saving:.1f}",
        ),
    ]
    if summary.diverged_at is not None:
        rows.append(("", f"It diverged at step {summary.diverged_at}: nothing about its speed means anything."))
    else:
        flops = summary.flops.fraction
        rows.append(("speed-up", speedup_in_words(speedup)))
        if flops is not None:
            rows.append(("FLOPs", f"{100 * flops:.0f} % of the whole schedule's"))
    if heldout is not None:
        cost = heldout.passes_per_training_example
        share = "" if cost is None else f", {100 * cost:.1f} % of the training examples, forward only"
        rows.append(
            (
                "held-out",
                f"{counted(heldout.measurements, 'measurement')} of {counted(heldout.examples, 'example')}{share}",
            )
        )
    for name, label in (("encoder", "vision tower"), ("frozen_layers", "frozen layers")):
        if name in summary.caches:
            rows.append(("cache", f"{label}: {_cached(summary.caches[name])}"))
    if summary.gain is not None:
        rows.append(("gain", str(summary.gain)))
    rows += [("settings", str(change)) for change in summary.setting_changes]
    if summary.losses_not_finite:
        rows.append(("numbers", f"the loss of {counted(summary.losses_not_finite, 'step')} was no finite number"))
    if summary.skipped_updates:
        skipped = counted(summary.skipped_updates, "update was", "updates were")
        rows.append(("numbers", f"{skipped} skipped: gradients overflowed in fp16"))
    memory = "not measured" if summary.peak_memory_mib is None else f"{summary.peak_memory_mib:,.0f} MiB"
    rows.append(("memory", f"{memory} at most, on {summary.environment.device}"))
    lines = [f"GradES: {summary.steps:,} of {counted(summary.total_steps, 'step')}; {summary.stop_reason}"]
    for label, text in rows:
        lines += textwrap.wrap(text, 80, initial_indent=f"  {label:<10}", subsequent_indent=" " * 12)
    return "\n".join(lines)


def speedup_in_words(speedup: Speedup) -> str:
    """How many times faster than the whole schedule, how sure that is, and by what, with the seconds saved."""
    cheaper, not_run = speedup.cheaper_steps, speedup.steps_not_run
    if cheaper.ratio is None or not speedup.in_words:
        also = f"; {counted(not_run.steps, 'step was', 'steps were')} not run" if not_run.steps else ""
        return f"not measurable: steps before the first freeze are too few, or vary too much{also}"
    parts = [f"steps {cheaper.ratio:.2f}x as fast{_saved(cheaper)}"]
    if not_run.steps:
        parts.append(f"{counted(not_run.steps, 'step')} not run{_saved(not_run)}")
    if speedup.validation_not_run.evaluations:
        parts.append(f"validation not run{_saved(speedup.validation_not_run)}")
    return f"{speedup.in_words} against the whole schedule: {', '.join(parts)}"


def _saved(part: Any) -> str:
    return "" if part.seconds_saved is None else f" ({part.seconds_saved:.1f} s)"


def format_ending(summary: RunSummary) -> str:
    """When and why a run ended, and which weights the model has, in one line."""
    return (
        f"The run ended after step {summary.steps} of {summary.total_steps}: {summary.stop_reason}. Weights of the "
        f"model: {_weights(summary)}."
    )


def _shares(gain: float | None, cost: float, error: float | None = None) -> str:
    unsure = "" if error is None else f" (+/- {100 * error:.0f})"
    return f"{100 * (gain or 0.0):.0f} %{unsure} of the gain for {100 * cost:.0f} % of the FLOPs"


def _cached(cache: CacheSummary) -> str:
    if cache.off:
        return f"off: {cache.off}"
    passes = counted(cache.hits + cache.misses, "pass", "passes")
    return f"{cache.hits:,} of {passes} read, {cache.mib:,.0f} MiB, {cache.saved_seconds:+.1f} s"


def _weights(summary: RunSummary) -> str:
    if summary.weights != "best average" or summary.heldout is None or summary.heldout.best_score is None:
        return summary.weights
    heldout = summary.heldout
    return f"best average, of step {heldout.best_step}: held-out {heldout.metric_in_words} {heldout.best_score:.4f}"
