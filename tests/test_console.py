"""What a recipe shows on the terminal while it trains."""

import contextlib
import fcntl
import io
import logging
import os
import pty
import re
import struct
import sys
import termios
import threading

import pytest
from tqdm import tqdm
from transformers import ProgressCallback

from grades_trl import GradESTrainer
from grades_trl.recipe import builtin
from grades_trl.recipe.bad_input import BadInput, run
from grades_trl.recipe.console import _joined, format_start, log_entries, set_up_console, show_progress
from grades_trl.recipe.results import format_results
from grades_trl.recipe.scored import RowsLeft
from grades_trl.report.environment import Environment
from grades_trl.wording import counted
from helpers import arguments, model_for, never

LOGS = {
    "loss": 0.80481,
    "learning_rate": 0.0012,
    "grad_norm": 0.6,
    "epoch": 1.875,
    "entropy": 0.9,
    "num_tokens": 62580.0,
}
GRADES = {"grades/step_speedup": 1.687, "grades/heldout_exact_match": 0.5, "grades/frozen_fraction": 0.5}


def test_a_log_line_has_five_entries_and_80_columns_at_most():
    assert log_entries(LOGS) == {"loss": "0.8048", "lr": "0.0012", "epoch": "1.88"}
    full = log_entries(LOGS | GRADES, (3, 6))
    assert list(full) == ["loss", "frozen", "speed", "held-out exact match"]
    assert full["frozen"] == "3/6" and full["speed"] == "1.69x" and full["held-out exact match"] == "0.5"
    for held_out in ({"grades/heldout_exact_match": 0.51234}, {}):
        long = log_entries(LOGS | {"grades/step_speedup": 1.687} | held_out, (30, 51))
        assert len("step 120  " + _joined(long, "  ")) <= 80
    assert "speed" not in log_entries(LOGS | GRADES, (0, 6))  # nothing that GradES could have made faster


def test_validation_has_a_line_of_its_own_and_the_end_of_training_none():
    assert log_entries({"eval_loss": 0.25, "eval_runtime": 3.0}) == {"validation loss": "0.25"}
    assert log_entries({"eval_de_loss": 0.25, "epoch": 1}) == {"validation loss of de": "0.25"}
    assert log_entries({"train_runtime": 3.0, "train_loss": 2.0}) == {}


class Terminal:
    """A pseudo-terminal: a stream to write to, and what has been shown on it."""

    def __init__(self, columns):
        self._screen, end = pty.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = os.fdopen(end, "w", encoding="utf-8")
        self._read = b""
        self._reader = threading.Thread(target=self._follow)
        self._reader.start()

    def _follow(self):
        with contextlib.suppress(OSError):  # when the stream is closed
            while chunk := os.read(self._screen, 4096):
                self._read += chunk

    def shown(self):
        """All that was written; the stream is closed then."""
        self.stream.close()
        self._reader.join()
        os.close(self._screen)
        return self._read.decode().replace("\r\n", "\n")


LONG = "The held-out loss of 123 rows is measured every 11 steps: see outputs/a_folder/with-a-name/grades/report.html"


@pytest.mark.parametrize("columns", [80, 40, 200, 0])
def test_a_log_line_breaks_between_words_on_a_terminal(monkeypatch, columns):
    """Also while a bar is shown, which comes after the lines."""
    terminal = Terminal(columns)
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    try:
        set_up_console()
        with tqdm(total=3, file=sys.stderr, ncols=30, disable=False) as bar:  # a test may have imported `quiet`
            logging.getLogger("grades_trl.x").info(LONG)
            logging.getLogger("vlm.x").warning("  first\nsecond")
            bar.update()
    finally:
        shown = terminal.shown()
    lines = [line.rpartition("\r")[2] for line in shown.split("\n")]
    message = lines[: lines.index("WARNING:   first")]
    lines_of_message = {80: 2, 40: 3, 200: 1, 0: 2}[columns]  # the path takes one of its own in 40 columns
    assert len(message) == lines_of_message
    assert " ".join(line.strip() for line in message) == LONG
    assert [line[:2] == "  " for line in message] == [False] + [True] * (lines_of_message - 1)
    assert all(len(line) < (columns or 80) for line in message if "outputs/" not in line)
    assert lines[len(message) + 1] == "second"
    assert "1/3" in lines[-2]  # the bar is whole, and the last line


def test_a_log_line_stays_one_line_in_a_pipe_and_a_file(monkeypatch, tmp_path):
    with (tmp_path / "log.txt").open("w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        set_up_console()
        logging.getLogger("grades_trl.x").info(LONG)
    assert (tmp_path / "log.txt").read_text() == LONG + "\n"


def test_an_error_of_the_user_breaks_between_words_on_a_terminal(monkeypatch):
    def main():
        raise BadInput("train: " + LONG)

    terminal = Terminal(80)
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    try:
        with pytest.raises(SystemExit):
            run(main)
    finally:
        shown = terminal.shown()
    first, second, hint = shown.splitlines()
    assert f"{first} {second.strip()}" == f"Error: train: {LONG}" and len(first) < 80
    assert hint.startswith("--debug")


@pytest.mark.parametrize("is_terminal", [False, True])
def test_lines_in_a_pipe_and_a_bar_on_a_terminal(tmp_path, monkeypatch, is_terminal):
    """In a pipe, a bar would be written once more with every step."""
    dataset, tokenizer = builtin.dates(train=64, test=8, seed=0), builtin.tiny_qwen3()[1]
    trainer = GradESTrainer(
        model=model_for(tokenizer),
        args=arguments(tmp_path, max_steps=4, logging_steps=2, disable_tqdm=False),
        train_dataset=dataset["train"],
        processing_class=tokenizer,
        grades=never(),
    )
    show_progress(trainer)
    assert not any(type(callback) is ProgressCallback for callback in trainer.callback_handler.callbacks)
    terminal, pipe = Terminal(80), io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal.stream if is_terminal else pipe)
    try:
        trainer.train()
    finally:
        on_terminal = terminal.shown()
    shown = on_terminal if is_terminal else pipe.getvalue()
    assert "step 2  loss " in shown and "step 4  loss " in shown and "frozen 0/" in shown
    assert ("2/4 [" in shown) == is_terminal
    if is_terminal:
        assert re.search(r"4/4 \[[^\r]*it/s, loss \d[\d.]*, frozen 0/\d+\]", shown), shown


def test_the_start_and_the_scores_fit_80_columns():
    start = format_start(
        Environment("toy", "CPU", {}), {"train": RowsLeft(1000, 1000), "test": RowsLeft(20, 8)}, "outputs/x"
    )
    assert start.splitlines() == [
        "model      toy, on CPU",
        "examples   1,000 to train on, 8 of 20 to test on",
        "results    outputs/x",
    ]
    scores = format_results({"before/exact_match_test": 0.0, "final/exact_match_test": 0.5, "final/test_loss": 1.25})
    assert [line.split() for line in scores.splitlines()] == [
        ["before", "after"],
        ["exact_match_test", "0.0", "%", "50.0", "%"],
        ["test_loss", "1.25"],
    ]
    assert format_results({"final/test_loss": 1.0}).split() == ["after", "test_loss", "1"]
    counted = format_results({"before/a": 0.5, "final/a": 1.0, "final/b": 2.0, "rows/b": 1234})
    assert counted.split() == ["before", "after", "rows", "a", "50.0", "%", "100.0", "%", "b", "200.0", "%", "1,234"]
    assert max(map(len, counted.splitlines())) <= 80


def test_one_of_something_is_no_plural():
    assert [counted(n, "row") for n in (0, 1, 2, 1000)] == ["0 rows", "1 row", "2 rows", "1,000 rows"]
    assert [counted(n, "matrix is", "matrices are") for n in (1, 2)] == ["1 matrix is", "2 matrices are"]
