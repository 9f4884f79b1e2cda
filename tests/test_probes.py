"""What is frozen is probed: its gradients are measured, nothing else changes; where it would pay, it trains again."""

import copy
import json

import pytest
import torch
from test_gain import criterion, feed

from grades_trl import GradES, GradESConfig
from grades_trl.criteria.gain import MIN_STEPS
from grades_trl.model.towers import towers_of_parameters
from helpers import llava

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
FROZEN_AT, PROBED = 2, (6, 7, 8)


class Run:
    """A LLaVA that trains with its vision tower frozen at step 2, by AdamW, on other rows in each step."""

    def __init__(self, probed=PROBED, cache_bytes=0, state=None):
        self.read_in = []  # steps whose pass read the cache
        self.model = llava(image_token_index=60).train() if state is None else copy.deepcopy(state["model"])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, weight_decay=0.1)
        whole_layers = {"freeze_norms": True, "freeze_embeddings": True}
        config = GradESConfig(metric="schedule", schedule={"vision": FROZEN_AT}, **whole_layers)
        self.grades = GradES(self.model, config, 100, self.optimizer, encoder_cache_bytes=cache_bytes, epoch=(4, 2))
        self.grades.criterion.probes = lambda step: step in probed
        if state is not None:
            self.optimizer.load_state_dict(state["optimizer"])
            self.grades.load_state_dict(state["grades"])

    def state(self):
        grades = self.grades.state_dict()
        tensors = grades.pop("tensors")
        return {
            "model": {name: p.detach().clone() for name, p in self.model.named_parameters()},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "grades": json.loads(json.dumps(grades)) | {"tensors": tensors},
        }

    def step(self, step):
        self.optimizer.zero_grad()
        chosen = [step % 2, 2 + step % 2]
        ids = torch.tensor([[60] * 16 + [3 + row, 4, 5 + step % 3] for row in chosen])
        labels = ids.masked_fill(ids == 60, -100)
        self.model(input_ids=ids, pixel_values=IMAGES[chosen], labels=labels).loss.backward()
        self.gradients = {name for name, p in self.model.named_parameters() if p.grad is not None}
        if self.grades.prefix.read_layers:
            self.read_in.append(step)
        events = self.grades.step(step)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return events

    def train(self, first=1, last=12):
        for step in range(first, last + 1):
            self.step(step)
        return self

    @property
    def weights(self):
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("cache_bytes", [0, 2**24], ids=["", "cached"])
def test_a_probe_measures_what_is_frozen_and_changes_nothing(cache_bytes):
    probed, left_alone = Run(cache_bytes=cache_bytes).train(), Run(probed=(), cache_bytes=cache_bytes).train()
    assert equal(probed.weights, left_alone.weights)
    vision = [layer for layer in probed.grades.gain.layers if layer.startswith("vision")]
    measured = [step for step, gains in probed.grades.gain.steps.items() if set(vision) <= gains.keys()]
    assert measured == [2, 7, 8]
    assert not any(set(vision) & gains.keys() for step, gains in left_alone.grades.gain.steps.items() if step > 2)
    assert probed.grades.prefix.skipped_layers == {"model.vision_tower.encoder.layers": 2}
    towers = towers_of_parameters(probed.model)
    assert {towers[name] for name, p in probed.model.named_parameters() if not p.requires_grad} == {"vision"}
    assert not any(id(p) in map(id, probed.optimizer.state) for p in probed.grades._freezer.frozen)
    if cache_bytes:  # what was kept before the probe is read after it
        hits, misses = (probed.grades.prefix.encoder_cache.use.hits, probed.grades.prefix.encoder_cache.use.misses)
        assert hits == left_alone.grades.prefix.encoder_cache.use.hits - len(PROBED) > 0
        assert misses == left_alone.grades.prefix.encoder_cache.use.misses
        # So a probe counts as computed in the FLOPs of the run.
        assert probed.read_in == [step for step in left_alone.read_in if step not in PROBED]
        assert len(probed.read_in) == hits


def test_the_gradients_of_a_probe_are_those_of_a_model_with_nothing_frozen():
    run = Run().train(last=6)
    whole = llava(image_token_index=60).train()
    whole.load_state_dict(run.model.state_dict())
    ids = torch.tensor([[60] * 16 + [4, 4, 6], [60] * 16 + [6, 4, 6]])
    inputs = {"input_ids": ids, "pixel_values": IMAGES[[1, 3]], "labels": ids.masked_fill(ids == 60, -100)}
    for model in (run.model, whole):
        model.zero_grad()
        model(**inputs).loss.backward()
    expected = dict(whole.named_parameters())
    names = [name for name, matrix in run.grades.matrices.items() if matrix.tower == "vision"]
    for name in names:
        for parameter, other in zip(run.grades.matrices[name].parameters, [expected[name + ".weight"]], strict=True):
            assert torch.equal(parameter.grad, other.grad)


def test_all_that_is_frozen_trains_again_where_the_criterion_says_so():
    run = Run().train(last=7)
    frozen = run.weights
    run.grades.criterion.unfreeze_reason = "it pays"
    run.grades.criterion.steps = {}  # of the schedule
    events = run.step(8)
    assert events and all(event.unfrozen and event.step == 8 and event.frozen == 0 for event in events)
    assert {event.tower for event in events} == {"vision"}
    assert run.grades.frozen == {} and run.grades.prefix.skipped_layers == {}
    assert all(p.requires_grad for p in run.model.parameters())
    run.grades.criterion.unfreeze_reason = ""
    run.train(9, 9)
    towers = towers_of_parameters(run.model)
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, frozen[name])}
    assert {name for name in run.gradients if towers[name] == "vision"} <= moved


def test_a_run_resumed_within_a_probe_goes_on_where_it_was():
    straight = Run().train()
    first = Run().train(last=7)
    state = first.state()
    model = llava(image_token_index=60).train()
    model.load_state_dict(state["model"], strict=False)
    second = Run(state=state | {"model": model}).train(8)
    assert equal(second.weights, straight.weights)
    assert second.grades.gain.steps == straight.grades.gain.steps


@pytest.mark.parametrize(("share", "again"), [(0.02, False), (0.6, True)])
def test_the_criterion_asks_for_probes_and_decides_by_them(share, again):
    """A tower of two of four equal layers costs a third of a step: half of that is the limit."""
    made = criterion()
    vision, language = made.layers[:2], made.layers[2:]
    live = {name for name, matrix in made.matrices.items() if matrix.tower == "language"}

    def measure(step, probed, share=share):
        gains = dict.fromkeys(language, (1 - share) / 2) | (dict.fromkeys(vision, share / 2) if probed else {})
        made.gain_meter._steps[step], made.gain_meter._values = gains, {"any": 1.0}

    feed(made, [0.01, 0.01, 0.49, 0.49])
    made._ends_at = 20
    measure(20, probed=True, share=0.02)
    assert {found.name for found in made.update(20, list(made.matrices), 1.0)} == set(made.matrices) - live
    asked = []
    for step in range(21, 70):
        if made.probes(step):
            asked.append(step)
        measure(step, made.probes(step) and made.probes(step - 1))
        made.update(step, live, 1.0)
        if made.unfreeze_reason:
            break
    first, second = list(range(30, 31 + MIN_STEPS)), list(range(53, 54 + MIN_STEPS))
    assert asked == (first if again else first + second)
    assert made.unfreeze_reason == ("60 % of the gain for 33 % of the FLOPs of a step" if again else "")
    if again:
        assert made._window == made._last_window == [] and not made.probes(53)
