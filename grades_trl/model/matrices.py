"""Finds the weight matrices of any model by structure: no list of model names.

A matrix is the 2-D weight of a linear layer inside a repeated layer, or a 3-D expert weight there. Under LoRA it is
the pair of adapters of such a weight. Embeddings, norms, biases and the output head are never tracked (arXiv
2509.01842, section 3).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from grades_trl.model.structure import (
    base_path,
    find_heads,
    find_layers,
    find_routers,
    is_adapter,
    is_linear,
    is_lora,
    locate,
    stacked_weights,
)
from grades_trl.model.towers import find_towers, tower_of

# Where a tower stands on the way from input to output.
TOWER_ORDER = {"vision": 0, "audio": 0, "projector": 1, "language": 2}


@dataclass(frozen=True, eq=False)
class WeightMatrix:
    """One tracked weight matrix.

    Attributes:
        name (`str`): full path of the weight's module in the base model, e.g. `model.layers.3.self_attn.q_proj`; for
            an expert weight, of the weight itself: `model.layers.3.mlp.experts.gate_up_proj`.
        layer (`int`): index of its layer, counted from the input; -1 outside the layers (projectors).
        role (`str`): what it is in its layer, e.g. `q_proj`, `down_proj`, `qkv`, `experts.gate_up_proj`.
        tower (`str`): `"language"`, `"vision"`, `"audio"` or `"projector"`.
        stack (`str`): path of the list of layers it belongs to, e.g. `model.layers`; `""` outside the layers.
        shape (`tuple[int, ...]`): of the full weight that it is or adapts: (out, in), or (experts, out, in) as the
            model stores it.
        parameters (`tuple[nn.Parameter, ...]`): what trains: the weight itself, or all LoRA factors of the weight.
    """

    name: str
    layer: int
    role: str
    tower: str
    stack: str
    shape: tuple[int, ...]
    parameters: tuple[nn.Parameter, ...]

    @property
    def params(self) -> int:
        """Number of trainable elements."""
        return sum(p.numel() for p in self.parameters)

    @property
    def lora(self) -> bool:
        """Whether low-rank factors train here, and the weight itself does not."""
        return len(self.parameters) > 1 or self.params != math.prod(self.shape)


def find_matrices(model: nn.Module, projector: bool = False) -> dict[str, WeightMatrix]:
    """All weight matrices of `model` that train, in the order of its modules.

    Args:
        model (`nn.Module`): a Transformers or plain PyTorch model, wrapped by PEFT or not. Call it after LoRA layers
            have been added and after anything has been frozen by hand: what does not require a gradient is left out.
        projector (`bool`, *optional*, defaults to `False`): also take the linear layers between two towers (mergers,
            multi-modal projectors). The paper never tracks them.

    Returns:
        `dict[str, WeightMatrix]`: keyed by name.

    Raises:
        ValueError: nothing to track, with the reason; adapters of a kind that GradES does not track.
    """
    layers, towers, heads = find_layers(model), find_towers(model), find_heads(model)
    _refuse_other_adapters(model, layers)
    routers = find_routers(model, layers)
    found: list[tuple[str, str, int, str, tuple[nn.Parameter, ...], tuple[int, ...]]] = []
    taken: set[int] = set()
    for path, name, parameters, shape in _trainable_weights(model):
        if (
            path in heads or path in routers or id(parameters[0]) in taken
        ):  # PEFT's `modules_to_save` wraps a layer and shows its weight
            continue
        taken.add(id(parameters[0]))
        layer = locate(path, layers)
        if layer:
            stack, index = layers[layer]
            found.append((name, base_path(stack), index, name.removeprefix(base_path(layer) + "."), parameters, shape))
        elif projector and tower_of(base_path(path), towers) == "projector":
            found.append((name, "", -1, name, parameters, shape))
    roles = _roles({(stack, inner) for _, stack, _, inner, _, _ in found})
    matrices = {
        name: WeightMatrix(
            name=name,
            layer=index,
            role=roles[stack, inner],
            tower=tower_of(name, towers),
            stack=stack,
            shape=shape,
            parameters=parameters,
        )
        for name, stack, index, inner, parameters, shape in found
    }
    if not matrices:
        lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        raise ValueError(
            f"GradES found no weight matrix to track in {type(model).__name__}: expected linear layers that require a "
            f"gradient inside a ModuleList of layers; found {len(layers)} such layers and "
            f"{sum(p.requires_grad for p in model.parameters())} trainable tensors. Looked at the lists "
            f"{', '.join(lists[:10]) or 'none'}. Add LoRA adapters or unfreeze weights before the trainer is built."
        )
    return matrices


def untracked_matrices(model: nn.Module, tracked: Iterable[WeightMatrix]) -> list[WeightMatrix]:
    """The weights inside of layers that do not train, each as the matrix that it would be in full fine-tuning: frozen
    before training, or without an adapter. A step multiplies by them all the same."""
    layers, towers = find_layers(model), find_towers(model)
    routers, names = find_routers(model, layers), {matrix.name for matrix in tracked}
    found: dict[str, WeightMatrix] = {}
    for path, module in model.named_modules():
        layer = locate(f"{path}.", layers)
        if not layer or ".lora_" in path or path in routers:
            continue
        shapes = {f"{path}.{name}": shape for name, shape in stacked_weights(module).items()}
        if is_linear(module):  # a packed weight of 4 bits has no shape of its own
            module_: Any = module
            has_features = hasattr(module, "out_features") and hasattr(module, "in_features")
            shapes = {
                path: (module_.out_features, module_.in_features) if has_features else tuple(module_.weight.shape)
            }
        for name, shape in shapes.items():
            name = base_path(name)
            if name in names or name in found:  # the layer inside of an adapter has the name of the adapter
                continue
            stack, index = layers[layer]
            role = ".".join(
                part for part in name.removeprefix(base_path(layer)).split(".") if part and not part.isdigit()
            )
            weight = nn.Parameter(torch.empty(shape, device="meta"))
            found[name] = WeightMatrix(name, index, role, tower_of(name, towers), base_path(stack), shape, (weight,))
    return list(found.values())


def matrices_by_layer(model: nn.Module, matrices: dict[str, WeightMatrix]) -> dict[str, list[str]]:
    """Path of a layer -> names of the tracked matrices in it. Layers without any are left out."""
    names: dict[tuple[str, int], list[str]] = {}
    for name, matrix in matrices.items():
        names.setdefault((matrix.stack, matrix.layer), []).append(name)
    places = {path: (base_path(stack), index) for path, (stack, index) in find_layers(model).items()}
    return {path: names[place] for path, place in places.items() if place in names}


def layers_in_order(matrices: dict[str, WeightMatrix]) -> dict[str, list[WeightMatrix]]:
    """Key of a layer -> its tracked matrices, from input to output: encoders, projector, language layers.

    A key is `"<tower>/<stack>/<layer>"`, as in `"vision/model.vision_tower.encoder.layers/0"`. Everything outside the
    layers has one key, `"projector//-1"`.
    """
    layers: dict[str, list[WeightMatrix]] = {}
    for matrix in sorted(matrices.values(), key=lambda m: (TOWER_ORDER[m.tower], m.tower, m.stack, m.layer)):
        layers.setdefault(f"{matrix.tower}/{matrix.stack}/{matrix.layer}", []).append(matrix)
    return layers


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


def describe(model: nn.Module, matrices: dict[str, WeightMatrix]) -> str:
    """The tracked set as a small table, and what trains beside it."""
    groups: dict[tuple[str, str], list[WeightMatrix]] = {}
    for matrix in matrices.values():
        groups.setdefault((matrix.tower, matrix.role), []).append(matrix)
    lines = [f"{'tower':<10} {'role':<24} {'matrices':>8} {'shape (out x in)':>18} {'trainable':>12}"]
    for (tower, role), members in groups.items():
        shapes = {m.shape for m in members}
        shape = " x ".join(map(str, members[0].shape)) if len(shapes) == 1 else f"{len(shapes)} shapes"
        params = sum(m.params for m in members)
        lines.append(f"{tower:<10} {role:<24} {len(members):>8} {shape:>18} {params:>12,}")
    lines.append(f"{'total':<35} {len(matrices):>8} {'':>18} {sum(m.params for m in matrices.values()):>12,}")
    untracked = untracked_parameters(model, matrices)
    if untracked:
        listed = ", ".join(f"{kind} {count:,}" for kind, count in untracked.items())
        lines.append(f"trains, but is not tracked: {listed}")
    return "\n".join(lines)


def _refuse_other_adapters(model: nn.Module, layers: dict[str, tuple[str, int]]) -> None:
    """Adapters other than LoRA train by rules of their own, which no measurement of GradES describes."""
    from peft import PeftModel

    kinds = {
        f"{type(module).__module__}.{type(module).__name__}"
        for path, module in model.named_modules()
        if is_adapter(module) and not is_lora(module) and locate(path, layers) and _adapter_parameters(module)
    }
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        kinds.add(f"peft.{type(model.active_peft_config).__name__}")
    if kinds:
        raise ValueError(
            f"GradES tracks weights and LoRA adapters; {type(model).__name__} trains adapters of another kind "
            f"({', '.join(sorted(kinds))}). Train it without GradES (grades=None), or use LoRA."
        )


def _adapter_parameters(module: nn.Module) -> tuple[nn.Parameter, ...]:
    """What trains in a layer that PEFT wraps, the wrapped layer left out."""
    return tuple(p for n, p in module.named_parameters() if p.requires_grad and not n.startswith("base_layer."))


def _trainable_weights(model: nn.Module) -> Iterator[tuple[str, str, tuple[nn.Parameter, ...], tuple[int, ...]]]:
    """(path of the module, name in the base model, what trains, shape of the full weight) of every linear layer."""
    from peft.tuners.lora.layer import ParamWrapper

    wrapped: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{adapter}.lora_") for adapter in wrapped):
            continue
        if is_lora(module):
            wrapped.append(path)
            parameters = _adapter_parameters(module)
            if not parameters or len(module.lora_A) == 0:  # frozen, or around an embedding
                continue
            if isinstance(module, ParamWrapper):  # `target_parameters`: experts in one tensor, or any other weight
                name, shape = base_path(path), tuple(module.get_param().shape)
                if not is_linear(module.get_base_layer()):
                    shape = stacked_weights(module.get_base_layer()).get(module.parameter_name, shape)
                    name = f"{name}.{module.parameter_name}"
                yield path, name, parameters, shape
            else:
                yield path, base_path(path), parameters, (module.out_features, module.in_features)
        elif is_linear(module) and not is_adapter(module) and module.weight.requires_grad:
            rows, columns = module.weight.shape
            if type(module).__name__ == "Conv1D":  # GPT-2 keeps its weights as (in, out)
                rows, columns = columns, rows
            yield path, base_path(path), (module.weight,), (rows, columns)
        else:
            for name, shape in stacked_weights(module).items():
                parameter, full = getattr(module, name), f"{path}.{name}"
                if parameter.requires_grad:
                    yield full, base_path(full), (parameter,), shape


def _roles(inner_paths: set[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """(stack, path inside a layer) -> role: the shortest ending that no other matrix of the same stack shares.

    Indices (of experts, of the layers in an `nn.Sequential`) are no part of a role.
    """
    unnumbered = {inner: ".".join(p for p in inner.split(".") if not p.isdigit()) or inner for _, inner in inner_paths}
    stacks: dict[str, set[str]] = {}
    for stack, inner in inner_paths:
        stacks.setdefault(stack, set()).add(unnumbered[inner])
    roles = {}
    for stack, inner in inner_paths:
        parts = unnumbered[inner].split(".")
        for length in range(1, len(parts) + 1):
            role = ".".join(parts[-length:])
            if sum(other == role or other.endswith("." + role) for other in stacks[stack]) == 1:
                break
        roles[stack, inner] = role
    return roles
