"""Backward stays out of the frozen prefix, and nothing else changes."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from grades_trl import GradES, GradESConfig, GradESTrainer
from grades_trl.freezing.frozen_prefix import PrefixCut
from grades_trl.recipe import builtin
from grades_trl.recipe.arguments import account
from helpers import llava, qwen3
from vlm import GradESVLMTrainer
from vlm import builtin as vlm_builtin

MATMULS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
CHECKPOINTING = pytest.mark.parametrize("reentrant", [None, False, True], ids=["none", "non_reentrant", "reentrant"])


class CountMatmuls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in MATMULS
        return function(*args, **(kwargs or {}))


def checkpoint(model, reentrant):
    """As the Trainer and PEFT do it: blocks recompute, and the embeddings' output requires a gradient."""
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    return model.train()


def lora(layers, seed=1):
    torch.manual_seed(seed)
    model = get_peft_model(qwen3(num_hidden_layers=layers), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)  # zeros would leave lora_A without a gradient
    return model


def blocks(model):
    return model.base_model.model.model.layers


IDS = torch.arange(32).view(2, 16)


def backward(model, ids=IDS):
    """Matmuls in backward, recomputation included, and all gradients."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    with CountMatmuls() as counter:
        loss.backward()
    return counter.count, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@CHECKPOINTING
@pytest.mark.parametrize("frozen", [1, 3, 5])
def test_lora_backward_costs_as_much_as_a_model_without_the_frozen_layers(reentrant, frozen):
    model = checkpoint(lora(6), reentrant)
    full, _ = backward(model)
    blocks(model)[:frozen].requires_grad_(False)
    uncut, expected = backward(model)

    cut = PrefixCut(model)
    backward(model)  # the pass in which the order of calls is seen
    assert cut.update()
    assert cut.depths == {"model.layers": frozen}
    count, gradients = backward(model)
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    shorter, _ = backward(checkpoint(lora(6 - frozen), reentrant))
    # With non-reentrant checkpointing the first live block's input needs no gradient, as it does in the shorter model:
    # one product less for each of q, k, v and their three lora_A.
    assert count == shorter - (6 if reentrant is False else 0)
    assert count < full
    if reentrant is not None:
        assert count < uncut
    assert not cut.update()  # nothing new


@CHECKPOINTING
def test_the_cut_survives_evaluation_generation_and_flags_that_are_set_again(reentrant):
    model = checkpoint(lora(4), reentrant)
    blocks(model)[:2].requires_grad_(False)
    _, expected = backward(model)
    plain = model.eval()(input_ids=IDS).logits
    cut = PrefixCut(model.train())
    backward(model)
    cut.update()
    count, _ = backward(model)
    model.eval()
    assert torch.equal(model(input_ids=IDS).logits, plain)
    model.generate(input_ids=IDS[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
    model.train()
    for module in model.modules():  # what Unsloth's for_training() does at each train()
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = reentrant is not None
    again, gradients = backward(model)
    assert again == count
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_closing_leaves_the_model_as_it_was():
    model = checkpoint(lora(4), False)
    before, expected = backward(model)
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    frozen = copy.deepcopy(model)
    blocks(frozen)[:2].requires_grad_(False)
    cut = PrefixCut(frozen)
    backward(frozen)
    cut.update()
    cut.close()
    assert not any("forward" in vars(block) for block in blocks(frozen))
    assert sum(len(m._forward_pre_hooks) for m in frozen.modules()) == hooks
    frozen.load_state_dict(model.state_dict())
    blocks(frozen).requires_grad_(False)
    for (_, ours), (_, theirs) in zip(frozen.named_parameters(), model.named_parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)
    after, gradients = backward(frozen)
    assert after == before
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


@pytest.mark.parametrize("tied", [False, True])
def test_full_fine_tuning_is_cut_only_where_embeddings_and_norms_are_frozen_too(tied):
    model = qwen3(num_hidden_layers=3, tie_word_embeddings=tied).train()
    matrices = GradES(model, GradESConfig(), 10).matrices
    for matrix in matrices.values():
        if matrix.layer < 2:
            matrix.parameters[0].requires_grad_(False)
    cut = PrefixCut(model)
    backward(model)
    assert not cut.update()  # norms and embeddings train
    model.model.layers[:2].requires_grad_(False)
    assert not cut.update()  # embeddings train
    model.model.embed_tokens.requires_grad_(False)
    assert cut.update()
    assert cut.depths == {"model.layers": 2}


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
        assert "model.norm.weight" in trains  # above all blocks
        assert grades.cut.depths == ({"model.layers": 2} if allowed else {})
        grades.unfreeze_all()
        assert all(p.requires_grad for p in model.parameters())
        assert grades.cut.depths == {}


def test_nothing_is_cut_above_a_vision_tower_that_trains():
    model = llava(image_token_id=3).train()
    text = torch.arange(10, 26).view(1, 16)
    language = model.model.language_model
    language.requires_grad_(False)
    language.layers[1].requires_grad_(True)
    cut = PrefixCut(model)
    model(input_ids=text, labels=text).loss.backward()
    assert not cut.update()  # the vision tower was not called yet, but it trains: it may be upstream
    image = {"pixel_values": torch.randn(1, 3, 32, 32), "input_ids": text.clone()}
    image["input_ids"][:, :16] = model.config.image_token_id
    image["input_ids"] = torch.cat([image["input_ids"], text], 1)
    model(**image, labels=image["input_ids"]).loss.backward()
    assert not cut.update()
    model.model.vision_tower.requires_grad_(False)
    assert cut.update()  # all of the vision tower; the projector trains still
    assert cut.depths == {"model.vision_tower.encoder.layers": 2}
    model.model.multi_modal_projector.requires_grad_(False)
    assert cut.update()
    assert cut.depths == {"model.vision_tower.encoder.layers": 2, "model.language_model.layers": 1}
    before = {name: p.grad.clone() for name, p in language.layers[1].named_parameters()}
    model.zero_grad()
    model(**image, labels=image["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in language.layers[1].parameters())
    assert before.keys() == dict(language.layers[1].named_parameters()).keys()


def trajectory(trainer_class, monkeypatch, cut, **arguments):
    with monkeypatch.context() as patch:
        if not cut:
            patch.setattr(PrefixCut, "update", lambda self: False)
        trainer = trainer_class(**arguments)
        trainer.train()
    losses = [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]
    evaluated = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return trainer, losses + evaluated, weights


def config_for(tmp_path, reentrant, **changes):
    return SFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=reentrant is not None,
        gradient_checkpointing_kwargs={"use_reentrant": bool(reentrant)},
        report_to=[],
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=8,
        disable_tqdm=True,
        **changes,
    )


def bottom_up(trainer, most=99):
    """Freezes one more layer from below every fourth step, so that a cut is sure to move during the run."""

    class BottomUp(trainer):
        def _start_grades(self):
            super()._start_grades()
            matrices = self.grades.matrices
            observed = self.grades.criterion.seen

            def update(step, readings):
                observed.update(dict.fromkeys(readings, 1))
                done = [
                    name
                    for name in observed
                    if matrices[name].layer < min(step // 4, most) and name not in self.grades.frozen
                ]
                self.grades.taus.update(dict.fromkeys(done, 1.0))
                self.grades.criterion.values.update(dict.fromkeys(done, 0.0))
                return done

            self.grades.criterion.update = update

    return BottomUp


@CHECKPOINTING
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_whole_text_runs_with_and_without_the_cut_are_equal(tmp_path, monkeypatch, reentrant, full):
    tokenizer = builtin.tiny_qwen3()[1]
    dataset = builtin.dates(train=128, test=8)
    grades = GradESConfig(freeze_norms=True, freeze_embeddings=True)
    runs = []
    for cut in (True, False):
        model = qwen3(num_hidden_layers=4, vocab_size=len(tokenizer), bos_token_id=None, tie_word_embeddings=True)
        runs.append(
            trajectory(
                bottom_up(GradESTrainer),
                monkeypatch,
                cut,
                model=model,
                args=config_for(tmp_path, reentrant, max_steps=15, save_strategy="steps", save_steps=8),
                train_dataset=dataset["train"],
                eval_dataset=dataset["test"],
                processing_class=tokenizer,
                grades=grades,
                peft_config=None if full else LoraConfig(r=4, target_modules="all-linear"),
            )
        )
    (trainer, losses, weights), (plain, expected, expected_weights) = runs
    assert trainer.grades_summary["cuts"][-1] == {"step": 12, "model.layers": 3}
    assert plain.grades_summary["cuts"] == []
    assert losses == expected
    assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)
    if not full:
        return
    assert trainer.grades_summary["flops"]["run"] < plain.grades_summary["flops"]["run"]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-8")
    assert "forward" not in vars(reloaded.model.layers[0])


@CHECKPOINTING
def test_whole_vlm_runs_with_and_without_the_cut_are_equal(tmp_path, monkeypatch, reentrant):
    dataset = vlm_builtin.digit_pictures(train=64, test=8)
    runs = []
    for cut in (True, False):
        model, processor = vlm_builtin.tiny_llava()
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=r".*layers\.\d+\..*(proj|fc1|fc2)"))
        runs.append(
            trajectory(
                bottom_up(GradESVLMTrainer),
                monkeypatch,
                cut,
                model=model,
                args=config_for(tmp_path, reentrant, max_steps=11, max_length=None, save_strategy="no"),
                train_dataset=dataset["train"],
                eval_dataset=dataset["test"],
                processing_class=processor,
            )
        )
    (trainer, losses, weights), (_, expected, expected_weights) = runs
    cuts = trainer.grades_summary["cuts"]
    assert cuts[0] == {"step": 4, "model.vision_tower.encoder.layers": 1}
    assert losses == expected
    assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_what_the_loss_does_not_use_is_no_obstacle(tmp_path, full):
    """LLaVA-1.5 takes the output of the last but one layer of its vision tower: the last one gets no gradient."""
    dataset = vlm_builtin.digit_pictures(train=64, test=8)

    def build():
        model, processor = vlm_builtin.tiny_llava()
        model.config.vision_feature_layer = -2
        if not full:
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(r=4, target_modules=r".*layers\.\d+\..*(proj|fc1|fc2)"))
        return bottom_up(GradESVLMTrainer)(
            model=model,
            args=config_for(tmp_path, False, max_steps=30, max_length=None, save_strategy="steps", save_steps=9),
            train_dataset=dataset["train"],
            eval_dataset=dataset["test"],
            processing_class=processor,
            grades=GradESConfig(freeze_norms=True, freeze_embeddings=True, track_projector=True),
        )

    trainer = build()
    trainer.train()
    last = {name for name in trainer.watched if "vision_tower" in name and ".layers.2." in name}
    assert len(last) == 6
    assert set(trainer.grades.frozen) == set(trainer.watched) - last
    assert trainer.state.global_step == 12
    assert trainer.grades_summary["stop_reason"] == "all matrices frozen"
    assert "33 of 39 matrices frozen (6 never got a gradient)" in account(trainer.grades_summary) or full
    cut = trainer.grades_summary["cuts"][-1]
    assert cut == {"step": 12, "model.vision_tower.encoder.layers": 3, "model.language_model.layers": 3}
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
    trainer = bottom_up(GradESTrainer)(
        model=model,
        args=config_for(tmp_path, None, max_steps=30, save_strategy="no"),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=processor.tokenizer,
    )
    trainer.train()
    assert {trainer.watched[name].tower for name in trainer.grades.frozen} == {"language"}
    assert trainer.state.global_step == 12


def test_a_head_that_is_trained_whole_comes_after_the_cut(tmp_path):
    """PEFT's `modules_to_save` wraps it; TRL's chunked loss calls neither."""
    tokenizer = builtin.tiny_qwen3()[1]
    dataset = builtin.dates(train=64, test=8)
    trainer = bottom_up(GradESTrainer)(
        model=qwen3(num_hidden_layers=4, vocab_size=len(tokenizer), bos_token_id=None),
        args=config_for(tmp_path, None, max_steps=9, save_strategy="no", loss_type="chunked_nll"),
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"]),
    )
    assert not any("lm_head" in name for name in trainer.watched)
    trainer.train()
    assert trainer.grades_summary["cuts"][-1] == {"step": 8, "model.layers": 2}


def test_a_run_resumed_beyond_a_cut_is_the_same_run(tmp_path):
    tokenizer = builtin.tiny_qwen3()[1]
    dataset = builtin.dates(train=128, test=8)

    def build(**changes):
        return bottom_up(GradESTrainer)(
            model=qwen3(num_hidden_layers=4, vocab_size=len(tokenizer), bos_token_id=None, tie_word_embeddings=True),
            args=config_for(tmp_path, False, max_steps=15, save_strategy="steps", save_steps=9),
            train_dataset=dataset["train"],
            eval_dataset=dataset["test"],
            processing_class=tokenizer,
            grades=GradESConfig(freeze_norms=True, freeze_embeddings=True),
        )

    straight = build()
    straight.train()
    resumed = build()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert resumed.grades.frozen == straight.grades.frozen
    assert resumed.grades_summary["cuts"] == straight.grades_summary["cuts"]
    for (name, one), (_, other) in zip(
        resumed.model.named_parameters(), straight.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
        assert one.requires_grad == other.requires_grad, name


def test_plain_sft_trainer_is_left_alone():
    assert not issubclass(SFTTrainer, GradESTrainer.__mro__[1])
