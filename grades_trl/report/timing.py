"""What a run cost and what freezing saved: FLOPs predicted from the shapes, seconds as measured."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from grades_trl.model.matrices import WeightMatrix

# Steps before the first freeze that a baseline needs, and first steps that are warm-up (allocator, caches, tuning).
MIN_BASELINE_STEPS = 5
WARM_UP_STEPS = 3
# Step times are summed as medians over windows of that many steps, so that one stall does not pass for a cost.
WINDOW = 25


def step_flops(
    matrices: Iterable[WeightMatrix],
    frozen: Collection[str] = (),
    tokens: dict[str, float] | None = None,
    checkpointing: bool = False,
    cut: Collection[str] = (),
) -> float:
    """Matmul FLOPs of one training step in the tracked layers, forward and backward.

    A layer of N = out x in weights costs 2N per token for each of: forward, its recomputation under gradient
    checkpointing, the gradient of its input, the gradient of its weight. LoRA factors of P elements add 2P to the
    first three, and the fourth is 2P alone. Attention scores, norms, embeddings and the output head are not counted.

    Args:
        matrices (`Iterable[WeightMatrix]`): the tracked matrices.
        frozen (`Collection[str]`, *optional*): their weight gradient is not computed.
        tokens (`dict[str, float]`, *optional*): tower -> tokens per step; 1 everywhere if not given. Experts are
            counted as if every token went through them.
        checkpointing (`bool`, *optional*, defaults to `False`): the forward pass is run again in backward.
        cut (`Collection[str]`, *optional*): matrices in blocks that backward does not enter at all.
    """
    total = 0.0
    for matrix in matrices:
        rows, columns = matrix.shape
        factors = matrix.params if matrix.lora else 0
        through = 2 * (rows * columns + factors)
        update = 2 * (factors or rows * columns)
        cost = through
        if matrix.name not in cut:
            cost += through * (2 if checkpointing else 1)
            cost += 0 if matrix.name in frozen else update
        total += cost * (tokens.get(matrix.tower, 0.0) if tokens else 1.0)
    return total


@dataclass
class Validation:
    """Evaluations of a run: how many the whole schedule has, how many were run, and their seconds."""

    planned: int = 0
    run: int = 0
    seconds: float = 0.0

    @property
    def mean_seconds(self) -> float:
        return self.seconds / self.run if self.run else 0.0


class StepClock:
    """Seconds of every optimizer step, data loading included, validation, saving and pictures left out."""

    def __init__(self):
        self.step_seconds: list[float] = []
        self.overhead_seconds: list[float] = []
        self.first_freeze: int | None = None  # index into step_seconds
        self._mark = time.perf_counter()

    def start(self) -> None:
        self._mark = time.perf_counter()

    def exclude(self, seconds: float) -> None:
        """Seconds that were spent on something else since the last step ended."""
        self._mark += seconds

    def step(self, overhead: float, froze: bool) -> None:
        """Closes a step. `overhead`: seconds of it that GradES took itself."""
        now = time.perf_counter()
        self.step_seconds.append(now - self._mark)
        self.overhead_seconds.append(overhead)
        if froze and self.first_freeze is None:
            self.first_freeze = len(self.step_seconds) - 1
        self._mark = now

    def add(self, overhead: float) -> None:
        """Seconds that GradES took after the last step."""
        self.step_seconds[-1] += overhead
        self.overhead_seconds[-1] += overhead

    @property
    def total(self) -> float:
        return sum(self.step_seconds)

    def plain_step(self) -> float | None:
        """Median seconds of a step before anything froze, less GradES's own; `None` without enough steps."""
        end = len(self.step_seconds) if self.first_freeze is None else self.first_freeze
        if end < WARM_UP_STEPS + MIN_BASELINE_STEPS:
            return None
        steps, overheads = self.step_seconds[WARM_UP_STEPS:end], self.overhead_seconds[WARM_UP_STEPS:end]
        return statistics.median(s - o for s, o in zip(steps, overheads, strict=True))

    def recent_step(self) -> float:
        """Median seconds of the last steps."""
        return statistics.median(self.step_seconds[-WINDOW:])

    def typical_total(self) -> float:
        """Seconds of all steps, each window of steps counted at its median, and of all that GradES took itself."""
        rest = [s - o for s, o in zip(self.step_seconds, self.overhead_seconds, strict=True)]
        windows = [rest[i : i + WINDOW] for i in range(0, len(rest), WINDOW)]
        return sum(statistics.median(window) * len(window) for window in windows) + sum(self.overhead_seconds)


def speedup(clock: StepClock, total_steps: int, validation: Validation) -> dict[str, Any]:
    """The speed-up in its three parts, each with its seconds; never one merged number without them.

    Returns:
        `dict`: `cheaper_steps` (the steps that were run, against plain steps), `steps_not_run`, `validation_not_run`;
        `against_same_length` (a plain run of as many steps) and `against_full_schedule` (a plain run of all steps, its
        validation included). A value is `None` where nothing was measured to tell it.
    """
    steps, plain = len(clock.step_seconds), clock.plain_step()
    missing = max(0, validation.planned - validation.run)
    parts: dict[str, Any] = {
        "cheaper_steps": {"ratio": None, "seconds_saved": None},
        "steps_not_run": {
            "ratio": total_steps / steps if steps else None,
            "steps": total_steps - steps,
            "seconds_saved": None,
        },
        "validation_not_run": {"evaluations": missing, "seconds_saved": missing * validation.mean_seconds},
        "against_same_length": None,
        "against_full_schedule": None,
    }
    if plain is None:
        return parts
    run = clock.typical_total()
    parts["cheaper_steps"] = {"ratio": plain * steps / run, "seconds_saved": plain * steps - run}
    parts["steps_not_run"]["seconds_saved"] = plain * (total_steps - steps)
    parts["against_same_length"] = plain * steps / run
    full = plain * total_steps + validation.mean_seconds * validation.planned
    parts["against_full_schedule"] = full / (run + validation.seconds)
    return parts


class RunClock(TrainerCallback):
    """
    Where the seconds of one `train()` go, with GradES or without: to be passed in the trainer's `callbacks`.

    It runs from the first step to the last, the best checkpoint of early stopping loaded; what is drawn and reported
    afterwards is not in it. A resumed run is timed from where it resumes.

    Attributes:
        total (`float`): seconds of the whole.
        validation (`float`): of them in `evaluate()`.
        saving (`float`): of them in writing checkpoints.
        history (`list[dict]`): one entry per validation: `step`, `seconds` since training began, `eval_loss`.
        peak_memory_mib (`float` or `None`): at the end of training, see [`peak_memory_mib`].
    """

    def __init__(self):
        self.total = self.validation = self.saving = 0.0
        self.history: list[dict[str, float]] = []
        self.peak_memory_mib: float | None = None
        self._began = self._mark = 0.0
        self._running = False

    def on_train_begin(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._began = self._mark = now()
        self._running = True

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_evaluate or control.should_save:  # else the device need not be waited for
            self._mark = now()

    on_epoch_end = on_step_end

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:  # of training; the next thing is validation or saving, if they are due
            self.on_step_end(args, state, control)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if not self._running:
            return
        self.validation += self._lap()
        seconds = self._mark - self._began
        self.history.append({"step": state.global_step, "seconds": seconds, "eval_loss": metrics.get("eval_loss")})

    def on_save(self, args, state, control, **kwargs):
        self.saving += self._lap()

    def on_train_end(self, args, state, control, **kwargs):
        self.total, self._running = now() - self._began, False
        self.peak_memory_mib = peak_memory_mib()

    def _lap(self) -> float:
        """Seconds since the last mark, which is set anew."""
        before, self._mark = self._mark, now()
        return self._mark - before


def now() -> float:
    """Seconds, when the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def device_name() -> str:
    """The accelerator, or the processor with the number of threads torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if platform.system() == "Linux":
        with open("/proc/cpuinfo") as cpuinfo:
            name = next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), name)
    return f"CPU, {name}, {torch.get_num_threads()} threads"


def peak_memory_mib() -> float:
    """MiB: allocated on the CUDA device at most, else resident memory of this process at most."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if platform.system() == "Darwin" else 2**10)


def versions() -> dict[str, str]:
    """Of Python and the libraries that results depend on."""
    libraries = ("grades-trl", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")
    return {"python": platform.python_version(), **{library: version(library) for library in libraries}}


def count_tokens(model: nn.Module, tower_paths: dict[str, str], counts: dict[str, list[int]]) -> list[Any]:
    """Hooks that note the tokens which enter the first block of each tower, one entry per forward pass.

    Args:
        model (`nn.Module`): holds the blocks.
        tower_paths (`dict[str, str]`): tower -> path of its first block.
        counts (`dict[str, list[int]]`): filled by the hooks.

    Returns:
        `list`: the hooks' handles, to be removed when enough was seen.
    """
    modules = dict(model.named_modules())

    def note(tower: str):
        def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden = next(
                x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.is_floating_point()
            )
            counts.setdefault(tower, []).append(hidden.numel() // hidden.shape[-1])

        return hook

    return [
        modules[path].register_forward_pre_hook(note(tower), with_kwargs=True) for tower, path in tower_paths.items()
    ]
