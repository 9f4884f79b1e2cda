"""Whether the loss of TRL's SFTTrainer fits a model: it takes the logits, or hidden states, to stand where the labels
do."""

from __future__ import annotations

import functools
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def refuse_misplaced_labels(model: nn.Module, loss_type: str) -> list[RemovableHandle]:
    """
    Refuses, in a training pass, a model that SFTTrainer cannot train.

    GIT puts its image in front of the text, and has more logits than labels. `loss_type="chunked_nll"`, the default,
    would compare each label with the hidden state of another token, without a word; the other losses end in a
    RuntimeError. `chunked_nll` also needs a base model that gives hidden states, which Kosmos 2, BLIP-2 and Llama 4
    have not, and hands the labels to no decoder (T5, Florence 2).

    Args:
        model (`nn.Module`): that SFTTrainer has prepared, with adapters or without.
        loss_type (`str`): of its arguments.

    Returns:
        `list`: handles of the hooks, to be removed after the first step. A pass raises their `ValueError`.

    Raises:
        ValueError: an encoder-decoder with `chunked_nll`.
    """
    # With prompt tuning, PEFT puts virtual tokens before both the hidden states and the labels that it hands on.
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if loss_type != "chunked_nll":
        return [base.register_forward_hook(_compare_logits, with_kwargs=True)]
    if base.config.is_encoder_decoder:
        raise _needs_nll(base, "reads nothing in its decoder then")
    labels: list[Any] = [None]
    return [
        base.register_forward_pre_hook(functools.partial(_keep_labels, labels), with_kwargs=True),
        base.base_model.register_forward_hook(
            functools.partial(_compare_hidden_states, base, labels), with_kwargs=True
        ),
    ]


def _compare_logits(base: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    logits = getattr(output, "logits", None)
    if base.training and isinstance(logits, Tensor):
        # With another loss than the model's, the Trainer keeps the labels, which are as long as the tokens.
        _compare(base, logits, kwargs.get("labels", kwargs.get("input_ids")), "logits")


def _keep_labels(labels: list[Any], base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    labels[0] = kwargs.get("labels", labels[0])  # a base model that is the model itself is called again, without them


def _compare_hidden_states(
    base: nn.Module, labels: list[Any], module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
) -> None:
    if not base.training or labels[0] is None or "labels" in kwargs:
        return
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        raise _needs_nll(base, "gives no hidden states without logits")
    _compare(base, hidden, labels[0], "hidden states")


def _needs_nll(base: nn.Module, problem: str) -> ValueError:
    return ValueError(
        f"SFTTrainer cannot train {type(base).__name__} with loss_type 'chunked_nll' (its default): the model "
        f"{problem}. Set loss_type='nll' (--loss_type nll)."
    )


def _compare(base: nn.Module, of_model: Tensor, labels: Any, kind: str) -> None:
    if isinstance(labels, Tensor) and of_model.shape[:2] != labels.shape:
        raise ValueError(
            f"SFTTrainer cannot train {type(base).__name__}: the model has {of_model.shape[1]} {kind} for "
            f"{labels.shape[1]} labels in a row, so that labels would be compared with those of other tokens. Train "
            "it by its own loss, with transformers.Trainer (class Mine(GradESMixin, Trainer)), or choose another "
            "model."
        )
