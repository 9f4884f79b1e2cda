"""--bema: the numbers of TRL's callback, in the model that is saved and scored."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import BEMACallback, ModelConfig

from grades_trl import GradESTrainer
from grades_trl.recipe import builtin
from grades_trl.recipe.arguments import configure_bema, parse
from grades_trl.recipe.bema import BEMA
from grades_trl.recipe.models import make_trainable
from grades_trl.recipe.results import train_and_save
from grades_trl.report.timing import RunClock
from grades_trl.trainers.whole_checkpoint import what_is_wrong
from helpers import arguments, model_for, qwen3, same, weights


def run(callback, model, steps=6):
    """Drives a callback as the Trainer does, with random updates."""
    generator, args = torch.Generator().manual_seed(0), SimpleNamespace(output_dir="unused")
    callback.on_train_begin(args, None, None, model=model)
    for step in range(1, steps + 1):
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        callback.on_step_end(args, SimpleNamespace(global_step=step), None, model=model)
    return args


def test_by_hand():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(2.0)
    bema, ema = BEMA(), 2.0
    bema.on_train_begin(None, None, None, model=model)
    for step, weight in ((1, 3.0), (2, 5.0)):
        model.weight.data.fill_(weight)
        bema.on_step_end(None, SimpleNamespace(global_step=step), None, model=model)
        beta, alpha = (10 + step) ** -0.5, (10 + step) ** -0.2
        ema = (1 - beta) * ema + beta * weight
    bema.on_train_end(None, None, None)
    assert model.weight.item() == pytest.approx(ema + alpha * (5.0 - 2.0))


def test_the_average_is_that_of_trl():
    theirs, ours = BEMACallback(update_freq=1), BEMA()
    run(theirs, qwen3(tie_word_embeddings=False))
    model = qwen3(tie_word_embeddings=False)
    args = run(ours, model)
    ours.on_train_end(args, None, None)
    assert same(weights(model), weights(theirs.running_model))


@pytest.mark.parametrize("peft", [False, True])
def test_what_does_not_train_stays_as_it_is(peft):
    model = make_trainable(qwen3(), ModelConfig(use_peft=peft, lora_r=2), layers="1")
    before, bema = weights(model), BEMA()
    args = run(bema, model)
    last = weights(model)
    bema.on_train_end(args, None, None)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (not parameter.requires_grad)
        assert torch.equal(parameter, last[name]) == (not parameter.requires_grad)


class Last(TrainerCallback):
    def on_step_end(self, args, state, control, model, **kwargs):
        self.weights = weights(model)


def test_the_average_is_what_is_saved_and_scored(tmp_path):
    dataset, tokenizer = builtin.dates(train=64, test=2), builtin.tiny_qwen3()[1]
    last, clock = Last(), RunClock()
    trainer = GradESTrainer(
        model=model_for(tokenizer),
        args=arguments(tmp_path, max_steps=4),
        train_dataset=dataset["train"],
        processing_class=tokenizer,
        grades=None,
        callbacks=[clock, last, BEMA()],
    )
    train_and_save(trainer, clock, None)
    scored = weights(trainer.model)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], scored[name]) for name in saved)
    assert not any(torch.equal(scored[name], last.weights[name]) for name in scored)


def test_nothing_else_decides_which_weights_are_kept(tmp_path):
    def configured(*flags):
        recipe, training, _, _ = parse("", tmp_path, ["--report_to", "none", "--model_name_or_path", "x", *flags])
        return configure_bema(recipe, training)

    assert configured() == []
    assert [type(it) for it in configured("--bema", "true", "--grades", "false")] == [BEMA]
    for flags in ([], ["--grades", "false", "--early_stopping_patience", "3"]):
        with pytest.raises(ValueError, match=r"bema decides which weights are kept.*add --grades false"):
            configured("--bema", "true", *flags)
    with pytest.raises(ValueError, match=r"x/bema_state\.safetensors is missing: the checkpoint was written without"):
        configured("--bema", "true", "--grades", "false", "--resume_from_checkpoint", "x")


def recipe_run(folder, checkpoint=None, peft=False, **changes):
    """A run of a recipe with --bema."""
    dataset, tokenizer = builtin.dates(train=64, test=2), builtin.tiny_qwen3()[1]
    clock, bema = RunClock(), BEMA(None if checkpoint is None else str(checkpoint))
    trainer = GradESTrainer(
        model=make_trainable(model_for(tokenizer), ModelConfig(use_peft=peft, lora_r=2)),
        args=arguments(folder, max_steps=6, save_strategy="steps", save_steps=3, **changes),
        train_dataset=dataset["train"],
        processing_class=tokenizer,
        grades=None,
        callbacks=[clock, bema],
    )
    train_and_save(trainer, clock, None if checkpoint is None else str(checkpoint))
    return weights(trainer.model)


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_a_resumed_run_equals_the_straight_one(tmp_path, peft):
    straight = recipe_run(tmp_path / "straight", peft=peft)
    first = tmp_path / "straight" / "checkpoint-3"
    assert what_is_wrong(first, with_grades=False) is None
    assert same(recipe_run(tmp_path / "resumed", first, peft), straight)
    assert same(recipe_run(tmp_path / "completed", tmp_path / "straight" / "checkpoint-6", peft), straight)
    (first / "bema_state.safetensors").unlink()
    assert what_is_wrong(first, with_grades=False) == "bema_state.safetensors is missing"


def test_averages_of_other_weights_are_refused(tmp_path):
    bema, model = BEMA(), qwen3()
    run(bema, model)
    bema.save_state(tmp_path)
    model.model.embed_tokens.requires_grad_(False)
    with pytest.raises(ValueError, match="averages of other weights than train now"):
        BEMA(str(tmp_path)).on_train_begin(None, SimpleNamespace(global_step=6), None, model=model)
