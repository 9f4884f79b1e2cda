"""A model and its tokenizer or processor, through Unsloth or Transformers: quantization, adapters, GGUF."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    set_seed,
)
from trl import ModelConfig, get_quantization_config

from grades_trl.extras import installed, require
from grades_trl.model import TOWERS, linear_layers
from grades_trl.recipe.bad_input import blamed_on
from grades_trl.recipe.choice import chosen_modules, whole_language_layers
from grades_trl.recipe.gguf_tokenizer import mend_tokenizer
from grades_trl.recipe.lora import (
    compare_with_adapted,
    default_targets,
    refuse_absent_modules,
    refuse_dropout_on_parameters,
)

# What Transformers raises of a name or folder that is no model, or a damaged one
NO_MODEL = (OSError, ValueError, KeyError, TypeError, SafetensorError)


def check_model(args: ModelConfig, *, vision: bool, trust_remote_code: bool = False) -> None:
    """Refuses, before data are read and anything is written, a model that is not there or cannot be quantized.

    Args:
        args (`ModelConfig`): without a name, or with `tiny_llava`, the built-in model.
        vision (`bool`): of the recipe. Its built-in model without a name is a folder, which loads as any other.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run code that the model's repository brings.

    Raises:
        ValueError: the model is not there, or its config is none; or quantization without adapters, or of the
            built-in model.
    """
    name, quantized = args.model_name_or_path, args.load_in_4bit or args.load_in_8bit
    if quantized and not args.use_peft:
        raise ValueError("load_in_4bit and load_in_8bit train adapters only: add --use_peft.")
    if quantized and (name == "tiny_llava" or (name is None and not vision)):
        raise ValueError("The built-in model is not quantized: remove load_in_4bit and load_in_8bit.")
    if name not in (None, "tiny_llava"):
        read_config(args, trust_remote_code)


def read_config(args: ModelConfig, trust_remote_code: bool = False) -> Any:
    """The config of a model on the hub, in a folder or in a GGUF file.

    Raises:
        [`BadInput`]: there is none.
    """
    name = args.model_name_or_path
    gguf = find_gguf(name)
    with blamed_on(f"{name}: cannot be loaded", *NO_MODEL):
        if gguf is not None:
            return AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        return AutoConfig.from_pretrained(name, revision=args.model_revision, trust_remote_code=trust_remote_code)


def load_model(
    args: ModelConfig,
    backend: str,
    *,
    vision: bool = False,
    towers: Collection[str] | None = None,
    layers: str | None = None,
    trust_remote_code: bool = False,
    max_length: int | None = 1024,
    seed: int = 42,
) -> tuple[Any, Any]:
    """A pretrained model, ready to be trained.

    Args:
        args (`ModelConfig`): TRL's model arguments. `model_name_or_path` is a hub id, a local folder, or a GGUF file
            (or a folder that holds one and no `config.json`), which is de-quantized to `dtype`.
        backend (`str`): `"unsloth"` or `"transformers"`.
        vision (`bool`, *optional*, defaults to `False`): a vision-language model; the second value is its processor.
        towers (`Collection[str]`, *optional*, defaults to all): what trains of a vision-language model: `"vision"`,
            `"projector"`, `"language"`.
        layers (`str`, *optional*, defaults to all): which layers train, see [`choice.chosen_modules`].
        trust_remote_code (`bool`, *optional*, defaults to `False`): run code that the model's repository brings.
        max_length (`int`, *optional*, defaults to `1024`): tokens; Unsloth wants to know it at load time.
        seed (`int`, *optional*, defaults to `42`): of the adapters.

    Returns:
        `tuple`: the model, with LoRA adapters if `args.use_peft`, and its tokenizer or processor.

    Raises:
        ValueError: quantization without adapters, a GGUF file with Unsloth or with 4-bit loading, or a choice of what
            trains that the model does not have.
    """
    name = args.model_name_or_path
    if (args.load_in_4bit or args.load_in_8bit) and not args.use_peft:
        raise ValueError("load_in_4bit and load_in_8bit train adapters only: add --use_peft.")
    if args.load_in_4bit or args.load_in_8bit:
        require("bitsandbytes", "load_in_4bit and load_in_8bit")
    gguf = find_gguf(name)
    if gguf is not None:
        if backend == "unsloth" or args.load_in_4bit or args.load_in_8bit:
            raise ValueError(f"{gguf} is a GGUF file: it loads with --backend transformers and without 4 or 8 bits.")
        with blamed_on(f"{name}: cannot be loaded", *NO_MODEL):
            model, processor = load_gguf(gguf, args.dtype)
    elif backend == "unsloth":
        return _load_with_unsloth(args, vision, towers, layers, trust_remote_code, max_length, seed)
    else:
        auto_model, auto_processor = (
            (AutoModelForImageTextToText, AutoProcessor) if vision else (AutoModelForCausalLM, AutoTokenizer)
        )
        common = {"revision": args.model_revision, "trust_remote_code": trust_remote_code}
        with blamed_on(f"{name}: cannot be loaded", *NO_MODEL):
            model = auto_model.from_pretrained(
                name,
                dtype=args.dtype,
                attn_implementation=args.attn_implementation,
                quantization_config=get_quantization_config(args),
                **common,
            )
            processor = auto_processor.from_pretrained(name, **common)
        _keep_4bit_layout(model)
    return make_trainable(model, args, towers, layers, seed), processor


def _keep_4bit_layout(model: nn.Module) -> None:
    """Some CPUs: bitsandbytes (0.50) repacks 4-bit weights in the first forward pass of inference. Nothing is
    back-propagated through repacked weights, so that training after generation would be silently wrong."""
    if not installed("bitsandbytes"):
        return
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def make_trainable(
    model: nn.Module,
    args: ModelConfig,
    towers: Collection[str] | None = None,
    layers: str | None = None,
    seed: int = 42,
) -> nn.Module:
    """Lets LoRA adapters train if `args.use_peft`, else all weights; in the given towers and layers only.

    Adapters go on `args.lora_target_modules`. If that is not given or `"all-linear"`, they go on every linear layer
    inside the repeated layers and between the towers (the paper adapts all seven projections), see
    [`lora.default_targets`]. Their initial weights are drawn with `seed`, since the Trainer sets its own seed later.

    Raises:
        ValueError: a choice that the model does not have, see [`choice.chosen_modules`], or without anything to adapt.
    """
    chosen = chosen_modules(model, towers, layers)
    if not args.use_peft:
        model.requires_grad_(False)
        for path in chosen:
            for parameter in model.get_submodule(path).parameters(recurse=False):
                parameter.requires_grad_(True)
        return model
    targets, target_parameters = _targets(args), args.lora_target_parameters
    by_default = targets in (None, "all-linear")
    if by_default:
        targets = linear_layers(model)
    if towers is not None or layers is not None:
        targets = _targets_inside(model, chosen, _targets(args), args)
        target_parameters = _target_parameters_inside(model, chosen, args)
        if not targets and not target_parameters:
            raise ValueError(
                f"Nothing to adapt: train_towers ({' '.join(towers or ['all'])}) and train_layers ({layers or 'all'}) "
                f"choose none of the layers that lora_target_modules ({args.lora_target_modules or 'all'}) names."
            )
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets,
        target_parameters=target_parameters,
        modules_to_save=args.lora_modules_to_save,
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
        task_type=args.lora_task_type,
    )
    if by_default:
        default_targets(model, config, targets or ())
    refuse_dropout_on_parameters(model, config)
    refuse_absent_modules(model, args.lora_modules_to_save)
    set_seed(seed)
    there = ", ".join(sorted({path.rpartition(".")[2] for path in linear_layers(model)}))
    with blamed_on(f"lora_target_modules, lora_modules_to_save (linear layers here: {there})", ValueError):
        adapted = get_peft_model(model, config)
    compare_with_adapted(adapted, None if by_default else _targets(args), args.lora_target_parameters)
    return adapted


def _targets_inside(
    model: nn.Module, chosen: Collection[str], targets: list[str] | str | None, args: ModelConfig
) -> list[str]:
    """Full paths of what LoRA adapts inside of the chosen modules."""
    if targets is None or targets == "all-linear":
        return [path for path in linear_layers(model) if path in chosen]
    config = LoraConfig(target_modules=targets, modules_to_save=args.lora_modules_to_save)
    return [path for path in chosen if path and check_target_module_exists(config, path)]


def _target_parameters_inside(model: nn.Module, chosen: Collection[str], args: ModelConfig) -> list[str] | None:
    """Full names of the parameters that LoRA adapts (experts in one tensor) inside of the chosen modules."""
    if args.lora_target_parameters is None:
        return None
    endings = tuple(f".{target}" for target in args.lora_target_parameters)
    names = [name for name, _ in model.named_parameters() if f".{name}".endswith(endings)]
    return [name for name in names if name.rpartition(".")[0] in chosen]


def _targets(args: ModelConfig) -> list[str] | str | None:
    """`--lora_target_modules`: ModelConfig unpacks a list of one, and a str is a pattern to PEFT."""
    targets = args.lora_target_modules
    return [targets] if isinstance(targets, str) and targets.isidentifier() else targets


def find_gguf(name: str) -> Path | None:
    """The GGUF file that `name` is, or that is the only one in the folder `name` without a `config.json`."""
    path = Path(name)
    if path.suffix == ".gguf":
        return path
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.rglob("*.gguf"))
        if len(files) == 1:
            return files[0]
    return None


def load_gguf(path: Path, dtype: str | torch.dtype | None = "float32") -> tuple[Any, Any]:
    """De-quantizes a GGUF file into a model that trains and saves like any other, and its tokenizer."""
    require("gguf", "GGUF files")
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    mend_tokenizer(tokenizer, path)
    # The weights are ordinary tensors now; these marks would make the Trainer and save_pretrained refuse them.
    model.is_quantized = False
    for mark in ("hf_quantizer", "quantization_method"):
        delattr(model, mark)
    del model.config.quantization_config
    # GGUF tokenizers come with <bos> as the end of text, or without padding; the model's own config knows better.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def _load_with_unsloth(
    args: ModelConfig,
    vision: bool,
    towers: Collection[str] | None,
    layers: str | None,
    trust_remote_code: bool,
    max_length: int | None,
    seed: int,
) -> tuple[Any, Any]:
    from unsloth import FastLanguageModel, FastVisionModel

    loader = FastVisionModel if vision else FastLanguageModel
    model, processor = loader.from_pretrained(
        args.model_name_or_path,
        max_seq_length=max_length or 2048,
        dtype=None if args.dtype in (None, "auto") else getattr(torch, args.dtype),
        load_in_4bit=args.load_in_4bit,
        load_in_8bit=args.load_in_8bit,
        full_finetuning=not args.use_peft,
        trust_remote_code=trust_remote_code,
        revision=None if args.model_revision == "main" else args.model_revision,
    )
    if args.use_peft:
        parts: dict[str, Any] = {}
        if vision:
            parts = {f"finetune_{tower}_layers": tower in (towers or TOWERS) for tower in ("vision", "language")}
        targets: Any = {} if args.lora_target_modules is None else {"target_modules": _targets(args)}
        target_parameters = args.lora_target_parameters
        if layers is not None:
            chosen = chosen_modules(model, towers, layers)
            indices = whole_language_layers(model, chosen)
            target_parameters = _target_parameters_inside(model, chosen, args)
            if indices is None:
                targets = {"target_modules": _targets_inside(model, chosen, _targets(args), args)}
            else:
                parts |= {"layers_to_transform": indices} | ({"finetune_vision_layers": False} if vision else {})
        model = loader.get_peft_model(
            model,
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            use_rslora=args.use_rslora,
            use_dora=args.use_dora,
            modules_to_save=args.lora_modules_to_save,
            target_parameters=target_parameters,
            random_state=seed,
            **targets,
            **parts,
        )
        compare_with_adapted(model, targets.get("target_modules"), target_parameters)
    elif vision or layers is not None:
        model = make_trainable(model, args, towers, layers, seed)
    if vision and max_length is None:
        # Unsloth's trainer takes what it was loaded with for `max_length`, and a row that is truncated there loses
        # tokens of its images but not the images.
        limit = model.config.get_text_config().max_position_embeddings
        for module in model.modules():
            if hasattr(module, "max_seq_length"):
                module.max_seq_length = limit  # type: ignore[assignment]
    return model, processor
