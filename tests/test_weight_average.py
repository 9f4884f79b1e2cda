"""The running average of the weights: closed forms, its memory, and weights that come back bit for bit."""

import gc
import json
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from grades_trl.weight_average import WeightAverage
from helpers import Toy

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def toy(dtype=torch.float32):
    """All of it trains but for the bias of the head."""
    model = Toy().to(dtype)
    model.head.bias.requires_grad_(False)
    move(model, 0)
    return model


def move(model, seed):
    """Gives the model other weights, and returns a copy of them."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator))
    return weights(model)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def in_model(average, model):
    """What the model has while the average is inside."""
    with average.in_model():
        return weights(model)


@contextmanager
def live_bytes():
    """Gives a function that counts the memory of all tensors made since then, shared storage once, no parameters."""
    gc.collect()
    gc.freeze()  # what was there before is not looked at

    def count():
        gc.collect()
        storages = [t.untyped_storage() for t in gc.get_objects() if type(t) is torch.Tensor]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    yield count


@DTYPES
def test_the_kth_update_counts_k_times(dtype):
    """After n updates it is sum k W_k / sum k, and an update leaves the weights as they are."""
    model = toy(dtype)
    average, path = WeightAverage(model), []
    for seed in range(5):
        path.append(move(model, seed))
        average.update()
        assert equal(weights(model), path[-1])
        exact = {name: sum((k + 1) * w[name].double() for k, w in enumerate(path)) for name in path[0]}
        for name, weight in in_model(average, model).items():
            if name == "head.bias":  # does not train
                assert torch.equal(weight, path[-1][name])
                continue
            count = len(path) * (len(path) + 1) / 2
            tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
            torch.testing.assert_close(weight.double(), exact[name] / count, **tolerance)
    assert average.updates == 5


def test_an_average_of_16_bit_weights_is_rounded_once():
    """It is kept in float32: small movements are not lost between updates."""
    model = toy(torch.bfloat16)
    average, exact = WeightAverage(model), 0.0
    for k in range(1, 9):
        for p in model.parameters():
            p.data.fill_(1.0 + (k == 8) / 128)  # the next number above 1 in bf16
        average.update()
        exact += k * (1.0 + (k == 8) / 128)
    _, tensors = average.state_dict()
    for tensor in tensors.values():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, torch.full_like(tensor, exact / 36))


def test_a_parameter_that_freezes_later_takes_part():
    model = toy()
    average = WeightAverage(model)
    move(model, 1)
    average.update()
    model.layers.requires_grad_(False)
    frozen = model.layers[0].proj.weight.detach().clone()
    average.update()
    average.mark_best()
    model.layers[0].proj.weight.data.zero_()
    average.restore_best()
    assert torch.equal(model.layers[0].proj.weight, frozen)
    assert not model.layers[0].proj.weight.requires_grad


@DTYPES
@pytest.mark.parametrize("best", ["none", "now", "earlier"])
def test_weights_and_average_change_places_bit_for_bit(dtype, best):
    model = toy(dtype)
    average = WeightAverage(model)
    for seed in range(3):
        here = move(model, seed)
        average.update()
        if best == "earlier" and seed == 1:
            average.mark_best()
    if best == "now":
        average.mark_best()
    expected = {name: t.to(dtype) for name, t in average.state_dict()[1].items() if name.startswith("average/")}
    before = {name: t.clone() for name, t in average.state_dict()[1].items()}
    for _ in range(3):  # as it would be seen if something was lost on the way
        with average.in_model():
            inside = weights(model)
        assert equal(weights(model), here)
        assert equal({f"average/{name}": w for name, w in inside.items() if name != "head.bias"}, expected)
        assert equal(average.state_dict()[1], before)


@DTYPES
def test_weights_come_back_when_a_measurement_fails(dtype):
    model = toy(dtype)
    average = WeightAverage(model)
    move(model, 1)
    average.update()
    here = move(model, 2)
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), average.in_model():
            raise error
        assert equal(weights(model), here)


class InterruptBefore(TorchDispatchMode):
    """Ctrl-C before the nth operation on tensors."""

    def __init__(self, n):
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("copy_", "_to_copy", "clone"):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


@DTYPES
def test_weights_come_back_when_a_measurement_is_interrupted(dtype):
    """By Ctrl-C at any moment, also while the average is put into the model or the weights are put back."""
    model = toy(dtype)
    average = WeightAverage(model)
    move(model, 1)
    average.update()
    here, n, interrupted = move(model, 2), 0, True
    while interrupted:
        n += 1
        with InterruptBefore(n) as interrupt:
            try:
                with average.in_model():
                    pass
            except KeyboardInterrupt:
                assert equal(weights(model), here), n
        interrupted = interrupt.left <= 0
    # Each of 6 parameters is copied out, in and back; 32-bit ones change places with the average twice.
    assert n == 1 + 6 * (6 if dtype == torch.float32 else 3)


@DTYPES
def test_the_best_average_is_restored_as_a_whole_when_that_is_interrupted(dtype):
    model = toy(dtype)
    average = WeightAverage(model)
    best = move(model, 1)
    average.update()
    average.mark_best()
    for n in range(1, 6):
        here = move(model, 2)
        with pytest.raises(KeyboardInterrupt), InterruptBefore(n):
            average.restore_best()
        assert equal(weights(model), best | {"head.bias": here["head.bias"]}), n


def test_the_best_average_stays_when_the_average_moves_on():
    model = toy()
    average = WeightAverage(model)
    one = move(model, 1)
    average.update()
    assert not average.has_best
    two = move(model, 2)
    average.update()
    average.mark_best()
    for seed in (3, 4):
        move(model, seed)
        average.update()
    now = in_model(average, model)
    average.restore_best()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.detach(), (one[name] + 2 * two[name]) / 3)
            assert not torch.allclose(p, now[name])


@DTYPES
def test_what_is_restored_is_what_was_measured(dtype):
    model = toy(dtype)
    average = WeightAverage(model)
    for seed in range(4):
        move(model, seed)
        average.update()
        if seed == 2:
            measured = in_model(average, model)
            average.mark_best()
    head = model.head.bias.detach().clone()
    average.restore_best()
    assert equal(weights(model), measured | {"head.bias": head})


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        # The average; the same while it is the best; the best as an earlier one. Inside the model, weights of 32 bits
        # change places with it, and those of 16 bits lie beside it.
        (torch.float32, {"one": (4, 4), "best": (4, 4), "moved on": (8, 8), "best again": (4, 4)}),
        (torch.bfloat16, {"one": (4, 6), "best": (4, 6), "moved on": (6, 8), "best again": (4, 6)}),
    ],
)
def test_at_most_8_bytes_of_host_memory_per_trained_parameter(dtype, expected):
    model = toy(dtype)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    average, found = WeightAverage(model), {}
    assert average.host_bytes == 8 * count
    with live_bytes() as held:

        def note(when):
            beside = held()
            with average.in_model():
                found[when] = beside / count, held() / count

        average.update()
        note("one")
        average.mark_best()
        note("best")
        for _ in range(2):
            average.update()
            note("moved on")
        average.mark_best()
        note("best again")
        average.update()
        average.release()
        assert held() == 0
    assert found == expected
    assert max(max(pair) for pair in found.values()) <= average.host_bytes / count
    assert not average.has_best


@DTYPES
@pytest.mark.parametrize("end", range(1, 7))
def test_an_average_goes_on_where_it_was(dtype, end):
    """Six updates, of which the second and the fourth are the best, interrupted after any of them."""

    def follow(average, model, seeds):
        for seed in seeds:
            move(model, seed)
            average.update()
            if seed in (2, 4):
                average.mark_best()

    straight_model, first_model, second_model = toy(dtype), toy(dtype), toy(dtype)
    straight, first, second = (WeightAverage(model) for model in (straight_model, first_model, second_model))
    follow(straight, straight_model, range(1, 7))
    follow(first, first_model, range(1, end + 1))
    state, tensors = first.state_dict()
    storages = [tensor.untyped_storage().data_ptr() for tensor in tensors.values()]
    assert len(set(storages)) == len(storages)  # safetensors writes no memory twice
    second.load_state_dict(json.loads(json.dumps(state)), {name: t.clone() for name, t in tensors.items()})
    assert second.state_dict()[0] == {"updates": end, "best_is_average": end in (2, 4)}
    follow(second, second_model, range(end + 1, 7))
    assert equal(second.state_dict()[1], straight.state_dict()[1])
    for average in (straight, second):
        average.restore_best()
    assert {name: p.dtype for name, p in weights(second_model).items()} == dict.fromkeys(weights(second_model), dtype)
    for (name, one), (_, other) in zip(
        straight_model.named_parameters(), second_model.named_parameters(), strict=True
    ):
        if one.requires_grad:
            assert torch.equal(one, other), name


@DTYPES
def test_what_a_state_takes(dtype):
    """4 bytes per trained parameter, and as much as the weights have where the best average is an earlier one."""
    model = toy(dtype)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    average = WeightAverage(model)

    def size():
        return sum(t.numel() * t.element_size() for t in average.state_dict()[1].values()) / count

    sizes = []
    for seed in range(3):
        move(model, seed)
        average.update()
        if seed == 1:
            average.mark_best()
        sizes.append(size())
    assert sizes == [4, 4, 4 + dtype.itemsize]


def test_tied_weights_are_averaged_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed_tokens.weight

    model = Tied()
    average = WeightAverage(model)
    one = move(model, 1)["embed_tokens.weight"]
    average.update()
    two = move(model, 2)["embed_tokens.weight"]
    average.update()
    with average.in_model():
        torch.testing.assert_close(model.head.weight.detach(), (one + 2 * two) / 3)
    assert torch.equal(model.head.weight, two)


class Normalized(nn.Module):
    """Its buffers: statistics, and a mask that no checkpoint has."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("mask", torch.ones(3), persistent=False)


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("moves_on", [False, True])
def test_the_best_average_comes_back_with_the_buffers_it_was_measured_with(moves_on, resumed):
    model = Normalized()
    average, measured = WeightAverage(model), {}
    for seed in range(4):
        move(model, seed)
        model.norm(torch.randn(8, 3, generator=torch.Generator().manual_seed(seed)))
        if moves_on or seed < 3:
            average.update()
        if seed == 2:
            with average.in_model():
                measured = {name: t.clone() for name, t in model.state_dict().items() if t.is_floating_point()}
            average.mark_best()
    assert average.host_bytes == 8 * 6 + 4 * 6
    model.mask.zero_()
    if resumed:
        state, tensors = average.state_dict()
        average = WeightAverage(model)
        average.load_state_dict(json.loads(json.dumps(state)), {name: t.clone() for name, t in tensors.items()})
        assert equal(average.state_dict()[1], tensors)
    average.restore_best()
    assert equal({name: t for name, t in model.state_dict().items() if t.is_floating_point()}, measured)
    assert torch.equal(model.mask, torch.zeros(3))
    average.release()
    assert average.state_dict()[1] == {}


@DTYPES
@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("best", [1, 2, 4])
def test_a_parameter_that_a_callback_unfreezes_later_was_what_it_is_until_then(dtype, best, resumed):
    """Its average is exact, and the best average has it, also where that is an earlier one (1) or the present (2)."""
    model = toy(dtype)
    late = model.layers[1].proj.weight.requires_grad_(False)
    average, path = WeightAverage(model), []
    for step in range(1, 5):
        if step == 3:
            late.requires_grad_(True)
        if step == 4 and resumed:
            state, tensors = average.state_dict()
            late.requires_grad_(False)  # until the callback is called again
            average = WeightAverage(model)
            average.load_state_dict(json.loads(json.dumps(state)), {name: t.clone() for name, t in tensors.items()})
        average.follow()
        before = weights(model)
        move(model, step)
        for name, p in model.named_parameters():
            if name == "head.bias" or (p is late and step < 3):
                p.data.copy_(before[name])
        average.update()
        path.append(weights(model))
        if step == best:
            average.mark_best()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}

    def check(found, steps):
        for name, weight in found.items():
            exact = sum((k + 1) * w[name].double() for k, w in enumerate(path[:steps])) / (steps * (steps + 1) / 2)
            torch.testing.assert_close(weight.double(), exact, **tolerance)

    check(in_model(average, model), 4)
    average.restore_best()
    check(weights(model), best)
