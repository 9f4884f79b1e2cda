"""The page of a run: one HTML file that loads nothing from anywhere. Every string from outside is escaped."""

from __future__ import annotations

import base64
import math
from html import escape
from typing import Any

import numpy as np

from grades_trl.events import FreezeEvent
from grades_trl.report.history import RunHistory
from grades_trl.report.summary import Flops, GainShare, GainSummary, Heldout, RunSummary
from grades_trl.report.timing import Speedup

MAX_EVENTS = 2000  # rows of a table; the rest is in the files
STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --soft: #616e7c; --line: #e4e7eb; --card: #fff; --page: #f5f7fa;
  --accent: #2563eb; --band: #2563eb26; --good: #047857; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #9aa5b1; --line: #323f4b; --card: #1b232c;
  --page: #12181f; --accent: #7aa7ff; --band: #7aa7ff33; --good: #34d399; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 12px; }
p { margin: 4px 0 12px; }
.soft { color: var(--soft); }
.lead { font-size: 17px; margin: 12px 0 20px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px; margin-bottom: 16px; }
section, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; }
section { margin-bottom: 16px; overflow-x: auto; }
.card { padding: 14px 16px; }
.card b { display: block; font-size: 23px; line-height: 1.3; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: 13px; line-height: 1.35; display: block; }
.figure { background: #fff; padding: 8px; }
.figure img { display: block; width: 100%; min-width: 680px; height: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; font-size: 13px; color: var(--soft); }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
td.n, th.n { text-align: right; white-space: nowrap; }
tr.total td { font-weight: 600; }
.scroll { max-height: 460px; overflow: auto; font-size: 13.5px; }
.scroll th { position: sticky; top: 0; background: var(--card); }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 16px; align-items: start; }
.columns section { margin: 0; }
.columns { margin-bottom: 16px; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 18px 22px; }
.curves h3 { font-size: 13.5px; margin: 0 0 4px; overflow-wrap: anywhere; }
.curves h3 span { font-weight: 400; color: var(--soft); }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--soft); font-size: 10px; }
.bar { background: var(--line); border-radius: 4px; height: 8px; min-width: 80px; margin-top: 7px; overflow: hidden; }
.bar i { display: block; height: 8px; background: var(--accent); }
details { margin-bottom: 8px; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow: auto; font-size: 12.5px; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def build(history: RunHistory, summary: RunSummary, png: bytes | None, gain: bytes | None = None) -> str:
    """
    The page as text.

    Args:
        history (`RunHistory`): events and metric values.
        summary (`RunSummary`): all other facts.
        png (`bytes` or `None`): the figure of the run.
        gain (`bytes`, *optional*): the heatmap of the gain; without it the page has no section about it.
    """
    model = _e(summary.environment.model)
    parts = [
        f"<h1>{model}</h1>",
        f"<div class=soft>metric {_e(summary.metric)} · {_e(summary.environment.device)}</div>",
        _lead(summary),
        f"<div class=cards>{''.join(_cards(summary))}</div>",
        _speedup(summary.speedup),
        _timeline(png),
        _gain(summary.gain, gain),
        _curves(history),
        _details(summary),
        _events(history),
        _still_training(history),
    ]
    # The policy makes the browser itself refuse scripts and anything from outside.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{model} - GradES</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def _e(value: Any) -> str:
    return escape(_show(value), quote=True)


def _show(value: Any) -> str:
    """A number, text or small dict as people read it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "-"
        return f"{value:,.0f}" if 10_000 <= abs(value) < 1e15 else f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_show(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_show(item) for item in value)
    return str(value)


def _seconds(value: float | None) -> str:
    if value is None:
        return "not measurable"
    if abs(value) < 120:
        return f"{value:.3g} s"
    minutes = round(value / 60)
    return f"{value / 60:.1f} min" if abs(minutes) < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _times(ratio: float | None) -> str:
    return "not measurable" if ratio is None else f"{ratio:.2f}x"


def _table(rows: list[tuple], header: tuple[str, ...] = (), numbers: int = 1) -> str:
    """A table; the last `numbers` columns are right-aligned. Cells are escaped here."""

    def cells(tag: str, row: tuple) -> str:
        first_number = len(row) - numbers
        return "".join(
            f"<{tag}{' class=n' if i >= first_number else ''}>{_e(cell)}</{tag}>" for i, cell in enumerate(row)
        )

    head = f"<thead><tr>{cells('th', header)}</tr></thead>" if header else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table>{head}<tbody>{body}</tbody></table>"


def _section(title: str, rows: list[tuple], header: tuple[str, ...] = (), numbers: int = 1) -> str:
    """A section with one table; nothing without rows."""
    return f"<section><h2>{title}</h2>{_table(rows, header, numbers)}</section>" if rows else ""


def _lead(summary: RunSummary) -> str:
    text = f"Ran <b>{summary.steps:,} of {summary.total_steps:,}</b> optimizer steps: {_e(summary.stop_reason)}."
    if summary.diverged_at is not None:
        text += f" <b>The run diverged at step {summary.diverged_at:,}</b>: its speed means nothing."
    return f"<p class=lead>{text} Weights of the model: {_e(summary.weights)}.</p>"


def _cards(summary: RunSummary) -> list[str]:
    speedup, overhead = summary.speedup, summary.overhead
    cards = [(f"{summary.frozen:,} / {summary.tracked_matrices:,}", "matrices frozen")]
    if summary.without_gradient:
        cards.append((f"{summary.without_gradient:,}", "matrices that never got a gradient"))
    if speedup.against_same_length is not None:
        cards.append((_times(speedup.against_same_length), "against a baseline of the same length"))
    if speedup.against_full_schedule is not None:
        cards.append((_times(speedup.against_full_schedule), "against a baseline of the full schedule"))
    if overhead.ms_per_step is not None:
        share = "" if overhead.fraction is None else f" ({overhead.fraction:.1%} of training)"
        cards.append((f"{overhead.ms_per_step:.3g} ms", f"overhead of GradES per step{share}"))
    if summary.peak_memory_mib is not None:
        cards.append((f"{summary.peak_memory_mib:,.0f} MiB", "peak memory"))
    return [f"<div class=card><b>{_e(value)}</b><span>{_e(label)}</span></div>" for value, label in cards]


def _speedup(speedup: Speedup) -> str:
    cheaper, steps, validation = speedup.cheaper_steps, speedup.steps_not_run, speedup.validation_not_run

    def amount(count: int | None, unit: str) -> str:
        return "" if count is None else f"{count:,} {unit}"

    rows = [
        ("Cheaper steps", "", _times(cheaper.ratio), _seconds(cheaper.seconds_saved)),
        ("Steps not run", amount(steps.steps, "steps"), _times(steps.ratio), _seconds(steps.seconds_saved)),
        (
            "Validation not run",
            amount(validation.evaluations, "evaluations"),
            "-",
            _seconds(validation.seconds_saved),
        ),
        ("All together, against a baseline of the same length", "", _times(speedup.against_same_length), ""),
        ("All together, against a baseline of the full schedule", "", _times(speedup.against_full_schedule), ""),
    ]
    return _section("What freezing saved", rows, ("Part", "Amount", "Speed-up", "Time saved"), numbers=2)


def _timeline(png: bytes | None) -> str:
    if png is None:
        return ""
    return (
        '<section class=figure><img alt="Freeze step of every matrix, and the frozen fraction over the steps" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}"></section>'
    )


def _gain(gain: GainSummary | None, png: bytes | None) -> str:
    if gain is None or png is None:
        return ""
    image = base64.b64encode(png).decode()
    header = ("", "Gain", "Standard error", "FLOPs")

    def rows(shares: dict[str, GainShare]) -> list[tuple]:
        return [(name, _percent(s.gain), _percent(s.error), _percent(s.cost)) for name, s in shares.items()]

    return (
        '<section class=figure><img alt="Gain of every layer over the steps, relative to its FLOPs" '
        f'src="data:image/png;base64,{image}"></section>'
        f"<section><h2>Where the gain is</h2><p>{_e(str(gain))}</p>"
        "<p class=soft>The gain of a layer is its part of the squared gradient of the training loss: how fast its "
        "weights could bring the loss down. It is estimated by the product of the gradients of two consecutive steps. "
        "A negative one is noise: the gradients of the two batches point apart. The steps measured are those of the "
        "first fifth of the run, and later one in ten or fewer. Embeddings, norms and the output head are not "
        "tracked, and have no share. Late in a run gains are small and noisy. Sum over these steps, all layers "
        f"together: {_e(gain.total)}.</p>"
        f"{_table(rows(gain.towers), header, numbers=3)}"
        f"<details><summary>All {len(gain.layers):,} layers</summary><div class=scroll>"
        f"{_table(rows(gain.layers), header, numbers=3)}</div></details></section>"
    )


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{fraction:.1%}"


def _details(summary: RunSummary) -> str:
    bars = []
    for tower, count in summary.towers.items():
        bar = f'<div class=bar><i style="width:{100 * count.frozen / count.matrices:.1f}%"></i></div>'
        number = f"{count.frozen:,} / {count.matrices:,}"
        bars.append(f"<tr><td>{_e(tower)}</td><td>{bar}</td><td class=n>{number}</td></tr>")
    seconds = summary.seconds
    parts = ("training", "validation", "saving", "grades", "total")
    parameters = [
        ("parameters in tracked matrices", summary.tracked_parameters),
        ("trained parameters outside them", summary.untracked_parameters),
    ]
    sections = [
        f"<section><h2>Towers</h2><table><tbody>{''.join(bars)}</tbody></table></section>",
        _section("Scores", list(summary.results.items())),
        _section("Where the time went", [(part, _seconds(getattr(seconds, part))) for part in parts]),
        _section("FLOPs in tracked layers, predicted", _flops(summary.flops)),
        _section("Held-out measurements", [] if summary.heldout is None else _heldout(summary.heldout)),
        _section("Layers that backward skips", [(f"from step {s.step:,}", s.layers) for s in summary.skipped_layers]),
        _section("Settings", list(summary.settings.items())),
        _section("Model and versions", [*parameters, *summary.environment.versions.items()]),
    ]
    return f"<div class=columns>{''.join(sections)}</div>"


def _flops(flops: Flops) -> list[tuple]:
    rows = [
        ("this run", flops.run),
        ("baseline of the same length", flops.baseline_same_length),
        ("baseline of the full schedule", flops.baseline_full_schedule),
    ]
    shown = [(label, f"{value:.3g}") for label, value in rows if value is not None]
    return [*shown, ("fraction of the full schedule", flops.fraction)]


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


def _events(history: RunHistory) -> str:
    events = sorted(history.all_events, key=lambda event: event.step)
    if not events:
        return "<section><h2>Freeze events</h2><p class=soft>No matrix froze.</p></section>"
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
    table = _table(rows, header, numbers=4)
    return f"<section><h2>Freeze events</h2>{note}<div class=scroll>{table}</div></section>"


def _still_training(history: RunHistory) -> str:
    columns, rows = history.table()
    live = [dict(zip(columns, row, strict=True)) for row in rows if row[columns.index("frozen at step")] is None]
    if not live:
        return ""
    keys = ("matrix", "tower", "layer", "role", "params", "last value")
    shown = [tuple(row[key] for key in keys) for row in live[:MAX_EVENTS]]
    table = _table(shown, ("Matrix", "Tower", "Layer", "Role", "Parameters", "Last value"), numbers=2)
    title = f"Still training at the end ({len(live):,})"
    return f"<section><details><summary>{title}</summary><div class=scroll>{table}</div></details></section>"


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
            chart = _chart(steps[seen], low, middle, high, events, history)
            count = f"{len(names):,} {'matrix' if len(names) == 1 else 'matrices'}"
            charts.append(f"<div><h3>{_e(role)} <span>{_e(tower)}, {count}</span></h3>{chart}</div>")
    if not charts:
        return ""
    note = "Median and middle 80 % of the matrices that were measured, by role. Ticks at the bottom are freezes"
    note += ", the shaded start is the grace period, the dashed line is tau where all frozen matrices share one."
    title = f"<h2>Metric by role: {_e(history.metric)}</h2>"
    return f"<section>{title}<p class=soft>{note}</p><div class=curves>{''.join(charts)}</div></section>"


def _chart(steps, low, middle, high, events: list[FreezeEvent], history: RunHistory) -> str:
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
        f'<polyline points="{points(steps, middle)}" fill="none" stroke="var(--accent)" stroke-width="1.6" '
        'stroke-linejoin="round"/>',
        f'<path d="M{left} 2V{floor}H{width}" fill="none" stroke="var(--soft)" stroke-width=".8"/>',
        f'<path d="{marks}" stroke="var(--good)" stroke-width="1.2"/>',
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
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(shapes)}</svg>'
