"""What one flag of the recipes sets elsewhere."""

from pathlib import Path

import pytest

from grades_trl.cli import early_stopping, parse

DEMO = Path(__file__).parents[1] / "configs" / "demo_text.yaml"


def settings(*flags):
    recipe, training, _, _ = parse("", DEMO, ["--config", str(DEMO), "--report_to", "none", *flags])
    return recipe, training


def test_early_stopping_is_one_flag():
    recipe, training = settings("--early_stopping_patience", "3", "--eval_steps", "7")
    (callback,) = early_stopping(recipe)
    assert (callback.early_stopping_patience, callback.early_stopping_threshold) == (3, 0.0005)
    assert (training.save_strategy, training.save_steps, training.save_total_limit) == ("steps", 7, 1)
    assert (training.load_best_model_at_end, training.metric_for_best_model) == (True, "eval_loss")
    assert training.greater_is_better is False
    assert training.save_only_model  # nobody asked for checkpoints to resume from

    _, training = settings("--early_stopping_patience", "3", "--eval_strategy", "epoch", "--save_strategy", "steps")
    assert training.save_strategy == "epoch"
    assert not training.save_only_model

    recipe, training = settings()
    assert early_stopping(recipe) == []
    assert (training.save_strategy, training.load_best_model_at_end) == ("no", False)


def test_early_stopping_needs_validation():
    with pytest.raises(ValueError, match='early_stopping_patience needs validation, and eval_strategy is "no"'):
        settings("--early_stopping_patience", "3", "--eval_strategy", "no")
