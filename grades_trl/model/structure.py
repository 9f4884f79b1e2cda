"""What a model is made of: repeated layers, linear layers, experts, routers, adapters, the output head.

A *layer* here is one decoder or encoder layer: an element of a `ModuleList`. A *linear layer* is a module that
multiplies what comes in by its 2-D weight. A *router* is the linear layer that chooses among experts. No list of model
names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# Qwen3-VL keeps a list of mergers (deepstack) beside its vision layers: each stands alone, they are no layers.
CONNECTORS = ("merger", "projector", "connector", "aligner")
# A tensor of three dimensions with such a name is no stack of matrices: Mamba's A_log, XLNet's seg_embed.
NO_WEIGHTS = ("log", "embed", "bias", "pos", "norm")
# How far above a tensor of experts its router may be: `ffn.experts.mlp.w1` and `ffn.router` (DBRX).
ROUTER_DISTANCE = 3


def find_layers(model: nn.Module) -> dict[str, tuple[str, int]]:
    """The repeated layers of `model`: path in the model -> (path of the list that holds the layer, index in it).

    A list of layers is an outermost `ModuleList` whose elements hold linear layers without being linear themselves. In
    a list of stages, the stages hold the layers: inner lists of equal modules (Florence-2's vision tower), or modules
    with one such list (Swin). Inner lists of different modules are one layer each (the resampler of Idefics).
    """
    layers: dict[str, tuple[str, int]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(f"{path}.".startswith(f"{layer}.") for layer in layers):
            continue
        if is_connector(path.rpartition(".")[2]) or _is_list_of_stages(module) or not _holds_layers(module):
            continue
        layers.update({f"{path}.{index}": (path, index) for index in range(len(module))})
    return layers


def _holds_layers(modules: nn.ModuleList) -> bool:
    return any(not is_linear(child) and any(map(is_linear, child.modules())) for child in modules)


def _is_list_of_stages(modules: nn.ModuleList) -> bool:
    return len(modules) > 0 and all(_layers_of_stage(child) is not None for child in modules)


def _layers_of_stage(module: nn.Module) -> nn.ModuleList | None:
    """The list of equal layers that a stage is or has; `None` for a module that is itself a layer."""
    lists = [m for m in (module, *module.children()) if isinstance(m, nn.ModuleList) and _holds_layers(m)]
    if len(lists) != 1 or len({type(child) for child in lists[0]}) > 1 or is_adapter(module):
        return None
    return lists[0]


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
    """Whether a module is a linear layer that PEFT can adapt: `nn.Linear`, GPT-2's `Conv1D`, quantized, adapted.

    Routers and norms of many models have a 2-D weight, too; they are modules of their own."""
    if is_adapter(module):
        return True
    weight = getattr(module, "weight", None)
    is_matrix = isinstance(weight, torch.Tensor) and weight.ndim == 2
    sizes = isinstance(module, nn.Linear) or (hasattr(module, "in_features") and hasattr(module, "out_features"))
    return is_matrix and (sizes or type(module).__name__ == "Conv1D")


def stacked_weights(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The tensors of a module that are matrices without being the weight of a linear layer: name -> shape.

    They are the experts of a mixture in one tensor (experts, rows, columns), other stacks of matrices, and fused
    weights that are read directly (`in_proj_weight` of torch's attention). DBRX keeps its experts in two dimensions.
    """
    if is_linear(module) or isinstance(module, nn.Embedding | nn.modules.conv._ConvNd):
        return {}
    found: dict[str, tuple[int, ...]] = {}
    experts = _number_of_experts(module)
    for name, parameter in module.named_parameters(recurse=False):
        shape = tuple(parameter.shape)
        if any(word in name.lower() for word in NO_WEIGHTS) or len(shape) not in (2, 3) or min(shape[-2:]) == 1:
            continue
        if len(shape) == 3 or "proj" in name:
            found[name] = shape
        elif experts > 1 and shape[0] % experts == 0 and shape[0] > experts:  # a router's has a row for each expert
            found[name] = (experts, shape[0] // experts, shape[1])
    return found


def _number_of_experts(module: nn.Module) -> int:
    return next((n for name, n in vars(module).items() if name.endswith("num_experts") and isinstance(n, int)), 0)


def find_routers(model: nn.Module, layers: dict[str, tuple[str, int]]) -> set[str]:
    """Paths of the linear layers that choose or weigh experts: one output for each expert, or a single one.

    Args:
        model (`nn.Module`): wrapped by PEFT or not.
        layers (`dict[str, tuple[str, int]]`): from `find_layers`.
    """
    modules = dict(model.named_modules())
    routers: set[str] = set()
    for path, count in _experts(modules, layers):
        parts = path.split(".")
        lowest = len(locate(f"{path}.", layers).split("."))
        for end in range(len(parts), max(lowest, len(parts) - ROUTER_DISTANCE) - 1, -1):
            above = ".".join(parts[:end])
            for name, child in modules[above].named_children():
                for linear, module in _only_linear(f"{above}.{name}", child):
                    if _outputs(module) in (1, count):
                        routers.add(linear)
    return routers


def _experts(modules: dict[str, nn.Module], layers: dict[str, tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """Path of what holds the experts of a layer -> how many they are."""
    for path, module in modules.items():
        if not locate(f"{path}.", layers):
            continue
        for shape in stacked_weights(module).values():
            if len(shape) == 3 and shape[0] > 1:
                yield path, shape[0]
        is_list = isinstance(module, nn.ModuleList | nn.ModuleDict) and path not in layers and len(module) > 1
        if is_list and all(not is_linear(m) and any(map(is_linear, m.modules())) for m in module.children()):
            yield path, len(list(module.children()))


def _only_linear(path: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """A linear layer, or the only one in a module, with its path."""
    if is_linear(module):
        return [(path, module)]
    inside = [(f"{path}.{name}", m) for name, m in module.named_modules() if is_linear(m)]
    outermost = [(name, m) for name, m in inside if not any(name.startswith(f"{other}.") for other, _ in inside)]
    return outermost if len(outermost) == 1 else []


def _outputs(module: Any) -> int:
    return module.out_features if hasattr(module, "out_features") else module.weight.shape[-1]


def is_adapter(module: nn.Module) -> bool:
    """Whether PEFT put this module around a layer of the base model, to adapt it."""
    # Imported here because peft imports transformers, and unsloth has to be imported before transformers.
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def is_lora(module: Any) -> bool:
    """Whether PEFT adapts this layer by LoRA, or by a relative that has its factors A and B (AdaLoRA, DoRA)."""
    return is_adapter(module) and "lora_A" in module.adapter_layer_names


def is_connector(name: str) -> bool:
    """Whether the name of a module says that it connects two towers."""
    return any(word in name for word in CONNECTORS)
