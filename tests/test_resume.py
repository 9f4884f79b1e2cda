"""Which checkpoint a run goes on from: what is whole, and what belongs to the run."""

import json
import logging
import os
import shutil

import pytest
import torch
from trl import SFTTrainer

from grades_trl import GradESConfig, GradESTrainer
from grades_trl.recipe import builtin
from grades_trl.recipe.arguments import parse
from grades_trl.recipe.resume import SETTINGS, set_up_resume
from grades_trl.trainers.whole_checkpoint import newest_whole, what_is_wrong
from helpers import LORA, arguments, model_for, warnings_in


def train(folder, steps=2, grades=True, **extra):
    rows, (_, tokenizer) = builtin.dates(train=32, test=8)["train"], builtin.tiny_qwen3()
    args = arguments(folder, max_steps=steps, save_strategy="steps", save_steps=1)
    if grades:
        extra["grades"] = GradESConfig()  # as a recipe without flags has it
    trainer = (GradESTrainer if grades else SFTTrainer)(
        model=model_for(tokenizer), args=args, train_dataset=rows, processing_class=tokenizer, **extra
    )
    trainer.train()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a run of two steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("run")
    train(folder)
    return folder


@pytest.fixture
def run(saved, tmp_path):
    """A copy of it, in the working directory."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("grades", [True, False], ids=["grades", "baseline"])
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_what_the_trainer_has_saved_is_whole(tmp_path, grades, peft_config):
    train(tmp_path, steps=1, grades=grades, peft_config=peft_config)
    assert what_is_wrong(tmp_path / "checkpoint-1", grades) is None
    wrong = what_is_wrong(tmp_path / "checkpoint-1", with_grades=True)
    assert wrong == (None if grades else "the state of GradES is missing (grades_state.json)")


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "at",
    ["store_flos", "_save_optimizer_and_scheduler", "_save_scaler", "_save_rng_state", "save_to_json"],
)
def test_a_process_that_ends_at_any_moment_of_saving_leaves_no_whole_checkpoint(tmp_path, monkeypatch, at):
    """The moments before each part that the Trainer writes; `store_flos` is before the first."""
    from transformers import Trainer, TrainerState

    owner = TrainerState if at == "save_to_json" else Trainer
    own = getattr(owner, at)

    def die_at_the_second_checkpoint(self, *args, **kwargs):
        if (tmp_path / "checkpoint-1" / "trainer_state.json").exists():
            raise Killed
        return own(self, *args, **kwargs)

    monkeypatch.setattr(owner, at, die_at_the_second_checkpoint)
    with pytest.raises(Killed):
        train(tmp_path)
    assert (tmp_path / "checkpoint-2").exists() == (at != "store_flos")
    assert newest_whole(tmp_path, with_grades=True) == tmp_path / "checkpoint-1"


FILES = [
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "grades_state.json",
    "grades_state.safetensors",
]


@pytest.mark.parametrize("file", FILES)
def test_a_torn_and_a_missing_file_are_named(run, file, caplog):
    path = run / "checkpoint-2" / file
    os.truncate(path, path.stat().st_size - 9)
    assert what_is_wrong(run / "checkpoint-2", with_grades=True) == f"{file} is incomplete"
    path.unlink()
    assert " is missing (" in what_is_wrong(run / "checkpoint-2", with_grades=True)
    assert newest_whole(run, with_grades=True) == run / "checkpoint-1"
    (warning,) = warnings_in(caplog)
    assert f"{run / 'checkpoint-2'} is not whole, and is passed over: the " in warning


def test_a_missing_shard_is_named(run):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (run / "checkpoint-2" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert what_is_wrong(run / "checkpoint-2", with_grades=True) == "model-2.safetensors is missing"


def test_checkpoints_are_ordered_by_their_steps(run):
    for step in (9, 10):
        shutil.copytree(run / "checkpoint-1", run / f"checkpoint-{step}")
    assert newest_whole(run, with_grades=True).name == "checkpoint-10"
    shutil.rmtree(run)
    assert newest_whole(run, with_grades=True) is None


def resumed(run, *flags):
    """The checkpoint that a run with these flags goes on from."""
    words = ["--model_name_or_path", "model", "--report_to", "none", "--output_dir", str(run), *flags]
    recipe, training, model_args, grades = parse("", run, words)
    set_up_resume(recipe, training, model_args, grades)
    return training.resume_from_checkpoint


@pytest.mark.parametrize("flag", ["--resume=auto", "--resume=true", "--resume_from_checkpoint=auto"])
def test_auto_takes_the_newest_whole_checkpoint_or_starts(tmp_path, saved, flag, caplog):
    caplog.set_level(logging.INFO, logger="grades_trl")
    assert resumed(tmp_path / "run", flag) is None
    assert "There is no whole checkpoint in" in caplog.text and "the run starts" in caplog.text
    shutil.copytree(saved, tmp_path / "run", dirs_exist_ok=True)
    assert resumed(tmp_path / "run", flag) == str(tmp_path / "run" / "checkpoint-2")
    (tmp_path / "run" / "checkpoint-2" / "rng_state.pth").unlink()
    assert resumed(tmp_path / "run", flag) == str(tmp_path / "run" / "checkpoint-1")
    shutil.rmtree(tmp_path / "run" / "checkpoint-1")
    assert resumed(tmp_path / "run", flag) is None


def test_a_checkpoint_is_named_by_either_flag_but_not_by_both(run):
    checkpoint = str(run / "checkpoint-1")
    assert resumed(run, "--resume", checkpoint) == checkpoint
    assert resumed(run, "--resume_from_checkpoint", checkpoint) == checkpoint
    assert resumed(run) is None
    assert resumed(run, "--resume_from_checkpoint", "false") is None
    with pytest.raises(ValueError, match="mean the same: give one"):
        resumed(run, "--resume", "auto", "--resume_from_checkpoint", checkpoint)
    with pytest.raises(ValueError, match="there is no such folder; expected that of a checkpoint, or auto"):
        resumed(run, "--resume", "checkpoint-7")
    os.truncate(run / "checkpoint-1" / "optimizer.pt", 100)
    with pytest.raises(ValueError, match=r"optimizer\.pt is incomplete, so the run would go on with other weights"):
        resumed(run, "--resume", checkpoint)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model_name_or_path", "other"], "model_name_or_path was 'model' and is 'other'"),
        (["--dataset_name", "b.jsonl"], "dataset_name was 'a.jsonl' and is 'b.jsonl'"),
        (["--learning_rate", "1"], "learning_rate was 2e-05 and is 1.0"),
        (["--metric", "grad_norm", "--tau", "3"], "metric was 'gain' and is 'grad_norm', tau was None and is 3"),
        (["--seed", "1", "--use_peft", "--lora_r", "4"], "seed was 42 and is 1"),
    ],
)
def test_a_folder_of_another_run_is_refused(run, flags, said):
    first = ["--dataset_name", "a.jsonl", "--hub_token", "secret"]
    shutil.move(run, run.with_name("aside"))
    resumed(run, *first)  # it starts, and is killed
    before = (run / SETTINGS).read_text()
    assert "secret" not in before
    with pytest.raises(ValueError, match="Choose another --output_dir") as refused:
        resumed(run, *first, *flags, "--resume", "auto")
    assert f"{run} holds another run: " in str(refused.value) and said in str(refused.value)
    assert (run / SETTINGS).read_text() == before

    # Without checkpoints, a new run takes the folder; with them, they would pass for its own
    shutil.copytree(run.with_name("aside"), run, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="holds another run"):
        resumed(run, *first, *flags)
    assert resumed(run, *first, "--resume", "auto")
    shutil.rmtree(run / "checkpoint-1")
    shutil.rmtree(run / "checkpoint-2")
    assert resumed(run, *first, *flags) is None
    assert (run / SETTINGS).read_text() != before


def test_what_makes_no_other_run_may_change(run):
    shutil.move(run, run.with_name("aside"))
    resumed(run)
    shutil.copytree(run.with_name("aside"), run, dirs_exist_ok=True)
    flags = "--resume auto --logging_steps 3 --save_steps 7 --run_name x --num_samples 0 --hub_token y"
    assert resumed(run, *flags.split()) == str(run / "checkpoint-2")


def test_checkpoints_of_an_unknown_run_are_not_taken(run):
    with pytest.raises(ValueError, match=r"has checkpoints, but no settings\.json .* name the checkpoint"):
        resumed(run, "--resume", "auto")


def test_a_whole_file_is_not_loaded(run, monkeypatch):
    monkeypatch.setattr(torch, "load", None)
    assert what_is_wrong(run / "checkpoint-2", with_grades=True) is None
