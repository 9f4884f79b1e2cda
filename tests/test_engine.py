"""The engine in a plain PyTorch loop: gradients set by hand with the freeze step worked out, and real training."""

import copy
import json
import re
import subprocess
import sys
import warnings

import pytest
import torch
from test_kernels import DEVICE, INTERPRETED, check, triton_environment
from torch.utils._python_dispatch import TorchDispatchMode

from grades_trl import GradES, GradESConfig, engine
from grades_trl.criteria import kernels, metrics
from helpers import Toy, qwen3, qwen3_moe

ONE = "layers.0.proj"


def run(gradients, metric, tau, total_steps=20, lr=0.0, scale=1.0, **config):
    """Sets each gradient of the first matrix to `value * ones(2, 3)` in turn; returns its readings and freeze step."""
    model = Toy()
    model.layers[1].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    grades = GradES(model, GradESConfig(metric=metric, tau=tau, **config), total_steps, optimizer)
    weight = model.layers[0].proj.weight
    readings = []
    for step, value in enumerate(gradients, start=1):
        weight.grad = None if value is None else torch.full((2, 3), float(value) * scale)
        events = grades.step(step, grad_scale=scale)
        readings.append(round(grades.readings.get(ONE, float("nan")), 4))
        if events:
            assert [(e.matrix, e.step, e.frozen, e.total) for e in events] == [(ONE, step, 1, 1)]
            assert events[0].value < events[0].tau
            return readings, step
        if weight.grad is not None:
            weight.grad /= scale
        optimizer.step()
    return readings, None


NAN = pytest.approx(float("nan"), nan_ok=True)


def test_grad_norm_by_hand():
    # 6 elements: 6, 5.4, 3, 1.2
    assert run([1, -0.9, 0.5, 0.2], "grad_norm", 3.1, alpha=0.0) == ([6.0, 5.4, 3.0], 3)
    assert run([1, 0.9, 0.5, 0.2], "grad_norm", 3.0, alpha=0.0) == ([6.0, 5.4, 3.0, 1.2], 4)
    assert run([1, 0.1, 0.1, 0.1, 0.1], "grad_norm", 3.0, alpha=0.2)[1] == 5  # grace: steps 1 to 4
    assert run([1, 0.1, 1, 0.1, 0.1], "grad_norm", 3.0, alpha=0.0, patience=2)[1] == 5


def test_grad_change_by_hand():
    # differences .1, .4, .3, .01 of 6 elements; the first step has nothing to compare with
    readings, step = run([1, 0.9, 0.5, 0.2, 0.19], "grad_change", 1.0, alpha=0.0)
    assert readings == [NAN, 0.6, 2.4, 1.8, 0.06]
    assert step == 5  # .6 was below, but it was the first reading
    assert run([1, 0.9, 0.5, 0.2, 0.19], "grad_change", 2.0, alpha=0.0)[1] == 4


def test_weight_change_by_hand():
    # SGD with lr .5 moves each of the 6 weights by half its gradient; step t reads what update t - 1 did
    readings, step = run([1, 0.8, 0.4, 0.2, 0.1], "weight_change", 0.7, lr=0.5, alpha=0.0)
    assert readings == [NAN, 3.0, 2.4, 1.2, 0.6]
    assert step == 5


def test_a_zero_or_absent_gradient_never_freezes():
    for nothing in (0.0, None):
        for metric in ("grad_norm", "grad_change", "weight_change"):
            readings, step = run([1, 2, nothing, nothing, nothing, 4], metric, 1e-3, lr=0.1, alpha=0.0)
            assert step is None, (metric, nothing)
            assert readings[2:5] == [NAN, NAN, NAN]


def test_what_is_compared_survives_steps_without_a_gradient():
    assert run([1, None, 0.0, 0.5], "grad_change", 0.1, alpha=0.0)[0] == [NAN, NAN, NAN, 3.0]


def test_an_overflow_is_no_observation_and_keeps_the_previous_gradient():
    readings, step = run([1, float("inf"), float("nan"), 0.5, 0.4], "grad_change", 0.1, alpha=0.0)
    assert readings == [NAN, NAN, NAN, 3.0, 0.6]
    assert step is None


def test_loss_scale_is_divided_out():
    for metric in ("grad_norm", "grad_change", "weight_change"):
        plain = run([1, 0.9, 0.5, 0.2, 0.19], metric, 0.5, lr=0.5, alpha=0.0)
        scaled = run([1, 0.9, 0.5, 0.2, 0.19], metric, 0.5, lr=0.5, alpha=0.0, scale=1024.0)
        assert str(scaled) == str(plain)  # as text, where nan equals nan


def test_reading_every_third_step_keeps_the_meaning_of_a_reading():
    gradients = [1, 0.9, 0.5, 0.2, 0.19, 0.1, 0.3]
    for metric in ("grad_norm", "grad_change", "weight_change"):
        every = run(gradients, metric, 1e-9, lr=0.5, alpha=0.0)[0]
        third = run(gradients, metric, 1e-9, lr=0.5, alpha=0.0, interval=3)[0]
        assert third == [NAN, NAN, every[2], NAN, NAN, every[5], NAN]


def test_a_norm_is_read_in_the_steps_that_count_and_no_others(monkeypatch):
    read = []
    monkeypatch.setattr(GradES, "_read", lambda self, step, *_: (read.append(step), {})[1])
    for metric in ("grad_norm", "grad_change"):
        grades = GradES(Toy(), GradESConfig(metric=metric, interval=3), 20)
        for step in range(1, 10):
            grades.step(step)
    assert read == [3, 6, 9, 2, 3, 5, 6, 8, 9]


def test_agreement_by_hand():
    """Gradients of one sign agree fully, of opposite signs not at all; their size does not matter."""
    readings, step = run([1, 0.5, -3, -0.1, 8, 0, -2], "agreement", -1.0, alpha=0.0)
    assert readings == [NAN, 1.0, -1.0, 1.0, -1.0, NAN, -1.0]
    assert step is None
    # running means: 1, (.95 - 1) / 1.95 = -.03
    assert run([1, 0.5, -3], "agreement", 0.0, alpha=0.0)[1] == 3
    for factor, scale in ((7, 1.0), (1, 1024.0)):  # no unit: another size, another loss scale
        gradients = [factor * g for g in (1, 0.5, -3)]
        assert run(gradients, "agreement", 0.0, lr=0.5, alpha=0.0, scale=scale)[1] == 3


def batches(seed, count, vocabulary=64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary, (4, 16), generator=generator) for _ in range(count)]


def train(model, config, steps=24, resume_at=None, lr=3e-3):
    """A plain loop with clipping and weight decay; the engine (and all else) saved and restored at `resume_at`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    grades = GradES(model, config, steps, optimizer)
    at_freeze = {}
    for step, batch in enumerate(batches(0, steps), start=1):
        if step == resume_at:
            model = copy.deepcopy(model)
            model.requires_grad_(True)
            state = optimizer.state_dict()
            saved = grades.state_dict()
            tensors = {name: tensor.clone() for name, tensor in saved.pop("tensors").items()}
            optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
            grades = GradES(model, config, steps, optimizer)
            grades.load_state_dict(json.loads(json.dumps(saved)) | {"tensors": tensors})
            optimizer.load_state_dict(state)
        model(input_ids=batch, labels=batch).loss.backward()
        for event in grades.step(step):
            at_freeze[event.matrix] = values(grades.matrices[event.matrix])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if grades.done:
            break
    return grades, optimizer, at_freeze


def values(matrix):
    return [p.detach().clone() for p in matrix.parameters]


@pytest.mark.parametrize("build", [qwen3, qwen3_moe])
def test_a_frozen_matrix_is_bit_identical_afterwards(build):
    model = build()
    grades, optimizer, at_freeze = train(model, GradESConfig(alpha=0.3, auto_ratio=1.0))
    assert len(at_freeze) > 5
    assert min(grades.frozen.values()) < max(grades.frozen.values())  # some trained on while others were frozen
    for name, before in at_freeze.items():
        for old, new in zip(before, values(grades.matrices[name]), strict=True):
            assert torch.equal(old, new), name
    live = [p for p in model.parameters() if p.requires_grad]
    assert set(map(id, optimizer.state)) == set(map(id, live))  # state of frozen tensors is released


@pytest.mark.parametrize("metric", ["grad_change", "grad_norm", "weight_change", "agreement"])
@pytest.mark.parametrize("build", [qwen3, qwen3_moe])
def test_a_resumed_run_is_the_same_run(build, metric):
    config = GradESConfig(metric=metric, alpha=0.3, auto_ratio=0.95, patience=2)
    straight, resumed = train(build(), config)[0], train(build(), config, resume_at=15)[0]
    assert straight.frozen == resumed.frozen
    assert straight.readings == resumed.readings
    assert straight.frozen


def test_a_state_of_something_else_is_refused():
    grades = GradES(qwen3(), GradESConfig(metric="grad_norm"), 10)
    with pytest.raises(ValueError, match="resume with --metric grad_norm"):
        GradES(qwen3(), GradESConfig(), 10).load_state_dict(grades.state_dict())
    with pytest.raises(ValueError, match=r"resume with --sample 0\.015625"):
        GradES(qwen3(), GradESConfig(metric="grad_norm", sample=1.0), 10).load_state_dict(grades.state_dict())
    state = grades.state_dict() | {"frozen": {"model.layers.7.mlp.up_proj": 3}}
    with pytest.raises(ValueError, match=r"1 matrices that this model does not train, model\.layers\.7"):
        grades.load_state_dict(state)


def test_steps_must_count_up():
    grades = GradES(qwen3(), GradESConfig(), 10)
    grades.step(1)
    with pytest.raises(ValueError, match="count up"):
        grades.step(1)


def test_done_when_all_are_frozen_and_the_rest_trains_on():
    model = qwen3()
    grades, _, _ = train(model, GradESConfig(metric="grad_norm", tau=1e9, alpha=0.5))
    assert grades.done
    assert set(grades.frozen.values()) == {13}  # ceil(.5 * 24) + 1
    assert model.model.embed_tokens.weight.requires_grad
    grades.unfreeze_all()
    assert all(p.requires_grad for p in model.parameters())
    assert not grades.done


def step_of(model, step, vocabulary=64, scale=1.0):
    """Backward of one batch; the gradients carry the loss scale."""
    batch = torch.randint(0, vocabulary, (2, 8), generator=torch.Generator().manual_seed(step)).to(model.device)
    (model(input_ids=batch, labels=batch).loss * scale).backward()


def test_the_fused_readings_in_the_interpreter():
    if INTERPRETED:
        pytest.skip("this is the interpreter")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "give_the_same_readings"],
        env=triton_environment(TRITON_INTERPRET="1"),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) == 9, run.stdout[-2000:]


@check
@pytest.mark.parametrize("metric", ["grad_change", "grad_norm", "weight_change"])
@pytest.mark.parametrize("build, scale", [(qwen3, 1.0), (qwen3, 1024.0), (qwen3_moe, 1024.0)])
def test_the_kernels_give_the_same_readings_as_torch(monkeypatch, build, metric, scale):
    """Two engines read the same run, one of them with each form."""
    called = {kernels: 0, metrics: 0}
    for module in called:

        def counted(*args, module=module, read=module.read):
            called[module] += 1
            return read(*args)

        monkeypatch.setattr(module, "read", counted)
    model = build(intermediate_size=4096, num_hidden_layers=1).to(DEVICE)
    if build is qwen3:
        model.to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = GradESConfig(metric=metric, tau=0.0, alpha=0.0)
    fused, plain = (GradES(model, config, 10, optimizer) for _ in range(2))
    steps = 4
    for step in range(1, steps + 1):
        step_of(model, step, scale=scale)
        if step == 3:  # other tensors than in the step before
            model.model.layers[0].self_attn.q_proj.weight.grad = None
        for grades, device in ((plain, "none"), (fused, DEVICE)):
            monkeypatch.setattr(engine, "FUSED_ON", device)
            grades.step(step, grad_scale=scale)
        first, after_gap = metric != "grad_norm", metric == "weight_change"
        unread = {1: first * len(plain.matrices), 3: 1, 4: int(after_gap)}.get(step, 0)
        assert len(plain.readings) == len(plain.matrices) - unread
        assert fused.readings == pytest.approx(plain.readings, rel=1e-5)
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(0.5 / scale)  # as clipping does, in place
        optimizer.step()
        optimizer.zero_grad()
    if build is qwen3:
        assert plain._samples["model.layers.0.mlp.up_proj"][0] is not None
    assert called == {kernels: steps, metrics: steps}


class Waits(TorchDispatchMode):
    """Counts what reads values of tensors into Python."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2")
        if func.overloadpacket.__name__ in names:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("metric", ["grad_change", "grad_norm", "weight_change", "agreement"])
def test_a_step_waits_once_for_the_device(monkeypatch, metric, scale):
    transfers = []
    for name in ("tolist", "numpy", "cpu"):  # not seen by a dispatch mode on the CPU
        original = getattr(torch.Tensor, name)

        def counted(self, *args, name=name, original=original):
            transfers.append(name)
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    model = qwen3(intermediate_size=4096)
    grades = GradES(model, GradESConfig(metric=metric, tau=1e9, alpha=0.3), 10, None)
    for step in range(1, 6):
        step_of(model, step, scale=scale)
        transfers.clear()
        with Waits() as waits:
            grades.step(step, grad_scale=scale)
        if step > 1:  # in the first one, samples are drawn
            assert transfers == ([] if step > 4 else ["tolist"])
            assert waits.count == 0
        model.zero_grad()
    assert grades.done  # in step 4, and there was nothing to read in step 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("metric", ["grad_change", "grad_norm", "weight_change"])
def test_a_step_on_a_gpu_waits_once(metric):
    model = qwen3(intermediate_size=4096).to(DEVICE)
    grades = GradES(model, GradESConfig(metric=metric, tau=0.0, alpha=0.0), 10, None)
    for step in range(1, 5):
        step_of(model, step)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                grades.step(step, grad_scale=1024.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if step > 2:  # samples are drawn in the first, kernels compiled in the first two
            assert len([w for w in caught if "synchronizing" in str(w.message)]) == 1


def test_sums_come_back_in_order_from_several_devices(monkeypatch):
    groups = []

    def read(tensors, previous, scale):
        groups.append((tensors[0].device.type, len(tensors)))
        pairs = zip(tensors, previous, strict=True)
        return torch.tensor([[x.numel() / scale, -1.0 if p is None else p.numel()] for x, p in pairs])

    monkeypatch.setattr(metrics, "read", read)
    here, there = torch.zeros(2), torch.zeros(6, device="meta")
    sums = engine._sums([there, here, here, there], [None, here, None, there], 2.0)
    assert sums == [[3, -1], [1, 2], [1, -1], [3, 6]]
    assert groups == [("meta", 2), ("cpu", 2)]


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_what_is_remembered_is_out_of_reach_of_clipping_and_of_the_optimizer(scale):
    """By another route: the gradients of a small and of a sampled matrix, cloned before they are changed."""
    for metric in ("grad_change", "weight_change"):
        model = qwen3(intermediate_size=4096)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        grades = GradES(model, GradESConfig(metric=metric, tau=0.0, alpha=0.0), 10, optimizer)
        names = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj")
        before = {}
        for step in range(1, 4):
            step_of(model, step, scale=scale)
            grades.step(step, grad_scale=scale)
            for name in names:
                weight = grades.matrices[name].parameters[0]
                chosen = grades._samples[name][0]
                now = (weight.grad / scale if metric == "grad_change" else weight.detach()).double().clone()
                if step > 1:
                    difference = now - before[name]
                    if chosen is not None:
                        difference = chosen.take(difference) * chosen.scale
                    assert grades.readings[name] == pytest.approx(difference.abs().sum().item(), rel=1e-4)
                before[name] = now
            for p in model.parameters():
                p.grad.mul_(0.1 / scale)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        assert chosen is not None
