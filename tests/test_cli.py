"""What one flag of the recipes sets elsewhere, and what evaluate.py takes over from a run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from trl import ModelConfig, SFTConfig, SFTTrainer

from grades_trl.recipe import arguments as cli
from grades_trl.recipe import builtin
from grades_trl.recipe.arguments import RecipeArguments, early_stopping, parse, parse_scoring
from grades_trl.recipe.backend import BACKENDS

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


def test_evaluate_does_without_unsloth():
    """cli.py writes the backends out, since backend.py imports Unsloth where it can."""
    assert RecipeArguments.__dataclass_fields__["backend"].metadata["choices"] == list(BACKENDS)
    code = "import sys, grades_trl.recipe.arguments; sys.exit('grades_trl.recipe.backend' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def kept(folder, *flags):
    """The folder of a run with these flags, as far as evaluate.py reads it."""
    recipe, training, model, _ = parse("", DEMO, ["--config", str(DEMO), "--report_to", "none", *flags])
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"scored_with": cli.scored_with(recipe, training, model)}))
    return str(folder)


def test_evaluate_takes_over_the_settings_of_the_first_run(tmp_path, capsys):
    run = kept(
        tmp_path / "run", "--dataset_name", "a.jsonl", "--seed", "3", "--max_new_tokens", "5", "--dtype", "float16"
    )
    other = kept(tmp_path / "other", "--dataset_name", "a.jsonl", "--max_new_tokens", "6")
    models, recipe, training, model = parse_scoring("", ["hub/name", run, other, run, "--test_size", "0.1"])
    assert models == ["hub/name", run, other]
    assert (recipe.dataset_name, training.seed, recipe.max_new_tokens) == ("a.jsonl", 3, 5)
    assert (model.dtype, training.max_length, training.per_device_eval_batch_size) == ("float16", 128, 100)
    assert training.use_cpu and not training.bf16
    printed = capsys.readouterr().out
    assert f"settings of {run};" in printed
    assert f"CAUTION: {other} held out other rows" in printed and f"CAUTION: {run}" not in printed

    # Flags go first, and a checkpoint is of its run
    _, recipe, training, _ = parse_scoring("", [f"{run}/checkpoint-4", "--max_new_tokens", "7", "--seed", "4"])
    assert (recipe.dataset_name, training.seed, recipe.max_new_tokens) == ("a.jsonl", 4, 7)
    assert "CAUTION" in capsys.readouterr().out

    # Of other data, other rows
    _, recipe, training, _ = parse_scoring("", [run, "--dataset_name", "b.jsonl"])
    assert (recipe.dataset_name, training.seed, recipe.max_new_tokens) == ("b.jsonl", 42, 5)
    assert "CAUTION" not in capsys.readouterr().out

    # The column of plain text by the name that it has in the source
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"body": f"text {i}"}) + "\n" for i in range(40)))
    recipe, training = settings("--dataset_name", str(texts), "--dataset_text_field", "body")
    rows = cli.load_data(recipe, training, {})
    (tmp_path / "body").mkdir()
    scored = {"scored_with": cli.scored_with(recipe, training, ModelConfig())}
    (tmp_path / "body" / "result.json").write_text(json.dumps(scored))
    _, recipe, training, _ = parse_scoring("", [str(tmp_path / "body")])
    assert cli.load_data(recipe, training, {})["test"][:] == rows["test"][:]

    # Of no run at all: as it is stored
    _, _, training, model = parse_scoring("", ["hub/name"])
    assert (model.dtype, training.max_length, training.report_to) == ("auto", None, [])


def test_table_of_scores():
    scores = {"a": {"test_loss": 1.23456, "exact_match": 0.5}, "longer": {"test_loss": 10, "exact_match": 1 / 3}}
    assert cli.table(scores) == (
        "        test_loss  exact_match\n     a      1.235        50.0%\nlonger         10        33.3%"
    )


def test_a_config_file_may_be_given_in_one_word(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 0.125\nreport_to: none\n")
    assert parse("", Path("none.yaml"), [f"--config={file}"])[1].learning_rate == 0.125


def test_what_max_length_cuts_is_said(tmp_path, capsys):
    """Two prompts are longer than that, the response of a third ends beyond it, a fourth example is whole."""
    model, tokenizer = builtin.tiny_qwen3()
    lengths = [(100, 4), (60, 4), (10, 60), (10, 4)]
    rows = Dataset.from_list([{"prompt": "1" * prompt, "completion": "2" * response} for prompt, response in lengths])
    short = rows.select([3, 3])

    def report(rows, max_length):
        args = SFTConfig(str(tmp_path), max_length=max_length, use_cpu=True, bf16=False, report_to=[])
        trainer = SFTTrainer(model, args, train_dataset=rows, eval_dataset=short, processing_class=tokenizer)
        cli.report_cut_rows(trainer, {"train": rows, "validation": short})
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("CAUTION")]

    assert report(rows, 40) == [
        "CAUTION: train: of 4 examples, 2 have no response left within --max_length 40: dropped. 1 more reach it and "
        "may be cut."
    ]
    assert report(rows, 200) == report(rows, None) == []
    with pytest.raises(SystemExit, match="train: of 2 examples, 2 have no response left within --max_length 40"):
        report(rows.select([0, 1]), 40)
