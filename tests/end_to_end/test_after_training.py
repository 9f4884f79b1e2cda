"""The model is on disk whatever fails after its last step; and runs that end in other ways than usual."""

import errno
import io
import json
import re
import sys
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file

from grades_trl.recipe import data
from grades_trl.recipe import results as recipe_results
from grades_trl.report.run_report import RunReport
from grades_trl.report.tracking import Tracker

TEXT = f"--config {Path(__file__).parents[2] / 'configs' / 'demo_text.yaml'}"
QUICK = "--max_steps 3 --eval_strategy no --num_eval_generations 2 --num_samples 1 --max_new_tokens 2"
QUICK += " --max_train_samples 64 --max_eval_samples 20 --warmup_steps 0 --output_dir out"


def weights(tmp_path):
    return load_file(tmp_path / "out" / "model.safetensors")


def result(tmp_path):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads((tmp_path / "out" / "result.json").read_text(), parse_constant=refuse)


def fail(error):
    def failing(*_, **__):
        raise error

    return failing


FULL_DISK = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("owner", "name", "error", "flags"),
    [
        (transformers.Trainer, "evaluate", KeyboardInterrupt("ctrl-c"), "--report_to none"),
        (transformers.Trainer, "evaluate", RuntimeError("out of memory"), "--report_to none --grades false"),
    ],
    ids=["ctrl-c", "evaluation"],
)
def test_the_model_is_saved_before_anything_can_fail(run, tmp_path, monkeypatch, owner, name, error, flags):
    monkeypatch.setattr(owner, name, fail(error))
    with pytest.raises(type(error), match=re.escape(str(error))):
        run("sft_text.py", QUICK, flags)
    saved = weights(tmp_path)
    assert all(tensor.isfinite().all() for tensor in saved.values())
    assert (tmp_path / "out" / "tokenizer_config.json").exists()


@pytest.mark.parametrize(
    ("owner", "name", "flags", "said"),
    [
        (RunReport, "write", "--report_to none", "out/grades could not be written"),
        (Tracker, "log_report", "--report_to wandb", "out/grades could not be written"),
        (transformers.integrations.WandbCallback, "on_train_end", "--report_to wandb", "W&B has failed"),
        (recipe_results, "write_json", "--report_to none --grades false", "out/result.json could not be written"),
    ],
    ids=["report", "wandb folder", "wandb callback", "result.json"],
)
def test_a_full_disk_after_training_is_said_and_the_scores_are_shown(
    run, tmp_path, monkeypatch, owner, name, flags, said
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setattr(owner, name, fail(FULL_DISK))
    printed = run("sft_text.py", QUICK, flags)
    assert said in printed and "No space left on device" in printed
    assert re.search(r"test_loss +\d", printed)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


def test_a_test_split_that_is_truncated_away_is_refused_before_training(run, tmp_path, capsys):
    rows = [{"prompt": "1" * length, "completion": "2"} for length in (300, 300, 5, 5)]
    folder = tmp_path / "rows"
    folder.mkdir()
    for split, of_split in (("train", rows[2:] * 8), ("test", rows)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_split))

    def tested(seed):
        return data.with_validation(data.load(str(folder), seed=seed))["test"]["prompt"][:]

    seed = next(seed for seed in range(100) if tested(seed) == ["1" * 300] * 2)  # the halves are drawn
    with pytest.raises(SystemExit, match="2"):
        run("sft_text.py", TEXT, QUICK, "--dataset_name rows --report_to none --seed", seed)
    assert "test: of 2 examples, 2 have no reply left within --max_length 128: raise it" in capsys.readouterr().err


def test_a_terminal_without_the_characters_of_a_row(run, tmp_path, monkeypatch):
    rows = [{"prompt": f"{i}は?", "completion": "日本語"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    run("sft_text.py", TEXT, QUICK, "--dataset_name rows.jsonl --report_to none")
    terminal.flush()
    assert b"expected  ???" in terminal.buffer.getvalue()
    assert result(tmp_path)["results"]["final/test_loss"] > 0


@pytest.mark.parametrize("grades", ["true", "false"])
def test_the_last_checkpoint_of_a_finished_run_gives_its_model_and_scores_again(run, tmp_path, grades):
    flags = f"--save_strategy steps --save_steps 3 --report_to none --grades {grades}"
    run("sft_text.py", QUICK, flags)
    before, scores = weights(tmp_path), result(tmp_path)["results"]
    printed = run("sft_text.py", QUICK, flags, "--resume_from_checkpoint out/checkpoint-3")
    assert "All steps of this run have been done" in printed
    assert result(tmp_path)["results"] == scores
    assert all(tensor.equal(before[name]) for name, tensor in weights(tmp_path).items())


def test_a_run_that_was_killed_before_its_scores_leaves_the_model_when_requeued(run, tmp_path):
    flags = "--save_strategy steps --save_steps 3 --report_to none"
    run("sft_text.py", QUICK, flags)
    before = weights(tmp_path)
    (tmp_path / "out" / "result.json").unlink()
    (tmp_path / "out" / "model.safetensors").unlink()
    run("sft_text.py", QUICK, flags, "--resume_from_checkpoint out/checkpoint-3")
    assert all(tensor.equal(before[name]) for name, tensor in weights(tmp_path).items())


@pytest.mark.parametrize("grades", ["true", "false"])
def test_a_run_that_ends_before_its_first_update(run, tmp_path, monkeypatch, grades):
    """As by a signal in the middle of an accumulated step."""

    def stop(self, args, state, control, **kwargs):
        control.should_training_stop = True

    monkeypatch.setattr(transformers.trainer_callback.DefaultFlowCallback, "on_substep_end", stop, raising=False)
    run("sft_text.py", QUICK, f"--gradient_accumulation_steps 2 --report_to none --grades {grades}")
    found = result(tmp_path)
    assert (found["steps"], found["total_steps"]) == (0, 3)
    assert found["results"]["final/test_loss"] > 0
    assert weights(tmp_path)


@pytest.mark.parametrize("grades", ["true", "false"])
def test_a_run_that_diverges_says_so_and_fails(run, tmp_path, grades):
    flags = f"--learning_rate 1e6 --max_steps 30 --max_grad_norm 0 --report_to none --grades {grades}"
    with pytest.raises(SystemExit) as ended:
        run("sft_text.py", QUICK, flags)
    assert "The run has diverged" in ended.value.code and "Lower --learning_rate" in ended.value.code
    found = result(tmp_path)
    assert found["results"]["final/test_loss"] is None
    if grades == "true":
        assert 0 < found["diverged_at"] < 30
        assert f"at step {found['diverged_at']}" in ended.value.code
        assert found["flops"] is None
