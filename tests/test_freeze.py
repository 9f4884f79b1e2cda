"""What is frozen stands still until it is given back."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from grades_trl import GradES, GradESConfig
from grades_trl.freezing.freeze import Freezer
from helpers import IDS, Toy, layers, lora, qwen3


def values(parameters):
    return [p.detach().clone() for p in parameters]


def unchanged(parameters, before):
    return all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
def test_frozen_values_stay_and_optimizer_state_is_released(optimizer_class):
    model = Toy()
    momentum = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}
    optimizer = optimizer_class(model.parameters(), lr=0.1, weight_decay=0.1, **momentum)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    freezer = Freezer(model, optimizer)
    frozen = list(model.layers[0].parameters())
    freezer.freeze(frozen)
    before = values(frozen)
    optimizer.step()
    assert unchanged(frozen, before)
    assert all(p.grad is None for p in frozen)
    assert not set(frozen) & set(optimizer.state)
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))


def test_only_what_was_frozen_here_is_given_back():
    model = Toy()
    model.layers[0].requires_grad_(False)
    freezer = Freezer(model)
    freezer.freeze(model.parameters())
    assert not any(p.requires_grad for p in model.parameters())
    freezer.unfreeze()
    freezer.unfreeze()
    assert not any(p.requires_grad for p in model.layers[0].parameters())
    assert all(p.requires_grad for p in (*model.layers[1].parameters(), *model.head.parameters()))


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_peft_does_not_give_frozen_adapters_back_when_it_enables_them_again(use_dora):
    """As after each reference pass of DPO."""
    model = get_peft_model(qwen3(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=use_dora)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    attributes = [sorted(vars(module)) for module in model.modules()]
    pair = [p for n, p in model.named_parameters() if p.requires_grad and "layers.1.self_attn.q_proj" in n]
    assert len(pair) == (3 if use_dora else 2)
    freezer = Freezer(model, optimizer)
    freezer.freeze(pair)
    before = values(pair)
    for _ in range(2):
        loss = model(input_ids=IDS, labels=IDS).loss
        with torch.no_grad(), model.disable_adapter():
            model(input_ids=IDS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not any(p.requires_grad for p in pair)
    assert unchanged(pair, before)
    freezer.unfreeze()
    assert all(p.requires_grad for p in pair)
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    with model.disable_adapter():
        pass
    assert all(p.requires_grad for p in pair)


def test_a_frozen_copy_of_a_whole_module_stays_frozen_when_peft_enables_it_again():
    """`modules_to_save`, after each reference pass of DPO: PEFT lets it train, and the next pass takes it out."""
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["down_proj"])
    model = get_peft_model(qwen3(), config).train()
    copied = "layers.1.mlp.down_proj.modules_to_save"
    frozen = [p for name, p in model.named_parameters() if copied in name]
    live = [p for name, p in model.named_parameters() if "layers.0.mlp.down_proj.modules_to_save" in name]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = {"metric": "schedule", "schedule": {"*layers.1.mlp.down_proj": 1}, "stopping": "end_of_schedule"}
    grades = GradES(model, GradESConfig(**schedule, keep="last"), 3, optimizer)
    before = values([*frozen, *live])
    for step in (1, 2, 3):
        with torch.no_grad(), model.disable_adapter():
            model(input_ids=IDS)
        model(input_ids=IDS, labels=IDS).loss.backward()
        grades.step(step)
        optimizer.step()
        optimizer.zero_grad()
    assert unchanged(frozen, before[:1])
    assert not unchanged(live, before[1:])
    grades.finish()
    assert all(p.requires_grad for p in frozen)


def test_adapters_that_train_on_are_enabled_again():
    model = lora(2)
    Freezer(model).freeze(layers(model)[0].parameters())
    with model.disable_adapter():
        pass
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {name for name, _ in model.named_parameters() if "lora_" in name and "layers.1." in name}


def test_the_dropout_of_a_frozen_adapter_is_off_until_it_trains_again():
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(qwen3(), config)
    frozen, live = (layer.self_attn.q_proj for layer in layers(model)[:2])
    x = torch.randn(3, frozen.in_features)
    torch.nn.init.normal_(frozen.lora_B["default"].weight)
    freezer = Freezer(model)
    freezer.freeze(frozen.parameters())
    model.train()  # as the Trainer does in each step
    state = torch.get_rng_state()
    assert torch.equal(frozen(x), frozen(x))
    assert torch.equal(torch.get_rng_state(), state)
    assert live.lora_dropout["default"].p == 0.5
    freezer.unfreeze()
    assert frozen.lora_dropout["default"].p == 0.5
    assert not torch.equal(frozen(x), frozen(x))
