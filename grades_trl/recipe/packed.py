"""Whether a model keeps packed examples apart: TRL puts several into one row, and only their positions tell."""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel
from trl import SFTConfig

from grades_trl.distributed import is_main

logger = logging.getLogger(__name__)

LENGTH = 8  # tokens of each of the two examples


def warn_if_packed_examples_mix(model: PreTrainedModel, training: SFTConfig, backend: str) -> None:
    """Warns if packing is on, and an example changes what the model makes of the next one in the same row.

    The masks that Transformers makes of positions keep examples apart, and so does FlashAttention. Some layers do not,
    such as state-space models. TRL does not look, and says that all but FlashAttention "may lead to" it. Unsloth has
    masks of its own, which it makes in its trainer, and is not tested.

    Args:
        model (`PreTrainedModel`): that will train. It must take `position_ids`, as TRL gives them.
        training (`SFTConfig`): with `packing` or `padding_free`.
        backend (`str`): `"unsloth"` or `"transformers"`.
    """
    if not (training.packing or training.padding_free) or backend == "unsloth" or not is_main():
        return
    mixing = packed_examples_mix(model)
    if mixing > 0:
        flag = "packing" if training.packing else "padding_free"
        logger.warning(
            f"{flag}: this model mixes the examples that share a row. The one before changes its logits by "
            f"{100 * mixing:.2g} % of the largest. Add --{flag} false, or --attn_implementation flash_attention_2."
        )


def packed_examples_mix(model: PreTrainedModel) -> float:
    """How much the logits of an example depend on the one before it in the row, as a fraction of the largest logit; 0
    if by no more than rounding. Both are short, and the same for every model."""
    tokens = torch.arange(3 * LENGTH, device=model.device)
    first, other, second = tokens.split(LENGTH)
    positions = torch.arange(LENGTH, device=model.device).repeat(2)[None]
    was_training = model.training
    model.eval()  # no dropout
    with torch.no_grad():
        behind_first, behind_other = (
            model(input_ids=torch.cat([before, second])[None], position_ids=positions, use_cache=False).logits[
                0, LENGTH:
            ]
            for before in (first, other)
        )
    model.train(was_training)
    change = float((behind_first - behind_other).abs().max() / behind_first.abs().max())
    return change if change > 4 * torch.finfo(model.dtype).eps else 0.0
