"""Runs of the same recipe side by side: what each variant reached and what it took. Summary, tables and figure.

A run is `{"variant": ..., "seed": ...}` with what its `result.json` holds, or with `"skipped"`, the reason why there
are no scores.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import textwrap
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grades_trl.extras import require
from grades_trl.model.matrices import TOWER_ORDER

Run = dict[str, Any]

# In the environment of a recipe that compare.py has started: the id that its `result.json` must carry.
RUN_ID = "GRADES_COMPARISON_RUN_ID"

# In the order in which the runs of a seed are made: those after `grades` may need what it left.
VARIANTS = {
    "baseline": "the whole schedule, nothing frozen",
    "grades": "GradES as configured",
    "baseline_matched_flops": "the baseline, its whole schedule shortened to the FLOPs of the GradES run of the seed",
    "early_stopping": "the baseline, ended when the validation loss stops improving; its best checkpoint is scored",
    "nothing_frozen": "GradES as configured, but without freezing: the average of the weights and the ending alone",
    "bema": "the baseline, scored with a running average of its weights (BEMA, arXiv 2508.00180)",
    "vision_frozen": "the whole schedule with the vision tower frozen from the start, its outputs cached",
    "random_order": "the freezes of the GradES run at the same steps, of matrices chosen at random",
    "bottom_up": "the freezes of the GradES run at the same steps, of matrices from the lowest layer up",
    "paper": "GradES with the paper's metric and settings",
}
PARTS = ("training", "validation", "saving", "grades")
# All kinds of color vision tell most of these apart; the marks tell all of them apart.
COLORS_AND_MARKS = {
    "baseline": ("#52606d", "o"),
    "grades": ("#0072b2", "s"),
    "baseline_matched_flops": ("#d55e00", "^"),
    "early_stopping": ("#009e73", "D"),
    "nothing_frozen": ("#cc79a7", "v"),
    "bema": ("#e69f00", "P"),
    "vision_frozen": ("#56b4e9", "X"),
    "random_order": ("#882255", "<"),
    "bottom_up": ("#999933", ">"),
    "paper": ("#332288", "*"),
}


def split_flags(flags: list[str], names: Collection[str]) -> tuple[list[str], list[str]]:
    """The flags named, with their values, and all others."""
    named: list[str] = []
    others: list[str] = []
    is_named = False
    for word in flags:
        if word.startswith("--"):
            is_named = word.removeprefix("--").partition("=")[0] in names
        (named if is_named else others).append(word)
    return named, others


def exit_with_comparison() -> None:
    """Lets a recipe that compare.py has started end with it, however that ends. Does nothing otherwise.

    compare.py holds the other end of the pipe that is the recipe's stdin: when it is gone, the pipe is closed. That is
    so on every system, and after `kill -9` too.
    """
    if RUN_ID in os.environ:
        threading.Thread(target=_exit_at_end_of_stdin, daemon=True).start()


def _exit_at_end_of_stdin() -> None:
    while os.read(sys.stdin.fileno(), 1024):  # blocks; sys.stdin itself would hold a lock at the end of the process
        pass
    os._exit(1)


def reordered(
    events: list[dict[str, Any]], tracked: list[dict[str, Any]], variant: str, seed: int
) -> list[dict[str, Any]]:
    """Gives the freeze steps of a run to other matrices: the control for the choice of what to freeze.

    Args:
        events (`list[dict]`): the lines of the run's `events.jsonl`, in their order.
        tracked (`list[dict]`): all tracked matrices, as in `result.json`.
        variant (`str`): `"random_order"`; or `"bottom_up"`: the vision tower first, then layer by layer.
        seed (`int`): of the random order.

    Returns:
        `list[dict]`: `matrix` and `step`, one per event.
    """
    if variant == "bottom_up":
        tracked = sorted(tracked, key=lambda m: (TOWER_ORDER[m["tower"]], m["layer"]))
    else:
        tracked = random.Random(seed).sample(tracked, len(tracked))
    return [{"matrix": m["matrix"], "step": e["step"]} for e, m in zip(events, tracked, strict=False)]


def summarize(runs: list[Run]) -> dict[str, Any]:
    """Mean and standard deviation of every variant over the seeds, and GradES against the others, seed by seed.

    Returns:
        `dict`: `variants`, variant -> number -> `{"mean", "sd"}` (`sd` is `None` for a single seed; a variant without
        a run has `{"skipped": reason}`), and `seeds`, one entry per seed. `flops` is a fraction of the baseline of the
        whole schedule; `baseline_time_ratio` is the time of the baseline divided by that of the run of the same seed.
    """
    seeds = by_seed(runs)
    variants: dict[str, Any] = {}
    for variant in (variant for variant in VARIANTS if any(run["variant"] == variant for run in runs)):
        numbers = numbers_of_variant(variant, seeds)
        if numbers:
            variants[variant] = {key: _mean_and_sd([of_run[key] for of_run in numbers]) for key in numbers[0]}
            variants[variant]["runs"] = len(numbers)
        else:
            variants[variant] = {"skipped": next(run["skipped"] for run in runs if run["variant"] == variant)}
    return {"variants": variants, "seeds": [{"seed": seed, **_against(of_seed)} for seed, of_seed in seeds.items()]}


def by_seed(runs: list[Run]) -> dict[int, dict[str, Run]]:
    """Seed -> variant -> run, of the runs that have scores."""
    seeds: dict[int, dict[str, Run]] = {}
    for run in runs:
        if "skipped" not in run:
            seeds.setdefault(run["seed"], {})[run["variant"]] = run
    return seeds


def numbers_of_variant(variant: str, seeds: dict[int, dict[str, Run]]) -> list[dict[str, float | None]]:
    """`numbers_of` each run of a variant, in the order of the seeds of [`by_seed`]."""
    return [numbers_of(of_seed[variant], of_seed) for of_seed in seeds.values() if variant in of_seed]


def made_alone(record: dict[str, Any]) -> bool:
    """Whether the runs of a comparison were made one after the other: side by side, they slow each other down."""
    return record.get("jobs") == 1


def numbers_of(run: Run, of_seed: dict[str, Run]) -> dict[str, float | None]:
    """The numbers of a run that are averaged over seeds."""
    lengths = [other["total_steps"] for name, other in of_seed.items() if name != "baseline_matched_flops"]
    schedule = max(lengths, default=run["total_steps"])
    baseline = of_seed.get("baseline")
    return {
        "steps": run["steps"],
        "test_loss": run["results"]["final/test_loss"],
        "validation_loss": run["results"]["final/validation_loss"],
        "exact_match": exact_match(run),
        **{f"{part}_seconds": run["seconds"][part] for part in ("total", *PARTS)},
        "flops": flops_of_run(run) * run["total_steps"] / schedule / (baseline or run)["choice"]["step"],
        "peak_memory_mib": run["peak_memory_mib"],
        "baseline_time_ratio": baseline["seconds"]["total"] / run["seconds"]["total"] if baseline else None,
    }


def flops_of_run(run: Run) -> float:
    """FLOPs of a run, held-out measurements included, as a fraction of its whole schedule with everything training.

    `run["flops"]` is a fraction of the schedule with all training that was chosen to train.
    """
    return run["choice"]["step"] * run["flops"]


def matched_steps(grades: Run) -> int:
    """Steps of a baseline that takes as many FLOPs as a GradES run, its held-out measurements included."""
    return max(1, round(flops_of_run(grades) / grades["choice"]["step"] * grades["total_steps"]))


def exact_match(run: Run) -> float | None:
    """Fraction of test prompts answered exactly; `None` where the recipe asked none."""
    results = run["results"]
    return results.get("final/exact_match", results.get("final/exact_match_test"))


def _mean_and_sd(values: list[float | None]) -> dict[str, float | None]:
    found = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(found) if found else None,
        "sd": statistics.stdev(found) if len(found) > 1 else None,
    }


def _against(of_seed: dict[str, Run]) -> dict[str, Any]:
    """GradES against the other variants of one seed; `None` where one of the two was not run."""
    baseline, grades = of_seed.get("baseline"), of_seed.get("grades")

    def test_loss_minus(variant: str) -> float | None:
        if grades is None or variant not in of_seed:
            return None
        return grades["results"]["final/test_loss"] - of_seed[variant]["results"]["final/test_loss"]

    best = min((entry["eval_loss"] for entry in baseline["validation"]), default=None) if baseline else None
    final = grades["results"]["final/validation_loss"] if grades else None
    return {
        "baseline_best_validation_loss": best,
        "grades_validation_loss": final,
        "as_good": None if best is None or final is None else final <= best,
        "fraction_of_baseline_time": (
            grades["seconds"]["total"] / baseline["seconds"]["total"] if baseline and grades else None
        ),
        "grades_minus_matched_flops": test_loss_minus("baseline_matched_flops"),
        "grades_minus_early_stopping": test_loss_minus("early_stopping"),
    }


class Column(NamedTuple):
    """
    A column of a table.

    Attributes:
        heading (`str`): in Markdown.
        cell: of the numbers of a variant, or of the entry of a seed.
        short (`str`, *optional*): on a terminal, which has no room for columns without one.
    """

    heading: str
    cell: Callable[[dict[str, Any]], str]
    short: str | None = None


OF_A_VARIANT = (
    Column("steps", lambda n: _text(n["steps"]["mean"], ".0f"), "steps"),
    Column("test loss", lambda n: _spread(n["test_loss"], ".4f"), "test loss"),
    Column("exact match, %", lambda n: _spread(n["exact_match"], ".1f", times=100), "exact, %"),
    Column("seconds", lambda n: _text(n["total_seconds"]["mean"], ".1f"), "seconds"),
    Column("in validation", lambda n: _text(n["validation_seconds"]["mean"], ".1f")),
    Column("in GradES", lambda n: _text(n["grades_seconds"]["mean"], ".2f")),
    Column("FLOPs / baseline", lambda n: _text(n["flops"]["mean"], ".2f"), "FLOPs"),
    Column("peak MiB", lambda n: _text(n["peak_memory_mib"]["mean"], ",.0f")),
    Column("baseline's time / this", lambda n: _text(n["baseline_time_ratio"]["mean"], ".2f", unit="x")),
)
OF_A_SEED = (
    Column("seed", lambda e: str(e["seed"]), "seed"),
    Column(
        "best validation loss of the baseline",
        lambda e: _text(e["baseline_best_validation_loss"], ".4f"),
        "baseline's best",
    ),
    Column("validation loss of GradES", lambda e: _text(e["grades_validation_loss"], ".4f"), "its loss"),
    Column("at or below", lambda e: {True: "yes", False: "no", None: "-"}[e["as_good"]]),
    Column("time / baseline", lambda e: _text(e["fraction_of_baseline_time"], ".0f", unit=" %", times=100), "time"),
    Column(
        "test loss, GradES - matched FLOPs",
        lambda e: _text(e["grades_minus_matched_flops"], "+.4f"),
        "- matched FLOPs",
    ),
    Column("GradES - early stopping", lambda e: _text(e["grades_minus_early_stopping"], "+.4f"), "- early stopping"),
)


def markdown(summary: dict[str, Any]) -> str:
    """Two tables: the variants, and below them GradES against the others for each seed."""
    header = ["variant", *(column.heading for column in OF_A_VARIANT)]
    rows = _rows_of_variants(summary, OF_A_VARIANT)
    rows = [row + [""] * (len(header) - len(row)) for row in rows]
    seeds = [[column.cell(entry) for column in OF_A_SEED] for entry in summary["seeds"]]
    return f"{_table(header, rows)}\n\n{_table([column.heading for column in OF_A_SEED], seeds)}\n"


def format_comparison(summary: dict[str, Any]) -> str:
    """The same two tables for a terminal, in 80 columns: with what decides, and without what was not measured."""
    columns = [column for column in OF_A_VARIANT if column.short]
    variants = _table_in_80_columns(["variant", *_short(columns)], _rows_of_variants(summary, columns))
    variants += "\nFLOPs: as a fraction of the baseline's."
    columns = [column for column in OF_A_SEED if column.short]
    rows = [[column.cell(entry) for column in columns] for entry in summary["seeds"]]
    if all(cell == "-" for row in rows for cell in row[1:]):  # GradES is not beside anything
        return variants
    return (
        f"{variants}\n\n"
        "GradES, seed by seed: its validation loss beside the best of the baseline; its\n"
        "time as a fraction of the baseline's; its test loss minus that of the others.\n"
        f"{_table_in_80_columns(_short(columns), rows)}"
    )


def _short(columns: list[Column]) -> list[str]:
    return [str(column.short) for column in columns]


def _rows_of_variants(summary: dict[str, Any], columns: Sequence[Column]) -> list[list[str]]:
    """A row for each variant; it has two cells if there are no numbers."""
    return [
        [variant, f"not applicable: {numbers['skipped']}"]
        if "skipped" in numbers
        else [variant, *(column.cell(numbers) for column in columns)]
        for variant, numbers in summary["variants"].items()
    ]


def _text(value: float | None, form: str, unit: str = "", times: float = 1) -> str:
    return "-" if value is None else f"{value * times:{form}}{unit}"


def _spread(number: dict[str, float | None], form: str, times: float = 1) -> str:
    mean, sd = number["mean"], number["sd"]
    if mean is None or sd is None:
        return _text(mean, form, times=times)
    return f"{mean * times:{form}} ± {sd * times:{form}}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown, its columns padded so that it reads well on a screen too."""
    lines = [header, *rows]
    # A remark in place of numbers runs over the columns it leaves empty.
    widths = [max(len(line[i]) for line in lines if i != 1 or line[-1]) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(f"{t:<{w}}" for t, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _table_in_80_columns(header: list[str], rows: list[list[str]]) -> str:
    """Names to the left and numbers to the right. A remark in place of numbers goes on below, if it is long."""
    numbers = [row for row in rows if len(row) == len(header)]
    shown = [i for i in range(len(header)) if i == 0 or any(row[i] != "-" for row in numbers)]
    first = max(len(row[0]) for row in [header, *rows])
    widths = {i: max(len(row[i]) for row in [header, *numbers]) for i in shown[1:]}
    lines = []
    for row in [header, *rows]:
        name = f"{row[0]:<{first}}"
        if len(row) == len(header):
            lines.append("  ".join([name, *(f"{row[i]:>{width}}" for i, width in widths.items())]))
        else:
            lines += textwrap.wrap(f"{name}  {row[1]}", 80, subsequent_indent=" " * (first + 2))
    return "\n".join(lines)


def draw(record: dict[str, Any], path: Path) -> None:
    """Saves a figure: what each run reached at what cost in FLOPs, in loss and in right answers; and where the time
    went, if the runs were made one after the other.

    Args:
        record (`dict[str, Any]`): what `compare.json` holds.
        path (`Path`): of the figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require("matplotlib", "Figures")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    seeds = by_seed(record["runs"])
    drawn = [variant for variant, numbers in record["variants"].items() if "skipped" not in numbers]
    found = {variant: numbers_of_variant(variant, seeds) for variant in drawn}
    panels = [("test_loss", "test loss", 1)]
    if any(numbers["exact_match"] is not None for of_variant in found.values() for numbers in of_variant):
        panels.append(("exact_match", "exact match, %", 100))
    with_times = made_alone(record)
    count = len(panels) + with_times
    figure = Figure(figsize=(6 * count, 5.2), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, count, squeeze=False)[0]
    for ax, (key, label, factor) in zip(axes, panels, strict=False):
        most = 1.0
        for variant in drawn:
            points = [(n["flops"], factor * score) for n in found[variant] if (score := n[key]) is not None]
            color, mark = COLORS_AND_MARKS[variant]
            if points:
                most = max(most, *(flops or 0.0 for flops, _ in points))
                ax.scatter(*zip(*points, strict=True), color=color, marker=mark, label=variant, s=22, alpha=0.5)
                middle = [statistics.median(numbers) for numbers in zip(*points, strict=True)]
                ax.scatter(*middle, color=color, marker=mark, s=130, edgecolor="white", zorder=3)
        ax.set(xlabel="FLOPs of the run, as a fraction of the whole baseline's", ylabel=label)
        ax.set_xlim(0, 1.06 * most)  # no mark is cut off
        ax.grid(color="#e4e7eb", linewidth=0.6)
        ax.set_axisbelow(True)
    axes[0].set_title("Each run is a small mark, the median of its seeds a large one", fontsize=10, loc="left")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    if with_times:
        _draw_times(axes[-1], drawn, record["variants"])
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def _draw_times(ax: Any, drawn: list[str], variants: dict[str, Any]) -> None:
    start = [0.0] * len(drawn)
    for part, shade in zip(PARTS, ("#9aa5b1", "#e69f00", "#e4e7eb", "#0072b2"), strict=True):
        widths = [variants[variant][f"{part}_seconds"]["mean"] for variant in drawn]
        label = "GradES" if part == "grades" else part
        ax.barh(drawn, widths, left=start, color=shade, label=label, height=0.6)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    ax.invert_yaxis()
    ax.set(xlabel="seconds, mean over seeds")
    ax.set_title("Where the time went", fontsize=10, loc="left")
    ax.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, -0.28), ncols=4)
