"""What a model is made of: repeated layers, linear layers, adapters, the output head. No list of model names.

A *layer* here is one decoder or encoder layer: an element of a `ModuleList`. A *linear layer* is a module with a 2-D
weight. A *connector* lies between two towers (the projector of LLaVA, the merger of Qwen-VL).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# Qwen3-VL keeps a list of mergers (deepstack) beside its vision layers: they connect towers, they are not layers.
CONNECTORS = ("merger", "projector", "connector")


def find_layers(model: nn.Module) -> dict[str, tuple[str, int]]:
    """The repeated layers of `model`: path in the model -> (path of the list that holds the layer, index in it).

    A list of layers is an outermost `ModuleList` whose elements hold linear layers without being linear themselves. Of
    a list of lists (the stages of Florence-2's vision tower), the inner lists hold the layers.
    """
    layers: dict[str, tuple[str, int]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(layer + ".") for layer in layers):
            continue
        if is_connector(path) or any(isinstance(child, nn.ModuleList) for child in module):
            continue
        if all(is_linear(child) or not any(map(is_linear, child.modules())) for child in module):
            continue
        layers.update({f"{path}.{index}": (path, index) for index in range(len(module))})
    return layers


def embeddings_train(model: nn.Module) -> bool:
    """Whether the embeddings of the tokens train, so that backward goes down to the first language layer."""
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    return embeddings is not None and any(p.requires_grad for p in embeddings.parameters())


def locate(path: str, layers: dict[str, tuple[str, int]]) -> str:
    """The path of the layer that `path` lies in; `""` outside all layers."""
    parts = path.split(".")
    return next((layer for end in range(1, len(parts)) if (layer := ".".join(parts[:end])) in layers), "")


def find_heads(model: nn.Module) -> list[str]:
    """Paths of the output head of a Transformers model; empty for other models."""
    getter: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = getter()
    return [path for path, module in model.named_modules() if module is head]


def base_path(path: str) -> str:
    """The path in the base model: without PEFT's wrappers."""
    parts = [part for part in path.split(".") if part != "base_layer"]
    if parts[:2] == ["base_model", "model"]:
        parts = parts[2:]
    return ".".join(parts)


def is_linear(module: nn.Module) -> bool:
    """Whether a weight of the module multiplies activations: `nn.Linear`, GPT-2's `Conv1D`, quantized, adapted."""
    weight = getattr(module, "weight", None)
    is_matrix = isinstance(weight, torch.Tensor) and weight.ndim == 2
    return (is_matrix and not isinstance(module, nn.Embedding)) or is_adapter(module)


def is_adapter(module: nn.Module) -> bool:
    """Whether PEFT put this module around a layer of the base model, to adapt it."""
    # Imported here because peft imports transformers, and unsloth has to be imported before transformers.
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def is_lora(module: Any) -> bool:
    """Whether PEFT adapts this layer by LoRA, or by a relative that has its factors A and B (AdaLoRA, DoRA)."""
    return is_adapter(module) and "lora_A" in module.adapter_layer_names


def is_connector(path: str) -> bool:
    """Whether a module lies between two towers."""
    return any(word in path for word in CONNECTORS)
