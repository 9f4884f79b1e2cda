import base64
import json
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from matplotlib.image import imread
from torch import nn

from grades_trl.events import FreezeEvent
from grades_trl.model.matrices import WeightMatrix
from grades_trl.report import history as module
from grades_trl.report.history import Timeline

SUMMARY = {
    "model": "toy",
    "metric": "agreement",
    "steps": 30,
    "total_steps": 100,
    "stop_reason": "all matrices frozen",
    "matrices": 6,
    "frozen": 6,
    "towers": {"language": {"matrices": 6, "frozen": 3}},
    "speedup": {
        "cheaper_steps": {"ratio": 1.03, "seconds_saved": None},
        "steps_not_run": {"ratio": 2.4, "steps": 588, "seconds_saved": 31.0},
        "validation_not_run": {"evaluations": 5, "seconds_saved": 4.0},
        "against_same_length": None,
        "against_full_schedule": 2.5,
    },
    "overhead": {"ms_per_step": 0.4, "fraction": 0.01},
    "seconds": {"training": 50.1},
    "peak_memory_mib": 812.0,
    "device": "cpu",
    "versions": {"torch": "2.13"},
}


def matrix(name, layer=0, role="q_proj", tower="language", stack="layers", expert=None):
    shape = (4, 8)
    weight = nn.Parameter(torch.empty(shape if expert is None else (4, *shape), device="meta"))
    return WeightMatrix(name, layer, role, tower, stack, shape, (weight,), expert)


def toy_matrices(layers=3, roles=("q_proj", "down_proj")):
    found = [matrix(f"layers.{layer}.{role}", layer, role) for layer in range(layers) for role in roles]
    return {m.name: m for m in found}


def freeze(matrices, name, step, value=0.01, tau=0.02, frozen=1):
    m = matrices[name]
    of = (frozen, len(matrices))
    return FreezeEvent(step, name, m.layer, m.role, m.tower, value, tau, m.params, *of, "agreement below tau")


def make(tmp_path, matrices, **kwargs):
    return Timeline(tmp_path, matrices, total_steps=100, metric="agreement", grace_steps=10, **kwargs)


def history(tmp_path):
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
    timeline = make(tmp_path, matrices)
    assert (tmp_path / "events.jsonl").read_text() == ""
    first, second = freeze(matrices, "layers.0.q_proj", 11), freeze(matrices, "layers.1.down_proj", 12, frozen=2)
    timeline.record(11, [first], {})
    assert events_on_disk(tmp_path) == [asdict(first)]
    timeline.record(12, [second], {})
    assert (tmp_path / "events.jsonl").read_text() == (
        '{"step": 11, "matrix": "layers.0.q_proj", "layer": 0, "role": "q_proj", "tower": "language", '
        '"value": 0.01, "tau": 0.02, "params": 32, "frozen": 1, "total": 6, "reason": "agreement below tau"}\n'
        '{"step": 12, "matrix": "layers.1.down_proj", "layer": 1, "role": "down_proj", "tower": "language", '
        '"value": 0.01, "tau": 0.02, "params": 32, "frozen": 2, "total": 6, "reason": "agreement below tau"}\n'
    )


def test_history_is_what_was_recorded(tmp_path):
    matrices = toy_matrices()
    timeline = make(tmp_path, matrices)
    rng = np.random.default_rng(0)
    expected = {}
    for step in range(1, 51):
        observed = [name for name in matrices if rng.random() < 0.7]
        readings = {name: rng.normal() for name in observed}
        expected |= {(step, name): np.float32(value) for name, value in readings.items()}
        timeline.record(step, [], readings | {"layers.2.q_proj": float("nan")})
        expected.pop((step, "layers.2.q_proj"), None)
    timeline.flush()
    assert history(tmp_path) == expected
    schema = pq.read_table(tmp_path / "history.parquet").schema
    assert schema.names == ["step", "matrix", "value"]
    assert schema.field("step").type == pa.int32() and schema.field("value").type == pa.float32()
    assert (
        pa.types.is_dictionary(schema.field("matrix").type) and schema.field("matrix").type.value_type == pa.string()
    )


def test_long_runs_are_thinned_but_the_last_readings_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_ROWS", 32)
    matrices = toy_matrices()
    timeline = make(tmp_path, matrices)
    frozen_at = {"layers.0.q_proj": 107, "layers.0.down_proj": 331, "layers.1.q_proj": 640}
    frozen = set()
    for step in range(1, 1000):
        readings = {name: step + i / 10 for i, name in enumerate(matrices) if name not in frozen}
        events = [freeze(matrices, name, step) for name, at in frozen_at.items() if at == step]
        frozen |= {event.matrix for event in events}
        timeline.record(step, events, readings)
    timeline.flush()
    found = history(tmp_path)
    for i, name in enumerate(matrices):
        steps = sorted(step for step, other in found if other == name)
        assert max(steps) == frozen_at.get(name, 999)
        assert all(found[step, name] == np.float32(step + i / 10) for step in steps)
        regular = steps[:-1]
        assert set(np.diff(regular)) == {64}  # 999 readings in fewer than 32 rows: 999 / 64 = 15.6, 999 / 32 = 31.2
        assert len(steps) <= 33


def test_thinning_counts_readings_not_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_ROWS", 8)
    matrices = toy_matrices()
    timeline = make(tmp_path, matrices)
    for step in range(1, 200):
        timeline.record(step, [], {"layers.0.q_proj": 1.0} if step % 10 == 1 else {})
    timeline.flush()
    # Read at 1, 11, ..., 191: 20 readings; every 4th is kept, and the last.
    assert sorted(step for step, _ in history(tmp_path)) == [1, 41, 81, 121, 161, 191]


def run_steps(timeline, matrices, steps, events):
    for step in steps:
        frozen = {event.matrix for event in events if event.step < step}
        readings = {name: step + i / 10 for i, name in enumerate(matrices) if name not in frozen}
        timeline.record(step, [event for event in events if event.step == step], readings)
    timeline.flush()


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
    timeline = make(resumed, matrices, resume_step=20)
    assert events_on_disk(resumed) == [asdict(event) for event in events[:2]]
    assert [row[5] for row in timeline.table()[1]] == [15, 20, None, None, None, None]
    assert [row[6] for row in timeline.table()[1]] == pytest.approx([15, 20.1, 20.2, 20.3, 20.4, 20.5])
    run_steps(timeline, matrices, range(21, 41), events)
    assert events_on_disk(resumed) == events_on_disk(whole) == [asdict(event) for event in events]
    assert history(resumed) == history(whole)


def test_resume_keeps_last_readings_of_a_thinned_history(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_ROWS", 16)
    matrices = toy_matrices()
    events = [freeze(matrices, "layers.0.q_proj", 77)]
    run_steps(make(tmp_path, matrices), matrices, range(1, 201), events)
    before = history(tmp_path)
    assert (77, "layers.0.q_proj") in before and (77, "layers.1.q_proj") not in before
    timeline = make(tmp_path, matrices, resume_step=200)
    timeline.flush()
    assert history(tmp_path) == before
    run_steps(timeline, matrices, range(201, 401), events)
    after = history(tmp_path)
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


def test_resume_before_the_first_reading(tmp_path):
    matrices = toy_matrices()
    run_steps(make(tmp_path, matrices), matrices, range(10, 20), [])
    timeline = make(tmp_path, matrices, resume_step=5)
    timeline.flush()
    assert history(tmp_path) == {}


def test_unknown_matrices_are_errors(tmp_path):
    matrices = toy_matrices()
    timeline = make(tmp_path, matrices)
    with pytest.raises(KeyError, match="other"):
        timeline.record(1, [], {"other": 1.0})
    run_steps(timeline, matrices, range(1, 20), [freeze(matrices, "layers.2.q_proj", 15)])
    with pytest.raises(KeyError, match=r"layers\.2\.q_proj.*not tracked|not tracked.*layers\.2\.q_proj"):
        make(tmp_path, toy_matrices(layers=2), resume_step=19)


def test_table(tmp_path):
    matrices = toy_matrices(layers=1)
    timeline = make(tmp_path, matrices)
    timeline.record(11, [], {"layers.0.q_proj": 0.5})
    timeline.record(12, [freeze(matrices, "layers.0.q_proj", 12, value=0.1)], {"layers.0.q_proj": 0.1})
    columns, rows = timeline.table()
    assert columns == ["matrix", "tower", "layer", "role", "params", "frozen at step", "last value", "tau"]
    assert rows == [
        ["layers.0.q_proj", "language", 0, "q_proj", 32, 12, 0.1, 0.02],
        ["layers.0.down_proj", "language", 0, "down_proj", 32, None, None, None],
    ]


def test_summary_is_strict_json(tmp_path):
    matrices = toy_matrices()
    timeline = make(tmp_path, matrices)
    timeline.record(11, [freeze(matrices, "layers.0.q_proj", 11, value=float("inf"), tau=float("nan"))], {})
    timeline.write_report(
        {
            "nan": float("nan"),
            "deep": [{"inf": float("-inf")}, (1, 2.5)],
            "numpy": np.float32(0.5),
            "int": np.int64(3),
            "true": True,
            "none": None,
            "dtype": torch.float32,
        }
    )

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert summary == {
        "nan": None,
        "deep": [{"inf": None}, [1, 2.5]],
        "numpy": 0.5,
        "int": 3,
        "true": True,
        "none": None,
        "dtype": "torch.float32",
    }
    (event,) = (
        json.loads(line, parse_constant=refuse) for line in (tmp_path / "events.jsonl").read_text().splitlines()
    )
    assert event["value"] is None and event["tau"] is None
    make(tmp_path, matrices, resume_step=11).write_report({})


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]
        assert not [name for name, _ in attributes if name.startswith("on")]

    def handle_data(self, data):
        self.text.append(data)


def test_report_is_self_contained_and_escaped(tmp_path):
    evil = '<script>alert("x")</script>'
    matrices = {m.name: m for m in (matrix(f"layers.0.{evil}", 0, evil), matrix("layers.1.$a$_{", 1, "$a$_{"))}
    timeline = Timeline(tmp_path, matrices, total_steps=100, metric=evil, grace_steps=10)
    for step in range(1, 21):
        event = freeze(matrices, f"layers.0.{evil}", 20)
        timeline.record(step, [event] if step == 20 else [], dict.fromkeys(matrices, 1 / step))
    summary = SUMMARY | dict.fromkeys(("model", "dataset", "metric", "stop_reason", "device", "tau", evil), evil)
    summary |= {"towers": {evil: {"matrices": 1, "frozen": 1}}, "versions": {evil: evil}, "seconds": {evil: evil}}
    summary["speedup"] = SUMMARY["speedup"] | {evil: evil, "steps_not_run": {evil: evil}}
    timeline.write_report(summary)
    text = (tmp_path / "report.html").read_text("utf-8")
    page = Page(text)
    assert "script" not in page.tags and "</script" not in text
    assert not {"link", "iframe", "object"} & set(page.tags)
    assert len(page.links) == 1 and page.links[0].startswith("data:image/png;base64,")
    assert "url(" not in text and "@import" not in text and not re.search(r"https?://", text)
    assert "".join(page.text).count(evil) >= 14
    picture = base64.b64decode(page.links[0].partition(",")[2])
    assert picture == (tmp_path / "timeline.png").read_bytes()


def test_report_says_what_happened(tmp_path):
    matrices = toy_matrices()
    timeline = make(tmp_path, matrices)
    events = [freeze(matrices, name, 20 + i, frozen=i + 1) for i, name in enumerate(list(matrices)[:5])]
    run_steps(timeline, matrices, range(1, 31), events)
    timeline.write_report(SUMMARY | {"model_flops": {"forward": 123.5}})
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    text = re.sub(r"\s+", " ", " ".join(page.text))
    for expected in (
        "30 of 100",
        "all matrices frozen",
        "6 / 6",
        "1.03x not measured",
        "588 steps 2.40x 31 s",
        "5 evaluations - 4 s",
        "same length not measured",
        "full schedule 2.50x",
        "0.4 ms",
        "1.0% of a step",
        "812 MiB",
        '"forward": 123.5',
        "Still training at the end (1)",
    ):
        assert expected in text, expected
    assert all(text.count(name) == 1 for name in matrices)
    assert page.tags.count("svg") == 2  # one curve per role


def test_report_of_an_empty_summary_and_an_empty_run(tmp_path):
    make(tmp_path, toy_matrices()).write_report({})
    assert history(tmp_path) == {}
    assert "No matrix froze" in (tmp_path / "report.html").read_text()


def cell_colors(timeline, panel=0):
    """RGB at the left edge of each cell of one heatmap, by (row, column): labels are in the middle."""
    figure = timeline.figure()
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)
    ax = [ax for ax in figure.axes if ax.get_xlabel() in ("layer", "no layer")][panel]
    rows, columns = len(ax.get_yticks()), round(np.diff(ax.get_xlim())[0])
    colors = {}
    for row in range(rows):
        for column in range(columns):
            x, y = ax.transData.transform((column - 0.42, row))
            colors[row, column] = tuple(pixels[pixels.shape[0] - 1 - int(y), int(x)])
    return colors


def is_grey(color):
    return max(color) - min(color) < 30


def test_heatmap_shows_who_froze(tmp_path):
    matrices = toy_matrices()
    timeline = make(tmp_path, matrices)
    frozen = {"layers.0.q_proj": 20, "layers.1.q_proj": 40, "layers.2.down_proj": 40}
    for name, step in frozen.items():
        timeline.record(step, [freeze(matrices, name, step)], {})
    colors = cell_colors(timeline)
    colored = {at for at, color in colors.items() if not is_grey(color)}
    assert colored == {(0, 0), (0, 1), (1, 2)}
    assert colors[0, 1] == colors[1, 2] != colors[0, 0]


def test_a_cell_of_experts_is_frozen_once_all_are(tmp_path):
    experts = [matrix(f"layers.{i}.experts.{e}", i, "experts", expert=e) for i in range(3) for e in range(4)]
    plain = [matrix(f"layers.{i}.q_proj", i) for i in range(3)]
    matrices = {m.name: m for m in experts + plain}
    timeline = make(tmp_path, matrices)
    steps = {f"layers.0.experts.{e}": 20 + 10 * e for e in range(4)}  # mean 35
    steps |= {f"layers.1.experts.{e}": 60 for e in range(3)}
    steps |= {"layers.0.q_proj": 20, "layers.1.q_proj": 35, "layers.2.q_proj": 60}
    for name, step in sorted(steps.items(), key=lambda item: item[1]):
        timeline.record(step, [freeze(matrices, name, step)], {})
    colors = cell_colors(timeline)
    assert colors[0, 0] == colors[1, 1]
    assert is_grey(colors[0, 1]) and is_grey(colors[0, 2])
    labels = [text.get_text() for ax in timeline.figure().axes for text in ax.texts]
    assert "35" in labels and "3/4" in labels


def test_towers_and_projectors_have_their_own_panels(tmp_path):
    found = [matrix(f"vision.{i}.fc1", i, "fc1", "vision", "vision") for i in range(2)]
    found += [matrix("merger.linear", -1, "linear", "projector", "")]
    found += [matrix(f"text.{i}.q_proj", i) for i in range(60)]
    matrices = {m.name: m for m in found}
    timeline = make(tmp_path, matrices)
    timeline.record(20, [freeze(matrices, "merger.linear", 20)], {})
    figure = timeline.figure()
    panels = [ax for ax in figure.axes if ax.get_xlabel() in ("layer", "no layer")]
    assert [ax.get_xlabel() for ax in panels] == ["layer", "no layer", "layer"]
    assert [tick.get_text() for ax in panels for tick in ax.get_yticklabels()] == ["fc1", "linear", "q_proj"]
    assert {"Vision", "Projector", "Language"} <= {text.get_text() for text in figure.texts}
    counts = [text.get_text() for ax in panels for text in ax.texts if "frozen" in text.get_text()]
    assert counts == ["0 of 2 frozen", "1 of 1 frozen", "0 of 60 frozen"]
    # Everything is on the page, and panels do not overlap.
    boxes = [ax.get_tightbbox() for ax in panels]
    width, height = figure.get_size_inches() * figure.dpi
    assert all(box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height for box in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_frozen_fraction_curve(tmp_path):
    matrices = toy_matrices()
    timeline = make(tmp_path, matrices)
    names = list(matrices)
    for step in range(1, 61):
        events = [freeze(matrices, names[step // 20 - 1], step)] if step % 20 == 0 else []
        timeline.record(step, events, {})
    (ax,) = [ax for ax in timeline.figure().axes if ax.get_xlabel() == "optimizer step"]
    (line,) = [line for line in ax.lines if line.get_label() == "matrices"]
    assert list(line.get_xdata()) == [0, 20, 40, 60, 60]
    assert list(line.get_ydata()) == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 3 / 6])
    labels = ax.get_legend_handles_labels()[1]
    assert {"grace period", "not run", "full schedule"} <= set(labels)


def test_timeline_png(tmp_path):
    matrices = toy_matrices()
    timeline = make(tmp_path, matrices)
    timeline.record(20, [freeze(matrices, "layers.0.q_proj", 20)], {})
    timeline.write_report(SUMMARY)
    pixels = imread(tmp_path / "timeline.png")
    assert pixels.shape[1] == 1560 and pixels.shape[0] > 500
    assert len(np.unique(pixels @ np.arange(1, 1 + pixels.shape[-1]))) > 100
