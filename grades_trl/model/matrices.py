"""Finds the weight matrices of any model by structure: no list of model names.

A matrix is the 2-D weight of a linear layer inside a repeated block (one element of a `ModuleList` of decoder or
encoder layers), or one expert of a 3-D expert weight there. Under LoRA it is the pair of adapters of such a layer.
Embeddings, norms, biases and the output head are never tracked (arXiv 2509.01842, section 3).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

TOWERS = ("language", "vision", "audio", "projector")

# Qwen3-VL keeps a list of mergers (deepstack) beside its vision blocks: they connect towers, they are not a stack.
CONNECTORS = ("merger", "projector", "connector")


@dataclass(frozen=True, eq=False)
class WeightMatrix:
    """One tracked weight matrix.

    Attributes:
        name (`str`): full path of the layer in the base model, e.g. `model.layers.3.self_attn.q_proj`; an expert of a
            3-D weight adds its index: `model.layers.3.mlp.experts.gate_up_proj.7`.
        layer (`int`): index of its block, counted from the input; -1 outside the blocks (projectors).
        role (`str`): what it is in its block, e.g. `q_proj`, `down_proj`, `qkv`, `experts.gate_up_proj`.
        tower (`str`): `"language"`, `"vision"`, `"audio"` or `"projector"`.
        stack (`str`): path of the list of blocks it belongs to, e.g. `model.layers`; `""` outside the blocks.
        shape (`tuple[int, int]`): of the full weight that it is or adapts, as (out, in).
        parameters (`tuple[nn.Parameter, ...]`): what trains: the weight itself, or all LoRA factors of the layer.
        expert (`int`, *optional*): index into the first dimension of a 3-D weight.
    """

    name: str
    layer: int
    role: str
    tower: str
    stack: str
    shape: tuple[int, int]
    parameters: tuple[nn.Parameter, ...]
    expert: int | None = None

    @property
    def params(self) -> int:
        """Number of trainable elements."""
        return sum(p.numel() // (1 if self.expert is None else p.shape[0]) for p in self.parameters)

    @property
    def part(self) -> Any:
        """What its tensors are indexed with to get what belongs to it: its expert, or all."""
        return ... if self.expert is None else self.expert

    @property
    def lora(self) -> bool:
        """Whether low-rank factors train here, and the weight itself does not."""
        own = len(self.parameters) == 1 and self.parameters[0].numel() == self.shape[0] * self.shape[1]
        return self.expert is None and not own


def find_matrices(model: nn.Module, projector: bool = False) -> dict[str, WeightMatrix]:
    """All weight matrices of `model` that train, in the order of the forward pass as far as the modules tell.

    Args:
        model (`nn.Module`): a Transformers or plain PyTorch model, wrapped by PEFT or not. Call it after LoRA layers
            have been added and after anything has been frozen by hand: what does not require a gradient is left out.
        projector (`bool`, *optional*, defaults to `False`): also take the linear layers between two towers (mergers,
            multi-modal projectors). The paper never tracks them.

    Returns:
        `dict[str, WeightMatrix]`: keyed by name.

    Raises:
        ValueError: nothing to track, with the reason.
    """
    blocks, towers, heads = find_blocks(model), _towers(model), find_heads(model)
    found: list[tuple[str, str, int, str, tuple[nn.Parameter, ...], tuple[int, ...]]] = []
    taken: set[int] = set()
    for path, name, parameters, shape in _trainable_linears(model):
        if path in heads or id(parameters[0]) in taken:  # PEFT's `modules_to_save` wraps a layer and shows its weight
            continue
        taken.add(id(parameters[0]))
        stack, layer, inner = _locate(path, name, blocks)
        if inner == "" and not (projector and _is_connector(path)):
            continue
        found.append((name, stack, layer, inner or name, parameters, shape))
    roles = _roles({(stack, inner) for _, stack, _, inner, _, _ in found})

    matrices = {}
    for name, stack, layer, inner, parameters, shape in found:
        tower = _tower_of(name, towers) if stack else "projector"
        role = roles[stack, inner]
        if len(shape) == 3 and len(parameters) == 1:  # each expert is a matrix of its own
            for expert in range(shape[0]):
                key = f"{name}.{expert}"
                matrices[key] = WeightMatrix(key, layer, role, tower, stack, (shape[1], shape[2]), parameters, expert)
        else:
            rows, columns = shape[-2:]
            matrices[name] = WeightMatrix(name, layer, role, tower, stack, (rows, columns), parameters)
    if not matrices:
        raise ValueError(
            f"GradES found no weight matrix to watch in {type(model).__name__}: expected linear layers that require a "
            f"gradient inside a ModuleList of blocks; found {len(blocks)} such blocks and "
            f"{sum(p.requires_grad for p in model.parameters())} trainable tensors. Add LoRA adapters or unfreeze "
            "weights before the trainer is built."
        )
    return matrices


def find_blocks(model: nn.Module) -> dict[str, tuple[str, int]]:
    """The repeated blocks of `model`: path in the model -> (path of the list, index in it).

    A block is an element of an outermost `ModuleList` that holds linear layers without being one itself.
    """
    blocks: dict[str, tuple[str, int]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(block + ".") for block in blocks):
            continue
        if _is_connector(path):
            continue
        if all(_is_linear(child) or not any(map(_is_linear, child.modules())) for child in module):
            continue
        blocks.update({f"{path}.{index}": (path, index) for index in range(len(module))})
    return blocks


def blocks_of_matrices(model: nn.Module, matrices: dict[str, WeightMatrix]) -> dict[str, list[str]]:
    """Path of a block -> the tracked matrices in it; blocks without any are left out."""
    names: dict[tuple[str, int], list[str]] = {}
    for name, matrix in matrices.items():
        names.setdefault((matrix.stack, matrix.layer), []).append(name)
    located = {path: (base_path(stack), index) for path, (stack, index) in find_blocks(model).items()}
    return {path: names[place] for path, place in located.items() if place in names}


def untracked_parameters(model: nn.Module, matrices: dict[str, WeightMatrix]) -> dict[str, int]:
    """What trains but is not tracked: kind (`"embed_tokens.weight"`, `"norms and biases"`, ...) -> elements."""
    tracked = {id(p) for matrix in matrices.values() for p in matrix.parameters}
    kinds: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in tracked:
            path = re.sub(r"\.lora_\w+\..*", " (LoRA)", base_path(name))
            words = [part for part in path.split(".") if not part.isdigit()]
            kind = "norms and biases" if parameter.ndim < 2 else ".".join(words[-2:])
            kinds[kind] += parameter.numel()
    return dict(kinds)


def towers_of_modules(model: nn.Module) -> dict[str, str]:
    """Path of a module -> tower. Embeddings and output head count as language, mergers and projectors as projector."""
    towers = _towers(model)
    return {
        path: "projector" if _is_connector(path) else _tower_of(base_path(path) + ".", towers)
        for path, _ in model.named_modules()
    }


def towers_of_parameters(model: nn.Module) -> dict[str, str]:
    """Parameter name -> tower, see `towers_of_modules`."""
    towers = towers_of_modules(model)
    return {name: towers[name.rpartition(".")[0]] for name, _ in model.named_parameters()}


def linear_layers(model: nn.Module, towers: Collection[str] = TOWERS) -> list[str]:
    """Paths of all linear layers of the given towers, quantized ones too: what LoRA adapts when nothing else is said.

    Those are the layers inside the blocks, which GradES watches, and with `"projector"` those between the towers.
    """
    blocks, tower_paths = find_blocks(model), _towers(model)
    layers = []
    for path, module in model.named_modules():
        if not _is_linear(module):
            continue
        if _is_connector(path):
            tower = "projector"
        elif _locate(path, path, blocks)[0]:
            tower = _tower_of(path, tower_paths)
        else:
            continue
        if tower in towers:
            layers.append(path)
    return layers


def describe(model: nn.Module, matrices: dict[str, WeightMatrix]) -> str:
    """The tracked set as a small table, and what trains beside it."""
    groups: dict[tuple[str, str], list[WeightMatrix]] = {}
    for matrix in matrices.values():
        groups.setdefault((matrix.tower, matrix.role), []).append(matrix)
    lines = [f"{'tower':<10} {'role':<24} {'matrices':>8} {'shape (out x in)':>18} {'trainable':>12}"]
    for (tower, role), members in groups.items():
        shapes = {m.shape for m in members}
        shape = "{} x {}".format(*members[0].shape) if len(shapes) == 1 else f"{len(shapes)} shapes"
        params = sum(m.params for m in members)
        lines.append(f"{tower:<10} {role:<24} {len(members):>8} {shape:>18} {params:>12,}")
    lines.append(f"{'total':<35} {len(matrices):>8} {'':>18} {sum(m.params for m in matrices.values()):>12,}")
    untracked = untracked_parameters(model, matrices)
    if untracked:
        listed = ", ".join(f"{kind} {count:,}" for kind, count in untracked.items())
        lines.append(f"trains, but is not tracked: {listed}")
    return "\n".join(lines)


def _is_linear(module: nn.Module) -> bool:
    """A layer whose own weight multiplies activations: `nn.Linear`, GPT-2's `Conv1D`, quantized and LoRA layers."""
    weight = getattr(module, "weight", None)
    is_matrix = isinstance(weight, torch.Tensor) and weight.ndim == 2
    return (is_matrix and not isinstance(module, nn.Embedding)) or _is_adapter(module)


def _is_connector(path: str) -> bool:
    return any(word in path for word in CONNECTORS)


def _is_adapter(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


def _trainable_linears(model: nn.Module) -> Iterator[tuple[str, str, tuple[nn.Parameter, ...], tuple[int, ...]]]:
    """(module path, name in the base model, what trains, shape of the full weight) of every linear layer."""
    adapters: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{adapter}.lora_") for adapter in adapters):
            continue
        if _is_adapter(module):
            adapters.append(path)
            parameters = tuple(
                p for n, p in module.named_parameters() if p.requires_grad and not n.startswith("base_layer.")
            )
            name, shape = base_path(path), (module.out_features, module.in_features)
            if hasattr(module, "parameter_name"):  # PEFT's target_parameters: LoRA on a 3-D expert weight
                name = f"{name}.{module.parameter_name}"
            if parameters and len(getattr(module, "lora_A", {})) > 0:
                yield path, name, parameters, shape
        elif _is_linear(module) and module.weight.requires_grad:
            rows, columns = module.weight.shape
            if type(module).__name__ == "Conv1D":  # GPT-2 keeps its weights as (in, out)
                rows, columns = columns, rows
            yield path, base_path(path), (module.weight,), (rows, columns)
        elif not isinstance(module, nn.modules.conv._ConvNd):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3 and parameter.requires_grad:
                    full = f"{path}.{name}"
                    yield full, base_path(full), (parameter,), tuple(parameter.shape)


def base_path(path: str) -> str:
    """Path in the base model: PEFT's wrappers removed."""
    parts = [part for part in path.split(".") if part != "base_layer"]
    if parts[:2] == ["base_model", "model"]:
        parts = parts[2:]
    return ".".join(parts)


def _locate(path: str, name: str, blocks: dict[str, tuple[str, int]]) -> tuple[str, int, str]:
    """(path of the list of blocks, index of the block, name inside the block); ("", -1, "") outside all blocks."""
    parts = path.split(".")
    for end in range(1, len(parts)):
        block = ".".join(parts[:end])
        if block in blocks:
            stack, layer = blocks[block]
            return base_path(stack), layer, name.removeprefix(base_path(block) + ".")
    return "", -1, ""


def _roles(inner_paths: set[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """(stack, path inside a block) -> role: the shortest ending that no other matrix of the same stack shares.

    Indices (of experts, of the layers in an `nn.Sequential`) are no part of a role.
    """
    plain = {inner: ".".join(p for p in inner.split(".") if not p.isdigit()) or inner for _, inner in inner_paths}
    stacks: dict[str, set[str]] = {}
    for stack, inner in inner_paths:
        stacks.setdefault(stack, set()).add(plain[inner])
    roles = {}
    for stack, inner in inner_paths:
        parts = plain[inner].split(".")
        for length in range(1, len(parts) + 1):
            role = ".".join(parts[-length:])
            if sum(other == role or other.endswith("." + role) for other in stacks[stack]) == 1:
                break
        roles[stack, inner] = role
    return roles


def _towers(model: nn.Module) -> dict[str, str]:
    """Path of a modality's encoder in `model` -> tower, told by the sub-config it was built from, else by its name."""
    config = getattr(model, "config", None)
    kinds = {
        type(getattr(config, attribute)): tower
        for attribute, tower in (("vision_config", "vision"), ("audio_config", "audio"))
        if getattr(config, attribute, None) is not None
    }
    towers: dict[str, str] = {}
    for path, module in model.named_modules():
        if path == "" or any(path.startswith(tower + ".") for tower in towers):
            continue
        last = path.split(".")[-1].lower()
        by_name = {"vision": "vision", "visual": "vision", "image": "vision", "audio": "audio"}
        if type(getattr(module, "config", None)) in kinds:
            towers[path] = kinds[type(module.config)]
        elif not kinds and any(word in last for word in by_name) and any(map(_is_linear, module.modules())):
            towers[path] = next(tower for word, tower in by_name.items() if word in last)
    return {base_path(path): tower for path, tower in towers.items()}


def _tower_of(name: str, towers: dict[str, str]) -> str:
    return next((tower for path, tower in towers.items() if name.startswith(path + ".")), "language")


def find_heads(model: nn.Module) -> list[str]:
    """Paths of the output head of a Transformers model."""
    getter: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = getter()
    return [path for path, module in model.named_modules() if module is head]
