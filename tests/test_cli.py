"""The command line: what a flag sets elsewhere, what is refused, and what evaluate.py takes over from a run."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from trl import ModelConfig, SFTConfig, SFTTrainer

from grades_trl import GradESConfig
from grades_trl.recipe import arguments as cli
from grades_trl.recipe import builtin
from grades_trl.recipe.arguments import RecipeArguments, configure_early_stopping, parse, parse_scoring
from grades_trl.recipe.backend import BACKENDS
from grades_trl.recipe.data import load_data, warn_truncated_examples
from grades_trl.recipe.results import format_scores
from grades_trl.recipe.scored import rows_left

DEMO = Path(__file__).parents[1] / "configs" / "demo_text.yaml"


@pytest.fixture(autouse=True)
def info(caplog):
    caplog.set_level(logging.INFO, logger="grades_trl")


def settings(*flags):
    recipe, training, _, _ = parse("", DEMO, ["--config", str(DEMO), "--report_to", "none", *flags])
    return recipe, training


def with_config(tmp_path, config, *flags):
    """The arguments of a run with this YAML file."""
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    return parse("", DEMO, ["--config", str(file), "--report_to", "none", *flags])


def test_the_recipes_have_the_defaults_of_the_config():
    _, _, _, grades = parse("", DEMO, ["--report_to", "none"])
    assert grades == GradESConfig()


@pytest.mark.parametrize(
    ("flags", "rate", "dtype"),
    [
        ([], 2e-5, "float32"),
        (["--use_peft"], 2e-4, "float32"),
        (["--bf16", "true"], 2e-5, "float32"),
        (["--use_peft", "--bf16", "true"], 2e-4, "bfloat16"),
        (["--use_peft", "--bf16", "true", "--learning_rate", "2e-5", "--dtype", "float32"], 2e-5, "float32"),
        (["--config", "smollm2_135m_lora", "--bf16", "true"], 5e-4, "float32"),  # the file's
    ],
)
def test_the_default_rate_and_type_of_weights_are_those_of_the_method(flags, rate, dtype):
    _, training, model, _ = parse("", DEMO, ["--model_name_or_path", "some/model", "--report_to", "none", *flags])
    assert (training.learning_rate, model.dtype) == (rate, dtype)


@pytest.mark.parametrize(
    ("flags", "steps", "epochs"),
    [
        (["--num_train_epochs", "0.5"], -1, 0.5),  # not the 500 steps of the file
        (["--num_train_epochs=2"], -1, 2),
        (["--num_train_epochs", "2", "--max_steps", "8"], 8, 2),
        ([], 500, 3),
    ],
)
def test_epochs_on_the_command_line_go_before_the_steps_of_the_file(flags, steps, epochs):
    training = settings(*flags)[1]
    assert (training.max_steps, training.num_train_epochs) == (steps, epochs)


def test_early_stopping_is_one_flag():
    recipe, training = settings("--early_stopping_patience", "3", "--eval_steps", "7")
    (callback,) = configure_early_stopping(recipe, training)
    assert (callback.early_stopping_patience, callback.early_stopping_threshold) == (3, 0.0005)
    assert (training.save_strategy, training.save_steps, training.save_total_limit) == ("steps", 7, 1)
    assert (training.load_best_model_at_end, training.metric_for_best_model) == (True, "eval_loss")
    assert training.greater_is_better is False
    assert training.save_only_model  # nobody asked for checkpoints to resume from

    flags = ["--early_stopping_patience", "3", "--eval_strategy", "epoch", "--save_strategy", "steps"]
    recipe, training = settings(*flags)
    configure_early_stopping(recipe, training)
    assert training.save_strategy == "epoch"
    assert not training.save_only_model

    recipe, training = settings()
    assert configure_early_stopping(recipe, training) == []
    assert (training.save_strategy, training.load_best_model_at_end) == ("no", False)


def test_early_stopping_needs_validation():
    with pytest.raises(ValueError, match='early_stopping_patience needs validation, and eval_strategy is "no"'):
        configure_early_stopping(*settings("--early_stopping_patience", "3", "--eval_strategy", "no"))


@pytest.mark.parametrize(
    ("config", "flags", "kept"),
    [
        (
            {"metric": "weight_change", "tau": 0.3, "alpha": 0.2},
            ["--metric", "grad_norm"],
            "tau, alpha .*weight_change",
        ),
        ({"alpha": 0.3}, ["--metric=weight_change"], "alpha for metric gain"),
        (
            {"metric": "grad_norm", "patience": 2},
            ["--tau", "1", "--metric", "grad_change"],
            "patience for metric grad_n",
        ),
        ({"metric": "schedule", "schedule": {"vision": 1}}, ["--metric", "none"], "schedule for metric schedule"),
    ],
)
def test_a_setting_of_another_metric_in_the_file_is_an_error(tmp_path, config, flags, kept):
    with pytest.raises(ValueError, match=f"sets {kept}.*give them again for .*, or remove them from the file"):
        with_config(tmp_path, config, *flags)


def test_settings_that_are_given_again_or_of_the_same_metric_are_none(tmp_path):
    config = {"metric": "weight_change", "tau": 0.3, "alpha": 0.2}
    flags = ["--metric", "grad_norm", "--tau", "7", "--alpha=0.5"]
    _, _, _, grades = with_config(tmp_path, config, *flags)
    assert (grades.metric, grades.tau, grades.alpha) == ("grad_norm", 7, 0.5)
    _, _, _, grades = with_config(tmp_path, config, "--metric", "weight_change", "--alpha", "0.5")
    assert (grades.metric, grades.tau, grades.alpha) == ("weight_change", 0.3, 0.5)
    _, _, _, grades = with_config(tmp_path, {"tau": 0.3}, "--metric", "weight_change")  # the default metric has none
    assert (grades.metric, grades.tau) == ("weight_change", 0.3)


def test_nested_and_unknown_keys_of_the_file_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"run\.yaml: grades is nested: .*All arguments are at the top level"):
        with_config(tmp_path, {"grades": {"metric": "grad_norm"}})
    with pytest.raises(ValueError, match=r"run\.yaml: alpha is nested"):
        with_config(tmp_path, {"alpha": {"vision": 0.5}})
    with pytest.raises(ValueError, match=r"metrik is not known in the config file\. Is it metric\?"):
        with_config(tmp_path, {"metrik": "grad_norm"})
    config = {
        "metric": "grad_norm",
        "tau": {"vision": 0.5},
        "lr_scheduler_kwargs": {"min_lr": 1e-5},
        "env": {"SOME_VARIABLE": "1"},
    }
    _, training, _, grades = with_config(tmp_path, config)
    assert grades.tau == {"vision": 0.5}
    assert training.lr_scheduler_kwargs == {"min_lr": 1e-5}


def test_a_schedule_that_the_run_would_overwrite_is_refused(tmp_path):
    events = tmp_path / "run" / "grades" / "events.jsonl"
    events.parent.mkdir(parents=True)
    events.write_text('{"matrix": "a", "step": 3}\n')
    flags = ["--metric", "schedule", "--schedule", str(events), "--output_dir"]
    with pytest.raises(ValueError, match=r"events\.jsonl, which this run would overwrite.*another --output_dir"):
        with_config(tmp_path, {}, *flags, str(tmp_path / "elsewhere" / ".." / "run"))
    assert with_config(tmp_path, {}, *flags, str(tmp_path / "other"))[3].schedule == str(events)


@pytest.mark.parametrize(("given", "held_out"), [("0.25", 10), ("6", 6), ("6.0", 6)])
def test_test_size_is_a_fraction_or_a_number_of_rows(tmp_path, given, held_out):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(40)))
    rows = load_data(*settings("--dataset_name", str(file), "--test_size", given), {})
    assert len(rows["validation"]) + len(rows["test"]) == held_out
    assert len(rows["train"]) == 40 - held_out


@pytest.mark.parametrize("given", ["1.5", "0", "-3"])
def test_other_test_sizes_are_refused(given):
    with pytest.raises(ValueError, match=r"test_size is .*; expected a fraction below 1, or a number of rows"):
        settings(f"--test_size={given}")


def test_training_samples_are_drawn_from_a_sorted_split(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"{i // 50} {i}"}) + "\n" for i in range(100)))  # two topics
    flags = ["--dataset_name", str(tmp_path), "--dataset_test_split", "test", "--max_train_samples"]
    file.rename(tmp_path / "train.jsonl")
    (tmp_path / "test.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')

    def drawn(*more):
        return load_data(*settings(*flags, *more), {})["train"]["text"][:]

    assert {text[0] for text in drawn("20")} == {"0", "1"}
    assert len(drawn("20")) == 20
    assert drawn("20") == drawn("20") != drawn("20", "--seed", "1")
    assert drawn("200") == [f"{i // 50} {i}" for i in range(100)]


def test_evaluate_does_without_unsloth():
    """arguments.py writes the backends out, since backend.py imports Unsloth where it can."""
    assert RecipeArguments.__dataclass_fields__["backend"].metadata["choices"] == list(BACKENDS)
    code = "import sys, grades_trl.recipe.arguments; sys.exit('grades_trl.recipe.backend' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def kept(folder, *flags):
    """The folder of a run with these flags, as far as evaluate.py reads it."""
    recipe, training, model, _ = parse("", DEMO, ["--config", str(DEMO), "--report_to", "none", *flags])
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"scored_with": cli.scored_with(recipe, training, model)}))
    return str(folder)


def test_evaluate_takes_over_the_settings_of_the_first_run(tmp_path, caplog):
    run = kept(
        tmp_path / "run", "--dataset_name", "a.jsonl", "--seed", "3", "--max_new_tokens", "5", "--dtype", "float16"
    )
    other = kept(tmp_path / "other", "--dataset_name", "a.jsonl", "--max_new_tokens", "6")
    models, recipe, training, model = parse_scoring("", ["hub/name", run, other, run, "--test_size", "0.1"])
    assert models == ["hub/name", run, other]
    assert (recipe.dataset_name, training.seed, recipe.max_new_tokens) == ("a.jsonl", 3, 5)
    assert (model.dtype, training.max_length, training.per_device_eval_batch_size) == ("float16", 128, 100)
    assert training.use_cpu and not training.bf16
    assert f"settings of {run};" in caplog.text
    assert f"{other} held out other rows" in caplog.text and f"{run} held out" not in caplog.text

    # Flags go first, and a checkpoint is of its run
    _, recipe, training, _ = parse_scoring("", [f"{run}/checkpoint-4", "--max_new_tokens", "7", "--seed", "4"])
    assert (recipe.dataset_name, training.seed, recipe.max_new_tokens) == ("a.jsonl", 4, 7)
    assert f"{run}/checkpoint-4 held out other rows" in caplog.text

    # Of other data, other rows
    _, recipe, training, _ = parse_scoring("", [run, "--dataset_name", "b.jsonl"])
    assert (recipe.dataset_name, training.seed, recipe.max_new_tokens) == ("b.jsonl", 42, 5)
    assert f"{run} held out other rows" not in caplog.text

    # The column of plain text by the name that it has in the source
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"body": f"text {i}"}) + "\n" for i in range(40)))
    recipe, training = settings("--dataset_name", str(texts), "--dataset_text_field", "body")
    rows = load_data(recipe, training, {})
    (tmp_path / "body").mkdir()
    scored = {"scored_with": cli.scored_with(recipe, training, ModelConfig())}
    (tmp_path / "body" / "result.json").write_text(json.dumps(scored))
    _, recipe, training, _ = parse_scoring("", [str(tmp_path / "body")])
    assert load_data(recipe, training, {})["test"][:] == rows["test"][:]

    # Of no run at all: as it is stored
    _, _, training, model = parse_scoring("", ["hub/name"])
    assert (model.dtype, training.max_length, training.report_to) == ("auto", None, [])


HARMLESS = {"dataset_name": "dates", "seed": 3, "test_size": 0.5, "max_length": None}


def scored_by_someone_else(folder, settings):
    folder.mkdir(exist_ok=True)
    (folder / "result.json").write_text(json.dumps({"scored_with": settings}))
    return parse_scoring("", [str(folder)])


def test_evaluate_takes_over_nothing_that_runs_code_or_writes_elsewhere(tmp_path):
    """A model folder from someone else: its settings say which rows are scored and how, and that is all."""
    harmful = {
        "trust_remote_code": True,
        "output_dir": "elsewhere",
        "attn_implementation": "someone/kernels",  # Transformers downloads and runs kernels by that name
        "model_init_kwargs": {"trust_remote_code": True},
        "model_name_or_path": "someone/model",
        "deepspeed": "file.json",
        "push_to_hub": True,
        "backend": "unsloth",
    }
    _, recipe, training, model = scored_by_someone_else(tmp_path / "run", HARMLESS | harmful)
    _, plain_recipe, plain_training, plain_model = parse_scoring("", ["hub/name"])
    for name in harmful:
        for own, plain in ((recipe, plain_recipe), (training, plain_training), (model, plain_model)):
            assert vars(own).get(name) == vars(plain).get(name), name
    assert (recipe.dataset_name, training.seed, recipe.test_size, training.max_length) == ("dates", 3, 0.5, None)
    assert parse_scoring("", [str(tmp_path / "run"), "--trust_remote_code"])[2].trust_remote_code  # the user may


def test_evaluate_scores_in_the_precision_of_the_run(tmp_path):
    """On a CPU too, where bf16 alone is off by default: in another one, its own scores would not come out."""
    _, _, training, model = scored_by_someone_else(tmp_path / "run", HARMLESS | {"bf16": True, "dtype": "bfloat16"})
    assert training.bf16 and model.dtype == "bfloat16"
    _, _, training, _ = parse_scoring("", [str(tmp_path / "run"), "--bf16", "false"])
    assert not training.bf16


def test_an_adapter_is_put_on_the_base_that_it_was_trained_on(tmp_path):
    flags = "--use_peft --load_in_4bit --bnb_4bit_quant_type fp4 --use_bnb_nested_quant --model_revision v2"
    run = kept(tmp_path / "run", "--model_name_or_path", "hub/name", *flags.split())
    model = parse_scoring("", [run])[3]
    assert (model.load_in_4bit, model.bnb_4bit_quant_type, model.use_bnb_nested_quant) == (True, "fp4", True)
    assert model.model_revision == "v2"
    # A run from before these were kept
    model = scored_by_someone_else(tmp_path / "run", HARMLESS | {"load_in_4bit": True})[3]
    assert (model.bnb_4bit_quant_type, model.use_bnb_nested_quant, model.model_revision) == ("nf4", False, "main")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("model_revision", None, "str"),
        ("seed", "3", "int"),
        ("seed", True, "int"),
        ("dataset_name", ["dates"], r"str \| None"),
        ("max_new_tokens", None, "int"),
        ("test_size", "all", r"int \| float"),
        ("load_in_4bit", 1, "bool"),
        ("max_length", 1.5, r"int \| None"),
    ],
)
def test_settings_of_a_wrong_type_are_an_error(tmp_path, name, value, expected):
    with pytest.raises(ValueError, match=rf"result\.json: scored_with\.{name} is .*; expected {expected}\."):
        scored_by_someone_else(tmp_path / "run", HARMLESS | {name: value})


def test_settings_that_are_no_object_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"scored_with is \['dates'\]; expected an object of arguments"):
        scored_by_someone_else(tmp_path / "run", ["dates"])


def test_what_is_kept_of_a_run_is_what_is_read(tmp_path):
    recipe, training, model, _ = parse("", DEMO, ["--config", str(DEMO), "--report_to", "none"])
    written = cli.scored_with(recipe, training, model)
    _, recipe, training, model = scored_by_someone_else(tmp_path / "run", written)
    assert cli.scored_with(recipe, training, model) == written


def test_table_of_scores():
    scores = {"a": {"test_loss": 1.23456, "exact_match": 0.5}, "longer": {"test_loss": 10, "exact_match": 1 / 3}}
    scores["longer"]["boolq/acc"] = 0.5
    assert format_scores(scores) == (
        "                  a  longer\n"
        "test_loss     1.235      10\n"
        "exact_match  50.0 %  33.3 %\n"
        "boolq/acc         -  50.0 %"
    )


def test_a_config_file_may_be_given_in_one_word(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 0.125\nreport_to: none\n")
    assert parse("", Path("none.yaml"), [f"--config={file}"])[1].learning_rate == 0.125


def test_examples_that_max_length_truncates_are_a_warning(tmp_path, caplog):
    """Two prompts are longer than that, the reply of a third ends beyond it, a fourth example is whole."""
    model, tokenizer = builtin.tiny_qwen3()
    lengths = [(100, 4), (60, 4), (10, 60), (10, 4)]
    rows = Dataset.from_list([{"prompt": "1" * prompt, "completion": "2" * response} for prompt, response in lengths])
    short = rows.select([3, 3])

    def report(rows, max_length):
        args = SFTConfig(str(tmp_path), max_length=max_length, use_cpu=True, bf16=False, report_to=[])
        trainer = SFTTrainer(model, args, train_dataset=rows, eval_dataset=short, processing_class=tokenizer)
        caplog.clear()
        warn_truncated_examples(rows_left(trainer, {"train": rows, "validation": short, "test": rows}), max_length)
        return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

    reach = "1 more reaches it, of which 1 is cut off, without the end-of-sequence token that ends a reply."
    found = "of 4 examples, 2 have no reply left within --max_length 40: dropped"
    assert report(rows, 40) == [f"train: {found}. {reach}", f"test: {found}, and not scored. {reach}"]
    assert report(rows, 200) == report(rows, None) == []
    with pytest.raises(ValueError, match="train: of 2 examples, 2 have no reply left within --max_length 40"):
        report(rows.select([0, 1]), 40)
