"""
The page of a run: `report.html`.

It begins with the answer: what happened, whether it was worth it, and what to do next. The figures follow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from grades_trl.events import FreezeEvent
from grades_trl.report.elements import (
    Line,
    cards,
    chart,
    command,
    document,
    fold,
    image,
    percent,
    plot,
    region,
    seconds,
    section,
    show,
    stacked_bar,
    table,
    table_section,
    text,
    times,
)
from grades_trl.report.history import RunHistory
from grades_trl.report.recipe_facts import RecipeFacts, Sample
from grades_trl.report.summary import (
    FINISHED,
    Flops,
    GainShare,
    GainSummary,
    Heldout,
    RunSummary,
    before_and_after,
    format_score,
    rows_of,
)
from grades_trl.report.timing import Evaluation, Speedup

MAX_EVENTS = 2000  # rows of a table; the rest is in the files
GAIN_NOTE = (
    "The gain of a layer is its part of the squared gradient of the training loss: how fast its weights could bring "
    "the loss down. It is estimated by the product of the gradients of two consecutive steps. Below 0 it is noise: "
    "the gradients of the two batches point apart. The steps measured are those of the first fifth of the run, and "
    "later one in ten or fewer. Embeddings, norms and the output head are not tracked, and have no share. Late in a "
    "run gains are small and noisy."
)


def build(
    history: RunHistory,
    summary: RunSummary,
    png: bytes | None,
    gain: bytes | None = None,
    *,
    evaluations: Sequence[Evaluation] = (),
    facts: RecipeFacts | None = None,
) -> str:
    """
    The page as text.

    Args:
        history (`RunHistory`): events and metric values.
        summary (`RunSummary`): all other facts.
        png (`bytes` or `None`): the figure of the run.
        gain (`bytes`, *optional*): the heatmap of the gain; without it the page has no section about it.
        evaluations (`Sequence[Evaluation]`, *optional*): the validations during training.
        facts (`RecipeFacts`, *optional*): what only a recipe knows.
    """
    facts = facts or RecipeFacts()
    model = show(summary.environment.model)
    froze = f"Step of the freeze of every matrix, by layer and role. {_frozen_in_words(summary)}"
    parts = [
        _answers(history, summary, facts),
        cards(_cards(summary)),
        _scores(summary, facts.samples),
        _time(summary),
        _heldout_curve(history, summary, evaluations),
        _gain(summary.gain, gain),
        section("What froze, when and why", ("" if png is None else plot(png, froze)) + _event_groups(history)),
        _curves(history),
        _details(summary, facts),
        _all_events(history),
        _still_training(history),
    ]
    over = f"GradES run report: {model}, on {show(summary.environment.device)}"
    return document(f"{model} - GradES", over, headline(summary), parts)


# ---- the answer ----


def headline(summary: RunSummary) -> str:
    """What happened and whether it was worth it, in one sentence."""
    if summary.diverged_at is not None:
        return f"The run diverged at step {summary.diverged_at:,}: its model is of no use"
    if summary.steps >= summary.total_steps:
        ran = f"The run took all {summary.total_steps:,} steps"
    else:
        ran = f"The run ended after {summary.steps:,} of {summary.total_steps:,} steps"
    ratio = summary.speedup.against_full_schedule
    if ratio is None:
        fraction = summary.flops.fraction
        return ran if fraction is None else f"{ran}, for {percent(fraction, 0)} of the FLOPs of the whole schedule"
    if _differs(summary.speedup) == 0:
        return f"{ran}, and was about as fast as the whole schedule: {ratio:.2f}x"
    if ratio >= 1:
        return f"{ran}, {ratio:.2f}x as fast as the whole schedule"
    return f"{ran}, and was slower than the whole schedule: {ratio:.2f}x"


def _differs(speedup: Speedup) -> int:
    """1 if the run was faster than the whole schedule, -1 if it was slower, 0 if that cannot be told."""
    ratio, sure = speedup.against_full_schedule or 1.0, 1 + max(0.02, speedup.margin or 0.0)
    return 1 if ratio > sure else -1 if ratio < 1 / sure else 0


def _answers(history: RunHistory, summary: RunSummary, facts: RecipeFacts) -> str:
    def answer(title: str, sentences: list[str]) -> str:
        return f"<div><h2>{title}</h2>{''.join(f'<p>{text(sentence)}</p>' for sentence in sentences)}"

    commands = "".join(f"<p>{text(purpose)}:</p>{command(line)}" for purpose, line in facts.next_commands)
    inner = (
        f"{answer('What happened', _what_happened(history, summary))}</div>"
        f"{answer('Was it worth it?', _was_it_worth_it(summary))}</div>"
        f"{answer('What next?', _what_next(history, summary, facts))}{commands}</div>"
    )
    return f"<section><div class=answers>{inner}</div></section>"


def _frozen_in_words(summary: RunSummary) -> str:
    never = f", and {summary.without_gradient:,} never got a gradient" if summary.without_gradient else ""
    return f"{summary.frozen:,} of {summary.tracked_matrices:,} matrices are frozen at the end{never}."


def _what_happened(history: RunHistory, summary: RunSummary) -> list[str]:
    groups = history.event_groups()
    told = [
        f"Step {g.step:,}: {'training again' if g.unfrozen else 'froze'} {g.what}, for this reason: {g.reason}."
        for g in groups[:3]
    ]
    if len(groups) > 3:
        told.append(f"{len(groups) - 3:,} more events are in the table below.")
    heldout, weights = summary.heldout, f"The model has these weights: {summary.weights}."
    if heldout is not None and heldout.best_score is not None and summary.weights == "best average":
        weights = (
            f"The model has the running average of the weights at step {show(heldout.best_step)}, whose held-out "
            f"{heldout.metric_in_words} was the best: {show(heldout.best_score)} ({summary.weights})."
        )
    return [
        f"Training ran {summary.steps:,} of {summary.total_steps:,} optimizer steps. Why it ended: "
        f"{summary.stop_reason}.",
        *(told or ["No matrix froze."]),
        _frozen_in_words(summary),
        weights,
    ]


def _was_it_worth_it(summary: RunSummary) -> list[str]:
    if summary.diverged_at is not None:
        return ["No. Nothing about the speed of a run that diverged means anything."]
    speedup, flops = summary.speedup, summary.flops.fraction
    ratio, told = speedup.against_full_schedule, []
    if ratio is None:
        told.append(
            "The clock cannot tell how fast a baseline is: its steps before the first freeze are too few, or vary too "
            "much."
        )
    else:
        verdict = {1: "Yes, in time", 0: "No difference in time", -1: "No, in time"}[_differs(speedup)]
        told.append(
            f"{verdict}: {speedup.in_words} against the whole schedule without freezing. Steps were "
            f"{times(speedup.cheaper_steps.ratio)} as fast, and {show(speedup.steps_not_run.steps)} were not run."
        )
    if flops is not None:
        told.append(f"It took {percent(flops, 0)} of the FLOPs of the whole schedule.")
    for name, before, after in _score_rows(summary):
        if isinstance(before, float) and isinstance(after, float):
            went = f"went from {format_score(name, before)} to {format_score(name, after)}"
            told.append(f"{name[0].upper()}{name[1:]} {went}.")
    told.append("One run cannot tell what a baseline would have reached. A comparison with the same seeds does.")
    return told


def _what_next(history: RunHistory, summary: RunSummary, facts: RecipeFacts) -> list[str]:
    if summary.diverged_at is not None:
        return ["Lower the learning rate or raise the warm-up, and look at the rows of that step."]
    told, heldout = [], summary.heldout
    best = None if heldout is None else heldout.best_step
    if summary.stop_reason == FINISHED and heldout is not None and heldout.every and best is not None:
        if best > summary.steps - heldout.every:
            told.append(
                f"The held-out {heldout.metric_in_words} was still improving at the end: a longer schedule may help."
            )
        else:
            told.append(
                f"The best held-out {heldout.metric_in_words} was at step {best:,}: a shorter schedule may do as well."
            )
    if not history.events and summary.metric not in ("none", "schedule"):
        told.append(
            "Nothing froze, so every layer cost as much as in a baseline; only the ending can have saved time."
        )
    if not facts.next_commands:
        told.append("Train once more with grades=None and the same seed, and compare the scores.")
    return told


def _cards(summary: RunSummary) -> list[tuple[str, str]]:
    speedup, overhead = summary.speedup, summary.overhead
    entries = [(f"{summary.frozen:,} / {summary.tracked_matrices:,}", "matrices frozen")]
    if speedup.against_full_schedule is not None:
        entries.append((times(speedup.against_full_schedule), "speed against the whole schedule"))
    if summary.flops.fraction is not None:
        entries.append((percent(summary.flops.fraction, 0), "of the FLOPs of the whole schedule"))
    entries.append((seconds(summary.seconds.total), "in all"))
    if overhead.ms_per_step is not None:
        share = "" if overhead.fraction is None else f" ({percent(overhead.fraction)} of training)"
        entries.append((f"{overhead.ms_per_step:.3g} ms", f"for GradES itself, per step{share}"))
    if summary.peak_memory_mib is not None:
        entries.append((f"{summary.peak_memory_mib:,.0f} MiB", "peak memory"))
    return entries


# ---- scores ----


def _score_rows(summary: RunSummary) -> list[tuple[str, float | None, float | None]]:
    return [(name.replace("_", " "), before, after) for name, before, after in before_and_after(summary.results)]


def _scores(summary: RunSummary, samples: Sequence[Sample]) -> str:
    rows, of_rows = _score_rows(summary), {name.replace("_", " "): n for name, n in rows_of(summary.results).items()}
    measured_before = any(before is not None for _, before, _ in rows)
    header = ("", *(["Before"] if measured_before else []), "After", *(["Rows"] if of_rows else []))
    cells = [
        (
            name,
            *("-" if score is None else format_score(name, score) for score in both[0 if measured_before else 1 :]),
            *([of_rows.get(name)] if of_rows else []),
        )
        for name, *both in rows
    ]
    caption = "Scores before and after training" if measured_before else "Scores"
    scores = table(cells, header, len(header) - 1, caption) if rows else ""
    inner = scores
    if samples:
        right = sum(sample.is_right for sample in samples)
        inner += (
            f"<h3>Held-out prompts, answered before and after training: {right} of {len(samples)} are right now</h3>"
            f"<div class=samples>{''.join(map(_sample, samples))}</div>"
        )
    return section("Scores before and after", inner)


def _sample(sample: Sample) -> str:
    picture = "" if sample.image is None else image(sample.image, "Image of this prompt", "jpeg")
    css, mark = ("good", "right") if sample.is_right else ("bad", "not as expected")
    return (
        f"<div class=sample>{picture}<dl><dt>prompt</dt><dd>{text(sample.prompt)}</dd>"
        f"<dt>expected</dt><dd>{text(sample.expected)}</dd><dt>before</dt><dd>{text(sample.before)}</dd>"
        f"<dt>after</dt><dd>{text(sample.after)} <span class={css}>({mark})</span></dd></dl></div>"
    )


# ---- time ----


def _time(summary: RunSummary) -> str:
    spent, speedup, flops = summary.seconds, summary.speedup, summary.flops
    cheaper, steps, validation = speedup.cheaper_steps, speedup.steps_not_run, speedup.validation_not_run
    parts = [
        ("training", spent.training),
        ("validation", spent.validation),
        ("saving", spent.saving),
        ("GradES", spent.grades),
    ]
    told = ", ".join(f"{name} {seconds(amount)}" for name, amount in parts)
    where = table(
        [(name, seconds(amount)) for name, amount in [*parts, ("total", spent.total)]], caption="Where time went"
    )

    def amount(count: int | None, unit: str) -> str:
        return "" if count is None else f"{count:,} {unit}"

    same = flops.baseline_same_length / flops.run if flops.run and flops.baseline_same_length else None
    full = 1 / flops.fraction if flops.fraction else None

    def limit(ratio: float | None) -> str:
        return "-" if ratio is None else times(ratio)

    rows = [
        ("Cheaper steps", "", times(cheaper.ratio), limit(same), seconds(cheaper.seconds_saved)),
        (
            "Steps not run",
            amount(steps.steps, "steps"),
            times(steps.ratio),
            times(steps.ratio),
            seconds(steps.seconds_saved),
        ),
        (
            "Validation not run",
            amount(validation.evaluations, "evaluations"),
            "-",
            "-",
            seconds(validation.seconds_saved),
        ),
        (
            "All together, against a baseline of the same length",
            "",
            times(speedup.against_same_length),
            limit(same),
            "",
        ),
        (
            "All together, against a baseline of the full schedule",
            "",
            times(speedup.against_full_schedule),
            limit(full),
            "",
        ),
    ]
    note = (
        "The baseline is the speed of this run's own steps before the first freeze. The limit is the ratio of the "
        "FLOPs in the tracked layers, held-out measurements included: what a step does beside them (data, optimizer, "
        "embeddings, output head) dilutes the saving, and the forward pass of layers that a cache replaces counts as "
        "saved." + ("" if speedup.margin is None else f" The measured ratios are known to {percent(speedup.margin)}.")
    )
    header = ("Part", "Amount", "Measured", "Limit by FLOPs", "Time saved")
    return section(
        "Where the time went, and what freezing saved",
        f"{stacked_bar(parts, f'Time: {told}')}{where}<h3>Against a baseline</h3>"
        f"{table(rows, header, 3, 'What freezing saved, measured and by FLOPs')}<p class='soft small'>{note}</p>",
    )


# ---- held-out rows ----


def _heldout_curve(history: RunHistory, summary: RunSummary, evaluations: Sequence[Evaluation]) -> str:
    """The held-out score with the freezes on it, and the validation loss where the score is a loss too."""
    points = [(float(p.step), p.score) for p in history.heldout if math.isfinite(p.score)]
    metric = history.heldout[0].metric.replace("_", " ") if history.heldout else "loss"
    lines = [Line(f"held-out {metric}, averaged weights", points, "blue", marks=True)] if points else []
    validation: dict[str, list[tuple[float, float]]] = {}
    for entry in evaluations:
        if entry.eval_loss is not None and math.isfinite(entry.eval_loss) and metric == "loss":
            name = f"validation loss{f' of {entry.dataset}' if entry.dataset else ''}"
            validation.setdefault(name, []).append((float(entry.step), entry.eval_loss))
    dashes = ("6 4", "2 3", "9 3 2 3")
    colors = ("orange", "violet", "grey")
    for i, (name, curve) in enumerate(list(validation.items())[:3]):
        lines.append(Line(name, curve, colors[i], dashes[i]))
    facts = table(_heldout(summary.heldout), caption="Held-out measurements") if summary.heldout is not None else ""
    if not lines:
        return section("Held-out measurements", facts)
    groups = history.event_groups()
    shown = groups[:: max(1, -(-len(groups) // 60))]  # so many lines can be told apart
    events = [(float(g.step), f"step {g.step}: {g.what}: {g.reason}") for g in shown]
    first = lines[0].points
    alt = (
        f"{lines[0].name}, from {show(first[0][1])} at step {first[0][0]:.0f} to {show(first[-1][1])} at step "
        f"{first[-1][0]:.0f}"
    )
    drawn = chart(lines, alt, "optimizer step", max(history.total_steps, history.step), events)
    numbers = fold("The numbers", table([(int(x), y) for x, y in first], ("Step", lines[0].name), 1, lines[0].name))
    return section("Held-out score and events", drawn + numbers + facts)


def _heldout(heldout: Heldout) -> list[tuple]:
    return [
        ("measurements", heldout.measurements),
        ("score", heldout.metric_in_words),
        ("examples in each", heldout.examples),
        ("optimizer steps between them", heldout.every),
        ("forward passes per training example", heldout.passes_per_training_example),
        ("best score", heldout.best_score),
        ("at step", heldout.best_step),
    ]


# ---- gain ----


def _gain(gain: GainSummary | None, png: bytes | None) -> str:
    if gain is None or png is None:
        return ""
    header = ("", "Gain", "Standard error", "FLOPs")

    def rows(shares: dict[str, GainShare]) -> list[tuple]:
        return [(name, percent(s.gain), percent(s.error), percent(s.cost)) for name, s in shares.items()]

    every = table(rows(gain.layers), header, 3, "Gain of every layer")
    return section(
        "Where the gain is",
        f"<p>{text(str(gain))}</p>"
        + plot(png, f"Gain of every layer over the steps, for its FLOPs, with the freezes. {gain}")
        + table(rows(gain.towers), header, 3, "Gain of each tower")
        + f"<p class='soft small'>{GAIN_NOTE} Sum over these steps, all layers together: {text(gain.total)}.</p>"
        + fold(f"All {len(gain.layers):,} layers", every),
    )


# ---- everything else ----


def _details(summary: RunSummary, facts: RecipeFacts) -> str:
    towers = [
        (tower, f"{count.frozen:,} / {count.matrices:,}", percent(count.frozen / count.matrices))
        for tower, count in summary.towers.items()
    ]
    parameters = [
        ("parameters in tracked matrices", summary.tracked_parameters),
        ("trained parameters outside them", summary.untracked_parameters),
    ]
    caches = [
        (
            name.replace("_", " "),
            cache.hits,
            cache.misses,
            f"{cache.mib:,.0f} MiB",
            seconds(cache.saved_seconds),
            f"off: {cache.off}" if cache.off else "on",
        )
        for name, cache in summary.caches.items()
    ]
    columns = [
        table_section("Frozen, by tower", towers, ("Tower", "Matrices", "Fraction"), 2),
        table_section("FLOPs in tracked layers, predicted", _flops(summary.flops)),
        table_section(
            "Layers that backward skips", [(f"from step {s.step:,}", s.layers) for s in summary.skipped_layers]
        ),
        table_section("Versions", list(summary.environment.versions.items())),
        table_section("Parameters", parameters),
    ]
    cached = table_section("Caches", caches, ("Outputs of", "Read", "Computed", "Memory", "Saved", "At the end"), 5)
    chosen = [(name, value) for name, value in summary.settings.items() if value is not None]
    settings = table(chosen, caption="Settings of GradES") if chosen else ""
    changes = [
        (f"from step {c.step:,}", f"{c.setting} is {c.after}, and was {c.before}") for c in summary.setting_changes
    ]
    changed = table(changes, caption="Settings changed when the run was resumed") if changes else ""
    inner = f"<h3>GradES, metric {text(summary.metric)}</h3>{settings}{changed}"
    for group, arguments in facts.arguments.items():
        rows = table(list(arguments.items()), caption=f"Arguments: {group}")
        inner += fold(f"All arguments of the {group} ({len(arguments):,})", rows)
    how = f"<h3>Command</h3>{command(facts.command)}" if facts.command else ""
    return f"<div class=columns>{''.join(columns)}</div>{cached}{section('Settings and command', how + inner)}"


def _flops(flops: Flops) -> list[tuple]:
    rows = [
        ("this run", flops.run),
        ("baseline of the same length", flops.baseline_same_length),
        ("baseline of the full schedule", flops.baseline_full_schedule),
    ]
    shown = [(label, f"{value:.3g}") for label, value in rows if value is not None]
    return [*shown, ("fraction of the full schedule", flops.fraction)]


def _event_groups(history: RunHistory) -> str:
    columns, rows = history.event_table()
    if not rows:
        return "<p class=soft>No matrix froze.</p>"
    header = tuple(f"{name[0].upper()}{name[1:]}" for name in columns)
    return region(table([tuple(row) for row in rows[:MAX_EVENTS]], header, 2, "Freezes"), "Freezes", "scroll")


def _all_events(history: RunHistory) -> str:
    events = sorted(history.all_events, key=lambda event: event.step)
    if not events:
        return ""
    rows = [
        (
            e.step,
            e.matrix,
            e.tower,
            e.layer,
            e.role,
            f"trains again: {e.reason}" if e.unfrozen else e.reason,
            e.params,
            e.value,
            e.tau,
            e.frozen,
        )
        for e in events[:MAX_EVENTS]
    ]
    header = ("Step", "Matrix", "Tower", "Layer", "Role", "Reason", "Parameters", "Value", "Tau", "Frozen so far")
    left_out = len(events) - len(rows)
    note = f"<p class=soft>The last {left_out:,} of {len(events):,} are in events.jsonl only.</p>" if left_out else ""
    shown = region(table(rows, header, 4, "Every freeze event"), "Every freeze event", "scroll")
    return f"<section>{fold(f'Every freeze event ({len(events):,})', note + shown)}</section>"


def _still_training(history: RunHistory) -> str:
    columns, rows = history.table()
    live = [dict(zip(columns, row, strict=True)) for row in rows if row[columns.index("frozen at step")] is None]
    if not live:
        return ""
    keys = ("matrix", "tower", "layer", "role", "params", "last value")
    shown = [tuple(row[key] for key in keys) for row in live[:MAX_EVENTS]]
    header = ("Matrix", "Tower", "Layer", "Role", "Parameters", "Last value")
    inner = region(table(shown, header, 2, "Matrices that still train"), "Matrices that still train", "scroll")
    return f"<section>{fold(f'Still training at the end ({len(live):,})', inner)}</section>"


def _curves(history: RunHistory) -> str:
    """Small multiples, one per tower and role: median and the middle 80 % of the matrices still training."""
    steps, table = history.sampled()
    every = max(1, -(-len(steps) // 250))
    steps, table = steps[::every], table[::every].astype(np.float64)
    groups: dict[tuple[str, str], dict[str, int]] = {}
    for column, (name, matrix) in enumerate(history.matrices.items()):
        groups.setdefault((matrix.tower, matrix.role), {})[name] = column
    charts = []
    for (tower, role), names in groups.items():
        values = table[:, list(names.values())]
        seen = ~np.isnan(values).all(1)
        if seen.any():
            low, middle, high = np.nanquantile(values[seen], (0.1, 0.5, 0.9), axis=1)
            events = [history.events[name] for name in names if name in history.events]
            drawn = _small_chart(steps[seen], low, middle, high, events, history)
            count = f"{len(names):,} {'matrix' if len(names) == 1 else 'matrices'}"
            charts.append(f"<div><h3>{text(role)} <span>{text(tower)}, {count}</span></h3>{drawn}</div>")
    if not charts:
        return ""
    note = "Median and middle 80 % of the matrices that were measured, by role. Ticks at the bottom are freezes"
    note += ", the shaded start is the grace period, the dashed line is tau where all frozen matrices share one."
    inner = f"<p class=soft>{note}</p><div class=curves>{''.join(charts)}</div>"
    return section(f"Metric by role: {history.metric}", inner)


def _small_chart(steps, low, middle, high, events: list[FreezeEvent], history: RunHistory) -> str:
    width, height, left, bottom = 260, 130, 46, 16
    end = max(history.total_steps, history.step)
    taus = {event.tau for event in events if event.tau is not None and math.isfinite(event.tau)}
    tau = taus.pop() if len(taus) == 1 else None
    ends = [float(low.min()), float(high.max())] + ([tau] if tau is not None else [])
    bottom_value, top_value = min(ends), max(ends)
    logarithmic = bottom_value > 0 and top_value > 20 * bottom_value
    scale = np.log10 if logarithmic else np.asarray
    lower, upper = float(scale(bottom_value)), float(scale(top_value))
    span = upper - lower or 1.0

    def x(step):
        return left + (width - left) * step / end

    def y(value):
        return 4 + (height - bottom - 8) * (upper - scale(value)) / span

    def points(at, values):
        return " ".join(f"{px:.1f},{py:.1f}" for px, py in zip(x(at), y(values), strict=True))

    floor, grace = height - bottom, x(min(history.grace_steps, end)) - left
    band = f"{points(steps, high)} {points(steps[::-1], low[::-1])}"
    marks = "".join(f"M{x(step):.1f} {floor}v-5" for step in sorted({event.step for event in events}))
    shapes = [
        f'<rect x="{left}" y="2" width="{grace:.1f}" height="{floor - 2}" fill="var(--line)" opacity=".6"/>',
        f'<polygon points="{band}" fill="var(--band)"/>',
        f'<polyline points="{points(steps, middle)}" fill="none" stroke="var(--blue)" stroke-width="1.6" '
        'stroke-linejoin="round"/>',
        f'<path d="M{left} 2V{floor}H{width}" fill="none" stroke="var(--soft)" stroke-width=".8"/>',
        f'<path d="{marks}" stroke="var(--green)" stroke-width="1.2"/>',
        f'<text x="{left - 4}" y="11" text-anchor="end">{top_value:.2g}</text>',
        f'<text x="{left - 4}" y="{floor}" text-anchor="end">{bottom_value:.2g}</text>',
        f'<text x="{left}" y="{height - 3}">0</text>',
        f'<text x="{width}" y="{height - 3}" text-anchor="end">{end:,}</text>',
        f'<text x="{width}" y="11" text-anchor="end">{"log scale" if logarithmic else ""}</text>',
    ]
    if tau is not None:
        shapes.append(
            f'<path d="M{left} {y(tau):.1f}H{width}" stroke="var(--ink)" stroke-width=".9" stroke-dasharray="4 3"/>'
        )
    alt = f"Median from {middle[0]:.3g} at step {steps[0]} to {middle[-1]:.3g} at step {steps[-1]}"
    return f'<svg viewBox="0 0 {width} {height}" role=img aria-label="{alt}">{"".join(shapes)}</svg>'
