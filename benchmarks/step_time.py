"""What a training step costs with GradES: while it measures, and when matrices are frozen.

  python benchmarks/step_time.py                                         # this machine; writes benchmarks/results/
  python benchmarks/step_time.py --hidden 128 --steps 2 --rounds 1       # a quick look

All variants run in one process and take turns. The first steps of a turn are warm-up. A time is the median over all
turns. A ratio is taken within each turn, and the median of these is reported: a machine that slows down changes all
variants alike. Beside each speed-up stands the limit that the FLOPs of the matrix products set. Beside the time of a
measurement stands the limit that the memory bandwidth sets.

With all matrices frozen a LoRA run has nothing left to train and ends. Full fine-tuning goes on in this benchmark: its
norms, embeddings and output head still train.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import BitsAndBytesConfig, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from grades_trl import GradESConfig, GradESTrainer
from grades_trl.model.flops import step_flops
from grades_trl.model.matrices import WeightMatrix, find_matrices
from grades_trl.recipe import builtin
from grades_trl.report.environment import device_name, versions
from grades_trl.report.timing import RunClock

RESULTS = Path(__file__).parent / "results"
WARM_UP = 3  # steps; the first one still runs the backward pass of what freezes in it
SHARES = (0.25, 0.5, 0.75)
CHECKPOINTING = ("off", "non-reentrant", "reentrant")


class StepProbe(TrainerCallback):
    """Measures each optimizer step, and in the last one what training holds in memory.

    It must be the last callback: `measure_last` puts it there.

    Attributes:
        seconds (`list[float]`): of each step.
        own_seconds (`list[float]`): of each step, what GradES took of them.
        held_bytes (`dict[str, int]`): of gradients and optimizer state; on CUDA also the peak of all allocations.
        remembered_bytes (`int`): of what is kept to compare with.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.own_seconds: list[float] = []
        self.held_bytes: dict[str, int] = {}
        self.remembered_bytes = 0
        self._trainer: Any = None
        self._clock: RunClock | None = None
        self._start = self._own_total = 0.0

    def measure_last(self, trainer: Any) -> None:
        """Puts the probe behind all other callbacks of a trainer."""
        callbacks = trainer.callback_handler.callbacks
        callbacks.sort(key=lambda callback: callback is self)
        self._trainer = trainer
        self._clock = next((callback for callback in callbacks if isinstance(callback, RunClock)), None)

    def on_step_begin(self, args, state, control, **kwargs):
        synchronize()
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        synchronize()
        self.seconds.append(time.perf_counter() - self._start)
        if self._clock is not None:
            own_total = self._clock.seconds.grades
            self.own_seconds.append(own_total - self._own_total)
            self._own_total = own_total
        if state.global_step == WARM_UP and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if state.global_step == state.max_steps:
            self._measure_memory(model, optimizer)

    def _measure_memory(self, model, optimizer) -> None:
        gradients = (p for p in model.parameters() if p.requires_grad)
        states = (x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor))
        self.held_bytes = {"gradients": size(gradients), "optimizer_state": size(states)}
        if torch.cuda.is_available():  # the peak of a process never falls on the CPU
            self.held_bytes["peak_allocated"] = torch.cuda.max_memory_allocated()
        if isinstance(self._trainer, GradESTrainer):
            grades = self._trainer.grades
            self.remembered_bytes = sum(
                size(part.state_dict()[1].values()) for part in (grades.criterion, grades.gain)
            )


def synchronize() -> None:
    """Waits for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)


def in_turn(names: list[str], turn: int) -> list[str]:
    """The order in which variants run. Each comes first in some turn."""
    first = turn % len(names)
    return names[first:] + names[:first]


def build(method: str, args: argparse.Namespace, tokenizer) -> torch.nn.Module:
    """A Qwen3 with random weights, for full fine-tuning, LoRA or QLoRA."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 128,
        head_dim=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = args.scratch / "base"
    if method != "qlora" or not folder.exists():
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = Qwen3ForCausalLM(config).to(args.dtype)
    if method == "qlora":
        if not folder.exists():
            model.save_pretrained(folder)
        four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=args.dtype)
        model = Qwen3ForCausalLM.from_pretrained(folder, quantization_config=four_bit)
    if method != "full":
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    return model


def train(
    model: torch.nn.Module,
    args: argparse.Namespace,
    tokenizer,
    data: Dataset,
    *,
    checkpointing: str = "off",
    steps: int,
    grades: GradESConfig | None = None,
    callbacks: Iterable[TrainerCallback] = (),
) -> tuple[StepProbe, float]:
    """Trains for `steps` steps, with GradES or with SFTTrainer alone; returns the probe and the mean loss."""
    probe = StepProbe()
    training = SFTConfig(
        output_dir=str(args.scratch),
        max_steps=steps,
        per_device_train_batch_size=args.batch,
        max_length=args.length,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=checkpointing != "off",
        gradient_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"},
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    kwargs: dict[str, Any] = {
        "model": model,
        "args": training,
        "train_dataset": data,
        "processing_class": tokenizer,
        "callbacks": [probe, *callbacks],
    }
    trainer = SFTTrainer(**kwargs) if grades is None else GradESTrainer(**kwargs, grades=grades)
    trainer.remove_callback(PrinterCallback)
    probe.measure_last(trainer)
    loss = trainer.train().training_loss
    return probe, loss


def memory_bandwidth() -> float:
    """Bytes per second, read and written: median of 9 copies of 256 MiB, which no cache holds."""
    source = torch.ones(2**26, device="cuda" if torch.cuda.is_available() else "cpu")
    target, seconds = source.clone(), []
    for _ in range(9):
        synchronize()
        start = time.perf_counter()
        target.copy_(source)
        synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size([source]) / statistics.median(seconds)


def measuring(args: argparse.Namespace, tokenizer, data: Dataset) -> dict[str, dict]:
    """Step time of SFTTrainer, of GradES that measures, and of the authors' package.

    The default measures the gain, in every step as at the beginning of a run. With the paper's metric, of a sample or
    of all elements, that is measured too.

    `own_ms` is what GradES itself takes. `limit_ms` is the bytes that it has to move, over the bandwidth of a copy in
    this process. A sample cannot reach that limit: it is gathered in pieces of 16 elements, which a copy is not.
    """
    from grades import GradEarlyStoppingCallback, GradEarlyStoppingConfig

    def authors() -> list[TrainerCallback]:
        # It measures from the first step on. Its first value is 0, which must not freeze anything in a short run.
        return [GradEarlyStoppingCallback(GradEarlyStoppingConfig(tau=1e-30, alpha=0.99, enable_wandb_logging=False))]

    sampled: dict[str, Any] = {"metric": "grad_change", "tau": 0.0, "alpha": 0.0}  # no value is below 0
    variants: dict[str, tuple[GradESConfig | None, Callable[[], list[TrainerCallback]]]] = {
        "baseline": (None, list),
        "gain": (GradESConfig(alpha=1.0), list),
        "grad_change": (GradESConfig(**sampled), list),
        "grad_change_exact": (GradESConfig(**sampled, sample_fraction=1.0), list),
        "grades_1.0.6": (None, authors),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    own: dict[str, list[float]] = {"gain": [], "grad_change": [], "grad_change_exact": []}
    moved: dict[str, int] = {}
    bandwidths = []
    for turn in range(args.rounds):
        bandwidths.append(memory_bandwidth())
        for name in in_turn(list(variants), turn):
            gc.collect()  # a model and its trainer refer to each other
            config, callbacks = variants[name]
            model = build("full", args, tokenizer)
            steps = WARM_UP + args.steps
            probe, _ = train(model, args, tokenizer, data, steps=steps, grades=config, callbacks=callbacks())
            seconds[name].append(statistics.median(probe.seconds[WARM_UP:]))
            if name in own:
                own[name].append(statistics.median(probe.own_seconds[WARM_UP:]))
                # It reads the gradients and what they are compared with, and writes a copy for the next step.
                moved[name] = 3 * probe.remembered_bytes
    rows: dict[str, dict] = {
        name: {
            "ms": 1e3 * statistics.median(times),
            "over_baseline": statistics.median(t / b for t, b in zip(times, seconds["baseline"], strict=True)),
        }
        for name, times in seconds.items()
    }
    bandwidth = statistics.median(bandwidths)
    for name, times in own.items():
        rows[name] |= {
            "own_ms": 1e3 * statistics.median(times),
            "gathers": name != "grad_change_exact",
            "bytes": moved[name],
            "bytes_per_second": bandwidth,
            "limit_ms": 1e3 * moved[name] / bandwidth,
        }
    for name, row in rows.items():
        text = f"  {name:<18} {row['ms']:8.1f} ms   {row['over_baseline']:.3f} of the baseline"
        if "own_ms" in row:
            text += (
                f", GradES itself {row['own_ms']:.2f} ms{' (gathers)' if row['gathers'] else ''}, limit"
                f" {row['limit_ms']:.2f} ms ({row['bytes'] / 1e6:.1f} MB at {bandwidth / 1e9:.1f} GB/s)"
            )
        print(text, flush=True)
    return rows


def frozen(args: argparse.Namespace, tokenizer, data: Dataset, method: str, checkpointing: str) -> list[dict]:
    """Step time with a growing share of the layers frozen from the first one on, with a random half of all matrices,
    and with all matrices where something else is left to train."""

    def leading(share: float) -> Callable[[dict[str, WeightMatrix]], set[str]]:
        return lambda matrices: {name for name, m in matrices.items() if m.layer < share * args.layers}

    def random_half(matrices: dict[str, WeightMatrix]) -> set[str]:
        order = torch.randperm(len(matrices), generator=torch.Generator().manual_seed(0)).tolist()
        return {list(matrices)[i] for i in order[: len(matrices) // 2]}

    states = {"nothing frozen": leading(0), **{f"{share:.0%} of layers": leading(share) for share in SHARES}}
    states["50% of matrices, random"] = random_half
    if method == "full":
        states["100% of matrices, the rest trains"] = set
    rows: dict[str, dict] = {name: {"seconds": []} for name in states}
    for turn in range(args.rounds):
        for name in in_turn(list(states), turn):
            gc.collect()
            skips = name.endswith("of layers")
            model = build(method, args, tokenizer)
            matrices = find_matrices(model)
            chosen = states[name](matrices)
            config = schedule(chosen, freeze_norms=skips, freeze_embeddings=skips)
            steps = WARM_UP + args.steps
            probe, _ = train(model, args, tokenizer, data, checkpointing=checkpointing, steps=steps, grades=config)
            rows[name]["seconds"].append(statistics.median(probe.seconds[WARM_UP:]))
            rows[name] |= probe.held_bytes
            stacks = {m.stack for m in matrices.values()}
            depth = 1 + max((matrices[name].layer for name in chosen), default=-1) if skips else 0
            rows[name]["flops"] = step_flops(
                matrices.values(),
                frozen=chosen,
                skipped_layers=dict.fromkeys(stacks, depth),
                checkpointing=checkpointing != "off",
            )
    baseline_flops, baseline_seconds = rows["nothing frozen"]["flops"], rows["nothing frozen"]["seconds"]
    for name, row in rows.items():
        seconds = row.pop("seconds")
        ratios = sorted(b / s for b, s in zip(baseline_seconds, seconds, strict=True))
        row |= {
            "method": method,
            "checkpointing": checkpointing,
            "state": name,
            "ms": 1e3 * statistics.median(seconds),
            "speedup": statistics.median(ratios),
            "speedup_range": [ratios[0], ratios[-1]],
            "limit": baseline_flops / row["flops"],
        }
        held = ", ".join(
            f"{key.replace('_', ' ')} {row[key] / 2**20:.1f}"
            for key in ("gradients", "optimizer_state", "peak_allocated")
            if key in row
        )
        print(
            f"  {method:<6} {checkpointing:<14} {name:<34} {row['ms']:8.1f} ms  {row['speedup']:.2f}x"
            f" ({ratios[0]:.2f} to {ratios[-1]:.2f}, limit {row['limit']:.2f}x)  MiB: {held}",
            flush=True,
        )
    if method != "full":
        print(f"  {method:<6} {checkpointing:<14} {'100% of matrices':<34} the run ends", flush=True)
    return list(rows.values())


def schedule(matrices: Iterable[str], **settings: Any) -> GradESConfig:
    """Freezes these matrices in the first step, and does not end the run."""
    steps: dict[str, Any] = {"schedule": dict.fromkeys(matrices, 1)}
    return GradESConfig(metric="schedule", stopping="end_of_schedule", **steps, **settings)


def cached(args: argparse.Namespace, tokenizer, data: Dataset, method: str, checkpointing: str) -> dict:
    """Half of the layers frozen: backward skips them; and from the second epoch on, their outputs come from memory."""
    steps_in_epoch = 4
    few = data.select(range(steps_in_epoch * args.batch))
    seconds: dict[str, list[float]] = {"0": [], "256": []}
    losses: dict[str, list[float]] = {name: [] for name in seconds}
    for turn in range(args.rounds):
        for mib in in_turn(list(seconds), turn):
            gc.collect()
            model = build(method, args, tokenizer)
            half = [name for name, m in find_matrices(model).items() if m.layer < args.layers / 2]
            config = schedule(half, freeze_norms=True, freeze_embeddings=True, activation_cache_mib=int(mib))
            probe, loss = train(
                model, args, tokenizer, few, checkpointing=checkpointing, steps=3 * steps_in_epoch + args.steps,
                grades=config,
            )  # fmt: skip
            seconds[mib].append(statistics.median(probe.seconds[3 * steps_in_epoch :]))
            losses[mib].append(loss)
    alone, both = (1e3 * statistics.median(times) for times in seconds.values())
    row = {
        "method": method,
        "checkpointing": checkpointing,
        "skipped_ms": alone,
        "skipped_and_cached_ms": both,
        "speedup": statistics.median(a / b for a, b in zip(*seconds.values(), strict=True)),
        "train_loss_difference": max(abs(a - b) for a, b in zip(*losses.values(), strict=True)),
    }
    print(
        f"  {method:<6} {checkpointing:<14} skipped {alone:.1f} ms, skipped and cached {both:.1f} ms:"
        f" {row['speedup']:.2f}x",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="hidden size of the model, a multiple of 128")
    parser.add_argument("--layers", type=int, default=8, help="decoder layers of the model")
    parser.add_argument("--batch", type=int, default=2, help="rows per step")
    parser.add_argument("--length", type=int, default=128, help="tokens per row")
    parser.add_argument("--steps", type=int, default=3, help="measured steps per turn")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each variant")
    args = parser.parse_args()
    args.dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    args.scratch = Path("outputs/benchmark")
    shutil.rmtree(args.scratch, ignore_errors=True)
    disable_progress_bars()
    logging.disable_progress_bar()
    tokenizer = builtin.tiny_qwen3()[1]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, len(tokenizer), (512, args.length), generator=generator)
    data = Dataset.from_dict({"input_ids": ids.tolist()})

    print("GradES measures, nothing frozen", flush=True)
    result: dict[str, Any] = {"measuring": measuring(args, tokenizer, data)}
    print("frozen", flush=True)
    result["frozen"] = [
        row
        for method in ("full", "lora", "qlora")
        for checkpointing in CHECKPOINTING
        for row in frozen(args, tokenizer, data, method, checkpointing)
    ]
    print("half of the layers frozen, without and with the activation cache", flush=True)
    result["cached"] = [cached(args, tokenizer, data, "lora", checkpointing) for checkpointing in CHECKPOINTING]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    result |= {"device": device_name(), "versions": versions(), "commit": commit}
    result["settings"] = {key: value for key, value in vars(args).items() if key != "scratch"} | {
        "dtype": str(args.dtype)
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"step_time_{'cuda' if torch.cuda.is_available() else 'cpu'}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{path}")


if __name__ == "__main__":
    main()
