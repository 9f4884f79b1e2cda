"""evaluate.py gives the scores of a run again from what the run has left on disk, and those of other models."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUICK = "--report_to none --max_steps 4 --eval_steps 4 --warmup_steps 0 --num_samples 2"


def results(folder):
    return json.loads((folder / "result.json").read_text())["results"]


def scores(tmp_path):
    return json.loads((tmp_path / "outputs" / "evaluate" / "scores.json").read_text())["scores"]


def as_in_the_run(scores, results):
    assert scores["test_loss"] == pytest.approx(results["final/test_loss"], rel=1e-5)
    assert scores["token_accuracy"] == results["final/eval_mean_token_accuracy"]
    assert scores["test_loss"] != pytest.approx(results["final/validation_loss"], rel=1e-3)


def yes_or_no(path):
    """Chats that a model answers by the more frequent of two words before it has learned anything else."""
    with path.open("w") as file:
        for i in range(90):
            answer = "no" if i % 3 == 0 else "yes"
            turns = [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")


def test_text_demo_and_its_baseline(run, tmp_path):
    quick = f"{QUICK} --max_train_samples 64 --max_eval_samples 25 --num_eval_generations 4"
    quick += " --per_device_eval_batch_size 10"
    printed = run("sft_text.py", quick)
    assert re.search(r"other models: python \S+/evaluate.py outputs/demo_text\n", printed)
    printed = run("sft_text.py", quick, "--grades false --output_dir outputs/demo_text_baseline --learning_rate 1e-4")
    assert "evaluate.py outputs/demo_text outputs/demo_text_baseline\n" in printed

    # As a user does it, in a process of its own
    command = [
        sys.executable,
        str(ROOT / "recipes" / "evaluate.py"),
        "outputs/demo_text",
        "outputs/demo_text_baseline",
    ]
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Scored with the rows and settings of outputs/demo_text;" in done.stderr
    assert "25 examples to score, 4 to answer" in done.stdout
    assert done.stdout.count("  expected  ") == 2
    found = scores(tmp_path)
    for name, of_model in found.items():
        run_scores = results(tmp_path / name)
        as_in_the_run(of_model, run_scores)
        assert of_model["exact_match"] == run_scores["final/exact_match_test"]
        assert of_model["exact_match_formats"] == run_scores["final/exact_match_test_formats"]
        assert re.search(rf"^ *{name} +{of_model['test_loss']:.4g} ", done.stdout, re.MULTILINE)
    losses = [of_model["test_loss"] for of_model in found.values()]
    assert len(losses) == 2 and losses[0] < losses[1] - 0.1


def test_vision_demo(run, tmp_path):
    run(
        "sft_vlm.py",
        QUICK,
        "--max_train_samples 64 --max_eval_samples 25 --num_eval_generations 4 --per_device_eval_batch_size 10",
    )
    printed = run("evaluate.py", "outputs/demo_vlm/")
    (found,) = scores(tmp_path).values()
    expected = results(tmp_path / "outputs" / "demo_vlm")
    as_in_the_run(found, expected)
    assert found["exact_match"] == expected["final/exact_match"]
    assert found["exact_match_blank_images"] == expected["final/exact_match_blank_images"]
    assert "evaluate.py ANOTHER_MODEL outputs/demo_vlm/\n" in printed
    with pytest.raises(SystemExit, match="The built-in dataset dates is for language models; expected digits"):
        run("evaluate.py", "outputs/demo_vlm --dataset_name dates")


@pytest.mark.parametrize("bits", ["", "--load_in_4bit"], ids=["lora", "qlora"])
def test_an_adapter_beside_its_base(run, tmp_path, folder, bits):
    yes_or_no(tmp_path / "chats.jsonl")
    flags = (
        f"--model_name_or_path {folder} --use_peft --lora_r 8 --learning_rate 0.005 --max_length 64 {bits} --seed 7"
    )
    flags += " --dataset_name chats.jsonl --test_size 0.4 --num_eval_generations 9 --max_new_tokens 4"
    flags += " --output_dir outputs/adapter"
    config = f"--config {ROOT / 'configs' / 'demo_text.yaml'}"
    run("sft_text.py", config, QUICK, flags, "--max_steps 25 --grades false --lr_scheduler_type constant")

    printed = run("evaluate.py", folder, "outputs/adapter")
    assert "18 examples to score, 9 to answer" in printed
    base, adapter = scores(tmp_path).values()
    expected = results(tmp_path / "outputs" / "adapter")
    as_in_the_run(adapter, expected)
    # Of just these rows that many are yes: with another seed or half it would be another share
    assert adapter["exact_match"] == expected["final/exact_match_test"]
    assert 0 < adapter["exact_match"] < 1
    assert base["exact_match"] == expected["before/exact_match_test"] == 0
    assert base["test_loss"] > adapter["test_loss"] + 1

    printed = run("evaluate.py", "outputs/adapter", "--seed 8 --num_eval_generations 0")
    assert "WARNING: outputs/adapter held out other rows" in printed
    assert f"evaluate.py {folder} outputs/adapter --seed 8" in printed
    (other,) = scores(tmp_path).values()
    assert set(other) == {"test_loss", "perplexity", "token_accuracy"}
    assert other["test_loss"] != adapter["test_loss"]


def test_baseline_text_and_models_of_two_kinds(run, tmp_path, folder):
    from vlm.builtin import tiny_llava

    rows = [json.dumps({"body": f"{i} and {i + 1}"}) for i in range(12)]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows))
    printed = run("evaluate.py", folder, "--dataset_name texts.jsonl --dataset_text_field body --test_size 0.5")
    assert "3 examples to score, 0 to answer" in printed
    assert scores(tmp_path)[folder]["perplexity"] > 10
    for part in tiny_llava():
        part.save_pretrained("sees")
    with pytest.raises(SystemExit, match=r"score them apart\. Vision: sees"):
        run("evaluate.py", folder, "sees --dataset_name dates")
    with pytest.raises(SystemExit, match="No data: give --dataset_name"):
        run("evaluate.py", folder)


def test_help_is_short(run, capsys):
    with pytest.raises(SystemExit):
        run("evaluate.py", "--help")
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) < 55
    for flag in ("MODEL ", "--dataset_name", "--num_eval_generations", "--load_in_4bit", "--output_dir"):
        assert flag in printed, flag
    assert "--learning_rate" not in printed
    with pytest.raises(SystemExit):
        run("evaluate.py", "one --dataset_name dates two")
    assert "not understood: two. Models come first" in capsys.readouterr().err
