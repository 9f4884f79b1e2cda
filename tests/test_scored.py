"""Scores say how many rows they are of."""

import pytest
from datasets import Dataset
from trl import SFTTrainer

from grades_trl.recipe import builtin
from grades_trl.recipe.card import _scores
from grades_trl.recipe.results import final_eval, format_results
from grades_trl.recipe.scored import RowsLeft, rows_left, rows_scored
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
