"""Models that the loss of TRL's SFTTrainer does not fit: refused in the first pass, before a weight has changed.

Each case first shows what the stock trainer does. If one goes red there, TRL has mended it, and the refusal can go.
"""

import copy
import re

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from trl import SFTTrainer

import helpers
from grades_trl import GradESConfig, GradESTrainer
from grades_trl.recipe.bad_input import EXIT_CODE, run
from grades_trl.recipe.results import train_and_save
from grades_trl.report.timing import RunClock
from grades_trl.trainers.first_step import first_step_checked
from helpers import LORA, losses, qwen3, same, weights

pytestmark = pytest.mark.usefixtures("no_figures")

NOTHING_FREEZES = GradESConfig(metric="none", stopping="end_of_schedule", keep="last")
MISPLACED = r"SFTTrainer cannot train GitForCausalLM: the model has 3\d {} for 16 labels"
NO_HIDDEN_STATES = r"SFTTrainer cannot train \w+ with loss_type 'chunked_nll'.*Set loss_type='nll' \(--loss_type nll\)"


def trainer(folder, cls, model, inputs, loss_type, **changes):
    args = helpers.arguments(folder, **helpers.ONE_BATCH, max_steps=2, loss_type=loss_type)
    return helpers.on_one_batch(cls, model, inputs, args, **changes)


def made(zoo, name):
    model = zoo.build(name, name not in zoo.TEXT)
    inputs = zoo.inputs_of(model, name not in zoo.TEXT)
    return model, inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])}


def test_chunked_nll_would_train_git_on_the_labels_of_other_tokens(zoo, tmp_path):
    model, inputs = made(zoo, "git")
    with torch.no_grad():
        loss = model.train()(**inputs).loss.item()
    stock = trainer(tmp_path, SFTTrainer, copy.deepcopy(model), inputs, "chunked_nll")
    stock.train()
    assert abs(losses(stock)[0] - loss) > 0.01
    with pytest.raises(RuntimeError, match="size of tensor"):
        trainer(tmp_path, SFTTrainer, model, inputs, "nll").train()


@pytest.mark.parametrize("grades", [NOTHING_FREEZES, None], ids=["grades", "baseline_of_a_recipe"])
@pytest.mark.parametrize(
    ("name", "loss_type", "message"),
    [
        ("git", "chunked_nll", MISPLACED.format("hidden states")),
        ("git", "nll", MISPLACED.format("logits")),
        ("git", "dft", MISPLACED.format("logits")),
        ("kosmos-2", "chunked_nll", NO_HIDDEN_STATES),
        ("t5", "chunked_nll", NO_HIDDEN_STATES),
    ],
)
def test_such_a_model_ends_a_recipe_with_one_line(zoo, tmp_path, capsys, name, loss_type, message, grades):
    model, inputs = made(zoo, name)
    before = weights(model)
    ours, clock = trainer(tmp_path, GradESTrainer, model, inputs, loss_type, grades=grades), RunClock()
    with pytest.raises(SystemExit) as ended:
        run(lambda: train_and_save(ours, clock, None))
    assert ended.value.code == EXIT_CODE
    *_, said, hint = capsys.readouterr().err.splitlines()
    assert re.match(f"Error: {message}", said) and hint.startswith("--debug")
    assert same(weights(model), before)
    assert all("sft_loss" not in str(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize(
    ("name", "error"), [("kosmos-2", "no attribute 'last_hidden_state'"), ("t5", "specify exactly one of input_ids")]
)
def test_without_hidden_states_the_stock_trainer_fails_and_nll_trains(zoo, tmp_path, name, error):
    model, inputs = made(zoo, name)
    with pytest.raises((AttributeError, ValueError), match=error):
        trainer(tmp_path, SFTTrainer, copy.deepcopy(model), inputs, "chunked_nll").train()
    ours = trainer(tmp_path, GradESTrainer, model, inputs, "nll", grades=NOTHING_FREEZES)
    ours.train()
    assert len(losses(ours)) == 2


def adapted(name):
    model = qwen3(vocab_size=96)
    if name == "lora":
        return get_peft_model(model, LORA)
    if name == "prompt tuning":  # virtual tokens before the text
        return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    return model


@pytest.mark.parametrize("loss_type", ["chunked_nll", "nll"])
@pytest.mark.parametrize("name", ["full", "lora", "prompt tuning", "qwen2_5_vl", "llava", "idefics"])
def test_models_that_it_fits_are_not_refused(zoo, tmp_path, name, loss_type):
    if name in zoo.WITH_IMAGES_OR_SOUND:
        model, inputs = made(zoo, name)
    else:
        model, (_, inputs) = adapted(name), made(zoo, "qwen3")
    fits = trainer(tmp_path, SFTTrainer, model, inputs, loss_type)
    with first_step_checked(fits):
        fits.train()
    assert len(losses(fits)) == 2
