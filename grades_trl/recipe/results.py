"""After training: the model on disk, its scores, `result.json`, and what is shown on the terminal."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import sort_checkpoints
from trl import ModelConfig

from grades_trl.distributed import launched_processes
from grades_trl.recipe.arguments import RecipeArguments, scored_with
from grades_trl.recipe.bad_input import printable, training_begins
from grades_trl.recipe.bema import BEMA
from grades_trl.recipe.choice import ChoiceFlops
from grades_trl.recipe.comparison import RUN_ID, split_flags
from grades_trl.recipe.diverged import EndDiverged
from grades_trl.recipe.interrupt import EndOnSignal
from grades_trl.recipe.places import command_of, recipe_name
from grades_trl.recipe.record import command_line, public_argv, resolved_arguments
from grades_trl.recipe.scored import rows_scored
from grades_trl.recipe.warm_up import WarnOfLongWarmUp
from grades_trl.report import tracking
from grades_trl.report.disk import is_of_the_disk, tolerated
from grades_trl.report.environment import Environment
from grades_trl.report.recipe_facts import RecipeFacts, Sample, write_samples
from grades_trl.report.strict_json import write_json
from grades_trl.report.summary import before_and_after, format_score, format_summary, rows_of, run_result
from grades_trl.report.timing import RunClock
from grades_trl.report.tracking import Tracker, result_fields
from grades_trl.trainers.first_step import first_step_checked
from grades_trl.trainers.mixin import NothingLeftToTrain

logger = logging.getLogger(__name__)

# Flags that mean one run, and not those that it is compared with: these begin at step 0 and are not uploaded.
OF_ONE_RUN = (
    *("output_dir", "overwrite_output_dir", "seed", "grades", "run_name", "resume", "resume_from_checkpoint"),
    *("push_to_hub", "hub_model_id", "hub_token", "hub_strategy", "hub_private_repo", "hub_revision", "export"),
)


def train_and_save(trainer: Any, clock: RunClock, resume_from_checkpoint: str | None) -> None:
    """Trains, and saves the model as soon as it is trained: before anything that may fail, such as the callbacks of
    W&B, reports and scores. If the checkpoint is that of the last step, only what comes after it is done. A warm-up
    that is as long as the run is said first.

    Args:
        trainer: not trained yet.
        clock (`RunClock`): among its callbacks. It ends before the model is saved.
        resume_from_checkpoint (`str`, *optional*): as in the training arguments.

    Raises:
        SystemExit: SIGTERM or Ctrl-C has ended training; with how to resume it.
    """
    save_model, callbacks = _SaveModel(trainer, clock), trainer.callback_handler.callbacks
    callbacks.insert(0, save_model)
    tracking.GroupedWandbCallback.put_into(trainer)  # of a baseline too: no run ends for W&B
    callbacks.sort(key=lambda callback: not isinstance(callback, BEMA))  # which gives the model its weights first
    trainer.add_callback(_EndFinishedRun(trainer))
    trainer.add_callback(WarnOfLongWarmUp())
    with contextlib.ExitStack() as during_training:
        if trainer.grades_config is None:  # what a run with GradES does itself
            trainer.add_callback(_KeepClock(clock))
            watch = EndDiverged(trainer)
            trainer.add_callback(watch)
            during_training.enter_context(watch.watching())
            during_training.enter_context(first_step_checked(trainer))
        ending = EndOnSignal(trainer)
        trainer.add_callback(ending)
        during_training.enter_context(ending.handlers())
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    ending.exit_if_asked()


class _EndFinishedRun(TrainerCallback):
    """The Trainer would run one more step (5.17), and on after early stopping."""

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        stopped = any(
            isinstance(callback, EarlyStoppingCallback)
            and callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self._trainer.callback_handler.callbacks
        )
        self._trainer.nothing_left |= stopped or state.global_step >= state.max_steps

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self._trainer.nothing_left:
            raise NothingLeftToTrain


class _SaveModel(TrainerCallback):
    def __init__(self, trainer: Any, clock: RunClock):
        self._trainer, self._clock = trainer, clock

    def on_step_end(self, args, state, control, **kwargs):  # the first pass may refuse the model
        training_begins()

    def on_train_end(self, args, state, control, **kwargs):
        self._clock.on_train_end(args, state, control)
        try:
            self._trainer.save_model(_internal_call=True)  # without the upload of --push_to_hub, which may fail
        except Exception as error:
            if not is_of_the_disk(error):
                raise
            raise SystemExit(_not_saved(Path(args.output_dir), error)) from error


def _not_saved(output_dir: Path, error: Exception) -> str:
    """What to say of a model that did not fit on the disk; half a file is deleted."""
    torn = max((p for p in output_dir.glob("*") if p.is_file()), key=lambda p: p.stat().st_mtime, default=output_dir)
    if "model" in torn.name:
        torn.unlink()
    checkpoints = sort_checkpoints(str(output_dir))
    again = (
        f"run the same command with --resume auto, which goes on from {checkpoints[-1]}"
        if checkpoints
        else ("run the same command again, with --save_strategy steps")
    )
    return (
        f"The model is trained, and could not be saved: {torn} did not fit ({error}). Checkpoints are as they were. "
        f"Make room, and {again}."
    )


class _KeepClock(TrainerCallback):
    """Keeps the clock of a baseline in its checkpoints, as GradES does it: the seconds of a run that is resumed are
    those of all its steps."""

    KEY = "clock"  # among the states of callbacks in trainer_state.json

    def __init__(self, clock: RunClock):
        self._clock = clock

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step and self.KEY in state.stateful_callbacks:
            self._clock.load_state_dict(state.stateful_callbacks[self.KEY])

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:
            state.stateful_callbacks[self.KEY] = self._clock.state_dict()

    def on_evaluate(self, args, state, control, **kwargs):  # its seconds too; and it may be what decides to save
        state.stateful_callbacks[self.KEY] = self._clock.state_dict()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.on_step_end(args, state, control)


def final_eval(trainer: Any, test: Dataset) -> dict[str, float]:
    """Scores of the trained model: on the validation half, used for decisions, and on the test half.

    Returns:
        `dict`: `final/validation_loss`, and of the test half `final/test_loss` and `final/test_token_accuracy`.
            Of a run that has diverged, the losses are NaN. `rows/<score>` is the number of rows that a loss is of.

    Raises:
        SystemExit: no test example has a reply left within `max_length`.
    """
    if trainer.diverged_at is not None:
        return {"final/validation_loss": math.nan, "final/test_loss": math.nan}
    trainer.remove_callback(EarlyStoppingCallback)  # it would miss "eval_loss" in the scores of the test half
    # With it, the Trainer would score the rows of its first evaluation again, whatever it is given (5.17).
    trainer.args.dataloader_persistent_workers = False
    with rows_scored(trainer.model) as of_validation:
        validation = trainer.evaluate()
    with rows_scored(trainer.model) as of_test:
        scores = trainer.evaluate(test, metric_key_prefix="test")
    if "test_loss" not in scores:  # TRL drops examples without a reply, and evaluates none
        raise SystemExit(
            f"test: none of {len(test)} examples has a reply left within --max_length {trainer.args.max_length}. The "
            f"model is in {trainer.args.output_dir}: score it with recipes/evaluate.py and a larger --max_length."
        )
    results = {"final/validation_loss": validation["eval_loss"], "final/test_loss": scores["test_loss"]}
    results |= {"rows/validation_loss": of_validation.count, "rows/test_loss": of_test.count}
    if "eval_mean_token_accuracy" in scores:  # TRL's own prefix; Unsloth's loss does not have it
        results["final/test_token_accuracy"] = scores["eval_mean_token_accuracy"]
        results["rows/test_token_accuracy"] = of_test.count
    return results


def save_results(
    trainer: Any,
    clock: RunClock,
    environment: Environment,
    results: dict[str, float],
    recipe: RecipeArguments,
    model_args: ModelConfig,
    choice: ChoiceFlops,
    samples: Sequence[Sample] = (),
) -> None:
    """Writes `result.json` and the samples, and tells the report and the loggers.

    Args:
        trainer: after `train()`.
        clock (`RunClock`): was among its callbacks.
        environment (`Environment`): gathered before training.
        results (`dict[str, float]`): the final scores.
        recipe (`RecipeArguments`), model_args (`ModelConfig`): as [`arguments.parse`] gave them.
        choice (`ChoiceFlops`): what trained from the start.
        samples (`Sequence[Sample]`, *optional*): answers before and after training.
    """
    summary = trainer.grades_summary
    result = run_result(
        summary,
        clock,
        steps=trainer.state.global_step,
        total_steps=trainer.state.max_steps,
        environment=environment,
        scores=results,
        warmup_steps=trainer.args.warmup_steps,
        argv=public_argv(),
        scored_with=scored_with(recipe, trainer.args, model_args),
        matrices=trainer.tracked.values() if summary is not None else (),
        diverged_at=trainer.diverged_at,
    )
    result.id = os.environ.get(RUN_ID, result.id)
    output_dir = Path(trainer.args.output_dir)
    # The model is safe, and its scores are shown whatever of this does not fit on the disk.
    with tolerated(output_dir / "result.json"):
        write_json(output_dir / "result.json", result.to_json() | {"choice": asdict(choice)})
    if samples:
        with tolerated(output_dir / "samples"):
            write_samples(output_dir / "samples", list(samples))
    tracker, step = Tracker.of(trainer), trainer.state.global_step
    tracker.log_samples(list(samples), step)
    tracker.log_result(result_fields(result), results, step)
    if summary is not None:
        summary.results = results
        arguments = resolved_arguments(trainer, recipe, model_args)
        commands = next_commands(output_dir, with_grades=True)
        trainer.report.facts = RecipeFacts(command_line(), arguments, list(samples), commands)
        with tolerated(trainer.report.directory):
            trainer.report.write(summary)


def format_run(trainer: Any, results: dict[str, float]) -> str:
    """A finished run for the terminal: its scores, what GradES did, where everything is, and what to run next."""
    output_dir = Path(trainer.args.output_dir)
    parts = [format_results(results)]
    found = [f"model      {output_dir}"]
    if trainer.grades_summary is not None:
        parts.append(format_summary(trainer.grades_summary))
        found.append(f"report     {output_dir / 'grades' / 'report.html'}")
    commands = next_commands(output_dir, trainer.grades_config is not None)
    parts += ["\n".join(found), "\n".join(f"{purpose}:\n  {command}" for purpose, command in commands)]
    return printable("\n" + "\n\n".join(parts))


def format_results(results: dict[str, float]) -> str:
    """The scores of a run as a table, a line each: before training, where that was measured, and after; and how many
    rows they are of, where it is known."""
    found, of_rows = sorted(before_and_after(results)), rows_of(results)
    columns = ["before", "after"][0 if any(before is not None for _, before, _ in found) else 1 :]
    lines = [f"{'':<28}" + "".join(f"{column:>12}" for column in [*columns, *(["rows"] if of_rows else [])])]
    for name, *values in found:
        cells = ["" if value is None else format_score(name, value) for value in values[-len(columns) :]]
        cells += [f"{of_rows[name]:,}"] if name in of_rows else []
        lines.append(f"{name:<28}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def next_commands(output_dir: Path, with_grades: bool) -> list[tuple[str, str]]:
    """What to run next, each with its purpose: a comparison with the baseline and other controls; the scores of the
    model again, beside those of the baseline if it is there."""
    commands = []
    if with_grades and launched_processes() == 1:  # compare.py trains in one, with another batch then
        _, flags = split_flags(public_argv()[1:], OF_ONE_RUN)
        compare = [*command_of("compare"), "--recipe", recipe_name(), *flags]
        commands.append(("Was it worth it? Compare it with the baseline", shlex.join(compare)))
    sibling = f"{output_dir}_baseline" if with_grades else str(output_dir).removesuffix("_baseline")
    folders = [sibling, str(output_dir)] if (Path(sibling) / "result.json").exists() else [str(output_dir)]
    evaluate = [*command_of("evaluate"), *dict.fromkeys(folders)]
    commands.append(("Score it again, or beside other models", shlex.join(evaluate)))
    return commands


def exit_if_diverged(trainer: Any, results: dict[str, float]) -> None:
    """Ends the process of a run that has diverged with exit code 1.

    Raises:
        SystemExit: it has; with the step, where it is known, and what to do.
    """
    if trainer.diverged_at is None and all(map(math.isfinite, results.values())):
        return
    logs = trainer.state.log_history  # of a baseline they tell; the Trainer leaves NaN out of losses, not of norms
    bad = [row["step"] for row in logs if not math.isfinite(row.get("grad_norm", 0.0) + row.get("loss", 0.0))]
    step = trainer.diverged_at if trainer.diverged_at is not None else min(bad, default=None)
    since = "" if step is None else f" at step {step}"
    raise SystemExit(
        f"The run has diverged{since}: its model is of no use. Lower --learning_rate (it was "
        f"{trainer.args.learning_rate:g}) or raise --warmup_steps, and look at the rows of that step."
    )


def format_scores(scores: dict[str, dict[str, float]]) -> str:
    """Scores of several models: a line for each score, a column for each model. All but losses and perplexities are
    fractions, and shown in percent."""
    names = list(dict.fromkeys(name for of_model in scores.values() for name in of_model))
    lines = [["", *scores]]
    for name in names:
        numbers = [of_model.get(name) for of_model in scores.values()]
        lines.append([name, *("-" if number is None else format_score(name, number) for number in numbers)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines = [
        [name.ljust(widths[0]), *(entry.rjust(width) for entry, width in zip(line, widths[1:], strict=True))]
        for name, *line in lines
    ]
    return printable("\n".join("  ".join(line) for line in lines))
