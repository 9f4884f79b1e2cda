"""Runs of the same recipe side by side: what each way of training reached, and what it took. Figures, table, picture.

A cell is one run, `{"arm": ..., "seed": ...}` with what its `result.json` holds, or with `"skipped"`, the reason why
there was nothing to run.
"""

from __future__ import annotations

import random
import statistics
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

Cell = dict[str, Any]

# In the order in which the cells of a seed run: what follows `grades` may need what it left.
ARMS = {
    "plain": "the whole schedule, nothing frozen",
    "grades": "GradES as configured",
    "shortened": "plain, with a schedule as long as the GradES run of the seed turned out",
    "early_stopping": "plain, ended when the validation loss no longer falls; the best checkpoint counts",
    "random": "as many matrices frozen at the same steps as by GradES, but which ones is left to chance",
    "together": "GradES with heldout_gain, but no matrix freezes before the whole model stops",
    "bottom_up": "as many matrices frozen at the same steps as by GradES, but from the lowest layer up",
    "paper": "GradES with the paper's metric and settings",
}
# Where a tower stands on the way from input to output.
TOWER_ORDER = {"vision": 0, "audio": 0, "projector": 1, "language": 2}
PARTS = ("training", "validation", "saving", "grades")
COLORS = {
    "plain": "#52606d",
    "grades": "#2563eb",
    "shortened": "#d97706",
    "early_stopping": "#059669",
    "random": "#9333ea",
    "together": "#65a30d",
    "bottom_up": "#be185d",
    "paper": "#0891b2",
}


def replayed(events: list[dict[str, Any]], watched: list[dict[str, Any]], order: str, seed: int) -> list[dict]:
    """The freeze steps of a run, given to other matrices: what freezing does, without the choice of what to freeze.

    Args:
        events (`list[dict]`): the lines of the run's `events.jsonl`, in their order.
        watched (`list[dict]`): all matrices of the model, as in `result.json`.
        order (`str`): `"random"`, or `"bottom_up"`: vision tower first, then by layer.
        seed (`int`): of the random order.

    Returns:
        `list[dict]`: the events, each with another matrix.
    """
    if order == "bottom_up":
        watched = sorted(watched, key=lambda m: (TOWER_ORDER[m["tower"]], m["layer"]))
    else:
        watched = random.Random(seed).sample(watched, len(watched))
    return [event | matrix for event, matrix in zip(events, watched, strict=False)]


def summarize(cells: list[Cell]) -> dict[str, Any]:
    """Mean and standard deviation of every arm over the seeds, and the arms against each other, seed by seed.

    Returns:
        `dict`: `arms`, arm -> figure -> `{"mean", "sd"}` (`sd` is `None` for a single seed; an arm without a run has
        `{"skipped": reason}`), and `seeds`, one entry per seed. `flops` is a fraction of the plain run of the whole
        schedule; `plain_over_this` compares the total seconds of the same seed.
    """
    runs = [cell for cell in cells if "skipped" not in cell]
    by_seed: dict[int, dict[str, Cell]] = {}
    for cell in runs:
        by_seed.setdefault(cell["seed"], {})[cell["arm"]] = cell
    arms: dict[str, Any] = {}
    for arm in (arm for arm in ARMS if any(cell["arm"] == arm for cell in cells)):
        own = [_figures(cell, by_seed[cell["seed"]]) for cell in runs if cell["arm"] == arm]
        if own:
            arms[arm] = {key: _mean_and_sd([figures[key] for figures in own]) for key in own[0]}
            arms[arm]["runs"] = len(own)
        else:
            arms[arm] = {"skipped": next(cell["skipped"] for cell in cells if cell["arm"] == arm)}
    return {"arms": arms, "seeds": [{"seed": seed, **_against(of_seed)} for seed, of_seed in by_seed.items()]}


def _figures(cell: Cell, of_seed: dict[str, Cell]) -> dict[str, float | None]:
    """The figures of a run that are averaged over seeds."""
    schedule = max(other["total_steps"] for other in of_seed.values())  # the shortened run's own is not the measure
    plain = of_seed.get("plain")
    return {
        "steps": cell["steps"],
        "test_loss": cell["results"]["final/test_loss"],
        "validation_loss": cell["results"]["final/validation_loss"],
        "exact_match": exact_match(cell),
        **{f"{part}_seconds": cell["seconds"][part] for part in ("total", *PARTS)},
        "flops": cell["flops"] * cell["total_steps"] / schedule,
        "peak_memory_mib": cell["peak_memory_mib"],
        "plain_over_this": plain["seconds"]["total"] / cell["seconds"]["total"] if plain else None,
    }


def exact_match(cell: Cell) -> float | None:
    """Fraction of test prompts answered exactly; `None` where the recipe asked none."""
    results = cell["results"]
    return results.get("final/exact_match", results.get("final/exact_match_test"))


def _mean_and_sd(values: list[float | None]) -> dict[str, float | None]:
    found = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(found) if found else None,
        "sd": statistics.stdev(found) if len(found) > 1 else None,
    }


def _against(of_seed: dict[str, Cell]) -> dict[str, Any]:
    """GradES against the other arms of one seed; `None` where one of the two was not run."""
    plain, grades = of_seed.get("plain"), of_seed.get("grades")

    def test_loss_over(arm: str) -> float | None:
        if grades is None or arm not in of_seed:
            return None
        return grades["results"]["final/test_loss"] - of_seed[arm]["results"]["final/test_loss"]

    best = min((entry["eval_loss"] for entry in plain["validation"]), default=None) if plain else None
    final = grades["results"]["final/validation_loss"] if grades else None
    return {
        "plain_best_validation_loss": best,
        "grades_validation_loss": final,
        "as_good": None if best is None or final is None else final <= best,
        "share_of_plain_time": grades["seconds"]["total"] / plain["seconds"]["total"] if plain and grades else None,
        "grades_minus_shortened": test_loss_over("shortened"),
        "grades_minus_early_stopping": test_loss_over("early_stopping"),
    }


def markdown(summary: dict[str, Any]) -> str:
    """Two tables: the arms, and below them GradES against the others for each seed."""
    header = (
        "arm",
        "steps",
        "test loss",
        "exact match, %",
        "seconds",
        "of it validation",
        "of it GradES",
        "FLOPs of plain",
        "peak MiB",
        "plain's time / this",
    )
    rows = []
    for arm, figures in summary["arms"].items():
        if "skipped" in figures:
            rows.append([arm, f"not applicable: {figures['skipped']}", *[""] * (len(header) - 2)])
            continue
        rows.append(
            [
                arm,
                _text(figures["steps"]["mean"], ".0f"),
                _spread(figures["test_loss"], ".4f"),
                _spread(figures["exact_match"], ".1f", times=100),
                _text(figures["total_seconds"]["mean"], ".1f"),
                _text(figures["validation_seconds"]["mean"], ".1f"),
                _text(figures["grades_seconds"]["mean"], ".2f"),
                _text(figures["flops"]["mean"], ".2f"),
                _text(figures["peak_memory_mib"]["mean"], ",.0f"),
                _text(figures["plain_over_this"]["mean"], ".2f", unit="x"),
            ]
        )
    below = (
        "seed",
        "plain's best validation loss",
        "GradES's at its end",
        "at or below",
        "ended after, of plain's time",
        "test loss, GradES - shortened",
        "GradES - early stopping",
    )
    seeds = [
        [
            str(entry["seed"]),
            _text(entry["plain_best_validation_loss"], ".4f"),
            _text(entry["grades_validation_loss"], ".4f"),
            {True: "yes", False: "no", None: "-"}[entry["as_good"]],
            _text(entry["share_of_plain_time"], ".0%"),
            _text(entry["grades_minus_shortened"], "+.4f"),
            _text(entry["grades_minus_early_stopping"], "+.4f"),
        ]
        for entry in summary["seeds"]
    ]
    return f"{_table(header, rows)}\n\n{_table(below, seeds)}\n"


def _text(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _spread(figure: dict[str, float | None], form: str, times: float = 1) -> str:
    mean, sd = figure["mean"], figure["sd"]
    if mean is None or sd is None:
        return _text(None if mean is None else mean * times, form)
    return f"{mean * times:{form}} ± {sd * times:{form}}"


def _table(header: tuple[str, ...], rows: list[list[str]]) -> str:
    """Markdown, its columns padded so that it reads well on a screen too."""
    lines = [list(header), *rows]
    # A remark in place of figures runs over the columns it leaves empty.
    widths = [max(len(line[i]) for line in lines if i != 1 or line[-1]) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(f"{t:<{w}}" for t, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


def draw(cells: list[Cell], summary: dict[str, Any], path: Path) -> None:
    """Writes a picture: on the left, what each run reached in what time; on the right, where the time went."""
    runs = [cell for cell in cells if "skipped" not in cell]
    figure = Figure(figsize=(12, 4.8), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for cell in runs:
        if cell["arm"] in ("plain", "grades"):
            curve = [(entry["seconds"], entry["eval_loss"]) for entry in cell["validation"]]
            left.plot(
                *zip(*curve, strict=True), color=COLORS[cell["arm"]], linewidth=0.7, alpha=0.6
            ) if curve else None
    drawn = [arm for arm, figures in summary["arms"].items() if "skipped" not in figures]
    for arm in drawn:
        points = [
            (cell["seconds"]["total"], cell["results"]["final/test_loss"]) for cell in runs if cell["arm"] == arm
        ]
        left.scatter(*zip(*points, strict=True), color=COLORS[arm], label=arm, s=28, zorder=3)
    left.set(xlabel="seconds of training, validation included", ylabel="loss", yscale="log")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter(NullFormatter())
    left.set_title("Test loss (points), validation loss of plain and grades (lines)", fontsize=10)
    left.legend(frameon=False, fontsize=9)

    start = [0.0] * len(drawn)
    for part, color in zip(PARTS, ("#9aa5b1", "#f59e0b", "#e4e7eb", "#2563eb"), strict=True):
        widths = [summary["arms"][arm][f"{part}_seconds"]["mean"] for arm in drawn]
        label = "GradES" if part == "grades" else part
        right.barh(drawn, widths, left=start, color=color, label=label, height=0.6)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    right.invert_yaxis()
    right.set(xlabel="seconds, mean over seeds")
    right.set_title("Where the time went", fontsize=10)
    right.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, -0.28), ncols=4)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
