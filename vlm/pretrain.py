"""Makes `vlm/reader/`, the pretrained model of the vision demo: a tiny LLaVA learns to read handwritten numbers.

  python -m vlm.pretrain          # about 15 minutes on one CPU core

20,000 images of the training scans, seven tasks ("Read the number.", "Count the digits.", ...), 5,000 steps. The
weights are saved in bfloat16 (2.7 MB).
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import trange
from transformers import LlavaProcessor

from .builtin import PRETRAINED_TASKS, PROMPT, READER, draw_numbers, tiny_llava

IMAGES = 20_000
STEPS, BATCH_SIZE, WARMUP_STEPS = 5_000, 32, 100
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 0.01


def pretrain(directory: str | Path, steps: int = STEPS, images: int = IMAGES) -> None:
    """Trains the model and saves it, with its processor.

    Args:
        directory (`str` or `Path`): where to.
        steps (`int`, *optional*, defaults to `5000`): optimizer steps, of a batch of 32 images.
        images (`int`, *optional*, defaults to `20000`): how many are drawn.
    """
    torch.manual_seed(0)
    chance = random.Random(0)
    model, processor = tiny_llava(vision_layers=5, vision_size=128)
    drawn, numbers = draw_numbers("train", images, np.random.default_rng(20_000))
    pixels = processor.image_processor(drawn, return_tensors="pt")["pixel_values"].to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    model.train()
    for step in (progress := trange(1, steps + 1, desc="pretraining")):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, step / WARMUP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2
        rows = chance.sample(range(images), BATCH_SIZE)
        prompts = [PROMPT if chance.random() < 0.3 else chance.choice(list(PRETRAINED_TASKS)) for _ in rows]
        answers = [PRETRAINED_TASKS[prompt](numbers[row]) for prompt, row in zip(prompts, rows, strict=True)]
        batch = tokenized(processor, prompts, answers)
        loss = model(**batch, pixel_values=pixels[rows].float()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    model.to(torch.bfloat16).save_pretrained(directory)
    processor.save_pretrained(directory)


def tokenized(processor: LlavaProcessor, prompts: list[str], answers: list[str]) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels` of a batch. Only the answers are learned."""
    begun, whole = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        asked = [{"role": "user", "content": content}]
        begun.append(processor.apply_chat_template(asked, add_generation_prompt=True))
        whole.append(processor.apply_chat_template([*asked, {"role": "assistant", "content": answer}]))
    size = processor.image_processor.size
    patches = (size["height"] // processor.patch_size) * (size["width"] // processor.patch_size)

    def ids(texts: list[str]) -> list[list[int]]:
        return processor.tokenizer([text.replace("<image>", "<image>" * patches) for text in texts])["input_ids"]

    rows = ids(whole)
    longest = max(map(len, rows))
    labels = [
        [-100] * len(start) + row[len(start) :] + [-100] * (longest - len(row))
        for start, row in zip(ids(begun), rows, strict=True)
    ]
    padded = processor.tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    return {**padded, "labels": torch.tensor(labels)}


if __name__ == "__main__":
    torch.set_num_threads(1)  # faster than more, on matrices this small
    pretrain(READER)
