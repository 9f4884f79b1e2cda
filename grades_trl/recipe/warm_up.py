"""A warm-up that is as long as the run, as that of a config whose `max_steps` was lowered."""

from __future__ import annotations

import logging

from transformers import TrainerCallback
from transformers.trainer_utils import SchedulerType

logger = logging.getLogger(__name__)

WITHOUT_WARM_UP = (SchedulerType.CONSTANT, SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)


class WarnOfLongWarmUp(TrainerCallback):
    """Warns before the first step if the learning rate would not reach its full value in the steps of the run, which
    are known only now where it is given in epochs."""

    def on_train_begin(self, args, state, control, **kwargs):
        warm_up, steps = args.get_warmup_steps(state.max_steps), state.max_steps
        if warm_up < steps or args.lr_scheduler_type in WITHOUT_WARM_UP:
            return
        logger.warning(
            f"The warm-up takes {warm_up:,} steps and the run has {steps:,}: the learning rate never reaches "
            f"{args.learning_rate:g}. Lower --warmup_steps; 0.1 is a tenth of the run."
        )
