"""Models that fail with gradient checkpointing in the stock trainer: they train, or are refused in the first pass.

Each case first shows that the stock trainer fails. If one goes red there, Transformers has mended it, and what we do
about it can go.
"""

import copy

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from trl import ModelConfig, SFTTrainer

import helpers
from grades_trl import GradESConfig, GradESMixin, GradESTrainer
from grades_trl.freezing.checkpointing import let_embeddings_be_changed, refuse_lost_gradients
from grades_trl.recipe.models import make_trainable
from grades_trl.recipe.results import train_and_save
from grades_trl.report.timing import RunClock
from grades_trl.trainers.callback import GradESCallback
from helpers import same, weights

pytestmark = pytest.mark.usefixtures("no_figures")

LEAF = "a leaf Variable that requires grad is being used in an in-place operation"
NOTHING_FREEZES = GradESConfig(metric="none", stopping="end_of_schedule", keep="last")


def made(zoo, name, kind):
    """A model and its inputs: all of it trains, all but its embeddings, or adapters."""
    vision = name not in zoo.TEXT
    model = zoo.build(name, vision)
    inputs = zoo.inputs_of(model, vision)
    if kind == "lora":
        model = make_trainable(model, ModelConfig(use_peft=True, lora_r=2, lora_dropout=0.0))
        torch.manual_seed(1)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                nn.init.normal_(parameter, std=0.1)
    if kind == "frozen embeddings":
        model.get_input_embeddings().requires_grad_(False)
    ids = inputs["input_ids"]
    return model, inputs | {"attention_mask": torch.ones_like(ids)}


def trainer(folder, cls, model, inputs, reentrant=None, steps=2, **changes):
    checkpointing = {"gradient_checkpointing": reentrant is not None}
    checkpointing["gradient_checkpointing_kwargs"] = None if reentrant is None else {"use_reentrant": reentrant}
    settings = {"max_steps": steps, "learning_rate": 1e-2, "weight_decay": 0.0, "loss_type": "nll"}
    args = helpers.arguments(folder, **helpers.ONE_BATCH, **settings, **checkpointing)
    return helpers.on_one_batch(cls, model, inputs, args, **changes)


def gradients(model, inputs, reentrant, *watched):
    model = copy.deepcopy(model)
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    model.train()
    for watch in watched:
        watch(model)
    torch.manual_seed(0)  # of dropout
    model(**inputs).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def close(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-6) for name in theirs
    )


# SFTTrainer cannot train GIT at all: its logits are longer than its labels.
IN_PLACE = pytest.mark.parametrize(
    ("name", "base"), [("git", Trainer), ("kosmos-2", SFTTrainer)], ids=["git", "kosmos-2"]
)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@pytest.mark.parametrize("kind", ["frozen embeddings", "lora"])
@pytest.mark.parametrize("name", ["git", "kosmos-2"])
def test_embeddings_that_are_changed_in_place_may_be_frozen(zoo, name, kind, reentrant):
    model, inputs = made(zoo, name, kind)
    with pytest.raises(RuntimeError, match=LEAF):
        gradients(model, inputs, reentrant)
    expected = gradients(model, inputs, None)
    assert close(gradients(model, inputs, reentrant, let_embeddings_be_changed, refuse_lost_gradients), expected)


@IN_PLACE
def test_such_a_model_trains_and_the_stock_trainer_fails(zoo, tmp_path, name, base):
    model, inputs = made(zoo, name, "lora")
    begun = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=LEAF):
        trainer(tmp_path, base, copy.deepcopy(model), inputs, False).train()
    ours = trainer(
        tmp_path, type("Ours", (GradESMixin, base), {}), copy.deepcopy(model), inputs, False, grades=NOTHING_FREEZES
    )
    ours.train()
    stock = trainer(tmp_path, base, copy.deepcopy(model), inputs)  # without checkpointing
    stock.train()
    assert close(weights(ours.model), weights(stock.model))
    assert not same(weights(ours.model), weights(begun))
    assert all("_require_gradient" not in str(m._forward_hooks) for m in ours.model.modules())
    by_callback = trainer(tmp_path, base, model, inputs, False, callbacks=[GradESCallback(NOTHING_FREEZES)])
    by_callback.train()
    assert same(weights(by_callback.model), weights(ours.model))


def test_embeddings_may_freeze_in_the_middle_of_a_run(zoo, tmp_path):
    """The stock trainer trains GIT with its embeddings. It is the freeze that would end it."""
    model, inputs = made(zoo, "git", "full")
    schedule = {"git.encoder.layer.0.*": 1, "*image_encoder*": 1}
    config = GradESConfig(
        metric="schedule", schedule=schedule, stopping="end_of_schedule", keep="last", freeze_embeddings=True
    )
    ours = trainer(tmp_path, type("Ours", (GradESMixin, Trainer), {}), model, inputs, False, steps=3, grades=config)
    frozen = []
    ours.add_callback(WhatTrains(frozen))
    ours.train()
    assert frozen[-1] is False and ours.state.global_step == 3


class WhatTrains(TrainerCallback):
    def __init__(self, seen):
        self._seen = seen

    def on_step_begin(self, args, state, control, model, **kwargs):
        self._seen.append(model.get_input_embeddings().weight.requires_grad)


LOST = [
    pytest.param("mllama", "full", "MllamaSelfAttentionDecoderLayer gets cross_attention_states by name", id="mllama"),
    pytest.param("gemma3n_text", "full", "reads what other layers have put into shared_kv_states", id="gemma3n"),
    pytest.param("idefics", "lora", "IdeficsVisionEncoderLayer gets nothing that requires a gradient", id="idefics"),
]


@pytest.mark.parametrize(("name", "kind", "problem"), LOST)
def test_reentrant_checkpointing_that_loses_gradients_is_refused(zoo, name, kind, problem):
    model, inputs = made(zoo, name, kind)
    expected = gradients(model, inputs, None)
    if name == "mllama":
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            gradients(model, inputs, True)
    else:
        assert not close(gradients(model, inputs, True), expected)
    with pytest.raises(ValueError, match=rf"{problem}\. Set gradient_checkpointing_kwargs=.*False"):
        gradients(model, inputs, True, refuse_lost_gradients)
    assert close(gradients(model, inputs, False, refuse_lost_gradients), expected)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", ["t5", "qwen2_5_vl", "llava", "gemma4_text", "bart", "hrm_text"])
def test_reentrant_checkpointing_that_loses_none_is_not(zoo, name, kind):
    model, inputs = made(zoo, name, kind)
    assert close(gradients(model, inputs, True, refuse_lost_gradients), gradients(model, inputs, None))


@pytest.mark.parametrize("grades", [NOTHING_FREEZES, None], ids=["grades", "baseline_of_a_recipe"])
def test_the_refusal_comes_before_any_weight_has_changed(zoo, tmp_path, grades):
    model, inputs = made(zoo, "mllama", "full")
    before = weights(model)
    with pytest.raises(RuntimeError, match="a second time"):
        trainer(tmp_path, SFTTrainer, copy.deepcopy(model), inputs, True).train()
    ours, clock = trainer(tmp_path, GradESTrainer, model, inputs, True, grades=grades), RunClock()
    with pytest.raises(ValueError, match="Reentrant gradient checkpointing loses gradients of this model"):
        train_and_save(ours, clock, None)
    assert same(weights(model), before)
    assert all("_refuse" not in str(module._forward_pre_hooks) for module in model.modules())
