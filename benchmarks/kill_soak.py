"""SIGKILL at random moments: each killed run is resumed until it ends, and must end as the one that was left alone.

  python benchmarks/kill_soak.py                                  # 20 kills over all set-ups, on tiny models
  python benchmarks/kill_soak.py --setups text_gain --kills 3

The set-ups cover every metric and stopping rule, full and LoRA, text and images, Unsloth's CPU backend if it is
installed, and the baseline with early stopping. A run is the recipe itself. It is killed somewhere between writing
down its arguments and its end, and started again with the same command and `--resume auto`. Compared are the final
weights, bit for bit, all freezes, measurements and values, and the scores.

This process imports everything once and forks for each run. Exit code 1: an end differs, or a run failed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from grades_trl.wording import counted

ROOT = Path(__file__).resolve().parents[1]

EVERY = "--heldout_every 4 --heldout_cost 1 --heldout_grace 0"
TEXT = (
    "sft_text.py --config demo_text --max_steps 32 --per_device_train_batch_size 8 --max_train_samples 128 "
    "--max_eval_samples 32 --eval_strategy no --num_eval_generations 4 --num_samples 1 --max_new_tokens 4 "
    "--logging_steps 1 --save_strategy steps --save_steps 3 --save_total_limit 2 --report_to none"
)
VLM = TEXT.replace("sft_text.py --config demo_text", "sft_vlm.py --config demo_vlm").replace("32 --per", "20 --per")
TAU = "--tau auto --auto_ratio 1"
LORA = "--use_peft --lora_r 4 --lora_alpha 8 --lora_dropout 0.1"
SCHEDULE = '{"*layers.0.*":5,"*layers.1.*":11}'
SETUPS = {
    "text_gain": f"{TEXT} --metric gain --stopping heldout {EVERY}",
    "text_grad_change": f"{TEXT} --metric grad_change {TAU} --alpha 0.3 --stopping all_frozen",
    "text_grad_norm": f"{TEXT} --metric grad_norm {TAU} --stopping end_of_schedule --keep best_average {EVERY}",
    "text_weight_change": f"{TEXT} --metric weight_change {TAU} --alpha 0.3 --stopping heldout {EVERY}",
    "text_schedule": f"{TEXT} --metric schedule --schedule {SCHEDULE} --stopping end_of_schedule",
    "text_none": f"{TEXT} --metric none --stopping train_accuracy --keep last --gradient_accumulation_steps 2",
    "text_early_stopping": f"{TEXT} --grades false --eval_strategy steps --eval_steps 3 --early_stopping_patience 2",
    "text_lora": f"{TEXT} {LORA} --model_name_or_path MODEL --metric grad_norm {TAU} --alpha 0.2 {EVERY}",
    "text_lora_gain": f"{TEXT} {LORA} --model_name_or_path MODEL --metric gain --stopping heldout {EVERY}",
    "vlm": f"{VLM} --metric gain --stopping heldout {EVERY}",
    "vlm_lora": f"{VLM} {LORA} --metric grad_change {TAU} --alpha 0.3 --stopping all_frozen",
    "unsloth": f"{TEXT} {LORA} --backend unsloth --model_name_or_path MODEL --metric grad_norm {TAU} {EVERY}",
}
RECORD = ("events.jsonl", "heldout.jsonl", "history.parquet", "gain.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="in all, shared by the set-ups (default: 20)")
    parser.add_argument("--setups", nargs="+", choices=list(SETUPS), default=list(SETUPS), metavar="SETUP")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/kill_soak"))
    args = parser.parse_args()
    args.output_dir = args.output_dir.resolve()
    failures = 0
    if "unsloth" in args.setups and len(args.setups) > 1:  # it must be imported first, and changes the others
        args.setups.remove("unsloth")
        share = args.kills // (len(args.setups) + 1)
        if importlib.util.find_spec("unsloth") is None:
            print("unsloth is not installed: left out", flush=True)
        else:
            args.kills -= share
            flags = ["--setups", "unsloth", "--kills", share, "--seed", args.seed, "--output_dir", args.output_dir]
            failures += subprocess.run([sys.executable, __file__, *map(str, flags)]).returncode != 0
    import_all(unsloth=args.setups == ["unsloth"])
    moments = random.Random(args.seed)
    for number, setup in enumerate(args.setups):
        kills = args.kills // len(args.setups) + (number < args.kills % len(args.setups))
        failures += soak(setup, kills, args.output_dir / setup, moments)
    ended = f"{failures} FAILED" if failures else "every run ended as the straight one"
    print(f"{counted(args.kills, 'kill')}: {ended}")
    sys.exit(failures > 0)


def import_all(unsloth: bool) -> None:
    """What the recipes import, once, before the processes fork."""
    own, sys.argv = sys.argv, ["kill_soak.py", "--backend", "unsloth" if unsloth else "transformers"]
    importlib.import_module("grades_trl.recipe.backend")
    sys.path[:0] = [str(ROOT)]
    for recipe in ("sft_text", "sft_vlm"):
        runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"), run_name="imported")
    sys.argv = own


def soak(setup: str, kills: int, folder: Path, moments: random.Random) -> int:
    """Runs a set-up once without and then with so many kills; returns how many ends differ."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if "MODEL" in SETUPS[setup]:
        save_model(folder / "model")
    code, seconds = run(setup, folder, "straight")
    print(f"{setup}: {seconds:.1f} s when it is left alone", flush=True)
    if code != 0:
        return failed(folder / "straight.log")
    differ = done = starts = 0
    while done < kills:
        starts += 1
        out = folder / f"killed{starts}"
        was_killed = False
        while True:
            after = moments.uniform(0, seconds) if done < kills else None
            code, took = run(setup, folder, out.name, kill_after=after)
            if code != -signal.SIGKILL:
                break
            was_killed = True
            done += 1
            print(f"  killed after {after:5.1f} s: {found(out)}", flush=True)
        if code != 0:
            return differ + failed(folder / f"{out.name}.log")
        if not was_killed:
            seconds = min(seconds, took)  # the first one was slower: nothing was warm
            shutil.rmtree(out)
            continue
        differing = differences(folder / "straight", out)
        differ += bool(differing)
        print(f"  ended: {', '.join(differing) + ' DIFFER' if differing else 'the same, bit for bit'}", flush=True)
    return differ


def run(setup: str, folder: Path, name: str, kill_after: float | None = None) -> tuple[int, float]:
    """Exit code (negative for a signal), and seconds since it wrote down its arguments, after its first step."""
    script, *flags = SETUPS[setup].split()
    model = str(folder / "model")
    argv = [str(ROOT / "recipes" / script), *(model if flag == "MODEL" else flag for flag in flags)]
    argv += ["--output_dir", str(folder / name), "--resume", "auto"]
    arguments = folder / name / "arguments.json"
    before = modified(arguments)
    pid = fork(lambda: runpy.run_path(argv[0], run_name="__main__"), argv, folder / f"{name}.log")
    began = None
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), time.monotonic() - (began or time.monotonic())
        if began is None and modified(arguments) != before:
            began = time.monotonic()
        if kill_after is not None and began is not None and time.monotonic() - began > kill_after:
            os.kill(pid, signal.SIGKILL)
            kill_after = None
        time.sleep(0.002)


def fork(work: Callable[[], object], argv: list[str], log: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = argv
        work()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def modified(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def save_model(folder: Path) -> None:
    """The tiny model of the demo, for set-ups that load one. In a process of its own: building it draws numbers."""
    from grades_trl.recipe import builtin

    def build() -> None:
        model, tokenizer = builtin.tiny_qwen3(seed=0)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    os.waitpid(fork(build, ["build"], folder.with_suffix(".log")), 0)


def found(out: Path) -> str:
    """What a killed run has left."""
    metrics = out / "grades" / "metrics.jsonl"
    lines = metrics.read_text("utf-8").splitlines() if metrics.exists() else []
    step = next((json.loads(line)["step"] for line in reversed(lines) if line.endswith("}")), "?")
    saved = sorted(int(path.name.partition("-")[2]) for path in out.glob("checkpoint-*"))
    saving = [path.name for path in (out / "_saving").glob("*")]
    parts = [f"step {step}", f"checkpoints {saved}"]
    parts += [f"while saving {saving[0]}"] if saving else []
    parts += ["its scores were written"] if (out / "result.json").exists() else []
    return ", ".join(parts)


def differences(straight: Path, other: Path) -> list[str]:
    """What the two runs do not have in common."""
    from safetensors.torch import load_file

    differing = []
    for path in straight.glob("*.safetensors"):
        a, b = load_file(path), load_file(other / path.name)
        if a.keys() != b.keys() or not all(a[name].equal(b[name]) for name in a):
            differing.append(path.name)
    for name in RECORD:
        a_file, b_file = straight / "grades" / name, other / "grades" / name
        if a_file.exists() != b_file.exists() or (a_file.exists() and a_file.read_bytes() != b_file.read_bytes()):
            differing.append(name)
    results = [json.loads((run / "result.json").read_text("utf-8")) for run in (straight, other)]
    differing += [key for key in ("results", "steps", "stop_reason") if results[0][key] != results[1][key]]
    return differing


def failed(log: Path) -> int:
    print("  FAILED:\n" + "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-15:]), flush=True)
    return 1


if __name__ == "__main__":
    main()
