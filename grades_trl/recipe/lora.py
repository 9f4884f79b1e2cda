"""What LoRA adapts, and whether PEFT did what it was asked to do."""

from __future__ import annotations

import copy
import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba, check_target_module_exists
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import AutoTokenizer
from trl import SFTConfig

from grades_trl.model import find_layers
from grades_trl.model.structure import base_path, is_linear, is_lora, stacked_weights

logger = logging.getLogger(__name__)

ROWS_OF_EMBEDDINGS = 64  # TRL makes their number a multiple of this when it takes another model's tokens


def default_targets(model: nn.Module, config: LoraConfig, paths: Iterable[str]) -> None:
    """Makes linear layers the targets of a LoRA config, in a form that PEFT neither refuses nor rewrites.

    PEFT refuses Mamba's `out_proj`, whose weight is read without calling the layer. In models with experts in one
    tensor it reads `gate_proj`, `up_proj` and `down_proj` as names of these tensors, dense layers and shared experts
    included. Their weights are then adapted as parameters, which knows neither dropout nor 4-bit weights. What cannot
    be adapted is said.

    Args:
        model (`nn.Module`): not wrapped by PEFT.
        config (`LoraConfig`): its targets are set.
        paths (`Iterable[str]`): of the linear layers, from [`linear_layers`].
    """
    targets = set(paths)
    refused = {path for path in targets if not _accepts(model, config, path)}
    rewritten = {path for path in targets - refused if _is_rewritten(model, config, path)}
    as_parameters = {path for path in rewritten if _is_plain(model.get_submodule(path)) and not config.lora_dropout}
    config.target_modules = targets - refused - rewritten
    parameters = [*(config.target_parameters or ()), *(f"{path}.weight" for path in sorted(as_parameters))]
    config.target_parameters = parameters or None
    _say(refused, "PEFT does not adapt these layers in Mamba models")
    _say(
        rewritten - as_parameters,
        "PEFT takes these names for those of experts; --lora_dropout 0, without 4 or 8 bits, adapts them",
    )
    if not config.target_parameters:
        _say(
            (f"{path}.{name}" for path in find_layers(model) for name in _experts_in(model, path)),
            "experts in one tensor are adapted by --lora_target_parameters with --lora_dropout 0",
        )


def _accepts(model: nn.Module, config: LoraConfig, path: str) -> bool:
    try:
        _check_lora_target_modules_mamba(config, model, path.rpartition(".")[2])
    except ValueError:
        return False
    return True


def _is_rewritten(model: nn.Module, config: LoraConfig, path: str) -> bool:
    """Whether PEFT would take a target for something else."""
    trial = copy.copy(config)
    trial.target_modules, trial.target_parameters, trial.rank_pattern, trial.alpha_pattern = {path}, None, {}, {}
    try:
        convert_peft_config_for_transformers(trial, model, None)
    except ValueError:  # half of a fused tensor
        return True
    return path not in (trial.target_modules or ())


def _is_plain(module: nn.Module) -> bool:
    weight: Any = getattr(module, "weight", None)
    return type(module) is nn.Linear and weight.is_floating_point()


def _experts_in(model: nn.Module, layer: str) -> list[str]:
    return [
        f"{path}.{name}" if path else name
        for path, module in model.get_submodule(layer).named_modules()
        for name, shape in stacked_weights(module).items()
        if len(shape) == 3
    ]


def refuse_dropout_on_parameters(model: nn.Module, config: LoraConfig) -> None:
    """Parameters, such as experts in one tensor, have no input of their own that dropout could act on.

    Raises:
        ValueError: parameters are to be adapted, by their names or by names that PEFT reads as theirs, with dropout.
    """
    if not config.lora_dropout:
        return
    names = [] if isinstance(config.target_modules, str) else list(config.target_modules or ())
    parameters = [*(config.target_parameters or ()), *(n for n in names if _is_rewritten(model, config, n))]
    if parameters:
        raise ValueError(
            f"LoRA adapts {_short(parameters)} as parameters (experts in one tensor), which knows no dropout: "
            f"lora_dropout is {config.lora_dropout}; set --lora_dropout 0, or leave them out."
        )


def refuse_absent_modules(model: nn.Module, names: Collection[str] | None) -> None:
    """PEFT leaves names of `modules_to_save` that the model does not have without a word.

    Raises:
        ValueError: no module has one of these names.
    """
    there = [path for path, _ in model.named_modules()]
    absent = [name for name in names or () if not any(f".{path}".endswith(f".{name}") for path in there)]
    if absent:
        outside = [path for path in there if path and not any(part.isdigit() for part in path.split("."))]
        raise ValueError(
            f"lora_modules_to_save names {', '.join(absent)}, and {_name(model)} has no such module. Those outside of "
            f"its layers are {', '.join(outside)}."
        )


def compare_with_adapted(
    model: nn.Module, asked: Collection[str] | str | None, parameters: Collection[str] | None = None
) -> None:
    """Compares what `--lora_target_modules` and `--lora_target_parameters` name with what PEFT has adapted.

    Args:
        model (`nn.Module`): wrapped by PEFT.
        asked (`Collection[str]` or `str`, *optional*): names, or a pattern.
        parameters (`Collection[str]`, *optional*): names of parameters.

    Raises:
        ValueError: a name has no adapter at all.
    """
    adapted = {base_path(path) for path, module in model.named_modules() if is_lora(module)}
    parameters_adapted = {
        f"{base_path(path)}.{module.parameter_name}"
        for path, module in model.named_modules()
        if is_lora(module) and hasattr(module, "parameter_name")
    }
    names = [] if asked is None or isinstance(asked, str) else list(asked)
    wanted = tuple(f".{name}" for name in parameters or ())
    instead = {name for name in parameters_adapted if not f".{name}".endswith(wanted)}
    missing = [n for n in names if not any(f".{path}".endswith(f".{n}") for path in adapted)]
    if instead:
        missing = [name for name in missing if not _is_rewritten(model, LoraConfig(), name)]
    missing += [n for n in parameters or () if not any(f".{p}".endswith(f".{n}") for p in parameters_adapted)]
    there = ", ".join(sorted({path.rpartition(".")[2] for path in _linear_paths(model)}))
    if missing:
        raise ValueError(
            f"lora_target_modules and lora_target_parameters name {', '.join(sorted(missing))}, and PEFT has put no "
            f"adapter there. The linear layers of {_name(model)} are called {there}. Experts in one tensor are "
            "parameters, and routers and norms are not adapted."
        )
    if asked is None or asked == "all-linear":
        return
    config = LoraConfig(target_modules=asked)
    left_out = {path for path in _linear_paths(model) if check_target_module_exists(config, path)} - adapted
    _say(left_out, "they are asked for, and PEFT has put no adapter there")
    if instead:
        logger.warning("LoRA adapts parameters, which have the names that were asked for: %s.", _short(instead))


def refuse_resized_embeddings(model: Any, processor: Any, training: SFTConfig) -> None:
    """
    Refuses adapters with the chat template of another model (`--chat_template_path MODEL`), where TRL would resize the
    embeddings for that model's tokens: the base on which the adapter is loaded later has embeddings of the old size.
    Also where there is room for new tokens and no embedding trains, so that these would stay as they are.

    Raises:
        ValueError: with what to do.
    """
    path = training.chat_template_path
    if path is None or Path(path).is_file() or not isinstance(model, PeftModel):
        return
    known = getattr(processor, "tokenizer", processor).get_vocab()
    theirs = AutoTokenizer.from_pretrained(path).added_tokens_decoder.values()
    new = [token.content for token in theirs if token.content not in known]
    before = model.get_input_embeddings().weight.shape[0]
    after = ROWS_OF_EMBEDDINGS * math.ceil((len(known) + len(new)) / ROWS_OF_EMBEDDINGS)
    embeddings_train = any(p.requires_grad for p in model.get_input_embeddings().parameters())
    if after == before and (embeddings_train or not new):
        return
    reason = "does not train their embeddings"
    if after != before:
        reason = f"resizes the embeddings from {before:,} to {after:,} rows: the adapter would not fit on its base"
    raise ValueError(
        f"--use_peft with --chat_template_path {path}: TRL takes the tokens of that model too ({len(new)} are new), "
        f"and {reason}. Give the template as a .jinja file, written with this model's own tokens, or train all "
        "weights, without --use_peft."
    )


def _linear_paths(model: nn.Module) -> list[str]:
    return [base_path(path) for path, module in model.named_modules() if is_linear(module) and ".lora_" not in path]


def _name(model: Any) -> str:
    return type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__


def _say(paths: Iterable[str], why: str) -> None:
    if paths := list(paths):
        logger.warning("LoRA leaves out %s: %s.", _short(paths), why)


def _short(paths: Iterable[str]) -> str:
    """Names with how often they occur: `mlp.gate_proj (2)`."""
    counts = Counter(".".join([part for part in path.split(".") if not part.isdigit()][-2:]) for path in paths)
    return ", ".join(f"{name} ({count})" for name, count in counts.items())
