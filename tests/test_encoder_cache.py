"""Outputs of a frozen vision tower read from memory: the same gradients, without the tower's work."""

import pytest
import torch
import transformers as T

from grades_trl.freezing.batch_content import Images
from grades_trl.freezing.encoder_cache import EncoderCache
from grades_trl.freezing.frozen_prefix import FrozenPrefix
from grades_trl.model.towers import towers_of_parameters
from helpers import SMALL, CountMatmuls, gradients, llava

TEXT = SMALL | {"vocab_size": 80, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}, "head_dim": 8}
IMAGE = 70


def qwen2_vl():
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 4, "hidden_size": 32, "patch_size": 4, "mlp_ratio": 2}
    config = T.Qwen2VLConfig(text_config=TEXT | MROPE, vision_config=vision, image_token_id=IMAGE)
    return T.Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl():
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}
    config = T.Qwen2_5_VLConfig(text_config=TEXT | MROPE, vision_config=vision, image_token_id=IMAGE)
    return T.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl():
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    config = T.Qwen3VLConfig(text_config=TEXT | MROPE, vision_config=vision, image_token_id=IMAGE)
    return T.Qwen3VLForConditionalGeneration(config)


def qwen_batch(model, grids, order):
    """Rows with one image each: patches of all images in one tensor, in the order of the rows."""
    vision = model.config.vision_config
    generator = torch.Generator().manual_seed(0)
    patches = [
        torch.randn(t * h * w, 3 * vision.temporal_patch_size * vision.patch_size**2, generator=generator)
        for t, h, w in grids
    ]
    longest = max(t * h * w // 4 for t, h, w in grids)
    rows = []
    for i in order:
        count = grids[i][0] * grids[i][1] * grids[i][2] // 4
        rows.append([3 + i] * (longest - count + 2) + [IMAGE] * count + [10 + i, 11, 12])
    ids = torch.tensor(rows)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(ids == IMAGE, -100),
        "pixel_values": torch.cat([patches[i] for i in order]),
        "image_grid_thw": torch.tensor([grids[i] for i in order]),
        "mm_token_type_ids": (ids == IMAGE).long(),
    }


def llava_batch(model, order, per_row=1):
    images = torch.randn(4 * per_row, 3, 32, 32, generator=torch.Generator().manual_seed(0)).split(per_row)
    tokens = [model.config.image_token_index] * (16 * per_row)
    ids = torch.tensor([[*tokens, 3 + i, 4 + i, 5] for i in order])
    labels = ids.masked_fill(ids == model.config.image_token_index, -100)
    return {"input_ids": ids, "labels": labels, "pixel_values": torch.cat([images[i] for i in order])}


def frozen_tower(model, cache_bytes=2**24):
    for name, tower in towers_of_parameters(model).items():
        model.get_parameter(name).requires_grad_(tower != "vision")
    return FrozenPrefix(model.train(), encoder_cache=EncoderCache(cache_bytes) if cache_bytes else None)


GRIDS = [(1, 4, 4), (1, 4, 8), (1, 8, 4), (1, 4, 4)]
FAMILIES = {
    "llava": (lambda: llava(image_token_index=60), llava_batch),
    "llava, last but one layer": (lambda: llava(image_token_index=60, vision_feature_layer=-2), llava_batch),
    "llava, two layers": (lambda: llava(image_token_index=60, vision_feature_layer=[-2, -1]), llava_batch),
    "llava, two images": (lambda: llava(image_token_index=60), lambda model, order: llava_batch(model, order, 2)),
    "qwen2-vl": (qwen2_vl, lambda model, order: qwen_batch(model, GRIDS, order)),
    "qwen2.5-vl": (qwen2_5_vl, lambda model, order: qwen_batch(model, GRIDS, order)),
    "qwen3-vl": (qwen3_vl, lambda model, order: qwen_batch(model, GRIDS, order)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_without_the_cache_and_the_tower_does_not_run(family):
    build, batch = FAMILIES[family]
    torch.manual_seed(0)
    model = build()
    prefix = frozen_tower(model, cache_bytes=0)
    orders = [(0, 1, 2, 3), (2, 3), (0, 1), (3, 1, 0, 2)]
    batches = [batch(model, order) for order in orders]
    for inputs in batches:
        gradients(model, **inputs)
    assert prefix.update()
    expected = [gradients(model, **inputs) for inputs in batches]
    with CountMatmuls() as computed:
        model(**batches[-1])
    prefix.close()

    prefix = frozen_tower(model)
    gradients(model, **batches[0])
    assert prefix.update()
    for inputs in batches[:3]:  # the first pass sees what is read, the others keep it
        gradients(model, **inputs)
    gradients(model, **batches[0])
    cache = prefix.encoder_cache
    assert cache.off == ""
    hits = cache.use.hits
    found = [gradients(model, **inputs) for inputs in batches]
    assert cache.use.hits == hits + 4
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6) for name in theirs)
    with CountMatmuls() as read:
        model(**batches[-1])
    assert read.count <= computed.count - 8
    prefix.close()
    assert cache.bytes == 0


def test_an_image_with_other_adapters_is_another_image():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llava(image_token_index=60), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        if "vision_tower" in name:
            parameter.requires_grad_(False)
    prefix = FrozenPrefix(model.train(), encoder_cache=EncoderCache(2**24))
    inputs = llava_batch(model, (0, 1))
    gradients(model, **inputs)
    assert prefix.update()
    for _ in range(3):
        gradients(model, **inputs)
    assert prefix.encoder_cache.use.hits == 2
    with model.disable_adapter():
        reference = model(**inputs).logits
    prefix.close()
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, reference)


def test_dropout_turns_it_off(caplog):
    model = llava(image_token_index=60)
    model.config.vision_config.attention_dropout = 0.5
    for layer in model.model.vision_tower.encoder.layers:
        layer.self_attn.dropout = 0.5
    prefix = frozen_tower(model)
    inputs = llava_batch(model, (0, 1))
    gradients(model, **inputs)
    assert prefix.update()
    for _ in range(4):
        gradients(model, **inputs)
    assert prefix.encoder_cache.use.hits == 0
    assert "draws random numbers" in caplog.text


def test_memory_is_bounded_and_evaluation_passes_by():
    model = llava(image_token_index=60)
    image = 17 * 32 * 4
    prefix = frozen_tower(model, cache_bytes=3 * image)
    inputs = llava_batch(model, (0, 1, 2, 3))
    gradients(model, **inputs)
    assert prefix.update()
    for _ in range(3):
        gradients(model, **inputs)
    assert prefix.encoder_cache.bytes == 3 * image
    assert prefix.encoder_cache.use.hits == 0
    gradients(model, **llava_batch(model, (0, 1, 2)))
    assert prefix.encoder_cache.use.hits == 1
    model.eval()
    model(**inputs)
    assert prefix.encoder_cache.use.hits == 1


def test_a_tower_that_trains_in_part_is_not_cached():
    model = llava(image_token_index=60)
    prefix = frozen_tower(model)
    model.model.vision_tower.encoder.layers[1].requires_grad_(True)
    inputs = llava_batch(model, (0, 1))
    gradients(model, **inputs)
    prefix.update()
    for _ in range(3):
        gradients(model, **inputs)
    assert prefix.skipped_layers == {"model.vision_tower.encoder.layers": 1}
    assert (prefix.encoder_cache.use.hits, prefix.encoder_cache.use.misses, prefix.encoder_cache.bytes) == (0, 0, 0)


def test_without_images_nothing_happens():
    cache = EncoderCache(2**20)
    cache.start(torch.nn.Module(), torch.nn.Module(), ["a"])
    cache.begin_pass(Images(), 1, "cpu")
    assert not cache.handles("a")
