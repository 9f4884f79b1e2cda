"""Where GradES runs: in one process on one device, so far."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import TrainingArguments


def refuse_several_devices(accelerator: Accelerator, args: TrainingArguments) -> None:
    """
    Raises:
        ValueError: the run has several processes, DeepSpeed or FSDP, or one process that would copy the model to
            several GPUs.
    """
    if accelerator.distributed_type != DistributedType.NO:
        raise ValueError(
            f"GradES runs in one process on one device; this run is {accelerator.distributed_type.value}. "
            "Start it as `python recipes/...` without a launcher, or train without GradES (grades=None)."
        )
    if args.n_gpu > 1:  # the Trainer would copy the model to all of them in each step (DataParallel)
        raise ValueError(
            f"GradES runs in one process on one device; {args.n_gpu} GPUs are visible to this one. Start it "
            "as `CUDA_VISIBLE_DEVICES=0 python recipes/...`, or train without GradES (grades=None)."
        )
