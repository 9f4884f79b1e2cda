"""The held-out loss of a trainer: which rows it is of, what it is, and what measuring it leaves alone."""

import random

import numpy as np
import pytest
import torch
from transformers import TrainerCallback
from trl import SFTTrainer

from grades_trl import GradESConfig, GradESTrainer
from grades_trl.recipe import builtin
from grades_trl.trainers.heldout import HeldoutRows
from helpers import LORA, arguments, losses, model_for, never, same, weights
from vlm import GradESVLMTrainer
from vlm import builtin as vlm_builtin


@pytest.fixture(scope="module")
def text():
    return builtin.dates(train=64, test=16), builtin.tiny_qwen3()[1]


def build(text, folder, grades=None, cls=GradESTrainer, rows=None, model=None, **changes):
    dataset, tokenizer = text
    peft = changes.pop("peft_config", None)
    return cls(
        model=model or model_for(tokenizer),
        args=arguments(folder, **changes),
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"] if rows is None else rows,
        processing_class=tokenizer,
        peft_config=peft,
        **({} if cls is SFTTrainer else {"grades": grades}),
    )


def nll(trainer, rows):
    """The mean negative log-likelihood per learned token, by hand, row by row."""
    total = count = 0
    trainer.model.eval()
    for row in rows:
        batch = trainer.data_collator([trainer.eval_dataset[row]])
        with torch.no_grad():
            logits = trainer.model(input_ids=batch["input_ids"]).logits[:, :-1].float()
        labels = batch["labels"][:, 1:]
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        count += (labels != -100).sum().item()
    trainer.model.train()
    return total / count


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("loss_type", ["nll", "chunked_nll", "dft"])
def test_it_is_the_loss_per_token_whatever_the_training_loss_and_the_batch_size(tmp_path, text, loss_type, lora):
    trainer = build(text, tmp_path, loss_type=loss_type, peft_config=LORA if lora else None)
    rows = HeldoutRows(trainer, 11)
    assert len(set(rows.rows)) == 11
    expected = nll(trainer, rows.rows)
    for size in (1, 4, 11):
        trainer._train_batch_size = size
        assert rows() == pytest.approx(expected, rel=1e-5)


def test_experts_are_measured_without_the_loss_of_their_router(tmp_path, text):
    from helpers import qwen3_moe

    torch.manual_seed(0)
    model = qwen3_moe(vocab_size=len(text[1]), bos_token_id=None, output_router_logits=True, router_aux_loss_coef=10.0)
    trainer = build(text, tmp_path, model=model)
    rows = HeldoutRows(trainer, 8)
    assert rows() == pytest.approx(nll(trainer, rows.rows), rel=1e-4)


def test_dropout_and_noise_are_off_and_nothing_random_moves(tmp_path, text):
    def run(heldout):
        torch.manual_seed(0)
        model = model_for(text[1], attention_dropout=0.3)
        grades = never(heldout_every=2, heldout_cost=1.0, heldout_grace=0.0, keep="last") if heldout else None
        trainer = build(text, tmp_path, grades, model=model, neftune_noise_alpha=5.0, max_steps=6)
        states = []

        class States(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                states.append((torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()))

        trainer.add_callback(States())
        trainer.train()
        return trainer, states

    measured, states = run(True)
    stock, expected = run(False)
    assert measured.grades.heldout.measurements == 3
    assert states == expected
    assert losses(measured) == losses(stock)
    assert same(weights(measured.model), weights(stock.model))
    rows = HeldoutRows(measured, 8)
    assert rows() == rows()


def test_modes_of_single_modules_are_put_back(tmp_path, text):
    trainer = build(text, tmp_path)
    frozen_norm = trainer.model.model.norm
    trainer.model.train()
    frozen_norm.eval()
    HeldoutRows(trainer, 4)()
    assert trainer.model.training
    assert not frozen_norm.training


def test_rows_without_a_learned_token_are_left_out(tmp_path, text):
    prepared = build(text, tmp_path).eval_dataset
    masked = prepared.map(
        lambda row, i: {"labels": [-100] * len(row["input_ids"])} if i % 4 else row, with_indices=True
    )
    trainer = build(text, tmp_path, rows=masked)
    trainer.eval_dataset = masked
    assert sorted(HeldoutRows(trainer, 16).rows) == [0, 4, 8, 12]
    trainer.eval_dataset = masked.select([1, 2, 3])
    with pytest.raises(ValueError, match="None of the 3 rows of eval_dataset has a token to learn"):
        HeldoutRows(trainer, 16)


class Poisoned(GradESTrainer):
    """The loss of one row is no number."""

    poisoned = 5

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        if not self.model.training and "input_ids" in inputs:
            bad = torch.tensor(self.eval_dataset[self.poisoned]["input_ids"])
            inputs = dict(inputs)
            inputs["is_bad"] = any(torch.equal(row[: len(bad)], bad) for row in inputs["input_ids"])
        return inputs


def test_a_row_whose_loss_is_no_number_is_named(tmp_path, text):
    trainer = build(text, tmp_path, cls=Poisoned)
    bad = trainer.eval_dataset[Poisoned.poisoned]["input_ids"]
    forward = trainer.model.forward

    def poisoned(*args, is_bad=False, **kwargs):
        output = forward(*args, **kwargs)
        if is_bad:
            output.loss = output.loss * float("nan")
        return output

    trainer.model.forward = poisoned
    assert bad
    with pytest.raises(ValueError, match=r"The loss of row 5 of eval_dataset is nan, that of 15 others is a number"):
        HeldoutRows(trainer, 16)()


def test_rows_are_measured_in_the_batch_size_that_fits(tmp_path, text):
    """auto_find_batch_size halves it until a step fits, and a measurement must fit, too."""
    largest = []

    class Small(GradESTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            if len(inputs["input_ids"]) > 2:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

        def compute_loss_context_manager(self):
            if not self.model.training:
                largest.append(self._train_batch_size)
            return super().compute_loss_context_manager()

    grades = never(heldout_every=2, heldout_cost=1.0)
    trainer = build(text, tmp_path, grades, cls=Small, auto_find_batch_size=True, max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4
    assert set(largest) == {2}


@pytest.mark.parametrize("stopping", ["auto", "heldout"])
def test_a_run_too_short_for_measurements_is_the_stock_one(tmp_path, text, stopping):
    trainer = build(text, tmp_path, GradESConfig(metric="none", stopping=stopping))
    stock = build(text, tmp_path, cls=SFTTrainer)
    trainer.train()
    stock.train()
    assert trainer.grades.heldout is None or trainer.grades.heldout.measurements == 0
    assert same(weights(trainer.model), weights(stock.model))


def test_what_is_needed_and_missing_is_said_before_training(tmp_path, text):
    dataset, tokenizer = text

    def trainer(rows, grades):
        return GradESTrainer(
            model=model_for(tokenizer),
            args=arguments(tmp_path),
            train_dataset=dataset["train"],
            eval_dataset=rows,
            processing_class=tokenizer,
            grades=grades,
        )

    for grades in (GradESConfig(stopping="heldout"), GradESConfig(keep="best_average")):
        with pytest.raises(ValueError, match="pass eval_dataset"):
            trainer(None, grades)
        with pytest.raises(ValueError, match="eval_dataset is streamed"):
            trainer(dataset["test"].to_iterable_dataset(), grades)
    assert trainer(None, GradESConfig()).grades_config is not None  # the default does without


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_run_that_ends_by_its_heldout_loss_resumes_exactly(tmp_path, text, lora):
    grades = GradESConfig(metric="none", heldout_every=2, heldout_cost=1.0, heldout_grace=0.0, heldout_patience=2)

    def trainer(**changes):
        return build(
            text,
            tmp_path,
            grades,
            max_steps=24,
            learning_rate=1.0,
            lr_scheduler_type="constant",
            peft_config=LORA if lora else None,
            save_strategy="steps",
            save_steps=3,
            **changes,
        )

    straight = trainer()
    straight.train()
    assert 4 < straight.state.global_step < 24
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == straight.state.global_step
    assert resumed.grades.heldout.state_dict() == straight.grades.heldout.state_dict()
    assert same(weights(resumed.model), weights(straight.model))


def test_a_vision_language_run_measures_its_heldout_loss(tmp_path):
    images = vlm_builtin.digit_images(train=16, test=6)
    model, processor = vlm_builtin.tiny_llava()
    trainer = GradESVLMTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=4, max_length=None),
        train_dataset=images["train"],
        eval_dataset=images["test"],
        processing_class=processor,
        grades=never(heldout_every=2, heldout_cost=1.0, heldout_grace=0.0),
    )
    rows = HeldoutRows(trainer, 6)
    batch = trainer.data_collator([images["test"][row] for row in rows.rows])
    model.eval()
    with torch.no_grad():
        expected = model(**batch).loss.item()
    assert rows() == pytest.approx(expected, rel=1e-5)
    trainer.train()
    assert trainer.grades.heldout.measurements >= 2


def test_load_best_model_at_end_has_the_last_word(tmp_path, text):
    grades = never(heldout_every=2, heldout_cost=1.0, heldout_grace=0.0)
    changes = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    trainer = build(text, tmp_path, grades, load_best_model_at_end=True, learning_rate=0.3, **changes)
    trainer.train()
    assert not trainer.grades.restored_best
    assert trainer.grades_summary.weights == "best checkpoint"
