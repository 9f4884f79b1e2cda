"""`--resume auto` after a run that was killed while it saved."""

import os
import shutil

from safetensors.torch import load_file

QUICK = (
    "--output_dir out --max_steps 6 --eval_steps 50 --per_device_train_batch_size 4 --max_train_samples 32 "
    "--num_eval_generations 2 --num_samples 0 --max_new_tokens 2 --report_to none --save_strategy steps --save_steps 2"
)


def test_a_killed_run_goes_on_from_its_newest_whole_checkpoint_and_ends_as_the_straight_one(run, tmp_path):
    run("sft_text.py", "--config demo_text --resume auto", QUICK)  # it starts
    out = tmp_path / "out"
    straight = load_file(out / "model.safetensors")
    for path in ("model.safetensors", "result.json"):
        (out / path).unlink()
    (out / "checkpoint-6" / "trainer_state.json").unlink()
    os.truncate(out / "checkpoint-6" / "rng_state.pth", 100)

    printed = run("sft_text.py", "--config demo_text --resume auto", QUICK)
    assert "checkpoint-6 is not whole, and is passed over" in printed
    assert "The run goes on from out/checkpoint-4" in printed
    resumed = load_file(out / "model.safetensors")
    assert all(resumed[name].equal(tensor) for name, tensor in straight.items())

    printed = run("sft_text.py", "--config demo_text --resume auto", QUICK)
    assert "Nothing is left to train" in printed
    shutil.rmtree(out)
