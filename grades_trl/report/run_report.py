"""The report of one run with GradES: the one object that a trainer holds for all that people get to see."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from grades_trl.distributed import gathered_objects, is_main
from grades_trl.events import FreezeEvent
from grades_trl.extras import how_to_install, installed
from grades_trl.model.flops import TokenCounter, forward_flops, read_flops, step_flops
from grades_trl.model.matrices import WeightMatrix, layers_in_order
from grades_trl.report import page
from grades_trl.report.disk import tolerated
from grades_trl.report.environment import Environment
from grades_trl.report.gain import GainTable
from grades_trl.report.history import RunHistory
from grades_trl.report.recipe_facts import RecipeFacts
from grades_trl.report.strict_json import write_json
from grades_trl.report.summary import (
    DATA_ENDED,
    Flops,
    Heldout,
    Outcome,
    Overhead,
    RunSummary,
    SkippedLayers,
    TowerCount,
)
from grades_trl.report.timing import RunClock, Speedup, speedup
from grades_trl.report.tracking import Tracker

if installed("matplotlib"):
    from grades_trl.report import figure, heatmap

logger = logging.getLogger(__name__)

# Freezes come in clusters: W&B gets a new figure when that much more of the model has frozen, as long as figures have
# taken no more than that fraction of the run. The first one takes 1.5 s of a core, to load matplotlib and its fonts,
# and later ones half a second: a run of a minute gets its figure at its end alone, when no clock runs.
FIGURE_EVERY, FIGURE_COST, FIRST_FIGURE_SECONDS = 0.05, 0.02, 1.5


class RunReport:
    """
    Takes in what happens in a run and tells it: scalars while it trains, files and W&B at its end.

    Args:
        directory (`str`, `Path` or `None`): where the files go; made if missing. `None` in a process that writes none:
            of several, the main one does.
        matrices (`dict[str, WeightMatrix]`): the tracked matrices by name.
        total_steps (`int`): optimizer steps in the full schedule.
        others (`Collection[WeightMatrix]`, *optional*): the weights of the layers that do not train.
        metric (`str`): what is measured of the matrices.
        settings (`dict[str, Any]`): of GradES; for the summary and W&B.
        grace_steps (`int`): optimizer steps during which nothing may freeze.
        environment (`Environment`): gathered before training.
        clock (`RunClock`): among the callbacks of the trainer.
        checkpointing (`bool`): whether gradient checkpointing is on.
        resume_step (`int`, *optional*, defaults to `0`): the optimizer step that a checkpoint resumes after. Call
            `load_state_dict` too.
        tracker (`Tracker`, *optional*): the W&B run of the trainer. By default there is none.
    """

    def __init__(
        self,
        directory: str | Path | None,
        matrices: dict[str, WeightMatrix],
        total_steps: int,
        *,
        others: Collection[WeightMatrix] = (),
        metric: str,
        settings: dict[str, Any],
        grace_steps: int,
        environment: Environment,
        clock: RunClock,
        checkpointing: bool,
        resume_step: int = 0,
        tracker: Tracker | None = None,
    ):
        self.directory = None if directory is None else Path(directory)
        self.clock = clock
        self._history = RunHistory(directory, matrices, total_steps, metric, grace_steps, resume_step)
        self._matrices = matrices
        self._others = list(others)
        self._settings = settings
        self._environment = environment
        self._checkpointing = checkpointing
        self._tracker = tracker or Tracker()
        self._tokens = TokenCounter()
        self._frozen: list[str] = []  # in order
        # Where the cost of a step changed: after that step, so many of `_frozen`, and the layers that backward skips.
        self._states: list[dict[str, Any]] = []
        self._unlogged: dict[str, float] = {}  # not every measurement is in a step that is logged
        self._heldout_scores: dict[str, float] = {}  # since the last log, by their keys
        self._heldout_measurements = 0
        self._heldout_passes = 0.0  # forward passes of an example, of all measurements
        self._share_in_figure, self._figure_seconds = 0.0, 0.0
        self._said_no_figures = False
        self._in_wandb = False
        self._reads_caches = 0
        self.facts = RecipeFacts()  # a recipe fills it in before it writes the report again
        self._tracker.log_config({"grades": settings})

    # ---- while it trains ----

    def count_batch(self, inputs: dict[str, Any], model_config: Any) -> None:
        """Adds the tokens of one training micro-batch, see [`TokenCounter`].

        Args:
            inputs (`dict`): what the collator made.
            model_config: the config of the model; `None` for a plain module.
        """
        self._tokens.add(inputs, model_config)

    def count_read(self, layers: dict[str, int]) -> None:
        """The training pass of the last micro-batch has read outputs of frozen layers from a cache. Call it after the
        pass.

        Args:
            layers (`dict[str, int]`): path of a layer list -> number of its leading layers that were not computed.
        """
        self._tokens.add_read(layers, {m.stack: m.tower for m in self._all_matrices})

    def tokens_per_batch(self) -> dict[str, float] | None:
        """Tower -> mean tokens of a training micro-batch so far, of all processes, which all call this; `None` if none
        could be counted."""
        return self._tokens_of_all().per_batch()

    def add_up_tokens(self) -> None:
        """Takes in the tokens of the other processes, which all call this: training is over."""
        self._tokens = self._tokens_of_all()

    def _tokens_of_all(self) -> TokenCounter:
        total = TokenCounter()
        for state in gathered_objects(self._tokens.state_dict()):
            total.add_state(state)
        return total

    @property
    def experts_per_token(self) -> float | None:
        """Experts that a token passes through, as the model's config says."""
        return self._tokens.experts_per_token

    def record(
        self,
        step: int,
        events: list[FreezeEvent],
        values: dict[str, float],
        skipped_layers: dict[str, int],
        gains: dict[str, float] | None = None,
        reads_caches: int = 0,
        probing: bool = False,
    ) -> None:
        """
        Takes in one optimizer step. Call it in the step, after the freezes and before the update.

        It tells the clock about freezes, and counts the time of a figure for W&B as GradES's own.

        Args:
            step (`int`): optimizer step, counted from 1.
            events (`list[FreezeEvent]`): what froze in this step, or trains again from the next one on.
            values (`dict[str, float]`): the metric of each matrix that was measured in this step.
            skipped_layers (`dict[str, int]`): path of a layer list -> number of its leading layers that backward skips
                from the next step on.
            gains (`dict[str, float]`, *optional*): the gain of each layer, if it was measured in this step.
            reads_caches (`int`, *optional*, defaults to `0`): how many caches the outputs of frozen layers are read
                from.
            probing (`bool`, *optional*, defaults to `False`): the gradients of what is frozen are computed in the next
                step, which costs as much as one with nothing frozen.

        Raises:
            `KeyError`: an event or a value names an unknown matrix.
        """
        self._history.record(step, events, values, gains)
        self._unlogged |= values
        unfrozen = {event.matrix for event in events if event.unfrozen}
        self._frozen = [name for name in self._frozen if name not in unfrozen]
        self._frozen += [event.matrix for event in events if not event.unfrozen]
        before = self._skipped_layers
        if probing:
            skipped_layers = {}
        if events or skipped_layers != before:
            frozen = [] if probing else list(self._frozen)
            self._states.append({"step": step, "frozen": frozen, "layers": dict(skipped_layers)})
        # Layers that are skipped although nothing has been frozen yet are frozen by the user, in the baseline as well.
        changed = events or skipped_layers != before
        if (changed and self._frozen) or reads_caches > self._reads_caches:
            self.clock.note_freeze(step)
        self._reads_caches = reads_caches
        share = len(self._frozen) / len(self._matrices)
        if self._tracker.is_on and share - self._share_in_figure >= FIGURE_EVERY and self._may_draw():
            start = time.perf_counter()
            with self.clock.overhead():
                timeline = self._drawn(lambda: figure.draw(self._history))
                gain = self._drawn(lambda: heatmap.draw(self._gain_table())) if self._history.gains else None
                for key, image in (("grades/timeline", timeline), ("grades/gain_heatmap", gain)):
                    if image is not None:
                        self._tracker.log_image(key, image, step)
            self._share_in_figure = share
            self._figure_seconds += time.perf_counter() - start

    def record_heldout(self, metric: str, score: float, passes: float) -> None:
        """Takes in one held-out measurement.

        Args:
            metric (`str`): what the score is, e.g. `"loss"`.
            score (`float`): of the examples.
            passes (`float`): forward passes of an example that it took.
        """
        self._history.record_heldout(metric, score)
        self._tracker.log_heldout(metric, score, self._history.step)
        self._heldout_scores[f"heldout_{metric}"] = score
        self._heldout_measurements += 1
        self._heldout_passes += passes

    def logs(self) -> dict[str, float]:
        """
        The scalars of the run, for `trainer.log`. What cannot be told yet is left out.

        Returns:
            `dict[str, float]`: under `grades/`:

            - `frozen_fraction`, `frozen_params_fraction`, `<tower>/frozen_fraction`: of the tracked matrices, of their
              trained parameters, of those in a tower;
            - `<tower>/backward_skipped_layers`: leading layers of a tower that backward skips;
            - `<tower>/metric`: mean of the last values of the matrices of a tower that were measured since the last
              call; by matrix it is in `history.parquet`, by role on the page;
            - `heldout_loss`, `heldout_token_accuracy` or `heldout_exact_match`: the last one since the last call;
            - `step_time`: seconds of a recent step; `overhead_ms`: of it, what GradES takes;
            - `step_speedup`: measured, baseline step over recent step; `step_speedup_predicted`: from FLOPs,
              without what caches save.
        """
        matrices, frozen = self._matrices, set(self._frozen)
        logs = {
            "frozen_fraction": len(frozen) / len(matrices),
            "frozen_params_fraction": sum(matrices[name].params for name in frozen) / self._tracked_parameters,
        }
        tokens = self._tokens.per_batch()
        baseline = self._flops(tokens)
        if baseline > 0:  # not so if only the vision tower trains and no image has come yet
            logs["step_speedup_predicted"] = baseline / self._flops(tokens, frozen, self._skipped_layers)
        seconds, overhead = self.clock.recent_step_seconds(), self.clock.recent_overhead_seconds()
        speedup = self.clock.step_speedup()
        if seconds is not None and overhead is not None:
            logs |= {"step_time": seconds, "overhead_ms": 1e3 * overhead}
        if speedup is not None:
            logs["step_speedup"] = speedup
        for tower, count in self._towers(frozen).items():
            stacks = {m.stack for m in matrices.values() if m.tower == tower}
            skipped = sum(self._skipped_layers.get(stack, 0) for stack in stacks)
            logs |= {
                f"{tower}/frozen_fraction": count.frozen / count.matrices,
                f"{tower}/backward_skipped_layers": float(skipped),
            }
        logs |= self._heldout_scores
        by_tower: dict[str, list[float]] = {}
        for name, value in self._unlogged.items():
            by_tower.setdefault(f"{matrices[name].tower}/metric", []).append(value)
        logs |= {key: statistics.fmean(values) for key, values in by_tower.items()}
        self._unlogged, self._heldout_scores = {}, {}
        return {f"grades/{key}": value for key, value in logs.items()}

    def console_line(self, step: int, events: list[FreezeEvent]) -> str:
        """What froze in a step, or trains again, and why, in one line."""
        verb = "training again" if events[0].unfrozen else "froze"
        why = f" ({events[0].reason})" if events[0].tau is None else ""
        what = self._history.in_words(events)
        return f"step {step}: {verb} {what}{why}; {len(self._frozen)} of {len(self._matrices)} frozen"

    def record_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        """Keeps what the trainer logs in `metrics.jsonl`.

        Args:
            step (`int`): optimizer step.
            metrics (`dict[str, Any]`): by their keys.
        """
        self._history.record_metrics(step, metrics)

    # ---- its end ----

    def summarize(self, outcome: Outcome) -> RunSummary:
        """What came of the run. Call it when all that GradES does has been done and is on the clock.

        Args:
            outcome (`Outcome`): what only the trainer knows.
        """
        diverged = outcome.diverged_at is not None
        # A schedule longer than the data is no saving.
        schedule = outcome.steps if outcome.stop_reason == DATA_ENDED else self._history.total_steps
        seconds, frozen = self.clock.seconds, set(outcome.frozen)
        busy = seconds.training + seconds.grades
        measured = outcome.steps > 0 and not diverged
        return RunSummary(
            environment=self._environment,
            metric=self._history.metric,
            settings=self._settings,
            steps=outcome.steps,
            total_steps=self._history.total_steps,
            stop_reason=outcome.stop_reason,
            diverged_at=outcome.diverged_at,
            weights=outcome.weights,
            tracked_matrices=len(self._matrices),
            frozen=len(frozen),
            without_gradient=outcome.without_gradient,
            tracked_parameters=self._tracked_parameters,
            untracked_parameters=outcome.untracked_parameters,
            towers=self._towers(frozen),
            skipped_layers=[SkippedLayers(s["step"], s["layers"]) for s in self._states if s["layers"]],
            speedup=speedup(self.clock, schedule) if measured else Speedup(),
            overhead=Overhead(
                1e3 * seconds.grades / outcome.steps if measured else None,
                seconds.grades / busy if measured and busy > 0 else None,
            ),
            seconds=seconds,
            flops=self._flops_of_run(outcome.steps, schedule, diverged),
            heldout=self._heldout(outcome),
            peak_memory_mib=self.clock.peak_memory_mib,
            gain=self._gain_table().summary(),
            caches=outcome.caches,
            setting_changes=outcome.setting_changes,
            losses_not_finite=outcome.losses_not_finite,
            skipped_updates=outcome.skipped_updates,
        )

    def write(self, summary: RunSummary) -> None:
        """Writes `history.parquet`, `gain.parquet`, `summary.json`, `timeline.png`, `gain.png` (if it was measured)
        and `report.html`, and the same to W&B. Without matplotlib there are no figures, and one line says so. Call it
        again after something was added to the summary."""
        if self.directory is None:
            return
        self.flush()
        files = self.directory
        with self._tolerated("summary.json"):
            write_json(files / "summary.json", summary.to_json())
        png = gain = None
        if installed("matplotlib"):
            png = self._drawn(lambda: figure.draw(self._history))
            gain = self._drawn(lambda: heatmap.draw(self._gain_table())) if self._history.gains else None
        elif not self._said_no_figures:
            self._said_no_figures = True
            logger.warning(f"The report has no figures, which need matplotlib: {how_to_install('matplotlib')}.")
        for name, image in (("timeline.png", png), ("gain.png", gain)):
            if image is not None:
                with self._tolerated(name):
                    (files / name).write_bytes(image)
        evaluations = self.clock.evaluations
        text = page.build(self._history, summary, png, gain, evaluations=evaluations, facts=self.facts)
        with self._tolerated("report.html"):
            (files / "report.html").write_text(text, encoding="utf-8")
        if self._tracker.is_on and not self._in_wandb:
            self._in_wandb = True
            step = self._history.step
            self._tracker.log_table("grades/matrices", *self._history.table(), step)
            self._tracker.log_table("grades/events", *self._history.event_table(), step)
            if png is not None:
                self._tracker.log_image("grades/timeline", png, step)
            if gain is not None:
                self._tracker.log_image("grades/gain_heatmap", gain, step)
        self._tracker.log_summary(summary.to_json())
        self._tracker.log_report(self.directory)

    def flush(self) -> None:
        """Writes `history.parquet` and `gain.parquet`."""
        self._history.flush()

    def save(self, folder: Path) -> None:
        """Writes them, and copies the record so far into a folder of a checkpoint, see [`history.restore_record`]."""
        self._history.flush()
        self._history.save(folder)

    # ---- resuming ----

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; of all processes, which all call this. The clock has a state of its own; freeze events and
        history are files, see `save`."""
        return {
            "frozen": self._frozen,
            "states": self._states,
            "tokens": self._tokens_of_all().state_dict(),
            "unlogged": self._unlogged,
            "heldout_scores": self._heldout_scores,
            "heldout_measurements": self._heldout_measurements,
            "heldout_passes": self._heldout_passes,
            "share_in_figure": self._share_in_figure,
            "figure_seconds": self._figure_seconds,
            "measurements": self._history.measurements,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the report of a checkpoint was."""
        self._frozen, self._states = list(state["frozen"]), list(state["states"])
        if is_main():  # it has those of all
            self._tokens.load_state_dict(state["tokens"])
        self._unlogged, self._heldout_scores = dict(state["unlogged"]), dict(state["heldout_scores"])
        self._heldout_measurements = state["heldout_measurements"]
        self._heldout_passes = state["heldout_passes"]
        self._share_in_figure, self._figure_seconds = state["share_in_figure"], state["figure_seconds"]
        self._history.measurements = state["measurements"]

    # ---- inside ----

    @property
    def _skipped_layers(self) -> dict[str, int]:
        return self._states[-1]["layers"] if self._states else {}

    @property
    def _tracked_parameters(self) -> int:
        return sum(matrix.params for matrix in self._matrices.values())

    def _may_draw(self) -> bool:
        cost = max(self._figure_seconds, FIRST_FIGURE_SECONDS)
        return installed("matplotlib") and cost <= FIGURE_COST * self.clock.seconds.total

    def _towers(self, frozen: set[str]) -> dict[str, TowerCount]:
        towers: dict[str, list[bool]] = {}
        for name, matrix in self._matrices.items():
            towers.setdefault(matrix.tower, []).append(name in frozen)
        return {tower: TowerCount(len(members), sum(members)) for tower, members in towers.items()}

    def _flops(
        self,
        tokens: dict[str, float] | None,
        frozen: Any = (),
        skipped_layers: dict[str, int] | None = None,
        matrices: Collection[WeightMatrix] | None = None,
    ) -> float:
        return step_flops(
            self._all_matrices if matrices is None else matrices,
            frozen={*frozen, *(matrix.name for matrix in self._others)},
            skipped_layers=self._skipped_by_choice if skipped_layers is None else skipped_layers,
            tokens=tokens,
            checkpointing=self._checkpointing,
            experts_per_token=self._tokens.experts_per_token,
        )

    @property
    def _all_matrices(self) -> list[WeightMatrix]:
        return [*self._matrices.values(), *self._others]

    @property
    def _skipped_by_choice(self) -> dict[str, int]:
        """Leading layers that backward skips although nothing has been frozen: they do not train in the baseline."""
        return next((state["layers"] for state in self._states if not state["frozen"]), {})

    def _tolerated(self, name: str) -> AbstractContextManager[None]:
        return tolerated((self.directory or Path()) / name, self._history.said)

    def _drawn(self, draw: Callable[[], Any]) -> bytes | None:
        """A figure as PNG; `None`, and one line says so, if it cannot be drawn: no run ends for that."""
        try:
            return figure.render(draw())
        except Exception as error:
            if not self._said_no_figures:
                self._said_no_figures = True
                logger.warning(f"A figure could not be drawn ({type(error).__name__}: {error}). All else goes on.")
            return None

    def _gain_table(self) -> GainTable:
        """The gain of every measured step, and what each layer cost in it."""
        layers, gains = layers_in_order(self._matrices), self._history.gains
        tokens = self._tokens.per_batch()
        towers = {layers[layer][0].tower for of_step in gains.values() for layer in of_step}
        if tokens is not None and not all(tokens.get(tower) for tower in towers):
            tokens = None  # not all that trains could be counted: as many in each tower
        states = [{"step": 0, "frozen": [], "layers": {}}, *self._states]
        costs: dict[int, dict[str, float]] = {}  # number of the state -> layer -> FLOPs
        of_steps = []
        for step in gains:
            number = max(i for i, state in enumerate(states) if state["step"] < step)
            if number not in costs:
                frozen, skipped = set(states[number]["frozen"]), states[number]["layers"]
                costs[number] = {
                    layer: self._flops(tokens, frozen, skipped, members) for layer, members in layers.items()
                }
            of_steps.append(costs[number])
        frozen_at = {name: event.step for name, event in self._history.events.items()}
        return GainTable.of(layers, gains, of_steps, frozen_at)

    def _flops_of_run(self, steps: int, schedule: int, diverged: bool) -> Flops:
        """From the run is deducted what frozen layers save in backward, and the forward pass of those whose outputs
        were read from a cache; from a baseline nothing is. Held-out measurements are added."""
        per_batch = self._tokens.per_batch()
        tokens = None if per_batch is None else _times(per_batch, self._tokens.batches / max(1, steps))
        baseline = self._flops(tokens)
        run, start, cost = 0.0, 0, baseline
        for state in self._states:  # each holds for the steps after the one in which it was reached
            run += cost * (state["step"] - start)
            start, cost = state["step"], self._flops(tokens, set(state["frozen"]), state["layers"])
        run += cost * (steps - start)
        run -= read_flops(self._all_matrices, self._tokens.read, experts_per_token=self._tokens.experts_per_token)
        if per_batch is not None and self._heldout_passes:
            per_example = _times(per_batch, self._tokens.batches / self._tokens.examples)
            run += self._heldout_passes * forward_flops(
                self._all_matrices, tokens=per_example, experts_per_token=self._tokens.experts_per_token
            )
        full = baseline * schedule
        fraction = None if diverged or not full else run / full
        if tokens is None:
            return Flops(None, None, None, fraction)
        return Flops(run, baseline * steps, full, fraction)

    def _heldout(self, outcome: Outcome) -> Heldout | None:
        if outcome.heldout_every is None and not self._heldout_measurements:
            return None
        seen = self._tokens.examples
        best = outcome.best_score
        return Heldout(
            metric=outcome.heldout_metric,
            examples=outcome.heldout_examples,
            every=outcome.heldout_every,
            measurements=self._heldout_measurements,
            passes_per_training_example=self._heldout_passes / seen if seen else None,
            best_step=None if best is None else outcome.best_step,
            best_score=best,
        )


def _times(tokens: dict[str, float], factor: float) -> dict[str, float]:
    return {tower: factor * count for tower, count in tokens.items()}
