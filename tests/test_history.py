"""Freeze events and metric values on disk, as they happen, thinned and resumed."""

import json
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_runs import freeze, matrix, toy_matrices

from grades_trl.report import history as history_module
from grades_trl.report.history import RunHistory, restore_record


def make(tmp_path, matrices, **kwargs):
    return RunHistory(tmp_path, matrices, total_steps=100, metric="grad_change", grace_steps=10, **kwargs)


def recorded(tmp_path):
    """Every recorded point, as {(step, matrix): value}; fails on duplicates."""
    table = pq.read_table(tmp_path / "history.parquet")
    points = list(zip(table["step"].to_pylist(), table["matrix"].to_pylist(), table["value"].to_pylist(), strict=True))
    found = {(step, name): value for step, name, value in points}
    assert len(found) == len(points)
    return found


def events_on_disk(tmp_path):
    return [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]


def test_events_are_on_disk_as_they_happen(tmp_path):
    matrices = toy_matrices()
    history = make(tmp_path, matrices)
    assert (tmp_path / "events.jsonl").read_text() == ""
    first, second = freeze(matrices, "layers.0.q_proj", 11), freeze(matrices, "layers.1.down_proj", 12, frozen=2)
    history.record(11, [first], {})
    assert events_on_disk(tmp_path) == [asdict(first)]
    history.record(12, [second], {})
    assert (tmp_path / "events.jsonl").read_text() == (
        '{"step": 11, "matrix": "layers.0.q_proj", "layer": 0, "role": "q_proj", "tower": "language", '
        '"value": 0.01, "tau": 0.02, "params": 32, "frozen": 1, "total": 6, "reason": "grad_change below tau", '
        '"unfrozen": false}\n'
        '{"step": 12, "matrix": "layers.1.down_proj", "layer": 1, "role": "down_proj", "tower": "language", '
        '"value": 0.01, "tau": 0.02, "params": 32, "frozen": 2, "total": 6, "reason": "grad_change below tau", '
        '"unfrozen": false}\n'
    )


def test_historyis_what_was_recorded(tmp_path):
    matrices = toy_matrices()
    history = make(tmp_path, matrices)
    rng = np.random.default_rng(0)
    expected = {}
    for step in range(1, 51):
        observed = [name for name in matrices if rng.random() < 0.7]
        values = {name: rng.normal() for name in observed}
        expected |= {(step, name): np.float32(value) for name, value in values.items()}
        history.record(step, [], values | {"layers.2.q_proj": float("nan")})
        expected.pop((step, "layers.2.q_proj"), None)
    history.flush()
    assert recorded(tmp_path) == expected
    schema = pq.read_table(tmp_path / "history.parquet").schema
    assert schema.names == ["step", "matrix", "value"]
    assert schema.field("step").type == pa.int32() and schema.field("value").type == pa.float32()
    assert (
        pa.types.is_dictionary(schema.field("matrix").type) and schema.field("matrix").type.value_type == pa.string()
    )


def test_long_runs_are_thinned_but_the_last_values_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(history_module, "MAX_ROWS", 32)
    matrices = toy_matrices()
    history = make(tmp_path, matrices)
    frozen_at = {"layers.0.q_proj": 107, "layers.0.down_proj": 331, "layers.1.q_proj": 640}
    frozen = set()
    for step in range(1, 1000):
        values = {name: step + i / 10 for i, name in enumerate(matrices) if name not in frozen}
        events = [freeze(matrices, name, step) for name, at in frozen_at.items() if at == step]
        frozen |= {event.matrix for event in events}
        history.record(step, events, values)
    history.flush()
    found = recorded(tmp_path)
    for i, name in enumerate(matrices):
        steps = sorted(step for step, other in found if other == name)
        assert max(steps) == frozen_at.get(name, 999)
        assert all(found[step, name] == np.float32(step + i / 10) for step in steps)
        regular = steps[:-1]
        assert set(np.diff(regular)) == {64}  # 999 values in fewer than 32 rows: 999 / 64 = 15.6, 999 / 32 = 31.2
        assert len(steps) <= 33


def test_thinning_counts_measurements_not_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(history_module, "MAX_ROWS", 8)
    matrices = toy_matrices()
    history = make(tmp_path, matrices)
    for step in range(1, 200):
        history.record(step, [], {"layers.0.q_proj": 1.0} if step % 10 == 1 else {})
    history.flush()
    # Measured at 1, 11, ..., 191: 20 times; every 4th is kept, and the last.
    assert sorted(step for step, _ in recorded(tmp_path)) == [1, 41, 81, 121, 161, 191]


def run_steps(history, matrices, steps, events):
    for step in steps:
        frozen = {event.matrix for event in events if event.step < step}
        values = {name: step + i / 10 for i, name in enumerate(matrices) if name not in frozen}
        history.record(step, [event for event in events if event.step == step], values)
    history.flush()


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    matrices = toy_matrices()
    names = list(matrices)
    events = [freeze(matrices, names[i], step, frozen=i + 1) for i, step in enumerate((15, 20, 21, 28))]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_steps(make(whole, matrices), matrices, range(1, 41), events)
    # The first run goes on to 30, past its checkpoint at 20; there another matrix froze.
    wrong = replace(events[2], step=25)
    run_steps(make(resumed, matrices), matrices, range(1, 31), [*events[:2], wrong])
    assert [event["step"] for event in events_on_disk(resumed)] == [15, 20, 25]
    with (resumed / "events.jsonl").open("a") as file:
        file.write('{"step": 31, "mat')  # cut off by a crash
    history = make(resumed, matrices, resume_step=20)
    assert events_on_disk(resumed) == [asdict(event) for event in events[:2]]
    assert [row[5] for row in history.table()[1]] == [15, 20, None, None, None, None]
    assert [row[6] for row in history.table()[1]] == pytest.approx([15, 20.1, 20.2, 20.3, 20.4, 20.5])
    run_steps(history, matrices, range(21, 41), events)
    assert events_on_disk(resumed) == events_on_disk(whole) == [asdict(event) for event in events]
    assert recorded(resumed) == recorded(whole)


def test_the_record_is_that_of_the_checkpoint_whatever_the_folder_holds(tmp_path):
    """Torn files, later lines, and those of another run."""
    matrices = toy_matrices()
    first = make(tmp_path / "run", matrices)
    run_steps(first, matrices, range(1, 21), [freeze(matrices, "layers.0.q_proj", 15)])
    first.flush()
    first.save(tmp_path / "checkpoint" / "grades")
    (tmp_path / "run" / "history.parquet").write_bytes(b"PAR1")
    (tmp_path / "run" / "events.jsonl").write_text('{"step": 1, "matrix": "of another run"}\n{"st')
    (tmp_path / "run" / "heldout.jsonl").write_text("of another run")
    restore_record(tmp_path / "checkpoint" / "grades", tmp_path / "run")
    resumed = make(tmp_path / "run", matrices, resume_step=20)
    assert resumed.all_events == first.all_events and resumed.heldout == []
    assert recorded(tmp_path / "run") == recorded(tmp_path / "checkpoint" / "grades") != {}


def test_resume_keeps_last_values_of_a_thinned_history(tmp_path, monkeypatch):
    monkeypatch.setattr(history_module, "MAX_ROWS", 16)
    matrices = toy_matrices()
    events = [freeze(matrices, "layers.0.q_proj", 77)]
    run_steps(make(tmp_path, matrices), matrices, range(1, 201), events)
    before = recorded(tmp_path)
    assert (77, "layers.0.q_proj") in before and (77, "layers.1.q_proj") not in before
    history = make(tmp_path, matrices, resume_step=200)
    history.flush()
    assert recorded(tmp_path) == before
    run_steps(history, matrices, range(201, 401), events)
    after = recorded(tmp_path)
    assert after[77, "layers.0.q_proj"] == 77
    per_matrix = [sum(name == other for _, other in after) for name in matrices]
    assert max(per_matrix) <= 17 and max(step for step, _ in after) == 400


def test_resume_without_files_and_fresh_start(tmp_path):
    matrices = toy_matrices()
    make(tmp_path, matrices, resume_step=5)
    run_steps(make(tmp_path, matrices), matrices, range(1, 20), [freeze(matrices, "layers.0.q_proj", 15)])
    make(tmp_path, matrices)
    assert events_on_disk(tmp_path) == []
    assert not (tmp_path / "history.parquet").exists()


def test_resume_before_the_first_measurement(tmp_path):
    matrices = toy_matrices()
    run_steps(make(tmp_path, matrices), matrices, range(10, 20), [])
    history = make(tmp_path, matrices, resume_step=5)
    history.flush()
    assert recorded(tmp_path) == {}


def test_gains_are_on_disk_and_come_back_up_to_the_checkpoint(tmp_path):
    matrices, layer = toy_matrices(), "language/layers/{}".format
    history = make(tmp_path, matrices)
    gains = {step: {layer(i): 0.1 * step + i for i in range(3) if i or step < 5} for step in range(2, 9)}
    for step in range(1, 9):
        history.record(step, [], {}, gains.get(step))
    history.flush()
    table = pq.read_table(tmp_path / "gain.parquet")
    assert [(name, str(type_)) for name, type_ in zip(table.schema.names, table.schema.types, strict=True)] == [
        ("step", "int32"),
        ("layer", "dictionary<values=string, indices=int32, ordered=0>"),
        ("gain", "double"),
    ]
    assert table.num_rows == 3 * 3 + 4 * 2
    assert make(tmp_path, matrices, resume_step=8).gains == gains
    assert make(tmp_path, matrices, resume_step=6).gains == {s: g for s, g in gains.items() if s <= 6}
    assert make(tmp_path, matrices).gains == {}
    assert not (tmp_path / "gain.parquet").exists()


def test_unknown_matrices_are_errors(tmp_path):
    matrices = toy_matrices()
    history = make(tmp_path, matrices)
    with pytest.raises(KeyError, match="other"):
        history.record(1, [], {"other": 1.0})
    run_steps(history, matrices, range(1, 20), [freeze(matrices, "layers.2.q_proj", 15)])
    with pytest.raises(KeyError, match=r"layers\.2\.q_proj.*not tracked|not tracked.*layers\.2\.q_proj"):
        make(tmp_path, toy_matrices(layers=2), resume_step=19)


def test_table(tmp_path):
    matrices = toy_matrices(layers=1)
    history = make(tmp_path, matrices)
    history.record(11, [], {"layers.0.q_proj": 0.5})
    history.record(12, [freeze(matrices, "layers.0.q_proj", 12, value=0.1)], {"layers.0.q_proj": 0.1})
    columns, rows = history.table()
    assert columns == ["matrix", "tower", "layer", "role", "params", "frozen at step", "last value", "tau", "reason"]
    assert rows == [
        ["layers.0.q_proj", "language", 0, "q_proj", 32, 12, 0.1, 0.02, "grad_change below tau"],
        ["layers.0.down_proj", "language", 0, "down_proj", 32, None, None, None, None],
    ]


def test_events_that_json_cannot_hold_are_null(tmp_path):
    matrices = toy_matrices()
    history = make(tmp_path, matrices)
    events = [
        freeze(matrices, "layers.0.q_proj", 11, value=float("inf"), tau=float("nan")),
        replace(freeze(matrices, "layers.1.q_proj", 11, value=None, tau=None), reason="schedule"),
    ]
    history.record(11, events, {})
    found = events_on_disk(tmp_path)
    assert [(event["value"], event["tau"]) for event in found] == [(None, None), (None, None)]
    assert list(make(tmp_path, matrices, resume_step=11).events) == ["layers.0.q_proj", "layers.1.q_proj"]


def test_a_resumed_history_is_thinned_in_the_same_rhythm(tmp_path, monkeypatch):
    monkeypatch.setattr(history_module, "MAX_ROWS", 16)
    matrices = toy_matrices()
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run_steps(make(straight, matrices), matrices, range(1, 121), [])
    first = make(resumed, matrices)
    run_steps(first, matrices, range(1, 83), [])
    second = make(resumed, matrices, resume_step=82)
    second.measurements = first.measurements
    run_steps(second, matrices, range(83, 121), [])
    assert recorded(resumed) == recorded(straight)


def test_files_are_utf_8_whatever_the_terminal_speaks(tmp_path, monkeypatch):
    """Issue 12, 19: seen with a cp1252 terminal and Japanese rows."""
    monkeypatch.setattr("io.text_encoding", lambda encoding, stacklevel=2: encoding or "ascii")
    matrices = {"層.0": matrix("層.0", role="層")}
    history = make(tmp_path, matrices)
    history.record(20, [freeze(matrices, "層.0", 20)], {"層.0": 1.0})
    history.flush()
    resumed = make(tmp_path, matrices, resume_step=20)
    assert list(resumed.events) == ["層.0"] and recorded(tmp_path) == {(20, "層.0"): 1.0}


def test_measurements_and_logged_metrics_come_back_up_to_the_checkpoint(tmp_path):
    """They are on disk as they happen, whatever the run reports to."""
    matrices = toy_matrices()
    history = make(tmp_path, matrices)
    for step in (10, 20, 30):
        history.record(step, [], {})
        history.record_heldout("loss", 100.0 / step)
        history.record_metrics(step, {"loss": float("nan"), "grades/step_time": step / 10})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1]) == {"step": 30, "loss": None, "grades/step_time": 3.0}
    resumed = make(tmp_path, matrices, resume_step=20)
    assert [(point.step, point.metric, point.score) for point in resumed.heldout] == [
        (10, "loss", 10.0),
        (20, "loss", 5.0),
    ]
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines[:2]
    assert make(tmp_path, matrices).heldout == []
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_events_are_told_in_groups(tmp_path):
    """One for each step and reason; what trains again is not frozen any more."""
    matrices = toy_matrices()
    history = make(tmp_path, matrices)
    history.record(5, [freeze(matrices, f"layers.0.{role}", 5) for role in ("q_proj", "down_proj")], {})
    history.record(7, [replace(freeze(matrices, "layers.1.q_proj", 7), reason="schedule")], {})
    history.record(9, [replace(freeze(matrices, "layers.0.q_proj", 9), unfrozen=True, reason="it gains again")], {})
    columns, rows = history.event_table()
    assert columns == ["step", "event", "what", "reason", "matrices", "frozen in all"]
    assert rows == [
        [5, "frozen", "language layer 0", "grad_change below tau", 2, 2],
        [7, "frozen", "language 1 q_proj", "schedule", 1, 3],
        [9, "trains again", "language 0 q_proj", "it gains again", 1, 2],
    ]
