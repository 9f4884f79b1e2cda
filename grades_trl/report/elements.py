"""
Parts of a page that loads nothing from anywhere: style, tables, charts, images. Every string from outside is escaped.

Colors are those of Okabe and Ito, which all kinds of color vision tell apart; lines differ in their dashes as well.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --soft: #52606d; --line: #d9dee4; --card: #fff; --page: #f5f7fa;
  --blue: #005b94; --band: #005b9426; --orange: #b34a00; --green: #00664b; --grey: #6b7785; --violet: #8d3c72; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #aab4bf; --line: #36424e; --card: #1b232c;
  --page: #12181f; --blue: #6cb8ee; --band: #6cb8ee33; --orange: #f5a65b; --green: #4fd1a5; --grey: #9aa5b1;
  --violet: #e3a0c8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main, header { max-width: 1120px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 32px; }
main { padding-bottom: 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 4px 0 20px; overflow-wrap: anywhere; }
h2 { font-size: 19px; line-height: 1.3; margin: 0 0 12px; }
h3 { font-size: 15px; line-height: 1.35; margin: 0 0 4px; overflow-wrap: anywhere; }
p { margin: 4px 0 12px; max-width: 78ch; overflow-wrap: anywhere; }
.soft { color: var(--soft); }
.small { font-size: 14px; }
section, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; }
section { margin-bottom: 16px; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(260px, 100%), 1fr)); gap: 20px 28px; }
.answers p { margin-bottom: 8px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 0 0 16px; }
.card { padding: 12px 14px; margin: 0; display: flex; flex-direction: column-reverse; justify-content: flex-end; }
.card dd { margin: 0; font-size: 23px; font-weight: 700; line-height: 1.3; font-variant-numeric: tabular-nums; }
.card dt { color: var(--soft); font-size: 14px; line-height: 1.35; }
.wide { overflow-x: auto; }
.wide:focus-visible, summary:focus-visible { outline: 2px solid var(--blue); outline-offset: 2px; }
.plot { background: #fff; padding: 8px; border-radius: 6px; margin: 0 0 12px; }
.plot img { display: block; width: 100%; min-width: 680px; height: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; font-size: 14px; color: var(--soft); }
tbody th { color: inherit; font-size: inherit; font-weight: 400; }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th.n, td.n { text-align: right; }
td.n { white-space: nowrap; }
.pairs table { max-width: 680px; }
.many table { min-width: 640px; }
.pairs th, .pairs td { overflow-wrap: anywhere; white-space: normal; min-width: 8ch; }
tr > :last-child { padding-right: 0; }
tbody tr:last-child > * { border-bottom: 0; }
.scroll { max-height: 460px; overflow: auto; font-size: 14px; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); gap: 16px;
  align-items: start; margin-bottom: 16px; }
.columns section { margin: 0; min-width: 0; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(240px, 100%), 1fr)); gap: 18px 22px; }
.curves h3 span { font-weight: 400; color: var(--soft); }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--soft); font-size: 11px; }
.chart { min-width: 480px; }
.curves svg text { font-size: 10px; }
.key { display: flex; flex-wrap: wrap; gap: 4px 20px; list-style: none; margin: 8px 0 0; padding: 0; font-size: 14px; }
.key svg { display: inline-block; width: 26px; height: 10px; margin-right: 6px; vertical-align: middle; }
.key i { display: inline-block; width: 14px; height: 14px; margin-right: 6px; vertical-align: -2px; }
.stack { display: flex; height: 26px; border-radius: 5px; overflow: hidden; margin-bottom: 10px; gap: 2px; }
.stack i, .key i { background: var(--blue); }
.stack .p1, .key .p1 { background: repeating-linear-gradient(45deg, var(--orange) 0 6px, transparent 6px 9px); }
.stack .p2, .key .p2 { background: var(--grey); }
.stack .p3, .key .p3 { background: repeating-linear-gradient(90deg, var(--green) 0 4px, transparent 4px 6px); }
div + h3 { margin-top: 16px; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: 16px; }
.sample { border: 1px solid var(--line); border-radius: 8px; padding: 12px; margin: 0; min-width: 0; }
.sample img { display: block; max-width: 100%; min-width: min(140px, 100%); max-height: 220px; object-fit: contain;
  background: #fff; border-radius: 4px; margin-bottom: 8px; }
.sample dl { margin: 0; display: grid; grid-template-columns: auto 1fr; gap: 2px 12px; }
.sample dt { color: var(--soft); }
.sample dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
.good { color: var(--green); font-weight: 600; }
.bad { color: var(--orange); font-weight: 600; }
details { margin-top: 8px; }
summary { cursor: pointer; font-weight: 600; padding: 4px 0; }
code { font: 14px/1.45 ui-monospace, monospace; overflow-wrap: anywhere; }
.command { display: block; background: var(--page); border: 1px solid var(--line); border-radius: 6px;
  padding: 8px 10px; margin: 4px 0 12px; white-space: pre-wrap; }
@media (max-width: 480px) { header, main { padding-left: 12px; padding-right: 12px; } section { padding: 14px; }
  h1 { font-size: 23px; } }
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --line: #bbb; --card: #fff; --page: #fff;
  --blue: #005b94; --band: #005b9426; --orange: #b34a00; --green: #00664b; --grey: #6b7785; --violet: #8d3c72; }
  body { font-size: 11pt; } section, .card, .sample { break-inside: avoid; border-color: #bbb; }
  .scroll { max-height: none; overflow: visible; } .plot img, .many table { min-width: 0; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
# The policy makes the browser itself refuse scripts and anything from outside.
PERCENT = re.compile(r"(?<=\d) %")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def document(title: str, over: str, headline: str, parts: Iterable[str]) -> str:
    """A whole page.

    Args:
        title (`str`): of the window.
        over (`str`): a line above the headline.
        headline (`str`): the answer, in one sentence.
        parts (`Iterable[str]`): HTML of the sections; empty ones are left out.
    """
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style></head>\n"
        f"<body><header><div class=soft>{text(over)}</div><h1>{text(headline)}</h1></header>\n"
        f"<main>\n{body}\n</main></body></html>\n"
    )


def text(value: Any) -> str:
    """A value as people read it, escaped; a number and its percent sign stay on one line."""
    return PERCENT.sub("\u00a0%", escape(show(value), quote=True))


def show(value: Any) -> str:
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
        return ", ".join(f"{key} {show(item)}" for key, item in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(show(item) for item in value) or "-"
    return str(value)


def seconds(value: float | None) -> str:
    """Seconds, minutes or hours."""
    if value is None:
        return "not measurable"
    if abs(value) < 120:
        return f"{value:.3g} s"
    minutes = round(value / 60)
    return f"{value / 60:.1f} min" if abs(minutes) < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def times(ratio: float | None) -> str:
    return "not measurable" if ratio is None else f"{ratio:.2f}x"


def percent(fraction: float | None, digits: int = 1) -> str:
    return "-" if fraction is None else f"{100 * fraction:.{digits}f} %"


def table(rows: Sequence[tuple], header: tuple[str, ...] = (), numbers: int = 1, caption: str = "") -> str:
    """A table that scrolls sideways where it is wider than the page. Cells are escaped here.

    Args:
        rows (`Sequence[tuple]`): their first cells head the rows.
        header (`tuple[str, ...]`, *optional*): of the columns.
        numbers (`int`, *optional*, defaults to `1`): so many columns at the end are aligned to the right.
        caption (`str`, *optional*): what it shows, for readers who hear the page.
    """

    def cells(row: tuple, head: bool) -> str:
        out = []
        for i, cell in enumerate(row):
            tag, scope = ("th", "col" if head else "row") if head or i == 0 else ("td", "")
            # An empty cell heads nothing.
            tag, scope = ("td", "") if head and not show(cell) else (tag, scope)
            number = " class=n" if i >= len(row) - numbers else ""
            out.append(f"<{tag}{number}{f' scope={scope}' if scope else ''}>{text(cell)}</{tag}>")
        return "".join(out)

    head = f"<thead><tr>{cells(header, True)}</tr></thead>" if header else ""
    body = "".join(f"<tr>{cells(row, False)}</tr>" for row in rows)
    columns = len(rows[0]) if rows else 0
    css = "wide pairs" if columns == 2 else "wide many" if columns > 4 else "wide"
    return region(f"<table>{head}<tbody>{body}</tbody></table>", caption or "table", css)


def region(inner: str, label: str, css: str = "wide") -> str:
    """Something that may scroll, and can be scrolled with the keyboard too."""
    return f'<div class="{css}" tabindex=0 role=group aria-label="{text(label)}">{inner}</div>'


def section(title: str, inner: str) -> str:
    """A section with its title; nothing without content."""
    return f"<section><h2>{text(title)}</h2>{inner}</section>" if inner else ""


def table_section(title: str, rows: Sequence[tuple], header: tuple[str, ...] = (), numbers: int = 1) -> str:
    """A section with one table; nothing without rows."""
    return section(title, table(rows, header, numbers, title)) if rows else ""


def fold(title: str, inner: str) -> str:
    """Something that is closed until it is asked for."""
    return f"<details><summary>{text(title)}</summary>{inner}</details>"


def cards(entries: Iterable[tuple[str, str]]) -> str:
    """Figures in large type: (value, label)."""
    inner = "".join(f"<div class=card><dt>{text(label)}</dt><dd>{text(value)}</dd></div>" for value, label in entries)
    return f"<dl class=cards>{inner}</dl>" if inner else ""


def command(line: str) -> str:
    return f"<code class=command>{escape(line)}</code>"  # as it is, to be copied


def image(data: bytes, alt: str, kind: str = "png") -> str:
    return f'<img alt="{text(alt)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def plot(data: bytes, alt: str) -> str:
    """A figure of matplotlib, which is as wide as a screen and stays on white."""
    return region(image(data, alt), alt, "wide plot")


def stacked_bar(shares: Sequence[tuple[str, float]], label: str) -> str:
    """A bar of up to four parts, with its key: (name, amount)."""
    whole = sum(amount for _, amount in shares)
    if whole <= 0:
        return ""
    parts = "".join(
        f'<i class=p{i} style="width:{100 * max(0.0, amount) / whole:.2f}%"></i>'
        for i, (_, amount) in enumerate(shares)
    )
    key = "".join(
        f"<li><i class=p{i} aria-hidden=true></i>{text(name)} {text(percent(amount / whole))}</li>"
        for i, (name, amount) in enumerate(shares)
    )
    return f'<div class=stack role=img aria-label="{text(label)}">{parts}</div><ul class=key>{key}</ul>'


@dataclass(frozen=True)
class Line:
    """
    A line of a chart.

    Attributes:
        name (`str`): in the key.
        points (`Sequence[tuple[float, float]]`): x and y.
        color (`str`): a variable of the style, such as `"blue"`.
        dash (`str`): as in SVG; empty for a solid line.
        marks (`bool`): a mark at every point.
    """

    name: str
    points: Sequence[tuple[float, float]]
    color: str = "blue"
    dash: str = ""
    marks: bool = False


def chart(
    lines: Sequence[Line],
    alt: str,
    x_label: str,
    x_end: float,
    events: Sequence[tuple[float, str]] = (),
    events_name: str = "freezes",
) -> str:
    """
    Lines over a common x-axis that begins at 0, with vertical lines at events and a key below.

    Args:
        lines (`Sequence[Line]`): at least one with a point.
        alt (`str`): what the chart shows, in a sentence.
        x_label (`str`): under the axis.
        x_end (`float`): where the axis ends.
        events (`Sequence[tuple[float, str]]`, *optional*): x, and a text that is shown under the pointer.
        events_name (`str`, *optional*): of the vertical lines, in the key.
    """
    width, height, left, right, top, bottom = 760, 260, 54, 12, 10, 38
    values = [y for line in lines for _, y in line.points]
    low, high = min(values), max(values)
    logarithmic = low > 0 and high > 8 * low
    scale = math.log10 if logarithmic else float
    span = scale(high) - scale(low) or 1.0
    floor = height - bottom

    def x(at: float) -> float:
        return left + (width - left - right) * at / x_end

    def y(value: float) -> float:
        return top + (floor - top) * (scale(high) - scale(value)) / span

    shapes = [f'<path d="M{left} {top}V{floor}H{width - right}" fill="none" stroke="var(--soft)" stroke-width=".8"/>']
    for tick in _ticks(low, high, logarithmic):
        at = y(tick)
        shapes.append(f'<path d="M{left} {at:.1f}H{width - right}" stroke="var(--line)" stroke-width=".8"/>')
        shapes.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{tick:.3g}</text>')
    for tick in _ticks(0, x_end, False):
        shapes.append(f'<text x="{x(tick):.1f}" y="{floor + 15}" text-anchor="middle">{tick:,.6g}</text>')
    note = "; the y-axis is logarithmic" if logarithmic else ""
    shapes.append(f'<text x="{left}" y="{height - 4}">{text(x_label)}{note}</text>')
    for at, title in events:
        shapes.append(
            f'<path d="M{x(at):.1f} {top}V{floor}" stroke="var(--green)" stroke-width="1.4" stroke-dasharray="2 3">'
            f"<title>{text(title)}</title></path>"
        )
    for line in lines:
        drawn = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line.points)
        dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
        shapes.append(
            f'<polyline points="{drawn}" fill="none" stroke="var(--{line.color})" stroke-width="2"{dash} '
            'stroke-linejoin="round"/>'
        )
        if line.marks or len(line.points) == 1:
            shapes += [
                f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3" fill="var(--{line.color})"/>' for a, b in line.points
            ]
    key = [(line.name, line.color, line.dash) for line in lines] + ([(events_name, "green", "2 3")] if events else [])
    items = "".join(f"<li>{_key_line(color, dash)}{text(name)}</li>" for name, color, dash in key)
    drawn = f'<svg viewBox="0 0 {width} {height}" role=img aria-label="{text(alt)}">{"".join(shapes)}</svg>'
    return region(f"<div class=chart>{drawn}</div>", alt) + f"<ul class=key>{items}</ul>"


def _key_line(color: str, dash: str) -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    line = f'<path d="M0 5H26" stroke="var(--{color})" stroke-width="2.4"{dashes}/>'
    return f'<svg viewBox="0 0 26 10" aria-hidden=true>{line}</svg>'


def _ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    """Three to eight round numbers from `low` to `high`."""
    if logarithmic:
        tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            found = [digit * 10.0**ten for ten in tens for digit in digits if low <= digit * 10.0**ten <= high]
            if len(found) <= 8:
                return found
        return found[:: math.ceil(len(found) / 8)]
    if high <= low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 6)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]
