"""What gradient checkpointing needs of a model beside frozen weights, and where it loses gradients."""

from __future__ import annotations

import functools
from collections import UserDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class _WithGradient(torch.autograd.Function):
    """The same tensor, as the result of an operation: it requires a gradient, and may be changed in place."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


def let_embeddings_be_changed(model: nn.Module) -> list[RemovableHandle]:
    """
    Lets models run that change the output of their frozen embeddings in place (GIT, Kosmos 2).

    Checkpointing and LoRA make that output require a gradient (`enable_input_require_grads`). If the embeddings are
    frozen it is a leaf then, which torch lets nobody change: "a leaf Variable that requires grad is being used in an
    in-place operation" (transformers 5.17). No value changes and nothing is copied.

    Args:
        model (`nn.Module`): with checkpointing as it will be in training.

    Returns:
        `list`: handles of the hooks, to be removed after training.
    """
    names = ("make_inputs_require_grads", "make_inputs_require_grad")  # of transformers, of PEFT
    embeddings = [
        module
        for module in model.modules()
        if any(getattr(hook, "__name__", "") in names for hook in module._forward_hooks.values())
    ]
    return [module.register_forward_hook(_require_gradient, prepend=True) for module in embeddings]


def _require_gradient(module: nn.Module, args: tuple, output: Any) -> Tensor | None:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not isinstance(output, Tensor):
        return None
    if output.requires_grad or not output.is_floating_point():
        return None
    return _WithGradient.apply(output, torch.empty(0, requires_grad=True))


def refuse_lost_gradients(model: nn.Module) -> list[RemovableHandle]:
    """
    Refuses, in a training pass, reentrant checkpointing that would lose gradients.

    It gives a gradient to tensors that a layer gets by position, and only if there is one that requires it. Mllama
    hands its image features over by name, and fails in the backward pass. Layers of Gemma 3n share keys by way of a
    dict. Under LoRA, Idefics' vision layers get nothing that requires a gradient. Both train, with wrong gradients
    (transformers 5.17). A layer that is called without gradients, as in the first cycles of HRM, has none to lose.

    Args:
        model (`nn.Module`): with checkpointing as it will be in training.

    Returns:
        `list`: handles of the hooks, to be removed after the first step. A pass raises their `ValueError`.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    modules = dict(model.named_modules())
    layers = [path for path, module in modules.items() if isinstance(module, GradientCheckpointingLayer)]
    # A layer is checked inside of the checkpoint, where gradients are always off: the modules around it tell whether
    # they were on outside.
    with_gradients: dict[str, bool] = {}
    around = {path for layer in layers for path in _around(layer)}
    handles = [
        modules[path].register_forward_pre_hook(functools.partial(_note, with_gradients, path)) for path in around
    ]
    writers: dict[int, dict[Any, Any]] = {}
    return handles + [
        modules[path].register_forward_pre_hook(
            functools.partial(_refuse, writers, with_gradients, path), with_kwargs=True
        )
        for path in layers
    ]


def _around(path: str) -> Iterator[str]:
    """Paths of the modules around one, the nearest first."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def _note(with_gradients: dict[str, bool], path: str, module: Any, args: tuple) -> None:
    with_gradients[path] = torch.is_grad_enabled()


def _refuse(
    writers: dict[int, dict[Any, Any]],
    with_gradients: dict[str, bool],
    path: str,
    layer: Any,
    args: tuple,
    kwargs: dict[str, Any],
) -> tuple[tuple, dict[str, Any]] | None:
    function: Any = getattr(layer, "_gradient_checkpointing_func", None)
    is_torch_s = getattr(getattr(function, "func", None), "__module__", "") == "torch.utils.checkpoint"
    is_on = layer.gradient_checkpointing and layer.training and is_torch_s
    # With gradients it is the backward pass that calls the layer, or the checkpointing is another one.
    if not is_on or torch.is_grad_enabled() or not function.keywords.get("use_reentrant", True):
        return None
    # A ModuleList is never called.
    if not next((with_gradients[around] for around in _around(path) if around in with_gradients), True):
        return None
    by_name = [name for name, value in kwargs.items() if _requires_grad(value)]
    if by_name:
        raise _lost(layer, f"gets {' and '.join(by_name)} by name")
    if any(p.requires_grad for p in layer.parameters()) and not any(map(_requires_grad, args)):
        raise _lost(layer, "gets nothing that requires a gradient")
    shared = {}
    for name, value in kwargs.items():
        if isinstance(value, dict | UserDict) and (not value or id(value) in writers):  # the layers fill it
            shared[name] = _Shared(value, layer, name, writers.setdefault(id(value), {}))
    return args, kwargs | shared


class _Shared(UserDict):
    """What a layer sees of a dict that layers share. It may not read what another one has computed."""

    def __init__(self, shared: Any, layer: Any, name: str, writers: dict[Any, Any]):
        self.data = shared
        self._layer, self._name, self._writers = layer, name, writers

    def __setitem__(self, key: Any, item: Any) -> None:
        self._writers[key] = self._layer
        self.data[key] = item

    def __getitem__(self, key: Any) -> Any:
        if self._writers.get(key, self._layer) is not self._layer:
            raise _lost(self._layer, f"reads what other layers have put into {self._name}")
        return self.data[key]


def _lost(layer: Any, problem: str) -> ValueError:
    return ValueError(
        f"Reentrant gradient checkpointing loses gradients of this model: {type(layer).__name__} {problem}. Set "
        "gradient_checkpointing_kwargs={'use_reentrant': False} "
        "(--gradient_checkpointing_kwargs '{\"use_reentrant\": false}'), or gradient_checkpointing=False."
    )


def _requires_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
