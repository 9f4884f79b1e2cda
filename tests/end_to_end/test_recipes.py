"""The recipes by their command line, some in processes of their own, and what they leave on disk and in W&B."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trl
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, GenerationMixin

from helpers import chat_tokenizer, model_for
from vlm import builtin as vlm_builtin
from wandb_reader import read_run

ROOT = Path(__file__).parents[2]
EVIDENCE = ("events.jsonl", "history.parquet", "gain.parquet", "summary.json", "timeline.png", "report.html")


def start(recipe, *flags, cwd):
    """Runs a recipe as a user does who is not logged in to W&B."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    command = [sys.executable, str(ROOT / "recipes" / recipe), *map(str, flags)]
    home = {"HOME": str(cwd), "NETRC": str(cwd / "netrc")}
    return subprocess.run(
        command, cwd=cwd, env=environment | home, capture_output=True, text=True, timeout=400, stdin=subprocess.DEVNULL
    )


# What a run of a recipe may say on stderr: these lines, and none of another library.
OURS = (
    r"W&B: not logged in, recording offline\.",
    r"step +\d+(: froze |: training again |  loss |  validation loss )",
    r"\d+ examples of the schedule are too few to measure a held-out ",
    r"The (held-out |run end|outputs of the frozen )",
    r"(tau|Thresholds) ",
)


def succeeded(done):
    """What was printed and logged."""
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert [line for line in done.stderr.splitlines() if not re.match("|".join(OURS), line)] == []
    return done.stdout + done.stderr


def check_wandb(output_dir, expected_keys):
    (path,) = (output_dir / "wandb").glob("offline-run-*")
    recorded = read_run(path)
    keys = {key for row in recorded["history"] for key in row}
    assert expected_keys <= keys, expected_keys - keys
    figures = [row["grades/timeline"] for row in recorded["history"] if "grades/timeline" in row]
    assert len(figures) == 1  # at the end: a run as short as this one has no time for more
    assert all(figure["_type"] == "image-file" for figure in figures)
    heatmaps = [row["grades/gain_heatmap"] for row in recorded["history"] if "grades/gain_heatmap" in row]
    assert heatmaps and all(image["_type"] == "image-file" for image in heatmaps)
    tables = [row["grades/matrices"] for row in recorded["history"] if "grades/matrices" in row]
    assert [table["_type"] for table in tables] == ["table-file"]
    for media in (*figures, *heatmaps, *tables):
        assert (path / "files" / media["path"]).stat().st_size > 0
    assert any(name.startswith("grades-") for name in recorded["artifacts"])
    return recorded


def test_text_demo(tmp_path):
    flags = ["--max_steps", 60, "--eval_steps", 30, "--num_eval_generations", 20, "--num_samples", 2]
    flags += ["--metric", "grad_change", "--auto_ratio", 1.5, "--alpha", 0.3, "--patience", 3]
    printed = succeeded(start("sft_text.py", *flags, "--max_train_samples", 640, cwd=tmp_path))
    assert printed.count("recording offline") == 1
    assert "examples   640 to train on, 300 to validate on, 300 to test on" in printed
    assert "language         4                28          669,952          669,952" in printed
    assert "it/s" not in printed  # no bars where stderr is no terminal
    for line in (
        "expected  ",
        "before    ",
        "after     ",
        "exact_match_test_formats ",
        "                                  before       after",
        "step 30  validation loss ",
        "  speed-up  ",
        "Was it worth it? Compare it with the baseline:",
    ):
        assert line in printed, line
    output_dir = tmp_path / "outputs" / "demo_text"
    for file in EVIDENCE:
        assert (output_dir / "grades" / file).stat().st_size > 0
    summary = json.loads((output_dir / "grades" / "summary.json").read_text())
    assert summary["frozen"] > 0
    assert 0 <= summary["results"]["final/exact_match_test"] <= 1
    # Not step_speedup: on a busy machine steps vary too much to say; tests/test_run_report.py has a clock of its own.
    recorded = check_wandb(
        output_dir,
        {
            "train/loss",
            "eval/loss",
            "grades/frozen_fraction",
            "grades/frozen_params_fraction",
            "grades/language/frozen_fraction",
            "grades/step_time",
            "grades/step_speedup_predicted",
            "grades/overhead_ms",
            "grades/language/metric",
        },
    )
    assert recorded["summary"]["grades/frozen"] == summary["frozen"]
    assert recorded["config"]["grades"]["auto_ratio"] == 1.5
    assert recorded["summary"]["final/exact_match_test"] == summary["results"]["final/exact_match_test"]
    assert (
        recorded["summary"]["test/loss"]
        == summary["results"]["final/test_loss"]
        != summary["results"]["final/validation_loss"]
    )


def test_vlm_builtin(tmp_path):
    """With the paper's metric every matrix converges in the first step in which it may."""
    flags = ["--max_steps", 40, "--eval_steps", 40, "--num_eval_generations", 10, "--num_samples", 2]
    flags += ["--warmup_steps", 39]
    flags += ["--max_train_samples", 640, "--metric", "grad_change", "--auto_ratio", 1000, "--alpha", 0.5]
    printed = succeeded(start("sft_vlm.py", *flags, cwd=tmp_path))
    assert "The held-out loss of 16 rows is measured every 6 steps" in printed
    assert "GradES: 21 of 40 steps; all matrices frozen" in printed
    assert "51 of 51 matrices" in printed
    assert "3 measurements of 16 examples" in printed
    assert "exact_match_blank_images" in printed
    output_dir = tmp_path / "outputs" / "demo_vlm"
    for file in EVIDENCE:
        assert (output_dir / "grades" / file).stat().st_size > 0
    assert Image.open(output_dir / "samples.png").size[0] > 500
    towers = json.loads((output_dir / "grades" / "summary.json").read_text())["towers"]
    assert set(towers) == {"vision", "language"}
    assert all(tower["frozen"] > 0 for tower in towers.values())
    check_wandb(output_dir, {"grades/vision/frozen_fraction", "grades/vision/metric", "grades/samples"})


def test_text_on_a_users_own_chats_with_lora_and_a_checkpoint(run, tmp_path):
    chats = [
        {"messages": [{"role": "user", "content": f"{i} plus 1?"}, {"role": "assistant", "content": str(i + 1)}]}
        for i in range(60)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(chat) for chat in chats))
    flags = "--dataset_name chats.jsonl --use_peft --lora_r 4 --max_steps 8 --output_dir out --report_to none"
    flags += " --save_strategy steps --save_steps 4 --num_eval_generations 3 --num_samples 1 --max_new_tokens 4"
    flags += " --metric grad_norm --tau 1e9 --alpha 0.3"
    printed = run("sft_text.py", "--config demo_text", flags)
    assert "54 to train on, 3 to validate on, 3 to test on" in printed
    assert "all matrices frozen" in printed
    assert "WARNING: The warm-up takes 50 steps and the run has 8: " in printed  # those of the config
    assert not (tmp_path / "out" / "wandb").exists()
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_early_stopping_goes_back_to_the_best_checkpoint(run, tmp_path):
    flags = "--grades false --early_stopping_patience 2 --max_steps 40 --eval_steps 2 --report_to none --num_samples 0"
    flags += " --warmup_steps 0 --learning_rate 0.3 --max_train_samples 32 --num_eval_generations 0"  # soon worse
    run("sft_text.py", flags)
    result = json.loads((tmp_path / "outputs" / "demo_text" / "result.json").read_text())
    losses = [entry["eval_loss"] for entry in result["validation"]]
    best = losses.index(min(losses))
    assert result["stop_reason"] == "early stopping"
    assert len(losses) == best + 3 < 20
    assert result["results"]["final/validation_loss"] == pytest.approx(losses[best], rel=1e-5)
    assert result["seconds"]["saving"] > 0
    (kept,) = (tmp_path / "outputs" / "demo_text").glob("checkpoint-*")
    assert kept.name == f"checkpoint-{2 * (best + 1)}"
    assert not (kept / "optimizer.pt").exists()


def test_vlm_on_a_users_own_folder_of_images(run, refused, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rows = []
    for i, example in enumerate(vlm_builtin.digit_images(train=24, test=2)["train"]):
        example["images"][0].save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "messages": example["prompt"] + example["completion"]})
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    flags = "--dataset_name images --max_steps 3 --output_dir out --report_to none --num_samples 1"
    flags += " --num_eval_generations 2"
    printed = run("sft_vlm.py", "--config demo_vlm", flags, "--train_towers language")
    assert "21 to train on, 1 to validate on, 2 to test on" in printed
    assert "vision           5                 0        1,018,752                0" in printed
    (folder / "7.png").write_bytes(b"no image")
    assert "row 7" in refused("sft_vlm.py", "--config demo_vlm", flags)


@pytest.mark.parametrize("recipe", ["sft_text.py", "sft_vlm.py"])
def test_answers_before_and_after_training_end_at_the_same_tokens(recipe, run, tmp_path, folder, monkeypatch):
    """Of a model whose generation config does not know its tokenizer's end-of-sequence token."""
    source, load = (folder, AutoTokenizer) if recipe == "sft_text.py" else (vlm_builtin.READER, AutoProcessor)
    shutil.copytree(source, tmp_path / "base")
    processor = load.from_pretrained(source)
    tokenizer = getattr(processor, "tokenizer", processor)
    other = next(token for token in tokenizer.all_special_tokens if token != tokenizer.eos_token)
    tokenizer.eos_token = other
    processor.save_pretrained(tmp_path / "base")
    seen, generate = [], GenerationMixin.generate

    def record(model, *args, **kwargs):
        seen.append(model.generation_config.eos_token_id)
        return generate(model, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", record)
    flags = "--model_name_or_path base --max_steps 1 --warmup_steps 0 --max_train_samples 16 --max_eval_samples 4"
    flags += " --eval_strategy no --num_eval_generations 1 --num_samples 1 --max_new_tokens 2 --grades false"
    config = "demo_text" if recipe == "sft_text.py" else "demo_vlm"
    run(recipe, f"--config {config} --report_to none --output_dir out", flags)
    assert len(seen) > 2 and all(tokenizer.eos_token_id in stops for stops in seen)
    assert all(stops == seen[0] for stops in seen)


@pytest.mark.parametrize(("flag", "warns"), [("", True), ("--eos_token <|im_end|>", False)], ids=["without", "with"])
def test_a_base_model_with_the_template_of_a_chat_model(run, tmp_path, flag, warns):
    """Its tokenizer has the tokens of ChatML, and ends a text otherwise."""
    chatml = (Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text()
    tokenizer = chat_tokenizer(chatml, "<|im_start|>", "<|im_end|>", "<|text|>", eos_token="<|text|>")
    tokenizer.save_pretrained(tmp_path / "base")
    model_for(tokenizer, eos_token_id=tokenizer.eos_token_id).save_pretrained(tmp_path / "base")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 8)
    printed = run("sft_text.py", "--preview --model_name_or_path base --dataset_name chats.jsonl --test_size 2", flag)
    said = "The chat template ends a reply with <|im_end|>. Answers stop at <|text|>, so that they will not end: add "
    assert (f"WARNING: {said}--eos_token '<|im_end|>'." in " ".join(printed.split())) == warns


@pytest.mark.parametrize("recipe", ["sft_text.py", "sft_vlm.py"])
def test_help_is_readable(recipe, run, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "119")
    with pytest.raises(SystemExit):
        run(recipe, "--help")
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) < 150
    for flag in (
        "--metric",
        "--tau",
        "--alpha",
        "--patience",
        "--backend",
        "--dataset_name",
        "--use_peft",
        "--help_all",
    ):
        assert flag in printed, flag
    assert "adafactor" not in printed


def test_stdout_has_nothing_but_the_recipes_own_prints(tmp_path):
    """For those who read it by a program: logs and progress go to stderr."""
    flags = "--disable_tqdm true --report_to none --max_steps 6 --eval_strategy no --logging_strategy no"
    flags += " --num_eval_generations 0 --num_samples 0 --max_train_samples 64 --warmup_steps 0"
    flags += " --metric grad_norm --tau 1e9 --alpha 0.5"
    done = start("sft_text.py", *flags.split(), cwd=tmp_path)
    succeeded(done)
    assert "step 4: froze the language tower; 28 of 28 frozen" in done.stderr
    lines = [line for line in done.stdout.splitlines() if line and not line.startswith("{")]  # those of the Trainer
    assert lines[0].startswith("model      Qwen3ForCausalLM, on CPU")
    assert lines[1] == "examples   64 to train on, 300 to validate on, 300 to test on"
    assert lines[3].split() == ["tower", "layers", "matrices", "tracked", "parameters", "trainable"]
    assert lines[5] == "First example, 23 tokens, of which 11 are learned, in [[ ]]:"
    assert lines[7].split() == ["after", "rows"]
    assert "step 4" not in done.stdout
