"""The record of a run on disk: every freeze, and the metric of every matrix over the steps."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from grades_trl.events import FreezeEvent
from grades_trl.model.matrices import WeightMatrix
from grades_trl.report.disk import Lines, tolerated

MAX_ROWS = 2000  # steps of history kept per matrix; when full, every other one goes and the stride doubles
# The files of a run. A checkpoint has a copy of them: those of the run may be torn, or of another run.
RECORD = ("events.jsonl", "heldout.jsonl", "metrics.jsonl", "history.parquet", "gain.parquet")
COLUMNS = ["matrix", "tower", "layer", "role", "params", "frozen at step", "last value", "tau", "reason"]


@dataclass(frozen=True)
class HeldoutPoint:
    """One held-out measurement: after which optimizer step, of what (`"loss"`, ...), and the score."""

    step: int
    metric: str
    score: float


@dataclass(frozen=True)
class EventGroup:
    """
    What froze, or trains again, in one step and for one reason.

    Attributes:
        step (`int`): optimizer step, counted from 1.
        unfrozen (`bool`): it trains again.
        what (`str`): in words, such as `"the vision tower"`.
        reason (`str`): as in the events.
        matrices (`int`): how many of them.
        frozen (`int`): how many are frozen after it.
    """

    step: int
    unfrozen: bool
    what: str
    reason: str
    matrices: int
    frozen: int


class RunHistory:
    """
    Keeps the freeze events of a run and the metric values of its matrices, and writes them to one directory.

    Files: `events.jsonl` (one line per freeze, as it happens), `heldout.jsonl` (one per held-out measurement),
    `metrics.jsonl` (one per call of `trainer.log`), `history.parquet` (columns `step` int32, `matrix` dictionary of
    strings, `value` float32) and `gain.parquet` (`step` int32, `layer` dictionary of strings, `gain` float64).

    Args:
        directory (`str`, `Path` or `None`): where the files go; made if missing. `None` in a process that writes none.
        matrices (`dict[str, WeightMatrix]`): the tracked matrices by name, as in `GradES.matrices`.
        total_steps (`int`): optimizer steps in the full schedule.
        metric (`str`): name of the metric, for titles.
        grace_steps (`int`): optimizer steps during which nothing may freeze.
        resume_step (`int`, *optional*, defaults to `0`): the optimizer step that a checkpoint resumes after. Events
            and values up to and including it are kept if their files are there, see `restore_record`; later ones are
            dropped. 0 starts fresh.

    Attributes:
        events (`dict[str, FreezeEvent]`): the freeze of every matrix that is frozen now, by name, in order.
        all_events (`list[FreezeEvent]`): these, and those of matrices that train again.
        gains (`dict[int, dict[str, float]]`): optimizer step -> layer -> gain, see `GainMeter`.
        heldout (`list[HeldoutPoint]`): the held-out measurements, in order.
        step (`int`): the last optimizer step that was recorded.
        measurements (`int`): steps with values so far. A resumed run must set it for its history to go on in the same
            rhythm.

    Raises:
        `KeyError`: on resuming, if a kept event or value names a matrix that the model does not have.
    """

    def __init__(
        self,
        directory: str | Path | None,
        matrices: dict[str, WeightMatrix],
        total_steps: int,
        metric: str,
        grace_steps: int,
        resume_step: int = 0,
    ):
        self.directory = None if directory is None else Path(directory)
        self.matrices = matrices
        self.total_steps = total_steps
        self.metric = metric
        self.grace_steps = grace_steps
        self.events: dict[str, FreezeEvent] = {}
        self.all_events: list[FreezeEvent] = []
        self.gains: dict[int, dict[str, float]] = {}
        self.step = resume_step
        self._column = {name: i for i, name in enumerate(matrices)}
        # History: one float32 row per kept step, NaN where a matrix was not measured; and each matrix's last value,
        # which thinning must not lose.
        self._rows: list[np.ndarray] = []
        self._row_steps: list[int] = []
        self._stride = 1
        self.measurements = 0
        self._last_step = np.zeros(len(matrices), np.int32)
        self._last_value = np.full(len(matrices), np.nan)

        self.heldout: list[HeldoutPoint] = []
        folder = self.directory or Path()
        self._events_path = folder / "events.jsonl"
        self._history_path = folder / "history.parquet"
        self._gain_path = folder / "gain.parquet"
        self._heldout_path = folder / "heldout.jsonl"
        self._metrics_path = folder / "metrics.jsonl"
        self.said: set[Path] = set()  # files that could not be written
        self._events, self._heldout, self._metrics = (
            Lines(path, self.said) for path in (self._events_path, self._heldout_path, self._metrics_path)
        )
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._read(resume_step)

    def _read(self, resume_step: int) -> None:
        """Takes in what an earlier process has written up to a step, and takes all else out of the files."""
        for row in _kept_lines(self._events_path, resume_step):
            event = FreezeEvent(**row)
            self._check_known([event.matrix], self._events_path)
            self._note(event)
        self.heldout = [HeldoutPoint(**row) for row in _kept_lines(self._heldout_path, resume_step)]
        _kept_lines(self._metrics_path, resume_step)
        if resume_step > 0 and self._history_path.exists():
            self._load_history(resume_step)
        else:
            self._history_path.unlink(missing_ok=True)
        if resume_step > 0 and self._gain_path.exists():
            for row in pq.read_table(self._gain_path, filters=[("step", "<=", resume_step)]).to_pylist():
                self.gains.setdefault(row["step"], {})[row["layer"]] = row["gain"]
        else:
            self._gain_path.unlink(missing_ok=True)

    def _note(self, event: FreezeEvent) -> None:
        self.all_events.append(event)
        if event.unfrozen:
            del self.events[event.matrix]
        else:
            self.events[event.matrix] = event

    def record(
        self,
        step: int,
        events: list[FreezeEvent],
        values: dict[str, float],
        gains: dict[str, float] | None = None,
    ) -> None:
        """Takes in one optimizer step. Events are on disk when it returns; values wait for `flush`.

        Args:
            step (`int`): optimizer step, counted from 1.
            events (`list[FreezeEvent]`): what froze at this step.
            values (`dict[str, float]`): the metric of each matrix that was measured at this step, in the metric's
                unit. Empty if nothing was measured. Non-finite values are no measurements and are left out.
            gains (`dict[str, float]`, *optional*): the gain of each layer, if it was measured at this step.

        Raises:
            `KeyError`: if a value or an event names an unknown matrix.
        """
        self.step = step
        if gains:
            self.gains[step] = gains
        if values:
            columns = np.fromiter((self._column[name] for name in values), np.int64, len(values))
            numbers = np.fromiter(values.values(), np.float64, len(values))
            finite = np.isfinite(numbers)
            columns, numbers = columns[finite], numbers[finite]
            self._last_step[columns] = step
            self._last_value[columns] = numbers
            if self.measurements % self._stride == 0:
                row = np.full(len(self.matrices), np.nan, np.float32)
                row[columns] = numbers
                self._append_row(step, row)
            self.measurements += 1
        if events:
            self._check_known([event.matrix for event in events], "record()")
            for event in events:
                self._note(event)
            self._append(self._events, [asdict(event) for event in events])

    def record_heldout(self, metric: str, score: float) -> None:
        """Takes in a held-out measurement of the last recorded step; it is on disk when this returns.

        Args:
            metric (`str`): what the score is, e.g. `"loss"`.
            score (`float`): of the held-out rows.
        """
        self.heldout.append(HeldoutPoint(self.step, metric, score))
        self._append(self._heldout, [asdict(self.heldout[-1])])

    def record_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        """Appends what a trainer logs to `metrics.jsonl`, so that a run that reports to no logger keeps it.

        Args:
            step (`int`): optimizer step.
            metrics (`dict[str, Any]`): by their keys, as `trainer.log` has them.
        """
        self._append(self._metrics, [{"step": step, **metrics}])

    def event_groups(self) -> list[EventGroup]:
        """The freezes of a run as people tell them: one entry per step, kind of event and reason, in order."""
        groups: dict[tuple[int, bool, str], list[FreezeEvent]] = {}
        for event in self.all_events:
            groups.setdefault((event.step, event.unfrozen, event.reason), []).append(event)
        frozen, told = 0, []
        for (step, unfrozen, reason), events in groups.items():
            frozen += -len(events) if unfrozen else len(events)
            told.append(EventGroup(step, unfrozen, self.in_words(events), reason, len(events), frozen))
        return told

    def event_table(self) -> tuple[list[str], list[list]]:
        """The entries of `event_groups`, for a table: the names of the columns, and the rows."""
        columns = ["step", "event", "what", "reason", "matrices", "frozen in all"]
        rows: list[list] = [
            [g.step, "trains again" if g.unfrozen else "frozen", g.what, g.reason, g.matrices, g.frozen]
            for g in self.event_groups()
        ]
        return columns, rows

    def in_words(self, events: list[FreezeEvent]) -> str:
        """Whole towers and layers by their names, other matrices each by its own, three of them at most."""
        names = {event.matrix for event in events}
        words, counted = [], set[str]()
        for tower in dict.fromkeys(event.tower for event in events):
            of_tower = [m for m in self.matrices.values() if m.tower == tower]
            if names >= {m.name for m in of_tower}:
                words.append(f"the {tower}{'' if tower == 'projector' else ' tower'}")
                counted |= {m.name for m in of_tower}
                continue
            whole = [
                layer
                for layer in dict.fromkeys(event.layer for event in events if event.tower == tower)
                if names >= {m.name for m in of_tower if m.layer == layer}
            ]
            if whole:
                first, last = min(whole), max(whole)
                in_a_row = len(whole) == last - first + 1
                shown = f"{first} to {last}" if in_a_row and first != last else ", ".join(map(str, sorted(whole)))
                words.append(f"{tower} layer{'s' if len(whole) > 1 else ''} {shown}")
                counted |= {m.name for m in of_tower if m.layer in whole}
        single = [f"{e.tower} {e.layer} {e.role}" for e in events if e.matrix not in counted]
        words += single[:3] + ([f"{len(single) - 3} more"] if len(single) > 3 else [])
        return ", ".join(words)

    def flush(self) -> None:
        """Writes `history.parquet`, at most about 2,000 steps per matrix, and every matrix's last value; and
        `gain.parquet`, if the gain was measured."""
        if self.directory is None:
            return
        for lines in (self._events, self._heldout, self._metrics):
            lines.append([])  # there may be room again
        row_steps, table_of_values = self.sampled()
        rows, columns = np.nonzero(~np.isnan(table_of_values))
        values, steps, columns = table_of_values[rows, columns], row_steps[rows], columns.astype(np.int32)

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
                "step": pa.array(steps.astype(np.int32), pa.int32()),
                "matrix": pa.DictionaryArray.from_arrays(pa.array(columns), names),
                "value": pa.array(values, pa.float32()),
            }
        )
        # Which steps are whole rows: the last value of a matrix stands beside them.
        metadata = {"stride": str(self._stride), "rows": json.dumps(self._row_steps)}
        with tolerated(self._history_path, self.said):
            _write(table.replace_schema_metadata(metadata), self._history_path)
        if self.gains:
            self._write_gains()

    def save(self, folder: Path) -> None:
        """Copies the files as they are on disk to another folder. For the process that writes them."""
        assert self.directory is not None
        folder.mkdir(parents=True, exist_ok=True)
        for name in RECORD:
            if (self.directory / name).exists():
                shutil.copyfile(self.directory / name, folder / name)

    def _write_gains(self) -> None:
        gains = [(step, layer, gain) for step, of_step in self.gains.items() for layer, gain in of_step.items()]
        table = pa.table(
            {
                "step": pa.array([step for step, _, _ in gains], pa.int32()),
                "layer": pa.array([layer for _, layer, _ in gains], pa.string()).dictionary_encode(),
                "gain": pa.array([gain for _, _, gain in gains], pa.float64()),
            }
        )
        with tolerated(self._gain_path, self.said):
            _write(table, self._gain_path)

    def table(self) -> tuple[list[str], list[list]]:
        """One row per matrix, for a W&B Table or a printout.

        Returns:
            `tuple[list[str], list[list]]`: the names of the columns, and the rows in the order of `matrices`.
            `frozen at step`, `tau` and `reason` are `None` while a matrix still trains, `last value` if it was never
            measured.
        """
        rows = []
        for (name, matrix), last in zip(self.matrices.items(), self._last_value.tolist(), strict=True):
            event = self.events.get(name)
            frozen_at, tau, reason = (event.step, event.tau, event.reason) if event else (None, None, None)
            value = None if math.isnan(last) else last
            of_matrix = [name, matrix.tower, matrix.layer, matrix.role, matrix.params]
            rows.append([*of_matrix, frozen_at, value, tau, reason])
        return COLUMNS, rows

    def sampled(self) -> tuple[np.ndarray, np.ndarray]:
        """The history as it is kept in memory: optimizer steps of shape (n,), and values of shape (n, matrices), NaN
        where a matrix was not measured."""
        values = np.stack(self._rows) if self._rows else np.zeros((0, len(self.matrices)), np.float32)
        return np.array(self._row_steps, np.int64), values

    def _append(self, lines: Lines, rows: list[dict[str, Any]]) -> None:
        if self.directory is not None:
            lines.append(rows)

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
        for step in json.loads(table.schema.metadata[b"rows"]):
            if step <= resume_step:
                row = np.full(len(self.matrices), np.nan, np.float32)
                own = slice(*np.searchsorted(steps, [step, step + 1]))
                row[columns[own]] = values[own]
                self._append_row(step, row)

    def _check_known(self, names: list[str], where: str | Path) -> None:
        unknown = [name for name in names if name not in self._column]
        if unknown:
            raise KeyError(
                f"{where} names {len(unknown)} matrices that are not tracked in this model, e.g. {unknown[0]!r}. "
                "Resume with the model and the adapter targets of the first run, or use another output directory."
            )


def restore_record(saved: Path, directory: Path) -> None:
    """Puts the files of a run back as they were when a checkpoint was written.

    Args:
        saved (`Path`): what `RunHistory.save` has written.
        directory (`Path`): where the run goes on. What another run, or the same one after that checkpoint, has left
            there is deleted.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name in RECORD:
        (directory / name).unlink(missing_ok=True)
        if (saved / name).exists():
            shutil.copyfile(saved / name, directory / name)


def _write(table: pa.Table, path: Path) -> None:
    """Replaces the file as a whole: a crash while writing must not cost the history so far."""
    partial = path.with_suffix(".partial")
    try:
        pq.write_table(table, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _kept_lines(path: Path, resume_step: int) -> list[dict[str, Any]]:
    """The rows of a file up to a step; all others are taken out of it. Step 0 starts an empty file."""
    lines = []
    if resume_step > 0 and path.exists():
        # A line without its end was cut off by a crash, so it is later than any checkpoint.
        lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    kept = [(line, row) for line in lines if (row := json.loads(line))["step"] <= resume_step]
    path.write_text("".join(line for line, _ in kept), encoding="utf-8")
    return [row for _, row in kept]
