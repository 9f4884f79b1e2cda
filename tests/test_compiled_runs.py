"""`torch_compile`: as many graphs as the stock trainer, and one more per freeze event at most."""

import pytest
import torch
from torch._dynamo.utils import counters
from trl import SFTTrainer

from grades_trl import GradESConfig, GradESTrainer
from grades_trl.recipe import builtin
from helpers import LORA, arguments, losses, model_for, never


@pytest.fixture(scope="module")
def text():
    # Rows of one length: another length is another graph in any trainer.
    rows = builtin.dates(train=256, test=2)["train"]
    length = len(rows[0]["prompt"][0]["content"])
    return rows.filter(lambda row: len(row["prompt"][0]["content"]) == length), builtin.tiny_qwen3()[1]


def run(text, folder, cls, **extra):
    torch._dynamo.reset()
    counters.clear()
    rows, tokenizer = text
    trainer = cls(
        model=model_for(tokenizer),
        args=arguments(
            folder,
            max_steps=8,
            per_device_train_batch_size=2,
            dataloader_drop_last=True,
            torch_compile=True,
            torch_compile_backend="eager",
            pad_to_multiple_of=64,
            loss_type="nll",  # the chunked loss breaks the graph in two
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LORA,
        **extra,
    )
    trainer.train()
    return trainer, counters["stats"]["unique_graphs"]


def test_measuring_compiles_nothing_more(tmp_path, text):
    stock, expected = run(text, tmp_path, SFTTrainer)
    measured, graphs = run(text, tmp_path, GradESTrainer, grades=never())
    assert expected > 0
    assert graphs <= expected
    assert losses(measured) == pytest.approx(losses(stock), rel=1e-5)


def test_a_freeze_event_compiles_one_graph_more_at_most(tmp_path, text):
    _, expected = run(text, tmp_path, GradESTrainer, grades=never())
    schedule = {"*.layers.0.*": 4}
    trainer, graphs = run(text, tmp_path, GradESTrainer, grades=GradESConfig(metric="schedule", schedule=schedule))
    assert trainer.grades_summary.skipped_layers[-1].layers == {"model.layers": 1}
    assert expected <= graphs <= expected + 1
