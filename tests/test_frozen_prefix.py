"""The backward pass skips the frozen prefix, and nothing else changes."""

import copy
import io
from types import SimpleNamespace

import pytest
import torch
import transformers as T
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from grades_trl import GradES, GradESConfig, GradESTrainer
from grades_trl.freezing.activation_cache import ActivationCache
from grades_trl.freezing.frozen_prefix import FrozenPrefix
from grades_trl.recipe import builtin
from grades_trl.report.summary import SkippedLayers, format_summary
from helpers import (
    CHECKPOINTING,
    IDS,
    SMALL,
    backward,
    bottom_up,
    checkpoint,
    config_for,
    gradients,
    layers,
    llava,
    lora,
    qwen3,
    same,
    trajectory,
)
from vlm import GradESVLMTrainer
from vlm import builtin as vlm_builtin

pytestmark = pytest.mark.usefixtures("no_figures")


@CHECKPOINTING
@pytest.mark.parametrize("frozen", [1, 3, 5])
def test_lora_backward_costs_as_much_as_a_model_without_the_frozen_layers(reentrant, frozen):
    model = checkpoint(lora(6), reentrant)
    full, _ = backward(model)
    layers(model)[:frozen].requires_grad_(False)
    without, expected = backward(model)

    prefix = FrozenPrefix(model)
    backward(model)  # the pass in which the order of calls is seen
    assert prefix.update()
    assert prefix.skipped_layers == {"model.layers": frozen}
    count, found = backward(model)
    assert same(found, expected)
    shorter, _ = backward(checkpoint(lora(6 - frozen), reentrant))
    # With non-reentrant checkpointing the input of the first live layer needs no gradient, as it does in the shorter
    # model: one product less for each of q, k, v and their three lora_A.
    assert count == shorter - (6 if reentrant is False else 0)
    assert count < full
    if reentrant is not None:
        assert count < without
    assert not prefix.update()  # nothing new


@CHECKPOINTING
def test_evaluation_generation_and_flags_that_are_set_again_change_nothing(reentrant):
    model = checkpoint(lora(4), reentrant)
    layers(model)[:2].requires_grad_(False)
    _, expected = backward(model)
    logits = model.eval()(input_ids=IDS).logits
    prefix = FrozenPrefix(model.train())
    backward(model)
    prefix.update()
    count, _ = backward(model)
    model.eval()
    assert torch.equal(model(input_ids=IDS).logits, logits)
    model.generate(input_ids=IDS[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
    model.train()
    for module in model.modules():  # what Unsloth's for_training() does at each train()
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = reentrant is not None
    again, found = backward(model)
    assert again == count
    assert same(found, expected)


def state(model):
    """What a frozen prefix puts on a model: hooks, forwards, flags."""
    return [
        (
            path,
            vars(module).get("forward"),
            vars(module).get("gradient_checkpointing"),
            list(module._forward_pre_hooks.values()),
            list(module._forward_hooks.values()),
            sorted(vars(module)),
        )
        for path, module in model.named_modules()
    ]


def interrupted(error):
    def forward(*args, **kwargs):
        raise error

    return forward


@pytest.mark.parametrize("error", [None, ValueError("bad"), KeyboardInterrupt()], ids=["none", "error", "ctrl_c"])
@CHECKPOINTING
def test_closing_leaves_the_model_as_it_was_found(reentrant, error):
    model = checkpoint(lora(4), reentrant)
    layers(model)[1].forward = layers(model)[1].forward  # a forward of its own, as accelerate and Unsloth give layers
    layers(model)[:2].requires_grad_(False)
    before, (count, expected) = state(model), backward(model)
    prefix = FrozenPrefix(model)
    backward(model)
    assert prefix.update()
    backward(model)
    if error is not None:
        layers(model)[3].mlp.forward = interrupted(error)
        with pytest.raises(type(error)):
            backward(model)
        del layers(model)[3].mlp.forward
    prefix.close()
    assert state(model) == before
    after, found = backward(model)
    assert after == count
    assert same(found, expected)
    prefix.close()
    assert state(model) == before


def test_after_an_interruption_training_goes_on_with_the_prefix():
    model = checkpoint(lora(4), True)
    layers(model)[:2].requires_grad_(False)
    prefix = FrozenPrefix(model)
    backward(model)
    prefix.update()
    count, expected = backward(model)
    layers(model)[3].mlp.forward = interrupted(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        backward(model)
    del layers(model)[3].mlp.forward
    again, found = backward(model)
    assert again == count
    assert same(found, expected)
    assert all(layer.gradient_checkpointing for layer in layers(model))


def deep_copy(model):
    return copy.deepcopy(model)


def save_and_load(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [deep_copy, save_and_load])
def test_a_copy_works_on_weights_of_its_own_and_without_a_prefix(duplicate):
    model = lora(4).train()
    layers(model)[1].forward = layers(model)[1].forward  # a forward of its own
    layers(model)[:2].requires_grad_(False)
    prefix = FrozenPrefix(model, ActivationCache(2**20))
    backward(model)
    assert prefix.update()
    _, expected = backward(model)
    copied = duplicate(model)
    assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in model.parameters()}
    for parameter in copied.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    called = prefix.called
    copied.requires_grad_(True)
    copied.train()
    assert all(name in backward(copied)[1] for name, _ in copied.named_parameters())  # nothing is skipped
    assert prefix.called == called
    assert same(backward(model)[1], expected)  # the original has its own weights, and its prefix
    model.eval(), copied.eval()
    copied.load_state_dict(model.state_dict())
    assert torch.equal(copied(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_full_fine_tuning_skips_layers_only_where_embeddings_and_norms_are_frozen_too(tied):
    model = qwen3(num_hidden_layers=3, tie_word_embeddings=tied).train()
    matrices = GradES(model, GradESConfig(), 10).matrices
    for matrix in matrices.values():
        if matrix.layer < 2:
            matrix.parameters[0].requires_grad_(False)
    prefix = FrozenPrefix(model)
    backward(model)
    assert not prefix.update()  # norms and embeddings train
    model.model.layers[:2].requires_grad_(False)
    assert not prefix.update()  # embeddings train
    model.model.embed_tokens.requires_grad_(False)
    assert prefix.update()
    assert prefix.skipped_layers == {"model.layers": 2}


def test_engine_freezes_norms_and_embeddings_only_if_allowed():
    for allowed in (False, True):
        model = qwen3(tie_word_embeddings=True).train()
        config = GradESConfig(metric="grad_norm", tau=1e9, alpha=0.0, freeze_norms=allowed, freeze_embeddings=allowed)
        grades = GradES(model, config, 10)
        for step in (1, 2):
            backward(model)
            grades.step(step)
        assert grades.done
        trains = {name for name, p in model.named_parameters() if p.requires_grad}
        assert ("model.embed_tokens.weight" in trains) != allowed
        assert ("model.layers.1.input_layernorm.weight" in trains) != allowed
        assert "model.norm.weight" in trains  # above all layers
        assert grades.prefix.skipped_layers == ({"model.layers": 2} if allowed else {})
        grades.close()
        assert all(p.requires_grad for p in model.parameters())
        assert grades.prefix.skipped_layers == {}


TEXT = torch.arange(10, 26).view(1, 16)


def image_inputs():
    """A row with an image, for `llava(image_token_id=3)`."""
    ids = torch.cat([torch.full((1, 16), 3), TEXT], 1)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids, "pixel_values": pixels}


def language_half_frozen():
    model = llava(image_token_id=3).train()
    model.model.language_model.requires_grad_(False)
    model.model.language_model.layers[1].requires_grad_(True)
    return model


def test_no_language_layer_is_skipped_above_a_vision_tower_that_trains():
    model = language_half_frozen()
    prefix = FrozenPrefix(model)
    gradients(model, input_ids=TEXT, labels=TEXT)
    assert not prefix.update()  # the vision tower was not called yet, but it trains: it may be upstream
    gradients(model, **image_inputs())
    assert not prefix.update()
    model.model.vision_tower.requires_grad_(False)
    expected = gradients(model, **image_inputs())
    assert prefix.update()  # all of the vision tower; the projector trains still
    assert prefix.skipped_layers == {"model.vision_tower.encoder.layers": 2}
    assert same(gradients(model, **image_inputs()), expected)
    model.model.multi_modal_projector.requires_grad_(False)
    expected = gradients(model, **image_inputs())
    assert prefix.update()
    assert prefix.skipped_layers == {"model.vision_tower.encoder.layers": 2, "model.language_model.layers": 1}
    assert same(gradients(model, **image_inputs()), expected)
    expected = gradients(model, input_ids=TEXT, labels=TEXT)
    assert expected and same(gradients(model, input_ids=TEXT, labels=TEXT), expected)  # a pass that leaves it out


def test_a_tower_that_no_gradient_has_reached_is_no_obstacle_until_it_is_called():
    model = language_half_frozen()
    prefix = FrozenPrefix(model)
    with_image, without = gradients(model, **image_inputs()), gradients(model, input_ids=TEXT, labels=TEXT)
    prefix.close()

    prefix = FrozenPrefix(model)
    reached = gradients(model, input_ids=TEXT, labels=TEXT)
    unreached = [p for name, p in model.named_parameters() if name not in reached]
    assert prefix.update(unreached)
    assert prefix.skipped_layers == {"model.language_model.layers": 1}
    assert same(gradients(model, input_ids=TEXT, labels=TEXT), without)
    for _ in range(2):  # images come in later: nothing is skipped in such a pass, although nobody called update()
        assert same(gradients(model, **image_inputs()), with_image)
    assert any("vision_tower" in name for name in with_image)
    assert prefix.update()
    assert prefix.skipped_layers == {}


def test_layers_that_are_given_back_are_not_skipped_any_more():
    """As by a callback that unfreezes a model from above."""
    model = lora(4)
    layers(model)[:2].requires_grad_(False)
    prefix = FrozenPrefix(model)
    gradients(model, input_ids=IDS, labels=IDS)
    assert prefix.update()
    assert not any("layers.1." in name for name in gradients(model, input_ids=IDS, labels=IDS))
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name and "layers.0." not in name)
    found = gradients(model, input_ids=IDS, labels=IDS)
    assert any("layers.1." in name for name in found)
    assert prefix.skipped_layers == {"model.layers": 1}
    prefix.close()
    assert same(found, gradients(model, input_ids=IDS, labels=IDS))


def test_an_input_that_wants_a_gradient_gets_it():
    """A soft prompt, which is in front of all layers."""
    model = lora(4)
    layers(model)[:2].requires_grad_(False)
    prefix = FrozenPrefix(model)
    gradients(model, input_ids=IDS, labels=IDS)
    assert prefix.update()
    embeds = model.get_input_embeddings()(IDS).detach()
    found = []
    for close in (lambda: None, prefix.close):
        close()
        prompt = embeds.clone().requires_grad_(True)
        model(inputs_embeds=prompt, labels=IDS).loss.backward()
        found.append(prompt.grad)
    assert found[0].abs().sum() > 0 and torch.equal(*found)


class Looped(nn.Module):
    """Runs its layers several times: all of them in each loop (Universal Transformer), or in a given order."""

    def __init__(self, order):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(8, 4)
        self.low = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
        self.high = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
        self.order = order

    def forward(self, ids):
        hidden = self.embed(ids)
        for name in self.order:
            for layer in getattr(self, name):
                hidden = hidden + layer(hidden)
        return SimpleNamespace(loss=hidden.square().mean())


@pytest.mark.parametrize(
    ("order", "frozen", "skipped"),
    [
        ("low low", {"low": 1}, {}),
        ("low high low", {"low": 1}, {}),
        ("low high low", {"low": 2}, {}),
        ("low high low", {"low": 2, "high": 1}, {"high": 1}),
        ("low high low", {"high": 2}, {}),
        # A layer is skipped if all of its calls come before anything that trains.
        ("low low high", {"low": 1}, {}),
        ("low low high", {"low": 2}, {"low": 2}),
        ("low low high", {"low": 2, "high": 1}, {"low": 2, "high": 1}),
        ("low low high high", {"low": 2, "high": 1}, {"low": 2}),
    ],
    ids=str,
)
def test_layers_that_run_twice_get_the_gradients_that_they_have_without_the_prefix(order, frozen, skipped):
    model = Looped(order.split()).train()
    model.embed.requires_grad_(False)
    for name, count in frozen.items():
        getattr(model, name)[:count].requires_grad_(False)
    ids = torch.arange(8).view(2, 4)
    expected = gradients(model, ids=ids)
    prefix = FrozenPrefix(model)
    gradients(model, ids=ids)
    prefix.update()
    assert prefix.skipped_layers == skipped
    assert same(gradients(model, ids=ids), expected)


@pytest.mark.parametrize("frozen", ["L_module", "H_module"])
def test_a_hierarchical_reasoning_model_gets_the_gradients_that_it_has_without_the_prefix(frozen):
    torch.manual_seed(0)
    config = T.HrmTextConfig(**SMALL, num_layers_per_stack=2, H_cycles=2, L_cycles=2)
    model = T.HrmTextForCausalLM(config).train()
    model.model.embed_tokens.requires_grad_(False)
    model.model.get_submodule(frozen).requires_grad_(False)
    inputs = {"input_ids": IDS, "labels": IDS, "use_cache": False}
    expected = gradients(model, **inputs)
    prefix = FrozenPrefix(model)
    gradients(model, **inputs)
    prefix.update()
    assert same(gradients(model, **inputs), expected)


@CHECKPOINTING
def test_recomputation_in_the_backward_pass_is_no_second_call(reentrant):
    model = checkpoint(lora(3), reentrant)
    prefix = FrozenPrefix(model)
    backward(model)
    called = [path for path in prefix.called if path.endswith((".0", ".1", ".2"))]
    assert called == [f"base_model.model.model.layers.{i}" for i in range(3)]
    layers(model)[:1].requires_grad_(False)
    assert prefix.update()


def test_a_layer_that_is_called_by_itself_has_its_gradients():
    """As probes and custom losses do it, outside a pass of the model."""
    model = qwen3(tie_word_embeddings=False).train().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    prefix = FrozenPrefix(model)
    backward(model)
    assert prefix.update()
    assert prefix.skipped_layers == {"model.layers": 2}
    backward(model)
    hidden = torch.randn(1, 4, 32, requires_grad=True)
    positions = model.model.rotary_emb(hidden, torch.arange(4).view(1, 4))
    model.model.layers[0](hidden, position_embeddings=positions).sum().backward()
    assert hidden.grad is not None


@pytest.mark.parametrize("reentrant", [None, False], ids=["none", "non_reentrant"])
def test_compiled_passes_have_the_graphs_of_the_baseline_and_one_more_per_freeze(reentrant):
    """The first pass is run eagerly, to see the order of calls."""
    torch.compiler.reset()
    runs = {}
    for with_prefix in (False, True):
        model = checkpoint(qwen3(), reentrant)
        model.model.embed_tokens.requires_grad_(False)
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, backend=counter)
        prefix = FrozenPrefix(model) if with_prefix else None
        with torch.compiler.set_stance("force_eager"):
            backward(compiled, use_cache=False)
        runs[with_prefix] = []
        for frozen in (0, 1):
            model.model.layers[:frozen].requires_grad_(False)
            if prefix is not None:
                assert prefix.update() == (frozen > 0)
            for _ in range(2):
                matmuls, found = backward(compiled, use_cache=False)
                runs[with_prefix].append((counter.frame_count, matmuls, found))
    graphs, matmuls, found = zip(*runs[True], strict=True)
    baseline, all_matmuls, expected = zip(*runs[False], strict=True)
    assert graphs == baseline
    first = baseline[0]  # more than one with checkpointing: the hook on the embeddings breaks the graph
    assert baseline == (first, first, first + 1, first + 1)
    assert all(same(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert prefix.skipped_layers == {"model.layers": 1}
    assert (matmuls[-1] < all_matmuls[-1]) == (reentrant is not None)  # otherwise no gradient reaches the first layer


@CHECKPOINTING
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_whole_text_runs_with_and_without_the_prefix_are_equal(tmp_path, monkeypatch, reentrant, full):
    tokenizer = builtin.tiny_qwen3()[1]
    dataset = builtin.dates(train=128, test=8)
    grades = bottom_up(4, freeze_norms=True, freeze_embeddings=True)
    runs = []
    for with_prefix in (True, False):
        model = qwen3(num_hidden_layers=4, vocab_size=len(tokenizer), bos_token_id=None, tie_word_embeddings=True)
        runs.append(
            trajectory(
                GradESTrainer,
                monkeypatch,
                with_prefix,
                model=model,
                args=config_for(tmp_path, reentrant, max_steps=15, save_strategy="steps", save_steps=8),
                train_dataset=dataset["train"],
                eval_dataset=dataset["test"],
                processing_class=tokenizer,
                grades=grades,
                peft_config=None if full else LoraConfig(r=4, target_modules="all-linear"),
            )
        )
    (trainer, losses, weights), (baseline, expected, expected_weights) = runs
    assert trainer.grades_summary.skipped_layers[-1] == SkippedLayers(12, {"model.layers": 3})
    assert baseline.grades_summary.skipped_layers == []
    assert losses == expected
    assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)
    if not full:
        return
    assert trainer.grades_summary.flops.run < baseline.grades_summary.flops.run
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-8")
    assert "forward" not in vars(reloaded.model.layers[0])


@CHECKPOINTING
def test_whole_vlm_runs_with_and_without_the_prefix_are_equal(tmp_path, monkeypatch, reentrant):
    dataset = vlm_builtin.digit_images(train=64, test=8)
    runs = []
    for with_prefix in (True, False):
        model, processor = vlm_builtin.tiny_llava()
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=r".*layers\.\d+\..*(proj|fc1|fc2)"))
        runs.append(
            trajectory(
                GradESVLMTrainer,
                monkeypatch,
                with_prefix,
                model=model,
                args=config_for(tmp_path, reentrant, max_steps=11, max_length=None, save_strategy="no"),
                train_dataset=dataset["train"],
                eval_dataset=dataset["test"],
                processing_class=processor,
                grades=bottom_up(3),
            )
        )
    (trainer, losses, weights), (_, expected, expected_weights) = runs
    assert trainer.grades_summary.skipped_layers[0] == SkippedLayers(4, {"model.vision_tower.encoder.layers": 1})
    assert losses == expected
    assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_what_the_loss_does_not_use_is_no_obstacle(tmp_path, full):
    """LLaVA-1.5 takes the output of the last but one layer of its vision tower: the last one gets no gradient."""
    dataset = vlm_builtin.digit_images(train=64, test=8)

    def build():
        model, processor = vlm_builtin.tiny_llava()
        model.config.vision_feature_layer = -2
        if not full:
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(r=4, target_modules=r".*layers\.\d+\..*(proj|fc1|fc2)"))
        return GradESVLMTrainer(
            model=model,
            args=config_for(tmp_path, False, max_steps=30, max_length=None, save_strategy="steps", save_steps=9),
            train_dataset=dataset["train"],
            eval_dataset=dataset["test"],
            processing_class=processor,
            grades=GradESConfig(
                metric="grad_norm",
                tau=1e9,
                alpha=0.4,
                stopping="all_frozen",
                freeze_norms=True,
                freeze_embeddings=True,
                track_projector=True,
            ),
        )

    trainer = build()
    trainer.train()
    last = {name for name in trainer.tracked if "vision_tower" in name and ".layers.2." in name}
    assert len(last) == 6
    assert set(trainer.grades.frozen) == set(trainer.tracked) - last
    assert trainer.state.global_step == 13
    assert trainer.grades_summary.stop_reason == "all matrices frozen"
    assert "33 of 39 matrices (6 never got a gradient)" in format_summary(trainer.grades_summary) or full
    skipped = {"model.vision_tower.encoder.layers": 3, "model.language_model.layers": 3}
    assert trainer.grades_summary.skipped_layers[-1] == SkippedLayers(13, skipped)
    resumed = build()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert resumed.grades.frozen == trainer.grades.frozen
    assert all(
        torch.equal(one, other)
        for one, other in zip(resumed.model.parameters(), trainer.model.parameters(), strict=True)
    )


def test_towers_without_data_do_not_keep_a_run_from_ending(tmp_path):
    """A vision-language model on text alone: its vision tower is not even called."""
    model, processor = vlm_builtin.tiny_llava()
    rows = Dataset.from_list([{"text": f"{i} {i + 1}"} for i in range(64)])
    model = get_peft_model(model, LoraConfig(r=4, target_modules=r".*layers\.\d+\..*(proj|fc1|fc2)"))
    trainer = GradESTrainer(
        model=model,
        args=config_for(tmp_path, None, max_steps=30, save_strategy="no"),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=processor.tokenizer,
        grades=GradESConfig(metric="grad_norm", tau=1e9, alpha=0.3, stopping="all_frozen"),
    )
    trainer.train()
    assert {trainer.tracked[name].tower for name in trainer.grades.frozen} == {"language"}
    assert trainer.state.global_step == 10


def test_a_head_that_is_trained_whole_comes_after_the_prefix(tmp_path):
    """PEFT's `modules_to_save` wraps it; TRL's chunked loss calls neither."""
    tokenizer = builtin.tiny_qwen3()[1]
    dataset = builtin.dates(train=64, test=8)
    trainer = GradESTrainer(
        model=qwen3(num_hidden_layers=4, vocab_size=len(tokenizer), bos_token_id=None),
        args=config_for(tmp_path, None, max_steps=9, save_strategy="no", loss_type="chunked_nll"),
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        processing_class=tokenizer,
        grades=bottom_up(4),
        peft_config=LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"]),
    )
    assert not any("lm_head" in name for name in trainer.tracked)
    trainer.train()
    assert trainer.grades_summary.skipped_layers[-1] == SkippedLayers(8, {"model.layers": 2})


def test_a_run_resumed_after_a_freeze_is_the_same_run(tmp_path):
    tokenizer = builtin.tiny_qwen3()[1]
    dataset = builtin.dates(train=128, test=8)

    def build(**changes):
        return GradESTrainer(
            model=qwen3(num_hidden_layers=4, vocab_size=len(tokenizer), bos_token_id=None, tie_word_embeddings=True),
            args=config_for(tmp_path, False, max_steps=15, save_strategy="steps", save_steps=9),
            train_dataset=dataset["train"],
            eval_dataset=dataset["test"],
            processing_class=tokenizer,
            grades=bottom_up(4, freeze_norms=True, freeze_embeddings=True),
        )

    straight = build()
    straight.train()
    resumed = build()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert resumed.grades.frozen == straight.grades.frozen
    assert resumed.grades_summary.skipped_layers == straight.grades_summary.skipped_layers
    for (name, one), (_, other) in zip(
        resumed.model.named_parameters(), straight.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
        assert one.requires_grad == other.requires_grad, name


def test_plain_sft_trainer_is_left_alone():
    assert not issubclass(SFTTrainer, GradESTrainer.__mro__[1])
