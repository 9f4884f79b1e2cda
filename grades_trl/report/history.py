"""The evidence of a run on disk: which matrix froze when, what its metric read, and a page that shows it.

Written by one process (rank 0). Everything in the files is plain JSON, parquet, PNG and HTML; the page loads nothing
from anywhere.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
from dataclasses import asdict
from html import escape
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from grades_trl.events import FreezeEvent
from grades_trl.model.matrices import WeightMatrix

MAX_ROWS = 2000  # steps of history kept per matrix; when full, every other one goes and the stride doubles
MAX_EVENTS_ON_PAGE = 2000
COLUMNS = ["matrix", "tower", "layer", "role", "params", "frozen at step", "last value", "tau"]


class Timeline:
    """Keeps the freeze events and the metric's history of a run, and writes them to one directory.

    Files: `events.jsonl` (one line per freeze, as it happens), `history.parquet` (columns `step` int32, `matrix`
    dictionary of strings, `value` float32), `summary.json`, `timeline.png` and `report.html`.

    Args:
        directory (`str` or `Path`): where the files go; made if missing.
        matrices (`dict[str, WeightMatrix]`): the tracked matrices by name, as in `GradES.matrices`.
        total_steps (`int`): optimizer steps in the full schedule.
        metric (`str`): name of the metric, for titles.
        grace_steps (`int`): optimizer steps during which nothing may freeze.
        resume_step (`int`, *optional*, defaults to `0`): the optimizer step that a checkpoint resumes after. Events
            and history up to and including it are kept if their files are there, later ones are dropped. 0 starts
            fresh.

    Raises:
        `KeyError`: on resuming, if a kept event or reading names a matrix that the model does not have.
    """

    def __init__(
        self,
        directory: str | Path,
        matrices: dict[str, WeightMatrix],
        total_steps: int,
        metric: str,
        grace_steps: int,
        resume_step: int = 0,
    ):
        self.directory = Path(directory)
        self.matrices = matrices
        self.total_steps = total_steps
        self.metric = metric
        self.grace_steps = grace_steps
        self.events: dict[str, FreezeEvent] = {}
        self._step = resume_step
        self._column = {name: i for i, name in enumerate(matrices)}
        # History: one float32 row per kept step, NaN where a matrix was not observed; and each matrix's last reading,
        # which thinning must not lose.
        self._rows: list[np.ndarray] = []
        self._row_steps: list[int] = []
        self._stride = 1
        self._readings_seen = 0
        self._last_step = np.zeros(len(matrices), np.int32)
        self._last_value = np.full(len(matrices), np.nan)

        self.directory.mkdir(parents=True, exist_ok=True)
        self._events_path = self.directory / "events.jsonl"
        self._history_path = self.directory / "history.parquet"
        kept = []
        if resume_step > 0 and self._events_path.exists():
            # A line without its end was cut off by a crash, so it is later than any checkpoint.
            lines = [line for line in self._events_path.read_text("utf-8").splitlines(True) if line.endswith("\n")]
            kept = [line for line in lines if json.loads(line)["step"] <= resume_step]
            for line in kept:
                event = FreezeEvent(**json.loads(line))
                self._check_known([event.matrix], self._events_path)
                self.events[event.matrix] = event
        self._events_path.write_text("".join(kept), "utf-8")
        if resume_step > 0 and self._history_path.exists():
            self._load_history(resume_step)
        else:
            self._history_path.unlink(missing_ok=True)

    def record(self, step: int, events: list[FreezeEvent], readings: dict[str, float]) -> None:
        """Takes in one optimizer step. Events are on disk when it returns; readings wait for `flush`.

        Args:
            step (`int`): optimizer step, counted from 1.
            events (`list[FreezeEvent]`): what froze at this step.
            readings (`dict[str, float]`): the metric of each matrix that was observed at this step, in the metric's
                unit. Empty if there was no reading. Non-finite values are not observations and are left out.

        Raises:
            `KeyError`: if a reading or an event names an unknown matrix.
        """
        self._step = step
        if readings:
            columns = np.fromiter((self._column[name] for name in readings), np.int64, len(readings))
            values = np.fromiter(readings.values(), np.float64, len(readings))
            finite = np.isfinite(values)
            columns, values = columns[finite], values[finite]
            self._last_step[columns] = step
            self._last_value[columns] = values
            if self._readings_seen % self._stride == 0:
                row = np.full(len(self.matrices), np.nan, np.float32)
                row[columns] = values
                self._append_row(step, row)
            self._readings_seen += 1
        if events:
            self._check_known([event.matrix for event in events], "record()")
            with self._events_path.open("a", encoding="utf-8") as file:
                for event in events:
                    self.events[event.matrix] = event
                    file.write(json.dumps(_strict(asdict(event)), allow_nan=False) + "\n")

    def flush(self) -> None:
        """Writes `history.parquet`: at most about 2,000 steps per matrix, and every matrix's last reading."""
        n = len(self.matrices)
        values = np.concatenate(self._rows) if self._rows else np.zeros(0, np.float32)
        steps = np.repeat(np.array(self._row_steps, np.int32), n)
        columns = np.tile(np.arange(n, dtype=np.int32), len(self._rows))
        observed = ~np.isnan(values)
        values, steps, columns = values[observed], steps[observed], columns[observed]

        thinned = np.flatnonzero((self._last_step > 0) & ~np.isin(self._last_step, self._row_steps))
        if len(thinned):
            values = np.concatenate([values, self._last_value[thinned].astype(np.float32)])
            steps = np.concatenate([steps, self._last_step[thinned]])
            columns = np.concatenate([columns, thinned.astype(np.int32)])
            order = np.argsort(steps, kind="stable")
            values, steps, columns = values[order], steps[order], columns[order]

        names = pa.array(list(self.matrices), pa.string())
        table = pa.table(
            {
                "step": pa.array(steps, pa.int32()),
                "matrix": pa.DictionaryArray.from_arrays(pa.array(columns), names),
                "value": pa.array(values, pa.float32()),
            }
        )
        # Replaced as a whole: a crash while writing must not cost the history so far.
        partial = self._history_path.with_suffix(".partial")
        pq.write_table(table.replace_schema_metadata({"stride": str(self._stride)}), partial)
        os.replace(partial, self._history_path)

    def figure(self) -> Figure:
        """Draws the run so far.

        Above, one heatmap per tower (layer x role; matrices outside the blocks have their own), colored by the step of
        the freeze. A cell with several matrices (experts) counts as frozen once all are, and shows their mean step.
        Below, the frozen fraction over the steps.

        Returns:
            `matplotlib.figure.Figure`: on an Agg canvas, 12 inches wide. No pyplot state is touched.
        """
        return _draw(self)

    def table(self) -> tuple[list[str], list[list]]:
        """One row per matrix, for a W&B Table or a printout.

        Returns:
            `tuple[list[str], list[list]]`: the columns (`matrix`, `tower`, `layer`, `role`, `params`,
            `frozen at step`, `last value`, `tau`) and the rows, in the order of `matrices`. `frozen at step` and `tau`
            are `None` while a matrix still trains, `last value` if it was never read.
        """
        rows = []
        for (name, matrix), last in zip(self.matrices.items(), self._last_value.tolist(), strict=True):
            event = self.events.get(name)
            frozen_at, tau = (event.step, event.tau) if event else (None, None)
            value = None if math.isnan(last) else last
            rows.append([name, matrix.tower, matrix.layer, matrix.role, matrix.params, frozen_at, value, tau])
        return COLUMNS, rows

    def write_report(self, summary: dict) -> None:
        """Writes `history.parquet`, `summary.json`, `timeline.png` and `report.html`.

        Args:
            summary (`dict`): what the run was and what it saved. NaN and infinities become `null`; the page shows the
                keys it knows in their places and all others as JSON.
        """
        self.flush()
        summary = _strict(summary)
        text = json.dumps(summary, indent=2, allow_nan=False, ensure_ascii=False)
        (self.directory / "summary.json").write_text(text + "\n", "utf-8")
        picture = io.BytesIO()
        self.figure().savefig(picture, format="png", dpi=130)
        (self.directory / "timeline.png").write_bytes(picture.getvalue())
        (self.directory / "report.html").write_text(_page(self, summary, picture.getvalue()), "utf-8")

    def _append_row(self, step: int, row: np.ndarray) -> None:
        self._rows.append(row)
        self._row_steps.append(step)
        if len(self._rows) >= MAX_ROWS:
            del self._rows[1::2], self._row_steps[1::2]
            self._stride *= 2

    def _load_history(self, resume_step: int) -> None:
        table = pq.read_table(self._history_path)
        table = table.filter(pc.less_equal(table["step"], resume_step))
        self._stride = int(table.schema.metadata[b"stride"])
        if not len(table):
            return
        matrix = table["matrix"].combine_chunks()
        names = matrix.dictionary.to_pylist()
        self._check_known(names, self._history_path)
        columns = np.array([self._column[name] for name in names])[matrix.indices.to_numpy()]
        steps, values = table["step"].to_numpy(), table["value"].to_numpy()
        self._last_step[columns] = steps  # rows are in the order of steps: the last assignment stays
        self._last_value[columns] = values
        # Steps that are in the file only as some frozen matrix's last reading belong to no row.
        frozen = np.array([name in self.events for name in self.matrices])
        extra = frozen[columns] & (self._last_step[columns] == steps)
        starts = np.flatnonzero(np.diff(steps, prepend=0))
        for start, end in zip(starts, [*starts[1:], len(steps)], strict=True):
            if not extra[start:end].all():
                row = np.full(len(self.matrices), np.nan, np.float32)
                row[columns[start:end]] = values[start:end]
                self._append_row(int(steps[start]), row)

    def _check_known(self, names: list[str], where: str | Path) -> None:
        unknown = [name for name in names if name not in self._column]
        if unknown:
            raise KeyError(
                f"{where} names {len(unknown)} matrices that are not tracked in this model, e.g. {unknown[0]!r}. "
                "Resume with the model and the adapter targets of the first run, or use another output directory."
            )


def _strict(value):
    """`value` with everything JSON cannot hold replaced: NaN and infinities by None, NumPy numbers by Python's."""
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


# ---------------------------------------------------------------------------------------------------------------------
# The picture. Sizes are in inches, so that cells stay legible from 2 layers to 100.

WIDTH, MARGIN, GAP = 12.0, 0.3, 0.45
CELL_HEIGHT, MAX_CELL_WIDTH = 0.29, 0.62
INK, GREY, LIGHT = "#1f2933", "#7b8794", "#e4e7eb"
TOWER_COLORS = {"language": "#2563eb", "vision": "#d97706", "audio": "#059669", "projector": "#9333ea"}


def _panels(timeline: Timeline) -> list[dict]:
    """One panel per tower, or more if it has several stacks of blocks; cells are (role, layer) -> matrix names."""
    panels: dict[tuple[str, str], dict] = {}
    for name, matrix in timeline.matrices.items():
        inside = matrix.layer >= 0
        stack = matrix.stack if inside else ""
        panel = panels.setdefault((matrix.tower, stack), {"tower": matrix.tower, "stack": stack, "cells": {}})
        panel["cells"].setdefault((matrix.role, matrix.layer), []).append(name)
    towers = [panel["tower"] for panel in panels.values()]
    for panel in panels.values():
        names = [name for cell in panel["cells"].values() for name in cell]
        frozen = sum(name in timeline.events for name in names)
        panel["title"] = panel["tower"].capitalize()
        if towers.count(panel["tower"]) > 1:
            panel["title"] += f" ({panel['stack'] or 'outside the blocks'})"
        panel["subtitle"] = f"{frozen:,} of {len(names):,} frozen"
        panel["roles"] = list(dict.fromkeys(role for role, _ in panel["cells"]))
        layers = [layer for _, layer in panel["cells"]]
        panel["layers"] = range(min(layers), max(layers) + 1)
    return list(panels.values())


def _draw(timeline: Timeline) -> Figure:
    panels = _panels(timeline)
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
        return figure.text(left / WIDTH, 1 - top / height, _plain(string), va="baseline", **style)

    steps = [event.step for event in timeline.events.values()]
    low, high = (min(steps), max(steps)) if steps else (0, timeline.total_steps)
    norm = Normalize(low, high if high > low else low + 1)
    text(MARGIN, 0.38, "When each matrix froze", fontsize=15, fontweight="bold", color=INK)
    text(MARGIN, 0.64, f"metric: {timeline.metric}", fontsize=9.5, color=GREY)
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
            _draw_panel(ax, panel, timeline.events, norm)
            beside = {"xycoords": title, "textcoords": "offset points", "annotation_clip": False}
            ax.annotate(panel["subtitle"], (1, 0), (8, 0.4), va="bottom", fontsize=9.5, color=GREY, **beside)
        top += row_height
    text(MARGIN, top + 0.2, "Frozen fraction", fontsize=11, fontweight="bold", color=INK)
    _draw_fraction(axes(MARGIN + 0.5, top + 0.4, WIDTH - 2 * MARGIN - 0.5, plot_height), timeline)
    return figure


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
    ax.set_yticks(range(len(roles)), [_plain(_short(role)) for role in roles])
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


def _draw_fraction(ax, timeline: Timeline) -> None:
    total, now = timeline.total_steps, timeline._step
    events = sorted(timeline.events.values(), key=lambda event: event.step)
    by_tower: dict[str, int] = {}
    for matrix in timeline.matrices.values():
        by_tower[matrix.tower] = by_tower.get(matrix.tower, 0) + 1

    def curve(chosen, weights, whole, **style):
        x = [0, *(event.step for event in chosen), now]
        y = np.concatenate([[0], np.cumsum(weights)]) / whole
        ax.plot(x, [*y, y[-1]], drawstyle="steps-post", solid_capstyle="butt", **style)

    if timeline.grace_steps > 0:
        ax.axvspan(0, timeline.grace_steps, color="#fde68a", alpha=0.5, linewidth=0, label="grace period")
    if len(by_tower) > 1:
        for tower, count in by_tower.items():
            chosen = [event for event in events if event.tower == tower]
            color = TOWER_COLORS.get(tower, GREY)
            curve(chosen, np.ones(len(chosen)), count, color=color, linewidth=1.3, label=tower)
    params = sum(matrix.params for matrix in timeline.matrices.values())
    curve(events, [e.params for e in events], params, color=INK, linewidth=1.2, linestyle=":", label="parameters")
    curve(events, np.ones(len(events)), len(timeline.matrices), color=INK, linewidth=2.2, label="matrices")
    if now < total:
        ax.axvspan(now, total, facecolor="none", edgecolor=LIGHT, hatch="////", linewidth=0, label="not run")
        ax.axvline(now, color=GREY, linewidth=0.8)
    ax.plot(now, len(events) / len(timeline.matrices), "o", color=INK, markersize=5, clip_on=False)
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
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
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


def _plain(string: str) -> str:
    """Keeps matplotlib from reading names as formulas."""
    return string.replace("$", r"\$")


def _thousands(tick: float, _position: int) -> str:
    return f"{int(tick):,}"


def _count(n: int) -> str:
    return f"{n}" if n < 10_000 else f"{n / 1000:.0f}k"


# ---------------------------------------------------------------------------------------------------------------------
# The page. Every string that is not written here goes through _e.

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
.picture { background: #fff; padding: 8px; }
.picture img { display: block; width: 100%; height: auto; }
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
KNOWN = {
    "model",
    "dataset",
    "metric",
    "tau",
    "alpha",
    "patience",
    "steps",
    "total_steps",
    "stop_reason",
    "matrices",
    "frozen",
    "params_tracked",
    "params_trained_untracked",
    "towers",
    "speedup",
    "overhead",
    "seconds",
    "peak_memory_mib",
    "device",
    "versions",
}


TOGETHER = {
    "against_same_length": "All together, against a plain run of the same length",
    "against_full_schedule": "All together, against a plain run of the full schedule",
}


def _e(value) -> str:
    return escape(_show(value), quote=True)


def _show(value) -> str:
    """A number, text or small dict as people read it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_show(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_show(item) for item in value)
    return str(value)


def _seconds(value) -> str:
    if not isinstance(value, int | float):
        return _show(value)
    if abs(value) < 120:
        return f"{value:.3g} s"
    minutes = round(value / 60)
    return f"{value / 60:.1f} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _times(ratio) -> str:
    return f"{ratio:.2f}x" if isinstance(ratio, int | float) else "not measured"


def _rows(pairs, header: tuple[str, ...] = (), numbers: int = 1) -> str:
    """A table; the last `numbers` columns are right-aligned. Cells are escaped here."""

    def cells(tag, row):
        first_number = len(row) - numbers
        return "".join(
            f"<{tag}{' class=n' if i >= first_number else ''}>{_e(cell)}</{tag}>" for i, cell in enumerate(row)
        )

    head = f"<thead><tr>{cells('th', header)}</tr></thead>" if header else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in pairs)
    return f"<table>{head}<tbody>{body}</tbody></table>"


def _page(timeline: Timeline, summary: dict, picture: bytes) -> str:
    model = _e(summary.get("model", "GradES run"))
    parts = [
        f"<h1>{model}</h1>",
        f"<div class=soft>{' · '.join(_facts(summary))}</div>",
        _lead(summary),
        f"<div class=cards>{''.join(_cards(summary))}</div>",
        _speedup(summary.get("speedup") or {}),
        '<section class=picture><img alt="Freeze step of every matrix, and the frozen fraction over the steps" '
        f'src="data:image/png;base64,{base64.b64encode(picture).decode()}"></section>',
        _curves(timeline),
        _details(summary),
        _events(timeline),
        _rest(timeline, summary),
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


def _facts(summary: dict) -> list[str]:
    facts = [_e(summary["dataset"])] if summary.get("dataset") else []
    facts += [f"{key} {_e(summary[key])}" for key in ("metric", "tau", "alpha", "patience") if key in summary]
    return facts + ([_e(summary["device"])] if summary.get("device") else [])


def _lead(summary: dict) -> str:
    if "steps" not in summary:
        return ""
    of = f" of {_e(summary['total_steps'])}" if "total_steps" in summary else ""
    reason = f": {_e(summary['stop_reason'])}" if summary.get("stop_reason") else ""
    return f"<p class=lead>Ran <b>{_e(summary['steps'])}{of}</b> optimizer steps{reason}.</p>"


def _cards(summary: dict) -> list[str]:
    cards = []
    if "frozen" in summary and "matrices" in summary:
        cards.append((f"{_show(summary['frozen'])} / {_show(summary['matrices'])}", "matrices frozen"))
    speedup, overhead = summary.get("speedup") or {}, summary.get("overhead") or {}
    for key, label in (
        ("against_same_length", "against a plain run of the same length"),
        ("against_full_schedule", "against a plain run of the full schedule"),
    ):
        if speedup.get(key) is not None:
            cards.append((_times(speedup[key]), label))
    if overhead.get("ms_per_step") is not None:
        fraction = overhead.get("fraction")
        share = f" ({fraction:.1%} of a step)" if fraction is not None else ""
        cards.append((f"{overhead['ms_per_step']:.3g} ms", f"overhead of GradES per step{share}"))
    if summary.get("peak_memory_mib") is not None:
        cards.append((f"{summary['peak_memory_mib']:,.0f} MiB", "peak memory"))
    return [f"<div class=card><b>{_e(value)}</b><span>{_e(label)}</span></div>" for value, label in cards]


def _speedup(speedup: dict) -> str:
    if not speedup:
        return ""
    rows = []
    for key, title in (
        ("cheaper_steps", "Cheaper steps"),
        ("steps_not_run", "Steps not run"),
        ("validation_not_run", "Validation not run"),
    ):
        part = speedup.get(key)
        if part is not None:
            rest = {name.replace("_", " "): v for name, v in part.items() if name not in ("ratio", "seconds_saved")}
            amount = ", ".join(f"{_show(v)} {name}" for name, v in rest.items())
            saved = part.get("seconds_saved")
            ratio = _times(part["ratio"]) if "ratio" in part else "-"
            rows.append((title, amount, ratio, "not measured" if saved is None else _seconds(saved)))
    for key, value in speedup.items():
        if key not in ("cheaper_steps", "steps_not_run", "validation_not_run"):
            title = TOGETHER.get(key, key.replace("_", " "))
            scalar = value is None or isinstance(value, int | float)
            rows.append((title, "", _times(value), "") if scalar else (title, _show(value), "", ""))
    table = _rows(rows, ("Part", "Amount", "Speed-up", "Time saved"), numbers=2)
    return f"<section><h2>What freezing saved</h2>{table}</section>"


def _details(summary: dict) -> str:
    sections = []
    towers = summary.get("towers")
    if towers:
        bars = []
        for tower, counts in towers.items():
            frozen, matrices = counts.get("frozen") or 0, counts.get("matrices") or 0
            share = frozen / matrices if matrices else 0
            bar = f'<div class=bar><i style="width:{100 * share:.1f}%"></i></div>'
            bars.append(f"<tr><td>{_e(tower)}</td><td>{bar}</td><td class=n>{_e(frozen)} / {_e(matrices)}</td></tr>")
        sections.append(f"<section><h2>Towers</h2><table><tbody>{''.join(bars)}</tbody></table></section>")
    seconds = summary.get("seconds")
    if seconds:
        rows = [(key, _seconds(value)) for key, value in seconds.items()]
        sections.append(f"<section><h2>Where the time went</h2>{_rows(rows)}</section>")
    facts = [
        ("parameters in tracked matrices", summary.get("params_tracked")),
        ("trained parameters outside them", summary.get("params_trained_untracked")),
        *(summary.get("versions") or {}).items(),
    ]
    facts = [(key, value) for key, value in facts if value is not None]
    if facts:
        sections.append(f"<section><h2>Model and versions</h2>{_rows(facts)}</section>")
    return f"<div class=columns>{''.join(sections)}</div>" if sections else ""


def _events(timeline: Timeline) -> str:
    events = sorted(timeline.events.values(), key=lambda event: event.step)
    if not events:
        return "<section><h2>Freeze events</h2><p class=soft>No matrix froze.</p></section>"
    rows = [
        (e.step, e.matrix, e.tower, e.layer, e.role, e.params, e.value, e.tau, e.frozen)
        for e in events[:MAX_EVENTS_ON_PAGE]
    ]
    header = ("Step", "Matrix", "Tower", "Layer", "Role", "Parameters", "Value", "Tau", "Frozen so far")
    cut = len(events) - len(rows)
    note = f"<p class=soft>The last {cut:,} of {len(events):,} are in events.jsonl only.</p>" if cut else ""
    table = _rows(rows, header, numbers=4)
    return f"<section><h2>Freeze events</h2>{note}<div class=scroll>{table}</div></section>"


def _rest(timeline: Timeline, summary: dict) -> str:
    blocks = []
    training = [row for row in timeline.table()[1] if row[5] is None]
    if training:
        shown = [(name, tower, layer, role, params, last) for name, tower, layer, role, params, _, last, _ in training]
        header = ("Matrix", "Tower", "Layer", "Role", "Parameters", "Last value")
        table = _rows(shown[:MAX_EVENTS_ON_PAGE], header, numbers=2)
        title = f"Still training at the end ({len(training):,})"
        blocks.append(f"<details><summary>{title}</summary><div class=scroll>{table}</div></details>")
    extra = {key: value for key, value in summary.items() if key not in KNOWN}
    if extra:
        text = escape(json.dumps(extra, indent=2, ensure_ascii=False))
        blocks.append(f"<details><summary>Also recorded</summary><pre>{text}</pre></details>")
    return f"<section>{''.join(blocks)}</section>" if blocks else ""


def _curves(timeline: Timeline) -> str:
    """Small multiples, one per tower and role: median and the middle 80 % of the matrices still training."""
    if not timeline._rows:
        return ""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, matrix in timeline.matrices.items():
        groups.setdefault((matrix.tower, matrix.role), []).append(name)
    every = -(-len(timeline._rows) // 250)
    steps = np.array(timeline._row_steps[::every])
    rows = timeline._rows[::every]
    charts = []
    for (tower, role), names in groups.items():
        columns = [timeline._column[name] for name in names]
        values = np.stack([row[columns] for row in rows]).astype(np.float64)
        seen = ~np.isnan(values).all(1)
        if seen.any():
            low, middle, high = np.nanquantile(values[seen], (0.1, 0.5, 0.9), axis=1)
            events = [timeline.events[name] for name in names if name in timeline.events]
            chart = _chart(steps[seen], low, middle, high, events, timeline)
            count = f"{len(names):,} {'matrix' if len(names) == 1 else 'matrices'}"
            charts.append(f"<div><h3>{_e(role)} <span>{_e(tower)}, {count}</span></h3>{chart}</div>")
    if not charts:
        return ""
    note = "Median and middle 80 % of the matrices that were read, by role. Ticks at the bottom are freezes"
    note += ", the shaded start is the grace period, the dashed line is tau where all frozen matrices share one."
    title = f"<h2>Metric by role: {_e(timeline.metric)}</h2>"
    return f"<section>{title}<p class=soft>{note}</p><div class=curves>{''.join(charts)}</div></section>"


def _chart(steps, low, middle, high, events: list[FreezeEvent], timeline: Timeline) -> str:
    width, height, left, bottom = 260, 130, 46, 16
    end = max(timeline.total_steps, timeline._step)
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

    floor, grace = height - bottom, x(min(timeline.grace_steps, end)) - left
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
