"""Files of other tools through the recipes, as a user gives them; and a look at them without training."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

CONFIG = f"--config {Path(__file__).parents[2] / 'configs' / 'demo_text.yaml'}"
QUICK = "--max_steps 3 --eval_strategy no --num_eval_generations 2 --num_samples 1 --max_new_tokens 2 --warmup_steps 0"
QUICK += " --report_to none --output_dir out"


def write(path, rows):
    path.write_text(json.dumps(rows))
    return path


def test_alpaca_with_columns_of_other_names_is_trained_on(run, tmp_path):
    rows = [{"instruktion": "Add one.", "input": str(i), "antwort": i + 1} for i in range(40)]
    write(tmp_path / "rows.json", rows)
    flags = "--dataset_name rows.json --columns prompt=instruktion input=input completion=antwort"
    printed = run("sft_text.py", CONFIG, QUICK, flags)
    (shown,) = re.findall(r"First example, \d+ tokens, of which (\d+) are learned, in \[\[ \]\]:\n  (.*)\n", printed)
    assert re.search(r"Add one\.\\n\d+<\|end\|><\|assistant\|>\[\[\d+<\|end\|>\]\]", shown[1])
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["scored_with"]["columns"] == ["prompt=instruktion", "input=input", "completion=antwort"]
    scored = run("evaluate.py", "out --output_dir scores")  # the same rows, by what is in result.json
    assert "2 examples to score" in scored
    (score,) = json.loads((tmp_path / "scores" / "scores.json").read_text())["scores"].values()
    assert score["test_loss"] == pytest.approx(result["results"]["final/test_loss"], abs=1e-6)


def test_conversations_are_trained_on_whole_and_scored_by_reply(run, tmp_path):
    """With a template that marks replies: training and evaluation score the same rows the same way."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
        "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    (tmp_path / "template.jinja").write_text(template)
    turns = [["human", "1?"], ["gpt", "2"], ["human", "3?"], ["gpt", "4"]]
    rows = [{"conversations": [{"from": who, "value": said} for who, said in turns]}] * 40
    write(tmp_path / "rows.json", rows)
    flags = "--dataset_name rows.json --chat_template_path template.jinja"
    printed = run("sft_text.py", CONFIG, QUICK, flags)
    assert "36 conversations, 36 rows: 72 replies are learned" in printed
    assert re.search(
        r"<\|assistant\|>\[\[2<\|end\|>\]\]<\|user\|>3\?<\|end\|><\|assistant\|>\[\[4<\|end\|>\]\]", printed
    )
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    run("evaluate.py", "out --output_dir scores")
    (score,) = json.loads((tmp_path / "scores" / "scores.json").read_text())["scores"].values()
    assert score["test_loss"] == pytest.approx(result["results"]["final/test_loss"], abs=1e-6)


def test_a_preview_of_text_trains_nothing(run, tmp_path):
    printed = run("sft_text.py", "--preview --output_dir out/a/run --max_train_samples 40")
    assert re.search(r"First example, \d+ tokens.*\n\n<\|user\|>.*\[\[\d{4}-\d\d-\d\d<\|end\|>\]\]\n", printed)
    assert "train: 40 rows of " in printed and "0 reach --max_length 128" in printed
    assert list(tmp_path.iterdir()) == []  # it is no run: the next one may have other settings


def test_a_preview_of_llava_s_json(run, refused, tmp_path):
    rows = []
    for i in range(40):
        Image.new("L", (112, 32), i * 5).save(tmp_path / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nRead the number."}, {"from": "gpt", "value": str(i)}]
        rows.append({"id": i, "image": f"{i}.png", "conversations": turns})
    write(tmp_path / "rows.json", rows)
    (tmp_path / "mine").mkdir()
    printed = run("sft_vlm.py", "--preview --output_dir mine/out --dataset_name rows.json")
    assert list((tmp_path / "mine").iterdir()) == []
    assert re.search(r"<image> x 16 Read the number\.<\|im_end\|>.*\n\[\[\d+<\|im_end\|>\]\]\n", printed)
    assert "train: 36 rows of " in printed and "their images included" in printed
    rows[2]["conversations"][1]["value"] = "7 " * 60
    write(tmp_path / "rows.json", rows)
    printed = run("sft_vlm.py", "--preview --output_dir mine/out --dataset_name rows.json --max_length 100")
    assert "1 more reaches it, of which 1 is cut off, without the end-of-sequence token" in printed
    rows[1]["image"] = "https://example.com/1.png"
    write(tmp_path / "rows.json", rows)
    said = refused("sft_vlm.py", "--preview --output_dir out --dataset_name rows.json")
    assert re.search(r"train: row 1 .*has the image https://example\.com/1\.png: nothing is downloaded", said)
