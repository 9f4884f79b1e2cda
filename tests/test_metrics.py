import pytest
import torch

from grades_trl.metrics import l1_distance, l1_norm


def test_closed_forms():
    a, b = torch.tensor([[1.0, -2.0], [3.0, 0.0]]), torch.tensor([0.5, -0.5])
    assert l1_norm([a]).item() == 6.0
    assert l1_norm([a, b]).item() == 7.0  # Eq. 3: sum |grad A| + sum |grad B|
    assert l1_distance([a, b], [torch.zeros(2, 2), torch.tensor([0.5, 0.5])]).item() == 7.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_exact_to_1e_5_in_every_dtype(dtype):
    torch.manual_seed(0)
    x, y = (torch.randn(512, 700).to(dtype) for _ in range(2))
    exact = (x.double() - y.double()).abs().sum()
    assert abs(l1_distance([x], [y]).double() - exact) / exact < 1e-5
    assert abs(l1_norm([x]).double() - x.double().abs().sum()) / x.double().abs().sum() < 1e-5


def test_readings_are_float32_scalars():
    for value in (l1_norm([torch.ones(2, dtype=torch.bfloat16)]), l1_distance([torch.ones(2)], [torch.ones(2)])):
        assert value.dtype == torch.float32
        assert value.shape == ()
