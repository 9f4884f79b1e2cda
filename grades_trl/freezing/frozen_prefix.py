"""Keeps backward out of the frozen prefix of a model: nothing below the first tensor that trains is recorded.

`requires_grad=False` alone does not do that. A gradient still flows down through every frozen layer as long as the
input of the first one requires it, and it does: with gradient checkpointing, Transformers and PEFT make the output of
the embeddings require a gradient, and each frozen layer is then run a second time and propagated through.

So the leading blocks in which nothing trains, with nothing that trains upstream of them, run under `no_grad` and
without checkpointing. Gradients of all that is still live are the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from grades_trl.freezing.activation_cache import PrefixCache, draws_at_random
from grades_trl.model.matrices import base_path, find_blocks, find_heads, towers_of_modules

TOUCHED = ("forward", "gradient_checkpointing")


class PrefixCut:
    """
    The cut of one model, moved up as matrices freeze.

    What is upstream of what is not guessed from names: the order in which the blocks, and the other modules that own
    parameters, are called is recorded. A pass may leave some out (a vision tower, without images).

    Args:
        model (`nn.Module`): the model that trains.
        cache_bytes (`int`, *optional*, defaults to `0`): CPU memory for the outputs of the cut language blocks, to be
            read when a sample comes back (see `caching.py`); 0 is off.

    Attributes:
        cache (`PrefixCache` or `None`): if there is one.
        depths (`dict[str, int]`): list of blocks, by its path in the base model -> number of its leading blocks that
            backward does not enter.
        blocks (`set[str]`): paths of all these blocks.
    """

    def __init__(self, model: nn.Module, cache_bytes: int = 0):
        self.cache = PrefixCache(cache_bytes) if cache_bytes else None
        self._model = model
        self.depths: dict[str, int] = {}
        self.blocks: set[str] = set()
        self._stacks = find_blocks(model)
        self._towers = towers_of_modules(model)
        inside = tuple(block + "." for block in self._stacks)
        self._units = {
            path: module
            for path, module in model.named_modules()
            if path in self._stacks or (not path.startswith(inside) and any(True for _ in _own(module)))
        }
        for head in find_heads(model):  # called last, or not at all: TRL's chunked loss reads its weight
            for path in [path for path in self._units if f"{path}.".startswith(f"{head}.")]:  # and PEFT's copy of it
                del self._units[path]
        self._order: dict[str, None] = {}  # paths by first call, of this pass or the last
        self._orders: set[tuple[str, ...]] = set()  # all different ones before
        self._before: dict[str, dict[str, Any]] = {}  # attributes of the cut blocks as they were
        self._hooks = [m.register_forward_pre_hook(self._note(path)) for path, m in self._units.items()]
        # Before each pass of the whole model: `for_training()` of Unsloth turns checkpointing on again in all blocks.
        self._hooks.append(model.register_forward_pre_hook(self._begin_pass, with_kwargs=True))

    def _note(self, path: str) -> Callable:
        def hook(*_: Any) -> None:
            self._order.setdefault(path)

        return hook

    @property
    def skipped_layers(self):
        return self.depths

    def update(self) -> bool:
        """Moves the cut to where the frozen prefix ends now, and says whether it moved. Call it between two passes."""
        blocks: set[str] = set()
        for tower in {self._towers[path] for path in self._stacks}:
            blocks |= self._prefix(tower)
        if blocks == self.blocks:
            return False
        self.remove()
        self.blocks = blocks
        cache = self._usable_cache()
        for path in blocks:
            stack, index = self._stacks[path]
            self.depths[base_path(stack)] = max(self.depths.get(base_path(stack), 0), index + 1)
        for path in blocks:
            stack, index = self._stacks[path]
            block = self._units[path]
            self._before[path] = {name: vars(block)[name] for name in TOUCHED if name in vars(block)}
            last = index + 1 == self.depths[base_path(stack)]
            feeds_a_live_block = last and f"{stack}.{index + 1}" in self._stacks
            _run_without_grad(block, feeds_a_live_block, cache, last and self._towers[path] == "language")
        return True

    def _usable_cache(self) -> PrefixCache | None:
        """The cache stands for all cut blocks of a decoder, and for the encoders whose output goes nowhere else."""
        stacks = {self._stacks[path][0] for path in self.blocks if self._towers[path] == "language"}
        usable = self.cache is not None and len(stacks) == 1 and not draws_at_random(self._model)
        return self.cache if usable else None

    def _prefix(self, tower: str) -> set[str]:
        """The blocks of a tower that come before the first module that trains, in every pass that was seen.

        All that was called before is upstream of the language blocks; for an encoder, all of its own that was. What
        was never called could be upstream too.
        """
        relevant = {path for path in self._units if tower in ("language", self._towers[path])}
        orders = self._orders | {tuple(self._order)}
        called = {path for order in orders for path in order}
        if any(self._trains(path) for path in relevant - called):
            return set()
        before: set[str] = set()
        after: set[str] = set()
        for order in orders:
            trained = False
            for path in (path for path in order if path in relevant):
                trained = trained or self._trains(path)
                if path in self._stacks and self._towers[path] == tower:
                    (after if trained else before).add(path)
        return before - after

    @property
    def called(self) -> list[str]:
        """What was called in this pass, or the last."""
        return list(self._order)

    def dead_ends(self, called: list[str], unreached: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """What trains in blocks and modules that were called without a gradient coming back to any of it: nothing
        uses their output. So it is with the last layer of LLaVA-1.5's vision tower (`vision_feature_layer=-2`)."""
        nowhere = {id(p) for p in unreached}
        trained = [[p for p in self._parameters(path) if p.requires_grad] for path in called]
        return [p for group in trained if all(id(p) in nowhere for p in group) for p in group]

    def _parameters(self, path: str) -> Iterator[nn.Parameter]:
        module = self._units[path]
        return module.parameters() if path in self._stacks else _own(module)

    def _trains(self, path: str) -> bool:
        return any(p.requires_grad for p in self._parameters(path))

    def upstream(self, first: str) -> list[nn.Module]:
        """What feeds the first block (a path) within its tower: embeddings of tokens, patches, positions."""
        order = next((o for o in (*self._orders, tuple(self._order)) if first in o), ())
        before = order[: order.index(first)] if order else ()
        same_tower = (path for path in before if self._towers[path] == self._towers[first])
        return [self._units[path] for path in same_tower if path not in self._stacks]

    def _begin_pass(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.cache is not None and self.blocks and model.training:
            self.cache.begin_pass({} if args else kwargs)
        if self._order:
            self._orders.add(tuple(self._order))
            self._order = {}
        for path in self.blocks:
            self._units[path].gradient_checkpointing = False  # type: ignore[assignment]

    def remove(self) -> None:
        """Gives the blocks their own forward back."""
        for path in self.blocks:
            attributes = vars(self._units[path])
            for name in TOUCHED:
                attributes.pop(name, None)
            attributes.update(self._before.pop(path))
        self.blocks, self.depths = set(), {}
        if self.cache is not None:
            self.cache.clear()

    def forget_outputs(self) -> None:
        """Empties the cache: the weights that its outputs come from have changed."""
        if self.cache is not None:
            self.cache.clear()

    def close(self) -> None:
        """Leaves the model as it was found."""
        self.remove()
        for hook in self._hooks:
            hook.remove()


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    return module.parameters(recurse=False)


def _run_without_grad(block: nn.Module, feeds_a_live_block: bool, cache: PrefixCache | None, last: bool) -> None:
    forward = block.forward

    def no_grad_forward(*args: Any, **kwargs: Any) -> Any:
        if not block.training:
            return forward(*args, **kwargs)
        if cache is not None and cache.output is not None:
            output = cache.output if last else args[0]
        else:
            with torch.no_grad():
                output = forward(*args, **kwargs)
            if cache is not None and last and isinstance(output, torch.Tensor):
                cache.store(output)
        if feeds_a_live_block and _checkpoints_reentrantly(block):
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            hidden.requires_grad_(True)
        return output

    block.forward = no_grad_forward  # type: ignore[method-assign]


def _checkpoints_reentrantly(block: nn.Module) -> bool:
    """Reentrant checkpointing of the next block gives no gradients at all unless its input requires one.

    Only torch's own function can be asked. Unsloth's is always reentrant, also where its caller says
    `use_reentrant=False`; taking another one for reentrant costs the gradient of one input at most.
    """
    function = getattr(block, "_gradient_checkpointing_func", None)
    if function is None:
        return False
    is_torch_s = getattr(function, "func", function).__module__ == "torch.utils.checkpoint"
    return not is_torch_s or getattr(function, "keywords", {}).get("use_reentrant", True)
