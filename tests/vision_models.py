"""Tiny vision-language models of several families, and batches as their processors make them."""

import torch
import transformers as T

from helpers import SMALL, llava

TEXT = SMALL | {
    "num_hidden_layers": 4,
    "vocab_size": 80,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
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


def qwen_rows(model, grids, rows):
    """Rows with any number of images, padded at the end: patches of all images in one tensor."""
    vision = model.config.vision_config
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    generator = torch.Generator().manual_seed(0)
    patches = [torch.randn(t * h * w, width, generator=generator) for t, h, w in grids]
    texts = []
    for images in rows:
        text = [3]
        for i in images:
            text += [4 + i] + [IMAGE] * (len(patches[i]) // 4) + [10 + i]
        texts.append([*text, 20, 21])
    used = [i for images in rows for i in images]
    return padded(texts, IMAGE) | {
        "pixel_values": torch.cat([patches[i] for i in used]),
        "image_grid_thw": torch.tensor([grids[i] for i in used]),
    }


def llava_rows(model, rows):
    """Rows with any number of images, padded at the end: a stack of all images."""
    token = model.config.image_token_index
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    texts = [[3, *(t for i in of_row for t in [token] * 16 + [4 + i]), 20, 21] for of_row in rows]
    inputs = padded(texts, token)
    del inputs["mm_token_type_ids"]
    return inputs | {"pixel_values": images[[i for of_row in rows for i in of_row]]}


def padded(texts, image_token):
    longest = max(map(len, texts))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    labels = ids.masked_fill((ids == image_token) | (mask == 0), -100)
    types = (ids == image_token).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "mm_token_type_ids": types}


def llava_batch(model, order, per_row=1):
    images = torch.randn(4 * per_row, 3, 32, 32, generator=torch.Generator().manual_seed(0)).split(per_row)
    tokens = [model.config.image_token_index] * (16 * per_row)
    ids = torch.tensor([[*tokens, 3 + i, 4 + i, 5] for i in order])
    labels = ids.masked_fill(ids == model.config.image_token_index, -100)
    return {"input_ids": ids, "labels": labels, "pixel_values": torch.cat([images[i] for i in order])}


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

# Rows with several images, and different numbers of them.
ROWS = {
    "llava": (
        lambda: llava(image_token_index=60, text_config=T.Qwen2Config(**TEXT)),
        llava_rows,
    ),
    "qwen2-vl": (qwen2_vl, lambda model, rows: qwen_rows(model, GRIDS, rows)),
    "qwen2.5-vl": (qwen2_5_vl, lambda model, rows: qwen_rows(model, GRIDS, rows)),
    "qwen3-vl": (qwen3_vl, lambda model, rows: qwen_rows(model, GRIDS, rows)),
}
