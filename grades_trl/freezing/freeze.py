"""Takes tensors out of training and gives them back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from grades_trl.model.structure import is_lora


class Freezer:
    """
    The tensors of one model that are out of training.

    `requires_grad=False` skips their share of the backward pass. `grad=None` makes optimizers skip them, weight decay
    and momentum included; a stale gradient would still be clipped and applied. The tensors stay in the parameter
    groups, so that checkpoints keep loading. Only their optimizer state is released. (bitsandbytes never frees the
    state of its paged optimizers. It is no longer touched, and the driver moves it to the host when memory is short.)

    PEFT sets `requires_grad` of all adapters again whenever it enables them, as after the reference pass of DPO. So it
    is told which weights of an adapter stay frozen, by its own `frozen_peft_weight_names`. The dropout of a frozen
    adapter is off: it learns nothing any more, and a frozen tower whose outputs are the same each time can be cached.
    PEFT has no such names for copies of whole modules (`modules_to_save`): `hold` takes those out again.

    Args:
        model (`nn.Module`): the model that trains, wrapped by PEFT or not.
        optimizer (`torch.optim.Optimizer`, *optional*): any with a `state` keyed by tensor, accelerate's wrapper too.

    Attributes:
        frozen (`list[nn.Parameter]`): what was frozen here.
    """

    def __init__(self, model: nn.Module, optimizer: Any = None):
        self.optimizer = optimizer
        self.frozen: list[nn.Parameter] = []
        self._probed: list[nn.Parameter] = []
        # Where PEFT keeps a tensor: its module, the adapter, the name of the weight.
        self._places: dict[int, tuple[Any, str, str]] = {}
        adapted: list[Any] = [module for module in model.modules() if is_lora(module)]
        for module in adapted:
            for name in module.adapter_layer_names:
                for adapter, weight in getattr(module, name).items():
                    for parameter in [weight] if isinstance(weight, nn.Parameter) else weight.parameters():
                        self._places[id(parameter)] = module, adapter, name
        self._declared: list[tuple[Any, dict[str, tuple[str, ...]] | None]] = []  # what PEFT was told before
        self._dropouts: list[tuple[nn.Dropout, float]] = []  # that are off here, and what they dropped before

    def freeze(self, parameters: Iterable[nn.Parameter]) -> None:
        """Takes tensors out of training. Their values stay bit-identical until `unfreeze`. What is frozen already, by
        whomever, is left alone."""
        probed = {id(parameter) for parameter in self._probed}
        for parameter in parameters:
            if not parameter.requires_grad or id(parameter) in probed:
                continue
            parameter.requires_grad_(False)
            parameter.grad = None
            if self.optimizer is not None:
                self.optimizer.state.pop(parameter, None)
            self.frozen.append(parameter)
            if id(parameter) in self._places:
                module, adapter, name = self._places[id(parameter)]
                self._declare(module, adapter, name)
                self._turn_dropout_off(module, adapter)

    def hold(self) -> None:
        """Takes out of training again what others have put back since `freeze`. Called before each pass, and before
        the gradients of a step are used."""
        probed = {id(parameter) for parameter in self._probed}
        for parameter in self.frozen:
            if parameter.requires_grad and id(parameter) not in probed:
                parameter.requires_grad_(False)
                parameter.grad = None

    def probe(self, parameters: Iterable[nn.Parameter]) -> None:
        """Lets tensors that are frozen here have a gradient, until `end_probe`."""
        self._probed = list(parameters)
        for parameter in self._probed:
            parameter.requires_grad_(True)

    def forget_gradients(self) -> None:
        """Drops the gradients of what is probed, so that no optimizer sees them."""
        for parameter in self._probed:
            parameter.grad = None

    def end_probe(self) -> None:
        """Takes what was probed out of training again."""
        self.forget_gradients()
        for parameter in self._probed:
            parameter.requires_grad_(False)
        self._probed = []

    def unfreeze(self) -> None:
        """Gives all tensors that were frozen here back to training. Their values stay as they are."""
        self.end_probe()
        for module, names in reversed(self._declared):
            if names is None:
                del module.frozen_peft_weight_names  # back to that of the class
            else:
                module.frozen_peft_weight_names = names
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        for dropout, p in self._dropouts:
            dropout.p = p
        self.frozen, self._declared, self._dropouts = [], [], []

    def _turn_dropout_off(self, module: Any, adapter: str) -> None:
        dropout = dict(module.lora_dropout.items()).get(adapter)
        if isinstance(dropout, nn.Dropout) and dropout.p > 0:
            self._dropouts.append((dropout, dropout.p))
            dropout.p = 0.0  # `eval()` would not last: the Trainer calls `train()` in each step

    def _declare(self, module: Any, adapter: str, name: str) -> None:
        self._declared.append((module, vars(module).get("frozen_peft_weight_names")))
        names = module.frozen_peft_weight_names
        module.frozen_peft_weight_names = names | {adapter: (*names.get(adapter, ()), name)}
