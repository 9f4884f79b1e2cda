"""Tiny models of the architectures that the installed Transformers has, from their own configs.

A config is made with its defaults, and its sizes are then made small. `CHANGES` holds what an architecture needs
beside that.
"""

from collections.abc import Iterator
from typing import Any

import torch
import transformers as T
from torch import nn
from transformers.models.auto import modeling_auto

IMAGE, VIDEO, AUDIO, VOCABULARY = 90, 91, 92, 96

TEXT = """
afmoe apertus arcee aria_text axk1 bamba biogpt bitnet bloom codegen cohere cohere2 cohere2_moe cwm dbrx
deepseek_v2 deepseek_v3 diffllama doge ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1 falcon_mamba
flex_olmo gemma gemma2 gemma3_text gemma3n_text gemma4_text glm glm4 glm4_moe glm4_moe_lite gpt2 gpt_bigcode
gpt_neo gpt_neox gpt_oss gptj granite granitemoe granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense
hunyuan_v1_moe hy_v3 jais2 jamba jetmoe laguna lfm2 lfm2_moe llama llama4_text longcat_flash mamba
mamba2 mellum mimo_v2_flash minicpm3 minimax minimax_m2 ministral ministral3 mistral mixtral modernbert-decoder mpt
nanochat nemotron nemotron_h olmo olmo2 olmo3 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3
qwen3_5_text qwen3_5_moe_text qwen3_moe qwen3_next recurrent_gemma rwkv seed_oss smollm3 solar_open stablelm
starcoder2 vaultgemma xglm youtu zaya bart mbart pegasus t5 t5gemma
""".split()  # noqa: SIM905
WITH_IMAGES_OR_SOUND = """
aria aya_vision blip-2 cohere2_vision cosmos3_omni deepseek_vl deepseek_vl_hybrid exaone4_5 florence2 fun_asr_nano
fuyu gemma3 git glm46v glm4v glm4v_moe glm_ocr glmasr got_ocr2 granite_speech granite_speech_plus idefics idefics2
idefics3 instructblip internvl janus kimi_k25 kosmos-2 kosmos-2.5 lfm2_vl lighton_ocr llama4 llava llava_next
llava_next_video llava_onevision mistral3 mllama ovis2 paddleocr_vl paligemma phi4_multimodal qianfan_ocr
qwen2_5_omni_thinker qwen2_5_vl qwen2_audio qwen2_vl qwen3_5 qwen3_5_moe qwen3_asr qwen3_omni_moe_thinker qwen3_vl
qwen3_vl_moe smolvlm video_llama_3 video_llava vipllava voxtral whisper
""".split()  # noqa: SIM905

SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embed_dim", "embedding_size"), 32),
    **dict.fromkeys(("out_hidden_size", "projection_dim", "model_dim", "hidden_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "mlp_dim"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "num_decoder_layers"), 4),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "d_kv", "dim_head"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 128),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_head_dim", "input_dim"), 16),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "image_size": 32,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "num_query_tokens": 4,
    "image_token_id": IMAGE,
    "image_token_index": IMAGE,
    "video_token_id": VIDEO,
    "audio_token_id": AUDIO,
    "audio_token_index": AUDIO,
}

LATENT = {"num_key_value_heads": 4}  # latent attention has as many keys as queries
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
MROPE_TEXT = {f"text_config.{name}": value for name, value in MROPE.items()}
GEMMA4 = {
    "global_head_dim": 8,
    "num_global_key_value_heads": 2,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
GEMMA3N = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "activation_sparsity_pattern": [0.0] * 4,
    "laurel_rank": 4,
}

Q_FORMER = {
    "qformer_config.encoder_hidden_size": 32,
    "text_config.word_embed_proj_dim": 32,
    "image_token_index": IMAGE,
}

# Architecture -> what its config needs beside `SIZES`; a key with a dot belongs to a sub-config.
CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "hy_v4", "kimi_k25"), LATENT),
    **dict.fromkeys(("glm4_moe_lite", "longcat_flash", "minicpm3", "youtu"), LATENT),
    "kimi_linear": LATENT | {"num_experts_per_token": 2},
    **dict.fromkeys(("deepseek_v2", "dots1"), LATENT | {"num_experts_per_tok": 2}),
    "bamba": MAMBA | {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": MAMBA | {"layer_types": ["linear_attention", "full_attention"] * 2},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "mamba_d_state": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "zamba2": {
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "dbrx": {
        "ffn_config.hidden_size": 32,
        "ffn_config.moe_top_k": 2,
        "attn_config.kv_n_heads": 2,
        "attn_config.rope_theta": 1e4,
        "attn_config.clip_qkv": 8.0,
    },
    **{key: {"rotary_dim": 8} for key in ("codegen", "gptj")},
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), GEMMA4),
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1},
    **{key: {"head_dim": 8, "num_key_value_heads": 2} for key in ("hunyuan_v1_dense", "ministral")},
    "hunyuan_v1_moe": {"head_dim": 8, "num_key_value_heads": 2, "num_experts": 4, "moe_topk": 2},
    "hrm_text": {"num_layers_per_stack": 4, "num_hidden_layers": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "gemma3n_text": GEMMA3N,
    "recurrent_gemma": {"lru_width": 32},
    **dict.fromkeys(("blip-2", "instructblip"), Q_FORMER),
    "opt": {"word_embed_proj_dim": 32},
    "t5": {"decoder_start_token_id": 1},
    "t5gemma": {"decoder.cross_attention_hidden_size": 32},
    "zaya": {"num_experts_per_tok": 1},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 8},
    "whisper": {"max_source_positions": 32, "max_target_positions": 64},
    # With images or sounds
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "paddleocr_vl"), MROPE_TEXT),
    **dict.fromkeys(("glm4v", "glm46v", "glm4v_moe", "glm_ocr", "glmga"), MROPE_TEXT),
    **{
        key: {f"text_config.{k}": v for k, v in GEMMA4.items()}
        for key in ("gemma4", "diffusion_gemma", "gemma4_unified")
    },
    "mistral4": {"text_config.num_key_value_heads": 4},
    "kimi_k25": {"text_config.num_key_value_heads": 4},
    "glm5_next": {"text_config.num_key_value_heads": 4},
    "florence2": {
        "vision_config.depths": [1, 2],
        "vision_config.patch_size": [7, 3],
        "vision_config.patch_stride": [4, 2],
        "vision_config.patch_padding": [3, 1],
        "vision_config.patch_prenorm": [False, True],
        "vision_config.embed_dim": [16, 32],
        "vision_config.num_heads": [2, 4],
        "vision_config.num_groups": [2, 4],
        "vision_config.window_size": 4,
        "vision_config.projection_dim": 32,
    },
    **{
        key: {
            "encoder_config.output_dim": 12,
            "encoder_config.context_size": 8,
            "projector_config.encoder_hidden_size": 32,
            "encoder_config.dim_head": 8,
            "encoder_config.hidden_dim": 32,
            "encoder_config.input_dim": 16,
            "window_size": 3,
            "downsample_rate": 3,
        }
        for key in ("granite_speech", "granite_speech_plus")
    },
    "janus": {
        "vq_config.base_channels": 32,
        "vq_config.latent_channels": 32,
        "vq_config.num_embeddings": 16,
        "vq_config.embed_dim": 8,
        "vq_config.channel_multiplier": [1, 1],
        "vq_config.image_token_embed_dim": 32,
    },
    "mllama": {
        "vision_config.attention_heads": 4,
        "vision_config.num_global_layers": 2,
        "vision_config.intermediate_layers_indices": [1, 3],
        "vision_config.vision_output_dim": 96,
        "text_config.cross_attention_layers": [1, 3],
    },
    "deepseek_vl_hybrid": {"high_res_vision_config.output_channels": 32},
    "minimax_m3_vl": {"projector_hidden_size": 32},
    "step3p7": {"text_config.sliding_window": 8},
    "hunyuan_vl": {"text_config.head_dim": 8, "text_config.num_key_value_heads": 2},
    "granite4_vision": {},
}


# What a config has to be made with, since it says something of each layer.
FROM_THE_START: dict[str, dict[str, Any]] = {
    "gemma4_text": {"num_hidden_layers": 4, "layer_types": GEMMA4["layer_types"]},
}


def sub_configs(config: Any) -> Iterator[Any]:
    """A config and all configs inside."""
    yield config
    for value in vars(config).values():
        if isinstance(value, T.PreTrainedConfig):
            yield from sub_configs(value)


def shrink(config: Any, changes: dict[str, Any]) -> Any:
    """Makes the sizes of a config small, and the lists of what its layers are as short."""
    for part in sub_configs(config):
        layers = getattr(part, "num_hidden_layers", None)
        for name, size in SIZES.items():
            now = vars(part).get(name)
            if isinstance(now, int) and not isinstance(now, bool):
                setattr(part, name, size)
        for name, now in list(vars(part).items()):
            if isinstance(now, list) and len(now) == layers and layers > 4:
                kinds = list(dict.fromkeys(map(str, now)))
                every_kind = [next(x for x in now if str(x) == kind) for kind in kinds]
                setattr(part, name, (every_kind * 4)[:4])
    for name, value in changes.items():
        *path, last = name.split(".")
        part = config
        for step in path:
            part = getattr(part, step)
        setattr(part, last, value)
    return config


def build(name: str, vision: bool = False) -> nn.Module:
    """The tiny model of an architecture.

    Args:
        name (`str`): `model_type` of its config.
        vision (`bool`, *optional*, defaults to `False`): the model with images or sounds, if there is one of text too.
    """
    lists = (
        ("MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ")
        if vision
        else ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM")
    )
    names = [getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES") for kind in lists]
    model_class = next(known[name] for known in names if name in known)
    config = shrink(T.CONFIG_MAPPING[name](**FROM_THE_START.get(name, {})), CHANGES.get(name, {}))
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return getattr(T, model_class)(config)


def inputs_of(model: nn.Module, vision: bool) -> dict[str, Any]:
    """Two rows of text, with an image where the model has to have one."""
    ids = torch.randint(3, 80, (2, 16), generator=torch.Generator().manual_seed(0))
    inputs: dict[str, Any] = {"input_ids": ids, "labels": ids}
    name = model.config.model_type
    if name in NEEDS:
        inputs = NEEDS[name](inputs)
    return inputs


def _pixels(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _with_query_tokens(inputs: dict[str, Any]) -> dict[str, Any]:
    """Four placeholders for the four outputs of a Q-Former, for each image."""
    ids = inputs["input_ids"].clone()
    ids[:, 1:5] = IMAGE
    return {"input_ids": ids, "labels": ids.masked_fill(ids == IMAGE, -100), "pixel_values": _pixels(2, 3, 32, 32)}


def _with_sound(inputs: dict[str, Any]) -> dict[str, Any]:
    return {"input_features": _pixels(2, 80, 64), "labels": inputs["labels"]}


# Architectures that take no rows of text alone.
NEEDS: dict[str, Any] = {
    "blip-2": _with_query_tokens,
    "instructblip": lambda i: _with_query_tokens(i) | {"qformer_input_ids": i["input_ids"]},
    "blip": lambda i: i | {"pixel_values": _pixels(2, 3, 32, 32)},
    "kosmos-2": lambda i: (
        i | {"image_embeds": _pixels(2, 4, 32), "image_embeds_position_mask": torch.arange(16).repeat(2, 1) < 4}
    ),
    "idefics": lambda i: i | {"pixel_values": _pixels(2, 1, 3, 32, 32), "image_attention_mask": torch.ones(2, 16, 1)},
    "git": lambda i: i | {"pixel_values": _pixels(2, 3, 32, 32)},
    "mllama": lambda i: (
        i
        | {"pixel_values": _pixels(2, 1, 4, 3, 32, 32), "cross_attention_mask": torch.ones(2, 16, 1, 4)}
        | {"aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long)}
        | {"aspect_ratio_mask": torch.ones(2, 1, 4, dtype=torch.long)}
    ),
    "whisper": _with_sound,
}
