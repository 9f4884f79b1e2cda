"""Several processes, with a copy of the model each (DDP) or a piece of it (FSDP2): what they agree on, who writes, and
what a freeze owes DDP.

The one place that knows `torch.distributed`. Every function here works in a run of one process too, and sends nothing
there. What sends something has to be called by all processes, in the same order.

Processes must never decide differently: the next all-reduce would wait for ever, or mix up gradients. So a decision is
either made from the numbers of the main process (`from_main`), or from what all have gathered, in the same order.
"""

from __future__ import annotations

import functools
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from grades_trl.wording import counted

logger = logging.getLogger(__name__)

T = TypeVar("T")

ONE_PROCESS = "NO"
COPIES = ("MULTI_GPU", "MULTI_CPU", "MULTI_NPU", "MULTI_XPU")  # accelerate's names for DDP


def world_size() -> int:
    """Processes that train together: those of torch's process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0 on; before there is a process group, as the launcher says."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", 0))


def launched_processes() -> int:
    """Processes that torchrun or accelerate has started on this machine, before they know each other and after."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this process decides, writes files and talks. All others are silent."""
    return rank() == 0


# ---- what processes tell each other ----


def from_main(numbers: Tensor) -> Tensor:
    """The numbers that the main process has. Copies of a model hold the same numbers, but their bits may differ.

    Args:
        numbers (`Tensor`): of one shape and dtype in all processes, on the device that the model runs on.
    """
    if world_size() > 1:
        dist.broadcast(numbers, src=0)
    return numbers


def gathered(numbers: Tensor) -> Tensor:
    """The numbers of all processes, in the order of their ranks: a sum over them is the same everywhere, to the bit.

    Args:
        numbers (`Tensor`): of one shape and dtype in all processes, on the device that the model runs on.

    Returns:
        `Tensor`: of shape (processes, *shape).
    """
    if world_size() == 1:
        return numbers[None]
    found = [torch.empty_like(numbers) for _ in range(world_size())]
    dist.all_gather(found, numbers)
    return torch.stack(found)


def in_any(flag: bool, device: torch.device) -> bool:
    """Whether a flag is set in any process. `device` is the one that the model runs on."""
    if world_size() == 1:
        return flag
    return bool(gathered(torch.tensor(float(flag), device=device)).any())


def gathered_objects(value: T) -> list[T]:
    """The values of all processes, in the order of their ranks. For what is rare and small: they are pickled."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def decided_by_main(decide: Callable[[], T]) -> T:
    """What a function returns in the main process, which alone calls it. Where it raises, all processes do."""
    if world_size() == 1:
        return decide()
    told: list[Any] = [None, None]
    if is_main():
        try:
            told[0] = decide()
        except Exception as error:
            told[1] = error
    dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise told[1]
    return told[0]


@contextmanager
def main_first() -> Iterator[None]:
    """The main process is through with what is inside before the others begin: they find what it has left on disk."""
    several = world_size() > 1
    if several and not is_main():
        dist.barrier()
    try:
        yield
    finally:
        if several and is_main():
            dist.barrier()


def others_end() -> bool:
    """Whether this process is to end now, since all that is left to do is for the main process alone. The main process
    is on its own afterwards: nothing that it calls waits for the others."""
    if world_size() == 1:
        return False
    ends = not is_main()
    dist.barrier()
    dist.destroy_process_group()
    return ends


# ---- a model in pieces (FSDP2) ----


def local(tensor: Tensor) -> Tensor:
    """The piece of a tensor that this process has; all of it where it is not sharded. It shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether a process has only pieces of these tensors."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def reshard(model: nn.Module) -> None:
    """Drops what was gathered for a forward pass without a backward pass: the next pass gathers the values of then."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


# ---- what a freeze owes DDP ----


class Reducer:
    """
    Keeps what `DistributedDataParallel` reduces equal to what trains.

    DDP looks at `requires_grad` once, when it is made. A matrix that freezes later is waited for, or reduced as zeros;
    one that trains again is never reduced, so that copies drift apart. Here, its reducer is made anew, with buckets
    for what trains now and the communication hooks that it had. No weights are sent.

    Args:
        ddp (`DistributedDataParallel` or `None`): what wraps the model; `None` makes this do nothing.
    """

    def __init__(self, ddp: DistributedDataParallel | None):
        self._ddp = ddp
        self._reduced: list[int] = []

    def follow(self) -> None:
        """Makes the reducer anew if something else trains than before, in all processes at once. To be called between
        a backward pass that has reduced its gradients and the next forward pass."""
        ddp = self._ddp
        if ddp is None:
            return
        trained = [id(p) for p in ddp.module.parameters() if p.requires_grad]
        if trained and trained != self._reduced:  # with nothing that trains there is no backward pass
            self._reduced = trained
            _rebuild(ddp)


def _rebuild(ddp: Any) -> None:
    state, hooks = ddp.__getstate__(), list(ddp._comm_hooks)
    ddp._remove_autograd_hooks()
    del ddp.reducer, ddp.logger  # they hold the buckets of before
    ddp.__setstate__(state)
    ddp._static_graph_delay_allreduce_enqueued = False
    ddp._comm_hooks = []
    for hook, of_hook in hooks:
        ddp.register_comm_hook(of_hook, hook)


class UnusedParameters:
    """
    Finds out in the first step whether DDP has to look for parameters that get no gradient.

    DDP waits for the gradient of each parameter, and fails in the second step if one has not come. It can look for
    unused ones, which costs time in every step. Here it looks in the first step, and then only if there are any.
    Nothing is done where it looks anyway.

    Args:
        ddp (`DistributedDataParallel`): what wraps the model, before the first forward pass.
        is_reentrant (`bool`): layers are checkpointed reentrantly, so that DDP cannot look.
    """

    def __init__(self, ddp: DistributedDataParallel, is_reentrant: bool):
        self._ddp, self._is_reentrant = ddp, is_reentrant
        self._reached: set[str] = set()
        self._handles: list[Any] = []
        if ddp.find_unused_parameters or ddp.static_graph:
            return
        self._trained = {name: p for name, p in ddp.module.named_parameters() if p.requires_grad}
        self._handles = [ddp.register_forward_pre_hook(self._begin_pass)]
        for name, parameter in self._trained.items():
            self._handles.append(parameter.register_post_accumulate_grad_hook(functools.partial(self._reach, name)))
        if not is_reentrant:
            self._look(True)

    def _begin_pass(self, *args: Any) -> None:
        if torch.is_grad_enabled():
            self._reached.clear()  # of several micro-batches, DDP waits for the gradients of the last one

    def _reach(self, name: str, parameter: Tensor) -> None:
        self._reached.add(name)

    def _look(self, looks: bool) -> None:
        self._ddp.find_unused_parameters = looks
        _rebuild(self._ddp)

    def remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def decide(self) -> None:
        """To be called after the first backward pass that has reduced its gradients, in all processes.

        Raises:
            ValueError: there are unused parameters, and DDP cannot look for them.
        """
        if not self._handles:
            return
        self.remove_hooks()
        unused = [name for name in self._trained if name not in self._reached]
        some = counted(len(unused), "parameter gets", "parameters get")
        some += f" no gradient ({', '.join(unused[:2])}{', ...' * (len(unused) > 2)})"
        if self._is_reentrant:
            if unused:
                raise ValueError(
                    f"{some}, and DDP waits for each. It cannot leave them out while layers are checkpointed "
                    'reentrantly: set gradient_checkpointing_kwargs={"use_reentrant": False} '
                    "(--gradient_checkpointing_kwargs '{\"use_reentrant\": false}'), or freeze them."
                )
            return
        if in_any(bool(unused), next(iter(self._trained.values())).device):
            logger.info("DDP looks for unused parameters in every step: %s.", some)
        else:
            self._look(False)


def wrapper_of(model: nn.Module) -> DistributedDataParallel | None:
    """The DDP that a trainer has put around its model, if there is one."""
    return model if isinstance(model, DistributedDataParallel) else None


# ---- what does not work ----


def refuse_unsupported(accelerator: Any, args: Any) -> None:
    """
    Args:
        accelerator (`Accelerator` or `AcceleratorState`): of a trainer.
        args (`TrainingArguments`): likewise.

    Raises:
        ValueError: DeepSpeed, FSDP of version 1 or another way to cut a model in pieces, several processes with
            torch_compile, or one process that would copy the model to several GPUs; with what to use instead.
    """
    kind = accelerator.distributed_type.value
    instead = (
        f"Use DDP, a copy of the model in each process: {launch_line(max(2, args.world_size))}. If the model does not "
        "fit into one GPU that way, use FSDP2 (--fsdp, or configs/accelerate/fsdp2.yaml), or LoRA or QLoRA "
        "(--use_peft, --load_in_4bit). Without GradES (grades=None, --grades false) nothing changes."
    )
    if kind == "DEEPSPEED":
        raise ValueError(
            "GradES does not run with DeepSpeed: there, a matrix that is frozen still moves, by momentum and weight "
            f"decay. {instead}"
        )
    if kind == "FSDP" and not accelerator.is_fsdp2:
        raise ValueError(f"GradES does not run with the first version of FSDP. {instead}")
    if kind not in (ONE_PROCESS, "FSDP", *COPIES):
        raise ValueError(f"GradES does not run with {kind}. {instead}")
    if getattr(args, "parallelism_config", None) is not None:
        raise ValueError(f"GradES does not run with a parallelism_config: it would miss parts of a matrix. {instead}")
    if kind != ONE_PROCESS and getattr(args, "torch_compile", False):
        raise ValueError("GradES does not run with torch_compile in several processes yet: leave out --torch_compile.")
    if args.n_gpu > 1:  # the Trainer would copy the model to all of them in each step (DataParallel)
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to this process, and GradES takes one for each process. Start it on all "
            f"of them with {launch_line(args.n_gpu)}, or on one with CUDA_VISIBLE_DEVICES=0."
        )


def refuse_reentrant_checkpointing(ddp: DistributedDataParallel | None, is_reentrant: bool) -> None:
    """
    Raises:
        ValueError: DDP looks for unused parameters in a model that checkpoints reentrantly, which fails in the first
            backward pass ("marked as ready twice"), with GradES or without.
    """
    if ddp is not None and is_reentrant and ddp.find_unused_parameters and not ddp.static_graph:
        raise ValueError(
            "DDP cannot look for unused parameters while layers are checkpointed reentrantly (it would mark them as "
            'ready twice). Set gradient_checkpointing_kwargs={"use_reentrant": False}, or '
            "ddp_find_unused_parameters=False (--ddp_find_unused_parameters false) if every parameter gets a gradient "
            "in every step."
        )


def refuse_devices_that_send_nothing(model: nn.Module) -> None:
    """
    Args:
        model (`nn.Module`): as it is trained, in pieces or not.

    Raises:
        ValueError: parameters lie where the processes cannot exchange anything: FSDP with CPU offload, and NCCL alone.
            The Trainer would fail too, as it clips gradients.
    """
    if world_size() == 1:
        return
    sending = dist.get_backend_config()  # as in "cuda:nccl,cpu:gloo"
    kinds = {local(parameter).device.type for parameter in model.parameters()}
    for kind in sorted(kinds.difference(pair.partition(":")[0] for pair in sending.split(","))):
        raise ValueError(
            f"Weights lie in the memory of the {kind}, as with FSDP's CPU offload, and the processes exchange only "
            f"what {sending} can send. Add --ddp_backend {sending},{kind}:gloo."
        )


def refuse_several_processes() -> None:
    """For scripts that run in one process.

    Raises:
        ValueError: there are several.
    """
    if launched_processes() > 1:
        raise ValueError(
            f"{sys.argv[0]} runs in one process, and {launched_processes()} were started: start it with python, "
            "without torchrun or accelerate launch."
        )


def launch_line(processes: int) -> str:
    """The command that starts this script in several processes, as text."""
    return f"{shlex.join(launch_command(processes))} ..."


def launch_command(processes: int) -> list[str]:
    """The command that starts this script in several processes, without its flags."""
    script = Path(sys.argv[0])
    started = [sys.argv[0]] if script.suffix == ".py" else ["your_script.py"]
    if script.parent == Path(__file__).parent / "recipes":  # an installed package starts its recipes by its command
        started = ["-m", "grades_trl.cli", script.stem.removeprefix("sft_")]
    return ["torchrun", "--nproc_per_node", str(processes), *started]
