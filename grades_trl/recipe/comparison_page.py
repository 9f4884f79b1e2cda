"""The page of a comparison: `compare.html`. It begins with the answer, GradES against each of the other variants."""

from __future__ import annotations

import shlex
import statistics
from pathlib import Path
from typing import Any

from grades_trl.recipe.comparison import VARIANTS, Run, exact_match, flops_of_run, made_alone
from grades_trl.report.elements import command, document, fold, percent, plot, seconds, section, table, text, times
from grades_trl.wording import counted

# Whether freezing does more than these do is the question of a comparison.
CONTROLS = ("baseline_matched_flops", "nothing_frozen", "early_stopping", "bema", "vision_frozen")


def build(record: dict[str, Any], png: bytes | None) -> str:
    """
    The page as text.

    Args:
        record (`dict[str, Any]`): what `compare.json` holds.
        png (`bytes` or `None`): the figure of the comparison.
    """
    ran = [run for run in record["runs"] if "skipped" not in run]
    environment = record.get("environment") or {}
    model, device = environment.get("model", "?"), environment.get("device", "?")
    seeds, runs = len({run["seed"] for run in ran}), len(record["runs"])
    compared = f"{counted(len(record['variants']), 'variant')} with {counted(seeds, 'seed')}"
    over = f"Comparison of {compared}: {model}, on {device}"
    cost = "time" if made_alone(record) else "FLOPs"
    answers = (
        f"<section><div class=answers><div><h2>What happened</h2>{_what_happened(record, ran)}</div>"
        f"<div><h2>Was it worth it?</h2>{_was_it_worth_it(ran, cost)}</div>"
        f"<div><h2>What next?</h2>{_paragraphs(_what_next(ran, cost))}</div></div></section>"
    )
    alt = "Test loss and exact match of every run against its FLOPs"
    parts = [
        answers,
        section("Every run", "" if png is None else plot(png, alt)),
        section("Means over the seeds", _variants(record["variants"])),
        section("GradES against the others, seed by seed", _seeds(record["seeds"])),
        section("What the variants are", table([(name, VARIANTS[name]) for name in record["variants"]], numbers=0)),
        f"<section>{fold(f'All runs ({runs:,})', _runs(record['runs']))}</section>",
        section("Settings and versions", _settings(record, environment)),
    ]
    return document(f"Comparison: {model} - GradES", over, headline(ran, cost), parts)


def headline(ran: list[Run], cost: str) -> str:
    """GradES against the baseline, in one sentence. `cost` is `"time"` or `"FLOPs"`."""
    if not _of(ran, "grades") or not _of(ran, "baseline"):
        names = list(dict.fromkeys(run["variant"] for run in ran))
        return f"A comparison of {', '.join(names)}" if names else "No run has scores"
    losses, matches = _pairs(ran, "baseline", _test_loss), _pairs(ran, "baseline", exact_match)
    told = f"GradES took {_share(ran, 'baseline', cost)} of the baseline's {cost}; its test loss was "
    told += _direction(losses)
    return f"{told}, its exact match {_direction(matches)}" if matches else told


def _of(ran: list[Run], variant: str) -> dict[int, Run]:
    return {run["seed"]: run for run in ran if run["variant"] == variant}


def _test_loss(run: Run) -> float | None:
    return run["results"]["final/test_loss"]


def _seconds(run: Run) -> float:
    return run["seconds"]["total"]


def _flops(run: Run) -> float:
    return flops_of_run(run) * run["total_steps"]


def _share(ran: list[Run], other: str, cost: str) -> str:
    """The cost of GradES as a fraction of that of another variant, in percent."""
    return percent(_mean(_ratios(ran, other, cost)), 0)


def _better(ran: list[Run], other: str) -> float | None:
    """By how much GradES is better than another variant: in exact match where there is one, else in test loss."""
    matches, losses = _pairs(ran, other, exact_match), _pairs(ran, other, _test_loss)
    if matches:
        return _mean(matches)
    return -_mean(losses) if losses else None


def _ratios(ran: list[Run], other: str, cost: str) -> list[float]:
    return _pairs(ran, other, _seconds if cost == "time" else _flops, divide=True)


def _pairs(ran: list[Run], other: str, number: Any, divide: bool = False) -> list[float]:
    """GradES minus another variant, or divided by it, for every seed that has both."""
    grades, others = _of(ran, "grades"), _of(ran, other)
    found = [(number(grades[seed]), number(others[seed])) for seed in grades if seed in others]
    whole = [(a, b) for a, b in found if a is not None and b is not None]
    return [a / b for a, b in whole] if divide else [a - b for a, b in whole]


def _mean(values: list[float]) -> float:
    return statistics.fmean(values)


def _direction(differences: list[float]) -> str:
    """In how many seeds, in words."""
    below, above, count = sum(d < 0 for d in differences), sum(d > 0 for d in differences), len(differences)
    if not count:
        return "not measured"
    if not below and not above:
        return "the same"
    seeds = {1: "the one seed", 2: "both seeds"}.get(count, f"all {count} seeds")
    if count in (below, above):
        return f"{'lower' if below else 'higher'} in {seeds}"
    return f"higher in {above} of {count} seeds, lower in {below}"


def _paragraphs(sentences: list[str]) -> str:
    return "".join(f"<p>{text(sentence)}</p>" for sentence in sentences)


def _what_happened(record: dict[str, Any], ran: list[Run]) -> str:
    told = [f"{counted(len(ran), 'run')} of recipes/{record['recipe']}.py, each variant with the same seeds and data."]
    grades = list(_of(ran, "grades").values())
    if grades:
        mean = _mean([run["steps"] / run["total_steps"] for run in grades])
        reasons = ", ".join(dict.fromkeys(run["stop_reason"] for run in grades))
        frozen = sorted({run["frozen"] for run in grades})
        froze = f"{frozen[0]:,}" if len(frozen) == 1 else f"{frozen[0]:,} to {frozen[-1]:,}"
        told.append(
            f"GradES ran {percent(mean, 0)} of the schedule. Why it ended: {reasons}. {froze} matrices were frozen."
        )
    skipped = [(run["variant"], run["seed"], run["skipped"]) for run in record["runs"] if "skipped" in run]
    told += [f"{variant}, seed {seed}, has no scores: {reason}." for variant, seed, reason in skipped]
    return _paragraphs(told)


def _was_it_worth_it(ran: list[Run], cost: str) -> str:
    if not _of(ran, "grades"):
        return "<p>There is no GradES run to compare with.</p>"
    told = []
    for other in ("baseline", *CONTROLS):
        losses = _pairs(ran, other, _test_loss)
        if not losses:
            continue
        sentence = (
            f"Against {other}: {_share(ran, other, cost)} of its {cost}, test loss {_mean(losses):+.4f} "
            f"({_direction(losses)})"
        )
        matches = _pairs(ran, other, exact_match)
        if matches:
            points = [100 * match for match in matches]
            sentence += f", exact match {_mean(points):+.1f} points ({_direction(points)})"
        told.append(f"{sentence}.")
    return _paragraphs(told or ["There is no other variant to compare with."])


def _what_next(ran: list[Run], cost: str) -> list[str]:
    told, count = [], len(_of(ran, "grades"))
    matched, none = _better(ran, "baseline_matched_flops"), _better(ran, "nothing_frozen")
    if matched is not None:
        told.append(
            "GradES does better here than a baseline that is shortened to the same FLOPs."
            if matched > 0
            else "A baseline that is shortened to the same FLOPs does as well here: train that one, without GradES."
        )
    if none is not None:
        ratio = _mean(_ratios(ran, "nothing_frozen", cost))
        if ratio >= 1 and none <= 0:
            told.append("Freezing itself brought nothing here: --metric none keeps the average and the ending.")
        else:
            told.append(
                f"Freezing itself brings the cost to {percent(ratio, 0)} of the {cost} of the same run without it."
            )
    if count < 3:
        told.append("Add seeds with --seeds 0 1 2: fewer than three cannot tell a difference from chance.")
    if matched is None:
        told.append("Add the variant baseline_matched_flops: freezing must earn its place against fewer steps.")
    return told


def _spread(number: dict[str, float | None], form: str = ".4f", factor: float = 1) -> str:
    mean, sd = number["mean"], number["sd"]
    if mean is None:
        return "-"
    return f"{mean * factor:{form}}" + ("" if sd is None else f" ± {sd * factor:{form}}")


def _variants(variants: dict[str, Any]) -> str:
    header = (
        "Variant",
        "Steps",
        "Test loss",
        "Exact match, %",
        "Time",
        "of it validation",
        "of it GradES",
        "FLOPs / baseline",
        "Peak MiB",
        "Speed-up",
    )
    rows: list[tuple] = []
    for name, numbers in variants.items():
        if "skipped" in numbers:
            rows.append((name, f"not applicable: {numbers['skipped']}", *[""] * (len(header) - 2)))
            continue
        memory, ratio = numbers["peak_memory_mib"]["mean"], numbers["baseline_time_ratio"]["mean"]
        rows.append(
            (
                name,
                f"{numbers['steps']['mean']:,.0f}",
                _spread(numbers["test_loss"]),
                _spread(numbers["exact_match"], ".1f", 100),
                seconds(numbers["total_seconds"]["mean"]),
                seconds(numbers["validation_seconds"]["mean"]),
                seconds(numbers["grades_seconds"]["mean"]),
                _spread(numbers["flops"], ".2f"),
                "-" if memory is None else f"{memory:,.0f}",
                times(ratio) if ratio is not None else "-",
            )
        )
    note = (
        "<p class='soft small'>Mean and standard deviation over the seeds. FLOPs count held-out measurements too.</p>"
    )
    return table(rows, header, len(header) - 1, "Means over the seeds") + note


def _seeds(entries: list[dict[str, Any]]) -> str:
    header = (
        "Seed",
        "Best validation loss of the baseline",
        "Validation loss of GradES",
        "At or below",
        "Time / baseline",
        "Test loss, GradES minus matched FLOPs",
        "minus early stopping",
    )

    def signed(value: float | None) -> str:
        return "-" if value is None else f"{value:+.4f}"

    rows = [
        (
            str(entry["seed"]),
            entry["baseline_best_validation_loss"],
            entry["grades_validation_loss"],
            entry["as_good"],
            percent(entry["fraction_of_baseline_time"]),
            signed(entry["grades_minus_matched_flops"]),
            signed(entry["grades_minus_early_stopping"]),
        )
        for entry in entries
    ]
    return table(rows, header, len(header) - 1, "GradES against the others, seed by seed") if rows else ""


def _runs(runs: list[Run]) -> str:
    header = ("Variant", "Seed", "Steps", "Why it ended", "Test loss", "Exact match", "Time")
    rows: list[tuple] = []
    for run in runs:
        if "skipped" in run:
            rows.append((run["variant"], str(run["seed"]), "-", run["skipped"], "-", "-", "-"))
            continue
        steps = f"{run['steps']:,} of {run['total_steps']:,}"
        scores = (_test_loss(run), percent(exact_match(run)), seconds(run["seconds"]["total"]))
        rows.append((run["variant"], str(run["seed"]), steps, run["stop_reason"], *scores))
    return table(rows, header, 3, "All runs")


def _settings(record: dict[str, Any], environment: dict[str, Any]) -> str:
    names = list(record["variants"])
    seeds = sorted({run["seed"] for run in record["runs"]})
    config = ["--config", record["config"]] if record.get("config") else []
    words = ["python", "recipes/compare.py", "--recipe", record["recipe"], *config, *record["flags"]]
    words += ["--seeds", *map(str, seeds), "--variants", *names]
    if record.get("jobs", 1) > 1:
        words += ["--jobs", str(record["jobs"])]
    rows = [("commit", record.get("commit")), ("runs side by side", record.get("jobs"))]
    rows += list(environment.get("versions", {}).items())
    return command(shlex.join(map(str, words))) + table(rows, caption="Versions")


def write(record: dict[str, Any], figure: Path | None, path: Path) -> None:
    """Writes the page of a comparison.

    Args:
        record (`dict[str, Any]`): what `compare.json` holds.
        figure (`Path` or `None`): `compare.png`.
        path (`Path`): of the page.
    """
    path.write_text(build(record, None if figure is None else figure.read_bytes()), encoding="utf-8")
