"""Toy models of the tests, all built from configs, and what tests of trainers share."""

import torch
import transformers as T
from peft import LoraConfig
from torch import nn
from trl import SFTConfig

from grades_trl import GradESConfig

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
        text_config=T.Qwen2Config(**SMALL),
        vision_config=T.CLIPVisionConfig(**vision, image_size=32, patch_size=8),
        **({"vision_feature_layer": -1} | changes),
    )
    return T.LlavaForConditionalGeneration(config)


LORA = LoraConfig(r=4, target_modules="all-linear")


def never(**changes) -> GradESConfig:
    """Measures in every step and freezes nothing."""
    return GradESConfig(**({"tau": 0.0, "alpha": 0.0} | changes))


def arguments(output_dir, **changes) -> SFTConfig:
    defaults = {
        "output_dir": str(output_dir),
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-3,
        "weight_decay": 0.1,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return SFTConfig(**(defaults | changes))


def model_for(tokenizer, **changes) -> T.Qwen3ForCausalLM:
    return qwen3(vocab_size=len(tokenizer), bos_token_id=None, **changes)


def losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
