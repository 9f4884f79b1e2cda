"""Criteria: sequences of values and of gradients with the freeze step worked out by hand."""

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from grades_trl.criteria import CRITERIA, Converged, measurement
from grades_trl.criteria.schedule import Schedule
from grades_trl.criteria.threshold import ThresholdCriterion
from grades_trl.model.matrices import WeightMatrix, find_matrices
from helpers import Toy, llava, qwen3

METRICS = ["grad_change", "grad_norm", "weight_change"]
ONE = "layers.0.proj"
NAN = pytest.approx(math.nan, nan_ok=True)


# ---- the threshold ----


class Given(ThresholdCriterion):
    """A threshold criterion whose values are given in place of measured."""

    metric = "given"

    def __init__(self, total_steps=20, towers=None, **settings):
        matrices = {
            name: WeightMatrix(name=name, layer=0, role="w", tower=tower, stack="layers", shape=(1, 1), parameters=())
            for name, tower in (towers or {"w": "language"}).items()
        }
        super().__init__(matrices, total_steps, **{**self.defaults, **settings})
        self.given = {}

    def measure(self, step, live, grad_scale):
        return self.given

    def take(self, step, **given):
        """What has converged by the values of a step; `None` is a matrix that was not measured."""
        self.given = {name: value for name, value in given.items() if value is not None}
        return self.update(step, [*self.matrices], 1.0)


def freeze_step(values, **settings):
    """The step in which a matrix with these values (from step 1 on) converges; `None` if it does not."""
    criterion = Given(**settings)
    return next((step for step, value in enumerate(values, 1) if criterion.take(step, w=value)), None)


def test_the_first_value_below_tau_after_the_grace_period_converges():
    falling = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0.5]
    assert freeze_step(falling, tau=5.0, alpha=0.1) == 6  # the 5 is not below 5
    assert freeze_step(falling, tau=5.0, alpha=0.4) == 9  # the grace period is steps 1 to 8
    assert freeze_step(falling, tau=0.1, alpha=0.1) is None
    assert freeze_step([0.0] * 20, tau=0, alpha=0.1) is None  # nothing is below 0


def test_what_has_converged_says_by_which_value_and_why():
    criterion = Given(tau=2, alpha=0.0)
    assert criterion.take(1, w=1.5) == []
    assert criterion.take(2, w=1.0) == [Converged("w", "given below tau", value=1.0, tau=2.0)]
    assert criterion.values == {"w": 1.0}


@pytest.mark.parametrize(
    ("alpha", "total", "steps"), [(0.55, 100, 55), (0.55, 101, 56), (0.3, 10, 3), (0, 10, 0), (1, 7, 7)]
)
def test_the_grace_period_is_the_papers_ceiling(alpha, total, steps):
    assert Given(total, alpha=alpha, tau=1.0).grace_steps == steps
    assert freeze_step([0.5] * 10 * total, total_steps=total, alpha=alpha, tau=1.0) == max(steps, 1) + 1


def test_nothing_converges_on_its_first_measurement():
    assert freeze_step([0.0, 0.0], tau=1.0, alpha=0.0) == 2
    # ... nor when that comes late, as in a tower that has seen no image for long
    assert freeze_step([None] * 15 + [0.1, 0.1], tau=1.0, alpha=0.5) == 17


def test_patience_counts_consecutive_values():
    assert freeze_step([9, 9, 1, 9, 1, 1, 9, 1, 1, 1], tau=5.0, alpha=0.0, patience=3) == 10
    # a step without a measurement neither counts nor starts anew
    assert freeze_step([9, 9, 1, None, 1, None, 1], tau=5.0, alpha=0.0, patience=3) == 7


def test_values_of_the_grace_period_do_not_count_towards_patience():
    assert freeze_step([1] * 20, tau=5.0, alpha=0.25, patience=3) == 8


@pytest.mark.parametrize("tau", [5.0, "auto"])
def test_a_value_that_is_not_finite_is_no_measurement(tau):
    bad = [math.nan, math.inf, -math.inf]
    assert freeze_step([*bad, 10, *bad, 1, *bad, 1], tau=5.0, alpha=0.0) == 8  # 10 is the first measurement
    assert freeze_step([10, 1, *bad, 1], tau=5.0, alpha=0.0, patience=2) == 6
    # the level is the median of 8, 10 and 12
    assert freeze_step([8, *bad, 10, *bad, 12, 6, *bad, 4.9], tau="auto", alpha=0.45) == 14
    criterion = Given(tau=5.0)
    criterion.take(1, w=math.nan)
    assert criterion.values == {}


def test_auto_takes_a_fraction_of_the_median_of_the_grace_period():
    # the grace period is steps 1 to 5, the median of 8, 10, 100, 12, 9 is 10
    values = [8, 10, 100, 12, 9, 6, 5, 4.9]
    assert freeze_step(values, tau="auto", alpha=0.25) == 8
    assert freeze_step(values, tau="auto", alpha=0.25, auto_ratio=0.7) == 6


def test_auto_goes_on_collecting_when_a_matrix_was_hardly_measured():
    # one value in the grace period; the level is that of the first three, 10, 8, 6: tau is 4
    assert freeze_step([None, None, None, None, 10, 8, 6, 4, 3.9], tau="auto", alpha=0.25) == 9


@pytest.mark.parametrize(
    ("values", "patience", "expected"),
    [
        # 10, 8, 1: tau is 4. The 1 lies in the grace period, and completes the level.
        ([10, 8, 1, 4.5, 3.5], 1, 5),
        # 10, 8 and 1 again, of which the 1 comes after the grace period.
        ([None, 10, 8, 1, 4.5, 3.5], 1, 6),
        ([None, None, 10, 8, 1, 3.5], 1, 6),
        # Nor does it count towards patience.
        ([None, None, 10, 8, 1, 3.5, 3.5], 2, 7),
    ],
)
def test_auto_freezes_nothing_by_the_value_that_completes_the_level(values, patience, expected):
    assert freeze_step(values, tau="auto", alpha=0.15, patience=patience) == expected


def test_auto_does_not_wait_for_another_value_when_the_last_step_of_the_grace_period_is_not_measured():
    """The grace period is steps 1 to 10, and every third step is measured: 12 is the first that may freeze."""
    measured = {3: 10, 6: 10, 9: 10, 12: 1, 15: 1}
    assert freeze_step([measured.get(step) for step in range(1, 16)], tau="auto", alpha=0.5) == 12


def test_each_matrix_has_its_own_level():
    criterion = Given(6, {"a": "language", "b": "language"}, alpha=0.5)
    for step in (1, 2, 3):
        criterion.take(step, a=10.0, b=1.0)
    assert [found.name for found in criterion.take(4, a=4.0, b=0.6)] == ["a"]
    assert criterion.taus == {"a": 5.0, "b": 0.5}


def test_each_tower_has_its_own_tau():
    towers = {"eye": "vision", "ear": "language"}
    criterion = Given(towers=towers, tau={"vision": 1.0, "language": 10.0}, alpha=0.0)
    criterion.take(1, eye=5.0, ear=5.0)
    assert [found.name for found in criterion.take(2, eye=5.0, ear=5.0)] == ["ear"]
    with pytest.raises(
        ValueError, match=r'tau gives thresholds for vision, but .* trains a language tower: add "lang'
    ):
        Given(towers=towers, tau={"vision": 1.0})


@pytest.mark.parametrize("tau", [5.0, "auto"])
def test_a_threshold_goes_on_where_it_was(tau):
    """Its state survives JSON after any step."""
    settings = {"total_steps": 6, "tau": tau, "alpha": 0.5, "patience": 2}
    values = [4.0, 6.0, 9.0, 2.0, 9.0, 2.0, 2.0, 1.0]
    straight = Given(**settings)
    expected = [straight.take(step, w=value) for step, value in enumerate(values, 1)]
    assert any(expected)
    for end in range(1, len(values)):
        first, second = Given(**settings), Given(**settings)
        got = [first.take(step, w=value) for step, value in enumerate(values[:end], 1)]
        state, tensors = first.state_dict()
        second.load_state_dict(json.loads(json.dumps(state)), tensors)
        got += [second.take(step, w=value) for step, value in enumerate(values[end:], end + 1)]
        assert got == expected


# ---- the paper's metrics, from gradients set by hand ----


def run(metric, gradients, lr=0.0, scale=1.0, **settings):
    """Sets each gradient of a matrix to `value * ones(2, 3)` in turn. Returns its values, NaN in a step that was no
    measurement, and the step in which it converges."""
    model = Toy()
    weight = model.layers[0].proj.weight
    model.requires_grad_(False)
    weight.requires_grad_(True)
    optimizer = torch.optim.SGD([weight], lr=lr)
    criterion = CRITERIA[metric](find_matrices(model), 20, **{**CRITERIA[metric].defaults, "alpha": 0.0, **settings})
    values = []
    for step, value in enumerate(gradients, start=1):
        weight.grad = None if value is None else torch.full((2, 3), float(value) * scale)
        converged = criterion.update(step, [ONE], scale)
        values.append(round(criterion.values.get(ONE, math.nan), 4))
        if converged:
            assert [(found.name, found.reason) for found in converged] == [(ONE, f"{metric} below tau")]
            return values, step
        if weight.grad is not None:
            weight.grad /= scale
        optimizer.step()
    return values, None


def test_grad_norm_by_hand():
    # 6 elements: 6, 5.4, 3, 1.2
    assert run("grad_norm", [1, -0.9, 0.5, 0.2], tau=3.1) == ([6.0, 5.4, 3.0], 3)
    assert run("grad_norm", [1, 0.9, 0.5, 0.2], tau=3.0) == ([6.0, 5.4, 3.0, 1.2], 4)
    assert run("grad_norm", [1, 0.1, 0.1, 0.1, 0.1], tau=3.0, alpha=0.2)[1] == 5  # the grace period is steps 1 to 4
    assert run("grad_norm", [1, 0.1, 1, 0.1, 0.1], tau=3.0, patience=2)[1] == 5


def test_grad_change_by_hand():
    # differences .1, .4, .3, .01 of 6 elements; the first step has nothing to compare with
    values, step = run("grad_change", [1, 0.9, 0.5, 0.2, 0.19], tau=1.0)
    assert values == [NAN, 0.6, 2.4, 1.8, 0.06]
    assert step == 5  # .6 was below, but it was the first measurement
    assert run("grad_change", [1, 0.9, 0.5, 0.2, 0.19], tau=2.0)[1] == 4


def test_weight_change_by_hand():
    # SGD with lr .5 moves each of the 6 weights by half its gradient; step t measures what update t - 1 did
    values, step = run("weight_change", [1, 0.8, 0.4, 0.2, 0.1], lr=0.5, tau=0.7)
    assert values == [NAN, 3.0, 2.4, 1.2, 0.6]
    assert step == 5


@pytest.mark.parametrize("nothing", [0.0, None, math.inf, math.nan])
@pytest.mark.parametrize("metric", METRICS)
def test_a_gradient_that_is_zero_missing_or_not_finite_is_no_measurement(metric, nothing):
    values, step = run(metric, [1, 2, nothing, nothing, nothing], tau=1e-3, lr=0.1)
    assert step is None
    assert values[2:] == [NAN, NAN, NAN]


@pytest.mark.parametrize("nothing", [0.0, None, math.inf, math.nan])
def test_a_gradient_is_compared_with_the_last_one_that_was_one(nothing):
    values, step = run("grad_change", [1, nothing, nothing, 0.5, 0.4], tau=0.1)
    assert values == [NAN, NAN, NAN, 3.0, 0.6]
    assert step is None


@pytest.mark.parametrize("metric", METRICS)
def test_the_loss_scale_is_divided_out(metric):
    gradients = [1, 0.9, 0.5, 0.2, 0.19]
    without, scaled = (run(metric, gradients, lr=0.5, tau=0.5, scale=scale) for scale in (1.0, 1024.0))
    assert str(scaled) == str(without)  # as text, where nan equals nan


@pytest.mark.parametrize("metric", METRICS)
def test_measuring_every_third_step_keeps_the_meaning_of_a_value(metric):
    gradients = [1, 0.9, 0.5, 0.2, 0.19, 0.1, 0.3]
    every = run(metric, gradients, lr=0.5, tau=1e-9)[0]
    third = run(metric, gradients, lr=0.5, tau=1e-9, measure_every=3)[0]
    assert third == [NAN, NAN, every[2], NAN, NAN, every[5], NAN]


@pytest.mark.parametrize(
    ("metric", "steps"),
    [("grad_norm", [3, 6, 9]), ("grad_change", [2, 3, 5, 6, 8, 9]), ("weight_change", [2, 3, 5, 6, 8, 9])],
)
def test_other_steps_cost_nothing(monkeypatch, metric, steps):
    """Where every third step is measured, the one before is what it is compared with."""
    model, touched = Toy(), []
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    sums = measurement.l1_sums
    monkeypatch.setattr(measurement, "l1_sums", lambda *args: (touched.append(step), sums(*args))[1])
    settings = {**CRITERIA[metric].defaults, "measure_every": 3}
    criterion = CRITERIA[metric](find_matrices(model), 20, **settings)
    for step in range(1, 10):
        criterion.update(step, [*criterion.matrices], 1.0)
    assert touched == steps


@pytest.mark.parametrize("metric", METRICS)
def test_a_lora_pair_counts_as_the_sum_over_both_factors(metric):
    """Paper, Eq. 3. A holds gradients of 1 and B of 2; at the second step both are three times that."""
    model = get_peft_model(qwen3(), LoraConfig(r=4, target_modules=["q_proj"]))
    matrices = find_matrices(model)
    settings = {**CRITERIA[metric].defaults, "tau": 0.0}
    criterion = CRITERIA[metric](matrices, 20, **settings)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for step, factor in enumerate((1.0, 3.0), start=1):
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.grad = torch.full_like(p, factor * (1.0 if "lora_A" in name else 2.0))
        criterion.update(step, [*matrices], 1.0)
        optimizer.step()
    for name, matrix in matrices.items():
        a, b = (p.numel() for p in matrix.parameters)
        expected = {"grad_norm": 3 * (a + 2 * b), "grad_change": 2 * (a + 2 * b), "weight_change": 0.5 * (a + 2 * b)}
        assert criterion.values[name] == pytest.approx(expected[metric], rel=1e-5)


class Wide(nn.Module):
    """Two layers with a matrix that is large enough to be sampled."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(512, 256, bias=False)}) for _ in range(2))
        self.head = nn.Linear(2, 2)


@pytest.mark.parametrize("measure_every", [1, 2, 3])
@pytest.mark.parametrize("sample_fraction", [1.0, 1 / 64])
def test_the_weight_change_of_a_skipped_update_is_no_measurement(sample_fraction, measure_every):
    """An overflow anywhere makes a loss scaler skip the update of all, and their change is exactly 0."""
    model = Wide()
    one, two, other = model.layers[0].proj.weight, model.layers[1].proj.weight, model.head.weight
    for p in model.parameters():
        p.data.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    scaler.scale(torch.ones(()))  # makes its state
    settings = {"tau": 1e-3, "alpha": 0.0, "sample_fraction": sample_fraction, "measure_every": measure_every}
    criterion = CRITERIA["weight_change"](
        find_matrices(model), 30, **{**CRITERIA["weight_change"].defaults, **settings}
    )
    in_two, elsewhere = {4, 5, 12}, {8, 15, 16, 20}  # steps with an overflow in the second matrix, and in the head
    seen = {name: {} for name in criterion.matrices}
    for step in range(1, 25):
        scale = scaler.get_scale()
        for p in model.parameters():
            p.grad = torch.full_like(p, scale / step)
        if step in in_two:
            two.grad.fill_(math.inf)
        if step in elsewhere:
            other.grad[0, 0] = math.inf
        before = one.clone()
        assert criterion.update(step, [*criterion.matrices], scale) == []
        for name, value in criterion.values.items():
            seen[name][step] = value
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(before, one) == (step in in_two | elsewhere)
    for name, own in (("layers.0.proj", set()), ("layers.1.proj", in_two)):
        unmeasured = {step + 1 for step in in_two | elsewhere} | own | {1}
        expected = {
            step: pytest.approx(0.5 / (step - 1) * one.numel(), rel=1e-4)
            for step in range(1, 25)
            if step % measure_every == 0 and step not in unmeasured
        }
        assert seen[name] == expected


@pytest.mark.parametrize("sample_fraction", [1.0, 1 / 64])
def test_a_learning_rate_of_zero_is_no_convergence(sample_fraction):
    model = Wide()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    settings = {**CRITERIA["weight_change"].defaults, "tau": 1.0, "alpha": 0.0, "sample_fraction": sample_fraction}
    criterion = CRITERIA["weight_change"](find_matrices(model), 20, **settings)
    for step in range(1, 6):
        for p in model.parameters():
            p.grad = torch.full_like(p, 1.0 / step)
        assert criterion.update(step, [*criterion.matrices], 1.0) == []
        assert criterion.values == {}
        optimizer.step()


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("metric", ["grad_change", "weight_change"])
def test_what_is_remembered_is_out_of_reach_of_clipping_and_of_the_optimizer(metric, scale):
    """By another route: gradients and weights of a small and of a sampled matrix, cloned before they are changed."""
    model = qwen3(intermediate_size=4096)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {**CRITERIA[metric].defaults, "tau": 0.0}
    criterion = CRITERIA[metric](find_matrices(model), 10, **settings)
    names = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj")
    before = {}
    for step in range(1, 4):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = scale * torch.randn(p.shape, generator=generator)
        criterion.update(step, names, scale)
        for name in names:
            weight = criterion.matrices[name].parameters[0]
            chosen = measurement.sample(weight, 1 / 64, f"{name}/0")
            now = (weight.grad / scale if metric == "grad_change" else weight.detach()).double().clone()
            if step > 1:
                difference = now - before[name]
                if chosen is not None:
                    difference = chosen.take(difference) * chosen.scale
                assert criterion.values[name] == pytest.approx(difference.abs().sum().item(), rel=1e-4)
            before[name] = now
        for p in model.parameters():
            p.grad.mul_(0.1 / scale)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert chosen is not None


def test_another_sample_fraction_cannot_go_on_from_a_state():
    matrices = find_matrices(Toy())

    def criterion(fraction):
        return CRITERIA["grad_norm"](matrices, 20, **{**CRITERIA["grad_norm"].defaults, "sample_fraction": fraction})

    with pytest.raises(ValueError, match=r"resume with --sample_fraction 0\.015625"):
        criterion(1.0).load_state_dict(*criterion(1 / 64).state_dict())


# ---- the schedule ----

LLAVA = find_matrices(llava())
LANGUAGE = [name for name, matrix in LLAVA.items() if matrix.tower == "language"]
VISION = [name for name, matrix in LLAVA.items() if matrix.tower == "vision"]
Q_PROJ = "model.language_model.layers.{}.self_attn.q_proj"


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({}, {}),
        ({Q_PROJ.format(1): 3}, {Q_PROJ.format(1): 3}),
        ({"vision": 1}, dict.fromkeys(VISION, 1)),
        ({"*": 5}, dict.fromkeys([*LANGUAGE, *VISION], 5)),
        ({"*language_model*.layers.[0-7].self_attn.q_proj": 2}, {Q_PROJ.format(0): 2, Q_PROJ.format(1): 2}),
        # of several entries that fit, the last one counts
        ({"language": 4, Q_PROJ.format(0): 9}, dict.fromkeys(LANGUAGE, 4) | {Q_PROJ.format(0): 9}),
        ({Q_PROJ.format(0): 9, "language": 4}, dict.fromkeys(LANGUAGE, 4)),
    ],
)
def test_a_schedule_names_matrices_patterns_and_towers(schedule, expected):
    criterion = Schedule(LLAVA, 20, schedule=schedule)
    found: dict[str, int] = {}
    for step in range(1, 12):
        converged = criterion.update(step, [name for name in LLAVA if name not in found], 1.0)
        assert all((c.reason, c.value, c.tau) == ("schedule", None, None) for c in converged)
        found |= {c.name: step for c in converged}
    assert found == expected
    assert criterion.values == {}
    assert criterion.grace_steps == 0


def test_a_step_of_a_schedule_that_was_missed_counts_too():
    criterion = Schedule(LLAVA, 20, schedule={"vision": 2, "language": 6})
    assert [found.name for found in criterion.update(5, [*LLAVA], 1.0)] == VISION


@pytest.mark.parametrize("entry", ["model.layers.9.mlp", "*.layers.9.*", "audio", "q_proj"])
def test_an_entry_of_a_schedule_that_fits_nothing_is_an_error_that_names_it(entry):
    with pytest.raises(ValueError, match=r"The schedule freezes .* which is no matrix, tower or pattern") as error:
        Schedule(LLAVA, 20, schedule={"vision": 1, entry: 3})
    assert repr(entry) in str(error.value)


def test_a_schedule_follows_a_file(tmp_path):
    path = tmp_path / "events.jsonl"
    events = [{"matrix": VISION[1], "step": 3, "value": 0.5, "tau": 1.0}, {"matrix": VISION[0], "step": 2}]
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    criterion = Schedule(LLAVA, 20, schedule=str(path))
    frozen = [[found.name for found in criterion.update(step, VISION, 1.0)] for step in range(1, 4)]
    assert frozen == [[], [VISION[0]], [VISION[0], VISION[1]]]
    path.write_text(json.dumps({"matrix": "elsewhere", "step": 1}))
    with pytest.raises(ValueError, match="'elsewhere', which is no matrix"):
        Schedule(LLAVA, 20, schedule=str(path))


@pytest.mark.parametrize(
    "line",
    ['{"matrix": "a", "st', '{"matrix": "a"}', '{"step": 3}', '{"matrix": "a", "step": "late"}', "[1, 2]", "3", ""],
)
def test_a_line_that_is_no_freeze_event_is_named(tmp_path, line):
    path = tmp_path / "events.jsonl"
    path.write_text(json.dumps({"matrix": VISION[0], "step": 2}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"events\.jsonl, line 2: expected a freeze event, .*, found") as error:
        Schedule(LLAVA, 20, schedule=str(path))
    assert repr(line) in str(error.value)


# ---- no freezing ----


def test_none_freezes_and_measures_nothing():
    model = Toy()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    criterion = CRITERIA["none"](find_matrices(model), 20)
    assert all(criterion.update(step, [*criterion.matrices], 1.0) == [] for step in range(1, 21))
    assert criterion.values == {}
    assert criterion.state_dict() == ({}, {})
