"""Scores say how many rows they are of."""

import pytest
from datasets import Dataset
from trl import SFTTrainer

from grades_trl.recipe import builtin
from grades_trl.recipe.card import _scores
from grades_trl.recipe.data import warn_truncated_examples
from grades_trl.recipe.results import final_eval, format_results
from grades_trl.recipe.scored import RowsLeft, rows_left, rows_scored, untruncated
from helpers import arguments, model_for
from vlm import GradESVLMTrainer
from vlm import builtin as vlm_builtin


@pytest.fixture(scope="module")
def text():
    """Of 12 test rows, half of the prompts are longer than 60 tokens; the replies of two others end beyond them."""
    lengths = [(90, 4), (10, 60)] * 2 + [(90, 4), (10, 4)] * 4
    test = [{"prompt": "1" * prompt, "completion": "2" * reply} for prompt, reply in lengths]
    train = [{"prompt": "1" * (5 + i), "completion": "23"} for i in range(16)]
    return Dataset.from_list(train), Dataset.from_list(test), builtin.tiny_qwen3()[1]


def trainer_for(text, folder, **changes):
    train, test, tokenizer = text
    model = model_for(tokenizer, max_position_embeddings=256)
    args = arguments(folder, per_device_eval_batch_size=5, **changes)
    trainer = SFTTrainer(model, args, train_dataset=train, eval_dataset=test, processing_class=tokenizer)
    trainer.diverged_at = None
    return trainer


def test_rows_that_lose_their_reply_are_not_scored_and_that_is_said(text, tmp_path):
    train, test, _ = text
    trainer = trainer_for(text, tmp_path, max_length=60)
    left = rows_left(trainer, {"train": train, "validation": test, "test": test})
    assert left == {"train": RowsLeft(16, 16), "validation": RowsLeft(12, 6, 2, 2), "test": RowsLeft(12, 6, 2, 2)}
    assert (str(left["train"]), str(left["test"])) == ("16", "6 of 12")
    results = final_eval(trainer, test)
    assert results["rows/test_loss"] == results["rows/validation_loss"] == results["rows/test_token_accuracy"] == 6
    assert format_results(results).splitlines()[1].split()[-1] == "6"
    assert _scores(results).splitlines()[-1].endswith("| 6 |")
    assert not trainer.model._forward_pre_hooks


@pytest.mark.parametrize(
    "changes",
    [{"max_length": None}, {"packing": True, "max_length": 256}, {"padding_free": True, "max_length": None}],
    ids=["all", "packed", "padding-free"],
)
def test_all_rows_are_counted_however_they_lie_in_a_batch(text, tmp_path, changes):
    trainer = trainer_for(text, tmp_path, **changes)
    given = {"train": text[0], "test": text[1]}
    assert rows_left(trainer, given) == {"train": RowsLeft(16, 16), "test": RowsLeft(12, 12)}
    with rows_scored(trainer.model) as rows:
        trainer.evaluate(text[1])
    assert rows.count == 12


def test_a_row_at_its_full_length_with_its_end_is_not_cut(text, tmp_path):
    whole = trainer_for(text, tmp_path, max_length=None)
    length = max(map(len, whole.train_dataset["input_ids"]))
    trainer = trainer_for(text, tmp_path, max_length=length)
    assert rows_left(trainer, {"train": text[0]})["train"].full > 0
    assert rows_left(trainer, {"train": text[0]})["train"].cut == 0
    shorter = trainer_for(text, tmp_path, max_length=length - 1)
    assert rows_left(shorter, {"train": text[0]})["train"].cut > 0


def test_rows_with_images_are_counted_when_they_are_scored(tmp_path):
    rows = vlm_builtin.digit_images(train=8, test=6, seed=0)
    model, processor = vlm_builtin.tiny_llava()
    trainer = GradESVLMTrainer(
        model=model,
        args=arguments(tmp_path, max_length=None),
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=processor,
        grades=None,
    )
    assert rows_left(trainer, {"train": rows["train"]}) == {"train": RowsLeft(8, 8)}
    with rows_scored(trainer.model) as scored:
        trainer.evaluate()
    assert scored.count == 6


def test_rows_with_images_that_are_truncated_are_counted(tmp_path, caplog, monkeypatch):
    """Image tokens count. Every second reply is longer, and one prompt is longer than all."""
    rows = vlm_builtin.digit_images(train=8, test=6, seed=0)["train"]
    texts = [[{"role": "user", "content": "1" * (90 if i == 7 else 3)}] for i in range(8)]
    replies = [[{"role": "assistant", "content": "2" * (40 if i % 2 else 3)}] for i in range(8)]
    rows = rows.select_columns("images").add_column("prompt", texts).add_column("completion", replies)
    model, processor = vlm_builtin.tiny_llava()
    trainer = GradESVLMTrainer(
        model=model,
        args=arguments(tmp_path, max_length=512, completion_only_loss=True),
        train_dataset=rows,
        eval_dataset=rows.select([0, 2]),
        processing_class=processor,
        grades=None,
    )
    lengths = [len(labels) for labels in untruncated(trainer, rows, 8)]
    assert rows_left(trainer, {"train": rows})["train"] == RowsLeft(8, 8, measured=8)
    limit = lengths[0]  # of the shorter ones, which reach it and are whole
    assert lengths[2] == limit < lengths[1] < lengths[7]
    trainer.data_collator.max_length = trainer.args.max_length = limit
    left = rows_left(trainer, {"train": rows, "validation": rows.select([0, 2])})
    assert left == {"train": RowsLeft(8, 7, 7, 3, 8), "validation": RowsLeft(2, 2, 2, 0, 2)}
    assert str(left["train"]) == "8"
    warn_truncated_examples(left, limit)
    assert f"train: of 8 examples, 1 has no reply left within --max_length {limit}: nothing is learned" in caplog.text
    assert "7 more reach it, of which 3 are cut off, without the end-of-sequence token" in caplog.text

    monkeypatch.setattr("grades_trl.recipe.scored.MEASURED", 4)
    warn_truncated_examples(rows_left(trainer, {"train": rows}), limit)
    assert "train: of 4 examples (a sample of the 8), 0 have no reply left" in caplog.text
