"""Many runs in one process, many freezes in one run, many steps: nothing accumulates."""

import gc
import json
import os
import threading

import pytest
import torch
from torch import nn

from grades_trl import GradES, GradESConfig, GradESTrainer
from grades_trl.recipe import builtin
from grades_trl.report import run_report
from helpers import LORA, arguments, model_for


def live():
    """What a process holds: tensors and their bytes, threads, open files."""
    gc.collect()
    tensors = [
        o for o in gc.get_objects() if isinstance(o, torch.Tensor) and not isinstance(o, torch._subclasses.FakeTensor)
    ]
    files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    return {
        "tensors": len(tensors),
        "bytes": sum(t.nbytes for t in tensors),
        "threads": threading.active_count(),
        "files": files,
    }


def hooks_and_forwards(model):
    modules = list(model.modules())
    return (
        sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules),
        sum("forward" in vars(m) for m in modules),
        sum(len(p._backward_hooks or ()) + len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()),
    )


@pytest.fixture
def text(monkeypatch):
    monkeypatch.setattr(run_report, "installed", lambda module: False)
    return builtin.dates(train=64, test=32), builtin.tiny_qwen3()[1]


RUNS = {
    "freezing": {"metric": "schedule", "schedule": {"*.layers.0.*": 2, "*.layers.1.mlp.*": 4}, "freeze_norms": True},
    "paper": {"metric": "grad_change", "tau": 0.0, "alpha": 0.0},
    "heldout": {"metric": "gain", "heldout_every": 2, "heldout_cost": 1.0, "heldout_grace": 0.0},
    "cached": {
        "metric": "schedule",
        "schedule": {"*.layers.0.*": 1},
        "freeze_norms": True,
        "freeze_embeddings": True,
        "activation_cache_mib": 8,
    },
}


@pytest.mark.parametrize(
    ("name", "lora"), [*((name, False) for name in RUNS), ("freezing", True)], ids=[*RUNS, "freezing lora"]
)
def test_after_three_runs_all_is_as_after_the_first(tmp_path, text, name, lora):
    dataset, tokenizer = text

    def train(folder):
        trainer = GradESTrainer(
            model=model_for(tokenizer),
            args=arguments(folder, max_steps=12, num_train_epochs=1, save_strategy="steps", save_steps=6),
            train_dataset=dataset["train"],
            eval_dataset=dataset["test"],
            processing_class=tokenizer,
            grades=GradESConfig(**RUNS[name]),
            peft_config=LORA if lora else None,
        )
        clean = hooks_and_forwards(trainer.model)
        trainer.train()
        assert hooks_and_forwards(trainer.model) == clean

    train(tmp_path / "warm-up")  # what is made once in a process
    train(tmp_path / "1")
    first = live()
    train(tmp_path / "2")
    train(tmp_path / "3")
    assert live() == first


def test_a_model_that_is_trained_three_times_holds_nothing_of_the_runs(tmp_path, text):
    dataset, tokenizer = text
    trainer = GradESTrainer(
        model=model_for(tokenizer),
        args=arguments(tmp_path, max_steps=8),
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        processing_class=tokenizer,
        grades=GradESConfig(**RUNS["freezing"]),
    )
    clean, seen = hooks_and_forwards(trainer.model), []
    for _ in range(3):
        trainer.train()
        assert hooks_and_forwards(trainer.model) == clean
        assert all(p.requires_grad for p in trainer.model.parameters())
        seen.append(live() | {"callbacks": len(trainer.callback_handler.callbacks)})
    assert seen[2] == seen[1]


# ---- the engine by itself ----


class Stack(nn.Module):
    """Many layers with one matrix of 2 x 2 each."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(2, 2, bias=False)}) for _ in range(layers))


def give_gradients(model, generator):
    for p in model.parameters():
        p.grad = torch.rand(p.shape, generator=generator) if p.requires_grad else None


def test_a_thousand_freezes(tmp_path):
    model, generator = Stack(1000), torch.Generator().manual_seed(0)
    clean = hooks_and_forwards(model)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = {f"layers.{i}.proj": i // 10 + 1 for i in range(1000)}
    config = GradESConfig(metric="schedule", schedule=schedule, stopping="all_frozen", keep="last")
    grades = GradES(model, config, 100, optimizer)
    events = []
    give_gradients(model, generator)
    optimizer.step()  # state for all
    for step in range(1, 101):
        events += grades.step(step)
    assert [event.step for event in events] == [i // 10 + 1 for i in range(1000)]
    assert grades.done and not any(p.requires_grad for p in model.parameters())
    assert not any(optimizer.state.get(p) for p in model.parameters())  # released
    assert grades.state_dict()["tensors"] == {}
    grades.finish()
    assert hooks_and_forwards(model) == clean and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("metric", ["gain", "grad_change", "grad_norm", "weight_change", "none"])
def test_ten_thousand_steps(metric):
    """The state that a checkpoint keeps stops growing, and so does what is in memory."""
    model, generator = Stack(2), torch.Generator().manual_seed(0)
    tau = {} if metric in ("gain", "none") else {"tau": 0.0, "alpha": 0.0}
    margin = {"margin": 1e9} if metric == "gain" else {}
    config = GradESConfig(metric=metric, heldout_every=100, heldout_patience=1000, **tau, **margin)
    grades = GradES(model, config, 10_000, None, lambda: 1.0)
    sizes, tensors = {}, {}
    for step in range(1, 10_001):
        give_gradients(model, generator)
        grades.step(step)
        if step % 2500 == 0:
            state = grades.state_dict()
            sizes[step] = len(json.dumps(state | {"tensors": None}))
            tensors[step] = sum(t.nbytes for t in state["tensors"].values())
    assert not grades.frozen
    assert len(set(tensors.values())) == 1
    # The gain of about 1,200 steps is kept, of two layers, and those of two windows of the criterion
    assert sizes[10_000] < 400_000
    assert sizes[10_000] - sizes[7500] <= sizes[2500]
    assert len(grades.gain.steps) <= 1200
