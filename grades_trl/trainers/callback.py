"""`GradESCallback`: GradES in a trainer that cannot be subclassed, such as the one that ms-swift makes."""

from __future__ import annotations

import dataclasses
import logging
import secrets
import weakref
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from grades_trl.config import GradESConfig
from grades_trl.distributed import ONE_PROCESS, refuse_unsupported
from grades_trl.engine import GradES
from grades_trl.model.flops import StepCosts

from .checkpoint import STATE_JSON, load_state, save_state
from .first_step import FirstStep

logger = logging.getLogger(__name__)

# In trainer_state.json: which run, or resumed part of one, has written the checkpoint.
OF_RUN = "GradESCallback"

# Those whose run has begun and not ended: no callback hears of an exception or Ctrl-C.
_running: weakref.WeakSet[GradESCallback] = weakref.WeakSet()


class GradESCallback(TrainerCallback):
    """
    Freezes matrices in any `transformers.Trainer`, and ends its run when nothing is left to train. Where you can
    subclass the trainer, use `GradESMixin`: it also measures held-out rows, keeps the best average and reports.

    ```python
    trainer = Trainer(..., callbacks=[GradESCallback(GradESConfig(metric="grad_change", tau=1.8))])
    ```

    No event of the Trainer shows gradients before they are clipped. So this callback clips: during training it sets
    `args.max_grad_norm` to 0, measures and freezes in `on_pre_optimizer_step`, and clips to the norm that was set.
    What freezes, and all weights, are those of `GradESMixin`. It costs one more pass over the gradients in each step,
    for the norm that the Trainer logs. `training_args.bin` has the 0.

    After an exception or Ctrl-C, call `close()`. A new trainer with a `GradESCallback` does so for the model and the
    arguments that it is given.

    The Trainer writes a checkpoint, and then calls the callback, which adds its state. A process that is killed in
    between leaves a checkpoint that the Trainer takes for whole; here it is an error to resume from it. It is looked
    for in the `output_dir` of the run.

    Args:
        config (`GradESConfig`, *optional*, defaults to `GradESConfig()`): without held-out rows and training accuracy.

    Attributes:
        grades (`GradES` or `None`): the engine, from the beginning of training on.

    Raises:
        ValueError: the configuration needs held-out rows or the training accuracy; when training begins: several
            processes or GPUs, torch_compile, or a checkpoint without the state of this callback, with a damaged one
            or with that of another run.
    """

    def __init__(self, config: GradESConfig | None = None):
        self.config = GradESConfig() if config is None else config
        if self.config.needs_heldout_rows or self.config.stopping == "train_accuracy":
            raise ValueError(
                f"stopping {self.config.stopping!r} and keep {self.config.keep!r} need scores that a callback cannot "
                'compute: set stopping="all_frozen" (or "end_of_schedule") and keep="last", or use GradESMixin.'
            )
        self.grades: Any = None
        self._first_step = FirstStep()
        self._max_grad_norm: float | None = None  # what the user has set

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for earlier in list(_running):
            if earlier._model is kwargs["model"] or earlier._args is args:
                earlier.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        refuse_unsupported(AcceleratorState(), args)
        kind = AcceleratorState().distributed_type.value
        if kind != ONE_PROCESS:
            raise ValueError(
                f"GradESCallback runs in one process, and this run is {kind}: no callback sees what wraps the model, "
                "which has to know what is frozen. Use GradESMixin, or leave the callback out."
            )
        unfit = "deepspeed" if args.deepspeed else "torch_compile" if args.torch_compile else None
        if unfit is not None:
            raise ValueError(f"GradESCallback does not work with {unfit}: leave it out.")
        if self.grades is not None:  # a second train()
            self.grades.close()
        self.grades = GradES(kwargs["model"], self.config, state.max_steps, kwargs["optimizer"])
        self._model, self._args = kwargs["model"], args
        if self._max_grad_norm is None:
            self._max_grad_norm = args.max_grad_norm
        _running.add(self)
        self._checkpointing = args.gradient_checkpointing
        self._first_step.on_train_begin(args, state, control, **kwargs)
        self.grades.criterion.costs = self._step_costs
        if state.global_step:
            self._resume(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", state)
        self._run = secrets.token_hex(8)
        args.max_grad_norm = 0.0
        logger.info("GradES tracks %d weight matrices", len(self.grades.matrices))

    def _step_costs(self) -> StepCosts:
        return dataclasses.replace(self.grades.step_costs(), checkpointing=self._checkpointing)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The Trainer has computed their norm, which has unscaled the gradients of fp16.
        step = state.global_step + 1
        for event in self.grades.step(step):
            logger.info("step %d: %s is frozen (%s)", step, event.matrix, event.reason)
        if self._max_grad_norm:
            torch.nn.utils.clip_grad_norm_(kwargs["model"].parameters(), self._max_grad_norm)

    def _resume(self, checkpoint: Path, state: Any) -> None:
        """
        Raises:
            ValueError: the checkpoint has no state, a damaged one, or one that was not written with it.
        """
        if not (checkpoint / STATE_JSON).exists():
            raise ValueError(
                f"{checkpoint / STATE_JSON} is missing: the run was killed while it saved, it was written without "
                "GradESCallback or with save_only_model, or the checkpoint is not in output_dir. Resume from the "
                "checkpoint before it, or leave the callback out."
            )
        saved = load_state(checkpoint)
        if saved.pop("run") != state.stateful_callbacks.get(OF_RUN):
            raise ValueError(
                f"{checkpoint / STATE_JSON} is of another run than {TRAINER_STATE_NAME} beside it, as after a kill "
                "while an older checkpoint was overwritten, or where the checkpoint is not in output_dir. Resume from "
                "the checkpoint before it."
            )
        self.grades.load_state_dict(saved)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.stateful_callbacks[OF_RUN] = self._run  # into trainer_state.json
        self._first_step.on_step_end(args, state, control)
        if self.grades.done:  # the next backward would find nothing that needs a gradient
            control.should_training_stop = control.should_log = True
            control.should_save |= args.save_strategy == SaveStrategy.STEPS

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.save_only_model:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            save_state(folder, self.grades.state_dict() | {"run": self._run})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Gives the model and the arguments back as they were. What has frozen can be trained again; weights stay as
        they are. The Trainer's end of training calls it; after an exception or Ctrl-C it is yours to call."""
        if self not in _running:
            return
        _running.remove(self)
        self.grades.close()
        self._first_step.remove_hooks()
        self._args.max_grad_norm, self._max_grad_norm = self._max_grad_norm, None
