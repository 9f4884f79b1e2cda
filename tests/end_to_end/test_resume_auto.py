"""`--resume auto` after a run that was killed, interrupted or has finished."""

import json
import os
import shutil

from safetensors.torch import load_file

QUICK = (
    "--output_dir out --max_steps 6 --eval_steps 50 --per_device_train_batch_size 4 --max_train_samples 32 "
    "--num_eval_generations 2 --num_samples 0 --max_new_tokens 2 --report_to none --save_strategy steps --save_steps 2"
)
RECORD = ("events.jsonl", "heldout.jsonl", "history.parquet", "gain.parquet")


def record(out):
    """What a run has written of its freezes and measurements."""
    return {name: (out / "grades" / name).read_bytes() for name in RECORD if (out / "grades" / name).exists()}


def test_a_killed_run_goes_on_and_ends_as_the_straight_one(run, tmp_path):
    flags = QUICK + ' --metric schedule --schedule {"language":2} --stopping end_of_schedule --keep last'
    run("sft_text.py", "--config demo_text --resume auto", flags)  # it starts
    out = tmp_path / "out"
    straight, recorded = load_file(out / "model.safetensors"), record(out)
    result = json.loads((out / "result.json").read_text())["results"]

    # Killed after step 4: the next checkpoint is a part of one, and the record has torn lines and those of later steps
    shutil.rmtree(out / "checkpoint-6")
    (out / "_saving").mkdir()
    (out / "model.safetensors").unlink()
    os.truncate(out / "grades" / "history.parquet", 50)
    with (out / "grades" / "events.jsonl").open("a") as file:
        file.write('{"step": 3, "matrix": "no')
    not_finished(out)
    printed = run("sft_text.py", "--config demo_text --resume auto", flags)
    assert "The run goes on from out/checkpoint-4" in printed
    resumed = load_file(out / "model.safetensors")
    assert all(resumed[name].equal(tensor) for name, tensor in straight.items())
    assert record(out) == recorded

    # A requeued job returns at once
    printed = run("sft_text.py", "--config demo_text --resume auto", flags, "--export merged")
    assert "This run has finished: out has its model and its result.json" in printed
    assert "export.py out --export merged" in printed and "Training on" not in printed

    # Killed between its last step and its scores
    shutil.rmtree(out / "grades")
    for path in ("model.safetensors", "result.json", "README.md"):
        (out / path).unlink()
    not_finished(out)
    printed = run("sft_text.py", "--config demo_text --resume auto", flags)
    assert "All steps of this run have been done" in printed
    resumed = load_file(out / "model.safetensors")
    assert all(resumed[name].equal(tensor) for name, tensor in straight.items())
    assert json.loads((out / "result.json").read_text())["results"] == result
    assert record(out) == recorded
    assert (out / "README.md").exists() and (out / "grades" / "summary.json").exists()


def not_finished(out):
    arguments = json.loads((out / "arguments.json").read_text())
    assert arguments.pop("finished")
    (out / "arguments.json").write_text(json.dumps(arguments))
