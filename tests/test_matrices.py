"""Matrices are found by structure, in architectures that name and lay out their weights differently."""

import pytest
import torch
import transformers as T
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn

from grades_trl.model import (
    describe,
    find_layers,
    find_matrices,
    linear_layers,
    towers_of_parameters,
    untracked_parameters,
)
from helpers import SMALL, Toy, llava, qwen3, qwen3_moe

VISION = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
LLAMA_ROLES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def roles(model, tower="language", **arguments):
    """role -> number of matrices"""
    counts = {}
    for matrix in find_matrices(model, **arguments).values():
        if matrix.tower == tower:
            counts[matrix.role] = counts.get(matrix.role, 0) + 1
    return counts


def test_the_papers_seven_of_every_layer():
    matrices = find_matrices(qwen3())
    assert roles(qwen3()) == dict.fromkeys(LLAMA_ROLES, 2)
    up = matrices["model.layers.1.mlp.up_proj"]
    assert (up.layer, up.role, up.tower, up.shape, up.params) == (1, "up_proj", "language", (48, 32), 48 * 32)
    assert not up.lora


def test_embeddings_norms_and_head_are_not_tracked_and_said_to_train():
    model = qwen3(tie_word_embeddings=False)
    matrices = find_matrices(model)
    rest = untracked_parameters(model, matrices)
    assert rest == {"embed_tokens.weight": 2048, "norms and biases": 192, "lm_head.weight": 2048}
    text = describe(model, matrices)
    assert "trains, but is not tracked: embed_tokens.weight 2,048" in text
    assert "language   q_proj                          2            32 x 32        2,048" in text


def test_gpt2_and_its_transposed_weights():
    model = T.GPT2LMHeadModel(T.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4))
    assert roles(model) == {"c_attn": 2, "attn.c_proj": 2, "c_fc": 2, "mlp.c_proj": 2}
    assert find_matrices(model)["transformer.h.0.attn.c_attn"].shape == (96, 32)


def test_neox():
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**sizes, intermediate_size=64))
    assert set(roles(model)) == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}


def test_fused_projections_of_phi3():
    model = T.Phi3ForCausalLM(T.Phi3Config(**SMALL, pad_token_id=0))
    assert roles(model) == {"qkv_proj": 2, "o_proj": 2, "gate_up_proj": 2, "down_proj": 2}


def test_multi_head_latent_attention_and_mixed_dense_and_expert_layers():
    config = T.DeepseekV3Config(
        **(SMALL | {"num_hidden_layers": 3, "num_key_value_heads": 4}),
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        v_head_dim=8,
        qk_nope_head_dim=8,
    )
    found = roles(T.DeepseekV3ForCausalLM(config))
    assert {"q_a_proj": 3, "q_b_proj": 3, "kv_a_proj_with_mqa": 3, "kv_b_proj": 3}.items() <= found.items()
    assert found["mlp.gate_proj"] == 1  # the dense layer
    assert found["shared_experts.gate_proj"] == 2
    assert found["gate_up_proj"] == 2  # one tensor with all experts in each of 2 layers


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_the_experts_of_a_3d_weight_are_one_matrix(adapted):
    model = qwen3_moe()
    if adapted:
        config = LoraConfig(r=3, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
        model = get_peft_model(model, config)
    matrix = find_matrices(model)["model.layers.1.mlp.experts.down_proj"]
    assert (matrix.shape, matrix.role, matrix.layer, matrix.lora) == ((4, 32, 16), "down_proj", 1, adapted)
    assert matrix.params == (4 * 3 * (32 + 16) if adapted else 4 * 32 * 16)
    assert "down_proj                       2        4 x 32 x 16" in describe(model, find_matrices(model))


def test_linear_attention_without_its_convolution():
    model = T.Qwen3NextForCausalLM(
        T.Qwen3NextConfig(
            **(SMALL | {"num_hidden_layers": 4, "head_dim": 8}),
            num_experts=4,
            moe_intermediate_size=16,
            num_experts_per_tok=2,
            shared_expert_intermediate_size=16,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        )
    )
    found = roles(model)
    assert {"in_proj_qkvz": 3, "in_proj_ba": 3, "q_proj": 1, "o_proj": 1}.items() <= found.items()
    assert not any("conv" in name for name in find_matrices(model))


def test_encoder_and_decoder_have_layers_of_their_own():
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    matrices = find_matrices(T.T5ForConditionalGeneration(T.T5Config(**sizes)))
    assert {m.stack for m in matrices.values()} == {"encoder.block", "decoder.block"}
    assert matrices["decoder.block.1.layer.1.EncDecAttention.q"].role == "EncDecAttention.q"


def test_towers_of_llava():
    model = llava()
    assert set(roles(model, "vision")) == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    assert set(roles(model, "language")) == LLAMA_ROLES
    assert roles(model, "projector") == {}  # the paper does not track it ...
    assert roles(model, "projector", projector=True) == {"linear_1": 1, "linear_2": 1}  # ... unless asked


def test_towers_of_qwen2_5_vl():
    config = T.Qwen2_5_VLConfig(text_config=SMALL, vision_config=VISION)
    model = T.Qwen2_5_VLForConditionalGeneration(config)
    assert roles(model, "vision") == {"qkv": 3, "proj": 3, "gate_proj": 3, "up_proj": 3, "down_proj": 3}
    assert set(roles(model, "language")) == LLAMA_ROLES
    assert sum(roles(model, "projector", projector=True).values()) == 2


def test_deepstack_mergers_of_qwen3_vl_are_no_layers():
    vision = VISION | {"deepstack_visual_indexes": [0, 1]}
    text = SMALL | {"head_dim": 8, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
    model = T.Qwen3VLForConditionalGeneration(T.Qwen3VLConfig(text_config=text, vision_config=vision))
    assert roles(model, "vision") == {"qkv": 3, "proj": 3, "linear_fc1": 3, "linear_fc2": 3}


@pytest.mark.parametrize("adapter", ["default", "student"])
def test_lora_pairs_are_one_matrix_under_any_adapter_name(adapter):
    model = get_peft_model(qwen3(), LoraConfig(r=4, target_modules="all-linear"), adapter_name=adapter)
    matrices = find_matrices(model)
    assert set(matrices) == set(find_matrices(qwen3()))  # the names of the base model
    q = matrices["model.layers.0.self_attn.q_proj"]
    assert [tuple(p.shape) for p in q.parameters] == [(4, 32), (32, 4)]
    assert (q.shape, q.params, q.lora) == ((32, 32), 2 * 4 * 32, True)


def test_a_layer_that_peft_trains_whole_is_one_matrix():
    """Its wrapper shows the weight of the copy inside."""
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["down_proj", "lm_head"])
    matrices = find_matrices(get_peft_model(qwen3(), config))
    assert sorted(matrices) == [
        f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("mlp.down_proj", "self_attn.q_proj")
    ]
    assert [m.lora for m in matrices.values()] == [True, False] * 2


def test_a_full_rank_pair_is_still_a_pair():
    # k_proj is 16 x 32: with rank 16, A has its shape; with rank 32 B of q_proj (32 x 32) has, and A too
    for rank in (16, 32):
        model = get_peft_model(qwen3(), LoraConfig(r=rank, target_modules=["q_proj", "k_proj"]))
        assert all(m.lora for m in find_matrices(model).values())


OTHER_ADAPTERS = {
    "vera": VeraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "lokr": LoKrConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "PromptTuningConfig": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "PrefixTuningConfig": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("kind", OTHER_ADAPTERS)
def test_adapters_of_other_kinds_are_refused_with_what_to_do(kind):
    model = get_peft_model(qwen3(), OTHER_ADAPTERS[kind])
    with pytest.raises(ValueError, match=rf"adapters of another kind \(peft\.\S*{kind}.*grades=None.*or use LoRA"):
        find_matrices(model)


def test_lora_beside_tokens_that_train_is_tracked():
    """PEFT trains single rows of the embeddings by an adapter layer of another kind, outside the layers."""
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1, 2])
    model = get_peft_model(qwen3(tie_word_embeddings=False), config)
    assert roles(model) == {"q_proj": 2}
    assert any("trainable_tokens" in kind for kind in untracked_parameters(model, find_matrices(model)))


def test_adapters_that_are_frozen_are_left_out():
    model = get_peft_model(qwen3(), LoraConfig(r=4, target_modules=["q_proj"]))
    model.base_model.model.model.layers[0].requires_grad_(False)
    assert list(find_matrices(model)) == ["model.layers.1.self_attn.q_proj"]


def test_lora_on_expert_weights():
    config = LoraConfig(
        r=4, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    assert roles(get_peft_model(qwen3_moe(), config)) == {"q_proj": 2, "gate_up_proj": 2, "down_proj": 2}


def test_lora_on_towers_of_choice():
    model = llava()
    layers = linear_layers(model, towers=("vision",))
    assert len(layers) == 12
    assert all("vision_tower" in layer for layer in layers)
    assert len(linear_layers(model, towers=("projector",))) == 2
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=layers))
    assert set(roles(adapted, "vision")) == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    assert roles(adapted, "language") == {}


def test_of_a_list_of_lists_the_inner_lists_hold_the_layers():
    """As in the stages of Florence-2's vision tower."""
    stages = nn.ModuleList(
        nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)) for _ in range(count))
        for count in (1, 2)
    )
    model = nn.ModuleDict({"stages": stages})
    assert find_layers(model) == {
        "stages.0.0": ("stages.0", 0),
        "stages.1.0": ("stages.1", 0),
        "stages.1.1": ("stages.1", 1),
    }
    assert {(m.name, m.stack, m.layer) for m in find_matrices(model).values()} == {
        (f"{layer}.{i}", stack, index) for layer, (stack, index) in find_layers(model).items() for i in (0, 2)
    }


def test_every_parameter_has_a_tower():
    towers = towers_of_parameters(llava())
    assert towers["model.multi_modal_projector.linear_1.bias"] == "projector"
    assert towers["model.vision_tower.post_layernorm.weight"] == "vision"
    assert towers["lm_head.weight"] == towers["model.language_model.embed_tokens.weight"] == "language"


def test_plain_pytorch_and_weights_frozen_by_hand():
    model = Toy()
    model.layers[0].requires_grad_(False)
    assert list(find_matrices(model)) == ["layers.1.proj"]


def test_a_plain_model_with_a_vision_encoder_is_told_by_its_name():
    model = nn.ModuleDict({"vision_encoder": Toy(), "decoder": Toy()})
    assert {m.name: m.tower for m in find_matrices(model).values()} == {
        "vision_encoder.layers.0.proj": "vision",
        "vision_encoder.layers.1.proj": "vision",
        "decoder.layers.0.proj": "language",
        "decoder.layers.1.proj": "language",
    }


def test_a_model_with_nothing_to_track_is_an_error():
    with pytest.raises(ValueError, match=r"found 2 such layers and 0 trainable tensors"):
        find_matrices(Toy().requires_grad_(False))
    with pytest.raises(ValueError, match="found 0 such layers"):
        find_matrices(nn.Sequential(nn.Linear(2, 2)))


def test_names_are_the_modules_full_paths():
    model = qwen3()
    for name, matrix in find_matrices(model).items():
        assert model.get_submodule(name).weight is matrix.parameters[0]
        assert torch.equal(model.get_parameter(f"{name}.weight"), matrix.parameters[0])


# ---- what is no matrix, and towers without words ----


class Experts(nn.Module):
    def __init__(self, **tensors):
        super().__init__()
        self.num_experts = 4
        for name, shape in tensors.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_experts, self.weight = 4, nn.Parameter(torch.zeros(4, 6))


def one_layer(**parts):
    return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict(parts)])})


def test_routers_and_gates_of_experts_are_no_matrices():
    mixture = {"experts": Experts(up_proj=(4, 5, 6)), "gate": Router(), "shared_expert": nn.Linear(6, 8)}
    mixture |= {
        "router": nn.Linear(6, 4),
        "shared_expert_gate": nn.Linear(6, 1),
        "nested": nn.Sequential(nn.Linear(6, 4)),
    }
    attention = nn.ModuleDict({"q_proj": nn.Linear(6, 4), "k_proj": nn.Linear(6, 4)})
    model = one_layer(mlp=nn.ModuleDict(mixture), attention=attention)
    linear = {f"layers.0.{name}" for name in ("mlp.shared_expert", "attention.q_proj", "attention.k_proj")}
    assert set(find_matrices(model)) == linear | {"layers.0.mlp.experts.up_proj"}
    assert set(linear_layers(model)) == linear


def test_a_list_of_experts_has_a_router_too():
    experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 5)}) for _ in range(3))
    model = one_layer(mlp=nn.ModuleDict({"experts": experts, "gate": nn.Linear(6, 3)}))
    assert [m.role for m in find_matrices(model).values()] == ["up"] * 3


@pytest.mark.parametrize("name", ["A_log", "seg_embed", "bias", "time_mix"])
def test_tensors_of_three_dimensions_that_are_no_matrices(name):
    shape = (1, 1, 6) if name == "time_mix" else (4, 5, 6)
    model = one_layer(mixer=Experts(**{name: shape}), q_proj=nn.Linear(6, 6))
    assert [m.role for m in find_matrices(model).values()] == ["q_proj"]


def test_dbrx_keeps_its_experts_in_two_dimensions():
    model = one_layer(glu=Experts(w1=(4 * 5, 6), v1=(4 * 5, 6), w2=(4 * 5, 6)), q_proj=nn.Linear(6, 6))
    assert {m.role: m.shape for m in find_matrices(model).values()} == {
        **dict.fromkeys(("w1", "v1", "w2"), (4, 5, 6)),
        "q_proj": (6, 6),
    }


def test_what_torchs_attention_reads_is_a_matrix_that_lora_does_not_adapt():
    model = one_layer(attention=nn.MultiheadAttention(6, 2), mlp=nn.Linear(6, 6))
    assert {m.role for m in find_matrices(model).values()} == {"in_proj_weight", "out_proj", "mlp"}
    assert linear_layers(model) == ["layers.0.mlp"]


def test_an_inner_list_of_different_modules_is_one_layer():
    """As in the resampler of Idefics; and stages with one list of equal layers each, as in Swin."""
    block = [nn.Sequential(nn.Linear(2, 2)), nn.ModuleDict({"mlp": nn.Linear(2, 2)})]
    assert set(find_layers(nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleList(block)])}))) == {"blocks.0"}
    stages = nn.ModuleList(
        nn.ModuleDict({"blocks": nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])}) for _ in range(2)
    )
    assert set(find_layers(nn.ModuleDict({"stages": stages}))) == {"stages.0.blocks.0", "stages.1.blocks.0"}


def test_a_q_former_is_a_projector_with_layers():
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = T.Blip2Config(
        vision_config=vision | {"image_size": 32, "patch_size": 8},
        qformer_config=vision | {"encoder_hidden_size": 32, "vocab_size": 64, "cross_attention_frequency": 1},
        text_config={"model_type": "opt", "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1, "vocab_size": 64}
        | {"num_attention_heads": 4, "word_embed_proj_dim": 32},
    )
    model = T.Blip2ForConditionalGeneration(config)
    towers = {m.stack: m.tower for m in find_matrices(model).values()}
    assert towers == {
        "vision_model.encoder.layers": "vision",
        "qformer.encoder.layer": "projector",
        "language_model.model.decoder.layers": "language",
    }
    assert towers_of_parameters(model)["language_projection.weight"] == "projector"
    assert towers_of_parameters(model)["language_model.model.decoder.embed_tokens.weight"] == "language"


def test_an_encoder_that_takes_sound_is_audio_whatever_its_name():
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 64, "pad_token_id": 0}
    model = T.WhisperForConditionalGeneration(T.WhisperConfig(**sizes, bos_token_id=1, eos_token_id=2))
    towers = {m.stack: m.tower for m in find_matrices(model).values()}
    assert towers == {"model.encoder.layers": "audio", "model.decoder.layers": "language"}
