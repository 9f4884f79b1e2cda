"""Wrong arguments, files, data and models end in one message, exit code 2 and no output folder; and what a terminal
would carry out is shown instead. All cases run in this process: no model is trained."""

import importlib
import json
import logging
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset

from grades_trl import GradESConfig
from grades_trl.recipe import backend
from grades_trl.recipe.bad_input import printable, run, training_begins
from grades_trl.recipe.console import format_start, set_up_console
from grades_trl.recipe.data import DataError
from grades_trl.recipe.data.formats import parse_columns
from grades_trl.recipe.generation import format_samples
from grades_trl.recipe.results import format_scores
from grades_trl.report.environment import Environment

RECIPES = Path(__file__).parents[1] / "recipes"
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
ESCAPE = "\x1b]0;owned\x07\x1b[2J"


@pytest.fixture(autouse=True)
def loggers():
    """Recipes set up the loggers of their process."""
    ours = [logging.getLogger(name) for name in ("grades_trl", "vlm")]
    before = [(logger.level, logger.handlers) for logger in ours]
    yield
    for logger, (level, handlers) in zip(ours, before, strict=True):
        logger.level, logger.handlers = level, handlers


def ended(main, monkeypatch, capsys, *words) -> str:
    """What a recipe says on stderr as it ends with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["recipe", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    return capsys.readouterr().err


def refused(recipe, flags, tmp_path, monkeypatch, capsys) -> str:
    monkeypatch.chdir(tmp_path)
    file = RECIPES / f"{recipe}.py"
    said = ended(lambda: runpy.run_path(str(file), run_name="__main__"), monkeypatch, capsys, *flags)
    assert "Traceback" not in said
    if not said.startswith("usage:"):  # argparse has a message of its own
        *notes, message, hint = said.splitlines()
        assert message.startswith("Error: ") and hint.startswith("--debug")
        assert all(note.startswith("No --model_name_or_path") for note in notes)
    assert not Path("out").exists()
    return said


FLAGS = [
    ("--max_steps 0", "max_steps is 0; expected a whole number of steps, 1 or more, or -1"),
    ("--max_steps -5", "max_steps is -5; expected"),
    ("--max_steps many", "invalid int value: 'many'"),
    ("--max_length -5", "max_length is -5; expected a whole number of tokens"),
    ("--max_length 0", "max_length is 0; expected"),
    ("--num_train_epochs 0", "num_train_epochs is 0.0; expected a number above 0"),
    ("--per_device_train_batch_size 0", "per_device_train_batch_size is 0; expected"),
    ("--gradient_accumulation_steps 0", "gradient_accumulation_steps"),
    ("--learning_rate nan", "learning_rate is nan; expected"),
    ("--learning_rate -1", "learning_rate is -1.0; expected"),
    ("--eval_steps -3", "eval_steps is -3.0; expected"),
    ("--seed -1", "seed is -1; expected"),
    ("--max_train_samples 0", "max_train_samples is 0; expected a whole number of rows, 1 or more"),
    ("--max_eval_samples 0", "max_eval_samples is 0; expected"),
    ("--num_samples -1", "num_samples is -1; expected a whole number of prompts, or 0 for none"),
    ("--num_eval_generations -1", "num_eval_generations is -1; expected"),
    ("--max_new_tokens 0", "max_new_tokens is 0; expected"),
    ("--early_stopping_patience 0", "early_stopping_patience is 0; expected a whole number of evaluations"),
    ("--test_size nan", "test_size is nan; expected a fraction below 1"),
    ("--test_size inf", "test_size is inf; expected a fraction below 1"),
    ("--metric grad_change --auto_ratio nan", "auto_ratio is nan; expected a number above 0"),
    ("--metric grad_change --tau Infinity", "tau is 'Infinity'; expected a number of at least 0"),
    ("--tau 3", "metric 'gain' has no tau"),
    ("--metric none --schedule missing.jsonl", "schedule is 'missing.jsonl'; expected"),
    ("--lora_r 8", "lora_r without use_peft"),
    ("--use_dora true --lora_alpha 4", "lora_alpha, use_dora without use_peft"),
    ("--use_peft --lora_r 0", "lora_r is 0; expected"),
    ("--use_peft --lora_dropout 1", "lora_dropout is 1.0; expected"),
    ("--use_peft --load_in_4bit", "The built-in model is not quantized"),
    ("--load_in_8bit", "load_in_4bit and load_in_8bit train adapters only"),
    ("--train_towers language", "--train_towers chooses among the towers"),
    ("--no_such_flag 1", "no_such_flag"),
    ("--config", "--config has no value"),
    ("--config no_such_config", "--config no_such_config: no such file"),
    ("--model_name_or_path no/such-model --dataset_name dates", "no/such-model: cannot be loaded"),
    ("--model_name_or_path ./nowhere --dataset_name dates", "./nowhere: cannot be loaded"),
    ("--model_name_or_path nowhere.gguf --dataset_name dates", "nowhere.gguf: cannot be loaded"),
    ("--dataset_name no/such-data", "no/such-data: cannot be loaded"),
    ("--dataset_name ./nowhere.jsonl", "./nowhere.jsonl: there is no such file"),
    ("--dataset_name digits", "The built-in dataset digits is for vision-language models"),
    ("--dataset_name dates --columns prompt=a", "The built-in dataset dates has no columns"),
    ("--resume nowhere", "--resume nowhere: there is no such folder"),
    ("--early_stopping_patience 2 --eval_strategy no", "early_stopping_patience needs validation"),
    ("--warmup_ratio 0.1", "--warmup_ratio is not known. Write --warmup_steps 0.1 (below 1"),
    ("--max-seq-length 512", "--max-seq-length is not known. Write --max_length."),
    ("--group_by_length --lora_rank=8", "Write --train_sampling_strategy group_by_length. --lora_rank is not known."),
    ("--overwrite_output_dir", "--overwrite_output_dir is not known. Write nothing: a run writes over"),
    ("--learning_rates 1", "--learning_rates is not known. Is it --learning_rate?"),
    ("--zzz", "--zzz is not known. --help_all lists all arguments."),
    ("--seed 1 more", "more: not understood; expected --name value."),
    ("--metric_for_best_model exact_match", "metric_for_best_model is exact_match; expected one of loss, "),
    ("--use_peft --lora_target_modules q_proj,v_proj", "'q_proj,v_proj'; expected names with spaces"),
    ("--dataset_train_split validation", "The built-in dataset dates has no dataset_train_split: leave it out."),
    ("--test_size 0.5", "The built-in dataset dates has no test_size: leave it out."),
    ("--load_best_model_at_end", "requires the save and eval strategy to match"),
]
if not torch.accelerator.is_available():
    FLAGS.append(("--activation_offloading", "activation_offloading moves activations from a GPU to the host"))


@pytest.mark.parametrize(("flags", "expected"), FLAGS, ids=[flags for flags, _ in FLAGS])
def test_wrong_flags(flags, expected, tmp_path, monkeypatch, capsys):
    given = ["--output_dir", "out", "--report_to", "none", *flags.split()]
    assert expected in refused("sft_text", given, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("recipe", "flags", "expected"),
    [
        ("sft_vlm", "--max_steps 0", "max_steps is 0"),
        ("sft_vlm", "--config demo_vlm --model_name_or_path tiny_llava --use_peft --load_in_4bit", "is not quantized"),
        ("sft_vlm", "--dataset_name dates", "The built-in dataset dates is for language models"),
        ("plan", "--max_length -5", "max_length is -5"),
        ("plan", "--model_name_or_path no/such-model", "no/such-model: cannot be loaded"),
        ("evaluate", "no/such-model --dataset_name dates", "no/such-model: cannot be loaded"),
        ("evaluate", "a b --num_samples -1", "num_samples is -1"),
        ("export", "a b", "One model at a time"),
        ("compare", "--recipe sft_text --jobs 0", "--jobs is at least 1"),
        ("compare", "--recipe sft_text --config nowhere --output_dir out", "--config nowhere: no such file"),
    ],
)
def test_wrong_flags_of_other_recipes(recipe, flags, expected, tmp_path, monkeypatch, capsys):
    assert expected in refused(recipe, flags.split(), tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("- max_steps: 3\n", "is a list; expected a mapping"),
        ("", "is a NoneType; expected a mapping"),
        ("max_steps: [\n", "expected the node content"),
        ("caf\xe9: 1\n", "'utf-8' codec can't decode"),
        ("grades:\n  tau: 3\n", "grades is nested"),
        ("max_stepz: 3\n", "max_stepz"),
        ("max_steps: [3]\n", "max_steps"),
        ("train_on: both\n", "train_on is 'both'; expected all or last"),
        ("num_samples: two\n", "invalid int value: 'two'"),
        ("lora_r: 8\n", "lora_r without use_peft"),
        ("cutoff_len: 8\n", "cutoff_len is not known in the config file. Write max_length."),
        ("use_peft: true\nlora_target_modules: q_proj,v_proj\n", "'q_proj,v_proj'; expected names with spaces"),
    ],
)
def test_wrong_config_files(content, expected, tmp_path, monkeypatch, capsys):
    (tmp_path / "run.yaml").write_bytes(content.encode("latin-1"))
    flags = ["--config", "run.yaml", "--output_dir", "out", "--report_to", "none"]
    assert expected in refused("sft_text", flags, tmp_path, monkeypatch, capsys)


def with_tools(tools):
    return {**CHAT, "tools": tools}


@pytest.mark.parametrize(
    ("rows", "encoding", "expected"),
    [
        ([{"messages": [CHAT["messages"][0], {"role": "assistant", "content": "caf\xe9"}]}], "latin-1", "not UTF-8"),
        ([{"prompt": "caf\xe9", "completion": "b"}], "latin-1", "not UTF-8"),
        ([{"conversations": "hello"}], "utf-8", "messages is 'hello', expected a list"),
        ([{"conversations": ["a", "b"]}], "utf-8", "messages[0] is 'a', expected"),
        ([{"instruction": "a", "output": "b", "history": ["x"]}], "utf-8", "messages[0] is 'x', expected"),
        ([with_tools("not json")], "utf-8", "tools is 'not json', which is no JSON"),
        ([with_tools(3)], "utf-8", "tools is 3, expected a list"),
        ([with_tools(["f"])], "utf-8", "tools is ['f'], expected a list"),
        ([with_tools({"name": "f"})], "utf-8", "tools is {'name': 'f'}, expected a list"),
        ([{"conversations": CHAT["messages"], "tools": 3}], "utf-8", "tools is 3, expected a list"),
        ([{"conversations": CHAT["messages"], "tools": ["f"]}], "utf-8", "tools is ['f'], expected a list"),
        ([{**CHAT, "chat_template_kwargs": "x"}], "utf-8", "chat_template_kwargs is 'x', expected an object"),
        ([{"messages": [{"role": ESCAPE, "content": "a"}]}], "utf-8", r"\x1b]0;owned"),
        ([{f"a{ESCAPE}": 1}], "utf-8", r"found: a\x1b]0;owned\x07\x1b[2J"),
    ],
)
def test_wrong_data(rows, encoding, expected, tmp_path, monkeypatch, capsys):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows * 8)
    (tmp_path / "data.jsonl").write_bytes(lines.encode(encoding))
    flags = ["--dataset_name", "data.jsonl", "--output_dir", "out", "--report_to", "none"]
    said = refused("sft_text", flags, tmp_path, monkeypatch, capsys)
    assert expected in said and "\x1b" not in said


MADE = [  # with flags that TRL, Transformers and PEFT look at: the data are read, and the model is made
    ("--assistant_only_loss", "this model's chat template does not mark replies ({% generation %})"),
    ("--padding_free", "`max_length` is not enforced"),
    ("--loss_type foo", "Invalid `loss_type` foo passed"),
    ("--save_strategy best", "`args.metric_for_best_model` must be provided"),
    ("--push_to_hub", "offline mode is enabled"),
    ("--optim schedule_free_adamw", "--optim schedule_free_adamw: ImportError: You need to install `schedulefree`"),
    ("--optim galore_adamw_layerwise", "optim is galore_adamw_layerwise, which updates weights during the backward"),
    ("--lr_scheduler_type cosine_with_min_lr", "--lr_scheduler_kwargs {}: One of min_lr or min_lr_rate should be set"),
    ("--lr_scheduler_type warmup_stable_decay", "missing 1 required positional argument: 'num_decay_steps'"),
    ('--lr_scheduler_kwargs {"min_lr":1}', "got an unexpected keyword argument 'min_lr'"),
    ("--use_peft --lora_target_modules c_attn", "(linear layers here: down_proj, gate_proj, k_proj"),
    ("--use_peft --lora_modules_to_save head", "lora_modules_to_save names head, and Qwen3ForCausalLM has no such"),
]
if importlib.util.find_spec("liger_kernel") is None:
    MADE.append(("--use_liger_kernel", "use_liger_kernel needs liger-kernel, which is not installed"))


@pytest.mark.parametrize(("flags", "expected"), MADE, ids=[flags for flags, _ in MADE])
def test_flags_that_the_libraries_beneath_refuse(flags, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["--output_dir", "out", "--report_to", "none", "--max_train_samples", "8", "--max_eval_samples", "8"]
    recipe = str(RECIPES / "sft_text.py")
    said = ended(lambda: runpy.run_path(recipe, run_name="__main__"), monkeypatch, capsys, *given, *flags.split())
    assert expected in said and "Traceback" not in said
    assert not Path("out", "grades").exists()  # nothing has been trained


def test_the_backend_is_chosen_before_the_arguments_are_read(tmp_path, monkeypatch, capsys):
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "bad.yaml").write_text("a: [\n")
    assert backend.requested(["--config", str(tmp_path / "list.yaml")]) == "auto"
    for words, expected in (
        (["--config", "nowhere"], "--config nowhere: no such file"),
        (["--config", str(tmp_path / "bad.yaml")], "expected the node content"),
        (["--backend", "jax"], "backend is 'jax'; expected one of auto, unsloth, transformers"),
    ):
        assert expected in ended(lambda: importlib.reload(backend), monkeypatch, capsys, *words)


def test_lora_settings_of_a_file_may_be_turned_off(tmp_path, caplog):
    from grades_trl.recipe.arguments import parse

    (tmp_path / "lora.yaml").write_text(yaml.safe_dump({"use_peft": True, "lora_r": 8, "report_to": "none"}))
    parse("", tmp_path, ["--config", str(tmp_path / "lora.yaml"), "--use_peft", "false"])
    assert "lora_r are ignored" in caplog.text


def checked():
    parse_columns(["wrong\nvalue \x1b[31m"])


def deep():
    int("internal")


def raise_of_ours():
    raise RuntimeError("cannot be")


def test_debug_shows_the_traceback(monkeypatch, capsys):
    seen = []

    def main():
        seen.append(sys.argv[1:])
        checked()

    said = ended(lambda: run(main), monkeypatch, capsys, "--seed", "1")
    assert said.startswith("Error: --columns wrong value \\x1b[31m: expected NAME=COLUMN OF THE FILE")
    assert said.endswith("\n--debug shows where it was found.\n") and said.count("\n") == 2
    said = ended(lambda: run(main), monkeypatch, capsys, "--debug", "--seed", "1")
    assert "Traceback" in said and "in checked" in said and "\x1b" not in said
    said = ended(lambda: run(main), monkeypatch, capsys, "--debug", "underflow_overflow")
    assert "Traceback" in said
    assert seen == [["--seed", "1"], ["--seed", "1"], ["--debug", "underflow_overflow"]]


def test_unforeseen_errors_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe"])
    with pytest.raises(ValueError, match="internal"):
        run(deep)  # no check of ours has found anything
    with pytest.raises(KeyError):
        run(lambda: {}["missing"])
    with pytest.raises(RuntimeError):
        run(raise_of_ours)  # we raise it where we are wrong, not the user

    def main():
        training_begins()
        checked()

    with pytest.raises(DataError, match="wrong"):
        run(main)


def test_a_schedule_beyond_the_last_step_is_said(tmp_path, caplog):
    from grades_trl.engine import GradES, tracked_in
    from helpers import qwen3

    model = qwen3()
    config = GradESConfig(metric="schedule", schedule={"*layers.0.*": 5, "*layers.1.*": 11})
    tracked_in(model, config)
    assert not caplog.records  # how many steps there are is not known yet
    GradES(model, config, total_steps=10).close()
    assert "7 of the 14 matrices of the schedule never freeze: their steps are after the last one, 10" in caplog.text

    for step in (0, 2.5, "3", True):
        events = tmp_path / "events.jsonl"
        events.write_text(json.dumps({"matrix": "model.layers.0.self_attn.q_proj", "step": step}) + "\n")
        with pytest.raises(ValueError, match=r"events\.jsonl, line 1: expected a freeze event"):
            tracked_in(model, GradESConfig(metric="schedule", schedule=str(events)))


def test_control_characters_are_shown():
    assert printable("a\tb\nc é 漢 \u200d") == "a\tb\nc é 漢 \u200d"
    assert printable("\x1b[31m\r\x07\x7f\x9b\x00\u202e") == r"\x1b[31m\r\x07\x7f\x9b\x00\u202e"


def test_no_escape_sequence_reaches_the_terminal(capsys):
    rows = Dataset.from_dict({"prompt": [f"ask{ESCAPE}"], "completion": [f"say{ESCAPE}"]})
    shown = format_samples(rows, {"after": [f"answer{ESCAPE}"]})
    shown += format_scores({f"model{ESCAPE}": {f"category{ESCAPE}/test_loss": 1.0}})
    shown += format_start(Environment(f"name{ESCAPE}", "CPU", {}), {"train": 1}, f"out{ESCAPE}")
    set_up_console()
    logging.getLogger("grades_trl").info(f"of {ESCAPE}")
    shown += capsys.readouterr().err
    assert "\x1b" not in shown and "\x07" not in shown and shown.count(r"\x1b]0;owned\x07") == 8
