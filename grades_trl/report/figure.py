"""The figure of a run: which matrix froze when, and how much of the model was frozen over the steps.

Sizes are in inches, so that cells stay legible from 2 layers to 100.
"""

from __future__ import annotations

import io
import math

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from grades_trl.events import FreezeEvent
from grades_trl.report.history import RunHistory

WIDTH, MARGIN, GAP = 12.0, 0.3, 0.45
CELL_HEIGHT, MAX_CELL_WIDTH = 0.29, 0.62
INK, GREY, LIGHT = "#1f2933", "#7b8794", "#e4e7eb"
TOWER_COLORS = {"language": "#2563eb", "vision": "#d97706", "audio": "#059669", "projector": "#9333ea"}


def draw(history: RunHistory) -> Figure:
    """
    Draws the run so far.

    Above, one heatmap per tower (layer x role; matrices outside the layers have their own), colored by the step of the
    freeze. A cell with several matrices, as the layers of an `nn.Sequential`, counts as frozen once all are, and shows
    their mean step. Below, the frozen fraction over the steps.

    Returns:
        `matplotlib.figure.Figure`: on an Agg canvas, 12 inches wide. No pyplot state is touched.
    """
    panels = _panels(history)
    label_width = {id(p): 0.25 + 0.073 * max(len(_short(role)) for role in p["roles"]) for p in panels}
    rows: list[list[dict]] = [[]]
    x = MARGIN
    for panel in panels:
        room = WIDTH - 2 * MARGIN - label_width[id(panel)]
        panel["cell"] = min(MAX_CELL_WIDTH, room / len(panel["layers"]))
        width = label_width[id(panel)] + panel["cell"] * len(panel["layers"])
        title_width = 0.095 * len(panel["title"]) + 0.075 * len(panel["subtitle"]) + 0.3
        if rows[-1] and x + max(width, title_width) > WIDTH - MARGIN + 1e-6:
            x, rows = MARGIN, [*rows, []]
        panel["x"] = x
        rows[-1].append(panel)
        x += max(width, title_width) + GAP
    title_height, axis_height, head, plot_height, foot = 0.42, 0.62, 1.0, 2.3, 0.6
    heights = [title_height + CELL_HEIGHT * max(len(p["roles"]) for p in row) + axis_height for row in rows]
    height = head + sum(heights) + 0.4 + plot_height + foot

    figure = Figure(figsize=(WIDTH, height), facecolor="white")
    FigureCanvasAgg(figure)

    def axes(left, top, width, tall):
        return figure.add_axes((left / WIDTH, 1 - (top + tall) / height, width / WIDTH, tall / height))

    def text(left, top, string, **style):
        return figure.text(left / WIDTH, 1 - top / height, _literal(string), va="baseline", **style)

    steps = [event.step for event in history.events.values()]
    low, high = (min(steps), max(steps)) if steps else (0, history.total_steps)
    norm = Normalize(low, high if high > low else low + 1)
    text(MARGIN, 0.38, "When each matrix froze", fontsize=15, fontweight="bold", color=INK)
    text(MARGIN, 0.64, f"metric: {history.metric}", fontsize=9.5, color=GREY)
    _draw_key(axes(WIDTH - MARGIN - 2.6, 0.3, 2.6, 0.13), norm, bool(steps))
    figure.legend(
        handles=[
            Patch(facecolor=LIGHT, edgecolor="#9aa5b1", hatch="////", linewidth=0, label="still training"),
            Patch(facecolor="#cbd2d9", edgecolor="white", hatch="..", linewidth=0, label="partly frozen"),
        ][: 2 if any(len(cell) > 1 for p in panels for cell in p["cells"].values()) else 1],
        loc="upper right",
        bbox_to_anchor=((WIDTH - MARGIN - 2.9) / WIDTH, 1 - 0.22 / height),
        ncols=2,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )

    top = head
    for row, row_height in zip(rows, heights, strict=True):
        for panel in row:
            title = text(panel["x"], top + 0.25, panel["title"], fontsize=11, fontweight="bold", color=INK)
            left = panel["x"] + label_width[id(panel)]
            wide, tall = panel["cell"] * len(panel["layers"]), CELL_HEIGHT * len(panel["roles"])
            ax = axes(left, top + title_height, wide, tall)
            _draw_panel(ax, panel, history.events, norm)
            beside = {"xycoords": title, "textcoords": "offset points", "annotation_clip": False}
            ax.annotate(panel["subtitle"], (1, 0), (8, 0.4), va="bottom", fontsize=9.5, color=GREY, **beside)
        top += row_height
    text(MARGIN, top + 0.2, "Frozen fraction", fontsize=11, fontweight="bold", color=INK)
    _draw_fraction(axes(MARGIN + 0.5, top + 0.4, WIDTH - 2 * MARGIN - 0.5, plot_height), history)
    return figure


def render(figure: Figure, dpi: int = 130) -> bytes:
    """A figure as PNG."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=dpi)
    return data.getvalue()


def _panels(history: RunHistory) -> list[dict]:
    """One panel per tower, or more if it has several lists of layers; cells are (role, layer) -> matrix names."""
    panels: dict[tuple[str, str], dict] = {}
    for name, matrix in history.matrices.items():
        inside = matrix.layer >= 0
        stack = matrix.stack if inside else ""
        panel = panels.setdefault((matrix.tower, stack), {"tower": matrix.tower, "stack": stack, "cells": {}})
        panel["cells"].setdefault((matrix.role, matrix.layer), []).append(name)
    towers = [panel["tower"] for panel in panels.values()]
    for panel in panels.values():
        names = [name for cell in panel["cells"].values() for name in cell]
        frozen = sum(name in history.events for name in names)
        panel["title"] = panel["tower"].capitalize()
        if towers.count(panel["tower"]) > 1:
            panel["title"] += f" ({panel['stack'] or 'outside the layers'})"
        panel["subtitle"] = f"{frozen:,} of {len(names):,} frozen"
        panel["roles"] = list(dict.fromkeys(role for role, _ in panel["cells"]))
        layers = [layer for _, layer in panel["cells"]]
        panel["layers"] = range(min(layers), max(layers) + 1)
    return list(panels.values())


def _draw_key(ax, norm: Normalize, any_frozen: bool) -> None:
    if not any_frozen:
        ax.set_axis_off()
        return
    bar = ax.figure.colorbar(ScalarMappable(norm, "viridis"), cax=ax, orientation="horizontal")
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(5, steps=[1, 2, 5, 10], integer=True)
    bar.formatter = _thousands
    bar.set_label("frozen at step", fontsize=9, color=INK, labelpad=2)
    ax.tick_params(labelsize=8, color=GREY, labelcolor=INK, length=2)


def _draw_panel(ax, panel: dict, events: dict[str, FreezeEvent], norm: Normalize) -> None:
    roles, layers = panel["roles"], panel["layers"]
    shape = (len(roles), len(layers))
    steps, training, partly = np.full(shape, np.nan), np.zeros(shape, bool), np.zeros(shape, bool)
    labels = {}
    for (role, layer), names in panel["cells"].items():
        at = roles.index(role), layer - layers[0]
        frozen = [events[name].step for name in names if name in events]
        if len(frozen) == len(names):
            steps[at] = np.mean(frozen)
            labels[at] = _count(round(steps[at]))
        else:
            training[at], partly[at] = not frozen, bool(frozen)
            labels[at] = f"{len(frozen)}/{len(names)}" if frozen else ""
    line = 1.0 if panel["cell"] > 0.2 else 0.5
    edges = np.arange(len(layers) + 1) - 0.5, np.arange(len(roles) + 1) - 0.5
    for mask, color, ink, hatch in (
        (training, LIGHT, "#b3bcc6", "////"),
        (partly, "#cbd2d9", "white", ".."),
    ):
        squares = [
            [(x - 0.5, y - 0.5), (x + 0.5, y - 0.5), (x + 0.5, y + 0.5), (x - 0.5, y + 0.5)]
            for y, x in np.argwhere(mask).tolist()
        ]
        ax.add_collection(PolyCollection(squares, facecolor=color, edgecolor=ink, hatch=hatch, linewidth=0))
    ax.pcolormesh(*edges, np.ma.masked_invalid(steps), cmap="viridis", norm=norm)
    ax.set_xticks(edges[0], minor=True)
    ax.set_yticks(edges[1], minor=True)
    ax.grid(which="minor", color="white", linewidth=line)
    ax.tick_params(which="both", length=0, colors=INK, labelsize=8.5)
    ax.spines[:].set_visible(False)
    ax.set_facecolor("white")
    ax.set_yticks(range(len(roles)), [_literal(_short(role)) for role in roles])
    ax.set_ylim(len(roles) - 0.5, -0.5)
    if layers[0] < 0:
        ax.set_xticks([])
        ax.set_xlabel("no layer", fontsize=9, color=GREY)
    else:
        every = next(n for n in (1, 2, 5, 10, 20, 50, 100) if panel["cell"] * n >= 0.24)
        shown = [layer for layer in layers if layer % every == 0]
        ax.set_xticks([layer - layers[0] for layer in shown], [str(layer) for layer in shown])
        ax.set_xlabel("layer", fontsize=9, color=GREY)
    if panel["cell"] >= 0.38:
        for (row, column), label in labels.items():
            dark = not math.isnan(steps[row, column]) and norm(steps[row, column]) < 0.6
            color = "white" if dark else INK
            ax.text(column, row, label, ha="center", va="center", fontsize=8, color=color)


def _draw_fraction(ax, history: RunHistory) -> None:
    total, now = history.total_steps, history.step
    events = sorted(history.events.values(), key=lambda event: event.step)
    by_tower: dict[str, int] = {}
    for matrix in history.matrices.values():
        by_tower[matrix.tower] = by_tower.get(matrix.tower, 0) + 1

    def curve(chosen, weights, whole, **style):
        x = [0, *(event.step for event in chosen), now]
        y = np.concatenate([[0], np.cumsum(weights)]) / whole
        ax.plot(x, [*y, y[-1]], drawstyle="steps-post", solid_capstyle="butt", **style)

    if history.grace_steps > 0:
        ax.axvspan(0, history.grace_steps, color="#fde68a", alpha=0.5, linewidth=0, label="grace period")
    if len(by_tower) > 1:
        for tower, count in by_tower.items():
            chosen = [event for event in events if event.tower == tower]
            color = TOWER_COLORS.get(tower, GREY)
            curve(chosen, np.ones(len(chosen)), count, color=color, linewidth=1.3, label=tower)
    params = sum(matrix.params for matrix in history.matrices.values())
    curve(events, [e.params for e in events], params, color=INK, linewidth=1.2, linestyle=":", label="parameters")
    curve(events, np.ones(len(events)), len(history.matrices), color=INK, linewidth=2.2, label="matrices")
    if now < total:
        ax.axvspan(now, total, facecolor="none", edgecolor=LIGHT, hatch="////", linewidth=0, label="not run")
        ax.axvline(now, color=GREY, linewidth=0.8)
    ax.plot(now, len(events) / len(history.matrices), "o", color=INK, markersize=5, clip_on=False)
    ax.axvline(total, color="#dc2626", linewidth=1.4, linestyle="--", label="full schedule")
    end = max(total, now)
    # The label of the last step goes to the side that has room.
    right = now < 0.8 * end
    style = {"fontsize": 9, "color": INK, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1.5}}
    ax.annotate(
        f"step {now:,} of {total:,}",
        (now, 0.5),
        (6 if right else -6, 0),
        textcoords="offset points",
        ha="left" if right else "right",
        va="center",
        **style,
    )
    ax.set_xlim(0, end * 1.01)
    ax.set_ylim(-0.03, 1.05)
    ax.xaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 5, 10], integer=True))
    ax.xaxis.set_major_formatter(_thousands)
    ax.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
    ax.set_xlabel("optimizer step", fontsize=9.5, color=INK)
    ax.grid(axis="y", color=LIGHT, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.tick_params(colors=INK, labelsize=8.5, color=GREY)
    ax.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1.0),
        ncols=8,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        handlelength=1.6,
        columnspacing=1.3,
    )


def _short(role: str, limit: int = 30) -> str:
    return role if len(role) <= limit else "…" + role[1 - limit :]


def _literal(string: str) -> str:
    """Keeps matplotlib from reading names as formulas."""
    return string.replace("$", r"\$")


def _thousands(tick: float, _position: int) -> str:
    return f"{int(tick):,}"


def _count(n: int) -> str:
    return f"{n}" if n < 10_000 else f"{n / 1000:.0f}k"
