import pytest
import torch

from grades_trl.criteria import measurement, metrics
from grades_trl.criteria.metrics import MIN_ELEMENTS, l1_distances, l1_norms, sample


def test_closed_forms():
    a, b = torch.tensor([[1.0, -2.0], [3.0, 0.0]]), torch.tensor([0.5, -0.5])
    assert l1_norms([a, b]).tolist() == [6.0, 1.0]
    assert l1_distances([a, b], [torch.zeros(2, 2), torch.tensor([0.5, 0.5])]).tolist() == [6.0, 1.0]
    # 255.5 has more digits than bf16.
    far, near = torch.tensor([256.0]).bfloat16(), torch.tensor([0.5]).bfloat16()
    assert l1_distances([far], [near]).tolist() == [255.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_exact_to_1e_5_in_every_dtype(dtype):
    torch.manual_seed(0)
    x, y = (torch.randn(512, 700).to(dtype) for _ in range(2))
    exact = (x.double() - y.double()).abs().sum()
    assert abs(l1_distances([x], [y])[0].double() - exact) / exact < 1e-5
    assert abs(l1_norms([x])[0].double() - x.double().abs().sum()) / x.double().abs().sum() < 1e-5


def test_sums_are_float32_on_one_axis():
    for values in (
        l1_norms([torch.ones(2, dtype=torch.bfloat16)] * 3),
        l1_distances([torch.ones(2)], [torch.ones(2)]),
    ):
        assert values.dtype == torch.float32
        assert values.ndim == 1


def heavy(rows, columns, seed):
    """Like a gradient: rows, columns and single entries of very different size."""
    generator = torch.Generator().manual_seed(seed)
    entries = torch.randn(rows, columns, generator=generator) ** 3
    return entries * torch.rand(rows, 1, generator=generator) ** 3 * torch.rand(columns, generator=generator) ** 2


def test_a_sample_has_its_size_and_is_the_same_whenever_the_name_is():
    x = torch.zeros(1024, 2048)
    first, again, other = (sample(x, 1 / 64, name) for name in ("a", "a", "b"))
    assert first.take(x).numel() == x.numel() // 64
    assert first.scale == 64.0
    assert torch.equal(first.index, again.index)
    assert not torch.equal(first.index, other.index)
    assert len(set(first.index.tolist())) == len(first.index)  # without replacement


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_holds_its_chunks_of_any_layout(dtype):
    x = torch.randn(1024, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    chosen = sample(x, 1 / 64, "w")
    for tensor in (x, x.T, torch.stack([x, x])[1]):
        expected = tensor.flatten().split(16)
        assert torch.equal(chosen.take(tensor), torch.stack([expected[i] for i in chosen.index]))


def test_nothing_is_written():
    x, y = torch.tensor([[1.0, -2.0]]), torch.tensor([[-3.0, 4.0]])
    metrics.l1_sums([x], [y], scale=2.0)
    metrics.l1_sums([x], [y])
    assert x.tolist() == [[1.0, -2.0]]
    assert y.tolist() == [[-3.0, 4.0]]


def test_small_and_odd_tensors_are_measured_as_a_whole():
    assert sample(torch.zeros(128, 256), 1 / 64, "w") is None
    assert sample(torch.zeros(1001, 1001), 1 / 64, "w") is None  # no equal chunks of 8 or more
    assert sample(torch.zeros(2048, 1024), 0.3, "w") is None
    small = sample(torch.zeros(512, 512), 1 / 64, "w")
    assert small.take(torch.zeros(512, 512)).numel() == MIN_ELEMENTS


def test_estimates_are_unbiased_and_within_the_stated_error():
    """Over many draws of chunks: the mean is right, and the spread is what the formula in the docstring says."""
    x = heavy(1024, 1024, seed=0)
    exact = x.abs().sum().item()
    estimates = []
    for draw in range(300):
        chosen = sample(x, 1 / 64, f"draw {draw}")
        estimates.append(l1_norms([chosen.take(x)]).item() * chosen.scale)
    estimates = torch.tensor(estimates)
    sums = x.abs().view(-1, chosen.chunk).sum(1)
    n, total = len(chosen.index), len(sums)
    predicted = (sums.std() / sums.mean() * ((1 - n / total) / n) ** 0.5).item()
    spread = (estimates.std() / exact).item()
    assert spread == pytest.approx(predicted, rel=0.2)
    assert abs(estimates.mean().item() / exact - 1) < 4 * predicted / 300**0.5


def test_sums_come_back_in_order_from_several_devices(monkeypatch):
    groups = []

    def l1_sums(tensors, previous, scale):
        groups.append((tensors[0].device.type, len(tensors)))
        pairs = zip(tensors, previous, strict=True)
        return torch.tensor([[x.numel() / scale, -1.0 if p is None else p.numel()] for x, p in pairs])

    monkeypatch.setattr(metrics, "l1_sums", l1_sums)
    here, there = torch.zeros(2), torch.zeros(6, device="meta")
    sums = measurement.l1_sums([there, here, here, there], [None, here, None, there], 2.0)
    assert sums == [[3, -1], [1, 2], [1, -1], [3, 6]]
    assert groups == [("meta", 2), ("cpu", 2)]


@pytest.mark.parametrize(
    ("norm", "expected"),
    [(0.0, False), (1e-30, True), (1.0, True), (float("inf"), False), (float("nan"), False)],
)
def test_what_counts_as_measured(norm, expected):
    assert measurement.is_measured(norm) == expected
