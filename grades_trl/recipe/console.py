"""What a recipe shows on the terminal: the start, the progress, the log of the library between them."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

import datasets
import transformers
from tqdm import tqdm
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from grades_trl.distributed import is_main
from grades_trl.recipe.bad_input import printable
from grades_trl.recipe.terminal import wrapped


def set_up_console() -> None:
    """Shows what `grades_trl` and `vlm` log, from INFO on, on stderr. On a terminal, lines break between words. Where
    stderr is no terminal each message is one line, and there are no bars. Of several processes only the main one shows
    anything, errors aside.

    Characters that the terminal does not have are replaced: a row in Japanese must not end a run on a Windows console.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    for name in ("grades_trl", "vlm"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO if is_main() else logging.CRITICAL)
        logger.handlers = [_TqdmHandler()]
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if not (sys.stderr.isatty() and is_main()):  # a bar would fill a file with copies of itself
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()


class _TqdmHandler(logging.Handler):
    """Writes between the progress bars, which stay whole."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname}: "
        _write(level + printable(self.format(record)))


def _write(text: str) -> None:
    tqdm.write(wrapped(text, sys.stderr), file=sys.stderr)


def show_progress(trainer: Any) -> None:
    """Gives a trainer the progress bar and the log lines of a recipe, in place of those of Transformers.

    The bar carries the loss and what is frozen, for which 80 columns suffice. A log line has five entries at most;
    everything that is logged goes to W&B and the like.

    Args:
        trainer: with `grades`, as a `GradESTrainer` has it; any, if it only evaluates.
    """
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if is_main():
        trainer.add_callback(_Progress(trainer))


class _Progress(ProgressCallback):
    def __init__(self, trainer: Any):
        super().__init__()
        self._trainer = trainer
        self._entries: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        # None: no bar where stderr is no terminal
        self.training_bar = tqdm(total=state.max_steps, dynamic_ncols=True, disable=args.disable_tqdm or None)
        self.current_step = 0

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if sys.stderr.isatty() and not args.disable_tqdm:
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None:  # scores after training have a table of their own
            return
        grades = self._trainer.grades
        frozen = None if grades is None else (len(grades.frozen), len(grades.matrices))
        entries = log_entries(logs or {}, frozen)
        if not entries:
            return
        self._entries |= {name: value for name, value in entries.items() if name in ("loss", "frozen")}
        self.training_bar.set_postfix_str(_joined(self._entries, ", "))
        _write(f"step {state.global_step:>{len(str(state.max_steps))}}  {_joined(entries, '  ')}")


def log_entries(logs: dict[str, Any], frozen: tuple[int, int] | None = None) -> dict[str, str]:
    """The entries of a log line, as text: five at most, in 80 columns; none for what the end of a run shows anyway.

    Args:
        logs (`dict[str, Any]`): as the trainer logs them: of training (with `loss`), or of a validation.
        frozen (`tuple[int, int]`, *optional*): matrices frozen, and tracked.
    """
    entries: dict[str, str] = {}
    if "loss" in logs:
        held_out = next((key for key in logs if key.startswith("grades/heldout_")), None)
        entries["loss"] = f"{float(logs['loss']):.4g}"
        # With a held-out score, learning rate and epoch would make the line longer than 80 columns.
        if "learning_rate" in logs and held_out is None:
            entries["lr"] = f"{float(logs['learning_rate']):.2g}"
        if frozen is not None:
            entries["frozen"] = f"{frozen[0]}/{frozen[1]}"
        if "grades/step_speedup" in logs and frozen is not None and frozen[0]:
            entries["speed"] = f"{logs['grades/step_speedup']:.2f}x"
        if held_out is not None:
            name = held_out.removeprefix("grades/heldout_").replace("_", " ")
            entries[f"held-out {name}"] = f"{logs[held_out]:.4g}"
        elif "epoch" in logs:
            entries["epoch"] = f"{logs['epoch']:.3g}"
        return entries
    for key, value in logs.items():
        if key.startswith("eval_") and key.endswith("loss") and len(entries) < 6:
            name = key.removeprefix("eval_").removesuffix("loss").strip("_")
            entries[f"validation loss{f' of {name}' if name else ''}"] = f"{float(value):.4g}"
    return entries


def _joined(entries: dict[str, str], separator: str) -> str:
    return separator.join(f"{name} {value}" for name, value in entries.items())


def format_start(environment: Any, splits: Mapping[str, Any], output_dir: str) -> str:
    """What a run is about to do, in three lines, which break between words where stdout is a terminal.

    Args:
        environment (`Environment`): of the run.
        splits (`Mapping[str, RowsLeft]`): split -> its rows, of which some can be too long.
        output_dir (`str`): where results go.
    """
    uses = {"train": "train on", "validation": "validate on", "test": "test on"}
    rows = ", ".join(f"{splits[split]} to {use}" for split, use in uses.items() if split in splits)
    lines = [
        f"model      {environment.model}, on {environment.device}",
        f"examples   {rows}",
        f"results    {output_dir}",
    ]
    return wrapped(printable("\n".join(lines)), sys.stdout)
