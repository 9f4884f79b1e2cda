"""FLOPs and tokens: closed forms, torch's own counter, and hooks on real models."""

import importlib
from pathlib import Path

import pytest
import torch
import transformers as T
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from grades_trl.model import linear_layers, untracked_matrices
from grades_trl.model.flops import TokenCounter, experts_per_token, forward_flops, step_flops
from grades_trl.model.matrices import WeightMatrix, find_matrices
from helpers import SMALL, llava, qwen3, qwen3_moe

BATCH, LENGTH = 2, 24


def matrix(name, layer, shape, tower="language", stack="layers", factors=()):
    parameters = [nn.Parameter(torch.empty(s, device="meta")) for s in (factors or [shape])]
    return WeightMatrix(name, layer, name.rpartition(".")[2], tower, stack, shape, tuple(parameters))


# ---- closed forms ----

TWO = [matrix("0.q", 0, (5, 7)), matrix("1.q", 1, (5, 7))]
N = 5 * 7


@pytest.mark.parametrize(
    ("changes", "of_n"),
    [
        ({}, 2 * 6),  # forward, gradient of the input, gradient of the weight: 2 each, in two layers
        ({"checkpointing": True}, 2 * 8),
        ({"frozen": {"1.q"}}, 6 + 4),
        ({"frozen": {"0.q"}, "skipped_layers": {"layers": 1}}, 2 + 6),
        ({"frozen": {"0.q"}, "skipped_layers": {"other": 1}}, 4 + 6),
        ({"frozen": {"0.q", "1.q"}, "skipped_layers": {"layers": 2}, "checkpointing": True}, 2 + 2),
        ({"frozen": {"0.q"}, "skipped_layers": {"layers": 1}, "checkpointing": True}, 2 + 8),
        ({"tokens": {"language": 10.0}}, 10 * 12),
        ({"tokens": {"vision": 10.0}}, 0),
    ],
)
def test_a_full_layer_costs_two_flops_per_weight_and_product(changes, of_n):
    assert step_flops(TWO, **changes) == of_n * N


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 4 * (N + 24) + 2 * 24),
        ({"checkpointing": True}, 6 * (N + 24) + 2 * 24),
        ({"frozen": {"0.q"}}, 4 * (N + 24)),
        ({"frozen": {"0.q"}, "skipped_layers": {"layers": 1}}, 2 * (N + 24)),
    ],
)
def test_lora_has_no_gradient_of_the_base_weight(changes, expected):
    lora = matrix("0.q", 0, (5, 7), factors=[(2, 7), (5, 2)])
    assert lora.params == 24
    assert step_flops([lora], **changes) == expected


@pytest.mark.parametrize(("active", "share"), [(2, 2 / 8), (None, 1), (16, 1)])
@pytest.mark.parametrize("one_tensor", [True, False])
def test_a_token_passes_through_the_active_experts_only(one_tensor, active, share):
    if one_tensor:
        experts = [matrix("0.experts.up", 0, (8, 5, 7))]
    else:
        experts = [matrix(f"0.experts.{i}.up", 0, (5, 7)) for i in range(8)]
    assert step_flops(experts, experts_per_token=active) == share * 8 * 6 * N
    assert forward_flops(experts, experts_per_token=active) == share * 8 * 2 * N


def test_layers_of_one_role_that_are_no_experts_all_count():
    sequential = [matrix("0.mlp.up", 0, (5, 7)), matrix("0.other.up", 0, (5, 7)), *TWO]
    assert step_flops(sequential, experts_per_token=1) == 4 * 6 * N


def test_matrices_outside_the_layers_are_never_skipped():
    projector = matrix("projector.linear", -1, (5, 7), tower="projector", stack="")
    assert step_flops([projector], skipped_layers={"": 3}) == 6 * N


def test_every_tower_has_its_own_tokens():
    both = [matrix("v.q", 0, (5, 7), tower="vision", stack="vision"), matrix("t.q", 0, (5, 7))]
    assert forward_flops(both, tokens={"vision": 17.0, "language": 3.0}) == 2 * N * 20
    assert forward_flops(both) == 2 * N * 2


# ---- torch's own counter ----


def counted(model, inputs):
    """FLOPs of forward and backward, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        model(**inputs).loss.backward()
    return counter.get_total_flops()


def predicted(model, tracked, inputs, **changes):
    counter = TokenCounter()
    counter.add(inputs, model.config)
    options = {"tokens": counter.per_batch(), "experts_per_token": counter.experts_per_token}
    return step_flops(tracked.values(), **options, **changes)


def attention(config, length=LENGTH, batch=BATCH, heads=None, head_dim=None):
    """Two products of one layer (scores, values), each with two in backward. Not counted by step_flops."""
    heads = heads or config.num_attention_heads
    head_dim = head_dim or config.hidden_size // heads
    return 3 * 2 * 2 * batch * heads * length**2 * head_dim


def head(config, products):
    """The output head: forward, gradient of its input, and that of its weight where it trains. Not counted either."""
    return products * 2 * BATCH * LENGTH * config.vocab_size * config.hidden_size


def text(vocab=64):
    ids = torch.randint(vocab, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def test_flops_of_a_decoder():
    model = qwen3(attn_implementation="eager")
    rest = 2 * attention(model.config, head_dim=8) + head(model.config, 3)
    tracked = find_matrices(model)
    assert predicted(model, tracked, text()) == pytest.approx(counted(model, text()) - rest, rel=0.02)


def test_flops_with_frozen_matrices_and_skipped_layers():
    model = qwen3(attn_implementation="eager", num_hidden_layers=4)
    tracked = find_matrices(model)
    frozen = {name for name, m in tracked.items() if m.layer == 0 or m.role == "down_proj"}
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    for name in frozen:
        for parameter in tracked[name].parameters:
            parameter.requires_grad_(False)
    rest = (3 + 1 / 3) * attention(model.config, head_dim=8) + head(model.config, 3)
    flops = predicted(model, tracked, text(), frozen=frozen, skipped_layers={"model.layers": 1})
    assert flops == pytest.approx(counted(model, text()) - rest, rel=0.02)


def test_flops_of_gpt2_whose_weights_are_transposed():
    torch.manual_seed(0)
    size = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 64}
    model = T.GPT2LMHeadModel(T.GPT2Config(**size, attn_implementation="eager"))
    rest = 3 * attention(model.config) + head(model.config, 3)
    tracked = find_matrices(model)
    assert predicted(model, tracked, text()) == pytest.approx(counted(model, text()) - rest, rel=0.02)


def test_flops_of_a_mixture_of_experts():
    model = qwen3_moe(attn_implementation="eager", experts_implementation="eager")
    routers = 2 * 3 * 2 * BATCH * LENGTH * 4 * 32  # a product with 4 x 32 weights in each of 2 layers
    rest = 2 * attention(model.config, head_dim=8) + head(model.config, 3) + routers
    tracked = find_matrices(model)
    assert any("experts" in name for name in tracked)
    assert predicted(model, tracked, text()) == pytest.approx(counted(model, text()) - rest, rel=0.02)


def vision_text(config, per_image):
    """Two rows with one image each: the placeholders, then text."""
    ids = torch.randint(3, 60, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[:, :per_image] = config.image_token_id
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def llava_inputs(config):
    return vision_text(config, 16) | {"pixel_values": torch.randn(BATCH, 3, 32, 32)}


def test_flops_of_llava():
    model = llava(image_token_index=60, attn_implementation="eager")
    inputs, tracked = llava_inputs(model.config), find_matrices(model, projector=True)
    text_config, vision = model.config.text_config, model.config.vision_config
    patch_embedding = 2 * 2 * BATCH * 16 * vision.hidden_size * 3 * 8 * 8  # a convolution: forward, and its weight
    rest = 2 * attention(text_config) + 2 * attention(vision, length=17) + head(text_config, 3) + patch_embedding
    assert predicted(model, tracked, inputs) == pytest.approx(counted(model, inputs) - rest, rel=0.02)


@pytest.mark.parametrize("reentrant", [True, False])
def test_flops_of_lora_with_checkpointing(reentrant):
    base = qwen3(attn_implementation="eager")
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    tracked = find_matrices(model)
    # Recomputation runs the two products of attention again.
    rest = 2 * (4 / 3) * attention(base.config, head_dim=8) + head(base.config, 2)
    if not reentrant:  # torch does not recompute the last product of a layer: B of down_proj
        rest -= 2 * 2 * BATCH * LENGTH * 4 * 32
    assert predicted(model, tracked, text(), checkpointing=True) == pytest.approx(
        counted(model, text()) - rest, rel=0.02
    )


# ---- tokens, against hooks ----


def entering(module, counts, tower):
    """Notes the tokens that enter a module: all rows of its first input that holds numbers."""

    def hook(_module, args, kwargs):
        hidden = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.is_floating_point())
        counts[tower] = hidden.numel() // hidden.shape[-1]

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def test_tokens_of_llava_are_those_that_enter_its_towers():
    model = llava(image_token_index=60)
    inputs, seen = llava_inputs(model.config), {}
    entering(model.model.vision_tower.encoder.layers[0], seen, "vision")
    entering(model.model.multi_modal_projector.linear_1, seen, "projector")
    entering(model.model.language_model.layers[0], seen, "language")
    model(**inputs)
    counter = TokenCounter()
    counter.add(inputs, model.config)
    assert counter.per_batch() == seen == {"vision": 2 * 17, "projector": 2 * 16, "language": 48}


@pytest.fixture(scope="module")
def qwen_vl():
    torch.manual_seed(0)
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = T.Qwen2_5_VLConfig(
        text_config=SMALL | {"vocab_size": 80, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=70,
        video_token_id=71,
        vision_start_token_id=72,
        vision_end_token_id=73,
    )
    return T.Qwen2_5_VLForConditionalGeneration(config)


def qwen_vl_inputs(config):
    """Two images of different size in the first row, none in the second."""
    grid = torch.tensor([[1, 4, 6], [1, 8, 4]])  # patches; 2 x 2 of them become one token
    pixels = config.vision_config.in_channels * config.vision_config.temporal_patch_size * 4 * 4
    ids = torch.randint(3, 60, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[0, 1:7], ids[0, 9:17] = config.image_token_id, config.image_token_id
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_grid_thw": grid, "labels": ids}
    inputs["mm_token_type_ids"] = (ids == config.image_token_id).long()
    return inputs | {"pixel_values": torch.randn(24 + 32, pixels)}


def test_tokens_of_qwen_vl_are_those_that_enter_its_towers(qwen_vl):
    inputs, seen = qwen_vl_inputs(qwen_vl.config), {}
    hooks = [
        entering(qwen_vl.model.visual.blocks[0], seen, "vision"),
        entering(qwen_vl.model.visual.merger.mlp[0], seen, "projector"),
        entering(qwen_vl.model.language_model.layers[0], seen, "language"),
    ]
    qwen_vl(**inputs)
    for hook in hooks:
        hook.remove()
    counter = TokenCounter()
    counter.add(inputs, qwen_vl.config)
    assert counter.per_batch() == seen == {"vision": 56, "projector": 14, "language": 48}


def test_flops_of_qwen_vl(qwen_vl):
    inputs, tracked = qwen_vl_inputs(qwen_vl.config), find_matrices(qwen_vl, projector=True)
    forward = predicted(qwen_vl, tracked, inputs) / 3
    with FlopCounterMode(display=False) as counter:
        qwen_vl.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        qwen_vl.model.language_model(input_ids=inputs["input_ids"])
    table = counter.get_flop_counts()
    linear = sum(flops for (op, flops) in table["Global"].items() if op in (torch.ops.aten.addmm, torch.ops.aten.mm))
    assert forward == pytest.approx(linear, rel=0.02)


def test_audio_tokens_are_half_of_the_frames():
    counter = TokenCounter()
    counter.add({"input_ids": torch.ones(2, 9), "input_features": torch.zeros(3, 80, 3000)}, None)
    assert counter.per_batch() == {"language": 18, "audio": 3 * 1500}


@pytest.mark.parametrize(
    ("pixels", "vision_config", "expected"),
    [
        ((2, 3, 32, 48), {"patch_size": 8}, 2 * 4 * 6),
        ((2, 5, 3, 32, 48), {"patch_size": [16, 8]}, 10 * 2 * 6),
        ((2, 100, 768), {"patch_size": 16}, 200),  # patches already, as SigLIP2 takes them
        ((77, 1176), {"patch_size": 14}, 77),
        ((2, 3, 32, 48), {}, 5),  # not known: as many as the placeholders
    ],
)
def test_vision_tokens_by_shape(pixels, vision_config, expected):
    class Config:
        image_token_id = 9

    Config.vision_config = type("VisionConfig", (), vision_config)
    counter = TokenCounter()
    counter.add({"input_ids": torch.tensor([[9, 9, 9, 1, 9, 9]]), "pixel_values": torch.zeros(pixels)}, Config)
    assert counter.per_batch() == {"language": 6, "projector": 5, "vision": expected}


def test_means_over_batches_and_what_counts_as_an_example():
    counter = TokenCounter()
    counter.add({"input_ids": torch.ones(4, 10)}, None)
    packed = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])
    counter.add({"input_ids": torch.ones(1, 8), "position_ids": packed}, None)
    counter.add({"chosen_input_ids": torch.ones(2, 5), "rejected_input_ids": torch.ones(2, 4)}, None)
    assert counter.per_batch() == {"language": (40 + 8 + 18) / 3}
    assert counter.examples == 4 + 3 + 2


@pytest.mark.parametrize("inputs", [{}, {"x": torch.ones(3)}, {"input_ids": None}])
def test_a_batch_of_unknown_form_counts_nothing(inputs):
    counter = TokenCounter()
    counter.add(inputs, None)
    assert counter.per_batch() is None and counter.batches == 1


def test_a_resumed_counter_goes_on():
    straight, first, resumed = TokenCounter(), TokenCounter(), TokenCounter()
    inputs = llava_inputs(llava(image_token_index=60).config)
    for counter in (straight, straight, first):
        counter.add(inputs, T.LlavaConfig(image_token_index=60))
    resumed.load_state_dict(first.state_dict())
    resumed.add(inputs, T.LlavaConfig(image_token_index=60))
    assert resumed.per_batch() == straight.per_batch() and resumed.state_dict() == straight.state_dict()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (T.Qwen3MoeConfig(num_experts_per_tok=3), 3),
        (T.MixtralConfig(), 2),
        (T.Qwen3VLMoeConfig(text_config={"num_experts_per_tok": 5}), 5),
        (T.Ernie4_5_MoeConfig(), 6),
        (T.HunYuanMoEV1Config(moe_topk=[1, 3]), 2),
        (T.Qwen3Config(), None),
        (None, None),
        ({"num_experts_per_tok": 2}, None),
    ],
)
def test_experts_per_token(config, expected):
    assert experts_per_token(config) == expected


# ---- architectures, full and LoRA ----

ARCHITECTURES = ["llama", "gemma2", "gpt2", "gpt_neox", "phi3", "falcon", "qwen3_moe", "mixtral"]


@pytest.mark.parametrize("targets", [None, "all", "one"], ids=["full", "lora", "lora on one of the linear layers"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_flops_of_architectures(monkeypatch, name, targets):
    """All products of two matrices in the layers; those of attention are of three dimensions."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "families"))
    model = importlib.import_module("zoo").build(name)
    config = model.config
    config._experts_implementation = "eager"
    if targets is not None:
        paths = linear_layers(model)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=paths if targets == "all" else paths[::5]))
        model.enable_input_require_grads()
    tracked, inputs = find_matrices(model), text(vocab=96)
    others = untracked_matrices(model, tracked.values())
    assert bool(others) == (targets == "one" or (targets == "all" and name in ("qwen3_moe", "mixtral")))
    with FlopCounterMode(display=False) as counter:
        model(**inputs).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    linear = sum(flops for op, flops in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    products = 3 if targets is None else 2
    linear -= products * 2 * BATCH * LENGTH * config.vocab_size * config.hidden_size  # the head
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", 0)
    linear -= products * 2 * BATCH * LENGTH * experts * config.hidden_size * config.num_hidden_layers  # the routers
    found = step_flops(
        [*tracked.values(), *others],
        frozen={matrix.name for matrix in others},
        tokens={"language": BATCH * LENGTH},
        experts_per_token=experts_per_token(config),
    )
    assert found == pytest.approx(linear, rel=0.02)
