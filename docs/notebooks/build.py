"""Writes text.ipynb and vision.ipynb: Unsloth's notebooks with the lines of GradES in them.

  python docs/notebooks/build.py

Change the notebooks here. tests/test_notebooks.py runs them with tiny models: it replaces the cells with a tag.
"""

import json
from pathlib import Path

REPOSITORY = "grades-trl/grades-trl"  # on GitHub
FOLDER = Path(__file__).parent

TITLE = """# {title}
[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{repository}/blob/main/docs/notebooks/{name}.ipynb)

This is Unsloth's usual notebook with two changes: the trainer is `{trainer}`, and it has some rows held out.
GradES measures what each layer could still gain, freezes leading layers that cost more than they gain, and ends the
run when the held-out loss has stopped improving. Choose a GPU: Runtime, Change runtime type, T4."""

INSTALL = """%pip install -q unsloth "grades-trl[all] @ git+https://github.com/{repository}\""""

TEXT_MODEL = """import unsloth  # first: it replaces parts of transformers and trl
import torch
from unsloth import FastLanguageModel

model, tokenizer = FastLanguageModel.from_pretrained(
    "unsloth/Qwen3-4B-Instruct-2507", max_seq_length=1024, load_in_4bit=True
)
model = FastLanguageModel.get_peft_model(
    model,
    r=16,
    lora_alpha=16,
    lora_dropout=0,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    use_gradient_checkpointing="unsloth",
    random_state=3407,
)
bf16 = torch.cuda.is_bf16_supported()
hardware = {"bf16": bf16, "fp16": not bf16, "optim": "adamw_8bit"}"""

TEXT_DATA = """from datasets import load_dataset

rows = load_dataset("mlabonne/FineTome-100k", split="train[:2200]")
roles = {"system": "system", "human": "user", "gpt": "assistant"}


def to_text(row):
    messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
    return {"text": tokenizer.apply_chat_template(messages, tokenize=False)}


rows = rows.map(to_text, remove_columns=rows.column_names)
split = rows.train_test_split(test_size=200, seed=3407)"""

TEXT_TRAIN = """from trl import SFTConfig

from grades_trl import GradESConfig, GradESTrainer

trainer = GradESTrainer(  # was: SFTTrainer
    model=model,
    processing_class=tokenizer,
    train_dataset=split["train"],
    eval_dataset=split["test"],  # new: rows that decide when the run ends
    grades=GradESConfig(),  # new, and the default; grades=None is SFTTrainer
    args=SFTConfig(
        output_dir="outputs",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=STEPS,
        warmup_steps=5,
        learning_rate=2e-4,
        weight_decay=0.001,
        lr_scheduler_type="linear",
        logging_steps=1,
        seed=3407,
        report_to="none",
        **hardware,
    ),
)
trainer.train()"""

TEXT_ASK = """messages = [{"role": "user", "content": QUESTION}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**prompt.to(model.device), max_new_tokens=64)
print(tokenizer.decode(answer[0], skip_special_tokens=True))"""

VISION_MODEL = """import unsloth  # first: it replaces parts of transformers and trl
import torch
from unsloth import FastVisionModel

model, processor = FastVisionModel.from_pretrained("unsloth/Qwen2.5-VL-3B-Instruct", load_in_4bit=True)
model = FastVisionModel.get_peft_model(
    model,
    r=16,
    lora_alpha=16,
    lora_dropout=0,
    finetune_vision_layers=True,
    finetune_language_layers=True,
    finetune_attention_modules=True,
    finetune_mlp_modules=True,
    random_state=3407,
)
bf16 = torch.cuda.is_bf16_supported()
hardware = {"bf16": bf16, "fp16": not bf16, "optim": "adamw_8bit"}"""

VISION_DATA = """from datasets import load_dataset

rows = load_dataset("unsloth/LaTeX_OCR", split="train[:2200]")
QUESTION = "Write the LaTeX representation for this image."


def to_conversation(row):
    return {
        "images": [row["image"]],
        "prompt": [{"role": "user", "content": QUESTION}],
        "completion": [{"role": "assistant", "content": row["text"]}],
    }


rows = rows.map(to_conversation, remove_columns=rows.column_names)
split = rows.train_test_split(test_size=200, seed=3407)"""

VISION_TRAIN = (
    TEXT_TRAIN.replace(
        "from grades_trl import GradESConfig, GradESTrainer",
        "from grades_trl import GradESConfig\nfrom grades_trl.vlm import GradESVLMTrainer",
    )
    .replace("GradESTrainer(", "GradESVLMTrainer(")
    .replace("processing_class=tokenizer", "processing_class=processor")
    .replace("        **hardware,", "        max_length=None,\n        **hardware,")
)

VISION_ASK = """row = split["test"][0]
content = [{"type": "image"}, {"type": "text", "text": row["prompt"][0]["content"]}]
prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
inputs = processor(images=row["images"], text=prompt, return_tensors="pt").to(model.device)
answer = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(answer[0], skip_special_tokens=True))"""

REPORT = """from IPython.display import Image, display

print(f"{len(trainer.grades.frozen)} of {len(trainer.tracked)} matrices froze; {trainer.state.global_step} steps ran.")
display(Image("outputs/grades/timeline.png"))"""

SAVE = """trainer.save_model("model")  # the adapter; with the tokenizer or processor beside it"""


def cell(kind: str, text: str, number: int, tag: str | None = None) -> dict:
    metadata = {"tags": [tag]} if tag else {}
    made = {"cell_type": kind, "id": f"cell-{number}", "metadata": metadata, "source": text.splitlines(keepends=True)}
    return made | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def notebook(name: str, title: str, trainer: str, model: str, data: str, train: str, ask: str) -> dict:
    head = TITLE.format(title=title, repository=REPOSITORY, name=name, trainer=trainer)
    steps = "STEPS = 250  # how long the run may be; it ends earlier when the held-out loss has stopped improving\n"
    if name == "text":
        steps += 'QUESTION = "Continue the Fibonacci sequence: 1, 1, 2, 3, 5, 8,"'
    parts = [
        ("markdown", head, None),
        ("code", INSTALL.format(repository=REPOSITORY), "install"),
        ("code", steps.strip(), "settings"),
        ("markdown", "## The model, with LoRA adapters", None),
        ("code", model, "model"),
        ("markdown", "## The data, and 200 rows held out", None),
        ("code", data, "data"),
        ("markdown", "## Train\nThe lines that are new say so.", None),
        ("code", train, None),
        ("markdown", "## What froze, and when\n`outputs/grades/report.html` has all figures.", None),
        ("code", REPORT, None),
        ("markdown", "## Ask it, and save it", None),
        ("code", ask, None),
        ("code", SAVE, None),
    ]
    cells = [cell(kind, text, number, tag) for number, (kind, text, tag) in enumerate(parts)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {
        "cells": cells,
        "metadata": {"accelerator": "GPU", "colab": {"gpuType": "T4"}, "kernelspec": kernel},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


NOTEBOOKS = {
    "text": notebook(
        "text", "Fine-tune a language model", "GradESTrainer", TEXT_MODEL, TEXT_DATA, TEXT_TRAIN, TEXT_ASK
    ),
    "vision": notebook(
        "vision",
        "Fine-tune a vision-language model",
        "GradESVLMTrainer",
        VISION_MODEL,
        VISION_DATA,
        VISION_TRAIN,
        VISION_ASK,
    ),
}

if __name__ == "__main__":
    for name, made in NOTEBOOKS.items():
        (FOLDER / f"{name}.ipynb").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
