"""Compare GradES with what else saves training time: every arm and seed is a run of its own, of the recipe itself.

  python recipes/compare.py --recipe sft_text --config configs/demo_text.yaml --seeds 0 1 2
  python recipes/compare.py --recipe sft_vlm --config configs/demo_vlm.yaml --arms plain grades --learning_rate 1e-3

All other flags go to the recipe. What is there already is not run again: start the same command anew after an
interruption, or with more seeds or arms. A run whose flags or config file have changed is repeated; after a change of
the code or of the data, delete the folders of the runs.

"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from grades_trl.recipe.comparison import ARMS, Cell, draw, markdown, replayed, summarize

RECIPES = Path(__file__).parent
DEFAULT_ARMS = ["plain", "shortened", "early_stopping", "grades", "random", "paper"]
NEED_GRADES = ("shortened", "random", "bottom_up")  # they are made from the GradES run of the same seed
LAST_LINES = 20  # of the log of a run that failed


def main() -> None:
    args, recipe_flags = parse()
    output_dir = Path(args.output_dir)
    os.environ["WANDB_RUN_GROUP"] = output_dir.name
    failed = threading.Event()

    def run_seed(seed: int) -> list[Cell]:
        cells: dict[str, Cell] = {}
        for arm in (arm for arm in ARMS if arm in args.arms):
            if failed.is_set():
                break
            try:
                cells[arm] = run_cell(args, recipe_flags, arm, seed, cells.get("grades"))
            except BaseException:
                failed.set()  # the other seeds end after the run they are at
                raise
        return list(cells.values())

    with ThreadPoolExecutor(args.jobs) as pool:
        cells = [cell for of_seed in pool.map(run_seed, args.seeds) for cell in of_seed]

    summary = summarize(cells)
    first = next(cell for cell in cells if "skipped" not in cell)
    record = {
        "recipe": args.recipe,
        "config": args.config,
        "flags": recipe_flags,
        "jobs": args.jobs,
        "device": first["device"],
        "versions": first["versions"],
        "commit": commit(),
        **summary,
        "cells": [
            {key: value for key, value in cell.items() if key not in ("watched", "argv", "scored_with")}
            for cell in cells
        ],
    }
    (output_dir / "compare.json").write_text(json.dumps(record, indent=2) + "\n")
    (output_dir / "compare.md").write_text(markdown(summary))
    draw(cells, summary, output_dir / "compare.png")
    print(f"\n{markdown(summary)}\n{output_dir / 'compare.png'}")


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The flags of the comparison, and those that go to the recipe as they are."""
    arms = "\n".join(f"  {arm:<16}{meaning}" for arm, meaning in ARMS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}arms:\n{arms}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", choices=("sft_text", "sft_vlm"), required=True)
    parser.add_argument("--config", help="YAML file of the recipe; by default the recipe's demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--output_dir", default="outputs/compare", help="default: outputs/compare")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=DEFAULT_ARMS, metavar="ARM", help="see above")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="seeds that run side by side (default: 1). They slow each other down: with more than 1, times can be "
        "compared within this comparison only, and roughly",
    )
    parser.add_argument(
        "--paper_tau",
        default="auto",
        help="threshold of the arm `paper`: a number, or JSON with one per tower. None is published for a model of "
        "your own; by default it is half of each matrix's level in the grace period",
    )
    args, recipe_flags = parser.parse_known_args()
    if "grades" not in args.arms and (needing := [arm for arm in NEED_GRADES if arm in args.arms]):
        parser.error(f"{', '.join(needing)} need the GradES run of the same seed: add grades to --arms")
    return args, recipe_flags


def run_cell(args: argparse.Namespace, recipe_flags: list[str], arm: str, seed: int, grades: Cell | None) -> Cell:
    """One run, or what an earlier run of the same command left.

    Raises:
        SystemExit: the run failed; with the last lines of its log.
    """
    folder = Path(args.output_dir) / f"{arm}-seed{seed}"
    made_of: dict[str, Any] = {"config": Path(args.config).read_text() if args.config else None, "events": None}
    if arm in ("random", "bottom_up"):
        assert grades is not None
        events_file = Path(args.output_dir) / f"grades-seed{seed}" / "grades" / "events.jsonl"
        events = [json.loads(line) for line in events_file.read_text().splitlines()]
        if not events:
            return {"arm": arm, "seed": seed, "skipped": "nothing froze"}
        made_of["events"] = replayed(events, grades["watched"], arm, seed)
    command = [sys.executable, str(RECIPES / f"{args.recipe}.py")]
    command += ["--config", args.config] if args.config else []
    command += [*recipe_flags, *arm_flags(arm, folder, grades, args.paper_tau)]
    command += ["--seed", str(seed), "--output_dir", str(folder)]
    made_of["command"] = command[1:]  # the same from another virtual environment

    record, result = folder / "cell.json", folder / "result.json"
    if folder.exists() and not record.exists():
        raise SystemExit(f"{folder} is there, but was not made by a comparison: choose another --output_dir.")
    if result.exists() and json.loads(record.read_text()) == made_of:
        cell = {"arm": arm, "seed": seed, **json.loads(result.read_text())}
        print(f"{describe(cell)}  (from an earlier run)", flush=True)
        return cell
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    record.write_text(json.dumps(made_of))
    if made_of["events"]:
        (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in made_of["events"]))
    with open(folder / "log.txt", "w") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        last = "\n".join((folder / "log.txt").read_text().splitlines()[-LAST_LINES:])
        raise SystemExit(f"{arm}, seed {seed} failed. The end of {folder / 'log.txt'}:\n\n{last}")
    cell = {"arm": arm, "seed": seed, **json.loads(result.read_text())}
    print(describe(cell), flush=True)
    return cell


def arm_flags(arm: str, folder: Path, grades: Cell | None, paper_tau: str) -> list[str]:
    """What makes a run of the recipe a run of that arm."""
    if arm == "grades":
        return ["--grades", "true"]
    if arm == "paper":  # whatever the config says of these
        settings = "--metric grad_change --auto_ratio 0.5 --alpha 0.55 --patience 1 --interval 1 --sample 1"
        settings += " --track_projector false --freeze_norms false --freeze_embeddings false"
        return ["--grades", "true", *settings.split(), "--tau", paper_tau]
    if arm == "together":  # no reading is below this: only the sum over all matrices ends the run
        return ["--grades", "true", "--metric", "heldout_gain", "--tau=-1e9"]
    if arm in ("random", "bottom_up"):
        return ["--grades", "true", "--replay", str(folder / "events.jsonl")]
    if arm == "early_stopping":
        return ["--grades", "false", "--early_stopping_patience", "3"]
    if arm == "shortened":
        assert grades is not None
        flags = ["--grades", "false", "--max_steps", str(grades["steps"])]
        if grades["warmup_steps"] >= 1:  # below 1 it is a fraction of the schedule already
            share = grades["steps"] / grades["total_steps"]
            flags += ["--warmup_steps", str(max(1, round(grades["warmup_steps"] * share)))]
        return flags
    return ["--grades", "false"]


def describe(cell: Cell) -> str:
    return (
        f"{cell['arm']:<15} seed {cell['seed']}: {cell['steps']:>6,} of {cell['total_steps']:,} steps, test loss "
        f"{cell['results']['final/test_loss']:.4f}, {cell['seconds']['total']:.1f} s, {cell['stop_reason']}"
    )


def commit() -> str | None:
    """The commit of this code, with "-dirty" after it if files were changed; `None` without git."""
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(RECIPES), "describe", "--always", "--dirty", "--abbrev=40"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


if __name__ == "__main__":
    main()
