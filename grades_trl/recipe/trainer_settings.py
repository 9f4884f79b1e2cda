"""Arguments that the Trainer looks at when training begins: refused before answers are generated and anything is
trained."""

from __future__ import annotations

from typing import Any

import torch
from transformers import get_scheduler
from transformers.utils import is_liger_kernel_available

from grades_trl.recipe.bad_input import blamed_on

WRONG = (ValueError, TypeError, ImportError)


def check_trainer_settings(trainer: Any) -> None:
    """
    Args:
        trainer: not trained yet. Neither its optimizer nor its schedule is made.

    Raises:
        [`BadInput`]: the optimizer needs a package that is not installed, or an argument; the schedule of the learning
            rate needs, or does not know, one of `lr_scheduler_kwargs`.
        ValueError: an optimizer that leaves no gradients to measure, with GradES.
        ImportError: Liger is not installed, and is to be used.
    """
    args = trainer.args
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ImportError("use_liger_kernel needs liger-kernel, which is not installed: pip install liger-kernel.")
    optimizer, schedule = _name(args.optim), _name(args.lr_scheduler_type)
    updates_in_backward = "layerwise" in optimizer or "lomo" in optimizer
    if updates_in_backward and trainer.grades_config is not None:
        raise ValueError(
            f"optim is {optimizer}, which updates weights during the backward pass and leaves no gradients that "
            "GradES could measure: choose another --optim, or add --grades false."
        )
    if not updates_in_backward:  # to ask these for their arguments puts hooks into the model
        with blamed_on(f"--optim {optimizer}", *WRONG):
            trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
    steps = args.max_steps if args.max_steps > 0 else 10**6
    kwargs = args.lr_scheduler_kwargs or {}
    with blamed_on(f"--lr_scheduler_type {schedule}, with --lr_scheduler_kwargs {kwargs}", *WRONG):
        get_scheduler(
            schedule,
            torch.optim.SGD([torch.zeros(1)], lr=0.0),  # of nothing
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=dict(kwargs),
        )


def _name(choice: Any) -> str:
    return getattr(choice, "value", choice)
