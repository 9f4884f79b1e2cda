"""What the figure and the page of a run show."""

import base64
import re
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser

import numpy as np
import pytest
from toy_runs import freeze, matrix, summary, toy_matrices

from grades_trl.report import elements, figure, page
from grades_trl.report.environment import Environment
from grades_trl.report.history import RunHistory
from grades_trl.report.summary import Flops, GainShare, GainSummary, SkippedLayers, TowerCount
from grades_trl.report.timing import Speedup

PNG, HEATMAP = b"\x89PNG of the test", b"\x89PNG of its gain"


def make(tmp_path, matrices, **kwargs):
    return RunHistory(tmp_path, matrices, total_steps=100, grace_steps=10, **({"metric": "grad_change"} | kwargs))


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.texts = [], [], []
        self.feed(text)
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]
        assert not [name for name, _ in attributes if name.startswith("on")]

    def handle_data(self, data):
        self.texts.append(data)


def trained(tmp_path, matrices, frozen=5, steps=30):
    history = make(tmp_path, matrices)
    for step in range(1, steps + 1):
        i = step - 20
        events = [freeze(matrices, list(matrices)[i], step, frozen=i + 1)] if 0 <= i < frozen else []
        history.record(step, events, {name: 1 / step + j / 50 for j, name in enumerate(matrices)})
    return history


# ---- page ----


def test_the_page_is_self_contained_and_escaped(tmp_path):
    evil = '<script>alert("x")</script>'
    matrices = {m.name: m for m in (matrix(f"layers.0.{evil}", 0, evil), matrix("layers.1.$a$_{", 1, "$a$_{"))}
    history = make(tmp_path, matrices, metric=evil)
    for step in range(1, 21):
        event = replace(freeze(matrices, f"layers.0.{evil}", 20), reason=evil)
        history.record(step, [event] if step == 20 else [], dict.fromkeys(matrices, 1 / step))
    changes = dict.fromkeys(("metric", "stop_reason", "weights"), evil)
    changes |= {"environment": Environment(evil, evil, {evil: evil}), "settings": {evil: {evil: [evil]}}}
    changes |= {"towers": {evil: TowerCount(1, 1)}, "skipped_layers": [SkippedLayers(3, {evil: 1})]}
    shares = {evil: GainShare(0.5, 0.1, 0.5), "b": GainShare(0.5, 0.1, 0.5)}
    changes |= {"results": {evil: 1.0}, "gain": GainSummary(2, 1.0, shares, shares)}
    text = page.build(history, summary(**changes), PNG, HEATMAP)
    found = Page(text)
    assert "script" not in found.tags and "</script" not in text
    assert not {"link", "iframe", "object"} & set(found.tags)
    assert "url(" not in text and "@import" not in text and not re.search(r"https?://", text)
    assert "".join(found.texts).count(evil) >= 17
    assert all(link.startswith("data:image/png;base64,") for link in found.links)


def test_the_page_says_what_happened(tmp_path):
    matrices = toy_matrices()
    found = Page(page.build(trained(tmp_path, matrices), summary(), PNG))
    for expected in (
        "The run ended after 30 of 100 steps, 2.50x as fast as the whole schedule",
        "Why it ended: all matrices frozen.",
        "running average of the weights at step 25, whose held-out loss was the best: 1.235 (best average)",
        "Step 20: froze language 0 q_proj, for this reason: grad_change below tau.",
        "2 more events are in the table below.",
        "Yes, in time: 2.50x (+/- 0.10) against the whole schedule",
        "30 % of the FLOPs of the whole schedule.",
        "6 / 6",
        "1.03x 1.33x not measurable",
        "588 steps 2.40x 2.40x 31 s",
        "5 evaluations - - 4 s",
        "same length not measurable 1.33x",
        "full schedule 2.50x 3.33x",
        "0.4 ms",
        "1.0 % of training",
        "812 MiB",
        "test loss 1.5",
        "training 50.1 s validation 10 s saving 8 s GradES 1.9 s total 70 s",
        "this run 1.5e+15",
        "fraction of the full schedule 0.3",
        "examples in each 64",
        "from step 21 layers 2",
        "alpha 0.55 towers vision 0.3",
        "torch 2.13",
        "grad_change below tau",
        "Still training at the end (1)",
    ):
        assert expected in found.text, expected
    assert all(found.text.count(name) == 1 for name in matrices)
    assert found.text.count("language, 3 matrices") == found.tags.count("svg") == 2  # one curve per role
    assert "pre" not in found.tags and "{'" not in found.text and '{"' not in found.text  # no raw JSON


@pytest.mark.parametrize(
    ("ratio", "margin", "words"),
    [
        (0.93, 0.12, "and was about as fast as the whole schedule: 0.93x"),
        (1.01, None, "and was about as fast as the whole schedule: 1.01x"),
        (0.93, 0.02, "and was slower than the whole schedule: 0.93x"),
        (1.2, 0.12, "1.20x as fast as the whole schedule"),
    ],
)
def test_the_headline_and_the_verdict_agree(tmp_path, ratio, margin, words):
    speedup = replace(summary().speedup, against_full_schedule=ratio, margin=margin)
    text = Page(page.build(make(tmp_path, toy_matrices()), summary(speedup=speedup), PNG)).text
    assert words in text and ("about" in words) == ("No difference in time" in text)


def test_a_percent_sign_stays_beside_its_number_but_not_in_a_command():
    assert elements.text("3.1 % of the gain") == "3.1\u00a0% of the gain"
    assert "'5 %.csv'" in elements.command("--dataset_name '5 %.csv'").replace("&#x27;", "'")


def test_scores_are_in_percent_and_losses_are_not(tmp_path):
    results = {"before/exact_match": 0.0, "final/exact_match": 0.363, "final/test_loss": 1.5}
    text = Page(page.build(make(tmp_path, toy_matrices()), summary(results=results), PNG)).text
    assert "Exact match went from 0.0 % to 36.3 %." in text
    assert "exact match 0.0 % 36.3 % test loss - 1.5" in text


def numbers(value):
    """All numbers in nested dataclasses, dicts and lists."""
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [value] if isinstance(value, int | float) else []


def test_every_number_of_the_summary_is_on_the_page(tmp_path):
    """A field that is added must find its place."""
    facts = summary(without_gradient=11, diverged_at=29)
    text = Page(page.build(make(tmp_path, toy_matrices()), facts, PNG, HEATMAP)).text
    in_percent = {elements.show(number) for number in (0.01, 0.04, 0.125, 0.875, 0.25, 0.75)}
    shown = {elements.show(number) for number in numbers(facts)} - in_percent
    shown = {number for number in shown if number not in text}
    assert shown <= {"1.03", "2.4", "2.5", "1.5e+15", "2e+15", "5e+15"}, shown
    assert "1.03x" in text and "2.40x" in text and "2.50x" in text and "1.0 %" in text and "4.0 %" in text


def test_a_page_of_a_run_without_anything(tmp_path):
    nothing = summary(
        speedup=Speedup(),
        flops=Flops(None, None, None, None),
        heldout=None,
        peak_memory_mib=None,
        gain=None,
        results={},
        settings={},
        skipped_layers=[],
    )
    text = Page(page.build(make(tmp_path, toy_matrices()), nothing, PNG)).text
    assert "No matrix froze" in text and text.count("not measurable") >= 5
    assert "The run ended after 30 of 100 steps" in text and "=None" in text
    text = text.replace("=None", "")
    assert "None" not in text and "Held-out" not in text and "Scores before" not in text and "the gain" not in text


def test_the_page_shows_where_the_gain_is(tmp_path):
    found = Page(page.build(make(tmp_path, toy_matrices()), summary(), PNG, HEATMAP))
    images = [base64.b64decode(link.removeprefix("data:image/png;base64,")) for link in found.links]
    assert images == [HEATMAP, PNG]
    for expected in (
        "The vision tower has 12 % (+/- 1) of the gain for 25 % of the FLOPs; the language tower has 88 %",
        "over the 28 steps measured.",
        "Sum over these steps, all layers together: 1.75",
        "Gain Standard error FLOPs vision 12.5 % 1.0 % 25.0 % language 87.5 % 1.0 % 75.0 %",
        "All 2 layers",
        "vision/v/0 12.5 % 1.0 % 25.0 % language/t/0 87.5 % 1.0 % 75.0 %",
    ):
        assert expected in found.text, expected


def test_the_page_of_a_run_that_diverged_says_so(tmp_path):
    text = page.build(make(tmp_path, toy_matrices()), summary(diverged_at=7), PNG)
    assert "diverged at step 7" in text


def test_a_scheduled_freeze_has_no_value_on_the_page(tmp_path):
    matrices = toy_matrices()
    history = make(tmp_path, matrices)
    event = replace(freeze(matrices, "layers.0.q_proj", 3), value=None, tau=None, reason="schedule")
    for step in range(1, 9):
        history.record(step, [event] if step == 3 else [], dict.fromkeys(matrices, 1.0))
    text = Page(page.build(history, summary(), PNG)).text
    assert "3 layers.0.q_proj language 0 q_proj schedule 32 - - 1" in text


def test_long_tables_end_somewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MAX_EVENTS", 2)
    matrices = toy_matrices()
    text = Page(page.build(trained(tmp_path, matrices), summary(), PNG)).text
    assert "The last 3 of 5 are in events.jsonl only" in text
    assert sum(text.count(name) for name in matrices) == 3


def test_times_as_people_read_them():
    seconds = (None, 0.0123, 119.0, 150.0, 3599.0, 3600.0, 7325.0, -150.0)
    shown = ("not measurable", "0.0123 s", "119 s", "2.5 min", "1 h 00 min", "1 h 00 min", "2 h 02 min", "-2.5 min")
    assert tuple(map(elements.seconds, seconds)) == shown


# ---- figure ----


def cell_colors(history, panel=0):
    """RGB at the left edge of each cell of one heatmap, by (row, column): labels are in the middle."""
    drawn = figure.draw(history)
    drawn.canvas.draw()
    pixels = np.asarray(drawn.canvas.buffer_rgba())[..., :3].astype(int)
    ax = [ax for ax in drawn.axes if ax.get_xlabel() in ("layer", "no layer")][panel]
    rows, columns = len(ax.get_yticks()), round(np.diff(ax.get_xlim())[0])
    colors = {}
    for row in range(rows):
        for column in range(columns):
            x, y = ax.transData.transform((column - 0.42, row))
            colors[row, column] = tuple(pixels[pixels.shape[0] - 1 - int(y), int(x)])
    return colors


def is_grey(color):
    return max(color) - min(color) < 30


def test_the_heatmap_shows_what_froze(tmp_path):
    matrices = toy_matrices()
    history = make(tmp_path, matrices)
    frozen = {"layers.0.q_proj": 20, "layers.1.q_proj": 40, "layers.2.down_proj": 40}
    for name, step in frozen.items():
        history.record(step, [freeze(matrices, name, step)], {})
    colors = cell_colors(history)
    colored = {at for at, color in colors.items() if not is_grey(color)}
    assert colored == {(0, 0), (0, 1), (1, 2)}
    assert colors[0, 1] == colors[1, 2] != colors[0, 0]


def test_a_cell_of_several_matrices_is_frozen_once_all_are(tmp_path):
    """The layers of an nn.Sequential have one role, as in the mergers of Qwen-VL."""
    several = [matrix(f"layers.{i}.mlp.{e}", i, "mlp") for i in range(3) for e in range(4)]
    single = [matrix(f"layers.{i}.q_proj", i) for i in range(3)]
    matrices = {m.name: m for m in several + single}
    history = make(tmp_path, matrices)
    steps = {f"layers.0.mlp.{e}": 20 + 10 * e for e in range(4)}  # mean 35
    steps |= {f"layers.1.mlp.{e}": 60 for e in range(3)}
    steps |= {"layers.0.q_proj": 20, "layers.1.q_proj": 35, "layers.2.q_proj": 60}
    for name, step in sorted(steps.items(), key=lambda item: item[1]):
        history.record(step, [freeze(matrices, name, step)], {})
    colors = cell_colors(history)
    assert colors[0, 0] == colors[1, 1]
    assert is_grey(colors[0, 1]) and is_grey(colors[0, 2])
    labels = [text.get_text() for ax in figure.draw(history).axes for text in ax.texts]
    assert "35" in labels and "3/4" in labels


def test_towers_and_projectors_have_their_own_panels(tmp_path):
    found = [matrix(f"vision.{i}.fc1", i, "fc1", "vision", "vision") for i in range(2)]
    found += [matrix("merger.linear", -1, "linear", "projector", "")]
    found += [matrix(f"text.{i}.q_proj", i) for i in range(60)]
    matrices = {m.name: m for m in found}
    history = make(tmp_path, matrices)
    history.record(20, [freeze(matrices, "merger.linear", 20)], {})
    drawn = figure.draw(history)
    panels = [ax for ax in drawn.axes if ax.get_xlabel() in ("layer", "no layer")]
    assert [ax.get_xlabel() for ax in panels] == ["layer", "no layer", "layer"]
    assert [tick.get_text() for ax in panels for tick in ax.get_yticklabels()] == ["fc1", "linear", "q_proj"]
    assert {"Vision", "Projector", "Language"} <= {text.get_text() for text in drawn.texts}
    counts = [text.get_text() for ax in panels for text in ax.texts if "frozen" in text.get_text()]
    assert counts == ["0 of 2 frozen", "1 of 1 frozen", "0 of 60 frozen"]
    # Everything is on the figure, and panels do not overlap.
    boxes = [ax.get_tightbbox() for ax in panels]
    width, height = drawn.get_size_inches() * drawn.dpi
    assert all(box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height for box in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_frozen_fraction_curve(tmp_path):
    matrices = toy_matrices()
    history = make(tmp_path, matrices)
    names = list(matrices)
    for step in range(1, 61):
        events = [freeze(matrices, names[step // 20 - 1], step)] if step % 20 == 0 else []
        history.record(step, events, {})
    (ax,) = [ax for ax in figure.draw(history).axes if ax.get_xlabel() == "optimizer step"]
    (line,) = [line for line in ax.lines if line.get_label() == "matrices"]
    assert list(line.get_xdata()) == [0, 20, 40, 60, 60]
    assert list(line.get_ydata()) == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 3 / 6])
    labels = ax.get_legend_handles_labels()[1]
    assert {"grace period", "not run", "full schedule"} <= set(labels)
