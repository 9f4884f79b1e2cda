"""Outputs of the frozen prefix read from memory: the same run, without the prefix's work."""

from types import SimpleNamespace

import pytest
import torch
import transformers as T
from peft import LoraConfig
from torch import nn
from vision_models import ROWS, llava_rows

from grades_trl import GradESTrainer
from grades_trl.freezing.activation_cache import ActivationCache
from grades_trl.freezing.batch_content import images_of, segments_of
from grades_trl.freezing.encoder_cache import EncoderCache
from grades_trl.freezing.freeze import Freezer
from grades_trl.freezing.frozen_prefix import FrozenPrefix
from grades_trl.model import find_layers
from grades_trl.recipe import builtin
from helpers import (
    CHECKPOINTING,
    SMALL,
    CountMatmuls,
    bottom_up,
    checkpoint,
    config_for,
    gradients,
    layers,
    llava,
    lora,
    losses,
    qwen3,
    qwen3_moe,
    warnings_in,
)

pytestmark = pytest.mark.usefixtures("no_figures")

MIB = 2**20


def random_ids(rows, seed=0):
    return torch.randint(3, 60, (rows, 12), generator=torch.Generator().manual_seed(seed))


def half_frozen(cache_bytes=MIB, reentrant=None):
    """Four layers with adapters, of which two are frozen and skipped."""
    model = checkpoint(lora(4), reentrant)
    layers(model)[:2].requires_grad_(False)
    prefix = FrozenPrefix(model, ActivationCache(cache_bytes) if cache_bytes else None)
    model(input_ids=torch.ones(1, 4, dtype=torch.long))
    assert prefix.update()
    return model, prefix


def forward(model, **inputs):
    with CountMatmuls() as counter:
        logits = model(**inputs).logits
    return counter.count, logits


def close(ours, theirs):
    """Equal up to the rounding of batches that are padded otherwise."""
    assert ours.keys() == theirs.keys()
    return all(torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6) for name in theirs)


def test_a_batch_that_comes_back_skips_the_prefix_and_gives_the_same_numbers():
    model, prefix = half_frozen()
    ids = random_ids(4)
    first, expected = forward(model, input_ids=ids)
    again, logits = forward(model, input_ids=ids)
    assert torch.equal(logits, expected)
    a_layer = forward(lora(2), input_ids=ids)[0] - forward(lora(1), input_ids=ids)[0]
    assert first - again == 2 * a_layer
    assert (prefix.cache.use.hits, prefix.cache.use.misses) == (1, 1)
    shuffled = ids[[2, 0, 3, 1]]
    _, logits = forward(model, input_ids=shuffled)
    assert torch.equal(logits, expected[[2, 0, 3, 1]])
    assert prefix.cache.use.hits == 2
    other = ids.clone()
    other[1, 5] = 61
    forward(model, input_ids=other)
    assert prefix.cache.use.hits == 2  # one changed token, and the batch is computed


def test_padding_does_not_matter():
    model, prefix = half_frozen()
    ids = random_ids(2)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    _, expected = forward(model, input_ids=ids, attention_mask=mask)
    longer, wider = torch.nn.functional.pad(ids, (0, 5)), torch.nn.functional.pad(mask, (0, 5))
    _, logits = forward(model, input_ids=longer, attention_mask=wider)
    assert prefix.cache.use.hits == 1
    assert torch.allclose(logits[0, :12], expected[0], atol=1e-5)
    assert torch.allclose(logits[1, :7], expected[1, :7], atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@CHECKPOINTING
def test_gradients_are_those_without_the_cache_under_checkpointing_and_autocast(reentrant, autocast):
    def both(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return [gradients(model, input_ids=ids, labels=ids) for ids in (random_ids(4), random_ids(4))]

    model, prefix = half_frozen(cache_bytes=0, reentrant=reentrant)
    expected = both(model)
    prefix.close()
    model, prefix = half_frozen(reentrant=reentrant)
    found = both(model)
    assert prefix.cache.use.hits == 1
    assert all(close(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def sizes(**changes):
    return SMALL | {"num_hidden_layers": 4} | changes


def bloom(dropout=0.0):
    config = {"vocab_size": 64, "hidden_size": 32, "n_layer": 4, "n_head": 4}
    return T.BloomForCausalLM(T.BloomConfig(**config, hidden_dropout=dropout, attention_dropout=dropout))


def falcon(dropout=0.0, **changes):
    config = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    config |= {"hidden_dropout": dropout, "attention_dropout": dropout}
    return T.FalconForCausalLM(T.FalconConfig(**config | changes))


def gemma3():
    config = sizes(head_dim=8, pad_token_id=0, sliding_window=8)
    return T.Gemma3ForCausalLM(T.Gemma3TextConfig(**config, layer_types=["sliding_attention", "full_attention"] * 2))


def gemma3n():
    config = sizes(head_dim=8, pad_token_id=0, layer_types=["sliding_attention", "full_attention"] * 2)
    per_layer = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
    shared = {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 4}
    return T.Gemma3nForCausalLM(T.Gemma3nTextConfig(**config, **per_layer, **shared))


def gemma4(**changes):
    config = sizes(head_dim=8, pad_token_id=0, layer_types=["sliding_attention", "full_attention"] * 2)
    per_layer = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}
    heads = {"global_head_dim": 8, "num_global_key_value_heads": 2}
    return T.Gemma4ForCausalLM(T.Gemma4TextConfig(**config | per_layer | heads | changes))


def opt():
    config = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "ffn_dim": 48, "num_attention_heads": 4}
    return T.OPTForCausalLM(T.OPTConfig(**config, max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.1))


def phimoe(**jitter):
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    noise = {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0} | jitter
    return T.PhimoeForCausalLM(T.PhimoeConfig(**sizes(pad_token_id=0), **experts, **noise))


def bart():
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    config = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.1}
    return T.BartForConditionalGeneration(T.BartConfig(**config, **heads, max_position_embeddings=64))


class SharesKeys(nn.Module):
    """Its last layer reads what the first one made, past the hidden state, as in Gemma 4."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 8)
        self.layers = nn.ModuleList(SharesKeysLayer() for _ in range(3))

    def forward(self, input_ids, labels):
        hidden, shared = self.embed(input_ids), []
        for layer in self.layers:
            hidden = layer(hidden, shared)
        return SimpleNamespace(loss=hidden.square().mean())


class SharesKeysLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden, shared):
        shared.append(self.key(hidden))
        return hidden + self.value(hidden) * shared[0]


def phi3():
    """Its frequencies are others as soon as a row of the batch is longer than eight tokens."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 5.0, 9.0, 13.0]}
    length = {"original_max_position_embeddings": 8}
    rope |= {"rope_theta": 10000.0, "partial_rotary_factor": 1.0, **length}
    return T.Phi3ForCausalLM(T.Phi3Config(**sizes(pad_token_id=0), rope_parameters=rope, **length))


def llama_dynamic():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    return T.LlamaForCausalLM(T.LlamaConfig(**sizes(max_position_embeddings=8), rope_parameters=rope))


def gemma3_dynamic():
    rope = {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")}
    rope["full_attention"] |= {"rope_type": "dynamic", "factor": 4.0}
    config = sizes(head_dim=8, pad_token_id=0, sliding_window=8, max_position_embeddings=8)
    layer_types = ["sliding_attention", "full_attention"] * 2
    return T.Gemma3ForCausalLM(T.Gemma3TextConfig(**config, layer_types=layer_types, rope_parameters=rope))


SEVERAL = "more than one"
RANDOM = "random numbers"
MORE = "loss reads more"


def router_loss():
    return qwen3_moe(num_hidden_layers=4, output_router_logits=True, router_aux_loss_coef=1.0)


@pytest.mark.parametrize(
    ("build", "off"),
    [
        pytest.param(lambda: qwen3(num_hidden_layers=4), "", id="qwen3"),
        pytest.param(lambda: qwen3(num_hidden_layers=4, attention_dropout=0.1), RANDOM, id="dropout"),
        pytest.param(lambda: qwen3_moe(num_hidden_layers=4), "", id="moe"),
        pytest.param(router_loss, MORE, id="moe_router_loss"),
        # PhiMoE samples its experts in training, jitter or not.
        pytest.param(phimoe, RANDOM, id="phimoe"),
        pytest.param(lambda: phimoe(router_jitter_noise=0.1), RANDOM, id="phimoe_router_jitter"),
        pytest.param(lambda: phimoe(input_jitter_noise=0.1), RANDOM, id="phimoe_input_jitter"),
        pytest.param(falcon, "", id="falcon"),  # its layers return a tuple with one tensor
        pytest.param(lambda: falcon(alibi=True, parallel_attn=False), "", id="falcon_rw"),
        pytest.param(lambda: falcon(new_decoder_architecture=True, num_kv_heads=2), "", id="falcon_40b"),
        pytest.param(lambda: falcon(dropout=0.1), RANDOM, id="falcon_dropout"),
        pytest.param(bloom, SEVERAL, id="bloom"),  # its layers return their attention weights too
        pytest.param(lambda: bloom(dropout=0.1), SEVERAL, id="bloom_dropout"),
        pytest.param(gemma3, "", id="gemma3"),
        pytest.param(gemma3n, SEVERAL, id="gemma3n"),
        pytest.param(gemma4, "", id="gemma4"),
        pytest.param(lambda: gemma4(num_kv_shared_layers=2), MORE, id="gemma4_shared_keys"),
        pytest.param(lambda: gemma4(attention_dropout=0.1), RANDOM, id="gemma4_dropout"),
        pytest.param(opt, RANDOM, id="opt"),
        pytest.param(bart, "several lists", id="bart"),
        pytest.param(SharesKeys, MORE, id="shared_keys"),
    ],
)
def test_gradients_are_those_without_the_cache_or_the_cache_turns_itself_off(build, off, caplog):
    torch.manual_seed(0)
    model = build().train()
    stack = list(find_layers(model))
    model.requires_grad_(False)
    model.get_submodule(stack[-1]).requires_grad_(True)
    batches = [random_ids(4, 0), random_ids(4, 1), random_ids(4, 0)[[2, 0, 3, 1]], random_ids(4, 1)]

    def run():
        found = []
        for seed, ids in enumerate(batches):
            torch.manual_seed(seed)
            found.append(gradients(model, input_ids=ids, labels=ids))
        return found

    expected = run()
    prefix = FrozenPrefix(model, ActivationCache(MIB))
    gradients(model, input_ids=batches[0], labels=batches[0])
    assert prefix.update()
    found = run()
    assert all(close(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert off in prefix.cache.off
    assert (prefix.cache.use.hits, len(warnings_in(caplog))) == ((0, 1) if off else (2, 0))
    assert (prefix.cache.bytes > 0) == (not off)


@pytest.mark.parametrize("build", [phi3, llama_dynamic, gemma3_dynamic])
def test_rotary_embeddings_that_depend_on_the_longest_row_turn_it_off(build):
    torch.manual_seed(0)
    model = build().train()
    for name, parameter in model.named_parameters():
        parameter.data *= 8 if "layers" in name and parameter.ndim == 2 else 1  # so that positions matter
    model.requires_grad_(False)
    model.model.layers[2:].requires_grad_(True)
    ids, lengths = random_ids(4), torch.tensor([5, 6, 12, 11])
    mask = (torch.arange(12) < lengths[:, None]).long()
    batches = []
    for rows in ([0, 2], [1, 3], [0, 1], [2, 3]):
        width = lengths[rows].max()
        inputs = {"input_ids": ids[rows, :width], "attention_mask": mask[rows, :width]}
        batches.append(inputs | {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)})
    expected = [gradients(model, **inputs) for inputs in batches]
    prefix = FrozenPrefix(model, ActivationCache(MIB))
    gradients(model, **batches[0])
    assert prefix.update()
    found = [gradients(model, **inputs) for inputs in batches]
    assert all(close(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert "longest row" in prefix.cache.off
    assert prefix.cache.use.hits == 0


class ImageAndText(nn.Module):
    """Image features come in by the embeddings, or by every layer, as in Mllama."""

    def __init__(self, cross=False, residual=False, norm=nn.Identity):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 4)
        self.vision_tower = nn.ModuleDict(
            {"layers": nn.ModuleList(nn.Sequential(nn.Linear(4, 4), norm(3)) for _ in range(2))}
        )
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
        self.cross, self.residual = cross, residual

    def forward(self, input_ids, pixel_values):
        image = pixel_values
        for layer in self.vision_tower["layers"]:
            image = layer(image)
        features = image.mean(1, keepdim=True)
        hidden = self.embed(input_ids) if self.cross else self.embed(input_ids) + features
        for layer in self.layers:
            extra = features if self.cross else hidden if self.residual else 0.0
            hidden = layer(hidden) + extra
        return SimpleNamespace(loss=hidden.square().mean())


@pytest.mark.parametrize(
    ("model", "off"),
    [
        (ImageAndText(), ""),
        (ImageAndText(cross=True), MORE),
        (ImageAndText(residual=True), MORE),  # the input of a layer goes past it
        (ImageAndText(norm=nn.BatchNorm1d), RANDOM),  # an example's output depends on its batch
    ],
    ids=["embeddings", "cross_attention", "residual", "batch_norm"],
)
def test_layers_are_left_out_only_if_all_that_they_make_goes_through_the_prefix(model, off):
    model.requires_grad_(False).train()
    model.layers[1].requires_grad_(True)
    ids, pixels = random_ids(4), torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": ids[rows], "pixel_values": pixels[rows]} for rows in ([0, 1], [2, 3], [0, 3])]
    expected = [gradients(model, **batch) for batch in batches]
    prefix = FrozenPrefix(model, ActivationCache(MIB))
    gradients(model, **batches[0])
    assert prefix.update()
    assert prefix.skipped_layers == {"layers": 1, "vision_tower.layers": 2}
    found = [gradients(model, **batch) for batch in batches]
    assert all(close(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert off in prefix.cache.off
    assert prefix.cache.use.hits == (0 if off else 1)


@pytest.mark.parametrize("reentrant", [None, True], ids=["none", "reentrant"])
def test_a_reference_pass_without_adapters_is_computed(reentrant):
    """As in DPO with LoRA: the same inputs, under no_grad and with the adapters disabled."""
    ids, results = random_ids(4), []
    for cache_bytes in (0, MIB):
        model = checkpoint(lora(4), reentrant)
        Freezer(model).freeze(layers(model)[:2].parameters())
        prefix = FrozenPrefix(model, ActivationCache(cache_bytes) if cache_bytes else None)
        gradients(model, input_ids=ids, labels=ids)
        assert prefix.update()
        found = [gradients(model, input_ids=ids, labels=ids)]
        for _ in range(2):
            with torch.no_grad(), model.disable_adapter():
                found.append({"logits": model(input_ids=ids).logits})
            with model.disable_adapter():
                found.append({"logits": model(input_ids=ids).logits.detach()})
            found.append(gradients(model, input_ids=ids, labels=ids))
        results.append(found)
    assert all(close(ours, theirs) for ours, theirs in zip(*results, strict=True))
    assert (prefix.cache.use.hits, prefix.cache.use.misses) == (3, 2)  # each of two kinds of passes is computed once


def test_another_setting_of_the_pass_is_another_example():
    model, prefix = half_frozen()
    ids = random_ids(4)
    for flag in (False, True):
        forward(model, input_ids=ids, use_cache=flag)
        assert prefix.cache.use.hits == 0
    forward(model, input_ids=ids, use_cache=False)
    assert prefix.cache.use.hits == 1


def test_whole_runs_with_and_without_the_cache_are_equal(tmp_path):
    tokenizer = builtin.tiny_qwen3()[1]
    dataset = builtin.dates(train=32, test=8)
    runs = []
    for mib in (0, 16):
        trainer = GradESTrainer(
            model=qwen3(num_hidden_layers=4, vocab_size=len(tokenizer), bos_token_id=None),
            args=config_for(tmp_path, False, num_train_epochs=6, save_strategy="no"),
            train_dataset=dataset["train"],
            eval_dataset=dataset["test"],
            processing_class=tokenizer,
            grades=bottom_up(2, activation_cache_mib=mib),
            peft_config=LoraConfig(r=4, lora_dropout=0.0, target_modules="all-linear"),
        )
        trainer.train()
        runs.append((trainer, losses(trainer)))
    (_, expected), (trainer, found) = runs
    cache = trainer.grades.prefix.cache
    # 4 steps an epoch; another prefix, and an empty cache, after steps 4 and 8: from step 13 on all is there.
    assert (cache.use.hits, cache.use.misses) == (12, 8)
    assert found == pytest.approx(expected, rel=1e-4)


def test_memory_is_bounded():
    row = 12 * 32 * 4
    model, prefix = half_frozen(cache_bytes=3 * row)
    ids = random_ids(8)
    for _ in range(2):
        forward(model, input_ids=ids)
    assert prefix.cache.bytes == 3 * row
    assert prefix.cache.use.hits == 0
    forward(model, input_ids=ids[:3])
    assert prefix.cache.use.hits == 1
    prefix.update()
    assert prefix.cache.bytes == 3 * row  # nothing changed
    layers(model)[2].requires_grad_(False)
    prefix.update()
    assert prefix.cache.bytes == 0  # another prefix
    prefix.close()


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"attention_mask": torch.tensor([[1] * 12, [0] * 4 + [1] * 8])}, "padding after the tokens"),
        ({"attention_mask": torch.ones(2, 1, 12, 12)}, "padding after the tokens"),
        ({"pixel_values_videos": torch.ones(2, 3)}, "videos"),
        ({"of_two_rows": torch.ones(2, 3)}, "of_two_rows does not have one entry for each token"),
        ({"lengths": [3, 4]}, "lengths is neither a tensor nor a plain value"),
        ({"pixel_values": torch.ones(3, 3, 4, 4)}, "which images belong to which row"),
        # Fuyu, Video-LLaVA and Phi-4-multimodal have other names for their pixels.
        ({"image_patches": torch.ones(2, 4, 5)}, "image_patches does not have one entry for each token"),
        ({"pixel_values_images": torch.ones(2, 3, 4, 4)}, "pixel_values_images does not have one entry"),
        ({"image_pixel_values": torch.ones(2, 3, 4, 4)}, "image_pixel_values does not have one entry"),
    ],
)
def test_what_the_key_would_not_tell_is_computed_and_said_once(inputs, reason, caplog):
    cache = ActivationCache(MIB)
    cache.reset(nn.Module())
    for _ in range(2):
        cache.begin_pass({"input_ids": random_ids(2)} | inputs, images_of(inputs))
        assert not cache.stores
    assert (cache.use.hits, cache.use.misses) == (0, 2)
    assert [reason in message for message in warnings_in(caplog)] == [True]


@pytest.mark.parametrize("name", ["image_patches", "pixel_values_images", "image_pixel_values"])
def test_another_image_under_another_name_is_another_example(name):
    inputs = {"input_ids": random_ids(1), name: torch.ones(1, 3, 4, 4)}
    keys = []
    for pixels in (torch.ones(1, 3, 4, 4), torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)):
        inputs[name] = pixels
        [segment] = segments_of(nn.Module(), inputs, images_of(inputs), b"").segments
        keys.append(segment.key)
    assert keys[0] == keys[1] != keys[2]


def test_other_position_ids_are_another_example():
    model, prefix = half_frozen()
    ids, positions = random_ids(2), torch.arange(12).expand(2, -1)
    for shift in (0, 1):
        forward(model, input_ids=ids, position_ids=positions + shift)
        assert prefix.cache.use.hits == 0
    forward(model, input_ids=ids, position_ids=positions)
    assert prefix.cache.use.hits == 1


def test_a_run_with_packing_is_the_same_with_the_cache(tmp_path):
    tokenizer = builtin.tiny_qwen3()[1]
    runs = []
    for mib in (0, 16):
        trainer = GradESTrainer(
            model=qwen3(num_hidden_layers=4, vocab_size=len(tokenizer), bos_token_id=None),
            args=config_for(tmp_path, None, num_train_epochs=6, save_strategy="no", packing=True, max_length=64),
            train_dataset=builtin.dates(train=256, test=8)["train"],
            eval_dataset=builtin.dates(train=8, test=8)["test"],
            processing_class=tokenizer,
            grades=bottom_up(1, activation_cache_mib=mib),
            peft_config=LoraConfig(r=4, lora_dropout=0.0, target_modules="all-linear"),
        )
        trainer.train()
        runs.append((trainer, losses(trainer)))
    (_, expected), (trainer, found) = runs
    summary = trainer.grades_summary.caches["frozen_layers"]
    assert summary.hits > summary.misses
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("noise", [None, 5.0])
def test_neftune_switches_it_off(tmp_path, caplog, noise):
    tokenizer = builtin.tiny_qwen3()[1]
    dataset = builtin.dates(train=32, test=8)
    trainer = GradESTrainer(
        model=qwen3(num_hidden_layers=4, vocab_size=len(tokenizer), bos_token_id=None),
        args=config_for(tmp_path, None, num_train_epochs=4, save_strategy="no", neftune_noise_alpha=noise),
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        processing_class=tokenizer,
        grades=bottom_up(2, activation_cache_mib=16),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    trainer.train()
    assert (trainer.grades.prefix.cache.use.hits == 0) == (noise is not None)
    assert any("activation cache is off" in message for message in caplog.messages) == (noise is not None)


def test_the_same_words_with_another_image_are_another_example():
    model = llava(image_token_id=3).train()
    model.requires_grad_(False)
    model.model.language_model.layers[1].requires_grad_(True)
    ids = torch.cat([torch.full((2, 16), 3), torch.arange(10, 18).expand(2, -1)], 1)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prefix = FrozenPrefix(model, ActivationCache(MIB))
    model(input_ids=ids, pixel_values=images)
    assert prefix.update()
    full, expected = forward(model, input_ids=ids, pixel_values=images)
    cached, logits = forward(model, input_ids=ids, pixel_values=images)
    assert prefix.cache.use.hits == 1
    assert torch.equal(logits, expected)
    assert cached < full / 2  # the vision tower is not run either
    _, swapped = forward(model, input_ids=ids, pixel_values=images[[1, 0]])
    assert torch.equal(swapped, expected[[1, 0]])
    forward(model, input_ids=ids, pixel_values=images + 1)
    assert prefix.cache.use.hits == 2


def language_prefix(model, frozen, cache=None, encoder_cache=None):
    """Only the language layers from `frozen` on train."""
    model.requires_grad_(False).train()
    for layer in model.model.language_model.layers[frozen:]:
        layer.requires_grad_(True)
    return FrozenPrefix(model, cache, encoder_cache)


EPOCH = [([0, 1], [2]), ([3, 0, 2], []), ([1], [3])]
NEXT_EPOCH = [([2], [3, 0, 2], []), ([3], [0, 1]), ([1],)]


@pytest.mark.parametrize("encoder", [False, True], ids=["alone", "with_encoder_cache"])
@pytest.mark.parametrize("family", ROWS)
def test_rows_with_any_number_of_images_come_back_in_other_batches(family, encoder):
    build, batch = ROWS[family]
    torch.manual_seed(0)
    model = build()
    batches = [batch(model, rows) for rows in (*EPOCH, *NEXT_EPOCH)]
    language_prefix(model, 3).close()
    expected = [gradients(model, **inputs) for inputs in batches]
    encoder_cache = EncoderCache(2**24) if encoder else None
    prefix = language_prefix(model, 3, ActivationCache(2**24), encoder_cache)
    gradients(model, **batches[0])
    assert prefix.update()
    if encoder:
        gradients(model, **batches[1])  # the pass that shows what is read of the encoder
    found = [gradients(model, **inputs) for inputs in batches]
    assert (prefix.cache.off, prefix.cache.use.hits) == ("", 3)
    assert all(close(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    other = {**batches[3], "pixel_values": batches[3]["pixel_values"].flip(0)}
    gradients(model, **other)
    assert prefix.cache.use.hits == 3  # the same words with other images


@pytest.mark.parametrize("encoder", [False, True], ids=["alone", "with_encoder_cache"])
def test_image_features_that_go_past_the_prefix_turn_it_off(encoder):
    """Qwen3-VL adds features of the encoder's lower layers behind its first language layers."""
    build, batch = ROWS["qwen3-vl"]
    torch.manual_seed(0)
    model = build()
    batches = [batch(model, rows) for rows in EPOCH * 3]
    language_prefix(model, 1).close()
    expected = [gradients(model, **inputs) for inputs in batches]
    encoder_cache = EncoderCache(2**24) if encoder else None
    prefix = language_prefix(model, 1, ActivationCache(2**24), encoder_cache)
    gradients(model, **batches[0])
    assert prefix.update()
    found = [gradients(model, **inputs) for inputs in batches]
    assert MORE in prefix.cache.off
    assert all(close(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    if encoder:
        assert prefix.encoder_cache.use.hits == 7  # all but the one that shows what is read, and another


def test_pixels_are_moved_from_the_device_once_for_both_caches(monkeypatch):
    model = llava(image_token_index=60)
    prefix = language_prefix(model, 1, ActivationCache(MIB), EncoderCache(MIB))
    inputs = llava_rows(model, ([0], [1]))
    for _ in range(2):
        gradients(model, **inputs)
        prefix.update()
    cpu, moved = torch.Tensor.cpu, []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: (moved.append(self.shape), cpu(self))[1])
    model(**inputs)
    assert (prefix.cache.use.misses, prefix.encoder_cache.use.hits) == (2, 1)
    assert moved.count(inputs["pixel_values"].shape) == 1


def packed(examples):
    """As TRL's padding-free collator makes it."""
    ids = torch.cat([random_ids(1, seed)[:, : 5 + seed] for seed in examples], 1)
    positions = torch.cat([torch.arange(5 + seed) for seed in examples])[None]
    labels = ids.masked_fill(positions == 0, -100)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def packed_passes(batches, cache, attention="sdpa", **settings):
    model = lora(4)
    model.set_attn_implementation(attention)
    layers(model)[:2].requires_grad_(False)
    prefix = FrozenPrefix(model.train(), cache)
    model(input_ids=torch.ones(1, 4, dtype=torch.long))
    assert prefix.update()
    return [gradients(model, **packed(batch), **settings) for batch in batches]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_examples_come_back_in_other_batches(attention):
    batches = [(0, 1, 2), (3, 4), (4, 1), (2, 0, 3)]
    expected = packed_passes(batches, None, attention, use_cache=False)
    cache = ActivationCache(MIB)
    found = packed_passes(batches, cache, attention, use_cache=False)
    assert (cache.use.hits, cache.use.misses) == (2, 2)
    assert all(close(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def gpt_oss():
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    layer_types = ["sliding_attention", "full_attention"] * 2
    return T.GptOssForCausalLM(T.GptOssConfig(**sizes(head_dim=8), **experts, layer_types=layer_types))


@pytest.mark.parametrize("build", [gpt_oss, falcon, lambda: falcon(alibi=True)], ids=["gpt_oss", "falcon", "alibi"])
def test_packed_examples_that_do_see_each_other_are_kept_as_a_whole(build):
    """Not every model makes a mask of its position ids."""
    torch.manual_seed(0)
    model = build().train()
    for parameter in model.parameters():
        parameter.data *= 6 if parameter.ndim > 1 else 1  # so that examples matter to each other
    stack = list(find_layers(model))
    model.requires_grad_(False)
    for path in stack[2:]:
        model.get_submodule(path).requires_grad_(True)
    batches = [packed(batch) | {"use_cache": False} for batch in [(0, 1), (2, 3), (0, 3), (2, 1), (0, 3)]]
    expected = [gradients(model, **inputs) for inputs in batches]
    prefix = FrozenPrefix(model, ActivationCache(MIB))
    gradients(model, **batches[0])
    assert prefix.update()
    found = [gradients(model, **inputs) for inputs in batches]
    assert all(close(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert (prefix.cache.off, prefix.cache.use.hits) == ("", 1)


def test_packed_rows_with_a_router_loss_are_not_tried():
    """It would read the router logits of that too."""
    torch.manual_seed(0)
    model = router_loss().train()
    model.requires_grad_(False)
    model.model.layers[2:].requires_grad_(True)
    batches = [packed(batch) | {"use_cache": False} for batch in [(0, 1), (2, 3)]]
    expected = [gradients(model, **inputs) for inputs in batches]
    prefix = FrozenPrefix(model, ActivationCache(MIB))
    gradients(model, **batches[0])
    assert prefix.update()
    found = [gradients(model, **inputs) for inputs in batches]
    assert all(close(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert MORE in prefix.cache.off


def test_to_try_whether_packed_examples_see_each_other_changes_no_random_number():
    """Dropout, with which the cache turns itself off: what comes later is drawn from the same random state."""
    states = []
    for cache_bytes in (0, MIB):
        model, prefix = half_frozen(cache_bytes)
        for module in model.modules():
            if isinstance(module, nn.Dropout) or hasattr(module, "attention_dropout"):
                module.p = module.attention_dropout = 0.5
        torch.manual_seed(0)
        model(**packed((0, 1)), use_cache=False)
        states.append(torch.get_rng_state())
    assert "random" in prefix.cache.off
    assert torch.equal(*states)


def test_packed_examples_that_may_see_each_other_are_kept_as_a_whole(caplog):
    """With a KV cache, Transformers makes no mask between them."""
    batches = [(0, 1, 2), (1, 2, 0), (0, 1, 2)]
    expected = packed_passes(batches, None, use_cache=True)
    cache = ActivationCache(MIB)
    found = packed_passes(batches, cache, use_cache=True)
    assert (cache.use.hits, cache.use.misses) == (1, 2)
    assert all(close(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert ["found again only with per_device_train_batch_size=1" in message for message in warnings_in(caplog)] == [
        True
    ]


def test_evaluation_does_not_touch_the_cache():
    model, prefix = half_frozen()
    ids = random_ids(2)
    expected = model.eval()(input_ids=ids).logits
    assert (prefix.cache.use.hits, prefix.cache.use.misses) == (0, 0)
    model.train()
    forward(model, input_ids=ids)
    assert torch.equal(model.eval()(input_ids=ids).logits, expected)
    assert prefix.cache.use.hits == 0


def test_without_memory_there_is_no_cache():
    assert FrozenPrefix(qwen3()).cache is None


def test_a_pass_is_looked_up_with_one_transfer_from_the_device_for_each_input(monkeypatch):
    moved = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: (moved.append(tuple(self.shape)), self)[1])
    cache = ActivationCache(MIB)
    cache.reset(nn.Module())
    inputs = {"input_ids": torch.ones(8, 5, dtype=torch.long), "pixel_values": torch.ones(8, 3, 4, 4)}
    inputs |= {"attention_mask": torch.ones(8, 5, dtype=torch.long), "labels": torch.ones(8, 5)}
    cache.begin_pass(inputs, images_of(inputs))
    assert cache.use.misses == 1
    assert sorted(moved) == [(8, 3, 4, 4), (8, 5), (8, 5)]
