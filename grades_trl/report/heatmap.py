"""The heatmap of a run: which layers have the gain, when, and whether that is worth their FLOPs.

Rows are layers from input to output, columns are windows of measured steps. Above stands the gain of all layers,
beside it the shares of each layer over the whole run.
"""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from grades_trl.report.figure import GREY, INK, LIGHT, MARGIN, WIDTH
from grades_trl.report.gain import GainTable

COLORS, LIMIT = "RdBu", 3.0  # told apart with every kind of color vision; a layer of thrice its cost is as blue as any
BLUE, RED = "#2f79b5", "#b6202f"  # of the same map
LABELS, BARS, GAP = 1.4, 1.9, 0.16  # inches: layer numbers, the shares at the right, between two towers


def draw(table: GainTable) -> Figure:
    """
    Draws what was measured so far.

    Args:
        table (`GainTable`): with one measured step at least.

    Returns:
        `matplotlib.figure.Figure`: on an Agg canvas, 12 inches wide. No pyplot state is touched.
    """
    groups = _groups(table)
    cell = min(0.29, max(0.09, 6.5 / len(table.layers)))
    wide = WIDTH - 2 * MARGIN - LABELS - BARS - 0.35
    heights = [cell * len(rows) for _, rows in groups]
    head, above, foot = 1.1, 0.75, 0.95
    height = head + above + GAP + sum(heights) + GAP * (len(groups) - 1) + foot
    figure = Figure(figsize=(WIDTH, height), facecolor="white")
    FigureCanvasAgg(figure)

    def axes(left: float, top: float, width: float, tall: float) -> Axes:
        return figure.add_axes((left / WIDTH, 1 - (top + tall) / height, width / WIDTH, tall / height))

    def text(left: float, top: float, string: str, **style) -> None:
        figure.text(left / WIDTH, 1 - top / height, string, va="baseline", **style)

    text(MARGIN, 0.38, "Where the gain is", fontsize=15, fontweight="bold", color=INK)
    subtitle = "The share of each layer in the squared gradient of the training loss, for its share of the FLOPs"
    text(MARGIN, 0.64, subtitle, fontsize=9.5, color=GREY)
    norm = Normalize(-LIMIT, LIMIT)
    _draw_key(axes(WIDTH - MARGIN - 2.9, 0.3, 2.9, 0.13), norm)

    left, right = MARGIN + LABELS, WIDTH - MARGIN - BARS
    _draw_gain_per_step(axes(left, head, wide, above), table)
    values, summary = table.gain_per_cost(), table.summary()
    assert summary is not None  # a step was measured
    shares = list(summary.layers.values())
    longest = max(max(abs(share.gain or 0.0), share.cost) for share in shares)
    top = head + above + GAP
    for (title, rows), tall in zip(groups, heights, strict=True):
        ax = axes(left, top, wide, tall)
        _draw_layers(ax, table, rows, values[rows], norm, cell)
        text(MARGIN, top + min(0.15, tall), title, fontsize=10, fontweight="bold", color=INK)
        beside = axes(right, top, BARS, tall)
        _draw_shares(beside, [shares[row] for row in rows], longest)
        top += tall + GAP
    _label_steps(ax, table)
    beside.tick_params(labelbottom=True)
    text(right, head + above, "share of gain", fontsize=9, color=BLUE, fontweight="bold")
    text(right + 1.1, head + above, "|  of FLOPs", fontsize=9, color=INK, fontweight="bold")
    _draw_legend(figure, height)
    return figure


def _groups(table: GainTable) -> list[tuple[str, list[int]]]:
    """The rows of each list of layers, with its title."""
    groups: dict[tuple[str, str], list[int]] = {}
    for row, members in enumerate(table.layers.values()):
        groups.setdefault((members[0].tower, members[0].stack), []).append(row)
    towers = [tower for tower, _ in groups]
    return [
        (
            tower.capitalize() if towers.count(tower) == 1 else f"{tower.capitalize()} {towers[:i].count(tower) + 1}",
            rows,
        )
        for i, ((tower, _), rows) in enumerate(groups.items())
    ]


def _draw_key(ax: Axes, norm: Normalize) -> None:
    bar = ax.figure.colorbar(ScalarMappable(norm, COLORS), cax=ax, orientation="horizontal", extend="both")
    bar.outline.set_visible(False)
    bar.set_ticks([-3, -2, -1, 0, 1, 2, 3])
    bar.set_label("gain per FLOP; 1 is that of the whole model", fontsize=8.5, color=INK, labelpad=2)
    ax.tick_params(labelsize=8, color=GREY, labelcolor=INK, length=2)


def _draw_gain_per_step(ax: Axes, table: GainTable) -> None:
    gains = table.gain_per_step()
    ax.bar(np.arange(len(gains)), gains, width=0.86, color=np.where(gains < 0, RED, BLUE))
    ax.axhline(0, color=GREY, linewidth=0.7)
    ax.set_xlim(-0.5, len(gains) - 0.5)
    ax.set_xticks([])
    ax.spines[:].set_visible(False)
    ax.tick_params(labelsize=8, colors=INK, length=2)
    ax.locator_params(axis="y", nbins=3)
    ax.set_ylabel("gain\nof a step", fontsize=8.5, color=GREY, rotation=0, ha="right", va="center")


def _draw_layers(
    ax: Axes, table: GainTable, rows: list[int], values: np.ndarray, norm: Normalize, cell: float
) -> None:
    layers, first = list(table.layers.items()), [table.steps[part.start] for part in table.windows()]
    edges = np.arange(len(first) + 1) - 0.5, np.arange(len(rows) + 1) - 0.5
    line = 0.8 if cell > 0.15 else 0.3
    ax.pcolormesh(*edges, np.ma.masked_invalid(values), cmap=COLORS, norm=norm, edgecolors="white", linewidth=line)
    frozen: list = []
    empty: list = []
    for y, x in np.argwhere(np.isnan(values)).tolist():
        at = table.frozen_at.get(layers[rows[y]][0], math.inf)
        square = [(x - 0.5, y - 0.5), (x + 0.5, y - 0.5), (x + 0.5, y + 0.5), (x - 0.5, y + 0.5)]
        (frozen if first[x] > at else empty).append(square)
    ax.add_collection(PolyCollection(frozen, facecolor="#cbd2d9", edgecolor="#7b8794", hatch="/////", linewidth=0))
    ax.add_collection(PolyCollection(empty, facecolor=LIGHT, linewidth=0))
    frozen_at = {y: table.frozen_at[layers[row][0]] for y, row in enumerate(rows) if layers[row][0] in table.frozen_at}
    marks, of_rows = np.searchsorted(first, list(frozen_at.values()), side="right") - 0.5, np.array(list(frozen_at))
    ax.vlines(marks, of_rows - 0.44, of_rows + 0.44, color=INK, linewidth=3, clip_on=False)
    ax.tick_params(length=0, colors=INK, labelsize=8)
    ax.spines[:].set_visible(False)
    numbers = [layers[row][1][0].layer for row in rows]
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100) if cell * n >= 0.15)
    shown = [y for y, number in enumerate(numbers) if number >= 0 and number % every == 0]
    ax.set_yticks(shown, [f"layer {numbers[y]}" if y == 0 else str(numbers[y]) for y in shown])
    ax.set_xticks([])
    ax.set_xlim(-0.5, len(first) - 0.5)
    ax.set_ylim(len(rows) - 0.5, -0.5)


def _label_steps(ax: Axes, table: GainTable) -> None:
    """Steps under the last row of heatmaps. Windows hold equally many measured steps, so the numbers are not evenly
    spaced."""
    first = [table.steps[part.start] for part in table.windows()]
    every = math.ceil(len(first) / 15)
    shown = range(0, len(first), every)
    ax.set_xticks(list(shown), [f"{first[x]:,}" for x in shown])
    ax.tick_params(axis="x", which="major", length=2, labelsize=8.5)
    several = "; every column has equally many measured steps" if len(first) < len(table.steps) else ""
    ax.set_xlabel(f"optimizer step{several}", fontsize=9, color=GREY)


def _draw_shares(ax: Axes, shares: list, longest: float) -> None:
    gains = np.array([share.gain or 0.0 for share in shares])
    ax.barh(np.arange(len(gains)), gains, height=0.7, color=np.where(gains < 0, RED, BLUE))
    costs, y = [share.cost for share in shares], np.arange(len(shares))
    ax.vlines(costs, y - 0.42, y + 0.42, color=INK, linewidth=1.6)
    ax.axvline(0, color=GREY, linewidth=0.7)
    ax.set_xlim(min(0.0, 1.1 * gains.min()), 1.1 * longest)
    ax.set_ylim(len(gains) - 0.5, -0.5)
    ax.set_yticks([])
    ax.locator_params(axis="x", nbins=4)
    ax.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f} %")
    ax.tick_params(labelsize=8, colors=INK, length=2, labelbottom=False)
    ax.spines[:].set_visible(False)


def _draw_legend(figure: Figure, height: float) -> None:
    handles: list = [
        Line2D([], [], color=INK, linewidth=0, marker="|", markersize=9, markeredgewidth=2.5, label="freeze"),
        Patch(facecolor="#cbd2d9", edgecolor="#7b8794", hatch="/////", linewidth=0, label="frozen"),
        Patch(facecolor=LIGHT, linewidth=0, label="no gradient"),
        Line2D([], [], color="none", label="red: gradients of two batches point apart, which is noise"),
    ]
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=((MARGIN + LABELS) / WIDTH, 0.1 / height),
        ncols=4,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        handlelength=1.6,
    )
