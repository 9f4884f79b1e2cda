"""The towers of a model: language, vision, audio, and the connectors between them. THE file for a new VLM family.

A tower is recognised by the sub-config that it was built from (`vision_config`, `audio_config`). Models without
sub-configs are told by the names of their modules. What belongs to no encoder and no connector is language.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from grades_trl.model.structure import base_path, find_layers, is_connector, is_linear, locate

TOWERS = ("language", "vision", "audio", "projector")
SUB_CONFIGS = {"vision_config": "vision", "audio_config": "audio"}
NAMES = {"vision": "vision", "visual": "vision", "image": "vision", "audio": "audio"}


def find_towers(model: nn.Module) -> dict[str, str]:
    """The encoders of a model: path in the base model -> `"vision"` or `"audio"`."""
    config = getattr(model, "config", None)
    kinds = {type(getattr(config, name, None)): tower for name, tower in SUB_CONFIGS.items()}
    kinds.pop(type(None), None)
    towers: dict[str, str] = {}
    for path, module in model.named_modules():
        if path == "" or any(path.startswith(tower + ".") for tower in towers):
            continue
        name = path.rpartition(".")[2].lower()
        if type(getattr(module, "config", None)) in kinds:
            towers[path] = kinds[type(module.config)]
        elif not kinds and any(word in name for word in NAMES) and any(map(is_linear, module.modules())):
            towers[path] = next(tower for word, tower in NAMES.items() if word in name)
    return {base_path(path): tower for path, tower in towers.items()}


def tower_of(path: str, towers: dict[str, str]) -> str:
    """The tower of a module, given by its path in the base model and the result of `find_towers`."""
    return next((tower for encoder, tower in towers.items() if f"{path}.".startswith(encoder + ".")), "language")


def towers_of_modules(model: nn.Module) -> dict[str, str]:
    """Path of a module -> its tower. Embeddings and output head are language, mergers and projectors projector."""
    towers = find_towers(model)
    return {
        path: "projector" if is_connector(path) else tower_of(base_path(path), towers)
        for path, _ in model.named_modules()
    }


def towers_of_parameters(model: nn.Module) -> dict[str, str]:
    """Name of a parameter -> its tower, see `towers_of_modules`."""
    towers = towers_of_modules(model)
    return {name: towers[name.rpartition(".")[0]] for name, _ in model.named_parameters()}


def linear_layers(model: nn.Module, towers: Collection[str] = TOWERS) -> list[str]:
    """Paths of all linear layers of the given towers, quantized ones included: the default targets of LoRA.

    They are the linear layers inside the repeated layers, which GradES tracks, and with `"projector"` those between
    the towers.
    """
    layers, encoders = find_layers(model), find_towers(model)
    paths = []
    for path, module in model.named_modules():
        if not is_linear(module):
            continue
        if is_connector(path):
            tower = "projector"
        elif locate(path, layers):
            tower = tower_of(base_path(path), encoders)
        else:
            continue
        if tower in towers:
            paths.append(path)
    return paths
