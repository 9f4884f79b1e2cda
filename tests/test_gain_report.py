"""Where the gain is, as the report tells it: shares, windows, the sentence and the heatmap."""

import math

import numpy as np
import pytest
from toy_runs import matrix

from grades_trl.model.matrices import layers_in_order
from grades_trl.report import figure, heatmap
from grades_trl.report.gain import MAX_WINDOWS, GainTable
from grades_trl.report.summary import GainShare, GainSummary

VISION = [matrix(f"v.{i}.fc1", i, "fc1", "vision", "v") for i in range(2)]
LANGUAGE = [matrix(f"t.{i}.q_proj", i, stack="t") for i in range(2)]
LAYERS = layers_in_order({m.name: m for m in LANGUAGE + VISION})
V0, V1, T0, T1 = LAYERS


def table(rows, steps=None, costs=(1.0, 1.0, 2.0, 4.0), frozen=None, layers=LAYERS):
    """Each row has the gain of every layer in one step; None where nothing of it trained."""
    steps = range(2, len(rows) + 2) if steps is None else steps
    gains = {
        step: {layer: gain for layer, gain in zip(layers, row, strict=True) if gain is not None}
        for step, row in zip(steps, rows, strict=True)
    }
    of_step = dict(zip(layers, costs, strict=True))
    return GainTable.of(layers, gains, [of_step] * len(rows), frozen or {})


# ---- numbers ----


def test_shares_are_of_all_gains_and_all_flops():
    found = table([[1.0, 0.0, 2.0, 1.0], [2.0, 1.0, 1.0, 0.0], [None, 0.0, 3.0, 3.0]]).summary()
    assert (found.steps, found.total) == (3, 14.0)
    vision, language = found.towers["vision"], found.towers["language"]
    assert (vision.gain, vision.cost) == (pytest.approx(4 / 14), 2 / 8)
    assert (language.gain, language.cost) == (pytest.approx(10 / 14), 6 / 8)
    assert [share.gain for share in found.layers.values()] == pytest.approx([3 / 14, 1 / 14, 6 / 14, 4 / 14])
    assert list(found.layers) == [V0, V1, T0, T1]
    # Of a ratio of means: the residuals own - share * total, over sqrt(n) times the mean total.
    rest = [1 - 4 * 4 / 14, 3 - 4 * 4 / 14, 0 - 6 * 4 / 14]
    deviation = math.sqrt(sum((r - sum(rest) / 3) ** 2 for r in rest) / 2)
    assert vision.error == language.error == pytest.approx(deviation / math.sqrt(3) / (14 / 3))


def test_without_gain_there_are_no_shares():
    found = table([[1.0, 0.0, -2.0, 0.0]] * 2).summary()
    assert found.towers["vision"] == GainShare(None, None, 2 / 8)
    assert str(found) == (
        "No layer has a share of the gain: the gradients of consecutive batches do not agree, over the 2 steps "
        "measured."
    )
    assert table([]).summary() is None


def test_a_frozen_layer_costs_less_in_the_steps_after():
    gains = {2: dict.fromkeys(LAYERS, 1.0), 3: {T0: 1.0, T1: 1.0}}
    costs = [{V0: 3.0, V1: 3.0, T0: 3.0, T1: 3.0}, {V0: 1.0, V1: 1.0, T0: 3.0, T1: 3.0}]
    found = GainTable.of(LAYERS, gains, costs, {"v.0.fc1": 2, "v.1.fc1": 2, "t.0.q_proj": 3})
    assert found.summary().towers["vision"].cost == 8 / 20
    assert found.frozen_at == {V0: 2, V1: 2, T0: 3}


def test_a_layer_is_frozen_with_the_last_of_its_matrices():
    pair = [matrix("t.0.a", 0, "a"), matrix("t.0.b", 0, "b")]
    layers = layers_in_order({m.name: m for m in pair})
    for frozen, expected in (({"t.0.a": 3}, {}), ({"t.0.a": 9, "t.0.b": 5}, {next(iter(layers)): 9})):
        assert GainTable.of(layers, {}, [], frozen).frozen_at == expected


def test_gain_per_flop_is_1_for_the_model_as_a_whole():
    values = table([[1.0, 1.0, 2.0, 4.0], [0.0, None, 4.0, 4.0], [-1.0, 1.0, -1.0, 1.0]]).gain_per_cost()
    assert values[:, 0] == pytest.approx([1.0] * 4)
    assert values[:, 1] == pytest.approx([0.0, math.nan, 2.0, 1.0], nan_ok=True)
    # Gains that cancel out are bounded: shares of the sum of absolute values.
    assert values[:, 2] == pytest.approx([-2.0, 2.0, -1.0, 0.5])


@pytest.mark.parametrize("steps", [1, 7, MAX_WINDOWS, MAX_WINDOWS + 1, 700])
def test_windows_hold_every_measured_step_once(steps):
    found = table([[1.0, 1.0, 1.0, 1.0]] * steps)
    windows = found.windows()
    assert len(windows) == min(steps, MAX_WINDOWS)
    assert [i for part in windows for i in range(part.start, part.stop)] == list(range(steps))
    assert max(p.stop - p.start for p in windows) - min(p.stop - p.start for p in windows) <= 1
    assert found.gain_per_step() == pytest.approx([4.0] * len(windows))
    assert found.gain_per_cost().shape == (4, len(windows))


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        (
            LAYERS,
            "The vision tower has 12 % (+/- 1) of the gain for 25 % of the FLOPs; the language tower has 88 % "
            "(+/- 1) of the gain for 75 % of the FLOPs, over the 5 steps measured.",
        ),
        (
            layers_in_order({m.name: m for m in LANGUAGE}),
            "The first of 2 layers has 43 % of the gain for 33 % of the FLOPs, over the 5 steps measured.",
        ),
        (
            layers_in_order({LANGUAGE[0].name: LANGUAGE[0]}),
            "One layer has all of the gain, over the 5 steps measured.",
        ),
    ],
    ids=["towers", "layers", "one layer"],
)
def test_one_sentence_says_what_pays(layers, text):
    rows = [dict(zip(LAYERS, [v, 0.5, 3.0, 4.0], strict=True)) for v in (0.2, 0.8, 0.5, 0.3, 0.7)]
    costs = dict(zip(LAYERS, [1.0, 1.0, 2.0, 4.0], strict=True))
    rows = [[row[layer] for layer in layers] for row in rows]
    assert str(table(rows, costs=[costs[layer] for layer in layers], layers=layers).summary()) == text


def test_a_projector_is_no_tower():
    share = GainShare(0.5, None, 0.5)
    text = str(GainSummary(2, 1.0, {"projector": share, "language": share}, {}))
    assert text.startswith("The projector has 50 % of the gain for 50 % of the FLOPs; the language tower ")


# ---- heatmap ----


def cells(drawn, axes):
    """The values of a heatmap, and how many of its cells are frozen and without a gradient."""
    values, frozen, empty, _ = axes.collections
    return np.ma.filled(values.get_array(), np.nan), len(frozen.get_paths()), len(empty.get_paths())


def marks(axes):
    """Where the freezes stand: column and row."""
    return [tuple(line.mean(0).tolist()) for line in axes.collections[3].get_segments()]


def heatmaps(drawn):
    return [ax for ax in drawn.axes if len(ax.collections) == 4]


def test_rows_are_layers_by_tower_and_what_is_frozen_is_hatched():
    rows = [[1.0, 1.0, 2.0, 4.0], [1.0, None, 2.0, -4.0], [None, None, 2.0, 4.0]]
    drawn = heatmap.draw(table(rows, steps=[2, 3, 10], frozen={"v.0.fc1": 5}))
    vision, language = heatmaps(drawn)
    values, frozen, empty = cells(drawn, vision)
    assert values == pytest.approx(table(rows).gain_per_cost()[:2], nan_ok=True)
    assert (frozen, empty) == (1, 2)  # layer 0 after step 5; layer 1 had no gradient
    assert vision.collections[1].get_hatch()
    values, frozen, empty = cells(drawn, language)
    assert values[1, 1] < 0 and (frozen, empty) == (0, 0)
    assert [tick.get_text() for tick in language.get_xticklabels()] == ["2", "3", "10"]
    assert {"Vision", "Language"} <= {text.get_text() for text in drawn.texts}
    # The mark of the freeze stands where the frozen cells begin.
    assert marks(vision) == [(1.5, 0.0)] and marks(language) == []


def test_a_freeze_after_the_last_measurement_stands_at_the_end():
    drawn = heatmap.draw(table([[1.0, 1.0, 2.0, 4.0]] * 2, frozen={"t.1.q_proj": 50}))
    assert [marks(ax) for ax in heatmaps(drawn)] == [[], [(1.5, 1.0)]]


def test_colors_tell_gains_from_losses_and_above_from_below():
    drawn = heatmap.draw(table([[-1.0, 1.0, 2.0, 12.0]]))
    drawn.canvas.draw()
    colors = [ax.collections[0].get_facecolor()[:, :3] for ax in heatmaps(drawn)]
    loss, below, _, above = np.concatenate(colors)
    assert loss[0] > loss[2] and above[2] > above[0]  # red, blue
    assert above.sum() < below.sum()  # the more, the darker
    norm = heatmaps(drawn)[0].collections[0].norm
    assert (norm.vmin, norm.vmax) == (-heatmap.LIMIT, heatmap.LIMIT)


@pytest.mark.parametrize("count", [1, 40])
def test_everything_is_on_the_figure_and_panels_do_not_overlap(count):
    members = [matrix(f"v.{i}", i, "fc1", "vision", "v") for i in range(count)]
    members += [
        matrix("merger", -1, "linear", "projector", ""),
        *(matrix(f"t.{i}", i, stack="t") for i in range(count)),
    ]
    layers = layers_in_order({m.name: m for m in members})
    drawn = heatmap.draw(table([[1.0] * len(layers)] * 20, costs=[1.0] * len(layers), layers=layers))
    drawn.canvas.draw()
    boxes = [ax.get_tightbbox() for ax in drawn.axes]
    width, height = drawn.get_size_inches() * drawn.dpi
    assert all(box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height for box in boxes)
    boxes = [ax.get_tightbbox() for ax in heatmaps(drawn)]
    assert len(boxes) == 3 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert figure.render(drawn, dpi=20).startswith(b"\x89PNG")
