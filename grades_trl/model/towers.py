"""The towers of a model: language, vision, audio, and the projectors between them. THE file for a new VLM family.

An encoder is recognised by the sub-config that it was built from: one that describes raw inputs (patches, channels,
mel bins). The language tower is the module that was built from the text config. Everything else lies between the two:
projectors, aligners, Q-Formers, resamplers. Where the text model has no module of its own, what connects the towers is
told by its sub-config or its name. Models without sub-configs are told by the inputs of their modules.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from grades_trl.model.structure import (
    base_path,
    find_heads,
    find_layers,
    find_routers,
    is_connector,
    is_linear,
    locate,
)

TOWERS = ("language", "vision", "audio", "projector")
NAMES = {"vision": "vision", "visual": "vision", "image": "vision", "audio": "audio", "speech": "audio"}
# What only the config of an encoder has: it says what comes in.
RAW_INPUTS = (
    "patch_size",
    "num_channels",
    "in_channels",
    "image_size",
    "num_mel_bins",
    "max_num_patches",
    "patch_embed_hidden_size",
    "input_dim",
    "input_feat_size",
    "input_size",
    "sampling_rate",
    "subsampling_conv_channels",
)
OF_PROJECTORS = ("resampler", "perceiver", "qformer", "image_to_text", "visual_projection", "vision_proj")


def find_towers(model: nn.Module) -> dict[str, str]:
    """Path of a module in the base model -> the tower of all that is inside, for [`tower_of`].

    The path `""` stands for the whole model, if what is not named belongs to something else than language.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    subs = [(name, sub) for name, sub in _sub_configs(config) if type(sub) is not type(text)]
    encoders = {type(sub): name for name, sub in subs if any(hasattr(sub, raw) for raw in RAW_INPUTS)}
    between = {type(sub) for _, sub in subs if type(sub) not in encoders and not list(_sub_configs(sub))}
    towers: dict[str, str] = {}
    inside_encoder = inside_text = ""
    has_text_model = False
    for path, module in model.named_modules():
        if path == "" or (inside_text and f"{path}.".startswith(inside_text)):
            continue
        kind, name = type(getattr(module, "config", None)), path.rpartition(".")[2].lower()
        if inside_encoder and f"{path}.".startswith(inside_encoder):
            if is_connector(name):
                towers[path] = "projector"
        elif kind in encoders:
            towers[path], inside_encoder = _tower_of_encoder(encoders[kind], module), f"{path}."
        elif kind in between:
            towers[path] = "projector"
        elif text is not config and encoders and kind is type(text):
            towers[path], inside_text, has_text_model = "language", f"{path}.", True
        elif not encoders and _reads_no_text(module):
            towers[path], inside_encoder = _tower_of_encoder("", module), f"{path}."
        elif text is None and any(word in name for word in NAMES) and any(map(is_linear, module.modules())):
            towers[path] = next(tower for word, tower in NAMES.items() if word in name)
            inside_encoder = f"{path}."
        elif is_connector(name) or any(word in name for word in OF_PROJECTORS):
            towers[path] = "projector"
    if has_text_model:
        towers[""] = "projector"
        for part in (model.get_input_embeddings(), model.get_output_embeddings()):  # type: ignore[operator]
            towers |= {path: "language" for path, module in model.named_modules() if module is part}
    return {base_path(path): tower for path, tower in towers.items()}


def _sub_configs(config: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of all configs inside of a config."""
    if not hasattr(config, "to_dict"):
        return
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield name, value
            yield from _sub_configs(value)


def _inputs_of(module: Any) -> set[str]:
    """What Transformers says that a model takes: "text", "image", "video", "audio"."""
    inputs = getattr(module, "input_modalities", ())
    return {inputs} if isinstance(inputs, str) else set(inputs or ())


def _reads_no_text(module: nn.Module) -> bool:
    return bool(_inputs_of(module)) and "text" not in _inputs_of(module)


def _tower_of_encoder(config_name: str, module: nn.Module) -> str:
    named = next((tower for word, tower in NAMES.items() if word in config_name), "")
    return named or ("audio" if "audio" in _inputs_of(module) else "vision")


def tower_of(path: str, towers: dict[str, str]) -> str:
    """The tower of a module, given by its path in the base model and the result of `find_towers`."""
    parts = path.split(".")
    prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((towers[prefix] for prefix in prefixes if prefix in towers), towers.get("", "language"))


def find_encoders(model: nn.Module) -> dict[str, str]:
    """The encoders of a model: path in the base model -> `"vision"` or `"audio"`."""
    return {path: tower for path, tower in find_towers(model).items() if tower in ("vision", "audio")}


def towers_of_modules(model: nn.Module) -> dict[str, str]:
    """Path of a module -> its tower. Embeddings and output head are language."""
    towers = find_towers(model)
    return {path: tower_of(base_path(path), towers) for path, _ in model.named_modules()}


def towers_of_parameters(model: nn.Module) -> dict[str, str]:
    """Name of a parameter -> its tower, see `towers_of_modules`."""
    towers = towers_of_modules(model)
    return {name: towers[name.rpartition(".")[0]] for name, _ in model.named_parameters()}


def linear_layers(model: nn.Module, towers: Collection[str] = TOWERS) -> list[str]:
    """Paths of all linear layers of the given towers, quantized ones included: the default targets of LoRA.

    They are the linear layers inside the repeated layers, which GradES tracks, and with `"projector"` those between
    the towers. Left out are routers, and what torch's own attention reads without calling it.
    """
    layers, tower_of_path, heads = find_layers(model), towers_of_modules(model), find_heads(model)
    routers = find_routers(model, layers)
    paths, attention = [], ""
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            attention = f"{path}."
        if not is_linear(module) or path in routers or path in heads or (attention and path.startswith(attention)):
            continue
        if tower_of_path[path] in towers and (locate(path, layers) or tower_of_path[path] == "projector"):
            paths.append(path)
    return paths
