"""The model, the device and the library versions of a run, gathered before it trains."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig

from grades_trl.distributed import world_size
from grades_trl.wording import counted

# The libraries that the numbers of a run depend on. One that is not installed is left out of the record.
LIBRARIES = (
    "grades-trl",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "unsloth",
)


@dataclass(frozen=True)
class Environment:
    """
    What a run was made on.

    Attributes:
        model (`str`): hub id of the model, the last two parts of its folder, or the name of its class.
        device (`str`): the accelerator, or the processor with the number of threads that torch uses; of several
            processes, with their number ("2 x ...").
        versions (`dict[str, str]`): Python and the installed ones of `LIBRARIES` -> version.
    """

    model: str
    device: str
    versions: dict[str, str]

    @classmethod
    def gather(cls, model: nn.Module) -> Environment:
        """Call it before training: what fails here then costs no finished run.

        Args:
            model (`nn.Module`): a Transformers model, wrapped by PEFT or not, or any other module.
        """
        config = getattr(model, "config", None)  # a plain module has none
        name = config.name_or_path if isinstance(config, PreTrainedConfig) else ""
        if Path(name).is_absolute():  # where it lies is nobody else's business
            name = "/".join(Path(name).parts[-2:])
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        several = f"{world_size()} x " if world_size() > 1 else ""
        return cls(name or type(model).__name__, several + device_name(device), versions())


def device_name(device: torch.device | None = None) -> str:
    """The name of a device, for people who compare seconds.

    Args:
        device (`torch.device`, *optional*): by default the accelerator, or the CPU if there is none.
    """
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    if device is not None and device.type != "cpu":
        return f"{device.type}, {name}"
    threads = torch.get_num_threads()
    return f"CPU, {name}, {counted(threads, 'thread')}"


def versions() -> dict[str, str]:
    """Python and the installed ones of `LIBRARIES` -> version."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:  # not installed, or run from a checkout that is not
            continue
    return found


def peak_memory_mib(device: torch.device | None = None) -> float | None:
    """MiB at most: allocated on a CUDA device since its statistics were reset, else resident in this process since it
    began. `None` on Windows without CUDA.

    Args:
        device (`torch.device`, *optional*): by default the CUDA device, if there is one.
    """
    if torch.cuda.is_available() if device is None else device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if platform.system() == "Darwin" else 2**10)
