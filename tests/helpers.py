"""What several test files share: toy models, all built from configs, and ways to run them."""

import logging

import gguf
import numpy as np
import pytest
import torch
import transformers as T
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from trl import SFTConfig

from grades_trl import GradESConfig
from grades_trl.freezing.frozen_prefix import FrozenPrefix
from grades_trl.recipe import builtin

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Toy(nn.Module):
    """Two blocks with one 2 x 3 linear layer each, an embedding and a head outside them."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(5, 3)
        self.layers = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(3, 2)}) for _ in range(2))
        self.head = nn.Linear(2, 5)


def qwen3(**changes) -> T.Qwen3ForCausalLM:
    torch.manual_seed(0)
    return T.Qwen3ForCausalLM(T.Qwen3Config(**(SMALL | {"head_dim": 8} | changes)))


def qwen3_moe(**changes) -> T.Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    moe = {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
    return T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**(SMALL | moe | changes)))


def llava(**changes) -> T.LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**vision, image_size=32, patch_size=8),
        **({"text_config": T.Qwen2Config(**SMALL), "vision_feature_layer": -1} | changes),
    )
    return T.LlavaForConditionalGeneration(config)


# Marks no replies, as most models' own templates
PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat_tokenizer(chat_template: str, *more_tokens: str, **special_tokens: str) -> T.PreTrainedTokenizerFast:
    """One token per byte, and one for each role and its end."""
    tokens = ["<pad>", "<image>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", *more_tokens]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator([], trainers.BpeTrainer(special_tokens=tokens, initial_alphabet=alphabet))
    special = {"pad_token": "<pad>", "eos_token": "<|end|>", "extra_special_tokens": tokens} | special_tokens
    return T.PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=chat_template, **special)


def llava_processor(tokenizer: T.PreTrainedTokenizerFast, size: int) -> T.LlavaProcessor:
    """Of images with `size` pixels at each edge, in patches of 8."""
    return T.LlavaProcessor(
        T.CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=PLAIN,
        num_additional_image_tokens=1,
    )


CHECKPOINTING = pytest.mark.parametrize("reentrant", [None, False, True], ids=["none", "non_reentrant", "reentrant"])
IDS = torch.arange(32).view(2, 16)
MATMULS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


def write_gguf(path, model, kind="gpt2", split="default"):
    """A GGUF file of a tiny Llama, as llama.cpp lays it out; with a kind of vocabulary, and how it splits texts."""
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<unk>", "<bos>", "<eos>", *(chr(ord("!") + i) for i in range(config.vocab_size - 5)), '!"', "#$"]
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (config.vocab_size - 3))
    writer.add_token_merges(['! "', "# $"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    parts |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    parts |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for i in range(config.num_hidden_layers):
        names |= {f"model.layers.{i}.{part}": f"blk.{i}.{name}" for part, name in parts.items()}
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        values = tensor.numpy().astype(np.float32)
        for part, count in heads.items():  # llama.cpp interleaves the two halves of each head for its rotary embedding
            if part in name:
                values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(f"{names[name.removesuffix('.weight')]}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def warnings_in(caplog) -> list[str]:
    """What was warned of. Other messages are captured too where another test has set the level of the logger."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


class CountMatmuls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in MATMULS
        return function(*args, **(kwargs or {}))


def checkpoint(model, reentrant):
    """As the Trainer and PEFT do it: layers recompute, and the embeddings' output requires a gradient."""
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    return model.train()


def lora(layers, seed=1):
    """A Qwen3 with that many layers and adapters that have a gradient."""
    torch.manual_seed(seed)
    model = get_peft_model(qwen3(num_hidden_layers=layers), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)  # zeros would leave lora_A without a gradient
    return model


def layers(model):
    """The decoder layers of `lora(...)`."""
    return model.base_model.model.model.layers


def gradients(model, **inputs):
    """All gradients of the model's loss."""
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def backward(model, ids=IDS, **inputs):
    """Matmuls in backward, recomputation included, and all gradients."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, **inputs).loss
    with CountMatmuls() as counter:
        loss.backward()
    return counter.count, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(ours, theirs):
    """Whether two dicts hold the same tensors, bit for bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


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


def bottom_up(layers: int, **changes) -> GradESConfig:
    """Freezes one more layer from below every fourth step, so that the frozen prefix grows during the run."""
    schedule = {f"*layers.{layer}.*": 4 * (layer + 1) for layer in range(layers)}
    return GradESConfig(metric="schedule", schedule=schedule, stopping="all_frozen", **changes)


def trajectory(trainer_class, monkeypatch, prefix, **arguments):
    """A whole run, with or without the frozen prefix: trainer, losses and gradient norms, final weights."""
    with monkeypatch.context() as patch:
        if not prefix:
            patch.setattr(FrozenPrefix, "update", lambda self, *_, **__: False)
        trainer = trainer_class(**arguments)
        trainer.train()
    losses = [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]
    evaluated = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return trainer, losses + evaluated, weights


LORA = LoraConfig(r=4, target_modules="all-linear")


def never(**changes) -> GradESConfig:
    """Measures in every step and freezes nothing."""
    return GradESConfig(**({"metric": "grad_change", "tau": 0.0, "alpha": 0.0} | changes))


# Of every tiny run, with the config of any trainer
QUIETLY_ON_CPU = {
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": [],
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def arguments(output_dir, **changes) -> SFTConfig:
    defaults = {
        "output_dir": str(output_dir),
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-3,
        "weight_decay": 0.1,
    }
    return SFTConfig(**(defaults | QUIETLY_ON_CPU | changes))


# Arguments of a trainer that is made by `on_one_batch`.
ONE_BATCH = {
    "per_device_train_batch_size": 2,
    "remove_unused_columns": False,
    "dataset_kwargs": {"skip_prepare_dataset": True},
}


def on_one_batch(cls, model, inputs, args, **others):
    """A trainer all of whose batches are `inputs`."""
    return cls(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": [[1, 2, 3]] * 8}),
        processing_class=builtin.tiny_qwen3()[1],
        data_collator=lambda rows: dict(inputs),
        **others,
    )


def model_for(tokenizer, **changes) -> T.Qwen3ForCausalLM:
    return qwen3(vocab_size=len(tokenizer), bos_token_id=None, **changes)


def losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}
