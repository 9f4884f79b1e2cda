"""What of a model trains: `--train_towers` and `--train_layers`. And what that choice can save, for the table at the
start of a run.
"""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from grades_trl.model import (
    TOWERS,
    WeightMatrix,
    find_layers,
    find_matrices,
    towers_of_modules,
    towers_of_parameters,
    untracked_matrices,
)
from grades_trl.model.flops import TokenCounter, experts_per_token, step_flops
from grades_trl.model.structure import (
    base_path,
    embeddings_train,
    find_heads,
    locate,
)

INDICES = re.compile(r"(\d+)(?:-(\d+))?")
FRACTIONS = re.compile(r"(\d*\.?\d+|\d+\.)-(\d*\.?\d+|\d+\.)")
EXPECTED = "expected layer indices (14-29), a part of the depth (0.5-1.0) or a glob pattern (*.layers.2?)"


def chosen_modules(model: nn.Module, towers: Collection[str] | None = None, layers: str | None = None) -> set[str]:
    """The modules whose own parameters train.

    A module is chosen if both arguments let it train. `layers` names layers, and what is outside of them comes with
    them or does not train. What a tower has in front of its layers or beside them (embeddings, norms) trains if its
    first layer is chosen as a whole: below a frozen layer, the backward pass would have to go down to it. An output
    head of its own trains if the last language layer is chosen as a whole. A tied one is the matrix of the embeddings,
    and goes with them.

    Args:
        model (`nn.Module`): not wrapped by PEFT.
        towers (`Collection[str]`, *optional*, defaults to all): those that train, such as `"vision"`.
        layers (`str`, *optional*, defaults to all): any of these, separated by commas. Indices of language layers,
            `14-29` or `7`, both ends included. A part of the depth of the language tower, `0.5-1.0`: the layers whose
            middle lies in it. A glob pattern of paths of layers, towers or modules: what it matches trains with all
            that is inside; `?` is any character but a dot.

    Returns:
        `set[str]`: paths.

    Raises:
        ValueError: nothing is chosen, the model does not have it, or it is no choice at all.
    """
    tower_of = towers_of_modules(model)
    present = {tower for path, tower in tower_of.items() if _has_own_parameters(model, path)}
    has = f"{type(model).__name__} has {', '.join(sorted(present, key=TOWERS.index))}"
    unknown = set(towers or ()) - present
    if unknown or (towers is not None and not towers):
        raise ValueError(f"train_towers is {' '.join(towers or ()) or 'empty'}; {has}.")
    allowed = {path for path, tower in tower_of.items() if towers is None or tower in towers}
    if layers is None:
        return allowed

    items = [item.strip() for item in layers.split(",")]
    picked = set().union(*(_pick(model, item) for item in items))
    chosen = {path for path in tower_of if not picked.isdisjoint(_path_and_parents(path))}
    chosen = (chosen | _outside_of_layers(model, tower_of, chosen)) & allowed
    if not any(_has_own_parameters(model, path) for path in chosen):
        raise ValueError(
            f"train_layers {layers} chooses nothing of the towers that train ({', '.join(towers or ())}). The layers "
            f"are {_what_there_is(model)}."
        )
    return chosen


def _pick(model: nn.Module, item: str) -> set[str]:
    """The paths that one item of `--train_layers` names."""
    indices, fractions = INDICES.fullmatch(item), FRACTIONS.fullmatch(item)
    if not item:
        raise ValueError(f"train_layers has an empty item; {EXPECTED}. The layers are {_what_there_is(model)}.")
    if indices or fractions:
        layers = language_layers(model)
        if indices:
            first, last = int(indices[1]), int(indices[2] or indices[1])
            found = list(range(first, last + 1)) if last < len(layers) else []
        else:
            assert fractions is not None
            low, high = float(fractions[1]), float(fractions[2])
            found = [i for i in range(len(layers)) if low <= (i + 0.5) / len(layers) < high and high <= 1]
        if not found:
            raise ValueError(
                f"train_layers {item}: the language tower of {type(model).__name__} has {len(layers)} layers, 0 to "
                f"{len(layers) - 1}; {EXPECTED}, from low to high."
            )
        return {layers[i] for i in found}
    pattern = re.compile(fnmatch.translate(item.replace("?", "[!.]")))
    matched = {path for path, _ in model.named_modules() if path and pattern.match(path)}
    if not matched:
        raise ValueError(
            f"train_layers {item} matches nothing in {type(model).__name__}; {EXPECTED}. The layers are "
            f"{_what_there_is(model)}."
        )
    return matched


def language_layers(model: nn.Module) -> list[str]:
    """Paths of the layers of the language tower, from the first to the last.

    Raises:
        ValueError: it has none, or several lists of them, so that an index does not say which layer is meant.
    """
    tower_of = towers_of_modules(model)
    lists: dict[str, list[str]] = {}
    for path, (stack, _) in find_layers(model).items():
        if tower_of[path] == "language":
            lists.setdefault(stack, []).append(path)
    if len(lists) != 1:
        raise ValueError(
            f"train_layers: {type(model).__name__} has {len(lists)} lists of language layers, so an index says "
            f"nothing. Choose by patterns: the layers are {_what_there_is(model)}."
        )
    return next(iter(lists.values()))


def whole_language_layers(model: nn.Module, chosen: Collection[str]) -> list[int] | None:
    """Indices of the chosen language layers, where nothing but whole language layers is chosen inside layers and
    between towers; `None` otherwise. That is what Unsloth and PEFT call `layers_to_transform`."""
    layers, tower_of = find_layers(model), towers_of_modules(model)
    if len({stack for path, (stack, _) in layers.items() if tower_of[path] == "language"}) != 1:
        return None
    if any(tower_of[path] != "language" for path in chosen):
        return None
    inside = {path: layer for path in tower_of if (layer := locate(f"{path}.", layers))}
    whole = {layer for path, layer in inside.items() if path in chosen}
    if any(layer in whole and path not in chosen for path, layer in inside.items()):
        return None
    return sorted(layers[layer][1] for layer in whole)


def _outside_of_layers(model: nn.Module, tower_of: dict[str, str], chosen: Collection[str]) -> set[str]:
    """What trains with a tower's first and last layer, see `chosen_modules`."""
    layers = find_layers(model)
    heads = set() if _is_tied(model) else set(find_heads(model))
    found: set[str] = set()
    for tower in {tower_of[path] for path in layers}:
        of_tower = [path for path in layers if tower_of[path] == tower]
        if of_tower[0] in chosen:
            outside = {path for path, its in tower_of.items() if its == tower and not locate(f"{path}.", layers)}
            found |= outside - heads
        if tower == "language" and of_tower[-1] in chosen:
            found |= heads
    return found


def _is_tied(model: Any) -> bool:
    if not find_heads(model):
        return False
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _has_own_parameters(model: nn.Module, path: str) -> bool:
    return any(True for _ in model.get_submodule(path).parameters(recurse=False))


def _path_and_parents(path: str) -> Iterator[str]:
    return itertools.accumulate(path.split("."), lambda parent, name: f"{parent}.{name}")


def _what_there_is(model: nn.Module) -> str:
    tower_of = towers_of_modules(model)
    last = {stack: (index, tower_of[path]) for path, (stack, index) in find_layers(model).items()}
    return ", ".join(f"{stack}.0 to {stack}.{index} ({tower})" for stack, (index, tower) in last.items()) or "none"


# ---- the table at the start ----


@dataclass(frozen=True)
class ChoiceFlops:
    """
    What a training step costs before anything freezes, as a fraction of a step in which everything trains.

    FLOPs as in `grades_trl.model.flops`. Everything: all weights inside of the layers, or under LoRA adapters on all
    linear layers there. The leading layers in which nothing trains cost a forward pass only.

    Attributes:
        step (`float`): a step of this choice.
    """

    step: float = 1.0


def choice_flops(trainer: Any) -> ChoiceFlops:
    """What the choice costs, from the model and the first rows of a trainer that has not trained yet."""
    model, towers = trainer.model, set(towers_of_parameters(trainer.model).values())
    tokens = None  # with one tower their number does not matter
    if len(towers) > 1:
        counter = TokenCounter()
        rows = list(itertools.islice(trainer.train_dataset, trainer.args.per_device_train_batch_size))
        counter.add(trainer.data_collator(rows), model.config)
        tokens = counter.per_batch()
    return flops_of(model, checkpointing=trainer.args.gradient_checkpointing, tokens=tokens)


def flops_of(model: nn.Module, checkpointing: bool = False, tokens: dict[str, float] | None = None) -> ChoiceFlops:
    """What the choice costs.

    Args:
        model (`nn.Module`): as it trains, wrapped by PEFT or not.
        checkpointing (`bool`, *optional*, defaults to `False`): of gradients.
        tokens (`dict[str, float]`, *optional*): tower -> tokens per step; by default as many in each.
    """
    of_choice, everything = absolute_flops(model, checkpointing, tokens)
    return ChoiceFlops(of_choice / everything)


def absolute_flops(
    model: nn.Module, checkpointing: bool = False, tokens: dict[str, float] | None = None
) -> tuple[float, float]:
    """FLOPs of a step of the choice, and of a step in which everything trains. Arguments as in [`flops_of`]."""
    tracked = _tracked(model)
    adapters = [matrix for matrix in tracked if matrix.lora]
    rank = None
    if adapters:
        *experts, rows, columns = adapters[0].shape
        rank = max(1, round(adapters[0].params / ((rows + columns) * (experts[0] if experts else 1))))
    untracked = untracked_matrices(model, tracked)
    settings: Any = {
        "tokens": tokens,
        "checkpointing": checkpointing,
        "experts_per_token": experts_per_token(getattr(model, "config", None)),
    }
    everything = step_flops([*tracked, *(_with_adapter(matrix, rank) for matrix in untracked)], **settings)
    frozen = {matrix.name for matrix in untracked}
    of_choice = step_flops([*tracked, *untracked], frozen=frozen, skipped_layers=_skipped_layers(model), **settings)
    return of_choice, everything


def _tracked(model: nn.Module) -> list[WeightMatrix]:
    """The matrices inside of layers that train; none where only a projector does."""
    return [matrix for matrix in find_matrices(model, projector=True).values() if matrix.stack]


def _with_adapter(matrix: WeightMatrix, rank: int | None) -> WeightMatrix:
    """The matrix as it would train: with a LoRA adapter if the others have one."""
    if rank is None or len(matrix.shape) != 2:
        return matrix
    rows, columns = matrix.shape
    factors = [nn.Parameter(torch.empty(shape, device="meta")) for shape in ((rank, columns), (rows, rank))]
    return WeightMatrix(
        matrix.name, matrix.layer, matrix.role, matrix.tower, matrix.stack, matrix.shape, tuple(factors)
    )


def _skipped_layers(model: Any) -> dict[str, int]:
    """Path of a list of layers -> number of its leading layers that the backward pass does not have to enter."""
    layers, tower_of = find_layers(model), towers_of_parameters(model)
    is_reached = {"language"} if embeddings_train(model) else set()
    live: set[str] = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = locate(name, layers)
        live.add(layer)
        if tower_of[name] != "language":  # it feeds the language tower
            is_reached |= {"language"} if layer else {"language", tower_of[name]}
    skipped: dict[str, int] = {}
    tower_of_module = towers_of_modules(model)
    for path, (stack, index) in layers.items():
        tower = tower_of_module[path]
        if path in live:
            is_reached.add(tower)
        if tower not in is_reached:
            skipped[base_path(stack)] = index + 1
    return skipped


def format_choice(model: nn.Module, flops: ChoiceFlops) -> str:
    """The choice as a table, a line for each tower, and what it can save, in 80 columns."""
    matrices, layers, tower_of = _tracked(model), find_layers(model), towers_of_parameters(model)
    tower_of_module = towers_of_modules(model)
    unmeasured: list[str] = []
    lines = [f"{'tower':<10} {'layers':>7} {'matrices tracked':>17} {'parameters':>16} {'trainable':>16}"]
    for tower in (tower for tower in TOWERS if tower in tower_of.values()):
        parameters = [p for name, p in model.named_parameters() if tower_of[name] == tower]
        count = sum(tower_of_module[path] == tower for path in layers)
        tracked = sum(matrix.tower == tower for matrix in matrices)
        trainable = sum(_elements(p) for p in parameters if p.requires_grad)
        if trainable and not tracked and tower != "projector":
            unmeasured.append(tower)
        lines.append(
            f"{tower:<10} {count or '-':>7} {tracked:>17} {sum(map(_elements, parameters)):>16,} {trainable:>16,}"
        )
    if unmeasured:
        lines.append(f"nothing is measured in: {', '.join(unmeasured)} (no linear layer in a list of layers trains)")
    if flops.step < 1:
        lines.append(f"limit of this choice: {1 / flops.step:.2f}x less time for a step than training everything")
    return "\n".join(lines)


def _elements(parameter: nn.Parameter) -> int:
    """Weights, of which a tensor of 4-bit weights packs two into each byte."""
    is_packed = type(parameter).__name__ == "Params4bit" and not parameter.is_floating_point()
    return parameter.numel() * (2 * parameter.element_size() if is_packed else 1)
