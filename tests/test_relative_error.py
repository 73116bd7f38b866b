import pytest
import torch

from timm_nf._relative_error import relative_error


def test_it_is_the_norm_of_the_difference_over_that_of_the_expected():
    assert relative_error(torch.tensor([3.0, 8.0]), torch.tensor([3.0, 4.0])) == 4 / 5
    assert relative_error(torch.tensor([[3.0], [4.0]]), torch.tensor([[3.0], [4.0]])) == 0


def test_it_is_computed_in_float64():
    half = torch.full((1000,), 300.0, dtype=torch.float16)  # the square of one is beyond float16
    assert relative_error(half * 2, half) == pytest.approx(1, rel=1e-12)


def test_other_shapes_are_not_broadcast():
    with pytest.raises(ValueError, match=r"expected shape \(2,\), got \(1,\)"):
        relative_error(torch.ones(1), torch.ones(2))
