"""evaluate.py gives the scores of a run again from what the run has left on disk, and those of other models."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from trl import ModelConfig

from grades_trl.recipe import data, harness
from grades_trl.recipe.models import load_model
from grades_trl.recipe.trained import load_trained
from vlm.builtin import READER
from wandb_reader import read_run

ROOT = Path(__file__).parents[2]
QUICK = "--report_to none --max_steps 4 --eval_steps 4 --warmup_steps 0 --num_samples 2"


def results(folder):
    return json.loads((folder / "result.json").read_text())["results"]


def scores(tmp_path):
    return json.loads((tmp_path / "outputs" / "evaluate" / "scores.json").read_text())["scores"]


def as_in_the_run(scores, results):
    assert scores["test_loss"] == pytest.approx(results["final/test_loss"], rel=1e-5)
    assert scores["token_accuracy"] == results["final/test_token_accuracy"]
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
    assert re.search(r"other models:\n  python \S+/evaluate.py outputs/demo_text\n", printed)
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
        assert of_model["character_error_rate"] > 0  # above 1 where an answer is longer than the expected one
    losses = [of_model["test_loss"] for of_model in found.values()]
    assert re.search(rf"^test_loss +{losses[0]:.4g} +{losses[1]:.4g}$", done.stdout, re.MULTILINE)
    assert len(losses) == 2 and losses[0] < losses[1] - 0.1


def test_vision_demo(run, refused, tmp_path):
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
    said = refused("evaluate.py", "outputs/demo_vlm --dataset_name dates")
    assert "The built-in dataset dates is for language models; expected digits" in said


@pytest.mark.parametrize("bits", ["", "--load_in_4bit"], ids=["lora", "qlora"])
def test_an_adapter_beside_its_base(run, tmp_path, folder, bits):
    yes_or_no(tmp_path / "chats.jsonl")
    flags = (
        f"--model_name_or_path {folder} --use_peft --lora_r 8 --learning_rate 0.005 --max_length 64 {bits} --seed 7"
    )
    flags += " --dataset_name chats.jsonl --test_size 0.4 --num_eval_generations 9 --max_new_tokens 4"
    flags += " --output_dir outputs/adapter"
    config = f"--config {ROOT / 'configs' / 'demo_text.yaml'}"
    flags += " --export merged adapter"
    printed = run("sft_text.py", config, QUICK, flags, "--max_steps 25 --grades false --lr_scheduler_type constant")
    assert "merged: outputs/adapter/merged" in printed and "adapter: outputs/adapter/adapter" in printed
    weights = (tmp_path / "outputs" / "adapter" / "merged" / "model.safetensors").read_bytes()
    printed = run("export.py", "outputs/adapter", "--to again --num_samples 2")
    assert "again/merged: loaded again, the same answers to 2 prompts" in printed
    assert (tmp_path / "again" / "merged" / "model.safetensors").read_bytes() == weights
    assert not (tmp_path / "again" / "adapter").exists()

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


def lora_of(folder, out):
    """An adapter as a run leaves it, without a run."""
    model, tokenizer = load_model(ModelConfig(model_name_or_path=folder, use_peft=True), "transformers")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {rows}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: ["1998-01-01", "2001-12-31"]
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def test_tasks_of_lm_eval_before_and_after(run, tmp_path, folder, monkeypatch):
    """A local task and no network; the harness in a process of its own."""
    rows = [json.dumps({"q": f"{i} May 1998", "gold": i % 3 == 0}) for i in range(12)]
    (tmp_path / "task.jsonl").write_text("\n".join(rows).replace("true", "1").replace("false", "0"))
    (tmp_path / "tiny.yaml").write_text(TASK.format(name="tiny", rows=tmp_path / "task.jsonl"))
    (tmp_path / "evaluate.py").write_text("raise SystemExit('not the package of this name')")
    lora_of(folder, tmp_path / "adapter")
    printed = run("evaluate.py", "adapter --tasks tiny.yaml --tasks_limit 9 --report_to wandb --dtype float32")
    assert f"Scored before and after: {folder} is what the adapter was trained on" in printed
    found = scores(tmp_path)
    assert list(found) == [folder, "adapter"] and list(found["adapter"]) == ["tiny/acc"]
    before, after = (f"{100 * found[name]['tiny/acc']:.1f} %" for name in (folder, "adapter"))
    assert re.search(rf"^tiny/acc +{before} +{after}$", printed, re.M)
    record = json.loads((tmp_path / "outputs" / "evaluate" / "scores.json").read_text())
    assert record["tasks"]["adapter"]["n-samples"]["tiny"]["effective"] == 9

    # The same numbers as from the model itself: the likelier of the two answers
    for name, of_model in found.items():
        model, tokenizer = load_trained(name, ModelConfig(dtype="float32"), vision=False)
        right = [likelier(model.eval(), tokenizer, f"{i} May 1998") == (i % 3 == 0) for i in range(9)]
        assert of_model["tiny/acc"] == pytest.approx(sum(right) / 9)

    (file,) = (tmp_path / "outputs" / "evaluate" / "wandb").glob("offline-run-*/*.wandb")
    recorded = read_run(file)
    assert recorded["summary"]["adapter/tiny/acc"] == found["adapter"]["tiny/acc"]
    assert recorded["summary"][f"{folder}/tiny/acc"] == found[folder]["tiny/acc"]
    assert any("evaluate/scores" in row for row in recorded["history"])


def likelier(model, tokenizer, question):
    """Index of the answer with the higher probability after the question and a space."""
    scores = []
    for choice in ("1998-01-01", "2001-12-31"):
        asked = tokenizer(question, add_special_tokens=False)["input_ids"]
        ids = tokenizer(f"{question} {choice}", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        scores.append(sum(logits[i - 1, ids[i]] for i in range(len(asked), len(ids))))
    return int(scores[1] > scores[0])


# As lmms-eval 0.7.3 does it: it finds tasks by name in --include_path and refuses their files, LlavaHf refuses batches
# and, with Transformers 5, its own default of device_map.
LMMS = """import json, pathlib, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
known = {"mme"} | {file.stem for file in pathlib.Path(flags.get("--include_path", "none")).glob("*.yaml")}
missing = set(flags["--tasks"].split(",")) - known
assert not missing, f"Tasks not found: {missing}"
model_args = dict(pair.split("=") for pair in flags["--model_args"].split(","))
assert flags["--model"] == "llava_hf" and set(model_args) == {"pretrained", "device_map"}, flags
assert model_args["device_map"] == flags["--device"] == "cpu" and flags["--batch_size"] == "1", flags
folder = pathlib.Path(flags["--output_path"], "model")
folder.mkdir(parents=True, exist_ok=True)
results = {"mme": {"alias": "mme", "mme_score,none": 12.5, "mme_score_stderr,none": "N/A"}}
results["mme"] |= {"mme_score_stderr_clt,none": 0.125, "mme_score_stderr_clustered,none": "N/A", "n": 3}
(folder / f"{time.time_ns()}_results.json").write_text(json.dumps({"results": results, "versions": {"mme": 1}}))
"""


def test_tasks_of_lmms_eval(run, refused, tmp_path, monkeypatch):
    """With a stand-in that has its command line and its file: it asks for torchvision and an older wandb."""
    said = refused("evaluate.py", READER, "--tasks mme")
    assert "run by lmms-eval, which is not installed: pip install lmms-eval" in said
    (tmp_path / "path" / "lmms_eval").mkdir(parents=True)
    (tmp_path / "path" / "lmms_eval" / "__init__.py").touch()
    (tmp_path / "path" / "lmms_eval" / "__main__.py").write_text(LMMS)
    monkeypatch.syspath_prepend(tmp_path / "path")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"), prepend=":")
    printed = run("evaluate.py", READER, "--tasks mme")
    assert scores(tmp_path) == {str(READER): {"mme/mme_score": 12.5}}
    assert re.search(r"^mme/mme_score +12\.5$", printed, re.MULTILINE)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "digits.yaml").write_text("dataset_path: json\ntask: 'digits'  # read\n")
    run("evaluate.py", READER, "--tasks mme own/digits.yaml")
    with pytest.raises(SystemExit, match=r"(?s)lmms_eval failed with exit code 1\. The end of .*log\.txt:.*'other'"):
        run("evaluate.py", READER, "--tasks other")
    said = refused("evaluate.py", READER, "--tasks own/digits.yaml other.yaml")
    assert "reads tasks from one folder: put own/digits.yaml, other.yaml into the same one" in said
    (tmp_path / "empty.yaml").touch()
    assert 'empty.yaml is no task of lmms-eval: it has no line "task: NAME"' in refused(
        "evaluate.py", READER, "--tasks empty.yaml"
    )


def test_what_the_harnesses_cannot_run(run, refused, tmp_path, folder, monkeypatch):
    lora_of(folder, tmp_path / "adapter")
    said = refused("evaluate.py", "adapter --tasks boolq --load_in_4bit")
    assert "no adapters on a base in 4 or 8 bits: run python recipes/export.py" in said
    nothing = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setattr(harness, "importlib", nothing)
    said = refused("evaluate.py", folder, "--tasks boolq")
    assert "run by lm-eval, which is not installed: pip install lm-eval" in said


def test_scores_by_category(run, refused, tmp_path, folder):
    rows = [
        {"prompt": f"{i}?", "completion": "7" if i % 2 else "not a number", "kind": "odd" if i % 2 else "even"}
        for i in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = "--dataset_name rows.jsonl --test_size 0.5 --max_new_tokens 4 --per_device_eval_batch_size 1"
    printed = run("evaluate.py", folder, flags, "--category_column kind --num_eval_generations 6")
    (found,) = scores(tmp_path).values()
    record = json.loads((tmp_path / "outputs" / "evaluate" / "scores.json").read_text())
    assert record["examples"]["test"] == 10
    tests = data.with_validation(data.load("rows.jsonl", test_size=0.5, keep=["kind"]))["test"]
    odd = tests["kind"][:].count("odd")
    assert 0 < odd < 10
    mean = (odd * found["odd/test_loss"] + (10 - odd) * found["even/test_loss"]) / 10
    assert mean == pytest.approx(found["test_loss"], rel=1e-4)
    assert found["odd/test_loss"] != pytest.approx(found["even/test_loss"], rel=0.001)
    lengths = {"odd": 1, "even": len("not a number")}
    kinds = tests["kind"][:6]
    of_all = sum(found[f"{kind}/character_error_rate"] * lengths[kind] for kind in kinds)
    assert found["character_error_rate"] == pytest.approx(of_all / sum(lengths[kind] for kind in kinds))
    assert re.search(r"^even/exact_match ", printed, re.MULTILINE)
    said = refused("evaluate.py", folder, flags, "--category_column sort")
    assert 'there is no column "sort"; there are: prompt, completion, kind' in said


def test_baseline_text_and_models_of_two_kinds(run, refused, tmp_path, folder):
    from vlm.builtin import tiny_llava

    rows = [json.dumps({"body": f"{i} and {i + 1}"}) for i in range(12)]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows))
    printed = run("evaluate.py", folder, "--dataset_name texts.jsonl --dataset_text_field body --test_size 0.5")
    assert "3 examples to score, 0 to answer" in printed
    assert scores(tmp_path)[folder]["perplexity"] > 10
    for part in tiny_llava():
        part.save_pretrained("sees")
    assert "score them apart. Vision: sees" in refused("evaluate.py", folder, "sees --dataset_name dates")
    assert "No data: give --dataset_name" in refused("evaluate.py", folder)


def test_help_is_short(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "119")
    with pytest.raises(SystemExit):
        run("evaluate.py", "--help")
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) < 60
    for flag in ("MODEL ", "--dataset_name", "--num_eval_generations", "--load_in_4bit", "--output_dir"):
        assert flag in printed, flag
    assert "--learning_rate" not in printed
    with pytest.raises(SystemExit):
        run("evaluate.py", "one --dataset_name dates two")
    assert "not understood: two. Models come first" in capsys.readouterr().err
