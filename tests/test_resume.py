"""Which checkpoint a run goes on from: what is whole, and what belongs to the run."""

import json
import logging
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import Trainer, TrainerState
from trl import SFTTrainer

from grades_trl import GradESConfig, GradESTrainer
from grades_trl.recipe import builtin
from grades_trl.recipe.arguments import parse
from grades_trl.recipe.resume import ARGUMENTS, mark_finished, set_up_resume
from grades_trl.trainers import mixin, whole_checkpoint
from grades_trl.trainers.checkpoint import load_state
from grades_trl.trainers.whole_checkpoint import MANIFEST, SAVING, newest_whole, what_is_wrong
from helpers import LORA, arguments, model_for, warnings_in

pytestmark = pytest.mark.usefixtures("no_figures")


def train(folder, steps=2, grades=True, peft_config=None, eval=(), **changes):
    """Saves after each step. `eval`: what it measures then."""
    dataset, (_, tokenizer) = builtin.dates(train=32, test=8), builtin.tiny_qwen3()
    args = arguments(folder, max_steps=steps, save_strategy="steps", save_steps=1, **changes)
    extra = {"grades": GradESConfig()} if grades else {}  # as a recipe without flags has it
    trainer = (GradESTrainer if grades else SFTTrainer)(
        model=model_for(tokenizer),
        args=args,
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        processing_class=tokenizer,
        peft_config=peft_config,
        **extra,
    )
    if eval:
        trainer._evaluate = lambda *_, **__: {"eval_loss": eval[trainer.state.global_step - 1]}
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


def die_at(monkeypatch, owner, name, folder):
    """A process that ends before the first call of a function after `folder` has its first checkpoint."""
    own = getattr(owner, name)

    def die(*args, **kwargs):
        if (folder / "checkpoint-1" / "trainer_state.json").exists():
            raise Killed
        return own(*args, **kwargs)

    monkeypatch.setattr(owner, name, die)


MOMENTS = {
    "first": (Trainer, "store_flos"),
    "optimizer": (Trainer, "_save_optimizer_and_scheduler"),
    "random state": (Trainer, "_save_rng_state"),
    "steps": (TrainerState, "save_to_json"),
    "state": (mixin, "save_state"),
    "manifest": (whole_checkpoint, "_write_manifest"),
    "rename": (whole_checkpoint, "put_in_place"),
}


@pytest.mark.parametrize("moment", list(MOMENTS))
def test_a_process_that_ends_at_any_moment_of_saving_leaves_no_part_of_a_checkpoint(tmp_path, monkeypatch, moment):
    with monkeypatch.context() as patch:
        die_at(patch, *MOMENTS[moment], tmp_path)
        with pytest.raises(Killed):
            train(tmp_path)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert (tmp_path / SAVING).exists() == (moment != "first")
    train(tmp_path)  # it clears up
    assert newest_whole(tmp_path, with_grades=True) == tmp_path / "checkpoint-2"
    assert not (tmp_path / SAVING).exists()


@pytest.mark.parametrize("moment", ["optimizer", "random state", "steps"])
def test_a_part_that_the_stock_trainer_has_left_is_not_taken(tmp_path, monkeypatch, moment):
    die_at(monkeypatch, *MOMENTS[moment], tmp_path)
    with pytest.raises(Killed):
        train(tmp_path, grades=False)
    assert (tmp_path / "checkpoint-2").exists()
    assert newest_whole(tmp_path, with_grades=False) == tmp_path / "checkpoint-1"


def test_a_checkpoint_takes_the_place_of_another_and_older_ones_go(tmp_path):
    train(tmp_path)
    (tmp_path / "checkpoint-2" / "of_the_other").touch()
    train(tmp_path, steps=3, save_total_limit=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert not (tmp_path / "checkpoint-2" / "of_the_other").exists()


def test_the_best_checkpoint_is_known_by_its_place(tmp_path):
    """The third is the newest, and the second the best: by an odd definition, the one with the higher loss."""
    best = {"metric_for_best_model": "eval_loss", "load_best_model_at_end": True, "save_total_limit": 1}
    best |= {"eval_strategy": "steps", "eval_steps": 1, "greater_is_better": True}
    train(tmp_path, steps=3, eval=[1.0, 3.0, 2.0], **best)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")


def test_what_is_pushed_is_where_it_stays(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda *_, **__: None)
    push = lambda self, folder: pushed.append((folder, os.listdir(folder)))  # noqa: E731
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    train(tmp_path, push_to_hub=True)
    assert [folder for folder, _ in pushed] == [str(tmp_path / f"checkpoint-{step}") for step in (1, 2)]
    assert all(MANIFEST in files for _, files in pushed)


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
    size = path.stat().st_size
    os.truncate(path, size - 9)
    said = {f"{file} is incomplete", f"{file} has {size - 9:,} bytes instead of {size:,}"}
    assert what_is_wrong(run / "checkpoint-2", with_grades=True) in said
    (run / "checkpoint-2" / MANIFEST).unlink()  # as of the stock Trainer
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


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "grades/events.jsonl"])
def test_every_file_of_the_manifest_counts(run, file):
    (run / "checkpoint-2" / file).unlink()
    assert what_is_wrong(run / "checkpoint-2", with_grades=True) == f"{file} is missing"


def damage(file):
    """Another byte, in a file that stays as long as it was."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: damage(folder / "grades_state.safetensors"), r"grades_state\.safetensors is damaged"),
        (lambda folder: damage(folder / "grades_state.json"), r"grades_state\.json is damaged"),
        (lambda folder: (folder / "grades_state.json").write_text("{"), r"grades_state\.json is damaged: .* no JSON"),
        (lambda folder: (folder / "grades_state.json").write_text("{}"), r"grades_state\.json is no state of GradES"),
        (lambda folder: (folder / "grades_state.safetensors").unlink(), r"grades_state\.safetensors is missing"),
        (
            lambda folder: (folder / "grades_state.json").write_text('{"version": 2}'),
            r"grades_state\.json was written by a newer version .* version 2, and this one reads 1\. Update",
        ),
    ],
)
def test_a_damaged_a_foreign_and_a_newer_state_are_named(run, change, said):
    assert load_state(run / "checkpoint-2")["settings"]["metric"] == "gain"
    change(run / "checkpoint-2")
    with pytest.raises(ValueError, match=said) as error:
        load_state(run / "checkpoint-2")
    assert str(run / "checkpoint-2") in str(error.value)


def test_the_state_of_another_checkpoint_is_refused(run):
    other = builtin.tiny_qwen3()[0].state_dict()
    save_file({"a": other["model.norm.weight"].clone()}, run / "checkpoint-2" / "grades_state.safetensors")
    with pytest.raises(ValueError, match=r"grades_state\.safetensors is damaged, or of another checkpoint"):
        load_state(run / "checkpoint-2")


def test_checkpoints_are_ordered_by_their_steps(run):
    for step in (9, 10):
        shutil.copytree(run / "checkpoint-1", run / f"checkpoint-{step}")
    assert newest_whole(run, with_grades=True).name == "checkpoint-10"
    shutil.rmtree(run)
    assert newest_whole(run, with_grades=True) is None


def resumed(run, *flags):
    """The checkpoint that a run with these flags goes on from. Its first step is done."""
    words = ["--model_name_or_path", "model", "--report_to", "none", "--output_dir", str(run), *flags]
    recipe, training, model_args, grades = parse("", run, words)
    set_up_resume(recipe, training, model_args, grades).write()
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
    before = (run / ARGUMENTS).read_text()
    assert "secret" not in before
    with pytest.raises(ValueError, match="Choose another --output_dir") as refused:
        resumed(run, *first, *flags, "--resume", "auto")
    assert f"{run} holds another run: " in str(refused.value) and said in str(refused.value)
    assert (run / ARGUMENTS).read_text() == before

    # Without checkpoints, a new run takes the folder; with them, they would pass for its own
    shutil.copytree(run.with_name("aside"), run, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="holds another run"):
        resumed(run, *first, *flags)
    assert resumed(run, *first, "--resume", "auto")
    shutil.rmtree(run / "checkpoint-1")
    shutil.rmtree(run / "checkpoint-2")
    assert resumed(run, *first, *flags) is None
    assert (run / ARGUMENTS).read_text() != before


def test_a_checkpoint_of_another_folder_is_not_taken_into_one_with_a_run(run, tmp_path):
    first = tmp_path / "first"
    resumed(first)
    shutil.copytree(run / "checkpoint-1", first / "checkpoint-1")
    checkpoint = str(run / "checkpoint-2")
    with pytest.raises(ValueError, match="first holds another run: learning_rate"):
        resumed(first, "--resume", checkpoint, "--learning_rate", "1")
    # Nor may later ones of the same folder be taken for those of a run that has left the way of the first
    shutil.copytree(run / "checkpoint-2", first / "checkpoint-2")
    with pytest.raises(ValueError, match="first holds another run: max_steps was -1 and is 9"):
        resumed(first, "--resume", str(first / "checkpoint-1"), "--max_steps", "9")  # a setting that may change
    assert resumed(first, "--resume", str(first / "checkpoint-1")) == str(first / "checkpoint-1")
    assert resumed(tmp_path / "second", "--resume", checkpoint, "--learning_rate", "1") == checkpoint


def test_a_finished_run_is_not_run_again_and_a_new_one_in_its_folder_is(tmp_path, capsys):
    def start(*flags):
        words = ["--model_name_or_path", "model", "--report_to", "none", "--output_dir", str(tmp_path / "run"), *flags]
        recipe, training, model_args, grades = parse("", tmp_path, words)
        return set_up_resume(recipe, training, model_args, grades), training

    record, training = start("--resume", "auto")
    record.write()
    (tmp_path / "run" / "result.json").touch()
    mark_finished(training)
    assert start("--resume", "auto")[0] is None
    assert "This run has finished" in capsys.readouterr().out
    assert not start("--resume", "auto", "--export", "merged")[0]
    assert f"{tmp_path / 'run'} --export merged" in capsys.readouterr().out
    assert (tmp_path / "run" / "result.json").exists()
    again = start()[0]  # without --resume. It may be refused before its first step
    assert (tmp_path / "run" / "result.json").exists() and start("--resume", "auto")[0] is None
    again.write()
    assert not (tmp_path / "run" / "result.json").exists()
    assert start("--resume", "auto")[0]


def test_what_makes_no_other_run_may_change(run):
    shutil.move(run, run.with_name("aside"))
    resumed(run)
    shutil.copytree(run.with_name("aside"), run, dirs_exist_ok=True)
    flags = "--resume auto --logging_steps 3 --save_steps 7 --run_name x --num_samples 0 --hub_token y --export merged"
    assert resumed(run, *flags.split()) == str(run / "checkpoint-2")


def test_checkpoints_of_an_unknown_run_are_not_taken(run):
    with pytest.raises(ValueError, match=r"has checkpoints, but no arguments\.json .* name the checkpoint"):
        resumed(run, "--resume", "auto")


def test_a_whole_file_is_not_loaded(run, monkeypatch):
    monkeypatch.setattr(torch, "load", None)
    assert what_is_wrong(run / "checkpoint-2", with_grades=True) is None
