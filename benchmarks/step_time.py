"""What GradES costs while it watches, and what a step costs when matrices are frozen. One command, one table.

  python benchmarks/step_time.py                      # on this machine; results into benchmarks/results/
  python benchmarks/step_time.py --hidden 256 --steps 5 --rounds 1       # a quick look

Everything is measured side by side in one process: variants take turns, the first steps of each turn are warm-up. A
time is the median over all turns, a ratio is taken within each turn, and the median of these is given. Beside each
speed-up stands the limit that the matmul FLOPs set; beside the time that watching takes, the limit that memory sets.

With all matrices frozen a run ends, and under LoRA nothing is left to train. Full fine-tuning is measured there too,
as if it went on: without --freeze_norms and --freeze_embeddings, so that norms, embeddings and head still train.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from grades_trl import GradESConfig, GradESMixin
from grades_trl.criteria import kernels
from grades_trl.recipe import builtin
from grades_trl.report import timing as accounting

RESULTS = Path(__file__).parent / "results"
WARM_UP = 3  # the first step still runs backward for what is frozen in it
SHARES = (0.25, 0.5, 0.75)


def build(method: str, args: argparse.Namespace, tokenizer) -> torch.nn.Module:
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


class Clock(TrainerCallback):
    """Seconds of each optimizer step, from the end of the last one."""

    def __init__(self):
        self.seconds: list[float] = []
        self._mark = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        synchronize()
        self._mark = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        self.seconds.append(time.perf_counter() - self._mark)
        if state.global_step == WARM_UP and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        control.should_training_stop = state.global_step >= state.max_steps  # not earlier, if all matrices are frozen


def in_turn(names: list[str], turn: int) -> list[str]:
    """The order in which variants are run: none is always the one that comes first."""
    first = turn % len(names)
    return names[first:] + names[:first]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Scheduled(GradESMixin, SFTTrainer):
    """Freezes what it is told to, when it is told to: `plan[step]` is the set of matrices frozen from that step on."""

    plan: dict[int, set[str]]

    def _start_grades(self):
        super()._start_grades()

        def update(step, readings):
            names = [name for name in self.plan.get(step, ()) if name not in self.grades.frozen]
            self.grades.taus.update(dict.fromkeys(names, 1.0))
            self.grades.criterion.values.update(dict.fromkeys(names, 0.0))
            return names

        self.grades.criterion.update = update

    def _print(self, text):
        pass


def trainer_for(cls, model, args, tokenizer, data, checkpointing, steps, callbacks=(), **extra):
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
    trainer = cls(
        model=model, args=training, train_dataset=data, processing_class=tokenizer, callbacks=list(callbacks), **extra
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def size(tensors) -> int:
    """Bytes."""
    return sum(t.numel() * t.element_size() for t in tensors)


def held_bytes(trainer) -> dict[str, int]:
    """Bytes of what training holds beside the weights; on CUDA also of all that was allocated at the peak."""
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    state = [v for s in trainer.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    previous = [t for kept in trainer.grades._previous.values() for t in kept]
    held = {"gradients": size(trained), "optimizer_state": size(state), "previous_gradients": size(previous)}
    # Not on the CPU: the peak of a process never falls, so it would be that of the most expensive state so far.
    return held | ({"peak_allocated": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {})


def reading_bytes(trainer) -> int:
    """Bytes that one reading has to move: what it reads of the gradients and what that is compared with come in, and a
    copy goes out, for the next reading."""
    kept = [t for tensors in trainer.grades._previous.values() for t in tensors]  # just as much as was read last
    return kernels.expected_bytes(kept, kept) + size(kept)


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


def watching(args, tokenizer, data) -> dict:
    """Step time of plain SFTTrainer, of GradES watching (sampled, exact) and of the authors' package.

    `own_ms` is what GradES takes itself, `limit_ms` the bytes it has to move over the bandwidth of a copy in this
    process. That is out of reach for a sample: it is gathered in pieces of 16 elements, which a copy is not.
    """
    from grades import GradEarlyStoppingCallback, GradEarlyStoppingConfig

    def authors():
        # It reads from the first step on. Its first reading is 0, which must not freeze anything in a short run.
        settings = GradEarlyStoppingConfig(tau=1e-30, alpha=0.99, enable_wandb_logging=False)
        return [GradEarlyStoppingCallback(settings)]

    never = {"tau": 0.0, "alpha": 0.0}
    variants = {
        "plain": (SFTTrainer, list, {}),
        "grades_trl": (Scheduled, list, {"grades": GradESConfig(**never)}),
        "grades_trl_exact": (Scheduled, list, {"grades": GradESConfig(**never, sample=1.0)}),
        "grades_1.0.6": (SFTTrainer, authors, {}),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    overhead: dict[str, list[float]] = {"grades_trl": [], "grades_trl_exact": []}
    moved: dict[str, int] = {}
    bandwidths = []
    Scheduled.plan = {}
    names = list(variants)
    for turn in range(args.rounds):
        bandwidths.append(memory_bandwidth())
        for name in in_turn(names, turn):
            cls, callbacks, extra = variants[name]
            clock = Clock()
            model = build("full", args, tokenizer)
            steps = WARM_UP + args.steps
            trainer = trainer_for(cls, model, args, tokenizer, data, "off", steps, [clock, *callbacks()], **extra)
            # Our clock runs first at the beginning of a step and must run last at its end.
            trainer.callback_handler.callbacks.sort(key=lambda callback: callback is clock)
            trainer.train()
            seconds[name].append(statistics.median(clock.seconds[WARM_UP:]))
            if name.startswith("grades_trl"):
                overhead[name].append(statistics.median(trainer._clock.overhead_seconds[WARM_UP:]))
                moved[name] = reading_bytes(trainer)
    # The ratio within each turn, then the median of these: a machine that slows down slows all of them.
    rows: dict[str, dict] = {
        name: {
            "ms": 1e3 * statistics.median(times),
            "over_plain": statistics.median(t / p for t, p in zip(times, seconds["plain"], strict=True)),
        }
        for name, times in seconds.items()
    }
    bandwidth = statistics.median(bandwidths)
    for name, times in overhead.items():
        rows[name] |= {
            "own_ms": 1e3 * statistics.median(times),
            "gathers": name == "grades_trl",
            "bytes": moved[name],
            "bytes_per_second": bandwidth,
            "limit_ms": 1e3 * moved[name] / bandwidth,
        }
    return rows


def frozen(args, tokenizer, data, method: str, checkpointing: str) -> list[dict]:
    """Step time with a growing share of the layers frozen from below, with a random half of all matrices, and with all
    of them where something else is left to train."""

    def bottom(share: float) -> Callable[[dict], set[str]]:
        return lambda matrices: {name for name, m in matrices.items() if m.layer < share * args.layers}

    def random_half(matrices: dict) -> set[str]:
        order = torch.randperm(len(matrices), generator=torch.Generator().manual_seed(0)).tolist()
        return {list(matrices)[i] for i in order[: len(matrices) // 2]}

    states = {"nothing frozen": bottom(0), **{f"{share:.0%} of layers": bottom(share) for share in SHARES}}
    states["50% of matrices, random"] = random_half
    if method == "full":
        states["100% of matrices, the rest trains"] = set
    names = list(states)
    rows: dict[str, dict] = {name: {"seconds": []} for name in names}
    for turn in range(args.rounds):
        for name in in_turn(names, turn):
            gc.collect()  # the last model and its trainer refer to each other
            cuts = name.endswith("of layers")
            clock = Clock()
            config = GradESConfig(freeze_norms=cuts, freeze_embeddings=cuts)
            trainer = trainer_for(
                Scheduled, build(method, args, tokenizer), args, tokenizer, data, checkpointing,
                WARM_UP + args.steps, [clock], grades=config,
            )  # fmt: skip
            trainer.callback_handler.callbacks.sort(key=lambda callback: callback is clock)
            chosen = states[name](trainer.watched)
            Scheduled.plan = {1: chosen}
            trainer.train()
            rows[name]["seconds"].append(statistics.median(clock.seconds[WARM_UP:]))
            rows[name] |= held_bytes(trainer)
            rows[name]["flops"] = accounting.step_flops(
                trainer.watched.values(), chosen, checkpointing=checkpointing != "off", cut=chosen if cuts else set()
            )
    start = rows["nothing frozen"]
    plain_flops, plain_seconds = start["flops"], start["seconds"]
    for name, row in rows.items():
        seconds = row.pop("seconds")
        # Of each turn, then the median of these: a machine that slows down slows all states.
        ratios = sorted(p / s for p, s in zip(plain_seconds, seconds, strict=True))
        row |= {"method": method, "checkpointing": checkpointing, "state": name}
        row |= {
            "ms": 1e3 * statistics.median(seconds),
            "speedup": statistics.median(ratios),
            "speedup_range": [ratios[0], ratios[-1]],
        }
        row["limit"] = plain_flops / row["flops"]
        held_mib = ", ".join(
            f"{key.replace('_', ' ')} {row[key] / 2**20:.1f}"
            for key in ("gradients", "optimizer_state", "previous_gradients", "peak_allocated")
            if key in row
        )
        print(
            f"  {method:<6} {checkpointing:<14} {name:<34} {row['ms']:8.1f} ms  {row['speedup']:.2f}x"
            f" ({ratios[0]:.2f} to {ratios[-1]:.2f}, limit {row['limit']:.2f}x)  MiB: {held_mib}",
            flush=True,
        )
    if method != "full":
        print(f"  {method:<6} {checkpointing:<14} {'100% of matrices':<34} the run ends", flush=True)
    return list(rows.values())


def cached(args, tokenizer, data, method: str, checkpointing: str) -> dict:
    """Half of the layers frozen: the cut alone, and with the prefix read from the cache from the second epoch on."""
    few = data.select(range(4 * args.batch))
    steps_in_epoch = 4
    seconds: dict[str, list[float]] = {"0": [], "256": []}
    losses: dict[str, list[float]] = {}
    for turn in range(args.rounds):
        for mib in in_turn(list(seconds), turn):
            clock = Clock()
            config = GradESConfig(freeze_norms=True, freeze_embeddings=True, cache_prefix=int(mib))
            trainer = trainer_for(
                Scheduled, build(method, args, tokenizer), args, tokenizer, few, checkpointing,
                3 * steps_in_epoch + args.steps, [clock], grades=config,
            )  # fmt: skip
            trainer.callback_handler.callbacks.sort(key=lambda callback: callback is clock)
            Scheduled.plan = {1: {n for n, m in trainer.watched.items() if m.layer < args.layers / 2}}
            trainer.train()
            seconds[mib].append(statistics.median(clock.seconds[3 * steps_in_epoch :]))
            losses.setdefault(mib, []).append(trainer.state.log_history[-1]["train_loss"])
    alone, both = (1e3 * statistics.median(times) for times in seconds.values())
    row = {"method": method, "checkpointing": checkpointing, "cut_ms": alone, "cut_and_cache_ms": both}
    row |= {
        "speedup": statistics.median(a / b for a, b in zip(*seconds.values(), strict=True)),
        "train_loss_difference": max(abs(a - b) for a, b in zip(*losses.values(), strict=True)),
    }
    print(
        f"  {method:<6} {checkpointing:<14} cut {alone:.1f} ms, cut and cache {both:.1f} ms: {row['speedup']:.2f}x",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3, help="measured steps per turn")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each variant")
    args = parser.parse_args()
    args.dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    args.scratch = Path("outputs/benchmark")
    shutil.rmtree(args.scratch, ignore_errors=True)
    disable_progress_bars()  # one after another for each model that is built
    logging.disable_progress_bar()
    tokenizer = builtin.tiny_qwen3()[1]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, len(tokenizer), (512, args.length), generator=generator)
    data = Dataset.from_dict({"input_ids": ids.tolist()})

    print("watching, nothing frozen", flush=True)
    result: dict = {"watching": watching(args, tokenizer, data)}
    for name, row in result["watching"].items():
        own = ""
        if "own_ms" in row:
            own = (
                f", itself {row['own_ms']:.2f} ms{' (gathers)' if row['gathers'] else ''}, limit {row['limit_ms']:.2f}"
                f" ms ({row['bytes'] / 1e6:.1f} MB at {row['bytes_per_second'] / 1e9:.1f} GB/s)"
            )
        print(f"  {name:<18} {row['ms']:8.1f} ms   {row['over_plain']:.3f} of plain{own}", flush=True)
    print("frozen", flush=True)
    result["frozen"] = [
        row
        for method in ("full", "lora", "qlora")
        for checkpointing in ("off", "non-reentrant", "reentrant")
        for row in frozen(args, tokenizer, data, method, checkpointing)
    ]
    print("half of the layers frozen, without and with the prefix cache", flush=True)
    result["cache"] = [
        cached(args, tokenizer, data, "lora", checkpointing) for checkpointing in ("off", "non-reentrant", "reentrant")
    ]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    settings = {key: value for key, value in vars(args).items() if key != "scratch"} | {"dtype": str(args.dtype)}
    result |= {"device": accounting.device_name(), "versions": accounting.versions(), "commit": commit}
    result["settings"] = settings
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"step_time_{'cuda' if torch.cuda.is_available() else 'cpu'}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{path}")


if __name__ == "__main__":
    main()
