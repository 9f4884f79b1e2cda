"""Write the tables of docs/results.md from the records in benchmarks/results.

  python benchmarks/results_page.py

The record of a comparison is the compare.json of `recipes/compare.py`, committed as `compare_<name>.json`. That of the
step times is written by `benchmarks/step_time.py`. The images are made by `benchmarks/pictures.py`.
"""

import json
import shlex
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grades_trl.recipe.comparison import VARIANTS, by_seed, numbers_of, numbers_of_variant

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"
BEGIN, END = "<!-- {}: written by benchmarks/results_page.py -->\n", "<!-- end -->"
# Record -> heading, and what it shows.
TITLES = {
    "demo_vlm": (
        "A new task: answer in another form",
        "The demo. A tiny LLaVA that reads handwritten numbers as 372 learns to answer 3-7-2: the vision tower knows "
        "the images, and hardly needs to move. 1,000 images, all parameters.",
    ),
    "demo_vlm_controls": (
        "The same, beside more controls",
        "`nothing_frozen`: what the average of the weights and the ending do alone. `vision_frozen`: the tower frozen "
        "from the first step. `random_order`, `bottom_up`: the freezes of GradES, of other matrices.",
    ),
    "demo_vlm_early_stopping": (
        "The same, with the early stopping of Transformers",
        "It goes back to its best checkpoint. Its validation, 1,000 rows every 30 steps, is not in its FLOPs: it "
        "would add about 0.2.",
    ),
    "demo_vlm_bema": (
        "The same, with BEMA",
        "The whole baseline, scored with TRL's average of the weights (`BEMACallback`, moved in each step). It is "
        "below the last weights of the baseline in each seed.",
    ),
    "demo_vlm_lora": (
        "The same, with LoRA",
        "Adapters of rank 16 on all linear layers, learning rate 4e-3, TRL's dropout of 0.05.",
    ),
    "vlm_new_task_700": (
        "The same task with 700 images",
        "In seed 2 the whole baseline also has few right answers. GradES ran to its end there, and is 1 to 3 points "
        "below.",
    ),
    "vlm_new_task_700_lora": (
        "700 images with LoRA",
        "Adapters of rank 16, learning rate 2e-3. At 4e-3 the loss has spikes, and the shortest runs end best: GradES "
        "was 3 to 18 points below the shortened baseline there (`dev/LOG.md`).",
    ),
    "vlm_new_task_4000": (
        "The same task with 4,000 images",
        "The baseline is still learning when its 600 steps end: it has seen each image five times.",
    ),
    "vlm_new_task_4000_lora": (
        "4,000 images with LoRA",
        "Adapters of rank 16, learning rate 2e-3. The tower freezes, and nothing ends early.",
    ),
    "vlm_new_images": (
        "New images: the vision tower has to move",
        "The same model learns to read inverted images. Here it must *not* be frozen, and by default it is not.",
    ),
    "vlm_new_images_lora": (
        "The same with LoRA",
        "Adapters of rank 16 on all linear layers, learning rate 4e-3. Nothing froze.",
    ),
    "digits_700": (
        "From scratch: nothing to freeze, and still learning at the end",
        "A tiny LLaVA learns to read from 700 images, seen 45 times at a constant rate. What helps is the average of "
        "the weights. The early stopping of Transformers, with one validation in 250 steps, ends no run; it goes back "
        "to its best checkpoint.",
    ),
    "smollm2_60x8": (
        "A quick start with a real model: 60 steps of 8 examples",
        "SmolLM2-135M-Instruct, LoRA, one-line descriptions of functions. There is nothing to freeze, nothing to end: "
        "GradES costs its three held-out measurements, and gives the same weights.",
    ),
    "smollm2_1000x1": (
        "The same model, 1,000 examples once",
        "125 steps of 8. Nothing freezes, nothing ends, and the weights are the same. In seeds 1 and 2 the steps were "
        "1.04 epochs, since fewer rows are within `--max_length`. They were measured twice as often, as runs in which "
        "rows come back. It takes 1.5 epochs now.",
    ),
    "smollm2_1000x3": (
        "The same model, 1,000 examples three times",
        "SmolLM2 learns to write dates as ISO 8601. The held-out loss falls to the end, nothing freezes, and the "
        "weights are the same. GradES costs its ten held-out measurements. Seed 2 ran on another CPU.",
    ),
    "smollm2_9_epochs": (
        "The same model, 9 epochs of 94 to 97 examples: a run that overfits",
        "GradES ends in the middle of its schedule, after its fourth measurement, and keeps the average of the third. "
        "It is below all others in each seed. Nothing froze. The validation of `early_stopping`, 66 rows after each "
        "epoch, is not in its FLOPs: it would add about 0.14.",
    ),
    "dates_150": (
        "Few examples: a run that overfits",
        "A tiny Qwen3 learns to write dates as ISO 8601 from 150 examples, from scratch; 600 steps are 128 epochs.",
    ),
}
METHODS = {"full": "full", "lora": "LoRA r 16", "qlora": "QLoRA r 16"}


def read(name: str) -> dict[str, Any]:
    """A record."""
    return json.loads((RESULTS / f"compare_{name}.json").read_text("utf-8"))


def table(record: dict[str, Any]) -> str:
    """Median and range of every variant over its seeds, as Markdown."""
    seeds = by_seed(record["runs"])
    lines = ["| variant | seeds | steps | FLOPs | test loss | exact match, % |", "|---|---|---|---|---|---|"]
    for variant in VARIANTS:
        found = numbers_of_variant(variant, seeds)
        if found:
            lines.append(f"| `{variant}` | {len(found)} | {cells(found)} |")
    return "\n".join(lines)


def cells(found: list[dict[str, Any]]) -> str:
    """Steps, FLOPs, test loss and exact match."""
    exact = [100 * number for run in found if (number := run["exact_match"]) is not None]
    numbers = [
        spread((run["steps"] for run in found), ",.0f"),
        spread((run["flops"] for run in found), ".2f"),
        spread((run["test_loss"] for run in found), ".3f"),
        spread(exact, ".1f") if exact else "-",
    ]
    return " | ".join(numbers)


def spread(values: Iterable[float | None], form: str) -> str:
    """Median and range."""
    found = [value for value in values if value is not None]
    middle, low, high = (format(value, form) for value in (statistics.median(found), min(found), max(found)))
    return middle if low == high else f"{middle} ({low} to {high})"


def seed_by_seed(runs: list[dict[str, Any]]) -> str:
    """Points of exact match of GradES above each other variant, seed by seed."""
    exact = {(run["variant"], run["seed"]): run["exact_match"] for run in runs}
    lines = []
    for other in ("baseline", "baseline_matched_flops"):
        pairs = [(number, exact.get((other, seed))) for (name, seed), number in exact.items() if name == "grades"]
        points = [f"{100 * (own - its):+.1f}" for own, its in pairs if own is not None and its is not None]
        if points:
            lines.append(f"Points of exact match above `{other}`, seed by seed: {', '.join(points)}.")
    return "  \n".join(lines)


def command(record: dict[str, Any]) -> str:
    """The command that makes a record."""
    seeds = [str(entry["seed"]) for entry in record["seeds"]]
    words = [
        "python",
        "recipes/compare.py",
        "--recipe",
        record["recipe"],
        "--config",
        record["config"],
        *record["flags"],
    ]
    return shlex.join([*words, "--seeds", *seeds, "--variants", *record["variants"]])


def section(name: str) -> str:
    """One comparison: heading, what it shows, table, command."""
    record = read(name)
    title, text = TITLES[name]
    picture = f"![Test loss and exact match of each run against its FLOPs](images/compare_{name}.png)"
    points = seed_by_seed([run | numbers_of(run, {}) for run in record["runs"]])
    parts = [f"## {title}", text, table(record), points, picture, f"```bash\n{command(record)}\n```"]
    if name == "demo_vlm":
        parts.append(on_more_images())
    return "\n\n".join(part for part in parts if part) + "\n"


def on_more_images() -> str:
    """The models of the demo, scored again."""
    record = json.loads((RESULTS / "demo_vlm_more_images.json").read_text("utf-8"))
    lines = ["| variant | seeds | exact match, % |", "|---|---|---|"]
    for variant in dict.fromkeys(run["variant"] for run in record["runs"]):
        found = [100 * run["exact_match"] for run in record["runs"] if run["variant"] == variant]
        lines.append(f"| `{variant}` | {len(found)} | {spread(found, '.1f')} |")
    text = f"The models of these runs, scored once more on {record['images']:,} other images of the held-out scans:"
    command = "python benchmarks/score_again.py outputs/compare"
    return "\n\n".join((text, "\n".join(lines), seed_by_seed(record["runs"]), f"```bash\n{command}\n```"))


def heldout_metrics() -> str:
    """GradES with each score of the held-out rows."""
    lines = ["| setting | held-out score | steps | FLOPs | test loss | exact match, % |", "|---|---|---|---|---|---|"]
    for name, loss in (("demo_vlm", "demo_vlm_controls"), ("dates_150", "dates_150")):
        files = {"loss": loss} | {metric: f"{name}_{metric}" for metric in ("token_accuracy", "exact_match")}
        for metric, file in files.items():
            runs = [run for run in read(file)["runs"] if run["variant"] == "grades"]
            lines.append(f"| {name} | `{metric}` | {cells([numbers_of(run, {}) for run in runs])} |")
    text = "Three seeds each. `exact_match` generates answers to a few rows, and is too noisy to end a run well."
    command = (
        "python recipes/compare.py --recipe sft_text --config configs/dates_150.yaml --variants grades \\\n"
        "  --heldout_metric token_accuracy"
    )
    return "\n\n".join(("## Which held-out score", text, "\n".join(lines), f"```bash\n{command}\n```")) + "\n"


def step_times() -> str:
    """Speed-up of a whole step by method and share of frozen layers, and what measuring costs."""
    record = json.loads((RESULTS / "step_time_cpu.json").read_text("utf-8"))
    rows = {(row["method"], row["checkpointing"], row["state"]): row for row in record["frozen"]}
    states = {
        "25% of layers": "25 % frozen",
        "50% of layers": "50 %",
        "75% of layers": "75 %",
        "50% of matrices, random": "half of the matrices, at random",
    }
    lines = [f"| method | checkpointing | {' | '.join(states.values())} |", "|---|" + "---|" * (1 + len(states))]
    for method, checkpointing in dict.fromkeys((method, checkpointing) for method, checkpointing, _ in rows):
        found = [rows[method, checkpointing, state] for state in states]
        speedups = " | ".join(f"{row['speedup']:.2f}x of {row['limit']:.2f}x" for row in found)
        lines.append(f"| {METHODS[method]} | {checkpointing} | {speedups} |")
    settings, measuring, cached = record["settings"], record["measuring"], record["cached"]
    text = (
        f"`python benchmarks/step_time.py`, alone on the machine ({record['device']}): how much faster a whole step "
        "is when that share of the layers is frozen from below, *of* the limit that the FLOPs set. The limit counts "
        "matrix products alone. What lies between them is skipped too, so that a speed-up can be above it. Medians of "
        f"{settings['rounds']} turns. Qwen3 with {settings['layers']} layers of width {settings['hidden']}, "
        f"{settings['batch'] * settings['length']} tokens a step, float32."
    )
    gain = measuring["gain"]
    more = (
        f"Measuring the gain in every step: {gain['over_baseline']:.3f} of the baseline's step time. GradES itself "
        f"took {gain['own_ms']:.1f} of {gain['ms']:.0f} ms. The paper's metric on all elements: "
        f"{measuring['grad_change_exact']['over_baseline']:.3f}. The authors' package: "
        f"{measuring['grades_1.0.6']['over_baseline']:.3f}."
    )
    ratios = ", ".join(f"{row['speedup']:.2f}x ({row['checkpointing']})" for row in cached)
    last = (
        "With half of the layers frozen, their outputs come from the activation cache from the second epoch on. "
        f"Beyond the skipped backward pass that gave, with LoRA and by checkpointing, {ratios}."
    )
    return "\n\n".join((text, "\n".join(lines), more, last)) + "\n"


def page() -> str:
    """The whole page with its tables as the records have them."""
    text = PAGE.read_text("utf-8")
    for name, written in (
        ("comparisons", "\n".join([*map(section, TITLES), heldout_metrics()])),
        ("step times", step_times()),
    ):
        begin = BEGIN.format(name)
        before, rest = text.split(begin)
        text = before + begin + "\n" + written + "\n" + END + rest.split(END, 1)[1]
    return text


def main() -> None:
    PAGE.write_text(page(), "utf-8")


if __name__ == "__main__":
    main()
