"""Toy runs for the tests of the report: their matrices, events, clocks and summaries."""

from types import SimpleNamespace

import torch
from torch import nn

from grades_trl.events import FreezeEvent
from grades_trl.model.matrices import WeightMatrix
from grades_trl.report.environment import Environment
from grades_trl.report.summary import (
    Flops,
    GainShare,
    GainSummary,
    Heldout,
    Overhead,
    RunSummary,
    SkippedLayers,
    TowerCount,
)
from grades_trl.report.timing import RunClock, Saving, Seconds, Speedup, StepsNotRun, ValidationNotRun

ENVIRONMENT = Environment("toy", "CPU, toy", {"torch": "2.13"})


def matrix(name, layer=0, role="q_proj", tower="language", stack="layers"):
    """A matrix of 4 x 8."""
    weight = nn.Parameter(torch.empty(4, 8, device="meta"))
    return WeightMatrix(name, layer, role, tower, stack, (4, 8), (weight,))


def toy_matrices(layers=3, roles=("q_proj", "down_proj")):
    found = [matrix(f"layers.{layer}.{role}", layer, role) for layer in range(layers) for role in roles]
    return {m.name: m for m in found}


def freeze(matrices, name, step, value=0.01, tau=0.02, frozen=1):
    m = matrices[name]
    of = (frozen, len(matrices))
    return FreezeEvent(step, name, m.layer, m.role, m.tower, value, tau, m.params, *of, "grad_change below tau")


def summary(**changes):
    """30 of 100 steps, of which nothing is missing."""
    facts = {
        "environment": ENVIRONMENT,
        "metric": "grad_change",
        "settings": {"tau": "auto", "alpha": 0.55, "towers": {"vision": 0.3}},
        "steps": 30,
        "total_steps": 100,
        "stop_reason": "all matrices frozen",
        "diverged_at": None,
        "weights": "best average",
        "tracked_matrices": 6,
        "frozen": 6,
        "without_gradient": 0,
        "tracked_parameters": 192,
        "untracked_parameters": 1234,
        "towers": {"language": TowerCount(6, 3)},
        "skipped_layers": [SkippedLayers(21, {"layers": 2})],
        "speedup": Speedup(
            Saving(1.03, None), StepsNotRun(2.4, 31.0, 588), ValidationNotRun(5, 4.0), None, 2.5, margin=0.04
        ),
        "overhead": Overhead(0.4, 0.01),
        "seconds": Seconds(70.0, 50.1, 10.0, 8.0, 1.9),
        "flops": Flops(1.5e15, 2e15, 5e15, 0.3),
        "heldout": Heldout("loss", 64, 10, 7, 0.014, 25, 1.23456),
        "peak_memory_mib": 812.0,
        "gain": GainSummary(
            28,
            1.75,
            {"vision": GainShare(0.125, 0.01, 0.25), "language": GainShare(0.875, 0.01, 0.75)},
            {"vision/v/0": GainShare(0.125, 0.01, 0.25), "language/t/0": GainShare(0.875, 0.01, 0.75)},
        ),
        "results": {"final/test_loss": 1.5},
    }
    return RunSummary(**(facts | changes))


class Run:
    """Drives a clock as the Trainer does, without one."""

    def __init__(self, now, clock=None, step=0, **args):
        self.now, self.clock = now, clock or RunClock()
        defaults = {"eval_strategy": "no", "eval_on_start": False, "eval_delay": 0, "device": torch.device("cpu")}
        self.args = SimpleNamespace(**(defaults | args))
        self.state = SimpleNamespace(global_step=step, max_steps=100, eval_steps=10, num_train_epochs=1)
        self.control = SimpleNamespace(should_evaluate=False, should_save=False, should_training_stop=False)
        self.event("on_train_begin")

    def event(self, name, **kwargs):
        getattr(self.clock, name)(self.args, self.state, self.control, **kwargs)

    def step(self, seconds, overhead=0.0, freeze=False):
        self.now[0] += seconds
        if overhead:
            self.clock.add_overhead(overhead)
        if freeze:
            self.clock.note_freeze(self.state.global_step + 1)
        self.state.global_step += 1
        self.event("on_step_end")

    def steps(self, count, seconds, **kwargs):
        for _ in range(count):
            self.step(seconds, **kwargs)

    def evaluate(self, seconds, loss=1.0, prefix="eval"):
        self.now[0] += seconds
        self.event("on_evaluate", metrics={f"{prefix}_loss": loss, f"{prefix}_runtime": seconds})

    def save(self, seconds):
        self.now[0] += seconds
        self.event("on_save")

    def end(self):
        self.event("on_train_end")
