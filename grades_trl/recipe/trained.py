"""A model as a run has left it: a folder with all weights, or an adapter on its base."""

from __future__ import annotations

import dataclasses
import gc
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoProcessor, AutoTokenizer
from transformers.trainer_utils import align_special_tokens
from transformers.utils import find_adapter_config_file
from trl import ModelConfig

from grades_trl.recipe.models import find_gguf, load_model, read_config


def base_of(name: str) -> str:
    """The model that an adapter was trained on; all other models are their own.

    Raises:
        ValueError: the adapter does not name one.
    """
    adapter = find_adapter_config_file(name)
    if adapter is None:
        return name
    base = json.loads(Path(adapter).read_text("utf-8"))["base_model_name_or_path"]
    if not base:
        raise ValueError(f"{name} is the adapter of a model that was not saved: train it on a folder or a hub id.")
    return base


def has_vision(name: str, trust_remote_code: bool) -> bool:
    """Whether a model, by its config, reads images."""
    args = ModelConfig(model_name_or_path=name)
    config = None if find_gguf(name) else read_config(args, trust_remote_code)
    return hasattr(config, "vision_config")


def load_trained(
    name: str,
    args: ModelConfig,
    *,
    vision: bool,
    trust_remote_code: bool = False,
    dequantized: bool = False,
) -> tuple[Any, Any]:
    """Model and processor; of an adapter, on the model that it was trained on. Answers end where those of the run did.

    Args:
        name (`str`): folder of a run or of an adapter, or hub id.
        args (`ModelConfig`): dtype and quantization of the base; its model and adapters are not read.
        vision (`bool`): a vision-language model.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run code that the model's repository brings.
        dequantized (`bool`, *optional*, defaults to `False`): with the values of the quantized base in tensors of the
            model's dtype, on the CPU.
    """
    base = base_of(name)
    # The Trainer takes no quantized model without adapters; new ones change nothing, as one factor is zero.
    quantized = args.load_in_4bit or args.load_in_8bit
    args = dataclasses.replace(args, model_name_or_path=base, use_peft=quantized)
    model, processor = load_model(args, "transformers", vision=vision, trust_remote_code=trust_remote_code)
    if quantized and (name != base or dequantized):
        model = model.unload()
    if dequantized and getattr(model, "is_quantized", False):
        model = model.to("cpu").dequantize(model.dtype)
    if name != base:
        model = PeftModel.from_pretrained(model, name, is_trainable=True)  # TRL then casts it as in training
        if (Path(name) / "tokenizer_config.json").exists():
            processor = (AutoProcessor if vision else AutoTokenizer).from_pretrained(name)
    # The Trainer does this when training begins. The folder of an adapter keeps none of it but the tokenizer.
    align_special_tokens(model, processor)
    return model, processor


def release() -> None:
    """Gives the memory back of what was deleted before."""
    gc.collect()  # a trainer refers to itself: without this, its model would stay
    torch.cuda.empty_cache()
