"""What a recipe shows on the terminal while it trains."""

import re
import sys

from transformers import ProgressCallback

from grades_trl import GradESTrainer
from grades_trl.recipe import builtin
from grades_trl.recipe.console import _joined, format_start, log_entries, show_progress
from grades_trl.recipe.results import format_results
from grades_trl.recipe.scored import RowsLeft
from grades_trl.report.environment import Environment
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


def test_lines_in_a_pipe_and_a_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    """In a pipe, a bar would be written once more with every step."""
    dataset, tokenizer = builtin.dates(train=64, test=8, seed=0), builtin.tiny_qwen3()[1]
    for is_terminal in (False, True):
        trainer = GradESTrainer(
            model=model_for(tokenizer),
            args=arguments(tmp_path, max_steps=4, logging_steps=2, disable_tqdm=False),
            train_dataset=dataset["train"],
            processing_class=tokenizer,
            grades=never(),
        )
        show_progress(trainer)
        assert not any(type(callback) is ProgressCallback for callback in trainer.callback_handler.callbacks)
        capsys.readouterr()
        monkeypatch.setattr(sys.stderr, "isatty", lambda answer=is_terminal: answer, raising=False)
        trainer.train()
        shown = capsys.readouterr().err
        assert "step 2  loss " in shown and "step 4  loss " in shown and "frozen 0/" in shown
        assert ("2/4 [" in shown) == is_terminal
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
