"""Compare GradES with what else saves training time: every variant and seed is a run of its own, of the recipe itself.

  python recipes/compare.py --recipe sft_text --config configs/demo_text.yaml --seeds 0 1 2
  python recipes/compare.py --recipe sft_vlm --config configs/demo_vlm.yaml --variants baseline grades

All other flags go to the recipe. To resume after an interruption, or to add seeds or variants, run the same command
again: what is there is not run again. A run whose flags or config file have changed is repeated. After a change of the
code or of the data, delete the folders of the runs.

"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from grades_trl.config import CRITERION_SETTINGS, HELDOUT_SETTINGS
from grades_trl.distributed import refuse_several_processes
from grades_trl.extras import how_to_install, installed
from grades_trl.recipe import comparison_page
from grades_trl.recipe.bad_input import printable, run
from grades_trl.recipe.comparison import (
    RUN_ID,
    VARIANTS,
    Run,
    draw,
    format_comparison,
    markdown,
    matched_steps,
    reordered,
    split_flags,
    summarize,
)
from grades_trl.recipe.places import IS_INSTALLED, RECIPES, ROOT, find_config, this_command
from grades_trl.recipe.secret import without_secrets
from grades_trl.recipe.terminal import wrapped
from grades_trl.report.strict_json import write_json
from grades_trl.wording import counted

# Recipe -> subcommand. The command runs the file in recipes/, in a checkout and in an installed package.
SUBCOMMANDS = {file.removesuffix(".py"): name for name, file in RECIPES.items() if name in ("text", "vlm")}
DEFAULT_VARIANTS = ["baseline", "grades", "baseline_matched_flops", "nothing_frozen", "bema", "paper"]
FROM_GRADES = ("baseline_matched_flops", "random_order", "bottom_up")  # made from the GradES run of the same seed
# Variants with a metric of their own: these settings are not taken from the flags and the config file.
SCHEDULED = ("random_order", "bottom_up")
REPLACED = {
    "nothing_frozen": ("metric", *CRITERION_SETTINGS),
    "vision_frozen": ("metric", *CRITERION_SETTINGS, "stopping", "keep", *HELDOUT_SETTINGS, "train_towers"),
    **dict.fromkeys(SCHEDULED, ("metric", *CRITERION_SETTINGS)),
    "paper": ("metric", *CRITERION_SETTINGS, "stopping", "keep", *HELDOUT_SETTINGS),
}
# A comparison uploads nothing. So tokens are left out of its records.
NOT_OF_A_VARIANT = (
    "push_to_hub",
    "hub_token",
    "hub_model_id",
    "hub_strategy",
    "hub_private_repo",
    "hub_revision",
    "env",
)
LAST_LINES = 20  # of the log of a run that failed


def main() -> None:
    refuse_several_processes()
    args, recipe_flags = parse()
    if args.config:  # of the variables that a config file sets, as of tokens, nothing is written down
        variables = yaml.safe_load(find_config(args.config).read_text("utf-8")).get("env", {})
        os.environ |= {name: str(value) for name, value in variables.items()}
    output_dir = Path(args.output_dir)
    os.environ["WANDB_RUN_GROUP"] = output_dir.name
    failed = threading.Event()

    def run_seed(seed: int) -> list[Run]:
        runs: dict[str, Run] = {}
        for variant in (variant for variant in VARIANTS if variant in args.variants):
            if failed.is_set():
                break
            try:
                runs[variant] = run_variant(args, recipe_flags, variant, seed, runs.get("grades"))
            except BaseException:
                failed.set()  # the other seeds end after their current run
                raise
        return list(runs.values())

    count = len(args.variants) * len(args.seeds)
    if count > 2:
        variants, seeds = counted(len(args.variants), "variant"), " ".join(map(str, args.seeds))
        print(f"{count} runs: {variants}, seeds {seeds}. Fewer: --variants baseline grades --seeds 0", flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            runs = [run for of_seed in pool.map(run_seed, args.seeds) for run in of_seed]
        except KeyboardInterrupt:  # at once, without waiting for the runs: they end with this process
            os._exit(130)

    summary = summarize(runs)
    record = {
        "recipe": args.recipe,
        "config": args.config,
        "flags": recipe_flags,
        "jobs": args.jobs,
        "environment": next((run["environment"] for run in runs if "environment" in run), None),
        "commit": commit(),
        **summary,
        "runs": [
            {key: value for key, value in run.items() if key not in ("tracked", "argv", "scored_with")} for run in runs
        ],
    }
    write_json(output_dir / "compare.json", record)
    (output_dir / "compare.md").write_text(markdown(summary), encoding="utf-8")
    figure = output_dir / "compare.png" if installed("matplotlib") else None
    if figure is not None:
        draw(record, figure)
    comparison_page.write(record, figure, output_dir / "compare.html")
    print(printable(f"\n{format_comparison(summary)}\n\nall numbers  {output_dir / 'compare.md'}"))
    print(printable(f"report       {output_dir / 'compare.html'}"))
    if figure is None:
        print(f"It has no figure, which needs matplotlib: {how_to_install('matplotlib')}.")


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The flags of the comparison, and those that go to the recipe as they are."""
    variants = "\n".join(f"  {variant:<24}{meaning}" for variant, meaning in VARIANTS.items())
    parser = argparse.ArgumentParser(
        prog=shlex.join(this_command()),
        description=f"{__doc__}variants:\n{variants}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", choices=list(SUBCOMMANDS), required=True)
    parser.add_argument("--config", help="YAML file of the recipe, or its name; by default the recipe's demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--output_dir", default="outputs/compare", help="default: outputs/compare")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=list(VARIANTS),
        default=DEFAULT_VARIANTS,
        metavar="VARIANT",
        help=f"see above; default: {' '.join(DEFAULT_VARIANTS)}",
    )
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
        help="threshold of the variant `paper`: a number, or JSON with one per tower. None is published for a model "
        "of your own; by default it is half of each matrix's level in the grace period",
    )
    args, recipe_flags = parser.parse_known_args()
    if args.jobs < 1 or min(args.seeds) < 0:
        parser.error("--jobs is at least 1, and --seeds are at least 0")
    resuming = [
        flag for flag in split_flags(recipe_flags, ("resume", "resume_from_checkpoint"))[0] if flag[:2] == "--"
    ]
    if resuming:
        parser.error(f"{resuming[0]}: every run of a comparison begins at its first step; leave it out")
    dashed = [name.replace("_", "-") for name in NOT_OF_A_VARIANT]  # TRL takes both
    recipe_flags = split_flags(recipe_flags, (*NOT_OF_A_VARIANT, *dashed))[1]
    needing = [variant for variant in FROM_GRADES if variant in args.variants]
    if needing and "grades" not in args.variants:
        parser.error(f"{', '.join(needing)} need the GradES run of the same seed: add grades to --variants")
    sys.argv[:] = without_secrets(sys.argv)
    return args, recipe_flags


def run_variant(args: argparse.Namespace, recipe_flags: list[str], variant: str, seed: int, grades: Run | None) -> Run:
    """One run, or what an earlier run of the same command left.

    A result counts if it carries the id that the record of its command has: another process, which an earlier
    comparison has left behind, does not know that id.

    Raises:
        SystemExit: the run failed; with the last lines of its log.
        ValueError: the folder holds something else.
    """
    folder = Path(args.output_dir) / f"{variant}-seed{seed}"
    config = yaml.safe_load(find_config(args.config).read_text("utf-8")) if args.config else {}
    config = {name: value for name, value in config.items() if name not in NOT_OF_A_VARIANT}
    made_of: dict[str, Any] = {"config": config, "schedule": None}
    if variant in FROM_GRADES and (grades is None or "skipped" in grades):
        return {"variant": variant, "seed": seed, "skipped": "there is no GradES run to make it from"}
    if variant in SCHEDULED:
        assert grades is not None
        events_file = Path(args.output_dir) / f"grades-seed{seed}" / "grades" / "events.jsonl"
        all_events = [json.loads(line) for line in events_file.read_text("utf-8").splitlines()]
        latest = {event["matrix"]: event for event in all_events}
        events = [event for event in latest.values() if not event.get("unfrozen")]
        if not events:
            return {"variant": variant, "seed": seed, "skipped": "nothing froze"}
        made_of["schedule"] = reordered(events, grades["tracked"], variant, seed)
    towers = train_towers(recipe_flags, config)
    if variant == "vision_frozen" and (args.recipe == "sft_text" or "vision" not in towers or len(towers) == 1):
        has = "the model has no vision tower" if args.recipe == "sft_text" else f"what trains is {' '.join(towers)}"
        return {"variant": variant, "seed": seed, "skipped": has}
    if variant in REPLACED:
        made_of["config"] = {name: value for name, value in config.items() if name not in REPLACED[variant]}
        _, recipe_flags = split_flags(recipe_flags, REPLACED[variant])
    command = [sys.executable, "-P", "-m", "grades_trl.cli", SUBCOMMANDS[args.recipe]]
    command += ["--config", str(folder / "config.yaml")] if args.config else []
    command += [*recipe_flags, *variant_flags(variant, folder, grades, args.paper_tau, towers)]
    command += ["--seed", str(seed), "--output_dir", str(folder)]
    made_of["command"] = command[1:]  # the same from another virtual environment

    record, result = folder / "run.json", folder / "result.json"
    if folder.exists() and any(folder.iterdir()) and not record.exists():
        raise ValueError(f"{folder} is there, but was not made by a comparison: choose another --output_dir.")
    before = read_json(record)
    if before is not None and {key: before.get(key) for key in made_of} == made_of:
        run = finished_run(result, before["id"], variant, seed)
        if run is not None:
            print(wrapped(f"{describe(run)}  (from an earlier run)", sys.stdout), flush=True)
            return run
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run_id = uuid.uuid4().hex
    write_json(record, {"id": run_id, **made_of})
    if args.config:
        (folder / "config.yaml").write_text(yaml.safe_dump(made_of["config"]), encoding="utf-8")
    if made_of["schedule"]:
        lines = "".join(json.dumps(freeze) + "\n" for freeze in made_of["schedule"])
        (folder / "schedule.jsonl").write_text(lines, encoding="utf-8")
    exit_code = run_recipe(command, run_id, variant, folder / "log.txt")
    run = finished_run(result, run_id, variant, seed)
    if run is None or (exit_code != 0 and "skipped" not in run):
        last = "\n".join((folder / "log.txt").read_text("utf-8", errors="replace").splitlines()[-LAST_LINES:])
        raise SystemExit(f"{variant}, seed {seed} failed. The end of {folder / 'log.txt'}:\n\n{printable(last)}")
    print(wrapped(describe(run), sys.stdout), flush=True)
    return run


def run_recipe(command: list[str], run_id: str, variant: str, log_file: Path) -> int:
    """Runs a recipe that ends when this process does (see `exit_with_comparison`); returns its exit code. In W&B the
    runs of a variant have its name as their job type."""
    environment = os.environ | {RUN_ID: run_id, "WANDB_JOB_TYPE": variant}
    with (
        open(log_file, "wb") as log,
        subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
        ) as process,
    ):
        return process.wait()


def finished_run(result: Path, run_id: str, variant: str, seed: int) -> Run | None:
    """What is in `result.json`, if it is there, whole, and of the run with that id."""
    found = read_json(result)
    if found is None or found.get("id") != run_id:
        return None
    run = {"variant": variant, "seed": seed, **found}
    if run["results"]["final/test_loss"] is None:
        since = "" if run["diverged_at"] is None else f" at step {run['diverged_at']}"
        run["skipped"] = f"diverged{since}"
    return run


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; `None` if there is no file, or a torn one."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def train_towers(flags: list[str], config: dict[str, Any]) -> list[str]:
    """The towers that train in the baseline: by the flags, else by the config file, else all."""
    flag, _ = split_flags(flags, ("train_towers",))
    given = [word.removeprefix("--train_towers").removeprefix("=") for word in flag]
    return [tower for tower in given if tower] or config.get("train_towers") or ["vision", "projector", "language"]


def variant_flags(
    variant: str, folder: Path, grades: Run | None, paper_tau: str, towers: Collection[str] = ()
) -> list[str]:
    """What makes a run of the recipe a run of that variant."""
    if variant == "grades":
        return ["--grades", "true"]
    if variant == "paper":  # whatever the config says of these
        settings = "--metric grad_change --auto_ratio 0.5 --alpha 0.55 --patience 1 --measure_every 1"
        settings += " --sample_fraction 1 --stopping all_frozen --keep last"
        settings += " --track_projector false --freeze_norms false --freeze_embeddings false"
        return ["--grades", "true", *settings.split(), "--tau", paper_tau]
    if variant in SCHEDULED:
        return ["--grades", "true", "--metric", "schedule", "--schedule", str(folder / "schedule.jsonl")]
    if variant == "nothing_frozen":
        return ["--grades", "true", "--metric", "none"]
    if variant == "early_stopping":
        return ["--grades", "false", "--early_stopping_patience", "3"]
    if variant == "bema":
        return ["--grades", "false", "--bema", "true"]
    if variant == "vision_frozen":  # with what makes frozen layers cheap, and without what freezes or ends
        engine = "--grades true --metric none --stopping end_of_schedule --keep last --train_towers"
        return [*engine.split(), *(tower for tower in towers if tower != "vision")]
    if variant == "baseline_matched_flops":
        assert grades is not None
        steps = matched_steps(grades)
        flags = ["--grades", "false", "--max_steps", str(steps)]
        if grades["warmup_steps"] >= 1:  # below 1 it is a fraction of the schedule already
            fraction = steps / grades["total_steps"]
            flags += ["--warmup_steps", str(max(1, round(grades["warmup_steps"] * fraction)))]
        return flags
    return ["--grades", "false"]


def describe(run: Run) -> str:
    name = f"{run['variant']:<22} seed {run['seed']}: "
    if "skipped" in run:
        return name + printable(run["skipped"])
    return name + printable(
        f"{run['steps']:>6,} of {counted(run['total_steps'], 'step')}, "
        f"test loss {run['results']['final/test_loss']:.4f}, {run['seconds']['total']:.1f} s, {run['stop_reason']}"
    )


def commit() -> str | None:
    """The commit of this code, with "-dirty" after it if files were changed; `None` without git or a checkout."""
    if IS_INSTALLED or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


if __name__ == "__main__":
    run(main)
